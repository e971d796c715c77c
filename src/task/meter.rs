//! Measures the resources that a task uses.

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
    pub fn usage(&mut self) -> Option<Usage> {
        if self.exit.borrow().is_some() { None } else { self.meter.usage() }
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
    /// When the task is unknown.
    pub async fn meter(&self, id: &TaskId) -> Result<Option<TaskMeter>, TaskError> {
        let task = self.find(id).await?;
        let meter = self.context().cgroups.meter(&task.record().intent.cgroup);
        Ok(meter.map(|meter| TaskMeter { meter, exit: task.exit.subscribe() }))
    }
}
