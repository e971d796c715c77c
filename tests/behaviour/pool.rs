//! Which task has which shim, and where writable layers are stored.

use std::{collections::BTreeSet, fs, path::Path};

use nomad_driver_shim::{
    cgroup::{CgroupMode, Cgroups},
    process::which,
};
use serde_json::{Value, json};

use crate::support::{Env, Task, leak};

async fn with(config: Value) -> Env {
    Env::configured(config).await
}

/// The shim that a task's record names.
async fn shim_of(env: &Env, task: &Task) -> String {
    env.record(task).await.1["shim"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_serves_one_task_after_the_other() {
    for reuse in [true, false] {
        let mut env = with(json!({"shim": {"pool": 1, "reuse": reuse}})).await;
        let mut shims = Vec::new();
        for n in 0..4 {
            let task = env.sh(&format!("echo {n}; exit {n}")).await;
            shims.push(shim_of(&env, &task).await);
            let (code, out, _) = env.finish_task(task).await;
            assert_eq!((code, out), (n, format!("{n}\n")));
            // The task gives its shim back once nothing of the task is left.
            let settled = async || match leak::entries(&env.dir.join("run/bundles")) {
                left if left.is_empty() => Ok(()),
                left => Err(left),
            };
            crate::support::eventually("the task is cleared away", settled).await;
        }
        let distinct: BTreeSet<&String> = shims.iter().collect();
        assert_eq!(distinct.len() < shims.len(), reuse, "{shims:?}");
        env.finish().await;
    }
}

/// Without this, such a shim would live forever if no further plugin were started.
#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_does_not_come_up_in_time_goes_with_the_plugin() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let program = dir.path().join("containerd-shim-runc-v2");
    let real = which(Path::new("containerd-shim-runc-v2")).unwrap();
    // The script stops itself before it executes the shim, so that nothing of it is left when it is killed.
    let script = format!("[ \"$1\" = -v ] || kill -STOP $$\nexec {} \"$@\"", real.display());
    crate::support::script(&program, &script);
    let env = with(json!({"shim": {"pool": 1, "binary": program}})).await;
    crate::support::eventually("a shim is coming up", async || match leak::entries(&env.dir.join("run/shims")) {
        shims if shims.len() == 1 => Ok(()),
        shims => Err(shims),
    })
    .await;
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nodes_tasks_share_a_shim_through_crashes() {
    let mut env = with(json!({"shim_scope": "node"})).await;
    // The plugin only warns of a shim older than 2.3.2, such as this distribution's; for a newer one there is no
    // warning.
    let version = std::process::Command::new("containerd-shim-runc-v2").arg("-v").output().unwrap();
    if String::from_utf8_lossy(&version.stdout).contains("Version:  1.") {
        env.busybox().await;
        crate::support::eventually("a word about starts that queue", async || {
            let said = env.plugin().stderr();
            if said.contains("starts one task at a time") { Ok(()) } else { Err(said) }
        })
        .await;
    }

    let tasks = [env.sh("sleep 600").await, env.sh("trap 'exit 3' TERM; echo up; while :; do sleep 0.02; done").await];
    let shim = shim_of(&env, &tasks[0]).await;
    assert_eq!(shim_of(&env, &tasks[1]).await, shim);
    env.kill_plugin().await;
    env.start_plugin().await;
    for task in &tasks {
        env.recover(task).await.unwrap();
        assert_eq!(env.exec_text(task, "echo alive").await, "alive\n");
    }
    // A later task joins the others in the shim; the end of one task does not end the others.
    let third = env.sh("sleep 600").await;
    assert_eq!(shim_of(&env, &third).await, shim);
    let [first, second] = tasks;
    env.destroy(&first).await.unwrap();
    second.says("up").await;
    env.stop(&second, std::time::Duration::from_secs(20), "").await.unwrap();
    assert_eq!(env.finish_task(second).await.0, 3);
    assert_eq!(env.exec_text(&third, "echo alive").await, "alive\n");
    env.destroy(&third).await.unwrap();
    // The shared shim waits for the next task.
    assert_eq!(leak::entries(&env.dir.join("run/shims")), std::slice::from_ref(&shim));
    let fourth = env.sh("exit 0").await;
    assert_eq!(shim_of(&env, &fourth).await, shim);
    assert_eq!(env.finish_task(fourth).await.0, 0);
    env.finish().await;
}

/// Nothing is left of a shim that dies while no task uses it, be it an idle shim of the pool or a shared shim.
#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_dies_idle_is_replaced_and_leaves_nothing() {
    for (scope, wanted) in [("task", 2), ("alloc", 2), ("node", 1)] {
        let config = json!({"shim_scope": scope, "shim": {"pool": 2}, "state": {"grace": "1s"}});
        let mut env = with(config).await;
        let task = env.sh("exit 4").await;
        assert_eq!(env.finish_task(task).await.0, 4);
        let shims = |env: &Env| leak::entries(&env.dir.join("run/shims"));
        let pid_file = |shim: &String| env.dir.join("run/shims").join(shim).join("pid");
        crate::support::eventually("the shims of the pool are there", async || match shims(&env) {
            shims if shims.len() == wanted && shims.iter().all(|shim| pid_file(shim).exists()) => Ok(()),
            shims => Err((scope, shims)),
        })
        .await;
        let dead = shims(&env);
        for shim in &dead {
            let identity = fs::read(pid_file(shim)).unwrap();
            let identity: Value = serde_json::from_slice(&identity).unwrap();
            let pid = nix::unistd::Pid::from_raw(i32::try_from(identity["pid"].as_i64().unwrap()).unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
        crate::support::eventually("others take their place", async || match shims(&env) {
            shims if shims.len() == wanted && shims.iter().all(|shim| !dead.contains(shim)) => Ok(()),
            shims => Err((scope, shims)),
        })
        .await;
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_a_shared_shim_is_told_to_all_its_tasks() {
    let mut env = with(json!({"shim_scope": "node"})).await;
    let tasks = [env.sh("sleep 600").await, env.sh("sleep 600").await];
    let shim = shim_of(&env, &tasks[0]).await;
    let identity: Value =
        serde_json::from_slice(&fs::read(env.dir.join("run/shims").join(shim).join("pid")).unwrap()).unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(identity["pid"].as_i64().unwrap()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    for task in &tasks {
        assert_eq!(env.wait(task).await.exit_code, 137);
    }
    // The next task gets a live shim.
    assert_eq!(env.run(json!({"image": env.busybox().await, "command": "/bin/true"})).await.0, 0);
    for task in &tasks {
        env.destroy(task).await.unwrap();
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allocations_tasks_share_a_shim_until_the_last_is_gone() {
    let mut env = with(json!({"shim_scope": "alloc", "shim": {"pool": 1}})).await;
    let image = env.busybox().await;
    let config = json!({"image": image, "command": "/bin/sleep", "args": ["600"]});
    let alloc = env.allocs.len();
    let mut first = env.prepare(config.clone()).await;
    env.try_start(&mut first).await.unwrap();
    let dirs = env.allocs[alloc].create_task("beside").unwrap();
    let mut second = env.prepare_in(dirs, "1", config.clone()).await;
    env.try_start(&mut second).await.unwrap();
    let mut stranger = env.prepare(config).await;
    env.try_start(&mut stranger).await.unwrap();
    let shim = shim_of(&env, &first).await;
    assert_eq!(shim_of(&env, &second).await, shim);
    assert_ne!(shim_of(&env, &stranger).await, shim);
    env.destroy(&first).await.unwrap();
    assert_eq!(env.exec_text(&second, "echo alive").await, "alive\n");
    for task in [&second, &stranger] {
        env.destroy(task).await.unwrap();
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writable_layers_in_memory_have_a_size_and_go_with_the_task() {
    let mut env = with(json!({"state": {"upper": "tmpfs", "upper_size": "1m"}})).await;
    let task = env.sh("echo up; dd if=/dev/zero of=/big bs=64k count=64; echo code $?; sleep 600").await;
    task.says("code 1").await;
    let id = env.attribute(&task, "container_id").await;
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(mounts.lines().any(|line| line.contains(&format!("/{id} ")) && line.contains(" - tmpfs ")), "{mounts}");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// Two plugins prime the cgroup lock on one node, as plugins under two names do: neither removes the other's cgroups.
#[tokio::test(flavor = "multi_thread")]
async fn warmers_leave_nothing_and_each_other_alone() {
    let mut envs = [with(json!({"cgroup": {"keep_warm": "3ms"}})).await, with(json!({})).await];
    let groups = |pid: u32| {
        let names = leak::entries(Path::new("/sys/fs/cgroup/freezer/nomad-driver-shim"));
        names.into_iter().filter(|name| name.starts_with(&format!("warm-{pid}-"))).count()
    };
    let mut pids = Vec::new();
    for env in &mut envs {
        let image = env.busybox().await;
        assert_eq!(env.run(json!({"image": image, "command": "/bin/true"})).await.0, 0);
        pids.push(env.plugin().pid().unwrap());
    }
    let v2 = Cgroups::detect().unwrap().mode() == CgroupMode::V2;
    for (env, pid) in envs.iter().zip(&pids) {
        assert_eq!(groups(*pid), if v2 { 0 } else { 2 });
        assert!(!env.plugin().stderr().contains("gives up"), "{}", env.plugin().stderr());
    }
    assert_eq!(envs[0].plugin().stderr().contains("needs no priming"), v2);
    for env in envs {
        env.finish().await;
    }
    assert_eq!(pids.into_iter().map(groups).sum::<usize>(), 0);
}
