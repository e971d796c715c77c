//! What every container gets: mounts, masked paths, device rules. The lists are containerd's (`pkg/oci/spec.go`,
//! `pkg/oci/mounts.go`) and moby's (`daemon/pkg/oci/defaults.go`), which agree.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, Mount, MountBuilder,
};

use super::{RootfsError, tmpfs::SHM_SIZE};
use crate::ids::Flavor;

/// Proc and sys entries that tell or change something about the host, and are the same on every host: moby's list
/// (`daemon/pkg/oci/defaults.go`, since moby/moby#49560 of 2025) and containerd's (since containerd/containerd#14090 of
/// September 2026). `/proc/interrupts` counts thermal events of the host's processors, which tell what others compute
/// (moby's advisory GHSA-6fw5-f8r9-fgfm).
const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/proc/scsi",
];

/// Where the kernel shows processors.
const PROCESSORS: &str = "/sys/devices/system/cpu";

/// What is hidden from every task that is not privileged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MaskedPaths(Vec<String>);

impl MaskedPaths {
    /// Looks at what this host has, which is done once for all tasks: a host may have hundreds of processors. Those that
    /// are brought online later count from the next start of the plugin, as in moby.
    pub fn of_this_host() -> Self {
        Self::of(Path::new(PROCESSORS))
    }

    /// The fixed paths alone: for a sandbox, whose own kernel shows nothing of the host's processors.
    pub fn of_a_sandbox() -> Self {
        Self(MASKED_PATHS.map(str::to_owned).to_vec())
    }

    /// With the thermal events of each processor whose directory in `processors` has them
    /// (`cpu0/thermal_throttle`, on Intel's: Documentation/admin-guide/cputopology.rst names the directories).
    fn of(processors: &Path) -> Self {
        let number = |name: &str| name.strip_prefix("cpu")?.parse::<u32>().ok();
        let listed = fs::read_dir(processors).into_iter().flatten().flatten();
        let numbers: BTreeSet<u32> = listed.filter_map(|entry| number(entry.file_name().to_str()?)).collect();
        let counters = numbers.into_iter().map(|number| format!("cpu{number}/thermal_throttle"));
        let found = counters.filter(|counters| processors.join(counters).is_dir());
        let mut this = Self::of_a_sandbox();
        this.0.extend(found.map(|counters| format!("{PROCESSORS}/{counters}")));
        this
    }

    /// The paths.
    pub fn as_slice(&self) -> &[String] {
        &self.0
    }
}

/// Proc entries that stay readable.
pub const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Builds one mount.
///
/// # Errors
/// When the spec's own builder refuses.
pub fn mount(target: &str, kind: &str, source: &str, options: &[&str]) -> Result<Mount, RootfsError> {
    Ok(MountBuilder::default()
        .destination(PathBuf::from(target))
        .typ(kind)
        .source(PathBuf::from(source))
        .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
        .build()?)
}

/// What the first mounts depend on.
#[derive(Debug, Clone, Copy)]
pub struct BaseMounts {
    /// Whose defaults hold.
    pub flavor: Flavor,
    /// Leaves sysfs writable.
    pub privileged: bool,
    /// The host's /dev/shm is mounted with the task's own mounts.
    pub host_ipc: bool,
    /// Of /dev/shm, in bytes.
    pub shm_size: Option<u64>,
}

/// The mounts below everything else.
///
/// # Errors
/// When the spec's own builder refuses.
pub fn mounts(base: BaseMounts) -> Result<Vec<Mount>, RootfsError> {
    let BaseMounts { flavor, privileged, host_ipc, shm_size } = base;
    let sys = if privileged { "rw" } else { "ro" };
    let shm_size = format!("size={}k", shm_size.unwrap_or(SHM_SIZE) >> 10);
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", sys])?,
    ];
    if !host_ipc {
        mounts.push(mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", &shm_size])?);
    }
    // Shows the queues of the IPC namespace in which it is mounted (mq_overview(7)).
    mounts.push(mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?);
    if flavor == Flavor::DropIn {
        mounts.push(mount("/run", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?);
    }
    Ok(mounts)
}

/// Device access: everything denied but the usual harmless ones (which the runtime makes), or everything allowed.
///
/// # Errors
/// When the spec's own builder refuses.
pub fn device_rules(all: bool) -> Result<Vec<LinuxDeviceCgroup>, RootfsError> {
    let every = LinuxDeviceCgroupBuilder::default().allow(all).access("rwm").build()?;
    if all {
        return Ok(vec![every]);
    }
    let mut rules = vec![every];
    // Making nodes is allowed (mknod), opening them is not; then null, zero, full, random, urandom, tty, console,
    // ptmx and the pseudo-terminals (containerd's WithDefaultUnixDevices).
    let devices: [(LinuxDeviceType, Option<i64>, Option<i64>, &str); 11] = [
        (LinuxDeviceType::C, None, None, "m"),
        (LinuxDeviceType::B, None, None, "m"),
        (LinuxDeviceType::C, Some(1), Some(3), "rwm"),
        (LinuxDeviceType::C, Some(1), Some(5), "rwm"),
        (LinuxDeviceType::C, Some(1), Some(7), "rwm"),
        (LinuxDeviceType::C, Some(1), Some(8), "rwm"),
        (LinuxDeviceType::C, Some(1), Some(9), "rwm"),
        (LinuxDeviceType::C, Some(5), Some(0), "rwm"),
        (LinuxDeviceType::C, Some(5), Some(1), "rwm"),
        (LinuxDeviceType::C, Some(5), Some(2), "rwm"),
        (LinuxDeviceType::C, Some(136), None, "rwm"),
    ];
    for (kind, major, minor, access) in devices {
        let mut rule = LinuxDeviceCgroupBuilder::default().allow(true).typ(kind).access(access);
        if let Some(major) = major {
            rule = rule.major(major);
        }
        if let Some(minor) = minor {
            rule = rule.minor(minor);
        }
        rules.push(rule.build()?);
    }
    Ok(rules)
}

/// Access to one device.
///
/// # Errors
/// When the spec's own builder refuses.
pub fn allow_device(device: &LinuxDevice, access: &str) -> Result<LinuxDeviceCgroup, RootfsError> {
    Ok(LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(device.typ())
        .major(device.major())
        .minor(device.minor())
        .access(access)
        .build()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processors_of_the_host_are_found() {
        let host = tempfile::tempdir().expect("a temporary directory");
        for directory in
            ["cpu0/thermal_throttle", "cpu10/thermal_throttle", "cpu2/thermal_throttle", "cpu3/cache", "cpufreq"]
        {
            fs::create_dir_all(host.path().join(directory)).expect("made");
        }
        let paths = MaskedPaths::of(host.path());
        let fixed = MASKED_PATHS.len();
        assert_eq!(paths.as_slice()[..fixed], MASKED_PATHS);
        let expected = ["cpu0", "cpu2", "cpu10"].map(|cpu| format!("/sys/devices/system/cpu/{cpu}/thermal_throttle"));
        assert_eq!(paths.as_slice()[fixed..], expected);
        assert_eq!(MaskedPaths::of(&host.path().join("none")), MaskedPaths::of_a_sandbox());
    }
}
