//! Log lines in the form that Nomad's agent reads from the plugin's stderr: one JSON object a line, with hclog's keys.
//!
//! The agent asserts that `@level`, `@message` and `@timestamp` are strings, requires exactly six fractional digits,
//! and reads lines of up to 64 KiB. When the agent has died, writes fail with EPIPE; that must not harm the plugin.
//!
//! The agent decodes the JSON and prints messages unescaped (hashicorp/go-hclog, `intlogger.go`), so control characters
//! that only JSON escapes would reach a terminal, or begin a line of their own in a log file. Texts are therefore
//! escaped before they become JSON.

use std::{fmt, io::Write as _, time::SystemTime};

use serde_json::{Map, Value};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, layer::Context};

use crate::text;

/// The longest text of one field, in characters. The longest text that is needed is a shim's log.
const FIELD_MAX: usize = 8 << 10;
/// The longest line, in bytes: the agent reads 64 KiB, and splits a longer line into several, none of them JSON.
const LINE_MAX: usize = 60 << 10;
/// The longest text of one field in a line that would otherwise exceed `LINE_MAX`, in characters.
const SHORT_FIELD_MAX: usize = 500;

/// A layer that writes hclog lines to stderr.
#[derive(Debug, Clone, Copy, Default)]
pub struct Hclog;

impl<S: Subscriber> Layer<S> for Hclog {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let line = line(event, SystemTime::now());
        // `eprintln!` would panic when the agent is gone.
        let _ = std::io::stderr().lock().write_all(line.as_bytes());
    }
}

fn line(event: &Event<'_>, now: SystemTime) -> String {
    let mut fields = Fields(Map::new());
    event.record(&mut fields);
    let metadata = event.metadata();
    let level = match *metadata.level() {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    };
    let Fields(mut map) = fields;
    let message = map.remove("message").unwrap_or_else(|| Value::from(metadata.name()));
    map.insert("@level".to_owned(), Value::from(level));
    map.insert("@message".to_owned(), message);
    map.insert("@module".to_owned(), Value::from(metadata.target()));
    map.insert("@timestamp".to_owned(), Value::from(timestamp(now)));
    encode(map)
}

/// Encodes one line of JSON, short enough for the agent to read it whole.
fn encode(map: Map<String, Value>) -> String {
    let mut object = Value::Object(map);
    let mut line = object.to_string();
    if line.len() > LINE_MAX {
        for value in object.as_object_mut().into_iter().flat_map(Map::values_mut) {
            if let Value::String(long) = value {
                *long = text::sanitize(long, SHORT_FIELD_MAX);
            }
        }
        line = object.to_string();
    }
    line + "\n"
}

/// Formats a time by RFC 3339 in UTC with six fractional digits.
fn timestamp(now: SystemTime) -> String {
    let stamp = prost_types::Timestamp::from(now);
    let whole = prost_types::Timestamp { nanos: 0, ..stamp }.to_string();
    format!("{}.{:06}Z", whole.trim_end_matches('Z'), stamp.nanos / 1000)
}

/// Collects the fields of an event.
struct Fields(Map<String, Value>);

impl Fields {
    fn put(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // The agent requires the message to be a string, whatever type was logged.
        self.record_str(field, &format!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, text::sanitize(value, FIELD_MAX));
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value);
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value);
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn no_text_breaks_a_line_or_controls_a_terminal() {
        let long = format!("{}\u{1b}[31m\r\n\u{9b}2J\u{202e}\\\"", "\"".repeat(1 << 20));
        let fields: Map<_, _> = ["@message", "@level", "a", "b", "c", "d", "e", "f"]
            .map(|name| (name.to_owned(), Value::from(text::sanitize(&long, FIELD_MAX))))
            .into_iter()
            .collect();
        let line = encode(fields);
        assert!(line.len() < 64 << 10, "{}", line.len());
        assert_eq!(line.trim_end().lines().count(), 1);
        let read: Map<String, Value> = serde_json::from_str(&line).expect("JSON");
        for value in read.values().filter_map(Value::as_str) {
            assert!(!value.chars().any(char::is_control) && value.contains("\\u{1b}[31m"), "{value}");
        }
    }

    #[test]
    fn timestamps_have_six_digits() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_786_000_000_000_001_999);
        assert_eq!(timestamp(at), "2026-08-06T07:06:40.000001Z");
        assert_eq!(timestamp(SystemTime::UNIX_EPOCH), "1970-01-01T00:00:00.000000Z");
    }
}
