//! docs/protocol/nomad-plugin.md#6.3, rows 14 and 15: registries, and an image's own command.

use std::time::Duration;

use nomad_driver_shim::host::is_recoverable;
use serde_json::json;

use crate::{
    row,
    row::Row,
    support::{
        Env, Image,
        fake_registry::{Answer, FakeRegistry, MANIFEST},
        patience, services,
    },
};

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row!(a_registry_out_of_reach, "6.3.14 reach", "a registry that is out of reach is a recoverable error"),
        row!(the_pull_timeout, "6.3.14 timeout", "image_pull_timeout ends a pull that takes longer"),
        row!(references, "6.3.14 names", "references by tag, by digest, and without a tag beside a port"),
        row!(credentials, "6.3.14 auth", "the job's credentials win over the plugin's; wrong ones are refused")
            .config(json!({"auth": {"username": "tester", "password": "of the plugin"}})),
        row!(what_is_run, "6.3.15", "entrypoint, command and args, and what the image has of them"),
    ]
}

async fn a_registry_out_of_reach(env: &mut Env) {
    let mut task = env.prepare(json!({"image": "127.0.0.1:1/app:1"})).await;
    let status = env.try_start(&mut task).await.unwrap_err();
    assert!(is_recoverable(&status), "not recoverable: {status:?}");
}

async fn the_pull_timeout(env: &mut Env) {
    let registry = FakeRegistry::start().await;
    let image = Image::busybox();
    let delay = 4 * patience();
    registry.set("/v2/slow/manifests/1", Answer { delay, ..Answer::ok(MANIFEST, image.manifest_bytes()) });
    let name = format!("{}/slow:1", registry.address);
    let mut task = env.prepare(json!({"image": name, "image_pull_timeout": "1s"})).await;
    let start = tokio::time::timeout(patience(), env.try_start(&mut task)).await;
    let status = start.expect("the timeout has no effect").unwrap_err();
    assert!(is_recoverable(&status), "{status:?}");
}

async fn references(env: &mut Env) {
    let services = services();
    let tagged = env.busybox().await;
    Image::busybox().push(&services.registry, "test/untagged:latest").await;
    let digest = nomad_driver_shim::ids::Digest::of(&Image::busybox().manifest_bytes());
    let by_digest = format!("{}@{digest}", tagged.rsplit_once(':').unwrap().0);
    for image in [tagged, by_digest, format!("{}/test/untagged", services.registry)] {
        let (code, out, err) = env.run(json!({"image": image, "command": "/bin/echo", "args": ["here"]})).await;
        assert_eq!((code, out.as_str()), (0, "here\n"), "{image}: {err}");
    }
}

async fn credentials(env: &mut Env) {
    let services = services();
    Image::busybox().push(&services.basic_backdoor, "private/rows:1").await;
    let image = format!("{}/private/rows:1", services.basic_registry);
    let config = |password: &str| {
        json!({
            "image": image, "command": "/bin/true", "auth": {"username": "tester", "password": password},
        })
    };
    let mut task = env.prepare(config("wrong")).await;
    env.try_start(&mut task).await.expect_err("wrong credentials were taken");
    let mut task = env.prepare(json!({"image": image, "command": "/bin/true"})).await;
    env.try_start(&mut task).await.expect_err("the plugin's credentials are wrong, too");
    assert_eq!(env.run(config("secret")).await.0, 0);
}

async fn what_is_run(env: &mut Env) {
    let image = Image::busybox()
        .with_config("Entrypoint", json!(["/bin/echo", "entry"]))
        .with_config("Cmd", json!(["cmd"]))
        .push(&services().registry, "test/rows-entrypoint:1")
        .await;
    for (mut config, expected) in [
        (json!({}), "entry cmd"),
        (json!({"args": ["a", "b"]}), "entry a b"),
        (json!({"command": "c", "args": ["a"]}), "entry c a"),
        (json!({"entrypoint": ["/bin/echo", "own"], "args": ["a"]}), "own a"),
    ] {
        config["image"] = json!(image);
        let (code, out, _) = tokio::time::timeout(Duration::from_secs(120), env.run(config.clone())).await.unwrap();
        assert_eq!((code, out.trim_end()), (0, expected), "{config}");
    }
}
