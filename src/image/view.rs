//! Checks the mounts that a snapshotter returns for a view of an image's layers, before anything is mounted.
//!
//! The directories that the snapshotter names become the lower layers of root file systems, and its options are joined
//! with commas: a directory of the host in the list would be readable in every container of the image, and an option
//! with a comma in it could name another upper directory. containerd's own snapshotters answer with
//! `ROOT/snapshots/NUMBER/fs` (overlayfs) or `ROOT/snapshots/NUMBER` (native), where only root can write to
//! `ROOT/snapshots` (containerd/containerd, plugins/snapshots/overlay/overlay.go and
//! plugins/snapshots/native/native.go).

use std::{
    fs::File,
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Component, Path, PathBuf},
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::pb::types::Mount;

/// The name of the directory in which a snapshotter has its snapshots.
const SNAPSHOTS: &str = "snapshots";
/// The name of the directory in a snapshot that the overlayfs snapshotter mounts.
const SNAPSHOT_CONTENT: &str = "fs";
/// Options of overlayfs that name no path (Documentation/filesystems/overlayfs.rst). The overlayfs snapshotter sets the
/// first two by itself, and its configuration can add others.
const OPTIONS: [&str; 8] = ["index", "userxattr", "metacopy", "nfs_export", "redirect_dir", "uuid", "volatile", "xino"];
/// Write permission for the group and for others.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Why a snapshotter's mounts are not used.
#[derive(Debug, thiserror::Error)]
pub enum ViewProblem {
    /// There is not exactly one mount, or it is of another type.
    #[error(
        "mounts of type {0:?} can't become overlay layers; use the snapshotter overlayfs or native (containerd.snapshotter)"
    )]
    Type(String),
    /// A directory does not have the form of those of containerd's snapshotters.
    #[error("directory {0:?} is not of the form /.../snapshots/NUMBER or /.../snapshots/NUMBER/fs")]
    Directory(PathBuf),
    /// A user other than root could have made a directory.
    #[error("directory {0:?} does not belong to root, or others can write to it")]
    Owner(PathBuf),
    /// A directory does not exist, or is reached through a symlink.
    #[error("directory {path:?} can't be opened without following a symlink")]
    Open {
        /// The directory as the snapshotter names it.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// An option names a path or is not an option of overlayfs.
    #[error("mount option {0:?} is not one of {list}", list = OPTIONS.join(", "))]
    Option(String),
}

/// The directories of a view's layers, and how overlayfs must mount them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LayerStack {
    /// Read-only directories, topmost first.
    pub lowers: Vec<PathBuf>,
    /// The mount options besides `lowerdir` that the snapshotter wants.
    pub options: Vec<String>,
}

impl LayerStack {
    /// Reads a view's mounts: one read-only bind mount, or an overlay without an upper directory.
    ///
    /// # Errors
    /// Fails when the mounts are anything else, or have directories or options that containerd's snapshotters do not
    /// use.
    pub(crate) fn from_mounts(mounts: &[Mount]) -> Result<Self, ViewProblem> {
        let [mount] = mounts else { return Err(ViewProblem::Type(format!("{} mounts", mounts.len()))) };
        let mut stack = Self { lowers: Vec::new(), options: Vec::new() };
        match mount.r#type.as_str() {
            "bind" => stack.lowers.push(PathBuf::from(&mount.source)),
            "overlay" => {
                for option in &mount.options {
                    match option.strip_prefix("lowerdir=") {
                        Some(list) => stack.lowers = list.split(':').map(PathBuf::from).collect(),
                        None if names_no_path(option) => stack.options.push(option.clone()),
                        None => return Err(ViewProblem::Option(option.clone())),
                    }
                }
                if stack.lowers.is_empty() {
                    return Err(ViewProblem::Type("overlay without directories".to_owned()));
                }
            }
            other => return Err(ViewProblem::Type(other.to_owned())),
        }
        match stack.lowers.iter().find(|lower| split_snapshot_path(lower).is_none()) {
            Some(lower) => Err(ViewProblem::Directory(lower.clone())),
            None => Ok(stack),
        }
    }

    /// Checks that only root can have made the directories.
    ///
    /// # Errors
    /// Fails when a directory is missing, is reached through a symlink, or is in a directory that others can write to.
    pub(crate) fn check_ownership(&self) -> Result<(), ViewProblem> {
        self.lowers.iter().try_for_each(|lower| {
            let (root, below) = split_snapshot_path(lower).ok_or_else(|| ViewProblem::Directory(lower.clone()))?;
            let failed = |source| ViewProblem::Open { path: lower.clone(), source };
            // The path to the snapshots may go through symlinks, because the operator may have made containerd's root
            // one.
            let flags = libc::O_PATH | libc::O_DIRECTORY;
            let root = File::options().read(true).custom_flags(flags).open(root).map_err(failed)?;
            let metadata = root.metadata().map_err(failed)?;
            if metadata.uid() != nix::unistd::geteuid().as_raw() || metadata.mode() & WRITABLE_BY_OTHERS != 0 {
                return Err(ViewProblem::Owner(lower.clone()));
            }
            let how = OpenHow::new()
                .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
                .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
            openat2(&root, below, how).map(drop).map_err(|errno| failed(errno.into()))
        })
    }
}

/// Returns whether the text is a single option that names no path. A comma in it would begin another option.
fn names_no_path(option: &str) -> bool {
    let (name, value) = option.split_once('=').unwrap_or((option, ""));
    OPTIONS.contains(&name) && value.bytes().all(|byte| byte.is_ascii_lowercase())
}

/// Splits a layer's directory into the directory of all snapshots and the path below that; `None` if the path does not
/// have the form that containerd's snapshotters use.
fn split_snapshot_path(lower: &Path) -> Option<(&Path, &Path)> {
    if !lower.is_absolute() || lower.components().any(|part| part == Component::ParentDir) {
        return None;
    }
    let snapshot = if lower.file_name()? == SNAPSHOT_CONTENT { lower.parent()? } else { lower };
    let number = snapshot.file_name()?.to_str()?;
    let root = snapshot.parent()?;
    let is_numbered = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let is_snapshot = is_numbered && root.file_name()? == SNAPSHOTS;
    is_snapshot.then(|| Some((root, lower.strip_prefix(root).ok()?))).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt as _};

    fn overlay(options: &[&str]) -> Vec<Mount> {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        vec![Mount { r#type: "overlay".to_owned(), options, ..Mount::default() }]
    }

    fn bind(source: &str) -> Vec<Mount> {
        vec![Mount { r#type: "bind".to_owned(), source: source.to_owned(), ..Mount::default() }]
    }

    #[test]
    fn mounts_of_containerds_snapshotters_are_read() {
        let stack = LayerStack::from_mounts(&overlay(&[
            "index=off",
            "userxattr",
            "lowerdir=/s/snapshots/2/fs:/s/snapshots/1/fs",
        ]));
        let stack = stack.expect("as overlayfs has it");
        assert_eq!(stack.lowers, [Path::new("/s/snapshots/2/fs"), Path::new("/s/snapshots/1/fs")]);
        assert_eq!(stack.options, ["index=off", "userxattr"]);
        assert!(
            LayerStack::from_mounts(&bind("/s/snapshots/12")).is_ok()
                && LayerStack::from_mounts(&bind("/s/snapshots/12/fs")).is_ok()
        );
    }

    #[test]
    fn other_directories_are_refused() {
        for path in [
            "",
            "/",
            "/etc",
            "fs",
            "s/snapshots/1/fs",
            "/snapshots",
            "/s/snapshots/fs",
            "/s/snapshots/x/fs",
            "/s/snapshots/1/fs/..",
            "/s/snapshots/../1/fs",
            "/s/snapshots/1/work",
            "/s/snapshots/1/fs/etc",
            "/s/1/fs",
        ] {
            assert!(matches!(LayerStack::from_mounts(&bind(path)), Err(ViewProblem::Directory(_))), "{path}");
            let list = format!("lowerdir=/s/snapshots/1/fs:{path}");
            assert!(matches!(LayerStack::from_mounts(&overlay(&[&list])), Err(ViewProblem::Directory(_))), "{list}");
        }
    }

    #[test]
    fn other_options_are_refused() {
        let lower = "lowerdir=/s/snapshots/1/fs";
        for option in [
            "upperdir=/etc",
            "workdir=/x",
            "ro,upperdir=/etc",
            "index=off,upperdir=/etc",
            "lowerdir+=/etc",
            "datadir+=/",
            "userxattr,lowerdir=/",
            "index=/etc",
            "volatile,",
            "uidmap=0:0:1",
            "",
        ] {
            let refused = LayerStack::from_mounts(&overlay(&[lower, option]));
            assert!(matches!(&refused, Err(ViewProblem::Option(named)) if named == option), "{option}: {refused:?}");
        }
        assert!(matches!(LayerStack::from_mounts(&overlay(&["index=off"])), Err(ViewProblem::Type(_))));
        assert!(matches!(LayerStack::from_mounts(&[]), Err(ViewProblem::Type(_))));
    }

    #[test]
    fn only_roots_own_directories_are_used() {
        let scratch = tempfile::tempdir().expect("a directory");
        let snapshots = scratch.path().join("snapshots");
        fs::create_dir_all(snapshots.join("1/fs")).expect("created");
        fs::set_permissions(&snapshots, fs::Permissions::from_mode(0o700)).expect("changed");
        std::os::unix::fs::symlink("/etc", snapshots.join("2")).expect("linked");
        std::os::unix::fs::symlink(scratch.path(), scratch.path().join("link")).expect("linked");
        let check = |path: PathBuf| LayerStack { lowers: vec![path], options: Vec::new() }.check_ownership();
        assert!(check(snapshots.join("1/fs")).is_ok());
        assert!(check(scratch.path().join("link/snapshots/1/fs")).is_ok(), "the operator's own link");
        assert!(matches!(check(snapshots.join("2")), Err(ViewProblem::Open { .. })));
        assert!(matches!(check(snapshots.join("3/fs")), Err(ViewProblem::Open { .. })));
        fs::set_permissions(&snapshots, fs::Permissions::from_mode(0o777)).expect("changed");
        assert!(matches!(check(snapshots.join("1/fs")), Err(ViewProblem::Owner(_))));
    }
}
