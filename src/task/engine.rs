//! All tasks of one plugin: who they are, what state they are in, and what can be asked of them.
//!
//! The map is locked only to look things up. What takes time happens outside of it, per task.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::File,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::{Duration, Instant, SystemTime},
};

use nix::fcntl::Flock;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::{
    ExecRequest, ExitRecord, FormerTask, Phases, Record, RecordState, Runtimes, Session, Settings, StartRequest,
    TaskError, TaskEvent, TaskHandle, exec,
    live::{Parts, Task, watch_exit},
    metrics::Gauges,
    shared::{Hands, Leftover, Shared},
    signal, start,
    undo::{RETRIES, find_shim, undo_or_keep, undo_soon},
};
use crate::{
    fault,
    ids::TaskId,
    logs::Hold,
    shim::{Found, Held, Kill, stdio::HeldOpen},
};

/// Nomad kills a plugin 2 s after it has asked it to leave (go-plugin, `client.go`, `Kill`).
const LAST_CALLS: Duration = Duration::from_millis(1500);

/// Held by whoever starts or undoes an attempt of one allocation's task.
type Turn = Arc<tokio::sync::Mutex<()>>;

/// An allocation and the name of a task in it.
pub(super) type Owner = (String, String);

/// For how long an agent has been connected without a break; zero when none is.
type Attended = Box<dyn Fn() -> Duration + Send + Sync>;

/// What an engine is.
pub(super) struct Inner {
    pub(super) shared: Arc<Shared>,
    pub(super) tasks: Mutex<HashMap<TaskId, Slot>>,
    /// One at a time for each allocation and task: an attempt that is being made, or being undone.
    pub(super) turns: Mutex<HashMap<Owner, Turn>>,
    /// Log FIFOs of starts that an earlier instance left half made, until Nomad asks for them again.
    pub(super) held: Mutex<HashMap<Owner, HeldOpen>>,
    /// Tasks of the old driver whose containers could not be ended yet.
    pub(super) former: Mutex<HashMap<Owner, FormerTask>>,
    /// Permits for tasks that are being recovered.
    pub(super) recoveries: Semaphore,
    pub(super) opened: Instant,
    pub(super) attended: OnceLock<Attended>,
    /// Tasks that this engine has nothing to do with, although their records lie where its own do. Their shims are held, so
    /// that none is ended with another task of the same shim.
    pub(super) left_alone: Mutex<Vec<(Record, Held)>>,
    pub(super) _lock: Flock<File>,
}

#[derive(Clone)]
pub(super) enum Slot {
    /// StartTask is at work; the channel closes when it is done.
    Starting {
        stop: CancellationToken,
        done: watch::Receiver<()>,
    },
    /// Its shim is being connected to; the channel closes when that is done.
    Recovering {
        record: Box<Record>,
        done: watch::Receiver<()>,
    },
    Task(Arc<Task>),
}

impl Slot {
    /// Its record; a start at work has none yet.
    pub(super) fn record(&self) -> Option<Record> {
        match self {
            Self::Task(task) => Some(task.record()),
            Self::Recovering { record, .. } => Some((**record).clone()),
            Self::Starting { .. } => None,
        }
    }
}

/// What `InspectTask` tells.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// The task's name.
    pub name: String,
    /// When its process was started.
    pub started_at: SystemTime,
    /// How it ended, if it has.
    pub exit: Option<ExitRecord>,
    /// Where it is.
    pub record: Record,
    /// Its process on the host.
    pub pid: u32,
    /// How long the start's parts took.
    pub phases: Phases,
}

/// The engine. Cheap to clone.
#[derive(Clone)]
pub struct Engine(pub(super) Arc<Inner>);

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("name", &self.0.shared.settings.name).finish_non_exhaustive()
    }
}

impl Engine {
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
    }

    pub(super) fn downgrade(&self) -> Weak<Inner> {
        Arc::downgrade(&self.0)
    }

    /// Says how to find out for how long an agent has been connected. Until then no agent is taken to be.
    pub fn watch_attendance(&self, attended: impl Fn() -> Duration + Send + Sync + 'static) {
        let _ = self.0.attended.set(Box::new(attended));
    }

    /// For how long an agent has been connected without a break.
    pub(super) fn attended_for(&self) -> Duration {
        self.0.attended.get().map_or(Duration::ZERO, |attended| attended())
    }

    /// How long it has been open.
    pub(super) fn age(&self) -> Duration {
        self.0.opened.elapsed()
    }

    /// All tasks that run or have ended.
    pub(super) fn live(&self) -> Vec<(TaskId, Arc<Task>)> {
        let tasks = self.tasks();
        let live = tasks.iter().filter_map(|(id, slot)| match slot {
            Slot::Task(task) => Some((id.clone(), task.clone())),
            Slot::Starting { .. } | Slot::Recovering { .. } => None,
        });
        live.collect()
    }

    /// Task events from now on.
    pub fn listen(&self) -> tokio::sync::broadcast::Receiver<TaskEvent> {
        self.0.shared.events.listen()
    }

    /// Who starts or undoes an attempt of this allocation's task holds this meanwhile.
    pub(super) fn turn(&self, alloc_id: &str, name: &str) -> Turn {
        let mut turns = self.0.turns.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody holds or waits for any more.
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        turns.entry((alloc_id.to_owned(), name.to_owned())).or_default().clone()
    }

    /// The settings it was opened with.
    pub fn settings(&self) -> &Settings {
        &self.0.shared.settings
    }

    /// The runtimes of this host.
    pub fn runtimes(&self) -> &Runtimes {
        &self.0.shared.runtimes
    }

    /// Is the shim's program there?
    pub fn shim_is_installed(&self) -> bool {
        crate::process::which(self.0.shared.pool.launcher().binary()).is_some()
    }

    /// Starts shims ahead.
    pub fn warm_up(&self) {
        self.0.shared.pool.refill();
    }

    /// Starts a task; it runs when this returns. A predecessor of the same allocation and name goes first.
    ///
    /// # Errors
    /// When it can't be started; nothing is left of it then.
    pub async fn start(&self, request: StartRequest) -> Result<TaskHandle, TaskError> {
        let outcome = Box::pin(self.start_uncounted(request)).await;
        if let Err(error) = &outcome {
            self.0.shared.metrics.failed(error);
        }
        outcome
    }

    async fn start_uncounted(&self, request: StartRequest) -> Result<TaskHandle, TaskError> {
        let id = request.task_id.clone();
        if let Some(handle) = self.started_before(&request).await {
            return Ok(handle);
        }
        let held = self.held().remove(&(request.alloc_id.clone(), request.name.clone()));
        let (stop, (tell, done)) = (CancellationToken::new(), watch::channel(()));
        match self.tasks().entry(id.clone()) {
            Entry::Vacant(free) => {
                free.insert(Slot::Starting { stop: stop.clone(), done });
            }
            Entry::Occupied(_) => return Err(TaskError::AlreadyStarted(id.0)),
        }
        let slot = Reserved { engine: self, id: &id, _done: tell };
        // An agent that died may have left its own call at work; that attempt is finished first, and then replaced.
        let mut turn = Box::pin(self.turn(&request.alloc_id, &request.name).lock_owned());
        let _turn = tokio::select! {
            turn = &mut turn => turn,
            () = stop.cancelled() => {
                self.clear_predecessors_later(turn, request);
                return Err(TaskError::Stopped(id.clone()));
            }
        };
        self.clear_former(&request.alloc_id, &request.name).await?;
        let _held = (held, self.clear_predecessors(&request, &stop).await?);
        let began = start::start(&self.0.shared, &request, &stop).await;
        self.0.shared.pool.refill();
        let start::Running { record, shim, run, phases, image, stdio, sources } = began?;
        self.0.shared.after_start(&record, image.clone(), sources);
        self.0.shared.metrics.started(&phases);
        tracing::info!(
            task = %id, image = record.image, runtime = record.runtime, pid = run.process.pid,
            pooled = phases.pooled, total_us = micros(phases.total), image_us = micros(phases.image),
            shim_us = micros(phases.shim), bundle_us = micros(phases.bundle), create_us = micros(phases.create),
            released_us = phases.released.map(micros), start_us = phases.start.map(micros), "started"
        );
        self.0.shared.events.tell_host(&record, format!("Started, process {}", run.process.pid));
        let (shim, image) = (Found::Alive(shim), Some(image));
        let log = Hold::new(&self.settings().places.log(&record.container_id));
        let task = Task::new(Parts { record, shim, run, phases, exit: None, lost: None, claimed: true, image, log });
        let handle = task.handle();
        slot.fill(task.clone());
        let mut exit = task.exit.subscribe();
        tokio::spawn(stdio.outlast(async move { drop(exit.wait_for(Option::is_some).await) }));
        tokio::spawn(watch_exit(self.0.shared.clone(), task));
        if stop.is_cancelled() {
            self.destroy(&id, Force::Yes).await?;
            return Err(TaskError::Stopped(id));
        }
        fault::point("start.answer");
        Ok(handle)
    }

    /// Waits until the task has ended: how. Any number may wait, before and after the end.
    ///
    /// # Errors
    /// When it is unknown.
    pub async fn wait(&self, id: &TaskId) -> Result<ExitRecord, TaskError> {
        let task = self.find(id).await?;
        let mut exit = task.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await.map(|exit| exit.clone());
        ended.ok().flatten().ok_or_else(|| TaskError::NotFound(id.clone()))
    }

    /// Stops a task: `signal`, else what the image says, else SIGTERM; after `timeout` SIGKILL to all of it. Returns
    /// when it has ended. One that has ended already, or is unknown, is fine: Nomad would retry an error for minutes.
    ///
    /// # Errors
    /// When it survives SIGKILL.
    pub async fn stop(&self, id: &TaskId, timeout: Duration, wanted: &str) -> Result<(), TaskError> {
        self.stop_starting(id).await;
        let Ok(task) = self.find(id).await else {
            tracing::debug!(task = %id, "stop of a task that is not here");
            return Ok(());
        };
        if task.has_ended() {
            return Ok(());
        }
        let record = task.record();
        let number = match wanted {
            "" => record.stop_signal,
            name => signal::parse(name).unwrap_or_else(|error| {
                tracing::warn!(task = %id, %error, "kill_signal; using the image's");
                record.stop_signal
            }),
        };
        fault::point("stop.begun");
        task.mark_stopping(&self.0.shared, timeout);
        fault::point("stop.marked");
        let mut exit = task.exit.subscribe();
        let Some(client) = &task.client else { return Err(TaskError::NotFound(id.clone())) };
        let name = record.container_id.as_str();
        if !timeout.is_zero() {
            let politely = async {
                if let Err(error) = client.kill(name, number, Kill::Init).await {
                    tracing::warn!(task = %id, %error, "the stop signal could not be sent");
                }
                fault::point("stop.signalled");
                exit.wait_for(Option::is_some).await.is_ok()
            };
            // The time counts from the question: a shim that hangs is no reason to take longer.
            if tokio::time::timeout(timeout, politely).await.is_ok() {
                return Ok(());
            }
        }
        let ended = task.end_by_force(&self.0.shared, id, client).await;
        fault::point("stop.killed");
        ended
    }

    /// Gives up a start that is still at work, on a slow pull or with a runtime that hangs: true when there was one.
    async fn stop_starting(&self, id: &TaskId) -> bool {
        let starting = match self.tasks().get(id) {
            Some(Slot::Starting { stop, done }) => Some((stop.clone(), done.clone())),
            _ => None,
        };
        let Some((stop, mut done)) = starting else { return false };
        tracing::info!(task = %id, "the task is stopped while it is being started");
        stop.cancel();
        while done.changed().await.is_ok() {}
        true
    }

    /// Sends a signal to the task's first process.
    ///
    /// # Errors
    /// When the signal's name is unknown, or the task is or has ended.
    pub async fn signal(&self, id: &TaskId, name: &str) -> Result<(), TaskError> {
        let number = signal::parse(name)?;
        let task = self.find(id).await?;
        let Some(client) = task.client.as_ref().filter(|_| !task.has_ended()) else {
            return Err(TaskError::NotFound(id.clone()));
        };
        let container = task.record().intent.container_id;
        client
            .kill(container.as_str(), number, Kill::Init)
            .await
            .map_err(|source| TaskError::Shim { doing: "send the signal", source })
    }

    /// Runs a further process in a task.
    ///
    /// # Errors
    /// When the task is unknown or has ended, or the process can't be started.
    pub async fn exec(&self, id: &TaskId, request: &ExecRequest) -> Result<Session, TaskError> {
        let task = self.find(id).await?;
        let ended = || TaskError::Ended(id.clone());
        let client = task.client.as_ref().filter(|_| !task.has_ended()).ok_or_else(ended)?;
        let (client, record, request) = (client.clone(), task.record(), request.clone());
        let places = self.0.shared.settings.places.clone();
        // To its end, whatever becomes of the caller: a session that nobody takes is dropped, and that kills it.
        let started = tokio::spawn(async move { exec::start(&client, &places, &record, &request).await }).await?;
        started.map_err(|error| {
            // It may have ended while we asked.
            if task.has_ended() { ended() } else { error.into() }
        })
    }

    /// Removes a task and all it left. A running one must be forced.
    ///
    /// # Errors
    /// When it is unknown, or runs and is not forced, or something of it can't be removed. The latter is tried again in
    /// the background: Nomad never asks twice.
    pub async fn destroy(&self, id: &TaskId, force: Force) -> Result<(), TaskError> {
        let interrupted = force == Force::Yes && self.stop_starting(id).await;
        let outcome = match self.destroy_once(id, force).await {
            // The start that was given up has left nothing.
            Err(TaskError::NotFound(_)) if interrupted => return Ok(()),
            outcome => outcome,
        };
        // Killed in vain, and so still in the map; everything else is kept as a leftover and tried again from there.
        if force == Force::Yes && outcome.is_err() && self.find(id).await.is_ok() {
            let (engine, id) = (self.clone(), id.clone());
            tokio::spawn(async move {
                for pause in RETRIES {
                    tokio::time::sleep(pause).await;
                    match engine.destroy_once(&id, Force::Yes).await {
                        Ok(()) | Err(TaskError::NotFound(_)) => return,
                        Err(error) => tracing::warn!(task = %id, error = %crate::chain(&error), "destroy, once more"),
                    }
                }
            });
        }
        outcome
    }

    async fn destroy_once(&self, id: &TaskId, force: Force) -> Result<(), TaskError> {
        let task = match self.find(id).await {
            Ok(task) => task,
            // Somebody may be at it: the answer is theirs.
            Err(_) if matches!(self.0.shared.hands_on(id), Some(Hands::Free | Hands::Taken)) => {
                return self.outlast_leftover(id, &CancellationToken::new()).await;
            }
            Err(unknown) => return Err(unknown),
        };
        if force == Force::No && !task.has_ended() {
            return Err(TaskError::StillRunning(id.clone()));
        }
        // Nomad never asks twice: from here on the next instance of us would go on with it.
        task.set_state(&self.0.shared, RecordState::Destroying);
        fault::point("destroy.marked");
        // Whoever comes second waits here, and then finds nothing to do.
        let mut shim = task.shim.lock().await;
        if shim.is_some()
            && !task.has_ended()
            && let Some(client) = &task.client
        {
            // Waiters get their answer before the task is forgotten.
            task.end_by_force(&self.0.shared, id, client).await?;
            fault::point("destroy.killed");
        }
        let Some(shim) = shim.take() else { return Err(TaskError::NotFound(id.clone())) };
        // Whatever becomes of the undoing: from here on the task is among what is to be undone.
        let _forgotten = Forgotten { engine: self, id };
        undo_soon(&self.0.shared, &task.record(), shim).await
    }

    pub(super) async fn destroy_leftover(&self, id: &TaskId) -> Option<Result<(), TaskError>> {
        let claim = self.0.shared.take_leftover(id)?;
        let shim = find_shim(&self.0.shared, claim.record()).await;
        Some(undo_or_keep(claim, shim).await)
    }

    /// What is known of a task.
    ///
    /// # Errors
    /// When it is unknown.
    pub async fn inspect(&self, id: &TaskId) -> Result<Inspection, TaskError> {
        let task = self.find(id).await?;
        let record = task.record();
        let exit = task.exit.borrow().clone();
        Ok(Inspection {
            name: record.name.clone(),
            started_at: task.started_at(),
            exit,
            record,
            pid: task.run.process.pid,
            phases: task.phases,
        })
    }

    /// Numbers about the driver, in Prometheus' text format.
    pub fn metrics(&self) -> String {
        let mut gauges = Gauges {
            leftovers: self.leftovers().len(),
            idle_shims: self.0.shared.pool.idle_ids().len(),
            images: self.0.shared.images.records().len(),
            ..Gauges::default()
        };
        for slot in self.tasks().values() {
            match slot {
                Slot::Starting { .. } => gauges.starting += 1,
                Slot::Task(task) if task.has_ended() => gauges.exited += 1,
                Slot::Task(_) | Slot::Recovering { .. } => gauges.running += 1,
            }
        }
        self.0.shared.metrics.render(gauges)
    }

    /// Lets the calls to runtimes that are at work end, and makes none afterwards. What takes too long is cut off, and the
    /// next plugin completes it.
    pub async fn finish_calls(&self) {
        if !self.0.shared.pool.launcher().calls().finish(LAST_CALLS).await {
            tracing::warn!(
                limit_ms = LAST_CALLS.as_millis(),
                "a call to a runtime has not ended while the plugin leaves; the next plugin completes it"
            );
        }
    }

    /// Ends what only we use: the idle shims, once tasks that are gone are cleared away. Other tasks go on.
    pub async fn close(&self) {
        let teardowns = async {
            if tokio::time::timeout(LAST_CALLS, self.0.shared.all_cleared()).await.is_err() {
                tracing::warn!("tasks that are gone are not all cleared away; the next plugin goes on with that");
            }
        };
        tokio::join!(self.finish_calls(), teardowns, self.0.shared.pool.close());
        if let Some(warmer) = &self.0.shared.warmer {
            warmer.end();
        }
        tokio::task::block_in_place(|| self.0.shared.ahead.close());
        self.0.shared.log_keeper.end_idle();
        self.settings().places.leave_uppers();
    }

    pub(super) async fn find(&self, id: &TaskId) -> Result<Arc<Task>, TaskError> {
        self.settled(id).await.ok_or_else(|| TaskError::NotFound(id.clone()))
    }

    /// The task, once it is known how it is; that takes as long as its shim needs to answer, and has a deadline.
    pub(super) async fn settled(&self, id: &TaskId) -> Option<Arc<Task>> {
        loop {
            let mut done = match self.tasks().get(id)? {
                Slot::Task(task) => return Some(task.clone()),
                Slot::Recovering { done, .. } => done.clone(),
                Slot::Starting { .. } => return None,
            };
            while done.changed().await.is_ok() {}
            // Whoever closes it has put something else into the map before.
            tokio::task::yield_now().await;
        }
    }

    pub(super) fn knows(&self, id: &TaskId) -> bool {
        self.tasks().contains_key(id)
    }

    pub(super) fn tasks(&self) -> MutexGuard<'_, HashMap<TaskId, Slot>> {
        self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn former(&self) -> MutexGuard<'_, HashMap<Owner, FormerTask>> {
        self.0.former.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn held(&self) -> MutexGuard<'_, HashMap<Owner, HeldOpen>> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn left_alone(&self) -> MutexGuard<'_, Vec<(Record, Held)>> {
        self.0.left_alone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn leftovers(&self) -> MutexGuard<'_, HashMap<TaskId, Leftover>> {
        self.0.shared.leftovers()
    }
}

/// `DestroyTask`'s flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Force {
    /// Kill it first.
    Yes,
    /// Refuse when it runs.
    No,
}

/// Takes a task out of the map when it is dropped.
struct Forgotten<'a> {
    engine: &'a Engine,
    id: &'a TaskId,
}

impl Drop for Forgotten<'_> {
    fn drop(&mut self) {
        self.engine.tasks().remove(self.id);
    }
}

/// A task id that is being started; freed when the start fails.
struct Reserved<'a> {
    engine: &'a Engine,
    id: &'a TaskId,
    _done: watch::Sender<()>,
}

impl Reserved<'_> {
    fn fill(self, task: Arc<Task>) {
        self.engine.tasks().insert(self.id.clone(), Slot::Task(task));
    }
}

impl Drop for Reserved<'_> {
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
