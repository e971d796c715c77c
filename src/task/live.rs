//! One task that runs or has ended: its record, its shim, and the watch over its end.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::sync::watch;

use super::{
    ExitRecord, Phases, Record, RecordState, TaskError, TaskHandle,
    claim::caught,
    record::{RunRecord, millis},
    shared::Shared,
    undo::KILL_GRACE,
};
use crate::{
    cgroup::CgroupPath,
    fault,
    ids::TaskId,
    image::ImageRecord,
    logs::Hold,
    process::PidFd,
    shim::{self, Client, Exit, Found, Kill, ShimError},
};

/// A kill takes 5 ms; a shim that has not done it by now hangs.
const HUNG: Duration = Duration::from_secs(5);
/// Between two questions to a shim that has answered nonsense.
const AGAIN: Duration = Duration::from_millis(200);

/// A task that runs or has ended.
pub struct Task {
    record: Mutex<Record>,
    /// Held by whoever writes a state that could not be written at once.
    pub(super) saving: Arc<tokio::sync::Mutex<()>>,
    /// Taken by whoever destroys it.
    pub(super) shim: tokio::sync::Mutex<Option<Found>>,
    /// Works as long as the shim lives. None for a task that had ended when it was found.
    pub(super) client: Option<Client>,
    pub(super) run: RunRecord,
    pub(super) phases: Phases,
    pub(super) exit: watch::Sender<Option<ExitRecord>>,
    /// Has Nomad named it to this very process?
    claimed: AtomicBool,
    /// Why nothing can be told of how it ended, when nothing can.
    pub(super) lost: Option<String>,
    /// Held, so that nobody collects it.
    _image: Option<Arc<ImageRecord>>,
    /// Held, so that what it has written outlives the log writer.
    _log: Hold,
}

/// What a `Task` is made of.
pub struct Parts {
    pub(super) record: Record,
    pub(super) shim: Found,
    pub(super) run: RunRecord,
    pub(super) phases: Phases,
    pub(super) exit: Option<ExitRecord>,
    pub(super) lost: Option<String>,
    pub(super) claimed: bool,
    pub(super) image: Option<Arc<ImageRecord>>,
    pub(super) log: Hold,
}

impl Task {
    pub(super) fn new(parts: Parts) -> Arc<Self> {
        let Parts { record, shim, run, phases, exit, lost, claimed, image, log } = parts;
        let client = match &shim {
            Found::Alive(shim) if exit.is_none() => Some(shim.client().clone()),
            _ => None,
        };
        Arc::new(Self {
            record: Mutex::new(record),
            saving: Arc::default(),
            shim: tokio::sync::Mutex::new(Some(shim)),
            client,
            run,
            phases,
            exit: watch::Sender::new(exit),
            claimed: AtomicBool::new(claimed),
            lost,
            _image: image,
            _log: log,
        })
    }

    pub(super) fn record(&self) -> Record {
        self.lock_record().clone()
    }

    pub(super) fn lock_record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn handle(&self) -> TaskHandle {
        TaskHandle { record: self.record() }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Nomad has named it: true when it does so for the first time.
    pub(super) fn claim(&self) -> bool {
        !self.claimed.swap(true, Ordering::SeqCst)
    }

    pub(super) fn is_claimed(&self) -> bool {
        self.claimed.load(Ordering::SeqCst)
    }

    pub(super) fn started_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.run.started_at)
    }

    pub(super) fn set_state(self: &Arc<Self>, shared: &Arc<Shared>, state: RecordState) {
        let mut record = self.lock_record();
        // How it ended is the last word but one, whoever comes later; that nobody wants it any more is the last.
        match (&record.state, &state) {
            (RecordState::Destroying, _) => return,
            (RecordState::Exited(_), next) if *next != RecordState::Destroying => return,
            _ => record.state = state,
        }
        self.save_locked(shared, &record);
    }

    pub(super) fn mark_stopping(self: &Arc<Self>, shared: &Arc<Shared>, timeout: Duration) {
        let deadline = millis(SystemTime::now() + timeout);
        self.set_state(shared, RecordState::Stopping { run: self.run, deadline });
    }

    pub(super) async fn end_by_force(&self, shared: &Shared, id: &TaskId, client: &Client) -> Result<(), TaskError> {
        let container = self.record().intent.container_id;
        let mut exit = self.exit.subscribe();
        let asked = client.kill(container.as_str(), libc::SIGKILL, Kill::All);
        match tokio::time::timeout(HUNG, asked).await {
            // A dead shim is the watcher's business: it ends the container and tells.
            Ok(Ok(()) | Err(ShimError::Gone { .. })) => {}
            outcome => {
                let problem =
                    outcome.map_or_else(|_| "it does not answer".to_owned(), |refused| format!("{refused:?}"));
                tracing::error!(task = %id, problem, "the shim does not kill the task; doing it ourselves");
                if let Ok(init) = PidFd::of(&self.run.process) {
                    init.signal(libc::SIGKILL);
                }
                if tokio::time::timeout(HUNG, exit.wait_for(Option::is_some)).await.is_err() {
                    // It does not tell of the end either: that of its connection does.
                    shim::kill_shim(&shared.settings.places.shim(&self.record().shim));
                }
            }
        }
        match tokio::time::timeout(KILL_GRACE, exit.wait_for(Option::is_some)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(TaskError::Unkillable { id: id.clone(), after: KILL_GRACE }),
        }
    }
}

/// Waits for a task's end, notes it on disk, and tells all who wait. A panic must not leave them waiting for ever.
pub async fn watch_exit(shared: Arc<Shared>, task: Arc<Task>) {
    while caught("the watch over a task's end", watch_once(&shared, &task)).await.is_none() && !task.has_ended() {
        tokio::time::sleep(AGAIN).await;
    }
}

async fn watch_once(shared: &Arc<Shared>, task: &Arc<Task>) {
    let Some(client) = &task.client else { return };
    let record = task.record();
    let id = record.container_id.as_str();
    let outcome = wait_out(client, id).await;
    fault::point("exit.seen");
    // Before the cgroup goes: it is all that remembers.
    let oom_killed = shared.cgroups.oom_kills(&CgroupPath::recorded(&record.cgroup)).is_some_and(|count| count > 0);
    let (exit, orphaned) = match outcome {
        Ok(exit) => (Ok(exit), false),
        Err(error) => after_shim_death(shared, task, &record, error).await,
    };
    let (code, error, at) = match exit {
        Ok(exit) => (i32::try_from(exit.code).unwrap_or(255), None, ended_at(&exit)),
        Err(error) => {
            let text = format!("the task's shim died, and the task was killed ({error})");
            (128 + libc::SIGKILL, Some(text), millis(SystemTime::now()))
        }
    };
    let exit = ExitRecord { code, oom_killed, error, started_at: task.run.started_at, at };
    shared.metrics.exited(oom_killed, exit.error.is_some());
    tracing::info!(task = %record.task_id, code, oom_killed, error = exit.error, "exited");
    let oom = if oom_killed { ", out of memory" } else { "" };
    shared.events.tell_host(&record, format!("Exited with code {code}{oom}"));
    task.set_state(shared, RecordState::Exited(exit.clone()));
    fault::point("exit.recorded");
    task.exit.send_replace(Some(exit));
    if orphaned {
        // What its shim would have removed. Whoever destroys the task meanwhile does the same, and waits for us.
        let shim = task.shim.lock().await;
        if shim.is_some()
            && let Err(left) = shared.delete_dead(&record).await
        {
            tracing::error!(task = %record.task_id, error = %crate::chain(&left), "after its shim's death");
        }
    }
}

/// Waits for the end of the container's process, or of its shim: nothing else ends the waiting.
async fn wait_out(client: &Client, id: &str) -> Result<Exit, ShimError> {
    loop {
        match client.wait(id).await {
            Ok(exit) => return Ok(exit),
            Err(error @ ShimError::Gone { .. }) => return Err(error),
            // A shim that does not know the container can't tell of its end.
            Err(error) if error.is_not_found() => return Err(error),
            Err(error) => {
                tracing::warn!(container = id, %error, "a shim did not wait; asking again");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// Nobody watches the container any more, and its output is cut: it must not run on. Its first process takes all others
/// along; the answer to Nomad does not wait for the runtime to tidy up, which takes runc 100 ms. True when that is
/// still to be done.
async fn after_shim_death(
    shared: &Shared,
    task: &Task,
    record: &Record,
    error: ShimError,
) -> (Result<Exit, ShimError>, bool) {
    if shim::has_noted_exit(&shared.settings.places.bundle(&record.container_id)) {
        return match shared.delete_dead(record).await {
            Ok(Some(exit)) => (Ok(exit), false),
            _ => (Err(error), true),
        };
    }
    if let Ok(init) = PidFd::of(&task.run.process) {
        init.signal(libc::SIGKILL);
        if tokio::time::timeout(KILL_GRACE, init.ended()).await.is_err() {
            tracing::error!(task = %record.task_id, "its shim died, and its process survives SIGKILL");
        }
    }
    (Err(error), true)
}

/// The shim's time, where it has one (Go's zero time means that it has not).
fn ended_at(exit: &Exit) -> u64 {
    let told = exit.at.and_then(|(seconds, nanos)| {
        let (seconds, nanos) = (u64::try_from(seconds).ok()?, u64::try_from(nanos).ok()?);
        Some(seconds * 1000 + nanos / 1_000_000)
    });
    told.filter(|&at| at > 0).unwrap_or_else(|| millis(SystemTime::now()))
}
