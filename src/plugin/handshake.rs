//! go-plugin's handshake and the lifetime of the plugin process: magic cookie, protocol versions, socket, the one line
//! on stdout, and a prompt exit when asked.

use std::{
    env, fs, io,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Server, server::Connected};

use super::{
    base::Base,
    connections::{ConnectionGuard, Connections, ShutdownMode},
    goplugin::{Broker, Controller, Stdio},
    service::DriverService,
    sockets,
    tls::{self, TlsError},
};
use crate::{
    cookie::{MAGIC_COOKIE, MAGIC_COOKIE_KEY},
    files::listen_privately,
    ids::DriverName,
    pb::{
        base::base_plugin_server::BasePluginServer,
        driver::driver_server::DriverServer,
        goplugin::{
            grpc_broker_server::GrpcBrokerServer, grpc_controller_server::GrpcControllerServer,
            grpc_stdio_server::GrpcStdioServer,
        },
    },
    peer::AllowedPeers,
    places::SOCKET_PATH_MAX,
};

/// The version of the application protocol of every Nomad since 0.9.
const PROTOCOL_VERSION: &str = "2";
/// The timeout of a TLS handshake, which takes a millisecond on a local socket.
const TLS_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a plugin whose settings can't be read keeps running without an agent.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(600);
/// The delay before the plugin exits, in which the answer to `Shutdown` is sent.
const SHUTDOWN_ANSWER_DELAY: Duration = Duration::from_millis(10);

/// Why the plugin can't serve.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The host does not offer this plugin's protocol version.
    #[error(
        "the host offers plugin protocol versions {0:?}; this plugin has only version {PROTOCOL_VERSION} (Nomad 0.9 and newer)"
    )]
    Version(String),
    /// The socket can't be created.
    #[error("could not create the plugin's socket {path}")]
    Socket {
        /// The socket, or its directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The socket's path would be too long.
    #[error(
        "plugin socket {0} would be longer than {SOCKET_PATH_MAX} bytes; set TMPDIR or PLUGIN_UNIX_SOCKET_DIR to a shorter path"
    )]
    TooLong(PathBuf),
    /// The socket's group is not known.
    #[error("PLUGIN_UNIX_SOCKET_GROUP {0:?} is neither a group nor a number")]
    Group(String),
    /// AutoMTLS can't be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The handshake line can't be written.
    #[error("could not write the handshake line")]
    Line(#[source] io::Error),
    /// The gRPC server failed.
    #[error("could not serve the plugin's socket")]
    Serve(#[from] tonic::transport::Error),
}

/// Says whether this process was started by Nomad, or by another host of plugins that knows the cookie.
pub fn is_plugin() -> bool {
    env::var(MAGIC_COOKIE_KEY).is_ok_and(|cookie| cookie == MAGIC_COOKIE)
}

/// Serves as a plugin called `name` until the host asks the plugin to shut down.
///
/// # Errors
/// When the handshake or the server fails.
pub async fn serve(name: DriverName) -> Result<(), HandshakeError> {
    let offered = env::var("PLUGIN_PROTOCOL_VERSIONS").unwrap_or_else(|_| PROTOCOL_VERSION.to_owned());
    if !offered.split(',').any(|version| version.trim() == PROTOCOL_VERSION) {
        return Err(HandshakeError::Version(offered));
    }
    ignore_interrupt();
    let tls = env::var("PLUGIN_CLIENT_CERT").ok().filter(|pem| !pem.is_empty());
    let tls = tls.map(|pem| tls::server_tls(&pem)).transpose()?;
    let (listener, socket, peers) = listen()?;
    let guard = SocketFileGuard(socket.clone());

    let (shutdown_sender, mut shutdown_receiver) = watch::channel(ShutdownMode::NotRequested);
    let (health_reporter, health) = tonic_health::server::health_reporter();
    health_reporter.set_service_status("plugin", tonic_health::ServingStatus::Serving).await;
    let clients = Connections::default();
    let driver = DriverService::new(name.clone(), shutdown_sender.clone(), clients.clone());
    // The host accepts messages of up to 2 GiB. The plugin's answers are small, but a job can make requests large.
    let server = Server::builder()
        .add_service(health)
        .add_service(GrpcBrokerServer::new(Broker))
        .add_service(GrpcStdioServer::new(Stdio))
        .add_service(GrpcControllerServer::new(Controller { shutdown_mode: shutdown_sender }))
        .add_service(BasePluginServer::new(Base::new(driver.clone())).max_decoding_message_size(usize::MAX))
        .add_service(DriverServer::new(driver.clone()).max_decoding_message_size(usize::MAX));
    let acceptor = tls.as_ref().map(|tls| TlsAcceptor::from(tls.config.clone()));
    let serving = server.serve_with_incoming(accept(listener, peers, acceptor, clients.clone()));

    let certificate = tls.map(|tls| tls.certificate).unwrap_or_default();
    let multiplexing = if env::var_os("PLUGIN_MULTIPLEX_GRPC").is_some() { "|false" } else { "" };
    print_line(&format!("1|{PROTOCOL_VERSION}|unix|{}|grpc|{certificate}{multiplexing}\n", socket.display()))?;
    tracing::debug!(%name, version = env!("CARGO_PKG_VERSION"), "the plugin serves requests");

    let terminated = async {
        // systemd sends SIGTERM to the agent's whole cgroup. The plugin then exits without touching tasks, as Go
        // plugins do.
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        outcome = serving => outcome?,
        _ = shutdown_receiver.wait_for(|mode| *mode != ShutdownMode::NotRequested) => {}
        () = terminated => {}
        () = wait_until_orphaned(&clients, &driver) => {
            tracing::warn!(
                "no agent has been connected for state.orphan_timeout; the plugin exits, and its tasks keep running"
            );
        }
    }
    let mode = *shutdown_receiver.borrow();
    driver.shut_down(mode).await;
    tokio::time::sleep(SHUTDOWN_ANSWER_DELAY).await;
    drop(guard);
    Ok(())
}

/// Returns when no agent has been connected for as long as the settings allow.
async fn wait_until_orphaned(clients: &Connections, driver: &DriverService) {
    let mut since = tokio::time::Instant::now();
    loop {
        let limit = driver.settings().map_or(ORPHAN_TIMEOUT, |settings| settings.orphan_timeout);
        if clients.any_connected() {
            since = tokio::time::Instant::now();
        } else if since.elapsed() >= limit {
            return;
        }
        tokio::time::sleep((limit / 10).clamp(Duration::from_millis(50), Duration::from_secs(10))).await;
    }
}

/// Ignores SIGINT: a terminal's Ctrl-C goes to the whole process group, and only the agent may act on it.
fn ignore_interrupt() {
    // SAFETY: ignoring a signal installs no handler and touches no memory.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
}

#[allow(clippy::print_stdout, reason = "go-plugin reads this one line from stdout")]
fn print_line(line: &str) -> Result<(), HandshakeError> {
    use io::Write as _;
    let mut stdout = io::stdout().lock();
    stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush()).map_err(HandshakeError::Line)
}

/// Removes the socket's file when it is dropped, on success as well as on failure.
struct SocketFileGuard(PathBuf);

impl Drop for SocketFileGuard {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Creates the socket. Returns it with its path and with the peers that may connect to it: root, and the members of the
/// group that the host asks for.
fn listen() -> Result<(UnixListener, PathBuf, AllowedPeers), HandshakeError> {
    let directory = sockets::directory();
    let path =
        sockets::new_path(&directory).map_err(|source| HandshakeError::Socket { path: directory.clone(), source })?;
    if path.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(HandshakeError::TooLong(path));
    }
    let failed = |source| HandshakeError::Socket { path: path.clone(), source };
    let listener = listen_privately(&path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let listener = UnixListener::from_std(listener).map_err(failed)?;
    let mut peers = AllowedPeers::root();
    if let Some(group) = env::var("PLUGIN_UNIX_SOCKET_GROUP").ok().filter(|group| !group.is_empty()) {
        let known = nix::unistd::Group::from_name(&group).ok().flatten().map(|group| group.gid.as_raw());
        let gid = known.or_else(|| group.parse().ok()).ok_or(HandshakeError::Group(group))?;
        std::os::unix::fs::chown(&path, None, Some(gid)).map_err(failed)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).map_err(failed)?;
        peers = AllowedPeers::with_group(Some(gid));
    }
    Ok((listener, path, peers))
}

/// Returns connections as they come, after their TLS handshake. A client whose handshake is slow or fails does not
/// delay other clients, and a client that may not connect does not count as an agent.
fn accept(
    listener: UnixListener,
    peers: AllowedPeers,
    tls: Option<TlsAcceptor>,
    clients: Connections,
) -> ReceiverStream<io::Result<HostConnection>> {
    let (send, receive) = mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Most likely this process has no file descriptors left, so accepting is tried again.
                    tracing::warn!(%error, "could not accept a connection to the plugin's socket");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            if let Err(error) = peers.check(&stream) {
                tracing::warn!(error = crate::error_chain(&error), "a connection to the plugin's socket was refused");
                continue;
            }
            let (send, tls, guard) = (send.clone(), tls.clone(), clients.register());
            tokio::spawn(async move {
                let stream = match tls {
                    None => HostConnection::Plain(stream, guard),
                    Some(tls) => match tokio::time::timeout(TLS_HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
                        Ok(Ok(stream)) => HostConnection::Tls(Box::new(stream), guard),
                        Ok(Err(error)) => return tracing::warn!(%error, "the TLS handshake of a client failed"),
                        Err(_) => return tracing::warn!("the TLS handshake of a client timed out"),
                    },
                };
                let _ = send.send(Ok(stream)).await;
            });
        }
    });
    ReceiverStream::new(receive)
}

/// A connection from the agent, or from another host of plugins.
enum HostConnection {
    Plain(UnixStream, #[allow(dead_code, reason = "counts as a connection until it is dropped")] ConnectionGuard),
    Tls(
        Box<TlsStream<UnixStream>>,
        #[allow(dead_code, reason = "counts as a connection until it is dropped")] ConnectionGuard,
    ),
}

impl Connected for HostConnection {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for HostConnection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream, _) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream, _) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for HostConnection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream, _) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream, _) => Pin::new(stream).poll_write(cx, buf),
        }
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream, _) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream, _) => Pin::new(stream).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream, _) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream, _) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
