//! The plugin is killed with SIGKILL at named points of start, stop and destroy. The next plugin, and the calls that
//! Nomad makes then, lead to exactly one container or to none, as Nomad's view demands, and nothing else is left.

use std::time::Duration;

use nomad_driver_shim::pb::driver::{StartTaskRequest, StopTaskRequest};
use serde_json::json;

use crate::{
    support::{Env, EnvOptions, Task, eventually, leak},
    trials,
};

const SWITCH: &str = "NOMAD_DRIVER_SHIM_KILL_AT";

/// Makes a trial of each point of a start.
macro_rules! trials_of_starts {
    ($check:ident) => {
        trials! { $check:
            image => "start.image";
            shim => "start.shim";
            intent => "start.intent";
            mounted => "start.mounted";
            bundle => "start.bundle";
            creating => "start.creating";
            released => "start.released";
            created => "start.created";
            started => "start.started";
            recorded => "start.recorded";
            answer => "start.answer";
        }
    };
}

/// Makes a trial of each point of a stop after the stop is on disk.
macro_rules! trials_of_stops {
    ($check:ident) => {
        trials! { $check:
            marked => "stop.marked";
            signalled => "stop.signalled";
            killed => "stop.killed";
            exit_seen => "exit.seen";
            exit_recorded => "exit.recorded";
        }
    };
}

/// A plugin that is killed at `point`. The grace period is short, so that the next plugin collects garbage soon.
async fn doomed(point: &str) -> Env {
    EnvOptions::default().config(json!({"state": {"grace": "1s"}})).var(SWITCH, point).start().await
}

/// The plugin was killed by its failpoint. The next plugin is started without a failpoint.
async fn next(env: &mut Env, point: &str) {
    let (said, signal) = env.plugin_died().await;
    assert_eq!(signal, Some(libc::SIGKILL), "{point}: the switch must fire; {said}");
    assert!(said.contains(&format!("killed at {point} by a failpoint")), "{said}");
    env.set_var(SWITCH, None);
    env.start_plugin().await;
}

/// The number of containers according to records, runtimes and mounts.
fn containers(env: &Env) -> [usize; 3] {
    let records = leak::entries(&env.dir.join("run/tasks")).len();
    let states = leak::entries(&env.dir.join("run/runtimes"))
        .into_iter()
        .map(|runtime| leak::entries(&env.dir.join("run/runtimes").join(runtime).join(&env.namespace)).len());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let roots = mounts.lines().filter(|line| line.contains(env.dir.to_str().unwrap()) && line.contains("/rootfs "));
    [records, states.sum(), roots.count()]
}

/// The configuration of a task that prints `up`, and ends with exit code 5 as soon as the file `go` exists.
async fn waiting(env: &Env) -> serde_json::Value {
    let script = "echo up; until [ -e /alloc/data/go ]; do sleep 0.02; done; exit 5";
    env.shell(script, json!({})).await
}

async fn waiting_task(env: &mut Env) -> Task {
    let config = waiting(env).await;
    env.prepare(config).await
}

/// A start whose plugin was killed at `point`. The next plugin runs.
async fn cut_off(point: &str) -> (Env, Task) {
    let mut env = doomed(point).await;
    let mut task = waiting_task(&mut env).await;
    env.try_start(&mut task).await.expect_err(point);
    next(&mut env, point).await;
    (env, task)
}

async fn is_the_only_one(env: &Env, task: Task, point: &str) {
    eventually(&format!("{point}: one container"), async || {
        let seen = containers(env);
        if seen == [1, 1, 1] { Ok(()) } else { Err(seen) }
    })
    .await;
    task.says("up").await;
    std::fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 5, "{point}");
    env.destroy(&task).await.unwrap();
}

/// The agent lives, and repeats the same start: same id, same configuration.
mod a_start_that_was_cut_off_is_asked_for_again {
    use super::*;

    async fn check(point: &str) {
        let (env, mut task) = cut_off(point).await;
        env.try_start(&mut task).await.unwrap_or_else(|error| panic!("{point}: {error:?}"));
        is_the_only_one(&env, task, point).await;
        env.finish().await;
    }

    trials_of_starts!(check);
}

/// The agent died, too. The next agent knows nothing of that start, and starts the same task under a new id.
mod a_start_that_nobody_remembers_is_replaced {
    use super::*;

    async fn check(point: &str) {
        let (env, task) = cut_off(point).await;
        let mut again = env.prepare_again(task, "2", waiting(&env).await).await;
        env.try_start(&mut again).await.unwrap_or_else(|error| panic!("{point}: {error:?}"));
        is_the_only_one(&env, again, point).await;
        env.finish().await;
    }

    trials_of_starts!(check);
}

/// A start that failed, and whose rollback was cut off.
mod a_failed_start_is_undone_to_its_end {
    use super::*;

    async fn check(point: &str) {
        let mut env = doomed(point).await;
        let mut task = env.prepare(json!({"image": env.busybox().await, "command": "/no/such"})).await;
        env.try_start(&mut task).await.expect_err(point);
        next(&mut env, point).await;
        env.finish().await;
    }

    trials! { check:
        container => "undo.container";
        unmount => "undo.unmount";
        upper => "undo.upper";
    }
}

/// A stop that is cut off at `point`. The task ends by SIGTERM if `point` is reached in this way, and otherwise only by
/// SIGKILL.
async fn stopped_at(point: &str) -> (Env, Task) {
    let mut env = doomed(point).await;
    let script = match point {
        "stop.killed" => "trap '' TERM; echo up; while :; do sleep 0.02; done",
        _ => "trap 'exit 9' TERM; echo up; while :; do sleep 0.02; done",
    };
    let task = env.sh(script).await;
    task.says("up").await;
    let timeout = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let request = StopTaskRequest { task_id: task.id.clone(), timeout, signal: String::new() };
    env.driver().stop_task(request).await.expect_err(point);
    next(&mut env, point).await;
    (env, task)
}

/// Nomad reports the task as killed and never repeats the stop (the agent itself stopped in the middle of the stop).
mod a_stop_that_was_cut_off_is_completed_though_nobody_asks {
    use super::*;

    async fn check(point: &str) {
        let (env, _task) = stopped_at(point).await;
        eventually(&format!("{point}: none is left"), async || {
            let seen = containers(&env);
            if seen == [0, 0, 0] { Ok(()) } else { Err((seen, env.plugin().stderr())) }
        })
        .await;
        env.finish().await;
    }

    trials_of_stops!(check);
}

/// The agent lives: it recovers the task, and repeats the stop.
mod a_stop_that_was_cut_off_is_asked_for_again {
    use super::*;

    async fn check(point: &str) {
        let (env, task) = stopped_at(point).await;
        env.recover(&task).await.unwrap_or_else(|error| panic!("{point}: {error:?}"));
        env.stop(&task, Duration::from_secs(1), "").await.unwrap();
        let code = env.wait(&task).await.exit_code;
        assert!(code == 9 || (code == 137 && matches!(point, "stop.killed" | "stop.marked")), "{point}: {code}");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }

    trials_of_stops!(check);
    trials! { check: begun => "stop.begun"; }
}

/// Nomad never repeats a DestroyTask.
mod a_destroy_that_was_cut_off_is_completed {
    use super::*;

    async fn check(point: &str) {
        let mut env = doomed(point).await;
        let task = env.sh("sleep 600").await;
        // The steps after the removal of the container and its shim run in the background: the answer may have been
        // sent by then.
        let answer = env.destroy(&task).await;
        let before = ["destroy.marked", "destroy.killed", "undo.container", "undo.shim"].contains(&point);
        assert!(answer.is_err() || !before, "{point}");
        next(&mut env, point).await;
        env.finish().await;
    }

    trials! { check:
        marked => "destroy.marked";
        killed => "destroy.killed";
        container => "undo.container";
        shim => "undo.shim";
        unmount => "undo.unmount";
        bundle => "undo.bundle";
        upper => "undo.upper";
        cgroup => "undo.cgroup";
        record => "undo.record";
    }
}

/// The files of a bundle are removed one by one.
mod a_bundle_half_removed_is_removed {
    use super::*;

    async fn check(file: &str) {
        let mut env = doomed("undo.unmount").await;
        let task = env.sh("sleep 600").await;
        env.destroy(&task).await.ok();
        env.plugin_died().await;
        let bundles = env.dir.join("run/bundles");
        std::fs::remove_file(bundles.join(&leak::entries(&bundles)[0]).join(file)).unwrap();
        env.set_var(SWITCH, None);
        env.start_plugin().await;
        env.finish().await;
    }

    trials! { check:
        runtime => "runtime";
        options => "options.json";
        config => "config.json";
    }
}

/// The agent dies in the middle of its StartTask call, and the plugin dies with it. The start is not even half done
/// when the plugin of a new agent starts.
mod a_call_of_a_dying_agent_leaves_nothing_half_made {
    use super::*;

    async fn check(delay: Duration) {
        let mut env = Env::new().await;
        // The image is in the store already, so that the start itself is cut off.
        assert_eq!(env.run(json!({"image": env.busybox().await, "command": "/bin/true"})).await.0, 0);
        let mut task = waiting_task(&mut env).await;
        let (mut driver, config) = (env.driver(), task.config.clone());
        let call = tokio::spawn(async move { driver.start_task(StartTaskRequest { task: Some(config) }).await });
        tokio::time::sleep(delay).await;
        call.abort();
        env.kill_plugin().await;
        env.start_plugin().await;
        env.try_start(&mut task).await.unwrap();
        is_the_only_one(&env, task, "a dropped call").await;
        env.finish().await;
    }

    trials! { check:
        after_1_ms => Duration::from_millis(1);
        after_4_ms => Duration::from_millis(4);
        after_8_ms => Duration::from_millis(8);
        after_12_ms => Duration::from_millis(12);
        after_16_ms => Duration::from_millis(16);
        after_20_ms => Duration::from_millis(20);
        after_30_ms => Duration::from_millis(30);
    }
}
