//! Primes the kernel's cgroup migration lock while a task is started, on cgroup version 1.
//!
//! Moving a process between cgroups takes a lock (`cgroup_threadgroup_rwsem`). It is cheap for readers, which are all
//! forks and exits. It is expensive for the first writer after a pause, which waits for an RCU grace period of 8 to 16
//! ms. On version 1 every runtime moves its container's process. Therefore, a thread of this plugin moves the plugin's
//! own process back and forth between two cgroups from the beginning of a start. The grace period passes while the
//! bundle is created and the runtime is loaded, and the runtime gets the lock without a delay. With the option `cgroup
//! { keep_warm }` an operator can have the lock primed all the time (docs/decisions/022 has the cost), or never. cgroup
//! version 2 needs no priming, because runtimes clone processes directly into their cgroup.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use parking_lot::Mutex;

use super::{CGROUP_ROOT, CgroupMode, Cgroups, OWN_GROUP};

/// The hierarchy whose cgroups the process is moved between, because a move costs least there.
const PRIMED_HIERARCHY: &str = "freezer";

/// The interval between two moves during a start, well below an RCU grace period.
const PRIMING_INTERVAL: Duration = Duration::from_millis(3);

/// The times at which the lock is primed (`cgroup { keep_warm }`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrimingMode {
    /// Never.
    Never,
    /// While tasks are started.
    Starts,
    /// All the time, at this interval.
    Always(Duration),
}

/// The owner of the thread that primes the lock. The thread is stopped when the owner is dropped.
#[derive(Debug)]
pub struct CgroupLockPrimer {
    state: Arc<PrimerState>,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
    thread_handle: thread::Thread,
}

#[derive(Debug, Default)]
struct PrimerState {
    stop: AtomicBool,
    /// The number of starts in progress.
    starts: AtomicUsize,
}

/// A guard for a start in progress: the lock is primed until the guard is dropped.
#[derive(Debug)]
pub struct Priming(Arc<PrimerState>);

impl Drop for Priming {
    fn drop(&mut self) {
        self.0.starts.fetch_sub(1, Ordering::Relaxed);
    }
}

impl CgroupLockPrimer {
    /// Starts the thread.
    ///
    /// # Errors
    /// Fails on cgroup version 2, which needs no priming, and when the thread's cgroups can't be created.
    pub fn start(cgroups: &Cgroups, mode: PrimingMode) -> io::Result<Self> {
        if cgroups.mode() == CgroupMode::V2 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this host has cgroup version 2, whose migration lock needs no priming",
            ));
        }
        let hierarchy = Path::new(CGROUP_ROOT).join(PRIMED_HIERARCHY);
        let original_procs = hierarchy.join(own_group_path()?.trim_start_matches('/')).join("cgroup.procs");
        let parent = hierarchy.join(OWN_GROUP);
        fs::create_dir_all(&parent)?;
        // Removes the cgroups of plugins that were killed. The cgroups of running plugins are kept, even if they are
        // empty.
        for entry in fs::read_dir(&parent)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let pid = name.strip_prefix("warm-").and_then(|rest| rest.split('-').next());
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
                && let Err(error) = fs::remove_dir(entry.path())
            {
                tracing::debug!(name, %error, "could not remove a cgroup that an earlier plugin used for priming");
            }
        }
        let groups = [0, 1].map(|n| parent.join(format!("warm-{}-{n}", std::process::id())));
        for group in &groups {
            fs::create_dir_all(group)?;
        }
        let state = Arc::new(PrimerState::default());
        let thread_state = state.clone();
        let thread = thread::Builder::new().name("cgroup-primer".to_owned()).spawn(move || {
            run_primer(&groups, mode, &thread_state);
            for (step, outcome) in [("move the plugin back to its cgroup", fs::write(&original_procs, "0"))]
                .into_iter()
                .chain(groups.iter().map(|group| ("remove a cgroup of the primer", fs::remove_dir(group))))
            {
                if let Err(error) = outcome {
                    tracing::warn!(step, %error, "could not clean up after priming the cgroup lock");
                }
            }
        })?;
        let thread_handle = thread.thread().clone();
        Ok(Self { state, thread: Mutex::new(Some(thread)), thread_handle })
    }

    /// Primes the lock from now on until the returned guard is dropped, concurrently with a start.
    pub fn prime(&self) -> Priming {
        self.state.starts.fetch_add(1, Ordering::Relaxed);
        self.thread_handle.unpark();
        Priming(self.state.clone())
    }

    /// Stops the thread, and returns when its cgroups are removed.
    pub fn stop(&self) {
        self.state.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            self.thread_handle.unpark();
            let _ = thread.join();
        }
    }
}

impl Drop for CgroupLockPrimer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Moves this process back and forth between two cgroups, when the mode demands it, until the primer is stopped.
fn run_primer(groups: &[PathBuf; 2], mode: PrimingMode, state: &PrimerState) {
    let procs = groups.each_ref().map(|group| group.join("cgroup.procs"));
    let mut targets = procs.iter().cycle();
    while !state.stop.load(Ordering::Relaxed) {
        let interval = match mode {
            PrimingMode::Always(interval) => interval,
            _ if state.starts.load(Ordering::Relaxed) > 0 => PRIMING_INTERVAL,
            _ => {
                // The next start wakes the thread, and so does `stop`.
                thread::park();
                continue;
            }
        };
        // 0 stands for the process that writes.
        if let Some(Err(error)) = targets.next().map(|target| fs::write(target, "0")) {
            tracing::error!(%error, "could not prime the cgroup lock; starts after a pause take longer from now on");
            return;
        }
        thread::park_timeout(interval);
    }
}

/// Returns the path of this process's cgroup in the hierarchy (cgroups(7), /proc/pid/cgroup).
fn own_group_path() -> io::Result<String> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let line = text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let controllers = fields.nth(1)?;
        controllers.split(',').any(|name| name == PRIMED_HIERARCHY).then(|| fields.next().unwrap_or("/").to_owned())
    });
    line.ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "this host has no freezer hierarchy"))
}
