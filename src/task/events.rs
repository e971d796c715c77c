//! What users see of a task in `nomad alloc status`, besides its states.

use std::{collections::HashMap, time::SystemTime};

use tokio::sync::broadcast;

use crate::ids::TaskId;

/// One event. Only the newest ten of a task are kept by Nomad, so they are sparse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskEvent {
    /// The task.
    pub task_id: TaskId,
    /// Its allocation.
    pub alloc_id: String,
    /// Its name.
    pub task_name: String,
    /// When.
    pub at: SystemTime,
    /// What happened.
    pub message: String,
    /// Details.
    pub annotations: HashMap<String, String>,
}

/// Hands events to whoever listens. Nobody is waited for: a slow listener misses the oldest.
#[derive(Debug, Clone)]
pub struct EventHub(broadcast::Sender<TaskEvent>);

impl Default for EventHub {
    fn default() -> Self {
        Self(broadcast::channel(1024).0)
    }
}

impl EventHub {
    /// Tells all who listen; without listeners it is lost, as Nomad's contract has it.
    pub fn tell(&self, event: TaskEvent) {
        let _ = self.0.send(event);
    }

    /// Listens from now on.
    pub fn listen(&self) -> broadcast::Receiver<TaskEvent> {
        self.0.subscribe()
    }
}
