//! What Nomad shows of an allocation: its state, and the events of its task. This module does no I/O.

use std::{fmt, time::Duration};

use serde_json::Value;

use super::job::TASK;

/// The kind of a task's event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Started,
    Terminated(i32),
    /// Nomad has lost the connection to the plugin, and takes the loss for the task's end.
    Disconnected(String),
    DriverFailure(String),
    Restarting,
    NotRestarting,
    /// Another kind of event, with Nomad's own text.
    Other(String),
}

/// An event of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    /// The time of the event as Nomad gives it, in nanoseconds since 1970.
    pub nanos: u64,
    /// The time of the event since the beginning of the run.
    pub then: Duration,
    pub kind: Kind,
}

/// An allocation, as Nomad shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AllocView {
    pub id: String,
    /// `pending`, `running`, `complete`, `failed`, `lost`.
    pub status: String,
    /// Nomad's description of the status.
    pub why: String,
    /// The state of the task: `pending`, `running`, `dead`.
    pub state: String,
    pub is_failed: bool,
    pub events: Vec<Event>,
}

impl AllocView {
    /// Reads an entry of `/v1/allocations`. `began` is the beginning of the run in nanoseconds since 1970.
    pub(super) fn read(entry: &Value, began: u64) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let task = &entry["TaskStates"][TASK];
        let events = task["Events"].as_array().into_iter().flatten().map(|event| Event::read(event, began));
        Self {
            id: text(&entry["ID"]),
            status: text(&entry["ClientStatus"]),
            why: text(&entry["ClientDescription"]),
            state: text(&task["State"]),
            is_failed: task["Failed"] == true,
            events: events.collect(),
        }
    }
}

impl Event {
    fn read(event: &Value, began: u64) -> Self {
        let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
        let kind = match event["Type"].as_str().unwrap_or_default() {
            "Started" => Kind::Started,
            // Such an event has no exit code, which reads as 0.
            "Terminated" if text("Message").contains("code = Unavailable") => Kind::Disconnected(text("Message")),
            "Terminated" => {
                let code = event["ExitCode"].as_i64().and_then(|code| i32::try_from(code).ok());
                Kind::Terminated(code.unwrap_or(-1))
            }
            "Driver Failure" => Kind::DriverFailure(text("DriverError")),
            "Restarting" => Kind::Restarting,
            "Not Restarting" => Kind::NotRestarting,
            other => Kind::Other(format!("{other}: {}", text("DisplayMessage"))),
        };
        let nanos = event["Time"].as_u64().unwrap_or_default();
        Self { nanos, then: Duration::from_nanos(nanos.saturating_sub(began)), kind }
    }
}

impl Kind {
    /// The name of the kind, which distinguishes events of the same time.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Terminated(_) => "terminated",
            Self::Disconnected(_) => "disconnected",
            Self::DriverFailure(_) => "driver failure",
            Self::Restarting => "restarting",
            Self::NotRestarting => "not restarting",
            Self::Other(_) => "other",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Terminated(code) => write!(f, "terminated with {code}"),
            Self::Disconnected(message) => write!(f, "terminated without a code: {message}"),
            Self::DriverFailure(message) => write!(f, "driver failure: {message}"),
            Self::Other(text) => f.write_str(text),
            _ => f.write_str(self.name()),
        }
    }
}

#[test]
fn an_allocation_is_read() {
    let entry = serde_json::json!({"ID": "a", "ClientStatus": "running", "TaskStates": {"t": {
    "State": "running", "Failed": false, "Events": [
        {"Type": "Terminated", "Time": 3_000_000_000_u64, "ExitCode": 137},
        {"Type": "Driver Failure", "Time": 4_000_000_000_u64, "DriverError": "no space"},
    ]}}});
    let view = AllocView::read(&entry, 1_000_000_000);
    assert_eq!((view.id.as_str(), view.status.as_str(), view.state.as_str()), ("a", "running", "running"));
    assert_eq!((view.events[0].then, &view.events[0].kind), (Duration::from_secs(2), &Kind::Terminated(137)));
    assert_eq!(view.events[1].kind, Kind::DriverFailure("no space".to_owned()));
    let message = "rpc error: code = Unavailable desc = error reading from server: EOF";
    let lost = serde_json::json!({"Type": "Terminated", "ExitCode": 0, "Message": message});
    assert_eq!(Event::read(&lost, 0).kind, Kind::Disconnected(message.to_owned()));
}
