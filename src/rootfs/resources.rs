//! Translates Nomad's resources to the OCI spec's limits.

use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxDeviceCgroup, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResources, LinuxResourcesBuilder,
};

use super::RootfsError;

/// The resources that Nomad assigns to a task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    /// The task's CPU in MHz, used as its weight (cpu.shares); 0 if it is unknown.
    pub cpu_shares: u64,
    /// The job's `memory` in bytes; 0 if it is unknown.
    pub memory: u64,
    /// The job's `memory_max`.
    pub memory_max: MemoryMax,
    /// Reserved cores as a list such as `0-1,4`; empty for a task in the share pool.
    pub cpuset_cpus: String,
    /// Memory nodes as such a list; empty for all.
    pub cpuset_mems: String,
    /// The limit on processor time.
    pub cpu_quota: Option<CpuQuota>,
    /// The limit on the number of processes and threads.
    pub pids: Option<i64>,
}

/// A limit on processor time in each period (cpu.cfs_quota_us and cpu.cfs_period_us; cpu.max on cgroup version 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuQuota {
    /// The processor time in each period, in microseconds, summed over all cores.
    pub quota: i64,
    /// The length of a period in microseconds.
    pub period: u64,
}

impl CpuQuota {
    /// Returns the quota for a share of all cores of the node, with this period in microseconds. It is at least 1 ms,
    /// the smallest quota that the kernel accepts.
    pub fn of(share: f64, cores: u32, period: u64) -> Self {
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            reason = "microseconds, at most a second"
        )]
        let quota = (share.max(0.0) * f64::from(cores) * period as f64).round() as i64;
        Self { quota: quota.max(1000), period }
    }
}

/// The job's `memory_max` (in Nomad, 0 means unset and −1 no limit).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MemoryMax {
    /// The job has no `memory_max`; `memory` is the limit.
    #[default]
    Unset,
    /// There is no limit.
    Unlimited,
    /// The limit in bytes.
    Bytes(u64),
}

/// The kernel's bounds on cpu.shares (Documentation/admin-guide/cgroup-v1, `MIN_SHARES`, `MAX_SHARES`).
const SHARES: std::ops::RangeInclusive<u64> = 2..=262_144;

/// Builds the limits. `memory` is the hard limit, unless `memory_max` is set; then it is the reservation. If the kernel
/// can count swap, memory and swap together have the same limit, so the task gets no swap beyond it.
///
/// # Errors
/// Fails when the spec's builders reject a value.
pub(crate) fn build(
    resources: &Resources,
    counts_swap: bool,
    devices: Vec<LinuxDeviceCgroup>,
) -> Result<LinuxResources, RootfsError> {
    let (limit, reservation) = match (resources.memory_max, resources.memory) {
        (MemoryMax::Unset, 0) => (None, None),
        (MemoryMax::Unset, memory) => (Some(memory), None),
        (MemoryMax::Bytes(max), memory) => (Some(max), Some(memory).filter(|&memory| memory > 0)),
        (MemoryMax::Unlimited, memory) => (None, Some(memory).filter(|&memory| memory > 0)),
    };
    let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    let mut memory = LinuxMemoryBuilder::default();
    if let Some(limit) = limit {
        memory = memory.limit(signed(limit));
        if counts_swap {
            memory = memory.swap(signed(limit));
        }
    }
    if let Some(reservation) = reservation {
        memory = memory.reservation(signed(reservation));
    }
    let mut cpu = LinuxCpuBuilder::default();
    if resources.cpu_shares > 0 {
        cpu = cpu.shares(resources.cpu_shares.clamp(*SHARES.start(), *SHARES.end()));
    }
    if !resources.cpuset_cpus.is_empty() {
        cpu = cpu.cpus(resources.cpuset_cpus.clone());
    }
    if !resources.cpuset_mems.is_empty() {
        cpu = cpu.mems(resources.cpuset_mems.clone());
    }
    if let Some(CpuQuota { quota, period }) = resources.cpu_quota {
        cpu = cpu.quota(quota).period(period);
    }
    let mut all = LinuxResourcesBuilder::default().devices(devices).memory(memory.build()?).cpu(cpu.build()?);
    if let Some(limit) = resources.pids {
        all = all.pids(LinuxPidsBuilder::default().limit(limit).build()?);
    }
    Ok(all.build()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_follows_nomads_rules() {
        const MB: u64 = 1 << 20;
        let limits = |memory, memory_max| {
            let resources = Resources { memory, memory_max, ..Default::default() };
            let built = build(&resources, true, Vec::new()).expect("builds");
            let memory = built.memory().expect("set");
            (memory.limit(), memory.reservation(), memory.swap())
        };
        assert_eq!(limits(64 * MB, MemoryMax::Unset), (Some(67_108_864), None, Some(67_108_864)));
        assert_eq!(
            limits(64 * MB, MemoryMax::Bytes(128 * MB)),
            (Some(134_217_728), Some(67_108_864), Some(134_217_728))
        );
        assert_eq!(limits(64 * MB, MemoryMax::Unlimited), (None, Some(67_108_864), None));
        assert_eq!(limits(0, MemoryMax::Unset), (None, None, None));
    }

    #[test]
    fn quotas_are_shares_of_the_node() {
        assert_eq!(CpuQuota::of(0.25, 4, 100_000), CpuQuota { quota: 100_000, period: 100_000 });
        assert_eq!(CpuQuota::of(0.000_1, 2, 100_000).quota, 1000);
        assert_eq!(CpuQuota::of(f64::NAN, 2, 100_000).quota, 1000);
    }

    #[test]
    fn shares_stay_within_the_kernels_bounds() {
        for (mhz, shares) in [(1, Some(2)), (500, Some(500)), (1_000_000, Some(262_144)), (0, None)] {
            let resources = Resources { cpu_shares: mhz, ..Default::default() };
            let cpu = build(&resources, false, Vec::new()).expect("builds").cpu().clone().expect("set");
            assert_eq!(cpu.shares(), shares);
        }
    }
}
