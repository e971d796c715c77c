//! The run directory is full when a task's record is to be written: the record is written once there is room.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::support::{Env, env::read_record, eventually};

/// Writes to a file fail with ENOSPC, or a directory is read-only, until this is dropped.
struct Unwritable(PathBuf);

impl Unwritable {
    fn full(file: &Path) -> Self {
        mount(Some("/dev/full"), file, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        Self(file.to_owned())
    }

    fn directory(path: &Path) -> Self {
        mount(Some(path), path, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, path, None::<&str>, flags, None::<&str>).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for Unwritable {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

async fn until_it_is(path: &Path, state: &str) -> Value {
    eventually(&format!("the record says {state}"), async || {
        let record = if path.exists() { read_record(path) } else { Value::Null };
        if record["state"]["is"] == state { Ok(()) } else { Err(record["state"].clone()) }
    })
    .await;
    read_record(path)
}

/// The shim also knows the exit code, but it is dead by then: only the record still has it.
#[tokio::test(flavor = "multi_thread")]
async fn an_exit_code_outlasts_a_full_disk() {
    let mut env = Env::new().await;
    let task = env.sh("until [ -e /alloc/data/go ]; do sleep 0.05; done; exit 7").await;
    let (path, record) = env.record(&task).await;
    let full = Unwritable::full(&path);
    fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 7);
    drop(full);
    assert_eq!(until_it_is(&path, "exited").await["state"]["code"], 7);
    env.kill_plugin().await;
    let shim = env.dir.join("run/shims").join(record["shim"].as_str().unwrap()).join("pid");
    let shim: Value = serde_json::from_slice(&fs::read(shim).unwrap()).unwrap();
    kill(Pid::from_raw(shim["pid"].as_i64().unwrap().try_into().unwrap()), Signal::SIGKILL).unwrap();
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    assert_eq!(env.finish_task(task).await.0, 7);
    env.finish().await;
}

/// The next plugin completes a stop that was requested, though the stop could not be recorded at first.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_outlasts_a_full_disk() {
    let mut env = Env::new().await;
    let task = env.sh("trap '' TERM; echo ready; while :; do sleep 0.05; done").await;
    task.says("ready").await;
    let (path, _) = env.record(&task).await;
    let full = Unwritable::full(&path);
    let (mut driver, id) = (env.driver(), task.id.clone());
    let stopping = tokio::spawn(async move {
        let timeout = Some(prost_types::Duration { seconds: 5, nanos: 0 });
        let request = nomad_driver_shim::pb::driver::StopTaskRequest { task_id: id, timeout, signal: String::new() };
        driver.stop_task(request).await
    });
    eventually("the stop can't be noted", async || {
        let said = env.plugin().stderr();
        if said.contains("could not append to the task record") { Ok(()) } else { Err(said) }
    })
    .await;
    drop(full);
    until_it_is(&path, "stopping").await;
    env.kill_plugin().await;
    drop(stopping.await.unwrap());
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 137);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// A running task is recovered from its handle, though its record can't be written. Earlier, the plugin gave such a
/// task up.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_without_a_record_is_recovered_on_a_full_disk() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let (path, _) = env.record(&task).await;
    env.kill_plugin().await;
    fs::remove_file(&path).unwrap();
    env.start_plugin().await;
    let read_only = Unwritable::directory(&env.dir.join("run/tasks"));
    let recovered = env.recover(&task).await;
    drop(read_only);
    recovered.unwrap();
    until_it_is(&path, "running").await;
    assert_eq!(env.exec_text(&task, "echo alive").await, "alive\n");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// A task is destroyed although its record can't be written, and the record does not come back.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_is_destroyed_on_a_full_disk() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let (path, _) = env.record(&task).await;
    let full = Unwritable::full(&path);
    env.stop(&task, Duration::ZERO, "").await.unwrap();
    env.destroy(&task).await.unwrap();
    drop(full);
    eventually("the record is gone", async || if path.exists() { Err(()) } else { Ok(()) }).await;
    // This is longer than the first retries take.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!path.exists());
    env.finish().await;
}
