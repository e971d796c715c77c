//! What happens before a start: a task that an earlier plugin has started for the same request is reused, and earlier
//! attempts of the task and their remains are destroyed.

use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

use super::{
    Engine, Force, Record, RecordState, StartRequest, TaskError, TaskHandle, engine::Slot, guards::catch_panic,
    live::Confirmation,
};
use crate::{ids::TaskId, shim::stdio::ParkedFifos};

/// How long a start waits for the teardown of an earlier attempt that another caller runs.
const TEARDOWN_WAIT_TIMEOUT: Duration = Duration::from_secs(120);

/// Wraps the error of an earlier attempt's teardown. It is not the job's fault, and a later start may find the attempt
/// removed.
fn earlier_attempt_error(id: TaskId, error: TaskError) -> TaskError {
    match error {
        error @ TaskError::TeardownInProgress(_) => error,
        error => TaskError::EarlierAttemptRemains { id, source: Box::new(error) },
    }
}

impl Engine {
    /// Returns the handle of a task that an earlier plugin has started for this same request. If a plugin dies before
    /// its answer to StartTask reaches Nomad, Nomad repeats the call with the same task id, and the task runs already.
    /// If that task was being stopped, or it is not known how it ended, it is destroyed instead, and the caller starts
    /// it again.
    pub(super) async fn reuse_earlier_start(&self, request: &StartRequest) -> Option<TaskHandle> {
        let id = &request.task_id;
        let task = self.wait_for_recovery(id).await?;
        let is_reusable =
            task.unrecoverable_reason.is_none() && !matches!(task.record().state, RecordState::Stopping { .. });
        let confirmation = task.confirm();
        if confirmation == Confirmation::Again {
            return None;
        }
        if is_reusable && confirmation == Confirmation::First {
            tracing::warn!(task = %id, "an earlier plugin has already started this task; keeping it");
            return Some(task.handle());
        }
        let parked = ParkedFifos::new(&request.alloc_dir, &request.stdout, &request.stderr);
        self.parked_fifos().insert((request.alloc_id.clone(), request.name.clone()), parked);
        if let Err(error) = self.destroy(id, Force::Yes).await {
            tracing::warn!(task = %id, error = %crate::error_chain(&error), "could not destroy an earlier start of the task");
        }
        None
    }

    /// Destroys all earlier attempts of the task. A new attempt means that Nomad no longer needs the old ones: it has
    /// given them up, or it died before it got the answer to their start. The logs of the attempts are one stream; the
    /// returned FIFOs keep that stream open.
    pub(super) async fn destroy_previous_attempts(
        &self,
        request: &StartRequest,
        stop: &CancellationToken,
    ) -> Result<Option<ParkedFifos>, TaskError> {
        let mut parked = None;
        let park = || ParkedFifos::new(&request.alloc_dir, &request.stdout, &request.stderr);
        let same = |record: &Record| record.intent.alloc_id == request.alloc_id && record.intent.name == request.name;
        let previous: Vec<TaskId> =
            self.tasks().values().filter_map(Slot::record).filter(same).map(|record| record.intent.task_id).collect();
        for old in previous {
            tracing::warn!(
                task = %old, new = %request.task_id,
                "destroying an earlier attempt that Nomad did not destroy"
            );
            parked = Some(park());
            match self.destroy(&old, Force::Yes).await {
                // Another call, most likely DestroyTask of the old agent, has destroyed the task meanwhile.
                Ok(()) | Err(TaskError::NotFound(_)) => {}
                Err(error) => return Err(earlier_attempt_error(old, error)),
            }
        }
        let pending: Vec<TaskId> = {
            let pending_teardowns = self.pending_teardowns();
            let records = pending_teardowns.values().map(|pending| &pending.record);
            records.filter(|record| same(record)).map(|record| record.intent.task_id.clone()).collect()
        };
        for old in pending {
            tracing::warn!(task = %old, new = %request.task_id, "removing the remains of an earlier attempt");
            parked = Some(park());
            match self.complete_teardown(&old, stop).await {
                Err(TaskError::Stopped(_)) => return Err(TaskError::Stopped(request.task_id.clone())),
                other => other.map_err(|error| earlier_attempt_error(old, error))?,
            }
        }
        Ok(parked)
    }

    /// Destroys the earlier attempts of a start that was stopped while it waited for its attempt lock. The lock is then
    /// held by a start that a dead agent has begun; when that start completes, no agent knows of its task. Later starts
    /// of the same task wait for this, since they are behind it in the lock's queue.
    pub(super) fn destroy_previous_attempts_later(
        &self,
        attempt_lock: impl Future<Output = OwnedMutexGuard<()>> + Send + 'static,
        request: StartRequest,
    ) {
        let engine = self.clone();
        tokio::spawn(catch_panic("destroying the earlier attempts of a stopped start", async move {
            let _attempt_lock = attempt_lock.await;
            if let Err(error) = engine.destroy_previous_attempts(&request, &CancellationToken::new()).await {
                tracing::warn!(
                    task = %request.task_id, error = %crate::error_chain(&error),
                    "could not yet remove an earlier attempt of a task whose start was stopped"
                );
            }
        }));
    }

    /// Runs a pending teardown, or waits for the caller that runs it. A new attempt can't start before that, since two
    /// attempts of a task share a cgroup, and two starts with the same task id share everything.
    ///
    /// # Errors
    /// When the teardown fails or takes too long, or `stop` is cancelled.
    pub(super) async fn complete_teardown(&self, id: &TaskId, stop: &CancellationToken) -> Result<(), TaskError> {
        let deadline = tokio::time::Instant::now() + TEARDOWN_WAIT_TIMEOUT;
        self.context().teardown_requested.notify_waiters();
        loop {
            let mut finished = std::pin::pin!(self.context().teardown_finished.notified());
            // The wait is registered before the check, so that a teardown that finishes during the check is not missed.
            finished.as_mut().enable();
            if let Some(outcome) = self.destroy_pending(id).await {
                return outcome;
            }
            if !self.pending_teardowns().contains_key(id) {
                return Ok(());
            }
            tokio::select! {
                () = finished => {}
                () = tokio::time::sleep_until(deadline) => return Err(TaskError::TeardownInProgress(id.clone())),
                () = stop.cancelled() => return Err(TaskError::Stopped(id.clone())),
            }
        }
    }
}
