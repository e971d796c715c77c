//! A task's output streams. Nomad's FIFOs are passed to the shim without trust in the directory in which they lie.
//!
//! The log directory is writable from inside the task (`/alloc/logs`), so the task can replace a FIFO by a symlink.
//! Each FIFO is therefore opened with `O_PATH | O_NOFOLLOW` beneath the allocation's directory, checked, and passed on
//! as `/proc/<pid of this process>/fd/N`, which names exactly the inode that was checked.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::fifo;

/// The reason why an output stream was refused.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The FIFO does not exist, can't be opened, or its path leads out of the allocation's directory.
    #[error("could not open the log FIFO {path}")]
    Open {
        /// The path that Nomad has passed.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file at the path is not a FIFO.
    #[error("log FIFO {path} is {kind}; it was replaced, possibly from inside the task")]
    NotFifo {
        /// The path that Nomad has passed.
        path: PathBuf,
        /// The type of the file that is there.
        kind: &'static str,
    },
}

/// One output stream.
#[derive(Debug)]
enum OutputStream {
    /// The output is discarded.
    Discard,
    /// A FIFO that was checked.
    Fifo(OwnedFd),
}

/// A task's output streams, which are kept open until the shim has opened them.
#[derive(Debug)]
pub struct Stdio {
    stdout: OutputStream,
    stderr: OutputStream,
    /// Read ends of the FIFOs, from which nothing is read. Because of them the shim need not wait for a reader, and the
    /// output of a very short task is not lost if Nomad's log collector opens the FIFOs only after the task's end.
    readers: Vec<(String, File)>,
}

impl Stdio {
    /// Opens and checks both streams. The output is discarded for `/dev/null` (Nomad's `logs { disabled = true }`) and
    /// for an empty path.
    ///
    /// # Errors
    /// Fails when a path is missing or is no FIFO.
    pub fn open(alloc_dir: &Path, stdout: &Path, stderr: &Path) -> Result<Self, StdioError> {
        let (stdout, stderr) = (open(alloc_dir, stdout)?, open(alloc_dir, stderr)?);
        let mut readers = Vec::new();
        for stream in [&stdout, &stderr] {
            if let Some(path) = stream.path() {
                // This must not be a write end: if this process died with the last write end, the log collector would
                // see the end of the stream.
                let reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
                let reader = reader.map_err(|source| StdioError::Open { path: (&path).into(), source })?;
                readers.push((path, reader));
            }
        }
        Ok(Self { stdout, stderr, readers })
    }

    /// Returns the paths that the shim opens: both or none, because the shim requires that.
    pub fn paths(&self) -> (String, String) {
        let null = || "/dev/null".to_owned();
        match (self.stdout.path(), self.stderr.path()) {
            (None, None) => (String::new(), String::new()),
            (stdout, stderr) => (stdout.unwrap_or_else(null), stderr.unwrap_or_else(null)),
        }
    }

    /// Closes the streams once they are no longer needed. By now the shim has both streams open (and keeps read ends,
    /// too), so this process's ends are needed only if the task ends before its log collector has opened the FIFOs, as
    /// may happen on a busy node. In that case, the streams stay open for a moment after the task's end, so that the
    /// log collector gets the task's output.
    pub async fn hold_until_read(self, ended: impl Future<Output = ()>) {
        if tokio::time::timeout(COLLECTOR_GRACE, ended).await.is_err() {
            return;
        }
        let Self { stdout, stderr, readers } = self;
        let readers = readers.into_iter().map(|(path, reader)| wait_for_late_reader(path, reader));
        futures_util::future::join_all(readers).await;
        drop((stdout, stderr));
    }
}

/// Keeps the output of an ended task until its log collector has read it, or a deadline is over. The log collector may
/// be reading, may be done, may be about to open its end, or may wait in open(2) for a writer.
async fn wait_for_late_reader(path: String, reader: File) {
    let deadline = tokio::time::Instant::now() + READER_GRACE;
    let mut pause = Duration::from_millis(1);
    // While the shim may still write, or output is unread, nothing may be closed. The read end that is kept here does
    // not delay the end of the stream for the log collector.
    loop {
        // This unblocks a log collector that waits for a writer in open(2).
        drop(open_to_write(&path));
        let is_closed = fifo::has_hung_up(&reader).unwrap_or(false);
        let has_unread = fifo::unread(&reader).is_ok_and(|count| count > 0);
        if (is_closed && !has_unread) || tokio::time::Instant::now() > deadline {
            break;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    drop(reader);
    // The log collector is done, or has not opened the FIFO yet.
    if let Some(both) = show_end_or_open_both(&path) {
        tokio::time::sleep_until(deadline).await;
        drop(both);
    }
}

/// Opens a FIFO for writing. Fails with ENXIO if no process has it open for reading (fifo(7)).
fn open_to_write(path: &str) -> io::Result<File> {
    File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// Lets a present reader see the end of the stream. If there is no reader yet, returns both ends of the FIFO, which the
/// caller keeps open for a while.
fn show_end_or_open_both(path: &str) -> Option<File> {
    let no_reader = open_to_write(path).is_err_and(|error| error.raw_os_error() == Some(libc::ENXIO));
    let both = || File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
    no_reader.then(both)?.ok()
}

/// Write ends of a task's FIFOs, which are kept open from the end of one attempt until the next attempt has opened the
/// FIFOs. Nomad's log collector regards the close by the last writer as the end of the stream, and would leave the next
/// attempt without a reader.
#[derive(Debug)]
pub struct ParkedFifos(#[allow(dead_code, reason = "kept open, never used")] Vec<File>);

impl ParkedFifos {
    /// Opens the write ends that can be opened. A FIFO that is gone or was replaced is left to the next attempt.
    pub fn new(alloc_dir: &Path, stdout: &Path, stderr: &Path) -> Self {
        let hold = |path: &&Path| {
            let stream = open(alloc_dir, path).ok()?;
            File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(stream.path()?).ok()
        };
        Self([stdout, stderr].iter().filter_map(hold).collect())
    }
}

/// The longest time that a log collector needs to open a task's FIFOs. If a task runs longer, the log collector has
/// opened them.
const COLLECTOR_GRACE: Duration = Duration::from_secs(2);
/// The longest time that a reader needs to open its end of a FIFO.
const READER_GRACE: Duration = Duration::from_millis(500);

/// Lets Nomad's log collector see the end of both streams at once when a start has failed. Without that, the log
/// collector waits four seconds for a writer. This must be called in the context of a tokio runtime.
pub fn show_end(alloc_dir: &Path, stdout: &Path, stderr: &Path) {
    for path in [stdout, stderr] {
        let Ok(stream) = open(alloc_dir, path) else { continue };
        let Some(path) = stream.path() else { continue };
        // There is no reader yet: the start has failed before the log collector has opened the FIFO. Both ends are kept
        // open for a moment, so that the log collector can open the FIFO, and then sees the end of the stream.
        if let Some(both) = show_end_or_open_both(&path) {
            tokio::spawn(async move {
                tokio::time::sleep(READER_GRACE).await;
                drop(both);
            });
        }
    }
}

impl OutputStream {
    fn path(&self) -> Option<String> {
        match self {
            Self::Discard => None,
            Self::Fifo(fd) => Some(format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd())),
        }
    }
}

fn open(alloc_dir: &Path, path: &Path) -> Result<OutputStream, StdioError> {
    if path.as_os_str().is_empty() || path == Path::new("/dev/null") {
        return Ok(OutputStream::Discard);
    }
    let failed = |source| StdioError::Open { path: path.to_owned(), source };
    // Below the allocation's directory no symlink is followed at all. A test harness may have its FIFOs elsewhere;
    // there, only the last component is checked.
    let (root, below) = match path.strip_prefix(alloc_dir) {
        Ok(below) if !alloc_dir.as_os_str().is_empty() => (alloc_dir, below.as_os_str()),
        _ => (path.parent().unwrap_or(Path::new("/")), path.file_name().unwrap_or(OsStr::new("."))),
    };
    let root = File::open(root).map_err(failed)?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let fd = openat2(&root, below, how).map_err(|errno| failed(errno.into()))?;
    let file = File::from(fd);
    let kind = file.metadata().map_err(failed)?.file_type();
    let name = match () {
        () if kind.is_fifo() => return Ok(OutputStream::Fifo(file.into())),
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_dir() => "a directory",
        () if kind.is_file() => "a plain file",
        () if kind.is_char_device() || kind.is_block_device() => "a device",
        () => "a socket",
    };
    Err(StdioError::NotFifo { path: path.to_owned(), kind: name })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{sys::stat::Mode, unistd::mkfifo};
    use std::{fs, os::unix::fs::symlink};

    #[test]
    fn only_fifos_beneath_the_allocation_are_taken() {
        let alloc = tempfile::tempdir().expect("a temporary directory");
        let logs = alloc.path().join("alloc/logs");
        fs::create_dir_all(&logs).expect("made");
        let path = |name: &str| logs.join(name);
        mkfifo(&path("good"), Mode::S_IRWXU).expect("made");
        fs::write(path("file"), "untouched").expect("written");
        symlink(path("file"), path("link")).expect("linked");
        symlink(&logs, alloc.path().join("alloc/elsewhere")).expect("linked");

        let stdio = Stdio::open(alloc.path(), &path("good"), Path::new("/dev/null")).expect("opens");
        let (stdout, stderr) = stdio.paths();
        assert!(stdout.starts_with("/proc/") && stderr == "/dev/null", "{stdout} {stderr}");
        drop(stdio);

        for (name, kind) in [("file", "plain file"), ("link", "symbolic link")] {
            let error = Stdio::open(alloc.path(), &path(name), Path::new("")).expect_err("refused").to_string();
            assert!(error.contains(kind), "{error}");
        }
        let around = alloc.path().join("alloc/elsewhere/good");
        assert!(Stdio::open(alloc.path(), &around, Path::new("")).is_err(), "a symlink on the way");
        assert_eq!(fs::read_to_string(path("file")).expect("read"), "untouched");
        let none = Stdio::open(alloc.path(), Path::new("/dev/null"), Path::new("/dev/null")).expect("opens");
        assert_eq!(none.paths(), (String::new(), String::new()));
    }
}
