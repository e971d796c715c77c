//! Targets of mounts in the container, and the rules for where a mount may be.

use std::{
    fmt,
    path::{Component, Path, PathBuf},
};

use crate::ids::Flavor;

/// Files of /proc that lxcfs and similar programs replace by a container's own view of them. Runtimes allow mounts over
/// these files and nowhere else below /proc (opencontainers/runc, libcontainer/rootfs_linux.go, `checkProcMount`).
const PROC_FILES: [&str; 8] = ["cpuinfo", "diskstats", "loadavg", "meminfo", "slabinfo", "stat", "swaps", "uptime"];

/// An absolute path below the container's root, without `.`, `..` and empty components.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MountTarget(PathBuf);

/// Whether mounts may cover parts of /sys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SysTargets {
    /// Mounts may cover /sys: with `Flavor::ContainerdDriver`, and for privileged tasks.
    Allowed,
    /// Mounts may not cover /sys.
    Refused,
}

impl SysTargets {
    /// Returns the rule for a task of a driver with this flavor.
    pub fn of(flavor: Flavor, privileged: bool) -> Self {
        if privileged || flavor == Flavor::ContainerdDriver { Self::Allowed } else { Self::Refused }
    }
}

impl MountTarget {
    /// Parses a target of a job.
    ///
    /// # Errors
    /// Returns a description of what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let path = Path::new(text);
        let has_parent_components = path.components().any(|component| component == Component::ParentDir);
        let target: PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        if !path.is_absolute() || has_parent_components || target.as_os_str().is_empty() || text.contains('\0') {
            return Err(format!("{text:?} is not an absolute path below the root"));
        }
        Ok(Self(Path::new("/").join(target)))
    }

    /// Parses a volume's destination, which Nomad passes on as the job has it. A relative path is relative to the root,
    /// and `..` is resolved without looking at the file system. Runtimes do both in the same way.
    ///
    /// # Errors
    /// Fails when the result is the root itself.
    pub fn parse_volume(text: &str) -> Result<Self, String> {
        let mut target = PathBuf::from("/");
        for component in Path::new(text).components() {
            match component {
                Component::Normal(name) => target.push(name),
                Component::ParentDir => drop(target.pop()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
        Self::parse(&target.to_string_lossy())
    }

    /// Returns the target for a path that has been resolved in a root file system.
    pub(super) fn found(path: PathBuf) -> Self {
        Self(path)
    }

    /// Returns the path in the container.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Returns the number of the path's components. Mounts at targets with fewer components come first.
    pub(super) fn depth(&self) -> usize {
        self.0.components().count()
    }

    /// Refuses targets at which a mount would hide parts of the task's confinement: /proc, through which runtimes and
    /// the kernel set security labels (CVE-2019-16884, CVE-2025-52881), and /sys.
    ///
    /// # Errors
    /// Returns the reason why no mount may be there.
    pub fn check(&self, sys: SysTargets) -> Result<(), String> {
        let below = |parent: &str| self.0.strip_prefix(parent).ok();
        if let Some(rest) = below("/proc") {
            if PROC_FILES.iter().any(|file| rest == Path::new(file)) {
                return Ok(());
            }
            return Err(format!(
                "{:?} is in /proc, where no mount may be except over {}; use another target",
                self.0,
                PROC_FILES.join(", ")
            ));
        }
        if sys == SysTargets::Refused && below("/sys").is_some() {
            return Err(format!(
                "{:?} is in /sys, where only privileged tasks may have mounts; use another target, such as /host{}",
                self.0,
                self.0.display()
            ));
        }
        Ok(())
    }
}

impl fmt::Display for MountTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_paths_below_the_root() {
        for (text, path) in [("/a", "/a"), ("//a/./b//", "/a/b"), ("/a/...", "/a/...")] {
            assert_eq!(MountTarget::parse(text).expect("a target").path(), Path::new(path), "{text}");
        }
        for text in ["", "/", "//", "/.", "/./", "a", "./a", "/..", "/a/../b", "/../../x", "/a\0b"] {
            assert!(MountTarget::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn destinations_of_volumes_are_cleaned() {
        for (text, path) in [("data", "/data"), ("/a/../data", "/data"), ("../../data/", "/data"), ("/a/./b", "/a/b")] {
            assert_eq!(MountTarget::parse_volume(text).expect("a target").path(), Path::new(path), "{text}");
        }
        for text in ["", "/", "..", "/a/..", "/a\0b"] {
            assert!(MountTarget::parse_volume(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn no_mount_hides_proc_or_sys() {
        let check = |text: &str, sys| MountTarget::parse(text).expect("a target").check(sys);
        for text in ["/proc", "/proc/sys", "/proc/self/attr", "/proc/1", "/proc/meminfo/x", "//proc/./sys"] {
            assert!(check(text, SysTargets::Allowed).is_err(), "{text}");
        }
        for text in ["/sys", "/sys/fs/cgroup"] {
            assert!(check(text, SysTargets::Refused).is_err(), "{text}");
            assert_eq!(check(text, SysTargets::Allowed), Ok(()), "{text}");
        }
        for text in ["/proc/meminfo", "/process", "/system", "/dev", "/dev/shm", "/host/proc", "/a/proc/sys"] {
            assert_eq!(check(text, SysTargets::Refused), Ok(()), "{text}");
        }
    }
}
