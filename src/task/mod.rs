//! Tasks: their states, their records, and the one place where images, root file systems, shims and cgroups meet.

mod apparmor;
mod claim;
mod engine;
mod events;
mod exec;
mod failure;
mod former;
mod group;
mod in_sandbox;
mod interrupt;
mod kept_settings;
mod live;
mod lock;
mod logs;
mod meter;
mod metrics;
mod mounts;
mod names;
mod off_workers;
mod open;
mod orphans;
mod plan;
mod predecessors;
mod record;
mod recover;
mod refused;
mod request;
mod runtime;
mod saving;
mod settings;
mod share_pool;
mod shared;
mod signal;
mod sources;
mod start;
mod sweep;
mod unattended;
mod undo;

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

pub use apparmor::{AppArmorDefault, AppArmorRequest, ProfileError};
pub use engine::{Engine, Force, Inspection};
pub use events::{Audience, EventHub, TaskEvent};
pub use exec::{Exec, ExecError, ExecRequest, Session, kill_alone, refusal_code, start_alone as exec_alone};
pub use former::{FORMER_VERSION, FormerTask};
pub use group::{GroupError, Membership, Stack};
pub use kept_settings::KeptSettings;
pub use meter::TaskMeter;
pub use orphans::Orphans;
use record::load_all as load_records;
pub use record::millis;
pub use record::{ExitRecord, Record, RecordError, RecordState, RunRecord, TaskHandle, read_all as read_records};
pub use request::{JobLimits, SeccompRequest, StartRequest, TaskDevice, TaskOptions, Volume};
pub use runtime::{
    OwnShim, Runtime, RuntimeError, Runtimes, SHIM_NAMES, crun_works, remove_probe, runsc_works, stale_probes,
};
pub use settings::{
    Compute, ContainerdSettings, MetricsAddress, RuntimeSettings, SeccompDefault, SecuritySettings, Settings,
    ShimSettings, matches_any,
};
pub use signal::parse as parse_signal;
pub use start::Phases;
pub use unattended::clear_unattended;

use crate::{
    cgroup::CgroupError,
    ids::TaskId,
    image::{ReferenceError, SharedError},
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
        apparmor::{Host as AppArmorHost, OWN_PREFIX as APPARMOR_PREFIX, PARSER_PACKAGE, Support as AppArmorSupport},
        seccomp::Form as FilterForm,
    },
    shim::{ExecIo, Exit, PoolSettings, ShimScope, WindowSize},
};

/// Why something could not be done to a task.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// Nomad never uses an id twice.
    #[error("task with ID {0:?} already started")]
    AlreadyStarted(String),
    /// Upstream's own text for it.
    #[error("task not found for given id")]
    NotFound(TaskId),
    /// `DestroyTask` without force.
    #[error("task {0} is still running; stop it first, or destroy it with force")]
    StillRunning(TaskId),
    /// A signal that no Linux knows.
    #[error("invalid signal: {0:?} is neither a name such as SIGHUP nor a number from 1 to 64")]
    Signal(String),
    /// What the last plugin has written down of its settings.
    #[error("read the settings of the last plugin in {path}; remove the file to use those of the command line")]
    KeptSettings {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Garbage that could not be removed.
    #[error("{path} stays")]
    Stays {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// SIGKILL did not end it.
    #[error("task {id} is still there {} s after SIGKILL; a process of it hangs in the kernel", after.as_secs())]
    Unkillable {
        /// Which.
        id: TaskId,
        /// How long we waited.
        after: Duration,
    },
    /// The root file system went away under a start.
    #[error(
        "the root file system was unmounted while the container was made, probably by a late clean-up of an earlier plugin"
    )]
    Unmounted {
        /// What came of it.
        source: Box<Self>,
    },
    /// The image can't be had.
    #[error(transparent)]
    Image(#[from] SharedImageError),
    /// The image's name.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// Spec, bundle or root file system.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// Its AppArmor profile.
    #[error(transparent)]
    AppArmor(#[from] ProfileError),
    /// The shim or the runtime.
    #[error("{doing}")]
    Shim {
        /// What was asked of it.
        doing: &'static str,
        /// What it answered.
        source: ShimError,
    },
    /// The log FIFOs.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// A log that is ours to write.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Who writes it.
    #[error("start the log writer")]
    LogWriter(#[source] std::io::Error),
    /// cgroups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The runtime's name.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A device that it does not get.
    #[error(
        "devices: {device:?} can't be had with runtime {runtime:?}: gVisor passes on GPUs and TPUs (/dev/nvidia*, /dev/accel*, /dev/vfio/*) only; remove it, or use a runtime without a sandbox"
    )]
    NotInSandbox {
        /// The runtime.
        runtime: String,
        /// The device.
        device: PathBuf,
    },
    /// The group's network.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// Our own records.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Our own directories.
    #[error(transparent)]
    Places(#[from] PlacesError),
    /// Another plugin of the same name lives on this host, and has an agent.
    #[error(
        "another plugin holds {path} and does not give way ({reason}); one driver name can have one live plugin on a host (link the binary under another name for a second one)"
    )]
    Held {
        /// Its lock.
        path: PathBuf,
        /// What it says.
        reason: String,
    },
    /// The lock could not be taken.
    #[error("lock {path}")]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A handle that leads to nothing.
    #[error("task {id} can't be recovered: {problem}")]
    Unrecoverable {
        /// Which.
        id: TaskId,
        /// Why.
        problem: String,
    },
    /// A process in a task.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// It may still run.
    #[error("a container of this task, of the driver that was here before, can't be ended")]
    Former(#[source] crate::containerd::ContainerdError),
    /// Nothing can be started beside that.
    #[error("an earlier attempt of the task, {0}, is still being undone")]
    Busy(TaskId),
    /// What an earlier attempt has left.
    #[error("an earlier attempt of the task, {id}, is not removed yet; the driver tries again")]
    Earlier {
        /// The attempt.
        id: TaskId,
        /// What could not be removed.
        source: Box<TaskError>,
    },
    /// Somebody changed their mind.
    #[error("task {0} was stopped while it was being started")]
    Stopped(TaskId),
    /// A task that is over.
    #[error("task {0} has ended; nothing can be run in it")]
    Ended(TaskId),
    /// A volume's file system.
    #[error("task {id}: the sources of its mounts can't be reached: {problem}")]
    Hanging {
        /// The task.
        id: TaskId,
        /// What happened.
        problem: String,
    },
    /// A worker thread is gone.
    #[error("internal: a worker ended early")]
    Worker(#[from] tokio::task::JoinError),
}

/// An image error as others share it.
#[derive(Debug, Clone)]
pub struct SharedImageError(pub SharedError);

impl SharedImageError {
    /// Is there no such image here?
    pub fn is_not_here(&self) -> bool {
        matches!(*self.0, crate::image::ImageError::NotHere { .. })
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

/// A start failed, wherever: lets whoever reads the task's log FIFOs see their end.
pub fn give_up_logs(alloc_dir: &Path, stdout: &Path, stderr: &Path) {
    stdio::give_up(alloc_dir, stdout, stderr);
}
