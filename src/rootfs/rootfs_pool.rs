//! A pool of prepared root file systems of the most recently used images: overlays with fresh writable layers that are
//! not attached anywhere yet. To mount an overlay takes half a millisecond, most of it spent on the disk;
//! to attach a prepared one takes a tenth of that.
//!
//! A detached overlay lives as long as its descriptor (open_tree(2), Linux 5.2). If the plugin is killed, only the
//! overlay's writable layer remains, and the next plugin removes it.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use parking_lot::{Mutex, MutexGuard};

use super::{
    RootfsError, UpperStorage,
    bundle::{BundlePaths, Layers},
    detached,
    pins::PreparedPins,
};
use crate::{files::create_private_dir, ids::random_hex, places::list_names};

/// The pool of prepared root file systems.
#[derive(Debug)]
pub struct RootfsPool {
    dir: PathBuf,
    capacity: usize,
    prepared: Mutex<Vec<PreparedRootfs>>,
    /// Directories to be removed, but not during a start: those of used root file systems, and those that could not be
    /// removed before.
    to_remove: Mutex<Vec<BundlePaths>>,
    /// Whether the pool prepares no more root file systems. A thread that prepares one holds this lock.
    closed: Mutex<bool>,
}

/// A root file system that waits for a task, and the file system for the sources of the task's mounts.
#[derive(Debug)]
struct PreparedRootfs {
    layer_ids: LayerIds,
    paths: BundlePaths,
    tree: OwnedFd,
    pins: PreparedPins,
}

/// The layers of a root file system, identified by path, device and inode: an image's layers may be removed and come
/// back as other directories.
#[derive(Debug, PartialEq, Eq)]
struct LayerIds {
    lowers: Vec<(PathBuf, u64, u64)>,
    options: Vec<String>,
}

impl LayerIds {
    fn of(layers: Layers<'_>) -> io::Result<Self> {
        let identified = |path: &PathBuf| device_and_inode(path).map(|(dev, ino)| (path.clone(), dev, ino));
        let lowers = layers.lowers.iter().map(identified).collect::<io::Result<_>>()?;
        Ok(Self { lowers, options: layers.options.to_vec() })
    }

    fn is_current(&self) -> bool {
        let same = |(path, dev, ino): &(PathBuf, u64, u64)| device_and_inode(path).is_ok_and(|now| now == (*dev, *ino));
        self.lowers.iter().all(same)
    }
}

/// Whether a pool has room for a further root file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// The pool takes one more.
    ForMore,
    /// The pool is full or closed.
    None,
}

/// Returns the position of the root file system that a full pool gives up: the oldest one of the image that has the most
/// of them. `images` is ordered by age, with the oldest first, and not empty.
fn least_useful<T: PartialEq>(images: &[T]) -> usize {
    let count = |image: &T| images.iter().filter(|other| *other == image).count();
    let most = images.iter().map(count).max();
    images.iter().position(|image| Some(count(image)) == most).unwrap_or_default()
}

/// Returns the device and inode of a directory.
fn device_and_inode(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|file| (file.dev(), file.ino()))
}

impl RootfsPool {
    /// Returns a pool of up to `capacity` root file systems. No other process uses `dir`, which is on the file system
    /// of the writable layers.
    pub fn new(dir: PathBuf, capacity: usize) -> Self {
        let this = Self {
            dir,
            capacity,
            prepared: Mutex::default(),
            to_remove: Mutex::default(),
            closed: Mutex::new(capacity == 0),
        };
        // An entry here belongs to a plugin that was killed. If the entries can't be listed now, the next plugin
        // removes them.
        let stale = list_names(&this.dir).unwrap_or_else(|error| {
            tracing::warn!(
                error = %crate::error_chain(&error),
                "could not list an earlier plugin's prepared root file systems"
            );
            Vec::new()
        });
        for name in stale {
            this.remove(this.paths(&name));
        }
        this
    }

    fn paths(&self, name: &str) -> BundlePaths {
        let dir = self.dir.join(name);
        BundlePaths { upper: dir.join("layer"), bundle: dir }
    }

    fn remove_pending(&self) {
        let pending = std::mem::take(&mut *self.to_remove.lock());
        pending.into_iter().for_each(|paths| self.remove(paths));
    }

    /// Removes the directories of a root file system. A removal that fails, for example for lack of descriptors, is
    /// tried again later.
    fn remove(&self, paths: BundlePaths) {
        if !remove(&paths) {
            self.to_remove.lock().push(paths);
        }
    }

    fn discard(&self, PreparedRootfs { tree, paths, .. }: PreparedRootfs) {
        drop(tree);
        self.remove(paths);
    }

    fn prepared(&self) -> MutexGuard<'_, Vec<PreparedRootfs>> {
        self.prepared.lock()
    }

    /// Attaches a root file system that was prepared from the present directories of these layers in an existing
    /// bundle. Returns the file system for the sources of mounts that was prepared with it, or `None` when the pool has
    /// no root file system with these layers.
    ///
    /// # Errors
    /// Fails as rename(2) and move_mount(2) do; nothing is mounted then.
    pub fn attach(&self, layers: Layers<'_>, to: &BundlePaths) -> io::Result<Option<PreparedPins>> {
        if self.prepared().is_empty() {
            return Ok(None);
        }
        let layer_ids = LayerIds::of(layers)?;
        let PreparedRootfs { paths, tree, pins, .. } = {
            let mut prepared = self.prepared();
            let Some(found) = prepared.iter().position(|rootfs| rootfs.layer_ids == layer_ids) else {
                return Ok(None);
            };
            prepared.remove(found)
        };
        let attached = fs::rename(&paths.upper, &to.upper).and_then(|()| detached::attach(&tree, &to.rootfs()));
        self.to_remove.lock().push(paths);
        if attached.is_err() {
            drop(tree);
            // If the directory can't be removed, the caller's next step fails and reports it: that step makes a new
            // directory there.
            let _ = fs::remove_dir_all(&to.upper);
        }
        attached.map(|()| Some(pins))
    }

    /// Prepares a root file system for these layers, unless the pool is full and has one. In a full pool it replaces one
    /// of another image. Root file systems whose layers are gone make room first. Returns whether there is room for a
    /// further one. Waits while another thread prepares one, and blocks for some milliseconds.
    ///
    /// # Errors
    /// Fails when a file system operation or mount(2) fails. Where the kernel has no detached mounts, or the plugin may
    /// not use them, only the first call fails: the pool is closed then.
    pub fn prepare(&self, layers: Layers<'_>) -> Result<Room, RootfsError> {
        let mut closed = self.closed.lock();
        self.remove_pending();
        self.prune();
        let layer_ids = LayerIds::of(layers).map_err(|source| RootfsError::LayersGone { source })?;
        if *closed {
            return Ok(Room::None);
        }
        let replaced = {
            let mut prepared = self.prepared();
            let is_full = prepared.len() >= self.capacity;
            if is_full && prepared.iter().any(|rootfs| rootfs.layer_ids == layer_ids) {
                return Ok(Room::None);
            }
            is_full.then(|| {
                let position = least_useful(&prepared.iter().map(|rootfs| &rootfs.layer_ids).collect::<Vec<_>>());
                prepared.remove(position)
            })
        };
        replaced.into_iter().for_each(|replaced| self.discard(replaced));
        let paths = self.paths(&random_hex(6));
        match mount_detached(&paths, layers) {
            Ok((tree, pins)) => {
                let mut prepared = self.prepared();
                prepared.push(PreparedRootfs { layer_ids, paths, tree, pins });
                Ok(if prepared.len() < self.capacity { Room::ForMore } else { Room::None })
            }
            Err(error) => {
                self.remove(paths);
                if let RootfsError::MountRootfs { source, .. } = &error {
                    *closed = matches!(source.raw_os_error(), Some(libc::ENOSYS | libc::EPERM));
                }
                Err(error)
            }
        }
    }

    /// Discards root file systems whose layers are gone.
    pub fn prune(&self) {
        let gone: Vec<PreparedRootfs> =
            self.prepared().extract_if(.., |rootfs| !rootfs.layer_ids.is_current()).collect();
        gone.into_iter().for_each(|gone| self.discard(gone));
    }

    /// Discards all root file systems.
    pub fn discard_all(&self) {
        // This comes first: a removal that fails below is added to the list, and must not be tried again at once.
        self.remove_pending();
        let all = std::mem::take(&mut *self.prepared());
        all.into_iter().for_each(|prepared| self.discard(prepared));
    }

    /// Discards all root file systems, and prepares no more.
    pub fn close(&self) {
        *self.closed.lock() = true;
        self.discard_all();
        // This fails when a root file system could not be removed, which has been logged already.
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Unmounts and removes a prepared root file system. Returns whether that succeeded.
fn remove(paths: &BundlePaths) -> bool {
    let removed = paths.unmount().and_then(|()| paths.remove()).inspect_err(|error| {
        tracing::warn!(
            path = %paths.bundle.display(),
            error = %crate::error_chain(&error),
            "could not remove a prepared root file system"
        );
    });
    removed.is_ok()
}

/// Mounts an overlay and a file system for the sources of mounts, and detaches both right away.
fn mount_detached(paths: &BundlePaths, layers: Layers<'_>) -> Result<(OwnedFd, PreparedPins), RootfsError> {
    let (rootfs, pins) = (paths.rootfs(), paths.pins());
    create_private_dir(&rootfs).map_err(|source| RootfsError::File {
        doing: "create",
        path: rootfs.clone(),
        source,
    })?;
    paths.mount(layers, &UpperStorage::Disk)?;
    let tree = detached::detach(&rootfs).map_err(|source| RootfsError::MountRootfs { path: rootfs, source })?;
    let pins = PreparedPins::make(&pins).map_err(|source| RootfsError::MountRootfs { path: pins, source })?;
    Ok((tree, pins))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_with_several_gives_one_up() {
        for (images, position) in [("a", 0), ("ab", 0), ("aa", 0), ("abb", 1), ("abcb", 1), ("abcabc", 0)] {
            let images: Vec<char> = images.chars().collect();
            assert_eq!(least_useful(&images), position, "{images:?}");
        }
    }
}
