//! A small disk that belongs to the test and holds a directory of the driver. The test can fill it.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Enough for the records and bundles of a run.
const SIZE: &str = "size=48m";
const FILLER: &str = ".filler";

/// A file system in memory, at this path.
pub(crate) struct Disk(PathBuf);

impl Disk {
    /// Mounts a disk at `path`. If the directory has contents, the mount hides them.
    pub(crate) fn mount(path: &Path) -> Self {
        fs::create_dir_all(path).unwrap();
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(SIZE)).unwrap();
        Self(path.to_owned())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Fills the disk until no space is left.
    pub(crate) fn fill(&self) {
        let Ok(mut file) = fs::File::create(self.0.join(FILLER)) else { return };
        for size in [1 << 20, 4096, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
    }

    /// Frees the space again.
    pub(crate) fn empty(&self) {
        let _ = fs::remove_file(self.0.join(FILLER));
    }

    /// Drops the disk's contents, as a reboot of the host does for a file system in memory.
    pub(crate) fn forget(&self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        mount(Some("tmpfs"), &self.0, Some("tmpfs"), MsFlags::empty(), Some(SIZE)).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
