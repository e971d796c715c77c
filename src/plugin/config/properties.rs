//! Property tests: everything that Nomad can send decodes, or is refused with a message that names an option, and
//! nothing panics.

use proptest::{collection::vec, prelude::*};
use rmpv::Value as Wire;

use super::{ConfigError, GroupNetwork, settings, task_options};
use crate::{
    ids::DriverName,
    plugin::options::{Kind, PLUGIN, Row, TASK},
};

/// Generates texts that are valid for some option, and arbitrary ones.
fn text() -> BoxedStrategy<Wire> {
    let telling = prop::sample::select(vec![
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
    let text = prop_oneof![3 => telling.prop_map(str::to_owned), 1 => ".{0,12}"];
    (text, any::<bool>())
        .prop_map(|(text, binary)| if binary { Wire::Binary(text.into_bytes()) } else { Wire::from(text) })
        .boxed()
}

fn number() -> BoxedStrategy<Wire> {
    prop_oneof![
        any::<i64>().prop_map(Wire::from),
        (-5i64..5).prop_map(Wire::from),
        (0u32..100_000).prop_map(|number| Wire::F64(f64::from(number))),
        any::<f64>().prop_map(Wire::F64),
        any::<u64>().prop_map(Wire::from),
    ]
    .boxed()
}

/// Generates what Nomad sends for an option of this kind, after it has applied the schema.
fn of_kind(kind: Kind) -> BoxedStrategy<Wire> {
    match kind {
        Kind::Text => text(),
        Kind::Flag => any::<bool>().prop_map(Wire::from).boxed(),
        Kind::Number => number(),
        Kind::List => vec(text(), 0..4).prop_map(Wire::Array).boxed(),
        Kind::Map => vec(vec((text(), text()), 0..3).prop_map(Wire::Map), 0..3).prop_map(Wire::Array).boxed(),
        Kind::Block(rows) => {
            let one = table(rows, &|row| of_kind(row.kind));
            (one, any::<bool>()).prop_map(|(one, list)| if list { Wire::Array(vec![one]) } else { one }).boxed()
        }
        Kind::Blocks(rows) => vec(table(rows, &|row| of_kind(row.kind)), 0..3).prop_map(Wire::Array).boxed(),
        Kind::Labelled(rows) => vec((text(), table(rows, &|row| of_kind(row.kind))), 0..3).prop_map(Wire::Map).boxed(),
    }
}

/// Generates values that no schema lets through, but that a broken host might send.
fn anything() -> BoxedStrategy<Wire> {
    let leaf = prop_oneof![
        Just(Wire::Nil),
        any::<bool>().prop_map(Wire::from),
        number(),
        text(),
        any::<f32>().prop_map(Wire::F32),
        vec(any::<u8>(), 0..8).prop_map(Wire::Binary),
        (any::<i8>(), vec(any::<u8>(), 0..8)).prop_map(|(kind, bytes)| Wire::Ext(kind, bytes)),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Wire::Array),
            vec((inner.clone(), inner), 0..4).prop_map(Wire::Map),
        ]
    })
    .boxed()
}

/// Generates a few of a table's options; the others are nil, as Nomad sends options that were not set.
fn table(rows: &'static [Row], value: &dyn Fn(&Row) -> BoxedStrategy<Wire>) -> BoxedStrategy<Wire> {
    let entries: Vec<BoxedStrategy<(Wire, Wire)>> = rows
        .iter()
        .map(|row| {
            let value = prop_oneof![3 => Just(Wire::Nil), 1 => value(row)];
            (Just(Wire::from(row.name)), value).boxed()
        })
        .collect();
    entries.prop_map(Wire::Map).boxed()
}

fn names(rows: &[Row]) -> Vec<&'static str> {
    let below = rows.iter().flat_map(|row| match row.kind {
        Kind::Block(rows) | Kind::Blocks(rows) | Kind::Labelled(rows) => names(rows),
        _ => Vec::new(),
    });
    rows.iter().map(|row| row.name).chain(below).collect()
}

fn is_named(rows: &[Row], outcome: Result<(), ConfigError>) -> Result<(), TestCaseError> {
    let Err(error) = outcome else { return Ok(()) };
    prop_assert!(!error.faults.is_empty(), "an error without a reason");
    let names = names(rows);
    for fault in &error.faults {
        prop_assert!(names.iter().any(|name| fault.contains(name)), "names no option: {fault}");
        prop_assert!(!fault.contains('\n'), "more than one line: {fault:?}");
    }
    Ok(())
}

fn bytes(wire: &Wire) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, wire).expect("in memory");
    bytes
}

fn job(wire: &Wire) -> Result<(), TestCaseError> {
    for name in ["shim", "containerd-driver"] {
        let plugin = settings(&DriverName::new(name).expect("a name"), &[]).expect("defaults are valid");
        for group in [GroupNetwork::Namespace, GroupNetwork::None] {
            is_named(TASK, task_options(&plugin, group, &bytes(wire)).map(drop))?;
        }
    }
    Ok(())
}

fn agent(wire: &Wire) -> Result<(), TestCaseError> {
    for name in ["shim", "containerd-driver"] {
        let name = DriverName::new(name).expect("a name");
        is_named(PLUGIN, settings(&name, &bytes(wire)).map(drop))?;
    }
    Ok(())
}

proptest! {
    #[test]
    fn what_nomad_can_send_of_a_job(wire in table(TASK, &|row| of_kind(row.kind))) {
        job(&wire)?;
    }

    #[test]
    fn what_a_broken_host_sends_of_a_job(wire in table(TASK, &|_| anything())) {
        job(&wire)?;
    }

    #[test]
    fn what_nomad_can_send_of_an_agent(wire in table(PLUGIN, &|row| of_kind(row.kind))) {
        agent(&wire)?;
    }

    #[test]
    fn what_a_broken_host_sends_of_an_agent(wire in table(PLUGIN, &|_| anything())) {
        agent(&wire)?;
    }
}
