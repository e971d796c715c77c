//! Watches the directory of tasks' logs by inotify, for the log writer and the log writer supervisor.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};

/// A change of the directory.
#[derive(Debug)]
pub(super) enum DirChange {
    /// A task's directory has appeared, with all of its files.
    Added(String),
    /// A task's directory was removed.
    Removed(String),
    /// The kernel has dropped events, so the caller must list the directory again.
    Overflow,
    /// The directory of all logs is being removed.
    DirRemoved,
}

/// An inotify watch of the directory.
#[derive(Debug)]
pub(super) struct DirWatch {
    inotify: Inotify,
    /// The name of a file in the directory. Its removal means that the directory is being removed: inotify does not
    /// report that itself as long as this process has files of the directory open.
    lock_name: &'static str,
}

impl DirWatch {
    /// Starts to watch `logs`, in which the file `lock_name` exists.
    pub(super) fn new(logs: &Path, lock_name: &'static str, flags: InitFlags) -> io::Result<Self> {
        let inotify = Inotify::init(flags | InitFlags::IN_CLOEXEC)?;
        inotify.add_watch(logs, AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE)?;
        Ok(Self { inotify, lock_name })
    }

    /// Waits until there is a change, but no longer than `limit`. Returns false if there is none.
    pub(super) fn wait(&self, limit: PollTimeout) -> io::Result<bool> {
        match poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLIN)], limit) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Returns the changes since the last call. Waits for one if there is none, unless the watch was created with
    /// `IN_NONBLOCK`.
    pub(super) fn changes(&self) -> io::Result<Vec<DirChange>> {
        let events = match self.inotify.read_events() {
            Ok(events) => events,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        };
        let change = |event: nix::sys::inotify::InotifyEvent| {
            let gone = event.mask.contains(AddWatchFlags::IN_DELETE);
            let name = event.name.map(|name| name.to_string_lossy().into_owned());
            match name {
                _ if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) => Some(DirChange::Overflow),
                Some(name) if gone && name == self.lock_name => Some(DirChange::DirRemoved),
                Some(name) if name.starts_with('.') => None,
                Some(name) if gone => Some(DirChange::Removed(name)),
                Some(name) => Some(DirChange::Added(name)),
                None => None,
            }
        };
        Ok(events.into_iter().filter_map(change).collect())
    }
}

impl AsFd for DirWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}
