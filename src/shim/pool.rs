//! Shims started ahead, so that a task's start finds one waiting.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{Launcher, Shim, ShimError};

/// Idle shims of one kind. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    launcher: Arc<Launcher>,
    size: usize,
    idle: Mutex<VecDeque<Shim>>,
    /// One refill at a time.
    refilling: tokio::sync::Mutex<()>,
    closed: AtomicBool,
}

impl Pool {
    /// An empty pool that keeps `size` shims.
    pub fn new(launcher: Arc<Launcher>, size: usize) -> Self {
        Self(Arc::new(Inner {
            launcher,
            size,
            idle: Mutex::default(),
            refilling: tokio::sync::Mutex::default(),
            closed: AtomicBool::new(false),
        }))
    }

    /// How its shims are started.
    pub fn launcher(&self) -> &Arc<Launcher> {
        &self.0.launcher
    }

    /// A shim for a task: a waiting one, or a new one when none waits. True when it had waited.
    ///
    /// # Errors
    /// When a new one can't be started.
    pub async fn take(&self) -> Result<(Shim, bool), ShimError> {
        loop {
            let next = self.idle().pop_front();
            match next {
                // One that died while it waited left nothing but its directory.
                Some(dead) if dead.has_ended() => dead.kill(),
                Some(shim) => return Ok((shim, true)),
                None => return Ok((self.0.launcher.launch().await?, false)),
            }
        }
    }

    /// Starts what is missing, in the background. Called after a start has returned, never on its path.
    pub fn refill(&self) {
        let pool = self.clone();
        tokio::spawn(async move {
            let Ok(_turn) = pool.0.refilling.try_lock() else { return };
            while !pool.is_closed() && pool.idle().len() < pool.0.size {
                match pool.0.launcher.launch().await {
                    Ok(shim) => pool.put(shim),
                    Err(error) => {
                        tracing::warn!(%error, "shim pool: not refilled; the next start launches its own");
                        return;
                    }
                }
            }
        });
    }

    /// Takes in an idle shim of an earlier instance of us, or ends it when there are enough.
    pub fn put(&self, shim: Shim) {
        let mut idle = self.idle();
        // Closing takes the same lock to empty the queue, so a shim either is seen there or ends here.
        if self.is_closed() || idle.len() >= self.0.size {
            shim.kill();
        } else {
            idle.push_back(shim);
        }
    }

    /// Ends all idle shims and starts no more.
    pub fn close(&self) {
        self.0.closed.store(true, Ordering::SeqCst);
        for shim in self.idle().drain(..) {
            shim.kill();
        }
    }

    /// Names of the idle shims.
    pub fn idle_ids(&self) -> Vec<String> {
        self.idle().iter().map(|shim| shim.id().to_owned()).collect()
    }

    fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::SeqCst)
    }

    fn idle(&self) -> MutexGuard<'_, VecDeque<Shim>> {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
