//! Guards that keep track of starts and teardowns. A teardown that a panic interrupts is queued again, instead of
//! staying claimed and counted forever.

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures_util::FutureExt as _;

use super::{
    Record,
    context::{EngineContext, PendingTeardown, TeardownState},
};

/// The guard of a teardown in progress. Dropped without [`TeardownGuard::finish`], it queues the teardown again, for
/// the garbage collection or a new attempt of the task.
pub(super) struct TeardownGuard {
    context: Arc<EngineContext>,
    record: Record,
    /// Whether this teardown is counted in `background_teardowns`.
    is_counted: bool,
    /// Whether the outcome was reported.
    is_finished: bool,
}

impl TeardownGuard {
    /// Begins a new teardown, and adds it to the pending teardowns as in progress.
    pub(super) fn new(context: &Arc<EngineContext>, record: &Record) -> Self {
        let pending = PendingTeardown { record: record.clone(), state: TeardownState::InProgress, shim_hold: None };
        context.pending_teardowns().insert(record.intent.task_id.clone(), pending);
        Self::for_claimed(context, record.clone())
    }

    /// Guards a pending teardown that the caller has marked as in progress.
    pub(super) fn for_claimed(context: &Arc<EngineContext>, record: Record) -> Self {
        Self { context: context.clone(), record, is_counted: false, is_finished: false }
    }

    pub(super) fn context(&self) -> &Arc<EngineContext> {
        &self.context
    }

    pub(super) fn record(&self) -> &Record {
        &self.record
    }

    /// Marks the teardown as running in the background: the container is gone, and the caller gets its answer.
    pub(super) fn move_to_background(&mut self) {
        if !std::mem::replace(&mut self.is_counted, true) {
            self.context.background_teardowns.send_modify(|count| *count += 1);
        }
        let pending =
            PendingTeardown { record: self.record.clone(), state: TeardownState::Background, shim_hold: None };
        self.context.pending_teardowns().insert(self.record.intent.task_id.clone(), pending);
    }

    /// Reports the outcome: the task is gone, or its teardown is queued again.
    pub(super) fn finish(mut self, is_gone: bool) {
        self.is_finished = true;
        if is_gone {
            self.context.remove_teardown(&self.record.intent.task_id);
        } else {
            self.context.queue_teardown(self.record.clone());
        }
    }
}

impl Drop for TeardownGuard {
    fn drop(&mut self) {
        if !self.is_finished {
            tracing::error!(
                task = %self.record.intent.task_id,
                "the teardown of a task was interrupted; it is queued again"
            );
            self.context.queue_teardown(self.record.clone());
        }
        if self.is_counted {
            self.context.background_teardowns.send_modify(|count| *count -= 1);
        }
    }
}

/// The guard of a start that has made something. Dropped without [`StartGuard::disarm`], as by a panic, it queues the
/// task's teardown.
pub(super) struct StartGuard {
    context: Arc<EngineContext>,
    record: Record,
    is_disarmed: bool,
}

impl StartGuard {
    /// Guards the start that `record` describes, whether the record is on disk or not.
    pub(super) fn new(context: &Arc<EngineContext>, record: &Record) -> Self {
        Self { context: context.clone(), record: record.clone(), is_disarmed: false }
    }

    /// Ends the guard: the task runs, or its teardown was begun.
    pub(super) fn disarm(mut self) {
        self.is_disarmed = true;
    }
}

impl Drop for StartGuard {
    fn drop(&mut self) {
        if !self.is_disarmed {
            tracing::error!(task = %self.record.intent.task_id, "a start was interrupted; its teardown is queued");
            self.context.queue_teardown(self.record.clone());
        }
    }
}

/// Runs work of a detached task, and catches and logs a panic. Returns `None` if the work has panicked.
pub(super) async fn catch_panic<T>(what: &'static str, work: impl Future<Output = T>) -> Option<T> {
    match AssertUnwindSafe(work).catch_unwind().await {
        Ok(done) => Some(done),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().map(String::as_str);
            let message = message.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text");
            tracing::error!(what, panic = message, "internal error: a part of the driver has panicked");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[allow(clippy::panic, reason = "the test is about a panic")]
    async fn a_panic_is_caught_and_distinguished_from_a_result() {
        assert_eq!(catch_panic("work", async { 7 }).await, Some(7));
        assert_eq!(catch_panic("work", async { panic!("on purpose") }).await, None::<()>);
    }
}
