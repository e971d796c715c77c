//! The engine: the map of all tasks of one plugin with their states, and the operations on them.
//!
//! The map is locked only for lookups and updates. Slow work runs outside of that lock, per task.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::File,
    sync::{Arc, OnceLock, Weak},
    time::{Duration, Instant, SystemTime},
};

use nix::fcntl::Flock;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::{
    Audience, ExecRequest, ExecSession, ExitRecord, LegacyTask, Phases, Record, RunRecord, Runtimes, Settings,
    StartRequest, TaskError, TaskEvent, TaskHandle,
    context::{EngineContext, PendingTeardown},
    exec,
    live::{Task, TaskParts, watch_exit},
    metrics::Gauges,
    signal, start,
    stop::Force,
};
use crate::{
    failpoint,
    ids::{AllocId, TaskId},
    logs::FifoGuard,
    shim::{Adoption, ShimHold, SignalTarget, stdio::ParkedFifos},
};

/// How long a plugin that exits waits for runtime calls and teardowns. Nomad kills a plugin 2 s after it has asked the
/// plugin to exit (go-plugin, `client.go`, `Kill`).
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(1500);

/// The lock of one task of an allocation. A start or a teardown of one of the task's attempts holds it.
type AttemptLock = Arc<tokio::sync::Mutex<()>>;

/// An allocation and the name of a task in it.
pub(super) type AllocTask = (AllocId, String);

/// Returns for how long an agent has been connected without interruption; zero when no agent is connected.
type AgentConnectedFor = Box<dyn Fn() -> Duration + Send + Sync>;

/// The state of an engine; all clones of an [`Engine`] have it in common.
pub(super) struct Inner {
    pub(super) context: Arc<EngineContext>,
    pub(super) tasks: Mutex<HashMap<TaskId, Slot>>,
    /// The attempt locks. Each lets only one attempt of a task at a time be started or torn down.
    pub(super) attempt_locks: Mutex<HashMap<AllocTask, AttemptLock>>,
    /// The log FIFOs of starts that an earlier plugin did not complete. They are kept open until Nomad starts the tasks
    /// again.
    pub(super) parked_fifos: Mutex<HashMap<AllocTask, ParkedFifos>>,
    /// Tasks of nomad-driver-containerd whose containers could not be stopped yet.
    pub(super) legacy: Mutex<HashMap<AllocTask, LegacyTask>>,
    /// Permits for recoveries, which limit how many run at a time.
    pub(super) recovery_permits: Semaphore,
    pub(super) opened_at: Instant,
    pub(super) agent_connected_for: OnceLock<AgentConnectedFor>,
    /// Tasks that this engine must not touch, although their records are in its directory. The engine holds their
    /// shims, so that the teardown of another task that shares such a shim does not end the shim.
    pub(super) left_alone: Mutex<Vec<(Record, ShimHold)>>,
    pub(super) _lock: Flock<File>,
}

/// The state of a task in the engine's map.
#[derive(Clone)]
pub(super) enum Slot {
    /// StartTask is running; the channel closes when it is done.
    Starting { stop: CancellationToken, done: watch::Receiver<()> },
    /// The engine is recovering the task from an earlier plugin; the channel closes when that is done.
    Recovering { record: Box<Record>, done: watch::Receiver<()> },
    /// The task runs or has ended.
    Task(Arc<Task>),
}

impl Slot {
    /// The task's record; `None` while the task is being started.
    pub(super) fn record(&self) -> Option<Record> {
        match self {
            Self::Task(task) => Some(task.record()),
            Self::Recovering { record, .. } => Some((**record).clone()),
            Self::Starting { .. } => None,
        }
    }
}

/// The answer to `InspectTask`.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// The task's name.
    pub name: String,
    /// When the task's process was started.
    pub started_at: SystemTime,
    /// How the task ended; `None` while it runs.
    pub exit: Option<ExitRecord>,
    /// The task's record, with its container, shim and cgroup.
    pub record: Record,
    /// The pid of the task's first process on the host. `None` for a task that had ended when it was recovered.
    pub pid: Option<u32>,
    /// How long each phase of the start took.
    pub phases: Phases,
}

/// The engine. Cheap to clone.
#[derive(Clone)]
pub struct Engine(pub(super) Arc<Inner>);

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("name", &self.0.context.settings.name).finish_non_exhaustive()
    }
}

impl Engine {
    pub(super) fn context(&self) -> &Arc<EngineContext> {
        &self.0.context
    }

    pub(super) fn downgrade(&self) -> Weak<Inner> {
        Arc::downgrade(&self.0)
    }

    /// Sets the function that returns for how long an agent has been connected. Before this call, the engine assumes
    /// that no agent is connected.
    pub fn set_agent_connected_for(&self, connected_for: impl Fn() -> Duration + Send + Sync + 'static) {
        let _ = self.0.agent_connected_for.set(Box::new(connected_for));
    }

    /// Returns for how long an agent has been connected without interruption; zero when no agent is connected.
    pub(super) fn agent_connected_for(&self) -> Duration {
        self.0.agent_connected_for.get().map_or(Duration::ZERO, |connected_for| connected_for())
    }

    /// Returns how long ago the engine was opened.
    pub(super) fn age(&self) -> Duration {
        self.0.opened_at.elapsed()
    }

    /// Returns all tasks that run or have ended, but none that is being started or recovered.
    pub(super) fn started_tasks(&self) -> Vec<(TaskId, Arc<Task>)> {
        let tasks = self.tasks();
        let started = tasks.iter().filter_map(|(id, slot)| match slot {
            Slot::Task(task) => Some((id.clone(), task.clone())),
            Slot::Starting { .. } | Slot::Recovering { .. } => None,
        });
        started.collect()
    }

    /// Subscribes to the task events that happen from now on.
    pub fn subscribe(&self) -> tokio::sync::broadcast::Receiver<TaskEvent> {
        self.0.context.events.subscribe()
    }

    /// Returns the lock of an allocation's task. A start or a teardown of one of the task's attempts holds the lock.
    pub(super) fn attempt_lock(&self, alloc_id: &AllocId, name: &str) -> AttemptLock {
        let mut attempt_locks = self.0.attempt_locks.lock();
        // Locks that are neither held nor waited for are dropped.
        attempt_locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        attempt_locks.entry((alloc_id.clone(), name.to_owned())).or_default().clone()
    }

    /// The settings that the engine was opened with.
    pub fn settings(&self) -> &Settings {
        &self.0.context.settings
    }

    /// The runtimes of this host.
    pub fn runtimes(&self) -> &Runtimes {
        &self.0.context.runtimes
    }

    /// Says whether the shim's binary is installed.
    pub fn shim_is_installed(&self) -> bool {
        crate::process::which(self.0.context.pool.launcher().binary()).is_some()
    }

    /// Fills the pools of idle shims and of prepared network namespaces in the background.
    pub fn fill_pools(&self) {
        self.0.context.pool.refill();
        self.fill_netns_pool();
    }

    fn fill_netns_pool(&self) {
        let context = self.0.context.clone();
        tokio::spawn(async move { context.fill_netns_pool().await });
    }

    /// Fills the pool of idle shims, and returns whether it is full within `limit`.
    pub async fn wait_for_full_shim_pool(&self, limit: Duration) -> bool {
        self.0.context.pool.fill(limit).await
    }

    /// Starts a task; it runs when this returns. An earlier attempt of the same task of the allocation is destroyed
    /// first.
    ///
    /// # Errors
    /// When the task can't be started. Everything that the start has made is removed then.
    pub async fn start(&self, request: StartRequest) -> Result<TaskHandle, TaskError> {
        let outcome = Box::pin(self.start_uncounted(request)).await;
        if let Err(error) = &outcome {
            self.0.context.metrics.failed(error);
        }
        outcome
    }

    async fn start_uncounted(&self, request: StartRequest) -> Result<TaskHandle, TaskError> {
        let id = request.task_id.clone();
        if let Some(handle) = self.reuse_earlier_start(&request).await {
            return Ok(handle);
        }
        let parked = self.parked_fifos().remove(&(request.alloc_id.clone(), request.name.clone()));
        let (stop, (done_sender, done)) = (CancellationToken::new(), watch::channel(()));
        match self.tasks().entry(id.clone()) {
            Entry::Vacant(free) => {
                free.insert(Slot::Starting { stop: stop.clone(), done });
            }
            Entry::Occupied(_) => return Err(TaskError::AlreadyStarted(id.0)),
        }
        let slot = StartingSlot { engine: self, id: &id, _done: done_sender };
        // A StartTask call of an agent that died may still be running. That attempt completes first, and is then
        // replaced.
        let mut attempt_lock = Box::pin(self.attempt_lock(&request.alloc_id, &request.name).lock_owned());
        let _attempt_lock = tokio::select! {
            lock = &mut attempt_lock => lock,
            () = stop.cancelled() => {
                self.destroy_previous_attempts_later(attempt_lock, request);
                return Err(TaskError::Stopped(id.clone()));
            }
        };
        self.end_remaining_legacy(&request.alloc_id, &request.name).await?;
        let _open_fifos = (parked, self.destroy_previous_attempts(&request, &stop).await?);
        let started = start::start(&self.0.context, &request, &stop).await;
        self.0.context.pool.refill();
        // A failed start may have taken a prepared network namespace.
        let started = started.inspect_err(|_| self.fill_netns_pool());
        let start::StartedTask { record, shim, run, phases, image, stdio, sources } = started?;
        self.0.context.spawn_deferred_work(&record, image.clone(), sources);
        self.announce_start(&record, &run, &phases);
        self.announce_missing_network(&request, &record);
        let (shim, image) = (Adoption::Alive(shim), Some(image));
        let log = FifoGuard::new(&self.settings().places.log(&record.intent.container_id));
        let task = Task::new(TaskParts {
            record,
            shim,
            process: Some(run.process),
            started_at: run.started_at,
            phases,
            exit: None,
            unrecoverable_reason: None,
            confirmed: true,
            image,
            log,
        });
        let handle = task.handle();
        slot.fill(task.clone());
        let mut exit = task.exit.subscribe();
        tokio::spawn(stdio.hold_until_read(async move { drop(exit.wait_for(Option::is_some).await) }));
        tokio::spawn(watch_exit(self.0.context.clone(), task));
        if stop.is_cancelled() {
            self.destroy(&id, Force::Yes).await?;
            return Err(TaskError::Stopped(id));
        }
        failpoint::kill_at("start.answer");
        Ok(handle)
    }

    /// Counts a start and reports it in the log and as a task event.
    fn announce_start(&self, record: &Record, run: &RunRecord, phases: &Phases) {
        self.0.context.metrics.started(phases);
        tracing::info!(
            task = %record.intent.task_id, image = record.intent.image, runtime = record.intent.runtime, pid = run.process.pid,
            pooled = phases.pooled, total_us = micros(phases.total), image_us = micros(phases.image),
            shim_us = micros(phases.shim), bundle_us = micros(phases.bundle), create_us = micros(phases.create),
            released_us = phases.released.map(micros), start_us = phases.start.map(micros), "task started"
        );
        self.0.context.events.send_to_host(record, format!("Started, process {}", run.process.pid));
    }

    /// Tells Nomad's users of a task that has loopback only, although its group asks for ports or upstreams.
    fn announce_missing_network(&self, request: &StartRequest, record: &Record) {
        let Some(variable) = &request.lacks_network_for else { return };
        let message = format!(
            "The task has loopback only: {variable} is set, but the group has no network namespace. Set network {{ mode = \"bridge\" }} in the group, or host_network = true in the task's config."
        );
        tracing::warn!(task = %request.task_id, variable, "a task has loopback only, although its group asks for a network");
        self.0.context.events.send_about(record, message, Audience::Everybody);
    }

    /// Waits until the task has ended, and returns how it ended. Any number of callers may wait, before and after the
    /// end.
    ///
    /// # Errors
    /// When the task is unknown.
    pub async fn wait(&self, id: &TaskId) -> Result<ExitRecord, TaskError> {
        let task = self.find(id).await?;
        let mut exit = task.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await.map(|exit| exit.clone());
        ended.ok().flatten().ok_or_else(|| TaskError::NotFound(id.clone()))
    }

    /// Sends a signal to the task's first process.
    ///
    /// # Errors
    /// When the signal's name is unknown, or the task is unknown or has ended.
    pub async fn signal(&self, id: &TaskId, name: &str) -> Result<(), TaskError> {
        let number = signal::parse(name)?;
        let task = self.find(id).await?;
        let Some(client) = task.client.as_ref().filter(|_| !task.has_ended()) else {
            return Err(TaskError::NotFound(id.clone()));
        };
        let container = task.record().intent.container_id;
        client
            .kill(container.as_str(), number, SignalTarget::Init)
            .await
            .map_err(|source| TaskError::Shim { doing: "send the signal", source })
    }

    /// Starts a further process in a task.
    ///
    /// # Errors
    /// When the task is unknown or has ended, or the process can't be started.
    pub async fn exec(&self, id: &TaskId, request: &ExecRequest) -> Result<ExecSession, TaskError> {
        let task = self.find(id).await?;
        let ended = || TaskError::Ended(id.clone());
        let client = task.client.as_ref().filter(|_| !task.has_ended()).ok_or_else(ended)?;
        let (client, record, request) = (client.clone(), task.record(), request.clone());
        let places = self.0.context.settings.places.clone();
        // The start completes even if the caller goes away. A session without a caller is then dropped, which kills its
        // process.
        let started = tokio::spawn(async move { exec::start(&client, &places, &record, &request).await }).await?;
        started.map_err(|error| {
            // The task may have ended while the process was being started.
            if task.has_ended() { ended() } else { error.into() }
        })
    }

    /// Returns what is known of a task.
    ///
    /// # Errors
    /// When the task is unknown.
    pub async fn inspect(&self, id: &TaskId) -> Result<Inspection, TaskError> {
        let task = self.find(id).await?;
        let record = task.record();
        let exit = task.exit.borrow().clone();
        Ok(Inspection {
            name: record.intent.name.clone(),
            started_at: task.started_at(),
            exit,
            record,
            pid: task.process.map(|process| process.pid),
            phases: task.phases,
        })
    }

    /// Returns the driver's metrics in Prometheus' text format.
    pub fn metrics(&self) -> String {
        let mut gauges = Gauges {
            pending_teardowns: self.pending_teardowns().len(),
            idle_shims: self.0.context.pool.idle_ids().len(),
            images: self.0.context.images.records().len(),
            ..Gauges::default()
        };
        for slot in self.tasks().values() {
            match slot {
                Slot::Starting { .. } => gauges.starting += 1,
                Slot::Task(task) if task.has_ended() => gauges.exited += 1,
                Slot::Task(_) | Slot::Recovering { .. } => gauges.running += 1,
            }
        }
        self.0.context.metrics.render(gauges)
    }

    /// Waits for the runtime calls that are in progress, and allows no further ones. A call that takes too long is cut
    /// off when the plugin exits, and the next plugin completes it.
    pub async fn finish_runtime_calls(&self) {
        if !self.0.context.pool.launcher().calls().drain(SHUTDOWN_TIMEOUT).await {
            tracing::warn!(
                limit_ms = SHUTDOWN_TIMEOUT.as_millis(),
                "a runtime call did not end before the plugin exits; the next plugin completes it"
            );
        }
    }

    /// Closes the engine: waits for the teardowns in the background, and ends what only this plugin uses, such as the
    /// idle shims. Running tasks keep running.
    pub async fn close(&self) {
        let teardowns = async {
            if tokio::time::timeout(SHUTDOWN_TIMEOUT, self.0.context.wait_for_teardowns()).await.is_err() {
                tracing::warn!("teardowns of destroyed tasks are still in progress; the next plugin completes them");
            }
        };
        tokio::join!(self.finish_runtime_calls(), teardowns, self.0.context.pool.close());
        if let Some(primer) = &self.0.context.cgroup_primer {
            primer.stop();
        }
        tokio::task::block_in_place(|| {
            self.0.context.rootfs_pool.close();
            self.0.context.netns_pool.close();
        });
        self.0.context.log_writer_supervisor.end_if_idle();
        self.settings().places.remove_uppers_if_empty();
    }

    /// Returns the task, after its recovery if it is being recovered.
    ///
    /// # Errors
    /// When the task is unknown, or is being started.
    pub(super) async fn find(&self, id: &TaskId) -> Result<Arc<Task>, TaskError> {
        self.wait_for_recovery(id).await.ok_or_else(|| TaskError::NotFound(id.clone()))
    }

    /// Returns the task, after its recovery if it is being recovered; `None` when it is unknown or is being started.
    /// The wait takes as long as the task's shim needs to answer, and is bounded by the deadlines of those calls.
    pub(super) async fn wait_for_recovery(&self, id: &TaskId) -> Option<Arc<Task>> {
        loop {
            let mut done = match self.tasks().get(id)? {
                Slot::Task(task) => return Some(task.clone()),
                Slot::Recovering { done, .. } => done.clone(),
                Slot::Starting { .. } => return None,
            };
            while done.changed().await.is_ok() {}
            // The recovery has changed the map before it closed the channel, so the next pass sees its outcome.
            tokio::task::yield_now().await;
        }
    }

    pub(super) fn knows(&self, id: &TaskId) -> bool {
        self.tasks().contains_key(id)
    }

    pub(super) fn tasks(&self) -> MutexGuard<'_, HashMap<TaskId, Slot>> {
        self.0.tasks.lock()
    }

    pub(super) fn legacy(&self) -> MutexGuard<'_, HashMap<AllocTask, LegacyTask>> {
        self.0.legacy.lock()
    }

    pub(super) fn parked_fifos(&self) -> MutexGuard<'_, HashMap<AllocTask, ParkedFifos>> {
        self.0.parked_fifos.lock()
    }

    pub(super) fn left_alone(&self) -> MutexGuard<'_, Vec<(Record, ShimHold)>> {
        self.0.left_alone.lock()
    }

    pub(super) fn pending_teardowns(&self) -> MutexGuard<'_, HashMap<TaskId, PendingTeardown>> {
        self.0.context.pending_teardowns()
    }
}

/// A guard of the map's entry for a start. If the guard is dropped without [`Self::fill`], it removes the entry, since
/// the start has failed.
struct StartingSlot<'a> {
    engine: &'a Engine,
    id: &'a TaskId,
    _done: watch::Sender<()>,
}

impl StartingSlot<'_> {
    /// Puts the started task in the entry's place.
    fn fill(self, task: Arc<Task>) {
        self.engine.tasks().insert(self.id.clone(), Slot::Task(task));
    }
}

impl Drop for StartingSlot<'_> {
    fn drop(&mut self) {
        let mut tasks = self.engine.tasks();
        if matches!(tasks.get(self.id), Some(Slot::Starting { .. })) {
            tasks.remove(self.id);
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
