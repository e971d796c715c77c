//! What a task's process will see: the OCI spec, made by pure functions from plain inputs, and the bundle that holds
//! it, with the root file system mounted by us.

mod ahead;
pub mod apparmor;
mod arrangement;
pub mod bundle;
mod capabilities;
pub mod ceilings;
mod defaults;
mod detached;
pub mod devices;
pub mod gateway;
mod image_links;
mod kernel_limits;
pub mod limits;
mod mount_attributes;
pub mod mount_tree;
pub mod mounts;
pub mod network;
mod pins;
mod process;
mod resources;
pub mod seccomp;
pub mod selinux;
mod spec;
pub mod target;
pub mod tmpfs;
mod users;

use std::{io, path::PathBuf};

pub use ahead::Ahead;
pub use bundle::UpperOn;
pub use capabilities::{Capabilities, CapabilityError, CapabilityRequest, default_allowed, parse_capability};
pub use defaults::MaskedPaths;
pub use kernel_limits::{KernelLimits, StringError, check_mount};
pub use pins::{Pins, PreparedPins};
pub use process::Command;
pub use resources::{CpuQuota, MemoryMax, Resources};
pub use spec::{Hooks, ImageDefaults, NetworkNamespace, Privilege, RootMode, SpecInput, Terminal, build};
pub use users::UserError;

use crate::{accounts::AccountsError, text::quoted};

/// Why no spec or bundle could be made.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// Neither job nor image says what to run.
    #[error("nothing to run: the image has neither ENTRYPOINT nor CMD; set `command`, `args` or `entrypoint`")]
    NoCommand,
    /// A user or group that the image doesn't have.
    #[error(transparent)]
    User(#[from] UserError),
    /// The files that the runtime finds users in, of the image or mounted over it.
    #[error(transparent)]
    Accounts(#[from] AccountsError),
    /// A string or path that the kernel does not take.
    #[error(transparent)]
    String(#[from] StringError),
    /// A working directory that is no absolute path.
    #[error("cwd {} is not an absolute path", quoted(.0))]
    Cwd(String),
    /// A part of the OCI spec was refused by its own builder.
    #[error("OCI spec")]
    Spec(#[from] oci_spec::OciSpecError),
    /// The seccomp profile.
    #[error(transparent)]
    Seccomp(#[from] seccomp::SeccompError),
    /// A file or directory of the host that can't be opened.
    #[error("{option} {source_path:?}")]
    Source {
        /// Who names it, such as `mounts: source`.
        option: &'static str,
        /// As the job has it.
        source_path: String,
        /// Why.
        source: io::Error,
    },
    /// A file or directory of the host that the job may not use.
    #[error(
        "{option} {source_path:?} is outside of the task's and allocation's directories; an operator can open it with security {{ allow_paths }}"
    )]
    SourceOutside {
        /// Which option of the job names it.
        option: &'static str,
        /// As the job has it.
        source_path: String,
    },
    /// A directory that Nomad has made for the task.
    #[error("open the task's directory {path}")]
    AllocDir {
        /// The directory.
        path: PathBuf,
        /// Why it can't be mounted.
        source: io::Error,
    },
    /// A mount's target.
    #[error("{option}: target {target:?}: {problem}")]
    Target {
        /// The option that names the target.
        option: &'static str,
        /// As it is written there.
        target: String,
        /// Why nothing can be mounted there.
        problem: String,
    },
    /// A mount that the kernel refuses.
    #[error("{option}: mount at target {target:?}")]
    Mounting {
        /// The option that asks for the mount.
        option: &'static str,
        /// Its target.
        target: String,
        /// Why it can't be mounted.
        source: io::Error,
    },
    /// Something of the image that is in the way.
    #[error("the image's /{path} is in the way of what every container has there")]
    Image {
        /// The path, from the root.
        path: PathBuf,
        /// Why it can't be replaced.
        source: io::Error,
    },
    /// `host-gateway` in `extra_hosts`.
    #[error("extra_hosts: {name}:host-gateway has no address here")]
    Gateway {
        /// The name that was to have it.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// A device that a job may not have.
    #[error(
        "devices: {path:?} is {resolved:?}, which is not allowed on this node (plugin option security {{ allow_devices }})"
    )]
    Device {
        /// As the job has it.
        path: PathBuf,
        /// What it leads to.
        resolved: PathBuf,
    },
    /// A volume's label.
    #[error("volume_mount {path}: selinux_label")]
    Label {
        /// The volume, on the host.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file or directory of the bundle.
    #[error("bundle: {doing} {path}")]
    File {
        /// What was done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The root file system can't be mounted because layers are gone.
    #[error("the image's unpacked layers are gone from containerd's store")]
    LayersGone {
        /// By mount(2).
        source: io::Error,
    },
    /// The root file system can't be mounted.
    #[error("mount the root file system at {path}")]
    Mount {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
