//! Where things live on disk. Every path of ours is made here and nowhere else.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use crate::ids::{ContainerId, Digest, DriverName, random_hex};

/// Longest path a unix socket can have (`sun_path` less its terminator, unix(7)).
pub const SOCKET_PATH_MAX: usize = 107;

/// The mode that versions up to 0.1.0 gave to directories.
const FORMER_MODE: u32 = 0o711;
/// The entry of the image directory that is no record.
const EMPTY_LAYER: &str = "empty";

/// Why a directory of ours can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PlacesError {
    /// A directory could not be made.
    #[error("create directory {path}")]
    Create {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Other users can get at a directory or file, and that could not be changed.
    #[error("close {path} to other users")]
    Close {
        /// The directory or file.
        path: PathBuf,
        /// Why its mode can't be changed.
        source: io::Error,
    },
    /// Shims' sockets would not fit under the run directory.
    #[error("state.run_dir {0} is too long: sockets below it would pass {SOCKET_PATH_MAX} bytes; use a shorter path")]
    TooLong(PathBuf),
}

/// The directories of one driver on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    run: PathBuf,
    state: PathBuf,
    uppers: PathBuf,
    ahead: PathBuf,
}

impl Places {
    /// Below `run` and `state`.
    pub fn new(run: impl Into<PathBuf>, state: impl Into<PathBuf>) -> Self {
        let (run, state): (PathBuf, PathBuf) = (run.into(), state.into());
        let owner = Digest::of(run.as_os_str().as_encoded_bytes()).to_string();
        let (_, owner) = owner.split_at("sha256:".len());
        let [uppers, ahead] = ["uppers", "ahead"].map(|kind| state.join(kind).join(&owner[..12]));
        Self { run, state, uppers, ahead }
    }

    /// The defaults of a driver called `name`.
    pub fn of(name: &DriverName) -> Self {
        Self::new(Self::run_parent().join(name.as_str()), Self::state_parent().join(name.as_str()))
    }

    /// Where the default run directories of all drivers on this host are.
    pub fn run_parent() -> PathBuf {
        PathBuf::from("/run/nomad-driver-shim")
    }

    /// Where the default state directories of all drivers on this host are.
    pub fn state_parent() -> PathBuf {
        PathBuf::from("/var/lib/nomad-driver-shim")
    }

    /// Makes the directories that must be there before anything starts.
    ///
    /// # Errors
    /// When one can't be made, or sockets would not fit.
    pub fn create(&self) -> Result<(), PlacesError> {
        if self.shim("0123456789ab").join("sock").as_os_str().len() > SOCKET_PATH_MAX {
            return Err(PlacesError::TooLong(self.run.clone()));
        }
        for path in [self.tasks(), self.bundles(), self.shims(), self.runtimes(), self.uppers(), self.images()] {
            make_dir(&path).map_err(|source| PlacesError::Create { path, source })?;
        }
        self.repair()
    }

    /// Closes directories and files to other users that earlier versions left open to them.
    fn repair(&self) -> Result<(), PlacesError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| PlacesError::Close { path, source }
        };
        let close = |path: &Path| close_to_others(path).map_err(failed(path));
        let list = |path: &Path| listed(path).map_err(failed(path));
        // A directory with another mode is the operator's, who may keep other things in it. What lies in it is ours.
        for path in [&self.run, &Self::run_parent(), &self.state, &Self::state_parent()] {
            if fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o777 == FORMER_MODE) {
                close(path)?;
            }
        }
        let shared = [self.uppers(), self.ahead()].map(|own| own.parent().map(Path::to_owned));
        for path in shared.into_iter().flatten() {
            close(&path)?;
        }
        for directory in [self.bundles(), self.shims(), self.runtimes(), self.uppers(), self.ahead()] {
            close(&directory)?;
            for name in list(&directory)? {
                close(&directory.join(name))?;
            }
        }
        for directory in [self.tasks(), self.images(), self.logs(), self.wrappers(), self.namespaces()] {
            close(&directory)?;
        }
        for directory in [self.tasks(), self.images()] {
            for name in list(&directory)?.iter().filter(|name| *name != EMPTY_LAYER) {
                close(&directory.join(name))?;
            }
        }
        close(&self.lock())
    }

    /// What an image without layers is mounted over: the container's root has its mode.
    pub fn empty_layer(&self) -> PathBuf {
        self.images().join(EMPTY_LAYER)
    }

    /// The run directory.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Held by the one live plugin of this run directory.
    pub fn lock(&self) -> PathBuf {
        self.run.join("lock")
    }

    /// Where the live plugin takes requests of the command line and of its successor.
    pub fn control(&self) -> PathBuf {
        self.run.join("control.sock")
    }

    /// Task records.
    pub fn tasks(&self) -> PathBuf {
        self.run.join("tasks")
    }

    /// One task's record.
    pub fn record(&self, id: &ContainerId) -> PathBuf {
        self.tasks().join(format!("{id}.json"))
    }

    /// OCI bundles.
    pub fn bundles(&self) -> PathBuf {
        self.run.join("bundles")
    }

    /// One task's bundle.
    pub fn bundle(&self, id: &ContainerId) -> PathBuf {
        self.bundles().join(id.as_str())
    }

    /// Where a task's root file system is mounted.
    pub fn rootfs(&self, id: &ContainerId) -> PathBuf {
        self.bundle(id).join("rootfs")
    }

    /// Names of the processes that were exec'd in a task and may still run.
    pub fn execs(&self, id: &ContainerId) -> PathBuf {
        self.bundle(id).join("execs")
    }

    /// Directories of the shims.
    pub fn shims(&self) -> PathBuf {
        self.run.join("shims")
    }

    /// One shim's directory: its working directory, socket, log and identity.
    pub fn shim(&self, shim: &str) -> PathBuf {
        self.shims().join(shim)
    }

    /// Logs that are ours to write, one directory a task.
    pub fn logs(&self) -> PathBuf {
        self.run.join("logs")
    }

    /// One task's log: its FIFOs and what they are for.
    pub fn log(&self, id: &ContainerId) -> PathBuf {
        self.logs().join(id.as_str())
    }

    /// State roots of the OCI runtimes, one each.
    pub fn runtimes(&self) -> PathBuf {
        self.run.join("runtimes")
    }

    /// One OCI runtime's state root; shims append their namespace.
    pub fn runtime_root(&self, runtime: &str) -> PathBuf {
        self.runtimes().join(runtime)
    }

    /// Where an OCI runtime keeps the containers of shims with this namespace.
    pub fn runtime_state(&self, runtime: &str, namespace: &str) -> PathBuf {
        self.runtime_root(runtime).join(namespace)
    }

    /// Scripts that shims call instead of a runtime that needs flags: below the state directory, because /run is often
    /// mounted so that nothing in it can be executed.
    pub fn wrappers(&self) -> PathBuf {
        self.state.join("wrappers")
    }

    /// What all sandboxes of this host share: an empty network namespace for their file servers. Sentries don't reach it.
    pub fn shared_gvisor() -> PathBuf {
        Self::run_parent().join("gvisor")
    }

    /// What gVisor sandboxes have taken from groups' network namespaces, to be put back.
    pub fn namespaces(&self) -> PathBuf {
        self.run.join("netns")
    }

    /// Writable layers. Runs of the command line share a state directory: each has its own part, so that none takes
    /// another's for remains.
    pub fn uppers(&self) -> PathBuf {
        self.uppers.clone()
    }

    /// Root file systems made ahead.
    pub fn ahead(&self) -> PathBuf {
        self.ahead.clone()
    }

    /// Nothing is left: the state directory keeps nothing of ours but images.
    pub fn leave_uppers(&self) {
        // Not empty: somebody's task runs on.
        let _ = fs::remove_dir(&self.uppers);
    }

    /// Has nobody else tasks below this state directory?
    pub fn is_alone(&self) -> bool {
        let parts = fs::read_dir(self.state.join("uppers")).into_iter().flatten().flatten();
        let mut others = parts.map(|part| part.path()).filter(|part| *part != self.uppers);
        !others.any(|part| fs::read_dir(part).is_ok_and(|mut tasks| tasks.next().is_some()))
    }

    /// One task's writable layer: `upper` and `work` below it.
    pub fn upper(&self, id: &ContainerId) -> PathBuf {
        self.uppers.join(id.as_str())
    }

    /// Image records.
    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    /// Eight hexadecimal digits that tell this state directory's leases and views from another's in one containerd.
    pub fn identity(&self) -> String {
        Digest::of(self.state.as_os_str().as_encoded_bytes()).short()[..8].to_owned()
    }
}

/// Makes `path` and its parents, for root alone (0700). Below them lie the root file systems of tasks: a local user who
/// could pass through would run a task's set-user-id programs on the host (CVE-2021-41091).
///
/// # Errors
/// As mkdir(2).
pub fn make_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Makes a directory that everybody may read and pass (0755): containers see it.
///
/// # Errors
/// As mkdir(2).
pub fn make_open_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(path)
}

/// Opens a file whose lock processes of ours take, and makes it where it is missing. Nobody else can open it: reading a
/// lock file is enough to hold its lock.
///
/// # Errors
/// As open(2).
pub fn open_lock(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Opens a new or emptied file that root alone can read (0600).
///
/// # Errors
/// As open(2).
pub fn create_private(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Writes a file that root alone can read (0600).
///
/// # Errors
/// As the file system.
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    create_private(path)?.write_all(content)
}

/// Takes other users' access to a directory or file away, where an earlier version or somebody else has given it. What is
/// not there is fine, and a link is not followed.
///
/// # Errors
/// As chmod(2).
fn close_to_others(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.permissions().mode() & 0o077 != 0 && !found.is_symlink() => {
            fs::set_permissions(path, fs::Permissions::from_mode(found.permissions().mode() & 0o700))
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Where something is mounted, as of one moment.
#[derive(Debug)]
pub struct MountPoints(String);

impl MountPoints {
    /// Of our mount namespace.
    pub fn read() -> Self {
        Self(fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    /// May something be mounted at `path` or below it? Also when that can't be told.
    pub fn may_be_in(&self, path: &Path) -> bool {
        // proc_pid_mountinfo(5): the fifth field is the mount point, with blanks and backslashes written in another way.
        let mut points = self.0.lines().filter_map(|line| line.split(' ').nth(4));
        self.0.is_empty()
            || path.to_string_lossy().contains([' ', '\t', '\n', '\\'])
            || points.any(|point| Path::new(point).starts_with(path))
    }
}

/// Writes a file whole or not at all, by a draft beside it, and makes the directory that it is in.
///
/// # Errors
/// As the file system.
pub fn write_whole(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        make_dir(parent)?;
    }
    let draft = path.with_extension(format!("{}.tmp", random_hex(4)));
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
    let written = file.write_all(content).and_then(|()| fs::rename(&draft, path));
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written
}

/// What lies in a directory of ours, by name. One that is not there is empty.
pub fn names(path: &Path) -> Vec<String> {
    listed(path).unwrap_or_else(|error| {
        tracing::warn!(path = %path.display(), %error, "a directory of the driver can't be listed");
        Vec::new()
    })
}

/// The names in a directory. One that is not there is empty.
fn listed(path: &Path) -> io::Result<Vec<String>> {
    match fs::read_dir(path) {
        Ok(entries) => {
            entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned())).collect()
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
