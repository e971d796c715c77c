//! go-plugin's own services: the broker and stdio streams that Nomad opens and never uses, and the controller by which
//! it asks us to leave.

use std::pin::Pin;

use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::presence::Leave;
use crate::pb::goplugin::{
    ConnInfo, Empty, StdioData, grpc_broker_server::GrpcBroker, grpc_controller_server::GrpcController,
    grpc_stdio_server::GrpcStdio,
};

/// A stream that stays open and says nothing, until the client goes.
type Silent<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Broker: accepted, held open, never used.
#[derive(Debug)]
pub struct Broker;

#[tonic::async_trait]
impl GrpcBroker for Broker {
    type StartStreamStream = Silent<ConnInfo>;

    async fn start_stream(&self, _: Request<Streaming<ConnInfo>>) -> Result<Response<Self::StartStreamStream>, Status> {
        Ok(Response::new(Box::pin(tokio_stream::pending())))
    }
}

/// Stdio: nothing is ever sent; Nomad would throw it away.
#[derive(Debug)]
pub struct Stdio;

#[tonic::async_trait]
impl GrpcStdio for Stdio {
    type StreamStdioStream = Silent<StdioData>;

    async fn stream_stdio(&self, _: Request<()>) -> Result<Response<Self::StreamStdioStream>, Status> {
        Ok(Response::new(Box::pin(tokio_stream::pending())))
    }
}

/// Controller: tells the server that it is time to leave.
#[derive(Debug)]
pub struct Controller {
    /// Set once.
    pub leave: watch::Sender<Leave>,
}

#[tonic::async_trait]
impl GrpcController for Controller {
    async fn shutdown(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        tracing::debug!("asked to leave");
        self.leave.send_replace(Leave::Ending);
        Ok(Response::new(Empty {}))
    }
}
