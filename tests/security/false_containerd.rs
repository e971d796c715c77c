//! A containerd that lies: a proxy before the real containerd that changes some of its answers.

use std::{
    convert::Infallible,
    fs,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use nomad_driver_shim::ids::random_hex;
use prost::Message;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    body::Body,
    codegen::{Bytes, http},
    transport::{Channel, Endpoint, Server},
};
use tower::{Service, ServiceExt as _};

use crate::support::services;

/// The calls whose answers can be changed.
const LIED_ABOUT: [&str; 3] = ["/View", "/Mounts", "/Version"];

/// Turns an answer's body into another one. The first argument is the call's HTTP/2 path.
pub(crate) type Lie = Arc<dyn Fn(&str, Bytes) -> Bytes + Send + Sync>;

/// Starts the proxy and returns its socket. The proxy ends with the test.
pub(crate) fn start(lie: Lie) -> PathBuf {
    let dir = services().root.join(format!("false-containerd-{}", random_hex(3)));
    fs::create_dir_all(&dir).unwrap();
    let socket = dir.join("sock");
    let listener = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
    let connect = |_| async { UnixStream::connect(&services().containerd).await.map(TokioIo::new) };
    let real = Endpoint::from_static("http://containerd").connect_with_connector_lazy(tower::service_fn(connect));
    tokio::spawn(Server::builder().serve_with_incoming(Proxy { real, lie }, listener));
    socket
}

/// A gRPC message as it is in an answer's body: not compressed, with its length before it.
pub(crate) fn framed(message: &impl Message) -> Bytes {
    let bytes = message.encode_to_vec();
    let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
    [&[0][..], &length, &bytes].concat().into()
}

#[derive(Clone)]
struct Proxy {
    real: Channel,
    lie: Lie,
}

impl Service<http::Request<Body>> for Proxy {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (real, lie) = (self.real.clone(), self.lie.clone());
        Box::pin(async move {
            let path = request.uri().path().to_owned();
            let answer = real.oneshot(request).await.unwrap();
            // A refusal has its status in the headers and no message.
            if answer.headers().contains_key("grpc-status") {
                return Ok(answer);
            }
            // A call that streams in both directions would wait for its own request here, so its answer is passed on.
            if !LIED_ABOUT.iter().any(|call| path.ends_with(call)) {
                return Ok(answer);
            }
            let (head, body) = answer.into_parts();
            let whole = body.collect().await.unwrap();
            let trailers = whole.trailers().cloned();
            let body = Full::new(lie(&path, whole.to_bytes())).with_trailers(async { trailers.map(Ok) });
            Ok(http::Response::from_parts(head, Body::new(body)))
        })
    }
}
