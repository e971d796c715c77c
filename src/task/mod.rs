//! Tasks: their states and their records. Only this module combines images, root file systems, shims and cgroups.

mod apparmor;
mod context;
mod dedicated_thread;
mod engine;
mod events;
mod exec;
mod failure;
mod gc;
mod group;
mod guards;
mod interrupt;
mod labels;
mod legacy;
mod live;
mod lock;
mod logs;
mod meter;
mod metrics;
mod mounts;
mod network_files;
mod offline_gc;
mod open;
mod orphans;
mod persisted_settings;
mod plan;
mod previous_attempts;
mod record;
mod recover;
mod refused;
mod request;
mod runtime;
mod runtime_processes;
mod sandbox_exec;
mod saving;
mod settings;
mod share_pool;
mod signal;
mod sources;
mod start;
mod stop;
mod undo;

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

pub use apparmor::{AppArmorDefault, AppArmorRequest, ProfileError};
pub use engine::{Engine, Inspection};
pub use events::{Audience, EventHub, TaskEvent};
pub use exec::{
    Exec, ExecError, ExecRequest, ExecSession, refusal_code, signal_without_engine,
    start_without_engine as exec_without_engine,
};
pub use group::{GroupError, NetnsMembership, NetworkStack};
pub use legacy::{LEGACY_HANDLE_VERSION, LegacyTask};
pub use meter::TaskMeter;
pub use offline_gc::gc_offline;
pub use orphans::OrphanPolicy;
pub use persisted_settings::PersistedSettings;
pub use record::epoch_millis;
use record::load_all as load_records;
pub use record::{ExitRecord, Record, RecordError, RecordState, RunRecord, TaskHandle, read_all as read_records};
pub use request::{JobLimits, SeccompRequest, StartRequest, TaskDevice, TaskOptions, Volume};
pub use runtime::{
    OwnShim, RUNC_SHIM_NAMES, Runtime, RuntimeError, Runtimes, probe_crun, probe_runsc, remove_probe, stale_probes,
};
pub use settings::{
    Compute, ContainerdSettings, MetricsAddress, RuntimeSettings, SeccompDefault, SecuritySettings, Settings,
    ShimSettings, matches_any,
};
pub use signal::parse as parse_signal;
pub use start::Phases;
pub use stop::Force;

use crate::{
    cgroup::CgroupError,
    ids::TaskId,
    image::{ReferenceError, SharedPullError},
    logs::LogError,
    places::PlacesError,
    rootfs::RootfsError,
    shim::{
        ShimError,
        stdio::{self, StdioError},
    },
};
pub use crate::{
    process::which,
    rootfs::{
        apparmor::{AppArmorHost, PARSER_PACKAGE, PROFILE_PREFIX as APPARMOR_PREFIX, Support as AppArmorSupport},
        seccomp::FilterForm,
    },
    shim::{ExecIo, Exit, PoolSettings, ShimScope, WindowSize},
};

/// Why something could not be done to a task.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// A task with this id exists already. Nomad never uses an id twice.
    #[error("task with ID {0:?} already started")]
    AlreadyStarted(String),
    /// The task is unknown. The text is that of Nomad's own drivers.
    #[error("task not found for given id")]
    NotFound(TaskId),
    /// `DestroyTask` was called without force, and the task runs.
    #[error("task {0} is still running; stop it first, or destroy it with force")]
    StillRunning(TaskId),
    /// Linux has no such signal.
    #[error("invalid signal: {0:?} is neither a name such as SIGHUP nor a number from 1 to 64")]
    Signal(String),
    /// The file with the last plugin's settings can't be read.
    #[error(
        "could not read the settings of the last plugin in {path}; remove the file to use those of the command line"
    )]
    PersistedSettings {
        /// The file with the settings.
        path: PathBuf,
        /// Why the file can't be read.
        source: io::Error,
    },
    /// Garbage could not be removed.
    #[error("could not remove {path}")]
    NotRemoved {
        /// The file or directory.
        path: PathBuf,
        /// Why it could not be removed.
        source: io::Error,
    },
    /// SIGKILL did not end the task.
    #[error("task {id} still runs {} s after SIGKILL; one of its processes hangs in the kernel", after.as_secs())]
    Unkillable {
        /// The task.
        id: TaskId,
        /// How long the driver waited after SIGKILL.
        after: Duration,
    },
    /// The root file system was unmounted during the start.
    #[error(
        "the root file system was unmounted while the container was created, probably by a late cleanup of an earlier plugin"
    )]
    RootfsUnmounted {
        /// The error that the start failed with.
        source: Box<Self>,
    },
    /// The image is not available.
    #[error(transparent)]
    Image(#[from] SharedImageError),
    /// The image's reference is invalid.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The spec, the bundle or the root file system could not be made or removed.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// The task's AppArmor profile can't be used.
    #[error(transparent)]
    AppArmor(#[from] ProfileError),
    /// A call of the shim, or of the runtime through the shim, failed.
    #[error("could not {doing}")]
    Shim {
        /// The purpose of the call.
        doing: &'static str,
        /// The error of the call.
        source: ShimError,
    },
    /// The log FIFOs can't be opened.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// A log that the driver writes itself could not be set up or removed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The log writer could not be started.
    #[error("could not start the log writer")]
    LogWriter(#[source] std::io::Error),
    /// A cgroup operation failed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The runtime is unknown or can't be used.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// gVisor does not pass the device on to the task.
    #[error(
        "devices: {device:?} is not available with runtime {runtime:?}: gVisor passes on GPUs and TPUs (/dev/nvidia*, /dev/accel*, /dev/vfio/*) only; remove it, or use a runtime without a sandbox"
    )]
    NotInSandbox {
        /// The runtime.
        runtime: String,
        /// The device.
        device: PathBuf,
    },
    /// The network namespace of the task's group can't be used.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// A record of a task can't be read, written or removed.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A directory of the driver can't be read or made.
    #[error(transparent)]
    Places(#[from] PlacesError),
    /// Another process of the same driver name holds the lock on this host and does not release it.
    #[error(
        "another plugin holds {path} and does not exit ({reason}); only one plugin of a driver name can run on a host (link the binary under another name for a second one)"
    )]
    LockHeld {
        /// The lock file.
        path: PathBuf,
        /// The holder's answer, or why there is none.
        reason: String,
    },
    /// The lock file can't be opened or locked.
    #[error("could not lock {path}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why it can't be opened or locked.
        source: io::Error,
    },
    /// The task of a handle can't be recovered.
    #[error("task {id} can't be recovered: {problem}")]
    Unrecoverable {
        /// The task.
        id: TaskId,
        /// Why the task can't be recovered.
        problem: String,
    },
    /// A further process could not be run in a task.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// A container that nomad-driver-containerd started for this task could not be stopped, and may still run.
    #[error("a container that nomad-driver-containerd started for this task could not be stopped")]
    Legacy(#[source] crate::containerd::ContainerdError),
    /// The teardown of an earlier attempt of the task takes too long. No attempt can be started concurrently with it.
    #[error("an earlier attempt of the task, {0}, is still being removed")]
    TeardownInProgress(TaskId),
    /// The teardown of an earlier attempt of the task failed.
    #[error("an earlier attempt of the task, {id}, could not be removed yet; the driver tries again")]
    EarlierAttemptRemains {
        /// The earlier attempt.
        id: TaskId,
        /// What could not be removed.
        source: Box<TaskError>,
    },
    /// StopTask or DestroyTask was called during the start.
    #[error("task {0} was stopped while it was being started")]
    Stopped(TaskId),
    /// The task has ended, so that no process can be started in it.
    #[error("task {0} has ended; no process can be started in it")]
    Ended(TaskId),
    /// A file system with sources of the task's mounts, or with other files that the job names, does not answer.
    #[error("task {id}: files of the host that it uses can't be reached: {problem}")]
    HostFilesUnreachable {
        /// The task.
        id: TaskId,
        /// What happened.
        problem: String,
    },
    /// A worker thread of the driver panicked or was cancelled.
    #[error("internal error: a worker thread panicked or was cancelled")]
    Worker(#[from] tokio::task::JoinError),
}

/// An image error that several waiting starts share.
#[derive(Debug, Clone)]
pub struct SharedImageError(pub SharedPullError);

impl SharedImageError {
    /// Says whether the image is not available locally.
    pub fn is_missing(&self) -> bool {
        matches!(*self.0, crate::image::ImageError::NotStored { .. })
    }
}

impl std::fmt::Display for SharedImageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for SharedImageError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

/// Opens and closes the task's log FIFOs, so that their reader sees the end of the stream. The plugin calls this when a
/// start has failed at any step.
pub fn signal_log_end(alloc_dir: &Path, stdout: &Path, stderr: &Path) {
    stdio::show_end(alloc_dir, stdout, stderr);
}
