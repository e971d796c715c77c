//! The plan of a start: the container's names, the spec and the bundle, derived from the request, the settings and the
//! image; and the functions that write the plan to disk.

use std::{
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use oci_spec::runtime::{LinuxDevice, Spec};
use tokio_util::sync::CancellationToken;

use super::{
    NetnsMembership, NetworkStack, Record, SeccompDefault, SeccompRequest, SecuritySettings, StartRequest, TaskError,
    context::{EngineContext, layers},
    dedicated_thread, mounts as task_mounts,
    record::Intent,
    runtime::Runtime,
    signal,
    sources::MountSources,
};
use crate::{
    accounts,
    cgroup::{CgroupMode, CgroupPath, SharePool},
    failpoint, gvisor,
    ids::{ContainerId, ShimId},
    image::ImageRecord,
    netns_pool::PreparedNetns,
    rootfs::{
        self, Capabilities, ImageDefaults, NetworkNamespace, Pins, PreparedPins, Privilege, RootfsError, SpecInput,
        Terminal,
        apparmor::ProfileName,
        bundle::{BundlePaths, Layers},
        devices::{self, DeviceRequest},
        labels::Labels,
        mount_tree::{self, Nesting, PlacementRules},
        mounts::{self, AllocDirs, TaskMount},
        same_target::SameTarget,
        seccomp::{self, Filter, SocketcallPolicy},
        selinux,
    },
};

/// The largest seccomp profile that is read. docker's default profile has 15 KB.
const PROFILE_MAX: u64 = 1 << 20;

/// Everything that is decided about a task before anything of it is made.
pub(super) struct Plan<'a> {
    pub(super) request: &'a StartRequest,
    pub(super) runtime: Runtime,
    /// The task's AppArmor profile, which is loaded into the kernel; `None` without AppArmor.
    pub(super) apparmor: Option<ProfileName>,
    /// The task's SELinux labels; `None` where tasks have none.
    pub(super) labels: Option<Labels>,
    pub(super) image: Arc<ImageRecord>,
    pub(super) mounts: Arc<Vec<TaskMount>>,
    /// The task's devices, each with the access that it gets (`r`, `w`, `m`).
    pub(super) devices: Vec<(LinuxDevice, String)>,
    /// The text of the seccomp profile that the job names.
    pub(super) seccomp_profile: Option<Vec<u8>>,
    pub(super) container_id: ContainerId,
    /// The host name that the task sees.
    pub(super) hostname: String,
    pub(super) cgroup: CgroupPath,
    /// The task's cpuset share pool and the pool's processors; `None` where it is in none.
    pub(super) share_pool: Option<(SharePool, String)>,
}

/// The component that starts the process of a created container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StartedBy {
    /// The driver opens the runtime's exec FIFO, which is all that the runtime's `start` would do.
    Driver,
    /// gVisor's wrapper has started the process together with the container.
    Wrapper,
    /// The shim starts the process when the driver calls its `Start`.
    Shim,
}

/// Returns the network namespace that a task runs in.
pub(super) fn network_namespace(request: &StartRequest) -> NetworkNamespace {
    if request.options.host_network { NetworkNamespace::Host } else { request.network.clone() }
}

/// What a job names by a path of the host, besides its mounts and its image.
#[derive(Default)]
pub(super) struct HostFiles {
    /// The task's devices, each with the access that it gets (`r`, `w`, `m`).
    pub(super) devices: Vec<(LinuxDevice, String)>,
    /// The text of the seccomp profile that the job names.
    pub(super) seccomp_profile: Option<Vec<u8>>,
}

impl HostFiles {
    /// Looks up the devices and reads the seccomp profile of a task. Their paths may lead to a dead file system, so a
    /// thread of its own does this.
    ///
    /// # Errors
    /// When a file is missing or not allowed, a file system does not answer, or the task is stopped meanwhile.
    pub(super) async fn open(
        context: &Arc<EngineContext>,
        request: &StartRequest,
        runtime: &Runtime,
        stop: &CancellationToken,
    ) -> Result<Self, TaskError> {
        let has_devices = !request.devices.is_empty() || !request.options.devices.is_empty();
        if !has_devices && !matches!(request.options.seccomp, SeccompRequest::File(_)) {
            return Ok(Self::default());
        }
        let (context, owned, runtime) = (context.clone(), request.clone(), runtime.clone());
        let open = move || -> Result<Self, TaskError> {
            let devices = devices(&context.settings.security, &owned, &runtime)?;
            Ok(Self { devices, seccomp_profile: job_seccomp_profile(&context, &owned)? })
        };
        dedicated_thread::run(&request.task_id, stop, open).await?
    }
}

/// Returns the devices of Nomad's device plugins and those that the job names. The operator must allow the file that
/// each device of the job resolves to.
///
/// # Errors
/// When a path is no device or is not allowed, or when the runtime does not pass on one of the devices: the driver
/// never silently ignores what a job relies on.
fn devices(
    security: &SecuritySettings,
    request: &StartRequest,
    runtime: &Runtime,
) -> Result<Vec<(LinuxDevice, String)>, TaskError> {
    let resolve = |path: &Path| {
        let failed = |source| RootfsError::File { doing: "use device", path: path.to_owned(), source };
        let resolved = path.canonicalize();
        let device = resolved.as_deref().unwrap_or(path);
        if runtime.gvisor.is_some() && !gvisor::passes_device_through(device) {
            return Err(TaskError::NotInSandbox { runtime: runtime.name.clone(), device: path.to_owned() });
        }
        Ok(resolved.map_err(failed)?)
    };
    // The resolved path is used from here on: it has no symlinks that could be changed after this check.
    let mut wanted = Vec::new();
    for device in &request.devices {
        wanted.push((resolve(&device.host_path)?, device.task_path.clone(), device.access.as_str()));
    }
    for path in request.options.devices.iter().map(PathBuf::from) {
        let resolved = resolve(&path)?;
        if !security.allows_device(&resolved.to_string_lossy()) {
            return Err(RootfsError::Device { path, resolved }.into());
        }
        wanted.push((resolved, path, "rwm"));
    }
    let wanted = wanted.iter().map(|(host_path, task_path, access)| DeviceRequest { host_path, task_path, access });
    Ok(devices::task_devices(wanted)?)
}

impl Plan<'_> {
    /// Returns the configuration file of a runtime's own shim, if the runtime has such a shim and the shim such a file.
    pub(super) fn shim_config(&self, context: &EngineContext) -> Option<PathBuf> {
        let shim = self.runtime.shim.as_ref()?;
        if self.runtime.gvisor.is_some() {
            return Some(context.settings.places.bundle(&self.container_id).join("shim.toml"));
        }
        shim.config.clone()
    }

    /// Returns the type of the shim's configuration: `io.containerd.NAME.options`, as containerd's own clients name it.
    pub(super) fn shim_options_type(&self) -> String {
        match self.runtime.gvisor {
            Some(_) => gvisor::SHIM_OPTIONS.to_owned(),
            None => format!("{}.options", self.runtime.name),
        }
    }

    /// Writes the task's record to disk, in the state `intended`, and returns it.
    pub(super) fn write_record(&self, context: &EngineContext, shim: &ShimId) -> Result<Record, TaskError> {
        let stop_signal = match self.image.config.stop_signal.as_str() {
            "" => libc::SIGTERM,
            name => signal::parse(name).unwrap_or_else(|error| {
                tracing::warn!(image = self.image.reference, %error, "invalid STOPSIGNAL in the image; using SIGTERM");
                libc::SIGTERM
            }),
        };
        let record = Record::new(Intent {
            task_id: self.request.task_id.clone(),
            name: self.request.name.clone(),
            alloc_id: self.request.alloc_id.clone(),
            alloc_dir: self.request.alloc_dir.clone(),
            stdout: self.request.stdout.clone(),
            stderr: self.request.stderr.clone(),
            container_id: self.container_id.clone(),
            image: self.image.reference.clone(),
            lease: self.image.lease.clone(),
            runtime: self.runtime.name.clone(),
            gvisor: self.runtime.gvisor.is_some(),
            shim: shim.clone(),
            shim_program: self.runtime.shim.as_ref().map(|shim| shim.program.clone()),
            namespace: context.pool.launcher().namespace().to_owned(),
            cgroup: self.cgroup.clone(),
            share_pool: self.share_pool.as_ref().map(|(pool, _)| pool.clone()),
            group: self.membership(),
            stop_signal,
        })?;
        // In a test that skips this step, `save_state` writes the record when the task runs.
        if !failpoint::skip("intent") {
            record.save(&context.settings.places.record(&self.container_id))?;
        }
        failpoint::kill_at("start.intent");
        Ok(record)
    }

    /// Returns how the task takes part in its group's network namespace; `None` if it is in no such namespace.
    pub(super) fn membership(&self) -> Option<NetnsMembership> {
        let namespace = network_namespace(self.request);
        let stack = match self.runtime.network(&namespace) {
            Some(gvisor::Network::Sandbox) => NetworkStack::Sandbox,
            Some(gvisor::Network::Host | gvisor::Network::None) | None => NetworkStack::Kernel,
        };
        match namespace {
            NetworkNamespace::Path(namespace) => Some(NetnsMembership { namespace, stack }),
            NetworkNamespace::Private | NetworkNamespace::Host => None,
        }
    }

    /// Takes a prepared network namespace for the task; `None` if the task has no network of its own or none is
    /// prepared. Only crun and runc are known to join a namespace as they use one that they create. Others may do
    /// more: a sandbox has a network stack of its own, and sysbox needs a namespace that belongs to its user namespace.
    pub(super) fn take_prepared_netns(&self, context: &EngineContext) -> Option<PreparedNetns> {
        let is_private = network_namespace(self.request) == NetworkNamespace::Private;
        if is_private && self.runtime.is_crun_or_runc() { context.netns_pool.take() } else { None }
    }

    /// Returns which component starts the process of the created container.
    pub(super) fn started_by(&self, context: &EngineContext) -> StartedBy {
        match (&self.runtime.gvisor, &self.runtime.shim) {
            (Some(_), None) => StartedBy::Wrapper,
            (None, None) if self.runtime.waits_at_fifo() && context.settings.hooks.poststart.is_empty() => {
                StartedBy::Driver
            }
            _ => StartedBy::Shim,
        }
    }

    fn bundle(&self, context: &EngineContext) -> BundlePaths {
        BundlePaths::of(&context.settings.places, &self.container_id)
    }

    /// Makes the bundle: the root file system, the task's mounts and the files. This takes a few dozen system calls on
    /// local file systems, and half a millisecond with a prepared root file system. So the calling thread does it: on a
    /// busy machine, a handover to another thread and back would cost more. Only if sources of mounts may be on a dead
    /// file system, the mounts are made on a separate thread.
    ///
    /// # Errors
    /// When something can't be made or mounted, a file system does not answer, or the task is stopped meanwhile.
    pub(super) async fn make_bundle(
        &self,
        context: &EngineContext,
        spec: Spec,
        stop: &CancellationToken,
    ) -> Result<MountSources, TaskError> {
        let (paths, mounts) = (self.bundle(context), self.mounts.clone());
        let rules = PlacementRules {
            sys: task_mounts::sys_targets(context, self.request),
            nesting: if self.runtime.gvisor.is_some() { Nesting::ByRuntime } else { Nesting::ByDriver },
            same_target: SameTarget::of(context.settings.name.flavor()),
            label: self.labels.as_ref().map(|labels| labels.files.clone()),
        };
        let place = move |prepared| place_mounts(&paths, &mounts, spec, &rules, prepared);
        let pins = if task_mounts::may_hang(self.request) {
            let prepared = tokio::task::block_in_place(|| self.mount_rootfs(context))?;
            let (spec, pins) = dedicated_thread::run(&self.request.task_id, stop, move || place(prepared)).await??;
            tokio::task::block_in_place(|| self.write_bundle(context, &spec))?;
            pins
        } else {
            tokio::task::block_in_place(|| {
                let (spec, pins) = place(self.mount_rootfs(context)?)?;
                self.write_bundle(context, &spec).map(|()| pins)
            })?
        };
        Ok(MountSources::new(pins, self.mounts.clone()))
    }

    /// Mounts the root file system. A prepared root file system comes with a file system for the sources of mounts,
    /// which is returned.
    fn mount_rootfs(&self, context: &EngineContext) -> Result<Option<PreparedPins>, TaskError> {
        let paths = self.bundle(context);
        paths.create()?;
        let layers = layers(&self.image);
        if let Some(labels) = &self.labels {
            // A prepared root file system has no label, and the label of a mounted one can't be changed.
            let label = selinux::mount_option(&labels.files);
            let options = [layers.options, &[label]].concat();
            paths.mount(Layers { options: &options, ..layers }, &context.settings.upper)?;
            failpoint::kill_at("start.mounted");
            return Ok(None);
        }
        let attached = context.rootfs_pool.attach(layers, &paths);
        let is_attached = matches!(attached, Ok(Some(_)));
        let pins = attached.unwrap_or_else(|error| {
            tracing::debug!(
                error = %crate::error_chain(&error),
                "could not attach a prepared root file system; mounting one"
            );
            None
        });
        if !is_attached {
            paths.mount(layers, &context.settings.upper)?;
        }
        failpoint::kill_at("start.mounted");
        Ok(pins)
    }

    /// Writes the bundle's files: the spec and, for gVisor's own shim, the shim's configuration.
    fn write_bundle(&self, context: &EngineContext, spec: &Spec) -> Result<(), TaskError> {
        let paths = self.bundle(context);
        let root = context.settings.places.runtime_root(&self.runtime.name);
        crate::files::create_private_dir(&root)
            .map_err(|source| crate::places::PlacesError::Create { path: root.clone(), source })?;
        if let Some(path) = self.shim_config(context).filter(|path| path.starts_with(context.settings.places.bundles()))
        {
            let text = gvisor::shim_config(&self.runtime.binary, &root).map_err(std::io::Error::other);
            let failed = |source| RootfsError::File { doing: "write", path: path.clone(), source };
            paths.write(&path, text.map_err(failed)?.as_bytes())?;
        }
        Ok(paths.write_spec(spec)?)
    }

    /// Builds the OCI spec. The task joins `netns`, if that is given. This changes nothing on the host.
    ///
    /// # Errors
    /// When the job, the image or the settings ask for what can't be done.
    pub(super) fn spec(&self, context: &EngineContext, netns: Option<&PreparedNetns>) -> Result<Spec, TaskError> {
        let Self { request, image, .. } = self;
        let options = &request.options;
        let settings = &context.settings;
        let flavor = settings.name.flavor();
        let own = &context.own_capabilities;
        let (privilege, base) = if options.privileged {
            // A privileged task in a sandbox gets only the devices that it names, since gVisor emulates `/dev`.
            let devices = if self.runtime.gvisor.is_some() { Vec::new() } else { devices::host_devices()? };
            (Privilege::Privileged { devices }, own.clone())
        } else {
            (Privilege::Confined, Capabilities::defaults(flavor))
        };
        let capabilities = base.adjusted(&options.cap_add, &options.cap_drop).within(own);
        let seccomp = self.seccomp_filter(context, &capabilities)?;
        let config = &image.config;
        let mut resources = request.resources.clone();
        if let Some((_, cpus)) = &self.share_pool {
            resources.cpuset_cpus.clone_from(cpus);
        }
        let mut annotations = request.annotations.clone();
        if self.runtime.gvisor.is_some() && self.runtime.shim.is_some() {
            let (key, value) = gvisor::SANDBOX_ANNOTATION;
            annotations.insert(key.to_owned(), value.to_owned());
        }
        let own_network = network_namespace(request);
        let network = netns.map_or(own_network, |prepared| NetworkNamespace::Path(prepared.path()));
        let mut sysctl = options.sysctl.clone();
        // gVisor's kernel has no such parameters, and restricts neither ports nor ping.
        if network != NetworkNamespace::Host && self.runtime.gvisor.is_none() {
            context.default_sysctls.add_missing(&mut sysctl);
        }
        let spec = rootfs::build(SpecInput {
            flavor,
            image: ImageDefaults {
                entrypoint: &config.entrypoint,
                cmd: &config.cmd,
                env: &config.env,
                user: &config.user,
                working_dir: &config.working_dir,
                passwd: &image.passwd,
                group: &image.group,
            },
            command: &options.command,
            first_process: options.first_process,
            cwd: options.cwd.as_deref(),
            user: &request.user,
            env: &request.env,
            hostname: &self.hostname,
            root: options.root,
            capabilities,
            privilege,
            masked: if self.runtime.gvisor.is_some() { &context.masked.sandbox } else { &context.masked.host },
            network,
            root_propagation: mount_tree::root_propagation(&self.mounts),
            devices: self.devices.clone(),
            resources: &resources,
            ulimits: &options.ulimits,
            ulimit_defaults: settings.security.ceilings.default_ulimits(),
            sysctl: &sysctl,
            namespaces: options.namespaces,
            is_cgroup_v2: context.cgroups.mode() == CgroupMode::V2,
            shm_size: options.shm_size,
            groups: &options.groups,
            oom_score_adj: options.oom_score_adj,
            no_new_privileges: options.no_new_privileges,
            terminal: if options.tty { Terminal::Yes } else { Terminal::No },
            hooks: &settings.hooks,
            counts_swap: context.cgroups.accounts_swap(),
            cgroup: self.cgroup.as_str(),
            kernel: context.kernel_limits,
            seccomp,
            apparmor: self.apparmor.as_ref(),
            labels: self.labels.as_ref(),
            annotations,
        })?;
        Ok(spec)
    }

    /// Returns the task's seccomp filter: the one that the job names, else the operator's default. `None` means no
    /// filter.
    fn seccomp_filter(
        &self,
        context: &EngineContext,
        capabilities: &Capabilities,
    ) -> Result<Option<Filter>, TaskError> {
        let settings = &context.settings;
        let options = &self.request.options;
        let compile = |source| {
            Ok(Some(
                context.seccomp_filters.get(source, capabilities, self.runtime.filters).map_err(RootfsError::from)?,
            ))
        };
        let operators = match (&options.seccomp, &settings.security.seccomp) {
            (SeccompRequest::Off, _) => return Ok(None),
            (SeccompRequest::Unset, _) if options.privileged => return Ok(None),
            (SeccompRequest::Unset, SeccompDefault::Unconfined) => return Ok(None),
            // docker's filter protects the host's kernel, which a task in a sandbox does not reach. gVisor's own kernel
            // would only spend time on the filter at each system call. A filter that the job or the operator names
            // applies in the sandbox, too.
            (SeccompRequest::Unset, SeccompDefault::Default) if self.runtime.gvisor.is_some() => return Ok(None),
            (SeccompRequest::File(path), _) => {
                let text = self.seccomp_profile.as_deref().unwrap_or_default();
                return compile(seccomp::ProfileSource::File { path: Path::new(path), text });
            }
            (SeccompRequest::On | SeccompRequest::Unset, operators) => operators,
        };
        // The driver's AppArmor profile denies sockets of the forbidden address families, whichever system call opens
        // them.
        let has_own_profile = self.apparmor.as_ref() == Some(context.apparmor.name());
        let socketcall = if has_own_profile { SocketcallPolicy::Allowed } else { settings.security.socketcall };
        match operators {
            SeccompDefault::File(path) => {
                let shown = path.to_string_lossy();
                compile(seccomp::ProfileSource::File { path, text: &read_seccomp_profile(&shown, &shown)? })
            }
            SeccompDefault::Default | SeccompDefault::Unconfined => {
                compile(seccomp::ProfileSource::Default(socketcall))
            }
        }
    }
}

/// Reads the seccomp profile that a job names, if it names one.
fn job_seccomp_profile(context: &EngineContext, request: &StartRequest) -> Result<Option<Vec<u8>>, RootfsError> {
    let SeccompRequest::File(path) = &request.options.seccomp else { return Ok(None) };
    let settings = &context.settings;
    let dirs = AllocDirs { alloc: &request.alloc_dir, task: &request.name };
    let opened =
        mounts::open_source("seccomp profile", path, dirs, settings.name.flavor(), &settings.security.allow_paths)?;
    read_seccomp_profile(&format!("/proc/self/fd/{}", opened.as_raw_fd()), path).map(Some)
}

/// Reads a seccomp profile. A file that is larger than any real profile is refused.
fn read_seccomp_profile(path: &str, shown: &str) -> Result<Vec<u8>, RootfsError> {
    use std::io::Read as _;
    let read = || {
        // O_NONBLOCK, since a FIFO in place of the profile must not block the start.
        let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(std::io::Error::other("it is not a regular file"));
        }
        let mut text = Vec::new();
        file.take(PROFILE_MAX + 1).read_to_end(&mut text)?;
        if text.len() as u64 > PROFILE_MAX {
            return Err(std::io::Error::other(format!("it is larger than {PROFILE_MAX} bytes")));
        }
        Ok(text)
    };
    read().map_err(|source| seccomp::SeccompError::Read { path: shown.into(), source }.into())
}

/// Mounts the task's mounts in its root file system. Returns the spec, completed by the mounts that the runtime has to
/// make, and the file system that holds the sources.
fn place_mounts(
    paths: &BundlePaths,
    mounts: &[TaskMount],
    mut spec: Spec,
    rules: &PlacementRules,
    prepared: Option<PreparedPins>,
) -> Result<(Spec, Pins), RootfsError> {
    let base = spec.mounts().clone().unwrap_or_default();
    let (placed, pins) = mount_tree::place_mounts(paths, &base, mounts, rules, prepared)?;
    spec.set_mounts(Some([base, placed].concat()));
    // The root file system is complete now, and the runtime will read the accounts from it.
    accounts::check(&paths.rootfs(), bind_mounts(&spec))?;
    Ok((spec, pins))
}

/// Returns the bind mounts of a spec: each destination in the container with its source.
fn bind_mounts(spec: &Spec) -> impl Iterator<Item = (&Path, &Path)> {
    let mounts = spec.mounts().iter().flatten().filter(|mount| mount.typ().as_deref() == Some("bind"));
    mounts.filter_map(|mount| Some((mount.destination().as_path(), mount.source().as_deref()?)))
}
