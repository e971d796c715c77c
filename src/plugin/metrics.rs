//! The metrics endpoint: `GET /metrics` on an address or a unix socket of the operator's choice.

use std::{convert::Infallible, io, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
};

use super::connections::listen_root_only;
use crate::{
    peer::AllowedPeers,
    task::{Engine, MetricsAddress},
};

/// How long a scraper may take to send its request. Scrapers send it as soon as they are connected.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// A listener at an address or at a unix socket.
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A scraper's connection.
trait Connection: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Connection for T {}

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Connection>> {
        Ok(match self {
            Self::Tcp(listener) => Box::new(listener.accept().await?.0),
            Self::Unix(listener) => {
                let stream = listener.accept().await?.0;
                AllowedPeers::root()
                    .check(&stream)
                    .map_err(|error| io::Error::new(io::ErrorKind::PermissionDenied, error))?;
                Box::new(stream)
            }
        })
    }
}

/// Answers scrapers for as long as the plugin runs.
///
/// # Errors
/// When the plugin can't listen at the address.
pub(crate) async fn serve(engine: Engine, address: &MetricsAddress) -> io::Result<()> {
    let listener = match address {
        MetricsAddress::Tcp(address) => Listener::Tcp(TcpListener::bind(address).await?),
        MetricsAddress::Unix(path) => Listener::Unix(listen_root_only(path)?),
    };
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok(stream) => drop(tokio::spawn(serve_connection(engine.clone(), stream))),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    tracing::warn!(%error, "a connection to the metrics socket was refused");
                }
                Err(error) => {
                    tracing::warn!(%error, "could not accept a connection to the metrics endpoint");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    });
    Ok(())
}

async fn serve_connection(engine: Engine, stream: Box<dyn Connection>) {
    let service = service_fn(move |request| answer(engine.clone(), request));
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).keep_alive(false);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "a scraper's connection to the metrics endpoint failed");
    }
}

async fn answer(engine: Engine, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let found = request.method() == Method::GET && request.uri().path() == "/metrics";
    let (status, text) = if found {
        (StatusCode::OK, engine.metrics())
    } else {
        (StatusCode::NOT_FOUND, "only GET /metrics is served here\n".to_owned())
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}
