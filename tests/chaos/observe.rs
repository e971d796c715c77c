//! What the kernel shows of a node: containers, by the mark in their environment, and the driver's processes. The
//! driver's own records are not read.

use std::{fs, path::Path};

use nomad_driver_shim::process::ProcessId;

use crate::{
    model::{AttemptId, Init},
    step::{Call, Target},
};

/// The variable that marks all processes of a task: `<namespace>/<task>/<attempt>`.
pub(crate) const MARK: &str = "CHAOS_TASK";

/// A process that a fault may strike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Victim {
    pub pid: u32,
    /// The attempts whose first process is a child of this process.
    pub holds: Vec<AttemptId>,
}

/// The first processes of a node's live containers. Each process is checked a second time, since one of two containers
/// of a task may have ended while the list was read.
pub(crate) fn inits(namespace: &str) -> Vec<Init> {
    let found: Vec<(ProcessId, Init)> = pids().into_iter().filter_map(|pid| init(pid, namespace)).collect();
    let still = |(process, _): &&(ProcessId, Init)| process.is_alive() && !is_zombie(process.pid);
    found.iter().filter(still).map(|(_, init)| *init).collect()
}

fn init(pid: u32, namespace: &str) -> Option<(ProcessId, Init)> {
    let attempt = marked(pid, namespace)?;
    let process = ProcessId::of(pid).ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    let mut numbers = numbers.split_whitespace();
    // The last number is the process id in the innermost namespace, the first one is the host's.
    let is_first = numbers.clone().count() > 1 && numbers.next_back() == Some("1");
    (is_first && !is_zombie(pid)).then_some((process, Init { pid, attempt }))
}

fn is_zombie(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().find_map(|line| line.strip_prefix("State:")).is_none_or(|state| state.trim().starts_with(['Z', 'X']))
}

/// The ids of all processes of a node's tasks.
pub(crate) fn marked_processes(namespace: &str) -> Vec<u32> {
    pids().into_iter().filter(|pid| marked(*pid, namespace).is_some()).collect()
}

/// The attempt that a process belongs to, according to its environment.
fn marked(pid: u32, namespace: &str) -> Option<AttemptId> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    environment.split(|byte| *byte == 0).find_map(|entry| parse_mark(std::str::from_utf8(entry).ok()?, namespace))
}

fn parse_mark(entry: &str, namespace: &str) -> Option<AttemptId> {
    let value = entry.strip_prefix(MARK)?.strip_prefix('=')?;
    let (task, attempt) = value.strip_prefix(namespace)?.strip_prefix('/')?.split_once('/')?;
    Some((task.parse().ok()?, attempt.parse().ok()?))
}

/// The processes of one kind, in the order of their ids. `containerd` is the process id of the node's own containerd.
pub(crate) fn victims(target: Target, dir: &Path, namespace: &str, containerd: u32) -> Vec<Victim> {
    match target {
        Target::Containerd => vec![Victim { pid: containerd, holds: Vec::new() }],
        Target::Init => {
            inits(namespace).into_iter().map(|init| Victim { pid: init.pid, holds: vec![init.attempt] }).collect()
        }
        _ => {
            let inits = inits(namespace);
            let of = |pid| {
                let children = inits.iter().filter(|init| parent(init.pid) == Some(pid));
                Victim { pid, holds: children.map(|init| init.attempt).collect() }
            };
            pids().into_iter().filter(|pid| kind(&words(*pid), dir) == Some(target)).map(of).collect()
        }
    }
}

/// The id of the process that was started last (proc_pid_loadavg(5): the fifth field of /proc/loadavg).
pub(crate) fn last_pid() -> u32 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().nth(4).and_then(|number| number.parse().ok()).unwrap_or_default()
}

/// Finds an OCI runtime that is in the middle of a call for a container of this node, among the processes whose ids are
/// `first` or higher. Only these are searched: a call takes milliseconds, so the search must be as fast.
pub(crate) fn runtime_in(call: Call, dir: &Path, first: u32) -> Option<u32> {
    let last = last_pid();
    let recent: Vec<u32> = if first <= last { (first..=last).collect() } else { pids() };
    recent.into_iter().find(|pid| kind(&words(*pid), dir) == Some(Target::Runtime) && calls(*pid, call))
}

/// Is this process a runtime in the middle of this call?
pub(crate) fn calls(pid: u32, call: Call) -> bool {
    words(pid).iter().any(|word| word == call.word())
}

/// All processes whose command line contains this directory, whatever their state.
pub(crate) fn all_of(dir: &Path) -> Vec<u32> {
    let dir = dir.to_string_lossy();
    pids().into_iter().filter(|pid| words(*pid).iter().any(|word| word.contains(&*dir))).collect()
}

/// The kind of a process, according to its command line, if it belongs to the node with this directory.
fn kind(words: &[String], dir: &Path) -> Option<Target> {
    let dir = dir.to_str()?;
    let has = |word: &str| words.iter().any(|known| known == word);
    let names = |part: &str| words.iter().any(|word| word.contains(part));
    if !names(dir) {
        return None;
    }
    if has("log-writer") {
        return Some(if has("--writer") { Target::LogWriter } else { Target::Keeper });
    }
    if has("-namespace") {
        return Some(Target::Shim);
    }
    if has("--root") && names(&format!("{dir}/run/")) {
        return Some(Target::Runtime);
    }
    (words.first().is_some_and(|program| program.starts_with(dir)) && has("--name")).then_some(Target::Plugin)
}

fn words(pid: u32) -> Vec<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// The parent of a process.
pub(crate) fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

fn pids() -> Vec<u32> {
    let mut pids = nomad_driver_shim::process::all_pids().unwrap();
    pids.sort_unstable();
    pids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_names_a_task_of_this_node_only() {
        assert_eq!(parse_mark("CHAOS_TASK=test-1/4/2", "test-1"), Some((4, 2)));
        assert_eq!(parse_mark("CHAOS_TASK=test-12/4/2", "test-1"), None);
        assert_eq!(parse_mark("CHAOS_TASKS=test-1/4/2", "test-1"), None);
        assert_eq!(parse_mark("PATH=/bin", "test-1"), None);
    }

    #[test]
    fn processes_are_known_by_their_command_lines() {
        let of = |line: &str| kind(&line.split(' ').map(str::to_owned).collect::<Vec<_>>(), Path::new("/d"));
        assert_eq!(of("/d/bin/nomad-driver-shim --name shim"), Some(Target::Plugin));
        assert_eq!(
            of("/usr/bin/containerd-shim-runc-v2 -namespace x -address /d/run/shims/1/sock"),
            Some(Target::Shim)
        );
        assert_eq!(of("crun --root /d/run/runtimes/crun/x delete c"), Some(Target::Runtime));
        assert_eq!(of("/d/bin/nomad-driver-shim log-writer /d/run/logs"), Some(Target::Keeper));
        assert_eq!(of("/d/bin/nomad-driver-shim log-writer --writer /d/run/logs"), Some(Target::LogWriter));
        assert_eq!(of("containerd --config /e/config.toml"), None);
        assert_eq!(of("crun --root /e/run/runtimes/crun/x delete c"), None);
    }
}
