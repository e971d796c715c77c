//! Typed calls of the Task service over one ttrpc connection. Every call but `wait` has a timeout.
//!
//! Shims before 2.0 serve `containerd.task.v2.Task`, later shims serve `containerd.task.v3.Task`. The messages are the
//! same, and only the name of the service differs. The client finds out the version once for each connection.

use std::{io, path::Path, sync::Arc, time::Duration};

use parking_lot::Mutex;
use protobuf::{
    Message, MessageField,
    well_known_types::{any::Any, timestamp::Timestamp},
};
use tokio::sync::Semaphore;
use ttrpc::{Error as TtrpcError, proto::Request};

use super::{
    CallKind, RefusalCode, RuntimeCalls, ShimError,
    connection::{ConnectionState, WatchedStream},
};
use crate::{
    pb::shim as wire,
    peer::AllowedPeers,
    text::{self, EXCERPT_MAX},
};

/// The timeout of Create. runc needs 12 to 20 ms on an idle host, and was seen to take seconds on a loaded one with a
/// cold disk.
const CREATE_TIMEOUT: Duration = Duration::from_secs(60);
/// The timeout of Start. `runc start` takes 3 to 6 ms.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// The timeout of Kill, for which the shim runs the runtime as well.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// The timeout of Delete. The shim drains the container's output for up to 10 s before it answers.
const DELETE_TIMEOUT: Duration = Duration::from_secs(45);
/// The timeout of calls that the shim answers from memory.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// The timeout of the first answer of a shim that has been running for a while.
pub const CONNECT_TIMEOUT: Duration = QUERY_TIMEOUT;

/// The exec id that stands for a container's first process.
const INIT_EXEC_ID: &str = "";

/// The version of the Task service that a shim serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskApi {
    /// The version of shims 1.x and of gVisor's shim.
    V2,
    /// The version of shims since 2.0.
    V3,
}

impl TaskApi {
    const fn service(self) -> &'static str {
        match self {
            Self::V2 => "containerd.task.v2.Task",
            Self::V3 => "containerd.task.v3.Task",
        }
    }
}

/// The arguments of [`Client::create`].
#[derive(Debug, Clone)]
pub struct CreateTask<'a> {
    /// The id of the container.
    pub id: &'a str,
    /// The container's bundle, with its root file system mounted.
    pub bundle: &'a Path,
    /// A FIFO for standard output. If it is empty, the process has no output and `stderr` must be empty, too.
    pub stdout: &'a str,
    /// A FIFO for standard error; empty if `stdout` is empty.
    pub stderr: &'a str,
    /// The runtime options for the shim.
    pub runtime: RuntimeOptions<'a>,
    /// Whether the process has a terminal, whose output goes to `stdout`.
    pub terminal: bool,
}

/// The options by which a shim knows the runtime to call, and the runtime's settings.
#[derive(Debug, Clone, Copy)]
pub enum RuntimeOptions<'a> {
    /// The options of runc's shim.
    Runc {
        /// The OCI runtime's program.
        binary: &'a Path,
        /// The OCI runtime's state root, to which the shim appends its namespace.
        root: &'a Path,
    },
    /// A configuration file for any other shim (`runtimeoptions.v1.Options`).
    File {
        /// The type URL of the file's content.
        kind: &'a str,
        /// The path of the file.
        path: &'a Path,
    },
    /// No options: the shim uses its own defaults.
    Default,
}

impl RuntimeOptions<'_> {
    fn encode(self) -> Result<Option<Any>, ShimError> {
        let (type_url, value) = match self {
            Self::Default => return Ok(None),
            Self::Runc { binary, root } => {
                let options = wire::RuncOptions {
                    binary_name: binary.to_string_lossy().into_owned(),
                    root: root.to_string_lossy().into_owned(),
                    ..Default::default()
                };
                ("containerd.runc.v1.Options", options.write_to_bytes())
            }
            Self::File { kind, path } => {
                let options = wire::FileOptions {
                    type_url: kind.to_owned(),
                    config_path: path.to_string_lossy().into_owned(),
                    ..Default::default()
                };
                ("runtimeoptions.v1.Options", options.write_to_bytes())
            }
        };
        let value = value.map_err(|error| malformed("Create", &error))?;
        Ok(Some(Any { type_url: type_url.to_owned(), value, ..Default::default() }))
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, 0 to 255. For a process that signal n has killed it is 128 + n.
    pub code: u32,
    /// The time of the exit in seconds and nanoseconds since the epoch, by the shim's clock, if the shim reports it.
    pub exited_at: Option<(i64, i32)>,
}

impl Exit {
    pub(super) fn new(code: u32, at: Option<&Timestamp>) -> Self {
        Self { code, exited_at: at.map(|time| (time.seconds, time.nanos)) }
    }
}

/// The arguments of [`Client::exec`]: a further process in a container.
#[derive(Debug, Clone)]
pub struct ExecProcess<'a> {
    /// The id of the container.
    pub id: &'a str,
    /// The id of the process within the container.
    pub exec_id: &'a str,
    /// Whether the process gets a terminal, whose output goes to `stdout`.
    pub terminal: bool,
    /// A FIFO for standard input, or empty for none.
    pub stdin: &'a str,
    /// A FIFO for standard output.
    pub stdout: &'a str,
    /// A FIFO for standard error; empty with a terminal.
    pub stderr: &'a str,
    /// The OCI description of the process, as JSON.
    pub spec: Vec<u8>,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowSize {
    /// The number of columns.
    pub width: u32,
    /// The number of lines.
    pub height: u32,
}

/// The processes that a signal goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalTarget {
    /// Only the container's first process.
    Init,
    /// All processes of the container.
    All,
}

/// A connection to one shim. It is cheap to clone, and calls on it run concurrently.
#[derive(Clone)]
pub struct Client {
    inner: ttrpc::asynchronous::Client,
    connection: ConnectionState,
    api: TaskApi,
    /// A lock that is held while a call is polled. The library numbers a request and queues it in two steps, and shims
    /// since 2.0 refuse a request that overtakes another one in between ("StreamID ... must increment"). The lock makes
    /// both steps one.
    send_order: Arc<Mutex<()>>,
    /// The permits for Create: one for shims 1.x, which hold a lock over Create that the reader of their children's
    /// exits takes for each exit. With many concurrent Creates, 32 exits are soon unread, and each further one stops
    /// the shim for a second (containerd, sys/reaper). The Creates therefore wait here instead.
    create_permits: Arc<Semaphore>,
    /// Counts the calls in which the shim runs a runtime.
    runtime_calls: RuntimeCalls,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("api", &self.api).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to a shim that has been running for a while, and finds out which service the shim serves. The service
    /// `hint` is tried first.
    ///
    /// # Errors
    /// Fails when the shim does not answer within 10 s, or serves neither service.
    pub async fn connect(socket: &Path, hint: Option<TaskApi>) -> Result<Self, ShimError> {
        Self::connect_within(CONNECT_TIMEOUT, socket, hint).await
    }

    /// Connects like [`Client::connect`], but to a shim that is still starting. The shim may take as long as a start
    /// may: with 20 starts at once on two slow processors, 12 shims needed more than 10 s. The kernel accepts the
    /// connection as soon as the socket listens, and a shim that dies meanwhile closes it, so that only a shim that
    /// hangs uses up the whole timeout. A limit on the number of shims that start at once is no alternative: all shims
    /// would be up at the same time as without it, and a shim that hangs would delay others.
    ///
    /// # Errors
    /// Fails when the shim does not answer within a minute, or serves neither service.
    pub async fn connect_to_starting(socket: &Path, hint: Option<TaskApi>) -> Result<Self, ShimError> {
        Self::connect_within(CREATE_TIMEOUT, socket, hint).await
    }

    async fn connect_within(limit: Duration, socket: &Path, hint: Option<TaskApi>) -> Result<Self, ShimError> {
        let gone = |error: io::Error| ShimError::ConnectionLost { call: "Connect", detail: error.to_string() };
        let stream = tokio::time::timeout(limit, tokio::net::UnixStream::connect(socket))
            .await
            .map_err(|_| ShimError::TimedOut { call: "Connect", after: limit })?
            .map_err(gone)?;
        // The kernel reports the process that called listen(2) as the peer (unix(7)): a plugin, which has passed the
        // socket to its shim.
        AllowedPeers::root().check(&stream).map_err(|error| gone(io::Error::other(error)))?;
        let (stream, connection) = WatchedStream::new(stream);
        let inner = ttrpc::asynchronous::Client::new(ttrpc::asynchronous::transport::Socket::new(stream));
        let apis = match hint {
            Some(TaskApi::V2) => [TaskApi::V2, TaskApi::V3],
            _ => [TaskApi::V3, TaskApi::V2],
        };
        let send_order: Arc<Mutex<()>> = Arc::default();
        for api in apis {
            let create_permits = Arc::new(Semaphore::new(match api {
                TaskApi::V2 => 1,
                TaskApi::V3 => Semaphore::MAX_PERMITS,
            }));
            let (inner, connection, calls) = (inner.clone(), connection.clone(), RuntimeCalls::default());
            let client =
                Self { inner, connection, api, send_order: send_order.clone(), create_permits, runtime_calls: calls };
            let request = wire::ConnectRequest::new();
            match client.call::<_, wire::ConnectResponse>("Connect", &request, Some(limit)).await {
                Ok(_) => return Ok(client),
                Err(ShimError::Refused { code: RefusalCode::UNIMPLEMENTED, .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(ShimError::NoTaskService(apis[0].service(), apis[1].service()))
    }

    /// Returns the same connection, whose runtime calls are counted in `calls`.
    pub fn with_runtime_calls(self, calls: &RuntimeCalls) -> Self {
        Self { runtime_calls: calls.clone(), ..self }
    }

    /// Returns the version of the Task service that the shim serves.
    pub fn api(&self) -> TaskApi {
        self.api
    }

    /// Creates the container and returns the pid of its process, which waits to be started.
    ///
    /// # Errors
    /// Fails with the runtime's message when the runtime can't create the container.
    pub async fn create(&self, task: &CreateTask<'_>) -> Result<u32, ShimError> {
        let request = wire::CreateTaskRequest {
            id: task.id.to_owned(),
            bundle: task.bundle.to_string_lossy().into_owned(),
            // The shim copies a terminal's output in any case, and needs a place to copy it to.
            stdout: if task.terminal && task.stdout.is_empty() { "/dev/null".into() } else { task.stdout.to_owned() },
            // A terminal has only one output stream.
            stderr: if task.terminal { String::new() } else { task.stderr.to_owned() },
            terminal: task.terminal,
            options: MessageField(task.runtime.encode()?.map(Box::new)),
            ..Default::default()
        };
        let permit = tokio::time::timeout(CREATE_TIMEOUT, self.create_permits.acquire()).await;
        let _permit = permit.map_err(|_| ShimError::TimedOut { call: "Create", after: CREATE_TIMEOUT })?;
        let _call_guard = self.runtime_calls.begin(CallKind::Create).await;
        let answer: wire::CreateTaskResponse = self.call("Create", &request, Some(CREATE_TIMEOUT)).await?;
        Ok(answer.pid)
    }

    /// Starts the process of a created container.
    ///
    /// # Errors
    /// Fails with the runtime's message.
    pub async fn start(&self, id: &str) -> Result<(), ShimError> {
        self.start_exec(id, INIT_EXEC_ID).await.map(drop)
    }

    /// Waits without a timeout until the container's process has ended.
    ///
    /// # Errors
    /// Fails with `ConnectionLost` when the shim dies first.
    pub async fn wait(&self, id: &str) -> Result<Exit, ShimError> {
        self.wait_exec(id, INIT_EXEC_ID).await
    }

    /// Adds a further process to a container. [`Client::start_exec`] starts the process.
    ///
    /// # Errors
    /// Fails with the shim's message.
    pub async fn exec(&self, process: ExecProcess<'_>) -> Result<(), ShimError> {
        let request = wire::ExecProcessRequest {
            id: process.id.to_owned(),
            exec_id: process.exec_id.to_owned(),
            terminal: process.terminal,
            stdin: process.stdin.to_owned(),
            stdout: process.stdout.to_owned(),
            stderr: process.stderr.to_owned(),
            spec: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: process.spec,
                ..Default::default()
            }),
            ..Default::default()
        };
        self.call::<_, wire::Empty>("Exec", &request, Some(QUERY_TIMEOUT)).await.map(drop)
    }

    /// Starts a process that [`Client::exec`] has added, and returns its pid.
    ///
    /// # Errors
    /// Fails with the runtime's message.
    pub async fn start_exec(&self, id: &str, exec_id: &str) -> Result<u32, ShimError> {
        let request = wire::StartRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        let kind = if exec_id == INIT_EXEC_ID { CallKind::FollowUp } else { CallKind::Create };
        let _call_guard = self.runtime_calls.begin(kind).await;
        self.call::<_, wire::StartResponse>("Start", &request, Some(START_TIMEOUT)).await.map(|answer| answer.pid)
    }

    /// Waits without a timeout until an exec'd process has ended.
    ///
    /// # Errors
    /// Fails with `ConnectionLost` when the shim dies first.
    pub async fn wait_exec(&self, id: &str, exec_id: &str) -> Result<Exit, ShimError> {
        let request = wire::WaitRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        self.call::<_, wire::WaitResponse>("Wait", &request, None)
            .await
            .map(|answer| Exit::new(answer.exit_status, answer.exited_at.as_ref()))
    }

    /// Kills an exec'd process. Succeeds if the process has ended already.
    ///
    /// # Errors
    /// Fails with the runtime's message.
    pub async fn kill_exec(&self, id: &str, exec_id: &str) -> Result<(), ShimError> {
        self.signal(id, exec_id, libc::SIGKILL, SignalTarget::Init).await
    }

    /// Deletes an exec'd process that has ended or never ran from the shim. Succeeds if the process is gone already.
    ///
    /// # Errors
    /// Fails with the shim's message.
    pub async fn delete_exec(&self, id: &str, exec_id: &str) -> Result<(), ShimError> {
        let request = wire::DeleteRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        let _call_guard = self.runtime_calls.begin(CallKind::FollowUp).await;
        ignore_not_found(self.idempotent_call::<_, wire::DeleteResponse>("Delete", &request, DELETE_TIMEOUT).await)
    }

    /// Sets the size of an exec'd process's terminal.
    ///
    /// # Errors
    /// Fails with the shim's message.
    pub async fn resize_exec(&self, id: &str, exec_id: &str, size: WindowSize) -> Result<(), ShimError> {
        let request = wire::ResizePtyRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            width: size.width,
            height: size.height,
            ..Default::default()
        };
        self.call::<_, wire::Empty>("ResizePty", &request, Some(QUERY_TIMEOUT)).await.map(drop)
    }

    /// Closes the shim's end of an exec'd process's input. The process sees the end of its input once this driver's end
    /// is closed, too.
    ///
    /// # Errors
    /// Fails with the shim's message.
    pub async fn close_exec_input(&self, id: &str, exec_id: &str) -> Result<(), ShimError> {
        let request =
            wire::CloseIORequest { id: id.to_owned(), exec_id: exec_id.to_owned(), stdin: true, ..Default::default() };
        ignore_not_found(self.call::<_, wire::Empty>("CloseIO", &request, Some(QUERY_TIMEOUT)).await)
    }

    /// Sends a signal to a container. Succeeds if the process has ended already.
    ///
    /// # Errors
    /// Fails with the runtime's message.
    pub async fn kill(&self, id: &str, signal: i32, target: SignalTarget) -> Result<(), ShimError> {
        self.signal(id, INIT_EXEC_ID, signal, target).await
    }

    async fn signal(&self, id: &str, exec_id: &str, signal: i32, target: SignalTarget) -> Result<(), ShimError> {
        let request = wire::KillRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal: signal.cast_unsigned(),
            all: target == SignalTarget::All,
            ..Default::default()
        };
        let _call_guard = self.runtime_calls.begin(CallKind::FollowUp).await;
        ignore_not_found(self.call::<_, wire::Empty>("Kill", &request, Some(KILL_TIMEOUT)).await)
    }

    /// Deletes a container that has ended, or was never started, from the shim and the runtime. Succeeds if the
    /// container is gone already.
    ///
    /// # Errors
    /// Fails with the runtime's message.
    pub async fn delete(&self, id: &str) -> Result<(), ShimError> {
        self.delete_exec(id, INIT_EXEC_ID).await
    }

    /// Returns whether the container's process is alive: it runs, or it waits to be started.
    ///
    /// # Errors
    /// Fails when the call fails, and with "not found" when the shim does not have the container.
    pub async fn is_alive(&self, id: &str) -> Result<bool, ShimError> {
        let request = wire::StateRequest { id: id.to_owned(), ..Default::default() };
        let state: wire::StateResponse = self.idempotent_call("State", &request, QUERY_TIMEOUT).await?;
        Ok(state.status.enum_value() != Ok(wire::Status::STOPPED))
    }

    /// Asks the shim to shut down. The shim exits if it has no container, and often closes the connection before it
    /// answers.
    ///
    /// # Errors
    /// Fails when the shim refuses.
    pub async fn shutdown(&self, id: &str) -> Result<(), ShimError> {
        let request = wire::ShutdownRequest { id: id.to_owned(), now: true, ..Default::default() };
        match self.call::<_, wire::Empty>("Shutdown", &request, Some(QUERY_TIMEOUT)).await {
            Ok(_) | Err(ShimError::ConnectionLost { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes a call that is idempotent. It is made a second time if its answer can't be decoded.
    async fn idempotent_call<Q: Message, A: Message>(
        &self,
        call: &'static str,
        request: &Q,
        limit: Duration,
    ) -> Result<A, ShimError> {
        match self.call(call, request, Some(limit)).await {
            Err(error @ ShimError::Malformed { .. }) => {
                tracing::warn!(%error, "the answer of a shim could not be decoded; the call is repeated");
                self.call(call, request, Some(limit)).await
            }
            outcome => outcome,
        }
    }

    async fn call<Q: Message, A: Message>(
        &self,
        call: &'static str,
        request: &Q,
        limit: Option<Duration>,
    ) -> Result<A, ShimError> {
        let request = Request {
            service: self.api.service().to_owned(),
            method: call.to_owned(),
            payload: request.write_to_bytes().map_err(|error| malformed(call, &error))?,
            // 0 means no timeout. The shim gets this timeout, too, but some of its calls ignore it, so the outer
            // timeout below is the one that always holds. The library applies this timeout as well and would report a
            // broken connection, so the outer timeout must expire first.
            timeout_nano: limit
                .map_or(0, |limit| i64::try_from((limit + Duration::from_secs(1)).as_nanos()).unwrap_or(i64::MAX)),
            ..Default::default()
        };
        // The request is unconstrained, because tokio's cooperative budget must not separate the two steps either (see
        // `send_order`).
        let mut exchange = std::pin::pin!(tokio::task::unconstrained(self.inner.request(request)));
        let ordered = async {
            self.connection.wait_for_room().await;
            let polled = std::future::poll_fn(|cx| {
                let _order_lock = self.send_order.lock();
                exchange.as_mut().poll(cx)
            });
            polled.await
        };
        let answer = match limit {
            Some(limit) => tokio::time::timeout(limit, ordered)
                .await
                .unwrap_or_else(|_| Err(TtrpcError::RpcStatus(deadline_status()))),
            None => ordered.await,
        };
        // A shim passes on the runtime's message, and the runtime passes on text of the image. That may be megabytes
        // and may contain escape sequences, so the message is cut and cleaned.
        let answer = answer.map_err(|error| match error {
            TtrpcError::RpcStatus(status) if status.code() == RefusalCode::DEADLINE_EXCEEDED => {
                ShimError::TimedOut { call, after: limit.unwrap_or_default() }
            }
            TtrpcError::RpcStatus(status) => {
                let message = text::sanitize(&status.message, EXCERPT_MAX);
                let code = status.code.enum_value().unwrap_or(RefusalCode::UNKNOWN);
                ShimError::Refused { call, code, message }
            }
            other => self.transport_error(call, &other),
        })?;
        A::parse_from_bytes(&answer.payload).map_err(|error| malformed(call, &error))
    }

    /// Converts the error of a call that the library has given up. The library reports `Others` both for an answer that
    /// it can't decode and for a connection that had broken before the call (ttrpc-rust, src/asynchronous/client.rs),
    /// so the state of the connection decides.
    fn transport_error(&self, call: &'static str, error: &TtrpcError) -> ShimError {
        let detail = text::sanitize(&error.to_string(), EXCERPT_MAX);
        match error {
            TtrpcError::Others(_) if !self.connection.is_broken() => ShimError::Malformed { call, detail },
            _ => ShimError::ConnectionLost { call, detail },
        }
    }
}

/// Converts the error of a request that can't be encoded, or of an answer that can't be decoded. Neither means that the
/// shim has died.
fn malformed(call: &'static str, error: &protobuf::Error) -> ShimError {
    ShimError::Malformed { call, detail: error.to_string() }
}

/// Treats "not found" as success: an object that does not exist (any more) needs nothing done to it.
fn ignore_not_found<T>(outcome: Result<T, ShimError>) -> Result<(), ShimError> {
    match outcome {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

fn deadline_status() -> ttrpc::Status {
    ttrpc::get_status(RefusalCode::DEADLINE_EXCEEDED, "no answer")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    /// A shim hangs, for example after SIGSTOP, while the health of its task is checked all the time. The driver must
    /// not regard the task as ended.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_shim_that_answers_nothing_is_not_taken_for_dead_however_often_it_is_asked() {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("sock");
        let listener = tokio::net::UnixListener::bind(&socket).expect("bound");
        // The fake shim answers Connect with an empty message, and reads nothing afterwards.
        let accept = async {
            let (mut stream, _) = listener.accept().await.expect("accepted");
            let mut head = [0; 10];
            stream.read_exact(&mut head).await.expect("a request");
            let mut request = vec![0; usize::from(u16::from_be_bytes([head[2], head[3]]))];
            stream.read_exact(&mut request).await.expect("a request");
            let answer = [&[0; 4], &head[4..8], &[2, 0]].concat();
            stream.write_all(&answer).await.expect("written");
            stream
        };
        let (client, stream) = tokio::join!(Client::connect(&socket, None), accept);
        let client = client.expect("connected");
        let waiting = tokio::spawn({
            let client = client.clone();
            async move { client.wait("x").await }
        });
        for _ in 0..600 {
            let asked = client.kill("x", libc::SIGHUP, SignalTarget::Init);
            assert!(tokio::time::timeout(Duration::from_millis(1), asked).await.is_err(), "the shim answers nothing");
            assert!(!waiting.is_finished(), "the shim is regarded as dead");
        }
        drop(stream);
        let error = waiting.await.expect("no panic").expect_err("the connection is closed");
        assert!(matches!(error, ShimError::ConnectionLost { .. }), "{error:?}");
    }
}
