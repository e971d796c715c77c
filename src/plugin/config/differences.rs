//! Tests that a running plugin notices a different value of each option of the agent's configuration, and names the
//! option.

use rmpv::Value as MsgpackValue;
use serde_json::{Value, json};

use super::settings;
use crate::{
    ids::DriverName,
    plugin::options::{OptionKind, OptionRow, PLUGIN_OPTIONS},
    task::Settings,
};

/// Each option with its blocks, two values of different meaning, and the name by which a difference is reported. The
/// last column has the other options that the values need to be valid.
const CHANGES: &[(&str, [&str; 2], &str, &str)] = &[
    ("enabled", ["true", "false"], "enabled", ""),
    ("containerd_runtime", [r#""io.containerd.runc.v2""#, r#""runc""#], "containerd_runtime", ""),
    ("stats_interval", [r#""1s""#, r#""2s""#], "stats_interval", ""),
    ("allow_privileged", ["true", "false"], "allow_privileged", ""),
    ("pids_limit", ["100", "200"], "pids_limit", ""),
    ("auth.username", [r#""a""#, r#""b""#], "auth", r#"{"auth": {"password": "p"}}"#),
    ("auth.password", [r#""a""#, r#""b""#], "auth", r#"{"auth": {"username": "u"}}"#),
    ("auth.server_address", [r#""a:5000""#, r#""b:5000""#], "auth", r#"{"auth": {"username": "u", "password": "p"}}"#),
    ("default_runtime", [r#""crun""#, r#""runc""#], "default_runtime", ""),
    ("allow_runtimes", [r#"["crun"]"#, r#"["runc"]"#], "allow_runtimes", ""),
    ("containerd.address", [r#""/a""#, r#""/b""#], "containerd.address", ""),
    ("containerd.namespace", [r#""a""#, r#""b""#], "containerd.namespace", ""),
    ("containerd.snapshotter", [r#""a""#, r#""b""#], "containerd.snapshotter", ""),
    ("state.run_dir", [r#""/a""#, r#""/b""#], "state.run_dir", ""),
    ("state.state_dir", [r#""/a""#, r#""/b""#], "state.state_dir", ""),
    ("state.upper", [r#""disk""#, r#""tmpfs""#], "state.upper", ""),
    ("state.upper_size", [r#""1m""#, r#""2m""#], "state.upper_size", r#"{"state": {"upper": "tmpfs"}}"#),
    ("state.grace", [r#""1s""#, r#""2s""#], "state.grace", ""),
    ("state.orphan_timeout", [r#""1s""#, r#""2s""#], "state.orphan_timeout", ""),
    ("state.orphans", ["\"keep\"", "\"end\""], "state.orphans", ""),
    ("image.keep", [r#""1h""#, r#""forever""#], "image.keep", ""),
    ("shim.binary", [r#""a""#, r#""b""#], "shim.binary", ""),
    ("shim.pool", ["1", "2"], "shim.pool", ""),
    ("shim.reuse", ["true", "false"], "shim.reuse", ""),
    ("shim_scope", [r#""task""#, r#""node""#], "shim_scope", ""),
    ("runtime.binary", [r#""/a/runsc""#, r#""/b/runsc""#], "runtime", ""),
    ("runtime.type", [r#""oci""#, r#""gvisor""#], "runtime", ""),
    ("runtime.shim", [r#""/a""#, r#""/b""#], "runtime", r#"{"runtime": {"own": {"type": "oci"}}}"#),
    ("runtime.config", [r#""/a""#, r#""/b""#], "runtime", r#"{"runtime": {"own": {"type": "oci", "shim": "/s"}}}"#),
    ("runtime.platform", [r#""systrap""#, r#""kvm""#], "runtime", ""),
    ("runtime.network", [r#""host""#, r#""none""#], "runtime", ""),
    ("runtime.overlay", [r#""none""#, r#""all:memory""#], "runtime", ""),
    ("runtime.file_access", [r#""exclusive""#, r#""shared""#], "runtime", ""),
    ("runtime.cgroups", ["true", "false"], "runtime", ""),
    ("runtime.debug_log", [r#""/a""#, r#""/b""#], "runtime", ""),
    ("runtime.flags", [r#"["host-uds=open"]"#, "[]"], "runtime", ""),
    ("cgroup.keep_warm", [r#""never""#, r#""3ms""#], "cgroup.keep_warm", ""),
    ("security.allow_caps", [r#"["SYS_TIME"]"#, "[]"], "security.allow_caps", ""),
    ("security.allow_paths", [r#"["/a"]"#, r#"["/b"]"#], "security.allow_paths", ""),
    ("security.seccomp", [r#""default""#, r#""unconfined""#], "security.seccomp", ""),
    ("security.allow_new_privileges", ["true", "false"], "security.allow_new_privileges", ""),
    ("security.allow_seccomp_override", ["true", "false"], "security.allow_seccomp_override", ""),
    ("security.allow_socketcall", ["true", "false"], "security.allow_socketcall", ""),
    ("security.apparmor", [r#""default""#, r#""unconfined""#], "security.apparmor", ""),
    ("security.allow_apparmor_override", ["true", "false"], "security.allow_apparmor_override", ""),
    ("security.selinux", ["true", "false"], "security.selinux", ""),
    ("security.allow_label_override", ["true", "false"], "security.allow_label_override", ""),
    ("security.allow_host_namespaces", ["true", "false"], "security.allow_host_namespaces", ""),
    ("security.allow_devices", [r#"["/dev/a"]"#, "[]"], "security.allow_devices", ""),
    ("security.allow_sysctls", [r#"["net.*"]"#, "[]"], "security.allow_sysctls", ""),
    ("security.ulimit_max", [r#"{"nofile": "10"}"#, r#"{"nofile": "20"}"#], "security.ulimit_max", ""),
    ("security.tmpfs_max", [r#""1m""#, r#""2m""#], "security.tmpfs_max", ""),
    ("hooks.prestart", [r#"["/a"]"#, "[]"], "hooks", ""),
    ("hooks.create_runtime", [r#"["/a"]"#, "[]"], "hooks", ""),
    ("hooks.create_container", [r#"["/a"]"#, "[]"], "hooks", ""),
    ("hooks.start_container", [r#"["/a"]"#, "[]"], "hooks", ""),
    ("hooks.poststart", [r#"["/a"]"#, "[]"], "hooks", ""),
    ("hooks.poststop", [r#"["/a"]"#, "[]"], "hooks", ""),
    ("disable_log_collection", ["true", "false"], "disable_log_collection", ""),
    ("metrics.address", [r#""127.0.0.1:1""#, r#""127.0.0.1:2""#], "metrics.address", ""),
];

/// Returns the options in `rows` that hold a value themselves, each with the path of its blocks.
fn options(rows: &[OptionRow], block: &str) -> Vec<String> {
    let named = |name: &str| if block.is_empty() { name.to_owned() } else { format!("{block}.{name}") };
    let of = |row: &OptionRow| match row.kind {
        OptionKind::Block(rows) | OptionKind::Blocks(rows) | OptionKind::Labelled(rows) => {
            options(rows, &named(row.name))
        }
        _ => vec![named(row.name)],
    };
    rows.iter().flat_map(of).collect()
}

/// Encodes `config` as Nomad sends it.
fn encoded(config: &Value) -> Vec<u8> {
    fn wire(value: &Value) -> MsgpackValue {
        match value {
            Value::Null => MsgpackValue::Nil,
            Value::Bool(flag) => MsgpackValue::from(*flag),
            Value::Number(number) => MsgpackValue::from(number.as_i64().expect("a whole number")),
            Value::String(text) => MsgpackValue::from(text.as_str()),
            Value::Array(items) => MsgpackValue::Array(items.iter().map(wire).collect()),
            Value::Object(fields) => MsgpackValue::Map(
                fields.iter().map(|(key, value)| (MsgpackValue::from(key.as_str()), wire(value))).collect(),
            ),
        }
    }
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, &wire(config)).expect("in memory");
    bytes
}

/// Returns the settings that result from one option, and from the other options that it needs.
fn configured(option: &str, value: &str, also: &str) -> Settings {
    let parsed = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
    let mut config = if also.is_empty() { json!({}) } else { parsed(also) };
    match option.split_once('.') {
        None => config[option] = parsed(value),
        Some(("runtime", option)) => {
            let gvisor = json!({"type": "gvisor"});
            let block = &mut config["runtime"]["own"];
            if block.is_null() {
                *block = gvisor;
            }
            block[option] = parsed(value);
        }
        Some((block, option)) => config[block][option] = parsed(value),
    }
    let name = DriverName::new("shim").expect("a name");
    settings(&name, &encoded(&config)).unwrap_or_else(|error| panic!("{option} = {value}: {error}"))
}

#[test]
fn every_option_that_differs_is_reported() {
    for (option, [one, other], name, also) in CHANGES {
        let (before, after) = (configured(option, one, also), configured(option, other, also));
        assert_eq!(before.differences(&configured(option, one, also)), Vec::<&str>::new(), "{option}: nothing differs");
        let differences = before.differences(&after);
        assert!(matches!(&differences[..], [only] if only.contains(name)), "{option}: {differences:?}");
    }
}

#[test]
fn no_option_is_left_out() {
    let mut known: Vec<String> = CHANGES.iter().map(|(option, ..)| (*option).to_owned()).collect();
    let mut all = options(PLUGIN_OPTIONS, "");
    known.sort();
    all.sort();
    assert_eq!(known, all);
}
