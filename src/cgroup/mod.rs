//! The cgroups of tasks and shims, for cgroup versions 1 and 2: their paths, processes, limits, usage and removal.

mod lock_primer;
mod share_pool;
mod stats;

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

pub use lock_primer::{CgroupLockPrimer, Priming, PrimingMode};
pub use share_pool::SharePool;
pub use stats::{CpuUsage, MemoryUsage, Meter, Usage, cpu_percent};

use crate::{
    failpoint,
    files::{none_if_missing, remove_dir_if_exists},
    ids::ContainerId,
    process::{PidFd, none_if_vanished},
};

/// The directory below which every Linux that Nomad supports mounts the cgroup hierarchies.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// The cgroup of this driver's shims and helpers, next to Nomad's own.
const OWN_GROUP: &str = "nomad-driver-shim";
/// The longest file name in Linux.
const NAME_MAX: usize = 255;

/// The cgroup version that this host uses for resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupMode {
    /// Version 1, or a hybrid setup whose controllers are on version 1.
    V1,
    /// Only version 2.
    V2,
}

/// The reason why a cgroup could not be used.
#[derive(Debug, thiserror::Error)]
#[error("could not {doing} {path} of a cgroup")]
pub struct CgroupError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The cgroup hierarchies of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroups {
    mode: CgroupMode,
    /// The mount points of all hierarchies, those of controllers and systemd's.
    hierarchies: Vec<PathBuf>,
    accounts_swap: bool,
}

/// The path of a task's cgroup, relative to each hierarchy's root and with a leading slash (`cgroupsPath` in the OCI
/// runtime specification).
///
/// The default stands for no cgroup: the cgroup of an unrecorded container is not known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupPath(String);

impl CgroupPath {
    /// Checks a path. Returns `None` for an empty one and for the root cgroup, which no task has.
    pub fn new(path: &str) -> Option<Self> {
        (!path.trim_matches('/').is_empty()).then(|| Self(path.to_owned()))
    }

    /// Creates the path of the cgroup with this name at the root of every hierarchy.
    pub fn at_root(name: &str) -> Self {
        Self(format!("/{name}"))
    }

    /// Returns the path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn in_hierarchy(&self, hierarchy: &Path) -> PathBuf {
        hierarchy.join(self.0.trim_start_matches('/'))
    }
}

impl Cgroups {
    /// Detects the cgroup hierarchies from the mount table.
    ///
    /// # Errors
    /// Fails when `/proc/self/mountinfo` can't be read.
    pub fn detect() -> Result<Self, CgroupError> {
        let path = PathBuf::from("/proc/self/mountinfo");
        let text =
            fs::read_to_string(&path).map_err(|source| CgroupError { doing: "read", path: path.clone(), source })?;
        Ok(Self::from_mountinfo(&text))
    }

    /// Parses a mount table. The fifth field is the mount point, and the first field after ` - ` is the type
    /// (proc_pid_mountinfo(5)).
    fn from_mountinfo(text: &str) -> Self {
        let mut hierarchies = Vec::new();
        let mut mode = CgroupMode::V1;
        for line in text.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let kind = right.split(' ').next().unwrap_or_default();
            if !matches!(kind, "cgroup" | "cgroup2") {
                continue;
            }
            let Some(point) = left.split(' ').nth(4).map(PathBuf::from) else { continue };
            // Containers and sandboxes may have mounted further hierarchies elsewhere; runtimes only use these.
            if !point.starts_with(CGROUP_ROOT) {
                continue;
            }
            if kind == "cgroup2" && point == Path::new(CGROUP_ROOT) {
                mode = CgroupMode::V2;
            }
            if !hierarchies.contains(&point) {
                hierarchies.push(point);
            }
        }
        let counts_swap =
            mode == CgroupMode::V2 || Path::new(CGROUP_ROOT).join("memory/memory.memsw.limit_in_bytes").exists();
        Self { mode, hierarchies, accounts_swap: counts_swap }
    }

    /// Returns the cgroup version of this host; a hybrid setup counts as version 1.
    pub fn mode(&self) -> CgroupMode {
        self.mode
    }

    /// Returns the mount points of all hierarchies.
    pub fn hierarchies(&self) -> &[PathBuf] {
        &self.hierarchies
    }

    /// Returns the path of a task's cgroup, which gets the task's limits. On version 2 it is the scope that Nomad has
    /// created (`cpuset_cgroup`), so that Nomad's partitions apply and its `cgroup.kill` works. On version 1 it is
    /// `/<parent>/<alloc>.<task>` in every hierarchy. If Nomad names no cgroup (because the agent does not manage
    /// cgroups), the paths are those that Nomad would have chosen.
    pub fn task_path(&self, cpuset_cgroup: &str, alloc_id: &str, task: &str, id: &ContainerId) -> CgroupPath {
        let given = Path::new(cpuset_cgroup).strip_prefix(CGROUP_ROOT).ok();
        let name = format!("{alloc_id}.{task}");
        let fits = name.len() + ".scope".len() <= NAME_MAX && !alloc_id.is_empty() && !name.contains(['/', '\0']);
        let name = if fits { name } else { id.to_string() };
        match self.mode {
            CgroupMode::V2 => match given {
                Some(path) if cpuset_cgroup.ends_with(".scope") => CgroupPath(format!("/{}", path.display())),
                _ => CgroupPath(format!("/nomad.slice/{name}.scope")),
            },
            CgroupMode::V1 => {
                // The path is `/sys/fs/cgroup/cpuset/<parent>/share`, and the operator chooses the parent's name.
                let parent = given.and_then(|path| path.iter().nth(1)).and_then(|part| part.to_str());
                CgroupPath(format!("/{}/{name}", parent.unwrap_or("nomad")))
            }
        }
    }

    /// Creates the cgroup of this driver's shims in every hierarchy. Returns the `cgroup.procs` files, by which a
    /// process is moved there.
    ///
    /// # Errors
    /// Fails when a cgroup can't be created.
    pub fn create_own_group(&self) -> Result<Vec<PathBuf>, CgroupError> {
        let mut procs = Vec::new();
        for hierarchy in &self.hierarchies {
            let path = hierarchy.join(OWN_GROUP);
            match fs::create_dir(&path) {
                Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(CgroupError { doing: "create", path, source });
                }
                _ => {}
            }
            // A cpuset of version 1 accepts no process before it has CPUs and memory nodes (cgroup-v1/cpusets.rst).
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let (own, parent) = (path.join(file), hierarchy.join(file));
                if self.mode == CgroupMode::V1
                    && own.exists()
                    && fs::read_to_string(&own).is_ok_and(|text| text.trim().is_empty())
                {
                    let copy = fs::read_to_string(&parent).and_then(|value| fs::write(&own, value.trim()));
                    copy.map_err(|source| CgroupError { doing: "set", path: own, source })?;
                }
            }
            procs.push(path.join("cgroup.procs"));
        }
        Ok(procs)
    }

    /// Returns whether the kernel accounts swap. On version 1 this depends on a boot option. On version 2 the kernel
    /// always does.
    pub fn accounts_swap(&self) -> bool {
        self.accounts_swap
    }

    /// Returns how many processes the OOM killer has killed in a task's cgroup. Returns `None` if the kernel does not
    /// count them, or the cgroup is gone.
    pub fn oom_kills(&self, task: &CgroupPath) -> Option<u64> {
        let file = match self.mode {
            CgroupMode::V1 => task.in_hierarchy(&Path::new(CGROUP_ROOT).join("memory")).join("memory.oom_control"),
            CgroupMode::V2 => task.in_hierarchy(Path::new(CGROUP_ROOT)).join("memory.events"),
        };
        let text = fs::read_to_string(file).ok()?;
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
    }

    /// Returns the names of the cgroups at the root of any hierarchy that start with `prefix`.
    ///
    /// # Errors
    /// Fails when a hierarchy can't be listed.
    pub fn root_groups(&self, prefix: &str) -> Result<BTreeSet<String>, CgroupError> {
        let mut found = BTreeSet::new();
        for hierarchy in &self.hierarchies {
            let failed = |source| CgroupError { doing: "list", path: hierarchy.clone(), source };
            for entry in fs::read_dir(hierarchy).map_err(failed)? {
                let name = entry.map_err(failed)?.file_name().into_string();
                found.extend(name.ok().filter(|name| name.starts_with(prefix)));
            }
        }
        Ok(found)
    }

    /// Returns the processes that are in a cgroup, or in a cgroup below it, in any hierarchy.
    ///
    /// # Errors
    /// Fails when the processes can't be listed.
    pub fn processes(&self, group: &CgroupPath) -> Result<BTreeSet<u32>, CgroupError> {
        let mut found = Vec::new();
        for hierarchy in &self.hierarchies {
            collect_pids(&group.in_hierarchy(hierarchy), &mut found)?;
        }
        Ok(found.into_iter().collect())
    }

    /// Returns when this cgroup was last changed in any hierarchy, or `None` if that is not known.
    pub fn last_modified(&self, group: &CgroupPath) -> Option<SystemTime> {
        let times = self
            .hierarchies
            .iter()
            .filter_map(|hierarchy| fs::metadata(group.in_hierarchy(hierarchy)).ok()?.modified().ok());
        times.max()
    }

    /// Returns whether a process is in the task's cgroup, and `false` for a process that has ended.
    ///
    /// # Errors
    /// Fails when the cgroups of the process can't be read.
    pub fn contains(&self, task: &CgroupPath, pid: u32) -> io::Result<bool> {
        let Some(groups) = read_groups(pid)? else { return Ok(false) };
        let below = format!("{}/", task.0);
        let mut paths = groups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
        Ok(paths.any(|path| path == task.0 || path.starts_with(&below)))
    }

    /// Returns whether two processes are in the same cgroup of every hierarchy, and `false` if one of them has ended.
    ///
    /// # Errors
    /// Fails when the cgroups of a process can't be read.
    pub fn are_in_same_groups(&self, one: u32, other: u32) -> io::Result<bool> {
        let Some(groups) = read_groups(one)? else { return Ok(false) };
        Ok(read_groups(other)?.is_some_and(|others| others == groups))
    }

    /// Sends SIGKILL to all processes in a task's cgroup, and returns their number. The cgroup is thawed as well,
    /// because a runtime may have frozen it and may have been killed before it could thaw it: frozen processes of
    /// cgroup version 1 do not die (freezer-subsystem.rst).
    ///
    /// # Errors
    /// Fails when the processes can't be listed. Those that were found are killed nevertheless.
    pub fn kill(&self, task: &CgroupPath) -> Result<usize, CgroupError> {
        // Without a cgroup there is nothing to kill. An empty path would mean the root cgroup.
        if task.0.trim_matches('/').is_empty() {
            return Ok(0);
        }
        let mut pids = Vec::new();
        let listed: Vec<_> =
            self.hierarchies.iter().map(|hierarchy| collect_pids(&task.in_hierarchy(hierarchy), &mut pids)).collect();
        pids.sort_unstable();
        pids.dedup();
        let found = listed.into_iter().collect::<Result<(), _>>().map(|()| pids.len());
        // `cgroup.kill` kills all processes at once, also those that are just being forked (cgroup-v2.rst, since Linux
        // 5.14).
        if self.mode == CgroupMode::V2
            && !pids.is_empty()
            && fs::write(task.in_hierarchy(Path::new(CGROUP_ROOT)).join("cgroup.kill"), "1").is_ok()
        {
            return found;
        }
        for &pid in &pids {
            // The cgroup is checked again once the process's descriptor is open, so that the descriptor certainly
            // refers to a process of this cgroup. A process that can't be checked is counted, so that the caller tries
            // again.
            if let Ok(process) = PidFd::open(pid)
                && self.contains(task, pid).unwrap_or(false)
            {
                process.signal(libc::SIGKILL);
            }
        }
        if self.mode == CgroupMode::V1 && !pids.is_empty() {
            self.hierarchies.iter().for_each(|hierarchy| thaw(&task.in_hierarchy(hierarchy)));
        }
        found
    }

    /// Removes a task's cgroup in all hierarchies. Succeeds if there is none.
    ///
    /// # Errors
    /// Fails when a cgroup still has processes.
    pub fn remove(&self, task: &CgroupPath) -> Result<(), CgroupError> {
        if failpoint::skip("cgroup") {
            return Ok(());
        }
        // An empty path would mean the root cgroup, which must never be removed.
        if task.0.trim_matches('/').is_empty() {
            return Ok(());
        }
        for hierarchy in &self.hierarchies {
            remove_tree(&task.in_hierarchy(hierarchy))?;
        }
        Ok(())
    }
}

/// Returns the contents of `/proc/<pid>/cgroup`, which has one line for each hierarchy; `None` if the process has
/// ended.
fn read_groups(pid: u32) -> io::Result<Option<String>> {
    none_if_vanished(fs::read_to_string(format!("/proc/{pid}/cgroup")))
}

/// Thaws a cgroup and those below it, if this hierarchy has the freezer.
fn thaw(path: &Path) {
    match none_if_missing(fs::write(path.join("freezer.state"), "THAWED")) {
        Ok(Some(())) => {}
        // This hierarchy has no freezer, or the cgroup is gone.
        Ok(None) => return,
        // The failure is only logged here: the caller notices that the processes do not end.
        Err(error) => tracing::warn!(path = %path.display(), %error, "could not thaw a frozen cgroup"),
    }
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            thaw(&entry.path());
        }
    }
}

/// Adds the processes of a cgroup and of those below it to `pids`. A cgroup that is gone has no processes.
fn collect_pids(path: &Path, pids: &mut Vec<u32>) -> Result<(), CgroupError> {
    let file = path.join("cgroup.procs");
    let read = crate::failpoint::fail_lookup("cgroup.procs").and_then(|()| fs::read_to_string(&file));
    match none_if_missing(read) {
        // Processes of other pid namespaces are listed as 0.
        Ok(Some(text)) => pids.extend(text.lines().filter_map(|line| line.parse().ok()).filter(|&pid: &u32| pid != 0)),
        Ok(None) => return Ok(()),
        // ENODEV: the cgroup was removed while the file was open. EOPNOTSUPP: the cgroup's threads belong to processes
        // of a cgroup above it, which lists them (cgroup-v2.rst, "Threads").
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EOPNOTSUPP)) => {}
        Err(source) => return Err(CgroupError { doing: "read", path: file, source }),
    }
    let failed = |source| CgroupError { doing: "list", path: path.to_owned(), source };
    let Some(entries) = none_if_missing(fs::read_dir(path)).map_err(failed)? else { return Ok(()) };
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_dir() {
            collect_pids(&entry.path(), pids)?;
        }
    }
    Ok(())
}

/// Removes a cgroup and those below it, from the leaves up. A cgroup's files are removed with its directory.
fn remove_tree(path: &Path) -> Result<(), CgroupError> {
    let failed = |doing| move |source| CgroupError { doing, path: path.to_owned(), source };
    let Some(entries) = none_if_missing(fs::read_dir(path)).map_err(failed("read"))? else { return Ok(()) };
    for entry in entries {
        let entry = entry.map_err(failed("list"))?;
        if entry.file_type().map_err(failed("list"))?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    remove_dir_if_exists(path).map_err(failed("remove"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::TaskId;

    const HYBRID: &str = "30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
        31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
        32 30 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
        33 30 0:29 / /elsewhere rw - cgroup cgroup rw,cpu\n";
    const UNIFIED: &str = "31 30 0:27 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n";

    #[test]
    fn hybrid_counts_as_version_one() {
        let hybrid = Cgroups::from_mountinfo(HYBRID);
        assert_eq!((hybrid.mode(), hybrid.hierarchies().len()), (CgroupMode::V1, 2));
        assert_eq!(Cgroups::from_mountinfo(UNIFIED).mode(), CgroupMode::V2);
    }

    #[test]
    fn the_root_is_no_cgroup_of_a_task() {
        assert_eq!(CgroupPath::new("").or(CgroupPath::new("/")).or(CgroupPath::new("//")), None);
        let path = CgroupPath::new("/nomad/a.web").expect("a path");
        assert_eq!(serde_json::to_string(&path).expect("JSON"), r#""/nomad/a.web""#);
    }

    #[test]
    fn paths_follow_nomads_cgroup() {
        let id = ContainerId::derive("a1", "web", &TaskId("a1/web/0".to_owned()));
        let path = |cgroups: &Cgroups, given: &str, task: &str| cgroups.task_path(given, "a1", task, &id).0;
        let (v1, v2) = (Cgroups::from_mountinfo(HYBRID), Cgroups::from_mountinfo(UNIFIED));
        let scope = "/sys/fs/cgroup/nomad.slice/share.slice/a1.web.scope";
        assert_eq!(path(&v2, scope, "web"), "/nomad.slice/share.slice/a1.web.scope");
        assert_eq!(path(&v2, "", "web"), "/nomad.slice/a1.web.scope");
        assert_eq!(path(&v1, "/sys/fs/cgroup/cpuset/own/share", "web"), "/own/a1.web");
        assert_eq!(path(&v1, "", "web"), "/nomad/a1.web");
        assert_eq!(path(&v1, "", &"x".repeat(300)), format!("/nomad/{id}"));
    }
}
