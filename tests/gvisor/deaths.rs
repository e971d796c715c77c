//! Parts of a sandbox that are killed, and a runsc that is removed while its tasks run.

use std::{fs, path::PathBuf, time::Instant};

use serde_json::json;

use crate::{
    SPELLINGS, kill, processes,
    support::{Env, Task, patience},
};

async fn ready(env: &mut Env) -> Task {
    let config = env.shell("echo ready; sleep 600", json!({})).await;
    let task = env.start(config).await;
    task.says("ready").await;
    task
}

fn part(env: &Env, task: &Task, name: &str) -> i32 {
    let all = processes(env, &task.dirs.alloc_id);
    let found = all.iter().find(|(_, line)| line.split_whitespace().next().is_some_and(|first| first.ends_with(name)));
    found.unwrap_or_else(|| panic!("no {name} in {all:?}")).0
}

/// Kills the sandbox or the file server of a task. The end must be reported at once and correctly, and nothing may be
/// left.
async fn killed(name: &str) {
    for runtime in SPELLINGS {
        let mut env = Env::with_runtime(runtime, json!({})).await;
        let task = ready(&mut env).await;
        kill(part(&env, &task, name));
        let began = Instant::now();
        let result = env.wait(&task).await;
        assert!(began.elapsed() < patience() / 15, "{runtime}: told after {:?}", began.elapsed());
        assert!(result.exit_code == 137 || result.signal == 9, "{runtime}: {result:?}");
        assert!(!result.oom_killed, "{runtime}: {result:?}");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn a_killed_sandbox_is_told() {
    killed("runsc-sandbox").await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn a_killed_file_server_is_told() {
    killed("runsc-gofer").await;
}

/// Copies runsc, so that the test can remove its copy.
fn own_runsc(env_dir: &str) -> PathBuf {
    let installed = nomad_driver_shim::process::which("runsc".as_ref()).expect("runsc is in PATH: make test-gvisor");
    let own = PathBuf::from(env_dir).join("runsc");
    fs::copy(installed, &own).unwrap();
    own
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn a_removed_runsc_serves_its_tasks_to_their_ends() {
    let directory = tempfile::tempdir().unwrap();
    let runsc = own_runsc(directory.path().to_str().unwrap());
    for runtime in SPELLINGS {
        let mut env = Env::with_runtime(runtime, json!({"runtime": {runtime: {"binary": runsc}}})).await;
        let config = env.shell("trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done", json!({})).await;
        let stopped = env.start(config.clone()).await;
        let killed = env.start(config).await;
        for task in [&stopped, &killed] {
            task.says("ready").await;
        }
        let aside = runsc.with_extension("aside");
        fs::rename(&runsc, &aside).unwrap();
        // After its restart, the plugin does not find runsc either.
        env.kill_plugin().await;
        env.start_plugin().await;
        env.recover(&stopped).await.unwrap();
        env.recover(&killed).await.unwrap();
        assert_eq!(env.exec_text(&stopped, "echo in there").await, "in there\n", "{runtime}");
        env.stop(&stopped, patience(), "SIGTERM").await.unwrap();
        assert_eq!(env.wait(&stopped).await.exit_code, 9, "{runtime}");
        kill(part(&env, &killed, "runsc-sandbox"));
        assert!(env.wait(&killed).await.exit_code != 0, "{runtime}");
        // New tasks are refused: the driver never uses a weaker runtime instead.
        let config = env.shell("true", json!({})).await;
        let mut third = env.prepare(config).await;
        let why = env.try_start(&mut third).await.unwrap_err().message().to_owned();
        assert!(why.contains("is not installed") && why.contains(runsc.to_str().unwrap()), "{runtime}: {why}");
        for task in [&stopped, &killed] {
            env.destroy(task).await.unwrap();
        }
        fs::rename(&aside, &runsc).unwrap();
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn a_killed_shim_and_a_killed_keeper_are_survived() {
    for runtime in SPELLINGS {
        let mut env = Env::with_runtime(runtime, json!({})).await;
        let task = ready(&mut env).await;
        let shim = env.dir.join("run/shims").join(env.record(&task).await.1["shim"].as_str().unwrap());
        let identity: serde_json::Value = serde_json::from_slice(&fs::read(shim.join("pid")).unwrap()).unwrap();
        kill(i32::try_from(identity["pid"].as_i64().unwrap()).unwrap());
        let answer = env.wait(&task).await;
        assert_eq!(answer.exit_code, 137, "{runtime}: {answer:?}");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

/// Each sandbox of gVisor's own shim has a sandbox supervisor of this driver, which notes how the sandbox ends. Without
/// the supervisor, runsc is asked for the exit code, as the shim does by default.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn a_killed_keeper_takes_nothing_along() {
    let mut env = Env::with_runtime(SPELLINGS[1], json!({})).await;
    let config = env.shell("trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done", json!({})).await;
    let task = env.start(config).await;
    task.says("ready").await;
    let sandbox = part(&env, &task, "runsc-sandbox");
    let status = fs::read_to_string(format!("/proc/{sandbox}/status")).unwrap();
    let keeper: i32 = status.lines().find_map(|line| line.strip_prefix("PPid:\t")).unwrap().parse().unwrap();
    let line = fs::read_to_string(format!("/proc/{keeper}/cmdline")).unwrap();
    assert!(line.contains("runsc-keeper"), "{line}");
    kill(keeper);
    env.stop(&task, patience(), "SIGTERM").await.unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 9);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}
