//! What starting, undoing and the engine itself work with.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{EventHub, Record, Runtimes, Settings};
use crate::{cgroup::Cgroups, ids::TaskId, image::ImageStore, shim::Pool};

/// The parts of an open engine, and what it has still to take over or undo.
pub struct Shared {
    pub(super) settings: Settings,
    pub(super) cgroups: Cgroups,
    pub(super) runtimes: Runtimes,
    pub(super) images: ImageStore,
    pub(super) pool: Pool,
    pub(super) events: EventHub,
    /// Tasks of an earlier instance of us that nobody has asked for yet, and those whose undo failed.
    pub(super) leftovers: Mutex<HashMap<TaskId, Record>>,
}

impl Shared {
    /// Keeps in mind what is still to be undone or taken over.
    pub(super) fn keep(&self, record: Record) {
        self.leftovers().insert(record.task_id.clone(), record);
    }

    /// Takes it, so that nobody else does.
    pub(super) fn take_leftover(&self, id: &TaskId) -> Option<Record> {
        self.leftovers().remove(id)
    }

    pub(super) fn leftovers(&self) -> MutexGuard<'_, HashMap<TaskId, Record>> {
        self.leftovers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
