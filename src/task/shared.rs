//! What starting, undoing and the engine itself work with.

use std::{
    collections::{HashMap, hash_map::Entry},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{Notify, Semaphore, watch};

use super::{
    EventHub, Record, RuntimeError, Runtimes, Settings,
    claim::Claim,
    group::Groups,
    logs::LogKeeper,
    metrics::Metrics,
    sources::{Sources, needs_sources},
};
use crate::{
    cgroup::{Cgroups, Warmer},
    gvisor,
    ids::{ContainerId, TaskId},
    image::{ImageRecord, ImageStore},
    rootfs::{Ahead, Capabilities, KernelLimits, MaskedPaths, apparmor::Loader, bundle::Layers, seccomp::Filters},
    shim::{self, DeadTask, Exit, Held, PidFiles, Pool, Purpose, ShimError},
};

/// The parts of an open engine, and what it has still to take over or undo.
pub struct Shared {
    pub(super) settings: Settings,
    pub(super) cgroups: Cgroups,
    pub(super) runtimes: Runtimes,
    pub(super) images: ImageStore,
    pub(super) filters: Filters,
    /// The driver's own AppArmor profile.
    pub(super) apparmor: Loader,
    pub(super) pool: Pool,
    /// Where they can be watched.
    pub(super) pid_files: Option<PidFiles>,
    /// Root file systems of the images used last.
    pub(super) ahead: Ahead,
    pub(super) events: EventHub,
    pub(super) metrics: Metrics,
    /// Who shares network namespaces.
    pub(super) groups: Groups,
    /// Where tasks' logs are ours to write.
    pub(super) log_keeper: Arc<LogKeeper>,
    /// Where it is wanted, and there is something to warm.
    pub(super) warmer: Option<Warmer>,
    /// What this process could hand on to a privileged task.
    pub(super) own_capabilities: Capabilities,
    /// What is hidden from tasks.
    pub(super) masked: Masked,
    /// What this host's kernel takes of a task's strings.
    pub(super) kernel: KernelLimits,
    /// Tasks that the background is clearing away, or will.
    pub(super) clearing: watch::Sender<usize>,
    /// So many tasks are cleared away at a time.
    pub(super) teardowns: Semaphore,
    /// Somebody waits for what is being cleared away.
    pub(super) hurry: Notify,
    /// A leftover is gone, or free again.
    pub(super) settled: Notify,
    /// Tasks that are to be undone: of an earlier instance of us, and those whose undo failed.
    pub(super) leftovers: Mutex<HashMap<TaskId, Leftover>>,
}

/// What is hidden from tasks, by where they run.
pub(super) struct Masked {
    pub(super) host: MaskedPaths,
    pub(super) sandbox: MaskedPaths,
}

/// They wait for disks and kernel locks, not for processors.
pub const TEARDOWNS: usize = 4;
/// A disk that is slower than this is not waited for.
const CLEARED: Duration = Duration::from_secs(30);

/// The work that a start leaves for later begins so long after it,
const BREATH: Duration = Duration::from_millis(5);
/// and at most so long later when other starts are at work.
const PATIENCE: Duration = Duration::from_millis(100);

/// A task that is to be undone.
pub struct Leftover {
    pub(super) record: Record,
    pub(super) hands: Hands,
    /// A hold on its shim, where the container in it could not be ended.
    pub(super) shim: Option<Held>,
}

/// Who is at a leftover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hands {
    /// Nobody.
    Free,
    /// Somebody, who will say how it went.
    Taken,
    /// The background: its container is gone, and whoever asked for that has had the answer.
    Clearing,
}

/// What an image's root file system is made of.
pub(super) fn layers(image: &ImageRecord) -> Layers<'_> {
    Layers { lowers: &image.lowers, options: &image.overlay_options }
}

impl Shared {
    /// Keeps in mind what is still to be undone.
    pub(super) fn keep(&self, record: Record) {
        match self.leftovers().entry(record.task_id.clone()) {
            Entry::Occupied(mut known) => {
                let known = known.get_mut();
                (known.record, known.hands) = (record, Hands::Free);
            }
            Entry::Vacant(free) => drop(free.insert(Leftover { record, hands: Hands::Free, shim: None })),
        }
        self.settled.notify_waiters();
    }

    /// Holds the shim of a task that is to be undone once more, or lets go of it.
    pub(super) fn hold_shim(&self, id: &TaskId, shim: Option<Held>) {
        if let Some(leftover) = self.leftovers().get_mut(id) {
            leftover.shim = shim;
        }
    }

    /// Takes it, so that nobody else does. It stays in mind until it is gone.
    pub(super) fn take_leftover(self: &Arc<Self>, id: &TaskId) -> Option<Claim> {
        let record = {
            let mut leftovers = self.leftovers();
            let leftover = leftovers.get_mut(id).filter(|leftover| leftover.hands == Hands::Free)?;
            leftover.hands = Hands::Taken;
            leftover.record.clone()
        };
        Some(Claim::on(self, record))
    }

    /// Who is at it, if there is such a leftover.
    pub(super) fn hands_on(&self, id: &TaskId) -> Option<Hands> {
        self.leftovers().get(id).map(|leftover| leftover.hands)
    }

    /// Does in the background what a start leaves for later: unmounts the sources of its mounts, and makes a root file system
    /// ahead for the next task of its image.
    pub(super) fn after_start(self: &Arc<Self>, record: &Record, image: Arc<ImageRecord>, sources: Sources) {
        let shared = self.clone();
        let task = record.task_id.clone();
        let sources = if needs_sources(record) { None } else { Some(sources) };
        tokio::spawn(async move {
            shared.pool.calm(BREATH, PATIENCE).await;
            let work = move || {
                if let Some(sources) = sources {
                    sources.release(&task);
                }
                shared.ahead.make(layers(&image))
            };
            // The next start makes its own, and says what is wrong.
            if let Ok(Err(error)) = tokio::task::spawn_blocking(work).await {
                tracing::debug!(error = %crate::chain(&error), "no root file system made ahead");
            }
        });
    }

    /// Waits until what has been destroyed is cleared away, but not for what hangs.
    pub(super) async fn all_cleared(&self) {
        self.hurry.notify_waiters();
        let mut clearing = self.clearing.subscribe();
        let cleared = tokio::time::timeout(CLEARED, clearing.wait_for(|count| *count == 0)).await;
        if cleared.is_err() {
            tracing::warn!("tasks that are gone are still being cleared away");
        }
    }

    /// It is gone.
    pub(super) fn forget(&self, id: &TaskId) {
        self.leftovers().remove(id);
        self.settled.notify_waiters();
    }

    /// What is left of a container whose shim is dead: ended and removed; how it had ended, where that was noted.
    pub(super) async fn delete_dead(&self, record: &Record) -> Result<Option<Exit>, ShimError> {
        let bundle = self.settings.places.bundle(&record.container_id);
        let runtime = self.runtimes.binary(&record.runtime);
        let dead = DeadTask {
            id: record.container_id.as_str(),
            namespace: &record.namespace,
            program: record.shim_program.as_deref(),
            is_gvisor: record.gvisor,
            runtime: runtime.as_deref(),
            bundle: &bundle,
        };
        let _at_work = self.pool.launcher().calls().begin(Purpose::Continue).await;
        let exit = shim::delete_dead(self.pool.launcher(), dead).await?;
        // gVisor's own shim says that all went well when its runsc could not be run.
        let root = self.settings.places.runtime_state(&record.runtime, &record.namespace);
        if record.gvisor && root.join(gvisor::state_file(record.container_id.as_str())).exists() {
            let message = "runsc has not deleted the container; its state is still there".to_owned();
            return Err(ShimError::Refused { call: "delete", code: -1, message });
        }
        Ok(exit)
    }

    /// Has a runtime end and forget a container that no shim holds. `root` is the runtime's state directory.
    pub(super) async fn delete_by_runtime(
        &self,
        runtime: &str,
        root: &Path,
        id: &ContainerId,
    ) -> Result<(), RuntimeError> {
        let _at_work = self.pool.launcher().calls().begin(Purpose::Continue).await;
        self.runtimes.delete(runtime, root, id).await
    }

    pub(super) fn leftovers(&self) -> MutexGuard<'_, HashMap<TaskId, Leftover>> {
        self.leftovers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
