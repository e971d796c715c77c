//! Containers that a runtime is probed with: how they are called, and what is left of those that were cut off.
//!
//! Their cgroups lie at the root of every hierarchy, where plugins of other names have theirs, too. So a name says which
//! process has made it: what a process that lives has made is at work, and everything else is nobody's.

use std::{
    collections::BTreeSet,
    fs, io,
    path::Path,
    time::{Duration, SystemTime},
};

use crate::{
    cgroup::{CgroupPath, Cgroups},
    ids::random_hex,
    places::names,
    process::ProcessId,
};

/// What a probe's directory is called, before the rest of its name.
const PREFIX: &str = "probe-";
/// What comes before that in the name of its cgroup.
const CGROUP: &str = "nomad-driver-shim-";
/// Earlier versions did not say whose a probe's cgroup was. None of their probes took longer than this.
const ANONYMOUS_AGE: Duration = Duration::from_secs(600);
/// What a cgroup holds is gone within milliseconds of a SIGKILL.
const CLEAR: Duration = Duration::from_secs(5);
/// Between two looks at that.
const LOOK: Duration = Duration::from_millis(5);

/// A new name, which says that this process has made it.
///
/// # Errors
/// When /proc does not tell when this process was started.
pub(super) fn new_name() -> io::Result<String> {
    let ProcessId { pid, start } = ProcessId::of(std::process::id())?;
    Ok(format!("{PREFIX}{pid}-{start}-{}", random_hex(6)))
}

/// The process that has made it; None where the name does not say.
fn maker(name: &str) -> Option<ProcessId> {
    let mut parts = name.strip_prefix(PREFIX)?.split('-');
    let process = ProcessId { pid: parts.next()?.parse().ok()?, start: parts.next()?.parse().ok()? };
    parts.next().map(|_| process)
}

/// The cgroup of a probe.
pub(super) fn cgroup(name: &str) -> String {
    format!("/{CGROUP}{name}")
}

/// Names of probes that were cut off: their directories below `scratch`, of which nobody else makes any, and cgroups of
/// this host's.
///
/// # Errors
/// When either can't be listed.
pub fn stale_probes(scratch: &Path, cgroups: &Cgroups) -> io::Result<BTreeSet<String>> {
    let is_over = |name: &String| maker(name).is_none_or(|maker| maker.is_gone());
    let mut found: BTreeSet<String> = names(scratch).map_err(io::Error::other)?.into_iter().collect();
    found.retain(|name| name.starts_with(PREFIX) && is_over(name));
    let groups = cgroups.at_the_root(&format!("{CGROUP}{PREFIX}")).map_err(io::Error::other)?;
    let groups = groups.iter().filter_map(|group| group.strip_prefix(CGROUP)).map(str::to_owned);
    found.extend(groups.filter(is_over).filter(|name| maker(name).is_some() || is_long_unused(name, cgroups)));
    Ok(found)
}

/// Is this cgroup, whose maker is not known, empty and old? Where that can't be told it is not.
fn is_long_unused(name: &str, cgroups: &Cgroups) -> bool {
    let group = CgroupPath::recorded(&cgroup(name));
    // The time of a cgroup's directory is never older than the cgroup (it is set when the kernel first looks it up).
    let age = cgroups.modified(&group).and_then(|at| SystemTime::now().duration_since(at).ok());
    cgroups.processes(&group).is_ok_and(|processes| processes.is_empty()) && age.is_some_and(|age| age > ANONYMOUS_AGE)
}

/// Removes what is left of a probe: its processes, its cgroup and its directory.
///
/// # Errors
/// When a process survives SIGKILL, or a directory can't be removed.
pub async fn remove_probe(scratch: &Path, cgroups: &Cgroups, name: &str) -> io::Result<()> {
    let group = CgroupPath::recorded(&cgroup(name));
    let deadline = tokio::time::Instant::now() + CLEAR;
    while cgroups.kill(&group).map_err(io::Error::other)? > 0 && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(LOOK).await;
    }
    cgroups.remove(&group).map_err(io::Error::other)?;
    match fs::remove_dir_all(scratch.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_who_has_made_it() {
        let me = ProcessId::of(std::process::id()).expect("this process");
        assert_eq!(maker(&new_name().expect("a name")), Some(me));
        assert_eq!(maker("probe-12-345-ab12"), Some(ProcessId { pid: 12, start: 345 }));
        // As earlier versions called them, also where all digits are decimal.
        for anonymous in ["probe-d016bdcf8d83", "probe-016000128083", "probe-12-345", "other-12-345-ab12"] {
            assert_eq!(maker(anonymous), None, "{anonymous}");
        }
    }

    #[test]
    fn directories_of_the_living_stay() {
        let directory = tempfile::tempdir().expect("made");
        let scratch = directory.path();
        let mine = new_name().expect("a name");
        let dead = "probe-1-99999999999-ab12".to_owned();
        for name in [mine.as_str(), &dead, "probe-d016bdcf8d83", "tasks"] {
            fs::create_dir(scratch.join(name)).expect("made");
        }
        let cgroups = Cgroups::detect().expect("cgroups");
        let stale = stale_probes(scratch, &cgroups).expect("listed");
        assert!(stale.contains(&dead) && stale.contains("probe-d016bdcf8d83"), "{stale:?}");
        assert!(!stale.contains(&mine) && !stale.contains("tasks"), "{stale:?}");
    }
}
