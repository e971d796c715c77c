//! The bundle: a directory with `config.json`, the files that the driver mounts into the container, and the root file
//! system.
//!
//! This module also removes what it creates. Each step of the removal can be called alone, and succeeds when there is
//! nothing to remove.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount};
use oci_spec::runtime::Spec;

use super::{RootfsError, detached::unmount_tree, mtab};
use crate::{
    failpoint,
    files::{create_private_dir, none_if_missing, remove_dir_all_if_exists, write_private},
    ids::ContainerId,
    overlay,
    places::{MountPoints, Places},
};

/// The paths of one task's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundlePaths {
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// The writable layer's directory, with `upper` and `work` below it.
    pub upper: PathBuf,
}

/// Where the driver stores writable layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpperStorage {
    /// In the state directory.
    Disk,
    /// In a file system in memory for each task. One unmount removes it, and its pages count as the task's own memory.
    Tmpfs {
        /// The size, as tmpfs(5) takes it; the kernel's default if it is `None`.
        size: Option<String>,
    },
}

/// The layers of an image.
#[derive(Debug, Clone, Copy)]
pub struct Layers<'a> {
    /// The read-only directories, the topmost first.
    pub lowers: &'a [PathBuf],
    /// Further options of the overlay.
    pub options: &'a [String],
}

impl BundlePaths {
    /// Returns the paths of a container's files.
    pub fn of(places: &Places, id: &ContainerId) -> Self {
        Self { bundle: places.bundle(id), upper: places.upper(id) }
    }

    /// Returns the mount point of the root file system.
    pub fn rootfs(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }

    /// Creates the bundle's directories.
    ///
    /// # Errors
    /// Fails when a file system operation fails.
    pub fn create(&self) -> Result<(), RootfsError> {
        let rootfs = self.rootfs();
        create_private_dir(&rootfs).map_err(|source| file("create", &rootfs, source))
    }

    /// Creates the writable layer, and mounts the root file system in an existing bundle.
    ///
    /// # Errors
    /// Fails when a directory can't be created or mounted; with `LayersGone` when the image's directories have
    /// vanished.
    pub fn mount(&self, layers: Layers<'_>, on: &UpperStorage) -> Result<(), RootfsError> {
        let rootfs = self.rootfs();
        create_private_dir(&self.upper).map_err(|source| file("create", &self.upper, source))?;
        if let UpperStorage::Tmpfs { size } = on {
            let path = &self.upper;
            let options = size.iter().fold("mode=700".to_owned(), |options, size| format!("{options},size={size}"));
            mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::MS_NODEV, Some(options.as_str()))
                .map_err(|errno| RootfsError::MountRootfs { path: path.clone(), source: errno.into() })?;
        }
        let work = self.upper.join("work");
        fs::DirBuilder::new().mode(0o700).create(&work).map_err(|source| file("create", &work, source))?;
        // The upper directory's mode becomes the mode of the container's "/", so it is copied from the topmost layer.
        // All images have 0755 there.
        let upper = self.upper.join("upper");
        let mode = layers
            .lowers
            .first()
            .and_then(|lower| fs::metadata(lower).ok())
            .map_or(0o755, |lower| lower.permissions().mode() & 0o7777);
        fs::DirBuilder::new()
            .mode(mode)
            .create(&upper)
            .and_then(|()| {
                // The process's umask may have cleared some bits. Only then is the mode set: a change costs a write to
                // the disk's journal.
                let made = fs::metadata(&upper)?.permissions().mode() & 0o7777;
                if made == mode { Ok(()) } else { fs::set_permissions(&upper, fs::Permissions::from_mode(mode)) }
            })
            .map_err(|source| file("make", &upper, source))?;
        overlay::mount_writable(layers.lowers, layers.options, &self.upper, &rootfs).map_err(|source| {
            let gone = source.kind() == io::ErrorKind::NotFound && layers.lowers.iter().any(|lower| !lower.exists());
            if gone {
                RootfsError::LayersGone { source }
            } else {
                RootfsError::MountRootfs { path: rootfs.clone(), source }
            }
        })?;
        // In a root file system that is prepared ahead, this takes no time of the start.
        mtab::add(&rootfs).map_err(|source| file("make /etc/mtab in", &rootfs, source))
    }

    /// Returns whether the root file system is mounted: an overlay has a device number of its own.
    ///
    /// # Errors
    /// Fails as stat(2) does.
    pub fn is_mounted(&self) -> io::Result<bool> {
        Ok(fs::metadata(self.rootfs())?.dev() != fs::metadata(&self.bundle)?.dev())
    }

    /// Writes `config.json`.
    ///
    /// # Errors
    /// Fails when a file system operation fails.
    pub fn write_spec(&self, spec: &Spec) -> Result<(), RootfsError> {
        let path = self.bundle.join("config.json");
        let bytes = serde_json::to_vec(spec).map_err(|error| file("encode", &path, error.into()))?;
        self.write(&path, &bytes)
    }

    /// Writes a file of the bundle. Only the driver's own user can read it: `config.json` holds the task's environment,
    /// secrets included.
    ///
    /// # Errors
    /// Fails when a file system operation fails.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), RootfsError> {
        write_private(path, bytes).map_err(|source| file("write", path, source))
    }

    /// Returns the path at which the source of the task's n-th mount is pinned, and from which the runtime mounts it.
    pub fn pin_path(&self, n: usize) -> PathBuf {
        self.pins().join(n.to_string())
    }

    /// Returns the directory in which the sources of all mounts are pinned: a file system of its own (`mount_tree`).
    pub(super) fn pins(&self) -> PathBuf {
        self.bundle.join("mounts")
    }

    /// Returns the directory of the volume that is the task's n-th mount. It is next to the writable layer and not in
    /// it, because a volume must not be on an overlay.
    pub(super) fn volume(&self, n: usize) -> PathBuf {
        self.upper.join("volumes").join(n.to_string())
    }

    /// Unmounts the sources of the task's mounts.
    ///
    /// # Errors
    /// Fails as umount2(2) does. Nothing mounted, or no directory, is not an error.
    pub fn unmount_pins(&self) -> Result<(), RootfsError> {
        if failpoint::skip("unmount") {
            return Ok(());
        }
        let pins = self.pins();
        unmount_all(&pins).map_err(|source| file("unmount", &pins, source))?;
        for point in self.legacy_pins()? {
            unmount_all(&point).map_err(|source| file("unmount", &point, source))?;
        }
        Ok(())
    }

    /// Returns the mount points of the sources of a task that an earlier version has started: it mounted each source in
    /// the bundle's directory on disk. A failure to list them is an error: if it passed for "nothing is mounted", the
    /// removal would descend into the sources.
    fn legacy_pins(&self) -> Result<Vec<PathBuf>, RootfsError> {
        let pins = self.pins();
        let listed = none_if_missing(fs::read_dir(&pins)).and_then(|entries| {
            let entries = entries.into_iter().flatten();
            entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()
        });
        listed.map_err(|source| file("list", &pins, source))
    }

    /// Unmounts the root file system and the sources of the task's mounts, however often they are mounted.
    ///
    /// # Errors
    /// Fails as umount2(2) does. Nothing mounted, or no directory, is not an error.
    pub fn unmount(&self) -> Result<(), RootfsError> {
        if failpoint::skip("unmount") {
            return Ok(());
        }
        self.unmount_pins()?;
        // The writable layer comes after the root file system, which uses it.
        for point in [self.rootfs(), self.upper.clone()] {
            unmount_all(&point).map_err(|source| file("unmount", &point, source))?;
        }
        Ok(())
    }

    /// Removes the bundle. Nothing may be mounted in it. A mount point can't be removed, so the possible mount points
    /// are removed first: the removal then never descends into a mount, which may be one of the host's own directories.
    ///
    /// # Errors
    /// Fails when a file system operation fails. A missing bundle is not an error.
    pub fn remove(&self) -> Result<(), RootfsError> {
        for point in self.legacy_pins()?.into_iter().chain([self.rootfs(), self.pins()]) {
            let removed = match fs::symlink_metadata(&point) {
                Ok(metadata) if metadata.is_dir() => fs::remove_dir(&point).or_else(|error| match error.kind() {
                    io::ErrorKind::DirectoryNotEmpty if point == self.rootfs() => remove_unmounted(&point),
                    _ => Err(error),
                }),
                Ok(_) => fs::remove_file(&point),
                Err(error) => Err(error),
            };
            none_if_missing(removed).map_err(|source| file("remove", &point, source))?;
        }
        if failpoint::skip("bundle") {
            return Ok(());
        }
        remove_all(&self.bundle)
    }

    /// Removes the writable layer.
    ///
    /// # Errors
    /// Fails when a file system operation fails. A missing layer is not an error.
    pub fn remove_upper(&self) -> Result<(), RootfsError> {
        if failpoint::skip("upper") {
            return Ok(());
        }
        remove_all(&self.upper)
    }
}

/// Unmounts everything that is mounted at `point`, one mount after the other.
fn unmount_all(point: &Path) -> io::Result<()> {
    loop {
        match unmount_tree(point, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // EINVAL means that it is not a mount point.
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Removes the files that an interrupted runtime has created at the root file system's mount point after it was
/// unmounted (gVisor creates its own mount points there). Refuses if anything is mounted below it, which may be the
/// host's own.
fn remove_unmounted(path: &Path) -> io::Result<()> {
    if MountPoints::read().may_be_below(path) {
        return Err(io::ErrorKind::DirectoryNotEmpty.into());
    }
    fs::remove_dir_all(path)
}

fn remove_all(path: &Path) -> Result<(), RootfsError> {
    remove_dir_all_if_exists(path).map_err(|source| file("remove", path, source))
}

fn file(doing: &'static str, path: &Path, source: io::Error) -> RootfsError {
    RootfsError::File { doing, path: path.to_owned(), source }
}
