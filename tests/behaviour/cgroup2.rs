//! Behaviour on cgroup version 2 only, which is the version that users have. `make test-cgroup2` runs these tests in
//! its machine. On a host with version 1, each test prints that it was not run.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nomad_driver_shim::cgroup::{CgroupMode, Cgroups};
use serde_json::json;

use crate::support::{Env, Task, eventually};

const ROOT: &str = "/sys/fs/cgroup";

fn unified(test: &str) -> bool {
    let unified = Cgroups::detect().unwrap().mode() == CgroupMode::V2;
    if !unified {
        eprintln!("{test}: this host has cgroup version 1; make test-cgroup2 runs it on version 2");
    }
    unified
}

/// A slice like the ones that Nomad's client creates below its own slice, with all controllers delegated.
fn slice(parent: &str, name: &str) -> PathBuf {
    let mut path = PathBuf::from(ROOT);
    for part in [parent, name] {
        hand_on(&path);
        path.push(part);
        fs::create_dir_all(&path).unwrap();
    }
    hand_on(&path);
    path
}

fn hand_on(path: &Path) {
    for controller in ["cpuset", "cpu", "io", "memory", "pids"] {
        fs::write(path.join("cgroup.subtree_control"), format!("+{controller}")).unwrap();
    }
}

async fn in_scope(env: &mut Env, scope: &Path, script: &str) -> Task {
    let config = env.shell(script, json!({})).await;
    let mut task = env.prepare(config).await;
    let linux = task.config.resources.as_mut().unwrap().linux_resources.as_mut().unwrap();
    linux.cpuset_cgroup = scope.to_str().unwrap().to_owned();
    env.try_start(&mut task).await.unwrap();
    task
}

/// Nomad creates the task's scope before it calls StartTask, and looks for the task's processes in this scope.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_are_in_the_scope_that_nomad_has_made() {
    if !unified("tasks_are_in_the_scope_that_nomad_has_made") {
        return;
    }
    let mut env = Env::new().await;
    let scope = slice("nomad.slice", "share.slice").join(format!("{}.web.scope", env.namespace));
    fs::create_dir(&scope).unwrap();
    let task = in_scope(&mut env, &scope, "cat /proc/self/cgroup; echo ready; sleep 600").await;
    // The task has a cgroup namespace of its own.
    task.says("0::/\nready").await;
    let limit = fs::read_to_string(scope.join("memory.max")).unwrap();
    assert_eq!(limit, format!("{}\n", 64 << 20));
    assert!(!fs::read_to_string(scope.join("cgroup.procs")).unwrap().is_empty(), "its processes are there");
    env.destroy(&task).await.unwrap();
    eventually("the scope is gone", async || if scope.exists() { Err(()) } else { Ok(()) }).await;
    env.finish().await;
}

/// Reserved cores are a cpuset partition that Nomad has created: the task sees no other processor.
#[tokio::test(flavor = "multi_thread")]
async fn reserved_cores_are_all_that_a_task_sees() {
    if !unified("reserved_cores_are_all_that_a_task_sees") {
        return;
    }
    let mut env = Env::new().await;
    // The test has a slice of its own, so that other tests' tasks keep their processors.
    let parent = format!("{}.slice", env.namespace);
    let reserve = slice(&parent, "reserve.slice");
    // The parent comes first, because a partition can only be created inside another partition.
    let parts = [reserve.parent().unwrap(), &reserve];
    for part in parts {
        fs::write(part.join("cpuset.cpus"), "1").unwrap();
        fs::write(part.join("cpuset.cpus.partition"), "root").unwrap();
        assert_eq!(fs::read_to_string(part.join("cpuset.cpus.partition")).unwrap(), "root\n", "{}", part.display());
    }
    let scope = reserve.join(format!("{}.web.scope", env.namespace));
    fs::create_dir(&scope).unwrap();
    let config = env.shell("grep Cpus_allowed_list /proc/self/status", json!({})).await;
    let mut task = env.prepare(config).await;
    let linux = task.config.resources.as_mut().unwrap().linux_resources.as_mut().unwrap();
    (linux.cpuset_cgroup, linux.cpuset_cpus) = (scope.to_str().unwrap().to_owned(), "1".to_owned());
    env.try_start(&mut task).await.unwrap();
    assert_eq!(env.finish_task(task).await.1, "Cpus_allowed_list:\t1\n");
    for part in parts.iter().rev() {
        fs::remove_dir(part).unwrap();
    }
    env.finish().await;
}

/// A task whose processes fork as fast as they are killed is ended at once, by `cgroup.kill`.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_outruns_the_kill() {
    if !unified("nothing_outruns_the_kill") {
        return;
    }
    let mut env = Env::new().await;
    let fork = "f() { sleep 0.01; f & f & }; echo ready; f; sleep 600";
    let config = env.shell(fork, json!({"pids_limit": 60})).await;
    let task = env.start(config).await;
    task.says("ready").await;
    env.stop(&task, std::time::Duration::ZERO, "").await.unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 137);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}
