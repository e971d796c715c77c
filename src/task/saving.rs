//! Retries of writes to a task's files that failed, for example because the disk was full. Until a retry succeeds, only
//! this process has the data. If the plugin dies before that, the next plugin still learns from the shims how their
//! tasks ended.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use super::{Record, RecordError, context::EngineContext, guards::catch_panic, live::Task};
use crate::ids::TaskId;

/// The delay before the first retry; each later delay is twice as long.
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// The longest delay between two retries.
const RETRY_MAX_DELAY: Duration = Duration::from_secs(10);

impl Task {
    /// Writes the current state to the task's record. If that fails, the write is retried in the background, each time
    /// with the state that is current then.
    pub(super) fn save(self: &Arc<Self>, context: &Arc<EngineContext>) {
        self.save_locked(context, &self.lock_record());
    }

    /// Does the same as [`Self::save`] for a caller that has locked the record already.
    pub(super) fn save_locked(self: &Arc<Self>, context: &Arc<EngineContext>, record: &Record) {
        let path = context.settings.places.record(&record.intent.container_id);
        let Err(error) = record.save_state(&path) else { return };
        let (id, error) = (record.intent.task_id.clone(), crate::error_chain(&error));
        tracing::error!(task = %id, error, "could not write the record of a task; retrying until that succeeds");
        // One retry loop per task suffices, since it writes the latest state.
        let Ok(save_guard) = self.save_lock.clone().try_lock_owned() else { return };
        let (task, mut save_guard) = (Arc::downgrade(self), Some(save_guard));
        let save = move |context: &EngineContext| {
            let Some(task) = task.upgrade() else { return Ok::<_, RecordError>(()) };
            let record = task.lock_record();
            record.save_late(&context.settings.places.record(&record.intent.container_id))?;
            // This lock is released before the record's lock: a caller that fails to write the next state must find
            // this lock free, so that it starts a new retry loop.
            drop(save_guard.take());
            Ok(())
        };
        retry_in_background(context, id, "the record of a task", save);
    }
}

/// Records for the log writer that a task's shim has opened the log FIFOs, and retries that until it succeeds. Without
/// this mark, the log writer would never see the end of the log.
pub(super) fn mark_log_started(context: &Arc<EngineContext>, record: &Record) {
    let log = context.settings.places.log(&record.intent.container_id);
    if let Err(error) = crate::logs::mark_started(&log) {
        tracing::error!(
            task = %record.intent.task_id, error = crate::error_chain(&error),
            "could not mark the log of a task as started; retrying until that succeeds"
        );
        retry_in_background(context, record.intent.task_id.clone(), "the start of a log", move |_: &EngineContext| {
            crate::logs::mark_started(&log)
        });
    }
}

/// Retries `write` in the background until it succeeds, for as long as the engine lives. `what` names the data in the
/// log.
fn retry_in_background<E: std::error::Error + 'static>(
    context: &Arc<EngineContext>,
    id: TaskId,
    what: &'static str,
    mut write: impl FnMut(&EngineContext) -> Result<(), E> + Send + 'static,
) {
    let context: Weak<EngineContext> = Arc::downgrade(context);
    tokio::spawn(catch_panic(what, async move {
        let mut pause = RETRY_DELAY;
        loop {
            tokio::time::sleep(pause).await;
            let Some(context) = context.upgrade() else { return };
            match write(&context) {
                Ok(()) => return tracing::info!(task = %id, what, "a retried write succeeded"),
                Err(error) => {
                    tracing::debug!(task = %id, what, error = crate::error_chain(&error), "a retried write failed again");
                }
            }
            pause = (2 * pause).min(RETRY_MAX_DELAY);
        }
    }));
}
