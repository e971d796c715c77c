//! Undoing a task: every step for itself, in the reverse order of making, harmless when there is nothing to undo.
//!
//! A failed start, a destroy and the remains of a crashed plugin all come through here, so there is one list of what
//! there is to undo, and the tests of any of them guard it.

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

/// Nothing survives SIGKILL longer than this but a process that hangs in the kernel (NFS, a dying disk).
pub const KILL_GRACE: Duration = Duration::from_secs(30);
/// What a runtime makes whose task is to be undone is of no use: so long it may go on, and then it is killed.
const RUNTIME_GRACE: Duration = Duration::from_secs(5);
/// Between two looks at what is about to be gone.
const LOOK: Duration = Duration::from_millis(5);
/// Who destroys a task often starts the next one at once: clearing away waits so long for that,
const BREATH: Duration = Duration::from_millis(3);
/// and so long for it to be over.
const PATIENCE: Duration = Duration::from_millis(40);
/// So many tasks may wait to be cleared away.
const BACKLOG: usize = 64;
/// When a cleanup that failed is tried again.
pub const RETRIES: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(10), Duration::from_secs(60)];

/// Removes everything of a task. Goes on past failures and reports the first; the record stays until all is done, so
/// that another try knows what to look for.
///
/// # Errors
/// The first step that failed.
pub async fn undo(shared: &Shared, record: &Record, shim: Found) -> Result<(), TaskError> {
    // What of the mounts could not be undone is tried again with the rest.
    let (released, _mounts) = release(shared, record, shim).await?;
    logs::written_out(&shared.settings.places, &record.container_id).await;
    released.finish(shared, record).await
}

/// A task whose container is gone, and with it every process and the job's own mounts: what is left is only ours.
pub struct Released {
    /// Fit for the next task, once nothing of this one is left: until then the record names it.
    shim: Option<Shim>,
    outcome: Outcome,
}

/// The first failure of several steps.
struct Outcome(Result<(), TaskError>);

impl Outcome {
    fn note(&mut self, record: &Record, step: &'static str, outcome: Result<(), TaskError>) {
        if let Err(error) = outcome {
            tracing::warn!(task = %record.task_id, step, error = %crate::chain(&error), "undo");
            if self.0.is_ok() {
                self.0 = Err(error);
            }
        }
    }
}

type Mounts = Result<(), TaskError>;

async fn release(shared: &Shared, record: &Record, shim: Found) -> Result<(Released, Mounts), TaskError> {
    let mut outcome = Outcome(Ok(()));
    if let Found::Unknown(source) = shim {
        // It may hold the container, so that nobody else may end it.
        let (id, path) = (record.shim.clone(), shared.settings.places.shim(&record.shim));
        let source = ShimError::File { id, doing: "look for", path, source };
        return Err(TaskError::Shim { doing: "find the task's shim", source });
    }
    // A hold from an earlier try would be taken for that of another task that shares the shim.
    shared.hold_shim(&record.task_id, None);
    // Without its shim and bundle a living container could never be ended: then everything else stays, for another try.
    let ended = match end_container(shared, record, &shim).await {
        Ok(ended) => ended,
        Err(error) => {
            tracing::warn!(task = %record.task_id, step = "container", error = %crate::chain(&error), "undo");
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
        // As other runtimes' `delete` does it, which an ended sandbox is spared. What stays is told of below.
        outcome.note(record, "processes", empty_cgroup(shared, record).await);
        let cgroup = CgroupPath::recorded(&record.cgroup);
        if let Err(error) = tokio::task::block_in_place(|| shared.cgroups.remove(&cgroup)) {
            tracing::debug!(task = %record.task_id, error = %crate::chain(&error), "its cgroup is removed later");
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
        tracing::warn!(task = %record.task_id, step = "mounts", error = %crate::chain(error), "undo");
    });
    Ok((Released { shim, outcome }, unmounted))
}

impl Released {
    /// Removes the rest: the root file system, the bundle, the writable layer, the cgroup, the record; and gives the
    /// shim back.
    ///
    /// # Errors
    /// The first step that failed, here or before.
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
            // As long as a record names it, another try would end it, whoever has it by then.
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

/// Removes what is left of a container in runsc's state directory: of an ended one all of it, since runsc is not asked
/// to, and of others what one that was cut off would have removed.
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

/// Who has ended the container?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// Its shim, which is as good as new.
    ByItsShim,
    /// The driver, after the shim or its runtime had refused to. The shim lives and holds the container for ever.
    InSpiteOfItsShim,
    /// Somebody else, or nobody had it.
    Otherwise,
}

async fn end_container(shared: &Shared, record: &Record, shim: &Found) -> Result<Ended, TaskError> {
    if fault::skipped("container") {
        return Ok(Ended::Otherwise);
    }
    let id = record.container_id.as_str();
    let failed = |doing| move |source| TaskError::Shim { doing, source };
    if let (Found::Alive(alive), Some(client)) = (shim, shim.client()) {
        let complete = async |refusal| refused::complete(shared, record, alive, refusal).await;
        match end_through(client, id).await {
            // It died under our hands: what it left is the dead-shim case.
            Err(ShimError::Gone { .. }) => {}
            Err(error) => return complete(error).await,
            Ok(Known::Yes) => return Ok(Ended::ByItsShim),
            // A Create that was cut off, and may still be at work.
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
            // They would end with it.
            let source = ShimError::Late { call: "Connect", after: shim::CONNECT };
            return Err(failed("end the container of a shim that has other tasks")(source));
        }
        // It has the container in its hands and does not let go of it otherwise.
        pidfd.signal(libc::SIGKILL);
        let _ = tokio::time::timeout(KILL_GRACE, pidfd.ended()).await;
    }
    delete_alone(shared, record).await.map_err(failed("clean up after a dead shim"))?;
    Ok(Ended::Otherwise)
}

/// Deletes the container of a dead shim, when no clean-up that an earlier plugin has begun for it is at work any more. Such a
/// clean-up deletes whatever container and unmounts whatever root file system has the names (containerd,
/// `runtime/v2/runc/manager`, `Stop`), and those of the attempt's next start are the same.
///
/// # Errors
/// When the container can't be deleted.
pub(super) async fn delete_alone(shared: &Shared, record: &Record) -> Result<Option<Exit>, ShimError> {
    // A living sandbox has the container's name in its arguments, too.
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

/// Waits until no runtime that the shim has called is at work any more: a plugin that died in the middle of a Create
/// leaves one behind, which may go on to make the container, or was cut off with its process half made.
async fn runtime_done(shared: &Shared, record: &Record, shim: &Shim) {
    let cgroup = CgroupPath::recorded(&record.cgroup);
    // Of a shim that others share, only what was called for this container and is still where the shim itself is.
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

/// Does the condition hold for one of these processes?
fn any(mut pids: impl Iterator<Item = u32>, holds: impl Fn(u32) -> io::Result<bool>) -> io::Result<bool> {
    pids.find_map(|pid| holds(pid).map(|holds| holds.then_some(())).transpose()).transpose().map(|one| one.is_some())
}

/// Waits while a runtime is at work, though not for ever: true when one was. Where that can't be told, one may be.
async fn outlast(record: &Record, limit: Duration, at_work: impl Fn() -> io::Result<bool>) -> bool {
    let deadline = tokio::time::Instant::now() + limit;
    let mut was = false;
    loop {
        let problem = match at_work() {
            Ok(false) => break,
            Ok(true) => "it does not come to an end".to_owned(),
            Err(error) => format!("its processes can't be looked at: {error}"),
        };
        was = true;
        if tokio::time::Instant::now() > deadline {
            tracing::warn!(task = %record.task_id, problem, "a runtime may be at work and is not waited for");
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    was
}

/// Is a runsc making this container, wherever it is? A shim that gives up kills what it has called, and not what that had
/// called.
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

/// Ends what a runsc has made that its shim had called just before it was ended itself, when it is done.
async fn end_late(shared: &Shared, record: &Record) -> Result<(), TaskError> {
    if outlast(record, KILL_GRACE, || runsc_is_at_work(record)).await {
        let failed = |source| TaskError::Shim { doing: "clean up after a dead shim", source };
        shared.delete_dead(record).await.map_err(failed)?;
    }
    Ok(())
}

/// Nothing of a task may outlive its undoing: what a runtime that was cut off has half made belongs to no container.
pub(super) async fn empty_cgroup(shared: &Shared, record: &Record) -> Result<(), TaskError> {
    let cgroup = CgroupPath::recorded(&record.cgroup);
    let deadline = tokio::time::Instant::now() + KILL_GRACE;
    while shared.cgroups.kill(&cgroup)? > 0 && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// Did the shim know the container?
enum Known {
    Yes,
    No,
}

async fn end_through(client: &Client, id: &str) -> Result<Known, ShimError> {
    let alive = match client.is_alive(id).await {
        Err(error) if error.is_not_found() => return Ok(Known::No),
        other => other?,
    };
    // One that was created and never started could be deleted as it is; that takes shims two seconds, though.
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

/// Lets go of a shim that holds an ended container which it can't delete. It is ended with the last task that holds it.
async fn discard_shim(shared: &Shared, shim: Shim) -> Result<(), TaskError> {
    if shared.pool.discard(shim).await { Ok(()) } else { Err(shim_stays()) }
}

fn shim_stays() -> TaskError {
    TaskError::Shim { doing: "end the shim", source: ShimError::Stays }
}

/// Undoes, and where that fails keeps the task in mind and tries again in the background: Nomad never asks twice.
///
/// # Errors
/// What failed at the first try.
pub async fn undo_or_keep(claim: Claim, shim: Found) -> Result<(), TaskError> {
    let outcome = undo(claim.shared(), claim.record(), shim).await;
    settle(claim, outcome.is_ok());
    outcome
}

/// Ends the container and lets go of all that is not ours; the rest is removed in the background, by so many at a time.
/// Meanwhile the task is a leftover that somebody is at: a new attempt waits for it, and a crash leaves its record.
///
/// # Errors
/// When its container can't be ended, or the job's own mounts stay.
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
    // Whoever makes tasks faster than they can be cleared away waits here.
    let _ = shared.clearing.subscribe().wait_for(|count| *count <= BACKLOG).await;
    // A panic in it drops the claim, and the task is undone again.
    tokio::spawn(caught("the teardown of a task", async move {
        let (shared, record) = (claim.shared(), claim.record());
        // Its locks and disk writes would be in the way of starts.
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

fn settle(claim: Claim, is_gone: bool) {
    let (shared, id) = (claim.shared().clone(), claim.record().task_id.clone());
    claim.settle(is_gone);
    if is_gone {
        return;
    }
    tokio::spawn(caught("another teardown of a task", async move {
        for pause in RETRIES {
            tokio::time::sleep(pause).await;
            // Somebody else took it: a new attempt of the task, or its destroy.
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

/// The shim of a record, if it still lives.
pub async fn find_shim(shared: &Shared, record: &Record) -> Found {
    if record.is_current() { shared.pool.launcher().adopt(&record.shim).await } else { Found::Gone }
}
