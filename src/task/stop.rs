//! StopTask and DestroyTask.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{
    Engine, RecordState, TaskError,
    context::TeardownState,
    engine::Slot,
    signal,
    undo::{RETRY_DELAYS, end_and_defer_teardown, find_shim, undo_or_retry},
};
use crate::{failpoint, ids::TaskId, shim::SignalTarget};

/// The flag `force` of `DestroyTask`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Force {
    /// A running task is killed first.
    Yes,
    /// The call is refused when the task runs.
    No,
}

impl Engine {
    /// Stops a task and returns when it has ended. The task's first process gets the signal `signal_name`; when that is
    /// empty or unknown, the signal that the image names, or else SIGTERM. After `timeout`, all processes of the task
    /// get SIGKILL. A task that has ended already or is unknown is no error, since Nomad would retry an error for
    /// minutes.
    ///
    /// # Errors
    /// When the task survives SIGKILL.
    pub async fn stop(&self, id: &TaskId, timeout: Duration, signal_name: &str) -> Result<(), TaskError> {
        self.cancel_start(id).await;
        let Ok(task) = self.find(id).await else {
            tracing::debug!(task = %id, "the task to be stopped is unknown");
            return Ok(());
        };
        if task.has_ended() {
            return Ok(());
        }
        let record = task.record();
        let number = match signal_name {
            "" => record.intent.stop_signal,
            name => signal::parse(name).unwrap_or_else(|error| {
                tracing::warn!(task = %id, %error, "the job's kill_signal is invalid; using the image's stop signal");
                record.intent.stop_signal
            }),
        };
        failpoint::kill_at("stop.begun");
        task.mark_stopping(&self.0.context, timeout);
        failpoint::kill_at("stop.marked");
        let mut exit = task.exit.subscribe();
        let Some(client) = &task.client else { return Err(TaskError::NotFound(id.clone())) };
        let name = record.intent.container_id.as_str();
        if !timeout.is_zero() {
            let signal_and_wait = async {
                if let Err(error) = client.kill(name, number, SignalTarget::Init).await {
                    tracing::warn!(task = %id, %error, "could not send the stop signal to the task");
                }
                failpoint::kill_at("stop.signalled");
                exit.wait_for(Option::is_some).await.is_ok()
            };
            // The timeout starts before the shim is asked to send the signal, so that a shim that hangs can't prolong
            // it.
            if tokio::time::timeout(timeout, signal_and_wait).await.is_ok() {
                return Ok(());
            }
        }
        let ended = task.kill_and_wait(&self.0.context, id, client).await;
        failpoint::kill_at("stop.killed");
        ended
    }

    /// Cancels a start that is still running, for example because a pull is slow or a runtime hangs, and waits for its
    /// end. Returns whether there was such a start.
    async fn cancel_start(&self, id: &TaskId) -> bool {
        let starting = match self.tasks().get(id) {
            Some(Slot::Starting { stop, done }) => Some((stop.clone(), done.clone())),
            _ => None,
        };
        let Some((stop, mut done)) = starting else { return false };
        tracing::info!(task = %id, "the task is stopped while it is being started");
        stop.cancel();
        while done.changed().await.is_ok() {}
        true
    }

    /// Destroys a task: removes everything of it. A running task is killed first, but only with [`Force::Yes`].
    ///
    /// # Errors
    /// When the task is unknown, when it runs and `force` is [`Force::No`], or when something of it can't be removed. A
    /// removal that failed is retried in the background, since Nomad calls DestroyTask only once.
    pub async fn destroy(&self, id: &TaskId, force: Force) -> Result<(), TaskError> {
        let interrupted = force == Force::Yes && self.cancel_start(id).await;
        let outcome = match self.destroy_once(id, force).await {
            // The start that was cancelled has removed everything that it had made.
            Err(TaskError::NotFound(_)) if interrupted => return Ok(()),
            outcome => outcome,
        };
        // A task that could not be killed is still in the map, and is retried here. Any other failure leaves a pending
        // teardown, which has its own retries.
        if force == Force::Yes && outcome.is_err() && self.find(id).await.is_ok() {
            let (engine, id) = (self.clone(), id.clone());
            tokio::spawn(async move {
                for pause in RETRY_DELAYS {
                    tokio::time::sleep(pause).await;
                    match engine.destroy_once(&id, Force::Yes).await {
                        Ok(()) | Err(TaskError::NotFound(_)) => return,
                        Err(error) => {
                            tracing::warn!(task = %id, error = %crate::error_chain(&error), "could not destroy the task");
                        }
                    }
                }
            });
        }
        outcome
    }

    async fn destroy_once(&self, id: &TaskId, force: Force) -> Result<(), TaskError> {
        let task = match self.find(id).await {
            Ok(task) => task,
            // A teardown that is queued is run here; one that is in progress is waited for. Its outcome is the answer.
            Err(_)
                if matches!(
                    self.0.context.teardown_state(id),
                    Some(TeardownState::Queued | TeardownState::InProgress)
                ) =>
            {
                return self.complete_teardown(id, &CancellationToken::new()).await;
            }
            Err(unknown) => return Err(unknown),
        };
        if force == Force::No && !task.has_ended() {
            return Err(TaskError::StillRunning(id.clone()));
        }
        // Nomad calls DestroyTask only once. With this state in the record, the next plugin would complete the
        // teardown.
        task.set_state(&self.0.context, RecordState::Destroying);
        failpoint::kill_at("destroy.marked");
        // A concurrent second call waits here, and then finds that the task is destroyed.
        let mut shim = task.shim.lock().await;
        if shim.is_some()
            && !task.has_ended()
            && let Some(client) = &task.client
        {
            // WaitTask calls get their answer before the task is removed from the map.
            task.kill_and_wait(&self.0.context, id, client).await?;
            failpoint::kill_at("destroy.killed");
        }
        let Some(shim) = shim.take() else { return Err(TaskError::NotFound(id.clone())) };
        // From here on the task is a pending teardown, so it is removed from the map, however the teardown ends.
        let _remove_from_map = RemoveOnDrop { engine: self, id };
        end_and_defer_teardown(&self.0.context, &task.record(), shim).await
    }

    /// Runs the queued teardown of a task. Returns `None` if the task has no pending teardown, or if another caller
    /// runs it.
    pub(super) async fn destroy_pending(&self, id: &TaskId) -> Option<Result<(), TaskError>> {
        let guard = self.0.context.claim_teardown(id)?;
        let shim = find_shim(&self.0.context, guard.record()).await;
        Some(undo_or_retry(guard, shim).await)
    }
}

/// A guard that removes a task from the map when it is dropped.
struct RemoveOnDrop<'a> {
    engine: &'a Engine,
    id: &'a TaskId,
}

impl Drop for RemoveOnDrop<'_> {
    fn drop(&mut self) {
        self.engine.tasks().remove(self.id);
    }
}
