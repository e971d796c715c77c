//! Which component starts a task's process: the plugin, as soon as the runtime has made the container, or the shim's
//! `Start` if the runtime uses another way.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nomad_driver_shim::process::which;
use serde_json::{Value, json};

use crate::support::{Env, Task};

/// Returns an environment with a runtime `odd`: the program `name` with the text `script`, in which REAL stands for
/// crun.
async fn with_odd(name: &str, script: &str) -> Env {
    let dir = tempfile::Builder::new().prefix("odd-").tempdir_in("/var/tmp").unwrap().keep();
    let path = dir.join(name);
    let crun = which(Path::new("crun")).unwrap();
    crate::support::script(&path, &script.replace("REAL", &crun.to_string_lossy()));
    let config = json!({"runtime": {"odd": {"binary": path}}});
    Env::configured(config).await
}

async fn finish(env: Env) {
    let binary = PathBuf::from(env.config["runtime"]["odd"]["binary"].as_str().unwrap());
    env.finish().await;
    fs::remove_dir_all(binary.parent().unwrap()).unwrap();
}

/// Prepares a task that creates a file when it runs.
async fn prepare(env: &mut Env, runtime: &str) -> Task {
    let image = env.busybox().await;
    let args = json!(["-c", "touch /local/up; exec sleep 600"]);
    env.prepare(json!({"image": image, "command": "/bin/sh", "args": args, "runtime": runtime})).await
}

fn up(task: &Task) -> Option<SystemTime> {
    fs::metadata(task.dirs.alloc_dir.join(&task.dirs.name).join("local/up")).and_then(|file| file.modified()).ok()
}

async fn phases(env: &Env, task: &Task) -> Vec<String> {
    let attributes = env.inspect(&task.id).await.unwrap().driver.unwrap().attributes;
    ["phase.released_ms", "phase.start_ms"]
        .into_iter()
        .filter(|name| attributes.contains_key(*name))
        .map(str::to_owned)
        .collect()
}

/// The task does not wait for what a slow runtime or shim does after that; only the answer of StartTask does.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_runs_as_soon_as_its_container_is_made() {
    let mut env =
        with_odd("crun-odd", "REAL \"$@\"; code=$?\ncase \" $* \" in *\" create \"*) sleep 1;; esac\nexit $code").await;
    let mut task = prepare(&mut env, "odd").await;
    env.try_start(&mut task).await.unwrap();
    let answered = SystemTime::now();
    let early = answered.duration_since(up(&task).expect("it runs")).unwrap();
    assert!(early > Duration::from_millis(500), "{early:?}");
    assert_eq!(phases(&env, &task).await, ["phase.released_ms"]);
    // The shim knows this task as any other.
    assert_eq!(env.exec_text(&task, "echo in").await, "in\n");
    env.stop(&task, Duration::from_secs(5), "SIGKILL").await.unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 137);
    env.destroy(&task).await.unwrap();
    // A task that ends before its shim knows it.
    let image = env.busybox().await;
    let config: Value =
        json!({"image": image, "command": "/bin/sh", "args": ["-c", "echo out; exit 7"], "runtime": "odd"});
    assert_eq!(env.run(config).await, (7, "out\n".to_owned(), String::new()));
    finish(env).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_fails_after_that_leaves_nothing() {
    let mut env =
        with_odd("crun-odd", "REAL \"$@\" || exit\ncase \" $* \" in *\" create \"*) sleep 1; exit 1;; esac").await;
    let mut task = prepare(&mut env, "odd").await;
    let error = env.try_start(&mut task).await.expect_err("its runtime failed");
    assert!(error.message().contains("create the container"), "{error:?}");
    assert!(up(&task).is_some(), "it ran");
    finish(env).await;
}

/// A runtime that has its state in another place, or that makes its process wait in another way.
#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_with_another_way_is_started_by_its_shim() {
    let elsewhere = "for word; do shift; [ \"$last\" = --root ] && word=$word/deeper; set -- \"$@\" \"$word\"; \
                     last=$word; done\nexec REAL \"$@\"";
    // The plugin can't know what a runtime with another name does at `start`.
    for (name, script) in [("crun-odd", elsewhere), ("odd", "exec REAL \"$@\"")] {
        let mut env = with_odd(name, script).await;
        let mut task = prepare(&mut env, "odd").await;
        env.try_start(&mut task).await.unwrap();
        assert_eq!(phases(&env, &task).await, ["phase.start_ms"]);
        env.stop(&task, Duration::ZERO, "").await.unwrap();
        env.destroy(&task).await.unwrap();
        fs::remove_dir_all(env.dir.join("run/runtimes/odd")).unwrap();
        finish(env).await;
    }
}

/// runc's process waits in the opposite way: it writes to the exec FIFO, while crun's process reads from it.
#[tokio::test(flavor = "multi_thread")]
async fn runcs_tasks_are_let_go_too() {
    let mut env = Env::new().await;
    for runtime in ["runc", "crun"] {
        let mut task = prepare(&mut env, runtime).await;
        env.try_start(&mut task).await.unwrap();
        assert_eq!(phases(&env, &task).await, ["phase.released_ms"], "{runtime}");
        env.stop(&task, Duration::ZERO, "").await.unwrap();
        env.destroy(&task).await.unwrap();
    }
    env.finish().await;
}
