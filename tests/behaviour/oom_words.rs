//! An OOM kill is reported as text where Nomad's Terminated event shows it: in `err` of WaitTask.

use std::fs;

use nomad_driver_shim::{ids::random_hex, pb::driver::WaitTaskResponse, process::PidFd};
use serde_json::json;

use crate::support::{Env, Image, Task, program, services, services::root};

/// A command that uses more memory than the task has, in one process.
const GREEDY: &str = "dd if=/dev/zero of=/dev/null bs=200M count=1";
/// The command of a task that waits until the test creates a file.
const WAIT_FOR_TEST: &str = "echo ready; until [ -e /alloc/data/go ]; do sleep 0.05; done";

/// Starts a task with 20 MiB of memory.
async fn small_task(env: &mut Env, runtime: &str, script: &str) -> Task {
    let image = env.busybox().await;
    let config = json!({"image": image, "command": "/bin/sh", "args": ["-c", script], "runtime": runtime});
    let mut task = env.prepare(config).await;
    let memory = task.config.resources.as_mut().unwrap().allocated_resources.as_mut().unwrap().memory.as_mut().unwrap();
    memory.memory_mb = 20;
    env.try_start(&mut task).await.unwrap();
    task
}

/// Returns the exit code, whether there was an OOM kill, and the text for it.
fn told(answer: &WaitTaskResponse) -> (i32, bool, &str) {
    let result = answer.result.as_ref().unwrap();
    (result.exit_code, result.oom_killed, &answer.err)
}

async fn let_go(task: &Task) {
    fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oom_kill_of_the_first_process_or_another_is_in_the_exit_message() {
    let mut env = Env::new().await;
    for runtime in ["crun", "runc"] {
        for (script, code) in [
            // The task's first process itself is killed.
            (format!("exec {GREEDY}"), 137),
            // Another process is killed, and the first process then exits with its own code.
            (format!("{GREEDY}; exit 3"), 3),
        ] {
            let task = small_task(&mut env, runtime, &script).await;
            let answer = env.try_wait(&task.id).await.unwrap();
            assert_eq!(told(&answer), (code, true, "OOM Killed"), "{runtime}: {script}");
            env.destroy(&task).await.unwrap();
        }
    }
    env.finish().await;
}

/// Nomad counts every exit with a message as a failure, and would run a finished batch job again.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_succeeds_in_spite_of_an_oom_kill_has_no_exit_message() {
    let mut env = Env::new().await;
    let task = small_task(&mut env, "crun", &format!("{GREEDY}; exit 0")).await;
    assert_eq!(told(&env.try_wait(&task.id).await.unwrap()), (0, true, ""));
    env.destroy(&task).await.unwrap();
    // A task that was killed in another way has no exit message either.
    let task = small_task(&mut env, "crun", "kill -9 $$; sleep 600").await;
    env.signal(&task, "SIGKILL").await.unwrap();
    assert_eq!(told(&env.try_wait(&task.id).await.unwrap()), (137, false, ""));
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oom_kill_that_no_plugin_saw_is_told_by_the_next_one() {
    let mut env = Env::new().await;
    for runtime in ["crun", "runc"] {
        let task = small_task(&mut env, runtime, &format!("{WAIT_FOR_TEST}; exec {GREEDY}")).await;
        task.says("ready").await;
        let pid: u32 = env.attribute(&task, "pid").await.parse().unwrap();
        let process = PidFd::open(pid).unwrap();
        env.kill_plugin().await;
        let_go(&task).await;
        tokio::time::timeout(crate::support::patience(), process.wait_for_end()).await.expect("it ends");
        // The first plugin knows of the OOM kill from the kernel, the second from what the first has recorded.
        for _ in 0..2 {
            env.start_plugin().await;
            env.recover(&task).await.unwrap();
            assert_eq!(told(&env.try_wait(&task.id).await.unwrap()), (137, true, "OOM Killed"), "{runtime}");
            env.kill_plugin().await;
        }
        env.start_plugin().await;
        env.recover(&task).await.unwrap();
        env.destroy(&task).await.unwrap();
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oom_kill_is_told_together_with_the_death_of_the_shim() {
    let mut env = Env::new().await;
    let script = format!("{GREEDY}; {WAIT_FOR_TEST}");
    let task = small_task(&mut env, "crun", &script).await;
    task.says("ready").await;
    let (_, record) = env.record(&task).await;
    let directory = env.dir.join("run/shims").join(record["shim"].as_str().unwrap());
    let identity: serde_json::Value = serde_json::from_slice(&fs::read(directory.join("pid")).unwrap()).unwrap();
    let shim = i32::try_from(identity["pid"].as_i64().unwrap()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::Signal::SIGKILL).unwrap();
    let answer = env.try_wait(&task.id).await.unwrap();
    let (code, oom_killed, words) = told(&answer);
    assert_eq!((code, oom_killed), (137, true));
    assert!(words.starts_with("OOM Killed; ") && words.contains("shim died"), "{words}");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn run_tells_an_oom_kill_in_words() {
    let id = random_hex(4);
    let (dir, image) = (root().join(&id), Image::busybox().push(&services().registry, "test/busybox:1").await);
    for (script, code, words) in [
        (format!("exec {GREEDY}"), 137, "OOM Killed"),
        (format!("{GREEDY}; exit 0"), 0, "OOM Killed; the task itself succeeded"),
    ] {
        let mut command = std::process::Command::new(program());
        command
            .args(["run", "--config", r#"{"memory_hard_limit": 20}"#, &image, "sh", "-c", &script])
            .env("NOMAD_DRIVER_SHIM_ADDRESS", &services().containerd)
            .env("NOMAD_DRIVER_SHIM_NAMESPACE", format!("oom-{id}"))
            .env("NOMAD_DRIVER_SHIM_RUN_DIR", dir.join("run"))
            .env("NOMAD_DRIVER_SHIM_STATE_DIR", dir.join("state"));
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert_eq!(said.matches(words).count(), 1, "{said}");
    }
}
