//! The pool of idle shims, which were started in advance or have served a task that is gone.
//!
//! Any running shim accepts `Create` for any container, so a shim whose container is gone serves the next task.
//! Starting a shim costs 7 to 14 ms of CPU time, as much as all the rest of a start.

use std::{
    collections::{HashMap, VecDeque},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, watch};

use super::{Launcher, Shim, ShimError, ShimScope, launch::ShimReservation};
use crate::ids::{AllocId, ShimId};

/// How long the closing of the pool waits for a shim that is being launched, before it abandons the launch. A shim
/// comes up in some 10 ms.
const LAUNCH_GRACE: Duration = Duration::from_millis(500);
/// The delay between a start and a refill of the pool. The started task has the processors meanwhile.
const REFILL_DELAY: Duration = Duration::from_millis(20);
/// The additional delay of a refill while the pool still has an idle shim. A short task returns its own shim before
/// that.
const REFILL_LONG_DELAY: Duration = Duration::from_millis(500);
/// The longest time for which a refill then waits for starts in progress. The time is limited because an empty pool
/// makes these starts even slower.
const REFILL_MAX_DELAY: Duration = Duration::from_millis(200);
/// How often a caller that waits for a full pool looks.
const FILL_POLL_INTERVAL: Duration = Duration::from_millis(2);
/// The most idle shims above the pool's size that are kept after a burst of tasks, for the next burst.
const SPARE_MAX: usize = 16;
/// The time for which idle shims above the pool's size are kept.
const SPARE_GRACE: Duration = Duration::from_secs(1);
/// The number of containers after which a shim is replaced. Nothing guarantees that a shim's memory doesn't grow.
const USES_MAX: u32 = 500;

/// The settings of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolSettings {
    /// The number of idle shims that the pool keeps.
    pub size: usize,
    /// The tasks that share a shim.
    pub scope: ShimScope,
    /// Whether a shim may serve one task after the other.
    pub reuse: bool,
}

/// A pool of idle shims of one launcher. It is cheap to clone.
#[derive(Debug, Clone)]
pub struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    launcher: Arc<Launcher>,
    settings: PoolSettings,
    idle: Mutex<VecDeque<Shim>>,
    /// The pool's own holds on shared shims, which further tasks of the same allocation or node join. The key is the
    /// allocation's id. It is empty for the shim of the node, which is kept even when no task uses it.
    shared: Mutex<HashMap<String, Shim>>,
    /// The lock of a reservation that launches a shared shim.
    launch_lock: tokio::sync::Mutex<()>,
    /// The lock of a refill; only one runs at a time.
    refill_lock: tokio::sync::Mutex<()>,
    /// Whether a trim of surplus shims is scheduled.
    trimming: AtomicBool,
    /// Whether the pool is closed and keeps no shims any more.
    closed: AtomicBool,
    /// The number of starts in progress.
    starts_in_progress: watch::Sender<usize>,
    /// Notifies a refill that the last idle shim was taken.
    became_empty: Notify,
    /// Notifies a refill that the launch of its shim is abandoned, because the pool is closed.
    launch_abandoned: Notify,
}

/// A guard that counts a start as in progress until the guard is dropped. Refills wait for starts in progress.
#[derive(Debug)]
pub struct StartGuard(Pool);

impl Drop for StartGuard {
    fn drop(&mut self) {
        self.0.0.starts_in_progress.send_modify(|count| *count -= 1);
    }
}

/// A shim that is reserved for a task.
#[derive(Debug)]
pub enum ReservedShim {
    /// The shim runs.
    Running(Shim),
    /// The shim has to be launched; only its id is known.
    ToLaunch(ShimReservation),
}

impl ReservedShim {
    /// Returns the id of the shim.
    pub fn id(&self) -> &ShimId {
        match self {
            Self::Running(shim) => shim.id(),
            Self::ToLaunch(reservation) => reservation.id(),
        }
    }
}

impl Pool {
    /// Creates an empty pool.
    pub fn new(launcher: Arc<Launcher>, settings: PoolSettings) -> Self {
        Self(Arc::new(Inner {
            launcher,
            settings,
            idle: Mutex::default(),
            shared: Mutex::default(),
            launch_lock: tokio::sync::Mutex::default(),
            refill_lock: tokio::sync::Mutex::default(),
            trimming: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            starts_in_progress: watch::Sender::new(0),
            became_empty: Notify::new(),
            launch_abandoned: Notify::new(),
        }))
    }

    /// Returns the launcher of the pool's shims.
    pub fn launcher(&self) -> &Arc<Launcher> {
        &self.0.launcher
    }

    /// Counts a start as in progress while the returned guard exists.
    pub fn start_guard(&self) -> StartGuard {
        self.0.starts_in_progress.send_modify(|count| *count += 1);
        StartGuard(self.clone())
    }

    /// Reserves a shim for a task of this allocation: a running one, or the id of one to launch. With a `program`, the
    /// shim is dedicated: it runs that program and serves this task only.
    ///
    /// # Errors
    /// Fails when a shim that tasks are to share can't be started.
    pub async fn reserve(&self, alloc_id: &AllocId, program: Option<&Path>) -> Result<ReservedShim, ShimError> {
        if let Some(program) = program {
            return Ok(ReservedShim::ToLaunch(self.0.launcher.reserve_with_program(program)));
        }
        let Some(key) = self.sharing_key(alloc_id) else { return Ok(self.reserve_unshared()) };
        if let Some(shim) = self.join_shared(key) {
            return Ok(ReservedShim::Running(shim));
        }
        let _launch_lock = self.0.launch_lock.lock().await;
        if let Some(shim) = self.join_shared(key) {
            return Ok(ReservedShim::Running(shim));
        }
        let shim = match self.reserve_unshared() {
            ReservedShim::Running(shim) => shim,
            ReservedShim::ToLaunch(reservation) => self.0.launcher.launch(reservation).await?,
        };
        let task_shim = shim.share();
        self.shared().insert(key.to_owned(), shim);
        self.trim_surplus();
        Ok(ReservedShim::Running(task_shim))
    }

    /// Lets further tasks of this allocation join an adopted shim that has one of the allocation's tasks.
    pub fn share_adopted(&self, alloc_id: &AllocId, shim: &Shim) {
        let Some(key) = self.sharing_key(alloc_id).filter(|_| !shim.is_dedicated()) else { return };
        {
            let mut shared = self.shared();
            if !self.is_closed() && !shim.is_unusable() && !shared.contains_key(key) {
                shared.insert(key.to_owned(), shim.share());
            }
        }
        self.trim_surplus();
    }

    /// Schedules the shutdown of surplus idle shims. There are some when the pool needs fewer than before. In the scope
    /// of the node, the pool needs none once there is a shared shim, but a refill may have launched one concurrently.
    fn trim_surplus(&self) {
        let size = self.target_size();
        if self.idle().len() > size {
            self.schedule_trim();
        }
    }

    /// Returns the key of the shim that a task of this allocation shares with others, if it shares one.
    fn sharing_key<'a>(&self, alloc_id: &'a AllocId) -> Option<&'a str> {
        match self.0.settings.scope {
            ShimScope::Task => None,
            // Tasks without an allocation don't share a shim.
            ShimScope::Alloc => Some(alloc_id.as_str()).filter(|id| !id.is_empty()),
            ShimScope::Node => Some(""),
        }
    }

    fn join_shared(&self, key: &str) -> Option<Shim> {
        let mut shared = self.shared();
        match shared.get(key) {
            Some(shim) if !shim.has_ended() => Some(shim.share()),
            Some(_) => {
                // The engine cleans up the containers of a dead shim when it handles their tasks.
                shared.remove(key);
                None
            }
            None => None,
        }
    }

    fn reserve_unshared(&self) -> ReservedShim {
        loop {
            let (next, left) = {
                let mut idle = self.idle();
                (idle.pop_front(), idle.len())
            };
            if left == 0 {
                self.0.became_empty.notify_waiters();
            }
            match next {
                // A shim that has died while it was idle has left only its directory.
                Some(dead) if dead.has_ended() => dead.kill_and_remove(),
                Some(shim) => return ReservedShim::Running(shim),
                None => return ReservedShim::ToLaunch(self.0.launcher.reserve()),
            }
        }
    }

    /// Delays work that can wait: sleeps for `delay`, and then waits until no start is in progress, for at most
    /// `max_delay`.
    pub async fn wait_until_idle(&self, delay: Duration, max_delay: Duration) {
        tokio::time::sleep(delay).await;
        let mut busy = self.0.starts_in_progress.subscribe();
        let _ = tokio::time::timeout(max_delay, busy.wait_for(|count| *count == 0)).await;
    }

    /// Starts the missing idle shims in the background. This is called after a start has returned, never on the start's
    /// path.
    pub fn refill(&self) {
        let pool = self.clone();
        tokio::spawn(async move {
            let Ok(_refill_lock) = pool.0.refill_lock.try_lock() else { return };
            pool.remove_ended();
            while pool.needs_refill() {
                let left = pool.idle().len();
                let idle = async {
                    if left > 0 {
                        tokio::time::sleep(REFILL_LONG_DELAY).await;
                    }
                    pool.wait_until_idle(REFILL_DELAY, REFILL_MAX_DELAY).await;
                };
                // When the last idle shim is taken, the refill launches one without further delay.
                tokio::select! {
                    () = idle => {}
                    () = pool.0.became_empty.notified() => {}
                }
                if !pool.needs_refill() {
                    return;
                }
                let launched = tokio::select! {
                    launched = pool.0.launcher.launch(pool.0.launcher.reserve()) => launched,
                    () = pool.0.launch_abandoned.notified() => return,
                };
                match launched {
                    Ok(shim) => pool.add_idle(shim),
                    Err(error) => {
                        tracing::warn!(
                            error = %crate::error_chain(&error),
                            "could not refill the shim pool; the next start launches its own shim"
                        );
                        return;
                    }
                }
            }
        });
    }

    /// Fills the pool, and returns whether all idle shims are there within `limit`.
    pub async fn fill(&self, limit: Duration) -> bool {
        let full = async {
            while self.needs_refill() {
                self.refill();
                tokio::time::sleep(FILL_POLL_INTERVAL).await;
            }
        };
        tokio::time::timeout(limit, full).await.is_ok()
    }

    fn needs_refill(&self) -> bool {
        let size = self.target_size();
        !self.is_closed() && self.idle().len() < size
    }

    /// Returns the number of idle shims that the pool should have.
    fn target_size(&self) -> usize {
        match self.0.settings.scope {
            // The shim that all tasks share is enough.
            ShimScope::Node if self.shared().values().any(|shim| !shim.has_ended()) => 0,
            ShimScope::Node => self.0.settings.size.min(1),
            ShimScope::Task | ShimScope::Alloc => self.0.settings.size,
        }
    }

    /// Adds an idle shim, new or adopted, to the pool. Kills the shim if it can't serve further tasks, or the pool is
    /// full or closed.
    pub fn add_idle(&self, shim: Shim) {
        if shim.is_dedicated() || shim.is_unusable() {
            return shim.kill_and_remove();
        }
        let size = self.target_size();
        let mut idle = self.idle();
        // Closing the pool takes the same lock to empty the queue, so a shim is either removed there or killed here.
        if self.is_closed() || idle.len() >= size {
            shim.kill_and_remove();
        } else {
            idle.push_back(shim);
        }
    }

    /// Removes the directories of shims that have died while no task used them.
    fn remove_ended(&self) {
        let ended_idle: Vec<Shim> = {
            let mut idle = self.idle();
            let (ended, alive) = idle.drain(..).partition(Shim::has_ended);
            *idle = alive;
            VecDeque::into(ended)
        };
        let mut shared = self.shared();
        let ended_shared = shared.extract_if(|_, shim| shim.has_ended()).map(|(_, shim)| shim);
        ended_shared.chain(ended_idle).for_each(release_hold);
    }

    /// Removes unused shims that no task has returned to the pool: shims that have died, and shims of allocations whose
    /// last task has released its hold in another way. Refills the pool afterwards.
    pub async fn remove_unused(&self) {
        self.remove_ended();
        let unused: Vec<Shim> = match self.0.settings.scope {
            ShimScope::Alloc => {
                // Further holds are taken under the same lock.
                self.shared().extract_if(|_, shim| shim.has_single_hold()).map(|(_, shim)| shim).collect()
            }
            ShimScope::Task | ShimScope::Node => Vec::new(),
        };
        for shim in unused {
            shim.shut_down().await;
        }
        self.refill();
    }

    /// Shuts down a shim whose container is gone, unless there are further holds on it. Returns whether the shim is
    /// gone or has further holds.
    pub async fn shut_down(&self, alloc_id: &AllocId, shim: Shim) -> bool {
        match self.release_unless_last(alloc_id, shim) {
            Some(shim) => shim.shut_down().await,
            None => true,
        }
    }

    /// Takes back a shim whose container is gone, to keep it for the next task or to shut it down. Returns `false` only
    /// if the shim had to be shut down and is not gone.
    pub async fn recycle(&self, alloc_id: &AllocId, shim: Shim) -> bool {
        let Some(mut shim) = self.release_unless_last(alloc_id, shim) else { return true };
        if shim.is_unusable() {
            return shim.kill_and_wait().await;
        }
        shim.uses += 1;
        let settings = self.0.settings;
        // Dedicated shims don't support a second container: gVisor's shim closes what it needs for terminals with the
        // first one.
        let unfit =
            shim.is_dedicated() || !settings.reuse || settings.size == 0 || shim.uses >= USES_MAX || shim.has_ended();
        let refused = if unfit { Some(shim) } else { self.keep_idle(shim) };
        match refused {
            Some(shim) => shim.shut_down().await,
            None => true,
        }
    }

    /// Quarantines a shim that has an ended container which it can't delete. The shim serves its present tasks and gets
    /// no others. The last task's release kills the shim, because the shim would not exit when asked to. Returns
    /// whether the shim is gone or has further holds.
    pub async fn quarantine(&self, mut shim: Shim) -> bool {
        shim.mark_unusable();
        self.shared().retain(|_, kept| kept.id() != shim.id());
        shim.release_if_shared() || shim.kill_and_wait().await
    }

    /// Returns the number of tasks that have a hold on this shim. The pool's own hold, which is there for further tasks
    /// of an allocation or node, is not counted.
    pub fn task_count(&self, id: &ShimId) -> usize {
        let shared = self.shared();
        let own = shared.values().filter(|kept| kept.id() == id).count();
        self.0.launcher.hold_count(id).saturating_sub(own)
    }

    /// Releases a task's hold on a shim. Returns the shim if that was the last hold of a task on it, and the caller has
    /// to end the shim.
    fn release_unless_last(&self, alloc_id: &AllocId, mut shim: Shim) -> Option<Shim> {
        let mut shared = self.shared();
        if !shim.release_if_shared() {
            return Some(shim);
        }
        // The last task of an allocation is gone when only the pool has a hold on its shim.
        let last = self.0.settings.scope == ShimScope::Alloc
            && shared.get(alloc_id.as_str()).is_some_and(|kept| kept.id() == shim.id() && kept.has_single_hold());
        last.then(|| shared.remove(alloc_id.as_str())).flatten()
    }

    /// Adds a used shim to the idle ones, for the next task. Returns the shim if there are enough.
    fn keep_idle(&self, shim: Shim) -> Option<Shim> {
        let size = self.target_size();
        let mut idle = self.idle();
        // The flag is read under the lock that closing the pool takes.
        if self.is_closed() || idle.len() >= size + SPARE_MAX {
            return Some(shim);
        }
        // The shim that was used last has the warmest caches, so it is used first.
        idle.push_front(shim);
        drop(idle);
        self.trim_surplus();
        None
    }

    /// Shuts down the surplus idle shims that a burst of tasks has left, unless another burst has used them.
    fn schedule_trim(&self) {
        if self.0.trimming.swap(true, Ordering::SeqCst) {
            return;
        }
        let pool = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(SPARE_GRACE).await;
            pool.0.trimming.store(false, Ordering::SeqCst);
            // The surplus shims are taken one at a time, so that closing the pool meanwhile finds the others.
            loop {
                let size = pool.target_size();
                let surplus = {
                    let mut idle = pool.idle();
                    if idle.len() > size { idle.pop_back() } else { None }
                };
                match surplus {
                    Some(shim) => drop(shim.shut_down().await),
                    None => return,
                }
            }
        });
    }

    /// Kills all idle shims and starts no more. A shim that is starting is waited for, or its launch is abandoned,
    /// because it would otherwise be left unrecorded.
    pub async fn close(&self) {
        self.0.closed.store(true, Ordering::SeqCst);
        self.0.became_empty.notify_waiters();
        if tokio::time::timeout(LAUNCH_GRACE, self.0.refill_lock.lock()).await.is_err() {
            self.0.launch_abandoned.notify_waiters();
            if tokio::time::timeout(LAUNCH_GRACE, self.0.refill_lock.lock()).await.is_err() {
                tracing::warn!("a shim of the pool is still being started; the next plugin adopts it");
            }
        }
        let shared: Vec<Shim> = self.shared().drain().map(|(_, shim)| shim).collect();
        shared.into_iter().for_each(release_hold);
        for shim in self.idle().drain(..) {
            shim.kill_and_remove();
        }
    }

    /// Returns the ids of the idle shims.
    pub fn idle_ids(&self) -> Vec<ShimId> {
        self.idle().iter().map(|shim| shim.id().clone()).collect()
    }

    fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::SeqCst)
    }

    fn idle(&self) -> MutexGuard<'_, VecDeque<Shim>> {
        self.0.idle.lock()
    }

    fn shared(&self) -> MutexGuard<'_, HashMap<String, Shim>> {
        self.0.shared.lock()
    }
}

/// Releases the pool's hold on a shim, and kills the shim if no task has a hold on it. A shim on which
/// tasks have holds stays; if it has died, the engine cleans up its containers when it handles those tasks.
fn release_hold(mut shim: Shim) {
    if !shim.release_if_shared() {
        shim.kill_and_remove();
    }
}
