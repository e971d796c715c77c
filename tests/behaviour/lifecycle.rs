//! A task from StartTask to DestroyTask, as Nomad sees it.

use std::{fs, time::Duration};

use nomad_driver_shim::pb::driver::TaskState;
use serde_json::{Value, json};
use tonic::Code;

use crate::{
    support::{Env, eventually, patience, services, shell_in},
    trials,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_task_runs_and_its_exit_code_and_output_come_back() {
    let mut env = Env::new().await;
    let (code, out, err) = {
        let task = env.sh("echo out; echo err >&2; exit 7").await;
        let handle = task.handle.clone().unwrap();
        assert_eq!((handle.version, handle.state), (2, TaskState::Running as i32));
        assert_eq!(handle.config.unwrap(), task.config, "a handle without its config is not recovered by Nomad");
        env.finish_task(task).await
    };
    assert_eq!((code, out.as_str(), err.as_str()), (7, "out\n", "err\n"));
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn inspect_always_sends_every_part() {
    let mut env = Env::new().await;
    let task = env.sh("read line < /dev/zero; sleep 60").await;
    let running = env.inspect(&task.id).await.unwrap();
    let status = running.task.unwrap();
    assert_eq!(status.state, TaskState::Running as i32);
    assert!(status.started_at.is_some() && status.result.is_some());
    assert_eq!(status.completed_at.unwrap().seconds, -62_135_596_800, "Go's zero time");
    env.stop(&task, Duration::ZERO, "").await.unwrap();
    let status = env.inspect(&task.id).await.unwrap().task.unwrap();
    assert_eq!((status.state, status.result.unwrap().exit_code), (TaskState::Exited as i32, 137));
    assert!(status.completed_at.unwrap().seconds > 0);
    env.destroy(&task).await.unwrap();
    assert_eq!(env.inspect(&task.id).await.unwrap_err().code(), Code::NotFound);
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_waiter_gets_the_result_and_a_cancelled_one_disturbs_nobody() {
    let mut env = Env::new().await;
    let task = env.sh("until [ -e /alloc/data/go ]; do sleep 0.05; done; exit 5").await;
    let waiters: Vec<_> = (0..20)
        .map(|_| {
            let (mut driver, task_id) = (env.driver(), task.id.clone());
            tokio::spawn(async move {
                let request = nomad_driver_shim::pb::driver::WaitTaskRequest { task_id };
                driver.wait_task(request).await.unwrap().into_inner().result.unwrap().exit_code
            })
        })
        .collect();
    waiters[0].abort();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(waiters[1..].iter().all(|waiter| !waiter.is_finished()));
    fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    for waiter in waiters.into_iter().skip(1) {
        assert_eq!(tokio::time::timeout(patience(), waiter).await.unwrap().unwrap(), 5);
    }
    assert_eq!(env.wait(&task).await.exit_code, 5, "after the exit, too");
    env.destroy(&task).await.unwrap();
    assert_eq!(env.try_wait(&task.id).await.unwrap_err().message(), "task not found for given id");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_is_started_once() {
    let mut env = Env::new().await;
    let mut task = env.sh("sleep 60").await;
    let error = env.try_start(&mut task).await.unwrap_err();
    assert!(error.message().contains("already started"), "{error:?}");
    assert_eq!(env.inspect(&task.id).await.unwrap().task.unwrap().state, TaskState::Running as i32);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn destroy_wants_force_for_a_running_task_and_takes_all_of_it() {
    let mut env = Env::new().await;
    let task = env.sh("setsid sh -c 'sleep 600 & sleep 601 & wait' & echo ready; sleep 602").await;
    task.says("ready").await;
    let error = env.destroy_with(&task, false).await.unwrap_err();
    assert!(error.message().contains("still running"), "{error:?}");
    env.destroy(&task).await.unwrap();
    assert_eq!(env.destroy(&task).await.unwrap_err().code(), Code::NotFound);
    // The leak checker looks into the task's cgroup and at every process.
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn destroy_answers_those_who_still_wait() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let (mut driver, task_id) = (env.driver(), task.id.clone());
    let waiter =
        tokio::spawn(async move { driver.wait_task(nomad_driver_shim::pb::driver::WaitTaskRequest { task_id }).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    env.destroy(&task).await.unwrap();
    let answer = tokio::time::timeout(patience(), waiter).await.unwrap().unwrap().unwrap().into_inner();
    assert_eq!(answer.result.unwrap().exit_code, 137);
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_reach_the_first_process() {
    let mut env = Env::new().await;
    let task = env.sh("trap 'echo hup' HUP; trap 'echo usr1' USR1; echo ready; while :; do sleep 0.05; done").await;
    task.says("ready").await;
    env.signal(&task, "SIGHUP").await.unwrap();
    task.says("hup").await;
    env.signal(&task, "usr1").await.unwrap();
    task.says("usr1").await;
    let error = env.signal(&task, "INVALID").await.unwrap_err();
    assert!(error.message().to_lowercase().contains("invalid signal"), "{error:?}");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oom_kill_is_told() {
    let mut env = Env::new().await;
    let config = env.shell("dd if=/dev/zero of=/dev/shm/x bs=1M count=60; echo survived", json!({})).await;
    let mut task = env.prepare(config).await;
    let memory = task.config.resources.as_mut().unwrap().allocated_resources.as_mut().unwrap().memory.as_mut().unwrap();
    memory.memory_mb = 20;
    env.try_start(&mut task).await.unwrap();
    let result = env.wait(&task).await;
    assert!(result.oom_killed, "{result:?}");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_shim_is_seen_and_its_task_ended() {
    let mut env = Env::new().await;
    let task = env.sh("echo ready; sleep 600").await;
    task.says("ready").await;
    let (_, record) = env.record(&task).await;
    let directory = env.dir.join("run/shims").join(record["shim"].as_str().unwrap());
    let shim = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .find(|process| fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == directory));
    let pid: i32 = shim.unwrap().file_name().to_str().unwrap().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    let answer = env.try_wait(&task.id).await.unwrap();
    assert!(answer.err.contains("shim died"), "{answer:?}");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_and_fingerprint_are_streams_that_stay() {
    use nomad_driver_shim::pb::driver::{FingerprintRequest, TaskEventsRequest, fingerprint_response::HealthState};
    let mut env = Env::new().await;
    let mut events = env.driver().task_events(TaskEventsRequest {}).await.unwrap().into_inner();
    let mut fingerprints = env.driver().fingerprint(FingerprintRequest {}).await.unwrap().into_inner();
    let first = tokio::time::timeout(patience(), fingerprints.message()).await.unwrap().unwrap().unwrap();
    assert_eq!((first.health, first.health_description.as_str()), (HealthState::Healthy as i32, "Healthy"));
    assert!(first.attributes.contains_key("driver.shim.version"), "{first:?}");
    let task = env.sh("exit 0").await;
    let event = tokio::time::timeout(patience(), events.message()).await.unwrap().unwrap().unwrap();
    assert_eq!(
        (event.message.as_str(), event.alloc_id.as_str(), event.task_name.as_str()),
        ("Downloading image", task.dirs.alloc_id.as_str(), "web")
    );
    assert_eq!(event.annotations["image"], env.busybox().await);
    env.finish_task(task).await;
    let ended = tokio::time::timeout(Duration::from_millis(200), fingerprints.message()).await;
    assert!(ended.is_err(), "the stream must not end: {ended:?}");
    env.finish().await;
}

mod a_fingerprint_tells_what_is_wrong {
    use nomad_driver_shim::pb::driver::{FingerprintRequest, fingerprint_response::HealthState};

    use super::*;

    async fn check(config: Value, health: HealthState, words: &str) {
        let env = Env::configured(config).await;
        let mut fingerprints = env.driver().fingerprint(FingerprintRequest {}).await.unwrap().into_inner();
        let first = tokio::time::timeout(patience(), fingerprints.message()).await.unwrap().unwrap().unwrap();
        assert_eq!(first.health, health as i32, "{first:?}");
        assert!(first.health_description.contains(words), "{first:?}");
        env.finish().await;
    }

    trials! { check:
        disabled => json!({"enabled": false}), HealthState::Undetected, "disabled";
        no_containerd => json!({"containerd": {"address": "/no/such.sock"}}), HealthState::Unhealthy, "/no/such.sock";
        no_shim => json!({"shim": {"binary": "/no/such-shim"}}), HealthState::Undetected, "/no/such-shim";
        no_runtime =>
            json!({"runtime": {"x": {"binary": "/no/such-runtime"}}, "default_runtime": "x"}),
            HealthState::Undetected,
            "/no/such-runtime";
    }
}

/// The rule of the start path: a task with a cached image starts although containerd can't be reached.
#[tokio::test(flavor = "multi_thread")]
async fn a_cached_image_starts_without_containerd() {
    let mut env = Env::new().await;
    assert_eq!(env.run(json!({"image": env.busybox().await, "command": "/bin/true"})).await.0, 0);
    assert!(env.plugin.take().unwrap().shut_down().await.status.is_some());
    env.config["containerd"]["address"] = json!("/no/such.sock");
    env.start_plugin().await;
    let image = env.busybox().await;
    assert_eq!(env.run(shell_in(&image, "exit 4")).await.0, 4);
    assert!(services().containerd.exists());
    env.finish().await;
}

/// Nomad's agent dies in the middle of a StartTask: the call is dropped, the start is completed all the same, and the
/// next agent can destroy the task.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_call_is_finished() {
    use crate::support::{
        Image,
        fake_registry::{Answer, FakeRegistry},
    };
    let mut env = Env::new().await;
    let registry = FakeRegistry::start().await;
    let slow = registry.serve(&Image::busybox(), |_, answer| Answer { delay: Duration::from_millis(400), ..answer });
    let config = shell_in(&slow, "sleep 600");
    let mut task = env.prepare(config).await;
    let pulling = async {
        while registry.requests().is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::select! {
        () = pulling => {}
        outcome = env.try_start(&mut task) => panic!("{outcome:?} before the image was asked for"),
    }
    eventually("the task runs", async || env.inspect(&task.id).await.map(drop)).await;
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// The agent died during a StartTask (during a long pull, for example). The next agent asks for the same task under a
/// new id while the first call is still in progress. In the end there is one container, that of the new call.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_waits_for_the_one_that_a_dead_agent_left_behind() {
    use crate::support::{
        Entry, Image, Layer, Packing,
        fake_registry::{Answer, FakeRegistry},
    };
    let mut env = Env::new().await;
    let registry = FakeRegistry::start().await;
    let noise = nomad_driver_shim::ids::random_hex(8);
    let image = Image::busybox().with_layer(Layer::new(&[Entry::file("noise", noise)], Packing::Gzip));
    let slow = registry.serve(&image, |_, answer| Answer { delay: Duration::from_millis(400), ..answer });
    let config = shell_in(&slow, "sleep 600");
    let mut first = env.prepare(config.clone()).await;
    let dropped = tokio::time::timeout(Duration::from_millis(100), env.try_start(&mut first)).await;
    assert!(dropped.is_err());
    let mut second = env.prepare_in(first.dirs.clone(), "2", config).await;
    env.try_start(&mut second).await.unwrap();
    assert_eq!(env.inspect(&first.id).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(env.inspect(&second.id).await.unwrap().task.unwrap().state, TaskState::Running as i32);
    assert_eq!(crate::support::leak::entries(&env.dir.join("run/tasks")).len(), 1);
    env.destroy(&second).await.unwrap();
    env.finish().await;
}
