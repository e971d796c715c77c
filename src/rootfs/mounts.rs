//! A job's own mounts: their sources found without leaving the directories they may come from.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::{Path, PathBuf},
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use oci_spec::runtime::{Mount, MountBuilder};

use super::RootfsError;
use crate::ids::Flavor;

/// One `mounts` block, its form checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountRequest {
    /// What it is.
    pub kind: MountKind,
    /// Absolute path in the container.
    pub target: String,
    /// fstab-style options.
    pub options: Vec<String>,
}

/// What a job can mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountKind {
    /// A file or directory of the host (`bind`, and `volume`, which has no store behind it).
    Bind {
        /// Absolute, or relative to the task's directory.
        source: String,
    },
    /// Another file system type, passed on as it is (`tmpfs`).
    FileSystem {
        /// Its type.
        kind: String,
        /// Its source.
        source: String,
    },
}

/// Directories of the allocation on the host.
#[derive(Debug, Clone, Copy)]
pub struct AllocDirs<'a> {
    /// The allocation's.
    pub alloc: &'a Path,
    /// The task's name, which is its directory below.
    pub task: &'a str,
}

/// A mount whose source has been found.
#[derive(Debug)]
pub enum ResolvedMount {
    /// To be passed on as it is.
    FileSystem(Mount),
    /// A file or directory, held so that nobody can swap it. The bundle binds it to a place of ours, from where the
    /// runtime takes it: a path through `/proc/<pid>/fd` would lie in our mount namespace, and runtimes mount from
    /// another.
    Bind {
        /// What was found.
        source: OwnedFd,
        /// Where it goes in the container.
        target: String,
        /// fstab-style options.
        options: Vec<String>,
    },
}

/// Finds every source. Relative ones lie below the task's directory (`local/…`, `secrets/…`) or are `alloc/…`;
/// absolute ones, under our own name, below the allocation's directory or one of `allow_paths`.
///
/// # Errors
/// When a source is missing, leaves its directory, or may not be mounted.
pub fn resolve(
    requests: &[MountRequest],
    dirs: AllocDirs<'_>,
    flavor: Flavor,
    allow_paths: &[PathBuf],
) -> Result<Vec<ResolvedMount>, RootfsError> {
    requests
        .iter()
        .map(|request| {
            let mut options = request.options.clone();
            match &request.kind {
                MountKind::FileSystem { kind, source } => Ok(ResolvedMount::FileSystem(
                    MountBuilder::default()
                        .destination(PathBuf::from(&request.target))
                        .typ(kind.as_str())
                        .source(PathBuf::from(source))
                        .options(options)
                        .build()?,
                )),
                MountKind::Bind { source } => {
                    if !options.iter().any(|option| option == "bind" || option == "rbind") {
                        options.push("rbind".to_owned());
                    }
                    let source = open_source(source, dirs, flavor, allow_paths)?;
                    Ok(ResolvedMount::Bind { source, target: request.target.clone(), options })
                }
            }
        })
        .collect()
}

/// Opens a file or directory of the host that a job names, by the rules of mounts' sources, as a descriptor that only
/// names it.
///
/// # Errors
/// When it is missing, leaves its directory, or may not be used.
pub fn open_source(
    source: &str,
    dirs: AllocDirs<'_>,
    flavor: Flavor,
    allow_paths: &[PathBuf],
) -> Result<OwnedFd, RootfsError> {
    let failed = |error: io::Error| RootfsError::Source { source_path: source.to_owned(), source: error };
    let outside = || RootfsError::SourceOutside { source_path: source.to_owned() };
    let path = Path::new(source);
    if path.is_absolute() {
        if flavor == Flavor::DropIn {
            // As the old driver: any path of the host, symlinks followed.
            return open_path(path).map_err(failed);
        }
        if let Some(root) = allow_paths.iter().find(|root| path.starts_with(root)) {
            // Nothing lies outside of the root; its own absolute links may be followed.
            if root == Path::new("/") {
                return open_path(path).map_err(failed);
            }
            return open_beneath(root, path.strip_prefix(root).unwrap_or(path)).map_err(failed);
        }
        let below = path.strip_prefix(dirs.alloc).map_err(|_| outside())?;
        let fd = open_beneath(dirs.alloc, below).map_err(failed)?;
        return if is_the_tasks(&fd, dirs).map_err(failed)? { Ok(fd) } else { Err(outside()) };
    }
    let (root, below) = match path.strip_prefix("alloc") {
        Ok(below) => (dirs.alloc.join("alloc"), below),
        Err(_) => (dirs.alloc.join(dirs.task), path),
    };
    let fd = open_beneath(&root, below).map_err(failed)?;
    if is_the_tasks(&fd, dirs).map_err(failed)? { Ok(fd) } else { Err(outside()) }
}

/// Is it in one of the directories that the task sees anyway? Asked of what was opened, not of how it was written:
/// `private` is Nomad's own, and the other tasks' secrets are theirs.
fn is_the_tasks(fd: &OwnedFd, dirs: AllocDirs<'_>) -> io::Result<bool> {
    let opened = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    let alloc = std::fs::canonicalize(dirs.alloc)?;
    let task = alloc.join(dirs.task);
    let seen = [alloc.join("alloc"), task.join("local"), task.join("secrets"), task.join("tmp")];
    Ok(seen.iter().any(|directory| opened.starts_with(directory)))
}

/// A descriptor that only names a file: nothing is read, and a FIFO or device is not waited for.
fn open_path(path: &Path) -> io::Result<OwnedFd> {
    File::options().read(true).custom_flags(libc::O_PATH).open(path).map(OwnedFd::from)
}

/// Opens `below` without ever leaving `root`, whatever symlinks stand in the way (openat2(2), Linux 5.6).
fn open_beneath(root: &Path, below: &Path) -> io::Result<OwnedFd> {
    let root = open_path(root)?;
    if below.as_os_str().is_empty() {
        return Ok(root);
    }
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    match openat2(&root, below, how) {
        Err(nix::Error::EXDEV) => {
            Err(io::Error::new(io::ErrorKind::PermissionDenied, "it leads out of the directory it must stay in"))
        }
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn bind(source: &str) -> MountRequest {
        MountRequest {
            kind: MountKind::Bind { source: source.to_owned() },
            target: "/t".to_owned(),
            options: vec!["ro".to_owned()],
        }
    }

    #[test]
    fn sources_stay_where_they_belong() {
        let alloc = tempfile::tempdir().expect("a temporary directory");
        let outside = tempfile::tempdir().expect("a temporary directory");
        for directory in ["alloc/data", "web/local", "web/private"] {
            fs::create_dir_all(alloc.path().join(directory)).expect("made");
        }
        fs::write(alloc.path().join("web/local/file"), "x").expect("written");
        std::os::unix::fs::symlink(outside.path(), alloc.path().join("web/local/out")).expect("linked");
        std::os::unix::fs::symlink("file", alloc.path().join("web/local/in")).expect("linked");
        let dirs = AllocDirs { alloc: alloc.path(), task: "web" };
        let resolve = |source: &str, flavor, allowed: &[PathBuf]| resolve(&[bind(source)], dirs, flavor, allowed);
        let whole = alloc.path().join("alloc/data");
        for source in ["local/file", "local/in", "alloc/data", "local", whole.to_str().expect("utf-8")] {
            let resolved = resolve(source, Flavor::Secure, &[]).expect(source);
            let ResolvedMount::Bind { options, .. } = &resolved[0] else { panic!("a bind") };
            assert_eq!(*options, ["ro", "rbind"]);
        }
        std::os::unix::fs::symlink("../private", alloc.path().join("web/local/sly")).expect("linked");
        let private = alloc.path().join("web/private");
        let private = private.to_str().expect("utf-8");
        for source in [
            "local/out",
            "../other",
            "private",
            "./private",
            "local/../private",
            "local/sly",
            ".",
            private,
            "local/../../x",
            outside.path().to_str().expect("utf-8"),
        ] {
            assert!(resolve(source, Flavor::Secure, &[]).is_err(), "{source}");
        }
        let outside_text = outside.path().to_str().expect("utf-8");
        assert!(resolve(outside_text, Flavor::Secure, &[outside.path().to_owned()]).is_ok());
        assert!(resolve(outside_text, Flavor::DropIn, &[]).is_ok());
        assert!(resolve("local/missing", Flavor::DropIn, &[]).is_err());
        let fifo = outside.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("made");
        let fifo_text = fifo.to_str().expect("utf-8");
        assert!(resolve(fifo_text, Flavor::Secure, std::slice::from_ref(&fifo)).is_ok(), "not waited for");
    }
}
