//! Property tests: everything that Nomad can send decodes, or is refused with a message that names an option, and
//! nothing panics.

use proptest::{collection::vec, prelude::*};
use rmpv::Value as MsgpackValue;

use super::{ConfigError, GroupNetwork, settings, task_options};
use crate::{
    ids::DriverName,
    plugin::options::{OptionKind, OptionRow, PLUGIN_OPTIONS, TASK_OPTIONS},
};

/// Generates texts that are valid for some option, and arbitrary ones.
fn text() -> BoxedStrategy<MsgpackValue> {
    let meaningful = prop::sample::select(vec![
        "",
        "host",
        "private",
        "HOST",
        "default",
        "unconfined",
        "/",
        "/tmp",
        "../x",
        "local/x",
        "1m",
        "5s",
        "-1",
        "0",
        "0-1",
        "3-1",
        "a:b",
        "a:::b",
        "NET_ADMIN",
        "ALL",
        "redis:7",
        "127.0.0.1:1/a@sha256:00",
        "bind",
        "tmpfs",
        "ro",
        "rbind",
        "/dev/null",
        "1:2",
        "nofile",
        "net.core.somaxconn",
        "never",
        "always",
        "db:127.0.0.1",
        "db:host-gateway",
        "no-new-privileges=false",
        "seccomp=/x",
        "runc",
        "io.containerd.runc.v2",
        "99999999999999999999",
        "\u{0}",
        "é",
    ]);
    let text = prop_oneof![3 => meaningful.prop_map(str::to_owned), 1 => ".{0,12}"];
    (text, any::<bool>())
        .prop_map(
            |(text, binary)| if binary { MsgpackValue::Binary(text.into_bytes()) } else { MsgpackValue::from(text) },
        )
        .boxed()
}

fn number() -> BoxedStrategy<MsgpackValue> {
    prop_oneof![
        any::<i64>().prop_map(MsgpackValue::from),
        (-5i64..5).prop_map(MsgpackValue::from),
        (0u32..100_000).prop_map(|number| MsgpackValue::F64(f64::from(number))),
        any::<f64>().prop_map(MsgpackValue::F64),
        any::<u64>().prop_map(MsgpackValue::from),
    ]
    .boxed()
}

/// Generates what Nomad sends for an option of this kind, after it has applied the schema.
fn of_kind(kind: OptionKind) -> BoxedStrategy<MsgpackValue> {
    match kind {
        OptionKind::Text => text(),
        OptionKind::Flag => any::<bool>().prop_map(MsgpackValue::from).boxed(),
        OptionKind::Number => number(),
        OptionKind::List => vec(text(), 0..4).prop_map(MsgpackValue::Array).boxed(),
        OptionKind::Map => {
            vec(vec((text(), text()), 0..3).prop_map(MsgpackValue::Map), 0..3).prop_map(MsgpackValue::Array).boxed()
        }
        OptionKind::Block(rows) => {
            let one = table(rows, &|row| of_kind(row.kind));
            (one, any::<bool>()).prop_map(|(one, list)| if list { MsgpackValue::Array(vec![one]) } else { one }).boxed()
        }
        OptionKind::Blocks(rows) => {
            vec(table(rows, &|row| of_kind(row.kind)), 0..3).prop_map(MsgpackValue::Array).boxed()
        }
        OptionKind::Labelled(rows) => {
            vec((text(), table(rows, &|row| of_kind(row.kind))), 0..3).prop_map(MsgpackValue::Map).boxed()
        }
    }
}

/// Generates values that no schema lets through, but that a broken host might send.
fn anything() -> BoxedStrategy<MsgpackValue> {
    let leaf = prop_oneof![
        Just(MsgpackValue::Nil),
        any::<bool>().prop_map(MsgpackValue::from),
        number(),
        text(),
        any::<f32>().prop_map(MsgpackValue::F32),
        vec(any::<u8>(), 0..8).prop_map(MsgpackValue::Binary),
        (any::<i8>(), vec(any::<u8>(), 0..8)).prop_map(|(kind, bytes)| MsgpackValue::Ext(kind, bytes)),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(MsgpackValue::Array),
            vec((inner.clone(), inner), 0..4).prop_map(MsgpackValue::Map),
        ]
    })
    .boxed()
}

/// Generates a few of a table's options; the others are nil, as Nomad sends options that were not set.
fn table(
    rows: &'static [OptionRow],
    value: &dyn Fn(&OptionRow) -> BoxedStrategy<MsgpackValue>,
) -> BoxedStrategy<MsgpackValue> {
    let entries: Vec<BoxedStrategy<(MsgpackValue, MsgpackValue)>> = rows
        .iter()
        .map(|row| {
            let value = prop_oneof![3 => Just(MsgpackValue::Nil), 1 => value(row)];
            (Just(MsgpackValue::from(row.name)), value).boxed()
        })
        .collect();
    entries.prop_map(MsgpackValue::Map).boxed()
}

fn names(rows: &[OptionRow]) -> Vec<&'static str> {
    let below = rows.iter().flat_map(|row| match row.kind {
        OptionKind::Block(rows) | OptionKind::Blocks(rows) | OptionKind::Labelled(rows) => names(rows),
        _ => Vec::new(),
    });
    rows.iter().map(|row| row.name).chain(below).collect()
}

fn is_named(rows: &[OptionRow], outcome: Result<(), ConfigError>) -> Result<(), TestCaseError> {
    let Err(error) = outcome else { return Ok(()) };
    prop_assert!(!error.faults.is_empty(), "an error without a reason");
    let names = names(rows);
    for fault in &error.faults {
        prop_assert!(names.iter().any(|name| fault.contains(name)), "names no option: {fault}");
        prop_assert!(!fault.contains('\n'), "more than one line: {fault:?}");
    }
    Ok(())
}

fn bytes(wire: &MsgpackValue) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, wire).expect("in memory");
    bytes
}

fn job(wire: &MsgpackValue) -> Result<(), TestCaseError> {
    for name in ["shim", "containerd-driver"] {
        let plugin = settings(&DriverName::new(name).expect("a name"), &[]).expect("defaults are valid");
        for group in [GroupNetwork::Namespace, GroupNetwork::None] {
            is_named(TASK_OPTIONS, task_options(&plugin, group, &bytes(wire)).map(drop))?;
        }
    }
    Ok(())
}

fn agent(wire: &MsgpackValue) -> Result<(), TestCaseError> {
    for name in ["shim", "containerd-driver"] {
        let name = DriverName::new(name).expect("a name");
        is_named(PLUGIN_OPTIONS, settings(&name, &bytes(wire)).map(drop))?;
    }
    Ok(())
}

proptest! {
    #[test]
    fn what_nomad_can_send_of_a_job(wire in table(TASK_OPTIONS, &|row| of_kind(row.kind))) {
        job(&wire)?;
    }

    #[test]
    fn what_a_broken_host_sends_of_a_job(wire in table(TASK_OPTIONS, &|_| anything())) {
        job(&wire)?;
    }

    #[test]
    fn what_nomad_can_send_of_an_agent(wire in table(PLUGIN_OPTIONS, &|row| of_kind(row.kind))) {
        agent(&wire)?;
    }

    #[test]
    fn what_a_broken_host_sends_of_an_agent(wire in table(PLUGIN_OPTIONS, &|_| anything())) {
        agent(&wire)?;
    }
}
