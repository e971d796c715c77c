//! Runtimes that still run for a container which is to be torn down: waiting for them, and killing those that take too
//! long.

use std::{fs, io, time::Duration};

use super::{
    Record,
    context::EngineContext,
    interrupt,
    undo::{KILL_GRACE, POLL_INTERVAL},
};
use crate::{
    gvisor,
    process::{self, descendants},
    shim::Shim,
};

/// How long a runtime may continue to create a container that is to be torn down. Then the runtime is killed, since the
/// container is of no use.
pub(super) const RUNTIME_GRACE: Duration = Duration::from_secs(5);

/// Waits until no runtime that the shim has called for this container is running any more, and kills those that take
/// too long. A plugin that dies during a Create leaves such a runtime behind. It may still create the container, or was
/// cut off while it created the container's process.
pub(super) async fn wait_for_runtime(context: &EngineContext, record: &Record, shim: &Shim) {
    let cgroup = &record.intent.cgroup;
    // The descendants of an unshared shim that are outside of the task's cgroup are runtimes. Of a shared shim's
    // descendants, those are runtimes that have this container's id as an argument and are still in the shim's cgroup.
    let is_unshared = shim.has_single_hold();
    let is_running = || {
        if record.intent.gvisor {
            return is_runsc_running(record);
        }
        any_process(descendants(shim.pid())?.into_iter().skip(1), |pid| {
            if is_unshared {
                return context.cgroups.contains(cgroup, pid).map(|holds| !holds);
            }
            Ok(context.cgroups.are_in_same_groups(pid, shim.pid())?
                && interrupt::has_container_arg(pid, &record.intent.container_id)?)
        })
    };
    wait_while_running(record, RUNTIME_GRACE, is_running).await;
    if is_running().unwrap_or(true) {
        interrupt::kill_runtime(shim.pid(), &record.intent.container_id);
        wait_while_running(record, KILL_GRACE, is_running).await;
    }
}

/// Says whether the condition holds for any of these processes.
pub(super) fn any_process(
    mut pids: impl Iterator<Item = u32>,
    holds: impl Fn(u32) -> io::Result<bool>,
) -> io::Result<bool> {
    pids.find_map(|pid| holds(pid).map(|holds| holds.then_some(())).transpose()).transpose().map(|one| one.is_some())
}

/// Waits while a runtime is running, but at most `limit`. Returns true if one was running. If the check fails, a
/// runtime is assumed to be running.
pub(super) async fn wait_while_running(
    record: &Record,
    limit: Duration,
    is_running: impl Fn() -> io::Result<bool>,
) -> bool {
    let deadline = tokio::time::Instant::now() + limit;
    let mut was_running = false;
    loop {
        let problem = match is_running() {
            Ok(false) => break,
            Ok(true) => "it is still running".to_owned(),
            Err(error) => format!("its processes can't be inspected: {error}"),
        };
        was_running = true;
        if tokio::time::Instant::now() > deadline {
            tracing::warn!(
                task = %record.intent.task_id, problem,
                "a runtime may still be running; no longer waiting for it"
            );
            break;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    was_running
}

/// Says whether a runsc is creating this container. All processes of the host are searched, because a shim that gives
/// up kills the process that it has called, but not that process's children.
pub(super) fn is_runsc_running(record: &Record) -> io::Result<bool> {
    any_process(process::all_pids()?.into_iter(), |pid| {
        let read = |file: &str| process::none_if_vanished(fs::read(format!("/proc/{pid}/{file}")));
        let Some(line) = read("cmdline")? else { return Ok(false) };
        if !line.split(|byte| *byte == 0).any(|arg| arg == record.intent.container_id.as_str().as_bytes()) {
            return Ok(false);
        }
        Ok(read("comm")?.is_some_and(|name| gvisor::is_creating_container(&String::from_utf8_lossy(&name), &line)))
    })
}
