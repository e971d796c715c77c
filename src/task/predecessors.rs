//! What stands in the way of a start: the same start made by an earlier instance of us, earlier attempts, and their
//! remains.

use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

use super::{
    Engine, Force, Record, RecordState, StartRequest, TaskError, TaskHandle, claim::caught, engine::Slot, live::Claim,
};
use crate::{ids::TaskId, shim::stdio::HeldOpen};

/// How long a start waits for somebody who is undoing an earlier attempt.
const OTHERS: Duration = Duration::from_secs(120);

/// The job can do nothing about what is left of its earlier attempt: a later start may find it removed.
fn earlier(id: TaskId, error: TaskError) -> TaskError {
    match error {
        error @ TaskError::Busy(_) => error,
        error => TaskError::Earlier { id, source: Box::new(error) },
    }
}

impl Engine {
    /// A plugin that died before its answer was out is asked again, with the same id: the task runs already, and is
    /// what was asked for. One that was to stop meanwhile, or whose end is not known, is made anew.
    pub(super) async fn started_before(&self, request: &StartRequest) -> Option<TaskHandle> {
        let id = &request.task_id;
        let task = self.settled(id).await?;
        let sound = task.lost.is_none() && !matches!(task.record().state, RecordState::Stopping { .. });
        let claim = task.claim();
        if claim == Claim::Again {
            return None;
        }
        if sound && claim == Claim::First {
            tracing::warn!(task = %id, "an earlier plugin had started it already");
            return Some(task.handle());
        }
        let held = HeldOpen::new(&request.alloc_dir, &request.stdout, &request.stderr);
        self.held().insert((request.alloc_id.clone(), request.name.clone()), held);
        if let Err(error) = self.destroy(id, Force::Yes).await {
            tracing::warn!(task = %id, error = %crate::chain(&error), "an unsound earlier start of it");
        }
        None
    }

    /// A new attempt of an allocation's task means that whatever is left of the old one is not wanted: Nomad gave up on
    /// it, or died before it knew of it. The logs of both are one stream, which what is returned keeps open.
    pub(super) async fn clear_predecessors(
        &self,
        request: &StartRequest,
        stop: &CancellationToken,
    ) -> Result<Option<HeldOpen>, TaskError> {
        let mut held = None;
        let hold = || HeldOpen::new(&request.alloc_dir, &request.stdout, &request.stderr);
        let same = |record: &Record| record.alloc_id == request.alloc_id && record.name == request.name;
        let anonymous = request.alloc_id.is_empty();
        let olds: Vec<TaskId> = self
            .tasks()
            .values()
            .filter_map(Slot::record)
            .filter(|_| !anonymous)
            .filter(same)
            .map(|record| record.intent.task_id)
            .collect();
        for old in olds {
            tracing::warn!(task = %old, new = %request.task_id, "replaces an attempt that was never destroyed");
            held = Some(hold());
            match self.destroy(&old, Force::Yes).await {
                // Somebody else, most likely the old agent's own call, was faster.
                Ok(()) | Err(TaskError::NotFound(_)) => {}
                Err(error) => return Err(earlier(old, error)),
            }
        }
        let leftovers: Vec<TaskId> = {
            let leftovers = self.leftovers();
            let records = leftovers.values().map(|leftover| &leftover.record);
            records.filter(|record| same(record)).map(|record| record.task_id.clone()).collect()
        };
        for old in leftovers {
            tracing::warn!(task = %old, new = %request.task_id, "replaces a task of an earlier plugin");
            held = Some(hold());
            match self.outlast_leftover(&old, stop).await {
                Err(TaskError::Stopped(_)) => return Err(TaskError::Stopped(request.task_id.clone())),
                other => other.map_err(|error| earlier(old, error))?,
            }
        }
        Ok(held)
    }

    /// Ends the predecessors of a start that was stopped while it waited for its turn: an attempt that a dead agent had begun
    /// comes up only then, and no agent knows of it. Later starts of the same task wait for this, since they are behind
    /// it in the queue.
    pub(super) fn clear_predecessors_later(
        &self,
        turn: impl Future<Output = OwnedMutexGuard<()>> + Send + 'static,
        request: StartRequest,
    ) {
        let engine = self.clone();
        tokio::spawn(caught("the end of a stopped start's predecessors", async move {
            let _turn = turn.await;
            if let Err(error) = engine.clear_predecessors(&request, &CancellationToken::new()).await {
                tracing::warn!(
                    task = %request.task_id, error = %crate::chain(&error),
                    "an earlier attempt of a task that was stopped is not removed yet"
                );
            }
        }));
    }

    /// Undoes a leftover, or waits until whoever is at it is done: two attempts share a cgroup, and with the same id all
    /// else too.
    pub(super) async fn outlast_leftover(&self, id: &TaskId, stop: &CancellationToken) -> Result<(), TaskError> {
        let deadline = tokio::time::Instant::now() + OTHERS;
        self.shared().hurry.notify_waiters();
        loop {
            let mut settled = std::pin::pin!(self.shared().settled.notified());
            // From here on: what settles while we look is not missed.
            settled.as_mut().enable();
            if let Some(outcome) = self.destroy_leftover(id).await {
                return outcome;
            }
            if !self.leftovers().contains_key(id) {
                return Ok(());
            }
            tokio::select! {
                () = settled => {}
                () = tokio::time::sleep_until(deadline) => return Err(TaskError::Busy(id.clone())),
                () = stop.cancelled() => return Err(TaskError::Stopped(id.clone())),
            }
        }
    }
}
