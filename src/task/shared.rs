//! The context that starts, teardowns and the engine itself have in common, and the list of pending teardowns.

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

/// The components of an open engine, and its pending teardowns.
pub struct Shared {
    pub(super) settings: Settings,
    pub(super) cgroups: Cgroups,
    pub(super) runtimes: Runtimes,
    pub(super) images: ImageStore,
    pub(super) filters: Filters,
    /// Loads the driver's own AppArmor profile.
    pub(super) apparmor: Loader,
    pub(super) pool: Pool,
    /// Watches the runtimes' pid files; `None` where inotify is not available.
    pub(super) pid_files: Option<PidFiles>,
    /// Prepared root file systems of the images that were used last.
    pub(super) ahead: Ahead,
    pub(super) events: EventHub,
    pub(super) metrics: Metrics,
    /// The groups whose tasks share a network namespace.
    pub(super) groups: Groups,
    /// Supervises the log writer, which writes the tasks' logs where Nomad's log collector does not.
    pub(super) log_keeper: Arc<LogKeeper>,
    /// Primes the kernel's cgroup lock for starts; `None` where this is disabled, not needed or not possible.
    pub(super) warmer: Option<Warmer>,
    /// The capabilities of this process, which are the most that a privileged task can get.
    pub(super) own_capabilities: Capabilities,
    /// The paths that are hidden from tasks.
    pub(super) masked: Masked,
    /// This kernel's limits on a task's arguments and environment.
    pub(super) kernel: KernelLimits,
    /// The number of teardowns that run in the background, or wait for that.
    pub(super) clearing: watch::Sender<usize>,
    /// Permits for teardowns in the background.
    pub(super) teardowns: Semaphore,
    /// Notified when a caller waits for teardowns, which then begin without delay.
    pub(super) hurry: Notify,
    /// Notified when a pending teardown has succeeded, or is queued again.
    pub(super) settled: Notify,
    /// The tasks that are to be torn down: those that an earlier plugin left, those whose teardown failed, and those
    /// whose teardown is in progress.
    pub(super) leftovers: Mutex<HashMap<TaskId, Leftover>>,
}

/// The paths that are hidden from tasks: of those on the host's kernel, and of those in a gVisor sandbox.
pub(super) struct Masked {
    pub(super) host: MaskedPaths,
    pub(super) sandbox: MaskedPaths,
}

/// How many teardowns run in the background at a time. Teardowns wait for disks and kernel locks, not for processors.
pub const TEARDOWNS: usize = 4;
/// How long a caller waits for the teardowns in the background. A slower disk is not waited for.
const CLEARED: Duration = Duration::from_secs(30);

/// How long after a start the work begins that the start has deferred.
const BREATH: Duration = Duration::from_millis(5);
/// How long that work waits, in addition, for other starts in progress.
const PATIENCE: Duration = Duration::from_millis(100);

/// A task that is to be torn down.
pub struct Leftover {
    pub(super) record: Record,
    pub(super) hands: Hands,
    /// A hold on the task's shim, if the container in the shim could not be ended.
    pub(super) shim: Option<Held>,
}

/// The state of a pending teardown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hands {
    /// The teardown waits for a caller to run it.
    Free,
    /// A caller runs the teardown and will report its outcome.
    Taken,
    /// The container is gone, the caller has its answer, and the rest of the teardown runs in the background.
    Clearing,
}

/// Returns the layers of an image's root file system.
pub(super) fn layers(image: &ImageRecord) -> Layers<'_> {
    Layers { lowers: &image.lowers, options: &image.overlay_options }
}

impl Shared {
    /// Queues the teardown of a task, for the first time or again.
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

    /// Sets or releases the hold on the shim of a task whose teardown is pending.
    pub(super) fn hold_shim(&self, id: &TaskId, shim: Option<Held>) {
        if let Some(leftover) = self.leftovers().get_mut(id) {
            leftover.shim = shim;
        }
    }

    /// Claims a queued teardown, so that no other caller runs it. The task stays in the list until its teardown
    /// succeeds.
    pub(super) fn take_leftover(self: &Arc<Self>, id: &TaskId) -> Option<Claim> {
        let record = {
            let mut leftovers = self.leftovers();
            let leftover = leftovers.get_mut(id).filter(|leftover| leftover.hands == Hands::Free)?;
            leftover.hands = Hands::Taken;
            leftover.record.clone()
        };
        Some(Claim::on(self, record))
    }

    /// Returns the state of the task's pending teardown, if it has one.
    pub(super) fn hands_on(&self, id: &TaskId) -> Option<Hands> {
        self.leftovers().get(id).map(|leftover| leftover.hands)
    }

    /// Does in the background what a start has deferred: unmounts the sources of its mounts, and prepares a root file
    /// system for the next task of its image.
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
            // Without a prepared root file system, the next start mounts its own, and reports what is wrong.
            if let Ok(Err(error)) = tokio::task::spawn_blocking(work).await {
                tracing::debug!(error = %crate::chain(&error), "could not prepare a root file system");
            }
        });
    }

    /// Waits until the teardowns in the background have ended, but at most `TEARDOWNS_TIMEOUT`.
    pub(super) async fn all_cleared(&self) {
        self.hurry.notify_waiters();
        let mut clearing = self.clearing.subscribe();
        let cleared = tokio::time::timeout(CLEARED, clearing.wait_for(|count| *count == 0)).await;
        if cleared.is_err() {
            tracing::warn!("teardowns of destroyed tasks are still in progress");
        }
    }

    /// Removes a task from the pending teardowns: its teardown has succeeded.
    pub(super) fn forget(&self, id: &TaskId) {
        self.leftovers().remove(id);
        self.settled.notify_waiters();
    }

    /// Kills and deletes what is left of a container whose shim is dead. Returns how the container had ended, if the
    /// shim has written that down.
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
        // gVisor's own shim reports success even if it could not run runsc.
        let root = self.settings.places.runtime_state(&record.runtime, &record.namespace);
        if record.gvisor && root.join(gvisor::state_file(record.container_id.as_str())).exists() {
            let message = "runsc has not deleted the container; its state is still there".to_owned();
            return Err(ShimError::Refused { call: "delete", code: -1, message });
        }
        Ok(exit)
    }

    /// Makes a runtime kill and delete a container that no shim holds. `root` is the runtime's state directory.
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
