//! The control socket of a live plugin: what the command line and a successor ask of it. One JSON object a line, one
//! line for each request; one line for the answer, or, for events, a line each until the asker goes.

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

use crate::peer::Peers;

/// Longest request.
pub const REQUEST_MAX: u64 = 64 << 10;
/// Connecting to and writing into a local socket; the other side need not do anything for it.
const CONNECT: Duration = Duration::from_secs(5);
/// Collecting garbage takes the longest.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Give way to a new plugin. Refused while an agent is connected.
    Leave,
    /// Remove what nobody needs.
    Gc {
        /// Only tell what would go.
        dry_run: bool,
    },
    /// Forget an image.
    RemoveImage {
        /// Its name.
        image: String,
    },
    /// Send a signal to a task; without one, kill all of it.
    Kill {
        /// Its id.
        task: String,
        /// A name or number.
        signal: Option<String>,
    },
    /// Task events from now on.
    Events,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It was done.
    Done,
    /// What was, or would be, removed.
    Removed(Vec<Garbage>),
    /// One event.
    Event(Event),
    /// There is no such thing here.
    NotHere,
    /// It was not done.
    Refused(String),
}

/// Something that nobody needs any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Garbage {
    /// `task`, `container`, `rootfs`, `shim`, `probe`, `plugin`, `socket`, `run`, `image`, `lease` or `all`.
    pub kind: String,
    /// Which.
    pub name: String,
    /// Why it stays, when it could not be removed.
    pub problem: Option<String>,
    /// Why it goes, or why it is left where it is; plugins of earlier versions do not say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// Is it left where it is, because something needs it?
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stays: bool,
}

impl Garbage {
    /// Something that was, or would be, removed; or could not be.
    pub fn new(kind: &str, name: &str, problem: Option<String>) -> Self {
        Self { kind: kind.to_owned(), name: name.to_owned(), problem, why: String::new(), stays: false }
    }

    /// Something that is left where it is, and why.
    pub fn staying(kind: &str, name: &str, why: &str) -> Self {
        Self { stays: true, ..Self::new(kind, name, None).because(why) }
    }

    /// The same, with the reason.
    pub fn because(self, why: &str) -> Self {
        Self { why: why.to_owned(), ..self }
    }

    /// The same, by how its removal ended.
    pub fn removed<E: std::error::Error>(kind: &str, name: &str, outcome: &Result<(), E>) -> Self {
        Self::new(kind, name, outcome.as_ref().err().map(|error| crate::chain(error)))
    }
}

/// A task event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Milliseconds since the epoch.
    pub at: u64,
    /// The task's id.
    pub task_id: String,
    /// Its allocation.
    pub alloc_id: String,
    /// Its name.
    pub task_name: String,
    /// What happened.
    pub message: String,
}

/// Why a request got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error("control socket {path}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It said no.
    #[error("{0}")]
    Refused(String),
    /// It said nothing, or nonsense.
    #[error("control socket {path}: {problem}")]
    Silent {
        /// Where.
        path: PathBuf,
        /// What came.
        problem: String,
    },
}

impl ControlError {
    /// Does no plugin live there?
    pub fn is_nobody(&self) -> bool {
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
    /// Connects and asks.
    ///
    /// # Errors
    /// When nobody listens.
    pub async fn open(path: &Path, request: &Request) -> Result<Self, ControlError> {
        let failed = |source| ControlError::Socket { path: path.to_owned(), source };
        let mut line = serde_json::to_vec(request).map_err(|error| failed(error.into()))?;
        line.push(b'\n');
        let connect = async {
            let mut stream = UnixStream::connect(path).await?;
            Peers::root().check(&stream).map_err(io::Error::other)?;
            stream.write_all(&line).await?;
            Ok(stream)
        };
        let stream = tokio::time::timeout(CONNECT, connect)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(failed)?;
        Ok(Self { path: path.to_owned(), lines: BufReader::new(stream).lines() })
    }

    /// The next answer; None when there are no more. Waits as long as it takes.
    ///
    /// # Errors
    /// When the other side breaks off or refuses.
    pub async fn next(&mut self) -> Result<Option<Answer>, ControlError> {
        let silent = |problem: String| ControlError::Silent { path: self.path.clone(), problem };
        let Some(line) = self.lines.next_line().await.map_err(|error| silent(error.to_string()))? else {
            return Ok(None);
        };
        match serde_json::from_str(&line) {
            Ok(Answer::Refused(why)) => Err(ControlError::Refused(why)),
            Ok(answer) => Ok(Some(answer)),
            Err(error) => Err(silent(error.to_string())),
        }
    }
}

/// Asks for one thing that has one answer.
///
/// # Errors
/// When there is none within `limit`, or a refusal.
pub async fn ask(path: &Path, request: &Request, limit: Duration) -> Result<Answer, ControlError> {
    let mut connection = Connection::open(path, request).await?;
    let silent = |problem: &str| ControlError::Silent { path: path.to_owned(), problem: problem.to_owned() };
    tokio::time::timeout(limit, connection.next())
        .await
        .unwrap_or_else(|_| Err(silent("no answer in time")))?
        .ok_or_else(|| silent("closed without an answer"))
}
