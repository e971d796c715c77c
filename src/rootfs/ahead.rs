//! Root file systems made ahead: an overlay with a fresh writable layer for each of the images used last, attached nowhere
//! yet. To mount one takes half a millisecond, most of it the disk's; to put one in its place takes a tenth.
//!
//! An overlay that is attached nowhere lives as long as its descriptor (open_tree(2), Linux 5.2): what is left of it when we
//! are killed is its writable layer, which the next instance removes.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::mount::{MntFlags, umount2};

use super::{
    RootfsError, UpperOn,
    bundle::{BundlePaths, Layers},
};
use crate::{
    ids::random_hex,
    places::{make_dir, names},
};

/// Attach the tree that a descriptor is (move_mount(2), `linux/mount.h`).
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x4;

/// Those that wait.
#[derive(Debug)]
pub struct Ahead {
    dir: PathBuf,
    most: usize,
    cells: Mutex<Vec<Cell>>,
    /// Directories of those that were taken, to be removed: not while a task is started.
    spent: Mutex<Vec<BundlePaths>>,
    /// Who makes one holds this: true when none is to be made any more.
    closed: Mutex<bool>,
}

/// One of them.
#[derive(Debug)]
struct Cell {
    stack: Stack,
    paths: BundlePaths,
    tree: OwnedFd,
}

/// Layers, and which directories those were: an image's may be removed and come back as others.
#[derive(Debug, PartialEq, Eq)]
struct Stack {
    lowers: Vec<(PathBuf, u64, u64)>,
    options: Vec<String>,
}

impl Stack {
    fn of(layers: Layers<'_>) -> io::Result<Self> {
        let identified = |path: &PathBuf| identity(path).map(|(dev, ino)| (path.clone(), dev, ino));
        let lowers = layers.lowers.iter().map(identified).collect::<io::Result<_>>()?;
        Ok(Self { lowers, options: layers.options.to_vec() })
    }

    fn is_current(&self) -> bool {
        let same = |(path, dev, ino): &(PathBuf, u64, u64)| identity(path).is_ok_and(|now| now == (*dev, *ino));
        self.lowers.iter().all(same)
    }
}

/// Which directory that is.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|file| (file.dev(), file.ino()))
}

impl Ahead {
    /// Keeps up to `most` of them; `dir` is ours alone, on the file system of the writable layers.
    pub fn new(dir: PathBuf, most: usize) -> Self {
        let this = Self { dir, most, cells: Mutex::default(), spent: Mutex::default(), closed: Mutex::new(most == 0) };
        // Of an instance that was killed. What can't be listed now is the next one's to remove.
        let stale = names(&this.dir).unwrap_or_else(|error| {
            tracing::warn!(error = %crate::chain(&error), "root file systems that an earlier plugin made ahead stay");
            Vec::new()
        });
        for name in stale {
            remove(&this.paths(&name));
        }
        this
    }

    fn paths(&self, name: &str) -> BundlePaths {
        let dir = self.dir.join(name);
        BundlePaths { upper: dir.join("layer"), bundle: dir }
    }

    fn spent(&self) -> MutexGuard<'_, Vec<BundlePaths>> {
        self.spent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove_spent(&self) {
        let spent = std::mem::take(&mut *self.spent());
        spent.iter().for_each(remove);
    }

    fn cells(&self) -> MutexGuard<'_, Vec<Cell>> {
        self.cells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mounts one that was made from these layers, as they are now, as the root file system of a bundle that is there. Was
    /// there one?
    ///
    /// # Errors
    /// As rename(2) and move_mount(2); nothing is mounted then.
    pub fn attach(&self, layers: Layers<'_>, to: &BundlePaths) -> io::Result<bool> {
        if self.cells().is_empty() {
            return Ok(false);
        }
        let stack = Stack::of(layers)?;
        let Cell { paths, tree, .. } = {
            let mut cells = self.cells();
            let Some(found) = cells.iter().position(|cell| cell.stack == stack) else { return Ok(false) };
            cells.remove(found)
        };
        let attached = fs::rename(&paths.upper, &to.upper).and_then(|()| move_mount(&tree, &to.rootfs()));
        self.spent().push(paths);
        if attached.is_err() {
            drop(tree);
            // Whoever makes a new one there says so if that is no good.
            let _ = fs::remove_dir_all(&to.upper);
        }
        attached.map(|()| true)
    }

    /// Makes one for these layers where none waits, in place of the one that has waited longest, unless somebody is at it.
    /// Blocks for some milliseconds.
    ///
    /// # Errors
    /// As the file system and mount(2). Where the kernel has no detached mounts, or nobody may use them, that is told once.
    pub fn make(&self, layers: Layers<'_>) -> Result<(), RootfsError> {
        let Ok(mut closed) = self.closed.try_lock() else { return Ok(()) };
        self.remove_spent();
        let stack = Stack::of(layers).map_err(|source| RootfsError::LayersGone { source })?;
        if *closed || self.cells().iter().any(|cell| cell.stack == stack) {
            return Ok(());
        }
        let oldest = {
            let mut cells = self.cells();
            (cells.len() >= self.most).then(|| cells.remove(0))
        };
        oldest.into_iter().for_each(Cell::discard);
        let paths = self.paths(&random_hex(6));
        match detached(&paths, layers) {
            Ok(tree) => {
                self.cells().push(Cell { stack, paths, tree });
                Ok(())
            }
            Err(error) => {
                remove(&paths);
                if let RootfsError::Mount { source, .. } = &error {
                    *closed = matches!(source.raw_os_error(), Some(libc::ENOSYS | libc::EPERM));
                }
                Err(error)
            }
        }
    }

    /// Gives up those whose layers are gone.
    pub fn prune(&self) {
        let gone: Vec<Cell> = self.cells().extract_if(.., |cell| !cell.stack.is_current()).collect();
        gone.into_iter().for_each(Cell::discard);
    }

    /// Gives up all of them.
    pub fn give_up(&self) {
        let all = std::mem::take(&mut *self.cells());
        all.into_iter().for_each(Cell::discard);
        self.remove_spent();
    }

    /// Gives up all of them, and makes no more.
    pub fn close(&self) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.give_up();
        // Not empty: of somebody who could not remove it, and has said so.
        let _ = fs::remove_dir(&self.dir);
    }
}

impl Cell {
    fn discard(self) {
        drop(self.tree);
        remove(&self.paths);
    }
}

fn remove(paths: &BundlePaths) {
    if let Err(error) = paths.unmount().and_then(|()| paths.remove()) {
        tracing::warn!(path = %paths.bundle.display(), error = %crate::chain(&error), "a root file system made ahead stays");
    }
}

/// Mounts an overlay and detaches it at once.
fn detached(paths: &BundlePaths, layers: Layers<'_>) -> Result<OwnedFd, RootfsError> {
    let rootfs = paths.rootfs();
    make_dir(&rootfs).map_err(|source| RootfsError::File { doing: "create", path: rootfs.clone(), source })?;
    paths.mount(layers, &UpperOn::Disk)?;
    let tree = open_tree(&rootfs);
    umount2(&rootfs, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
        .map_err(io::Error::from)
        .and(tree)
        .map_err(|source| RootfsError::Mount { path: rootfs, source })
}

/// A copy of what is mounted at `path`, attached nowhere.
fn open_tree(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: a terminated string, which the kernel only reads; it gives a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: just made, and ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn move_mount(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let target = CString::new(target.as_os_str().as_bytes())?;
    let (from, empty) = (tree.as_raw_fd(), c"");
    // SAFETY: an open descriptor and two terminated strings, which the kernel only reads.
    let moved = unsafe {
        let to = target.as_ptr();
        libc::syscall(libc::SYS_move_mount, from, empty.as_ptr(), libc::AT_FDCWD, to, MOVE_MOUNT_F_EMPTY_PATH)
    };
    if moved == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
