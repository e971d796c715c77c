//! The sources of a task's mounts on the host: they are needed until the container has been made with them.
//!
//! What stays mounted is copied into the mount namespace of every container that is made later, and keeps the host from
//! removing what is mounted over. Unmounting takes half a millisecond and kernel locks that a start needs as well, so that it
//! waits until the start has been answered.

use std::sync::Arc;

use super::{Record, shared::Shared};
use crate::{
    ids::TaskId,
    rootfs::{Pins, bundle::BundlePaths, mounts::TaskMount},
};

/// The sources of the mounts of a task that is being started.
#[derive(Debug)]
pub struct Sources {
    pins: Pins,
    /// The opened sources, closed together with the mounts: that takes time as well.
    _opened: Arc<Vec<TaskMount>>,
}

impl Sources {
    pub(super) fn new(pins: Pins, opened: Arc<Vec<TaskMount>>) -> Self {
        Self { pins, _opened: opened }
    }

    /// Unmounts the sources. Blocks for half a millisecond. What fails is logged, and done with the task's teardown.
    pub(super) fn release(self, task: &TaskId) {
        if let Err(error) = self.pins.unmount() {
            tracing::warn!(%task, %error, "the sources of the task's mounts stay mounted until the task is destroyed");
        }
    }
}

/// Does the shim of a task need the sources for as long as the task lives? runc's and gVisor's shims do not; nothing is
/// known of others.
pub(super) fn needs_sources(record: &Record) -> bool {
    record.shim_program.is_some() && !record.gvisor
}

/// Unmounts the sources of a running task whose plugin ended before it did so.
pub(super) fn release_after_recovery(shared: &Shared, record: &Record) {
    if needs_sources(record) {
        return;
    }
    let bundle = BundlePaths::of(&shared.settings.places, &record.container_id);
    if let Err(error) = tokio::task::block_in_place(|| bundle.unmount_pins()) {
        let (task, error) = (&record.task_id, crate::chain(&error));
        tracing::warn!(%task, error, "the sources of the task's mounts stay mounted until the task is destroyed");
    }
}
