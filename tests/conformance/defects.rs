//! docs/protocol/nomad-driver-containerd.md#9: the defects B1 to B28 of that driver. Each row requires the behaviour
//! that its users wanted instead.

use std::{fs, time::Duration};

use nomad_driver_shim::{
    host::Alloc,
    ids::random_hex,
    pb::driver::{
        Device, FingerprintRequest, TaskState, fingerprint_response::HealthState, memory_usage::Fields as MemoryField,
    },
};
use serde_json::json;

use crate::{
    exec::tty_is_resized,
    logs::{release, without_a_plugin},
    resources::{Pool, has, out_of_memory, sample, stats},
    row,
    row::Row,
    seen::{
        beat, beats, is_still, keeper, kill, kill_containerd, linux, own_containerd, prints, processes, prompt,
        promptly, start_with,
    },
    support::{Env, Image, eventually, leak, not_applicable, patience, services},
};

pub(crate) fn rows() -> Vec<Row> {
    let grace = || json!({"state": {"grace": "1s"}});
    let rows = vec![
        row!(b1_the_start_is_in_start_task, "B1", "StartTask starts, and does not wait five seconds"),
        row!(b2_a_failed_start_is_told, "B2", "what can't be executed makes StartTask fail"),
        row!(b3_nothing_blocks_inspect, "B3", "InspectTask answers while the task is being stopped"),
        row!(b4_a_stop_waits_for_the_exit, "B4", "StopTask ends when the process does, not when the time is over"),
        row!(b5_long_kill_timeouts, "B5", "a kill_timeout of more than 30 s ends in SIGKILL"),
        row!(b6_the_signal_counts, "B6", "kill_signal and the image's STOPSIGNAL are what is sent"),
        row!(b7_stopping_what_has_ended, "B7", "StopTask of a task that has ended is no error"),
        row!(b8_forced_destroy, "B8", "DestroyTask with force takes a running task"),
        row!(
            b9_cleaning_up_goes_on,
            "B9",
            "a container whose processes and shim are gone is cleared away, and its names are free"
        ),
        row!(b10_failed_starts_are_rolled_back, "B10", "after a failed start the same allocation can start"),
        row!(b11_processor_time_is_right, "B11", "a busy task's processor percentage is that of a busy task"),
        row!(b12_memory_is_complete, "B12", "memory statistics have usage, cache and resident memory"),
        row!(tty_is_resized, "B13", "resizes go to the process that is exec'd"),
        row!(
            b14_execs_end_with_their_client,
            "B14",
            "a client that leaves takes what it exec'd along; output is drained first"
        ),
        row!(b15_oom_and_signals_are_told, "B15", "OOM and the killing signal are in the result"),
        row!(b16_containerd_may_restart, "B16", "containerd is restarted: no task ends by that"),
        row!(
            b17_a_plugin_dies_in_the_middle,
            "B17",
            "the plugin is killed in the middle of a start: one container comes of it, or none"
        )
        .config(grace()),
        row!(b18_disabled_is_disabled, "B18", "enabled = false is seen").config(json!({"enabled": false})),
        row!(b19_credentials_stay_secret, "B19", "passwords are not logged"),
        row!(b20_an_empty_entrypoint, "B20", "entrypoint = [] is as if it were not there"),
        row!(b21_any_name_starts, "B21", "names that Nomad allows start: spaces, dots, double dashes, 200 characters"),
        row!(b22_the_hostname_fits, "B22", "the default hostname has at most 64 bytes"),
        row!(b23_the_cpuset_is_nomads, "B23", "the cpuset that Nomad names is the task's"),
        row!(b24_devices_of_plugins, "B24", "devices of device plugins are there"),
        row!(b25_hosts_is_out_of_reach, "B25", "the hosts file is not in the task's directory"),
        row!(b26_containerd_is_not_up_yet, "B26", "without containerd the plugin lives, and says so"),
        row!(b27_fifos, "B27", "a FIFO that can't be opened is an error, and the other one is let go"),
        row!(without_a_plugin, "B27 streams", "output goes on while the plugin is down"),
        row!(
            b28_orphans_are_reaped,
            "B28",
            "after a crash, a container that has ended and that nobody asks for is cleared away"
        )
        .config(grace()),
    ];
    rows.into_iter().map(Row::drop_in).collect()
}

async fn b1_the_start_is_in_start_task(env: &mut Env) {
    prints(env, "true", json!({})).await;
    let config = env.shell(&beat("up"), json!({})).await;
    let task = prompt("StartTask with a cached image", start_with(env, config, |_| {})).await;
    assert_eq!(env.inspect(&task.id).await.unwrap().task.unwrap().state, i32::from(TaskState::Running));
    prompt("the process's first act after StartTask", beats(&task, "up")).await;
}

async fn b2_a_failed_start_is_told(env: &mut Env) {
    let image = env.busybox().await;
    let mut task = env.prepare(json!({"image": image, "command": "/no/such"})).await;
    env.try_start(&mut task).await.expect_err("/no/such was started");
    assert!(env.inspect(&task.id).await.is_err());
}

async fn b3_nothing_blocks_inspect(env: &mut Env) {
    prints(env, "true", json!({})).await;
    let config = env.shell("trap '' TERM; echo ready; while :; do sleep 0.05; done", json!({})).await;
    let mut task = env.prepare(config).await;
    // StartTask and the first call after it must both be prompt: the old driver held its lock while it slept.
    prompt("StartTask", env.try_start(&mut task)).await.unwrap();
    prompt("InspectTask after the start", env.inspect(&task.id)).await.unwrap();
    task.says("ready").await;
    let stop = env.stop(&task, Duration::from_secs(3), "");
    let look = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        prompt("InspectTask during a stop", env.inspect(&task.id)).await.unwrap()
    };
    let (stopped, _) = tokio::join!(stop, look);
    stopped.unwrap();
    prompt("DestroyTask", env.destroy(&task)).await.unwrap();
}

async fn b4_a_stop_waits_for_the_exit(env: &mut Env) {
    let task = env.sh("trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done").await;
    task.says("ready").await;
    prompt("StopTask", env.stop(&task, 3 * promptly(), "")).await.unwrap();
    assert_eq!(prompt("WaitTask", env.wait(&task)).await.exit_code, 0);
}

async fn b5_long_kill_timeouts(env: &mut Env) {
    let task = env.sh("trap '' TERM; echo ready; while :; do sleep 0.05; done").await;
    task.says("ready").await;
    let (timeout, began) = (Duration::from_secs(31), std::time::Instant::now());
    env.stop(&task, timeout, "").await.unwrap();
    let result = env.wait(&task).await;
    assert!(began.elapsed() >= timeout, "killed after {:?}", began.elapsed());
    assert!(result.exit_code == 137 || result.signal == 9, "{result:?}");
}

async fn b6_the_signal_counts(env: &mut Env) {
    let script =
        "trap 'exit 11' TERM; trap 'exit 12' INT; trap 'exit 13' QUIT; echo ready; while :; do sleep 0.05; done";
    let own = Image::busybox().with_config("StopSignal", json!("SIGQUIT"));
    let own = own.push(&services().registry, "test/rows-stopsignal:1").await;
    for (image, signal, expected) in [(env.busybox().await, "SIGINT", 12), (own.clone(), "", 13), (own, "SIGINT", 12)] {
        let config = env.shell(script, json!({"image": image})).await;
        let task = env.start(config).await;
        task.says("ready").await;
        env.stop(&task, 3 * promptly(), signal).await.unwrap();
        assert_eq!(env.wait(&task).await.exit_code, expected, "kill_signal {signal:?}");
        env.destroy(&task).await.unwrap();
    }
}

async fn b7_stopping_what_has_ended(env: &mut Env) {
    let task = env.sh("exit 3").await;
    assert_eq!(env.wait(&task).await.exit_code, 3);
    env.stop(&task, promptly(), "").await.unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 3);
}

async fn b8_forced_destroy(env: &mut Env) {
    let task = env.sh(&beat("up")).await;
    beats(&task, "up").await;
    env.destroy(&task).await.unwrap();
    is_still(&task, "up").await;
    let left = leak::of_tasks(env).await;
    assert!(left.is_empty(), "{left:#?}");
}

async fn b9_cleaning_up_goes_on(env: &mut Env) {
    let task = env.sh("echo ready; sleep 600").await;
    task.says("ready").await;
    let shim = keeper(env, &task);
    kill(shim);
    processes(env, &task).into_iter().for_each(kill);
    env.destroy(&task).await.unwrap();
    let left = leak::of_tasks(env).await;
    assert!(left.is_empty(), "{left:#?}");
    let config = env.shell("exit 4", json!({})).await;
    let mut again = env.prepare_in(task.dirs.clone(), "1", config).await;
    env.try_start(&mut again).await.unwrap();
    assert_eq!(env.wait(&again).await.exit_code, 4);
}

async fn b10_failed_starts_are_rolled_back(env: &mut Env) {
    let config = env.shell("exit 4", json!({})).await;
    let mut task = env.prepare(config.clone()).await;
    task.config.user = "nobody-has-this-name".to_owned();
    env.try_start(&mut task).await.expect_err("a user that does not exist");
    task.config.user.clear();
    let mut without = env.prepare_again(task, "1", json!({"image": config["image"], "command": "/no/such"})).await;
    env.try_start(&mut without).await.expect_err("/no/such was started");
    let mut again = env.prepare_in(without.dirs.clone(), "1", config).await;
    env.try_start(&mut again).await.unwrap_or_else(|status| panic!("{}", status.message()));
    assert_eq!(env.wait(&again).await.exit_code, 4);
}

async fn b11_processor_time_is_right(env: &mut Env) {
    let task = env.sh("while :; do :; done").await;
    let mut stream = stats(env, &task, 500).await;
    let mut percent = 0.0;
    for _ in 0..3 {
        percent = sample(&mut stream).await.unwrap().agg_resource_usage.unwrap().cpu.unwrap().percent;
    }
    assert!(percent > 5.0, "{percent} % for a busy loop");
}

async fn b12_memory_is_complete(env: &mut Env) {
    let task = env.sh("dd if=/dev/zero of=/dev/shm/file bs=1M count=20 2>/dev/null; echo ready; sleep 600").await;
    task.says("ready").await;
    let mut stream = stats(env, &task, 300).await;
    let memory = sample(&mut stream).await.unwrap().agg_resource_usage.unwrap().memory.unwrap();
    let all = [MemoryField::Rss, MemoryField::Cache, MemoryField::Usage];
    assert!(has(&memory.measured_fields, &all), "{memory:?}");
    assert!(memory.cache >= 20 << 20 && memory.usage >= memory.cache, "{memory:?}");
}

async fn b14_execs_end_with_their_client(env: &mut Env) {
    let task = env.sh("sleep 600").await;
    for tty in [false, true] {
        let name = format!("exec-{tty}");
        let talk = env.talk(&task, &["/bin/sh", "-c", &beat(&name)], tty).await.unwrap();
        beats(&task, &name).await;
        drop(talk);
        is_still(&task, &name).await;
    }
    let all = env.talk(&task, &["/bin/sh", "-c", "seq 1 30000; echo last"], false).await.unwrap().end().await;
    assert_eq!((all.stdout.lines().count(), all.code), (30_001, Some(0)), "the last lines are lost");
}

async fn b15_oom_and_signals_are_told(env: &mut Env) {
    let task = env.sh("exec sleep 600").await;
    env.stop(&task, Duration::ZERO, "").await.unwrap();
    let result = env.wait(&task).await;
    assert!(result.signal == 9 || result.exit_code == 137, "{result:?}");
    out_of_memory(env).await;
}

async fn b16_containerd_may_restart(env: &mut Env) {
    let dir = own_containerd(env).await;
    let task = env.sh("trap 'exit 8' TERM; echo ready; while :; do sleep 0.05; done").await;
    task.says("ready").await;
    let waiting = {
        let (mut driver, task_id) = (env.driver(), task.id.clone());
        let request = nomad_driver_shim::pb::driver::WaitTaskRequest { task_id };
        tokio::spawn(async move { driver.wait_task(request).await })
    };
    kill_containerd(&dir);
    tokio::time::sleep(Duration::from_secs(1)).await;
    services::start_containerd(&dir);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!waiting.is_finished(), "the task is said to have ended");
    env.stop(&task, 3 * promptly(), "").await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().into_inner().result.unwrap().exit_code, 8);
    env.destroy(&task).await.unwrap();
    kill_containerd(&dir);
}

async fn b17_a_plugin_dies_in_the_middle(env: &mut Env) {
    prints(env, "true", json!({})).await;
    for delay in [2, 8, 15, 25, 40] {
        let config = env.shell(&beat("first"), json!({})).await;
        let mut task = env.prepare(config).await;
        let start = tokio::time::timeout(Duration::from_millis(delay), env.try_start(&mut task));
        let _ = start.await;
        env.kill_plugin().await;
        env.start_plugin().await;
        let config = env.shell("exit 3", json!({})).await;
        let mut again = env.prepare_in(task.dirs.clone(), "2", config).await;
        env.try_start(&mut again).await.unwrap_or_else(|status| panic!("after {delay} ms: {}", status.message()));
        assert_eq!(env.wait(&again).await.exit_code, 3, "after {delay} ms");
        if task.dirs.alloc_dir.join("alloc/data/first").exists() {
            is_still(&task, "first").await;
        }
        env.destroy(&again).await.unwrap();
    }
}

async fn health(env: &Env) -> (i32, String) {
    let mut stream = env.driver().fingerprint(FingerprintRequest {}).await.unwrap().into_inner();
    let first = tokio::time::timeout(patience(), stream.message()).await.expect("no fingerprint").unwrap().unwrap();
    (first.health, first.health_description)
}

async fn b18_disabled_is_disabled(env: &mut Env) {
    if env.config["enabled"].is_null() {
        not_applicable("it has no option enabled");
    }
    let (health, why) = health(env).await;
    assert_eq!(health, i32::from(HealthState::Undetected), "{why}");
}

async fn b19_credentials_stay_secret(env: &mut Env) {
    let secret = format!("hunter2-{}", random_hex(4));
    let image = format!("{}/private/none:1", services().basic_registry);
    let mut task = env.prepare(json!({"image": image, "auth": {"username": "tester", "password": secret}})).await;
    let said = env.try_start(&mut task).await.unwrap_err();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!said.message().contains(&secret) && !env.plugin().stderr().contains(&secret), "{}", env.plugin().stderr());
}

async fn b20_an_empty_entrypoint(env: &mut Env) {
    let image = env.busybox().await;
    let (code, out, _) =
        env.run(json!({"image": image, "entrypoint": [], "command": "/bin/echo", "args": ["here"]})).await;
    assert_eq!((code, out.as_str()), (0, "here\n"));
}

async fn start_named(env: &mut Env, name: &str, script: &str) -> String {
    let alloc = Alloc::create(&env.dir.join("allocs"), &format!("{}-{}", env.namespace, random_hex(4))).unwrap();
    env.allocs.push(alloc.clone());
    let config = env.shell(script, json!({})).await;
    let mut task = env.prepare_in(alloc.create_task(name).unwrap(), "1", config).await;
    env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{name}: {}", status.message()));
    let (code, out, err) = env.finish_task(task).await;
    assert_eq!(code, 0, "{name}: {err}");
    out
}

async fn b21_any_name_starts(env: &mut Env) {
    for name in ["with space", "a--b..c", "-leading", "ünï", &"x".repeat(200)] {
        start_named(env, name, "true").await;
    }
}

async fn b22_the_hostname_fits(env: &mut Env) {
    let hostname = start_named(env, &"y".repeat(100), "hostname").await;
    assert!((1..=64).contains(&hostname.trim_end().len()), "{hostname}");
}

async fn b23_the_cpuset_is_nomads(env: &mut Env) {
    let pool = Pool::new(env, "1");
    let config = env.shell("grep Cpus_allowed_list /proc/self/status", json!({})).await;
    let task = start_with(env, config, |config| linux(config).cpuset_cgroup.clone_from(&pool.told)).await;
    assert_eq!(env.finish_task(task).await.1, "Cpus_allowed_list:\t1\n");
}

async fn b24_devices_of_plugins(env: &mut Env) {
    let config = env.shell("head -c 3 /dev/card | wc -c", json!({})).await;
    let task = start_with(env, config, |config| {
        let (task_path, host_path) = ("/dev/card".to_owned(), "/dev/zero".to_owned());
        config.devices.push(Device { task_path, host_path, cgroup_permissions: "rwm".to_owned() });
    })
    .await;
    assert_eq!(env.finish_task(task).await.1, "3\n");
}

async fn b25_hosts_is_out_of_reach(env: &mut Env) {
    let script = "ls -A /local; echo '9.9.9.9 evil' 2>/dev/null >> /etc/hosts; grep -c localhost /etc/hosts";
    let out = prints(env, script, json!({"extra_hosts": ["db:127.0.1.9"]})).await;
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 1, "there is something in /local: {out}");
}

async fn b26_containerd_is_not_up_yet(env: &mut Env) {
    let dir = own_containerd(env).await;
    env.plugin.take().unwrap().shut_down().await;
    kill_containerd(&dir);
    eventually("containerd is gone", async || {
        let socket = std::os::unix::net::UnixStream::connect(dir.join("containerd.sock"));
        if socket.is_err() { Ok(()) } else { Err(()) }
    })
    .await;
    env.start_plugin().await;
    env.plugin().info().await.unwrap();
    let (health, why) = health(env).await;
    assert!(health != i32::from(HealthState::Healthy) && !why.is_empty(), "{why}");
}

async fn b27_fifos(env: &mut Env) {
    let config = env.shell("true", json!({})).await;
    let mut task = env.prepare(config).await;
    task.config.stderr_path = format!("{}/no/such.fifo", task.dirs.alloc_dir.display());
    env.try_start(&mut task).await.expect_err("a FIFO that is not there");
    let pid = env.plugin().pid().unwrap();
    let open =
        fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
    let held: Vec<_> = open.filter(|path| *path == task.dirs.stdout).collect();
    assert!(held.is_empty(), "{held:?}");
    release(&task.dirs.stderr);
    release(&task.dirs.stdout);
}

async fn b28_orphans_are_reaped(env: &mut Env) {
    if env.config["state"].is_null() {
        not_applicable("when it reaps can't be said");
    }
    let task = env.sh("until [ -e /alloc/data/go ]; do sleep 0.05; done").await;
    env.kill_plugin().await;
    fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    env.start_plugin().await;
    // No agent asks for this task again.
    let left = leak::of_tasks(env).await;
    assert!(left.is_empty(), "{left:#?}");
}
