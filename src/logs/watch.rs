//! What comes to the directory of tasks' logs, and goes: for the writer and for its keeper.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};

/// A change.
#[derive(Debug)]
pub(super) enum Change {
    /// A task's directory is there, whole.
    Came(String),
    /// A task's directory is gone.
    Gone(String),
    /// Something was missed: whoever cares looks again.
    Missed,
    /// All of it is being removed.
    Over,
}

/// A watch over the directory.
#[derive(Debug)]
pub(super) struct Watch {
    inotify: Inotify,
    /// A file there. Its end is the directory's, which is not told itself: our open files keep it.
    lock: &'static str,
}

impl Watch {
    /// Of `logs`, with the file `lock` in it.
    pub(super) fn new(logs: &Path, lock: &'static str, flags: InitFlags) -> io::Result<Self> {
        let inotify = Inotify::init(flags | InitFlags::IN_CLOEXEC)?;
        inotify.add_watch(logs, AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE)?;
        Ok(Self { inotify, lock })
    }

    /// What has changed since the last time; waits for that, unless the watch was made not to.
    pub(super) fn changes(&self) -> io::Result<Vec<Change>> {
        let events = match self.inotify.read_events() {
            Ok(events) => events,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        };
        let change = |event: nix::sys::inotify::InotifyEvent| {
            let gone = event.mask.contains(AddWatchFlags::IN_DELETE);
            let name = event.name.map(|name| name.to_string_lossy().into_owned());
            match name {
                _ if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) => Some(Change::Missed),
                Some(name) if gone && name == self.lock => Some(Change::Over),
                Some(name) if name.starts_with('.') => None,
                Some(name) if gone => Some(Change::Gone(name)),
                Some(name) => Some(Change::Came(name)),
                None => None,
            }
        };
        Ok(events.into_iter().filter_map(change).collect())
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}
