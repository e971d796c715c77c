//! Breaks off a start while its runtime is at work: StopTask and DestroyTask do not wait for a runtime that hangs.
//!
//! A shim does not give up a runtime that it has called, and answers nothing about the container meanwhile. So the runtime
//! is killed, which the shim takes for a failed Create, and the start is undone as any other that failed.

use std::{fs, io, pin::pin, time::Duration};

use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::{TaskError, plan::Plan};
use crate::{
    ids::ContainerId,
    process::{self, PidFd, descendants, unless_vanished},
    shim::{Shim, ShimError},
};

/// A create takes 10 to 30 ms, and some hundred on a busy machine: one that is nearly done is not killed.
const CREATE_GRACE: Duration = Duration::from_secs(1);
/// A shim whose runtime is dead answers in milliseconds.
const SHIM_ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// Between two looks for the runtime, which may not have been called yet.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Waits for the part of a start that the shim has in its hands, and breaks it off when the task is stopped.
///
/// # Errors
/// `Stopped` when it was broken off; its own otherwise. All that was made is still to be undone then.
pub(super) async fn unless_stopped<T>(
    starting: impl Future<Output = Result<T, TaskError>>,
    stop: &CancellationToken,
    plan: &Plan<'_>,
    shim: &Shim,
) -> Result<T, TaskError> {
    let mut starting = pin!(starting);
    tokio::select! {
        outcome = &mut starting => {
            if matches!(outcome, Err(TaskError::Shim { source: ShimError::Late { .. }, .. })) {
                kill_runtime(shim.pid(), &plan.container_id);
            }
            return outcome;
        }
        () = stop.cancelled() => {}
    }
    let task = &plan.request.task_id;
    let stopped = |error: TaskError| {
        tracing::debug!(%task, error = crate::chain(&error), "the start that was broken off ended with this error");
        TaskError::Stopped(task.clone())
    };
    if let Ok(outcome) = timeout(CREATE_GRACE, &mut starting).await {
        return outcome.map_err(stopped);
    }
    tracing::warn!(%task, "the task is stopped, and the runtime that makes its container is killed");
    let deadline = Instant::now() + SHIM_ANSWER_DEADLINE;
    while Instant::now() < deadline {
        kill_runtime(shim.pid(), &plan.container_id);
        if let Ok(outcome) = timeout(POLL_INTERVAL, &mut starting).await {
            return outcome.map_err(stopped);
        }
    }
    // The shim itself hangs. Others may have their tasks in one that is shared.
    if shim.is_held_once() {
        tracing::warn!(%task, shim = shim.id(), "the shim does not answer either, and is killed");
        shim.kill_process();
    }
    Err(TaskError::Stopped(task.clone()))
}

/// Kills the runtimes that a shim has called for one container, with all that they have started. This includes the
/// container's own first process; processes of other containers are not affected. What could not be found is logged: the
/// caller sees by the shim's answer whether the runtime has ended.
pub(super) fn kill_runtime(shim: u32, container: &ContainerId) {
    if let Err(error) = try_to_kill_runtime(shim, container) {
        tracing::warn!(%container, %error, "the processes of a runtime that is to be killed can't all be found");
    }
}

fn try_to_kill_runtime(shim: u32, container: &ContainerId) -> io::Result<()> {
    let mut called = Vec::new();
    for pid in descendants(shim)?.into_iter().skip(1) {
        if is_called_for(pid, container)? {
            called.extend(descendants(pid)?);
        }
    }
    still_below(shim, called)?.iter().for_each(|process| process.signal(libc::SIGKILL));
    Ok(())
}

/// Kills all processes of this host that were called with a container's name.
pub(super) fn kill_called_for(container: &ContainerId) {
    let is_called = |pid: u32| is_called_for(pid, container).unwrap_or(false);
    // Asked again when its descriptor is had: a number may have been given to another process.
    let opened = |pid: u32| PidFd::open(pid).ok().filter(|_| is_called(pid));
    match process::all() {
        Ok(pids) => pids.into_iter().filter(|pid| is_called(*pid)).filter_map(opened).for_each(|process| {
            process.signal(libc::SIGKILL);
        }),
        Err(error) => {
            tracing::warn!(%container, %error, "the processes that were called for a container can't be found");
        }
    }
}

/// All processes below a shim, for the time when it is gone.
///
/// # Errors
/// When they can't be found.
pub(super) fn all_below(shim: u32) -> io::Result<Vec<PidFd>> {
    still_below(shim, descendants(shim)?.into_iter().skip(1).collect())
}

/// Opens those of `pids` that are descendants of a shim. A pid may have been reused since it was listed, so that it is
/// looked for once more when its process is open.
fn still_below(shim: u32, pids: Vec<u32>) -> io::Result<Vec<PidFd>> {
    let mut opened = Vec::new();
    for pid in pids {
        opened.extend(unless_vanished(PidFd::open(pid))?.map(|process| (pid, process)));
    }
    let still = descendants(shim)?;
    Ok(opened.into_iter().filter(|(pid, _)| still.contains(pid)).map(|(_, process)| process).collect())
}

/// Was a process called with a container's name? Runtimes have it as their last argument, wrappers hand it on.
///
/// # Errors
/// When that can't be told. A process that has ended was not.
pub(super) fn is_called_for(pid: u32, container: &ContainerId) -> io::Result<bool> {
    let line = unless_vanished(fs::read(format!("/proc/{pid}/cmdline")))?.unwrap_or_default();
    Ok(line.split(|byte| *byte == 0).any(|word| word == container.as_str().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::TaskId;
    use std::process::Command;

    /// Of two runtimes below one shim only the one for this container is killed, and what it has started with it.
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
        until("two runtimes with a child each", 4).await;
        // The shim of this test has both names in its own line, and is no runtime.
        kill_runtime(shim.id(), &mine);
        until("the other one and its child stay", 2).await;
        kill_runtime(shim.id(), &other);
        shim.wait().expect("it has nothing left to wait for");
    }
}
