//! The CPUs that tasks without reserved cores share. On version 2 a task's scope lies below Nomad's share pool, and the
//! kernel applies the pool's CPUs. On version 1 Nomad names one directory for all these tasks
//! (docs/protocol/nomad-plugin.md#4.8). Its list of CPUs is copied to each task's own cpuset, and copied again when it
//! changes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{CGROUP_ROOT, CgroupError, CgroupMode, CgroupPath, Cgroups};
use crate::files::none_if_missing;

const CPUSET_CPUS: &str = "cpuset.cpus";

/// Nomad's cpuset directory of the share pool on version 1.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SharePool(PathBuf);

impl SharePool {
    /// Returns the pool's present CPUs as a list in the format of cpuset(7).
    ///
    /// # Errors
    /// Fails when the pool does not exist or is empty.
    pub fn cpus(&self) -> Result<String, CgroupError> {
        let path = self.0.join(CPUSET_CPUS);
        let failed = |source| CgroupError { doing: "read", path: path.clone(), source };
        let text = fs::read_to_string(&path).map_err(failed)?;
        match text.trim() {
            "" => Err(failed(std::io::Error::other("the share pool has no CPUs"))),
            cpus => Ok(cpus.to_owned()),
        }
    }
}

impl Cgroups {
    /// Returns the share pool that a task's `cpuset_cgroup` names. Returns `None` on version 2, where the kernel
    /// applies the pool, and if Nomad names no pool.
    pub fn share_pool(&self, cpuset_cgroup: &str) -> Option<SharePool> {
        let hierarchy = Path::new(CGROUP_ROOT).join("cpuset");
        let path = Path::new(cpuset_cgroup);
        (self.mode == CgroupMode::V1 && path.starts_with(hierarchy)).then(|| SharePool(path.to_owned()))
    }

    /// Sets the CPUs of a task's cgroup on version 1. Succeeds if the cgroup is gone.
    ///
    /// # Errors
    /// Fails when the kernel refuses the list, because a cgroup below has other CPUs.
    pub fn set_cpus(&self, task: &CgroupPath, cpus: &str) -> Result<(), CgroupError> {
        let path = task.in_hierarchy(&Path::new(CGROUP_ROOT).join("cpuset")).join(CPUSET_CPUS);
        let set = none_if_missing(fs::write(&path, cpus)).map(drop);
        set.map_err(|source| CgroupError { doing: "set", path, source })
    }
}
