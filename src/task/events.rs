//! What users see of a task in `nomad alloc status`, besides its states.

use std::{collections::HashMap, time::SystemTime};

use tokio::sync::broadcast;

use super::Record;
use crate::{
    ids::TaskId,
    text::{self, FOREIGN_MAX, MESSAGE_MAX},
};

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
    /// Who is told.
    pub audience: Audience,
}

/// Who hears of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// Nomad's users, too.
    Everybody,
    /// Only who listens on this host: Nomad tells it by itself.
    Host,
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
    /// Tells all who listen; without listeners it is lost, as Nomad's contract has it. Its texts are cut and escaped here:
    /// they may hold words of images, registries and runtimes.
    pub fn tell(&self, mut event: TaskEvent) {
        event.message = text::shown(&event.message, MESSAGE_MAX);
        event.annotations.values_mut().for_each(|value| *value = text::shown(value, FOREIGN_MAX));
        let _ = self.0.send(event);
    }

    /// Tells who listens on this host what became of a task.
    pub fn tell_host(&self, record: &Record, message: String) {
        self.tell_of(record, message, Audience::Host);
    }

    /// Tells everybody of this audience what became of a task.
    pub fn tell_of(&self, record: &Record, message: String, audience: Audience) {
        self.tell(TaskEvent {
            task_id: record.task_id.clone(),
            alloc_id: record.alloc_id.clone(),
            task_name: record.name.clone(),
            at: SystemTime::now(),
            message,
            annotations: HashMap::new(),
            audience,
        });
    }

    /// Listens from now on.
    pub fn listen(&self) -> broadcast::Receiver<TaskEvent> {
        self.0.subscribe()
    }
}
