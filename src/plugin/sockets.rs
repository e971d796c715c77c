//! The socket at which the plugin serves the agent: its name, and the removal of sockets that killed plugins have left
//! behind.
//!
//! A plugin that is killed can't remove its socket, and Nomad does not remove it. The sockets lie where go-plugin wants
//! them, usually in a directory that is writable for all users. A socket is therefore removed only if its name says
//! that a process of this driver has made it, that process has ended, the socket belongs to this process's user, and no
//! process listens at it.

use std::{
    env, fs, io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
};

use crate::{
    files::remove_file_if_exists,
    {ids::random_hex, places::SOCKET_PATH_MAX, process::ProcessId},
};

/// The prefix of every socket's name, as in go-plugin itself.
const SOCKET_PREFIX: &str = "plugin-";
/// The second part of the names of this driver's sockets; the pid and start time of the process that made it follow.
const DRIVER_INFIX: &str = "shim-";
/// The number of random digits at the end of a name. Names of earlier versions have nothing else after the prefix.
const RANDOM_DIGITS: usize = 12;
/// The age before which a socket is left alone if its name does not identify the process that made it. A socket between
/// bind(2) and listen(2) seems to have no listener, but only for microseconds.
const ANONYMOUS_MIN_AGE: Duration = Duration::from_secs(600);

/// Returns the directory that the agent asks for (`PLUGIN_UNIX_SOCKET_DIR`, of go-plugin 1.5 and newer), else the
/// directory of temporary files.
pub fn directory() -> PathBuf {
    env::var_os("PLUGIN_UNIX_SOCKET_DIR").filter(|dir| !dir.is_empty()).map_or_else(env::temp_dir, PathBuf::from)
}

/// Returns a path for a new socket. The name identifies this process if the directory leaves room for that in a
/// socket's address; else the name is as short as those of earlier versions.
///
/// # Errors
/// When /proc does not give the start time of this process.
pub(crate) fn new_path(directory: &Path) -> io::Result<PathBuf> {
    let ProcessId { pid, start } = ProcessId::of(std::process::id())?;
    let random = random_hex(RANDOM_DIGITS / 2);
    let path = directory.join(format!("{SOCKET_PREFIX}{DRIVER_INFIX}{pid}-{start}-{random}"));
    let fits = path.as_os_str().len() <= SOCKET_PATH_MAX;
    Ok(if fits { path } else { directory.join(format!("{SOCKET_PREFIX}{random}")) })
}

/// The process that has made a socket, by the socket's name.
#[derive(Debug, PartialEq, Eq)]
enum Creator {
    /// This process of the driver has made the socket.
    Known(ProcessId),
    /// The name does not identify the process. Most likely an earlier version of the driver has made the socket.
    Unknown,
}

/// Reads a socket's name; `None` for a name that this driver does not give.
fn creator(name: &str) -> Option<Creator> {
    let rest = name.strip_prefix(SOCKET_PREFIX)?;
    let is_random = |text: &str| text.len() == RANDOM_DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let Some(identity) = rest.strip_prefix(DRIVER_INFIX) else { return is_random(rest).then_some(Creator::Unknown) };
    let mut parts = identity.split('-');
    let process = ProcessId { pid: parts.next()?.parse().ok()?, start: parts.next()?.parse().ok()? };
    (is_random(parts.next()?) && parts.next().is_none()).then_some(Creator::Known(process))
}

/// Returns the sockets in this directory that killed plugins of this driver, under any driver name, have left behind.
pub fn abandoned(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let candidates = entries.filter_map(|entry| Some((entry.path(), creator(entry.file_name().to_str()?)?)));
    candidates.filter(|(path, creator)| is_abandoned(path, creator)).map(|(path, _)| path).collect()
}

fn is_abandoned(path: &Path, creator: &Creator) -> bool {
    // A link, which may be another user's, is not followed.
    let Ok(found) = fs::symlink_metadata(path) else { return false };
    if !found.file_type().is_socket() || found.uid() != nix::unistd::geteuid().as_raw() {
        return false;
    }
    let is_over = match creator {
        Creator::Known(process) => process.is_gone(),
        Creator::Unknown => {
            let age = found.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
            age.is_some_and(|age| age > ANONYMOUS_MIN_AGE)
        }
    };
    // A process that is gone may only be invisible in this PID namespace, so the socket itself is tested as well.
    is_over && has_no_listener(path)
}

/// Says whether a connection to the socket is refused. Does not wait: a listener that is busy counts as a listener.
fn has_no_listener(path: &Path) -> bool {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let try_connect = || {
        let address = UnixAddr::new(path)?;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(socket.as_raw_fd(), &address)
    };
    try_connect() == Err(Errno::ECONNREFUSED)
}

/// Removes a socket. A socket that another process has already removed is no error.
///
/// # Errors
/// Those of unlink(2).
pub fn remove(path: &Path) -> io::Result<()> {
    remove_file_if_exists(path)
}

/// Removes all sockets that killed plugins have left in the directory of this plugin's own socket.
pub(crate) fn remove_abandoned() {
    for path in abandoned(&directory()) {
        match remove(&path) {
            Ok(()) => tracing::info!(path = %path.display(), "removed the socket of a plugin that was killed"),
            Err(error) => tracing::warn!(path = %path.display(), %error, "could not remove a killed plugin's socket"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A name whose process has never existed.
    const GONE: &str = "plugin-shim-1-99999999999-0123456789ab";

    #[test]
    fn a_sockets_name_contains_its_creator() {
        let own = new_path(Path::new("/x")).expect("a path");
        let me = ProcessId::of(std::process::id()).expect("this process");
        assert_eq!(creator(own.file_name().and_then(|name| name.to_str()).expect("a name")), Some(Creator::Known(me)));
        assert_eq!(creator("plugin-0123456789ab"), Some(Creator::Unknown));
        let long = format!("/{}", "x".repeat(SOCKET_PATH_MAX - "/plugin-0123456789ab".len() - 1));
        let short = new_path(Path::new(&long)).expect("a path");
        assert_eq!(short.as_os_str().len(), SOCKET_PATH_MAX, "{}", short.display());
        assert_eq!(creator(short.file_name().and_then(|name| name.to_str()).expect("a name")), Some(Creator::Unknown));
        // go-plugin's own names belong to agents and their helpers.
        for other in ["plugin123456789", "plugin-", "plugin-xyz456789012", "plugin-shim-1-2", "plugin-shim-1-2-3-4"] {
            assert_eq!(creator(other), None, "{other}");
        }
    }

    #[test]
    fn only_sockets_without_a_listener_are_abandoned() {
        let directory = tempfile::tempdir().expect("made");
        let path = |name: &str| directory.path().join(name);
        // A listener that is dropped leaves its socket behind.
        for name in [GONE, "plugin-0123456789ab", "plugin987654321"] {
            drop(UnixListener::bind(path(name)).expect("bound"));
        }
        let living = UnixListener::bind(path("plugin-shim-2-99999999999-0123456789ab")).expect("bound");
        fs::write(path("plugin-shim-3-99999999999-0123456789ab"), "no socket").expect("written");
        std::os::unix::fs::symlink(path(GONE), path("plugin-shim-4-99999999999-0123456789ab")).expect("linked");
        drop(UnixListener::bind(new_path(directory.path()).expect("a path")).expect("bound"));
        assert_eq!(abandoned(directory.path()), [path(GONE)], "the socket without a process in its name is too young");
        let old = SystemTime::now() - 2 * ANONYMOUS_MIN_AGE;
        let time = nix::sys::time::TimeSpec::from_duration(
            old.duration_since(SystemTime::UNIX_EPOCH).expect("after the epoch"),
        );
        let follow = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
        nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, &path("plugin-0123456789ab"), &time, &time, follow)
            .expect("set");
        let mut found = abandoned(directory.path());
        found.sort();
        assert_eq!(found, [path("plugin-0123456789ab"), path(GONE)]);
        drop(living);
    }
}
