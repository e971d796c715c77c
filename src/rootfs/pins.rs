//! The file system in memory below a bundle, `mounts`, in which the sources of the task's mounts are pinned.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::Path,
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{detached, mounts::open_path};

/// How far a task may let its own hosts file and the like grow.
const GROWTH_MAX: usize = 1 << 20;
/// Texts of this length fit into each file system of this kind; for longer ones it is made larger.
const TEXT_MAX: usize = 32 << 10;

/// A file system for a bundle, made ahead and attached nowhere. Dropping it removes it.
#[derive(Debug)]
pub struct PreparedPins(OwnedFd);

impl PreparedPins {
    /// Makes one, with `dir` as its mount point meanwhile.
    ///
    /// # Errors
    /// As the file system, mount(2) and open_tree(2).
    pub fn make(dir: &Path) -> io::Result<Self> {
        mount_at(dir, 0)?;
        detached::detach(dir).map(Self)
    }
}

/// The file system of one start. Its mount is known by a descriptor, and not by its path: a later start of the same bundle
/// has another one there.
#[derive(Debug)]
pub struct Pins(OwnedFd);

impl Pins {
    /// Puts the file system at `dir`, which it makes: the prepared one where the task's own files, of `text` bytes
    /// together, have room in that.
    ///
    /// # Errors
    /// As the file system and mount(2).
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

    /// Unmounts the file system and all that is mounted in it. It is fine if that has happened already.
    ///
    /// # Errors
    /// As mount(2) and umount2(2).
    pub fn unmount(&self) -> io::Result<()> {
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        let path = path.as_str();
        // A lazy unmount reaches the peers of what is mounted in there, which are the host's own: `bundle.rs`.
        let unmounted = mount(None::<&str>, path, None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
            .and_then(|()| umount2(path, MntFlags::MNT_DETACH));
        match unmounted {
            // EINVAL: it is attached nowhere any more.
            Ok(()) | Err(nix::Error::EINVAL) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Makes `dir` and mounts the file system there. It spreads nowhere, so that the sources are not held in other mount
/// namespaces as well.
fn mount_at(dir: &Path, text: usize) -> io::Result<()> {
    let options = format!("mode=700,size={}", GROWTH_MAX + 2 * text.max(TEXT_MAX));
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    fs::DirBuilder::new().mode(0o700).create(dir)?;
    mount(Some("tmpfs"), dir, Some("tmpfs"), flags, Some(options.as_str()))?;
    mount(None::<&str>, dir, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    Ok(())
}
