//! Tells when a runtime has made a container, without waiting for the shim to say so.
//!
//! The last thing that runc and crun do in `create` is to write the container's pid to the file that the shim names
//! (`--pid-file`, `init.pid` in the bundle). The shim then waits for the runtime's end and looks at the container's
//! cgroups, which takes it 2 to 4 ms on a host with cgroup version 1.

use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::oneshot,
};
use tokio_util::task::AbortOnDropHandle;

/// As shims call it.
const NAME: &str = "init.pid";

/// Watches bundles. One for all: closing an inotify instance waits for the kernel's readers, for milliseconds.
#[derive(Debug)]
pub struct PidFiles {
    watches: Arc<Watches>,
    _listening: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Watches {
    inotify: AsyncFd<Source>,
    awaited: Mutex<HashMap<WatchDescriptor, Awaited>>,
}

#[derive(Debug)]
struct Awaited {
    path: PathBuf,
    tell: oneshot::Sender<u32>,
}

#[derive(Debug)]
struct Source(Inotify);

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl std::os::fd::AsRawFd for Source {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_fd().as_raw_fd()
    }
}

/// The pid file of one bundle.
#[derive(Debug)]
pub struct PidFile {
    watches: Arc<Watches>,
    watch: WatchDescriptor,
    told: oneshot::Receiver<u32>,
}

impl PidFiles {
    /// Begins to listen.
    ///
    /// # Errors
    /// As inotify_init1(2): a user has 128 instances by default.
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // SAFETY: `Source` owns its descriptor, which stays open and itself for as long as the AsyncFd has it.
        let inotify = unsafe { AsyncFd::register_with_interest(Source(inotify), Interest::READABLE) }?;
        let watches = Arc::new(Watches { inotify, awaited: Mutex::default() });
        let listening = tokio::spawn({
            let watches = watches.clone();
            async move {
                if let Err(error) = watches.listen().await {
                    tracing::warn!(%error, "pid files can't be watched; each start waits for its shim");
                }
            }
        });
        Ok(Self { watches, _listening: AbortOnDropHandle::new(listening) })
    }

    /// Watches a bundle, which has no pid file yet.
    ///
    /// # Errors
    /// As inotify_add_watch(2).
    pub fn watch(&self, bundle: &Path) -> io::Result<PidFile> {
        // crun writes the file, runc renames another one to it.
        let flags = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_ONLYDIR;
        let (tell, told) = oneshot::channel();
        // Held over both, or an event could come before anybody is known to wait for it.
        let mut awaited = self.watches.awaited();
        let watch = self.watches.inotify.get_ref().0.add_watch(bundle, flags)?;
        awaited.insert(watch, Awaited { path: bundle.join(NAME), tell });
        Ok(PidFile { watches: self.watches.clone(), watch, told })
    }
}

impl Watches {
    fn awaited(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, Awaited>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn listen(&self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            let Ok(events) = ready.try_io(|inotify| Ok(inotify.get_ref().0.read_events()?)) else { continue };
            let named = |event: &&InotifyEvent| event.name.as_ref().is_some_and(|name| name == NAME);
            events?.iter().filter(named).for_each(|event| self.written(event.wd));
        }
    }

    fn written(&self, watch: WatchDescriptor) {
        let Some(Awaited { path, tell }) = self.awaited().remove(&watch) else { return };
        let pid = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
        match pid {
            // Nobody waits any more: fine.
            Some(pid) => drop(tell.send(pid)),
            None => tracing::debug!(path = %path.display(), "not a pid file"),
        }
    }
}

impl PidFile {
    /// The container's pid, as soon as it is written. Never returns when that can't be known.
    pub async fn written(file: Option<Self>) -> u32 {
        if let Some(mut file) = file
            && let Ok(pid) = (&mut file.told).await
        {
            return pid;
        }
        std::future::pending().await
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        self.watches.awaited().remove(&self.watch);
        // Gone with its directory, maybe.
        let _ = self.watches.inotify.get_ref().0.rm_watch(self.watch);
    }
}
