//! Ends a container whose shim lives and answers, but whose runtime refuses to kill or to delete it.
//!
//! A shim kills the runtime that it has called when its caller's connection breaks. If a plugin dies while a runtime
//! deletes a container, the runtime has removed the container's state in whole or in part, and the shim still holds the
//! container. Then the runtime refuses each further Delete: crun says "cannot open directory" (runc says "does not
//! exist", which shims take for success: containerd, `cmd/containerd-shim-runc-v2/process/init.go`, `delete`). A
//! runtime that the OOM killer has ended leaves the same state.
//!
//! A shim also hangs together with a runtime that hangs, and answers no request about the container meanwhile.
//!
//! This module checks the kernel, the shim and the runtime's state directory for the container's actual state, and
//! removes what is left of the container.

use std::{io, path::Path, time::Duration};

use super::{
    Record, TaskError,
    context::EngineContext,
    interrupt,
    undo::{ContainerEnd, KILL_GRACE, kill_cgroup_processes},
};
use crate::{
    failpoint,
    files::remove_dir_all_if_exists,
    process::PidFd,
    rootfs::RootfsError,
    shim::{Client, Shim, ShimError},
};

/// How long the driver waits for the end of a shim that it has killed, which takes milliseconds.
const SHIM_DEATH_TIMEOUT: Duration = Duration::from_secs(5);

/// Ends a container after `refusal`, the error of its shim's State, Kill or Delete. Other containers of a shared shim
/// are not affected.
///
/// # Errors
/// `refusal` if this function can't help with such an error, or the container does not end. Another error if a shared
/// shim hangs, or what is left of the container can't be removed.
pub(super) async fn end_despite_refusal(
    context: &EngineContext,
    record: &Record,
    shim: &Shim,
    refusal: ShimError,
) -> Result<ContainerEnd, TaskError> {
    let failed = |source| TaskError::Shim { doing: "end the container", source };
    if failpoint::skip("delete-completed") {
        return Err(failed(refusal));
    }
    match refusal {
        ShimError::Refused { .. } | ShimError::Malformed { .. } => tracing::warn!(
            task = %record.intent.task_id, error = %crate::error_chain(&refusal),
            "the runtime refuses to end the container; the driver ends it and removes what is left of it"
        ),
        ShimError::TimedOut { .. } => {
            tracing::warn!(
                task = %record.intent.task_id, error = %crate::error_chain(&refusal),
                "the shim does not end the container in time; the driver kills the runtime that the shim has called"
            );
            interrupt::kill_runtime(shim.pid(), &record.intent.container_id);
            if context.pool.task_count(shim.id()) <= 1 {
                return end_with_shim(context, record, shim).await;
            }
            // A shared shim answers again, now that the runtime is gone. A shared shim that hangs itself is not killed,
            // because of its other containers.
        }
        _ => return Err(failed(refusal)),
    }
    let (client, id) = (shim.client(), record.intent.container_id.as_str());
    if is_alive(client, id).await.map_err(failed)? != Some(false) {
        kill_processes(context, record).await?;
        match tokio::time::timeout(KILL_GRACE, client.wait(id)).await {
            Ok(Err(error)) if !error.is_not_found() => return Err(failed(error)),
            Ok(_) => {}
            Err(_) => return Err(failed(refusal)),
        }
    }
    // A Delete may succeed now: the refusal may have been that of a Kill, or a temporary one.
    match client.delete(id).await {
        Ok(()) => return Ok(ContainerEnd::ByShim),
        Err(ShimError::Refused { .. } | ShimError::Malformed { .. }) => {}
        Err(ShimError::TimedOut { .. }) => interrupt::kill_runtime(shim.pid(), &record.intent.container_id),
        Err(error) => return Err(failed(error)),
    }
    // Only a runtime's own shim knows how to remove its containers. Such a shim has no other container.
    if record.intent.shim_program.is_some() {
        return end_with_shim(context, record, shim).await;
    }
    kill_processes(context, record).await?;
    remove_runtime_state(context, record).await?;
    Ok(ContainerEnd::DespiteShim)
}

/// Kills a shim that has no other task, with all processes that it has called, and deletes the container that it
/// leaves.
async fn end_with_shim(context: &EngineContext, record: &Record, shim: &Shim) -> Result<ContainerEnd, TaskError> {
    let failed = |source| TaskError::Shim { doing: "delete the container without its shim", source };
    let called = interrupt::open_descendants(shim.pid()).unwrap_or_else(|error| {
        tracing::warn!(
            task = %record.intent.task_id, %error,
            "could not list the processes of a shim; they may outlive it"
        );
        Vec::new()
    });
    shim.kill_process();
    called.iter().for_each(|process| process.signal(libc::SIGKILL));
    let mut death = shim.subscribe_exit();
    let seen = tokio::time::timeout(SHIM_DEATH_TIMEOUT, death.wait_for(|ended| *ended)).await;
    seen.map_err(|_| failed(ShimError::TimedOut { call: "SIGKILL", after: SHIM_DEATH_TIMEOUT }))?.ok();
    context.delete_dead(record).await.map_err(failed)?;
    Ok(ContainerEnd::Otherwise)
}

/// Says whether the container's process lives. `None` if the shim does not have the container.
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
/// When the processes of the container's cgroup can't be listed or killed.
async fn kill_processes(context: &EngineContext, record: &Record) -> Result<(), TaskError> {
    if let Some(run) = record.state.run() {
        // If the process can't be opened in this time, it is killed with its cgroup.
        let opened = tokio::time::timeout(SHIM_DEATH_TIMEOUT, PidFd::of_when_known(&run.process)).await;
        if let Ok(Some(init)) = opened {
            init.signal(libc::SIGKILL);
        }
    }
    kill_cgroup_processes(context, record).await
}

/// Removes the runtime's state of a container without processes. The runtime's own `delete` is tried first, since it
/// also calls the hooks for a container's end; if it fails, the driver removes the state directory.
async fn remove_runtime_state(context: &EngineContext, record: &Record) -> Result<(), RootfsError> {
    let root = context.settings.places.runtime_state(&record.intent.runtime, &record.intent.namespace);
    let state = root.join(record.intent.container_id.as_str());
    if !state.try_exists().map_err(file("look at", &state))? {
        return Ok(());
    }
    if let Err(error) = context.delete_by_runtime(&record.intent.runtime, &root, &record.intent.container_id).await {
        tracing::warn!(
            task = %record.intent.task_id, error = %crate::error_chain(&error),
            "the runtime does not delete a container without processes; the driver removes the container's state"
        );
    }
    remove_dir_all_if_exists(&state).map_err(file("remove", &state))
}

fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RootfsError {
    let path = path.to_owned();
    move |source| RootfsError::File { doing, path, source }
}
