use super::*;
use crate::{ids::DriverName, rootfs::mounts::MountKind, task::Settings};
use rmpv::Value as MsgpackValue;

fn encode(entries: &[(&str, MsgpackValue)]) -> Vec<u8> {
    let map = MsgpackValue::Map(entries.iter().map(|(key, value)| (MsgpackValue::from(*key), value.clone())).collect());
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, &map).expect("in memory");
    bytes
}

fn named(name: &str) -> Settings {
    settings(&DriverName::new(name).expect("a name"), &[]).expect("defaults are valid")
}

fn list(items: &[&str]) -> MsgpackValue {
    MsgpackValue::Array(items.iter().map(|item| MsgpackValue::from(*item)).collect())
}

#[test]
fn defaults_are_strict_unless_the_driver_is_called_containerd_driver() {
    let (strict, compatible) = (named("shim"), named("containerd-driver"));
    assert!(
        !strict.security.allow_privileged
            && !strict.security.allow_host_namespaces
            && strict.security.allow_caps.is_some()
    );
    assert!(
        compatible.security.allow_privileged
            && compatible.security.allow_host_namespaces
            && compatible.security.allow_caps.is_none()
    );
    assert_eq!(strict.places.run(), std::path::Path::new("/run/nomad-driver-shim/shim"));
}

#[test]
fn hostnames_are_names() {
    let with = |driver: &str, name: &str| {
        let bytes = encode(&[("image", MsgpackValue::from("a")), ("hostname", MsgpackValue::from(name))]);
        task_options(&named(driver), GroupNetwork::None, &bytes).map(|options| options.hostname)
    };
    for name in ["a", "web-1.example", "9lives", "under_score", "_service", "a.", &"h".repeat(64)] {
        assert_eq!(with("shim", name).expect(name).as_deref(), Some(name));
    }
    for name in
        ["-x;$(id)", "a b", "a/b", ".a", "h\u{f6}st", "a\nb", "\u{1b}[31m", "a\u{202e}b", "a\0b", &"h".repeat(65)]
    {
        let error = with("shim", name).expect_err(name).to_string();
        assert!(error.contains("hostname") && !error.contains(char::is_control), "{error}");
    }
    // nomad-driver-containerd accepted everything.
    for name in ["-x;$(id)", "a b", "h\u{f6}st"] {
        with("containerd-driver", name).expect(name);
    }
    for name in ["a\nb", "\u{1b}[31m", "\u{9b}2J", "a\u{202e}b", "a\0b"] {
        with("containerd-driver", name).expect_err(name);
    }
}

#[test]
fn all_faults_are_reported_together() {
    let bytes = encode(&[
        ("image", MsgpackValue::from("Not An Image")),
        ("image_pull_timeout", MsgpackValue::from("soon")),
        ("command", MsgpackValue::from("a")),
        ("entrypoint", list(&["b"])),
        ("cwd", MsgpackValue::from("tmp")),
        ("hostname", MsgpackValue::from("h".repeat(65))),
        ("privileged", MsgpackValue::from(true)),
        ("host_network", MsgpackValue::from(true)),
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
            ("image", MsgpackValue::from("redis")),
            ("privileged", MsgpackValue::from(true)),
            ("cap_add", list(&["SYS_ADMIN"])),
            ("entrypoint", list(&[])),
            ("command", MsgpackValue::from("x")),
        ]),
    );
    assert!(old.is_ok(), "{old:?}");
}

#[test]
fn mounts_are_checked_by_kind() {
    let check = |name: &str, entries: &[(&str, MsgpackValue)]| {
        let mount =
            MsgpackValue::Map(entries.iter().map(|(key, value)| (MsgpackValue::from(*key), value.clone())).collect());
        let bytes = encode(&[("image", MsgpackValue::from("a")), ("mounts", MsgpackValue::Array(vec![mount]))]);
        task_options(&named(name), GroupNetwork::None, &bytes).map(|options| options.mounts).map_err(|e| e.to_string())
    };
    let target = ("target", MsgpackValue::from("/t"));
    assert!(check("shim", &[target.clone(), ("source", MsgpackValue::from("local/x"))]).is_ok());
    assert!(
        check("containerd-driver", &[target.clone(), ("source", MsgpackValue::from("local/x"))])
            .expect_err("no options")
            .contains("options")
    );
    assert!(check("shim", std::slice::from_ref(&target)).expect_err("no source").contains("source is required"));
    assert!(check("shim", &[target.clone(), ("type", MsgpackValue::from("nfs"))]).expect_err("kind").contains("nfs"));
    assert!(check("shim", &[target, ("type", MsgpackValue::from("tmpfs"))]).is_ok());
    assert!(
        check("shim", &[("target", MsgpackValue::from("/a/../..")), ("type", MsgpackValue::from("tmpfs"))]).is_err()
    );
    let target = ("target", MsgpackValue::from("/t"));
    // A "tmpfs" with the options of a bind is a bind, and is checked as one; unknown options are refused.
    for name in ["shim", "containerd-driver"] {
        let disguised = [
            target.clone(),
            ("type", MsgpackValue::from("tmpfs")),
            ("source", MsgpackValue::from("/")),
            ("options", list(&["rbind", "rw"])),
        ];
        let mounts = check(name, &disguised).expect("a bind");
        assert_eq!(mounts[0].kind, MountKind::Bind { source: "/".to_owned() });
    }
    let strange = [target, ("type", MsgpackValue::from("tmpfs")), ("options", list(&["size=1m", "lowerdir=/"]))];
    assert!(check("shim", &strange).expect_err("an option").contains("lowerdir"));
}

/// As with docker, the options are accepted where they have no effect.
#[test]
fn selinux_options_are_accepted_where_tasks_have_no_labels() {
    let options = list(&["label=type:spc_t", "label:level:s0:c1,c2", "label=disable"]);
    let bytes = encode(&[("image", MsgpackValue::from("a")), ("security_opt", options)]);
    for driver in ["shim", "containerd-driver"] {
        let options = task_options(&named(driver), GroupNetwork::None, &bytes).expect("accepted");
        assert!(options.labels.is_set() && options.labels.is_disabled, "{driver}");
    }
}

/// nomad-driver-containerd mounts both, and the last one is visible.
#[test]
fn the_old_name_takes_two_mounts_with_one_target() {
    let options = MsgpackValue::Array(vec![MsgpackValue::from("rbind")]);
    let fields = [("source", MsgpackValue::from("/a")), ("target", MsgpackValue::from("/t")), ("options", options)];
    let mount =
        MsgpackValue::Map(fields.iter().map(|(key, value)| (MsgpackValue::from(*key), value.clone())).collect());
    let mounts = MsgpackValue::Array(vec![mount.clone(), mount]);
    let bytes = encode(&[("image", MsgpackValue::from("a")), ("mounts", mounts)]);
    let options = task_options(&named("containerd-driver"), GroupNetwork::None, &bytes).expect("accepted");
    assert_eq!(options.mounts.len(), 2);
    assert!(task_options(&named("shim"), GroupNetwork::None, &bytes).is_err());
}

#[test]
fn a_bad_plugin_configuration_names_its_options() {
    let bytes = encode(&[
        ("shim", MsgpackValue::Map(vec![(MsgpackValue::from("pool"), MsgpackValue::from(1000))])),
        ("state", MsgpackValue::Map(vec![(MsgpackValue::from("run_dir"), MsgpackValue::from("relative"))])),
        ("default_runtime", MsgpackValue::from("kata")),
        ("metrics", MsgpackValue::Map(vec![(MsgpackValue::from("address"), MsgpackValue::from("9107"))])),
        ("stats_interval", MsgpackValue::from("often")),
    ]);
    let error = settings(&DriverName::new("shim").expect("a name"), &bytes).expect_err("refused").to_string();
    for part in ["shim.pool = 1000", "state.run_dir", "kata", "stats_interval", "metrics.address = \"9107\""] {
        assert!(error.contains(part), "{part:?} in {error}");
    }
}

fn block(entries: &[(&str, MsgpackValue)]) -> MsgpackValue {
    MsgpackValue::Map(entries.iter().map(|(key, value)| (MsgpackValue::from(*key), value.clone())).collect())
}

#[test]
fn runtimes_are_what_their_blocks_say() {
    let bytes = encode(&[
        ("containerd_runtime", MsgpackValue::from("io.containerd.runsc.v1")),
        (
            "runtime",
            block(&[
                ("youki", block(&[])),
                (
                    "boxed",
                    block(&[("binary", MsgpackValue::from("/opt/runsc")), ("network", MsgpackValue::from("host"))]),
                ),
                ("io.containerd.kata.v2", block(&[("config", MsgpackValue::from("/etc/kata.toml"))])),
                (
                    "shared",
                    block(&[("type", MsgpackValue::from("gvisor")), ("file_access", MsgpackValue::from("shared"))]),
                ),
            ]),
        ),
    ]);
    let settings = settings(&DriverName::new("shim").expect("a name"), &bytes).expect("valid");
    assert_eq!(settings.default_runtime.as_deref(), Some("io.containerd.runsc.v1"));
    let of = |name: &str| &settings.runtimes[name];
    assert_eq!((of("youki").binary.to_str(), &of("youki").shim, &of("youki").gvisor), (Some("youki"), &None, &None));
    let boxed = of("boxed").gvisor.as_ref().expect("by its binary's name");
    assert_eq!(boxed.network, crate::gvisor::Network::Host);
    assert_eq!(of("shared").gvisor.as_ref().expect("by its type").overlay.as_deref(), Some("none"));
    let kata = of("io.containerd.kata.v2").shim.as_ref().expect("by its name");
    assert_eq!(kata.program.to_str(), Some("containerd-shim-kata-v2"));
    assert_eq!(kata.config.as_deref(), Some(std::path::Path::new("/etc/kata.toml")));
    let own = of("io.containerd.runsc.v1");
    assert!(own.gvisor.is_some() && own.shim.is_some() && own.binary.to_str() == Some("runsc"));
}

#[test]
fn wrong_runtime_blocks_are_refused() {
    let wrong = block(&[
        ("x/y", block(&[])),
        ("a", block(&[("platform", MsgpackValue::from("kvm"))])),
        ("b", block(&[("type", MsgpackValue::from("lxc")), ("config", MsgpackValue::from("/x"))])),
        (
            "runsc",
            block(&[
                ("platform", MsgpackValue::from("fast")),
                ("network", MsgpackValue::from("bridge")),
                ("overlay", MsgpackValue::from("self")),
                ("debug_log", MsgpackValue::from("logs")),
                ("flags", list(&["--x", "root=/"])),
            ]),
        ),
        (
            "runsc2",
            block(&[("file_access", MsgpackValue::from("shared")), ("overlay", MsgpackValue::from("root:self"))]),
        ),
    ]);
    let bytes = encode(&[("containerd_runtime", MsgpackValue::from("io.containerd.wasm.v1")), ("runtime", wrong)]);
    let error = settings(&DriverName::new("shim").expect("a name"), &bytes).expect_err("refused").to_string();
    for part in [
        "13 problems",
        "runtime \"x/y\"",
        "runtime \"a\": platform is an option of gVisor's",
        "type = \"lxc\" is not oci or gvisor",
        "config needs a shim",
        "platform = \"fast\" is not systrap, kvm or ptrace",
        "network = \"bridge\" is not sandbox, host or none",
        "overlay = \"self\"",
        "debug_log = \"logs\" is not an absolute path",
        "\"--x\" is not a flag's name",
        "\"root\" is not allowed in this list",
        "overlay = \"root:self\" and file_access = \"shared\"",
        "containerd_runtime = \"io.containerd.wasm.v1\" is not configured",
    ] {
        assert!(error.contains(part), "{part:?} in {error}");
    }
}

#[test]
fn options_that_gvisor_does_not_support_are_refused() {
    let bytes = encode(&[
        ("image", MsgpackValue::from("busybox")),
        ("runtime", MsgpackValue::from("runsc")),
        ("pid_mode", MsgpackValue::from("host")),
        ("ipc_mode", MsgpackValue::from("host")),
        ("uts_mode", MsgpackValue::from("host")),
        (
            "sysctl",
            block(&[
                ("net.core.somaxconn", MsgpackValue::from("9")),
                ("net.ipv6.conf.all.disable_ipv6", MsgpackValue::from("1")),
            ]),
        ),
    ]);
    let error = task_options(&named("containerd-driver"), GroupNetwork::None, &bytes).expect_err("refused").to_string();
    assert!(error.contains("4 problems") && error.contains("net.core.somaxconn"), "{error}");
    for option in ["pid_mode", "ipc_mode", "uts_mode"] {
        assert!(error.contains(&format!("{option} = \"host\" is not possible with runtime \"runsc\"")), "{error}");
    }
}

#[test]
fn credentials_without_an_address_are_for_docker_hub_or_for_what_the_job_names() {
    let auth = |server: &str| {
        let pairs = [("username", "u"), ("password", "hidden"), ("server_address", server)];
        let block = pairs.iter().map(|(key, value)| (MsgpackValue::from(*key), MsgpackValue::from(*value))).collect();
        ("auth", MsgpackValue::Array(vec![MsgpackValue::Map(block)]))
    };
    let of_plugin = |name: &str, server: &str| {
        let name = DriverName::new(name).expect("a name");
        settings(&name, &encode(&[auth(server)])).map(|settings| settings.auth.expect("credentials").scope)
    };
    let of_job = |server: &str| {
        let bytes = encode(&[("image", MsgpackValue::from("app")), auth(server)]);
        let options = task_options(&named("shim"), GroupNetwork::None, &bytes);
        options.map(|options| options.auth.expect("credentials").scope)
    };
    let only = |server: &str| CredentialScope::Registry(server.parse().expect("an address"));
    assert_eq!(of_plugin("shim", ""), Ok(only("docker.io")));
    assert_eq!(of_plugin("containerd-driver", ""), Ok(CredentialScope::ImageRegistry));
    assert_eq!(of_job(""), Ok(CredentialScope::ImageRegistry));
    for scope in [of_plugin("shim", "a:1"), of_plugin("containerd-driver", "a:1"), of_job("a:1")] {
        assert_eq!(scope, Ok(only("a:1")));
    }
    let hiding = "https://u:hidden@registry.example/";
    for refused in [of_plugin("shim", hiding), of_plugin("containerd-driver", hiding), of_job(hiding)] {
        let error = refused.expect_err("refused").to_string();
        assert!(error.contains("auth.server_address") && !error.contains("hidden"), "{error}");
    }
}
