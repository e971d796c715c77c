//! A failure is reported with its cause, nothing is left behind, and Nomad knows whether a retry makes sense.

use nomad_driver_shim::host::is_recoverable;
use serde_json::{Value, json};

use crate::{
    support::{
        Entry, Env, Image, Layer, Packing, each_case,
        fake_registry::{Answer, FakeRegistry, MANIFEST},
        services,
    },
    trials,
};

#[tokio::test(flavor = "multi_thread")]
async fn failed_starts_are_named_and_leave_nothing() {
    let mut env = Env::new().await;
    let good = env.busybox().await;
    let registry = &services().registry;
    let no_command = Image::busybox().with_config("Cmd", json!([])).push(registry, "test/nothing:1").await;
    let cases = [
        (json!({"image": good, "command": "/no/such"}), "", &["/no/such"][..], false),
        (json!({"image": good, "command": "/no/such", "runtime": "runc"}), "", &["/no/such"], false),
        (json!({"image": good, "command": "/etc/not-executable"}), "", &["ermission denied"], false),
        (json!({"image": good}), "ghost", &["ghost", "/etc/passwd"], false),
        (json!({"image": good}), "user:ghosts", &["ghosts", "/etc/group"], false),
        (json!({"image": no_command}), "", &["no command to run", "ENTRYPOINT"], false),
        (json!({"image": format!("{registry}/no/such:1")}), "", &["no/such:1", "not found"], false),
        (json!({"image": format!("{registry}/test/busybox:none")}), "", &["none", "not found"], false),
        (json!({"image": "127.0.0.1:1/x:1"}), "", &["127.0.0.1:1", "could not reach"], true),
        (json!({"image": "Not An Image"}), "", &["Not An Image"], false),
    ];
    each_case(cases, async |(config, user, words, again)| {
        let mut task = env.prepare(config.clone()).await;
        task.config.user = user.to_owned();
        let status = env.try_start(&mut task).await.expect_err(&config.to_string());
        assert!(words.iter().all(|word| status.message().contains(word)), "{config}: {}", status.message());
        assert_eq!(is_recoverable(&status), again, "{config}: {status:?}");
        assert!(!status.message().contains('\n'), "one line: {}", status.message());
        assert_eq!(env.inspect(&task.id).await.unwrap_err().code(), tonic::Code::NotFound);
    })
    .await;
    env.finish().await;
}

/// Unknown, mistyped and conflicting options are reported, all in one message, before anything is pulled.
#[tokio::test(flavor = "multi_thread")]
async fn all_faults_of_a_job_come_at_once_and_first() {
    let mut env = Env::new().await;
    let registry = FakeRegistry::start().await;
    let config = json!({
        "image": format!("{}/app:1", registry.address), "imagine": 1, "args": "text", "command": "a", "entrypoint": ["b"],
        "cap_add": ["CAP_NONSENSE"], "privileged": true, "cwd": "relative", "image_pull_timeout": "x",
        "mounts": [{"type": "bind", "target": "relative"}], "runtime": 7,
    });
    let mut task = env.prepare(config).await;
    let status = env.try_start(&mut task).await.unwrap_err();
    for part in [
        "unknown option imagine (did you mean image?)",
        "args must be a list of strings",
        "exclude each other",
        "CAP_NONSENSE",
        "privileged jobs are not allowed",
        "cwd",
        "image_pull_timeout",
        "mounts[0].target",
        "runtime must be a string",
    ] {
        assert!(status.message().contains(part), "{part:?} in {}", status.message());
    }
    assert!(registry.requests().is_empty(), "nothing was asked of the registry");
    assert!(!is_recoverable(&status));
    task.config.msgpack_driver_config = vec![0x81, 0xa5, b'i'];
    let status = env.try_start(&mut task).await.unwrap_err();
    assert!(status.message().contains("msgpack"), "{status:?}");
    env.finish().await;
}

type Change<'a> = dyn Fn(&str, Answer) -> Answer + 'a;

/// How a registry lies: it changes its answer about a manifest, a config or a layer.
struct Lie<'a>(Box<Change<'a>>);

fn lie<'a>(change: impl Fn(&str, Answer) -> Answer + 'a) -> Lie<'a> {
    Lie(Box::new(change))
}

impl std::fmt::Debug for Lie<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("a lie")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lying_registries_are_caught_by_name() {
    let mut env = Env::new().await;
    // No other test has this layer: containerd shares blobs among namespaces, and does not download blobs that it has.
    let noise: Vec<u8> = (0..20_000).flat_map(|_| nomad_driver_shim::ids::random_hex(1).into_bytes()).collect();
    let image = Image { layers: vec![Layer::new(&[Entry::file("noise", noise)], Packing::None)], ..Image::busybox() };
    let manifest = |text: &str| Answer::ok(MANIFEST, text.as_bytes().to_vec());
    let other = vec![b'x'; 100];
    let config_digest = nomad_driver_shim::ids::Digest::of(&image.config_bytes()).to_string();
    let cases = [
        (
            "manifest",
            lie(|kind, answer| if kind == "manifest" { manifest("{\"schemaVersion\":2") } else { answer }),
            false,
        ),
        ("not JSON", lie(|kind, answer| if kind == "manifest" { manifest("<html>") } else { answer }), false),
        (
            "schema version 1",
            lie(|kind, answer| if kind == "manifest" { manifest("{\"schemaVersion\":1}") } else { answer }),
            false,
        ),
        (
            config_digest.as_str(),
            lie(|kind, answer| if kind == "config" { Answer::ok("", other.clone()) } else { answer }),
            false,
        ),
        (
            "layer of image",
            lie(|kind, mut answer| {
                if kind == "layer" {
                    answer.body[2000] ^= 1;
                }
                answer
            }),
            false,
        ),
        (
            "was interrupted",
            lie(|kind, mut answer| {
                if kind == "layer" {
                    answer.body.truncate(5000);
                }
                answer
            }),
            true,
        ),
        ("500", lie(|kind, answer| if kind == "layer" { Answer { status: 500, ..answer } } else { answer }), true),
        (
            "pull access denied",
            lie(|kind, answer| if kind == "manifest" { Answer { status: 403, ..answer } } else { answer }),
            false,
        ),
    ];
    each_case(cases, async |(words, change, again)| {
        let registry = FakeRegistry::start().await;
        let name = registry.serve(&image, change.0);
        let mut task = env.prepare(json!({"image": name})).await;
        let status = env.try_start(&mut task).await.expect_err(words);
        assert!(status.message().contains(words), "{words:?} in {}", status.message());
        assert_eq!(is_recoverable(&status), again, "{words}: {status:?}");
    })
    .await;
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_layers_are_refused_by_name() {
    let mut env = Env::new().await;
    let hard_link = Entry { kind: tar::EntryType::Link, ..Entry::symlink("shadow", "../../etc/shadow") };
    let climbing = Layer::new(&[Entry::file("../../escaped", "x")], Packing::Gzip);
    let linking = Layer::new(&[hard_link], Packing::Gzip);
    let honest = Layer::new(&[Entry::file("a", "x")], Packing::Gzip);
    let cut = Layer { bytes: honest.bytes[..honest.bytes.len() - 10].to_vec(), ..honest.clone() };
    let garbage = Layer { bytes: b"\x1f\x8bgarbage".repeat(50), ..honest.clone() };
    let lying = Layer { diff_id: nomad_driver_shim::ids::Digest::of(b"other"), ..honest };
    let cases = [
        ("\"../../escaped\" escapes", climbing),
        ("\"../../etc/shadow\", which escapes", linking),
        ("cut off", cut),
        ("can't be unpacked", garbage),
        ("uncompressed digest", lying),
    ];
    each_case(cases, async |(words, layer)| {
        let tag = format!("test/bad:{}", nomad_driver_shim::ids::random_hex(4));
        let name = Image::busybox().with_layer(layer.clone()).push(&services().registry, &tag).await;
        let mut task = env.prepare(json!({"image": name})).await;
        let status = env.try_start(&mut task).await.expect_err(words);
        let digest = nomad_driver_shim::ids::Digest::of(&layer.bytes);
        assert!(status.message().contains(words) && status.message().contains(digest.as_str()), "{}", status.message());
        assert!(!is_recoverable(&status), "{status:?}");
    })
    .await;
    env.finish().await;
}

/// A failed start releases its shim, its id and its names, so that the next start succeeds.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_attempt_can_be_tried_again() {
    let mut env = Env::new().await;
    let good = env.shell("exit 0", json!({})).await;
    let mut bad = good.clone();
    bad["command"] = json!("/no/such");
    let mut task = env.prepare(bad).await;
    let dirs = task.dirs.clone();
    env.try_start(&mut task).await.unwrap_err();
    let mut again = env.prepare_in(dirs, "1", good).await;
    env.try_start(&mut again).await.unwrap();
    assert_eq!(env.finish_task(again).await.0, 0);
    env.finish().await;
}

mod a_missing_shim_or_runtime_is_named {
    use super::*;

    async fn check(config: Value, task: Value, words: &str) {
        let mut env = Env::configured(config).await;
        let mut options = task;
        options["image"] = json!(env.busybox().await);
        let mut task = env.prepare(options).await;
        let status = env.try_start(&mut task).await.expect_err(words);
        assert!(status.message().contains(words), "{words:?} in {}", status.message());
        env.finish().await;
    }

    trials! { check:
        shim_is_missing => json!({"shim": {"binary": "/no/such-shim", "pool": 0}}), json!({}), "/no/such-shim";
        shim_fails => json!({"shim": {"binary": "/bin/false", "pool": 0}}), json!({}), "get a shim";
        runtime_is_missing =>
            json!({"runtime": {"odd": {"binary": "/no/such-runtime"}}}), json!({"runtime": "odd"}), "/no/such-runtime";
        runtime_fails =>
            json!({"runtime": {"odd": {"binary": "/bin/false"}}}), json!({"runtime": "odd"}), "create the container";
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_plugin_configuration_is_refused_by_name() {
    use nomad_driver_shim::{
        host::{Plugin, PluginCommand, encode_raw},
        pb::base::SetConfigRequest,
    };
    let plugin = Plugin::launch(&PluginCommand::new(crate::support::program())).await.unwrap();
    let config = json!({"allow_priviledged": true, "shim": {"pool": -1}, "state": {"run_dir": "x"}});
    let request = SetConfigRequest { msgpack_config: encode_raw(&config), ..Default::default() };
    let status = plugin.base().set_config(request).await.unwrap_err();
    for part in ["allow_priviledged (did you mean allow_privileged?)", "shim.pool = -1", "state.run_dir"] {
        assert!(status.message().contains(part), "{part:?} in {}", status.message());
    }
    plugin.shut_down().await;
}
