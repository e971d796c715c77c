//! Who undoes a task: a guard, so that a task whose undoing is broken off by a panic is neither taken for ever nor counted
//! for ever, but undone again.

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures_util::FutureExt as _;

use super::{
    Record,
    shared::{Hands, Leftover, Shared},
};

/// Somebody undoes this task. Dropped without [`Claim::settle`], it leaves the task to the next who comes: the reaper, or a
/// new attempt.
pub(super) struct Claim {
    shared: Arc<Shared>,
    record: Record,
    /// Is it one of the teardowns that are counted in `clearing`?
    is_counted: bool,
    is_settled: bool,
}

impl Claim {
    /// On a task that is nobody's yet.
    pub(super) fn new(shared: &Arc<Shared>, record: &Record) -> Self {
        let leftover = Leftover { record: record.clone(), hands: Hands::Taken, shim: None };
        shared.leftovers().insert(record.task_id.clone(), leftover);
        Self::on(shared, record.clone())
    }

    /// On a task that was marked as taken.
    pub(super) fn on(shared: &Arc<Shared>, record: Record) -> Self {
        Self { shared: shared.clone(), record, is_counted: false, is_settled: false }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(super) fn record(&self) -> &Record {
        &self.record
    }

    /// Its container is gone and whoever asked for that has the answer; from here on it is the background's.
    pub(super) fn is_clearing(&mut self) {
        if !std::mem::replace(&mut self.is_counted, true) {
            self.shared.clearing.send_modify(|count| *count += 1);
        }
        let leftover = Leftover { record: self.record.clone(), hands: Hands::Clearing, shim: None };
        self.shared.leftovers().insert(self.record.task_id.clone(), leftover);
    }

    /// Says how it went: the task is gone, or to be undone once more.
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
            tracing::error!(task = %self.record.task_id, "the undoing of a task was broken off; it is undone again later");
            self.shared.keep(self.record.clone());
        }
        if self.is_counted {
            self.shared.clearing.send_modify(|count| *count -= 1);
        }
    }
}

/// A start that has something to undo. Dropped without [`Attempt::over`], as by a panic, it has the task undone.
pub(super) struct Attempt {
    shared: Arc<Shared>,
    record: Record,
    is_over: bool,
}

impl Attempt {
    /// Whose record, or the name of whose container and shim, this is.
    pub(super) fn new(shared: &Arc<Shared>, record: &Record) -> Self {
        Self { shared: shared.clone(), record: record.clone(), is_over: false }
    }

    /// The task runs, or was undone, or somebody is at that.
    pub(super) fn over(mut self) {
        self.is_over = true;
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if !self.is_over {
            tracing::error!(task = %self.record.task_id, "a start was broken off; what it has made is undone later");
            self.shared.keep(self.record.clone());
        }
    }
}

/// Runs work that goes on without anybody who waits for it; `None` when it has panicked, which is logged.
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
    #[allow(clippy::panic, reason = "what is tested")]
    async fn a_panic_is_caught_and_told_apart_from_an_answer() {
        assert_eq!(caught("work", async { 7 }).await, Some(7));
        assert_eq!(caught("work", async { panic!("on purpose") }).await, None::<()>);
    }
}
