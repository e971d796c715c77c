//! The leak checker: what one environment has left in the kernel, in containerd and on disk.
//!
//! Every object that an environment makes has the environment's directory or an allocation's id in its name. Therefore
//! tests can run concurrently, and each sees only its own objects.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nomad_driver_shim::{cgroup::Cgroups, containerd::Client, netns::find_process_in};

use super::{Env, services};

/// Returns the default timeout of a leak check. The last teardown takes some milliseconds, or up to ten seconds on a
/// busy machine.
fn patience() -> Duration {
    super::patience() / 6
}

/// Returns the leaks while the plugin runs and has no tasks. Polls, since the last teardown may still be in progress.
pub(crate) async fn while_alive(env: &Env) -> Vec<String> {
    alive_within(env, patience()).await
}

/// Like [`while_alive`], with another timeout: a test that expects a leak need not wait long for the leak to go.
pub(crate) async fn alive_within(env: &Env, patience: Duration) -> Vec<String> {
    match env.plugin().pid() {
        Some(plugin) => beside(env, plugin, patience).await,
        None => vec!["the plugin is gone".to_owned()],
    }
}

/// Like [`alive_within`], for a plugin that the environment has not started itself.
pub(crate) async fn beside(env: &Env, plugin: u32, patience: Duration) -> Vec<String> {
    polled(patience, async || {
        let mut leaks = kernel(env);
        leaks.extend(on_disk(env));
        leaks.extend(in_containerd(env).await);
        leaks.extend(descriptors(env, plugin));
        let idle = entries(&env.dir.join("run/shims"));
        let pool = env.config["shim"]["pool"].as_u64().unwrap_or(2);
        if idle.len() as u64 > pool {
            leaks.push(format!("shims: {} for a pool of {pool}: {idle:?}", idle.len()));
        }
        // Each idle shim is one process. No other process of the environment may exist, apart from the plugin.
        let others = processes(env).into_iter().filter(|(pid, _)| *pid != plugin.to_string());
        // The log writer and its supervisor stay, for the next task.
        let others: Vec<_> = others.filter(|(_, line)| !line.contains(" log-writer ")).collect();
        if others.len() != idle.len() {
            leaks.push(format!("processes: {others:?} for {} idle shims", idle.len()));
        }
        leaks
    })
    .await
}

/// Returns what tasks have left in the kernel and on disk, for any driver.
pub(crate) async fn of_tasks(env: &Env) -> Vec<String> {
    polled(patience(), async || {
        let mut leaks = kernel(env);
        leaks.extend(on_disk(env));
        leaks
    })
    .await
}

/// Returns the leaks after the plugin has ended.
pub(crate) async fn afterwards(env: &Env) -> Vec<String> {
    afterwards_within(env, patience()).await
}

/// Like [`afterwards`], with another timeout.
pub(crate) async fn afterwards_within(env: &Env, patience: Duration) -> Vec<String> {
    polled(patience, async || {
        let mut leaks = kernel(env);
        leaks.extend(on_disk(env));
        leaks.extend(processes(env).into_iter().map(|(pid, line)| format!("process {pid}: {line}")));
        leaks.extend(entries(&env.dir.join("run/shims")).into_iter().map(|shim| format!("shim directory {shim}")));
        let sockets = entries(&env.dir).into_iter().filter(|name| name.starts_with("plugin-"));
        leaks.extend(sockets.map(|name| format!("plugin socket {name}")));
        let ahead = entries(&env.dir.join("state/ahead")).into_iter();
        leaks.extend(ahead.map(|part| format!("prepared root file systems: {part}")));
        leaks
    })
    .await
}

/// Removes mounts, cgroups with their processes, and shims, as far as possible. Files stay until the next test run.
pub(crate) async fn remove(env: &Env) {
    for group in cgroups(env) {
        let members = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        members.lines().for_each(kill);
    }
    // A program of the developer's own, such as a pager, may also have a path of the environment in its command line.
    let is_of_driver = |pid: &str, line: &str| {
        let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        cwd.starts_with(&env.dir) || line.contains(&env.namespace) || line.contains(" log-writer ")
    };
    processes(env).iter().filter(|(pid, line)| is_of_driver(pid, line)).for_each(|(pid, _)| kill(pid));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for point in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new) {
        if point.starts_with(&env.dir) {
            let _ = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH);
        }
    }
    // A cgroup can't be removed before its processes are gone.
    polled(patience(), async || {
        let mut groups = cgroups(env);
        groups.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
        groups.into_iter().filter_map(|path| fs::remove_dir(path).err()).map(|error| error.to_string()).collect()
    })
    .await;
}

fn kill(pid: &str) {
    let pid = nix::unistd::Pid::from_raw(pid.parse().unwrap());
    // The process may have ended in the meantime.
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
}

async fn polled(patience: Duration, look: impl AsyncFn() -> Vec<String>) -> Vec<String> {
    let deadline = Instant::now() + patience;
    loop {
        let leaks = look().await;
        if leaks.is_empty() || Instant::now() > deadline {
            return leaks;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Returns mounts, cgroups of every hierarchy, and processes in the cgroups.
fn kernel(env: &Env) -> Vec<String> {
    let dir = env.dir.to_str().unwrap();
    let mut leaks: Vec<String> = fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .filter(|line| line.contains(dir) && !env.own_mounts.iter().any(|point| is_mounted_at(line, point)))
        .map(|line| format!("mount: {line}"))
        .collect();
    leaks.extend(cgroups(env).into_iter().map(|path| format!("cgroup: {}", path.display())));
    for pid in pids() {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        if env.allocs.iter().any(|alloc| groups.contains(&alloc.id)) {
            leaks.push(format!("process {pid} in a task's cgroup"));
        }
    }
    for name in entries(Path::new("/run/netns")) {
        if env.allocs.iter().any(|alloc| name.contains(&alloc.id)) {
            leaks.push(format!("network namespace {name}"));
        }
    }
    leaks
}

/// Returns whether this line of mountinfo is the mount at exactly this point.
fn is_mounted_at(line: &str, point: &Path) -> bool {
    line.split(' ').nth(4).is_some_and(|found| Path::new(found) == point)
}

/// Returns the tasks' cgroups in every hierarchy.
pub(crate) fn cgroups(env: &Env) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for hierarchy in Cgroups::detect().unwrap().hierarchies() {
        find_dirs(hierarchy, &mut |path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if env.allocs.iter().any(|alloc| name.contains(&alloc.id)) || name.contains(&env.namespace) {
                found.push(path.to_owned());
            }
        });
    }
    found
}

/// Returns processes with the environment's directory in their command line or working directory: the plugin, its
/// shims, their runtimes.
fn processes(env: &Env) -> Vec<(String, String)> {
    let dir = env.dir.to_str().unwrap();
    pids()
        .into_iter()
        .filter_map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
            let socket = env.plugin.as_ref().and_then(nomad_driver_shim::host::Plugin::pid).map(|pid| pid.to_string());
            let ours = line.contains(dir) || cwd.starts_with(dir) || socket == Some(pid.clone());
            // A process that is being reaped has neither a command line nor a working directory.
            ours.then_some((pid, line))
        })
        .collect()
}

/// Returns records, bundles, writable layers, runtimes' states, and generated files of allocations.
fn on_disk(env: &Env) -> Vec<String> {
    let mut leaks = Vec::new();
    // Each run directory has its own subdirectory of the writable layers.
    let parts = entries(&env.dir.join("state/uppers")).into_iter().map(|part| format!("state/uppers/{part}"));
    let logs = entries(&env.dir.join("run/logs")).into_iter().filter(|name| !name.starts_with('.'));
    leaks.extend(logs.map(|name| format!("log of {name}")));
    for place in ["run/tasks", "run/bundles"].map(str::to_owned).into_iter().chain(parts) {
        leaks.extend(entries(&env.dir.join(&place)).into_iter().map(|name| format!("{place}/{name}")));
    }
    for runtime in entries(&env.dir.join("run/runtimes")) {
        let root = env.dir.join("run/runtimes").join(&runtime).join(&env.namespace);
        leaks.extend(entries(&root).into_iter().map(|id| format!("{runtime} state of {id}")));
    }
    leaks
}

/// Returns leases and snapshots that no image record names.
async fn in_containerd(env: &Env) -> Vec<String> {
    let records: Vec<serde_json::Value> = entries(&env.dir.join("state/images"))
        .into_iter()
        .filter(|name| name.ends_with(".json"))
        .map(|name| serde_json::from_slice(&fs::read(env.dir.join("state/images").join(name)).unwrap()).unwrap())
        .collect();
    let claimed = |key: &str, field: &str| records.iter().any(|record| record[field] == key);
    // Another driver's configuration may not name containerd's address.
    let address = env.config["containerd"]["address"].as_str();
    let address = address.map_or(services().containerd.as_path(), Path::new);
    let client = Client::new(address, &env.namespace, "overlayfs");
    let mut leaks = Vec::new();
    for lease in client.leases().await.unwrap_or_default() {
        if !claimed(&lease.0, "lease") {
            leaks.push(format!("lease {lease}"));
        }
    }
    for key in client.snapshot_keys().await.unwrap_or_default() {
        // Unpacked layers stay with their image. Every other snapshot must be the view of a record.
        if !key.starts_with("sha256:") && !claimed(&key, "view") {
            leaks.push(format!("snapshot {key}"));
        }
    }
    leaks
}

/// Returns wrong descriptors of the plugin: it may have no FIFO, directory or file of a task open, two descriptors for
/// each idle shim, and one for each network namespace of its pool, in which no process is and which has no name.
fn descriptors(env: &Env, pid: u32) -> Vec<String> {
    let dir = env.dir.to_str().unwrap();
    let idle = entries(&env.dir.join("run/shims")).len();
    let (mut pidfds, mut networks) = (0, 0);
    let mut leaks = Vec::new();
    let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else { return vec!["the plugin is gone".to_owned()] };
    for entry in open.flatten() {
        let target = fs::read_link(entry.path()).unwrap_or_default().to_string_lossy().into_owned();
        if target.contains("pidfd") {
            pidfds += 1;
        } else if target.starts_with("net:") {
            networks += 1;
            let is_named = || entries(Path::new("/run/netns")).iter().any(|name| is_same_file(&entry.path(), name));
            if is_named() || find_process_in(&entry.path()).unwrap().is_some() {
                leaks.push(format!("descriptor of the plugin: {target}, which is in use"));
            }
        } else if target.contains(dir) && !target.ends_with("run/lock") {
            leaks.push(format!("descriptor of the plugin: {target}"));
        }
    }
    let pool = env.config["shim"]["pool"].as_u64().unwrap_or(2);
    if networks > pool {
        leaks.push(format!("descriptors of the plugin: {networks} network namespaces, with a pool of {pool}"));
    }
    // Each shim has two pidfds: tokio watches each child by its own, and the driver by another. The log writer
    // supervisor, if there is one, has a third, which the driver waits on.
    let keeper = if env.dir.join("run/logs").exists() { 3 } else { 0 };
    if pidfds > 2 * idle + keeper {
        leaks.push(format!("descriptors of the plugin: {pidfds} pidfds for {idle} idle shims"));
    }
    leaks
}

/// Tells whether a descriptor refers to the network namespace of this name.
fn is_same_file(descriptor: &Path, name: &str) -> bool {
    let id = |path: &Path| fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    id(descriptor).is_some_and(|own| id(&Path::new("/run/netns").join(name)) == Some(own))
}

pub(crate) fn entries(path: &Path) -> Vec<String> {
    let names = fs::read_dir(path)
        .map(|entries| entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect());
    names.unwrap_or_default()
}

fn pids() -> Vec<String> {
    entries(Path::new("/proc")).into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())).collect()
}

fn find_dirs(path: &Path, visit: &mut impl FnMut(&Path)) {
    let Ok(found) = fs::read_dir(path) else { return };
    for entry in found.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        visit(&entry.path());
        find_dirs(&entry.path(), visit);
    }
}
