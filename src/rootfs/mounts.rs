//! Sources of mounts. A look-up never leaves the directories that a source may come from. Each source is held open, so
//! that no task can put something else in its place.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{SFlag, fstat},
};

use super::{RootfsError, mount_origin::MountOrigin, target::MountTarget};
use crate::{
    failure::{self, Cause},
    ids::Flavor,
};

/// The name that errors give to the source of a `mounts` block.
const SOURCE_OPTION: &str = "mounts: source";

/// One `mounts` block whose form has been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountRequest {
    /// The kind of mount, with its source.
    pub kind: MountKind,
    /// The mount's target in the container.
    pub target: MountTarget,
    /// The options, as in fstab(5).
    pub options: Vec<String>,
}

/// The kinds of mount that a job can ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountKind {
    /// A file or directory of the host (`bind`, and `volume`, for which there is no store of volumes).
    Bind {
        /// The path, absolute or relative to the task's directory.
        source: String,
    },
    /// A file system of another type, such as `tmpfs`, which is passed to the runtime as it is.
    FileSystem {
        /// The file system's type.
        kind: String,
        /// The file system's source.
        source: String,
    },
}

/// Directories of the allocation on the host.
#[derive(Debug, Clone, Copy)]
pub struct AllocDirs<'a> {
    /// The allocation's directory.
    pub alloc: &'a Path,
    /// The task's name, which is also the name of its directory in the allocation's.
    pub task: &'a str,
}

/// A mount of a task, whose source on the host has been opened.
#[derive(Debug, Clone)]
pub struct TaskMount {
    /// What asks for the mount.
    pub origin: MountOrigin,
    /// The mount's target in the container.
    pub target: MountTarget,
    /// The file, directory or file system that is mounted.
    pub content: MountContent,
    /// The options, as in fstab(5).
    pub options: Vec<String>,
}

impl TaskMount {
    /// Returns the error for a mount that can't be, or may not be, at its target.
    pub(super) fn target_error(&self, problem: String) -> RootfsError {
        RootfsError::Target { origin: self.origin.clone(), target: self.target.to_string(), problem }
    }

    /// Returns the error for a mount whose target could not be looked up in the image. A failure of the host keeps its
    /// errno, which distinguishes it from a path that the image does not have.
    pub(super) fn unresolved(&self, source: io::Error) -> RootfsError {
        match failure::of_error(&source) {
            Some(Cause::Host) => {
                RootfsError::MountAtTarget { origin: self.origin.clone(), target: self.target.to_string(), source }
            }
            _ => self.target_error(source.to_string()),
        }
    }
}

/// A file or directory of the host. It is held open, so that no other process can exchange it.
#[derive(Debug, Clone)]
pub struct MountSource {
    opened: Arc<OwnedFd>,
    is_directory: bool,
    /// Device and inode.
    identity: (u64, u64),
}

impl MountSource {
    /// Reads the type and identity of an opened file or directory. This is done only once, because each further call of
    /// fstat(2) could block on a dead network file system.
    ///
    /// # Errors
    /// Fails as fstat(2) does.
    pub fn of(opened: OwnedFd) -> io::Result<Self> {
        let found = fstat(&opened)?;
        let is_directory = SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR;
        Ok(Self { opened: Arc::new(opened), is_directory, identity: (found.st_dev, found.st_ino) })
    }

    /// Returns whether the source is a directory.
    pub fn is_directory(&self) -> bool {
        self.is_directory
    }

    /// Returns whether the source is the file or directory that the host has at `path`.
    pub fn is_host_path(&self, path: &str) -> bool {
        std::fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == self.identity)
    }

    /// Returns the current path of the source.
    ///
    /// # Errors
    /// Fails as readlink(2) does.
    pub fn path(&self) -> io::Result<PathBuf> {
        std::fs::read_link(self.fd_path())
    }

    /// Returns a path by which this process can mount the source.
    pub(super) fn fd_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.opened.as_raw_fd()))
    }
}

/// The content of a mount.
#[derive(Debug, Clone)]
pub enum MountContent {
    /// A file or directory of the host.
    Bind(MountSource),
    /// A file that the driver makes for the task, with this text.
    File(String),
    /// A directory that the driver makes for the task, with the content that the image has at the target. It is removed
    /// together with the task's writable layer.
    Volume,
    /// A new file system.
    FileSystem {
        /// The file system's type.
        kind: String,
        /// The file system's source.
        source: String,
    },
}

/// Opens the sources of all `mounts` blocks. A relative source is a path in the task's directory (`local/…`,
/// `secrets/…`), or begins with `alloc/`. An absolute source must, with `Flavor::Strict`, be below the allocation's
/// directory or one of `allow_paths`.
///
/// # Errors
/// Fails when a source is missing, leaves its directory, or may not be mounted.
pub fn resolve_sources(
    requests: &[MountRequest],
    dirs: AllocDirs<'_>,
    flavor: Flavor,
    allow_paths: &[PathBuf],
) -> Result<Vec<TaskMount>, RootfsError> {
    let resolved = requests.iter().enumerate().map(|(number, request)| {
        let mut options = request.options.clone();
        let content = match &request.kind {
            MountKind::FileSystem { kind, source } => {
                MountContent::FileSystem { kind: kind.clone(), source: source.clone() }
            }
            MountKind::Bind { source } => {
                if !options.iter().any(|option| option == "bind" || option == "rbind") {
                    options.push("rbind".to_owned());
                }
                let opened = open_source(SOURCE_OPTION, source, dirs, flavor, allow_paths)?;
                let failed =
                    |error| RootfsError::Source { option: SOURCE_OPTION, source_path: source.clone(), source: error };
                MountContent::Bind(MountSource::of(opened).map_err(failed)?)
            }
        };
        Ok(TaskMount { origin: MountOrigin::Job(number), target: request.target.clone(), content, options })
    });
    resolved.collect()
}

/// Opens a directory that Nomad has made for a task (`alloc`, `local`, `secrets`, `alloc/logs`) below the allocation's
/// directory. No component may be a link, since tasks of the allocation can create links in some of these directories.
///
/// # Errors
/// Fails when it is missing, is not a directory, or is behind a link.
pub fn open_alloc_dir(alloc_dir: &Path, below: &Path) -> Result<MountSource, RootfsError> {
    let opened = || {
        let root = open_path(alloc_dir)?;
        let source = MountSource::of(open_without_links(&root, below)?)?;
        if source.is_directory() {
            Ok(source)
        } else {
            Err(io::Error::new(io::ErrorKind::NotADirectory, "it is not a directory"))
        }
    };
    opened().map_err(|source| RootfsError::AllocDir { path: alloc_dir.join(below), source })
}

/// Opens a file or directory of the host whose path the operator or Nomad has chosen, so links are followed. Errors
/// name the option that asks for it.
///
/// # Errors
/// Fails when it is missing.
pub fn open_host_path(option: &'static str, path: &Path) -> Result<MountSource, RootfsError> {
    open_path(path).and_then(MountSource::of).map_err(|source| RootfsError::Source {
        option,
        source_path: path.to_string_lossy().into_owned(),
        source,
    })
}

/// Opens a file or directory of the host that a job names, by the rules for sources of mounts (`resolve_sources`). The
/// descriptor only refers to the file (`O_PATH`). Errors name the option that asks for it.
///
/// # Errors
/// Fails when it is missing, leaves its directory, or may not be used.
pub fn open_source(
    option: &'static str,
    source: &str,
    dirs: AllocDirs<'_>,
    flavor: Flavor,
    allow_paths: &[PathBuf],
) -> Result<OwnedFd, RootfsError> {
    let failed = |error: io::Error| RootfsError::Source { option, source_path: source.to_owned(), source: error };
    let outside = || RootfsError::SourceOutside { option, source_path: source.to_owned() };
    let path = Path::new(source);
    if path.is_absolute() {
        if flavor == Flavor::ContainerdDriver {
            // As in nomad-driver-containerd, a job may name any path of the host, and symlinks are followed.
            return open_path(path).map_err(failed);
        }
        if let Some(root) = allow_paths.iter().find(|root| path.starts_with(root)) {
            // Nothing lies outside of "/", so absolute links may be followed.
            if root == Path::new("/") {
                return open_path(path).map_err(failed);
            }
            return open_beneath(root, path.strip_prefix(root).unwrap_or(path)).map_err(failed);
        }
        let below = path.strip_prefix(dirs.alloc).map_err(|_| outside())?;
        let fd = open_beneath(dirs.alloc, below).map_err(failed)?;
        return if is_visible_to_task(&fd, dirs).map_err(failed)? { Ok(fd) } else { Err(outside()) };
    }
    let (root, below) = match path.strip_prefix("alloc") {
        Ok(below) => (dirs.alloc.join("alloc"), below),
        Err(_) => (dirs.alloc.join(dirs.task), path),
    };
    let fd = open_beneath(&root, below).map_err(failed)?;
    if is_visible_to_task(&fd, dirs).map_err(failed)? { Ok(fd) } else { Err(outside()) }
}

/// Returns whether an opened file is in one of the directories that the task sees anyway. The check uses the opened
/// file's real path, not the path in the job: `private` belongs to Nomad, and other tasks' secrets must stay secret.
fn is_visible_to_task(fd: &OwnedFd, dirs: AllocDirs<'_>) -> io::Result<bool> {
    let opened = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    let alloc = std::fs::canonicalize(dirs.alloc)?;
    let task = alloc.join(dirs.task);
    let seen = [alloc.join("alloc"), task.join("local"), task.join("secrets"), task.join("tmp")];
    Ok(seen.iter().any(|directory| opened.starts_with(directory)))
}

/// Opens a descriptor that only refers to a file (`O_PATH`). The descriptor can't be used to read, and the call does
/// not block on a FIFO or device.
pub(super) fn open_path(path: &Path) -> io::Result<OwnedFd> {
    File::options().read(true).custom_flags(libc::O_PATH).open(path).map(OwnedFd::from)
}

/// Opens `below` without ever leaving `root`, even if symlinks are on the way (openat2(2), Linux 5.6).
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

/// Opens `below` in the directory `root`. No component may be a link.
///
/// # Errors
/// Fails when a component is a link, and as openat2(2) does.
pub(super) fn open_without_links(root: impl AsFd, below: &Path) -> io::Result<OwnedFd> {
    match try_open_without_links(root, below) {
        Err(nix::Error::ELOOP) => {
            Err(io::Error::new(io::ErrorKind::PermissionDenied, "a symbolic link is on the way, and is not followed"))
        }
        other => Ok(other?),
    }
}

/// Opens `below` in the directory `root` as [`open_without_links`] does, for callers that expect links.
///
/// # Errors
/// Fails with `ELOOP` when a component is a link, and as openat2(2) does.
pub(super) fn try_open_without_links(root: impl AsFd, below: &Path) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, below, how)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn bind(source: &str) -> MountRequest {
        MountRequest {
            kind: MountKind::Bind { source: source.to_owned() },
            target: MountTarget::parse("/t").expect("a target"),
            options: vec!["ro".to_owned()],
        }
    }

    #[test]
    fn sources_outside_of_the_tasks_directories_are_refused() {
        let alloc = tempfile::tempdir().expect("a temporary directory");
        let outside = tempfile::tempdir().expect("a temporary directory");
        for directory in ["alloc/data", "web/local", "web/private"] {
            fs::create_dir_all(alloc.path().join(directory)).expect("made");
        }
        fs::write(alloc.path().join("web/local/file"), "x").expect("written");
        std::os::unix::fs::symlink(outside.path(), alloc.path().join("web/local/out")).expect("linked");
        std::os::unix::fs::symlink("file", alloc.path().join("web/local/in")).expect("linked");
        let dirs = AllocDirs { alloc: alloc.path(), task: "web" };
        let resolve =
            |source: &str, flavor, allowed: &[PathBuf]| resolve_sources(&[bind(source)], dirs, flavor, allowed);
        let whole = alloc.path().join("alloc/data");
        for source in ["local/file", "local/in", "alloc/data", "local", whole.to_str().expect("utf-8")] {
            let resolved = resolve(source, Flavor::Strict, &[]).expect(source);
            assert!(matches!(resolved[0].content, MountContent::Bind(_)), "a bind");
            assert_eq!(resolved[0].options, ["ro", "rbind"]);
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
            assert!(resolve(source, Flavor::Strict, &[]).is_err(), "{source}");
        }
        let outside_text = outside.path().to_str().expect("utf-8");
        assert!(resolve(outside_text, Flavor::Strict, &[outside.path().to_owned()]).is_ok());
        assert!(resolve(outside_text, Flavor::ContainerdDriver, &[]).is_ok());
        assert!(resolve("local/missing", Flavor::ContainerdDriver, &[]).is_err());
        let fifo = outside.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("made");
        let fifo_text = fifo.to_str().expect("utf-8");
        assert!(
            resolve(fifo_text, Flavor::Strict, std::slice::from_ref(&fifo)).is_ok(),
            "the call does not wait for a writer of the FIFO"
        );
    }

    #[test]
    fn nomads_directories_are_opened_without_following_links() {
        let alloc = tempfile::tempdir().expect("a temporary directory");
        let outside = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir_all(alloc.path().join("alloc/data")).expect("made");
        fs::create_dir_all(alloc.path().join("web")).expect("made");
        fs::write(alloc.path().join("web/secrets"), "").expect("written");
        std::os::unix::fs::symlink(outside.path(), alloc.path().join("alloc/logs")).expect("linked");
        std::os::unix::fs::symlink("../alloc", alloc.path().join("web/alloc")).expect("linked");
        let open =
            |below: &str| open_alloc_dir(alloc.path(), Path::new(below)).map_err(|error| crate::error_chain(&error));
        assert!(open("alloc").is_ok() && open("alloc/data").is_ok());
        for (below, why) in [
            ("alloc/logs", "symbolic link"),
            ("web/alloc/data", "symbolic link"),
            ("web/secrets", "not a directory"),
            ("web/local", "No such file"),
            ("../x", "Invalid cross-device link"),
        ] {
            let error = open(below).expect_err(below);
            assert!(error.contains(why) && error.contains(below.trim_start_matches("../")), "{below}: {error}");
        }
    }
}
