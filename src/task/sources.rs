//! The sources of a task's mounts on the host, which are needed until the container has been created.
//!
//! A source that stays mounted is copied into the mount namespace of every container that is created later, and
//! prevents the host from removing the file or directory that it covers. Unmounting the sources takes half a
//! millisecond and kernel locks that a start needs as well. So it is deferred until the start has been answered.

use std::sync::Arc;

use super::{Record, context::EngineContext};
use crate::{
    ids::TaskId,
    rootfs::{Pins, bundle::BundlePaths, mounts::TaskMount},
};

/// The sources of the mounts of a task that is being started.
#[derive(Debug)]
pub(crate) struct MountSources {
    pins: Pins,
    /// The opened sources. They are closed together with the unmounting, since closing takes time as well.
    _opened: Arc<Vec<TaskMount>>,
}

impl MountSources {
    pub(super) fn new(pins: Pins, opened: Arc<Vec<TaskMount>>) -> Self {
        Self { pins, _opened: opened }
    }

    /// Unmounts the sources. Blocks for half a millisecond. A failure is logged, and the task's teardown unmounts the
    /// sources.
    pub(super) fn unmount(self, task: &TaskId) {
        self.pins.unmount().unwrap_or_else(|error| log_failure(task, &error));
    }
}

/// Says whether the shim of a task may need the sources for as long as the task lives. The shims of runc and gVisor do
/// not need them.
pub(super) fn needs_sources(record: &Record) -> bool {
    record.intent.shim_program.is_some() && !record.intent.gvisor
}

/// Unmounts the sources of a running task, in case the earlier plugin ended before it did so.
pub(super) fn unmount_after_recovery(context: &EngineContext, record: &Record) {
    if needs_sources(record) {
        return;
    }
    let bundle = BundlePaths::of(&context.settings.places, &record.intent.container_id);
    tokio::task::block_in_place(|| bundle.unmount_pins())
        .unwrap_or_else(|error| log_failure(&record.intent.task_id, &error));
}

fn log_failure(task: &TaskId, error: &dyn std::error::Error) {
    let error = crate::error_chain(error);
    tracing::warn!(
        %task, error,
        "could not unmount the sources of the task's mounts; they stay mounted until the task is destroyed"
    );
}
