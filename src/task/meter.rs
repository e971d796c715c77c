//! Measures the resources that a task uses.

use std::io;

use tokio::sync::watch;

use super::{Engine, ExitRecord, TaskError};
use crate::{
    cgroup::{Meter, Usage},
    ids::TaskId,
};

/// Measures one task repeatedly, until the task has ended.
#[derive(Debug)]
pub struct TaskMeter {
    meter: Meter,
    exit: watch::Receiver<Option<ExitRecord>>,
}

impl TaskMeter {
    /// Returns what the task uses now. `None` once the task has ended.
    ///
    /// # Errors
    /// Fails when a file of the task's cgroup can't be read at the moment.
    pub fn usage(&mut self) -> io::Result<Option<Usage>> {
        if self.exit.borrow().is_some() { Ok(None) } else { self.meter.usage() }
    }

    /// Completes when the task has ended.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut exit = self.exit.clone();
        async move {
            // The wait fails when the task is destroyed and its sender dropped. A destroyed task has ended, too.
            let _ = exit.wait_for(Option::is_some).await;
        }
    }
}

impl Engine {
    /// Returns a meter of a task. `None` once the task has ended.
    ///
    /// # Errors
    /// When the task is unknown, or its cgroup can't be opened at the moment.
    pub async fn meter(&self, id: &TaskId) -> Result<Option<TaskMeter>, TaskError> {
        let task = self.find(id).await?;
        let meter = self.context().cgroups.meter(&task.record().intent.cgroup)?;
        Ok(meter.map(|meter| TaskMeter { meter, exit: task.exit.subscribe() }))
    }
}
