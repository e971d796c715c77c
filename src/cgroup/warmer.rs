//! Keeps the kernel's cgroup migration lock warm while a task is started, on version 1.
//!
//! Moving a process between groups takes a lock (`cgroup_threadgroup_rwsem`) that is cheap for readers, who are every
//! fork and exit, and dear for the first writer after a pause: it waits for an RCU grace period, 8 to 16 ms. On version 1
//! every runtime moves its container's process. So a thread of ours moves its own process to and fro, from the moment
//! that a start begins: the grace period passes while the bundle is made and the runtime comes up, and the runtime finds
//! the lock warm. An operator can have it kept warm all the time (docs/decisions/010 has the price), or never.
//! cgroup version 2 needs none of this: runtimes clone right into the group there.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use super::{CgroupMode, Cgroups, OWN, ROOT};

/// The hierarchy with the least to do at a move.
const HIERARCHY: &str = "freezer";

/// While it is warmed: well below a grace period.
const EVERY: Duration = Duration::from_millis(3);

/// When the lock is kept warm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepWarm {
    /// Never.
    Never,
    /// While a task is started.
    Starts,
    /// All the time, this often.
    Always(Duration),
}

/// The warming thread; it ends with this.
#[derive(Debug)]
pub struct Warmer {
    wanted: Arc<Wanted>,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
    sleeper: thread::Thread,
}

#[derive(Debug, Default)]
struct Wanted {
    stop: AtomicBool,
    starts: AtomicUsize,
}

/// A start is at work until this is dropped.
#[derive(Debug)]
pub struct Warm(Arc<Wanted>);

impl Drop for Warm {
    fn drop(&mut self) {
        self.0.starts.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Warmer {
    /// Starts it.
    ///
    /// # Errors
    /// On version 2, where there is nothing to warm, and when the groups can't be made.
    pub fn start(cgroups: &Cgroups, keep: KeepWarm) -> io::Result<Self> {
        if cgroups.mode() == CgroupMode::V2 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this host has cgroup version 2, which needs no warming",
            ));
        }
        let hierarchy = Path::new(ROOT).join(HIERARCHY);
        let home = hierarchy.join(own_place()?.trim_start_matches('/')).join("cgroup.procs");
        let parent = hierarchy.join(OWN);
        fs::create_dir_all(&parent)?;
        // Of plugins that were killed. Those of the living are theirs, also while nobody is in them.
        for entry in fs::read_dir(&parent)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let pid = name.strip_prefix("warm-").and_then(|rest| rest.split('-').next());
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
                && let Err(error) = fs::remove_dir(entry.path())
            {
                tracing::debug!(name, %error, "an old warming group stays");
            }
        }
        let groups = [0, 1].map(|n| parent.join(format!("warm-{}-{n}", std::process::id())));
        for group in &groups {
            fs::create_dir_all(group)?;
        }
        let wanted = Arc::new(Wanted::default());
        let seen = wanted.clone();
        let thread = thread::Builder::new().name("cgroup-warmer".to_owned()).spawn(move || {
            warm(&groups, keep, &seen);
            for (what, outcome) in [("go home", fs::write(&home, "0"))]
                .into_iter()
                .chain(groups.iter().map(|group| ("remove a group", fs::remove_dir(group))))
            {
                if let Err(error) = outcome {
                    tracing::warn!(what, %error, "the cgroup warmer leaves something");
                }
            }
        })?;
        let sleeper = thread.thread().clone();
        Ok(Self { wanted, thread: Mutex::new(Some(thread)), sleeper })
    }

    /// A start begins: the lock is warmed from now on, beside it.
    pub fn warm(&self) -> Warm {
        self.wanted.starts.fetch_add(1, Ordering::Relaxed);
        self.sleeper.unpark();
        Warm(self.wanted.clone())
    }

    /// Ends it, and returns when its groups are gone.
    pub fn end(&self) {
        self.wanted.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            self.sleeper.unpark();
            let _ = thread.join();
        }
    }
}

impl Drop for Warmer {
    fn drop(&mut self) {
        self.end();
    }
}

fn warm(groups: &[PathBuf; 2], keep: KeepWarm, wanted: &Wanted) {
    let procs = groups.each_ref().map(|group| group.join("cgroup.procs"));
    let mut targets = procs.iter().cycle();
    while !wanted.stop.load(Ordering::Relaxed) {
        let every = match keep {
            KeepWarm::Always(every) => every,
            _ if wanted.starts.load(Ordering::Relaxed) > 0 => EVERY,
            _ => {
                // Woken by the next start, or when it is to end.
                thread::park();
                continue;
            }
        };
        // 0: whoever writes.
        if let Some(Err(error)) = targets.next().map(|target| fs::write(target, "0")) {
            tracing::error!(%error, "the cgroup warmer gives up; starts after a pause take longer");
            return;
        }
        thread::park_timeout(every);
    }
}

/// Where this process is in the hierarchy (cgroups(7), /proc/pid/cgroup).
fn own_place() -> io::Result<String> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let line = text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let controllers = fields.nth(1)?;
        controllers.split(',').any(|name| name == HIERARCHY).then(|| fields.next().unwrap_or("/").to_owned())
    });
    line.ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "this host has no freezer hierarchy"))
}
