//! Compares how the kernel confines two processes. It shows whether the floor's task is as confined as runc's; both are
//! inspected from outside while they wait.

use std::{collections::BTreeMap, fs};

/// Returns the properties of a process's confinement that the kernel reports, by name. Two processes with equal results
/// are confined alike.
pub(super) fn read_confinement(pid: u32) -> BTreeMap<String, String> {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let mut found = BTreeMap::new();
    for line in read("status").lines() {
        let (name, value) = line.split_once(':').unwrap_or_default();
        let of_interest = ["Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters"].contains(&name);
        if of_interest || name.starts_with("Cap") {
            found.insert(name.to_owned(), value.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    found.insert("oom_score_adj".to_owned(), read("oom_score_adj").trim().to_owned());
    for kind in ["mnt", "pid", "ipc", "uts", "net", "cgroup", "user"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
        let own = of(&pid.to_string()) != of("self");
        found.insert(format!("namespace {kind}"), if own { "its own" } else { "the host's" }.to_owned());
    }
    // Mount point, file system type and flags. The mount's source is left out: it differs from task to task.
    for line in read("mountinfo").lines() {
        let (left, right) = line.split_once(" - ").unwrap_or_default();
        let fields: Vec<&str> = left.split(' ').collect();
        if let [_, _, _, _, point, options, ..] = fields[..] {
            let kind = right.split(' ').next().unwrap_or_default();
            let mut options: Vec<&str> = options.split(',').filter(|option| *option != "relatime").collect();
            options.sort_unstable();
            found.insert(format!("mount {point}"), format!("{kind} {}", options.join(",")));
        }
    }
    let mut devices: Vec<String> = fs::read_dir(format!("/proc/{pid}/root/dev"))
        .map(|entries| entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    devices.sort_unstable();
    found.insert("devices".to_owned(), devices.join(" "));
    // The limits of the cgroups that the process is in.
    for line in read("cgroup").lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let below = if controllers.is_empty() { String::new() } else { format!("{controllers}/") };
        for file in [
            "memory.limit_in_bytes",
            "memory.soft_limit_in_bytes",
            "cpu.shares",
            "cpu.cfs_quota_us",
            "pids.max",
            "devices.list",
            "memory.max",
            "memory.low",
            "cpu.weight",
            "cpu.max",
        ] {
            if let Ok(value) =
                fs::read_to_string(format!("/sys/fs/cgroup/{below}{}/{file}", path.trim_start_matches('/')))
            {
                // On cgroup version 1, runc 1.1 allows every container to use tun and tap devices. The floor does not
                // need to.
                let mut lines: Vec<&str> = value.lines().filter(|line| *line != "c 10:200 rwm").collect();
                lines.sort_unstable();
                found.insert(format!("limit {file}"), lines.join(", "));
            }
        }
    }
    found
}

/// Lists the differences as text, each with its name, the value of `one` and the value of `other`.
pub(super) fn differences(one: &BTreeMap<String, String>, other: &BTreeMap<String, String>) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = one.keys().chain(other.keys()).collect();
    let none = "nothing".to_owned();
    names
        .into_iter()
        .filter_map(|name| {
            let (left, right) = (one.get(name).unwrap_or(&none), other.get(name).unwrap_or(&none));
            (left != right).then(|| format!("{name}: {left} against {right}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_of_two_processes_are_named() {
        let own = read_confinement(std::process::id());
        assert!(own.contains_key("CapBnd") && own.contains_key("namespace pid"), "{own:?}");
        assert!(differences(&own, &own).is_empty());
        let mut other = own.clone();
        other.insert("Seccomp".to_owned(), "9".to_owned());
        let named = differences(&own, &other);
        assert!(named.len() == 1 && named[0].starts_with("Seccomp: ") && named[0].ends_with("against 9"), "{named:?}");
    }
}
