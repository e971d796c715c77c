//! Guards that keep track of starts and teardowns. A teardown that a panic interrupts is queued again, instead of
//! staying claimed and counted forever.

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures_util::FutureExt as _;

use super::{
    Record,
    shared::{Hands, Leftover, Shared},
};

/// The guard of a teardown in progress. Dropped without [`TeardownGuard::finish`], it queues the teardown again, for
/// the garbage collection or a new attempt of the task.
pub(super) struct Claim {
    shared: Arc<Shared>,
    record: Record,
    /// Is this teardown counted in `background_teardowns`?
    is_counted: bool,
    is_settled: bool,
}

impl Claim {
    /// Begins a new teardown, and adds it to the pending teardowns as in progress.
    pub(super) fn new(shared: &Arc<Shared>, record: &Record) -> Self {
        let leftover = Leftover { record: record.clone(), hands: Hands::Taken, shim: None };
        shared.leftovers().insert(record.task_id.clone(), leftover);
        Self::on(shared, record.clone())
    }

    /// Guards a pending teardown that the caller has marked as in progress.
    pub(super) fn on(shared: &Arc<Shared>, record: Record) -> Self {
        Self { shared: shared.clone(), record, is_counted: false, is_settled: false }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(super) fn record(&self) -> &Record {
        &self.record
    }

    /// Marks the teardown as running in the background: the container is gone, and the caller gets its answer.
    pub(super) fn is_clearing(&mut self) {
        if !std::mem::replace(&mut self.is_counted, true) {
            self.shared.clearing.send_modify(|count| *count += 1);
        }
        let leftover = Leftover { record: self.record.clone(), hands: Hands::Clearing, shim: None };
        self.shared.leftovers().insert(self.record.task_id.clone(), leftover);
    }

    /// Reports the outcome: the task is gone, or its teardown is queued again.
    pub(super) fn settle(mut self, is_gone: bool) {
        self.is_settled = true;
        if is_gone {
            self.shared.forget(&self.record.task_id);
        } else {
            self.shared.keep(self.record.clone());
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.is_settled {
            tracing::error!(task = %self.record.task_id, "the teardown of a task was interrupted; it is queued again");
            self.shared.keep(self.record.clone());
        }
        if self.is_counted {
            self.shared.clearing.send_modify(|count| *count -= 1);
        }
    }
}

/// The guard of a start that has made something. Dropped without [`StartGuard::disarm`], as by a panic, it queues the
/// task's teardown.
pub(super) struct Attempt {
    shared: Arc<Shared>,
    record: Record,
    is_over: bool,
}

impl Attempt {
    /// Guards the start that `record` describes, whether the record is on disk or not.
    pub(super) fn new(shared: &Arc<Shared>, record: &Record) -> Self {
        Self { shared: shared.clone(), record: record.clone(), is_over: false }
    }

    /// Ends the guard: the task runs, or its teardown was begun.
    pub(super) fn over(mut self) {
        self.is_over = true;
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if !self.is_over {
            tracing::error!(task = %self.record.task_id, "a start was interrupted; its teardown is queued");
            self.shared.keep(self.record.clone());
        }
    }
}

/// Runs work of a detached task, and catches and logs a panic. Returns `None` if the work has panicked.
pub(super) async fn caught<T>(what: &'static str, work: impl Future<Output = T>) -> Option<T> {
    match AssertUnwindSafe(work).catch_unwind().await {
        Ok(done) => Some(done),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text");
            tracing::error!(what, panic = said, "internal: a part of the driver has panicked");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[allow(clippy::panic, reason = "the test is about a panic")]
    async fn a_panic_is_caught_and_told_apart_from_an_answer() {
        assert_eq!(caught("work", async { 7 }).await, Some(7));
        assert_eq!(caught("work", async { panic!("on purpose") }).await, None::<()>);
    }
}
