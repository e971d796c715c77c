//! One stream of one task, from its FIFO to its files.

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

use super::{LogPolicy, LogSpec, STARTED, fifo, series::Series, status::StreamLosses};
use crate::fifo::{is_closed, unread};

/// A stream's turn is over after so many bytes: the others wait.
const TURN: u64 = 1 << 20;
/// A line up to this long is not split over two files (Nomad's rotator: `lineScanLimit`).
const LINE: usize = 32 << 10;
/// What could not be written is tried again after this.
const AGAIN: Duration = Duration::from_millis(500);

/// What a turn came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// All that was there has been moved: so many bytes.
    Idle(u64),
    /// There is more.
    More(u64),
    /// Its file takes nothing; it rests until then.
    Stuck(Instant),
    /// Its last writer has gone, and all is written.
    Over,
}

/// A pipe to look at a FIFO's contents without taking them.
#[derive(Debug)]
pub struct Scratch {
    read: File,
    write: File,
    null: File,
}

impl Scratch {
    pub fn new() -> io::Result<Self> {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK)?;
        Ok(Self { read: read.into(), write: write.into(), null: File::options().write(true).open("/dev/null")? })
    }

    /// The first bytes of a FIFO, up to `limit`, which stay there.
    fn peek(&mut self, fifo: &File, limit: usize) -> io::Result<Vec<u8>> {
        let count = tee(fifo, &self.write, limit, SpliceFFlags::SPLICE_F_NONBLOCK)?;
        let mut bytes = vec![0; count];
        io::Read::read_exact(&mut self.read, &mut bytes)?;
        Ok(bytes)
    }
}

/// A FIFO and where it goes.
#[derive(Debug)]
pub struct Stream {
    path: PathBuf,
    fifo: File,
    series: Series,
    max_size: u64,
    policy: LogPolicy,
    /// Dropped since the file was last written to; told there when it can be again.
    untold: u64,
    /// Dropped in all.
    pub dropped: u64,
    /// Why nothing is written.
    pub stuck: Option<String>,
    again: Option<Instant>,
}

impl Stream {
    /// The stream `name` of the task in `dir`, of which so much was `lost` before.
    ///
    /// # Errors
    /// When its FIFO can't be opened; not found when it has been written out.
    pub fn open(dir: &Path, name: &str, spec: &LogSpec, lost: &StreamLosses) -> io::Result<Self> {
        let path = fifo(dir, name);
        let open = |read: bool| {
            File::options().read(read).write(!read).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(&path)
        };
        let fifo = open(true)?;
        // Its shim has had it open; one that comes later is seen. A reader that has seen no writer is not told that the
        // last one is gone (fifo(7)): let it see one.
        if dir.join(STARTED).exists() {
            drop(open(false)?);
        }
        let mut series = Series::new(spec.alloc_dir.clone(), format!("{}.{name}", spec.task), spec.options.max_files);
        // As Nomad's collector does: who follows a log that says nothing yet finds it. Where that fails, the first bytes
        // will tell.
        let _ = series.current();
        let (max_size, policy) = (spec.options.max_size.max(1), spec.options.policy);
        let (dropped, stuck) = (lost.dropped, lost.stuck.clone());
        Ok(Self { path, fifo, series, max_size, policy, untold: 0, dropped, stuck, again: None })
    }

    /// For epoll.
    pub fn fifo(&self) -> &File {
        &self.fifo
    }

    /// Removes the FIFO: that is how the others know that all of it is written.
    pub fn finish(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Moves what there is, up to a turn's worth.
    ///
    /// # Errors
    /// When the FIFO fails; what is wrong with the file is the policy's business.
    pub fn turn(&mut self, scratch: &mut Scratch) -> io::Result<Turn> {
        let mut moved = 0;
        loop {
            let waiting = unread(&self.fifo)?;
            if waiting == 0 {
                return Ok(if self.has_ended()? { Turn::Over } else { Turn::Idle(moved) });
            }
            if moved >= TURN {
                return Ok(Turn::More(moved));
            }
            if let Some(again) = self.again.filter(|again| *again > Instant::now()) {
                match self.policy {
                    LogPolicy::Block => return Ok(Turn::Stuck(again)),
                    LogPolicy::Drop => moved += self.drop_some(scratch, waiting)?,
                }
                continue;
            }
            match self.write_some(scratch, waiting) {
                Ok(count) => {
                    (self.stuck, self.again) = (None, None);
                    moved += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Idle(moved)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.stuck = Some(error.to_string());
                    self.again = Some(Instant::now() + AGAIN);
                }
            }
        }
    }

    /// Has its last writer gone? Asked before the FIFO is looked at again: what came before its end is there by then.
    fn has_ended(&self) -> io::Result<bool> {
        Ok(is_closed(&self.fifo)? && unread(&self.fifo)? == 0)
    }

    /// Moves some of the `waiting` bytes to the file, which never grows beyond its size.
    fn write_some(&mut self, scratch: &mut Scratch, waiting: u64) -> io::Result<u64> {
        if self.untold > 0 {
            self.tell_of_the_dropped()?;
        }
        let (file, size) = self.series.current()?;
        let room = self.max_size.saturating_sub(size);
        if room == 0 {
            self.series.rotate()?;
            return Ok(0);
        }
        let count = if waiting <= room {
            waiting
        } else {
            match split(&scratch.peek(&self.fifo, usize::try_from(room).unwrap_or(usize::MAX))?, room, size == 0) {
                Some(count) => count as u64,
                None => {
                    self.series.rotate()?;
                    return Ok(0);
                }
            }
        };
        let mut offset = i64::try_from(size).map_err(io::Error::other)?;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let moved = splice(&self.fifo, None, file, Some(&mut offset), count, SpliceFFlags::SPLICE_F_NONBLOCK)?;
        Ok(moved as u64)
    }

    fn drop_some(&mut self, scratch: &Scratch, waiting: u64) -> io::Result<u64> {
        let count = usize::try_from(waiting).unwrap_or(usize::MAX);
        let moved = match splice(&self.fifo, None, &scratch.null, None, count, SpliceFFlags::SPLICE_F_NONBLOCK) {
            Ok(moved) => moved as u64,
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        self.untold += moved;
        self.dropped += moved;
        Ok(moved)
    }

    fn tell_of_the_dropped(&mut self) -> io::Result<()> {
        use std::os::unix::fs::FileExt as _;
        let why = self.stuck.clone().unwrap_or_default();
        let line = format!("\n[nomad-driver-shim: {} bytes of output were dropped here: {why}]\n", self.untold);
        if self.series.current()?.1 + line.len() as u64 > self.max_size {
            self.series.rotate()?;
        }
        let (file, size) = self.series.current()?;
        file.write_all_at(line.as_bytes(), size).inspect_err(|_| {
            // Not half a line.
            let _ = file.set_len(size);
        })?;
        self.untold = 0;
        Ok(())
    }
}

/// How much of `next` goes into the `room` that is left, when more is to come than fits: whole lines. None: nothing, it
/// goes into the next file. A line longer than [`LINE`], or than a whole file (`fresh`: this one is empty), is split.
fn split(next: &[u8], room: u64, fresh: bool) -> Option<usize> {
    let room = usize::try_from(room).unwrap_or(usize::MAX);
    let fits = &next[..next.len().min(room)];
    match fits.iter().rposition(|byte| *byte == b'\n') {
        Some(end) => Some(end + 1),
        None if fresh || fits.len() >= LINE => Some(fits.len()).filter(|count| *count > 0),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_stay_whole_when_they_can() {
        assert_eq!(split(b"one\ntwo\nthr", 10, false), Some(8));
        assert_eq!(split(b"one\ntwo\n", 5, false), Some(4));
        assert_eq!(split(b"toolong\n", 5, false), None, "into the next file");
        assert_eq!(split(b"toolong\n", 5, true), Some(5), "no file would hold it");
        assert_eq!(split(&vec![b'x'; 2 * LINE], LINE as u64 + 7, false), Some(LINE + 7), "too long to be kept whole");
        assert_eq!(split(b"", 5, true), None);
    }
}
