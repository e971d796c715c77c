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
    interrupt,
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
    shim::{self, Client, Exit, Found, Kill, Shim, ShimError},
};

/// A kill takes 5 ms; a shim that has not done it by now hangs.
const HUNG: Duration = Duration::from_secs(5);
/// Between two questions to a shim whose answer was refused or not understood, at first and at most.
const AGAIN: Duration = Duration::from_millis(200);
const AGAIN_MAX: Duration = Duration::from_secs(10);

/// A task that runs or has ended.
pub struct Task {
    record: Mutex<Record>,
    /// Held by whoever writes a state that could not be written at once.
    pub(super) saving: Arc<tokio::sync::Mutex<()>>,
    /// Taken by whoever destroys it.
    pub(super) shim: tokio::sync::Mutex<Option<Found>>,
    /// Works as long as the shim lives. None for a task that had ended when it was found.
    pub(super) client: Option<Client>,
    /// The process of that shim.
    shim_pid: Option<u32>,
    pub(super) run: RunRecord,
    pub(super) phases: Phases,
    pub(super) exit: watch::Sender<Option<ExitRecord>>,
    /// Who has it, as far as this very process knows.
    holder: Mutex<Holder>,
    /// Was it said that nobody asks for it?
    warned: AtomicBool,
    /// Why nothing can be told of how it ended, when nothing can.
    pub(super) lost: Option<String>,
    /// Held, so that nobody collects it.
    _image: Option<Arc<ImageRecord>>,
    /// Held, so that what it has written outlives the log writer.
    _log: Hold,
}

/// Who has a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// No agent has asked this process for it.
    Nobody,
    /// An agent has.
    Agent,
    /// It is being removed, since no agent had asked for it.
    Reaper,
}

/// What an agent that asks for a task is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// It has it from now on.
    First,
    /// It had it already.
    Again,
    /// It comes too late: the task is being removed.
    Refused,
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
        let alive = match &shim {
            Found::Alive(shim) if exit.is_none() => Some(shim),
            _ => None,
        };
        let (client, shim_pid) = (alive.map(|shim| shim.client().clone()), alive.map(Shim::pid));
        Arc::new(Self {
            record: Mutex::new(record),
            saving: Arc::default(),
            shim: tokio::sync::Mutex::new(Some(shim)),
            client,
            shim_pid,
            run,
            phases,
            exit: watch::Sender::new(exit),
            holder: Mutex::new(if claimed { Holder::Agent } else { Holder::Nobody }),
            warned: AtomicBool::new(false),
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

    /// An agent asks for it.
    pub(super) fn claim(&self) -> Claim {
        let mut holder = self.holder();
        match *holder {
            Holder::Nobody => {
                *holder = Holder::Agent;
                Claim::First
            }
            Holder::Agent => Claim::Again,
            Holder::Reaper => Claim::Refused,
        }
    }

    /// The reaper is about to remove it: true when no agent has asked for it, and none can have it any more.
    pub(super) fn claim_for_reaper(&self) -> bool {
        let mut holder = self.holder();
        let is_free = *holder == Holder::Nobody;
        if is_free {
            *holder = Holder::Reaper;
        }
        is_free
    }

    /// The reaper could not remove it.
    pub(super) fn release_by_reaper(&self) {
        *self.holder() = Holder::Nobody;
    }

    pub(super) fn is_claimed(&self) -> bool {
        *self.holder() != Holder::Nobody
    }

    /// Is it to be said for the first time that nobody asks for it?
    pub(super) fn is_first_warning(&self) -> bool {
        !self.warned.swap(true, Ordering::SeqCst)
    }

    fn holder(&self) -> MutexGuard<'_, Holder> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
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
                self.kill_cgroup(shared);
                // A shim tells of the end only after the runtime that it has called to kill the container.
                if let Some(shim) = self.shim_pid {
                    interrupt::kill_runtime(shim, &container);
                }
                if tokio::time::timeout(HUNG, exit.wait_for(Option::is_some)).await.is_err() {
                    self.kill_shim(shared);
                }
            }
        }
        if tokio::time::timeout(HUNG, exit.wait_for(Option::is_some)).await.is_ok() {
            return Ok(());
        }
        self.kill_cgroup(shared);
        match tokio::time::timeout(KILL_GRACE, exit.wait_for(Option::is_some)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(TaskError::Unkillable { id: id.clone(), after: KILL_GRACE }),
        }
    }

    /// Kills all processes of the task. A runtime that was killed itself may have left the task's cgroup frozen, and frozen
    /// processes of cgroup version 1 die only when they are thawed.
    fn kill_cgroup(&self, shared: &Shared) {
        let record = self.record();
        let cgroup = CgroupPath::recorded(&record.cgroup);
        if let Err(error) = tokio::task::block_in_place(|| shared.cgroups.kill(&cgroup)) {
            tracing::warn!(task = %record.task_id, error = %crate::chain(&error), "the task's cgroup can't be killed");
        }
    }

    /// Ends a shim that does not tell of the task's end: that of its connection does. Other tasks of a shared one go on.
    fn kill_shim(&self, shared: &Shared) {
        let record = self.record();
        if shared.pool.tasks_of(&record.shim) > 1 {
            tracing::error!(
                task = %record.task_id, shim = record.shim,
                "the shim does not tell of the task's end, and is not killed, since other tasks share it"
            );
            return;
        }
        shim::kill_shim(&shared.settings.places.shim(&record.shim));
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
    let oom_killed = has_oom_kill(shared, &record);
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

/// Has the kernel's OOM killer ended a process of this task? Its cgroup remembers, and the runtime's `delete` removes that.
pub(super) fn has_oom_kill(shared: &Shared, record: &Record) -> bool {
    shared.cgroups.oom_kills(&CgroupPath::recorded(&record.cgroup)).is_some_and(|count| count > 0)
}

/// Waits for the end of the container's process, or of its shim: nothing else ends the waiting.
async fn wait_out(client: &Client, id: &str) -> Result<Exit, ShimError> {
    let mut pause = AGAIN;
    loop {
        match client.wait(id).await {
            Ok(exit) => return Ok(exit),
            Err(error @ ShimError::Gone { .. }) => return Err(error),
            // A shim that does not know the container can't tell of its end.
            Err(error) if error.is_not_found() => return Err(error),
            Err(error) => {
                // The task runs on: an answer that was not understood says nothing about it.
                tracing::warn!(container = id, %error, "a shim did not wait; asking again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(AGAIN_MAX);
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
pub(super) fn ended_at(exit: &Exit) -> u64 {
    let told = exit.at.and_then(|(seconds, nanos)| {
        let (seconds, nanos) = (u64::try_from(seconds).ok()?, u64::try_from(nanos).ok()?);
        Some(seconds * 1000 + nanos / 1_000_000)
    });
    told.filter(|&at| at > 0).unwrap_or_else(|| millis(SystemTime::now()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::fake::{Answer, listen};

    /// Answers that can't be decoded, in the transport's message and in the shim's, and a refusal: none says that the task has
    /// ended. The last one is a `Response` with a `WaitResponse` whose exit status is 7.
    #[tokio::test]
    async fn a_task_outlives_answers_that_are_not_understood() {
        const ANSWERS: [&[u8]; 4] =
            [b"\xff\xff\xff\xff", b"\x12\x02\xff\xff", b"\x0a\x02\x08\x02", b"\x12\x02\x08\x07"];
        let dir = tempfile::tempdir().expect("a directory");
        let socket =
            listen(dir.path(), |_, before| ANSWERS.get(before).map_or(Answer::Close, |bytes| Answer::Bytes(bytes)));
        let client = Client::connect(&socket, None).await.expect("connected");
        // State is asked twice.
        let error = client.is_alive("x").await.expect_err("not understood");
        assert!(matches!(error, ShimError::NotUnderstood { .. }), "{error:?}");
        let exit = wait_out(&client, "x").await.expect("asked again after the refusal");
        assert_eq!(exit.code, 7);
        for _ in 0..3 {
            let error = wait_out(&client, "x").await.expect_err("the connection is closed");
            assert!(matches!(error, ShimError::Gone { .. }), "{error:?}");
        }
    }

    #[tokio::test]
    async fn waiting_goes_on_after_an_answer_that_is_not_understood() {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = listen(dir.path(), |_, before| match before {
            0 => Answer::Bytes(b"\xff\xff\xff\xff"),
            1 => Answer::Bytes(b"\x12\x02\xff\xff"),
            _ => Answer::Bytes(b"\x12\x02\x08\x07"),
        });
        let client = Client::connect(&socket, None).await.expect("connected");
        assert_eq!(wait_out(&client, "x").await.expect("an exit").code, 7);
    }
}
