//! Root file systems made ahead: an overlay with a fresh writable layer for each of the images used last, attached nowhere
//! yet. To mount one takes half a millisecond, most of it the disk's; to put one in its place takes a tenth.
//!
//! An overlay that is attached nowhere lives as long as its descriptor (open_tree(2), Linux 5.2): what is left of it when we
//! are killed is its writable layer, which the next instance removes.

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
    pins: PreparedPins,
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

    /// Mounts a root file system that was made from these layers, as they are now, in a bundle that is there. Returns the
    /// file system for the sources of mounts that was made with it; `None` when none was made from these layers.
    ///
    /// # Errors
    /// As rename(2) and move_mount(2); nothing is mounted then.
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
            // Whoever makes a new one there says so if that is no good.
            let _ = fs::remove_dir_all(&to.upper);
        }
        attached.map(|()| Some(pins))
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

/// Mounts an overlay, and a file system for the sources of mounts, and detaches both at once.
fn prepared(paths: &BundlePaths, layers: Layers<'_>) -> Result<(OwnedFd, PreparedPins), RootfsError> {
    let (rootfs, pins) = (paths.rootfs(), paths.pins());
    make_dir(&rootfs).map_err(|source| RootfsError::File { doing: "create", path: rootfs.clone(), source })?;
    paths.mount(layers, &UpperOn::Disk)?;
    let tree = detached::detach(&rootfs).map_err(|source| RootfsError::Mount { path: rootfs, source })?;
    let pins = PreparedPins::make(&pins).map_err(|source| RootfsError::Mount { path: pins, source })?;
    Ok((tree, pins))
}
