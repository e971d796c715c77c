//! A task's standard streams: Nomad's FIFOs, handed to the shim without ever trusting their directory.
//!
//! The log directory is writable from inside the task (`/alloc/logs`), which can put a symlink in a FIFO's place.
//! Each is therefore opened with `O_PATH | O_NOFOLLOW` beneath the allocation's directory, looked at, and handed on as
//! `/proc/<our pid>/fd/N`, which names the very inode that was looked at.

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

/// Why a stream was refused.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// It is not there, or leads elsewhere.
    #[error("log FIFO {path}")]
    Open {
        /// As Nomad names it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is something else.
    #[error("log FIFO {path} is {kind}; it was replaced, possibly from inside the task")]
    NotFifo {
        /// As Nomad names it.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
}

/// One stream.
#[derive(Debug)]
enum Stream {
    /// Nobody wants it.
    Discard,
    /// A checked FIFO.
    Fifo(OwnedFd),
}

/// A task's output streams, held until the shim has opened them.
#[derive(Debug)]
pub struct Stdio {
    stdout: Stream,
    stderr: Stream,
    /// Read ends that keep the shim from waiting for a reader, and what a very quick task has written from going with
    /// it, when Nomad's collector opens later than that. Never read from.
    readers: Vec<(String, File)>,
}

impl Stdio {
    /// Opens and checks both. `/dev/null` (Nomad's `logs { disabled = true }`) and an empty path mean: discard.
    ///
    /// # Errors
    /// When one is missing or no FIFO.
    pub fn open(alloc_dir: &Path, stdout: &Path, stderr: &Path) -> Result<Self, StdioError> {
        let (stdout, stderr) = (open(alloc_dir, stdout)?, open(alloc_dir, stderr)?);
        let mut readers = Vec::new();
        for stream in [&stdout, &stderr] {
            if let Some(path) = stream.path() {
                // Never a write end: were we to die with the last one, the collector would take it for the stream's end.
                let reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
                let reader = reader.map_err(|source| StdioError::Open { path: (&path).into(), source })?;
                readers.push((path, reader));
            }
        }
        Ok(Self { stdout, stderr, readers })
    }

    /// What the shim is to open: both streams or neither, as it insists.
    pub fn paths(&self) -> (String, String) {
        let null = || "/dev/null".to_owned();
        match (self.stdout.path(), self.stderr.path()) {
            (None, None) => (String::new(), String::new()),
            (stdout, stderr) => (stdout.unwrap_or_else(null), stderr.unwrap_or_else(null)),
        }
    }

    /// The shim has both open (it holds read ends too): ours are no longer needed, unless the task has ended before its
    /// collector was there, as on a busy node. Then what it has written waits here for a moment.
    pub async fn outlast(self, ended: impl Future<Output = ()>) {
        if tokio::time::timeout(LATE_TASK, ended).await.is_err() {
            return;
        }
        let Self { stdout, stderr, readers } = self;
        let readers = readers.into_iter().map(|(path, reader)| wait_for_the_late(path, reader));
        futures_util::future::join_all(readers).await;
        drop((stdout, stderr));
    }
}

/// The task is over; its collector may be reading, done, about to open its end, or waiting in that for a writer.
async fn wait_for_the_late(path: String, reader: File) {
    let deadline = tokio::time::Instant::now() + LATE_READER;
    let mut pause = Duration::from_millis(1);
    // As long as the shim may still write, or something is unread, nothing must be closed. A reader that holds on keeps
    // nobody from seeing the end.
    loop {
        // Lets one in that waits for a writer.
        drop(open_to_write(&path));
        let is_closed = fifo::is_closed(&reader).unwrap_or(false);
        let has_unread = fifo::unread(&reader).is_ok_and(|count| count > 0);
        if (is_closed && !has_unread) || tokio::time::Instant::now() > deadline {
            break;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    drop(reader);
    // It is done, or not there yet.
    if let Some(both) = end_or_hold(&path) {
        tokio::time::sleep_until(deadline).await;
        drop(both);
    }
}

/// Fails with ENXIO when nobody has it open for reading (fifo(7)).
fn open_to_write(path: &str) -> io::Result<File> {
    File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// Shows a reader that is there the end of the stream; for one that is not, both ends, to be held for a while.
fn end_or_hold(path: &str) -> Option<File> {
    let nobody = open_to_write(path).is_err_and(|error| error.raw_os_error() == Some(libc::ENXIO));
    let both = || File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
    nobody.then(both)?.ok()
}

/// Write ends of a task's FIFOs, held over the end of one attempt until the next has opened them: Nomad's collector
/// takes the last writer's end for the end of the stream, and would leave the next attempt without a reader.
#[derive(Debug)]
pub struct HeldOpen(#[allow(dead_code, reason = "held, never used")] Vec<File>);

impl HeldOpen {
    /// Holds what can be held. A FIFO that is gone or was replaced is the next attempt's business.
    pub fn new(alloc_dir: &Path, stdout: &Path, stderr: &Path) -> Self {
        let hold = |path: &&Path| {
            let stream = open(alloc_dir, path).ok()?;
            File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(stream.path()?).ok()
        };
        Self([stdout, stderr].iter().filter_map(hold).collect())
    }
}

/// A task that runs longer than this has not ended before its collector was there.
const LATE_TASK: Duration = Duration::from_secs(2);
/// A reader that is about to open its end has done so within this.
const LATE_READER: Duration = Duration::from_millis(500);

/// Nothing was started: lets Nomad's collector see the end of both streams at once. It waits four seconds for somebody
/// to open them otherwise. Must be called inside of a runtime.
pub fn give_up(alloc_dir: &Path, stdout: &Path, stderr: &Path) {
    for path in [stdout, stderr] {
        let Ok(stream) = open(alloc_dir, path) else { continue };
        let Some(path) = stream.path() else { continue };
        // No reader yet: we failed faster than the collector opens. Both ends held for a moment let it in, and their end
        // is what it then sees.
        if let Some(held) = end_or_hold(&path) {
            tokio::spawn(async move {
                tokio::time::sleep(LATE_READER).await;
                drop(held);
            });
        }
    }
}

impl Stream {
    fn path(&self) -> Option<String> {
        match self {
            Self::Discard => None,
            Self::Fifo(fd) => Some(format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd())),
        }
    }
}

fn open(alloc_dir: &Path, path: &Path) -> Result<Stream, StdioError> {
    if path.as_os_str().is_empty() || path == Path::new("/dev/null") {
        return Ok(Stream::Discard);
    }
    let failed = |source| StdioError::Open { path: path.to_owned(), source };
    // Below the allocation's directory no symlink is followed at all. A harness may have its FIFOs elsewhere; there
    // only the last component can be a trap.
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
        () if kind.is_fifo() => return Ok(Stream::Fifo(file.into())),
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
