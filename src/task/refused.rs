//! Ends a container whose shim lives and answers, but whose runtime refuses to kill or to delete it.
//!
//! A shim kills the runtime that it has called when the connection of its caller breaks. A plugin that dies while a
//! runtime deletes a container leaves one whose state the runtime has removed, wholly or in part, and which the shim
//! still holds. Each further Delete is refused then: crun says "cannot open directory" (runc says "does not exist", which
//! shims take for success: containerd, `cmd/containerd-shim-runc-v2/process/init.go`, `delete`). The same is left by a
//! runtime that the OOM killer has ended.
//!
//! A shim also hangs with a runtime that hangs, and answers nothing about the container meanwhile.
//!
//! What is true is asked of the kernel, the shim and the runtime's state directory; what is left is removed here.

use std::{fs, io, path::Path, time::Duration};

use super::{
    Record, TaskError, interrupt,
    shared::Shared,
    undo::{Ended, KILL_GRACE, empty_cgroup},
};
use crate::{
    fault,
    process::PidFd,
    rootfs::RootfsError,
    shim::{Client, Shim, ShimError},
};

/// A shim that was killed is seen to be dead within milliseconds.
const SHIM_DEATH: Duration = Duration::from_secs(5);

/// Completes the end of a container after `refusal`, the answer of its shim to State, Kill or Delete. Other containers of
/// a shared shim are not affected.
///
/// # Errors
/// `refusal` when it is not one that can be completed, or the container does not end. Others when a shared shim hangs, or
/// what is left can't be removed.
pub(super) async fn complete(
    shared: &Shared,
    record: &Record,
    shim: &Shim,
    refusal: ShimError,
) -> Result<Ended, TaskError> {
    let failed = |source| TaskError::Shim { doing: "end the container", source };
    if fault::skipped("delete-completed") {
        return Err(failed(refusal));
    }
    match refusal {
        ShimError::Refused { .. } | ShimError::NotUnderstood { .. } => tracing::warn!(
            task = %record.task_id, error = %crate::chain(&refusal),
            "the runtime refuses to end the container; the driver ends it and removes what is left of it"
        ),
        ShimError::Late { .. } => {
            tracing::warn!(
                task = %record.task_id, error = %crate::chain(&refusal),
                "the shim does not end the container in time; the driver kills the runtime that the shim has called"
            );
            interrupt::kill_runtime(shim.pid(), &record.container_id);
            if shared.pool.tasks_of(shim.id()) <= 1 {
                return end_with_shim(shared, record, shim).await;
            }
            // One that is shared answers again, now that the runtime is gone. One that hangs itself is left to the others.
        }
        _ => return Err(failed(refusal)),
    }
    let (client, id) = (shim.client(), record.container_id.as_str());
    if is_alive(client, id).await.map_err(failed)? != Some(false) {
        kill_processes(shared, record).await?;
        match tokio::time::timeout(KILL_GRACE, client.wait(id)).await {
            Ok(Err(error)) if !error.is_not_found() => return Err(failed(error)),
            Ok(_) => {}
            Err(_) => return Err(failed(refusal)),
        }
    }
    // The refusal may have been that of a Kill, or a passing one.
    match client.delete(id).await {
        Ok(()) => return Ok(Ended::ByItsShim),
        Err(ShimError::Refused { .. } | ShimError::NotUnderstood { .. }) => {}
        Err(ShimError::Late { .. }) => interrupt::kill_runtime(shim.pid(), &record.container_id),
        Err(error) => return Err(failed(error)),
    }
    // Only a shim of another kind knows how its containers are removed, and it has no other container.
    if record.shim_program.is_some() {
        return end_with_shim(shared, record, shim).await;
    }
    kill_processes(shared, record).await?;
    remove_runtime_state(shared, record).await?;
    Ok(Ended::InSpiteOfItsShim)
}

/// Kills a shim that has no other task, with all that it has called, and has what it leaves removed.
async fn end_with_shim(shared: &Shared, record: &Record, shim: &Shim) -> Result<Ended, TaskError> {
    let failed = |source| TaskError::Shim { doing: "clean up after a dead shim", source };
    let called = interrupt::all_below(shim.pid()).unwrap_or_else(|error| {
        tracing::warn!(task = %record.task_id, %error, "what a shim has called can't be found, and may outlive it");
        Vec::new()
    });
    shim.kill_process();
    called.iter().for_each(|process| process.signal(libc::SIGKILL));
    let mut death = shim.watch();
    let seen = tokio::time::timeout(SHIM_DEATH, death.wait_for(|ended| *ended)).await;
    seen.map_err(|_| failed(ShimError::Late { call: "SIGKILL", after: SHIM_DEATH }))?.ok();
    shared.delete_dead(record).await.map_err(failed)?;
    Ok(Ended::Otherwise)
}

/// Does the container's process live? None when the shim does not hold the container.
async fn is_alive(client: &Client, id: &str) -> Result<Option<bool>, ShimError> {
    match client.is_alive(id).await {
        Ok(alive) => Ok(Some(alive)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Kills the container's processes without its runtime.
///
/// # Errors
/// When they can't be found.
async fn kill_processes(shared: &Shared, record: &Record) -> Result<(), TaskError> {
    let init = record.state.run().and_then(|run| PidFd::of(&run.process).ok());
    if let Some(init) = init {
        init.signal(libc::SIGKILL);
    }
    empty_cgroup(shared, record).await
}

/// Removes what the runtime still knows of a container without processes: by the runtime itself, which also calls the
/// hooks for a container's end, and where that fails by hand.
async fn remove_runtime_state(shared: &Shared, record: &Record) -> Result<(), RootfsError> {
    let root = shared.settings.places.runtime_state(&record.runtime, &record.namespace);
    let state = root.join(record.container_id.as_str());
    if !state.try_exists().map_err(file("look at", &state))? {
        return Ok(());
    }
    if let Err(error) = shared.delete_by_runtime(&record.runtime, &root, &record.container_id).await {
        tracing::warn!(
            task = %record.task_id, error = %crate::chain(&error),
            "the runtime does not delete a container without processes; the driver removes its state"
        );
    }
    match fs::remove_dir_all(&state) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(file("remove", &state)(source)),
        _ => Ok(()),
    }
}

fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RootfsError {
    let path = path.to_owned();
    move |source| RootfsError::File { doing, path, source }
}
