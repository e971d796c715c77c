//! The protocol of a plugin's control socket. Its clients are the command line and the plugin's successor, which asks
//! the plugin to give up the lock of the run directory.
//!
//! Each line is one JSON object. A connection carries one request, then one answer; a request for events is answered by
//! one line for each event until the client closes the connection.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    net::UnixStream,
};

use crate::peer::AllowedPeers;

/// The longest request, in bytes.
pub const REQUEST_MAX: u64 = 64 << 10;
/// The limit for connecting to the socket and writing the request. Both need no work of the process that listens.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The limit for an answer. Garbage collection takes the longest of all requests.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// A request to a plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Stop, and leave the run directory to a new plugin. Refused while an agent is connected.
    Leave,
    /// Remove everything that nothing needs any more (garbage collection).
    Gc {
        /// Only report what would be removed.
        dry_run: bool,
    },
    /// Remove an image.
    RemoveImage {
        /// The image's name.
        image: String,
    },
    /// Send a signal to a task. If none is given, kill all the task's processes.
    Kill {
        /// The task's id.
        task: String,
        /// The signal's name or number.
        signal: Option<String>,
    },
    /// Start the missing idle shims, and answer when all of them wait for a task.
    FillPool,
    /// Stream all task events from now on.
    Events,
}

/// An answer of a plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The request was carried out.
    Done,
    /// What was removed, or would be removed without `dry_run`.
    Removed(Vec<Garbage>),
    /// One task event.
    Event(Event),
    /// The plugin has no image of this name.
    NotHere,
    /// The request was refused, for this reason.
    Refused(String),
}

/// An item that garbage collection looked at: it was removed, would be removed, or is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Garbage {
    /// What kind of item this is: `task`, `container`, `rootfs`, `shim`, `probe`, `plugin`, `socket`, `run`, `image`,
    /// `lease` or `all`.
    pub kind: String,
    /// The item's name or path.
    pub name: String,
    /// Why the item could not be removed.
    pub problem: Option<String>,
    /// Why the item is removed or kept. Plugins of earlier versions do not send a reason.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// Whether the item is kept because something needs it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stays: bool,
}

impl Garbage {
    /// Returns an item that was removed, would be removed, or could not be removed because of `problem`.
    pub fn new(kind: &str, name: &str, problem: Option<String>) -> Self {
        Self { kind: kind.to_owned(), name: name.to_owned(), problem, why: String::new(), stays: false }
    }

    /// Returns an item that is kept, with the reason.
    pub fn kept(kind: &str, name: &str, why: &str) -> Self {
        Self { stays: true, ..Self::new(kind, name, None).with_reason(why) }
    }

    /// Adds the reason.
    pub fn with_reason(self, why: &str) -> Self {
        Self { why: why.to_owned(), ..self }
    }

    /// Returns an item whose removal had this outcome.
    pub fn removed<E: std::error::Error>(kind: &str, name: &str, outcome: &Result<(), E>) -> Self {
        Self::new(kind, name, outcome.as_ref().err().map(|error| crate::error_chain(error)))
    }
}

/// A task event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When the event happened, in milliseconds since the epoch.
    pub at: u64,
    /// The task's id.
    pub task_id: String,
    /// The id of the task's allocation.
    pub alloc_id: String,
    /// The task's name.
    pub task_name: String,
    /// What happened, as text for people.
    pub message: String,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket can't be connected to, or the request can't be written. In most cases no plugin is listening.
    #[error("could not send a request to control socket {path}")]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The plugin refused the request.
    #[error("{0}")]
    Refused(String),
    /// The plugin sent no answer, or an invalid one.
    #[error("no valid answer from control socket {path}: {problem}")]
    NoValidAnswer {
        /// The socket's path.
        path: PathBuf,
        /// What is wrong with the answer.
        problem: String,
    },
}

impl ControlError {
    /// Makes the error for an answer that does not belong to the request.
    pub fn unexpected(path: &Path, answer: &Answer) -> Self {
        Self::NoValidAnswer { path: path.to_owned(), problem: format!("unexpected answer {answer:?}") }
    }

    /// Returns whether the request failed because no plugin listens at the socket.
    pub fn no_plugin_listens(&self) -> bool {
        matches!(self, Self::Socket { source, .. }
            if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused))
    }
}

/// A connection to a control socket.
#[derive(Debug)]
pub struct Connection {
    path: PathBuf,
    lines: Lines<BufReader<UnixStream>>,
}

impl Connection {
    /// Connects and sends the request.
    ///
    /// # Errors
    /// Fails when no plugin listens, or the process that listens belongs to another user.
    pub async fn open(path: &Path, request: &Request) -> Result<Self, ControlError> {
        let failed = |source| ControlError::Socket { path: path.to_owned(), source };
        let mut line = serde_json::to_vec(request).map_err(|error| failed(error.into()))?;
        line.push(b'\n');
        let connect = async {
            let mut stream = UnixStream::connect(path).await?;
            AllowedPeers::root().check(&stream).map_err(io::Error::other)?;
            stream.write_all(&line).await?;
            Ok(stream)
        };
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(failed)?;
        Ok(Self { path: path.to_owned(), lines: BufReader::new(stream).lines() })
    }

    /// Returns the path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the next answer, without a time limit; `None` when the plugin has closed the connection.
    ///
    /// # Errors
    /// Fails when the connection breaks, the answer is invalid, or the plugin refuses the request.
    pub async fn next_answer(&mut self) -> Result<Option<Answer>, ControlError> {
        let no_valid_answer = |problem: String| ControlError::NoValidAnswer { path: self.path.clone(), problem };
        let Some(line) = self.lines.next_line().await.map_err(|error| no_valid_answer(error.to_string()))? else {
            return Ok(None);
        };
        match serde_json::from_str(&line) {
            Ok(Answer::Refused(why)) => Err(ControlError::Refused(why)),
            Ok(answer) => Ok(Some(answer)),
            Err(error) => Err(no_valid_answer(error.to_string())),
        }
    }
}

/// Sends a request that has one answer, and waits for the answer.
///
/// # Errors
/// Fails when no answer comes within `limit`, or the plugin refuses the request.
pub async fn send_request(path: &Path, request: &Request, limit: Duration) -> Result<Answer, ControlError> {
    let mut connection = Connection::open(path, request).await?;
    let no_valid_answer =
        |problem: &str| ControlError::NoValidAnswer { path: path.to_owned(), problem: problem.to_owned() };
    tokio::time::timeout(limit, connection.next_answer())
        .await
        .unwrap_or_else(|_| Err(no_valid_answer("no answer in time")))?
        .ok_or_else(|| no_valid_answer("the connection was closed without an answer"))
}
