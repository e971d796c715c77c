//! The teardown of a task. The steps run in the reverse order of the start; each is independent of the others, and does
//! nothing if there is nothing to remove.
//!
//! Failed starts, DestroyTask and the cleanup after a crashed plugin all use this code. So there is only one list of
//! steps, and the tests of each use cover it.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::sync::watch;

use super::{
    Record, TaskError,
    context::EngineContext,
    group,
    guards::{TeardownGuard, catch_panic},
    interrupt, logs, refused,
    runtime_processes::{RUNTIME_GRACE, any_process, is_runsc_running, wait_for_runtime, wait_while_running},
};
use crate::{
    failpoint,
    files::remove_file_if_exists,
    gvisor,
    ids::{ContainerId, TaskId},
    places::list_names,
    process,
    rootfs::{RootfsError, bundle::BundlePaths},
    shim::{self, Adoption, Client, Exit, Shim, ShimError, SignalTarget},
};

/// How long a process may survive SIGKILL. Only a process that hangs in the kernel (NFS, a dying disk) survives it
/// longer.
pub(crate) const KILL_GRACE: Duration = Duration::from_secs(30);
/// How often the driver checks whether processes have ended.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// How long after DestroyTask the teardown in the background begins. A caller often starts the next task at once.
const TEARDOWN_DELAY: Duration = Duration::from_millis(3);
/// How long the teardown in the background waits, in addition, for starts in progress.
const TEARDOWN_MAX_DELAY: Duration = Duration::from_millis(40);
/// How many teardowns may run or wait in the background before DestroyTask waits for them.
const BACKGROUND_TEARDOWNS_MAX: usize = 64;
/// How long DestroyTask waits for them at most.
const BACKGROUND_WAIT_MAX: Duration = Duration::from_secs(30);
/// The delays before the retries of a failed teardown.
pub(crate) const RETRY_DELAYS: [Duration; 3] =
    [Duration::from_secs(1), Duration::from_secs(10), Duration::from_secs(60)];

/// Removes everything of a task. A step that fails does not keep later steps from running. The record is removed last,
/// and only if all steps succeed, so that a retry knows what to look for.
///
/// # Errors
/// The error of the first step that failed.
pub(crate) async fn undo(context: &EngineContext, record: &Record, shim: Adoption) -> Result<(), TaskError> {
    // Mounts that could not be unmounted are retried in `finish`.
    let (ended, _mounts) = end_task(context, record, shim).await?;
    logs::wait_until_written(&context.settings.places, &record.intent.container_id).await;
    ended.finish(context, record).await
}

/// A task whose container, processes and mount sources are gone. Only the driver's own files, mounts and cgroup are
/// left.
pub(crate) struct EndedTask {
    /// The shim, if it can serve the next task. It is reusable only after the teardown, since the record names it until
    /// then.
    shim: Option<Shim>,
    outcome: FirstError,
}

/// The error of the first of several steps that failed.
struct FirstError(Result<(), TaskError>);

impl FirstError {
    fn note(&mut self, record: &Record, step: &'static str, outcome: Result<(), TaskError>) {
        if let Err(error) = outcome {
            warn_of_failed_step(record, step, &error);
            if self.0.is_ok() {
                self.0 = Err(error);
            }
        }
    }
}

fn warn_of_failed_step(record: &Record, step: &'static str, error: &TaskError) {
    tracing::warn!(
        task = %record.intent.task_id, step, error = %crate::error_chain(error),
        "a step of the task's teardown failed"
    );
}

/// The outcome of unmounting the sources of the task's mounts.
type UnmountResult = Result<(), TaskError>;

/// Ends the container and, unless it can be reused, the shim, and unmounts the sources of the task's mounts.
///
/// # Errors
/// When the container can't be ended. Everything else is kept then, since it is needed for a retry.
async fn end_task(
    context: &EngineContext,
    record: &Record,
    shim: Adoption,
) -> Result<(EndedTask, UnmountResult), TaskError> {
    let mut outcome = FirstError(Ok(()));
    if let Adoption::Unknown(source) = shim {
        // The shim may hold the container. Then the container must be ended through the shim.
        let (id, path) = (record.intent.shim.to_string(), context.settings.places.shim(&record.intent.shim));
        let source = ShimError::File { id, doing: "look for", path, source };
        return Err(TaskError::Shim { doing: "find the task's shim", source });
    }
    // An earlier attempt of this teardown may have left a hold, which would look like that of another task of the shim.
    context.set_shim_hold(&record.intent.task_id, None);
    // Without its shim and bundle, a running container could never be ended. So everything stays for a retry.
    let ended = match end_container(context, record, &shim).await {
        Ok(ended) => ended,
        Err(error) => {
            warn_of_failed_step(record, "container", &error);
            let hold = match shim {
                Adoption::Alive(shim) => Some(shim.into_hold()),
                Adoption::Hung(_) => Some(context.pool.launcher().acquire(&record.intent.shim)),
                Adoption::Gone | Adoption::Unknown(_) => None,
            };
            context.set_shim_hold(&record.intent.task_id, hold);
            return Err(error);
        }
    };
    if record.intent.group.is_some() {
        tokio::task::block_in_place(|| group::leave(context, record));
    }
    if record.intent.gvisor && !failpoint::skip("container") {
        clear_sandbox_cgroup(context, record, &mut outcome).await;
    }
    failpoint::kill_at("undo.container");
    let shim = match (shim, ended) {
        (Adoption::Alive(shim), ContainerEnd::ByShim) => Some(shim),
        (Adoption::Alive(shim), ContainerEnd::DespiteShim) => {
            outcome.note(record, "shim", discard_shim(context, shim).await);
            None
        }
        (other, _) => {
            outcome.note(record, "shim", end_shim(context, record, other).await);
            if record.intent.gvisor {
                outcome.note(record, "container", delete_late_container(context, record).await);
            }
            None
        }
    };
    failpoint::kill_at("undo.shim");
    let bundle = BundlePaths::of(&context.settings.places, &record.intent.container_id);
    let unmounted = tokio::task::block_in_place(|| bundle.unmount_pins());
    let unmounted =
        unmounted.map_err(TaskError::from).inspect_err(|error| warn_of_failed_step(record, "mounts", error));
    Ok((EndedTask { shim, outcome }, unmounted))
}

/// Kills what is left in the cgroup of a sandbox, and removes the cgroup. Other runtimes do this in their `delete`,
/// which is not called for an ended sandbox. A cgroup that can't be removed here is retried and reported in
/// [`EndedTask::finish`].
async fn clear_sandbox_cgroup(context: &EngineContext, record: &Record, outcome: &mut FirstError) {
    outcome.note(record, "processes", kill_cgroup_processes(context, record).await);
    if let Err(error) = tokio::task::block_in_place(|| context.cgroups.remove(&record.intent.cgroup)) {
        tracing::debug!(
            task = %record.intent.task_id, error = %crate::error_chain(&error),
            "could not remove the task's cgroup; retrying later"
        );
    }
}

impl EndedTask {
    /// Removes the rest: the log, the root file system, the bundle, the writable layer, the cgroup and the record. Then
    /// returns the shim to the pool.
    ///
    /// # Errors
    /// The error of the first step that failed, here or in [`end_task`].
    async fn finish(self, context: &EngineContext, record: &Record) -> Result<(), TaskError> {
        let Self { shim, mut outcome } = self;
        if !failpoint::skip("container") {
            outcome.note(record, "processes", kill_cgroup_processes(context, record).await);
        }
        let bundle = BundlePaths::of(&context.settings.places, &record.intent.container_id);
        let log = context.settings.places.log(&record.intent.container_id);
        let cgroups = context.cgroups.clone();
        let cgroup = record.intent.cgroup.clone();
        let root = context.settings.places.runtime_state(&record.intent.runtime, &record.intent.namespace);
        let state = record.intent.gvisor.then(|| (root, record.intent.container_id.clone()));
        let files = tokio::task::spawn_blocking(move || {
            let after = |name, outcome: Result<(), TaskError>| {
                failpoint::kill_at(name);
                outcome
            };
            [
                ("log", crate::logs::remove_task_dir(&log).map_err(TaskError::from)),
                ("runtime", state.map_or(Ok(()), |(root, id)| remove_runsc_state(&root, &id))),
                ("unmount", after("undo.unmount", bundle.unmount().map_err(TaskError::from))),
                ("bundle", after("undo.bundle", bundle.remove().map_err(TaskError::from))),
                ("upper", after("undo.upper", bundle.remove_upper().map_err(TaskError::from))),
                ("cgroup", after("undo.cgroup", cgroups.remove(&cgroup).map_err(TaskError::from))),
            ]
        });
        match files.await {
            Ok(steps) => steps.into_iter().for_each(|(step, done)| outcome.note(record, step, done)),
            Err(error) => outcome.note(record, "files", Err(error.into())),
        }
        if outcome.0.is_ok() {
            context.images.touch(&record.intent.image);
            outcome.note(
                record,
                "record",
                Record::remove(&context.settings.places.record(&record.intent.container_id)).map_err(TaskError::from),
            );
        }
        if let Some(shim) = shim {
            // While a record names the shim, a retry of this teardown would end it, even if it serves another task by
            // then.
            let returned = match outcome.0 {
                _ if failpoint::skip("shim") => true,
                Ok(()) => context.pool.recycle(&record.intent.alloc_id, shim).await,
                Err(_) => context.pool.shut_down(&record.intent.alloc_id, shim).await,
            };
            if !returned {
                outcome.note(record, "shim", Err(shim_stays_error()));
            }
        }
        if outcome.0.is_ok() {
            failpoint::kill_at("undo.record");
        }
        outcome.0
    }
}

/// Removes a container's files in runsc's state directory. An ended container has all of its files there, because
/// `delete` is not called for it. Of other containers, only the files of a runsc that was cut off are left.
pub(super) fn remove_runsc_state(root: &Path, id: &ContainerId) -> Result<(), TaskError> {
    for name in list_names(root)?.into_iter().filter(|name| gvisor::container_of_state_file(name) == id.as_str()) {
        let path = root.join(name);
        remove_file_if_exists(&path).map_err(|source| RootfsError::File { doing: "remove", path, source })?;
    }
    Ok(())
}

/// How the container was ended, which decides what becomes of its shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ContainerEnd {
    /// The shim ended and deleted the container, and can be reused.
    ByShim,
    /// The driver ended the container, because the shim or its runtime refused to. The shim lives and holds the
    /// container forever.
    DespiteShim,
    /// The container was ended in another way, or did not exist. The shim can't be reused.
    Otherwise,
}

/// Ends and deletes the container: through its shim if the shim answers, else without it.
///
/// # Errors
/// When the container can't be ended.
async fn end_container(context: &EngineContext, record: &Record, shim: &Adoption) -> Result<ContainerEnd, TaskError> {
    if failpoint::skip("container") {
        return Ok(ContainerEnd::Otherwise);
    }
    let id = record.intent.container_id.as_str();
    let failed = |doing| move |source| TaskError::Shim { doing, source };
    if let (Adoption::Alive(alive), Some(client)) = (shim, shim.client()) {
        let end_despite_refusal = async |refusal| refused::end_despite_refusal(context, record, alive, refusal).await;
        match end_through_shim(client, id).await {
            // The shim died during the call. The code below deletes the container, as for any dead shim.
            Err(ShimError::ConnectionLost { .. }) => {}
            Err(error) => return end_despite_refusal(error).await,
            Ok(KnownToShim::Yes) => return Ok(ContainerEnd::ByShim),
            // A Create of this container may have been cut off, and its runtime may still be running.
            Ok(KnownToShim::No) => {
                wait_for_runtime(context, record, alive).await;
                match end_through_shim(client, id).await {
                    Ok(KnownToShim::Yes) => return Ok(ContainerEnd::Otherwise),
                    Ok(KnownToShim::No) | Err(ShimError::ConnectionLost { .. }) => {}
                    Err(error) => return end_despite_refusal(error).await,
                }
            }
        }
    }
    if let Adoption::Hung(pidfd) = shim {
        if context.pool.task_count(&record.intent.shim) > 0 {
            // The containers of the shim's other tasks would end with the shim.
            let source = ShimError::TimedOut { call: "Connect", after: shim::CONNECT_TIMEOUT };
            return Err(failed("end the container of a shim that has other tasks")(source));
        }
        // A hung shim holds the container until the shim is killed.
        pidfd.signal(libc::SIGKILL);
        if tokio::time::timeout(KILL_GRACE, pidfd.wait_for_end()).await.is_err() {
            let source = ShimError::TimedOut { call: "SIGKILL", after: KILL_GRACE };
            return Err(failed("end a shim that does not answer")(source));
        }
    }
    delete_after_cleanup(context, record).await.map_err(failed("delete the container without its shim"))?;
    Ok(ContainerEnd::Otherwise)
}

/// Deletes the container of a dead shim, after the end of any cleanup that an earlier plugin has begun for it. Such a
/// cleanup deletes any container and unmounts any root file system that has the attempt's names (containerd,
/// `runtime/v2/runc/manager`, `Stop`), and the attempt's next start has the same names.
///
/// # Errors
/// When the container can't be deleted.
pub(super) async fn delete_after_cleanup(context: &EngineContext, record: &Record) -> Result<Option<Exit>, ShimError> {
    // With gVisor this check is not possible, because a running sandbox has the container's id among its arguments,
    // too.
    if !record.intent.gvisor {
        let is_running = || {
            any_process(process::all_pids()?.into_iter(), |pid| {
                interrupt::has_container_arg(pid, &record.intent.container_id)
            })
        };
        wait_while_running(record, RUNTIME_GRACE, is_running).await;
        if is_running().unwrap_or(true) {
            interrupt::kill_processes_of(&record.intent.container_id);
            wait_while_running(record, KILL_GRACE, is_running).await;
        }
    }
    context.delete_dead(record).await
}

/// Waits for a runsc that the shim had called just before the shim was ended, and deletes the container that this runsc
/// has created.
async fn delete_late_container(context: &EngineContext, record: &Record) -> Result<(), TaskError> {
    if wait_while_running(record, KILL_GRACE, || is_runsc_running(record)).await {
        let failed = |source| TaskError::Shim { doing: "delete the container without its shim", source };
        context.delete_dead(record).await.map_err(failed)?;
    }
    Ok(())
}

/// Kills all processes in the task's cgroup. No process may outlive the task's teardown, and those of a runtime that
/// was cut off belong to no container.
///
/// # Errors
/// When the processes can't be listed or killed, or when one of them survives SIGKILL.
pub(super) async fn kill_cgroup_processes(context: &EngineContext, record: &Record) -> Result<(), TaskError> {
    let kill = || Ok(context.cgroups.kill(&record.intent.cgroup)?);
    kill_until_gone(&record.intent.task_id, KILL_GRACE, kill).await
}

/// Calls `kill`, which returns how many processes there still were, until there is none.
async fn kill_until_gone(
    id: &TaskId,
    limit: Duration,
    kill: impl Fn() -> Result<usize, TaskError>,
) -> Result<(), TaskError> {
    let deadline = tokio::time::Instant::now() + limit;
    while kill()? > 0 {
        if tokio::time::Instant::now() > deadline {
            return Err(TaskError::Unkillable { id: id.clone(), after: limit });
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

/// Whether the shim has the container.
enum KnownToShim {
    Yes,
    No,
}

/// Kills the container and deletes it through its shim.
///
/// # Errors
/// When the shim or its runtime refuses, does not answer in time, or dies.
async fn end_through_shim(client: &Client, id: &str) -> Result<KnownToShim, ShimError> {
    let alive = match client.is_alive(id).await {
        Err(error) if error.is_not_found() => return Ok(KnownToShim::No),
        other => other?,
    };
    // A container that was created and never started could be deleted without a kill, but that takes a shim two
    // seconds.
    if alive {
        client.kill(id, libc::SIGKILL, SignalTarget::All).await?;
        failpoint::kill_at("undo.killed");
        match tokio::time::timeout(KILL_GRACE, client.wait(id)).await {
            Ok(Err(error)) if !error.is_not_found() => return Err(error),
            Ok(_) => {}
            Err(_) => return Err(ShimError::TimedOut { call: "Wait", after: KILL_GRACE }),
        }
    }
    client.delete(id).await?;
    Ok(KnownToShim::Yes)
}

/// Ends the shim of a container that is gone, unless other tasks hold it.
async fn end_shim(context: &EngineContext, record: &Record, shim: Adoption) -> Result<(), TaskError> {
    if failpoint::skip("shim") {
        return Ok(());
    }
    let dir = context.settings.places.shim(&record.intent.shim);
    let gone = match shim {
        Adoption::Alive(shim) => context.pool.shut_down(&record.intent.alloc_id, shim).await,
        Adoption::Hung(pidfd) => shim::kill_hung(&dir, &pidfd).await,
        Adoption::Gone | Adoption::Unknown(_) => shim::shut_down_unrecorded(&dir).await,
    };
    if gone { Ok(()) } else { Err(shim_stays_error()) }
}

/// Releases a shim that holds an ended container which it can't delete. The shim is ended with the last task that holds
/// it.
async fn discard_shim(context: &EngineContext, shim: Shim) -> Result<(), TaskError> {
    if context.pool.quarantine(shim).await { Ok(()) } else { Err(shim_stays_error()) }
}

fn shim_stays_error() -> TaskError {
    TaskError::Shim { doing: "end the shim", source: ShimError::DoesNotExit }
}

/// Removes everything of a task. If that fails, the teardown is queued and retried in the background, since Nomad does
/// not repeat its call.
///
/// # Errors
/// The error of the first attempt.
pub(crate) async fn undo_or_retry(guard: TeardownGuard, shim: Adoption) -> Result<(), TaskError> {
    let outcome = undo(guard.context(), guard.record(), shim).await;
    finish_or_retry(guard, outcome.is_ok());
    outcome
}

/// Ends the container and unmounts the sources of its mounts. The rest is removed in the background, by a limited
/// number of teardowns at a time. Meanwhile the task is a pending teardown: a new attempt waits for it, and after a
/// crash the next plugin finds its record.
///
/// # Errors
/// When the container can't be ended, or the sources of its mounts can't be unmounted.
pub(crate) async fn end_and_defer_teardown(
    context: &Arc<EngineContext>,
    record: &Record,
    shim: Adoption,
) -> Result<(), TaskError> {
    let mut guard = TeardownGuard::new(context, record);
    let (ended, unmounted) = match end_task(context, record, shim).await {
        Ok(ended) => ended,
        Err(error) => {
            finish_or_retry(guard, false);
            return Err(error);
        }
    };
    guard.move_to_background();
    wait_for_teardowns(&context.background_teardowns, BACKGROUND_WAIT_MAX).await;
    // A panic in the background drops the guard, which queues the teardown again.
    tokio::spawn(catch_panic("the teardown of a task", async move {
        let (context, record) = (guard.context(), guard.record());
        // The teardown's kernel locks and disk writes would delay starts.
        tokio::select! {
            () = context.pool.wait_until_idle(TEARDOWN_DELAY, TEARDOWN_MAX_DELAY) => {}
            () = context.teardown_requested.notified() => {}
        }
        logs::wait_until_written(&context.settings.places, &record.intent.container_id).await;
        let permit = context.teardown_permits.acquire().await;
        failpoint::kill_at("undo.clearing");
        let outcome = ended.finish(context, record).await;
        drop(permit);
        finish_or_retry(guard, outcome.is_ok());
    }));
    unmounted
}

/// Waits while too many teardowns run in the background, so that a caller that destroys tasks faster than they can be
/// torn down is slowed down. Teardowns that hang must not make DestroyTask hang, so the wait is limited.
async fn wait_for_teardowns(count: &watch::Sender<usize>, limit: Duration) {
    let mut count = count.subscribe();
    let waiting = count.wait_for(|count| *count <= BACKGROUND_TEARDOWNS_MAX);
    if tokio::time::timeout(limit, waiting).await.is_err() {
        tracing::warn!(
            teardowns = *count.borrow(),
            seconds = limit.as_secs(),
            "teardowns in the background make no progress; another one is added"
        );
    }
}

/// Reports the outcome of a teardown to its guard. If the teardown failed, it is retried in the background.
fn finish_or_retry(guard: TeardownGuard, is_gone: bool) {
    let (context, id) = (guard.context().clone(), guard.record().intent.task_id.clone());
    guard.finish(is_gone);
    if is_gone {
        return;
    }
    tokio::spawn(catch_panic("the retry of a task's teardown", async move {
        for (retry, pause) in (1..).zip(RETRY_DELAYS) {
            tokio::time::sleep(pause).await;
            // If there is nothing to claim, another caller runs the teardown, such as a new attempt of the task, or the
            // teardown has succeeded.
            let Some(guard) = context.claim_teardown(&id) else { return };
            let shim = find_shim(&context, guard.record()).await;
            let outcome = undo(&context, guard.record(), shim).await;
            guard.finish(outcome.is_ok());
            let Err(error) = outcome else { return };
            tracing::warn!(
                task = %id, retry, of = RETRY_DELAYS.len(), error = %crate::error_chain(&error),
                "a retry of a task's teardown failed"
            );
        }
    }));
}

/// Finds the shim of a record and connects to it.
pub(crate) async fn find_shim(context: &EngineContext, record: &Record) -> Adoption {
    if record.is_current() { context.pool.launcher().adopt(&record.intent.shim).await } else { Adoption::Gone }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_that_survives_is_reported() {
        let id = TaskId("a/b/1".to_owned());
        let limit = Duration::from_millis(30);
        let outcome = kill_until_gone(&id, limit, || Ok(1)).await;
        assert!(matches!(outcome, Err(TaskError::Unkillable { after, .. }) if after == limit), "{outcome:?}");
        let left = std::cell::Cell::new(3_usize);
        let kill = || {
            left.set(left.get() - 1);
            Ok(left.get())
        };
        kill_until_gone(&id, KILL_GRACE, kill).await.expect("no process is left");
        assert_eq!(left.get(), 0);
    }

    #[tokio::test]
    async fn teardowns_that_hang_do_not_block_a_further_one_forever() {
        let hung = watch::Sender::new(BACKGROUND_TEARDOWNS_MAX + 1);
        let limit = Duration::from_millis(30);
        let began = tokio::time::Instant::now();
        wait_for_teardowns(&hung, limit).await;
        assert!(began.elapsed() >= limit, "a caller that is too fast is slowed down");
        hung.send_replace(BACKGROUND_TEARDOWNS_MAX);
        tokio::time::timeout(KILL_GRACE, wait_for_teardowns(&hung, 2 * KILL_GRACE)).await.expect("there is room");
    }
}
