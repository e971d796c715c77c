//! Shims that wait for a task: started ahead, or left over from a task that has gone.
//!
//! Any running shim takes `Create` for any container, so one whose container is gone serves the next: starting a shim
//! costs 7 to 14 ms of CPU, as much as all the rest of a start.

use std::{
    collections::{HashMap, VecDeque},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Notify, watch};

use super::{Launcher, Shim, ShimError, launch::Unborn};

/// How long the end of the pool waits for a shim that has just been launched, before it ends that, too; to come up takes
/// some 10 ms.
const COMING_UP: Duration = Duration::from_millis(500);
/// A refill waits this long after a start, in which the task has the processors,
const BREATH: Duration = Duration::from_millis(20);
/// and so long while another shim still waits: a short task gives its own back before that.
const LONG_BREATH: Duration = Duration::from_millis(500);
/// And then for starts at work to be done, but not for ever: an empty pool makes them slower still.
const BACK_PRESSURE: Duration = Duration::from_millis(200);
/// So many more than wanted may wait after a burst, for the next one,
const SPARE: usize = 16;
/// for so long.
const SPARE_TIME: Duration = Duration::from_secs(1);
/// A shim is replaced after so many containers: nobody has promised that it doesn't grow.
const USES: u32 = 500;

/// Who shares a shim.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ShimScope {
    /// Nobody: one shim a task.
    #[default]
    Task,
    /// The tasks of an allocation.
    Alloc,
    /// All tasks of this node.
    Node,
}

/// What pools are made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolSettings {
    /// How many shims wait.
    pub size: usize,
    /// Who shares one.
    pub scope: ShimScope,
    /// May a shim serve one task after the other?
    pub reuse: bool,
}

/// Idle shims of one kind. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    launcher: Arc<Launcher>,
    settings: PoolSettings,
    idle: Mutex<VecDeque<Shim>>,
    /// Shims that further tasks of the same allocation or node share, by what they share. The node's stays.
    shared: Mutex<HashMap<String, Shim>>,
    /// Who makes a shared one.
    making: tokio::sync::Mutex<()>,
    /// One refill at a time.
    refilling: tokio::sync::Mutex<()>,
    trimming: AtomicBool,
    closed: AtomicBool,
    /// Starts at work.
    busy: watch::Sender<usize>,
    /// The last idle one was taken.
    empty: Notify,
    /// A shim that has not come up by now is not waited for.
    too_late: Notify,
}

/// A start is at work until this is dropped; refills wait for that.
#[derive(Debug)]
pub struct Busy(Pool);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.0.busy.send_modify(|count| *count -= 1);
    }
}

/// A shim for a task.
#[derive(Debug)]
pub enum Reserved {
    /// It is there.
    Waiting(Shim),
    /// It has to be launched; only its name is known.
    Named(Unborn),
}

impl Reserved {
    /// Its name.
    pub fn id(&self) -> &str {
        match self {
            Self::Waiting(shim) => shim.id(),
            Self::Named(unborn) => unborn.id(),
        }
    }
}

impl Pool {
    /// An empty pool.
    pub fn new(launcher: Arc<Launcher>, settings: PoolSettings) -> Self {
        Self(Arc::new(Inner {
            launcher,
            settings,
            idle: Mutex::default(),
            shared: Mutex::default(),
            making: tokio::sync::Mutex::default(),
            refilling: tokio::sync::Mutex::default(),
            trimming: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            busy: watch::Sender::new(0),
            empty: Notify::new(),
            too_late: Notify::new(),
        }))
    }

    /// How its shims are started.
    pub fn launcher(&self) -> &Arc<Launcher> {
        &self.0.launcher
    }

    /// A start is at work.
    pub fn busy(&self) -> Busy {
        self.0.busy.send_modify(|count| *count += 1);
        Busy(self.clone())
    }

    /// A shim for a task of this allocation: a waiting one, or the name of one to launch. One of another kind, whose
    /// `program` this is, is the task's alone.
    ///
    /// # Errors
    /// When one that is to be shared can't be started.
    pub async fn reserve(&self, alloc_id: &str, program: Option<&Path>) -> Result<Reserved, ShimError> {
        if let Some(program) = program {
            return Ok(Reserved::Named(self.0.launcher.name_of(program)));
        }
        let Some(key) = self.key(alloc_id) else { return Ok(self.reserve_own()) };
        if let Some(shim) = self.join(key) {
            return Ok(Reserved::Waiting(shim));
        }
        let _making = self.0.making.lock().await;
        if let Some(shim) = self.join(key) {
            return Ok(Reserved::Waiting(shim));
        }
        let shim = match self.reserve_own() {
            Reserved::Waiting(shim) => shim,
            Reserved::Named(unborn) => self.0.launcher.launch(unborn).await?,
        };
        let own = shim.share();
        self.shared().insert(key.to_owned(), shim);
        Ok(Reserved::Waiting(own))
    }

    /// A shim of an earlier instance of us that holds a task of this allocation: others may join that.
    pub fn adopted(&self, alloc_id: &str, shim: &Shim) {
        let Some(key) = self.key(alloc_id).filter(|_| !shim.is_of_another_kind()) else { return };
        let mut shared = self.shared();
        if !self.is_closed() && !shim.is_unusable() && !shared.contains_key(key) {
            shared.insert(key.to_owned(), shim.share());
        }
    }

    /// By what a task of this allocation finds those that it shares a shim with, if it shares one.
    fn key<'a>(&self, alloc_id: &'a str) -> Option<&'a str> {
        match self.0.settings.scope {
            ShimScope::Task => None,
            // Tasks of no allocation share nothing.
            ShimScope::Alloc => Some(alloc_id).filter(|id| !id.is_empty()),
            ShimScope::Node => Some(""),
        }
    }

    fn join(&self, key: &str) -> Option<Shim> {
        let mut shared = self.shared();
        match shared.get(key) {
            Some(shim) if !shim.has_ended() => Some(shim.share()),
            Some(_) => {
                // What it held is the dead-shim case of its tasks.
                shared.remove(key);
                None
            }
            None => None,
        }
    }

    fn reserve_own(&self) -> Reserved {
        loop {
            let (next, left) = {
                let mut idle = self.idle();
                (idle.pop_front(), idle.len())
            };
            if left == 0 {
                self.0.empty.notify_waiters();
            }
            match next {
                // One that died while it waited left nothing but its directory.
                Some(dead) if dead.has_ended() => dead.kill(),
                Some(shim) => return Reserved::Waiting(shim),
                None => return Reserved::Named(self.0.launcher.name()),
            }
        }
    }

    /// Where work that can wait begins: `breath` from now, or when no start is at work then, but at most `patience` later.
    pub async fn calm(&self, breath: Duration, patience: Duration) {
        tokio::time::sleep(breath).await;
        let mut busy = self.0.busy.subscribe();
        let _ = tokio::time::timeout(patience, busy.wait_for(|count| *count == 0)).await;
    }

    /// Starts what is missing, in the background. Called after a start has returned, never on its path.
    pub fn refill(&self) {
        let pool = self.clone();
        tokio::spawn(async move {
            let Ok(_turn) = pool.0.refilling.try_lock() else { return };
            pool.remove_ended();
            while pool.is_short() {
                let left = pool.idle().len();
                let calm = async {
                    if left > 0 {
                        tokio::time::sleep(LONG_BREATH).await;
                    }
                    pool.calm(BREATH, BACK_PRESSURE).await;
                };
                // Once none is left, waiting has an end.
                tokio::select! {
                    () = calm => {}
                    () = pool.0.empty.notified() => {}
                }
                if !pool.is_short() {
                    return;
                }
                let launched = tokio::select! {
                    launched = pool.0.launcher.launch(pool.0.launcher.name()) => launched,
                    () = pool.0.too_late.notified() => return,
                };
                match launched {
                    Ok(shim) => pool.put(shim),
                    Err(error) => {
                        tracing::warn!(%error, "shim pool: not refilled; the next start launches its own");
                        return;
                    }
                }
            }
        });
    }

    fn is_short(&self) -> bool {
        let size = self.size();
        !self.is_closed() && self.idle().len() < size
    }

    /// How many shims are to wait.
    fn size(&self) -> usize {
        match self.0.settings.scope {
            // The one that all share is enough.
            ShimScope::Node if self.shared().values().any(|shim| !shim.has_ended()) => 0,
            ShimScope::Node => self.0.settings.size.min(1),
            ShimScope::Task | ShimScope::Alloc => self.0.settings.size,
        }
    }

    /// Takes in an idle shim, new or of an earlier instance of us, or ends it when there are enough.
    pub fn put(&self, shim: Shim) {
        if shim.is_of_another_kind() || shim.is_unusable() {
            return shim.kill();
        }
        let size = self.size();
        let mut idle = self.idle();
        // Closing takes the same lock to empty the queue, so a shim either is seen there or ends here.
        if self.is_closed() || idle.len() >= size {
            shim.kill();
        } else {
            idle.push_back(shim);
        }
    }

    /// Removes the directories of shims that have died while no task had them.
    fn remove_ended(&self) {
        let ended_idle: Vec<Shim> = {
            let mut idle = self.idle();
            let (ended, alive) = idle.drain(..).partition(Shim::has_ended);
            *idle = alive;
            VecDeque::into(ended)
        };
        let mut shared = self.shared();
        let ended_shared = shared.extract_if(|_, shim| shim.has_ended()).map(|(_, shim)| shim);
        ended_shared.chain(ended_idle).for_each(let_go);
    }

    /// Ends what has come to be of no use while nobody gave it back: shims that have died, and those of allocations whose last
    /// task let go of its shim in another way.
    pub async fn tidy(&self) {
        self.remove_ended();
        let unused: Vec<Shim> = match self.0.settings.scope {
            ShimScope::Alloc => {
                // Further holds are made under the same lock.
                self.shared().extract_if(|_, shim| shim.is_held_once()).map(|(_, shim)| shim).collect()
            }
            ShimScope::Task | ShimScope::Node => Vec::new(),
        };
        for shim in unused {
            shim.end().await;
        }
        self.refill();
    }

    /// Ends a shim whose container is gone, if nobody else holds it. True when it is gone or others hold it.
    pub async fn end(&self, alloc_id: &str, shim: Shim) -> bool {
        match self.last_hold(alloc_id, shim) {
            Some(shim) => shim.end().await,
            None => true,
        }
    }

    /// Takes back a shim whose container is gone: for the next task, or to its end. True when it is gone or ours again.
    pub async fn take_back(&self, alloc_id: &str, shim: Shim) -> bool {
        let Some(mut shim) = self.last_hold(alloc_id, shim) else { return true };
        if shim.is_unusable() {
            return shim.end_by_force().await;
        }
        shim.uses += 1;
        let settings = self.0.settings;
        // Others are not made for a second container: gVisor's closes what it needs for terminals with the first.
        let worn =
            shim.is_of_another_kind() || !settings.reuse || settings.size == 0 || shim.uses >= USES || shim.has_ended();
        let refused = if worn { Some(shim) } else { self.keep(shim) };
        match refused {
            Some(shim) => shim.end().await,
            None => true,
        }
    }

    /// Lets go of a shim that holds an ended container which it can't delete: it serves the tasks that it has and no others,
    /// and then it is ended by force, since it would not leave when asked to. True when it is gone or others hold it.
    pub async fn discard(&self, mut shim: Shim) -> bool {
        shim.mark_unusable();
        self.shared().retain(|_, kept| kept.id() != shim.id());
        shim.leave_to_others() || shim.end_by_force().await
    }

    /// How many tasks hold this shim: the pool's own hold, which further tasks of an allocation or node would share, is none.
    pub fn tasks_of(&self, id: &str) -> usize {
        let shared = self.shared();
        let own = shared.values().filter(|kept| kept.id() == id).count();
        self.0.launcher.holders_of(id).saturating_sub(own)
    }

    /// Gives up a task's hold on a shim, unless it is the last one, which is returned.
    fn last_hold(&self, alloc_id: &str, mut shim: Shim) -> Option<Shim> {
        let mut shared = self.shared();
        if !shim.leave_to_others() {
            return Some(shim);
        }
        // The last task of an allocation is gone when only we hold its shim.
        let last = self.0.settings.scope == ShimScope::Alloc
            && shared.get(alloc_id).is_some_and(|kept| kept.id() == shim.id() && kept.is_held_once());
        last.then(|| shared.remove(alloc_id)).flatten()
    }

    /// Has it wait for the next task; gives it back when there are enough.
    fn keep(&self, shim: Shim) -> Option<Shim> {
        let size = self.size();
        let mut idle = self.idle();
        // Looked at under the lock that closing takes.
        if self.is_closed() || idle.len() >= size + SPARE {
            return Some(shim);
        }
        // The one that was used last is warmest.
        idle.push_front(shim);
        if idle.len() > size {
            self.trim_later();
        }
        None
    }

    /// Ends what a burst has left over, when no other burst has come.
    fn trim_later(&self) {
        if self.0.trimming.swap(true, Ordering::SeqCst) {
            return;
        }
        let pool = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(SPARE_TIME).await;
            pool.0.trimming.store(false, Ordering::SeqCst);
            // One at a time: whoever closes the pool meanwhile sees the others.
            loop {
                let size = pool.size();
                let surplus = {
                    let mut idle = pool.idle();
                    if idle.len() > size { idle.pop_back() } else { None }
                };
                match surplus {
                    Some(shim) => drop(shim.end().await),
                    None => return,
                }
            }
        });
    }

    /// Ends all idle shims and starts no more. One that is coming up is waited for, or goes: nobody would know of it.
    pub async fn close(&self) {
        self.0.closed.store(true, Ordering::SeqCst);
        self.0.empty.notify_waiters();
        if tokio::time::timeout(COMING_UP, self.0.refilling.lock()).await.is_err() {
            self.0.too_late.notify_waiters();
            if tokio::time::timeout(COMING_UP, self.0.refilling.lock()).await.is_err() {
                tracing::warn!("a shim is still being started; the next plugin takes it over");
            }
        }
        let shared: Vec<Shim> = self.shared().drain().map(|(_, shim)| shim).collect();
        shared.into_iter().for_each(let_go);
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

    fn shared(&self) -> MutexGuard<'_, HashMap<String, Shim>> {
        self.0.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives up the pool's hold on a shim, and ends the shim at once if no task holds it. Those of tasks that go on are theirs, and one
/// that has died is the dead-shim case of its tasks.
fn let_go(mut shim: Shim) {
    if !shim.leave_to_others() {
        shim.kill();
    }
}
