//! A small disk of the test's own for a directory of the driver, which can be filled.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Enough for the records and bundles of a run.
const SIZE: &str = "size=48m";
const FILLER: &str = ".filler";

/// A file system in memory.
pub(crate) struct Disk(PathBuf);

impl Disk {
    /// Mounts one at `path`, which may hold something that is hidden by it.
    pub(crate) fn mount(path: &Path) -> Self {
        fs::create_dir_all(path).unwrap();
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(SIZE)).unwrap();
        Self(path.to_owned())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Leaves no space.
    pub(crate) fn fill(&self) {
        let Ok(mut file) = fs::File::create(self.0.join(FILLER)) else { return };
        for size in [1 << 20, 4096, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
    }

    /// Gives the space back.
    pub(crate) fn empty(&self) {
        let _ = fs::remove_file(self.0.join(FILLER));
    }

    /// Forgets all that is on it, as memory does when the host is started anew.
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
