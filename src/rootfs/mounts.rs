//! A job's own mounts: their sources found without leaving the directories they may come from.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt as _},
    path::{Component, Path, PathBuf},
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

fn open_source(
    source: &str,
    dirs: AllocDirs<'_>,
    flavor: Flavor,
    allow_paths: &[PathBuf],
) -> Result<OwnedFd, RootfsError> {
    let failed = |error: io::Error| RootfsError::Source { source_path: source.to_owned(), source: error };
    let path = Path::new(source);
    if !path.is_absolute() {
        let (root, below) = match path.strip_prefix("alloc") {
            Ok(below) => (dirs.alloc.join("alloc"), below),
            Err(_) => (dirs.alloc.join(dirs.task), path),
        };
        if below.components().next() == Some(Component::Normal("private".as_ref())) {
            return Err(RootfsError::SourceOutside { source_path: source.to_owned() });
        }
        return open_beneath(&root, below).map_err(failed);
    }
    if flavor == Flavor::DropIn {
        // As the old driver: any path of the host, symlinks followed.
        let opened = File::options().read(true).custom_flags(libc::O_PATH).open(path);
        return opened.map(OwnedFd::from).map_err(failed);
    }
    let roots = [dirs.alloc.to_owned()];
    let root = roots.iter().chain(allow_paths).find(|root| path.starts_with(root));
    let root = root.ok_or_else(|| RootfsError::SourceOutside { source_path: source.to_owned() })?;
    open_beneath(root, path.strip_prefix(root).unwrap_or(path)).map_err(failed)
}

/// Opens `below` without ever leaving `root`, whatever symlinks stand in the way (openat2(2), Linux 5.6).
fn open_beneath(root: &Path, below: &Path) -> io::Result<OwnedFd> {
    let root = File::open(root)?;
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
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
        for source in ["local/out", "../other", "private", "local/../../x", outside.path().to_str().expect("utf-8")] {
            assert!(resolve(source, Flavor::Secure, &[]).is_err(), "{source}");
        }
        let outside_text = outside.path().to_str().expect("utf-8");
        assert!(resolve(outside_text, Flavor::Secure, &[outside.path().to_owned()]).is_ok());
        assert!(resolve(outside_text, Flavor::DropIn, &[]).is_ok());
        assert!(resolve("local/missing", Flavor::DropIn, &[]).is_err());
    }
}
