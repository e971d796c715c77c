//! What every container gets: mounts, masked paths, device rules. The lists are containerd's (`oci/spec.go`,
//! `oci/mounts.go`), which runc and docker share.

use std::path::PathBuf;

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, Mount, MountBuilder,
};

use super::{RootfsError, tmpfs::SHM_SIZE};
use crate::ids::Flavor;

/// Proc and sys entries that tell or change something about the host.
pub const MASKED_PATHS: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
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
