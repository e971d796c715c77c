//! Tasks' logs without Nomad's log collector: a task's shim writes into FIFOs of this driver, and one log writer for
//! each node moves the output to the files where Nomad looks for it, `<alloc>/alloc/logs/<task>.stdout.N`, rotated by
//! size and count.
//!
//! No output is lost, duplicated or reordered when one of the processes dies. Bytes go from a FIFO to a file by
//! splice(2), which removes from the pipe exactly the bytes that it has written to the file. A FIFO's content exists as
//! long as a process has the FIFO open, and the shim, the log writer and the log writer supervisor have it open.
//!
//! The work of the log writer is described on disk: each task has a directory in [`crate::places::Places::logs`] with
//! its two FIFOs and a description. The directory appears complete (by rename), and is removed when the task is
//! destroyed.

mod confine;
mod rotated_files;
mod status;
mod stream;
mod supervisor;
mod watch;
mod writer;

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use serde::{Deserialize, Serialize};

pub use confine::Role;
pub use status::{Losses, StreamLosses, changed_file, read_losses};
pub use supervisor::{SUPERVISOR_COMMAND, WRITER_FLAG, run_supervisor, running_supervisor, stop, supervisor_args};
pub use writer::run_writer;

use crate::files::{create_private, none_if_missing, remove_dir_all_if_exists, write_private};

/// The file in a task's directory with its [`LogSpec`].
const SPEC: &str = "spec.json";
/// The file in a task's directory that exists once the task's shim has the FIFOs open. From then on, a FIFO that no
/// process has open for writing is at its end.
const STARTED: &str = "started";
/// The names of the two streams and of their FIFOs.
pub const STREAMS: [&str; 2] = ["stdout", "stderr"];
/// How often to check whether the log writer has removed the FIFOs of a task that has ended.
const DRAIN_POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Why a task's log could not be set up or removed.
#[derive(Debug, thiserror::Error)]
#[error("could not {doing} {path} for a task's log")]
pub struct LogError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The treatment of output that can't be written, because the disk is full or the log directory was replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogPolicy {
    /// The task's writes block until the output can be written.
    #[default]
    Block,
    /// The output is dropped and counted.
    Drop,
}

/// The limits of a task's log, and the policy for output that can't be written. The defaults are those of Nomad's
/// `logs` block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogOptions {
    /// The largest size of a file in bytes.
    pub max_size: u64,
    /// The largest number of files of one stream.
    pub max_files: u32,
    /// The treatment of output that can't be written.
    pub policy: LogPolicy,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { max_size: 10 << 20, max_files: 10, policy: LogPolicy::Block }
    }
}

/// The description of a task's log for the log writer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogSpec {
    /// The allocation's directory on the host.
    pub alloc_dir: PathBuf,
    /// The task's name, with which the names of its log files begin.
    pub task: String,
    /// The limits and the policy.
    #[serde(flatten)]
    pub options: LogOptions,
}

/// Returns the path of a stream's FIFO in a task's directory.
pub fn fifo_path(dir: &Path, stream: &str) -> PathBuf {
    dir.join(stream)
}

/// Descriptors of a task's FIFOs, from which nothing is read. The kernel keeps the content of the FIFOs for as long as
/// this guard exists.
#[derive(Debug, Default)]
pub struct FifoGuard([Option<fs::File>; STREAMS.len()]);

impl FifoGuard {
    /// Opens the FIFOs in a task's directory. A FIFO that can't be opened is left out and logged: the log writer
    /// supervisor has the FIFO open, too.
    pub fn new(dir: &Path) -> Self {
        let mut guard = Self::default();
        if let Err(error) = guard.open_missing(dir) {
            tracing::warn!(path = %dir.display(), %error, "could not open a FIFO of a task's log");
        }
        guard
    }

    /// Drops the descriptors of FIFOs that have been removed from a task's directory, or replaced by another FIFO. If that
    /// is not known, a descriptor is kept.
    fn drop_replaced(&mut self, dir: &Path) {
        for (stream, fifo) in STREAMS.iter().zip(&mut self.0) {
            let Some(file) = fifo else { continue };
            let is_replaced = match (file.metadata(), none_if_missing(fs::symlink_metadata(fifo_path(dir, stream)))) {
                (_, Ok(None)) => true,
                (Ok(held), Ok(Some(present))) => {
                    let is_same = (held.dev(), held.ino()) == (present.dev(), present.ino());
                    present.file_type().is_fifo() && !is_same
                }
                (Err(_), _) | (_, Err(_)) => false,
            };
            if is_replaced {
                *fifo = None;
            }
        }
    }

    /// Opens those FIFOs in a task's directory that this guard does not have open yet. A FIFO that does not exist is
    /// left out: it is written completely, or the task has a terminal and thus only one stream.
    ///
    /// # Errors
    /// The first error of opening a FIFO. The other FIFO is opened nevertheless.
    fn open_missing(&mut self, dir: &Path) -> io::Result<()> {
        let mut outcome = Ok(());
        for (stream, fifo) in STREAMS.iter().zip(&mut self.0).filter(|(_, fifo)| fifo.is_none()) {
            let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
            let opened = fs::File::options().read(true).custom_flags(flags).open(fifo_path(dir, stream));
            match none_if_missing(opened) {
                Ok(opened) => *fifo = opened,
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome
    }
}

/// Creates a task's directory, so that the log writer finds the task. A task with a terminal has only one stream.
///
/// # Errors
/// When a file can't be created. Then the function removes what it has created.
pub fn create_task_dir(dir: &Path, spec: &LogSpec, terminal: bool) -> Result<(), LogError> {
    let failed = |doing, path: &Path| {
        let path = path.to_owned();
        move |source| LogError { doing, path, source }
    };
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let draft = dir.with_file_name(format!(".{name}"));
    remove_task_dir(&draft)?;
    let create = || {
        fs::DirBuilder::new().mode(0o700).create(&draft).map_err(failed("create", &draft))?;
        for stream in &STREAMS[..if terminal { 1 } else { 2 }] {
            let path = fifo_path(&draft, stream);
            mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|errno| failed("create", &path)(errno.into()))?;
        }
        let path = draft.join(SPEC);
        let text = serde_json::to_vec(spec).map_err(|error| failed("encode", &path)(error.into()))?;
        write_private(&path, &text).map_err(failed("write", &path))?;
        fs::rename(&draft, dir).map_err(failed("create", dir))
    };
    create().inspect_err(|_| drop(remove_task_dir(&draft)))
}

/// Records for the log writer that the shim has the FIFOs open. Does nothing for a task whose log this driver does not
/// write.
///
/// # Errors
/// When the file can't be created.
pub fn mark_started(dir: &Path) -> Result<(), LogError> {
    let path = dir.join(STARTED);
    let created = none_if_missing(create_private(&path)).map(drop);
    created.map_err(|source| LogError { doing: "create", path, source })
}

/// Waits until the log writer has written all output that a task that has ended left in its FIFOs. Returns false when
/// that takes longer than `limit`.
pub async fn wait_until_drained(dir: &Path, limit: Duration) -> bool {
    let deadline = tokio::time::Instant::now() + limit;
    // The log writer removes a FIFO after it has written all of it.
    while dir.join(STARTED).exists() && STREAMS.iter().any(|stream| fifo_path(dir, stream).exists()) {
        if tokio::time::Instant::now() > deadline {
            return false;
        }
        tokio::time::sleep(DRAIN_POLL_INTERVAL).await;
    }
    true
}

/// Removes a task's directory. It is not an error if the directory does not exist.
///
/// # Errors
/// When the directory can't be removed.
pub fn remove_task_dir(dir: &Path) -> Result<(), LogError> {
    remove_dir_all_if_exists(dir).map_err(|source| LogError { doing: "remove", path: dir.to_owned(), source })
}

/// Returns whether there is a task with a log. Also returns true when the directory of logs can't be read.
pub fn has_tasks(logs: &Path) -> bool {
    none_if_missing(task_names(logs)).map_or(true, |tasks| tasks.is_some_and(|tasks| !tasks.is_empty()))
}

/// Returns the names of the tasks' directories.
fn task_names(logs: &Path) -> io::Result<Vec<String>> {
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
