//! The host resources of a sandbox: its processes are limited like those of any task, and its sandbox supervisor has no
//! privileges to lose.

use std::fs;

use serde_json::json;

use crate::{SPELLINGS, processes, support, support::Env};
use support::eventually;

fn cgroup_file(env: &support::Env, alloc: &str, name: &str) -> String {
    let groups = support::leak::cgroups(env).into_iter().filter(|path| path.to_str().unwrap().contains(alloc));
    groups.filter_map(|path| fs::read_to_string(path.join(name)).ok()).next().unwrap_or_default().trim().to_owned()
}

/// For a sandbox, the operator's limit counts its processes and threads on the host. A sandbox that exceeds the limit
/// may end, but the host is not affected.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn a_sandbox_stays_within_the_operators_limit_of_processes() {
    for runtime in SPELLINGS {
        let mut env = Env::with_runtime(runtime, json!({})).await;
        let task = env.start(env.shell("exec sleep 600", json!({})).await).await;
        assert_eq!(cgroup_file(&env, &task.dirs.alloc_id, "pids.max"), "2048", "{runtime}");
        env.destroy(&task).await.unwrap();
        env.finish().await;

        let mut env = Env::with_runtime(runtime, json!({"pids_limit": 100})).await;
        let fork = "for i in $(seq 300); do sleep 600 & done 2>/dev/null; echo forked; sleep 600";
        let task = env.start(env.shell(fork, json!({"memory_hard_limit": 1024})).await).await;
        assert_eq!(cgroup_file(&env, &task.dirs.alloc_id, "pids.max"), "100", "{runtime}");
        eventually("the sandbox has met its limit, or ended", async || {
            let events = cgroup_file(&env, &task.dirs.alloc_id, "pids.events");
            let current: u32 = cgroup_file(&env, &task.dirs.alloc_id, "pids.current").parse().unwrap_or(0);
            assert!(current <= 100, "{runtime}: {current}");
            let met = !events.is_empty() && events != "max 0";
            if met || processes(&env, &task.dirs.alloc_id).is_empty() { Ok(()) } else { Err((events, current)) }
        })
        .await;
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-gvisor"]
async fn the_keeper_of_an_exit_code_has_no_rights() {
    let mut env = Env::with_runtime("io.containerd.runsc.v1", json!({})).await;
    let task = env.start(env.shell("exec sleep 600", json!({})).await).await;
    let name = |pid: i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let sandbox = processes(&env, &task.dirs.alloc_id).into_iter().find(|(_, line)| line.starts_with("runsc-sandbox"));
    let (sandbox, _) = sandbox.expect("a sandbox");
    let status = fs::read_to_string(format!("/proc/{sandbox}/status")).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:\t")).unwrap().parse::<i32>().unwrap();
    assert_eq!(name(parent), "runsc-keeper\n");
    eventually("the keeper is confined", async || {
        let status = fs::read_to_string(format!("/proc/{parent}/status")).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t")).unwrap();
        let sets =
            ["CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"].map(|set| field(set).trim_matches('0').is_empty());
        let confined = sets == [true; 5] && field("Seccomp") == "2" && field("NoNewPrivs") == "1";
        if confined { Ok(()) } else { Err(status) }
    })
    .await;
    // The confined sandbox supervisor still reports the exit code.
    env.signal(&task, "SIGKILL").await.unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 137);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}
