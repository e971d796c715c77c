//! Decodes Nomad's msgpack into checked values, by the option tables. All faults are collected; none stops the decoding
//! of the other options.
//!
//! Nomad decodes a job against the plugin's schema and sends every key, absent ones as nil. Numbers come as any integer
//! form, as a float or as text; texts may come as binary; older helpers wrap a single block into an array.

use std::collections::BTreeMap;

use rmpv::Value as Wire;

use super::options::{Kind, Presence, Row};

/// The decoded value of an option.
#[derive(Clone, PartialEq)]
enum Value {
    Text(String),
    Flag(bool),
    Number(i64),
    List(Vec<String>),
    Block(Values),
    Blocks(Vec<Values>),
    Labelled(BTreeMap<String, Values>),
    Map(BTreeMap<String, String>),
}

/// Decoded options by name; options that were absent and have no default are missing.
#[derive(Clone, Default, PartialEq)]
pub struct Values(BTreeMap<&'static str, Value>);

impl Values {
    /// Returns the text of an option.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.0.get(name) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// Returns the text of an option unless it is empty; HCL's `""` mostly means "not set".
    pub fn filled(&self, name: &str) -> Option<&str> {
        self.text(name).filter(|text| !text.is_empty())
    }

    /// Returns the value of a flag.
    pub fn flag(&self, name: &str) -> Option<bool> {
        match self.0.get(name) {
            Some(Value::Flag(flag)) => Some(*flag),
            _ => None,
        }
    }

    /// Returns the value of a number.
    pub fn number(&self, name: &str) -> Option<i64> {
        match self.0.get(name) {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    /// Whether the option has a value.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Returns the texts of a list; `None` when the list is absent.
    pub fn list(&self, name: &str) -> Option<&[String]> {
        match self.0.get(name) {
            Some(Value::List(list)) => Some(list),
            _ => None,
        }
    }

    /// Returns the content of a block.
    pub fn block(&self, name: &str) -> Option<&Self> {
        match self.0.get(name) {
            Some(Value::Block(block)) => Some(block),
            _ => None,
        }
    }

    /// Returns the contents of the blocks of this name, in order.
    pub fn blocks(&self, name: &str) -> &[Self] {
        match self.0.get(name) {
            Some(Value::Blocks(blocks)) => blocks,
            _ => &[],
        }
    }

    /// Returns the texts of a map by their names; an absent map is empty.
    pub fn map(&self, name: &str) -> BTreeMap<String, String> {
        match self.0.get(name) {
            Some(Value::Map(map)) => map.clone(),
            _ => BTreeMap::new(),
        }
    }

    /// Returns the labels and contents of labelled blocks.
    pub fn labelled(&self, name: &str) -> impl Iterator<Item = (&String, &Self)> {
        let blocks = match self.0.get(name) {
            Some(Value::Labelled(blocks)) => Some(blocks),
            _ => None,
        };
        blocks.into_iter().flatten()
    }
}

/// Decodes `bytes` by `rows`. Empty input means that all options are absent.
///
/// Each fault names its option's path; values that may be secret are not repeated.
pub fn decode(rows: &'static [Row], bytes: &[u8], faults: &mut Vec<String>) -> Values {
    let wire = if bytes.is_empty() {
        Wire::Map(Vec::new())
    } else {
        match rmpv::decode::read_value(&mut &bytes[..]) {
            Ok(wire) => wire,
            Err(error) => {
                faults.push(format!("config is not msgpack: {error}"));
                return Values::default();
            }
        }
    };
    let mut path = String::new();
    object(rows, &wire, &mut path, faults).unwrap_or_default()
}

fn object(rows: &'static [Row], wire: &Wire, path: &mut String, faults: &mut Vec<String>) -> Option<Values> {
    let entries = match wire {
        Wire::Map(entries) => entries.as_slice(),
        Wire::Nil => &[],
        other => {
            let name = if path.is_empty() { "config" } else { path.as_str() };
            faults.push(format!("{name} must be a block, not {}", kind_of(other)));
            return None;
        }
    };
    let mut given: BTreeMap<String, &Wire> = BTreeMap::new();
    for (key, value) in entries {
        match text(key) {
            Some(key) => drop(given.insert(key, value)),
            None => faults.push(format!("{path}: an option's name must be a string, not {}", kind_of(key))),
        }
    }
    for name in given.keys().filter(|name| !rows.iter().any(|row| row.name == *name)) {
        faults.push(format!("unknown option {}{}", join(path, name).escape_debug(), nearest(rows, name)));
    }
    let mut values = Values::default();
    for row in rows {
        let length = path.len();
        *path = join(path, row.name);
        match given.get(row.name) {
            None | Some(Wire::Nil) => match row.presence {
                Presence::Required => faults.push(format!("{path} is required")),
                Presence::Default(literal) => drop(values.0.insert(row.name, literal_value(row.kind, literal))),
                Presence::Optional => {}
            },
            Some(wire) => {
                if let Some(value) = value(row.kind, wire, path, faults) {
                    no_nul(&value, path, faults);
                    values.0.insert(row.name, value);
                }
            }
        }
        path.truncate(length);
    }
    Some(values)
}

fn value(kind: Kind, wire: &Wire, path: &mut String, faults: &mut Vec<String>) -> Option<Value> {
    let mut wrong = |wanted: &str| {
        faults.push(format!("{path} must be {wanted}, not {}", kind_of(wire)));
        None
    };
    match kind {
        Kind::Text => text(wire).map(Value::Text).or_else(|| wrong("a string")),
        Kind::Flag => wire.as_bool().map(Value::Flag).or_else(|| wrong("true or false")),
        Kind::Number => number(wire).map(Value::Number).or_else(|| wrong("a whole number")),
        Kind::List => match wire {
            Wire::Array(items) => {
                let texts: Option<Vec<String>> = items.iter().map(text).collect();
                texts.map(Value::List).or_else(|| wrong("a list of strings"))
            }
            _ => wrong("a list of strings"),
        },
        Kind::Block(rows) => match wire {
            Wire::Array(items) if items.is_empty() => None,
            Wire::Array(items) if items.len() == 1 => object(rows, &items[0], path, faults).map(Value::Block),
            other => object(rows, other, path, faults).map(Value::Block),
        },
        Kind::Blocks(rows) => {
            let items = match wire {
                Wire::Array(items) => items.as_slice(),
                single @ Wire::Map(_) => std::slice::from_ref(single),
                _ => return wrong("a list of blocks"),
            };
            let mut blocks = Vec::new();
            for (n, item) in items.iter().enumerate() {
                let length = path.len();
                path.push_str(&format!("[{n}]"));
                blocks.extend(object(rows, item, path, faults));
                path.truncate(length);
            }
            Some(Value::Blocks(blocks))
        }
        Kind::Map => {
            // Nomad sends one map for each block of this name; later maps win.
            let maps = match wire {
                Wire::Array(items) => items.as_slice(),
                single => std::slice::from_ref(single),
            };
            let mut map = BTreeMap::new();
            for entries in maps {
                let Wire::Map(entries) = entries else { return wrong("a map of strings") };
                for (key, value) in entries {
                    let scalar = text(value).or_else(|| number(value).map(|number| number.to_string()));
                    let (Some(key), Some(value)) = (text(key), scalar) else { return wrong("a map of strings") };
                    map.insert(key, value);
                }
            }
            Some(Value::Map(map))
        }
        Kind::Labelled(rows) => {
            let Wire::Map(entries) = wire else { return wrong("labelled blocks") };
            let mut blocks = BTreeMap::new();
            for (label, item) in entries {
                let Some(label) = text(label) else { continue };
                let length = path.len();
                path.push_str(&format!("[{label:?}]"));
                if let Some(block) = object(rows, item, path, faults) {
                    blocks.insert(label, block);
                }
                path.truncate(length);
            }
            Some(Value::Labelled(blocks))
        }
    }
}

/// Refuses NUL bytes: C programs (the kernel, crun) end a text there, and would see another text than the one that is
/// checked here.
fn no_nul(value: &Value, path: &str, faults: &mut Vec<String>) {
    let mut check = |text: &str| {
        if text.contains('\0') {
            faults.push(format!("{path} contains a NUL byte"));
        }
    };
    match value {
        Value::Text(text) => check(text),
        Value::List(list) => list.iter().for_each(|text| check(text)),
        Value::Map(map) => map.iter().flat_map(|(key, value)| [key, value]).for_each(|text| check(text)),
        Value::Labelled(blocks) => blocks.keys().for_each(|label| check(label)),
        // The options of a block are checked one by one.
        Value::Block(_) | Value::Blocks(_) => {}
        Value::Flag(_) | Value::Number(_) => {}
    }
}

/// Parses a default of the option tables: a quoted text, a flag or a number.
fn literal_value(kind: Kind, literal: &str) -> Value {
    match kind {
        Kind::Flag => Value::Flag(literal == "true"),
        Kind::Number => Value::Number(literal.parse().unwrap_or_default()),
        _ => Value::Text(literal.trim_matches('"').to_owned()),
    }
}

fn text(wire: &Wire) -> Option<String> {
    match wire {
        Wire::String(text) => text.as_str().map(str::to_owned),
        Wire::Binary(bytes) => String::from_utf8(bytes.clone()).ok(),
        _ => None,
    }
}

/// Reads a number. Integral floats and decimal texts count as well: HCL's numbers arrive in whichever form holds them
/// exactly.
fn number(wire: &Wire) -> Option<i64> {
    if let Some(number) = wire.as_i64() {
        return Some(number);
    }
    let float = wire.as_f64().filter(|_| matches!(wire, Wire::F32(_) | Wire::F64(_)));
    if let Some(float) = float {
        let whole = float.fract() == 0.0 && float.abs() < 9.0e18;
        #[allow(clippy::cast_possible_truncation, reason = "whole and in range, as just checked")]
        return whole.then_some(float as i64);
    }
    text(wire)?.parse().ok()
}

fn kind_of(wire: &Wire) -> &'static str {
    match wire {
        Wire::Nil => "nothing",
        Wire::Boolean(_) => "a bool",
        Wire::Integer(_) | Wire::F32(_) | Wire::F64(_) => "a number",
        Wire::String(_) | Wire::Binary(_) => "a string",
        Wire::Array(_) => "a list",
        Wire::Map(_) => "a block",
        Wire::Ext(..) => "an extension value",
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// Suggests the option whose name differs least ("did you mean"), if it is near enough.
fn nearest(rows: &[Row], name: &str) -> String {
    let near = rows.iter().map(|row| (distance(row.name, name), row.name)).min().filter(|(distance, _)| *distance <= 2);
    near.map(|(_, name)| format!(" (did you mean {name}?)")).unwrap_or_default()
}

/// The Levenshtein distance of two texts.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        host::encode_raw,
        plugin::options::{PLUGIN, TASK},
    };
    use proptest::prelude::*;

    #[test]
    fn all_faults_are_named_at_once() {
        let mut faults = Vec::new();
        let config = serde_json::json!({
            "commmand": "x", "args": "not a list", "privileged": "yes", "mounts": [{"type": "bind"}], "zzzzzzz": 1,
        });
        decode(TASK, &encode_raw(&config), &mut faults);
        let text = faults.join("; ");
        for part in [
            "unknown option commmand (did you mean command?)",
            "unknown option zzzzzzz",
            "args must be a list of strings, not a string",
            "privileged must be true or false, not a string",
            "mounts[0].target is required",
            "image is required",
        ] {
            assert!(text.contains(part), "{part:?} in {text}");
        }
        assert_eq!(faults.len(), 6, "{text}");
    }

    #[test]
    fn nomads_many_encodings_are_taken() {
        let mut faults = Vec::new();
        let config =
            serde_json::json!({"image": "a", "args": null, "auth": [{"username": "u", "password": "p"}], "mounts": []});
        let values = decode(TASK, &encode_raw(&config), &mut faults);
        assert!(faults.is_empty(), "{faults:?}");
        assert_eq!(values.block("auth").and_then(|auth| auth.text("username")), Some("u"));
        assert_eq!(values.text("image_pull_timeout"), Some("5m"));
        assert_eq!(values.list("args"), None);
        let binary = Wire::Map(vec![(Wire::from("image"), Wire::Binary(b"b".to_vec()))]);
        let mut bytes = Vec::new();
        rmpv::encode::write_value(&mut bytes, &binary).expect("in memory");
        assert_eq!(decode(TASK, &bytes, &mut faults).text("image"), Some("b"));
        let values = decode(
            PLUGIN,
            &encode_raw(&serde_json::json!({"shim": {"pool": 3.0}, "runtime": {"x": {"binary": "/x"}}})),
            &mut faults,
        );
        assert_eq!(values.block("shim").and_then(|shim| shim.number("pool")), Some(3));
        assert_eq!(values.labelled("runtime").count(), 1);
        assert!(faults.is_empty(), "{faults:?}");
    }

    #[test]
    fn nul_bytes_are_refused_in_every_kind_of_text() {
        for (option, value) in [
            ("command", serde_json::json!("/bin/sh\0x")),
            ("args", serde_json::json!(["a", "b\0"])),
            ("sysctl", serde_json::json!({"fs.mqueue.msg_max\0x": "1"})),
            ("labels", serde_json::json!([{"a": "\0"}])),
            ("mounts[0].target", serde_json::json!([{"target": "/etc/passwd\0x"}])),
            ("mounts[0].options", serde_json::json!([{"target": "/t", "options": ["size=1\0"]}])),
            ("auth.password", serde_json::json!({"username": "u", "password": "secret\0"})),
        ] {
            let mut faults = Vec::new();
            let mut config = serde_json::json!({"image": "a"});
            config[option.split(['.', '[']).next().expect("a name")] = value;
            decode(TASK, &encode_raw(&config), &mut faults);
            assert_eq!(faults, [format!("{option} contains a NUL byte")]);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut faults = Vec::new();
            decode(TASK, &bytes, &mut faults);
            decode(PLUGIN, &bytes, &mut faults);
        }
    }
}
