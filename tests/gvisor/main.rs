//! What is different in a gVisor sandbox: exit codes with both of gVisor's runtime names, the confinement, deaths of a
//! sandbox's parts, groups, settings. `make test-gvisor` builds runsc and gVisor's shim and runs these tests. `make
//! test` leaves them out, since the build needs Go. A missing runsc is a failure here.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::too_many_arguments,
    clippy::zombie_processes,
    clippy::large_futures,
    missing_docs,
    reason = "tests; what they start ends with them"
)]

#[path = "../support/mod.rs"]
#[allow(dead_code, unused_imports, reason = "shared with the behaviour tests")]
mod support;

mod bounds;
mod deaths;
mod escape;
mod exit_codes;
mod first_process;
mod groups;
mod settings;

use support::Env;

/// Both names of gVisor's runtime.
pub const SPELLINGS: [&str; 2] = ["runsc", "io.containerd.runsc.v1"];

/// Returns the host's processes in a task's cgroup, with their command lines.
pub(crate) fn processes(env: &Env, alloc: &str) -> Vec<(i32, String)> {
    let groups = support::leak::cgroups(env).into_iter().filter(|path| path.to_str().unwrap().contains(alloc));
    let lists = groups.filter_map(|path| std::fs::read_to_string(path.join("cgroup.procs")).ok());
    let mut pids: Vec<i32> =
        lists.flat_map(|text| text.lines().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
    pids.sort_unstable();
    pids.dedup();
    let line =
        |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ");
    pids.into_iter().map(|pid| (pid, line(&pid))).collect()
}

pub fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}
