//! The plugin ends while a runtime is running. The shim then kills the runtime at whatever step it is, since the
//! connection of the shim's client is broken. The next plugin completes the step that was cut off.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use nomad_driver_shim::pb::driver::{DestroyTaskRequest, StartTaskRequest};
use serde_json::{Value, json};

use crate::support::{
    Env, EnvOptions, Task, eventually, patience,
    wrapped_runtime::{Detour, WrappedRuntime},
};

/// Both runtimes of the suite, or the one that `make test-matrix` names.
fn runtimes() -> Vec<String> {
    std::env::var("NOMAD_DRIVER_SHIM_TEST_RUNTIME")
        .map_or_else(|_| ["crun", "runc"].map(str::to_owned).to_vec(), |runtime| vec![runtime])
}

/// A node with this default runtime.
async fn node(runtime: &WrappedRuntime, config: Value) -> Env {
    let mut config = runtime.configure(config);
    config["state"] = json!({"grace": "1s"});
    Env::with(EnvOptions { config, ..EnvOptions::default() }).await
}

/// How a plugin ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Killed,
    Terminated,
}

/// Ends the plugin, and starts the next one.
async fn succeed(env: &mut Env, end: End, wrapper: &WrappedRuntime) {
    match end {
        End::Killed => env.kill_plugin().await,
        End::Terminated => drop(terminate(env).await),
    }
    wrapper.disarm();
    env.start_plugin().await;
}

/// Ends the plugin with SIGTERM, as systemd does. Returns how long that took.
async fn terminate(env: &mut Env) -> Duration {
    let mut plugin = env.plugin.take().unwrap();
    let began = Instant::now();
    kill(Pid::from_raw(plugin.pid().unwrap().cast_signed()), Signal::SIGTERM).unwrap();
    tokio::time::timeout(patience(), plugin.wait()).await.expect("the plugin lives on").unwrap();
    began.elapsed()
}

async fn sleeper(env: &Env) -> Value {
    json!({"image": env.busybox().await, "command": "/bin/sh", "args": ["-c", "echo up; exec sleep 600"]})
}

fn destroy(env: &Env, task: &Task) {
    let (mut driver, task_id) = (env.driver(), task.id.clone());
    // The plugin ends before it answers.
    tokio::spawn(async move { driver.destroy_task(DestroyTaskRequest { task_id, force: true }).await.map(drop) });
}

/// The next attempt of the same task starts, as Nomad's restart policy starts it, and behaves like any other attempt.
async fn next_attempt_runs(env: &Env, task: Task, what: &str) {
    let config = json!({"image": env.busybox().await, "command": "/bin/sh", "args": ["-c", "echo again"]});
    let mut next = env.prepare_again(task, "2", config).await;
    env.try_start(&mut next).await.unwrap_or_else(|status| {
        panic!("{what}: the next attempt is refused: {}\n{}", status.message(), env.plugin().stderr())
    });
    assert_eq!(env.wait(&next).await.exit_code, 0, "{what}");
    env.destroy(&next).await.unwrap();
}

/// After one plugin has succeeded another: the task `bystander` is recovered and alive, the next attempt of the task
/// `cut_off` runs, and nothing is left when both are gone.
async fn nothing_else_is_harmed(env: Env, cut_off: Task, bystander: &Task, what: &str) {
    env.recover(bystander).await.unwrap_or_else(|status| panic!("{what}: {}", status.message()));
    next_attempt_runs(&env, cut_off, what).await;
    is_alive(&env, bystander, what).await;
    env.destroy(bystander).await.unwrap();
    env.finish().await;
}

/// Starts a task by a call that runs concurrently with the test.
fn start(env: &Env, task: &Task) -> tokio::task::JoinHandle<Result<(), tonic::Status>> {
    let (mut driver, request) = (env.driver(), StartTaskRequest { task: Some(task.config.clone()) });
    tokio::spawn(async move { driver.start_task(request).await.map(drop) })
}

async fn is_alive(env: &Env, bystander: &Task, what: &str) {
    assert_eq!(env.exec_text(bystander, "echo alive").await, "alive\n", "{what}");
}

/// The states in which a killed `delete` leaves a container: all of its state is gone, or some of its files.
const DELETED: &str = "REAL \"$@\"";
const HALF_DELETED: &str = "rm -f \"$root/$id/status\" \"$root/$id/state.json\"";

async fn a_delete_that_is_cut_off(real: &str, scope: &str, instead: &str, end: End) {
    let what = format!("{real}, {scope}, {instead}, {end:?}");
    let wrapper = WrappedRuntime::new(real, &Detour { verb: "delete", first: instead, then: "exec sleep 600" });
    let mut env = node(&wrapper, json!({"shim_scope": scope})).await;
    let config = sleeper(&env).await;
    let bystander = env.start(config.clone()).await;
    bystander.says("up").await;
    // The tasks are in the same allocation, so that they share a shim in every scope in which tasks share shims.
    let dirs = env.allocs[0].create_task("side").unwrap();
    let mut task = env.prepare_in(dirs, "1", config).await;
    env.try_start(&mut task).await.unwrap();
    task.says("up").await;
    wrapper.arm();
    destroy(&env, &task);
    wrapper.called().await;
    succeed(&mut env, end, &wrapper).await;
    Box::pin(nothing_else_is_harmed(env, task, &bystander, &what)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_that_is_cut_off_is_completed() {
    for runtime in runtimes() {
        a_delete_that_is_cut_off(&runtime, "task", DELETED, End::Killed).await;
        a_delete_that_is_cut_off(&runtime, "task", HALF_DELETED, End::Killed).await;
        a_delete_that_is_cut_off(&runtime, "task", DELETED, End::Terminated).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_shim_that_tasks_share_the_others_go_on() {
    for runtime in runtimes() {
        for scope in ["alloc", "node"] {
            a_delete_that_is_cut_off(&runtime, scope, DELETED, End::Killed).await;
        }
        a_delete_that_is_cut_off(&runtime, "node", HALF_DELETED, End::Terminated).await;
    }
}

/// No plugin ends here. The runtime itself is killed, as by the OOM killer, after it has removed its state.
#[tokio::test(flavor = "multi_thread")]
async fn a_delete_whose_runtime_is_killed_is_completed() {
    for runtime in runtimes() {
        for scope in ["task", "node"] {
            let wrapper = WrappedRuntime::new(&runtime, &Detour { verb: "delete", first: DELETED, then: "kill -9 $$" });
            let mut env = node(&wrapper, json!({"shim_scope": scope})).await;
            let config = sleeper(&env).await;
            let bystander = env.start(config.clone()).await;
            let task = env.start(config).await;
            wrapper.arm();
            env.destroy(&task).await.unwrap_or_else(|status| panic!("{runtime}, {scope}: {}", status.message()));
            wrapper.disarm();
            next_attempt_runs(&env, task, &format!("{runtime}, {scope}")).await;
            is_alive(&env, &bystander, &runtime).await;
            env.destroy(&bystander).await.unwrap();
            env.finish().await;
        }
    }
}

/// A runtime that refuses to kill, as with a container whose state is damaged, keeps no container alive.
#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_refuses_to_kill_keeps_nothing_alive() {
    for runtime in runtimes() {
        for scope in ["task", "node"] {
            let what = format!("{runtime}, {scope}");
            let wrapper =
                WrappedRuntime::new(&runtime, &Detour { verb: "kill", first: "echo no state >&2", then: "exit 1" });
            let mut env = node(&wrapper, json!({"shim_scope": scope})).await;
            let config = sleeper(&env).await;
            let bystander = env.start(config.clone()).await;
            let task = env.start(config).await;
            wrapper.arm();
            // The next plugin considers the remains a task that was being destroyed, and has no watcher for it.
            destroy(&env, &task);
            wrapper.called().await;
            // The runtime refuses the kill of the next plugin, too.
            env.kill_plugin().await;
            env.start_plugin().await;
            env.recover(&bystander).await.unwrap_or_else(|status| panic!("{what}: {}", status.message()));
            next_attempt_runs(&env, task, &what).await;
            wrapper.disarm();
            is_alive(&env, &bystander, &what).await;
            env.destroy(&bystander).await.unwrap();
            env.finish().await;
        }
    }
}

/// A runtime freezes a container's cgroup to kill all of its processes, and to change its devices. A runtime that is
/// killed meanwhile leaves the cgroup frozen, and with cgroup version 1 the container's processes don't die.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_a_runtime_has_left_frozen_is_ended() {
    for (runtime, call) in runtimes().into_iter().flat_map(|runtime| [(runtime.clone(), "kill"), (runtime, "none")]) {
        let wrapper = WrappedRuntime::new(&runtime, &Detour { verb: call, first: "echo no state >&2", then: "exit 1" });
        let mut env = node(&wrapper, json!({})).await;
        let config = sleeper(&env).await;
        let task = env.start(config).await;
        let group = env.record(&task).await.1["cgroup"].as_str().unwrap().trim_start_matches('/').to_owned();
        let root = Path::new("/sys/fs/cgroup");
        let (version_1, version_2) = (root.join("freezer").join(&group), root.join(&group));
        if version_1.exists() {
            fs::write(version_1.join("freezer.state"), "FROZEN").unwrap();
        } else {
            fs::write(version_2.join("cgroup.freeze"), "1").unwrap();
        }
        wrapper.arm();
        env.destroy(&task).await.unwrap_or_else(|status| panic!("{runtime}: {}", status.message()));
        wrapper.disarm();
        next_attempt_runs(&env, task, &runtime).await;
        env.finish().await;
    }
}

/// A late clean-up of an earlier plugin may unmount the root file system of the next start. The runtime then reports an
/// error about the image, which is not the job's fault.
#[tokio::test(flavor = "multi_thread")]
async fn a_root_file_system_that_goes_away_is_not_the_jobs_fault() {
    for runtime in runtimes() {
        let unmount = "for word; do [ \"$last\" = --bundle ] && umount -l \"$word/rootfs\"; last=$word; done";
        let wrapper = WrappedRuntime::new(&runtime, &Detour { verb: "create", first: unmount, then: ":" });
        let mut env = node(&wrapper, json!({})).await;
        let config = sleeper(&env).await;
        wrapper.arm();
        let mut task = env.prepare(config).await;
        let status = env.try_start(&mut task).await.expect_err("there is no /bin/sh");
        assert!(status.message().contains("was unmounted while the container was created"), "{runtime}: {status:?}");
        assert!(nomad_driver_shim::host::is_recoverable(&status), "{runtime}: {status:?}");
        wrapper.disarm();
        next_attempt_runs(&env, task, &runtime).await;
        env.finish().await;
    }
}

/// The shim reports nothing about a container whose runtime hangs, and would not report its end either. Other tasks of
/// the same shim go on, even if the runtime hangs each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_hangs_while_it_kills_harms_no_other_task() {
    for runtime in runtimes() {
        // A child process of the shell is not killed with the shell, and keeps the shim waiting.
        let wrapper = WrappedRuntime::new(&runtime, &Detour { verb: "kill", first: ":", then: "sleep 600" });
        let mut env = node(&wrapper, json!({"shim_scope": "node"})).await;
        let config = sleeper(&env).await;
        let bystander = env.start(config.clone()).await;
        let task = env.start(config).await;
        wrapper.arm();
        env.stop(&task, Duration::ZERO, "").await.unwrap_or_else(|status| panic!("{runtime}: {}", status.message()));
        env.destroy(&task).await.unwrap_or_else(|status| panic!("{runtime}: {}", status.message()));
        wrapper.disarm();
        is_alive(&env, &bystander, &runtime).await;
        env.destroy(&bystander).await.unwrap();
        env.finish().await;
    }
}

/// A shared shim with a container that it can't delete gets no further task, and ends with the last task that it has.
#[tokio::test(flavor = "multi_thread")]
async fn a_shared_shim_that_can_not_delete_a_container_gets_no_further_task() {
    let runtime = &runtimes()[0];
    for scope in ["alloc", "node"] {
        let wrapper = WrappedRuntime::new(runtime, &Detour { verb: "delete", first: DELETED, then: "kill -9 $$" });
        let mut env = node(&wrapper, json!({"shim_scope": scope})).await;
        let config = sleeper(&env).await;
        let bystander = env.start(config.clone()).await;
        let beside = async |env: &mut Env, name: &str| {
            let dirs = env.allocs[0].create_task(name).unwrap();
            let mut task = env.prepare_in(dirs, "1", config.clone()).await;
            env.try_start(&mut task).await.unwrap();
            task
        };
        let task = beside(&mut env, "side").await;
        let shim = shim_of(&env, &bystander).await;
        assert_eq!(shim_of(&env, &task).await, shim, "{scope}");
        wrapper.arm();
        env.destroy(&task).await.unwrap_or_else(|status| panic!("{scope}: {}", status.message()));
        wrapper.disarm();
        let next = beside(&mut env, "next").await;
        assert_ne!(shim_of(&env, &next).await, shim, "{scope}: it has got another task");
        // The next plugin knows that the shim is unusable, too.
        env.kill_plugin().await;
        env.start_plugin().await;
        for task in [&bystander, &next] {
            env.recover(task).await.unwrap();
        }
        is_alive(&env, &bystander, scope).await;
        env.destroy(&bystander).await.unwrap();
        let dir = env.dir.join("run/shims").join(&shim);
        eventually("the shim ends with its last task", async || if dir.exists() { Err(scope) } else { Ok(()) }).await;
        env.destroy(&next).await.unwrap();
        env.finish().await;
    }
}

async fn shim_of(env: &Env, task: &Task) -> String {
    env.record(task).await.1["shim"].as_str().unwrap().to_owned()
}

/// A `create` that is cut off before or after the container exists.
#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_is_cut_off_leaves_nothing() {
    for runtime in runtimes() {
        for (instead, scope) in [(":", "task"), (DELETED, "task"), (DELETED, "node")] {
            let what = format!("{runtime}, {scope}, {instead}");
            let wrapper =
                WrappedRuntime::new(&runtime, &Detour { verb: "create", first: instead, then: "exec sleep 600" });
            let mut env = node(&wrapper, json!({"shim_scope": scope})).await;
            let config = sleeper(&env).await;
            let bystander = env.start(config.clone()).await;
            wrapper.arm();
            let task = env.prepare(config).await;
            drop(start(&env, &task));
            wrapper.called().await;
            succeed(&mut env, End::Terminated, &wrapper).await;
            Box::pin(nothing_else_is_harmed(env, task, &bystander, &what)).await;
        }
    }
}

/// An agent dies while its start is in progress. The next agent starts the same task, and stops this start while it
/// waits for the first one. No agent knows of the attempt that the first start completes.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_start_ends_the_attempt_that_it_waits_for() {
    for runtime in runtimes() {
        let wrapper = WrappedRuntime::new(
            &runtime,
            &Detour { verb: "create", first: ":", then: "while [ -e $dir/armed ]; do sleep 0.05; done" },
        );
        let mut env = node(&wrapper, json!({})).await;
        let config = sleeper(&env).await;
        wrapper.arm();
        let task = env.prepare(config.clone()).await;
        let of_dead_agent = start(&env, &task);
        wrapper.called().await;
        of_dead_agent.abort();
        let next = env.prepare_again(task, "2", config).await;
        let waits = start(&env, &next);
        eventually("the next start waits", async || {
            env.stop(&next, Duration::from_secs(5), "").await.unwrap();
            if waits.is_finished() { Ok(()) } else { Err("it has not been stopped yet") }
        })
        .await;
        assert!(waits.await.unwrap().unwrap_err().message().contains("was stopped"));
        wrapper.disarm();
        // No call names this attempt any more, and nothing is left of it.
        env.finish().await;
    }
}

/// An exec'd process ends with the plugin that started it, even if the runtime was cut off when the process existed
/// already.
#[tokio::test(flavor = "multi_thread")]
async fn an_exec_that_is_cut_off_leaves_no_process() {
    for runtime in runtimes() {
        let wrapper = WrappedRuntime::new(&runtime, &Detour { verb: "exec", first: DELETED, then: "exec sleep 600" });
        let mut env = node(&wrapper, json!({})).await;
        let config = sleeper(&env).await;
        let task = env.start(config).await;
        task.says("up").await;
        wrapper.arm();
        let mut driver = env.driver();
        let request = nomad_driver_shim::pb::driver::ExecTaskRequest {
            task_id: task.id.clone(),
            command: ["/bin/sleep", "4321"].map(str::to_owned).to_vec(),
            timeout: None,
        };
        tokio::spawn(async move { driver.exec_task(request).await.map(drop) });
        wrapper.called().await;
        succeed(&mut env, End::Killed, &wrapper).await;
        env.recover(&task).await.unwrap();
        eventually("the exec'd process ends", async || {
            let list = env.exec_text(&task, "ps").await;
            if list.contains("sleep 4321") { Err(list) } else { Ok(()) }
        })
        .await;
        is_alive(&env, &task, &runtime).await;
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

/// A runtime that needs some time when the plugin is told to shut down gets this time. A runtime that hangs does not
/// keep the plugin for longer than Nomad waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_is_told_to_leave_lets_runtimes_finish() {
    // A child process of the shell is not killed with the shell, and keeps the shim waiting.
    for (pause, completed) in [("sleep 0.7", true), ("exec sleep 600", false), ("sleep 600", false)] {
        let runtime = &runtimes()[0];
        let done = |dir: &Path| dir.join("done").exists();
        let finally = format!("{pause}\ntouch $dir/done");
        let wrapper = WrappedRuntime::new(runtime, &Detour { verb: "delete", first: ":", then: &finally });
        let mut env = node(&wrapper, json!({})).await;
        let config = sleeper(&env).await;
        let task = env.start(config).await;
        wrapper.arm();
        destroy(&env, &task);
        wrapper.called().await;
        let took = terminate(&mut env).await;
        assert_eq!(done(wrapper.dir()), completed, "a delete with `{pause}`, cut off after {took:?}");
        // Nomad kills a plugin after 2 s. A busy machine may need longer. A plugin that waited for its runtimes'
        // timeouts would need 10 s and more.
        assert!(took < Duration::from_secs(6), "the plugin waited for {took:?}");
        wrapper.disarm();
        env.start_plugin().await;
        next_attempt_runs(&env, task, pause).await;
        env.finish().await;
    }
}
