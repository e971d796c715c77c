//! The directory `mounts` of a bundle: a file system in memory in which the sources of the task's mounts are pinned.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::Path,
};

use nix::mount::{MntFlags, MsFlags, mount};

use super::{detached, mounts::open_path};

/// The number of bytes by which a task may let its own files, such as its hosts file, grow.
const GROWTH_MAX: usize = 1 << 20;
/// The total length in bytes of the task's own files for which each such file system has room. The file system is made
/// larger for longer files.
const TEXT_MAX: usize = 32 << 10;

/// A prepared file system for the sources of a task's mounts. It is not attached anywhere yet, and vanishes when it is
/// dropped.
#[derive(Debug)]
pub struct PreparedPins(OwnedFd);

impl PreparedPins {
    /// Prepares a file system, with `dir` as its temporary mount point.
    ///
    /// # Errors
    /// Fails when a file system operation, mount(2) or open_tree(2) fails.
    pub fn make(dir: &Path) -> io::Result<Self> {
        mount_at(dir, 0)?;
        detached::detach(dir).map(Self)
    }
}

/// The file system for the sources of one start's mounts. The descriptor identifies the mount. The path does not,
/// because a later start with the same bundle mounts another file system there.
#[derive(Debug)]
pub struct Pins(OwnedFd);

impl Pins {
    /// Creates `dir` and puts the file system there. It uses the prepared one if that has room for the task's own
    /// files, which have `text` bytes in total.
    ///
    /// # Errors
    /// Fails when a file system operation or mount(2) fails.
    pub fn attach(dir: &Path, text: usize, prepared: Option<PreparedPins>) -> io::Result<Self> {
        match prepared {
            Some(PreparedPins(tree)) if text <= TEXT_MAX => {
                fs::DirBuilder::new().mode(0o700).create(dir)?;
                detached::attach(&tree, dir).map(|()| Self(tree))
            }
            Some(_) | None => {
                mount_at(dir, text)?;
                open_path(dir).map(Self)
            }
        }
    }

    /// Unmounts the file system and everything that is mounted in it. Does nothing if it is unmounted already.
    ///
    /// # Errors
    /// Fails as mount(2) and umount2(2) do.
    pub fn unmount(&self) -> io::Result<()> {
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        match detached::unmount_tree(Path::new(&path), MntFlags::empty()) {
            // EINVAL means that the file system is not attached anywhere any more.
            Ok(()) | Err(nix::Error::EINVAL) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Creates `dir` and mounts the file system there. The mount is private, so that other mount namespaces don't keep the
/// sources in use as well.
fn mount_at(dir: &Path, text: usize) -> io::Result<()> {
    let options = format!("mode=700,size={}", GROWTH_MAX + 2 * text.max(TEXT_MAX));
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    fs::DirBuilder::new().mode(0o700).create(dir)?;
    mount(Some("tmpfs"), dir, Some("tmpfs"), flags, Some(options.as_str()))?;
    mount(None::<&str>, dir, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    Ok(())
}
