//! The processors that tasks without cores of their own share. On version 2 a task's scope lies below the pool and the
//! kernel sees to it; on version 1 Nomad names one directory for all of them (protocol reference 4.8), whose list is
//! copied to each task's own cpuset, and again when it changes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{CgroupError, CgroupMode, CgroupPath, Cgroups, ROOT};

const CPUS: &str = "cpuset.cpus";

/// Nomad's directory of the pool, on version 1.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SharePool(PathBuf);

impl SharePool {
    /// Which processors they are now, as cpuset(7) writes lists.
    ///
    /// # Errors
    /// When the pool is not there, or empty.
    pub fn cpus(&self) -> Result<String, CgroupError> {
        let path = self.0.join(CPUS);
        let failed = |source| CgroupError { doing: "read", path: path.clone(), source };
        let text = fs::read_to_string(&path).map_err(failed)?;
        match text.trim() {
            "" => Err(failed(std::io::Error::other("it names no processors"))),
            cpus => Ok(cpus.to_owned()),
        }
    }
}

impl Cgroups {
    /// The pool that Nomad means by a task's `cpuset_cgroup`; None where the kernel or nobody keeps one.
    pub fn share_pool(&self, cpuset_cgroup: &str) -> Option<SharePool> {
        let hierarchy = Path::new(ROOT).join("cpuset");
        let path = Path::new(cpuset_cgroup);
        (self.mode == CgroupMode::V1 && path.starts_with(hierarchy)).then(|| SharePool(path.to_owned()))
    }

    /// Gives a task's group on version 1 these processors. One that is gone needs none.
    ///
    /// # Errors
    /// When the kernel refuses: a group below it has others.
    pub fn set_cpus(&self, task: &CgroupPath, cpus: &str) -> Result<(), CgroupError> {
        let path = task.below(&Path::new(ROOT).join("cpuset")).join(CPUS);
        match fs::write(&path, cpus) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(CgroupError { doing: "set", path, source })
            }
            _ => Ok(()),
        }
    }
}
