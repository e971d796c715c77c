//! Runs file operations that a dead file system (NFS, FUSE, a CSI volume) may block forever. Each operation runs on a
//! thread of its own, so that neither tokio's worker threads nor the threads that tear tasks down wait for it.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use super::TaskError;
use crate::ids::TaskId;

/// The maximum number of such threads. A thread that hangs keeps its permit until its file system answers.
const THREADS_MAX: usize = 128;
/// A file system that has not answered for this long is considered dead.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

static THREAD_PERMITS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(THREADS_MAX)));

/// Runs `work` on a thread of its own, and waits until it is done, the task is stopped, or the timeout has passed.
/// In the last two cases the work continues on its thread, and its result is dropped.
///
/// # Errors
/// `Stopped` when the task is stopped. `HostFilesUnreachable` when the file system does not answer, when too many
/// earlier calls hang, or when no thread can be started.
pub(super) async fn run<T: Send + 'static>(
    task: &TaskId,
    stop: &CancellationToken,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, TaskError> {
    let Ok(permit) = THREAD_PERMITS.clone().try_acquire_owned() else {
        return Err(TaskError::HostFilesUnreachable {
            id: task.clone(),
            problem: format!("{THREADS_MAX} file operations hang already"),
        });
    };
    let (answer, done) = oneshot::channel();
    let thread = std::thread::Builder::new().name("volumes".to_owned()).spawn(move || {
        // The receiver is gone if the caller no longer waits.
        let _ = answer.send(work());
        drop(permit);
    });
    if let Err(error) = thread {
        return Err(TaskError::HostFilesUnreachable {
            id: task.clone(),
            problem: format!("no thread could be started: {error}"),
        });
    }
    tokio::select! {
        outcome = tokio::time::timeout(ANSWER_TIMEOUT, done) => match outcome {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(_)) => {
                let problem = "the thread that opens them panicked".to_owned();
                Err(TaskError::HostFilesUnreachable { id: task.clone(), problem })
            }
            Err(_) => {
                let problem = format!("a file system did not answer in {} s", ANSWER_TIMEOUT.as_secs());
                Err(TaskError::HostFilesUnreachable { id: task.clone(), problem })
            }
        },
        () = stop.cancelled() => Err(TaskError::Stopped(task.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_hangs_is_left_when_the_task_is_stopped() {
        let task = TaskId("a/b/1".to_owned());
        let stop = CancellationToken::new();
        assert_eq!(run(&task, &stop, || 7).await.expect("done"), 7);
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let stopper = stop.clone();
        let hanging = run(&task, &stop, move || held.recv().is_ok());
        let stopping = async move { stopper.cancel() };
        let (outcome, ()) = tokio::join!(hanging, stopping);
        assert!(matches!(outcome, Err(TaskError::Stopped(_))));
        drop(hold);
    }
}
