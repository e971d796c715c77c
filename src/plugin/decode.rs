//! Decodes Nomad's msgpack into checked values, by the option tables. All faults are collected; none stops the decoding
//! of the other options.
//!
//! Nomad decodes a job against the plugin's schema and sends every key, absent ones as nil. Numbers come as any integer
//! form, as a float or as text; texts may come as binary; older helpers wrap a single block into an array.

use std::collections::BTreeMap;

use rmpv::Value as MsgpackValue;

use super::options::{OptionKind, OptionRow, Presence};

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
pub(crate) struct Values(BTreeMap<&'static str, Value>);

impl Values {
    /// Returns the text of an option.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        match self.0.get(name) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// Returns the text of an option unless it is empty; HCL's `""` mostly means "not set".
    pub(crate) fn non_empty_text(&self, name: &str) -> Option<&str> {
        self.text(name).filter(|text| !text.is_empty())
    }

    /// Returns the value of a flag.
    pub(crate) fn flag(&self, name: &str) -> Option<bool> {
        match self.0.get(name) {
            Some(Value::Flag(flag)) => Some(*flag),
            _ => None,
        }
    }

    /// Returns the value of a number.
    pub(crate) fn number(&self, name: &str) -> Option<i64> {
        match self.0.get(name) {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    /// Says whether the option has a value.
    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Returns the texts of a list; `None` when the list is absent.
    pub(crate) fn list(&self, name: &str) -> Option<&[String]> {
        match self.0.get(name) {
            Some(Value::List(list)) => Some(list),
            _ => None,
        }
    }

    /// Returns the content of a block.
    pub(crate) fn block(&self, name: &str) -> Option<&Self> {
        match self.0.get(name) {
            Some(Value::Block(block)) => Some(block),
            _ => None,
        }
    }

    /// Returns the content of a block; an absent block is empty.
    pub(crate) fn block_or_empty(&self, name: &str) -> &Self {
        static EMPTY: Values = Values(BTreeMap::new());
        self.block(name).unwrap_or(&EMPTY)
    }

    /// Returns the contents of the blocks of this name, in order.
    pub(crate) fn blocks(&self, name: &str) -> &[Self] {
        match self.0.get(name) {
            Some(Value::Blocks(blocks)) => blocks,
            _ => &[],
        }
    }

    /// Returns the texts of a map by their names; an absent map is empty.
    pub(crate) fn map(&self, name: &str) -> BTreeMap<String, String> {
        match self.0.get(name) {
            Some(Value::Map(map)) => map.clone(),
            _ => BTreeMap::new(),
        }
    }

    /// Returns the labels and contents of labelled blocks.
    pub(crate) fn labelled(&self, name: &str) -> impl Iterator<Item = (&String, &Self)> {
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
pub(crate) fn decode(rows: &'static [OptionRow], bytes: &[u8], faults: &mut Vec<String>) -> Values {
    let wire = if bytes.is_empty() {
        MsgpackValue::Map(Vec::new())
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
    decode_block(rows, &wire, &mut path, faults).unwrap_or_default()
}

fn decode_block(
    rows: &'static [OptionRow],
    wire: &MsgpackValue,
    path: &mut String,
    faults: &mut Vec<String>,
) -> Option<Values> {
    let entries = match wire {
        MsgpackValue::Map(entries) => entries.as_slice(),
        MsgpackValue::Nil => &[],
        other => {
            let name = if path.is_empty() { "config" } else { path.as_str() };
            faults.push(format!("{name} must be a block, not {}", kind_of(other)));
            return None;
        }
    };
    let mut given: BTreeMap<String, &MsgpackValue> = BTreeMap::new();
    for (key, value) in entries {
        match text(key) {
            Some(key) => drop(given.insert(key, value)),
            None => faults.push(format!("{path}: an option's name must be a string, not {}", kind_of(key))),
        }
    }
    for name in given.keys().filter(|name| !rows.iter().any(|row| row.name == *name)) {
        faults.push(format!("unknown option {}{}", join(path, name).escape_debug(), suggestion(rows, name)));
    }
    let mut values = Values::default();
    for row in rows {
        let length = path.len();
        *path = join(path, row.name);
        match given.get(row.name) {
            None | Some(MsgpackValue::Nil) => match row.presence {
                Presence::Required => faults.push(format!("{path} is required")),
                Presence::Default(literal) => drop(values.0.insert(row.name, literal_value(row.kind, literal))),
                Presence::Optional => {}
            },
            Some(wire) => {
                if let Some(value) = decode_value(row.kind, wire, path, faults) {
                    refuse_nul(&value, path, faults);
                    values.0.insert(row.name, value);
                }
            }
        }
        path.truncate(length);
    }
    Some(values)
}

fn decode_value(kind: OptionKind, wire: &MsgpackValue, path: &mut String, faults: &mut Vec<String>) -> Option<Value> {
    let mut wrong = |wanted: &str| {
        faults.push(format!("{path} must be {wanted}, not {}", kind_of(wire)));
        None
    };
    match kind {
        OptionKind::Text => text(wire).map(Value::Text).or_else(|| wrong("a string")),
        OptionKind::Flag => wire.as_bool().map(Value::Flag).or_else(|| wrong("true or false")),
        OptionKind::Number => number(wire).map(Value::Number).or_else(|| wrong("a whole number")),
        OptionKind::List => match wire {
            MsgpackValue::Array(items) => {
                let texts: Option<Vec<String>> = items.iter().map(text).collect();
                texts.map(Value::List).or_else(|| wrong("a list of strings"))
            }
            _ => wrong("a list of strings"),
        },
        OptionKind::Block(rows) => match wire {
            MsgpackValue::Array(items) if items.is_empty() => None,
            MsgpackValue::Array(items) if items.len() == 1 => {
                decode_block(rows, &items[0], path, faults).map(Value::Block)
            }
            other => decode_block(rows, other, path, faults).map(Value::Block),
        },
        OptionKind::Blocks(rows) => {
            let items = match wire {
                MsgpackValue::Array(items) => items.as_slice(),
                single @ MsgpackValue::Map(_) => std::slice::from_ref(single),
                _ => return wrong("a list of blocks"),
            };
            let mut blocks = Vec::new();
            for (n, item) in items.iter().enumerate() {
                let length = path.len();
                path.push_str(&format!("[{n}]"));
                blocks.extend(decode_block(rows, item, path, faults));
                path.truncate(length);
            }
            Some(Value::Blocks(blocks))
        }
        OptionKind::Map => decode_map(wire).map(Value::Map).or_else(|| wrong("a map of strings")),
        OptionKind::Labelled(rows) => {
            let MsgpackValue::Map(entries) = wire else { return wrong("labelled blocks") };
            let mut blocks = BTreeMap::new();
            for (label, item) in entries {
                let Some(label) = text(label) else { continue };
                let length = path.len();
                path.push_str(&format!("[{label:?}]"));
                if let Some(block) = decode_block(rows, item, path, faults) {
                    blocks.insert(label, block);
                }
                path.truncate(length);
            }
            Some(Value::Labelled(blocks))
        }
    }
}

/// Decodes a map of strings. Nomad sends one map for each block of this name; later maps win.
fn decode_map(wire: &MsgpackValue) -> Option<BTreeMap<String, String>> {
    let maps = match wire {
        MsgpackValue::Array(items) => items.as_slice(),
        single => std::slice::from_ref(single),
    };
    let mut map = BTreeMap::new();
    for entries in maps {
        let MsgpackValue::Map(entries) = entries else { return None };
        for (key, value) in entries {
            let value = text(value).or_else(|| number(value).map(|number| number.to_string()))?;
            map.insert(text(key)?, value);
        }
    }
    Some(map)
}

/// Refuses NUL bytes. C programs (the kernel, crun) end a text at a NUL byte, so they would see another text than the
/// one that is checked here.
fn refuse_nul(value: &Value, path: &str, faults: &mut Vec<String>) {
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
fn literal_value(kind: OptionKind, literal: &str) -> Value {
    match kind {
        OptionKind::Flag => Value::Flag(literal == "true"),
        OptionKind::Number => Value::Number(literal.parse().unwrap_or_default()),
        _ => Value::Text(literal.trim_matches('"').to_owned()),
    }
}

fn text(wire: &MsgpackValue) -> Option<String> {
    match wire {
        MsgpackValue::String(text) => text.as_str().map(str::to_owned),
        MsgpackValue::Binary(bytes) => String::from_utf8(bytes.clone()).ok(),
        _ => None,
    }
}

/// Reads a number. Integral floats and decimal texts count as well: HCL's numbers arrive in whichever form holds them
/// exactly.
fn number(wire: &MsgpackValue) -> Option<i64> {
    if let Some(number) = wire.as_i64() {
        return Some(number);
    }
    let float = wire.as_f64().filter(|_| matches!(wire, MsgpackValue::F32(_) | MsgpackValue::F64(_)));
    if let Some(float) = float {
        let whole = float.fract() == 0.0 && float.abs() < 9.0e18;
        #[allow(clippy::cast_possible_truncation, reason = "whole and in range, as just checked")]
        return whole.then_some(float as i64);
    }
    text(wire)?.parse().ok()
}

fn kind_of(wire: &MsgpackValue) -> &'static str {
    match wire {
        MsgpackValue::Nil => "nothing",
        MsgpackValue::Boolean(_) => "a bool",
        MsgpackValue::Integer(_) | MsgpackValue::F32(_) | MsgpackValue::F64(_) => "a number",
        MsgpackValue::String(_) | MsgpackValue::Binary(_) => "a string",
        MsgpackValue::Array(_) => "a list",
        MsgpackValue::Map(_) => "a block",
        MsgpackValue::Ext(..) => "an extension value",
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// Suggests the option whose name differs least ("did you mean"), if it is near enough.
fn suggestion(rows: &[OptionRow], name: &str) -> String {
    let near = rows.iter().map(|row| (distance(row.name, name), row.name)).min().filter(|(distance, _)| *distance <= 2);
    near.map(|(_, name)| format!(" (did you mean {name}?)")).unwrap_or_default()
}

/// Returns the Levenshtein distance of two texts.
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
        plugin::options::{PLUGIN_OPTIONS, TASK_OPTIONS},
    };
    use proptest::prelude::*;

    #[test]
    fn all_faults_are_named_at_once() {
        let mut faults = Vec::new();
        let config = serde_json::json!({
            "commmand": "x", "args": "not a list", "privileged": "yes", "mounts": [{"type": "bind"}], "zzzzzzz": 1,
        });
        decode(TASK_OPTIONS, &encode_raw(&config), &mut faults);
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
        let values = decode(TASK_OPTIONS, &encode_raw(&config), &mut faults);
        assert!(faults.is_empty(), "{faults:?}");
        assert_eq!(values.block("auth").and_then(|auth| auth.text("username")), Some("u"));
        assert_eq!(values.text("image_pull_timeout"), Some("5m"));
        assert_eq!(values.list("args"), None);
        let binary = MsgpackValue::Map(vec![(MsgpackValue::from("image"), MsgpackValue::Binary(b"b".to_vec()))]);
        let mut bytes = Vec::new();
        rmpv::encode::write_value(&mut bytes, &binary).expect("in memory");
        assert_eq!(decode(TASK_OPTIONS, &bytes, &mut faults).text("image"), Some("b"));
        let values = decode(
            PLUGIN_OPTIONS,
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
            decode(TASK_OPTIONS, &encode_raw(&config), &mut faults);
            assert_eq!(faults, [format!("{option} contains a NUL byte")]);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut faults = Vec::new();
            decode(TASK_OPTIONS, &bytes, &mut faults);
            decode(PLUGIN_OPTIONS, &bytes, &mut faults);
        }
    }
}
