//! Recovery of the tasks of an earlier plugin: the engine reads their records and connects to their shims concurrently.
//! Starts and teardowns that the earlier plugin did not complete are undone or completed.

use std::{
    collections::HashSet,
    future::Future,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::{Semaphore, watch};

use super::{
    Engine, ExitRecord, Phases, Record, RecordState, TaskError, TaskHandle,
    context::{EngineContext, TeardownState},
    engine::Slot,
    exec,
    guards::catch_panic,
    live::{Confirmation, Task, TaskParts, has_oom_kill, watch_exit},
    record::{Records, epoch_millis},
    saving, sources,
    undo::{RETRY_DELAYS, delete_after_cleanup, find_shim},
};
use crate::{
    failpoint,
    ids::{ContainerId, ShimId, TaskId},
    logs::FifoGuard,
    places::{PlacesError, list_names},
    shim::{self, Adoption, ShimError, stdio::ParkedFifos},
};

/// How many tasks are recovered at a time. A StartTask that comes meanwhile runs concurrently with these, and does not
/// wait for the recovery of all tasks of the node.
pub(super) const CONCURRENT_RECOVERIES_MAX: usize = 4;
/// How long a recovery keeps its permit. A recovery that takes longer, for example because a shim hangs, continues
/// without one.
const RECOVERY_PERMIT_TIMEOUT: Duration = Duration::from_millis(500);
/// How long the search for a task's shim is retried when the search itself fails.
const SHIM_SEARCH_TIMEOUT: Duration = Duration::from_secs(60);
/// The pause between two such searches, each of which takes seconds itself.
const SHIM_SEARCH_INTERVAL: Duration = Duration::from_millis(500);

impl Engine {
    /// Begins the recovery of all recorded tasks. Tasks whose start or teardown an earlier plugin did not complete are
    /// torn down: Nomad has no answer to the start, or no longer needs the task. The recovered tasks wait for
    /// `RecoverTask`. The containers in `excluded` are not touched. All of this runs in the background, because Nomad
    /// waits for `Init` without a deadline. Returns true if every container has a readable record.
    pub(super) fn recover_all(&self, records: Records, excluded: &HashSet<ContainerId>) -> bool {
        let all_recorded = self.adopt_idle_shims(&records);
        let (left_alone, to_recover): (Vec<Record>, Vec<Record>) =
            records.readable.into_iter().partition(|record| excluded.contains(&record.intent.container_id));
        // The holds are taken first: a teardown below must not end a shim that an excluded task shares.
        let held = left_alone
            .into_iter()
            .map(|record| (record.clone(), self.context().pool.launcher().acquire(&record.intent.shim)));
        self.left_alone().extend(held);
        for record in to_recover {
            let why = match &record.state {
                _ if !record.is_current() => Some("the host was restarted since the task was started"),
                RecordState::Intended => Some("an earlier plugin had only begun to start it"),
                RecordState::Destroying => Some("an earlier plugin had begun to destroy it"),
                RecordState::Running(_) | RecordState::Stopping { .. } | RecordState::Exited(_) => None,
            };
            match why {
                None => self.begin_recovery(record),
                Some(why) => {
                    tracing::warn!(
                        task = %record.intent.task_id, why,
                        "removing the remains of a task of an earlier plugin"
                    );
                    if record.state == RecordState::Intended {
                        let parked =
                            ParkedFifos::new(&record.intent.alloc_dir, &record.intent.stdout, &record.intent.stderr);
                        self.parked_fifos()
                            .insert((record.intent.alloc_id.clone(), record.intent.name.clone()), parked);
                    }
                    self.teardown_in_background(record);
                }
            }
        }
        all_recorded
    }

    /// Queues the teardown of a task and runs it in the background, under the task's attempt lock.
    fn teardown_in_background(&self, record: Record) {
        let (id, engine) = (record.intent.task_id.clone(), self.clone());
        let attempt_lock = self.attempt_lock(&record.intent.alloc_id, &record.intent.name);
        self.context().groups.register_recovered(&record);
        self.context().queue_teardown(record);
        tokio::spawn(async move {
            let _attempt_lock = attempt_lock.lock().await;
            if let Some(Err(error)) = engine.destroy_pending(&id).await {
                tracing::error!(
                    task = %id, error = %crate::error_chain(&error),
                    "could not remove the remains of a task of an earlier plugin"
                );
            }
        });
    }

    /// Adopts the unrecorded shims of an earlier plugin into the pool, since they were idle. If a record was lost, one
    /// of these shims may hold the container of the lost record's task. Then the shims are asked to exit instead, which
    /// a shim with a container does not do. Returns true if every container has a readable record.
    fn adopt_idle_shims(&self, records: &Records) -> bool {
        let places = &self.context().settings.places;
        let named: HashSet<&ShimId> = records.readable.iter().map(|record| &record.intent.shim).collect();
        let known: HashSet<&str> = records.readable.iter().map(|record| record.intent.container_id.as_str()).collect();
        let listed = list_names(&places.bundles()).and_then(|bundles| Ok((bundles, places.list_shims()?)));
        let (bundles, shims) = match listed {
            Ok(listed) => listed,
            Err(error) => {
                // The garbage collection looks for these shims again, and ends those that are idle.
                let error = crate::error_chain(&error);
                tracing::error!(
                    error,
                    "could not list the containers and shims of an earlier plugin; none of its idle shims is adopted"
                );
                return false;
            }
        };
        let may_hold_containers =
            !records.unreadable.is_empty() || bundles.iter().any(|id| !known.contains(id.as_str()));
        for id in shims.into_iter().filter(|id| !named.contains(id)) {
            let context = self.context().clone();
            tokio::spawn(async move {
                let dir = context.settings.places.shim(&id);
                if may_hold_containers {
                    shim::shut_down_unrecorded(&dir).await;
                    return;
                }
                match context.pool.launcher().adopt(&id).await {
                    // The settings may have changed since the shim was launched.
                    Adoption::Alive(shim) if shim.namespace() == context.pool.launcher().namespace() => {
                        context.pool.add_idle(shim);
                    }
                    Adoption::Alive(shim) => drop(shim.shut_down().await),
                    Adoption::Hung(pidfd) => drop(shim::kill_hung(&dir, &pidfd).await),
                    Adoption::Gone => drop(shim::shut_down_unrecorded(&dir).await),
                    Adoption::Unknown(error) => {
                        tracing::warn!(
                            shim = %id, %error,
                            "could not look for an idle shim of an earlier plugin; the next garbage collection ends it"
                        );
                    }
                }
            });
        }
        !may_hold_containers
    }

    /// Recovers a task in the background. Calls for the task wait until its recovery has ended.
    fn begin_recovery(&self, record: Record) {
        self.context().groups.register_recovered(&record);
        let (done_sender, done) = watch::channel(());
        let id = record.intent.task_id.clone();
        self.tasks().insert(id.clone(), Slot::Recovering { record: Box::new(record.clone()), done });
        let engine = self.clone();
        // The hold is taken before the connection is made. Otherwise the shim would look unshared to another of its
        // tasks.
        let hold = self.context().pool.launcher().acquire(&record.intent.shim);
        tokio::spawn(async move {
            let recovered =
                with_recovery_permit(&engine.0.recovery_permits, Box::pin(engine.recover_catching_panics(&record)))
                    .await;
            let Some(task) = recovered else {
                engine.tasks().remove(&id);
                drop((hold, done_sender));
                return;
            };
            drop(hold);
            engine.tasks().insert(id.clone(), Slot::Task(task.clone()));
            tokio::spawn(watch_exit(engine.context().clone(), task.clone()));
            if let RecordState::Stopping { deadline, .. } = task.record().state {
                tokio::spawn(engine.complete_stop(id, task, deadline));
            }
            drop(done_sender);
        });
    }

    /// Recovers a task, and retries that after a panic. If every attempt panics, the teardown of the task is queued,
    /// since its id would stay in use forever otherwise.
    async fn recover_catching_panics(&self, record: &Record) -> Option<Arc<Task>> {
        for pause in RETRY_DELAYS {
            if let Some(task) = catch_panic("the recovery of a task", self.recover_task(record.clone())).await {
                return Some(task);
            }
            tokio::time::sleep(pause).await;
        }
        tracing::error!(task = %record.intent.task_id, "could not recover the task; removing it");
        self.context().queue_teardown(record.clone());
        None
    }

    /// Recovers a task: finds its shim, and finds out whether the task runs or how it has ended.
    async fn recover_task(&self, mut record: Record) -> Arc<Task> {
        let context = self.context();
        let shim = find_shim_with_retries(context, &record).await;
        crate::failpoint::kill_at("recover.found");
        if let Adoption::Alive(alive) = &shim {
            context.pool.share_adopted(&record.intent.alloc_id, alive);
        }
        let process = record.state.run().map(|run| run.process);
        let started_at = record.state.started_at().unwrap_or_default();
        let (exit, unrecoverable_reason) = find_exit(context, &record, &shim, started_at).await;
        if exit.is_none()
            && let (Adoption::Alive(alive), Some(client)) = (&shim, shim.client())
        {
            // The abandoned exec processes are listed now, since later ones belong to this plugin, and are ended in the
            // background, since RecoverTask waits for this function.
            let execs = context.settings.places.execs(&record.intent.container_id);
            let listed = exec::list_markers(&execs);
            let container = record.intent.container_id.clone();
            tokio::spawn(exec::kill_abandoned(client.clone(), alive.pid(), container, execs, listed));
            sources::unmount_after_recovery(context, &record);
        }
        let before = record.state.clone();
        if let (Some(exit), None) = (&exit, &unrecoverable_reason) {
            record.state = RecordState::Exited(exit.clone());
        }
        let state_changed = record.state != before;
        // The earlier plugin may have died before it marked the log as started.
        saving::mark_log_started(context, &record);
        tracing::info!(
            task = %record.intent.task_id, pid = process.map(|process| process.pid), problem = unrecoverable_reason,
            "took over a task of an earlier plugin"
        );
        let image = context.images.by_name(&record.intent.image);
        let log = FifoGuard::new(&context.settings.places.log(&record.intent.container_id));
        let task = Task::new(TaskParts {
            record,
            shim,
            process,
            started_at,
            phases: Phases::default(),
            exit,
            unrecoverable_reason,
            confirmed: false,
            image,
            log,
        });
        if state_changed {
            // The record must say how the task ended, since the shim is gone and can't report it to the next plugin.
            task.save(context);
        }
        task
    }

    /// Completes a stop that an earlier plugin had begun: waits until `deadline`, and then kills the task.
    async fn complete_stop(self, id: TaskId, task: Arc<Task>, deadline: u64) {
        let left = Duration::from_millis(deadline.saturating_sub(epoch_millis(SystemTime::now())));
        tracing::info!(task = %id, left_ms = left.as_millis(), "completing a stop that an earlier plugin had begun");
        let mut exit = task.exit.subscribe();
        if tokio::time::timeout(left, exit.wait_for(Option::is_some)).await.is_ok() {
            return;
        }
        if let Some(client) = &task.client
            && let Err(error) = task.kill_and_wait(self.context(), &id, client).await
        {
            tracing::error!(task = %id, error = %crate::error_chain(&error), "could not complete the stop of a task");
        }
    }

    /// Confirms the task of an earlier plugin for the agent that asks for it, after its recovery. A task whose record
    /// was lost or is torn is recovered from its handle.
    ///
    /// # Errors
    /// When the task is unknown, when it has ended and nothing is known of how, or when it is already being removed
    /// because no agent had asked for it in time.
    pub async fn recover(&self, id: &TaskId, handle: &TaskHandle) -> Result<(), TaskError> {
        let unrecoverable = |problem: &str| TaskError::Unrecoverable { id: id.clone(), problem: problem.to_owned() };
        let mut saved = Ok(());
        if !self.knows(id) {
            let record = &handle.record;
            if record.intent.task_id != *id {
                return Err(unrecoverable("its handle belongs to another task"));
            }
            if !record.is_current() {
                return Err(unrecoverable("the host was restarted since it was started"));
            }
            let teardown_state = self.context().teardown_state(id);
            if teardown_state == Some(TeardownState::Background) {
                return Err(unrecoverable("it was destroyed; no record of it on this host"));
            }
            if teardown_state.is_some() {
                return Err(unrecoverable(
                    "its start was not completed, or it was being destroyed, and it is being removed",
                ));
            }
            let path = self.context().settings.places.bundle(&record.intent.container_id);
            if !path.try_exists().map_err(|source| PlacesError::List { path, source })? {
                return Err(unrecoverable("no record of it on this host"));
            }
            tracing::warn!(task = %id, "the task's record is lost or torn; recovering the task from its handle");
            saved = record.save(&self.context().settings.places.record(&record.intent.container_id));
            self.begin_recovery(record.clone());
        }
        let task = self.wait_for_recovery(id).await.ok_or_else(|| unrecoverable("it is being started"))?;
        if let Err(error) = saved {
            // A full disk is no reason to give up a running task.
            tracing::warn!(task = %id, error = %crate::error_chain(&error), "could not write the task's record; retrying");
            task.save(self.context());
        }
        if let Some(problem) = &task.unrecoverable_reason {
            return Err(unrecoverable(problem));
        }
        match task.confirm() {
            Confirmation::First => tracing::info!(task = %id, "the agent has recovered the task"),
            Confirmation::Again => {}
            Confirmation::Refused => {
                return Err(unrecoverable("no agent had asked for it within state.grace, and it is being removed"));
            }
        }
        Ok(())
    }
}

/// Runs a recovery with a permit, which it gives back when it ends or after `RECOVERY_PERMIT_TIMEOUT`.
async fn with_recovery_permit<T>(recoveries: &Semaphore, recovery: impl Future<Output = T>) -> T {
    let permit = recoveries.acquire().await;
    let mut recovery = pin!(recovery);
    if let Ok(recovered) = tokio::time::timeout(RECOVERY_PERMIT_TIMEOUT, recovery.as_mut()).await {
        return recovered;
    }
    drop(permit);
    recovery.await
}

/// Finds the shim of a task that may run. A plugin that can't search for the shim, for lack of descriptors or memory,
/// knows nothing about the task. It retries the search for a minute, in which RecoverTask waits.
async fn find_shim_with_retries(context: &EngineContext, record: &Record) -> Adoption {
    let deadline = tokio::time::Instant::now() + SHIM_SEARCH_TIMEOUT;
    loop {
        match find_shim(context, record).await {
            Adoption::Unknown(error) if tokio::time::Instant::now() < deadline => {
                tracing::warn!(task = %record.intent.task_id, %error, "could not look for the task's shim; retrying");
                tokio::time::sleep(SHIM_SEARCH_INTERVAL).await;
            }
            found => return found,
        }
    }
}

/// Finds out how a task that was started at `started_at` has ended; `None` if it runs. The second value is the reason
/// why the task's own exit code is not known, if it is not.
async fn find_exit(
    context: &EngineContext,
    record: &Record,
    shim: &Adoption,
    started_at: u64,
) -> (Option<ExitRecord>, Option<String>) {
    if let RecordState::Exited(known) = &record.state {
        let code = if failpoint::skip("recovered-exit") { 0 } else { known.code };
        return (Some(ExitRecord { code, ..known.clone() }), None);
    }
    // The OOM kills are read before the container of a dead shim is deleted, since its cgroup is deleted with it.
    let oom_killed = has_oom_kill(context, record);
    let ended = |code, error| {
        let at = epoch_millis(SystemTime::now());
        ExitRecord { code, oom_killed, error, started_at, at }
    };
    match probe_task(context, record, shim).await {
        Ok(code) => (code.map(|code| ended(code, None)), None),
        // The task was killed, by this plugin or together with its shim. Its real exit code is lost.
        Err(problem) => (Some(ended(128 + libc::SIGKILL, Some(problem.clone()))), Some(problem)),
    }
}

/// Finds out whether a task that was last known to run still runs. Returns `None` if its shim still has it, and
/// otherwise its exit code.
///
/// # Errors
/// The reason why the exit code is not known.
async fn probe_task(context: &EngineContext, record: &Record, shim: &Adoption) -> Result<Option<i32>, String> {
    let id = record.intent.container_id.as_str();
    match shim {
        Adoption::Alive(shim) => match shim.client().is_alive(id).await {
            Ok(_) => Ok(None),
            Err(error) if error.is_not_found() => Err("its shim does not know it any more".to_owned()),
            // The shim lives and has the container. `watch_exit` finds out whether the container still runs.
            Err(error @ (ShimError::Malformed { .. } | ShimError::Refused { .. })) => {
                tracing::warn!(
                    task = %record.intent.task_id, %error,
                    "the shim does not report the task's state; assuming that the task runs"
                );
                Ok(None)
            }
            Err(error) => Err(format!("its shim can't be queried: {error}")),
        },
        Adoption::Hung(_) => Err("its shim does not answer".to_owned()),
        Adoption::Unknown(error) => Err(format!("could not look for its shim: {error}")),
        Adoption::Gone => match delete_after_cleanup(context, record).await {
            Ok(Some(exit)) => Ok(Some(i32::try_from(exit.code).unwrap_or(255))),
            Ok(None) => Err("its shim is gone; how it ended is not known".to_owned()),
            Err(error) => Err(format!("its shim is gone, and its container can't be ended: {error}")),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;

    use super::*;

    #[tokio::test]
    async fn concurrent_recoveries_are_limited_and_a_hung_one_blocks_no_other() {
        let (recoveries, running, most) = (Semaphore::new(2), AtomicUsize::new(0), AtomicUsize::new(0));
        let quick = async || {
            most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(10)).await;
            running.fetch_sub(1, Ordering::SeqCst);
        };
        let hung = join_all((0..2).map(|_| with_recovery_permit(&recoveries, std::future::pending::<()>())));
        let others = join_all((0..20).map(|_| with_recovery_permit(&recoveries, quick())));
        tokio::select! {
            biased;
            _ = hung => unreachable!("these never end"),
            _ = others => {}
            () = tokio::time::sleep(Duration::from_secs(60)) => panic!("two recoveries that hang block all others"),
        }
        assert_eq!(most.load(Ordering::SeqCst), 2);
    }
}
