//! The context that starts, teardowns and the engine itself have in common, and the list of pending teardowns.

use std::{
    collections::{HashMap, hash_map::Entry},
    path::Path,
    sync::Arc,
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, Semaphore, watch};

use super::{
    EventHub, Record, RuntimeError, Runtimes, Settings,
    group::NetnsRegistry,
    guards::TeardownGuard,
    logs::LogWriterSupervisor,
    metrics::Metrics,
    sources::{MountSources, needs_sources},
};
use crate::{
    cgroup::{CgroupLockPrimer, Cgroups},
    gvisor,
    ids::{ContainerId, TaskId},
    image::{ImageRecord, ImageStore},
    netns_pool::NetnsPool,
    rootfs::{
        Capabilities, KernelLimits, MaskedPaths, Room, RootfsPool, apparmor::Loader, bundle::Layers,
        labels::PolicyLabels, limits::DefaultSysctls, seccomp::FilterCache,
    },
    shim::{self, CallKind, DeadContainer, Exit, PidFiles, Pool, ShimError, ShimHold},
};

/// The components of an open engine, and its pending teardowns.
pub(crate) struct EngineContext {
    pub(super) settings: Settings,
    pub(super) cgroups: Cgroups,
    pub(super) runtimes: Runtimes,
    pub(super) images: ImageStore,
    pub(super) seccomp_filters: FilterCache,
    /// Loads the driver's own AppArmor profile.
    pub(super) apparmor: Loader,
    pub(super) pool: Pool,
    /// Watches the runtimes' pid files; `None` where inotify is not available.
    pub(super) pid_files: Option<PidFiles>,
    /// Prepared root file systems of the images that were used last.
    pub(super) rootfs_pool: RootfsPool,
    /// Prepared network namespaces for tasks with a network of their own.
    pub(super) netns_pool: NetnsPool,
    pub(super) events: EventHub,
    pub(super) metrics: Metrics,
    /// The groups whose tasks share a network namespace.
    pub(super) groups: NetnsRegistry,
    /// Supervises the log writer, which writes the tasks' logs where Nomad's log collector does not.
    pub(super) log_writer_supervisor: Arc<LogWriterSupervisor>,
    /// Primes the kernel's cgroup lock for starts; `None` where this is disabled, not needed or not possible.
    pub(super) cgroup_primer: Option<CgroupLockPrimer>,
    /// The bounding set of this process, which has all capabilities that a privileged task can get.
    pub(super) own_capabilities: Capabilities,
    /// The paths that are hidden from tasks.
    pub(super) masked: Masked,
    /// Kernel parameters that a task has unless its job sets them.
    pub(super) default_sysctls: DefaultSysctls,
    /// The SELinux labels that the node's policy has for containers; `None` where tasks have no labels.
    pub(super) policy_labels: Option<PolicyLabels>,
    /// This kernel's limits on a task's arguments and environment.
    pub(super) kernel_limits: KernelLimits,
    /// The number of teardowns that run in the background, or wait for that.
    pub(super) background_teardowns: watch::Sender<usize>,
    /// Held by the one step of deferred work that runs. Without it, many steps would wait for the kernel's mount lock, each
    /// in a thread of its own.
    pub(super) deferred_work_lock: tokio::sync::Mutex<()>,
    /// Permits for teardowns in the background.
    pub(super) teardown_permits: Semaphore,
    /// Notified when a caller waits for teardowns, which then begin without delay.
    pub(super) teardown_requested: Notify,
    /// Notified when a pending teardown has succeeded, or is queued again.
    pub(super) teardown_finished: Notify,
    /// The tasks that are to be torn down: those that an earlier plugin left, those whose teardown failed, and those
    /// whose teardown is in progress.
    pub(super) pending_teardowns: Mutex<HashMap<TaskId, PendingTeardown>>,
}

/// The paths that are hidden from tasks. There is one list for tasks on the host's kernel, and one for tasks in gVisor
/// sandboxes.
pub(super) struct Masked {
    pub(super) host: MaskedPaths,
    pub(super) sandbox: MaskedPaths,
}

/// How many teardowns run in the background at a time. Teardowns wait for disks and kernel locks, not for processors.
pub(crate) const CONCURRENT_TEARDOWNS_MAX: usize = 4;
/// How long a caller waits for the teardowns in the background, which take longer than this only on a very slow disk.
const TEARDOWNS_TIMEOUT: Duration = Duration::from_secs(30);

/// How long after a start the work begins that the start has deferred.
const DEFERRED_WORK_DELAY: Duration = Duration::from_millis(5);
/// How long each step of that work waits, in addition, for other starts in progress.
const DEFERRED_WORK_MAX_DELAY: Duration = Duration::from_millis(100);

/// A task that is to be torn down.
pub(crate) struct PendingTeardown {
    pub(super) record: Record,
    pub(super) state: TeardownState,
    /// A hold on the task's shim, if the container in the shim could not be ended.
    pub(super) shim_hold: Option<ShimHold>,
}

/// The state of a pending teardown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TeardownState {
    /// The teardown waits for a caller to run it.
    Queued,
    /// A caller runs the teardown and will report its outcome.
    InProgress,
    /// The container is gone, the caller has its answer, and the rest of the teardown runs in the background.
    Background,
}

/// Returns the layers of an image's root file system.
pub(super) fn layers(image: &ImageRecord) -> Layers<'_> {
    Layers { lowers: &image.lowers, options: &image.overlay_options }
}

impl EngineContext {
    /// Queues the teardown of a task, for the first time or again.
    pub(super) fn queue_teardown(&self, record: Record) {
        match self.pending_teardowns().entry(record.intent.task_id.clone()) {
            Entry::Occupied(mut known) => {
                let known = known.get_mut();
                (known.record, known.state) = (record, TeardownState::Queued);
            }
            Entry::Vacant(free) => {
                free.insert(PendingTeardown { record, state: TeardownState::Queued, shim_hold: None });
            }
        }
        self.teardown_finished.notify_waiters();
    }

    /// Sets or releases the hold on the shim of a task whose teardown is pending.
    pub(super) fn set_shim_hold(&self, id: &TaskId, shim: Option<ShimHold>) {
        if let Some(pending) = self.pending_teardowns().get_mut(id) {
            pending.shim_hold = shim;
        }
    }

    /// Claims a queued teardown, so that no other caller runs it. The task stays in the list until its teardown
    /// succeeds.
    pub(super) fn claim_teardown(self: &Arc<Self>, id: &TaskId) -> Option<TeardownGuard> {
        let record = {
            let mut pending_teardowns = self.pending_teardowns();
            let pending = pending_teardowns.get_mut(id).filter(|pending| pending.state == TeardownState::Queued)?;
            pending.state = TeardownState::InProgress;
            pending.record.clone()
        };
        Some(TeardownGuard::for_claimed(self, record))
    }

    /// Returns the state of the task's pending teardown, if it has one.
    pub(super) fn teardown_state(&self, id: &TaskId) -> Option<TeardownState> {
        self.pending_teardowns().get(id).map(|pending| pending.state)
    }

    /// Does in the background what a start has deferred: unmounts the sources of the task's mounts, unless its shim
    /// needs them, and prepares network namespaces, and root file systems for the next tasks of the image.
    pub(super) fn spawn_deferred_work(
        self: &Arc<Self>,
        record: &Record,
        image: Arc<ImageRecord>,
        sources: MountSources,
    ) {
        let context = self.clone();
        let task = record.intent.task_id.clone();
        let sources = if needs_sources(record) { None } else { Some(sources) };
        tokio::spawn(async move {
            tokio::time::sleep(DEFERRED_WORK_DELAY).await;
            if let Some(sources) = sources {
                context.run_when_idle(move |_| sources.unmount(&task)).await;
            }
            context.fill_netns_pool().await;
            loop {
                let image = image.clone();
                match context.run_when_idle(move |context| context.rootfs_pool.prepare(layers(&image))).await {
                    Some(Ok(Room::ForMore)) => {}
                    // Without a prepared root file system, the next start mounts its own, and reports what is wrong.
                    Some(Err(error)) => {
                        let error = crate::error_chain(&error);
                        tracing::debug!(error, "could not prepare a root file system");
                        return;
                    }
                    Some(Ok(Room::None)) | None => return,
                }
            }
        });
    }

    /// Runs a step of deferred work, which may block, when no start is in progress. Returns `None` if it panics.
    async fn run_when_idle<T: Send + 'static>(
        self: &Arc<Self>,
        step: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Option<T> {
        self.pool.wait_until_idle(Duration::ZERO, DEFERRED_WORK_MAX_DELAY).await;
        let _lock = self.deferred_work_lock.lock().await;
        let context = self.clone();
        tokio::task::spawn_blocking(move || step(&context)).await.ok()
    }

    /// Fills the pool of network namespaces while no start is in progress.
    pub(super) async fn fill_netns_pool(self: &Arc<Self>) {
        while self.netns_pool.has_room() {
            match self.run_when_idle(|context| context.netns_pool.prepare()).await {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    tracing::debug!(
                        %error,
                        "could not prepare a network namespace; the runtime creates one for the next task"
                    );
                    return;
                }
                None => return,
            }
        }
    }

    /// Waits until the teardowns in the background have ended, but at most `TEARDOWNS_TIMEOUT`.
    pub(super) async fn wait_for_teardowns(&self) {
        self.teardown_requested.notify_waiters();
        let mut background_teardowns = self.background_teardowns.subscribe();
        let finished =
            tokio::time::timeout(TEARDOWNS_TIMEOUT, background_teardowns.wait_for(|count| *count == 0)).await;
        if finished.is_err() {
            tracing::warn!(
                limit_s = TEARDOWNS_TIMEOUT.as_secs(),
                "teardowns of destroyed tasks are still in progress; no longer waiting for them"
            );
        }
    }

    /// Removes a task from the pending teardowns: its teardown has succeeded.
    pub(super) fn remove_teardown(&self, id: &TaskId) {
        self.pending_teardowns().remove(id);
        self.teardown_finished.notify_waiters();
    }

    /// Kills and deletes what is left of a container whose shim is dead. Returns how the container ended, if the shim
    /// has recorded that.
    pub(super) async fn delete_dead(&self, record: &Record) -> Result<Option<Exit>, ShimError> {
        let bundle = self.settings.places.bundle(&record.intent.container_id);
        let runtime = self.runtimes.binary(&record.intent.runtime);
        let dead = DeadContainer {
            id: record.intent.container_id.as_str(),
            namespace: &record.intent.namespace,
            program: record.intent.shim_program.as_deref(),
            is_gvisor: record.intent.gvisor,
            runtime: runtime.as_deref(),
            bundle: &bundle,
        };
        let _call_guard = self.pool.launcher().calls().begin(CallKind::FollowUp).await;
        let exit = shim::delete_dead_container(self.pool.launcher(), dead).await?;
        // gVisor's own shim reports success even if it could not run runsc.
        let root = self.settings.places.runtime_state(&record.intent.runtime, &record.intent.namespace);
        if record.intent.gvisor && root.join(gvisor::state_file(record.intent.container_id.as_str())).exists() {
            return Err(ShimError::NotDeleted);
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
        let _call_guard = self.pool.launcher().calls().begin(CallKind::FollowUp).await;
        self.runtimes.delete(runtime, root, id).await
    }

    pub(super) fn pending_teardowns(&self) -> MutexGuard<'_, HashMap<TaskId, PendingTeardown>> {
        self.pending_teardowns.lock()
    }
}
