//! Events of tasks, which users see in `nomad alloc status` along with a task's states.

use std::{collections::HashMap, time::SystemTime};

use tokio::sync::broadcast;

use super::Record;
use crate::{
    ids::{AllocId, TaskId},
    text::{self, EXCERPT_MAX, MESSAGE_MAX},
};

/// One event of a task. Nomad keeps only the newest ten of a task, so events are sparse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskEvent {
    /// The id of the attempt.
    pub task_id: TaskId,
    /// The id of its allocation.
    pub alloc_id: AllocId,
    /// The task's name.
    pub task_name: String,
    /// When it happened.
    pub at: SystemTime,
    /// What happened.
    pub message: String,
    /// Further details.
    pub annotations: HashMap<String, String>,
    /// The receivers of the event.
    pub audience: Audience,
}

/// The receivers of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// Nomad's users and the listeners on this host.
    Everybody,
    /// Only the listeners on this host, because Nomad reports the same by itself.
    HostOnly,
}

/// Distributes events to all listeners. Sending never waits: a slow listener misses the oldest events.
#[derive(Debug, Clone)]
pub struct EventHub(broadcast::Sender<TaskEvent>);

impl Default for EventHub {
    fn default() -> Self {
        Self(broadcast::channel(1024).0)
    }
}

impl EventHub {
    /// Sends an event to all listeners. Without listeners the event is lost, which Nomad's contract permits. The
    /// event's texts are truncated and escaped here, because they may contain strings from images, registries and
    /// runtimes.
    pub fn send(&self, mut event: TaskEvent) {
        event.message = text::sanitize(&event.message, MESSAGE_MAX);
        event.annotations.values_mut().for_each(|value| *value = text::sanitize(value, EXCERPT_MAX));
        let _ = self.0.send(event);
    }

    /// Sends an event about a task to the listeners on this host.
    pub fn send_to_host(&self, record: &Record, message: String) {
        self.send_about(record, message, Audience::HostOnly);
    }

    /// Sends an event about a task to this audience.
    pub fn send_about(&self, record: &Record, message: String, audience: Audience) {
        self.send(TaskEvent {
            task_id: record.intent.task_id.clone(),
            alloc_id: record.intent.alloc_id.clone(),
            task_name: record.intent.name.clone(),
            at: SystemTime::now(),
            message,
            annotations: HashMap::new(),
            audience,
        });
    }

    /// Returns a receiver of all events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<TaskEvent> {
        self.0.subscribe()
    }
}
