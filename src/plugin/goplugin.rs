//! go-plugin's own services: the broker and stdio streams, which Nomad opens and never uses, and the controller, with
//! which the agent shuts the plugin down.

use std::pin::Pin;

use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::connections::ShutdownMode;
use crate::pb::goplugin::{
    ConnInfo, Empty, StdioData, grpc_broker_server::GrpcBroker, grpc_controller_server::GrpcController,
    grpc_stdio_server::GrpcStdio,
};

/// A stream that stays open without messages until the client disconnects.
type SilentStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The broker service: its stream is accepted and held open, and never used.
#[derive(Debug)]
pub(crate) struct Broker;

#[tonic::async_trait]
impl GrpcBroker for Broker {
    type StartStreamStream = SilentStream<ConnInfo>;

    async fn start_stream(&self, _: Request<Streaming<ConnInfo>>) -> Result<Response<Self::StartStreamStream>, Status> {
        Ok(Response::new(Box::pin(tokio_stream::pending())))
    }
}

/// The stdio service: nothing is ever sent, since Nomad would discard it.
#[derive(Debug)]
pub(crate) struct Stdio;

#[tonic::async_trait]
impl GrpcStdio for Stdio {
    type StreamStdioStream = SilentStream<StdioData>;

    async fn stream_stdio(&self, _: Request<()>) -> Result<Response<Self::StreamStdioStream>, Status> {
        Ok(Response::new(Box::pin(tokio_stream::pending())))
    }
}

/// The controller service: shuts the plugin down when the agent asks for it.
#[derive(Debug)]
pub(crate) struct Controller {
    /// The controller sets this to `ShutdownMode::Exit` when the agent asks the plugin to shut down.
    pub shutdown_mode: watch::Sender<ShutdownMode>,
}

#[tonic::async_trait]
impl GrpcController for Controller {
    async fn shutdown(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        tracing::debug!("the agent asked the plugin to shut down");
        self.shutdown_mode.send_replace(ShutdownMode::Exit);
        Ok(Response::new(Empty {}))
    }
}
