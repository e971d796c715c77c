//! The bundle: a directory with `config.json`, the files we mount into the container, and the root file system.
//!
//! What is made here is undone here, each step for itself and harmless when there is nothing to undo.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::Spec;

use super::RootfsError;
use crate::{
    fault,
    ids::ContainerId,
    overlay,
    places::{MountPoints, Places, make_dir, write_private},
};

/// Where one task's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundlePaths {
    /// The bundle.
    pub bundle: PathBuf,
    /// The writable layer: `upper` and `work` below it.
    pub upper: PathBuf,
}

/// Where writable layers are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpperOn {
    /// In the state directory.
    Disk,
    /// In memory, each for itself: gone with one unmount, counted to the task's own memory.
    Tmpfs {
        /// As tmpfs(5) takes it; the kernel's default otherwise.
        size: Option<String>,
    },
}

/// The layers of an image.
#[derive(Debug, Clone, Copy)]
pub struct Layers<'a> {
    /// Read-only directories, topmost first.
    pub lowers: &'a [PathBuf],
    /// Further overlay options.
    pub options: &'a [String],
}

impl BundlePaths {
    /// A container's.
    pub fn of(places: &Places, id: &ContainerId) -> Self {
        Self { bundle: places.bundle(id), upper: places.upper(id) }
    }

    /// Where the root file system is mounted.
    pub fn rootfs(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }

    /// Makes the bundle's directories.
    ///
    /// # Errors
    /// As the file system.
    pub fn create(&self) -> Result<(), RootfsError> {
        let rootfs = self.rootfs();
        make_dir(&rootfs).map_err(|source| file("create", &rootfs, source))
    }

    /// Makes the writable layer, and mounts the layers in a bundle that is there.
    ///
    /// # Errors
    /// When anything can't be made; `LayersGone` when the image's directories have vanished.
    pub fn mount(&self, layers: Layers<'_>, on: &UpperOn) -> Result<(), RootfsError> {
        let rootfs = self.rootfs();
        make_dir(&self.upper).map_err(|source| file("create", &self.upper, source))?;
        if let UpperOn::Tmpfs { size } = on {
            let path = &self.upper;
            let options = size.iter().fold("mode=700".to_owned(), |options, size| format!("{options},size={size}"));
            mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::MS_NODEV, Some(options.as_str()))
                .map_err(|errno| RootfsError::Mount { path: path.clone(), source: errno.into() })?;
        }
        let work = self.upper.join("work");
        fs::DirBuilder::new().mode(0o700).create(&work).map_err(|source| file("create", &work, source))?;
        // The container's "/" has the mode of the upper directory, which every image has at 0755.
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
                // Less what the process's mask took away; a change costs the disk's journal something.
                let made = fs::metadata(&upper)?.permissions().mode() & 0o7777;
                if made == mode { Ok(()) } else { fs::set_permissions(&upper, fs::Permissions::from_mode(mode)) }
            })
            .map_err(|source| file("make", &upper, source))?;
        overlay::mount_writable(layers.lowers, layers.options, &self.upper, &rootfs).map_err(|source| {
            let gone = source.kind() == io::ErrorKind::NotFound && layers.lowers.iter().any(|lower| !lower.exists());
            if gone { RootfsError::LayersGone { source } } else { RootfsError::Mount { path: rootfs.clone(), source } }
        })
    }

    /// Is the root file system mounted? An overlay is a device of its own.
    ///
    /// # Errors
    /// As stat(2).
    pub fn is_mounted(&self) -> io::Result<bool> {
        Ok(fs::metadata(self.rootfs())?.dev() != fs::metadata(&self.bundle)?.dev())
    }

    /// Writes `config.json`.
    ///
    /// # Errors
    /// As the file system.
    pub fn write_spec(&self, spec: &Spec) -> Result<(), RootfsError> {
        let path = self.bundle.join("config.json");
        let bytes = serde_json::to_vec(spec).map_err(|error| file("encode", &path, error.into()))?;
        self.write(&path, &bytes)
    }

    /// Writes a file of the bundle. Readable by us alone: `config.json` holds the task's environment, secrets included.
    ///
    /// # Errors
    /// As the file system.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), RootfsError> {
        write_private(path, bytes).map_err(|source| file("write", path, source))
    }

    /// Where the source of the task's n-th mount is, from where the runtime takes it.
    pub fn pinned(&self, n: usize) -> PathBuf {
        self.pins().join(n.to_string())
    }

    /// Where the sources of all mounts are: a file system of its own (`mount_tree`).
    pub(super) fn pins(&self) -> PathBuf {
        self.bundle.join("mounts")
    }

    /// Unmounts the sources of the task's mounts.
    ///
    /// # Errors
    /// As umount2(2); not mounted and not there are fine.
    pub fn unmount_pins(&self) -> Result<(), RootfsError> {
        if fault::skipped("unmount") {
            return Ok(());
        }
        let pins = self.pins();
        unmount_all(&pins).map_err(|source| file("unmount", &pins, source))?;
        for point in self.former_pins()? {
            unmount_all(&point).map_err(|source| file("unmount", &point, source))?;
        }
        Ok(())
    }

    /// Where the sources of a task of an earlier version are mounted: each in the directory itself. A listing that fails is
    /// an error: taken for "nothing", the removal would descend.
    fn former_pins(&self) -> Result<Vec<PathBuf>, RootfsError> {
        let pins = self.pins();
        let listed = match fs::read_dir(&pins) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
            Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>(),
        };
        listed.map_err(|source| file("list", &pins, source))
    }

    /// Unmounts the root file system and the job's sources, however often they are mounted.
    ///
    /// # Errors
    /// As umount2(2); not mounted and not there are fine.
    pub fn unmount(&self) -> Result<(), RootfsError> {
        if fault::skipped("unmount") {
            return Ok(());
        }
        self.unmount_pins()?;
        // The layer after what is made of it.
        for point in [self.rootfs(), self.upper.clone()] {
            unmount_all(&point).map_err(|source| file("unmount", &point, source))?;
        }
        Ok(())
    }

    /// Removes the bundle. Nothing may be mounted in it: a mount point can't be removed, and that is tried first, so
    /// that what is mounted (the host's own directories among it) is never descended into.
    ///
    /// # Errors
    /// As the file system; not there is fine.
    pub fn remove(&self) -> Result<(), RootfsError> {
        for point in self.former_pins()?.into_iter().chain([self.rootfs(), self.pins()]) {
            let removed = match fs::symlink_metadata(&point) {
                Ok(metadata) if metadata.is_dir() => fs::remove_dir(&point).or_else(|error| match error.kind() {
                    io::ErrorKind::DirectoryNotEmpty if point == self.rootfs() => remove_unmounted(&point),
                    _ => Err(error),
                }),
                Ok(_) => fs::remove_file(&point),
                Err(error) => Err(error),
            };
            match removed {
                Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(file("remove", &point, source)),
                _ => {}
            }
        }
        if fault::skipped("bundle") {
            return Ok(());
        }
        remove_all(&self.bundle)
    }

    /// Removes the writable layer.
    ///
    /// # Errors
    /// As the file system; not there is fine.
    pub fn remove_upper(&self) -> Result<(), RootfsError> {
        if fault::skipped("upper") {
            return Ok(());
        }
        remove_all(&self.upper)
    }
}

/// Unmounts whatever is mounted at `point`, layer by layer.
fn unmount_all(point: &Path) -> io::Result<()> {
    loop {
        // A bind of the host's directory is a peer of it, and a lazy unmount reaches peers: what is mounted below the
        // host's own directory would go with ours (mount_namespaces(7)). As a slave it hears and does not speak.
        match mount(None::<&str>, point, None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>) {
            Ok(()) => {}
            // EINVAL: not a mount point.
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
        match umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Removes what a runtime that was cut off has put where the root file system was no more (gVisor makes its mount points
/// there), if nothing at all is mounted in it: what is mounted there may be the host's own.
fn remove_unmounted(path: &Path) -> io::Result<()> {
    if MountPoints::read().may_be_in(path) {
        return Err(io::ErrorKind::DirectoryNotEmpty.into());
    }
    fs::remove_dir_all(path)
}

fn remove_all(path: &Path) -> Result<(), RootfsError> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(file("remove", path, source)),
        _ => Ok(()),
    }
}

fn file(doing: &'static str, path: &Path, source: io::Error) -> RootfsError {
    RootfsError::File { doing, path: path.to_owned(), source }
}
