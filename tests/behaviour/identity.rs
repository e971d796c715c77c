//! Ids and names that no task can have: every call refuses them and names the field.

use std::time::Duration;

use nomad_driver_shim::pb::driver::{
    DestroyTaskRequest, ExecTaskRequest, ExecTaskStreamingRequest, InspectTaskRequest, RecoverTaskRequest,
    SignalTaskRequest, StartTaskRequest, StopTaskRequest, TaskConfig, TaskHandle, TaskStatsRequest, WaitTaskRequest,
    exec_task_streaming_request::Setup,
};
use serde_json::json;
use tonic::{Code, Status};

use crate::support::Env;

fn refused(what: &str, field: &str, outcome: Result<(), Status>) {
    let Err(status) = outcome else { panic!("{what} succeeds without a usable {field}") };
    assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
    assert!(status.message().contains(field), "{what}: {status:?}");
}

/// Formerly, a start with an empty id was reported as started already, and StopTask succeeded for an empty id.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_id_is_refused_by_every_call() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    for id in ["", "a\0b"] {
        let mut driver = env.driver();
        let id = || id.to_owned();
        let config = TaskConfig { id: id(), ..task.config.clone() };
        let start = StartTaskRequest { task: Some(config.clone()) };
        refused("StartTask", "task.id", driver.start_task(start).await.map(drop));
        refused("WaitTask", "task_id", driver.wait_task(WaitTaskRequest { task_id: id() }).await.map(drop));
        let stop = StopTaskRequest { task_id: id(), timeout: None, signal: String::new() };
        refused("StopTask", "task_id", driver.stop_task(stop).await.map(drop));
        let destroy = DestroyTaskRequest { task_id: id(), force: true };
        refused("DestroyTask", "task_id", driver.destroy_task(destroy).await.map(drop));
        refused("InspectTask", "task_id", driver.inspect_task(InspectTaskRequest { task_id: id() }).await.map(drop));
        let signal = SignalTaskRequest { task_id: id(), signal: "SIGHUP".to_owned() };
        refused("SignalTask", "task_id", driver.signal_task(signal).await.map(drop));
        let exec = ExecTaskRequest { task_id: id(), command: vec!["true".to_owned()], timeout: None };
        refused("ExecTask", "task_id", driver.exec_task(exec).await.map(drop));
        let setup = Setup { task_id: id(), command: vec!["true".to_owned()], tty: false };
        let first = ExecTaskStreamingRequest { setup: Some(setup), ..Default::default() };
        let streamed = driver.exec_task_streaming(futures_util::stream::iter([first])).await;
        refused("ExecTaskStreaming", "setup.task_id", streamed.map(drop));
        let stats = TaskStatsRequest { task_id: id(), collection_interval: None };
        refused("TaskStats", "task_id", driver.task_stats(stats).await.map(drop));
        let handle = task.handle.clone().map(|handle| TaskHandle { config: Some(config.clone()), ..handle });
        let recover = RecoverTaskRequest { task_id: String::new(), handle };
        refused("RecoverTask", "handle.config.id", driver.recover_task(recover).await.map(drop));
    }
    // The running task was not disturbed.
    assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n");
    env.stop(&task, Duration::ZERO, "").await.unwrap();
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_can_not_be_directories_are_refused() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let fine = env.prepare(json!({"image": image, "command": "/bin/true"})).await;
    let config = || fine.config.clone();
    for (field, config) in [
        ("task.name is empty", TaskConfig { name: String::new(), ..config() }),
        ("task.alloc_id is empty", TaskConfig { alloc_id: String::new(), ..config() }),
        ("task.alloc_dir = \"\"", TaskConfig { alloc_dir: String::new(), ..config() }),
        ("task.name = \"../web\"", TaskConfig { name: "../web".to_owned(), ..config() }),
    ] {
        let outcome = env.driver().start_task(StartTaskRequest { task: Some(config) }).await;
        refused("StartTask", field, outcome.map(drop));
    }
    // These handles lead to no task. Some are in this driver's format, some in that of nomad-driver-containerd.
    let recover = async |handle| {
        let request = RecoverTaskRequest { task_id: String::new(), handle };
        env.driver().recover_task(request).await.map(drop)
    };
    refused("RecoverTask", "handle", recover(None).await);
    refused("RecoverTask", "handle.config.id", recover(Some(TaskHandle { version: 2, ..Default::default() })).await);
    for (field, config) in [
        ("handle.config.alloc_id", TaskConfig { alloc_id: String::new(), ..config() }),
        ("handle.config.name", TaskConfig { name: String::new(), ..config() }),
    ] {
        let handle = TaskHandle { version: 1, config: Some(config), ..Default::default() };
        refused("RecoverTask", field, recover(Some(handle)).await);
    }
    env.finish().await;
}
