//! A new plugin recovers the tasks of the previous plugin.

use nomad_driver_shim::{
    cgroup::{CgroupPath, Cgroups},
    pb::driver::TaskState,
};

use crate::support::{Env, services};

#[tokio::test(flavor = "multi_thread")]
async fn a_task_lives_through_the_death_of_its_plugin() {
    let mut env = Env::new().await;
    let task = env.sh("echo first; until [ -e /alloc/data/go ]; do sleep 0.05; done; echo second; exit 6").await;
    task.says("first").await;
    let pid = env.attribute(&task, "pid").await;
    env.kill_plugin().await;
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    env.recover(&task).await.unwrap();
    assert_eq!(env.attribute(&task, "pid").await, pid);
    assert_eq!(env.inspect(&task.id).await.unwrap().task.unwrap().state, TaskState::Running as i32);
    std::fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    let (code, out, _) = env.finish_task(task).await;
    assert_eq!((code, out.as_str()), (6, "first\nsecond\n"));
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_that_was_noted_survives_the_plugin() {
    let mut env = Env::new().await;
    let task = env.sh("exit 8").await;
    assert_eq!(env.wait(&task).await.exit_code, 8);
    env.kill_plugin().await;
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    assert_eq!(env.finish_task(task).await.0, 8);
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_recovered_is_refused_with_a_reason() {
    let mut env = Env::new().await;
    let mut task = env.sh("exit 0").await;
    env.wait(&task).await;
    env.destroy(&task).await.unwrap();
    let error = env.recover(&task).await.unwrap_err();
    assert!(error.message().contains("no record"), "{error:?}");
    task.handle.as_mut().unwrap().version = 9;
    let error = env.recover(&task).await.unwrap_err();
    assert!(error.message().contains("version 9"), "{error:?}");
    task.handle.as_mut().unwrap().version = 2;
    task.handle.as_mut().unwrap().driver_state = b"nonsense".to_vec();
    let error = env.recover(&task).await.unwrap_err();
    assert!(error.message().contains("can't be decoded"), "{error:?}");
    task.handle = None;
    env.recover(&task).await.unwrap_err();
    env.finish().await;
}

/// The agent's plugin was changed from the old driver's binary to this driver's while its task ran: containerd has the
/// container.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_of_the_old_driver_is_ended_and_never_doubled() {
    let mut env = Env::new().await;
    // This run puts the task's image into containerd.
    let mut task = env.sh("exit 0").await;
    env.wait(&task).await;
    env.destroy(&task).await.unwrap();
    let image = env.busybox().await;
    let container = format!("{}-{}", task.dirs.name, task.dirs.alloc_id);
    let ctr = |arguments: &[&str]| {
        let socket = &services().containerd;
        crate::support::services::run(
            std::process::Command::new("ctr").arg("-a").arg(socket).args(["-n", &env.namespace]).args(arguments),
        )
    };
    ctr(&["run", "-d", "--null-io", &image, &container, "/bin/sleep", "600"]);
    assert!(ctr(&["tasks", "ls"]).contains("RUNNING"));
    (task.handle.as_mut().unwrap().version, task.handle.as_mut().unwrap().driver_state) = (1, Vec::new());
    let error = env.recover(&task).await.unwrap_err();
    assert!(error.message().contains(&container) && error.message().contains("was killed"), "{error:?}");
    assert!(
        !ctr(&["tasks", "ls", "-q"]).contains(&container) && !ctr(&["containers", "ls", "-q"]).contains(&container)
    );
    let error = env.recover(&task).await.unwrap_err();
    assert!(error.message().contains("its container is gone"), "{error:?}");
    // containerd gives its cgroups a parent with the name of the namespace.
    let parent = CgroupPath::new(&format!("/{}", env.namespace)).unwrap();
    Cgroups::detect().unwrap().remove(&parent).unwrap();
    env.finish().await;
}

/// containerd can't be reached when the agent comes back: the old container may still run.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_started_beside_a_container_of_the_old_driver() {
    let mut env = Env::new().await;
    let mut task = env.sh("exit 0").await;
    env.wait(&task).await;
    env.destroy(&task).await.unwrap();
    let config = serde_json::json!({"containerd": {"address": "/nonexistent/containerd.sock"}});
    let mut away = Env::configured(config).await;
    (task.handle.as_mut().unwrap().version, task.handle.as_mut().unwrap().driver_state) = (1, Vec::new());
    let error = away.recover(&task).await.unwrap_err();
    assert!(error.message().contains("may still run"), "{error:?}");
    let error = away.try_start(&mut task).await.unwrap_err();
    assert!(error.message().contains("started for this task could not be stopped"), "{error:?}");
    assert!(away.plugin.take().unwrap().shut_down().await.status.is_some_and(|status| status.success()));
    env.finish().await;
}
