//! What starting, undoing and the engine itself work with.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{EventHub, Record, Runtimes, Settings, metrics::Metrics};
use crate::{
    cgroup::Cgroups,
    ids::TaskId,
    image::ImageStore,
    rootfs::seccomp::Filters,
    shim::{self, DeadTask, Exit, Pool, ShimError},
};

/// The parts of an open engine, and what it has still to take over or undo.
pub struct Shared {
    pub(super) settings: Settings,
    pub(super) cgroups: Cgroups,
    pub(super) runtimes: Runtimes,
    pub(super) images: ImageStore,
    pub(super) filters: Filters,
    pub(super) pool: Pool,
    pub(super) events: EventHub,
    pub(super) metrics: Metrics,
    /// Tasks that are to be undone: of an earlier instance of us, and those whose undo failed.
    pub(super) leftovers: Mutex<HashMap<TaskId, Leftover>>,
}

/// A task that is to be undone.
pub struct Leftover {
    pub(super) record: Record,
    /// Somebody is at it.
    taken: bool,
}

impl Shared {
    /// Keeps in mind what is still to be undone.
    pub(super) fn keep(&self, record: Record) {
        self.leftovers().insert(record.task_id.clone(), Leftover { record, taken: false });
    }

    /// Takes it, so that nobody else does. It stays in mind until it is gone.
    pub(super) fn take_leftover(&self, id: &TaskId) -> Option<Record> {
        let mut leftovers = self.leftovers();
        let leftover = leftovers.get_mut(id).filter(|leftover| !leftover.taken)?;
        leftover.taken = true;
        Some(leftover.record.clone())
    }

    /// It is gone.
    pub(super) fn forget(&self, id: &TaskId) {
        self.leftovers().remove(id);
    }

    /// What is left of a container whose shim is dead: ended and removed; how it had ended, where that was noted.
    pub(super) async fn delete_dead(&self, record: &Record) -> Result<Option<Exit>, ShimError> {
        let bundle = self.settings.places.bundle(&record.container_id);
        let dead = DeadTask { id: record.container_id.as_str(), namespace: &record.namespace, bundle: &bundle };
        shim::delete_dead(self.pool.launcher(), dead).await
    }

    pub(super) fn leftovers(&self) -> MutexGuard<'_, HashMap<TaskId, Leftover>> {
        self.leftovers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
