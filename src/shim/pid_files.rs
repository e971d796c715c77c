//! Reports that a runtime has created a container, some milliseconds before the shim reports it.
//!
//! The last step of runc and crun in `create` is to write the container's pid to the file that the shim names
//! (`--pid-file`, `init.pid` in the bundle). The shim then waits for the runtime's exit and reads the container's
//! cgroups, which takes 2 to 4 ms on a host with cgroup version 1.

use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::oneshot,
};
use tokio_util::task::AbortOnDropHandle;

/// The name that shims give the pid file.
const PID_FILE_NAME: &str = "init.pid";

/// Watches bundles for their pid files. One inotify instance serves all bundles, because closing an instance waits some
/// milliseconds for readers in the kernel.
#[derive(Debug)]
pub struct PidFiles {
    watches: Arc<Watches>,
    _listening: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Watches {
    inotify: AsyncFd<InotifyFd>,
    awaited: Mutex<HashMap<WatchDescriptor, AwaitedPid>>,
}

#[derive(Debug)]
struct AwaitedPid {
    path: PathBuf,
    pid_sender: oneshot::Sender<u32>,
}

#[derive(Debug)]
struct InotifyFd(Inotify);

impl AsFd for InotifyFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl std::os::fd::AsRawFd for InotifyFd {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_fd().as_raw_fd()
    }
}

/// The pid file of one bundle, watched until this is dropped.
#[derive(Debug)]
pub struct PidFile {
    watches: Arc<Watches>,
    watch: WatchDescriptor,
    pid_receiver: oneshot::Receiver<u32>,
}

impl PidFiles {
    /// Creates the inotify instance and starts to read its events.
    ///
    /// # Errors
    /// Fails as inotify_init1(2) does; by default a user may have 128 instances.
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // SAFETY: `InotifyFd` owns its descriptor, which stays open and unchanged for as long as the AsyncFd has it.
        let inotify = unsafe { AsyncFd::register_with_interest(InotifyFd(inotify), Interest::READABLE) }?;
        let watches = Arc::new(Watches { inotify, awaited: Mutex::default() });
        let listening = tokio::spawn({
            let watches = watches.clone();
            async move {
                if let Err(error) = watches.listen().await {
                    tracing::warn!(
                        %error,
                        "could not read the events of pid files; from now on, each start waits for its shim's answer"
                    );
                }
            }
        });
        Ok(Self { watches, _listening: AbortOnDropHandle::new(listening) })
    }

    /// Watches a bundle that has no pid file yet.
    ///
    /// # Errors
    /// Fails as inotify_add_watch(2) does.
    pub fn watch(&self, bundle: &Path) -> io::Result<PidFile> {
        // crun writes the file, runc renames another one to it.
        let flags = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_ONLYDIR;
        let (pid_sender, pid_receiver) = oneshot::channel();
        // The lock is held over both steps. Otherwise an event could arrive before its receiver is registered.
        let mut awaited = self.watches.awaited();
        let watch = self.watches.inotify.get_ref().0.add_watch(bundle, flags)?;
        awaited.insert(watch, AwaitedPid { path: bundle.join(PID_FILE_NAME), pid_sender });
        Ok(PidFile { watches: self.watches.clone(), watch, pid_receiver })
    }
}

impl Watches {
    fn awaited(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, AwaitedPid>> {
        self.awaited.lock()
    }

    async fn listen(&self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            let Ok(events) = ready.try_io(|inotify| Ok(inotify.get_ref().0.read_events()?)) else { continue };
            let named = |event: &&InotifyEvent| event.name.as_ref().is_some_and(|name| name == PID_FILE_NAME);
            events?.iter().filter(named).for_each(|event| self.on_written(event.wd));
        }
    }

    fn on_written(&self, watch: WatchDescriptor) {
        let Some(AwaitedPid { path, pid_sender }) = self.awaited().remove(&watch) else { return };
        let pid = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
        match pid {
            // The receiver may be gone, because the shim has answered first.
            Some(pid) => drop(pid_sender.send(pid)),
            None => tracing::debug!(path = %path.display(), "a pid file contains no pid"),
        }
    }
}

impl PidFile {
    /// Returns the container's pid as soon as it is written. Never returns if there is no pid file to watch, or its pid
    /// can't be read.
    pub async fn wait(file: Option<Self>) -> u32 {
        if let Some(mut file) = file
            && let Ok(pid) = (&mut file.pid_receiver).await
        {
            return pid;
        }
        std::future::pending().await
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        self.watches.awaited().remove(&self.watch);
        // The watch may be gone already, together with the bundle's directory.
        let _ = self.watches.inotify.get_ref().0.rm_watch(self.watch);
    }
}
