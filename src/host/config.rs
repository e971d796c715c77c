//! Encodes configurations as Nomad does: a configuration is decoded by the plugin's schema and encoded as msgpack with
//! every key of the schema.

use rmpv::Value as MsgpackValue;
use serde_json::Value as Json;

use crate::pb::hclspec::{Spec, spec::Block};

/// A configuration that does not match the schema. Nomad refuses it without a call to the plugin.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("config: {0}")]
pub struct ConfigMismatch(String);

/// Decodes `json` by `spec` and encodes the result. Without a schema, the result is an empty configuration.
///
/// # Errors
/// Fails when an argument is unknown, missing or of the wrong type, as in Nomad.
pub fn encode(spec: Option<&Spec>, json: &Json) -> Result<Vec<u8>, ConfigMismatch> {
    let value = match spec {
        Some(spec) => decode(spec, "", Some(json).filter(|json| !json.is_null()))?,
        None => MsgpackValue::Map(Vec::new()),
    };
    Ok(pack(&value))
}

/// Encodes `json` without a schema, as a faulty host might send it.
pub fn encode_raw(json: &Json) -> Vec<u8> {
    pack(&convert(json))
}

fn pack(value: &MsgpackValue) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Err(error) = rmpv::encode::write_value(&mut bytes, value) {
        tracing::error!(%error, "could not encode a configuration; the plugin gets only a part of it");
    }
    bytes
}

/// Decodes `json` by a part of a schema. `name` names the option in errors.
fn decode(spec: &Spec, name: &str, json: Option<&Json>) -> Result<MsgpackValue, ConfigMismatch> {
    let mismatch = |problem: String| ConfigMismatch(problem);
    match &spec.block {
        Some(Block::Object(object)) => {
            let empty = serde_json::Map::new();
            let given = match json {
                Some(Json::Object(map)) => map,
                None => &empty,
                Some(_) => return Err(mismatch(format!("{name}: a block is required"))),
            };
            if let Some(unknown) = given.keys().find(|key| !object.attributes.contains_key(*key)) {
                let block = if name.is_empty() { String::new() } else { format!("{name}: ") };
                return Err(mismatch(format!("{block}unsupported argument {unknown:?}")));
            }
            let mut keys: Vec<&String> = object.attributes.keys().collect();
            keys.sort();
            let entries = keys.into_iter().map(|key| {
                let value = given.get(key).filter(|value| !value.is_null());
                Ok((MsgpackValue::from(key.as_str()), decode(&object.attributes[key], key, value)?))
            });
            entries.collect::<Result<Vec<_>, _>>().map(MsgpackValue::Map)
        }
        Some(Block::Attr(attr)) => match json {
            None if attr.required => Err(mismatch(format!("missing required argument {name:?}"))),
            None => Ok(MsgpackValue::Nil),
            Some(value) => coerce(&attr.r#type, name, value),
        },
        Some(Block::Default(default)) => {
            let primary = default.primary.as_deref().map(|spec| decode(spec, name, json)).transpose()?;
            match (primary, default.default.as_deref()) {
                (Some(MsgpackValue::Nil) | None, Some(fallback)) => decode(fallback, name, None),
                (primary, _) => Ok(primary.unwrap_or(MsgpackValue::Nil)),
            }
        }
        Some(Block::Literal(literal)) => {
            let value = serde_json::from_str(&literal.value).map_err(|error| mismatch(format!("{name}: {error}")))?;
            Ok(convert(&value))
        }
        Some(Block::BlockValue(block)) => match (json, block.nested.as_deref()) {
            (None, _) => Ok(MsgpackValue::Nil),
            (Some(Json::Array(items)), Some(nested)) if items.len() == 1 => decode(nested, name, items.first()),
            (Some(value), Some(nested)) => decode(nested, name, Some(value)),
            (Some(_), None) => Err(mismatch(format!("{name}: schema without a nested block"))),
        },
        Some(Block::BlockList(list)) => {
            let items: Vec<&Json> = match json {
                None => Vec::new(),
                Some(Json::Array(items)) => items.iter().collect(),
                Some(single) => vec![single],
            };
            let nested =
                list.nested.as_deref().ok_or_else(|| mismatch(format!("{name}: schema without a nested block")))?;
            items
                .into_iter()
                .map(|item| decode(nested, name, Some(item)))
                .collect::<Result<_, _>>()
                .map(MsgpackValue::Array)
        }
        Some(Block::BlockMap(map)) => {
            let Some(Json::Object(blocks)) = json else { return Ok(MsgpackValue::Map(Vec::new())) };
            let nested =
                map.nested.as_deref().ok_or_else(|| mismatch(format!("{name}: schema without a nested block")))?;
            let entries = blocks
                .iter()
                .map(|(label, block)| Ok((MsgpackValue::from(label.as_str()), decode(nested, name, Some(block))?)));
            entries.collect::<Result<_, _>>().map(MsgpackValue::Map)
        }
        _ => Err(mismatch(format!("{name}: this program does not know this kind of schema"))),
    }
}

/// Converts a value to the type of an attribute. Only HCL's own conversions between scalars are allowed.
fn coerce(kind: &str, name: &str, value: &Json) -> Result<MsgpackValue, ConfigMismatch> {
    let wrong = || ConfigMismatch(format!("{name}: a value of type {kind} is required"));
    match (kind, value) {
        ("string", Json::Number(number)) => Ok(MsgpackValue::from(number.to_string())),
        ("string", Json::Bool(flag)) => Ok(MsgpackValue::from(flag.to_string())),
        ("bool", Json::String(text)) => text.parse::<bool>().map(MsgpackValue::from).map_err(|_| wrong()),
        ("number", Json::String(text)) => text.parse::<i64>().map(MsgpackValue::from).map_err(|_| wrong()),
        ("string", Json::String(_)) | ("bool", Json::Bool(_)) | ("number", Json::Number(_)) => Ok(convert(value)),
        ("list(string)", Json::Array(items)) => {
            items.iter().map(|item| coerce("string", name, item)).collect::<Result<_, _>>().map(MsgpackValue::Array)
        }
        // A single block counts as a list with one element.
        ("list(map(string))", Json::Object(_)) => coerce(kind, name, &Json::Array(vec![value.clone()])),
        ("list(map(string))", Json::Array(items)) => {
            let map = |item: &Json| {
                let entries = item.as_object().ok_or_else(wrong)?.iter();
                let entries =
                    entries.map(|(key, value)| Ok((MsgpackValue::from(key.as_str()), coerce("string", name, value)?)));
                entries.collect::<Result<_, _>>().map(MsgpackValue::Map)
            };
            items.iter().map(map).collect::<Result<_, _>>().map(MsgpackValue::Array)
        }
        _ => Err(wrong()),
    }
}

/// Converts a value without a schema.
fn convert(json: &Json) -> MsgpackValue {
    match json {
        Json::Null => MsgpackValue::Nil,
        Json::Bool(flag) => MsgpackValue::Boolean(*flag),
        Json::Number(number) => {
            number.as_i64().map_or_else(|| MsgpackValue::F64(number.as_f64().unwrap_or_default()), MsgpackValue::from)
        }
        Json::String(text) => MsgpackValue::from(text.as_str()),
        Json::Array(items) => MsgpackValue::Array(items.iter().map(convert).collect()),
        Json::Object(map) => MsgpackValue::Map(
            map.iter().map(|(key, value)| (MsgpackValue::from(key.as_str()), convert(value))).collect(),
        ),
    }
}
