//! The teardown of a task. The steps run in the reverse order of the start; each is independent of the others, and does
//! nothing if there is nothing to remove.
//!
//! A failed start, DestroyTask and the remains of a crashed plugin all use this code. So there is only one list of
//! steps, and the tests of each use cover it.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use super::{
    Record, TaskError,
    claim::{Claim, caught},
    group, interrupt, logs, refused,
    shared::Shared,
};
use crate::{
    cgroup::CgroupPath,
    fault, gvisor,
    ids::ContainerId,
    places::names,
    process::{self, descendants},
    rootfs::{RootfsError, bundle::BundlePaths},
    shim::{self, Client, Exit, Found, Kill, Shim, ShimError},
};

/// How long a process may survive SIGKILL. Only a process that hangs in the kernel (NFS, a dying disk) survives it
/// longer.
pub const KILL_GRACE: Duration = Duration::from_secs(30);
/// How long a runtime may go on that is creating a container which is to be torn down. Then it is killed, since the
/// container is of no use.
const RUNTIME_GRACE: Duration = Duration::from_secs(5);
/// How often the driver checks whether processes have ended.
const LOOK: Duration = Duration::from_millis(5);
/// How long after DestroyTask the teardown in the background begins. A caller often starts the next task at once.
const BREATH: Duration = Duration::from_millis(3);
/// How long the teardown in the background waits, in addition, for such a start to end.
const PATIENCE: Duration = Duration::from_millis(40);
/// How many teardowns may run or wait in the background before DestroyTask waits for them.
const BACKLOG: usize = 64;
/// The delays before the retries of a failed teardown.
pub const RETRIES: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(10), Duration::from_secs(60)];

/// Removes everything of a task. A step that fails does not keep later steps from running. The record is removed last,
/// and only if all steps succeed, so that a retry knows what to look for.
///
/// # Errors
/// The error of the first step that failed.
pub async fn undo(shared: &Shared, record: &Record, shim: Found) -> Result<(), TaskError> {
    // Mounts that could not be unmounted are retried in `finish`.
    let (released, _mounts) = release(shared, record, shim).await?;
    logs::written_out(&shared.settings.places, &record.container_id).await;
    released.finish(shared, record).await
}

/// A task whose container, processes and mount sources are gone. Only the driver's own files, mounts and cgroup are
/// left.
pub struct Released {
    /// The shim, if it can serve the next task. It is reusable only after the teardown, since the record names it until
    /// then.
    shim: Option<Shim>,
    outcome: Outcome,
}

/// The error of the first of several steps that failed.
struct Outcome(Result<(), TaskError>);

impl Outcome {
    fn note(&mut self, record: &Record, step: &'static str, outcome: Result<(), TaskError>) {
        if let Err(error) = outcome {
            tracing::warn!(
                task = %record.task_id, step, error = %crate::chain(&error),
                "a step of the task's teardown failed"
            );
            if self.0.is_ok() {
                self.0 = Err(error);
            }
        }
    }
}

/// The outcome of unmounting the sources of the task's mounts.
type Mounts = Result<(), TaskError>;

/// Ends the container and, unless it can be reused, the shim, and unmounts the sources of the task's mounts.
///
/// # Errors
/// When the container can't be ended. Everything else is kept then, since it is needed for a retry.
async fn release(shared: &Shared, record: &Record, shim: Found) -> Result<(Released, Mounts), TaskError> {
    let mut outcome = Outcome(Ok(()));
    if let Found::Unknown(source) = shim {
        // The shim may hold the container, which only that shim may end.
        let (id, path) = (record.shim.clone(), shared.settings.places.shim(&record.shim));
        let source = ShimError::File { id, doing: "look for", path, source };
        return Err(TaskError::Shim { doing: "find the task's shim", source });
    }
    // The hold of an earlier attempt of this teardown would look like that of another task which shares the shim.
    shared.hold_shim(&record.task_id, None);
    // Without its shim and bundle, a living container could never be ended. So everything else stays for a retry.
    let ended = match end_container(shared, record, &shim).await {
        Ok(ended) => ended,
        Err(error) => {
            tracing::warn!(
                task = %record.task_id, step = "container", error = %crate::chain(&error),
                "a step of the task's teardown failed"
            );
            let hold = match shim {
                Found::Alive(shim) => Some(shim.into_hold()),
                Found::Hung(_) => Some(shared.pool.launcher().hold(&record.shim)),
                Found::Gone | Found::Unknown(_) => None,
            };
            shared.hold_shim(&record.task_id, hold);
            return Err(error);
        }
    };
    if record.group.is_some() {
        tokio::task::block_in_place(|| group::leave(shared, record));
    }
    if record.gvisor && !fault::skipped("container") {
        // Other runtimes do this in their `delete`, which is not called for an ended sandbox. A cgroup that can't be
        // removed here is retried and reported in `finish`.
        outcome.note(record, "processes", empty_cgroup(shared, record).await);
        let cgroup = CgroupPath::recorded(&record.cgroup);
        if let Err(error) = tokio::task::block_in_place(|| shared.cgroups.remove(&cgroup)) {
            tracing::debug!(
                task = %record.task_id, error = %crate::chain(&error),
                "could not remove the task's cgroup; retrying later"
            );
        }
    }
    fault::point("undo.container");
    let shim = match (shim, ended) {
        (Found::Alive(shim), Ended::ByItsShim) => Some(shim),
        (Found::Alive(shim), Ended::InSpiteOfItsShim) => {
            outcome.note(record, "shim", discard_shim(shared, shim).await);
            None
        }
        (other, _) => {
            outcome.note(record, "shim", end_shim(shared, record, other).await);
            if record.gvisor {
                outcome.note(record, "container", end_late(shared, record).await);
            }
            None
        }
    };
    fault::point("undo.shim");
    let bundle = BundlePaths::of(&shared.settings.places, &record.container_id);
    let unmounted = tokio::task::block_in_place(|| bundle.unmount_pins());
    let unmounted = unmounted.map_err(TaskError::from).inspect_err(|error| {
        tracing::warn!(
            task = %record.task_id, step = "mounts", error = %crate::chain(error),
            "a step of the task's teardown failed"
        );
    });
    Ok((Released { shim, outcome }, unmounted))
}

impl Released {
    /// Removes the rest: the log, the root file system, the bundle, the writable layer, the cgroup and the record. Then
    /// returns the shim to the pool.
    ///
    /// # Errors
    /// The error of the first step that failed, here or in [`end_task`].
    async fn finish(self, shared: &Shared, record: &Record) -> Result<(), TaskError> {
        let Self { shim, mut outcome } = self;
        if !fault::skipped("container") {
            outcome.note(record, "processes", empty_cgroup(shared, record).await);
        }
        let bundle = BundlePaths::of(&shared.settings.places, &record.container_id);
        let log = shared.settings.places.log(&record.container_id);
        let cgroups = shared.cgroups.clone();
        let cgroup = CgroupPath::recorded(&record.cgroup);
        let root = shared.settings.places.runtime_state(&record.runtime, &record.namespace);
        let state = record.gvisor.then(|| (root, record.container_id.clone()));
        let files = tokio::task::spawn_blocking(move || {
            let after = |name, outcome: Result<(), TaskError>| {
                fault::point(name);
                outcome
            };
            [
                ("log", crate::logs::remove(&log).map_err(TaskError::from)),
                ("runtime", state.map_or(Ok(()), |(root, id)| remove_state(&root, &id))),
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
            shared.images.touch(&record.image);
            outcome.note(
                record,
                "record",
                Record::remove(&shared.settings.places.record(&record.container_id)).map_err(TaskError::from),
            );
        }
        if let Some(shim) = shim {
            // While a record names the shim, a retry of this teardown would end it, even if it serves another task by
            // then.
            let returned = match outcome.0 {
                _ if fault::skipped("shim") => true,
                Ok(()) => shared.pool.take_back(&record.alloc_id, shim).await,
                Err(_) => shared.pool.end(&record.alloc_id, shim).await,
            };
            if !returned {
                outcome.note(record, "shim", Err(shim_stays()));
            }
        }
        if outcome.0.is_ok() {
            fault::point("undo.record");
        }
        outcome.0
    }
}

/// Removes a container's files in runsc's state directory. An ended container has all of its files there, because
/// `delete` is not called for it. Of other containers, only the files of a runsc that was cut off are left.
pub(super) fn remove_state(root: &Path, id: &ContainerId) -> Result<(), TaskError> {
    for name in names(root)?.into_iter().filter(|name| gvisor::container_of(name) == id.as_str()) {
        let path = root.join(name);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(RootfsError::File { doing: "remove", path, source }.into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// How the container was ended, which decides what becomes of its shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The shim ended and deleted the container, and can be reused.
    ByItsShim,
    /// The driver ended the container, because the shim or its runtime refused to. The shim lives and holds the
    /// container forever.
    InSpiteOfItsShim,
    /// The container was ended in another way, or did not exist. The shim can't be reused.
    Otherwise,
}

/// Ends and deletes the container: through its shim if the shim answers, else without it.
///
/// # Errors
/// When the container can't be ended.
async fn end_container(shared: &Shared, record: &Record, shim: &Found) -> Result<Ended, TaskError> {
    if fault::skipped("container") {
        return Ok(Ended::Otherwise);
    }
    let id = record.container_id.as_str();
    let failed = |doing| move |source| TaskError::Shim { doing, source };
    if let (Found::Alive(alive), Some(client)) = (shim, shim.client()) {
        let complete = async |refusal| refused::complete(shared, record, alive, refusal).await;
        match end_through(client, id).await {
            // The shim died during the call. What it left is handled as for any dead shim, below.
            Err(ShimError::Gone { .. }) => {}
            Err(error) => return complete(error).await,
            Ok(Known::Yes) => return Ok(Ended::ByItsShim),
            // A Create of this container may have been cut off, and its runtime may still be running.
            Ok(Known::No) => {
                runtime_done(shared, record, alive).await;
                match end_through(client, id).await {
                    Ok(Known::Yes) => return Ok(Ended::Otherwise),
                    Ok(Known::No) | Err(ShimError::Gone { .. }) => {}
                    Err(error) => return complete(error).await,
                }
            }
        }
    }
    if let Found::Hung(pidfd) = shim {
        if shared.pool.tasks_of(&record.shim) > 0 {
            // The containers of the shim's other tasks would end with the shim.
            let source = ShimError::Late { call: "Connect", after: shim::CONNECT };
            return Err(failed("end the container of a shim that has other tasks")(source));
        }
        // A hung shim holds the container until the shim is killed.
        pidfd.signal(libc::SIGKILL);
        let _ = tokio::time::timeout(KILL_GRACE, pidfd.ended()).await;
    }
    delete_alone(shared, record).await.map_err(failed("clean up after a dead shim"))?;
    Ok(Ended::Otherwise)
}

/// Deletes the container of a dead shim, after the end of any cleanup that an earlier plugin has begun for it. Such a
/// cleanup deletes any container and unmounts any root file system that has the attempt's names (containerd,
/// `runtime/v2/runc/manager`, `Stop`), and the attempt's next start has the same names.
///
/// # Errors
/// When the container can't be deleted.
pub(super) async fn delete_alone(shared: &Shared, record: &Record) -> Result<Option<Exit>, ShimError> {
    // For gVisor this check does not work: a living sandbox has the container's name among its arguments, too.
    if !record.gvisor {
        let at_work = || any(process::all()?.into_iter(), |pid| interrupt::is_called_for(pid, &record.container_id));
        outlast(record, RUNTIME_GRACE, at_work).await;
        if at_work().unwrap_or(true) {
            interrupt::kill_called_for(&record.container_id);
            outlast(record, KILL_GRACE, at_work).await;
        }
    }
    shared.delete_dead(record).await
}

/// Waits until no runtime that the shim has called for this container is running any more, and kills those that take
/// too long. A plugin that dies during a Create leaves such a runtime behind. It may still create the container, or was
/// cut off while it created the container's process.
async fn runtime_done(shared: &Shared, record: &Record, shim: &Shim) {
    let cgroup = CgroupPath::recorded(&record.cgroup);
    // Of a shared shim's processes, only those count that were called for this container and are still in the shim's
    // own cgroup.
    let alone = shim.is_held_once();
    let at_work = || {
        if record.gvisor {
            return runsc_is_at_work(record);
        }
        any(descendants(shim.pid())?.into_iter().skip(1), |pid| {
            if alone {
                return shared.cgroups.holds(&cgroup, pid).map(|holds| !holds);
            }
            Ok(shared.cgroups.are_together(pid, shim.pid())? && interrupt::is_called_for(pid, &record.container_id)?)
        })
    };
    outlast(record, RUNTIME_GRACE, at_work).await;
    if at_work().unwrap_or(true) {
        interrupt::kill_runtime(shim.pid(), &record.container_id);
        outlast(record, KILL_GRACE, at_work).await;
    }
}

/// Does the condition hold for any of these processes?
fn any(mut pids: impl Iterator<Item = u32>, holds: impl Fn(u32) -> io::Result<bool>) -> io::Result<bool> {
    pids.find_map(|pid| holds(pid).map(|holds| holds.then_some(())).transpose()).transpose().map(|one| one.is_some())
}

/// Waits while a runtime is running, but at most `limit`. Returns true if one was running. If the check fails, a
/// runtime is assumed to be running.
async fn outlast(record: &Record, limit: Duration, at_work: impl Fn() -> io::Result<bool>) -> bool {
    let deadline = tokio::time::Instant::now() + limit;
    let mut was = false;
    loop {
        let problem = match at_work() {
            Ok(false) => break,
            Ok(true) => "it is still running".to_owned(),
            Err(error) => format!("its processes can't be inspected: {error}"),
        };
        was = true;
        if tokio::time::Instant::now() > deadline {
            tracing::warn!(task = %record.task_id, problem, "a runtime may still be running; no longer waiting for it");
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    was
}

/// Is a runsc creating this container? All processes of the host are searched, because a shim that gives up kills the
/// process that it has called, but not that process's children.
fn runsc_is_at_work(record: &Record) -> io::Result<bool> {
    any(process::all()?.into_iter(), |pid| {
        let read = |file: &str| process::unless_vanished(fs::read(format!("/proc/{pid}/{file}")));
        let Some(line) = read("cmdline")? else { return Ok(false) };
        if !line.split(|byte| *byte == 0).any(|word| word == record.container_id.as_str().as_bytes()) {
            return Ok(false);
        }
        Ok(read("comm")?.is_some_and(|name| gvisor::is_at_work(&String::from_utf8_lossy(&name), &line)))
    })
}

/// Waits for a runsc that the shim had called just before the shim was ended, and deletes the container that this runsc
/// has created.
async fn end_late(shared: &Shared, record: &Record) -> Result<(), TaskError> {
    if outlast(record, KILL_GRACE, || runsc_is_at_work(record)).await {
        let failed = |source| TaskError::Shim { doing: "clean up after a dead shim", source };
        shared.delete_dead(record).await.map_err(failed)?;
    }
    Ok(())
}

/// Kills all processes in the task's cgroup. No process may outlive the task's teardown, and those of a runtime that
/// was cut off belong to no container.
pub(super) async fn empty_cgroup(shared: &Shared, record: &Record) -> Result<(), TaskError> {
    let cgroup = CgroupPath::recorded(&record.cgroup);
    let deadline = tokio::time::Instant::now() + KILL_GRACE;
    while shared.cgroups.kill(&cgroup)? > 0 && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// Does the shim have the container?
enum Known {
    Yes,
    No,
}

/// Kills the container and deletes it through its shim.
///
/// # Errors
/// When the shim or its runtime refuses, does not answer in time, or dies.
async fn end_through(client: &Client, id: &str) -> Result<Known, ShimError> {
    let alive = match client.is_alive(id).await {
        Err(error) if error.is_not_found() => return Ok(Known::No),
        other => other?,
    };
    // A container that was created and never started could be deleted without a kill, but that takes a shim two
    // seconds.
    if alive {
        client.kill(id, libc::SIGKILL, Kill::All).await?;
        fault::point("undo.killed");
        match tokio::time::timeout(KILL_GRACE, client.wait(id)).await {
            Ok(Err(error)) if !error.is_not_found() => return Err(error),
            Ok(_) => {}
            Err(_) => return Err(ShimError::Late { call: "Wait", after: KILL_GRACE }),
        }
    }
    client.delete(id).await?;
    Ok(Known::Yes)
}

/// Ends the shim of a container that is gone, unless other tasks hold it.
async fn end_shim(shared: &Shared, record: &Record, shim: Found) -> Result<(), TaskError> {
    if fault::skipped("shim") {
        return Ok(());
    }
    let dir = shared.settings.places.shim(&record.shim);
    let gone = match shim {
        Found::Alive(shim) => shared.pool.end(&record.alloc_id, shim).await,
        Found::Hung(pidfd) => shim::end_hung(&dir, &pidfd).await,
        Found::Gone | Found::Unknown(_) => shim::end_stray(&dir).await,
    };
    if gone { Ok(()) } else { Err(shim_stays()) }
}

/// Releases a shim that holds an ended container which it can't delete. The shim is ended with the last task that holds
/// it.
async fn discard_shim(shared: &Shared, shim: Shim) -> Result<(), TaskError> {
    if shared.pool.discard(shim).await { Ok(()) } else { Err(shim_stays()) }
}

fn shim_stays() -> TaskError {
    TaskError::Shim { doing: "end the shim", source: ShimError::Stays }
}

/// Removes everything of a task. If that fails, the teardown is queued and retried in the background, since Nomad does
/// not repeat its call.
///
/// # Errors
/// The error of the first attempt.
pub async fn undo_or_keep(claim: Claim, shim: Found) -> Result<(), TaskError> {
    let outcome = undo(claim.shared(), claim.record(), shim).await;
    settle(claim, outcome.is_ok());
    outcome
}

/// Ends the container and unmounts the sources of its mounts. The rest is removed in the background, by a limited
/// number of teardowns at a time. Meanwhile the task is a pending teardown: a new attempt waits for it, and after a
/// crash the next plugin finds its record.
///
/// # Errors
/// When the container can't be ended, or the sources of its mounts can't be unmounted.
pub async fn undo_soon(shared: &Arc<Shared>, record: &Record, shim: Found) -> Result<(), TaskError> {
    let mut claim = Claim::new(shared, record);
    let (released, answer) = match release(shared, record, shim).await {
        Ok(released) => released,
        Err(error) => {
            settle(claim, false);
            return Err(error);
        }
    };
    claim.is_clearing();
    // A caller that destroys tasks faster than they can be torn down waits here.
    let _ = shared.clearing.subscribe().wait_for(|count| *count <= BACKLOG).await;
    // A panic in the background drops the guard, which queues the teardown again.
    tokio::spawn(caught("the teardown of a task", async move {
        let (shared, record) = (claim.shared(), claim.record());
        // The teardown's kernel locks and disk writes would delay starts.
        tokio::select! {
            () = shared.pool.calm(BREATH, PATIENCE) => {}
            () = shared.hurry.notified() => {}
        }
        logs::written_out(&shared.settings.places, &record.container_id).await;
        let room = shared.teardowns.acquire().await;
        fault::point("undo.clearing");
        let outcome = released.finish(shared, record).await;
        drop(room);
        settle(claim, outcome.is_ok());
    }));
    answer
}

/// Reports the outcome of a teardown to its guard. If the teardown failed, it is retried in the background.
fn settle(claim: Claim, is_gone: bool) {
    let (shared, id) = (claim.shared().clone(), claim.record().task_id.clone());
    claim.settle(is_gone);
    if is_gone {
        return;
    }
    tokio::spawn(caught("the retry of a task's teardown", async move {
        for pause in RETRIES {
            tokio::time::sleep(pause).await;
            // Otherwise another caller runs the teardown, such as a new attempt of the task, or it has succeeded.
            let Some(claim) = shared.take_leftover(&id) else { return };
            let shim = find_shim(&shared, claim.record()).await;
            let is_gone = undo(&shared, claim.record(), shim).await.is_ok();
            claim.settle(is_gone);
            if is_gone {
                return;
            }
        }
    }));
}

/// Finds the shim of a record and connects to it.
pub async fn find_shim(shared: &Shared, record: &Record) -> Found {
    if record.is_current() { shared.pool.launcher().adopt(&record.shim).await } else { Found::Gone }
}
