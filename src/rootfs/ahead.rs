//! A pool of prepared root file systems: for each of the most recently used images, an overlay with a fresh writable
//! layer that is not attached anywhere yet. To mount an overlay takes half a millisecond, most of it spent on the disk;
//! to attach a prepared one takes a tenth of that.
//!
//! A detached overlay lives as long as its descriptor (open_tree(2), Linux 5.2). If the plugin is killed, only the
//! overlay's writable layer remains, and the next plugin removes it.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{
    RootfsError, UpperOn,
    bundle::{BundlePaths, Layers},
    detached,
    pins::PreparedPins,
};
use crate::{
    ids::random_hex,
    places::{make_dir, names},
};

/// The pool of prepared root file systems.
#[derive(Debug)]
pub struct Ahead {
    dir: PathBuf,
    most: usize,
    cells: Mutex<Vec<Cell>>,
    /// The directories of root file systems that tasks have taken. They are removed later, and not while a task starts.
    spent: Mutex<Vec<BundlePaths>>,
    /// Whether the pool prepares no more root file systems. A thread that prepares one holds this lock.
    closed: Mutex<bool>,
}

/// A root file system that waits for a task, and the file system for the sources of the task's mounts.
#[derive(Debug)]
struct Cell {
    stack: Stack,
    paths: BundlePaths,
    tree: OwnedFd,
    pins: PreparedPins,
}

/// The layers of a root file system, identified by path, device and inode: an image's layers may be removed and come
/// back as other directories.
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

/// Returns the device and inode of a directory.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|file| (file.dev(), file.ino()))
}

impl Ahead {
    /// Returns a pool of up to `most` root file systems. No other process uses `dir`, which is on the file system of
    /// the writable layers.
    pub fn new(dir: PathBuf, most: usize) -> Self {
        let this = Self { dir, most, cells: Mutex::default(), spent: Mutex::default(), closed: Mutex::new(most == 0) };
        // These are from a plugin that was killed. If they can't be listed now, the next plugin removes them.
        let stale = names(&this.dir).unwrap_or_else(|error| {
            tracing::warn!(
                error = %crate::chain(&error),
                "could not list an earlier plugin's prepared root file systems"
            );
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

    /// Attaches a root file system that was prepared from these layers, as they are now, in an existing bundle. Returns
    /// the file system for the sources of mounts that was prepared with it, or `None` when the pool has no root file
    /// system with these layers.
    ///
    /// # Errors
    /// Fails as rename(2) and move_mount(2) do; nothing is mounted then.
    pub fn attach(&self, layers: Layers<'_>, to: &BundlePaths) -> io::Result<Option<PreparedPins>> {
        if self.cells().is_empty() {
            return Ok(None);
        }
        let stack = Stack::of(layers)?;
        let Cell { paths, tree, pins, .. } = {
            let mut cells = self.cells();
            let Some(found) = cells.iter().position(|cell| cell.stack == stack) else { return Ok(None) };
            cells.remove(found)
        };
        let attached = fs::rename(&paths.upper, &to.upper).and_then(|()| detached::attach(&tree, &to.rootfs()));
        self.spent().push(paths);
        if attached.is_err() {
            drop(tree);
            // If the directory can't be removed, the caller's next step, which makes a new one there, reports it.
            let _ = fs::remove_dir_all(&to.upper);
        }
        attached.map(|()| Some(pins))
    }

    /// Prepares a root file system for these layers if the pool has none. In a full pool it replaces the oldest one.
    /// Does nothing while another thread prepares one. Blocks for some milliseconds.
    ///
    /// # Errors
    /// Fails when a file system operation or mount(2) fails. Where the kernel has no detached mounts, or the plugin may
    /// not use them, only the first call fails: the pool is closed then.
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
        match prepared(&paths, layers) {
            Ok((tree, pins)) => {
                self.cells().push(Cell { stack, paths, tree, pins });
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

    /// Discards root file systems whose layers are gone.
    pub fn prune(&self) {
        let gone: Vec<Cell> = self.cells().extract_if(.., |cell| !cell.stack.is_current()).collect();
        gone.into_iter().for_each(Cell::discard);
    }

    /// Discards all root file systems.
    pub fn give_up(&self) {
        let all = std::mem::take(&mut *self.cells());
        all.into_iter().for_each(Cell::discard);
        self.remove_spent();
    }

    /// Discards all root file systems, and prepares no more.
    pub fn close(&self) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.give_up();
        // The directory is not empty when a root file system could not be removed, which has been logged then.
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
        tracing::warn!(
            path = %paths.bundle.display(),
            error = %crate::chain(&error),
            "could not remove a prepared root file system"
        );
    }
}

/// Mounts an overlay and a file system for the sources of mounts, and detaches both right away.
fn prepared(paths: &BundlePaths, layers: Layers<'_>) -> Result<(OwnedFd, PreparedPins), RootfsError> {
    let (rootfs, pins) = (paths.rootfs(), paths.pins());
    make_dir(&rootfs).map_err(|source| RootfsError::File { doing: "create", path: rootfs.clone(), source })?;
    paths.mount(layers, &UpperOn::Disk)?;
    let tree = detached::detach(&rootfs).map_err(|source| RootfsError::Mount { path: rootfs, source })?;
    let pins = PreparedPins::make(&pins).map_err(|source| RootfsError::Mount { path: pins, source })?;
    Ok((tree, pins))
}
