//! A runtime that hangs while it creates a container: StopTask and DestroyTask abort the start, whichever tasks share
//! the shim.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nomad_driver_shim::pb::driver::{DestroyTaskRequest, StartTaskRequest, StopTaskRequest};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tonic::Status;

use crate::{
    runtimes,
    support::{Env, Task, eventually, script},
};

/// An aborted start ends in about a second. The runtime would take ten minutes, and the driver's own limit is one
/// minute.
const PROMPT: Duration = Duration::from_secs(20);

/// The point in its `create` at which the runtime hangs.
#[derive(Clone, Copy, Debug)]
enum Hang {
    Before,
    /// The container exists by then, and its process waits for the start.
    After,
}

/// A runtime that hangs in `create` as long as the file `hang` is in its directory, and creates the file `called` when
/// it hangs.
fn slow_runtime(dir: &Path, real: &str, hang: Hang) -> PathBuf {
    let (program, flag, called) = (dir.join("slow"), dir.join("hang"), dir.join("called"));
    let hangs = format!("if [ -e {} ]; then touch {}; sleep 600; fi", flag.display(), called.display());
    let (before, after) = match hang {
        Hang::Before => (hangs.as_str(), ":"),
        Hang::After => (":", hangs.as_str()),
    };
    script(
        &program,
        &format!(
            "case \" $* \" in *' create '*) {before}; {real} \"$@\" || exit; {after}; exit 0;; esac\nexec {real} \"$@\""
        ),
    );
    program
}

async fn slow_plugin(real: &str, hang: Hang, config: Value) -> Env {
    let dir = tempfile::tempdir_in(crate::support::services::root()).unwrap().keep();
    let mut config = config;
    config["runtime"] = json!({"slow": {"binary": slow_runtime(&dir, real, hang)}});
    let env = Env::with_runtime("slow", config).await;
    // The directory moves to the plugin's own files, so that the leak checker looks for remains of the runtime.
    std::fs::rename(&dir, env.dir.join("runtime")).unwrap();
    let program = env.dir.join("runtime");
    std::os::unix::fs::symlink(&program, &dir).unwrap();
    env
}

fn runtime_dir(env: &Env) -> PathBuf {
    env.dir.join("runtime")
}

fn start(env: &Env, task: &Task) -> JoinHandle<Result<(), Status>> {
    let (mut driver, config) = (env.driver(), task.config.clone());
    tokio::spawn(async move { driver.start_task(StartTaskRequest { task: Some(config) }).await.map(drop) })
}

async fn hanging(env: &Env) {
    let called = runtime_dir(env).join("called");
    eventually("the runtime is called", async || if called.exists() { Ok(()) } else { Err("not called") }).await;
}

async fn stop(env: &Env, task: &Task) -> Result<(), Status> {
    let request = StopTaskRequest {
        task_id: task.id.clone(),
        timeout: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
        signal: String::new(),
    };
    env.driver().stop_task(request).await.map(drop)
}

async fn broken_off(starting: JoinHandle<Result<(), Status>>, began: Instant, what: &str) {
    let answer = starting.await.unwrap();
    assert!(began.elapsed() < PROMPT, "{what}: took {:?}", began.elapsed());
    let status = answer.expect_err(what);
    assert!(status.message().contains("was stopped while it was being started"), "{what}: {}", status.message());
}

/// Lets the next start proceed.
fn release(env: &Env) {
    std::fs::remove_file(runtime_dir(env).join("hang")).unwrap();
}

fn arm(env: &Env) {
    let dir = runtime_dir(env);
    std::fs::write(dir.join("hang"), "").unwrap();
    let _ = std::fs::remove_file(dir.join("called"));
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_and_destroy_break_off_a_create_that_hangs() {
    for runtime in runtimes() {
        for hang in [Hang::Before, Hang::After] {
            let mut env = slow_plugin(&runtime, hang, json!({})).await;
            for how in ["stop", "destroy"] {
                arm(&env);
                let config = env.shell("sleep 600", json!({})).await;
                let task = env.prepare(config).await;
                let starting = start(&env, &task);
                hanging(&env).await;
                let began = Instant::now();
                let what = format!("{runtime}, {hang:?}, {how}");
                if how == "stop" {
                    stop(&env, &task).await.expect(&what);
                } else {
                    let request = DestroyTaskRequest { task_id: task.id.clone(), force: true };
                    env.driver().destroy_task(request).await.expect(&what);
                }
                broken_off(starting, began, &what).await;
            }
            // The next start is not affected.
            release(&env);
            let config = env.shell("echo fine", json!({})).await;
            assert_eq!(env.run(config).await.1, "fine\n");
            env.finish().await;
        }
    }
}

/// In a shim that all tasks of the node share, a running task continues. A task whose create call waits in the queue is
/// not harmed when the start before it ends.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_that_share_the_shim_are_not_harmed() {
    for runtime in runtimes() {
        let mut env = slow_plugin(&runtime, Hang::Before, json!({"shim_scope": "node"})).await;
        let config = env.shell("echo up; sleep 600", json!({})).await;
        let bystander = env.start(config.clone()).await;
        bystander.says("up").await;
        arm(&env);
        let (first, second) = (env.prepare(config.clone()).await, env.prepare(config.clone()).await);
        let one = start(&env, &first);
        hanging(&env).await;
        let two = start(&env, &second);
        release(&env);
        let began = Instant::now();
        stop(&env, &first).await.expect("stopped");
        broken_off(one, began, &format!("{runtime}, shared")).await;
        two.await.unwrap().unwrap_or_else(|status| panic!("{runtime}: {}", status.message()));
        for task in [&bystander, &second] {
            assert_eq!(env.exec_text(task, "echo alive").await, "alive\n", "{runtime}");
            env.destroy(task).await.unwrap();
        }
        env.finish().await;
    }
}

/// A stop at any moment in the middle of a start that does not hang: nothing of the start remains.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_can_be_stopped_at_any_time() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let mut stopped = 0;
        for delay in [0, 1, 2, 3, 5, 10, 20, 40] {
            let config = env.shell("sleep 600", json!({})).await;
            let task = env.prepare(config).await;
            let starting = start(&env, &task);
            tokio::time::sleep(Duration::from_millis(delay)).await;
            stop(&env, &task).await.expect("stopped");
            match starting.await.unwrap() {
                // The stop arrived before the plugin knew the start, or after the task ran.
                Ok(()) => env.destroy(&task).await.unwrap(),
                Err(status) => {
                    assert!(status.message().contains("was stopped"), "{}", status.message());
                    stopped += 1;
                }
            }
        }
        assert!(stopped > 0, "{runtime}: no stop came during a start");
        env.finish().await;
    }
}

/// A shim that hangs together with its runtime is ended with it, if no other task uses the shim.
#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_hangs_is_ended_too() {
    for runtime in runtimes() {
        let mut env = slow_plugin(&runtime, Hang::Before, json!({})).await;
        arm(&env);
        let config = env.shell("sleep 600", json!({})).await;
        let task = env.prepare(config).await;
        let starting = start(&env, &task);
        hanging(&env).await;
        let shims = shims(&env);
        // From here on the shim and its runtime both hang. The pool's other shim is stopped as well, and must be ended,
        // too.
        for pid in &shims {
            nix::sys::signal::kill(*pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
        }
        let began = Instant::now();
        stop(&env, &task).await.expect("stopped");
        broken_off(starting, began, &runtime).await;
        for pid in &shims {
            // The shim has been ended, or is idle in the pool.
            let _ = nix::sys::signal::kill(*pid, nix::sys::signal::Signal::SIGCONT);
        }
        env.finish().await;
    }
}

fn shims(env: &Env) -> Vec<nix::unistd::Pid> {
    let dirs = std::fs::read_dir(env.dir.join("run/shims")).unwrap().flatten();
    let pids = dirs.filter_map(|dir| {
        let text = std::fs::read_to_string(dir.path().join("pid")).ok()?;
        let noted: Value = serde_json::from_str(&text).ok()?;
        i32::try_from(noted["pid"].as_i64()?).ok().map(nix::unistd::Pid::from_raw)
    });
    pids.collect()
}
