//! The defaults of every container: mounts, masked paths and device rules. The lists are those of containerd
//! (`pkg/oci/spec.go`, `pkg/oci/mounts.go`) and moby (`daemon/pkg/oci/defaults.go`), which agree.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, Mount, MountBuilder,
};

use super::{RootfsError, tmpfs_size::SHM_SIZE};
use crate::{files::none_if_missing, ids::Flavor};

/// Entries of /proc and /sys that reveal or change something of the host, and are the same on every host. The list is
/// moby's (`daemon/pkg/oci/defaults.go`, since moby/moby#49560 of 2025) and containerd's (since
/// containerd/containerd#14090 of September 2026). `/proc/interrupts` counts thermal events of the host's processors,
/// which reveal what others compute (moby's advisory GHSA-6fw5-f8r9-fgfm).
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

/// The directory in which the kernel lists processors.
const PROCESSORS: &str = "/sys/devices/system/cpu";

/// The paths that are hidden from every task that is not privileged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MaskedPaths(Vec<String>);

impl MaskedPaths {
    /// Returns the masked paths of this host, which are looked up once for all tasks: a host may have hundreds of
    /// processors. Processors that are brought online later are found when the plugin starts next, as in moby.
    ///
    /// # Errors
    /// Fails when the processors can't be listed: tasks could read what has to be hidden from them.
    pub fn for_this_host() -> Result<Self, RootfsError> {
        let path = Path::new(PROCESSORS);
        Self::of(path).map_err(|source| RootfsError::File { doing: "look up processors in", path: path.into(), source })
    }

    /// Returns only the fixed paths, for a sandbox: its own kernel shows nothing of the host's processors.
    pub fn for_sandbox() -> Self {
        Self(MASKED_PATHS.map(str::to_owned).to_vec())
    }

    /// Returns the fixed paths and the thermal event counters of each processor that has them in `processors`
    /// (`cpu0/thermal_throttle` on Intel's; Documentation/admin-guide/cputopology.rst names the directories).
    fn of(processors: &Path) -> io::Result<Self> {
        let number = |name: &str| name.strip_prefix("cpu")?.parse::<u32>().ok();
        let mut numbers = BTreeSet::new();
        for entry in none_if_missing(fs::read_dir(processors))?.into_iter().flatten() {
            numbers.extend(entry?.file_name().to_str().and_then(number));
        }
        let mut this = Self::for_sandbox();
        for number in numbers {
            let counters = format!("cpu{number}/thermal_throttle");
            if none_if_missing(fs::metadata(processors.join(&counters)))?.is_some() {
                this.0.push(format!("{PROCESSORS}/{counters}"));
            }
        }
        Ok(this)
    }

    /// Returns the paths.
    pub fn as_slice(&self) -> &[String] {
        &self.0
    }
}

/// Entries of /proc that a task may read but not write.
pub(crate) const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Builds one mount.
///
/// # Errors
/// Fails when the spec's builder rejects a value.
pub(crate) fn mount(target: &str, kind: &str, source: &str, options: &[&str]) -> Result<Mount, RootfsError> {
    Ok(MountBuilder::default()
        .destination(PathBuf::from(target))
        .typ(kind)
        .source(PathBuf::from(source))
        .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
        .build()?)
}

/// The properties of a task that its base mounts depend on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BaseMounts {
    /// The flavor whose defaults apply.
    pub flavor: Flavor,
    /// Whether the task is privileged; sysfs and the cgroup file systems are then writable.
    pub privileged: bool,
    /// Whether the task is in the host's IPC namespace. The host's /dev/shm is then one of the task's own mounts.
    pub host_ipc: bool,
    /// The size of /dev/shm in bytes; `None` for the default.
    pub shm_size: Option<u64>,
}

/// Returns the base mounts, which every container has and which come before the task's own mounts.
///
/// # Errors
/// Fails when the spec's builder rejects a value.
pub(crate) fn base_mounts(base: BaseMounts) -> Result<Vec<Mount>, RootfsError> {
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
        // JVMs, .NET, Go and node read their limits there.
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", sys])?,
    ];
    if !host_ipc {
        mounts.push(mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", &shm_size])?);
    }
    // This mount shows the queues of the IPC namespace in which it is made (mq_overview(7)).
    mounts.push(mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?);
    if flavor == Flavor::ContainerdDriver {
        mounts.push(mount("/run", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?);
    }
    Ok(mounts)
}

/// Returns the device rules of a container. They allow all devices if `all` is set. Otherwise they allow only the usual
/// harmless devices, whose nodes the runtime creates.
///
/// # Errors
/// Fails when the spec's builder rejects a value.
pub(crate) fn device_rules(all: bool) -> Result<Vec<LinuxDeviceCgroup>, RootfsError> {
    let every = LinuxDeviceCgroupBuilder::default().allow(all).access("rwm").build()?;
    if all {
        return Ok(vec![every]);
    }
    let mut rules = vec![every];
    // The first two rules allow to create device nodes (mknod), but not to open them. The others are for null, zero,
    // full, random, urandom, tty, console, ptmx, the pseudo-terminals (containerd's WithDefaultUnixDevices) and
    // /dev/net/tun, which a task with CAP_NET_ADMIN makes itself. runc adds that one to the rules of every container
    // (libcontainer/specconv, `AllowedDevices`), so it is there under docker; crun does not.
    let devices: [(LinuxDeviceType, Option<i64>, Option<i64>, &str); 12] = [
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
        (LinuxDeviceType::C, Some(10), Some(200), "rwm"),
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

/// Returns a rule that allows access to one device.
///
/// # Errors
/// Fails when the spec's builder rejects a value.
pub(crate) fn allow_device(device: &LinuxDevice, access: &str) -> Result<LinuxDeviceCgroup, RootfsError> {
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
        let paths = MaskedPaths::of(host.path()).expect("found");
        let fixed = MASKED_PATHS.len();
        assert_eq!(paths.as_slice()[..fixed], MASKED_PATHS);
        let expected = ["cpu0", "cpu2", "cpu10"].map(|cpu| format!("/sys/devices/system/cpu/{cpu}/thermal_throttle"));
        assert_eq!(paths.as_slice()[fixed..], expected);
        assert_eq!(MaskedPaths::of(&host.path().join("none")).expect("none"), MaskedPaths::for_sandbox());
    }

    /// A link that leads to itself stands for a directory that can't be opened for lack of descriptors or memory.
    #[test]
    fn processors_that_can_not_be_looked_up_are_an_error() {
        let host = tempfile::tempdir().expect("a temporary directory");
        for link in ["processors", "cpu0"] {
            std::os::unix::fs::symlink(link, host.path().join(link)).expect("linked");
        }
        assert!(MaskedPaths::of(&host.path().join("processors")).is_err());
        assert!(MaskedPaths::of(host.path()).is_err());
    }
}
