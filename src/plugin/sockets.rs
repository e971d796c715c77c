//! The socket that the agent speaks to us at: what it is called, and those that killed plugins have left behind.
//!
//! A plugin that is killed can't remove its socket, and Nomad does not. They lie where go-plugin wants them, in a directory
//! that is everybody's as a rule, so that a socket is only removed when its name says that a process of ours made it which
//! has ended, it is a socket of our own user, and nobody listens at it.

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

use crate::{ids::random_hex, places::SOCKET_PATH_MAX, process::ProcessId};

/// What every plugin's socket begins with, as go-plugin's own.
const PREFIX: &str = "plugin-";
/// What ours go on with; the maker's pid and start time follow.
const OURS: &str = "shim-";
/// Digits that end a name. Those of earlier versions had nothing else after the prefix.
const DIGITS: usize = 12;
/// A socket whose name does not say who made it is left alone for this long. Between bind(2) and listen(2), where nobody
/// can be told to listen, lie microseconds.
const ANONYMOUS_AGE: Duration = Duration::from_secs(600);

/// Where the agent wants it (`PLUGIN_UNIX_SOCKET_DIR`, of go-plugin 1.5 and newer), else where temporary files are.
pub fn directory() -> PathBuf {
    env::var_os("PLUGIN_UNIX_SOCKET_DIR").filter(|dir| !dir.is_empty()).map_or_else(env::temp_dir, PathBuf::from)
}

/// A path for a new socket. It says that this process has made it, where the directory leaves room for that in a socket's
/// address; else it is as short as those of earlier versions.
///
/// # Errors
/// When /proc does not tell when this process was started.
pub fn new_path(directory: &Path) -> io::Result<PathBuf> {
    let ProcessId { pid, start } = ProcessId::of(std::process::id())?;
    let random = random_hex(DIGITS / 2);
    let path = directory.join(format!("{PREFIX}{OURS}{pid}-{start}-{random}"));
    let fits = path.as_os_str().len() <= SOCKET_PATH_MAX;
    Ok(if fits { path } else { directory.join(format!("{PREFIX}{random}")) })
}

/// Who has made a socket of this name.
#[derive(Debug, PartialEq, Eq)]
enum Maker {
    /// This process of ours.
    Known(ProcessId),
    /// An earlier version of ours, most likely.
    Unknown,
}

/// None for a name that is not ours.
fn maker(name: &str) -> Option<Maker> {
    let rest = name.strip_prefix(PREFIX)?;
    let is_random = |text: &str| text.len() == DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let Some(ours) = rest.strip_prefix(OURS) else { return is_random(rest).then_some(Maker::Unknown) };
    let mut parts = ours.split('-');
    let process = ProcessId { pid: parts.next()?.parse().ok()?, start: parts.next()?.parse().ok()? };
    (is_random(parts.next()?) && parts.next().is_none()).then_some(Maker::Known(process))
}

/// Sockets in this directory that plugins of ours, of whatever driver name, have left behind.
pub fn abandoned(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let candidates = entries.filter_map(|entry| Some((entry.path(), maker(entry.file_name().to_str()?)?)));
    candidates.filter(|(path, maker)| is_abandoned(path, maker)).map(|(path, _)| path).collect()
}

fn is_abandoned(path: &Path, maker: &Maker) -> bool {
    // Not what a link of somebody else's leads to.
    let Ok(found) = fs::symlink_metadata(path) else { return false };
    if !found.file_type().is_socket() || found.uid() != nix::unistd::geteuid().as_raw() {
        return false;
    }
    let is_over = match maker {
        Maker::Known(process) => process.is_gone(),
        Maker::Unknown => {
            let age = found.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
            age.is_some_and(|age| age > ANONYMOUS_AGE)
        }
    };
    // The process may be gone only as this pid namespace sees it.
    is_over && nobody_listens(path)
}

/// Is a connection refused? Never waits: a listener that is busy is one.
fn nobody_listens(path: &Path) -> bool {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let refused = || {
        let address = UnixAddr::new(path)?;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(socket.as_raw_fd(), &address)
    };
    refused() == Err(Errno::ECONNREFUSED)
}

/// Removes one. That somebody else was faster is fine.
///
/// # Errors
/// As unlink(2).
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes all that killed plugins have left where our own socket is.
pub fn clear() {
    for path in abandoned(&directory()) {
        match remove(&path) {
            Ok(()) => tracing::info!(path = %path.display(), "removed the socket of a plugin that was killed"),
            Err(error) => tracing::warn!(path = %path.display(), %error, "the socket of a killed plugin stays"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A process that there has never been.
    const GONE: &str = "plugin-shim-1-99999999999-0123456789ab";

    #[test]
    fn names_say_who_has_made_a_socket() {
        let own = new_path(Path::new("/x")).expect("a path");
        let me = ProcessId::of(std::process::id()).expect("this process");
        assert_eq!(maker(own.file_name().and_then(|name| name.to_str()).expect("a name")), Some(Maker::Known(me)));
        assert_eq!(maker("plugin-0123456789ab"), Some(Maker::Unknown));
        let long = format!("/{}", "x".repeat(SOCKET_PATH_MAX - "/plugin-0123456789ab".len() - 1));
        let short = new_path(Path::new(&long)).expect("a path");
        assert_eq!(short.as_os_str().len(), SOCKET_PATH_MAX, "{}", short.display());
        assert_eq!(maker(short.file_name().and_then(|name| name.to_str()).expect("a name")), Some(Maker::Unknown));
        // go-plugin's own are of agents and their helpers.
        for other in ["plugin123456789", "plugin-", "plugin-xyz456789012", "plugin-shim-1-2", "plugin-shim-1-2-3-4"] {
            assert_eq!(maker(other), None, "{other}");
        }
    }

    #[test]
    fn only_sockets_that_nobody_listens_at_are_abandoned() {
        let directory = tempfile::tempdir().expect("made");
        let path = |name: &str| directory.path().join(name);
        // A listener that is gone leaves its socket.
        for name in [GONE, "plugin-0123456789ab", "plugin987654321"] {
            drop(UnixListener::bind(path(name)).expect("bound"));
        }
        let living = UnixListener::bind(path("plugin-shim-2-99999999999-0123456789ab")).expect("bound");
        fs::write(path("plugin-shim-3-99999999999-0123456789ab"), "no socket").expect("written");
        std::os::unix::fs::symlink(path(GONE), path("plugin-shim-4-99999999999-0123456789ab")).expect("linked");
        drop(UnixListener::bind(new_path(directory.path()).expect("a path")).expect("bound"));
        assert_eq!(abandoned(directory.path()), [path(GONE)], "the one without a name is too young");
        let old = SystemTime::now() - 2 * ANONYMOUS_AGE;
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
