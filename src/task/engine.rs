//! All tasks of one plugin: who they are, what state they are in, and what can be asked of them.
//!
//! The map is locked only to look things up. What takes time happens outside of it, per task.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    fs::{self, File},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use nix::fcntl::{Flock, FlockArg};
use tokio::sync::watch;

use super::{
    EventHub, ExitRecord, Phases, Record, RecordState, Runtimes, Settings, StartRequest, TaskError, TaskHandle,
    load_records,
    record::millis,
    shared::Shared,
    signal, start,
    undo::{KILL_GRACE, RETRIES, ShimHandle, find_shim, undo_or_keep},
};
use crate::{
    cgroup::{CgroupPath, Cgroups},
    containerd,
    ids::TaskId,
    image::{ImageStore, Reference},
    shim::{self, Client, DeadTask, Kill, Launcher, Pool, ShimError},
};

/// A plugin that was told to leave is gone well within this.
const LOCK: Duration = Duration::from_secs(5);

/// Held by whoever starts or undoes an attempt of one allocation's task.
type Turn = Arc<tokio::sync::Mutex<()>>;

/// What an engine is.
struct Inner {
    shared: Arc<Shared>,
    tasks: Mutex<HashMap<TaskId, Slot>>,
    /// One at a time for each allocation and task: an attempt that is being made, or being undone.
    turns: Mutex<HashMap<(String, String), Turn>>,
    _lock: Flock<File>,
}

#[derive(Clone)]
enum Slot {
    /// StartTask is at work.
    Starting,
    Task(Arc<Task>),
}

/// A task that runs or has ended.
struct Task {
    record: Mutex<Record>,
    /// Taken by whoever destroys it.
    shim: tokio::sync::Mutex<Option<ShimHandle>>,
    client: Option<Client>,
    pid: u32,
    started_at: SystemTime,
    phases: Phases,
    exit: watch::Sender<Option<ExitRecord>>,
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
pub struct Engine(Arc<Inner>);

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("name", &self.0.shared.settings.name).finish_non_exhaustive()
    }
}

impl Engine {
    /// Makes the directories, takes the lock, reads the records, and undoes what an earlier instance left half done.
    ///
    /// # Errors
    /// When another plugin holds the lock, or the host can't be used at all.
    pub async fn open(settings: Settings, events: EventHub) -> Result<Self, TaskError> {
        // Beside the rest: nobody waits for it, unless a start comes that very moment.
        drop(tokio::task::spawn_blocking(Reference::prepare));
        let places = settings.places.clone();
        places.create()?;
        let lock = take_lock(&places).await?;
        let cgroups = Cgroups::detect()?;
        let group = cgroups.own_group()?;
        let runtimes = Runtimes::find(&settings, &places.bundles()).await;
        let containerd = &settings.containerd;
        let client = containerd::Client::new(&containerd.address, &containerd.namespace, &containerd.snapshotter);
        let images = ImageStore::open(&places, client).map_err(|error| super::SharedImageError(Arc::new(error)))?;
        let binary = super::runtime::which(&settings.shim.binary).unwrap_or_else(|| settings.shim.binary.clone());
        let launcher = Launcher::new(binary, containerd.namespace.clone(), places.clone(), group);
        let pool = Pool::new(Arc::new(launcher), settings.shim.pool);
        let records = load_records(&places.tasks())?;
        let shared =
            Arc::new(Shared { settings, cgroups, runtimes, images, pool, events, leftovers: Mutex::default() });
        let engine = Self(Arc::new(Inner { shared, tasks: Mutex::default(), turns: Mutex::default(), _lock: lock }));
        engine.sort_out(records);
        Ok(engine)
    }

    /// Half-made starts were never told to Nomad: they go. The others wait for `RecoverTask` or `DestroyTask`. Shims
    /// that no record names were idle ones. What takes time is done in the background, side by side: Nomad waits for
    /// `Init` without a deadline.
    fn sort_out(&self, records: Vec<Record>) {
        let places = &self.0.shared.settings.places;
        let named: HashSet<String> = records.iter().map(|record| record.shim.clone()).collect();
        match fs::read_dir(places.shims()) {
            Ok(strays) => strays
                .flatten()
                .filter(|stray| !named.contains(stray.file_name().to_string_lossy().as_ref()))
                .for_each(|stray| drop(tokio::spawn(async move { shim::end_stray(&stray.path()).await }))),
            Err(error) => tracing::warn!(%error, "list the shims of an earlier plugin"),
        }
        for record in records {
            let half_made = record.state == RecordState::Intended;
            let (id, engine) = (record.task_id.clone(), self.clone());
            let turn = self.turn(&record.alloc_id, &record.name);
            self.0.shared.keep(record);
            if half_made {
                tracing::warn!(task = %id, "an earlier plugin left a half-made start; undoing it");
                tokio::spawn(async move {
                    let _turn = turn.lock().await;
                    if let Some(outcome) = engine.destroy_leftover(&id).await
                        && let Err(error) = outcome
                    {
                        tracing::error!(task = %id, error = %crate::chain(&error), "remains of an earlier plugin stay");
                    }
                });
            }
        }
    }

    /// Who starts or undoes an attempt of this allocation's task holds this meanwhile.
    fn turn(&self, alloc_id: &str, name: &str) -> Turn {
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
        super::runtime::which(self.0.shared.pool.launcher().binary()).is_some()
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
        let id = request.task_id.clone();
        match self.tasks().entry(id.clone()) {
            Entry::Vacant(free) if !id.0.is_empty() => drop(free.insert(Slot::Starting)),
            _ => return Err(TaskError::AlreadyStarted(id.0)),
        }
        let slot = Reserved { engine: self, id: &id };
        // An agent that died may have left its own call at work; that attempt is finished first, and then replaced.
        let turn = self.turn(&request.alloc_id, &request.name);
        let _turn = turn.lock().await;
        self.clear_predecessors(&request).await?;
        let began = start::start(&self.0.shared, &request).await;
        self.0.shared.pool.refill();
        let running = began?;
        let handle = TaskHandle { container_id: running.record.container_id.clone() };
        let phases = running.phases;
        tracing::info!(
            task = %id, image = running.record.image, runtime = running.record.runtime, pid = running.pid,
            pooled = phases.pooled, total_us = micros(phases.total), image_us = micros(phases.image),
            shim_us = micros(phases.shim), bundle_us = micros(phases.bundle), create_us = micros(phases.create),
            start_us = micros(phases.start), "started"
        );
        let client = running.shim.any_client().cloned();
        let task = Arc::new(Task {
            record: Mutex::new(running.record),
            shim: tokio::sync::Mutex::new(Some(running.shim)),
            client,
            pid: running.pid,
            started_at: running.started_at,
            phases,
            exit: watch::Sender::new(None),
        });
        slot.fill(task.clone());
        tokio::spawn(watch_exit(self.0.shared.clone(), task));
        Ok(handle)
    }

    /// A new attempt of an allocation's task means that whatever is left of the old one is not wanted: Nomad gave up on
    /// it, or died before it knew of it.
    async fn clear_predecessors(&self, request: &StartRequest) -> Result<(), TaskError> {
        let same = |record: &Record| record.alloc_id == request.alloc_id && record.name == request.name;
        let leftovers: Vec<TaskId> =
            self.leftovers().values().filter(|record| same(record)).map(|record| record.task_id.clone()).collect();
        for old in leftovers {
            tracing::warn!(task = %old, new = %request.task_id, "replaces a task of an earlier plugin");
            self.destroy_leftover(&old).await.unwrap_or(Ok(()))?;
        }
        if request.alloc_id.is_empty() {
            return Ok(());
        }
        let olds: Vec<TaskId> = self
            .tasks()
            .values()
            .filter_map(|slot| match slot {
                Slot::Task(task) => Some(task.record()),
                Slot::Starting => None,
            })
            .filter(same)
            .map(|record| record.intent.task_id)
            .collect();
        for old in olds {
            tracing::warn!(task = %old, new = %request.task_id, "replaces an attempt that was never destroyed");
            match self.destroy(&old, Force::Yes).await {
                // Somebody else, most likely the old agent's own call, was faster.
                Ok(()) | Err(TaskError::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes over a task of an earlier instance of us.
    ///
    /// # Errors
    /// When it is unknown, or nothing can be told of how it ended.
    pub async fn recover(&self, id: &TaskId) -> Result<(), TaskError> {
        if self.tasks().contains_key(id) {
            return Ok(());
        }
        let unrecoverable = |problem: &str| TaskError::Unrecoverable { id: id.clone(), problem: problem.to_owned() };
        let record = self.leftovers().get(id).cloned().ok_or_else(|| unrecoverable("no record of it on this host"))?;
        let shim = find_shim(&self.0.shared, &record).await;
        let (pid, started_at, exit) = match &record.state {
            RecordState::Exited(exit) => (0, exit.started_at, Some(exit.clone())),
            RecordState::Running { pid, started_at } | RecordState::Stopping { pid, started_at, .. } => {
                if shim.client().is_none() {
                    return Err(unrecoverable("its shim is gone; how it ended is not known"));
                }
                (*pid, *started_at, None)
            }
            RecordState::Intended => return Err(unrecoverable("it was never started")),
        };
        let client = shim.client().cloned();
        let watched = exit.is_none();
        let task = Arc::new(Task {
            record: Mutex::new(record),
            shim: tokio::sync::Mutex::new(Some(shim)),
            client,
            pid,
            started_at: SystemTime::UNIX_EPOCH + Duration::from_millis(started_at),
            phases: Phases::default(),
            exit: watch::Sender::new(exit),
        });
        self.leftovers().remove(id);
        self.tasks().insert(id.clone(), Slot::Task(task.clone()));
        if watched {
            tokio::spawn(watch_exit(self.0.shared.clone(), task));
        }
        tracing::info!(task = %id, pid, "recovered");
        Ok(())
    }

    /// Waits until the task has ended: how. Any number may wait, before and after the end.
    ///
    /// # Errors
    /// When it is unknown.
    pub async fn wait(&self, id: &TaskId) -> Result<ExitRecord, TaskError> {
        let task = self.find(id)?;
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
        let Ok(task) = self.find(id) else {
            tracing::debug!(task = %id, "stop of a task that is not here");
            return Ok(());
        };
        if task.exit.borrow().is_some() {
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
        task.mark_stopping(&self.0.shared, timeout);
        let mut exit = task.exit.subscribe();
        let Some(client) = &task.client else { return Err(TaskError::NotFound(id.clone())) };
        let name = record.container_id.as_str();
        if !timeout.is_zero() {
            if let Err(error) = client.kill(name, number, Kill::Init).await {
                tracing::warn!(task = %id, %error, "the stop signal could not be sent");
            }
            if tokio::time::timeout(timeout, exit.wait_for(Option::is_some)).await.is_ok() {
                return Ok(());
            }
        }
        task.end_by_force(id, client).await
    }

    /// Sends a signal to the task's first process.
    ///
    /// # Errors
    /// When the signal's name is unknown, or the task is or has ended.
    pub async fn signal(&self, id: &TaskId, name: &str) -> Result<(), TaskError> {
        let number = signal::parse(name)?;
        let task = self.find(id)?;
        let ended = task.exit.borrow().is_some();
        let Some(client) = task.client.as_ref().filter(|_| !ended) else { return Err(TaskError::NotFound(id.clone())) };
        let container = task.record().intent.container_id;
        client
            .kill(container.as_str(), number, Kill::Init)
            .await
            .map_err(|source| TaskError::Shim { doing: "send the signal", source })
    }

    /// Removes a task and all it left. A running one must be forced.
    ///
    /// # Errors
    /// When it is unknown, or runs and is not forced, or something of it can't be removed. The latter is tried again in
    /// the background: Nomad never asks twice.
    pub async fn destroy(&self, id: &TaskId, force: Force) -> Result<(), TaskError> {
        let outcome = self.destroy_once(id, force).await;
        // Killed in vain, and so still in the map; everything else is kept as a leftover and tried again from there.
        if force == Force::Yes && outcome.is_err() && self.find(id).is_ok() {
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
        let task = match self.find(id) {
            Ok(task) => task,
            Err(unknown) => return self.destroy_leftover(id).await.unwrap_or(Err(unknown)),
        };
        if force == Force::No && task.exit.borrow().is_none() {
            return Err(TaskError::StillRunning(id.clone()));
        }
        // Whoever comes second waits here, and then finds nothing to do.
        let mut shim = task.shim.lock().await;
        if task.exit.borrow().is_none()
            && let Some(client) = &task.client
        {
            // Waiters get their answer before the task is forgotten.
            task.end_by_force(id, client).await?;
        }
        let Some(shim) = shim.take() else { return Err(TaskError::NotFound(id.clone())) };
        let outcome = undo_or_keep(&self.0.shared, &task.record(), shim).await;
        self.tasks().remove(id);
        outcome
    }

    async fn destroy_leftover(&self, id: &TaskId) -> Option<Result<(), TaskError>> {
        let record = self.0.shared.take_leftover(id)?;
        let shim = find_shim(&self.0.shared, &record).await;
        Some(undo_or_keep(&self.0.shared, &record, shim).await)
    }

    /// What is known of a task.
    ///
    /// # Errors
    /// When it is unknown.
    pub fn inspect(&self, id: &TaskId) -> Result<Inspection, TaskError> {
        let task = self.find(id)?;
        let record = task.record();
        let exit = task.exit.borrow().clone();
        Ok(Inspection {
            name: record.name.clone(),
            started_at: task.started_at,
            exit,
            record,
            pid: task.pid,
            phases: task.phases,
        })
    }

    /// Ends what only we use: the idle shims. Tasks go on.
    pub fn close(&self) {
        self.0.shared.pool.close();
    }

    fn find(&self, id: &TaskId) -> Result<Arc<Task>, TaskError> {
        match self.tasks().get(id) {
            Some(Slot::Task(task)) => Ok(task.clone()),
            Some(Slot::Starting) | None => Err(TaskError::NotFound(id.clone())),
        }
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<TaskId, Slot>> {
        self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leftovers(&self) -> MutexGuard<'_, HashMap<TaskId, Record>> {
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

/// A task id that is being started; freed when the start fails.
struct Reserved<'a> {
    engine: &'a Engine,
    id: &'a TaskId,
}

impl Reserved<'_> {
    fn fill(self, task: Arc<Task>) {
        self.engine.tasks().insert(self.id.clone(), Slot::Task(task));
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let mut tasks = self.engine.tasks();
        if matches!(tasks.get(self.id), Some(Slot::Starting)) {
            tasks.remove(self.id);
        }
    }
}

impl Task {
    fn record(&self) -> Record {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_state(&self, shared: &Shared, state: RecordState) {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        // How it ended is the last word, whoever comes later.
        if matches!(record.state, RecordState::Exited(_)) {
            return;
        }
        record.state = state;
        if let Err(error) = record.save(&shared.settings.places.record(&record.container_id)) {
            tracing::error!(task = %record.task_id, error = %crate::chain(&error), "its record is out of date");
        }
    }

    fn mark_stopping(&self, shared: &Shared, timeout: Duration) {
        let deadline = millis(SystemTime::now() + timeout);
        self.set_state(shared, RecordState::Stopping { pid: self.pid, started_at: millis(self.started_at), deadline });
    }

    async fn end_by_force(&self, id: &TaskId, client: &Client) -> Result<(), TaskError> {
        let container = self.record().intent.container_id;
        match client.kill(container.as_str(), libc::SIGKILL, Kill::All).await {
            // A dead shim is the watcher's business: it ends the container and tells.
            Ok(()) | Err(ShimError::Gone { .. }) => {}
            Err(source) => return Err(TaskError::Shim { doing: "kill the container", source }),
        }
        let mut exit = self.exit.subscribe();
        match tokio::time::timeout(KILL_GRACE, exit.wait_for(Option::is_some)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(TaskError::Unkillable { id: id.clone(), after: KILL_GRACE }),
        }
    }
}

/// Waits for a task's end, notes it on disk, and tells all who wait.
async fn watch_exit(shared: Arc<Shared>, task: Arc<Task>) {
    let record = task.record();
    let id = record.container_id.as_str();
    let outcome = match &task.client {
        Some(client) => client.wait(id).await,
        None => Err(ShimError::Gone { call: "Wait", detail: "no connection".to_owned() }),
    };
    // Before the cgroup goes: it is all that remembers.
    let oom_killed = shared.cgroups.oom_kills(&CgroupPath::recorded(&record.cgroup)).is_some_and(|count| count > 0);
    let (code, error) = match outcome {
        Ok(exit) => (i32::try_from(exit.code).unwrap_or(255), None),
        Err(error) => {
            // Nobody watches the container any more, and its output is cut: it must not run on.
            let bundle = shared.settings.places.bundle(&record.container_id);
            if let Err(left) = shim::delete_dead(shared.pool.launcher(), DeadTask { id, bundle: &bundle }).await {
                tracing::error!(task = %record.task_id, error = %crate::chain(&left), "after its shim's death");
            }
            (128 + libc::SIGKILL, Some(format!("the task's shim died, and the task was killed ({error})")))
        }
    };
    let exit =
        ExitRecord { code, oom_killed, error, started_at: millis(task.started_at), at: millis(SystemTime::now()) };
    tracing::info!(task = %record.task_id, code, oom_killed, error = exit.error, "exited");
    task.set_state(&shared, RecordState::Exited(exit.clone()));
    task.exit.send_replace(Some(exit));
}

async fn take_lock(places: &crate::places::Places) -> Result<Flock<File>, TaskError> {
    let path = places.lock();
    let failed = |source| TaskError::Lock { path: places.lock(), source };
    let deadline = tokio::time::Instant::now() + LOCK;
    loop {
        let file = File::options().create(true).append(true).open(&path).map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, nix::Error::EWOULDBLOCK)) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err((_, nix::Error::EWOULDBLOCK)) => return Err(TaskError::Held(path)),
            Err((_, errno)) => return Err(failed(errno.into())),
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
