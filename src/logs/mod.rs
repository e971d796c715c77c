//! Tasks' logs without Nomad's collector: a task's shim writes into FIFOs of ours, and one log writer a node moves what
//! comes to the files where Nomad looks for them, `<alloc>/alloc/logs/<task>.stdout.N`, rotated by size and count.
//!
//! Nothing is lost, doubled or out of order whoever dies: bytes go from a FIFO to a file by splice(2), which takes from
//! the one what it has given to the other, and a FIFO's contents live as long as somebody has it open, which the shim,
//! the writer and the writer's keeper do.
//!
//! What there is to do is on disk: a directory for each task in [`crate::places::Places::logs`], with its two FIFOs and
//! a description. It appears whole (by rename) and goes when the task is destroyed.

mod confine;
mod keeper;
mod series;
mod status;
mod stream;
mod watch;
mod writer;

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use serde::{Deserialize, Serialize};

pub use confine::Role;
pub use keeper::{COMMAND, WRITER, arguments, end, keep, keeper_of};
pub use status::{Losses, StreamLosses, changed, read_losses};
pub use writer::write;

use crate::places::{create_private, write_private};

/// In a task's directory: what its log is to be.
const SPEC: &str = "spec.json";
/// In a task's directory, once its shim has its FIFOs open: from then on, no writer means the end.
const STARTED: &str = "started";
/// The two streams, and the names of their FIFOs.
pub const STREAMS: [&str; 2] = ["stdout", "stderr"];
/// Between two looks at what is about to be written out.
const LOOK: Duration = Duration::from_millis(2);

/// Why a log could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("log: {doing} {path}")]
pub struct LogError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// What happens to output that can't be written: the disk is full, or the directory is not what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogPolicy {
    /// The task waits in its write until it can.
    #[default]
    Block,
    /// It is dropped, and counted.
    Drop,
}

/// How a task's log is kept. The defaults are those of Nomad's `logs` block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogOptions {
    /// Bytes of one file at most.
    pub max_size: u64,
    /// Files of one stream at most.
    pub max_files: u32,
    /// When it can't be written.
    pub policy: LogPolicy,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { max_size: 10 << 20, max_files: 10, policy: LogPolicy::Block }
    }
}

/// A task's log, as the writer needs to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogSpec {
    /// The allocation's directory on the host.
    pub alloc_dir: PathBuf,
    /// The task's name, by which its files are called.
    pub task: String,
    /// How it is kept.
    #[serde(flatten)]
    pub options: LogOptions,
}

/// The FIFO of a stream in a task's directory.
pub fn fifo(dir: &Path, stream: &str) -> PathBuf {
    dir.join(stream)
}

/// Descriptors of a task's FIFOs, never read: what is in them lives as long as this does.
#[derive(Debug, Default)]
pub struct Hold(#[allow(dead_code, reason = "held, never used")] Vec<fs::File>);

impl Hold {
    /// Of a task's directory. What is not there need not be held.
    pub fn new(dir: &Path) -> Self {
        let open = |stream: &&str| {
            let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
            fs::File::options().read(true).custom_flags(flags).open(fifo(dir, stream)).ok()
        };
        Self(STREAMS.iter().filter_map(open).collect())
    }
}

/// Makes a task's directory, which the writer sees from then on. With a terminal there is one stream only.
///
/// # Errors
/// As the file system; nothing is left then.
pub fn prepare(dir: &Path, spec: &LogSpec, terminal: bool) -> Result<(), LogError> {
    let failed = |doing, path: &Path| {
        let path = path.to_owned();
        move |source| LogError { doing, path, source }
    };
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let making = dir.with_file_name(format!(".{name}"));
    remove(&making)?;
    let make = || {
        fs::DirBuilder::new().mode(0o700).create(&making).map_err(failed("create", &making))?;
        for stream in &STREAMS[..if terminal { 1 } else { 2 }] {
            let path = fifo(&making, stream);
            mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|errno| failed("create", &path)(errno.into()))?;
        }
        let path = making.join(SPEC);
        let text = serde_json::to_vec(spec).map_err(|error| failed("describe", &path)(error.into()))?;
        write_private(&path, &text).map_err(failed("write", &path))?;
        fs::rename(&making, dir).map_err(failed("create", dir))
    };
    make().inspect_err(|_| drop(remove(&making)))
}

/// Says that the shim has the FIFOs open. A task without a log of ours is fine.
///
/// # Errors
/// As the file system.
pub fn started(dir: &Path) -> Result<(), LogError> {
    let path = dir.join(STARTED);
    match create_private(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(LogError { doing: "create", path, source }),
        _ => Ok(()),
    }
}

/// Waits until the writer has written out what a task that has ended left in its FIFOs: true when it has.
pub async fn drained(dir: &Path, limit: Duration) -> bool {
    let deadline = tokio::time::Instant::now() + limit;
    // The writer removes a FIFO when it has seen its end.
    while dir.join(STARTED).exists() && STREAMS.iter().any(|stream| fifo(dir, stream).exists()) {
        if tokio::time::Instant::now() > deadline {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
    true
}

/// Removes a task's directory. Not there is fine.
///
/// # Errors
/// As the file system.
pub fn remove(dir: &Path) -> Result<(), LogError> {
    match fs::remove_dir_all(dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(LogError { doing: "remove", path: dir.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Is there a task with a log? Where that can't be told, there may be.
pub fn has_tasks(logs: &Path) -> bool {
    match tasks(logs) {
        Ok(tasks) => !tasks.is_empty(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// Names of the tasks that have a log.
fn tasks(logs: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(logs)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') && entry.file_type()?.is_dir() {
            names.push(name);
        }
    }
    Ok(names)
}
