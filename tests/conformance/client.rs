//! docs/protocol/nomad-plugin.md#6.3, rows 24 to 26 and 28: how an agent uses a driver.

use std::{fs, process::Command, time::Duration};

use nomad_driver_shim::{
    host::Plugin,
    pb::driver::{
        FingerprintRequest, FingerprintResponse, NetworkIsolationSpec, StartTaskRequest,
        fingerprint_response::HealthState,
    },
};
use serde_json::json;
use tonic::Streaming;

use crate::{
    row,
    row::Row,
    seen::{kill_containerd, own_containerd, prompt, promptly, start_with},
    support::{
        Env, Image, eventually,
        fake_registry::{Answer, FakeRegistry, MANIFEST},
        patience, services,
    },
};

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row!(
            agents_and_plugins_die,
            "6.3.24",
            "agent restart (clean, killed), plugin killed, both: the same process, and a stop that works"
        ),
        row!(health, "6.3.25", "the fingerprint tells that what the driver needs is away, and back"),
        row!(
            group_network,
            "6.3.26",
            "two tasks of a group share its network, also after a restart; nothing holds it afterwards"
        ),
        row!(
            stop_during_a_pull,
            "6.3.28",
            "an allocation is stopped during a slow pull: the start gives up and leaves nothing"
        ),
    ]
}

async fn agents_and_plugins_die(env: &mut Env) {
    let task = env.sh("echo start >> /alloc/data/starts; trap 'exit 12' TERM; while :; do sleep 0.05; done").await;
    let starts = task.dirs.alloc_dir.join("alloc/data/starts");
    eventually("it is up", async || if starts.exists() { Ok(()) } else { Err(()) }).await;
    for how in ["clean", "plugin killed", "both killed", "agent killed"] {
        match how {
            "clean" => {
                env.plugin.take().unwrap().shut_down().await;
            }
            "plugin killed" => env.kill_plugin().await,
            "both killed" => {
                let plugin = env.plugin.take().unwrap();
                let socket = plugin.socket().to_owned();
                plugin.detach().unwrap().kill().await.unwrap();
                fs::remove_file(socket).unwrap();
            }
            _ => {
                let plugin = env.plugin.take().unwrap();
                let socket = plugin.socket().to_owned();
                let child = plugin.detach().unwrap();
                tokio::spawn(child.wait_with_output());
                env.plugin = Some(Plugin::reattach(&socket).await.unwrap());
            }
        }
        if env.plugin.is_none() {
            env.start_plugin().await;
        }
        env.recover(&task).await.unwrap_or_else(|status| panic!("{how}: {}", status.message()));
        let status = env.inspect(&task.id).await.unwrap().task.unwrap();
        assert_eq!(status.state, i32::from(nomad_driver_shim::pb::driver::TaskState::Running), "{how}");
    }
    prompt("StopTask", env.stop(&task, 3 * promptly(), "")).await.unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 12);
    assert_eq!(fs::read_to_string(starts).unwrap(), "start\n", "it was started again");
}

async fn next(stream: &mut Streaming<FingerprintResponse>) -> FingerprintResponse {
    tokio::time::timeout(2 * patience(), stream.message()).await.expect("no word").unwrap().expect("the stream ended")
}

async fn health(env: &mut Env) {
    let dir = own_containerd(env).await;
    let mut stream = env.driver().fingerprint(FingerprintRequest {}).await.unwrap().into_inner();
    assert_eq!(next(&mut stream).await.health, i32::from(HealthState::Healthy));
    kill_containerd(&dir);
    let mut seen = next(&mut stream).await;
    while seen.health == i32::from(HealthState::Healthy) {
        seen = next(&mut stream).await;
    }
    assert!(!seen.health_description.is_empty(), "{seen:?}");
    services::start_containerd(&dir);
    while next(&mut stream).await.health != i32::from(HealthState::Healthy) {}
    kill_containerd(&dir);
}

pub(crate) async fn group_network(env: &mut Env) {
    let name = format!("nds-{}", env.namespace);
    let ip = |arguments: &[&str]| services::run(Command::new("ip").args(arguments));
    ip(&["netns", "add", &name]);
    ip(&["-n", &name, "link", "set", "lo", "up"]);
    let path = format!("/run/netns/{name}");
    let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap());
    let group = NetworkIsolationSpec { mode: 1, path, ..Default::default() };
    let server = env.shell("mkdir /www; echo hello > /www/f; exec httpd -f -p 8080 -h /www", json!({})).await;
    let server = start_with(env, server, |config| config.network_isolation_spec = Some(group.clone())).await;
    let client = env.shell("sleep 600", json!({})).await;
    let client = start_with(env, client, |config| config.network_isolation_spec = Some(group)).await;
    for restarted in [false, true] {
        if restarted {
            env.kill_plugin().await;
            env.start_plugin().await;
            env.recover(&server).await.unwrap();
            env.recover(&client).await.unwrap();
        }
        eventually("an answer from the other task", async || {
            let answer = env.exec(&client, &["/bin/wget", "-qO-", "http://127.0.0.1:8080/f"], 0).await.unwrap();
            if answer.stdout == b"hello\n" { Ok(()) } else { Err(String::from_utf8(answer.stderr).unwrap()) }
        })
        .await;
    }
    env.destroy(&server).await.unwrap();
    env.destroy(&client).await.unwrap();
    ip(&["netns", "del", &name]);
    let holds =
        |path: std::path::PathBuf| fs::read_link(path).is_ok_and(|link| link.ends_with(format!("net:[{inode}]")));
    eventually("nobody is in the namespace", async || {
        let inside: Vec<_> = crate::support::leak::entries(std::path::Path::new("/proc"))
            .into_iter()
            .filter(|pid| holds(format!("/proc/{pid}/ns/net").into()))
            .collect();
        if inside.is_empty() { Ok(()) } else { Err(inside) }
    })
    .await;
}

async fn stop_during_a_pull(env: &mut Env) {
    let registry = FakeRegistry::start().await;
    let slow = Answer { delay: 4 * patience(), ..Answer::ok(MANIFEST, Image::busybox().manifest_bytes()) };
    registry.set("/v2/slow/manifests/1", slow);
    let task = env.prepare(json!({"image": format!("{}/slow:1", registry.address)})).await;
    env.asked.lock().unwrap().push(task.id.clone());
    let (mut driver, config) = (env.driver(), task.config.clone());
    let start = tokio::spawn(async move { driver.start_task(StartTaskRequest { task: Some(config) }).await });
    eventually("the pull has begun", async || if registry.requests().is_empty() { Err(()) } else { Ok(()) }).await;
    // Nomad does the same: it stops the task, and cancels the call if that does not help.
    let _ = prompt("StopTask", env.stop(&task, Duration::from_secs(1), "")).await;
    let answer = tokio::time::timeout(patience() / 2, start).await.expect("the start goes on").unwrap();
    assert!(answer.is_err(), "{answer:?}");
    let _ = env.destroy(&task).await;
    let config = env.shell("exit 3", json!({})).await;
    let mut again = env.prepare_again(task, "2", config).await;
    env.try_start(&mut again).await.unwrap();
    assert_eq!(env.wait(&again).await.exit_code, 3);
}
