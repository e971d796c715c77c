//! Retries of writes to a task's files that failed, for example because the disk was full. Until a retry succeeds, only
//! this process has the data. If the plugin dies before that, the next plugin still learns from the shims how their
//! tasks ended.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use super::{Record, RecordError, claim::caught, live::Task, shared::Shared};
use crate::ids::TaskId;

/// The delay before the first retry; each later delay is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest delay between two retries.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

impl Task {
    /// Writes the current state to the task's record. If that fails, the write is retried in the background, each time
    /// with the state that is current then.
    pub(super) fn save(self: &Arc<Self>, shared: &Arc<Shared>) {
        self.save_locked(shared, &self.lock_record());
    }

    /// Does the same as [`Self::save`] for a caller that has locked the record already.
    pub(super) fn save_locked(self: &Arc<Self>, shared: &Arc<Shared>, record: &Record) {
        let path = shared.settings.places.record(&record.container_id);
        let Err(error) = record.save_state(&path) else { return };
        let (id, error) = (record.task_id.clone(), crate::chain(&error));
        tracing::error!(task = %id, error, "could not write the record of a task; retrying until that succeeds");
        // One retry loop per task suffices, since it writes the latest state.
        let Ok(turn) = self.saving.clone().try_lock_owned() else { return };
        let (task, mut turn) = (Arc::downgrade(self), Some(turn));
        let save = move |shared: &Shared| {
            let Some(task) = task.upgrade() else { return Ok::<_, RecordError>(()) };
            let record = task.lock_record();
            record.save_late(&shared.settings.places.record(&record.container_id))?;
            // Released before the record's lock: a caller that then fails to write the next state must find this lock
            // free, so that it starts a new retry loop.
            drop(turn.take());
            Ok(())
        };
        again(shared, id, "the record of a task", save);
    }
}

/// Writes down for the log writer that a task's shim has opened the log FIFOs, and retries that until it succeeds.
/// Without it, the log writer would never see the end of the log.
pub(super) fn log_started(shared: &Arc<Shared>, record: &Record) {
    let log = shared.settings.places.log(&record.container_id);
    if let Err(error) = crate::logs::started(&log) {
        tracing::error!(
            task = %record.task_id, error = crate::chain(&error),
            "could not mark the log of a task as started; retrying until that succeeds"
        );
        again(shared, record.task_id.clone(), "the start of a log", move |_: &Shared| crate::logs::started(&log));
    }
}

/// Retries `write` in the background until it succeeds, for as long as the engine lives. `what` names the data in the
/// log.
fn again<E: std::error::Error + 'static>(
    shared: &Arc<Shared>,
    id: TaskId,
    what: &'static str,
    mut write: impl FnMut(&Shared) -> Result<(), E> + Send + 'static,
) {
    let shared: Weak<Shared> = Arc::downgrade(shared);
    tokio::spawn(caught(what, async move {
        let mut pause = FIRST_PAUSE;
        loop {
            tokio::time::sleep(pause).await;
            let Some(shared) = shared.upgrade() else { return };
            match write(&shared) {
                Ok(()) => return tracing::info!(task = %id, what, "a retried write succeeded"),
                Err(error) => {
                    tracing::debug!(task = %id, what, error = crate::chain(&error), "a retried write failed again");
                }
            }
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }));
}
