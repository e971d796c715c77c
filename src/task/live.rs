//! A task that runs or has ended: its record, its shim, and the background work that waits for its end.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use super::{
    ExitRecord, Phases, Record, RecordState, TaskError, TaskHandle,
    context::EngineContext,
    guards::catch_panic,
    interrupt,
    record::{RunRecord, epoch_millis},
    undo::KILL_GRACE,
};
use crate::{
    failpoint,
    ids::TaskId,
    image::ImageRecord,
    logs::FifoGuard,
    process::{PidFd, ProcessId},
    shim::{self, Adoption, Client, Exit, Shim, ShimError, SignalTarget},
};

/// How long a shim may take to kill a task. A kill takes 5 ms; a shim that takes longer than this hangs.
const SHIM_KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// The first delay before the shim is asked again, after it refused to wait or its answer was not understood. The delay
/// doubles with each such answer. Also the delay before a wait that has panicked is restarted.
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// The longest delay before the shim is asked again.
const RETRY_MAX_DELAY: Duration = Duration::from_secs(10);

/// A task that runs or has ended.
pub(crate) struct Task {
    record: Mutex<Record>,
    /// The lock of the background work that retries to write the record.
    pub(super) save_lock: Arc<tokio::sync::Mutex<()>>,
    /// The task's shim; `None` once the task is being torn down.
    pub(super) shim: tokio::sync::Mutex<Option<Adoption>>,
    /// The connection to the task's shim. `None` for a task that had ended when it was recovered.
    pub(super) client: Option<Client>,
    /// The pid of that shim.
    shim_pid: Option<u32>,
    /// The container's first process. `None` for a task that had ended when it was recovered.
    pub(super) process: Option<ProcessId>,
    /// When the task was started, in milliseconds since the epoch.
    started_at: u64,
    pub(super) phases: Phases,
    pub(super) exit: watch::Sender<Option<ExitRecord>>,
    /// Whether an agent has confirmed the task, or the garbage collection is removing it.
    holder: Mutex<Holder>,
    /// Whether the warning that no agent has asked for the task was logged.
    warned: AtomicBool,
    /// Why the task can't be recovered: it has ended, and it is not known how. `None` for all other tasks.
    pub(super) unrecoverable_reason: Option<String>,
    /// Protects the image from garbage collection.
    _image: Option<Arc<ImageRecord>>,
    /// Keeps the log FIFOs open, so that the output in them outlives the log writer.
    _log: FifoGuard,
}

/// Whether a task belongs to an agent, to the garbage collection, or to neither yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// No agent has asked this plugin for the task.
    Unconfirmed,
    /// An agent has started the task with this plugin, or has asked the plugin for it.
    Agent,
    /// The garbage collection is removing the task, since no agent had asked for it.
    GarbageCollector,
}

/// The answer to an agent that asks for a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Confirmation {
    /// The agent is the first to ask for the task, and has it from now on.
    First,
    /// An agent has the task already.
    Again,
    /// The agent asks too late: the task is being removed.
    Refused,
}

/// The arguments of [`Task::new`].
pub(crate) struct TaskParts {
    pub(super) record: Record,
    pub(super) shim: Adoption,
    pub(super) process: Option<ProcessId>,
    pub(super) started_at: u64,
    pub(super) phases: Phases,
    pub(super) exit: Option<ExitRecord>,
    pub(super) unrecoverable_reason: Option<String>,
    pub(super) confirmed: bool,
    pub(super) image: Option<Arc<ImageRecord>>,
    pub(super) log: FifoGuard,
}

impl Task {
    pub(super) fn new(parts: TaskParts) -> Arc<Self> {
        let TaskParts { record, shim, process, started_at, phases, exit, unrecoverable_reason, confirmed, image, log } =
            parts;
        let alive = match &shim {
            Adoption::Alive(shim) if exit.is_none() => Some(shim),
            _ => None,
        };
        let (client, shim_pid) = (alive.map(|shim| shim.client().clone()), alive.map(Shim::pid));
        Arc::new(Self {
            record: Mutex::new(record),
            save_lock: Arc::default(),
            shim: tokio::sync::Mutex::new(Some(shim)),
            client,
            shim_pid,
            process,
            started_at,
            phases,
            exit: watch::Sender::new(exit),
            holder: Mutex::new(if confirmed { Holder::Agent } else { Holder::Unconfirmed }),
            warned: AtomicBool::new(false),
            unrecoverable_reason,
            _image: image,
            _log: log,
        })
    }

    pub(super) fn record(&self) -> Record {
        self.lock_record().clone()
    }

    pub(super) fn lock_record(&self) -> MutexGuard<'_, Record> {
        self.record.lock()
    }

    pub(super) fn handle(&self) -> TaskHandle {
        TaskHandle { record: self.record() }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Confirms the task for an agent that asks for it.
    pub(super) fn confirm(&self) -> Confirmation {
        let mut holder = self.holder();
        match *holder {
            Holder::Unconfirmed => {
                *holder = Holder::Agent;
                Confirmation::First
            }
            Holder::Agent => Confirmation::Again,
            Holder::GarbageCollector => Confirmation::Refused,
        }
    }

    /// Reserves the task for the garbage collection, which is about to remove it. Returns false if an agent has asked
    /// for the task; after true, no agent can get it any more.
    pub(super) fn reserve_for_gc(&self) -> bool {
        let mut holder = self.holder();
        let is_free = *holder == Holder::Unconfirmed;
        if is_free {
            *holder = Holder::GarbageCollector;
        }
        is_free
    }

    /// Gives up the reservation for the garbage collection, which could not remove the task.
    pub(super) fn release_from_gc(&self) {
        *self.holder() = Holder::Unconfirmed;
    }

    /// Says whether an agent has confirmed the task, or the garbage collection is removing it.
    pub(super) fn has_holder(&self) -> bool {
        *self.holder() != Holder::Unconfirmed
    }

    /// Returns true at the first call only: the warning that no agent has asked for the task is logged once.
    pub(super) fn is_first_warning(&self) -> bool {
        !self.warned.swap(true, Ordering::SeqCst)
    }

    fn holder(&self) -> MutexGuard<'_, Holder> {
        self.holder.lock()
    }

    pub(super) fn started_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.started_at)
    }

    /// Changes the task's state and writes its record.
    pub(super) fn set_state(self: &Arc<Self>, context: &Arc<EngineContext>, state: RecordState) {
        let mut record = self.lock_record();
        // `Exited` may be followed by `Destroying` only, and `Destroying` by no other state.
        match (&record.state, &state) {
            (RecordState::Destroying, _) => return,
            (RecordState::Exited(_), next) if *next != RecordState::Destroying => return,
            _ => record.state = state,
        }
        self.save_locked(context, &record);
    }

    /// Notes in the record that the task is being stopped, so that the next plugin can complete the stop.
    pub(super) fn mark_stopping(self: &Arc<Self>, context: &Arc<EngineContext>, timeout: Duration) {
        // A task that had ended when it was recovered is not stopped.
        let Some(process) = self.process else { return };
        let run = RunRecord { process, started_at: self.started_at };
        let deadline = epoch_millis(SystemTime::now() + timeout);
        self.set_state(context, RecordState::Stopping { run, deadline });
    }

    /// Kills the task and waits for its end: through its shim, or without the shim if it hangs.
    ///
    /// # Errors
    /// When the task survives SIGKILL.
    pub(super) async fn kill_and_wait(
        &self,
        context: &EngineContext,
        id: &TaskId,
        client: &Client,
    ) -> Result<(), TaskError> {
        let container = self.record().intent.container_id;
        let mut exit = self.exit.subscribe();
        let asked = client.kill(container.as_str(), libc::SIGKILL, SignalTarget::All);
        match tokio::time::timeout(SHIM_KILL_TIMEOUT, asked).await {
            // After the death of a shim, `watch_exit` kills the container and reports its end.
            Ok(Ok(()) | Err(ShimError::ConnectionLost { .. })) => {}
            outcome => {
                let problem =
                    outcome.map_or_else(|_| "it does not answer".to_owned(), |refused| format!("{refused:?}"));
                tracing::error!(task = %id, problem, "the shim does not kill the task; the driver kills it");
                // If the process can't be opened in this time, it is killed with its cgroup.
                if let Ok(Some(init)) = tokio::time::timeout(SHIM_KILL_TIMEOUT, self.open_process()).await {
                    init.signal(libc::SIGKILL);
                }
                self.kill_cgroup(context);
                // A shim reports the container's end only after the runtime has ended that it called to kill the
                // container.
                if let Some(shim) = self.shim_pid {
                    interrupt::kill_runtime(shim, &container);
                }
                if tokio::time::timeout(SHIM_KILL_TIMEOUT, exit.wait_for(Option::is_some)).await.is_err() {
                    self.kill_shim(context);
                }
            }
        }
        if tokio::time::timeout(SHIM_KILL_TIMEOUT, exit.wait_for(Option::is_some)).await.is_ok() {
            return Ok(());
        }
        self.kill_cgroup(context);
        match tokio::time::timeout(KILL_GRACE, exit.wait_for(Option::is_some)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(TaskError::Unkillable { id: id.clone(), after: KILL_GRACE }),
        }
    }

    /// Opens the container's first process, if it still runs. Does not return before that is known.
    async fn open_process(&self) -> Option<PidFd> {
        PidFd::of_when_known(&self.process?).await
    }

    /// Kills all processes in the task's cgroup. A runtime that was killed itself may have left the cgroup frozen, and
    /// on cgroup version 1, frozen processes die only when they are thawed.
    fn kill_cgroup(&self, context: &EngineContext) {
        let record = self.record();
        if let Err(error) = tokio::task::block_in_place(|| context.cgroups.kill(&record.intent.cgroup)) {
            tracing::warn!(
                task = %record.intent.task_id, error = %crate::error_chain(&error),
                "could not kill the processes in the task's cgroup"
            );
        }
    }

    /// Kills a shim that does not report the task's end. Its connection then breaks, by which `watch_exit` sees the
    /// task's end. A shim that other tasks share is not killed.
    fn kill_shim(&self, context: &EngineContext) {
        let record = self.record();
        if context.pool.task_count(&record.intent.shim) > 1 {
            tracing::error!(
                task = %record.intent.task_id, shim = %record.intent.shim,
                "the shim does not report the task's end, and is not killed, since other tasks share it"
            );
            return;
        }
        shim::kill_shim(&context.settings.places.shim(&record.intent.shim));
    }
}

/// Waits for a task's end, writes it to the task's record, and notifies all waiting calls. After a panic it starts
/// again, since those calls would wait forever otherwise.
pub(crate) async fn watch_exit(context: Arc<EngineContext>, task: Arc<Task>) {
    while catch_panic("waiting for a task's end", watch_exit_once(&context, &task)).await.is_none() && !task.has_ended()
    {
        tokio::time::sleep(RETRY_DELAY).await;
    }
}

async fn watch_exit_once(context: &Arc<EngineContext>, task: &Arc<Task>) {
    let Some(client) = &task.client else { return };
    let record = task.record();
    let id = record.intent.container_id.as_str();
    let outcome = wait_for_exit(client, id).await;
    failpoint::kill_at("exit.seen");
    // The OOM kills are read before the cgroup is removed, since only the cgroup counts them.
    let oom_killed = has_oom_kill(context, &record);
    let (exit, needs_cleanup) = match outcome {
        Ok(exit) => (Ok(exit), false),
        Err(error) => end_after_shim_loss(context, task, &record, error).await,
    };
    let (code, error, at) = match exit {
        Ok(exit) => (i32::try_from(exit.code).unwrap_or(255), None, ended_at(&exit)),
        Err(error) => {
            let loss = if error.is_not_found() { "no longer has the task's container" } else { "died" };
            let text = format!("the task's shim {loss}, and the task was killed ({error})");
            (128 + libc::SIGKILL, Some(text), epoch_millis(SystemTime::now()))
        }
    };
    let exit = ExitRecord { code, oom_killed, error, started_at: task.started_at, at };
    context.metrics.exited(oom_killed, exit.error.is_some());
    tracing::info!(task = %record.intent.task_id, code, oom_killed, error = exit.error, "task exited");
    let oom = if oom_killed { ", out of memory" } else { "" };
    context.events.send_to_host(&record, format!("Exited with code {code}{oom}"));
    task.set_state(context, RecordState::Exited(exit.clone()));
    failpoint::kill_at("exit.recorded");
    task.exit.send_replace(Some(exit));
    if needs_cleanup {
        // DestroyTask would have the shim delete the container, which a dead shim can't. A concurrent DestroyTask waits
        // for this lock.
        let shim = task.shim.lock().await;
        if shim.is_some()
            && let Err(error) = context.delete_dead(&record).await
        {
            tracing::error!(
                task = %record.intent.task_id, error = %crate::error_chain(&error),
                "could not delete the container of a dead shim"
            );
        }
    }
}

/// Says whether the kernel's OOM killer has ended a process of this task. The task's cgroup counts OOM kills until the
/// runtime's `delete` removes the cgroup.
pub(super) fn has_oom_kill(context: &EngineContext, record: &Record) -> bool {
    context.cgroups.oom_kills(&record.intent.cgroup).is_some_and(|count| count > 0)
}

/// Waits until the container's process or its shim has ended. Other errors do not end the wait.
async fn wait_for_exit(client: &Client, id: &str) -> Result<Exit, ShimError> {
    let mut pause = RETRY_DELAY;
    loop {
        match client.wait(id).await {
            Ok(exit) => return Ok(exit),
            Err(error @ ShimError::ConnectionLost { .. }) => return Err(error),
            // A shim that does not have the container can't report its end.
            Err(error) if error.is_not_found() => return Err(error),
            Err(error) => {
                // A refusal, or an answer that was not understood, does not mean that the task has ended.
                tracing::warn!(container = id, %error, "the shim did not wait for the container's end; asking again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX_DELAY);
            }
        }
    }
}

/// Kills a container whose shim has died or does not have the container any more, unless the shim has recorded the
/// container's end before. No process watches the end of such a container, and its output is cut off, so it must not
/// continue to run. When its first process is killed, all others die. The answer to Nomad does not wait for the
/// runtime's cleanup, which takes runc 100 ms. Returns how the container ended, and whether the caller has to do that
/// cleanup.
async fn end_after_shim_loss(
    context: &EngineContext,
    task: &Task,
    record: &Record,
    error: ShimError,
) -> (Result<Exit, ShimError>, bool) {
    if shim::has_exit_file(&context.settings.places.bundle(&record.intent.container_id)) {
        return match context.delete_dead(record).await {
            Ok(Some(exit)) => (Ok(exit), false),
            _ => (Err(error), true),
        };
    }
    if let Some(init) = task.open_process().await {
        init.signal(libc::SIGKILL);
        if tokio::time::timeout(KILL_GRACE, init.wait_for_end()).await.is_err() {
            tracing::error!(
                task = %record.intent.task_id,
                "the task's shim died, and the task's process survives SIGKILL"
            );
        }
    }
    (Err(error), true)
}

/// Returns when the container ended, in milliseconds since the epoch: the shim's time, or now if the shim does not know
/// it (Go's zero time).
pub(super) fn ended_at(exit: &Exit) -> u64 {
    let reported = exit.exited_at.and_then(|(seconds, nanos)| {
        let (seconds, nanos) = (u64::try_from(seconds).ok()?, u64::try_from(nanos).ok()?);
        Some(seconds * 1000 + nanos / 1_000_000)
    });
    reported.filter(|&at| at > 0).unwrap_or_else(|| epoch_millis(SystemTime::now()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::fake::{Answer, listen};

    /// The answers are two that can't be decoded (the transport's message and the shim's) and a refusal. None of them
    /// means that the task has ended. The last answer is a `Response` with a `WaitResponse` whose exit status is 7.
    #[tokio::test]
    async fn a_task_outlives_answers_that_are_not_understood() {
        const ANSWERS: [&[u8]; 4] =
            [b"\xff\xff\xff\xff", b"\x12\x02\xff\xff", b"\x0a\x02\x08\x02", b"\x12\x02\x08\x07"];
        let dir = tempfile::tempdir().expect("a directory");
        let socket =
            listen(dir.path(), |_, before| ANSWERS.get(before).map_or(Answer::Close, |bytes| Answer::Bytes(bytes)));
        let client = Client::connect(&socket, None).await.expect("connected");
        // `is_alive` sends State a second time, since the first answer can't be decoded.
        let error = client.is_alive("x").await.expect_err("not understood");
        assert!(matches!(error, ShimError::Malformed { .. }), "{error:?}");
        let exit = wait_for_exit(&client, "x").await.expect("asked again after the refusal");
        assert_eq!(exit.code, 7);
        for _ in 0..3 {
            let error = wait_for_exit(&client, "x").await.expect_err("the connection is closed");
            assert!(matches!(error, ShimError::ConnectionLost { .. }), "{error:?}");
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
        assert_eq!(wait_for_exit(&client, "x").await.expect("an exit").code, 7);
    }
}
