//! A pool of prepared network namespaces. The kernel takes half a millisecond to create a network namespace, and a
//! runtime does that during each start of a task with a network of its own. Joining a prepared one takes a tenth of that.
//!
//! A prepared namespace lives as long as its descriptor, so nothing remains of it if the plugin is killed. Only one task
//! ever gets it.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;

use crate::netns;

/// The pool of prepared network namespaces.
#[derive(Debug)]
pub struct NetnsPool {
    capacity: usize,
    prepared: Mutex<Vec<PreparedNetns>>,
    /// Whether the pool prepares no more namespaces.
    closed: AtomicBool,
}

/// A network namespace with a loopback device only, in which no process is yet.
#[derive(Debug)]
pub struct PreparedNetns(OwnedFd);

impl PreparedNetns {
    /// The path by which other processes of the host can join the namespace. It exists as long as this value.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }
}

impl NetnsPool {
    /// Returns a pool of up to `capacity` namespaces. It is empty until the first call of [`Self::prepare`].
    pub fn new(capacity: usize) -> Self {
        Self { capacity, prepared: Mutex::default(), closed: AtomicBool::new(capacity == 0) }
    }

    /// Removes a namespace from the pool and returns it; `None` when the pool is empty.
    pub fn take(&self) -> Option<PreparedNetns> {
        self.prepared.lock().pop()
    }

    /// Returns whether the pool takes a further namespace.
    pub fn has_room(&self) -> bool {
        !self.closed.load(Ordering::SeqCst) && self.prepared.lock().len() < self.capacity
    }

    /// Prepares a namespace, if the pool has room for it. Blocks for half a millisecond.
    ///
    /// # Errors
    /// Fails when a namespace can't be created. Where the plugin may not create any, only the first call fails: the pool
    /// is closed then.
    pub fn prepare(&self) -> io::Result<()> {
        if !self.has_room() {
            return Ok(());
        }
        let created = netns::create().inspect_err(|error| {
            if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EINVAL)) {
                self.closed.store(true, Ordering::SeqCst);
            }
        })?;
        let mut prepared = self.prepared.lock();
        // Another thread may have filled or closed the pool in this time.
        if !self.closed.load(Ordering::SeqCst) && prepared.len() < self.capacity {
            prepared.push(PreparedNetns(created));
        }
        Ok(())
    }

    /// Discards all namespaces, and prepares no more.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.prepared.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::HashSet, fs, os::unix::fs::MetadataExt as _, process::Command};

    #[test]
    fn each_namespace_is_a_new_one_with_loopback() {
        let pool = NetnsPool::new(2);
        assert!(pool.take().is_none(), "an empty pool has no namespace");
        while pool.has_room() {
            pool.prepare().expect("prepared");
        }
        pool.prepare().expect("a full pool stays as it is");
        let taken: Vec<PreparedNetns> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(taken.len(), 2);
        let own = fs::metadata("/proc/thread-self/ns/net").expect("the test's namespace").ino();
        let inodes: HashSet<u64> =
            taken.iter().map(|netns| fs::metadata(netns.path()).expect("the path leads to it").ino()).collect();
        assert!(inodes.len() == 2 && !inodes.contains(&own), "{inodes:?}");
        for netns in &taken {
            let path = format!("--net={}", netns.path().display());
            let output = Command::new("nsenter").args([&path, "ip", "-oneline", "address"]).output().expect("it runs");
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(text.contains("lo    inet 127.0.0.1/8") && !text.contains("eth"), "{text}");
        }
        pool.close();
        pool.prepare().expect("a closed pool stays empty");
        assert!(pool.take().is_none() && !pool.has_room(), "a closed pool has no namespace");
    }
}
