//! A task's container as its process sees it: the OCI spec, which pure functions build from plain inputs, and the
//! bundle, which contains the spec and the root file system. This driver mounts the root file system itself.

pub mod apparmor;
mod arrangement;
pub mod bundle;
mod capabilities;
pub mod ceilings;
mod copy_tree;
mod defaults;
mod detached;
pub mod devices;
pub mod group_network;
mod image_links;
pub mod init;
mod kernel_limits;
pub mod labels;
pub mod limits;
mod mount_attributes;
pub mod mount_origin;
pub mod mount_tree;
pub mod mounts;
mod mtab;
pub mod network;
mod pins;
mod process;
mod resources;
mod rootfs_pool;
pub mod same_target;
pub mod seccomp;
pub mod selinux;
mod spec;
pub mod target;
pub mod tmpfs;
pub mod tmpfs_size;
mod users;

use std::{io, path::PathBuf};

pub use bundle::UpperStorage;
pub use capabilities::{Capabilities, CapabilityError, CapabilityRequest, default_allowed, parse_capability};
pub use defaults::MaskedPaths;
pub use kernel_limits::{KernelLimits, StringError, check_mount};
pub use pins::{Pins, PreparedPins};
pub(crate) use process::DEFAULT_TERM;
pub use process::{Command, Terminal};
pub use resources::{CpuQuota, MemoryMax, Resources};
pub use rootfs_pool::{Room, RootfsPool};
pub use spec::{Hooks, ImageDefaults, NetworkNamespace, Privilege, RootMode, SpecInput, build};
pub use users::UserError;

use self::mount_origin::MountOrigin;
use crate::{accounts::AccountsError, text::quoted};

/// Why the OCI spec or the bundle of a task could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// Neither the job nor the image names a command.
    #[error(
        "there is no command to run: the image has neither ENTRYPOINT nor CMD; set `command`, `args` or `entrypoint`"
    )]
    NoCommand,
    /// A user or group can't be resolved in the image.
    #[error(transparent)]
    User(#[from] UserError),
    /// The files in which the runtime looks up users, the image's own or those mounted over them, can't be used.
    #[error(transparent)]
    Accounts(#[from] AccountsError),
    /// The kernel does not accept a string or path of the spec.
    #[error(transparent)]
    String(#[from] StringError),
    /// The working directory is not an absolute path.
    #[error("cwd {} is not an absolute path", quoted(.0))]
    Cwd(String),
    /// A builder of the crate `oci_spec` rejected a part of the spec.
    #[error("could not build the OCI spec")]
    Spec(#[from] oci_spec::OciSpecError),
    /// The seccomp profile can't be used.
    #[error(transparent)]
    Seccomp(#[from] seccomp::SeccompError),
    /// A file or directory of the host can't be opened.
    #[error("{option} {source_path:?} could not be opened")]
    Source {
        /// The option that names the path, such as `mounts: source`.
        option: &'static str,
        /// The path, as the job has it.
        source_path: String,
        /// The system call's error.
        source: io::Error,
    },
    /// The job may not use a file or directory of the host.
    #[error(
        "{option} {source_path:?} is outside of the task's and allocation's directories; an operator can open it with security {{ allow_paths }}"
    )]
    SourceOutside {
        /// The option of the job that names the path.
        option: &'static str,
        /// The path, as the job has it.
        source_path: String,
    },
    /// A directory that Nomad has made for the task can't be opened.
    #[error("could not open the task's directory {path}")]
    AllocDir {
        /// The directory.
        path: PathBuf,
        /// Why the directory can't be mounted.
        source: io::Error,
    },
    /// Nothing may be mounted at a target, or the target can't be found.
    #[error("{origin}: target {target:?}: {problem}")]
    Target {
        /// What asks for the mount.
        origin: MountOrigin,
        /// The target, as the option has it.
        target: String,
        /// Why nothing can be mounted there.
        problem: String,
    },
    /// The kernel refuses a mount.
    #[error("{origin}: could not mount at target {target:?}")]
    MountAtTarget {
        /// What asks for the mount.
        origin: MountOrigin,
        /// The mount's target.
        target: String,
        /// Why it can't be mounted.
        source: io::Error,
    },
    /// The image has an entry at a path that every container needs, and the entry can't be replaced.
    #[error("could not replace /{path} of the image, where every container has a file or directory of its own")]
    Image {
        /// The path, relative to the root.
        path: PathBuf,
        /// Why the entry can't be replaced.
        source: io::Error,
    },
    /// The host's name, which a task with the host's network has, can't be read.
    #[error("could not read the host's name")]
    Hostname(#[source] io::Error),
    /// The addresses of the group's network, which belong to the task's name in /etc/hosts, can't be read.
    #[error("could not read the addresses of the group's network namespace {namespace:?}")]
    Addresses {
        /// The path of the namespace.
        namespace: PathBuf,
        /// Why the addresses can't be read.
        source: io::Error,
    },
    /// `host-gateway` in `extra_hosts` can't be resolved to an address.
    #[error("extra_hosts: {name}:host-gateway has no address here")]
    Gateway {
        /// The host name that the address is for.
        name: String,
        /// Why the task's network has no such address.
        source: io::Error,
    },
    /// The job may not use a device.
    #[error(
        "devices: {path:?} is {resolved:?}, which is not allowed on this node (plugin option security {{ allow_devices }})"
    )]
    Device {
        /// The path, as the job has it.
        path: PathBuf,
        /// The path without symbolic links.
        resolved: PathBuf,
    },
    /// A volume or a directory of the task can't be given its SELinux label.
    #[error("could not set the SELinux label of {path} (volume_mount: selinux_label, or security {{ selinux }})")]
    Label {
        /// The volume's path on the host.
        path: PathBuf,
        /// The system call's error.
        source: io::Error,
    },
    /// An operation on a file or directory failed: of the bundle, or of the host for the bundle.
    #[error("could not {doing} {path}")]
    File {
        /// The operation as a verb, such as `create`.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why the operation failed.
        source: io::Error,
    },
    /// The root file system can't be mounted because layers are gone.
    #[error("the image's unpacked layers are gone from containerd's store")]
    LayersGone {
        /// The error of mount(2) or stat(2).
        source: io::Error,
    },
    /// The root file system can't be mounted.
    #[error("could not mount the root file system at {path}")]
    MountRootfs {
        /// The mount point.
        path: PathBuf,
        /// The system call's error.
        source: io::Error,
    },
}
