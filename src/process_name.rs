//! Names of files and cgroups that contain the process that made them: a prefix, the pid and the start time of the
//! process, and a random part. A later process finds by such a name whether the maker has ended.

use std::io;

use crate::{ids::random_hex, process::ProcessId};

/// Returns a new name of this process. `prefix` ends with a dash.
///
/// # Errors
/// When the start time of this process can't be read from /proc.
pub(crate) fn new_name(prefix: &str) -> io::Result<String> {
    let ProcessId { pid, start } = ProcessId::of(std::process::id())?;
    Ok(format!("{prefix}{pid}-{start}-{}", random_hex(6)))
}

/// Returns the process that has made this name. `None` if the name does not contain it.
pub(crate) fn creator(prefix: &str, name: &str) -> Option<ProcessId> {
    let mut parts = name.strip_prefix(prefix)?.split('-');
    let process = ProcessId { pid: parts.next()?.parse().ok()?, start: parts.next()?.parse().ok()? };
    parts.next().map(|_| process)
}
