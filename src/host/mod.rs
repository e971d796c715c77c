//! The agent's side of Nomad's plugin protocol: starts a driver plugin with the real handshake and calls it as an agent
//! does.
//!
//! The command `run` and the tests use this module to run a driver without an agent. It depends only on the protocol,
//! so that it works with any Nomad driver plugin.

mod alloc;
mod config;
mod log_collector;
mod tls;

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

pub use alloc::{Alloc, TaskDirs};
pub use config::{ConfigMismatch, encode, encode_raw};
pub use log_collector::{Collector, Output};

use crate::{
    cookie::{MAGIC_COOKIE, MAGIC_COOKIE_KEY},
    pb::{
        base::{
            ConfigSchemaRequest, PluginInfoRequest, PluginInfoResponse, SetConfigRequest,
            base_plugin_client::BasePluginClient,
        },
        driver::{InitRequest, driver_client::DriverClient},
        goplugin::{Empty, grpc_controller_client::GrpcControllerClient},
        rpc,
        structs::RecoverableError,
    },
    process::async_command,
};

/// The time within which a plugin must write its handshake line. Nomad has the same limit.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);
/// The time for which Nomad waits for a plugin to shut down before it kills the plugin.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// The time within which a plugin must end after it has closed its standard output.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a plugin can't be used.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The program can't be started.
    #[error("could not start plugin {program}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The plugin wrote no handshake line, or one that Nomad does not accept.
    #[error("plugin {program}: {problem}; its stderr: {stderr}")]
    Handshake {
        /// The program.
        program: PathBuf,
        /// What is wrong with the handshake.
        problem: String,
        /// What the plugin wrote to standard error.
        stderr: String,
    },
    /// The connection to the plugin's socket failed.
    #[error("could not connect to the plugin")]
    Connect(#[from] tonic::transport::Error),
    /// The TLS connection to the plugin failed.
    #[error("could not set up TLS with the plugin")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A call failed.
    #[error("{call}: {}", status.message())]
    Call {
        /// The name of the call.
        call: &'static str,
        /// The plugin's answer.
        status: Box<Status>,
    },
    /// The plugin's schema does not allow a configuration.
    #[error(transparent)]
    Config(#[from] ConfigMismatch),
    /// A directory or FIFO of an allocation can't be created or removed.
    #[error("could not create or remove {path}")]
    File {
        /// The directory or FIFO.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

/// The parameters of a plugin's start.
#[derive(Debug, Clone)]
pub struct PluginCommand {
    /// The program.
    pub program: PathBuf,
    /// The argument 0 of the process, if it is not the program's path.
    pub arg0: Option<OsString>,
    /// The arguments.
    pub args: Vec<String>,
    /// Variables that are added to the environment of this process.
    pub env: Vec<(String, String)>,
    /// Whether to ask for AutoMTLS, as hosts of go-plugin other than Nomad do.
    pub tls: bool,
}

impl PluginCommand {
    /// Makes the parameters to start `program` with this driver's option `--name`, so that the driver's name does not
    /// depend on the file's name.
    pub fn with_name(program: impl Into<PathBuf>, name: &str) -> Self {
        Self { args: vec!["--name".to_owned(), name.to_owned()], ..Self::new(program) }
    }

    /// Makes the parameters with which Nomad starts `program`.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), arg0: None, args: Vec::new(), env: Vec::new(), tls: false }
    }
}

/// A running plugin, and the connection to it.
#[derive(Debug)]
pub struct Plugin {
    /// The process; `None` if another host has started the plugin.
    child: Option<tokio::process::Child>,
    channel: Channel,
    socket: PathBuf,
    stderr: Arc<Mutex<String>>,
    readers: Vec<tokio::task::JoinHandle<()>>,
}

/// The outcome of a plugin's shutdown.
#[derive(Debug)]
pub struct PluginExit {
    /// The exit status; `None` if the plugin had to be killed.
    pub status: Option<ExitStatus>,
    /// The duration of the shutdown.
    pub took: Duration,
    /// What the plugin wrote to standard error; empty if another host has started the plugin.
    pub stderr: String,
}

impl Plugin {
    /// Starts a plugin, performs the handshake and connects to the plugin.
    ///
    /// # Errors
    /// Fails when the plugin does not start, writes a wrong handshake line, or can't be reached.
    pub async fn launch(parameters: &PluginCommand) -> Result<Self, HostError> {
        let program = parameters.program.clone();
        let identity = if parameters.tls { Some(tls::Identity::new()?) } else { None };
        let mut command = async_command(&program);
        command
            .args(&parameters.args)
            .env(MAGIC_COOKIE_KEY, MAGIC_COOKIE)
            .env("PLUGIN_PROTOCOL_VERSIONS", "2")
            .env("PLUGIN_MIN_PORT", "10000")
            .env("PLUGIN_MAX_PORT", "25000")
            .envs(parameters.env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if let Some(arg0) = &parameters.arg0 {
            command.arg0(arg0);
        }
        if let Some(identity) = &identity {
            command.env("PLUGIN_CLIENT_CERT", identity.pem());
        }
        let mut child = command.spawn().map_err(|source| HostError::Spawn { program: program.clone(), source })?;
        let stderr = Arc::new(Mutex::new(String::new()));
        let mut readers = Vec::new();
        if let Some(pipe) = child.stderr.take() {
            let stderr = stderr.clone();
            readers.push(tokio::spawn(async move {
                let mut lines = BufReader::new(pipe).lines();
                while let Ok(Some(line)) = lines.next_line().await {
                    let mut all = stderr.lock();
                    all.push_str(&line);
                    all.push('\n');
                }
            }));
        }
        let refused = |problem: String| {
            let stderr = stderr.lock().trim().to_owned();
            HostError::Handshake { program: program.clone(), problem, stderr }
        };
        let pipe = child.stdout.take().ok_or_else(|| refused("it has no standard output".to_owned()))?;
        let mut lines = BufReader::new(pipe).lines();
        let line = match tokio::time::timeout(HANDSHAKE_TIMEOUT, lines.next_line()).await {
            Ok(Ok(Some(line))) => line,
            Ok(Ok(None)) => {
                let end = async {
                    let _ = child.wait().await;
                    for reader in readers {
                        let _ = reader.await;
                    }
                };
                // A program may close its standard output and run on, or leave its standard error to another process.
                let problem = match tokio::time::timeout(END_TIMEOUT, end).await {
                    Ok(()) => "it ended without a handshake line",
                    Err(_) => "it closed its standard output without a handshake line",
                };
                return Err(refused(problem.to_owned()));
            }
            Ok(Err(error)) => return Err(refused(error.to_string())),
            Err(_) => return Err(refused(format!("no handshake line within {} s", HANDSHAKE_TIMEOUT.as_secs()))),
        };
        // The plugin's standard output is read as long as the plugin runs, because a full pipe would block it.
        readers.push(tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} }));
        let (socket, certificate) = parse_handshake(&line).map_err(refused)?;
        let channel = connect(&socket, identity, certificate).await?;
        Ok(Self { child: Some(child), channel, socket, stderr, readers })
    }

    /// Connects to a plugin that another host has started and left running, as a new agent does.
    ///
    /// # Errors
    /// Fails when the plugin can't be reached.
    pub async fn reattach(socket: &Path) -> Result<Self, HostError> {
        let channel = connect(socket, None, String::new()).await?;
        let readers = Vec::new();
        Ok(Self { child: None, channel, socket: socket.to_owned(), stderr: Arc::default(), readers })
    }

    /// Closes the plugin's pipes and leaves it running, as an agent that dies does. Returns the process, for which the
    /// caller can wait.
    pub fn detach(mut self) -> Option<tokio::process::Child> {
        for reader in self.readers.drain(..) {
            reader.abort();
        }
        self.child.take()
    }

    /// Returns the plugin's pid, if this process has started it.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref()?.id()
    }

    /// Waits for the plugin's end, and returns its exit status.
    ///
    /// # Errors
    /// Fails when another host has started the plugin, or waiting fails.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        match &mut self.child {
            Some(child) => child.wait().await,
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Returns the plugin's socket, by which another host can reattach.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns what the plugin has written to standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.lock().clone()
    }

    /// Returns the connection, for services that have no method here.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Returns a client of the driver service.
    pub fn driver(&self) -> DriverClient<Channel> {
        DriverClient::new(self.channel.clone()).max_decoding_message_size(usize::MAX)
    }

    /// Returns a client of the base service.
    pub fn base(&self) -> BasePluginClient<Channel> {
        BasePluginClient::new(self.channel.clone())
    }

    /// Returns the plugin's name, type and versions.
    ///
    /// # Errors
    /// Fails when the call fails.
    pub async fn info(&self) -> Result<PluginInfoResponse, HostError> {
        let answer = self.base().plugin_info(PluginInfoRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(call_error("PluginInfo"))
    }

    /// Configures the plugin as an agent does: decodes the configuration by the plugin's schema, sends it, and calls
    /// `Init`.
    ///
    /// # Errors
    /// Fails when the schema or the plugin refuses the configuration.
    pub async fn configure(&self, config: &serde_json::Value) -> Result<(), HostError> {
        let schema =
            self.base().config_schema(ConfigSchemaRequest {}).await.map_err(call_error("ConfigSchema"))?.into_inner();
        let msgpack_config = encode(schema.spec.as_ref(), config)?;
        let request =
            SetConfigRequest { msgpack_config, plugin_api_version: "v0.1.0".to_owned(), ..Default::default() };
        self.base().set_config(request).await.map_err(call_error("SetConfig"))?;
        match self.driver().init(InitRequest {}).await {
            Err(status) if status.code() != Code::Unimplemented => Err(call_error("Init")(status)),
            _ => Ok(()),
        }
    }

    /// Asks the plugin to shut down as an agent does, and kills it if it has not ended within 2 s.
    pub async fn shut_down(self) -> PluginExit {
        self.shut_down_within(SHUTDOWN_TIMEOUT).await
    }

    /// Asks the plugin to shut down, and kills it if it has not ended within `timeout`.
    pub async fn shut_down_within(mut self, timeout: Duration) -> PluginExit {
        let began = Instant::now();
        let shutdown = async {
            let _ = GrpcControllerClient::new(self.channel.clone()).shutdown(Empty {}).await;
            match &mut self.child {
                Some(child) => child.wait().await.ok(),
                None => None,
            }
        };
        let status = tokio::time::timeout(timeout, shutdown).await.ok().flatten();
        let took = began.elapsed();
        if let (None, Some(child)) = (status, &mut self.child) {
            let _ = child.kill().await;
        }
        // An agent waits for the end of both pipes. If a child of the plugin has inherited them, they end later, so the
        // wait is limited here.
        for reader in std::mem::take(&mut self.readers) {
            let _ = tokio::time::timeout(timeout, reader).await;
        }
        PluginExit { status, took, stderr: self.stderr() }
    }

    /// Kills the plugin with SIGKILL.
    pub async fn kill(mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill().await;
        }
    }
}

/// Returns a function that turns the status of a failed call into an error with the call's name.
pub fn call_error(call: &'static str) -> impl Fn(Status) -> HostError {
    move |status| HostError::Call { call, status: Box::new(status) }
}

/// Returns whether Nomad's restart policy applies to this error (Nomad's rule: docs/protocol/nomad-plugin.md#4.1).
pub fn is_recoverable(status: &Status) -> bool {
    if status.code() != Code::FailedPrecondition {
        return false;
    }
    let first = rpc::Status::decode(status.details()).ok().and_then(|status| status.details.into_iter().next());
    first.is_some_and(|any| {
        any.type_url.ends_with("hashicorp.nomad.plugins.shared.structs.RecoverableError")
            && RecoverableError::decode(&any.value[..]).is_ok_and(|error| error.recoverable)
    })
}

/// Parses a handshake line, `1|2|unix|<path>|grpc|<certificate>`, and returns the socket and the certificate.
fn parse_handshake(line: &str) -> Result<(PathBuf, String), String> {
    let fields: Vec<&str> = line.trim_end().split('|').collect();
    match fields[..] {
        ["1", "2", "unix", socket, "grpc", ref rest @ ..] => {
            Ok((PathBuf::from(socket), rest.first().copied().unwrap_or_default().to_owned()))
        }
        _ => Err(format!("unexpected handshake line {line:?}")),
    }
}

async fn connect(socket: &Path, identity: Option<tls::Identity>, certificate: String) -> Result<Channel, HostError> {
    let endpoint = Endpoint::from_static("http://unused");
    let path = socket.to_owned();
    let channel = match identity {
        None => {
            endpoint
                .connect_with_connector(tower::service_fn(move |_| {
                    let path = path.clone();
                    async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
                }))
                .await?
        }
        Some(identity) => {
            let connector = identity.connector(&certificate)?;
            endpoint
                .connect_with_connector(tower::service_fn(move |_| {
                    let (path, connector) = (path.clone(), connector.clone());
                    async move {
                        let stream = tokio::net::UnixStream::connect(path).await?;
                        let name = rustls::pki_types::ServerName::try_from("localhost").map_err(io::Error::other)?;
                        connector.connect(name, stream).await.map(TokioIo::new)
                    }
                }))
                .await?
        }
    };
    Ok(channel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handshake_lines_are_read_as_nomad_reads_them() {
        assert_eq!(parse_handshake("1|2|unix|/tmp/x|grpc|"), Ok((PathBuf::from("/tmp/x"), String::new())));
        assert_eq!(parse_handshake("1|2|unix|/tmp/x|grpc|abc|false"), Ok((PathBuf::from("/tmp/x"), "abc".to_owned())));
        assert!(parse_handshake("1|1|unix|/tmp/x|grpc|").is_err());
        assert!(parse_handshake("hello").is_err());
    }

    #[tokio::test]
    async fn a_program_that_closes_its_output_and_runs_on_is_refused() {
        let script = "exec >&-; echo closed >&2; exec sleep 600";
        let args = ["-c", script].map(str::to_owned).to_vec();
        let error =
            Plugin::launch(&PluginCommand { args, ..PluginCommand::new("/bin/sh") }).await.expect_err("refused");
        let text = error.to_string();
        assert!(text.contains("closed its standard output") && text.contains("closed"), "{text}");
    }
}
