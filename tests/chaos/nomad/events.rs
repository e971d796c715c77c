//! What Nomad shows of an allocation: its state, and the events of its task. Pure.

use std::{fmt, time::Duration};

use serde_json::Value;

use super::job::TASK;

/// What an event of a task tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Started,
    Terminated(i32),
    /// Nomad has lost the connection to the plugin, and takes that for the task's end.
    Disconnected(String),
    DriverFailure(String),
    Restarting,
    NotRestarting,
    /// Something else, by Nomad's own words.
    Other(String),
}

/// An event of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    /// When, as Nomad says it.
    pub nanos: u64,
    /// When, since the beginning of the run.
    pub then: Duration,
    pub kind: Kind,
}

/// An allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AllocView {
    pub id: String,
    /// `pending`, `running`, `complete`, `failed`, `lost`.
    pub status: String,
    /// What Nomad says of that.
    pub why: String,
    /// The task's: `pending`, `running`, `dead`.
    pub state: String,
    pub is_failed: bool,
    pub events: Vec<Event>,
}

impl AllocView {
    /// Reads an entry of `/v1/allocations`. `began` is the run's beginning in nanoseconds since 1970.
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
            // It has no code then, which reads as 0.
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
    /// Tells events of the same time apart.
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
