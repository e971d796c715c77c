//! The paths of the driver's files and directories, and helpers to list them. Modules get the paths from [`Places`];
//! they only append names of files inside of a bundle, a shim's directory or a task's log directory.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use crate::{
    files::{create_private_dir, none_if_missing},
    ids::{ContainerId, Digest, DriverName, ShimId},
};

/// The longest path that a unix socket can have (`sun_path` without its terminator, unix(7)).
pub const SOCKET_PATH_MAX: usize = 107;

/// The mode of directories that versions up to 0.1.0 created.
const LEGACY_DIR_MODE: u32 = 0o711;
/// The entry of the image directory that is not an image record.
const EMPTY_LAYER: &str = "empty";

/// Why a directory of the driver can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PlacesError {
    /// A directory can't be created.
    #[error("could not create directory {path}")]
    Create {
        /// The directory.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// Other users have access to a directory or file, and its mode can't be changed.
    #[error("could not remove other users' access to {path}")]
    RemoveAccess {
        /// The directory or file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// A directory can't be listed, so its content is not known. It must not be treated as an empty directory.
    #[error("could not list {path}")]
    List {
        /// The directory.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The run directory's path is so long that the paths of shims' sockets below it would exceed the kernel's limit.
    #[error("state.run_dir {0} is too long: sockets below it would pass {SOCKET_PATH_MAX} bytes; use a shorter path")]
    RunDirTooLong(PathBuf),
}

/// The directories of one driver on this host: those of a plugin, or of one run of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    run: PathBuf,
    state: PathBuf,
    uppers: PathBuf,
    prepared_rootfs: PathBuf,
}

impl Places {
    /// Returns the paths below the run directory `run` and the state directory `state`.
    pub fn new(run: impl Into<PathBuf>, state: impl Into<PathBuf>) -> Self {
        let (run, state): (PathBuf, PathBuf) = (run.into(), state.into());
        let owner = Digest::of(run.as_os_str().as_encoded_bytes()).to_string();
        let (_, owner) = owner.split_at("sha256:".len());
        let [uppers, ahead] = ["uppers", "ahead"].map(|kind| state.join(kind).join(&owner[..12]));
        Self { run, state, uppers, prepared_rootfs: ahead }
    }

    /// Returns the default paths of a driver with this name.
    pub fn of(name: &DriverName) -> Self {
        Self::new(Self::run_parent().join(name.as_str()), Self::state_parent().join(name.as_str()))
    }

    /// Returns the path of the parent directory of all drivers' default run directories.
    pub fn run_parent() -> PathBuf {
        PathBuf::from("/run/nomad-driver-shim")
    }

    /// Returns the path of the parent directory of all drivers' default state directories.
    pub fn state_parent() -> PathBuf {
        PathBuf::from("/var/lib/nomad-driver-shim")
    }

    /// Creates the directories that must exist before anything starts, and corrects the modes of existing ones.
    ///
    /// # Errors
    /// Fails when a directory can't be created or its mode can't be corrected, or when the run directory's path is too
    /// long.
    pub fn create(&self) -> Result<(), PlacesError> {
        if self.shims().join("0123456789ab").join("sock").as_os_str().len() > SOCKET_PATH_MAX {
            return Err(PlacesError::RunDirTooLong(self.run.clone()));
        }
        for path in [self.tasks(), self.bundles(), self.shims(), self.runtimes(), self.uppers(), self.images()] {
            create_private_dir(&path).map_err(|source| PlacesError::Create { path, source })?;
        }
        self.restrict_old_permissions()
    }

    /// Removes other users' access to directories and files that earlier versions have created with it.
    fn restrict_old_permissions(&self) -> Result<(), PlacesError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| PlacesError::RemoveAccess { path, source }
        };
        let restrict = |path: &Path| remove_access_of_others(path).map_err(failed(path));
        let list = |path: &Path| list_entries(path).map_err(failed(path));
        // A directory with any other mode belongs to the operator, who may keep other things in it. The directories
        // below it are this driver's own.
        for path in [&self.run, &Self::run_parent(), &self.state, &Self::state_parent()] {
            if fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o777 == LEGACY_DIR_MODE) {
                restrict(path)?;
            }
        }
        let shared = [self.uppers(), self.prepared_rootfs()].map(|own| own.parent().map(Path::to_owned));
        for path in shared.into_iter().flatten() {
            restrict(&path)?;
        }
        for directory in [self.bundles(), self.shims(), self.runtimes(), self.uppers(), self.prepared_rootfs()] {
            restrict(&directory)?;
            for name in list(&directory)? {
                restrict(&directory.join(name))?;
            }
        }
        for directory in [self.tasks(), self.images(), self.logs(), self.wrappers(), self.saved_addresses()] {
            restrict(&directory)?;
        }
        for directory in [self.tasks(), self.images()] {
            for name in list(&directory)?.iter().filter(|name| *name != EMPTY_LAYER) {
                restrict(&directory.join(name))?;
            }
        }
        restrict(&self.lock())
    }

    /// Returns the path of the empty directory that serves as the only layer of an image without layers. The
    /// container's root directory gets its mode.
    pub fn empty_layer(&self) -> PathBuf {
        self.images().join(EMPTY_LAYER)
    }

    /// Returns the path of the run directory.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// Returns the path of the state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Returns the path of the lock file that the one live plugin of this run directory holds.
    pub fn lock(&self) -> PathBuf {
        self.run.join("lock")
    }

    /// Returns the path of the file with those settings of the last plugin that `gc` needs to clean up its directories.
    pub fn kept_settings(&self) -> PathBuf {
        self.run.join("settings.json")
    }

    /// Returns the path of the socket at which the live plugin accepts requests of the command line and of its
    /// successor.
    pub fn control(&self) -> PathBuf {
        self.run.join("control.sock")
    }

    /// Returns the path of the directory of the task records.
    pub fn tasks(&self) -> PathBuf {
        self.run.join("tasks")
    }

    /// Returns the path of the record of one task.
    pub fn record(&self, id: &ContainerId) -> PathBuf {
        self.tasks().join(format!("{id}.json"))
    }

    /// Returns the path of the directory of the OCI bundles.
    pub fn bundles(&self) -> PathBuf {
        self.run.join("bundles")
    }

    /// Returns the path of the bundle of one task.
    pub fn bundle(&self, id: &ContainerId) -> PathBuf {
        self.bundles().join(id.as_str())
    }

    /// Returns the path of the mount point of a task's root file system.
    pub fn rootfs(&self, id: &ContainerId) -> PathBuf {
        self.bundle(id).join("rootfs")
    }

    /// Returns the path of the directory of markers for processes that were exec'd in a task and may still run.
    pub fn execs(&self, id: &ContainerId) -> PathBuf {
        self.bundle(id).join("execs")
    }

    /// Returns the path of the directory that contains one directory for each shim.
    pub fn shims(&self) -> PathBuf {
        self.run.join("shims")
    }

    /// Returns the path of the directory of one shim: its working directory, with its socket, its log and its pid file.
    pub fn shim(&self, shim: &ShimId) -> PathBuf {
        self.shims().join(shim.as_str())
    }

    /// Returns the ids of the shims that have directories.
    ///
    /// # Errors
    /// Fails when the directories can't be listed.
    pub fn list_shims(&self) -> Result<Vec<ShimId>, PlacesError> {
        Ok(list_names(&self.shims())?.iter().filter_map(|name| ShimId::from_dir_name(name)).collect())
    }

    /// Returns the path of the directory of the tasks whose logs the driver's log writer writes; one directory for each
    /// task.
    pub fn logs(&self) -> PathBuf {
        self.run.join("logs")
    }

    /// Returns the path of the log directory of one task: its FIFOs and the description of what to do with them.
    pub fn log(&self, id: &ContainerId) -> PathBuf {
        self.logs().join(id.as_str())
    }

    /// Returns the path of the directory of the OCI runtimes' state roots; one for each runtime.
    pub fn runtimes(&self) -> PathBuf {
        self.run.join("runtimes")
    }

    /// Returns the path of the state root of one OCI runtime. Shims append their containerd namespace to it.
    pub fn runtime_root(&self, runtime: &str) -> PathBuf {
        self.runtimes().join(runtime)
    }

    /// Returns the path of the directory in which an OCI runtime keeps the state of containers whose shims have this
    /// namespace.
    pub fn runtime_state(&self, runtime: &str, namespace: &str) -> PathBuf {
        self.runtime_root(runtime).join(namespace)
    }

    /// Returns the path of the directory of the scripts that shims call instead of a runtime that needs flags. It is
    /// below the state directory, because /run is often mounted `noexec`.
    pub fn wrappers(&self) -> PathBuf {
        self.state.join("wrappers")
    }

    /// Returns the path of the directory that all gVisor sandboxes of this host share. It contains an empty network
    /// namespace for their file servers (gofers), which sentries have no access to.
    pub fn gvisor_shared_root() -> PathBuf {
        Self::run_parent().join("gvisor")
    }

    /// Returns the path of the directory of the addresses that gVisor sandboxes have removed from groups' network
    /// namespaces, and that the driver restores there.
    pub fn saved_addresses(&self) -> PathBuf {
        self.run.join("netns")
    }

    /// Returns the path of the directory of the tasks' writable layers. Runs of the command line share a state
    /// directory, so each run directory has a part of its own there: no run may mistake another run's layers for
    /// remains.
    pub fn uppers(&self) -> PathBuf {
        self.uppers.clone()
    }

    /// Returns the path of the directory of the root file systems that are prepared before a task needs them.
    pub fn prepared_rootfs(&self) -> PathBuf {
        self.prepared_rootfs.clone()
    }

    /// Removes the directory of writable layers if it is empty, so that only images are left in the state directory.
    pub fn remove_uppers_if_empty(&self) {
        // Fails while the directory is not empty, because a task still runs.
        let _ = fs::remove_dir(&self.uppers);
    }

    /// Returns whether no other run directory has tasks below this state directory.
    ///
    /// # Errors
    /// Fails when a directory can't be listed.
    pub fn is_only_user_of_state_dir(&self) -> Result<bool, PlacesError> {
        let parts = self.state.join("uppers");
        for part in list_names(&parts)? {
            let part = parts.join(part);
            if part != self.uppers && !list_names(&part)?.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns the path of the directory of one task's writable layer, with `upper` and `work` below it.
    pub fn upper(&self, id: &ContainerId) -> PathBuf {
        self.uppers.join(id.as_str())
    }

    /// Returns the path of the directory of the image records.
    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    /// Eight hexadecimal digits that distinguish this state directory's leases and views in containerd from those of
    /// another state directory.
    pub fn state_dir_hash(&self) -> String {
        Digest::of(self.state.as_os_str().as_encoded_bytes()).short()[..8].to_owned()
    }
}

/// Removes other users' access to a directory or file, in case an earlier version or another program has granted it. A
/// missing file is fine, and a symlink is left alone.
///
/// # Errors
/// Fails as chmod(2) does.
fn remove_access_of_others(path: &Path) -> io::Result<()> {
    match none_if_missing(fs::symlink_metadata(path))? {
        Some(found) if found.permissions().mode() & 0o077 != 0 && !found.is_symlink() => {
            fs::set_permissions(path, fs::Permissions::from_mode(found.permissions().mode() & 0o700))
        }
        _ => Ok(()),
    }
}

/// The mount points of this process's mount namespace at one moment.
#[derive(Debug)]
pub struct MountPoints(String);

impl MountPoints {
    /// Reads the mount points.
    pub fn read() -> Self {
        Self(fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    /// Returns whether something may be mounted at `path` or below it. True as well if that is not known.
    pub fn may_be_below(&self, path: &Path) -> bool {
        // proc_pid_mountinfo(5): the fifth field is the mount point, with blanks and backslashes escaped.
        let mut points = self.0.lines().filter_map(|line| line.split(' ').nth(4));
        self.0.is_empty()
            || path.to_string_lossy().contains([' ', '\t', '\n', '\\'])
            || points.any(|point| Path::new(point).starts_with(path))
    }
}

/// Returns the names of the entries of a directory of the driver. A missing directory counts as empty.
///
/// # Errors
/// Fails when the directory can't be listed, and so its content is not known.
pub fn list_names(path: &Path) -> Result<Vec<String>, PlacesError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let listed = crate::failpoint::fail_lookup(&name).and_then(|()| list_entries(path));
    listed.map_err(|source| PlacesError::List { path: path.to_owned(), source })
}

/// Returns the names of a directory's entries. A missing directory counts as empty.
fn list_entries(path: &Path) -> io::Result<Vec<String>> {
    let Some(entries) = none_if_missing(fs::read_dir(path))? else { return Ok(Vec::new()) };
    entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_be_listed_is_not_empty() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        assert_eq!(list_names(&directory.path().join("absent")).expect("a missing one is empty"), Vec::<String>::new());
        let file = directory.path().join("file");
        fs::write(&file, "").expect("written");
        assert!(matches!(list_names(&file), Err(PlacesError::List { .. })));
        let places = Places::new(directory.path().join("run"), directory.path());
        assert!(places.is_only_user_of_state_dir().expect("the directories can be listed"));
        fs::create_dir(directory.path().join("uppers")).expect("made");
        fs::write(directory.path().join("uppers/other"), "").expect("written");
        places.is_only_user_of_state_dir().expect_err("the content is not known");
    }
}
