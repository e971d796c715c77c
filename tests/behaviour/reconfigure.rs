//! A running plugin is configured again: it accepts the configuration that it already has, and refuses any other.

use nomad_driver_shim::{
    host::{Plugin, PluginCommand, encode},
    pb::{
        base::{ConfigSchemaRequest, SetConfigRequest},
        driver::InitRequest,
    },
};
use serde_json::{Value, json};
use tonic::Code;

use crate::support::{Env, program};

/// A job that binds a directory of the host.
async fn binding(env: &Env, source: &std::path::Path) -> Value {
    json!({
        "image": env.busybox().await, "command": "/bin/cat", "args": ["/m/file"],
        "mounts": [{"type": "bind", "source": source, "target": "/m", "options": ["rbind", "ro"]}],
    })
}

/// Without this, requests were checked by the new settings and executed by the old ones.
#[tokio::test(flavor = "multi_thread")]
async fn another_configuration_is_refused_as_a_whole_and_told() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let source = env.dir.join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), "content").unwrap();

    let mut other = env.config.clone();
    other["security"] = json!({"allow_paths": [source]});
    other["allow_privileged"] = json!(true);
    other["shim_scope"] = json!("node");
    other["state"]["grace"] = json!("1s");
    let Err(error) = env.plugin().configure(&other).await else {
        let mut task = env.prepare(binding(&env, &source).await).await;
        let outcome = env.try_start(&mut task).await;
        panic!("the second configuration was accepted, and a job that it allows answers {outcome:?}");
    };
    let said = format!("{error:?}");
    let pid = env.plugin().pid().unwrap();
    for part in ["security.allow_paths", "allow_privileged", "shim_scope", "state.grace", "nothing of the new one"] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    assert!(said.contains(&format!("kill {pid}")), "no way out: {said}");

    // No part of the new configuration is in effect: neither where a job is checked, nor where its task is made.
    let mut privileged = env.prepare(json!({"image": env.busybox().await, "privileged": true})).await;
    let error = env.try_start(&mut privileged).await.unwrap_err();
    assert!(error.message().contains("allow_privileged"), "{error:?}");
    let mut bound = env.prepare(binding(&env, &source).await).await;
    let error = env.try_start(&mut bound).await.unwrap_err();
    assert!(error.message().contains("allow_paths"), "{error:?}");
    assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n");

    // The way out: the next plugin has the new configuration, and recovers the task.
    env.kill_plugin().await;
    other["shim_scope"] = json!("task");
    env.config = other;
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    assert_eq!(env.run(binding(&env, &source).await).await, (0, "content".to_owned(), String::new()));
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// A new agent that reattaches sends the same configuration: nothing has changed, so nothing happens.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_configuration_is_taken_again() {
    let mut env = Env::configured(
        json!({"security": {"ulimit_max": {"nofile": "4096"}}, "runtime": {"own": {"binary": "runc"}}}),
    )
    .await;
    let task = env.sh("sleep 600").await;
    for _ in 0..3 {
        env.plugin().configure(&env.config).await.unwrap();
    }
    let again = Plugin::reattach(env.plugin().socket()).await.unwrap();
    again.configure(&env.config).await.unwrap();
    drop(again);
    assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// Until then, the plugin has not checked or made anything with its configuration.
#[tokio::test(flavor = "multi_thread")]
async fn until_the_first_work_the_last_configuration_wins() {
    let mut env = Env::new().await;
    let plugin = Plugin::launch(&PluginCommand::with_name(program(), "shim")).await.unwrap();
    let configure = async |config: &Value| {
        let schema = plugin.base().config_schema(ConfigSchemaRequest {}).await.unwrap().into_inner();
        let msgpack_config = encode(schema.spec.as_ref(), config).unwrap();
        plugin.base().set_config(SetConfigRequest { msgpack_config, ..Default::default() }).await.map(drop)
    };
    let mut other = env.config.clone();
    other["enabled"] = json!(false);
    configure(&other).await.unwrap();
    configure(&env.config).await.unwrap();
    env.kill_plugin().await;
    plugin.driver().init(InitRequest {}).await.unwrap();
    let status = configure(&other).await.unwrap_err();
    assert!(
        status.code() == Code::FailedPrecondition && status.message().contains("options that differ: enabled)"),
        "{status:?}"
    );
    env.plugin = Some(plugin);
    assert_eq!(env.run(json!({"image": env.busybox().await, "command": "/bin/true"})).await.0, 0);
    env.finish().await;
}
