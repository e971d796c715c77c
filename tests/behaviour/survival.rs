//! What happens to a task when plugins, agents, containerd and shims end and come back.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use nomad_driver_shim::{
    host::{Plugin, PluginCommand},
    pb::driver::TaskState,
    process::PidFd,
};
use serde_json::{Value, json};

use crate::support::{Env, eventually, program, services, shell_in};

/// Starts a containerd of the test's own, which the test may kill.
fn own_containerd() -> (std::path::PathBuf, i32) {
    let dir = services().root.join(format!("containerd-{}", nomad_driver_shim::ids::random_hex(3)));
    let socket = services::start_containerd(&dir);
    (socket, fs::read_to_string(dir.join("pid")).unwrap().parse().unwrap())
}

/// Returns the pid of the shim that a record names.
fn shim_pid(env: &Env, record: &Value) -> i32 {
    let path = env.dir.join("run/shims").join(record["shim"].as_str().unwrap()).join("pid");
    let process: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    i32::try_from(process["pid"].as_i64().unwrap()).unwrap()
}

/// Everything in one test: the agent's connection is dropped and attached again, the plugin is killed, and containerd
/// is killed and its socket replaced by a listener that counts calls.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_lives_through_the_death_of_everything_around_it() {
    let (containerd, containerd_pid) = own_containerd();
    let mut env = Env::configured(json!({"containerd": {"address": containerd}, "image": {"keep": "forever"}})).await;
    let script = "trap 'echo stopping; exit 3' TERM; n=0; while [ ! -e /alloc/data/go ]; do \
                  for i in 1 2 3 4 5 6 7 8 9 10; do n=$((n+1)); echo $n; done; usleep 500; done; echo last; \
                  while :; do usleep 10000; done";
    let task = env.sh(script).await;
    task.says("\n100\n").await;
    let pid = env.attribute(&task, "pid").await;

    // The agent dies and the plugin lives on; a new agent attaches.
    let socket = env.plugin().socket().to_owned();
    let child = env.plugin.take().unwrap().detach();
    env.plugin = Some(Plugin::reattach(&socket).await.unwrap());
    env.recover(&task).await.unwrap();
    assert_eq!(env.attribute(&task, "pid").await, pid);

    // Then the plugin and containerd die.
    kill(Pid::from_raw(containerd_pid), Signal::SIGKILL).unwrap();
    drop(env.plugin.take());
    child.unwrap().kill().await.unwrap();
    fs::remove_file(&socket).unwrap();
    fs::remove_file(&containerd).unwrap();
    let listener = tokio::net::UnixListener::bind(&containerd).unwrap();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    tokio::spawn(async move {
        loop {
            drop(listener.accept().await.unwrap());
            counted.fetch_add(1, Ordering::SeqCst);
        }
    });
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    assert_eq!(env.attribute(&task, "pid").await, pid);
    let second = env.sh("echo cached").await;
    assert_eq!(env.finish_task(second).await.1, "cached\n");
    assert_eq!(calls.load(Ordering::SeqCst), 0, "a cached image's start called containerd");

    fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    task.says("last").await;
    env.stop(&task, Duration::from_secs(30), "").await.unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 3);
    let (out, _) = task.output().await;
    let mut lines = out.lines();
    let mut count = 0;
    for line in lines.by_ref().take_while(|line| *line != "last") {
        count += 1;
        assert_eq!(line, count.to_string(), "a line was lost or doubled");
    }
    assert_eq!(lines.collect::<Vec<_>>(), ["stopping"]);
    assert!(count > 500, "{count} lines are no test");
    env.destroy(&task).await.unwrap();
    let leaks = crate::support::leak::while_alive(&env).await;
    assert!(leaks.is_empty(), "{leaks:#?}");
    env.plugin.take().unwrap().shut_down().await;
}

/// containerd is killed, is away for a while, and comes back: tasks and starts of cached images are not affected; pulls
/// fail with a clear error, and then work again.
#[tokio::test(flavor = "multi_thread")]
async fn containerd_may_go_and_come_back() {
    let (containerd, pid) = own_containerd();
    let mut env = Env::configured(json!({"containerd": {"address": containerd}})).await;
    let task = env.sh("trap 'exit 8' TERM; echo up; while :; do sleep 0.05; done").await;
    task.says("up").await;
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    eventually("containerd is gone", async || {
        if std::os::unix::net::UnixStream::connect(&containerd).is_err() { Ok(()) } else { Err(()) }
    })
    .await;
    let other = crate::support::Image::busybox().with_config("Env", json!(["PATH=/bin", "OTHER=yes"]));
    let other = other.push(&services().registry, "test/other:1").await;
    let mut pulling = env.prepare(shell_in(&other, "echo $OTHER")).await;
    let error = env.try_start(&mut pulling).await.unwrap_err();
    assert!(error.message().contains("could not reach"), "{error:?}");
    assert!(nomad_driver_shim::host::is_recoverable(&error), "Nomad's restart policy may try again");
    let cached = env.sh("echo cached").await;
    assert_eq!(env.finish_task(cached).await.1, "cached\n");
    services::start_containerd(containerd.parent().unwrap());
    let again = env.run(shell_in(&other, "echo $OTHER")).await;
    assert_eq!(again.1, "yes\n");
    env.stop(&task, Duration::from_secs(30), "").await.unwrap();
    assert_eq!(env.finish_task(task).await.0, 8);
    let leaks = crate::support::leak::while_alive(&env).await;
    assert!(leaks.is_empty(), "{leaks:#?}");
    env.plugin.take().unwrap().shut_down().await;
}

/// Measures the time from the kernel's report of the shim's death to the answer of WaitTask.
#[tokio::test(flavor = "multi_thread")]
async fn a_shims_death_is_told_at_once_and_leaves_nothing() {
    let mut env = Env::new().await;
    let mut took = Vec::new();
    for runtime in ["crun", "runc"].repeat(5) {
        let config = json!({
            "image": env.busybox().await, "command": "/bin/sh", "runtime": runtime,
            "args": ["-c", "(setsid sleep 600) & echo ready; sleep 600"],
        });
        let task = env.start(config).await;
        task.says("ready").await;
        let (_, record) = env.record(&task).await;
        let init = u32::try_from(record["state"]["pid"].as_u64().unwrap()).unwrap();
        let family = nomad_driver_shim::process::descendants(init).unwrap();
        assert!(family.len() >= 2, "{family:?}");
        let shim = shim_pid(&env, &record);
        let pidfd = PidFd::open(shim.try_into().unwrap()).unwrap();
        let dead = tokio::spawn(async move {
            pidfd.wait_for_end().await;
            Instant::now()
        });
        let (mut driver, id) = (env.driver(), task.id.clone());
        let waiting = tokio::spawn(async move {
            let request = nomad_driver_shim::pb::driver::WaitTaskRequest { task_id: id };
            (driver.wait_task(request).await.unwrap().into_inner(), Instant::now())
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
        let (answer, answered) = tokio::time::timeout(crate::support::patience(), waiting).await.unwrap().unwrap();
        took.push(answered.saturating_duration_since(dead.await.unwrap()));
        assert!(answer.err.contains("shim died"), "{answer:?}");
        assert_eq!(answer.result.unwrap().exit_code, 137);
        // A new process may have one of these pids by now; the task's processes were in the task's cgroup.
        for pid in family {
            let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            let alive = nomad_driver_shim::process::ProcessId::of(pid).is_ok();
            assert!(!alive || !groups.contains(&task.dirs.alloc_id), "{pid} lives on");
        }
        env.destroy(&task).await.unwrap();
    }
    took.sort();
    eprintln!("shim dead → WaitTask answered: {took:?}");
    env.finish().await;
}

/// A shim died while no plugin watched it: nothing can be reported of the task, and nothing of the task is left.
#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_died_unwatched_is_not_recovered() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let (_, record) = env.record(&task).await;
    let shim = shim_pid(&env, &record);
    env.kill_plugin().await;
    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    env.start_plugin().await;
    let error = env.recover(&task).await.unwrap_err();
    assert!(error.message().contains("shim is gone"), "{error:?}");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// A shim that hangs (here: that is stopped) does not delay the others, and is ended when its task is destroyed.
#[tokio::test(flavor = "multi_thread")]
async fn a_hung_shim_holds_nobody_up() {
    let mut env = Env::new().await;
    let (hung, fine) = (env.sh("sleep 600").await, env.sh("sleep 600").await);
    let shim = shim_pid(&env, &env.record(&hung).await.1);
    env.kill_plugin().await;
    kill(Pid::from_raw(shim), Signal::SIGSTOP).unwrap();
    env.start_plugin().await;
    let began = Instant::now();
    env.recover(&fine).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let error = env.recover(&hung).await.unwrap_err();
    assert!(error.message().contains("does not answer"), "{error:?}");
    env.destroy(&hung).await.unwrap();
    env.destroy(&fine).await.unwrap();
    env.finish().await;
}

/// A shim hangs while the plugin uses it: the task is stopped all the same, and nothing is left.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_whose_shim_hangs_is_stopped_all_the_same() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let shim = shim_pid(&env, &env.record(&task).await.1);
    kill(Pid::from_raw(shim), Signal::SIGSTOP).unwrap();
    env.stop(&task, Duration::from_secs(1), "").await.unwrap();
    let answer = env.try_wait(&task.id).await.unwrap();
    assert!(answer.err.contains("shim died") && answer.result.unwrap().exit_code == 137, "{answer:?}");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// A shared shim that hangs is not killed to stop one of its tasks: its other tasks would end with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_shared_shim_that_hangs_is_not_killed_for_one_task() {
    let mut env = Env::configured(json!({"shim_scope": "node"})).await;
    let (stopped, bystander) = (env.sh("sleep 600").await, env.sh("sleep 600").await);
    let shim = Pid::from_raw(shim_pid(&env, &env.record(&stopped).await.1));
    kill(shim, Signal::SIGSTOP).unwrap();
    let stop = async {
        env.stop(&stopped, Duration::ZERO, "").await.unwrap();
    };
    let resume = async {
        eventually("the shim is spared", async || {
            let said = env.plugin().stderr();
            if said.contains("is not killed, since other tasks share it") { Ok(()) } else { Err(said) }
        })
        .await;
        kill(shim, Signal::SIGCONT).unwrap();
    };
    tokio::join!(stop, resume);
    assert_eq!(env.wait(&stopped).await.exit_code, 137);
    env.destroy(&stopped).await.unwrap();
    assert_eq!(env.exec_text(&bystander, "echo alive").await, "alive\n");
    env.destroy(&bystander).await.unwrap();
    env.finish().await;
}

/// Records that are wrong or truncated: the plugin sets each one aside or detects the error, and the other tasks go on.
#[tokio::test(flavor = "multi_thread")]
async fn records_that_lie_or_are_torn_harm_nobody() {
    let mut env = Env::configured(json!({"state": {"grace": "2s"}})).await;
    let mut tasks = Vec::new();
    for name in ["truncated", "emptied", "other-boot", "future", "reused-pid", "forgotten", "fine"] {
        let task = env.sh("sleep 600").await;
        let (path, value) = env.record(&task).await;
        tasks.push((name, task, path, value));
    }
    env.kill_plugin().await;
    let mut bystander = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    for (name, _, path, value) in &mut tasks {
        let text = fs::read(&*path).unwrap();
        match *name {
            "truncated" | "forgotten" => fs::write(path, &text[..text.len() / 2]).unwrap(),
            "emptied" => fs::write(path, "").unwrap(),
            // A record of an earlier boot: no process of its task is left.
            "other-boot" => {
                kill(Pid::from_raw(shim_pid(&env, value)), Signal::SIGKILL).unwrap();
                value["boot_id"] = json!("00000000-0000-0000-0000-000000000000");
                fs::write(path, value.to_string()).unwrap();
            }
            "future" => {
                value["version"] = json!(99);
                fs::write(path, value.to_string()).unwrap();
            }
            // The task's shim is gone, and the pid in its record belongs to another process now.
            "reused-pid" => {
                kill(Pid::from_raw(shim_pid(&env, value)), Signal::SIGKILL).unwrap();
                value["state"]["pid"] = json!(bystander.id());
                fs::write(path, value.to_string()).unwrap();
            }
            _ => {}
        }
    }
    env.start_plugin().await;
    for (name, task, path, _) in &tasks {
        match *name {
            // These tasks are found by their handles.
            "truncated" | "emptied" | "future" | "fine" => {
                env.recover(task).await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
                assert_eq!(env.exec_text(task, "echo alive").await, "alive\n", "{name}");
            }
            "forgotten" => {}
            _ => {
                let error = env.recover(task).await.unwrap_err();
                assert!(error.message().contains("can't be recovered"), "{name}: {error:?}");
            }
        }
        if matches!(*name, "truncated" | "emptied" | "future") {
            assert!(path.with_extension("bad").exists(), "{name} is set aside");
        }
    }
    let said = env.plugin().stderr();
    assert_eq!(said.matches("could not read a task record").count(), 4, "{said}");
    assert!(said.contains("it has version 99"), "{said}");
    for (name, task, ..) in &tasks {
        match *name {
            "forgotten" => {}
            // The plugin has removed this task by itself, or removes it now.
            "other-boot" => drop(env.destroy(task).await),
            _ => env.destroy(task).await.unwrap_or_else(|error| panic!("{name}: {error:?}")),
        }
    }
    assert!(bystander.try_wait().unwrap().is_none(), "a stranger was killed");
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    // No agent asks for the last task: it is removed after the grace period.
    eventually("the forgotten one is reaped", async || {
        let left = crate::support::leak::entries(&env.dir.join("run/bundles"));
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    env.finish().await;
}

const MANY: usize = 300;

/// A new plugin on a node that is full of tasks.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn three_hundred_tasks_are_recovered_at_once() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let mut tasks = Vec::new();
    for n in 0..MANY {
        let script = format!("trap 'exit {}' TERM; sleep 600 & wait", n % 100);
        let config = shell_in(&image, &script);
        tasks.push(env.prepare(config).await);
    }
    for some in tasks.chunks_mut(8) {
        futures_util::future::join_all(some.iter_mut().map(|task| env.try_start(task)))
            .await
            .into_iter()
            .for_each(Result::unwrap);
    }
    env.kill_plugin().await;
    let began = Instant::now();
    env.start_plugin().await;
    let opened = began.elapsed();
    // The tasks are handled one after the other, as Nomad does.
    for task in &tasks {
        env.recover(task).await.unwrap();
    }
    let recovered = began.elapsed();
    eprintln!("{MANY} tasks: plugin ready after {opened:?}, all recovered after {recovered:?}");
    assert!(recovered < Duration::from_secs(20), "{recovered:?}");
    for task in tasks.iter().step_by(60) {
        assert_eq!(env.exec_text(task, "echo here").await, "here\n");
    }
    for (n, task) in tasks.iter().enumerate().step_by(30) {
        env.stop(task, Duration::from_secs(30), "").await.unwrap();
        assert_eq!(env.wait(task).await.exit_code, i32::try_from(n % 100).unwrap());
    }
    for some in tasks.chunks(8) {
        futures_util::future::join_all(some.iter().map(|task| env.destroy(task)))
            .await
            .into_iter()
            .for_each(Result::unwrap);
    }
    env.finish().await;
}

/// An agent that has ended leaves its plugin running. The next agent's plugin takes that plugin's place at once, tasks
/// and idle shims included.
#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_gives_way() {
    let mut env = Env::new().await;
    let task = env.sh("trap 'exit 6' TERM; echo up; while :; do sleep 0.05; done").await;
    task.says("up").await;
    let idle = |env: &Env| {
        let record = fs::read_dir(env.dir.join("run/tasks")).unwrap().flatten().next().unwrap();
        let record = crate::support::env::read_record(&record.path());
        let shims = crate::support::leak::entries(&env.dir.join("run/shims"));
        shims.into_iter().filter(|shim| *shim != record["shim"].as_str().unwrap()).collect::<Vec<_>>()
    };
    // A shim that does not listen yet is not taken over.
    let listens = |shim: &String| {
        std::os::unix::net::UnixStream::connect(env.dir.join("run/shims").join(shim).join("sock")).is_ok()
    };
    let is_ready = |idle: &[String]| idle.len() == 1 && idle.iter().all(listens);
    eventually("an idle shim", async || if is_ready(&idle(&env)) { Ok(()) } else { Err(idle(&env)) }).await;
    // A plugin that gives way ends a shim that it has not connected to yet. Nothing outside of the plugin shows whether
    // it has connected.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let prepared = idle(&env);
    let mut orphan = env.plugin.take().unwrap().detach().unwrap();
    let began = Instant::now();
    env.start_plugin().await;
    let took = began.elapsed();
    let left = tokio::time::timeout(Duration::from_secs(2), orphan.wait()).await.expect("it stays").unwrap();
    assert!(left.success(), "{left:?}");
    eprintln!("an orphan gave way in {took:?}");
    env.recover(&task).await.unwrap();
    assert_eq!(idle(&env), prepared, "what was prepared is taken over");
    env.stop(&task, Duration::from_secs(30), "").await.unwrap();
    assert_eq!(env.finish_task(task).await.0, 6);
    env.finish().await;
}

/// No further agent connects: the plugin ends by itself, and its tasks go on.
#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_lets_go_after_a_while() {
    let mut env = Env::configured(json!({"state": {"orphan_timeout": "500ms"}})).await;
    let task = env.sh("sleep 600").await;
    let pid = env.attribute(&task, "pid").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(env.attribute(&task, "pid").await, pid, "with an agent it stays");
    let mut orphan = env.plugin.take().unwrap().detach().unwrap();
    assert!(tokio::time::timeout(Duration::from_secs(10), orphan.wait()).await.expect("it stays").unwrap().success());
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    assert_eq!(env.attribute(&task, "pid").await, pid);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// While an agent stops, its task runner may start one more instance of the plugin for 12 ms: SetConfig, Init, SIGKILL.
#[tokio::test(flavor = "multi_thread")]
async fn a_short_lived_instance_does_no_harm() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    assert!(env.plugin.take().unwrap().shut_down().await.status.is_some());
    for delay in [0, 1, 2, 5, 12, 30] {
        let launch = PluginCommand { args: vec!["--name".into(), "shim".into()], ..PluginCommand::new(program()) };
        let mut fourth = Plugin::launch(&launch).await.unwrap();
        let pid = Pid::from_raw(fourth.pid().unwrap().try_into().unwrap());
        let socket = fourth.socket().to_owned();
        let config = env.config.clone();
        let dying = tokio::spawn(async move {
            let _ = fourth.configure(&config).await;
            fourth.wait().await
        });
        tokio::time::sleep(Duration::from_millis(delay)).await;
        kill(pid, Signal::SIGKILL).unwrap();
        dying.await.unwrap().unwrap();
        // Other plugins have their sockets in the same directory, and remove the sockets of killed plugins.
        let _ = fs::remove_file(socket);
    }
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    assert_eq!(env.inspect(&task.id).await.unwrap().task.unwrap().state, TaskState::Running as i32);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// Plugins under two names on one host are two drivers, each with its own lock, places and tasks.
#[tokio::test(flavor = "multi_thread")]
async fn two_drivers_live_side_by_side() {
    let mut ours = Env::new().await;
    let mut theirs = Env::drop_in(json!({})).await;
    let (a, b) = (ours.sh("exit 4").await, theirs.sh("exit 5").await);
    assert_eq!((ours.finish_task(a).await.0, theirs.finish_task(b).await.0), (4, 5));
    ours.finish().await;
    theirs.finish().await;
}

/// A stop in the middle of a slow pull: the start gives up, and nothing of the start or the pull is left.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_during_a_slow_pull_ends_cleanly() {
    use crate::support::{
        Image,
        fake_registry::{Answer, FakeRegistry, MANIFEST},
    };
    let mut env = Env::new().await;
    let registry = FakeRegistry::start().await;
    let image = Image::busybox();
    let slow = Answer { delay: Duration::from_secs(40), ..Answer::ok(MANIFEST, image.manifest_bytes()) };
    registry.set("/v2/slow/app/manifests/1", slow);
    let task = env.prepare(json!({"image": format!("{}/slow/app:1", registry.address)})).await;
    let (mut driver, config) = (env.driver(), task.config.clone());
    let start = tokio::spawn(async move {
        let request = nomad_driver_shim::pb::driver::StartTaskRequest { task: Some(config) };
        driver.start_task(request).await.map(drop)
    });
    eventually("the pull has begun", async || if registry.requests().is_empty() { Err(()) } else { Ok(()) }).await;
    let began = Instant::now();
    env.stop(&task, Duration::from_secs(5), "").await.unwrap();
    let error = start.await.unwrap().unwrap_err();
    assert!(error.message().contains("stopped while it was being started"), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    env.destroy(&task).await.unwrap_err();
    // The same task can be started again.
    let config = json!({"image": env.busybox().await, "command": "/bin/true"});
    let mut again = env.prepare_again(task, "2", config).await;
    env.try_start(&mut again).await.unwrap();
    assert_eq!(env.wait(&again).await.exit_code, 0);
    env.destroy(&again).await.unwrap();
    env.finish().await;
}
