//! Describes the host, and measures how quiet it was during the run.

use std::{collections::BTreeMap, fs, io, time::Duration};

use serde::{Deserialize, Serialize};

use super::stamp::now;
use crate::{
    cgroup::{CgroupMode, Cgroups},
    process,
};

/// The host that figures were measured on. Figures mean little without it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The kernel's release.
    pub kernel: String,
    /// The number of processors.
    pub cpus: usize,
    /// The first processor's model name.
    pub cpu: String,
    /// The size of the memory in MiB.
    pub memory_mib: u64,
    /// The version of cgroups: 1 (also on hybrid hosts) or 2.
    pub cgroup_version: u8,
    /// The load average of the last minute before the run.
    pub load_before: f64,
    /// The load average of the last minute after the run.
    pub load_after: f64,
    /// How evenly the host worked: a fixed piece of work is timed again and again between the measurements, and this is
    /// the 90th percentile of its time divided by the minimum.
    pub unevenness: f64,
    /// Whether the host was too busy for the figures to mean much.
    pub noisy: bool,
    /// The versions of the programs that may be involved, by name.
    pub programs: BTreeMap<String, String>,
}

/// The largest unevenness of a quiet host. Above it, medians change from run to run.
const UNEVENNESS_MAX: f64 = 1.6;

impl Machine {
    /// Describes this host, before the run.
    pub(super) fn describe() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let v2 = Cgroups::detect().is_ok_and(|cgroups| cgroups.mode() == CgroupMode::V2);
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            memory_mib: memory.split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() >> 10,
            cgroup_version: if v2 { 2 } else { 1 },
            load_before: load(),
            load_after: 0.0,
            unevenness: 0.0,
            noisy: false,
            programs: BTreeMap::new(),
        }
    }

    /// Decides whether the host was noisy, by the times of the fixed work and by the load.
    pub(super) fn rate_noise(&mut self, mut work: Vec<u64>) {
        self.load_after = load();
        work.sort_unstable();
        #[allow(clippy::cast_precision_loss, reason = "microseconds")]
        if let (Some(least), Some(most)) = (work.first(), work.get(work.len() * 9 / 10)) {
            self.unevenness = *most as f64 / (*least).max(1) as f64;
        }
        #[allow(clippy::cast_precision_loss, reason = "a small number")]
        let busy = self.load_before > self.cpus as f64 * 0.75;
        self.noisy = busy || self.unevenness > UNEVENNESS_MAX;
    }
}

/// Returns the versions of the programs that may be involved, by name.
pub(super) async fn programs() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for (name, flag) in [
        ("containerd", "--version"),
        ("containerd-shim-runc-v2", "-v"),
        ("runc", "--version"),
        ("crun", "--version"),
        ("docker", "--version"),
        ("podman", "--version"),
    ] {
        let output = tokio::process::Command::new(name).arg(flag).kill_on_drop(true).output();
        if let Ok(Ok(output)) = tokio::time::timeout(Duration::from_secs(10), output).await {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let line = text.lines().find(|line| line.chars().any(|c| c.is_ascii_digit())).unwrap_or_default();
            found.insert(name.to_owned(), line.trim().to_owned());
        }
    }
    found
}

/// Returns the load average of the last minute.
fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or_default()
}

/// Does about a millisecond of work that depends on nothing but the processor, and returns the nanoseconds it took.
pub(super) fn fixed_work() -> u64 {
    use sha2::Digest as _;
    let began = now();
    let mut block = [7_u8; 4096];
    for _ in 0..64 {
        let hash = sha2::Sha256::digest(block);
        block[..32].copy_from_slice(&hash);
    }
    std::hint::black_box(block);
    now() - began
}

/// Returns the clock ticks that all processors together have spent on anything but idling.
pub(super) fn cpu_ticks() -> u64 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let numbers: Vec<u64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|word| word.parse().ok())
        .collect();
    // user, nice, system, (idle, iowait,) irq, softirq
    [0, 1, 2, 5, 6].iter().filter_map(|n| numbers.get(*n)).sum()
}

/// Returns the proportional set size of a process in KiB (proc_pid_smaps(5)); 0 if the process has ended.
pub(super) fn pss_kib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("Pss:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or_default()
}

/// Returns the pids and names of processes whose command line contains `text`.
///
/// # Errors
/// Fails when `/proc` can't be listed.
pub(super) fn processes(text: &str) -> io::Result<Vec<(u32, String)>> {
    let found = process::all_pids()?
        .into_iter()
        .filter_map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
            line.contains(text).then_some((pid, name))
        })
        .collect();
    Ok(found)
}
