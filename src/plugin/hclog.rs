//! Log lines the way Nomad's agent reads them from our stderr: one JSON object a line, hclog's keys.
//!
//! The agent asserts that `@level`, `@message` and `@timestamp` are strings, wants exactly six fractional digits, and
//! reads lines of up to 64 KiB. When it has died, nobody reads: writes fail with EPIPE, and that must not hurt us.

use std::{fmt, io::Write as _, time::SystemTime};

use serde_json::{Map, Value};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, layer::Context};

/// Longest text of one field; a line of a few fields stays well under the agent's 64 KiB.
const FIELD_MAX: usize = 16 << 10;

/// A layer that writes hclog lines to stderr.
#[derive(Debug, Clone, Copy, Default)]
pub struct Hclog;

impl<S: Subscriber> Layer<S> for Hclog {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let line = line(event, SystemTime::now());
        // Not `eprintln!`: it panics when the agent is gone.
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
    format!("{}\n", Value::Object(map))
}

/// RFC 3339 in UTC with six fractional digits.
fn timestamp(now: SystemTime) -> String {
    let stamp = prost_types::Timestamp::from(now);
    let whole = prost_types::Timestamp { nanos: 0, ..stamp }.to_string();
    format!("{}.{:06}Z", whole.trim_end_matches('Z'), stamp.nanos / 1000)
}

struct Fields(Map<String, Value>);

impl Fields {
    fn put(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = format!("{value:?}");
        if text.len() > FIELD_MAX {
            let end = (0..=FIELD_MAX).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
            text.truncate(end);
        }
        // The agent wants the message as a string, whatever was logged.
        self.put(field, text);
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
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
    fn timestamps_have_six_digits() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_786_000_000_000_001_999);
        assert_eq!(timestamp(at), "2026-08-06T07:06:40.000001Z");
        assert_eq!(timestamp(SystemTime::UNIX_EPOCH), "1970-01-01T00:00:00.000000Z");
    }
}
