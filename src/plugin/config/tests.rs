use super::*;
use crate::{ids::DriverName, rootfs::mounts::MountKind, task::Settings};
use rmpv::Value as Wire;

fn encode(entries: &[(&str, Wire)]) -> Vec<u8> {
    let map = Wire::Map(entries.iter().map(|(key, value)| (Wire::from(*key), value.clone())).collect());
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, &map).expect("in memory");
    bytes
}

fn named(name: &str) -> Settings {
    settings(&DriverName::new(name).expect("a name"), &[]).expect("defaults are valid")
}

fn list(items: &[&str]) -> Wire {
    Wire::Array(items.iter().map(|item| Wire::from(*item)).collect())
}

#[test]
fn our_own_name_is_closed_and_the_old_one_open() {
    let (ours, old) = (named("shim"), named("containerd-driver"));
    assert!(
        !ours.security.allow_privileged && !ours.security.allow_host_namespaces && ours.security.allow_caps.is_some()
    );
    assert!(old.security.allow_privileged && old.security.allow_host_namespaces && old.security.allow_caps.is_none());
    assert_eq!(ours.places.run(), std::path::Path::new("/run/nomad-driver-shim/shim"));
}

#[test]
fn conflicts_and_gates_are_told_together() {
    let bytes = encode(&[
        ("image", Wire::from("Not An Image")),
        ("image_pull_timeout", Wire::from("soon")),
        ("command", Wire::from("a")),
        ("entrypoint", list(&["b"])),
        ("cwd", Wire::from("tmp")),
        ("hostname", Wire::from("h".repeat(65))),
        ("privileged", Wire::from(true)),
        ("host_network", Wire::from(true)),
        ("cap_add", list(&["NET_ADMIN", "FLY"])),
    ]);
    let error = task_options(&named("shim"), GroupNetwork::Namespace, &bytes).expect_err("refused").to_string();
    for part in [
        "10 problems",
        "Not An Image",
        "image_pull_timeout",
        "exclude each other; only one",
        "cwd",
        "hostname",
        "privileged jobs are not allowed",
        "group network",
        "allow_host_namespaces",
        "FLY",
        "NET_ADMIN is not allowed",
    ] {
        assert!(error.contains(part), "{part:?} in {error}");
    }
    let old = task_options(
        &named("containerd-driver"),
        GroupNetwork::None,
        &encode(&[
            ("image", Wire::from("redis")),
            ("privileged", Wire::from(true)),
            ("cap_add", list(&["SYS_ADMIN"])),
            ("entrypoint", list(&[])),
            ("command", Wire::from("x")),
        ]),
    );
    assert!(old.is_ok(), "{old:?}");
}

#[test]
fn mounts_are_checked_by_kind() {
    let check = |name: &str, entries: &[(&str, Wire)]| {
        let mount = Wire::Map(entries.iter().map(|(key, value)| (Wire::from(*key), value.clone())).collect());
        let bytes = encode(&[("image", Wire::from("a")), ("mounts", Wire::Array(vec![mount]))]);
        task_options(&named(name), GroupNetwork::None, &bytes).map(|options| options.mounts).map_err(|e| e.to_string())
    };
    let target = ("target", Wire::from("/t"));
    assert!(check("shim", &[target.clone(), ("source", Wire::from("local/x"))]).is_ok());
    assert!(
        check("containerd-driver", &[target.clone(), ("source", Wire::from("local/x"))])
            .expect_err("no options")
            .contains("options")
    );
    assert!(check("shim", std::slice::from_ref(&target)).expect_err("no source").contains("source is required"));
    assert!(check("shim", &[target.clone(), ("type", Wire::from("nfs"))]).expect_err("kind").contains("nfs"));
    assert!(check("shim", &[target, ("type", Wire::from("tmpfs"))]).is_ok());
    assert!(check("shim", &[("target", Wire::from("/a/../..")), ("type", Wire::from("tmpfs"))]).is_err());
    let target = ("target", Wire::from("/t"));
    // A "tmpfs" with the options of a bind is one, and checked as one; strange options are refused.
    for name in ["shim", "containerd-driver"] {
        let disguised = [
            target.clone(),
            ("type", Wire::from("tmpfs")),
            ("source", Wire::from("/")),
            ("options", list(&["rbind", "rw"])),
        ];
        let mounts = check(name, &disguised).expect("a bind");
        assert_eq!(mounts[0].kind, MountKind::Bind { source: "/".to_owned() });
    }
    let strange = [target, ("type", Wire::from("tmpfs")), ("options", list(&["size=1m", "lowerdir=/"]))];
    assert!(check("shim", &strange).expect_err("an option").contains("lowerdir"));
}

#[test]
fn a_bad_plugin_configuration_names_its_options() {
    let bytes = encode(&[
        ("shim", Wire::Map(vec![(Wire::from("pool"), Wire::from(1000))])),
        ("state", Wire::Map(vec![(Wire::from("run_dir"), Wire::from("relative"))])),
        ("default_runtime", Wire::from("kata")),
        ("metrics", Wire::Map(vec![(Wire::from("address"), Wire::from("9107"))])),
        ("stats_interval", Wire::from("often")),
    ]);
    let error = settings(&DriverName::new("shim").expect("a name"), &bytes).expect_err("refused").to_string();
    for part in ["shim.pool = 1000", "state.run_dir", "kata", "stats_interval", "metrics.address = \"9107\""] {
        assert!(error.contains(part), "{part:?} in {error}");
    }
}
