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
    claim::caught,
    engine::Slot,
    exec,
    live::{Claim, Parts, Task, has_oom_kill, watch_exit},
    record::{Records, RunRecord, millis},
    saving,
    shared::{Hands, Shared},
    sources,
    undo::{RETRIES, delete_alone, find_shim},
};
use crate::{
    fault,
    ids::{ContainerId, TaskId},
    logs::Hold,
    places::{PlacesError, names},
    process::ProcessId,
    shim::{self, Found, ShimError, stdio::HeldOpen},
};

/// How many tasks are recovered at a time. A StartTask that comes meanwhile runs concurrently with these, and does not
/// wait for the recovery of all tasks of the node.
pub(super) const RECOVERIES: usize = 4;
/// How long a recovery keeps its permit. A recovery that takes longer, for example because a shim hangs, goes on
/// without one.
const RECOVERY_COUNTS: Duration = Duration::from_millis(500);
/// How long the search for a task's shim is retried when the search itself fails.
const SHIM_SEARCH: Duration = Duration::from_secs(60);
/// The pause between two such searches, each of which takes seconds itself.
const SHIM_SEARCH_PAUSE: Duration = Duration::from_millis(500);

impl Engine {
    /// Begins the recovery of all recorded tasks, and the teardown of those whose start or teardown an earlier plugin
    /// did not complete: Nomad never got an answer to such a start, and no longer needs such a task. The recovered
    /// tasks wait for `RecoverTask`. The containers in `left_alone` are not touched. All of this runs in the
    /// background, because Nomad waits for `Init` without a deadline. Returns true if every container has a readable
    /// record.
    pub(super) fn sort_out(&self, records: Records, alone: &HashSet<ContainerId>) -> bool {
        let whole = self.sort_out_shims(&records);
        let (alone, ours): (Vec<Record>, Vec<Record>) =
            records.good.into_iter().partition(|record| alone.contains(&record.container_id));
        // These holds come first: a teardown below must not end a shim that such a task shares.
        let held = alone.into_iter().map(|record| (record.clone(), self.shared().pool.launcher().hold(&record.shim)));
        self.left_alone().extend(held);
        for record in ours {
            let why = match &record.state {
                _ if !record.is_current() => Some("the host was restarted since the task was started"),
                RecordState::Intended => Some("an earlier plugin had only begun to start it"),
                RecordState::Destroying => Some("an earlier plugin had begun to destroy it"),
                RecordState::Running(_) | RecordState::Stopping { .. } | RecordState::Exited(_) => None,
            };
            match why {
                None => self.take_over(record),
                Some(why) => {
                    tracing::warn!(task = %record.task_id, why, "removing the remains of a task of an earlier plugin");
                    if record.state == RecordState::Intended {
                        let held = HeldOpen::new(&record.alloc_dir, &record.stdout, &record.stderr);
                        self.held().insert((record.alloc_id.clone(), record.name.clone()), held);
                    }
                    self.undo_in_background(record);
                }
            }
        }
        whole
    }

    /// Queues the teardown of a task and runs it in the background, under the task's attempt lock.
    fn undo_in_background(&self, record: Record) {
        let (id, engine) = (record.task_id.clone(), self.clone());
        let turn = self.turn(&record.alloc_id, &record.name);
        self.shared().groups.known(&record);
        self.shared().keep(record);
        tokio::spawn(async move {
            let _turn = turn.lock().await;
            if let Some(Err(error)) = engine.destroy_leftover(&id).await {
                tracing::error!(
                    task = %id, error = %crate::chain(&error),
                    "could not remove the remains of a task of an earlier plugin"
                );
            }
        });
    }

    /// Adopts the unrecorded shims of an earlier plugin into the pool, since they were idle. If a record was lost, one
    /// of them may hold the container of that task. Then they are asked to exit instead, which a shim with a container
    /// refuses. Returns true if every container has a readable record.
    fn sort_out_shims(&self, records: &Records) -> bool {
        let places = &self.shared().settings.places;
        let named: HashSet<&str> = records.good.iter().map(|record| record.shim.as_str()).collect();
        let known: HashSet<&str> = records.good.iter().map(|record| record.container_id.as_str()).collect();
        let listed = names(&places.bundles()).and_then(|bundles| Ok((bundles, names(&places.shims())?)));
        let (bundles, shims) = match listed {
            Ok(listed) => listed,
            Err(error) => {
                // The garbage collection looks for these shims again, and ends those that are idle.
                let error = crate::chain(&error);
                tracing::error!(error, "no idle shim of an earlier plugin is adopted: each may hold a container");
                return false;
            }
        };
        let nameless = !records.bad.is_empty() || bundles.iter().any(|id| !known.contains(id.as_str()));
        for id in shims.into_iter().filter(|id| !named.contains(id.as_str())) {
            let shared = self.shared().clone();
            tokio::spawn(async move {
                let dir = shared.settings.places.shim(&id);
                if nameless {
                    shim::end_stray(&dir).await;
                    return;
                }
                match shared.pool.launcher().adopt(&id).await {
                    // The settings may have changed since the shim was launched.
                    Found::Alive(shim) if shim.namespace() == shared.pool.launcher().namespace() => {
                        shared.pool.put(shim);
                    }
                    Found::Alive(shim) => drop(shim.end().await),
                    Found::Hung(pidfd) => drop(shim::end_hung(&dir, &pidfd).await),
                    Found::Gone => drop(shim::end_stray(&dir).await),
                    Found::Unknown(error) => {
                        tracing::warn!(
                            shim = id, %error,
                            "could not look for an idle shim of an earlier plugin; the next garbage collection ends it"
                        );
                    }
                }
            });
        }
        !nameless
    }

    /// Recovers a task in the background. Calls for the task wait until its recovery has ended.
    fn take_over(&self, record: Record) {
        self.shared().groups.known(&record);
        let (tell, done) = watch::channel(());
        let id = record.task_id.clone();
        self.tasks().insert(id.clone(), Slot::Recovering { record: Box::new(record.clone()), done });
        let engine = self.clone();
        // The shim is held from here on, so that it does not look unshared to another of its tasks before the
        // connection is made.
        let held = self.shared().pool.launcher().hold(&record.shim);
        tokio::spawn(async move {
            let revived = in_turn(&engine.0.recoveries, Box::pin(engine.revive_in_spite_of_panics(&record))).await;
            let Some(task) = revived else {
                engine.tasks().remove(&id);
                drop((held, tell));
                return;
            };
            drop(held);
            engine.tasks().insert(id.clone(), Slot::Task(task.clone()));
            tokio::spawn(watch_exit(engine.shared().clone(), task.clone()));
            if let RecordState::Stopping { deadline, .. } = task.record().state {
                tokio::spawn(engine.finish_stop(id, task, deadline));
            }
            drop(tell);
        });
    }

    /// Recovers a task, and retries that after a panic. If every attempt panics, the teardown of the task is queued,
    /// since its id would stay in use forever otherwise.
    async fn revive_in_spite_of_panics(&self, record: &Record) -> Option<Arc<Task>> {
        for pause in RETRIES {
            if let Some(task) = caught("the recovery of a task", self.revive(record.clone())).await {
                return Some(task);
            }
            tokio::time::sleep(pause).await;
        }
        tracing::error!(task = %record.task_id, "could not recover the task; removing it");
        self.shared().keep(record.clone());
        None
    }

    /// Recovers a task: finds its shim, and finds out whether the task runs or how it has ended.
    async fn revive(&self, mut record: Record) -> Arc<Task> {
        let shared = self.shared();
        let shim = find_shim_in_time(shared, &record).await;
        crate::fault::point("recover.found");
        if let Found::Alive(alive) = &shim {
            shared.pool.adopted(&record.alloc_id, alive);
        }
        let nothing = RunRecord { process: ProcessId { pid: 0, start: 0 }, started_at: 0 };
        let mut run = record.state.run().unwrap_or(nothing);
        let mut lost = None;
        let exit = if let RecordState::Exited(known) = &record.state {
            run.started_at = known.started_at;
            let code = if fault::skipped("recovered-exit") { 0 } else { known.code };
            Some(ExitRecord { code, ..known.clone() })
        } else {
            // Read before the container of a dead shim is deleted, since its cgroup is deleted with it.
            let oom_killed = has_oom_kill(shared, &record);
            let ended = |code, error| {
                let at = millis(SystemTime::now());
                ExitRecord { code, oom_killed, error, started_at: run.started_at, at }
            };
            match how_it_is(shared, &record, &shim).await {
                Ok(code) => code.map(|code| ended(code, None)),
                Err(problem) => {
                    lost = Some(problem.clone());
                    // The task was killed, by this plugin or together with its shim. Its real exit code is lost.
                    Some(ended(128 + libc::SIGKILL, Some(problem)))
                }
            }
        };
        if exit.is_none()
            && let (Found::Alive(alive), Some(client)) = (&shim, shim.client())
        {
            // The abandoned exec processes are listed now, since later ones belong to this plugin, and are ended in the
            // background, since RecoverTask waits for this function.
            let execs = shared.settings.places.execs(&record.container_id);
            let listed = exec::abandoned(&execs);
            let container = record.container_id.clone();
            tokio::spawn(exec::end_abandoned(client.clone(), alive.pid(), container, execs, listed));
            sources::release_after_recovery(shared, &record);
        }
        let before = record.state.clone();
        if let (Some(exit), None) = (&exit, &lost) {
            record.state = RecordState::Exited(exit.clone());
        }
        let is_news = record.state != before;
        // The earlier plugin may have died before it could write this down.
        saving::log_started(shared, &record);
        tracing::info!(task = %record.task_id, pid = run.process.pid, lost, "took over a task of an earlier plugin");
        let image = shared.images.by_name(&record.image);
        let log = Hold::new(&shared.settings.places.log(&record.container_id));
        let task =
            Task::new(Parts { record, shim, run, phases: Phases::default(), exit, lost, claimed: false, image, log });
        if is_news {
            // The record must say how the task ended, since the shim is gone and can't report it to the next plugin.
            task.save(shared);
        }
        task
    }

    /// Completes a stop that an earlier plugin had begun: waits until `deadline`, and then kills the task.
    async fn finish_stop(self, id: TaskId, task: Arc<Task>, deadline: u64) {
        let left = Duration::from_millis(deadline.saturating_sub(millis(SystemTime::now())));
        tracing::info!(task = %id, left_ms = left.as_millis(), "completing a stop that an earlier plugin had begun");
        let mut exit = task.exit.subscribe();
        if tokio::time::timeout(left, exit.wait_for(Option::is_some)).await.is_ok() {
            return;
        }
        if let Some(client) = &task.client
            && let Err(error) = task.end_by_force(self.shared(), &id, client).await
        {
            tracing::error!(task = %id, error = %crate::chain(&error), "could not complete the stop of a task");
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
            if record.task_id != *id {
                return Err(unrecoverable("its handle belongs to another task"));
            }
            if !record.is_current() {
                return Err(unrecoverable("the host was restarted since it was started"));
            }
            let hands = self.shared().hands_on(id);
            if hands == Some(Hands::Clearing) {
                return Err(unrecoverable("it was destroyed; no record of it on this host"));
            }
            if hands.is_some() {
                return Err(unrecoverable(
                    "its start was not completed, or it was being destroyed, and it is being removed",
                ));
            }
            let path = self.shared().settings.places.bundle(&record.container_id);
            if !path.try_exists().map_err(|source| PlacesError::List { path, source })? {
                return Err(unrecoverable("no record of it on this host"));
            }
            tracing::warn!(task = %id, "the task's record is lost or torn; recovering the task from its handle");
            saved = record.save(&self.shared().settings.places.record(&record.container_id));
            self.take_over(record.clone());
        }
        let task = self.settled(id).await.ok_or_else(|| unrecoverable("it is being started"))?;
        if let Err(error) = saved {
            // A full disk is no reason to give up a running task.
            tracing::warn!(task = %id, error = %crate::chain(&error), "could not write the task's record; retrying");
            task.save(self.shared());
        }
        if let Some(problem) = &task.lost {
            return Err(unrecoverable(problem));
        }
        match task.claim() {
            Claim::First => tracing::info!(task = %id, "the agent has recovered the task"),
            Claim::Again => {}
            Claim::Refused => {
                return Err(unrecoverable("no agent had asked for it within state.grace, and it is being removed"));
            }
        }
        Ok(())
    }
}

/// Runs a recovery with a permit, which it gives back when it ends or after `RECOVERY_PERMIT_TIMEOUT`.
async fn in_turn<T>(recoveries: &Semaphore, recovery: impl Future<Output = T>) -> T {
    let permit = recoveries.acquire().await;
    let mut recovery = pin!(recovery);
    if let Ok(recovered) = tokio::time::timeout(RECOVERY_COUNTS, recovery.as_mut()).await {
        return recovered;
    }
    drop(permit);
    recovery.await
}

/// Finds the shim of a task that may run. A plugin that can't search for the shim, for lack of descriptors or memory,
/// knows nothing about the task. It retries the search for a minute, in which RecoverTask waits.
async fn find_shim_in_time(shared: &Shared, record: &Record) -> Found {
    let deadline = tokio::time::Instant::now() + SHIM_SEARCH;
    loop {
        match find_shim(shared, record).await {
            Found::Unknown(error) if tokio::time::Instant::now() < deadline => {
                tracing::warn!(task = %record.task_id, %error, "could not look for the task's shim; retrying");
                tokio::time::sleep(SHIM_SEARCH_PAUSE).await;
            }
            found => return found,
        }
    }
}

/// Finds out what became of a task that was last known to run. Returns `None` if its shim still has it, and its exit
/// code if that is still known.
///
/// # Errors
/// Why the exit code is not known.
async fn how_it_is(shared: &Shared, record: &Record, shim: &Found) -> Result<Option<i32>, String> {
    let id = record.container_id.as_str();
    match shim {
        Found::Alive(shim) => match shim.client().is_alive(id).await {
            Ok(_) => Ok(None),
            Err(error) if error.is_not_found() => Err("its shim does not know it any more".to_owned()),
            // The shim lives and has the container. `watch_exit` finds out whether the container still runs.
            Err(error @ (ShimError::NotUnderstood { .. } | ShimError::Refused { .. })) => {
                tracing::warn!(
                    task = %record.task_id, %error,
                    "the shim does not report the task's state; assuming that the task runs"
                );
                Ok(None)
            }
            Err(error) => Err(format!("its shim can't be queried: {error}")),
        },
        Found::Hung(_) => Err("its shim does not answer".to_owned()),
        Found::Unknown(error) => Err(format!("could not look for its shim: {error}")),
        Found::Gone => match delete_alone(shared, record).await {
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
    async fn few_recoveries_are_at_work_at_a_time_and_one_that_hangs_holds_up_nobody() {
        let (recoveries, at_work, most) = (Semaphore::new(2), AtomicUsize::new(0), AtomicUsize::new(0));
        let quick = async || {
            most.fetch_max(at_work.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(10)).await;
            at_work.fetch_sub(1, Ordering::SeqCst);
        };
        let hung = join_all((0..2).map(|_| in_turn(&recoveries, std::future::pending::<()>())));
        let others = join_all((0..20).map(|_| in_turn(&recoveries, quick())));
        tokio::select! {
            biased;
            _ = hung => unreachable!("these never end"),
            _ = others => {}
            () = tokio::time::sleep(Duration::from_secs(60)) => panic!("two recoveries that hang block all others"),
        }
        assert_eq!(most.load(Ordering::SeqCst), 2);
    }
}
