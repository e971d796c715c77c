//! Observations of a task that need no knowledge of its driver.

use std::{
    fs,
    future::Future,
    path::{Path, PathBuf},
    time::Duration,
};

use nomad_driver_shim::{
    cgroup::{CgroupMode, Cgroups},
    ids::random_hex,
    pb::driver::{AllocatedMemoryResources, LinuxResources, TaskConfig},
};
use serde_json::{Value, json};

use crate::support::{Env, Task, eventually, leak, not_applicable, patience, services};

/// Returns a duration (4 s by default) that no correct call takes. The defects take longer: five seconds, or the kill
/// timeout.
pub(crate) fn promptly() -> Duration {
    patience() / 15
}

/// Awaits `future`, which must not take as long as the defects do.
pub(crate) async fn prompt<T>(what: &str, future: impl Future<Output = T>) -> T {
    let began = tokio::time::Instant::now();
    let answer = future.await;
    assert!(began.elapsed() < promptly(), "{what} took {:?}", began.elapsed());
    answer
}

/// Runs a shell with these options and returns its standard output.
pub(crate) async fn prints(env: &mut Env, script: &str, options: Value) -> String {
    let config = env.shell(script, options).await;
    let (code, out, err) = env.run(config).await;
    assert_eq!(code, 0, "{script}: {out}{err}");
    out
}

/// Returns the error text with which the start of a shell with these options is refused.
pub(crate) async fn refused(env: &mut Env, options: Value) -> String {
    let config = env.shell("true", options.clone()).await;
    let mut task = env.prepare(config).await;
    match env.try_start(&mut task).await {
        Ok(()) => panic!("{options} was accepted"),
        Err(status) => status.message().to_owned(),
    }
}

/// Prepares a task, applies `change` to its configuration, and starts it.
pub(crate) async fn start_with(env: &mut Env, config: Value, change: impl FnOnce(&mut TaskConfig)) -> Task {
    let mut task = env.prepare(config).await;
    change(&mut task.config);
    env.try_start(&mut task).await.unwrap_or_else(|status| panic!("StartTask: {}", status.message()));
    task
}

pub(crate) fn linux(config: &mut TaskConfig) -> &mut LinuxResources {
    config.resources.as_mut().unwrap().linux_resources.as_mut().unwrap()
}

pub(crate) fn memory(config: &mut TaskConfig) -> &mut AllocatedMemoryResources {
    config.resources.as_mut().unwrap().allocated_resources.as_mut().unwrap().memory.as_mut().unwrap()
}

/// Shell code of a process that writes to `/alloc/data/NAME` as long as it lives.
pub(crate) fn beat(name: &str) -> String {
    format!("while :; do echo . >> /alloc/data/{name}; sleep 0.05; done")
}

/// Waits until the process of a [`beat`] has started.
pub(crate) async fn beats(task: &Task, name: &str) {
    let path = task.dirs.alloc_dir.join("alloc/data").join(name);
    eventually(&format!("{name} beats"), async || if path.exists() { Ok(()) } else { Err(()) }).await;
}

/// Waits until the process of a [`beat`] is gone.
pub(crate) async fn is_still(task: &Task, name: &str) {
    let path = task.dirs.alloc_dir.join("alloc/data").join(name);
    let size = || fs::metadata(&path).unwrap().len();
    eventually(&format!("{name} is still"), async || {
        let before = size();
        tokio::time::sleep(Duration::from_millis(400)).await;
        if size() == before { Ok(()) } else { Err(()) }
    })
    .await;
}

/// Returns the content of a file in the task's cgroup: `v1` is controller and file name, `v2` is the file name.
pub(crate) fn limit(env: &Env, task: &Task, v1: (&str, &str), v2: &str) -> String {
    let unified = Cgroups::detect().unwrap().mode() == CgroupMode::V2;
    let (controller, file) = if unified { ("", v2) } else { v1 };
    let ours = |path: &PathBuf| path.to_str().is_some_and(|path| path.contains(&task.dirs.alloc_id));
    let found = leak::cgroups(env)
        .into_iter()
        .filter(|path| ours(path) && path.starts_with(format!("/sys/fs/cgroup/{controller}")))
        .find_map(|path| fs::read_to_string(path.join(file)).ok());
    found.unwrap_or_else(|| panic!("no cgroup of {} has {file}", task.dirs.alloc_id)).trim().to_owned()
}

/// Returns the task's processes on the host, found by its cgroups.
pub(crate) fn processes(env: &Env, task: &Task) -> Vec<i32> {
    let groups = leak::cgroups(env)
        .into_iter()
        .filter(|path| path.to_str().is_some_and(|path| path.contains(&task.dirs.alloc_id)));
    let mut pids: Vec<i32> = groups
        .flat_map(|path| {
            fs::read_to_string(path.join("cgroup.procs"))
                .unwrap_or_default()
                .lines()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .filter_map(|pid| pid.parse().ok())
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}

/// Returns the parent of the task's first process: the shim, or the process that another driver uses instead.
pub(crate) fn keeper(env: &Env, task: &Task) -> i32 {
    let pids = processes(env, task);
    let outside = pids.iter().filter_map(|pid| parent_of(*pid)).find(|parent| !pids.contains(parent) && *parent > 1);
    outside.unwrap_or_else(|| panic!("nobody keeps {pids:?}"))
}

fn parent_of(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:\t")?.parse().ok())
}

pub(crate) fn parent(pid: i32) -> i32 {
    parent_of(pid).unwrap_or_else(|| panic!("{pid} has no parent"))
}

pub(crate) fn kill(pid: i32) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
}

/// Starts a containerd that the test may kill, restarts the plugin with it, and returns containerd's directory.
pub(crate) async fn own_containerd(env: &mut Env) -> PathBuf {
    if env.config["containerd"]["address"].is_null() {
        not_applicable("its containerd can't be chosen");
    }
    let dir = services().root.join(format!("containerd-{}", random_hex(3)));
    let socket = services::start_containerd(&dir);
    env.plugin.take().unwrap().shut_down().await;
    env.config["containerd"]["address"] = json!(socket);
    env.start_plugin().await;
    dir
}

pub(crate) fn kill_containerd(dir: &Path) {
    kill(fs::read_to_string(dir.join("pid")).unwrap().parse().unwrap());
}
