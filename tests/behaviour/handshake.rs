//! The handshake of go-plugin, and the life cycle of the plugin process.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use nomad_driver_shim::{
    cookie::{MAGIC_COOKIE, MAGIC_COOKIE_KEY},
    host::{Plugin, PluginCommand},
    pb::{
        base::{ConfigSchemaRequest, SetConfigRequest},
        goplugin::{ConnInfo, grpc_broker_client::GrpcBrokerClient, grpc_stdio_client::GrpcStdioClient},
    },
};
use serde_json::json;

use crate::support::{Env, patience, program, services::root};

/// Starts the program as a plugin, without the host module.
fn raw(environment: &[(&str, &str)]) -> Child {
    let mut command = Command::new(program());
    command.env(MAGIC_COOKIE_KEY, MAGIC_COOKIE).env("PLUGIN_PROTOCOL_VERSIONS", "2").env("TMPDIR", root());
    command.envs(environment.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn first_line(child: &mut Child) -> String {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    line
}

#[test]
fn without_cookie_and_arguments_it_explains_itself() {
    let output = Command::new(program()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let text = String::from_utf8(output.stderr).unwrap();
    for part in ["Nomad", "plugin_dir", "run IMAGE"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn the_line_has_the_fields_that_nomad_splits() {
    let mut child = raw(&[]);
    let line = first_line(&mut child);
    let fields: Vec<&str> = line.trim_end().split('|').collect();
    assert_eq!((&fields[..3], fields[4], fields[5], fields.len()), (&["1", "2", "unix"][..], "grpc", "", 6));
    assert_eq!(std::fs::metadata(fields[3]).unwrap().permissions().mode() & 0o777, 0o600);
    child.kill().unwrap();
    child.wait().unwrap();
    let mut child = raw(&[("PLUGIN_MULTIPLEX_GRPC", "true")]);
    assert!(first_line(&mut child).trim_end().ends_with("|grpc||false"), "the seventh field only when it is asked for");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn the_sockets_directory_and_group_are_the_hosts_choice() {
    let directory = root().join("socket-dir");
    std::fs::create_dir_all(&directory).unwrap();
    let mut child =
        raw(&[("PLUGIN_UNIX_SOCKET_DIR", directory.to_str().unwrap()), ("PLUGIN_UNIX_SOCKET_GROUP", "4242")]);
    let line = first_line(&mut child);
    let socket = Path::new(line.split('|').nth(3).unwrap());
    assert!(socket.starts_with(&directory), "{line}");
    let metadata = std::fs::metadata(socket).unwrap();
    assert_eq!((metadata.permissions().mode() & 0o777, std::os::unix::fs::MetadataExt::gid(&metadata)), (0o660, 4242));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn another_protocol_version_is_refused_in_words() {
    let output = raw(&[("PLUGIN_PROTOCOL_VERSIONS", "1,3")]).wait_with_output().unwrap();
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("1,3"));
}

#[tokio::test(flavor = "multi_thread")]
async fn through_a_link_it_says_the_links_name() {
    let link = root().join("containerd-driver");
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(program(), &link).unwrap();
    let plugin = Plugin::launch(&PluginCommand::new(&link)).await.unwrap();
    let info = plugin.info().await.unwrap();
    assert_eq!((info.name.as_str(), info.plugin_api_versions), ("containerd-driver", vec!["v0.1.0".to_owned()]));
    // This is an agent configuration of nomad-driver-containerd, unchanged.
    let old = json!({"enabled": true, "containerd_runtime": "io.containerd.runc.v2", "stats_interval": "5s"});
    let schema = plugin.base().config_schema(ConfigSchemaRequest {}).await.unwrap().into_inner();
    let msgpack_config = nomad_driver_shim::host::encode(schema.spec.as_ref(), &old).unwrap();
    plugin.base().set_config(SetConfigRequest { msgpack_config, ..Default::default() }).await.unwrap();
    plugin.shut_down().await;

    let mut launch = PluginCommand::new(program());
    assert_eq!(Plugin::launch(&launch).await.unwrap().info().await.unwrap().name, "shim");
    launch.args = vec!["--name".to_owned(), "other".to_owned()];
    assert_eq!(Plugin::launch(&launch).await.unwrap().info().await.unwrap().name, "other");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_asks_for_mutual_tls_gets_it() {
    let mut launch = PluginCommand::new(program());
    launch.tls = true;
    let plugin = Plugin::launch(&launch).await.unwrap();
    assert_eq!(plugin.info().await.unwrap().name, "shim");
    // Another client, without the pinned certificate, is refused.
    let path = plugin.socket().to_owned();
    let endpoint = tonic::transport::Endpoint::from_static("http://x");
    let plain = endpoint.connect_with_connector(tower::service_fn(move |_| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
    }));
    if let Ok(channel) = plain.await {
        let mut client = nomad_driver_shim::pb::base::base_plugin_client::BasePluginClient::new(channel);
        client.plugin_info(nomad_driver_shim::pb::base::PluginInfoRequest {}).await.unwrap_err();
    }
    assert_eq!(plugin.info().await.unwrap().name, "shim", "and does no harm");
    assert!(plugin.shut_down().await.status.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn go_plugins_own_services_are_there() {
    let env = Env::new().await;
    let channel = env.plugin().channel();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let answer = health.check(tonic_health::pb::HealthCheckRequest { service: "plugin".to_owned() }).await.unwrap();
    assert_eq!(answer.into_inner().status, 1, "SERVING");
    let mut stdio = GrpcStdioClient::new(channel.clone()).stream_stdio(()).await.unwrap().into_inner();
    let mut broker =
        GrpcBrokerClient::new(channel).start_stream(tokio_stream::pending::<ConnInfo>()).await.unwrap().into_inner();
    let quiet = Duration::from_millis(200);
    assert!(tokio::time::timeout(quiet, stdio.message()).await.is_err(), "held open, silent");
    assert!(tokio::time::timeout(quiet, broker.message()).await.is_err(), "held open, silent");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn asking_who_it_is_touches_nothing() {
    let directory = root().join("untouched");
    let plugin = Plugin::launch(&PluginCommand::new(program())).await.unwrap();
    plugin.info().await.unwrap();
    let schema = plugin.base().config_schema(ConfigSchemaRequest {}).await.unwrap().into_inner();
    let config = json!({"state": {"run_dir": directory.join("run"), "state_dir": directory.join("state")}});
    let msgpack_config = nomad_driver_shim::host::encode(schema.spec.as_ref(), &config).unwrap();
    for _ in 0..2 {
        let request = SetConfigRequest { msgpack_config: msgpack_config.clone(), ..Default::default() };
        plugin.base().set_config(request).await.unwrap();
    }
    let left = plugin.shut_down().await;
    assert!(left.status.is_some_and(|status| status.success()) && left.took < Duration::from_secs(1), "{left:?}");
    assert!(!directory.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn it_leaves_at_once_and_takes_its_socket_along() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let socket = env.plugin().socket().to_owned();
    // A WaitTask call that is still waiting must not delay the plugin's end.
    let (mut driver, task_id) = (env.driver(), task.id.clone());
    let waiter =
        tokio::spawn(async move { driver.wait_task(nomad_driver_shim::pb::driver::WaitTaskRequest { task_id }).await });
    let left = env.plugin.take().unwrap().shut_down().await;
    assert!(left.status.is_some_and(|status| status.success()) && left.took < Duration::from_secs(1), "{left:?}");
    assert!(!socket.exists());
    assert!(waiter.await.unwrap().is_err(), "an answer would be taken for the task's exit");
    env.start_plugin().await;
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminals_interrupt_is_ignored() {
    let env = Env::new().await;
    let pid = nix::unistd::Pid::from_raw(env.plugin().pid().unwrap().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(env.plugin().info().await.unwrap().name, "shim");
    env.finish().await;
}

/// The agent died, so no process reads the plugin's stderr any more. Every log line fails with EPIPE, and the plugin
/// goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_stderr_does_no_harm() {
    let mut child = raw(&[]);
    let line = first_line(&mut child);
    let socket = line.split('|').nth(3).unwrap().to_owned();
    drop(child.stderr.take());
    drop(child.stdout.take());
    let channel = tonic::transport::Endpoint::from_static("http://x")
        .connect_with_connector(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
        }))
        .await
        .unwrap();
    let mut driver = nomad_driver_shim::pb::driver::driver_client::DriverClient::new(channel.clone());
    for _ in 0..50 {
        // Each call is refused, and logged to the broken stderr.
        let request =
            nomad_driver_shim::pb::driver::StopTaskRequest { task_id: "none".to_owned(), ..Default::default() };
        let mut base = nomad_driver_shim::pb::base::base_plugin_client::BasePluginClient::new(channel.clone());
        let config = nomad_driver_shim::host::encode_raw(&json!({"enabled": false}));
        base.set_config(SetConfigRequest { msgpack_config: config, ..Default::default() }).await.unwrap();
        let _ = driver.stop_task(request).await;
    }
    assert!(child.try_wait().unwrap().is_none(), "still alive");
    let mut controller = nomad_driver_shim::pb::goplugin::grpc_controller_client::GrpcControllerClient::new(channel);
    let _ = controller.shutdown(nomad_driver_shim::pb::goplugin::Empty {}).await;
    let ended = tokio::task::spawn_blocking(move || child.wait().unwrap());
    assert!(tokio::time::timeout(patience(), ended).await.unwrap().unwrap().success());
}

/// Log lines have the keys of hclog, strings where Nomad's client asserts strings, and exactly six digits in the time.
#[tokio::test(flavor = "multi_thread")]
async fn log_lines_are_what_the_agent_parses() {
    let mut env = Env::new().await;
    let task = env.sh("exit 0").await;
    env.finish_task(task).await;
    let stderr = env.plugin().stderr();
    assert!(stderr.lines().count() > 2, "{stderr}");
    for line in stderr.lines() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        for key in ["@level", "@message", "@timestamp"] {
            assert!(value[key].is_string(), "{key} in {line}");
        }
        let time = value["@timestamp"].as_str().unwrap();
        assert!(time.len() == "2026-08-21T10:11:12.123456Z".len() && time.ends_with('Z'), "{time}");
    }
    env.finish().await;
}

/// If a shim inherited the plugin's stdout or stderr, the agent would wait forever for the end of these streams.
#[tokio::test(flavor = "multi_thread")]
async fn shims_inherit_neither_streams_nor_cgroup_nor_session() {
    let mut env = Env::new().await;
    let task = env.sh("echo ready; sleep 600").await;
    task.says("ready").await;
    let dir = env.dir.join("run/shims");
    let mut seen = 0;
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(cwd) = std::fs::read_link(process.path().join("cwd")) else { continue };
        // A shim that is just being started for the pool is a copy of this program for a moment, until it executes its
        // own.
        let program = std::fs::read_link(process.path().join("exe")).unwrap_or_default();
        if !cwd.starts_with(&dir) || !program.ends_with("containerd-shim-runc-v2") {
            continue;
        }
        seen += 1;
        for fd in std::fs::read_dir(process.path().join("fd")).unwrap().flatten() {
            let target = std::fs::read_link(fd.path()).unwrap().to_string_lossy().into_owned();
            let number: u32 = fd.file_name().to_str().unwrap().parse().unwrap();
            match number {
                0 | 1 => assert_eq!(target, "/dev/null"),
                2 => assert!(target.ends_with("/log"), "{target}"),
                _ => assert!(!target.ends_with("run/lock"), "{target}"),
            }
            // The only memfd of the shim is crun's sealed copy, as descriptor 4.
            assert!(number == 4 || !target.starts_with("/memfd:"), "{number}: {target}");
        }
        // A shim that is just being started for the pool is moved to its cgroup right after its start.
        crate::support::eventually("the shim's own cgroup", async || {
            let groups = std::fs::read_to_string(process.path().join("cgroup")).unwrap();
            if groups.lines().all(|line| line.ends_with("/nomad-driver-shim")) { Ok(()) } else { Err(groups) }
        })
        .await;
        let mut stat = String::new();
        std::fs::File::open(process.path().join("stat")).unwrap().read_to_string(&mut stat).unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        assert_eq!(fields[3], process.file_name().to_str().unwrap(), "leader of its own session");
    }
    assert!(seen >= 1);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// Two plugins of one name on one host: the second one reports this and touches nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_plugin_of_the_same_name_is_refused_while_the_first_lives() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let second =
        Plugin::launch(&PluginCommand { args: vec!["--name".into(), "shim".into()], ..PluginCommand::new(program()) })
            .await
            .unwrap();
    second.configure(&env.config).await.unwrap();
    let request = nomad_driver_shim::pb::driver::StartTaskRequest { task: Some(task.config.clone()) };
    let status = second.driver().start_task(request).await.unwrap_err();
    assert!(status.message().contains("another plugin holds"), "{status:?}");
    assert!(nomad_driver_shim::host::is_recoverable(&status));
    second.shut_down().await;
    env.destroy(&task).await.unwrap();
    env.finish().await;
}
