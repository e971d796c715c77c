//! docs/protocol/nomad-plugin.md#6.3, rows 1 to 13: a task from its start to its end.

use std::{
    fs,
    time::{Duration, Instant},
};

use nomad_driver_shim::pb::driver::{StartTaskRequest, TaskState, WaitTaskRequest};
use serde_json::json;

use crate::{
    row,
    row::Row,
    seen::{beat, beats, is_still, keeper, kill, processes, prompt, promptly},
    support::{
        Env, Image, Task, eventually,
        fake_registry::{Answer, FakeRegistry},
        leak, patience, services,
    },
};

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row!(exit_codes, "6.3.1", "start, wait: the exit code, and success for 0 only"),
        row!(waiting, "6.3.2", "WaitTask waits, may be cancelled, is answered to all and again afterwards"),
        row!(stop_with_a_signal, "6.3.3", "StopTask sends the given signal; the result is told; the state is EXITED"),
        row!(
            stop_of_the_deaf,
            "6.3.4",
            "StopTask of a process that ignores the signal: SIGKILL when the time is over, not before"
        ),
        row!(stop_at_once, "6.3.5", "StopTask without time kills at once"),
        row!(destroy, "6.3.6", "DestroyTask wants force for a running task, and takes all its processes and its id"),
        row!(failed_starts_leave_nothing, "6.3.7", "a start that fails is an error, and leaves nothing"),
        row!(
            predecessors_are_replaced,
            "6.3.8",
            "an attempt starts although the one before it is still there, stopped or running"
        ),
        row!(
            killed_from_outside,
            "6.3.9",
            "DestroyTask of a container that was killed by others; the task can be started again"
        ),
        row!(recovery, "6.3.10", "RecoverTask by a new plugin: running, ended meanwhile, gone"),
        row!(keeper_killed, "6.3.11", "the shim is killed: WaitTask tells of a failure"),
        row!(no_orphans, "6.3.12", "no process outlives the first one"),
        row!(
            many_at_once,
            "6.3.13",
            "several tasks and pulls at once: each image is pulled once, a start that is given up disturbs no other"
        ),
    ]
}

async fn exit_codes(env: &mut Env) {
    for code in [0, 1, 7, 255] {
        let task = env.sh(&format!("exit {code}")).await;
        let result = env.wait(&task).await;
        assert_eq!((result.exit_code, result.oom_killed), (code, false), "{result:?}");
        let status = env.inspect(&task.id).await.unwrap().task.unwrap();
        assert_eq!(status.state, i32::from(TaskState::Exited));
        assert!(status.completed_at.unwrap().seconds > 0);
        env.destroy(&task).await.unwrap();
    }
}

async fn waiting(env: &mut Env) {
    let task = env.sh("until [ -e /alloc/data/go ]; do sleep 0.05; done; exit 5").await;
    let wait = || {
        let (mut driver, task_id) = (env.driver(), task.id.clone());
        tokio::spawn(async move { driver.wait_task(WaitTaskRequest { task_id }).await })
    };
    let waiters = [wait(), wait(), wait()];
    waiters[0].abort();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!waiters[1].is_finished() && !waiters[2].is_finished(), "the task runs");
    assert_eq!(env.inspect(&task.id).await.unwrap().task.unwrap().state, i32::from(TaskState::Running));
    fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    for waiter in waiters.into_iter().skip(1) {
        let answer = tokio::time::timeout(patience(), waiter).await.unwrap().unwrap().unwrap();
        assert_eq!(answer.into_inner().result.unwrap().exit_code, 5);
    }
    assert_eq!(prompt("WaitTask after the end", env.wait(&task)).await.exit_code, 5);
}

async fn stop_with_a_signal(env: &mut Env) {
    let task = env.sh("trap 'exit 44' INT; echo ready; while :; do sleep 0.05; done").await;
    task.says("ready").await;
    prompt("StopTask", env.stop(&task, 3 * promptly(), "SIGINT")).await.unwrap();
    let result = prompt("WaitTask", env.wait(&task)).await;
    assert_eq!(result.exit_code, 44, "{result:?}");
    assert_eq!(env.inspect(&task.id).await.unwrap().task.unwrap().state, i32::from(TaskState::Exited));
    env.destroy(&task).await.unwrap();
}

async fn stop_of_the_deaf(env: &mut Env) {
    let task = env.sh("trap '' TERM INT; echo ready; while :; do sleep 0.05; done").await;
    task.says("ready").await;
    let (timeout, began) = (Duration::from_secs(2), Instant::now());
    env.stop(&task, timeout, "SIGINT").await.unwrap();
    let result = env.wait(&task).await;
    assert!(began.elapsed() >= timeout, "killed after {:?}", began.elapsed());
    assert!(result.exit_code == 137 || result.signal == 9, "{result:?}");
}

async fn stop_at_once(env: &mut Env) {
    let task = env.sh("trap '' TERM; echo ready; while :; do sleep 0.05; done").await;
    task.says("ready").await;
    prompt("StopTask", env.stop(&task, Duration::ZERO, "")).await.unwrap();
    assert_ne!(env.wait(&task).await.exit_code, 0);
}

async fn destroy(env: &mut Env) {
    let script = format!("(setsid sh -c '{}' &) ; echo ready; sleep 600", beat("child"));
    let task = env.sh(&script).await;
    beats(&task, "child").await;
    assert!(env.destroy_with(&task, false).await.is_err(), "a running task was destroyed without force");
    env.destroy(&task).await.unwrap();
    is_still(&task, "child").await;
    assert!(env.inspect(&task.id).await.is_err(), "the id is known");
    assert!(env.try_wait(&task.id).await.is_err(), "the id can be waited for");
}

async fn failed_starts_leave_nothing(env: &mut Env) {
    let image = env.busybox().await;
    for config in [
        json!({"image": image, "command": "/no/such"}),
        json!({"image": image, "command": "/etc/not-executable"}),
        json!({"image": format!("{}/no/such:1", services().registry)}),
    ] {
        let mut task = env.prepare(config.clone()).await;
        assert!(env.try_start(&mut task).await.is_err(), "{config} was started");
        assert!(env.inspect(&task.id).await.is_err(), "{config}: its id is known");
        let left = leak::of_tasks(env).await;
        assert!(left.is_empty(), "{config}: {left:#?}");
    }
}

async fn predecessors_are_replaced(env: &mut Env) {
    for stopped in [true, false] {
        let first = env.sh(&beat("first")).await;
        beats(&first, "first").await;
        if stopped {
            env.stop(&first, Duration::ZERO, "").await.unwrap();
        }
        let config = env.shell("exit 3", json!({})).await;
        let mut second = env.prepare_in(first.dirs.clone(), "2", config).await;
        env.try_start(&mut second).await.unwrap_or_else(|status| panic!("stopped {stopped}: {}", status.message()));
        assert_eq!(env.wait(&second).await.exit_code, 3);
        is_still(&first, "first").await;
        env.destroy(&second).await.unwrap();
    }
}

async fn killed_from_outside(env: &mut Env) {
    let task = env.sh("echo ready; sleep 600").await;
    task.says("ready").await;
    let shim = keeper(env, &task);
    processes(env, &task).into_iter().for_each(kill);
    kill(shim);
    assert_ne!(env.wait(&task).await.exit_code, 0);
    env.destroy(&task).await.unwrap();
    let config = env.shell("exit 4", json!({})).await;
    let mut again = env.prepare_in(task.dirs.clone(), "2", config).await;
    env.try_start(&mut again).await.unwrap();
    assert_eq!(env.wait(&again).await.exit_code, 4);
}

async fn recovery(env: &mut Env) {
    let runs = env.sh("trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done").await;
    let ends = env.sh("until [ -e /alloc/data/go ]; do sleep 0.05; done; echo over > /alloc/data/over; exit 6").await;
    let mut gone = env.sh("exit 0").await;
    env.wait(&gone).await;
    env.destroy(&gone).await.unwrap();
    runs.says("ready").await;
    env.kill_plugin().await;
    fs::write(ends.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    let over = ends.dirs.alloc_dir.join("alloc/data/over");
    eventually("the task ends", async || if over.exists() { Ok(()) } else { Err(()) }).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    env.start_plugin().await;
    env.recover(&runs).await.unwrap();
    assert_eq!(env.inspect(&runs.id).await.unwrap().task.unwrap().state, i32::from(TaskState::Running));
    env.recover(&ends).await.unwrap();
    assert_eq!(env.wait(&ends).await.exit_code, 6);
    gone.handle.as_mut().unwrap().state = TaskState::Running.into();
    assert!(env.recover(&gone).await.is_err(), "what is gone was recovered");
    prompt("StopTask", env.stop(&runs, 3 * promptly(), "")).await.unwrap();
    assert_eq!(env.wait(&runs).await.exit_code, 9);
}

async fn keeper_killed(env: &mut Env) {
    let task = env.sh("echo ready; sleep 600").await;
    task.says("ready").await;
    kill(keeper(env, &task));
    let answer = env.try_wait(&task.id).await.unwrap();
    let failed = answer.result.as_ref().is_none_or(|result| result.exit_code != 0) || !answer.err.is_empty();
    assert!(failed, "{answer:?}");
}

async fn no_orphans(env: &mut Env) {
    let script =
        format!("(setsid sh -c '{}' &); until [ -e /alloc/data/child ]; do sleep 0.02; done; exit 2", beat("child"));
    let task = env.sh(&script).await;
    assert_eq!(env.wait(&task).await.exit_code, 2);
    is_still(&task, "child").await;
}

async fn many_at_once(env: &mut Env) {
    let mut tasks: Vec<Task> = Vec::new();
    for n in 0..3 {
        let image = Image::busybox().with_file("etc/n", &n.to_string());
        let image = image.push(&services().registry, &format!("test/many:{n}")).await;
        tasks.push(env.prepare(json!({"image": image, "command": "/bin/cat", "args": ["/etc/n"]})).await);
    }
    let started = futures_util::future::join_all(tasks.iter_mut().map(|task| env.try_start(task))).await;
    started.into_iter().for_each(Result::unwrap);
    for (n, task) in tasks.into_iter().enumerate() {
        let (code, out, _) = env.finish_task(task).await;
        assert_eq!((code, out), (0, n.to_string()));
    }

    // Four starts need the same image, which downloads slowly, and one of the four is cancelled.
    let registry = FakeRegistry::start().await;
    let text = nomad_driver_shim::ids::random_hex(8);
    let image = registry.serve(&Image::busybox().with_file("etc/slow", &text), |kind, answer| {
        let delay = if kind == "layer" { Duration::from_secs(1) } else { Duration::ZERO };
        Answer { delay, ..answer }
    });
    let mut tasks: Vec<Task> = Vec::new();
    for _ in 0..4 {
        tasks.push(env.prepare(json!({"image": image, "command": "/bin/cat", "args": ["/etc/slow"]})).await);
    }
    let given_up = tasks.remove(0);
    let start = {
        let (mut driver, task) = (env.driver(), given_up.config.clone());
        env.asked.lock().unwrap().push(task.id.clone());
        tokio::spawn(async move { driver.start_task(StartTaskRequest { task: Some(task) }).await })
    };
    eventually("the pull has begun", async || if registry.requests().is_empty() { Err(()) } else { Ok(()) }).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    start.abort();
    let started = futures_util::future::join_all(tasks.iter_mut().map(|task| env.try_start(task))).await;
    started.into_iter().for_each(Result::unwrap);
    for task in tasks {
        assert_eq!(env.finish_task(task).await.1, text);
    }
    let mut blobs: Vec<String> = registry.requests().into_iter().filter(|path| path.contains("/blobs/")).collect();
    let all = blobs.len();
    blobs.sort();
    blobs.dedup();
    assert_eq!(all, blobs.len(), "a blob was asked for twice");
    // The cancelled start may have been completed all the same. In that case its task is destroyed with the row.
    eventually("the one that was given up is decided", async || {
        let _ = env.destroy(&given_up).await;
        let left = processes(env, &given_up);
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
}
