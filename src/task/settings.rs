//! The driver's settings, which come from the agent's configuration and have been checked.

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use super::{
    apparmor::AppArmorDefault,
    orphans::OrphanPolicy,
    runtime::{OwnShim, RUNC_SHIM_NAMES},
};
use crate::{
    cgroup::PrimingMode,
    gvisor::GvisorSettings,
    ids::DriverName,
    image::Credentials,
    places::Places,
    rootfs::{Capabilities, Hooks, UpperStorage, ceilings::Ceilings, seccomp::SocketcallPolicy},
    shim::PoolSettings,
};

/// Everything an operator can set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The driver's name in job files.
    pub name: DriverName,
    /// `enabled`.
    pub enabled: bool,
    /// `state { run_dir, state_dir }`.
    pub places: Places,
    /// `containerd { … }`.
    pub containerd: ContainerdSettings,
    /// `shim { … }`.
    pub shim: ShimSettings,
    /// `runtime "NAME" { … }`, including the built-in runtimes.
    pub runtimes: BTreeMap<String, RuntimeSettings>,
    /// `default_runtime`.
    pub default_runtime: Option<String>,
    /// `allow_runtimes`; `None` allows all runtimes that are configured.
    pub allow_runtimes: Option<Vec<String>>,
    /// `state { upper, upper_size }`.
    pub upper: UpperStorage,
    /// `cgroup { keep_warm }`.
    pub keep_warm: PrimingMode,
    /// `state { grace }`: how long the remains of tasks are kept that no agent has asked for.
    pub grace: Duration,
    /// `state { orphans }`: what happens to running tasks that no agent asks for.
    pub orphans: OrphanPolicy,
    /// `state { orphan_timeout }`: how long a plugin without an agent keeps running.
    pub orphan_timeout: Duration,
    /// `stats_interval`; `None` uses the interval that the agent asks for.
    pub stats_interval: Option<Duration>,
    /// The performance of this node's processors, as the agent reports it.
    pub compute: Compute,
    /// `disable_log_collection`: the agent collects no logs, and this driver writes the logs of tasks.
    pub disable_log_collection: bool,
    /// `image { keep }`: how long an image that no task uses is kept; `None` keeps it forever.
    pub keep_images: Option<Duration>,
    /// `pids_limit`: the maximum number of processes of a task, which is also the default; `None` sets no limit.
    pub pids_limit: Option<i64>,
    /// `hooks { … }`.
    pub hooks: Hooks,
    /// `metrics { address }`.
    pub metrics: Option<MetricsAddress>,
    /// `auth { … }`.
    pub auth: Option<Credentials>,
    /// What jobs are allowed to do.
    pub security: SecuritySettings,
}

/// The address at which metrics are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetricsAddress {
    /// An IP address and a port.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl FromStr for MetricsAddress {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wanted = "is neither an address with a port (127.0.0.1:9107) nor \"unix:\" followed by an absolute path";
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(_) => Err(wanted),
            None => text.parse().map(Self::Tcp).map_err(|_| wanted),
        }
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The performance of a node's processors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compute {
    /// The sum of all cores' clock rates, in MHz.
    pub total_mhz: u64,
    /// The number of cores.
    pub cores: u32,
}

impl Compute {
    /// Returns the clock rate of one core in MHz, or 0 if it is not known.
    pub fn mhz_per_core(self) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "megahertz are small numbers")]
        let total = self.total_mhz as f64;
        if self.cores == 0 { 0.0 } else { total / f64::from(self.cores) }
    }
}

/// A runtime that jobs can name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeSettings {
    /// `binary`: the runtime's program, by path or by name in PATH.
    pub binary: PathBuf,
    /// `shim`, `config`: a shim other than runc's, by path or by name in PATH.
    pub shim: Option<OwnShim>,
    /// The settings of gVisor, if the runtime is gVisor's runsc.
    pub gvisor: Option<GvisorSettings>,
}

impl Settings {
    /// Returns the options, by the operator's names, in which `other` differs. Two fields are no options and are not
    /// compared: the driver's name, which no running plugin changes, and the node's processors, whose clock rate may be
    /// measured differently each time.
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        // All fields are listed, so that the compiler asks for the option's name when a field is added.
        let Self {
            name: _,
            enabled,
            places,
            containerd,
            shim,
            runtimes,
            default_runtime,
            allow_runtimes,
            upper,
            keep_warm,
            grace,
            orphan_timeout,
            orphans,
            stats_interval,
            compute: _,
            disable_log_collection,
            keep_images,
            pids_limit,
            hooks,
            metrics,
            auth,
            security,
        } = self;
        let mut differ = vec![
            ("enabled", *enabled != other.enabled),
            ("state.run_dir", places.run() != other.places.run()),
            ("state.state_dir", places.state() != other.places.state()),
            ("state.upper or state.upper_size", *upper != other.upper),
            ("state.grace", *grace != other.grace),
            ("state.orphan_timeout", *orphan_timeout != other.orphan_timeout),
            ("state.orphans", *orphans != other.orphans),
            ("runtime", *runtimes != other.runtimes),
            ("default_runtime or containerd_runtime", *default_runtime != other.default_runtime),
            ("allow_runtimes", *allow_runtimes != other.allow_runtimes),
            ("cgroup.keep_warm", *keep_warm != other.keep_warm),
            ("stats_interval", *stats_interval != other.stats_interval),
            ("disable_log_collection", *disable_log_collection != other.disable_log_collection),
            ("image.keep", *keep_images != other.keep_images),
            ("pids_limit", *pids_limit != other.pids_limit),
            ("hooks", *hooks != other.hooks),
            ("metrics.address", *metrics != other.metrics),
            ("auth", *auth != other.auth),
        ];
        differ.extend(containerd.differences(&other.containerd));
        differ.extend(shim.differences(&other.shim));
        differ.extend(security.differences(&other.security));
        differ.into_iter().filter(|(_, differs)| *differs).map(|(option, _)| option).collect()
    }

    /// Returns the settings of the runtime that a job names, or else of the default runtime. `None` if the job names
    /// none and no default runtime is configured. The default is then chosen when a task starts.
    pub fn runtime(&self, wanted: Option<&str>) -> Option<&RuntimeSettings> {
        let named = wanted.filter(|name| !RUNC_SHIM_NAMES.contains(name));
        self.runtimes.get(named.or(self.default_runtime.as_deref())?)
    }
}

/// The containerd that stores images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerdSettings {
    /// The path of containerd's socket.
    pub address: PathBuf,
    /// The namespace in containerd that this driver uses.
    pub namespace: String,
    /// The snapshotter that this driver uses.
    pub snapshotter: String,
}

impl ContainerdSettings {
    fn differences(&self, other: &Self) -> [(&'static str, bool); 3] {
        let Self { address, namespace, snapshotter } = self;
        [
            ("containerd.address", *address != other.address),
            ("containerd.namespace", *namespace != other.namespace),
            ("containerd.snapshotter", *snapshotter != other.snapshotter),
        ]
    }
}

/// The settings of shims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShimSettings {
    /// The shim's program.
    pub binary: PathBuf,
    /// How many idle shims there are, and which tasks share one.
    pub pool: PoolSettings,
}

impl ShimSettings {
    fn differences(&self, other: &Self) -> [(&'static str, bool); 4] {
        let Self { binary, pool: PoolSettings { size, scope, reuse } } = self;
        [
            ("shim.binary", *binary != other.binary),
            ("shim.pool", *size != other.pool.size),
            ("shim_scope", *scope != other.pool.scope),
            ("shim.reuse", *reuse != other.pool.reuse),
        ]
    }
}

/// What jobs are allowed to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecuritySettings {
    /// `allow_privileged`.
    pub allow_privileged: bool,
    /// `security { allow_caps }`; `None` allows all, as nomad-driver-containerd does.
    pub allow_caps: Option<Capabilities>,
    /// `security { allow_paths }`.
    pub allow_paths: Vec<PathBuf>,
    /// Whether jobs may use the host's network namespace and its other namespaces.
    pub allow_host_namespaces: bool,
    /// The paths of devices that jobs may use; a `*` at the end of a path matches any rest. `None` allows all.
    pub allow_devices: Option<Vec<String>>,
    /// The kernel parameters that jobs may set, in the same form. `None` allows all that a container has for itself.
    pub allow_sysctls: Option<Vec<String>>,
    /// `security { ulimit_max, tmpfs_max }`: the maximum values that jobs may ask for.
    pub ceilings: Ceilings,
    /// `security { seccomp }`.
    pub seccomp: SeccompDefault,
    /// Whether jobs may let their processes gain privileges, as set-user-id programs do.
    pub allow_new_privileges: bool,
    /// Whether jobs may choose another seccomp filter, or none.
    pub allow_seccomp_override: bool,
    /// `security { allow_socketcall }`: how docker's seccomp profile treats `socketcall`.
    pub socketcall: SocketcallPolicy,
    /// `security { apparmor }`.
    pub apparmor: AppArmorDefault,
    /// Whether jobs may choose another AppArmor profile, or none.
    pub allow_apparmor_override: bool,
    /// Whether tasks and their files have SELinux labels, where the node has SELinux.
    pub selinux: bool,
    /// Whether jobs may choose other SELinux labels, or none.
    pub allow_label_override: bool,
}

impl SecuritySettings {
    fn differences(&self, other: &Self) -> [(&'static str, bool); 15] {
        let Self {
            allow_privileged,
            allow_caps,
            allow_paths,
            allow_host_namespaces,
            allow_devices,
            allow_sysctls,
            ceilings,
            seccomp,
            allow_new_privileges,
            allow_seccomp_override,
            socketcall,
            apparmor,
            allow_apparmor_override,
            selinux,
            allow_label_override,
        } = self;
        [
            ("allow_privileged", *allow_privileged != other.allow_privileged),
            ("security.allow_caps", *allow_caps != other.allow_caps),
            ("security.allow_paths", *allow_paths != other.allow_paths),
            ("security.allow_host_namespaces", *allow_host_namespaces != other.allow_host_namespaces),
            ("security.allow_devices", *allow_devices != other.allow_devices),
            ("security.allow_sysctls", *allow_sysctls != other.allow_sysctls),
            ("security.ulimit_max or security.tmpfs_max", *ceilings != other.ceilings),
            ("security.seccomp", *seccomp != other.seccomp),
            ("security.allow_new_privileges", *allow_new_privileges != other.allow_new_privileges),
            ("security.allow_seccomp_override", *allow_seccomp_override != other.allow_seccomp_override),
            ("security.allow_socketcall", *socketcall != other.socketcall),
            ("security.apparmor", *apparmor != other.apparmor),
            ("security.allow_apparmor_override", *allow_apparmor_override != other.allow_apparmor_override),
            ("security.selinux", *selinux != other.selinux),
            ("security.allow_label_override", *allow_label_override != other.allow_label_override),
        ]
    }

    /// Says whether jobs may use this device.
    pub fn allows_device(&self, path: &str) -> bool {
        self.allow_devices.as_ref().is_none_or(|patterns| matches_any(patterns, path))
    }
}

/// Says whether a name matches one of the patterns, whose last character may be a `*`.
pub fn matches_any(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| pattern.strip_suffix('*').map_or(pattern == name, |start| name.starts_with(start)))
}

/// The seccomp filter of tasks whose job chooses none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SeccompDefault {
    /// No filter.
    Unconfined,
    /// Docker's default profile.
    Default,
    /// A profile of the operator, in this file.
    File(PathBuf),
}
