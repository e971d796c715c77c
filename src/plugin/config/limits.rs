//! Reads a job's options for namespaces, limits, kernel parameters, devices, hosts and logs, and checks them against
//! each other and against what the operator allows.

use std::collections::BTreeMap;

use super::{ceilings, faults::Faults, group_network::GroupNetwork};
use crate::{
    gvisor,
    logs::{LogOptions, LogPolicy},
    plugin::decode::Values,
    rootfs::{
        MemoryMax,
        ceilings::Ceilings,
        limits::{Namespace, Namespaces, Ulimit, check_annotations, check_sysctl},
        network::ExtraHost,
        tmpfs_size::TmpfsSize,
    },
    size,
    task::{JobLimits, SecuritySettings, matches_any},
};

/// The kernel's bounds on cpu.cfs_period_us, in microseconds (Documentation/scheduler/sched-bwc.rst).
const CFS_PERIOD_RANGE: std::ops::RangeInclusive<i64> = 1_000..=1_000_000;
/// The kernel's default of cpu.cfs_period_us, in microseconds.
const DEFAULT_CFS_PERIOD: i64 = 100_000;

/// The smallest size of a log file, in bytes: a smaller file would not hold an ordinary line.
const LOG_SIZE_MIN: u64 = 4 << 10;
/// The largest number of log files of one stream.
const LOG_FILES_MAX: u32 = 10_000;

pub(super) fn namespaces(values: &Values, security: &SecuritySettings, faults: &mut Faults) -> Namespaces {
    let mut mode = |option: &str, others: &[&str]| {
        let text = values.non_empty_text(option)?;
        let host = text.eq_ignore_ascii_case("host");
        if !host && !others.contains(&text) {
            let known: Vec<String> = ["host"].iter().chain(others).map(|known| format!("{known:?}")).collect();
            faults.push(format!("{option} = {text:?} is invalid; the values are {}", known.join(" and ")));
        } else if host && option != "userns_mode" && !security.allow_host_namespaces {
            faults.push(format!(
                "{option} = {text:?} is not allowed on this node (plugin option security {{ allow_host_namespaces }})"
            ));
        }
        Some(if host { Namespace::Host } else { Namespace::Private })
    };
    // `host` is the only mode so far, so the option is checked but changes nothing.
    mode("userns_mode", &[]);
    let namespaces = Namespaces {
        pid: mode("pid_mode", &["private"]).unwrap_or_default(),
        ipc: mode("ipc_mode", &["private"]).unwrap_or_default(),
        uts: mode("uts_mode", &["private"]).unwrap_or_default(),
        cgroup: mode("cgroupns", &["private"]),
    };
    if namespaces.uts == Namespace::Host && values.non_empty_text("hostname").is_some() {
        faults.push("hostname and uts_mode = \"host\" exclude each other; remove one of them".to_owned());
    }
    if namespaces.ipc == Namespace::Host && values.non_empty_text("shm_size").is_some() {
        faults.push("shm_size and ipc_mode = \"host\" exclude each other; remove one of them".to_owned());
    }
    namespaces
}

pub(super) fn sysctls(
    values: &Values,
    (namespaces, group): (Namespaces, GroupNetwork),
    security: &SecuritySettings,
    faults: &mut Faults,
) -> BTreeMap<String, String> {
    let host = values.flag("host_network").unwrap_or(false) && group == GroupNetwork::None;
    let network = if host { Namespace::Host } else { Namespace::Private };
    // sysctl(8) accepts names with slashes as well as with dots.
    let named: BTreeMap<String, String> =
        values.map("sysctl").into_iter().map(|(name, value)| (name.replace('/', "."), value)).collect();
    for name in named.keys() {
        faults.record_err("sysctl", check_sysctl(name, namespaces, network));
        if !security.allow_sysctls.as_ref().is_none_or(|patterns| matches_any(patterns, name)) {
            faults.push(format!(
                "sysctl: {name:?} is not allowed on this node (plugin option security {{ allow_sysctls }})"
            ));
        }
    }
    named
}

pub(super) fn ulimits(values: &Values, ceilings: &Ceilings, faults: &mut Faults) -> Vec<Ulimit> {
    let map = values.map("ulimit");
    let mut limits: Vec<Ulimit> =
        map.iter().filter_map(|(name, value)| faults.record_err("ulimit", Ulimit::parse(name, value))).collect();
    for limit in &limits {
        faults.record_err("ulimit", ceilings.check_ulimit(limit));
    }
    match values.number("file_limit") {
        None | Some(0) => {}
        Some(_) if map.contains_key("nofile") => {
            faults.push("file_limit and ulimit { nofile } exclude each other; remove one of them".to_owned());
        }
        Some(limit) => match u64::try_from(limit) {
            Ok(limit) => {
                faults.record_err("file_limit", ceilings.check_ulimit(&Ulimit::files(limit)));
                limits.push(Ulimit::files(limit));
            }
            Err(_) => faults.push(format!("file_limit = {limit} is negative")),
        },
    }
    limits
}

pub(super) fn job_limits(values: &Values, pids_ceiling: Option<i64>, faults: &mut Faults) -> JobLimits {
    let cpuset = |option: &str, faults: &mut Faults| {
        let text = values.non_empty_text(option).unwrap_or_default().trim();
        if !is_cpu_list(text) {
            faults.push(format!("{option} = {text:?} is not a list such as 0-3,5"));
        }
        text.to_owned()
    };
    let (cpuset_cpus, cpuset_mems) = (cpuset("cpuset_cpus", faults), cpuset("cpuset_mems", faults));
    let period = match values.number("cpu_cfs_period") {
        None | Some(0) => DEFAULT_CFS_PERIOD,
        Some(period) if CFS_PERIOD_RANGE.contains(&period) => period,
        Some(period) => {
            faults.push(format!(
                "cpu_cfs_period = {period} is not between {} and {} microseconds",
                CFS_PERIOD_RANGE.start(),
                CFS_PERIOD_RANGE.end()
            ));
            DEFAULT_CFS_PERIOD
        }
    };
    let memory_hard_limit = match values.number("memory_hard_limit") {
        None | Some(0) => None,
        Some(limit) => {
            let bytes = u64::try_from(limit).ok().and_then(|limit| limit.checked_mul(1 << 20));
            faults.record_err("memory_hard_limit", bytes.ok_or(format!("{limit} is not a number of MiB")))
        }
    };
    JobLimits {
        pids: ceilings::job_pids_limit(values, pids_ceiling, faults),
        cpuset_cpus,
        cpuset_mems,
        cfs_period: values.flag("cpu_hard_limit").unwrap_or(false).then_some(period.unsigned_abs()),
        memory_max: memory_hard_limit.map_or(MemoryMax::Unset, MemoryMax::Bytes),
    }
}

/// Says whether `text` is a list in the format of cpuset(7). An empty text is an empty list.
fn is_cpu_list(text: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.len() < 6 && text.bytes().all(|byte| byte.is_ascii_digit());
    text.is_empty()
        || text.split(',').map(str::trim).all(|part| {
            // `0-6:2/4` means the first two of each group of four.
            let (range, group) = part.split_once(':').map_or((part, None), |(range, group)| (range, Some(group)));
            let is_group = group.is_none_or(|group| {
                group.split_once('/').is_some_and(|(used, size)| is_number(used) && is_number(size))
            });
            is_group
                && match range.split_once('-') {
                    Some((from, to)) => {
                        is_number(from) && is_number(to) && from.parse::<u32>().ok() <= to.parse::<u32>().ok()
                    }
                    None => group.is_none() && is_number(range),
                }
        })
}

pub(super) fn shm_size(values: &Values, ceilings: &Ceilings, faults: &mut Faults) -> Option<u64> {
    let Some(text) = values.non_empty_text("shm_size") else { return ceilings.shm_size() };
    let size = faults.record_err("shm_size", size::parse(text))?;
    faults.record_err("shm_size", ceilings.check_memory(text, TmpfsSize::Count(size)));
    if size < 1024 {
        faults.push(format!("shm_size = {text:?} is less than a kibibyte"));
    }
    Some(size)
}

pub(super) fn oom_score(values: &Values, faults: &mut Faults) -> i32 {
    match values.number("oom_score_adj") {
        None => 0,
        Some(score) => match i32::try_from(score) {
            Ok(score) if (0..=1000).contains(&score) => score,
            _ => {
                faults.push(format!("oom_score_adj = {score} is not between 0 and 1000"));
                0
            }
        },
    }
}

pub(super) fn annotations(values: &Values, faults: &mut Faults) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for option in ["labels", "annotations"] {
        let map = values.map(option);
        faults.record_err(option, check_annotations(&map));
        all.extend(map);
    }
    all
}

pub(super) fn extra_hosts(values: &Values, faults: &mut Faults) -> Vec<ExtraHost> {
    let lines = values.list("extra_hosts").unwrap_or_default();
    lines.iter().filter_map(|line| faults.record_err("extra_hosts", ExtraHost::parse(line))).collect()
}

pub(super) fn devices(values: &Values, security: &SecuritySettings, faults: &mut Faults) -> Vec<String> {
    let devices = values.list("devices").unwrap_or_default();
    for device in devices {
        if !device.starts_with('/') || device.split('/').any(|part| part == "..") {
            faults.push(format!("devices: {device:?} is not an absolute path without \"..\""));
        } else if !security.allows_device(device) {
            faults.push(format!(
                "devices: {device:?} is not allowed on this node (plugin option security {{ allow_devices }})"
            ));
        }
    }
    devices.to_vec()
}

/// Refuses options that gVisor silently ignores or does not support.
pub(super) fn check_gvisor_support(
    runtime: &str,
    namespaces: Namespaces,
    sysctls: &BTreeMap<String, String>,
    faults: &mut Faults,
) {
    let refused_modes = [("pid_mode", namespaces.pid), ("ipc_mode", namespaces.ipc), ("uts_mode", namespaces.uts)];
    for (option, _) in refused_modes.iter().filter(|(_, mode)| *mode == Namespace::Host) {
        faults.push(format!(
            "{option} = \"host\" is not possible with runtime {runtime:?}: a gVisor sandbox has its own namespaces; remove it, or use a runtime without a sandbox"
        ));
    }
    for name in sysctls.keys().filter(|name| !gvisor::SUPPORTED_SYSCTLS.contains(&name.as_str())) {
        faults.push(format!(
            "sysctl: {name:?} has no effect with runtime {runtime:?}: gVisor's kernel does not have this parameter; remove it, or use a runtime without a sandbox"
        ));
    }
}

/// Reads the job's log options. Nomad does not pass its `logs` block to drivers, so these options take its place.
pub(super) fn log_options(values: &Values, faults: &mut Faults) -> LogOptions {
    let mut log = LogOptions::default();
    if let Some(text) = values.non_empty_text("log_max_size") {
        match size::parse(text) {
            Ok(size) if size >= LOG_SIZE_MIN => log.max_size = size,
            Ok(_) => faults.push(format!("log_max_size = {text:?} is less than 4k")),
            Err(error) => faults.push(format!("log_max_size: {error}")),
        }
    }
    if let Some(count) = values.number("log_max_files") {
        match u32::try_from(count) {
            Ok(count @ 1..=LOG_FILES_MAX) => log.max_files = count,
            _ => faults.push(format!("log_max_files = {count} is not between 1 and {LOG_FILES_MAX}")),
        }
    }
    match values.non_empty_text("log_policy") {
        None | Some("block") => {}
        Some("drop") => log.policy = LogPolicy::Drop,
        Some(other) => faults.push(format!("log_policy = {other:?} is neither block nor drop")),
    }
    log
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_have_the_kernels_format() {
        for good in ["", "0", "0-3", "0-3,5", "1, 2,7-9", "0-6:2/4"] {
            assert!(is_cpu_list(good), "{good}");
        }
        for bad in ["-", "3-1", "a", "1,", "1-2-3", "0 1", "9999999", "0:1/2", "0-3:x"] {
            assert!(!is_cpu_list(bad), "{bad}");
        }
    }

    #[test]
    fn patterns_end_in_a_star() {
        let patterns = ["net.ipv4.*".to_owned(), "/dev/fuse".to_owned()];
        assert!(matches_any(&patterns, "net.ipv4.ip_forward") && matches_any(&patterns, "/dev/fuse"));
        assert!(!matches_any(&patterns, "/dev/fuse2") && !matches_any(&patterns, "net.ipv6.x"));
    }
}
