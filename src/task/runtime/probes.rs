//! The containers that runtimes are probed with: their names, and the cleanup of probes that were interrupted.
//!
//! The cgroups of probes are at the root of every hierarchy, as are those of plugins with other names. So the name of a
//! probe contains the process that has created it: if that process lives, the probe is in progress, and otherwise it is
//! stale.

use std::{
    collections::BTreeSet,
    io,
    path::Path,
    time::{Duration, SystemTime},
};

use crate::{
    cgroup::{CgroupPath, Cgroups},
    files::remove_dir_all_if_exists,
    places::list_names,
    process::ProcessId,
    process_name,
};

/// The beginning of a probe's name, which is also the name of its directory.
const NAME_PREFIX: &str = "probe-";
/// What precedes a probe's name in the name of its cgroup.
const CGROUP_PREFIX: &str = "nomad-driver-shim-";
/// The age above which a probe's cgroup is stale if its name does not contain the creator. Earlier versions used such
/// names, and none of their probes took longer than this.
const ANONYMOUS_MAX_AGE: Duration = Duration::from_secs(600);
/// How long the processes of a cgroup are waited for after SIGKILL. They usually end within milliseconds.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a cgroup is checked for processes after SIGKILL.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Returns a new name for a probe of this process.
///
/// # Errors
/// When the start time of this process can't be read from /proc.
pub(super) fn new_probe_name() -> io::Result<String> {
    process_name::new_name(NAME_PREFIX)
}

/// Returns the process that has created the probe of this name. `None` if the name does not contain it.
fn creator(name: &str) -> Option<ProcessId> {
    process_name::creator(NAME_PREFIX, name)
}

/// Returns the cgroup of a probe.
pub(super) fn cgroup(name: &str) -> CgroupPath {
    CgroupPath::at_root(&format!("{CGROUP_PREFIX}{name}"))
}

/// Returns the names of probes that were interrupted, by their directories below `scratch`, where only this driver's
/// probes have directories, and by the cgroups of this host.
///
/// # Errors
/// When the directory or the cgroups can't be listed.
pub fn stale_probes(scratch: &Path, cgroups: &Cgroups) -> io::Result<BTreeSet<String>> {
    let is_over = |name: &String| creator(name).is_none_or(|process| process.is_gone());
    let mut found: BTreeSet<String> = list_names(scratch).map_err(io::Error::other)?.into_iter().collect();
    found.retain(|name| name.starts_with(NAME_PREFIX) && is_over(name));
    let groups = cgroups.root_groups(&format!("{CGROUP_PREFIX}{NAME_PREFIX}")).map_err(io::Error::other)?;
    let groups = groups.iter().filter_map(|group| group.strip_prefix(CGROUP_PREFIX)).map(str::to_owned);
    found.extend(groups.filter(is_over).filter(|name| creator(name).is_some() || is_long_unused(name, cgroups)));
    Ok(found)
}

/// Says whether the cgroup of a probe whose creator is not known is empty and old. Returns false if that can't be found
/// out.
fn is_long_unused(name: &str, cgroups: &Cgroups) -> bool {
    let group = cgroup(name);
    // The time of a cgroup's directory is never before the creation of the cgroup, because the kernel sets it when the
    // directory is first looked up.
    let age = cgroups.last_modified(&group).and_then(|at| SystemTime::now().duration_since(at).ok());
    cgroups.processes(&group).is_ok_and(|processes| processes.is_empty())
        && age.is_some_and(|age| age > ANONYMOUS_MAX_AGE)
}

/// Removes the remains of a probe: its processes, its cgroup and its directory.
///
/// # Errors
/// When a process survives SIGKILL, or a directory can't be removed.
pub async fn remove_probe(scratch: &Path, cgroups: &Cgroups, name: &str) -> io::Result<()> {
    let group = cgroup(name);
    let deadline = tokio::time::Instant::now() + KILL_TIMEOUT;
    while cgroups.kill(&group).map_err(io::Error::other)? > 0 && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    cgroups.remove(&group).map_err(io::Error::other)?;
    remove_dir_all_if_exists(&scratch.join(name))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_probe_name_contains_its_creator() {
        let me = ProcessId::of(std::process::id()).expect("this process");
        assert_eq!(creator(&new_probe_name().expect("a name")), Some(me));
        assert_eq!(creator("probe-12-345-ab12"), Some(ProcessId { pid: 12, start: 345 }));
        // Earlier versions used names like the first two. The second one has decimal digits only.
        for anonymous in ["probe-d016bdcf8d83", "probe-016000128083", "probe-12-345", "other-12-345-ab12"] {
            assert_eq!(creator(anonymous), None, "{anonymous}");
        }
    }

    #[test]
    fn directories_of_running_probes_stay() {
        let directory = tempfile::tempdir().expect("made");
        let scratch = directory.path();
        let running = new_probe_name().expect("a name");
        let dead = "probe-1-99999999999-ab12".to_owned();
        for name in [running.as_str(), &dead, "probe-d016bdcf8d83", "tasks"] {
            fs::create_dir(scratch.join(name)).expect("made");
        }
        let cgroups = Cgroups::detect().expect("cgroups");
        let stale = stale_probes(scratch, &cgroups).expect("listed");
        assert!(stale.contains(&dead) && stale.contains("probe-d016bdcf8d83"), "{stale:?}");
        assert!(!stale.contains(&running) && !stale.contains("tasks"), "{stale:?}");
    }
}
