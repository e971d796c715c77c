//! The machine, and how quiet it was.

use std::{collections::BTreeMap, fs, io, time::Duration};

use serde::{Deserialize, Serialize};

use super::stamp::now;
use crate::{
    cgroup::{CgroupMode, Cgroups},
    process,
};

/// What figures are worth little without.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Of the kernel.
    pub kernel: String,
    /// Processors.
    pub cpus: usize,
    /// The first one's name.
    pub cpu: String,
    /// Of memory.
    pub memory_mib: u64,
    /// 1 (hybrid included) or 2.
    pub cgroup_version: u8,
    /// Mean number of busy processes in the last minute, before and after.
    pub load_before: f64,
    /// After.
    pub load_after: f64,
    /// A fixed piece of work, over and over between the measurements: its 90th percentile by its minimum.
    pub unevenness: f64,
    /// Was it too noisy for the figures to mean much?
    pub noisy: bool,
    /// Versions of the programs involved.
    pub programs: BTreeMap<String, String>,
}

/// Above this, medians move by themselves.
const UNEVEN: f64 = 1.6;

impl Machine {
    pub(super) fn look() -> Self {
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

    pub(super) fn judge(&mut self, mut work: Vec<u64>) {
        self.load_after = load();
        work.sort_unstable();
        #[allow(clippy::cast_precision_loss, reason = "microseconds")]
        if let (Some(least), Some(most)) = (work.first(), work.get(work.len() * 9 / 10)) {
            self.unevenness = *most as f64 / (*least).max(1) as f64;
        }
        #[allow(clippy::cast_precision_loss, reason = "a handful")]
        let busy = self.load_before > self.cpus as f64 * 0.75;
        self.noisy = busy || self.unevenness > UNEVEN;
    }
}

/// Versions of the programs that may be involved.
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

fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or_default()
}

/// A millisecond or so of work that does not depend on anything: how long it took.
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

/// Ticks of all processors spent on anything but waiting, and how many make a second.
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

/// Proportional set size of a process in KiB (proc_pid_smaps(5)); 0 when it is gone.
pub(super) fn pss(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("Pss:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or_default()
}

/// Processes whose command line holds `text`, with their names.
///
/// # Errors
/// When `/proc` can't be listed.
pub(super) fn processes(text: &str) -> io::Result<Vec<(u32, String)>> {
    let found = process::all()?
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
