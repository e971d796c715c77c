//! What could not be written to a task's files, because the disk was full, say: it is written as soon as that works again.
//! Until then this process knows it; of what a plugin knows that dies meanwhile, shims know how their tasks ended.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use super::{Record, RecordError, claim::caught, live::Task, shared::Shared};
use crate::ids::TaskId;

/// Before the second attempt; each later pause is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

impl Task {
    /// Writes the state as it is now to the task's record. Where that fails, it is written in the background, whatever it is
    /// by then.
    pub(super) fn save(self: &Arc<Self>, shared: &Arc<Shared>) {
        self.save_locked(shared, &self.lock_record());
    }

    /// The same for who has the record already.
    pub(super) fn save_locked(self: &Arc<Self>, shared: &Arc<Shared>, record: &Record) {
        let path = shared.settings.places.record(&record.container_id);
        let Err(error) = record.save_state(&path) else { return };
        let (id, error) = (record.task_id.clone(), crate::chain(&error));
        tracing::error!(task = %id, error, "the record of a task can't be written; trying again until it can");
        // One at a time: whoever is at it writes the latest state.
        let Ok(turn) = self.saving.clone().try_lock_owned() else { return };
        let (task, mut turn) = (Arc::downgrade(self), Some(turn));
        let save = move |shared: &Shared| {
            let Some(task) = task.upgrade() else { return Ok::<_, RecordError>(()) };
            let record = task.lock_record();
            record.save_late(&shared.settings.places.record(&record.container_id))?;
            // Before the record is free: who can't write the next state finds that nobody is at it.
            drop(turn.take());
            Ok(())
        };
        again(shared, id, "the record of a task", save);
    }
}

/// Says that a task's shim has its log's FIFOs open, now or as soon as that can be written: without it, the end of the log
/// would never be seen.
pub(super) fn log_started(shared: &Arc<Shared>, record: &Record) {
    let log = shared.settings.places.log(&record.container_id);
    if let Err(error) = crate::logs::started(&log) {
        tracing::error!(task = %record.task_id, error = crate::chain(&error), "its log; trying again until that works");
        again(shared, record.task_id.clone(), "the start of a log", move |_: &Shared| crate::logs::started(&log));
    }
}

/// Tries until it works, for as long as the engine lives.
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
                Ok(()) => return tracing::info!(task = %id, what, "written at last"),
                Err(error) => tracing::debug!(task = %id, what, error = crate::chain(&error), "not written yet"),
            }
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }));
}
