//! What a task uses, read from the kernel's own files: no call to a shim, no process, 0.1 ms.

use std::{collections::HashMap, fs, path::Path, time::Duration};

use super::{CgroupMode, CgroupPath, Cgroups, ROOT};

/// One look at a task's cgroup. None where this kernel does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time in nanoseconds since the group was made.
    pub cpu: CpuUsage,
    /// Memory in bytes.
    pub memory: MemoryUsage,
}

/// Of one processor, in percent: what was spent between two looks that lie `time` apart. 100 is a whole one.
#[allow(clippy::cast_precision_loss, reason = "percentages need no more than 52 bits")]
pub fn percent(before_ns: u64, after_ns: u64, time: Duration) -> f64 {
    let spent = after_ns.saturating_sub(before_ns);
    if time.is_zero() { 0.0 } else { spent as f64 / time.as_nanos() as f64 * 100.0 }
}

/// Processor time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuUsage {
    /// All of it, in nanoseconds.
    pub total_ns: u64,
    /// In user mode, in nanoseconds.
    pub user_ns: Option<u64>,
    /// In the kernel, in nanoseconds.
    pub system_ns: Option<u64>,
    /// How many periods it was held back in.
    pub throttled_periods: Option<u64>,
    /// How long it was held back, in nanoseconds.
    pub throttled_ns: Option<u64>,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Anonymous memory.
    pub rss: Option<u64>,
    /// Page cache.
    pub cache: Option<u64>,
    /// All that is charged to the group.
    pub usage: Option<u64>,
    /// The most that ever was.
    pub max_usage: Option<u64>,
    /// Swap.
    pub swap: Option<u64>,
    /// The kernel's own on its behalf.
    pub kernel: Option<u64>,
    /// The most that ever was of it.
    pub kernel_max: Option<u64>,
}

impl Cgroups {
    /// What a task uses right now; None when its group is gone.
    pub fn usage(&self, task: &CgroupPath) -> Option<Usage> {
        match self.mode {
            CgroupMode::V1 => {
                let (cpu, memory) = (self.controller("cpuacct"), Path::new(ROOT).join("memory"));
                version1(&task.below(&cpu), &task.below(&self.controller("cpu")), &task.below(&memory))
            }
            CgroupMode::V2 => version2(&task.below(Path::new(ROOT))),
        }
    }

    /// Where a v1 controller is mounted: alone, or with another as `cpu,cpuacct`.
    fn controller(&self, name: &str) -> std::path::PathBuf {
        let has = |point: &&std::path::PathBuf| {
            point.file_name().and_then(|file| file.to_str()).is_some_and(|file| file.split(',').any(|one| one == name))
        };
        self.hierarchies.iter().find(has).cloned().unwrap_or_else(|| Path::new(ROOT).join(name))
    }
}

/// cgroup-v1/cpuacct.rst, memory.rst: times in nanoseconds.
fn version1(cpuacct: &Path, cpu: &Path, memory: &Path) -> Option<Usage> {
    let throttling = table(&cpu.join("cpu.stat"));
    let stat = table(&memory.join("memory.stat"));
    let usage = number(&memory.join("memory.usage_in_bytes"));
    let with_swap = number(&memory.join("memory.memsw.usage_in_bytes"));
    Some(Usage {
        cpu: CpuUsage {
            total_ns: number(&cpuacct.join("cpuacct.usage"))?,
            user_ns: number(&cpuacct.join("cpuacct.usage_user")),
            system_ns: number(&cpuacct.join("cpuacct.usage_sys")),
            throttled_periods: throttling.get("nr_throttled").copied(),
            throttled_ns: throttling.get("throttled_time").copied(),
        },
        memory: MemoryUsage {
            rss: stat.get("total_rss").copied(),
            cache: stat.get("total_cache").copied(),
            usage,
            max_usage: number(&memory.join("memory.max_usage_in_bytes")),
            swap: with_swap.zip(usage).map(|(both, usage)| both.saturating_sub(usage)),
            kernel: number(&memory.join("memory.kmem.usage_in_bytes")),
            kernel_max: number(&memory.join("memory.kmem.max_usage_in_bytes")),
        },
    })
}

/// cgroup-v2.rst: times in microseconds.
fn version2(group: &Path) -> Option<Usage> {
    let cpu = table(&group.join("cpu.stat"));
    let stat = table(&group.join("memory.stat"));
    let nanos = |name: &str| cpu.get(name).map(|micros| micros.saturating_mul(1000));
    // `kernel` is younger (5.18) than its largest parts.
    let parts = stat.get("kernel_stack").zip(stat.get("slab")).map(|(stack, slab)| stack + slab);
    Some(Usage {
        cpu: CpuUsage {
            total_ns: nanos("usage_usec")?,
            user_ns: nanos("user_usec"),
            system_ns: nanos("system_usec"),
            throttled_periods: cpu.get("nr_throttled").copied(),
            throttled_ns: nanos("throttled_usec"),
        },
        memory: MemoryUsage {
            rss: stat.get("anon").copied(),
            cache: stat.get("file").copied(),
            usage: number(&group.join("memory.current")),
            max_usage: number(&group.join("memory.peak")),
            swap: number(&group.join("memory.swap.current")),
            kernel: stat.get("kernel").copied().or(parts),
            kernel_max: None,
        },
    })
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// `name value` lines.
fn table(path: &Path) -> HashMap<String, u64> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
        let group = tempfile::tempdir().expect("a temporary directory");
        for (name, text) in files {
            fs::write(group.path().join(name), text).expect("written");
        }
        group
    }

    #[test]
    fn version_2_counts_microseconds() {
        let group = group(&[
            ("cpu.stat", "usage_usec 3000\nuser_usec 2000\nsystem_usec 1000\nnr_throttled 4\nthrottled_usec 7\n"),
            ("memory.stat", "anon 10\nfile 20\nkernel_stack 1\nslab 2\n"),
            ("memory.current", "33\n"),
            ("memory.swap.current", "0\n"),
        ]);
        let usage = version2(group.path()).expect("a group");
        assert_eq!(
            (usage.cpu.total_ns, usage.cpu.user_ns, usage.cpu.throttled_ns),
            (3_000_000, Some(2_000_000), Some(7000))
        );
        let memory = MemoryUsage {
            rss: Some(10),
            cache: Some(20),
            usage: Some(33),
            swap: Some(0),
            kernel: Some(3),
            ..Default::default()
        };
        assert_eq!(usage.memory, memory);
    }

    #[test]
    fn version_1_counts_nanoseconds() {
        let group = group(&[
            ("cpuacct.usage", "3000\n"),
            ("cpuacct.usage_user", "2000\n"),
            ("cpuacct.usage_sys", "1000\n"),
            ("cpu.stat", "nr_periods 0\nnr_throttled 4\nthrottled_time 7\n"),
            ("memory.stat", "rss 1\ntotal_rss 10\ntotal_cache 20\n"),
            ("memory.usage_in_bytes", "33\n"),
            ("memory.memsw.usage_in_bytes", "40\n"),
            ("memory.max_usage_in_bytes", "50\n"),
        ]);
        let usage = version1(group.path(), group.path(), group.path()).expect("a group");
        assert_eq!((usage.cpu.total_ns, usage.cpu.system_ns, usage.cpu.throttled_periods), (3000, Some(1000), Some(4)));
        assert_eq!((usage.memory.rss, usage.memory.swap, usage.memory.max_usage), (Some(10), Some(7), Some(50)));
        assert_eq!(usage.memory.kernel, None);
    }

    #[test]
    fn a_group_that_is_gone_has_no_usage() {
        let nowhere = Path::new("/nonexistent");
        assert_eq!((version1(nowhere, nowhere, nowhere), version2(nowhere)), (None, None));
    }
}
