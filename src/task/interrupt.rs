//! Cancels a start while its runtime is running, so that StopTask and DestroyTask do not wait for a runtime that hangs.
//!
//! A shim does not give up a runtime that it has called, and answers no request about the container meanwhile. So the
//! runtime is killed. For the shim that is a failed Create, and the start is undone like any other failed start.

use std::{fs, io, pin::pin, time::Duration};

use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::{TaskError, plan::Plan};
use crate::{
    ids::ContainerId,
    process::{self, PidFd, descendants, none_if_vanished},
    shim::{Shim, ShimError},
};

/// How long a Create may continue after the start was cancelled. A Create takes 10 to 30 ms, and some hundred on a busy
/// machine; one that is nearly done should not be killed.
const CREATE_GRACE: Duration = Duration::from_secs(1);
/// How long the driver waits for the answer of a shim whose runtime was killed. The answer takes milliseconds.
const SHIM_ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the driver looks for the runtime, which the shim may not have called yet.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Waits for `starting`, the part of a start that the shim carries out, and cancels it when the task is stopped.
///
/// # Errors
/// `Stopped` if the start was cancelled, else the error of `starting`. The caller has to undo what the start has made.
pub(super) async fn run_until_stopped<T>(
    starting: impl Future<Output = Result<T, TaskError>>,
    stop: &CancellationToken,
    plan: &Plan<'_>,
    shim: &Shim,
) -> Result<T, TaskError> {
    let mut starting = pin!(starting);
    tokio::select! {
        outcome = &mut starting => {
            if matches!(outcome, Err(TaskError::Shim { source: ShimError::TimedOut { .. }, .. })) {
                kill_runtime(shim.pid(), &plan.container_id);
            }
            return outcome;
        }
        () = stop.cancelled() => {}
    }
    let task = &plan.request.task_id;
    let stopped = |error: TaskError| {
        tracing::debug!(%task, error = crate::error_chain(&error), "a cancelled start ended with an error");
        TaskError::Stopped(task.clone())
    };
    if let Ok(outcome) = timeout(CREATE_GRACE, &mut starting).await {
        return outcome.map_err(stopped);
    }
    tracing::warn!(%task, "the task is stopped; killing the runtime that creates its container");
    let deadline = Instant::now() + SHIM_ANSWER_TIMEOUT;
    while Instant::now() < deadline {
        kill_runtime(shim.pid(), &plan.container_id);
        if let Ok(outcome) = timeout(POLL_INTERVAL, &mut starting).await {
            return outcome.map_err(stopped);
        }
    }
    // The shim itself hangs. It is killed, unless it has other tasks.
    if shim.has_single_hold() {
        tracing::warn!(%task, shim = %shim.id(), "the shim does not answer; killing it");
        shim.kill_process();
    }
    Err(TaskError::Stopped(task.clone()))
}

/// Kills the runtimes that a shim has called for one container, with all processes that they have started. This
/// includes the container's own first process. Processes of other containers are not affected. An error is only logged,
/// since the caller learns from the shim's answer whether the runtime has ended.
pub(super) fn kill_runtime(shim: u32, container: &ContainerId) {
    if let Err(error) = try_to_kill_runtime(shim, container) {
        tracing::warn!(%container, %error, "could not find all processes of a runtime that is to be killed");
    }
}

fn try_to_kill_runtime(shim: u32, container: &ContainerId) -> io::Result<()> {
    let mut called = Vec::new();
    for pid in descendants(shim)?.into_iter().skip(1) {
        if has_container_arg(pid, container)? {
            called.extend(descendants(pid)?);
        }
    }
    open_if_descendants(shim, called)?.iter().for_each(|process| process.signal(libc::SIGKILL));
    Ok(())
}

/// Kills all processes of this host that have a container's id among their arguments.
pub(super) fn kill_processes_of(container: &ContainerId) {
    let has_arg = |pid: u32| has_container_arg(pid, container).unwrap_or(false);
    // The arguments are checked again once the pidfd is open, since the pid may have been reused for another process.
    let opened = |pid: u32| PidFd::open(pid).ok().filter(|_| has_arg(pid));
    match process::all_pids() {
        Ok(pids) => pids.into_iter().filter(|pid| has_arg(*pid)).filter_map(opened).for_each(|process| {
            process.signal(libc::SIGKILL);
        }),
        Err(error) => {
            tracing::warn!(
                %container, %error,
                "could not list the processes of this host; runtimes of the container may still run"
            );
        }
    }
}

/// Opens all descendants of a shim, since they can't be found any more after the shim's end.
///
/// # Errors
/// When the processes can't be listed or opened.
pub(super) fn open_descendants(shim: u32) -> io::Result<Vec<PidFd>> {
    open_if_descendants(shim, descendants(shim)?.into_iter().skip(1).collect())
}

/// Opens those of `pids` that are descendants of a shim. A pid may have been reused since it was listed, so the
/// descendants are listed again once the pidfds are open.
fn open_if_descendants(shim: u32, pids: Vec<u32>) -> io::Result<Vec<PidFd>> {
    let mut opened = Vec::new();
    for pid in pids {
        opened.extend(none_if_vanished(PidFd::open(pid))?.map(|process| (pid, process)));
    }
    let still = descendants(shim)?;
    Ok(opened.into_iter().filter(|(pid, _)| still.contains(pid)).map(|(_, process)| process).collect())
}

/// Says whether a process has a container's id among its arguments. Runtimes have it as their last argument, and
/// wrappers pass it on. A process that has ended has no arguments.
///
/// # Errors
/// When the process's arguments can't be read.
pub(super) fn has_container_arg(pid: u32, container: &ContainerId) -> io::Result<bool> {
    let line = none_if_vanished(fs::read(format!("/proc/{pid}/cmdline")))?.unwrap_or_default();
    Ok(line.split(|byte| *byte == 0).any(|arg| arg == container.as_str().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::TaskId;
    use std::process::Command;

    /// Of two runtimes below one shim, only the one of this container is killed, together with the process that it has
    /// started.
    #[tokio::test]
    async fn only_the_runtime_of_this_container_is_killed() {
        let of = |task: &str| ContainerId::derive("alloc", task, &TaskId(task.to_owned()));
        let (mine, other) = (of("mine"), of("other"));
        let script = "sh -c 'sleep 600 & wait' create \"$0\" & sh -c 'sleep 600 & wait' create \"$1\" & wait";
        let mut shim = Command::new("sh").args(["-c", script, mine.as_str(), other.as_str()]).spawn().expect("spawned");
        let below = || descendants(shim.id()).expect("listed").into_iter().skip(1).collect::<Vec<_>>();
        let until = async |what: &str, count: usize| {
            let deadline = Instant::now() + Duration::from_secs(20);
            while below().len() != count {
                assert!(Instant::now() < deadline, "{what}: {:?}", below());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        until("two runtimes run, with one child each", 4).await;
        // The shim of this test has both ids in its own arguments, and must not be taken for a runtime.
        kill_runtime(shim.id(), &mine);
        until("the other runtime and its child remain", 2).await;
        kill_runtime(shim.id(), &other);
        shim.wait().expect("the shim's script has ended");
    }
}
