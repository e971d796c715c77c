//! Where a mount goes in the container, and whether a mount may go there.

use std::{
    fmt,
    path::{Component, Path, PathBuf},
};

use crate::ids::Flavor;

/// Files of /proc that lxcfs and its like replace by views of a container. Runtimes allow these and nothing else below
/// /proc (opencontainers/runc, libcontainer/rootfs_linux.go, `checkProcMount`).
const PROC_FILES: [&str; 8] = ["cpuinfo", "diskstats", "loadavg", "meminfo", "slabinfo", "stat", "swaps", "uptime"];

/// An absolute path below the container's root, without `.`, `..` and empty components.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MountTarget(PathBuf);

/// May mounts cover parts of /sys?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SysTargets {
    /// They may: under the old driver's name, and for privileged tasks.
    Allowed,
    /// They may not.
    Refused,
}

impl SysTargets {
    /// What holds for a task of a driver with these defaults.
    pub fn of(flavor: Flavor, privileged: bool) -> Self {
        if privileged || flavor == Flavor::DropIn { Self::Allowed } else { Self::Refused }
    }
}

impl MountTarget {
    /// Reads a target as a job writes it.
    ///
    /// # Errors
    /// With what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let path = Path::new(text);
        let climbs = path.components().any(|component| component == Component::ParentDir);
        let target: PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        if !path.is_absolute() || climbs || target.as_os_str().is_empty() || text.contains('\0') {
            return Err(format!("{text:?} is not an absolute path below the root"));
        }
        Ok(Self(Path::new("/").join(target)))
    }

    /// Reads a volume's destination, which Nomad passes on as the job has it: a relative one is below the root, and `..` is
    /// resolved by its words, as runtimes do both.
    ///
    /// # Errors
    /// When that is the root itself.
    pub fn of_volume(text: &str) -> Result<Self, String> {
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

    /// The target that `path` is, which was found in a root file system.
    pub(super) fn found(path: PathBuf) -> Self {
        Self(path)
    }

    /// The path in the container.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// How deep the target lies: a mount at a shallower one comes first.
    pub(super) fn depth(&self) -> usize {
        self.0.components().count()
    }

    /// Refuses places where a mount hides what confines the task: /proc, by which runtimes and the kernel set labels
    /// (CVE-2019-16884, CVE-2025-52881), and /sys.
    ///
    /// # Errors
    /// Why no mount may go there.
    pub fn check(&self, sys: SysTargets) -> Result<(), String> {
        let below = |parent: &str| self.0.strip_prefix(parent).ok();
        if let Some(rest) = below("/proc") {
            if PROC_FILES.iter().any(|file| rest == Path::new(file)) {
                return Ok(());
            }
            return Err(format!(
                "{:?} is in /proc, where no mount may go except over {}; use another target",
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
            assert_eq!(MountTarget::of_volume(text).expect("a target").path(), Path::new(path), "{text}");
        }
        for text in ["", "/", "..", "/a/..", "/a\0b"] {
            assert!(MountTarget::of_volume(text).is_err(), "{text:?}");
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
