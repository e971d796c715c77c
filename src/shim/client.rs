//! Typed calls of the Task service over one ttrpc connection, with a deadline on each but `wait`.
//!
//! Shims before 2.0 serve `containerd.task.v2.Task`, those since `v3`; the messages are the same, so the service's name
//! is all that differs, and it is found out once per connection.

use std::{
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use protobuf::{
    Message, MessageField,
    well_known_types::{any::Any, timestamp::Timestamp},
};
use tokio::sync::Semaphore;
use ttrpc::{Error as TtrpcError, proto::Request};

use super::{
    Purpose, RuntimeCalls, ShimError, UNIMPLEMENTED,
    connection::{ConnectionState, Watched},
};
use crate::{
    pb::shim as wire,
    peer::Peers,
    text::{self, FOREIGN_MAX},
};

/// runc needs 12 to 20 ms when idle; a loaded machine with a cold disk has been seen to take seconds.
const CREATE: Duration = Duration::from_secs(60);
/// `runc start`: 3 to 6 ms.
const START: Duration = Duration::from_secs(30);
/// Spawns the runtime too.
const KILL: Duration = Duration::from_secs(30);
/// The shim drains output for up to 10 s before it answers.
const DELETE: Duration = Duration::from_secs(45);
/// Answered from memory.
const QUICK: Duration = Duration::from_secs(10);
/// How long a shim that is not just starting has for its first answer.
pub const CONNECT: Duration = QUICK;

/// The exec id of a container's first process.
const INIT: &str = "";

/// Which Task service a shim serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskApi {
    /// Shims 1.x, and gVisor's.
    V2,
    /// Shims since 2.0.
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

/// What `create` needs.
#[derive(Debug, Clone)]
pub struct CreateTask<'a> {
    /// The container.
    pub id: &'a str,
    /// Its bundle, root file system mounted.
    pub bundle: &'a Path,
    /// A FIFO for standard output, or empty for none; then `stderr` must be empty too.
    pub stdout: &'a str,
    /// A FIFO for standard error.
    pub stderr: &'a str,
    /// What the shim is told of the runtime.
    pub runtime: RuntimeOptions<'a>,
    /// Does its process have a terminal, whose output goes to `stdout`?
    pub terminal: bool,
}

/// What a shim is told of the runtime that it is to call.
#[derive(Debug, Clone, Copy)]
pub enum RuntimeOptions<'a> {
    /// runc's shim.
    Runc {
        /// The OCI runtime's binary.
        binary: &'a Path,
        /// The OCI runtime's state root; the shim appends its namespace.
        root: &'a Path,
    },
    /// Any other: the file that it is configured by (`runtimeoptions.v1.Options`).
    File {
        /// What kind of file that is.
        kind: &'a str,
        /// The file.
        path: &'a Path,
    },
    /// Any other, with its own defaults.
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
        let value = value.map_err(|error| encoding("Create", &error))?;
        Ok(Some(Any { type_url: type_url.to_owned(), value, ..Default::default() }))
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + n for a death by signal n.
    pub code: u32,
    /// Seconds and nanoseconds since the epoch, by the shim's clock.
    pub at: Option<(i64, i32)>,
}

impl Exit {
    pub(super) fn new(code: u32, at: Option<&Timestamp>) -> Self {
        Self { code, at: at.map(|time| (time.seconds, time.nanos)) }
    }
}

/// A further process in a container.
#[derive(Debug, Clone)]
pub struct ExecProcess<'a> {
    /// The container.
    pub id: &'a str,
    /// The process's own name.
    pub exec_id: &'a str,
    /// Give it a terminal? Then `stderr` is empty.
    pub terminal: bool,
    /// A FIFO for standard input, or empty for none.
    pub stdin: &'a str,
    /// A FIFO for standard output.
    pub stdout: &'a str,
    /// A FIFO for standard error.
    pub stderr: &'a str,
    /// The OCI process, as JSON.
    pub spec: Vec<u8>,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowSize {
    /// Columns.
    pub width: u32,
    /// Lines.
    pub height: u32,
}

/// Whom a signal goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kill {
    /// The container's first process.
    Init,
    /// Every process of the container.
    All,
}

/// A connection to one shim. Cheap to clone; calls on it run side by side.
#[derive(Clone)]
pub struct Client {
    inner: ttrpc::asynchronous::Client,
    connection: ConnectionState,
    api: TaskApi,
    /// The library numbers a request and queues it in two steps; shims since 2.0 refuse one that overtakes another
    /// in between ("StreamID ... must increment"). Held while a call is polled, both steps are one.
    order: Arc<Mutex<()>>,
    /// Shims 1.x hold a lock over Create that the reader of their children's exits wants for each. With many Creates in
    /// it, 32 exits are soon unread, and each further one stops the shim for a second (containerd, sys/reaper): one at a
    /// time, they wait here.
    creating: Arc<Semaphore>,
    /// Those in which the shim runs a runtime.
    calls: RuntimeCalls,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("api", &self.api).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to a shim that has been running for a while, and finds out which service it serves, `hint` first.
    ///
    /// # Errors
    /// When it does not answer within 10 s, or neither service is there.
    pub async fn connect(socket: &Path, hint: Option<TaskApi>) -> Result<Self, ShimError> {
        Self::connect_within(CONNECT, socket, hint).await
    }

    /// As `connect`, to a shim that is still starting, which may take as long as a start may: with 20 starts at once on two
    /// slow processors, 12 shims needed more than 10 s. The kernel takes the connection as soon as the socket listens, and
    /// a shim that dies meanwhile closes it, so that only one that hangs is waited for in vain. The number of shims that
    /// start at once is not bounded instead: all of them would be up at the same time as before, and one that hangs would
    /// keep others waiting.
    ///
    /// # Errors
    /// When it does not answer within a minute, or neither service is there.
    pub async fn connect_to_starting(socket: &Path, hint: Option<TaskApi>) -> Result<Self, ShimError> {
        Self::connect_within(CREATE, socket, hint).await
    }

    async fn connect_within(limit: Duration, socket: &Path, hint: Option<TaskApi>) -> Result<Self, ShimError> {
        let gone = |error: io::Error| ShimError::Gone { call: "Connect", detail: error.to_string() };
        let stream = tokio::time::timeout(limit, tokio::net::UnixStream::connect(socket))
            .await
            .map_err(|_| ShimError::Late { call: "Connect", after: limit })?
            .map_err(gone)?;
        // The listener is one that a plugin made, and its shim got.
        Peers::root().check(&stream).map_err(|error| gone(io::Error::other(error)))?;
        let (stream, connection) = Watched::new(stream);
        let inner = ttrpc::asynchronous::Client::new(ttrpc::asynchronous::transport::Socket::new(stream));
        let apis = match hint {
            Some(TaskApi::V2) => [TaskApi::V2, TaskApi::V3],
            _ => [TaskApi::V3, TaskApi::V2],
        };
        let order: Arc<Mutex<()>> = Arc::default();
        for api in apis {
            let creating = Arc::new(Semaphore::new(match api {
                TaskApi::V2 => 1,
                TaskApi::V3 => Semaphore::MAX_PERMITS,
            }));
            let (inner, connection, calls) = (inner.clone(), connection.clone(), RuntimeCalls::default());
            let client = Self { inner, connection, api, order: order.clone(), creating, calls };
            let request = wire::ConnectRequest::new();
            match client.call::<_, wire::ConnectResponse>("Connect", &request, Some(limit)).await {
                Ok(_) => return Ok(client),
                Err(ShimError::Refused { code: UNIMPLEMENTED, .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(ShimError::NoService(apis[0].service(), apis[1].service()))
    }

    /// The same connection, whose calls count among these.
    pub fn counted_in(self, calls: &RuntimeCalls) -> Self {
        Self { calls: calls.clone(), ..self }
    }

    /// Which service it serves.
    pub fn api(&self) -> TaskApi {
        self.api
    }

    /// Makes the container, its process waiting to be started: the process's pid.
    ///
    /// # Errors
    /// With the runtime's words when it can't be made.
    pub async fn create(&self, task: &CreateTask<'_>) -> Result<u32, ShimError> {
        let request = wire::CreateTaskRequest {
            id: task.id.to_owned(),
            bundle: task.bundle.to_string_lossy().into_owned(),
            // The shim copies a terminal's output in any case.
            stdout: if task.terminal && task.stdout.is_empty() { "/dev/null".into() } else { task.stdout.to_owned() },
            // A terminal has one stream.
            stderr: if task.terminal { String::new() } else { task.stderr.to_owned() },
            terminal: task.terminal,
            options: MessageField(task.runtime.encode()?.map(Box::new)),
            ..Default::default()
        };
        let turn = tokio::time::timeout(CREATE, self.creating.acquire()).await;
        let _turn = turn.map_err(|_| ShimError::Late { call: "Create", after: CREATE })?;
        let _at_work = self.calls.begin(Purpose::Begin).await;
        let answer: wire::CreateTaskResponse = self.call("Create", &request, Some(CREATE)).await?;
        Ok(answer.pid)
    }

    /// Lets the container's process go.
    ///
    /// # Errors
    /// With the runtime's words.
    pub async fn start(&self, id: &str) -> Result<(), ShimError> {
        self.start_exec(id, INIT).await.map(drop)
    }

    /// Waits until the container's process has ended, however long that takes.
    ///
    /// # Errors
    /// `Gone` when the shim dies first.
    pub async fn wait(&self, id: &str) -> Result<Exit, ShimError> {
        self.wait_exec(id, INIT).await
    }

    /// Announces a further process; `start_exec` runs it.
    ///
    /// # Errors
    /// With the shim's words.
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
        self.call::<_, wire::Empty>("Exec", &request, Some(QUICK)).await.map(drop)
    }

    /// Runs an announced process: its pid.
    ///
    /// # Errors
    /// With the runtime's words.
    pub async fn start_exec(&self, id: &str, exec_id: &str) -> Result<u32, ShimError> {
        let request = wire::StartRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        let purpose = if exec_id == INIT { Purpose::Continue } else { Purpose::Begin };
        let _at_work = self.calls.begin(purpose).await;
        self.call::<_, wire::StartResponse>("Start", &request, Some(START)).await.map(|answer| answer.pid)
    }

    /// Waits until an exec'd process has ended, however long that takes.
    ///
    /// # Errors
    /// `Gone` when the shim dies first.
    pub async fn wait_exec(&self, id: &str, exec_id: &str) -> Result<Exit, ShimError> {
        let request = wire::WaitRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        self.call::<_, wire::WaitResponse>("Wait", &request, None)
            .await
            .map(|answer| Exit::new(answer.exit_status, answer.exited_at.as_ref()))
    }

    /// Kills an exec'd process. One that has ended already is fine.
    ///
    /// # Errors
    /// With the runtime's words.
    pub async fn kill_exec(&self, id: &str, exec_id: &str) -> Result<(), ShimError> {
        self.signal(id, exec_id, libc::SIGKILL, Kill::Init).await
    }

    /// Forgets an exec'd process that has ended or never ran. One that is gone is fine.
    ///
    /// # Errors
    /// With the shim's words.
    pub async fn delete_exec(&self, id: &str, exec_id: &str) -> Result<(), ShimError> {
        let request = wire::DeleteRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        let _at_work = self.calls.begin(Purpose::Continue).await;
        gone_is_fine(self.repeatable_call::<_, wire::DeleteResponse>("Delete", &request, DELETE).await)
    }

    /// Sets the size of an exec'd process's terminal.
    ///
    /// # Errors
    /// With the shim's words.
    pub async fn resize_exec(&self, id: &str, exec_id: &str, size: WindowSize) -> Result<(), ShimError> {
        let request = wire::ResizePtyRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            width: size.width,
            height: size.height,
            ..Default::default()
        };
        self.call::<_, wire::Empty>("ResizePty", &request, Some(QUICK)).await.map(drop)
    }

    /// Lets an exec'd process see the end of its input, once our end of it is closed too.
    ///
    /// # Errors
    /// With the shim's words.
    pub async fn close_exec_input(&self, id: &str, exec_id: &str) -> Result<(), ShimError> {
        let request =
            wire::CloseIORequest { id: id.to_owned(), exec_id: exec_id.to_owned(), stdin: true, ..Default::default() };
        gone_is_fine(self.call::<_, wire::Empty>("CloseIO", &request, Some(QUICK)).await)
    }

    /// Sends a signal. A process that has ended already is fine.
    ///
    /// # Errors
    /// With the runtime's words.
    pub async fn kill(&self, id: &str, signal: i32, whom: Kill) -> Result<(), ShimError> {
        self.signal(id, INIT, signal, whom).await
    }

    async fn signal(&self, id: &str, exec_id: &str, signal: i32, whom: Kill) -> Result<(), ShimError> {
        let request = wire::KillRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal: signal.cast_unsigned(),
            all: whom == Kill::All,
            ..Default::default()
        };
        let _at_work = self.calls.begin(Purpose::Continue).await;
        gone_is_fine(self.call::<_, wire::Empty>("Kill", &request, Some(KILL)).await)
    }

    /// Removes an ended (or never started) container from shim and runtime. One that is gone is fine.
    ///
    /// # Errors
    /// With the runtime's words.
    pub async fn delete(&self, id: &str) -> Result<(), ShimError> {
        self.delete_exec(id, INIT).await
    }

    /// Does the container's process live, waiting to be started or running?
    ///
    /// # Errors
    /// When it can't be asked; "not found" when the shim does not hold the container.
    pub async fn is_alive(&self, id: &str) -> Result<bool, ShimError> {
        let request = wire::StateRequest { id: id.to_owned(), ..Default::default() };
        let state: wire::StateResponse = self.repeatable_call("State", &request, QUICK).await?;
        Ok(state.status.enum_value() != Ok(wire::Status::STOPPED))
    }

    /// Asks the shim to end, which it does if it holds no container. It often closes before it answers.
    ///
    /// # Errors
    /// When it refuses.
    pub async fn shutdown(&self, id: &str) -> Result<(), ShimError> {
        let request = wire::ShutdownRequest { id: id.to_owned(), now: true, ..Default::default() };
        match self.call::<_, wire::Empty>("Shutdown", &request, Some(QUICK)).await {
            Ok(_) | Err(ShimError::Gone { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// A call that does no harm when it is made twice, and is made again when its answer was not understood.
    async fn repeatable_call<Q: Message, A: Message>(
        &self,
        call: &'static str,
        request: &Q,
        limit: Duration,
    ) -> Result<A, ShimError> {
        match self.call(call, request, Some(limit)).await {
            Err(error @ ShimError::NotUnderstood { .. }) => {
                tracing::warn!(%error, "asking the shim again");
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
            payload: request.write_to_bytes().map_err(|error| encoding(call, &error))?,
            // 0 waits for ever. The shim gets the deadline too, but some calls ignore it: the outer one always holds.
            // The library keeps it too, and would report a broken connection: the outer one must come first.
            timeout_nano: limit
                .map_or(0, |limit| i64::try_from((limit + Duration::from_secs(1)).as_nanos()).unwrap_or(i64::MAX)),
            ..Default::default()
        };
        // Unconstrained: the runtime's budget must not cut between the two steps either.
        let mut asking = std::pin::pin!(tokio::task::unconstrained(self.inner.request(request)));
        let asking = async {
            self.connection.room().await;
            let polled = std::future::poll_fn(|cx| {
                let _turn = self.order.lock().unwrap_or_else(PoisonError::into_inner);
                asking.as_mut().poll(cx)
            });
            polled.await
        };
        let answer = match limit {
            Some(limit) => tokio::time::timeout(limit, asking)
                .await
                .unwrap_or_else(|_| Err(TtrpcError::RpcStatus(deadline_status()))),
            None => asking.await,
        };
        // A shim hands on what the runtime says, and that what an image says: megabytes of it, and escape sequences.
        let answer = answer.map_err(|error| match error {
            TtrpcError::RpcStatus(status) if status.code() == ttrpc::Code::DEADLINE_EXCEEDED => {
                ShimError::Late { call, after: limit.unwrap_or_default() }
            }
            TtrpcError::RpcStatus(status) => {
                let message = text::shown(&status.message, FOREIGN_MAX);
                ShimError::Refused { call, code: status.code.value(), message }
            }
            other => self.failure(call, &other),
        })?;
        A::parse_from_bytes(&answer.payload).map_err(|error| encoding(call, &error))
    }

    /// The error of a call that the library gave up. It says `Others` both for an answer that it can't decode and for a
    /// connection that had broken before the call (ttrpc-rust, src/asynchronous/client.rs), so the connection is asked.
    fn failure(&self, call: &'static str, error: &TtrpcError) -> ShimError {
        let detail = text::shown(&error.to_string(), FOREIGN_MAX);
        match error {
            TtrpcError::Others(_) if !self.connection.is_broken() => ShimError::NotUnderstood { call, detail },
            _ => ShimError::Gone { call, detail },
        }
    }
}

/// A request that can't be encoded, or an answer that can't be decoded: neither says anything about the shim's life.
fn encoding(call: &'static str, error: &protobuf::Error) -> ShimError {
    ShimError::NotUnderstood { call, detail: error.to_string() }
}

/// What is not there (any more) needs nothing done to it.
fn gone_is_fine<T>(outcome: Result<T, ShimError>) -> Result<(), ShimError> {
    match outcome {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

fn deadline_status() -> ttrpc::Status {
    ttrpc::get_status(ttrpc::Code::DEADLINE_EXCEEDED, "no answer")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    /// A shim that was stopped, say, with a task whose health is checked all the time. Its task is not taken for ended.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_shim_that_answers_nothing_is_not_taken_for_dead_however_often_it_is_asked() {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("sock");
        let listener = tokio::net::UnixListener::bind(&socket).expect("bound");
        // Connect is answered with an empty message; nothing is read afterwards.
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
            let asked = client.kill("x", libc::SIGHUP, Kill::Init);
            assert!(tokio::time::timeout(Duration::from_millis(1), asked).await.is_err(), "it answers nothing");
            assert!(!waiting.is_finished(), "it is taken for dead");
        }
        drop(stream);
        let error = waiting.await.expect("no panic").expect_err("it is gone now");
        assert!(matches!(error, ShimError::Gone { .. }), "{error:?}");
    }
}
