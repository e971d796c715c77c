//! The request to start a task.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use super::AppArmorRequest;
use crate::{
    ids::{AllocId, TaskId},
    image::{Credentials, PullPolicy, Reference},
    logs::LogOptions,
    rootfs::{
        CapabilityRequest, Command, MemoryMax, NetworkNamespace, Resources, RootMode,
        init::FirstProcess,
        labels::LabelRequest,
        limits::{Namespaces, Ulimit},
        mounts::MountRequest,
        network::{Dns, ExtraHost},
        selinux::VolumeLabel,
    },
};

/// The checked options of a job's `config` block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskOptions {
    /// `image`.
    pub image: Reference,
    /// `image_pull_timeout`.
    pub image_pull_timeout: Duration,
    /// `auth`.
    pub auth: Option<Credentials>,
    /// `command`, `args`, `entrypoint`.
    pub command: Command,
    /// `init`.
    pub first_process: FirstProcess,
    /// `cwd`.
    pub cwd: Option<String>,
    /// `hostname`.
    pub hostname: Option<String>,
    /// `readonly_rootfs`.
    pub root: RootMode,
    /// `mounts`.
    pub mounts: Vec<MountRequest>,
    /// `host_network`.
    pub host_network: bool,
    /// `privileged`.
    pub privileged: bool,
    /// `cap_add`.
    pub cap_add: Vec<CapabilityRequest>,
    /// `cap_drop`.
    pub cap_drop: Vec<CapabilityRequest>,
    /// `seccomp`, `seccomp_profile`.
    pub seccomp: SeccompRequest,
    /// `security_opt` apparmor.
    pub apparmor: AppArmorRequest,
    /// `security_opt` label.
    pub labels: LabelRequest,
    /// `runtime`.
    pub runtime: Option<String>,
    /// `image_pull_policy`, `force_pull`.
    pub image_pull_policy: PullPolicy,
    /// `pid_mode`, `ipc_mode`, `uts_mode`, `cgroupns`.
    pub namespaces: Namespaces,
    /// `host_dns`.
    pub host_dns: bool,
    /// `extra_hosts`.
    pub extra_hosts: Vec<ExtraHost>,
    /// `shm_size`, in bytes.
    pub shm_size: Option<u64>,
    /// `sysctl`.
    pub sysctl: BTreeMap<String, String>,
    /// `devices`: paths on the host.
    pub devices: Vec<String>,
    /// `ulimit`, `file_limit`.
    pub ulimits: Vec<Ulimit>,
    /// `group_add`.
    pub groups: Vec<String>,
    /// Limits beyond Nomad's resources.
    pub limits: JobLimits,
    /// `oom_score_adj`.
    pub oom_score_adj: i32,
    /// `security_opt` no-new-privileges.
    pub no_new_privileges: Option<bool>,
    /// `tty`.
    pub tty: bool,
    /// `log_max_size`, `log_max_files`, `log_policy`.
    pub log: LogOptions,
    /// `labels`, `annotations`.
    pub annotations: BTreeMap<String, String>,
}

/// The limits that a job sets in addition to its `resources`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobLimits {
    /// `pids_limit`.
    pub pids: Option<i64>,
    /// `cpuset_cpus`.
    pub cpuset_cpus: String,
    /// `cpuset_mems`.
    pub cpuset_mems: String,
    /// The period of `cpu_hard_limit`, which is `cpu_cfs_period`, in microseconds. `None` without a hard limit.
    pub cfs_period: Option<u64>,
    /// `memory_hard_limit`.
    pub memory_max: MemoryMax,
}

/// The seccomp filter that a job asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SeccompRequest {
    /// The option is not set. The operator's filter applies, but none to privileged tasks, and docker's profile not to
    /// tasks in a gVisor sandbox.
    Unset,
    /// No filter.
    Off,
    /// The operator's filter, or docker's if the operator has set none.
    On,
    /// The profile in this file.
    File(String),
}

/// A volume that Nomad itself mounts into the task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The volume's path on the host.
    pub host_path: PathBuf,
    /// The volume's path in the container.
    pub task_path: PathBuf,
    /// Whether the task may only read.
    pub readonly: bool,
    /// The mount propagation, as an option of mount(8): `rprivate`, `rslave` or `rshared`.
    pub propagation: &'static str,
    /// `selinux_label`.
    pub label: Option<VolumeLabel>,
}

/// A device that one of Nomad's device plugins has assigned to the task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskDevice {
    /// The device's path on the host.
    pub host_path: PathBuf,
    /// The device's path in the container.
    pub task_path: PathBuf,
    /// The permitted kinds of access, a subset of `rwm`.
    pub access: String,
}

/// A request to start a task, whose form has been checked.
#[derive(Debug, Clone)]
pub struct StartRequest {
    /// Nomad's id of this attempt.
    pub task_id: TaskId,
    /// The task's name.
    pub name: String,
    /// The id of the allocation.
    pub alloc_id: AllocId,
    /// The allocation's directory on the host.
    pub alloc_dir: PathBuf,
    /// The FIFO for standard output.
    pub stdout: PathBuf,
    /// The FIFO for standard error.
    pub stderr: PathBuf,
    /// The task's whole environment.
    pub env: BTreeMap<String, String>,
    /// The job's `user`.
    pub user: String,
    /// The job's `config`.
    pub options: TaskOptions,
    /// The task's resource limits.
    pub resources: Resources,
    /// The task's cgroup as Nomad names it. Nomad may have created it or not.
    pub cpuset_cgroup: String,
    /// The network namespace of the task's group.
    pub network: NetworkNamespace,
    /// The variable by which Nomad tells the task of a port or an upstream of its group, although the task has neither a
    /// network namespace of its group nor the host's network.
    pub lacks_network_for: Option<String>,
    /// The group's `dns`.
    pub dns: Dns,
    /// The group's address and host name, if Nomad knows them.
    pub group_host: Option<(String, String)>,
    /// Host volumes and CSI volumes.
    pub volumes: Vec<Volume>,
    /// Devices of Nomad's device plugins.
    pub devices: Vec<TaskDevice>,
    /// Annotations of the container, for people and tools that inspect it.
    pub annotations: BTreeMap<String, String>,
}
