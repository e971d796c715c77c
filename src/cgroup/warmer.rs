//! Keeps the kernel's cgroup migration lock warm, on version 1, where an operator wants that.
//!
//! Moving a process between groups takes a lock (`cgroup_threadgroup_rwsem`) that is cheap for readers, who are every
//! fork and exit, and dear for the first writer after a pause: it waits for an RCU grace period, 8 to 16 ms. On version 1
//! every runtime moves its container's process, so a start after a pause pays that. A thread that moves its own process
//! to and fro every few milliseconds pays it in their place. The price: its CPU time (docs/decisions/010), and that every
//! fork and exit of the host takes the slower reader's way. cgroup version 2 needs none of this.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use super::{CgroupMode, Cgroups, OWN, ROOT};

/// The hierarchy with the least to do at a move.
const HIERARCHY: &str = "freezer";

/// The warming thread; it ends with this.
#[derive(Debug)]
pub struct Warmer {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Warmer {
    /// Starts it.
    ///
    /// # Errors
    /// On version 2, where there is nothing to warm, and when the groups can't be made.
    pub fn start(cgroups: &Cgroups, every: Duration) -> io::Result<Self> {
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
        // Of plugins that were killed. Those that somebody is in can't be removed.
        for entry in
            fs::read_dir(&parent)?.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("warm-"))
        {
            let _ = fs::remove_dir(entry.path());
        }
        let groups = [0, 1].map(|n| parent.join(format!("warm-{}-{n}", std::process::id())));
        for group in &groups {
            fs::create_dir_all(group)?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::Builder::new().name("cgroup-warmer".to_owned()).spawn(move || {
            keep_warm(&groups, every, &stopped);
            for (what, outcome) in [("go home", fs::write(&home, "0"))]
                .into_iter()
                .chain(groups.iter().map(|group| ("remove a group", fs::remove_dir(group))))
            {
                if let Err(error) = outcome {
                    tracing::warn!(what, %error, "the cgroup warmer leaves something");
                }
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Warmer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn keep_warm(groups: &[PathBuf; 2], every: Duration, stop: &AtomicBool) {
    let procs = groups.each_ref().map(|group| group.join("cgroup.procs"));
    for target in procs.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        // 0: whoever writes.
        if let Err(error) = fs::write(target, "0") {
            tracing::error!(%error, "the cgroup warmer gives up; starts after a pause take longer");
            return;
        }
        // Woken when it is to end.
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
