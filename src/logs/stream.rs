//! Moves the output of one stream of a task from its FIFO to its log files.

use std::{
    fs::File,
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{SpliceFFlags, splice, tee},
};

use super::{LogPolicy, LogSpec, STARTED, fifo_path, rotated_files::RotatedFiles, status::StreamLosses};
use crate::{
    fifo::{has_hung_up, unread},
    files::remove_file_if_exists,
};

/// The number of bytes after which a transfer of a stream ends, because other streams wait.
const TRANSFER_MAX: u64 = 1 << 20;
/// The length up to which a line is not split between two files (Nomad's rotator: `lineScanLimit`).
const WHOLE_LINE_MAX: usize = 32 << 10;
/// The delay before output that could not be written is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// The outcome of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TransferOutcome {
    /// The FIFO is empty. Has the number of bytes that were moved or dropped.
    Drained(u64),
    /// The FIFO has more output. Has the number of bytes that were moved or dropped.
    Pending(u64),
    /// The file can't be written. Has the time at which the transfer must be tried again.
    Stuck(Instant),
    /// The last writer has closed the FIFO, and all output is written.
    Finished,
}

/// A pipe with which a FIFO's content is read without removing it, and a descriptor of `/dev/null`.
#[derive(Debug)]
pub(crate) struct PeekPipe {
    read: File,
    write: File,
    null: File,
}

impl PeekPipe {
    pub(crate) fn new() -> io::Result<Self> {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK)?;
        Ok(Self { read: read.into(), write: write.into(), null: File::options().write(true).open("/dev/null")? })
    }

    /// Returns the first bytes of a FIFO, up to `limit`, without removing them.
    fn peek(&mut self, fifo: &File, limit: usize) -> io::Result<Vec<u8>> {
        let count = tee(fifo, &self.write, limit, SpliceFFlags::SPLICE_F_NONBLOCK)?;
        let mut bytes = vec![0; count];
        io::Read::read_exact(&mut self.read, &mut bytes)?;
        Ok(bytes)
    }
}

/// A FIFO and the files to which its output is moved.
#[derive(Debug)]
pub(crate) struct Stream {
    path: PathBuf,
    fifo: File,
    files: RotatedFiles,
    max_size: u64,
    policy: LogPolicy,
    /// The number of dropped bytes that no notice in the log file reports yet.
    unreported: u64,
    /// The number of all bytes that were dropped.
    pub dropped: u64,
    /// The error because of which nothing can be written now.
    pub stuck: Option<String>,
    /// The time at which writing is tried again after an error.
    retry_at: Option<Instant>,
}

impl Stream {
    /// Opens the stream `name` of the task in `dir`. `losses` are those that an earlier log writer has reported.
    ///
    /// # Errors
    /// When the FIFO can't be opened. It does not exist if all its output has been written.
    pub(crate) fn open(dir: &Path, name: &str, spec: &LogSpec, losses: &StreamLosses) -> io::Result<Self> {
        let path = fifo_path(dir, name);
        let open = |read: bool| {
            File::options().read(read).write(!read).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(&path)
        };
        let fifo = open(true)?;
        // The kernel reports the end of a FIFO only to a reader that had the FIFO open while a writer had it open
        // (fifo(7)). The shim may have opened and closed the FIFO already. So this process opens and closes the FIFO as
        // a writer itself, unless the shim has not opened the FIFO yet.
        if dir.join(STARTED).exists() {
            drop(open(false)?);
        }
        let mut files =
            RotatedFiles::new(spec.alloc_dir.clone(), format!("{}.{name}", spec.task), spec.options.max_files);
        // The first file is created at once, as by Nomad's log collector, so that a client can follow a log without
        // output. An error is ignored here, because the first output meets it again.
        let _ = files.current();
        let (max_size, policy) = (spec.options.max_size.max(1), spec.options.policy);
        let (dropped, stuck) = (losses.dropped, losses.stuck.clone());
        Ok(Self { path, fifo, files, max_size, policy, unreported: 0, dropped, stuck, retry_at: None })
    }

    /// Returns the FIFO for epoll.
    pub(crate) fn fifo(&self) -> &File {
        &self.fifo
    }

    /// Removes the FIFO, which shows other processes that all its output is written.
    pub(crate) fn remove_fifo(&self) -> io::Result<()> {
        remove_file_if_exists(&self.path)
    }

    /// Moves the output in the FIFO to the files, up to `TRANSFER_MAX` bytes. Output that can't be written is treated
    /// according to the log's policy.
    ///
    /// # Errors
    /// When the FIFO can't be read.
    pub(crate) fn transfer(&mut self, peek_pipe: &mut PeekPipe) -> io::Result<TransferOutcome> {
        let mut moved = 0;
        loop {
            let waiting = unread(&self.fifo)?;
            if waiting == 0 {
                return Ok(if self.has_ended()? { TransferOutcome::Finished } else { TransferOutcome::Drained(moved) });
            }
            if moved >= TRANSFER_MAX {
                return Ok(TransferOutcome::Pending(moved));
            }
            if let Some(retry_at) = self.retry_at.filter(|at| *at > Instant::now()) {
                match self.policy {
                    LogPolicy::Block => return Ok(TransferOutcome::Stuck(retry_at)),
                    LogPolicy::Drop => moved += self.drop_bytes(peek_pipe, waiting)?,
                }
                continue;
            }
            match self.write_bytes(peek_pipe, waiting) {
                Ok(count) => {
                    (self.stuck, self.retry_at) = (None, None);
                    moved += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(TransferOutcome::Drained(moved)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.stuck = Some(error.to_string());
                    self.retry_at = Some(Instant::now() + RETRY_INTERVAL);
                }
            }
        }
    }

    /// Returns whether the last writer has closed the FIFO and no output is left in it. The FIFO's content is checked
    /// last, because output that was written before the end is certainly there then.
    fn has_ended(&self) -> io::Result<bool> {
        Ok(has_hung_up(&self.fifo)? && unread(&self.fifo)? == 0)
    }

    /// Moves some of the `waiting` bytes to the current file, which never exceeds the size limit. Returns 0 after a
    /// rotation.
    fn write_bytes(&mut self, peek_pipe: &mut PeekPipe, waiting: u64) -> io::Result<u64> {
        if self.unreported > 0 {
            self.write_drop_notice()?;
        }
        let (file, size) = self.files.current()?;
        let room = self.max_size.saturating_sub(size);
        if room == 0 {
            self.files.rotate()?;
            return Ok(0);
        }
        let count = if waiting <= room {
            waiting
        } else {
            match whole_lines(
                &peek_pipe.peek(&self.fifo, usize::try_from(room).unwrap_or(usize::MAX))?,
                room,
                size == 0,
            ) {
                Some(count) => count as u64,
                None => {
                    self.files.rotate()?;
                    return Ok(0);
                }
            }
        };
        let mut offset = i64::try_from(size).map_err(io::Error::other)?;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let moved = splice(&self.fifo, None, file, Some(&mut offset), count, SpliceFFlags::SPLICE_F_NONBLOCK)?;
        Ok(moved as u64)
    }

    /// Drops up to `waiting` bytes of the FIFO.
    fn drop_bytes(&mut self, peek_pipe: &PeekPipe, waiting: u64) -> io::Result<u64> {
        let count = usize::try_from(waiting).unwrap_or(usize::MAX);
        let moved = match splice(&self.fifo, None, &peek_pipe.null, None, count, SpliceFFlags::SPLICE_F_NONBLOCK) {
            Ok(moved) => moved as u64,
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        self.unreported += moved;
        self.dropped += moved;
        Ok(moved)
    }

    /// Writes a notice about the bytes that were dropped into the log file.
    fn write_drop_notice(&mut self) -> io::Result<()> {
        use std::os::unix::fs::FileExt as _;
        let why = self.stuck.clone().unwrap_or_default();
        let line = format!("\n[nomad-driver-shim: {} bytes of output were dropped here: {why}]\n", self.unreported);
        if self.files.current()?.1 + line.len() as u64 > self.max_size {
            self.files.rotate()?;
        }
        let (file, size) = self.files.current()?;
        file.write_all_at(line.as_bytes(), size).inspect_err(|_| {
            // Removes a notice that was written in part.
            let _ = file.set_len(size);
        })?;
        self.unreported = 0;
        Ok(())
    }
}

/// Returns how many bytes of `next` go into the current file, which has `room` bytes left, when not all output fits:
/// whole lines. `None` means that all of it goes into the next file. A line is split if it is longer than
/// `WHOLE_LINE_MAX`, or does not fit into an empty file (`fresh`).
fn whole_lines(next: &[u8], room: u64, fresh: bool) -> Option<usize> {
    let room = usize::try_from(room).unwrap_or(usize::MAX);
    let fits = &next[..next.len().min(room)];
    match fits.iter().rposition(|byte| *byte == b'\n') {
        Some(end) => Some(end + 1),
        None if fresh || fits.len() >= WHOLE_LINE_MAX => Some(fits.len()).filter(|count| *count > 0),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_stay_whole_when_they_can() {
        assert_eq!(whole_lines(b"one\ntwo\nthr", 10, false), Some(8));
        assert_eq!(whole_lines(b"one\ntwo\n", 5, false), Some(4));
        assert_eq!(whole_lines(b"toolong\n", 5, false), None, "the line goes into the next file");
        assert_eq!(whole_lines(b"toolong\n", 5, true), Some(5), "the line fits into no file");
        assert_eq!(
            whole_lines(&vec![b'x'; 2 * WHOLE_LINE_MAX], WHOLE_LINE_MAX as u64 + 7, false),
            Some(WHOLE_LINE_MAX + 7),
            "too long to be kept whole"
        );
        assert_eq!(whole_lines(b"", 5, true), None);
    }
}
