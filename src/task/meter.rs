//! What a task uses, as often as somebody wants to know.

use tokio::sync::watch;

use super::{Engine, ExitRecord, TaskError};
use crate::{
    cgroup::{CgroupPath, Meter, Usage},
    ids::TaskId,
};

/// A task that is looked at.
#[derive(Debug)]
pub struct TaskMeter {
    meter: Meter,
    exit: watch::Receiver<Option<ExitRecord>>,
}

impl TaskMeter {
    /// What it uses right now; None once it has ended.
    pub fn usage(&mut self) -> Option<Usage> {
        if self.exit.borrow().is_some() { None } else { self.meter.usage() }
    }

    /// Completes when it has ended.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut exit = self.exit.clone();
        async move {
            // A task that is forgotten has ended, too.
            let _ = exit.wait_for(Option::is_some).await;
        }
    }
}

impl Engine {
    /// What a task uses, for as many looks as are wanted; None once it has ended.
    ///
    /// # Errors
    /// When it is unknown.
    pub async fn meter(&self, id: &TaskId) -> Result<Option<TaskMeter>, TaskError> {
        let task = self.find(id).await?;
        let meter = self.shared().cgroups.meter(&CgroupPath::recorded(&task.record().cgroup));
        Ok(meter.map(|meter| TaskMeter { meter, exit: task.exit.subscribe() }))
    }
}
