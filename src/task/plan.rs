//! What a start will make, worked out before anything is made: names, the spec, the bundle's contents.

use std::{
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use oci_spec::runtime::{LinuxDevice, Spec};
use tokio_util::sync::CancellationToken;

use super::{
    Membership, Record, SeccompDefault, SeccompRequest, Stack, StartRequest, TaskError, mounts as task_mounts,
    off_workers,
    record::Intent,
    runtime::Runtime,
    shared::{Shared, layers},
    signal,
    sources::Sources,
};
use crate::{
    accounts,
    cgroup::{CgroupMode, CgroupPath, SharePool},
    fault, gvisor,
    ids::ContainerId,
    image::ImageRecord,
    rootfs::{
        self, Capabilities, ImageDefaults, NetworkNamespace, Pins, PreparedPins, Privilege, RootfsError, SpecInput,
        Terminal,
        apparmor::ProfileName,
        bundle::BundlePaths,
        devices::{self, DeviceRequest},
        mount_tree::{self, Nesting},
        mounts::{self, AllocDirs, TaskMount},
        seccomp::{self, Filter, Multiplexer},
        target::SysTargets,
    },
};

/// docker's default profile has 15 KB.
const PROFILE_MAX: u64 = 1 << 20;

/// What is known about a task before anything is made.
pub(super) struct Plan<'a> {
    pub(super) request: &'a StartRequest,
    pub(super) runtime: Runtime,
    /// Its AppArmor profile, which is loaded.
    pub(super) apparmor: Option<ProfileName>,
    pub(super) image: Arc<ImageRecord>,
    pub(super) mounts: Arc<Vec<TaskMount>>,
    /// With what it may do to them.
    pub(super) devices: Vec<(LinuxDevice, String)>,
    pub(super) container_id: ContainerId,
    pub(super) cgroup: CgroupPath,
    /// With its processors.
    pub(super) share_pool: Option<(SharePool, String)>,
}

/// Who starts the process of a container that is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Starter {
    /// We do: letting it go is all that the runtime's `start` would do.
    Driver,
    /// gVisor's wrapper has started it with the container.
    Wrapper,
    /// The shim, asked to.
    Shim,
}

/// Whose network a task sees.
pub(super) fn network(request: &StartRequest) -> NetworkNamespace {
    if request.options.host_network { NetworkNamespace::Host } else { request.network.clone() }
}

/// The devices of Nomad's device plugins, and those that the job names, where the operator allows what they lead to.
pub(super) fn devices(shared: &Shared, request: &StartRequest) -> Result<Vec<(LinuxDevice, String)>, RootfsError> {
    let security = &shared.settings.security;
    let mut own = Vec::new();
    for path in request.options.devices.iter().map(PathBuf::from) {
        let failed = |source| RootfsError::File { doing: "use device", path: path.clone(), source };
        let resolved = path.canonicalize().map_err(failed)?;
        if !security.allows_device(&resolved.to_string_lossy()) {
            return Err(RootfsError::Device { path, resolved });
        }
        own.push((resolved, path));
    }
    // From here on by what was allowed, which has no symlinks that somebody could turn elsewhere.
    let own = own.iter().map(|(host_path, task_path)| DeviceRequest { host_path, task_path, access: "rwm" });
    let given = request.devices.iter().map(|device| DeviceRequest {
        host_path: &device.host_path,
        task_path: &device.task_path,
        access: &device.access,
    });
    devices::of_the_task(given.chain(own))
}

/// Can this runtime do what the job wants? Nothing is passed over in silence that a job relies on.
///
/// # Errors
/// With what it can't do.
pub(super) fn fits(runtime: &Runtime, request: &StartRequest) -> Result<(), TaskError> {
    if runtime.gvisor.is_none() {
        return Ok(());
    }
    let given = request.devices.iter().map(|device| device.host_path.as_path());
    let own = request.options.devices.iter().map(Path::new);
    match given.chain(own).find(|path| !gvisor::passes_on(path)) {
        None => Ok(()),
        Some(device) => Err(TaskError::NotInSandbox { runtime: runtime.name.clone(), device: device.to_owned() }),
    }
}

impl Plan<'_> {
    /// The file that the task's own shim is configured by, if it has one.
    pub(super) fn shim_config(&self, shared: &Shared) -> Option<PathBuf> {
        let shim = self.runtime.shim.as_ref()?;
        if self.runtime.gvisor.is_some() {
            return Some(shared.settings.places.bundle(&self.container_id).join("shim.toml"));
        }
        shim.config.clone()
    }

    /// What kind of file that is: `io.containerd.NAME.options`, as containerd's own clients say it.
    pub(super) fn shim_options(&self) -> String {
        match self.runtime.gvisor {
            Some(_) => gvisor::SHIM_OPTIONS.to_owned(),
            None => format!("{}.options", self.runtime.name),
        }
    }

    pub(super) fn record(&self, shared: &Shared, shim: &str) -> Result<Record, TaskError> {
        let stop_signal = match self.image.config.stop_signal.as_str() {
            "" => libc::SIGTERM,
            name => signal::parse(name).unwrap_or_else(|error| {
                tracing::warn!(image = self.image.reference, %error, "STOPSIGNAL of the image; using SIGTERM");
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
            shim: shim.to_owned(),
            shim_program: self.runtime.shim.as_ref().map(|shim| shim.program.clone()),
            namespace: shared.pool.launcher().namespace().to_owned(),
            cgroup: self.cgroup.as_str().to_owned(),
            share_pool: self.share_pool.as_ref().map(|(pool, _)| pool.clone()),
            group: self.membership(),
            stop_signal,
        })?;
        // Without this, `save_state` writes the record when the task runs.
        if !fault::skipped("intent") {
            record.save(&shared.settings.places.record(&self.container_id))?;
        }
        fault::point("start.intent");
        Ok(record)
    }

    /// How it is in its group's network namespace, if there is one.
    pub(super) fn membership(&self) -> Option<Membership> {
        let namespace = network(self.request);
        let stack = match self.runtime.network(&namespace) {
            Some(gvisor::Network::Sandbox) => Stack::Sandbox,
            Some(gvisor::Network::Host | gvisor::Network::None) | None => Stack::Kernel,
        };
        match namespace {
            NetworkNamespace::Path(namespace) => Some(Membership { namespace, stack }),
            NetworkNamespace::Private | NetworkNamespace::Host => None,
        }
    }

    /// Who starts the process of a container that is made.
    pub(super) fn starter(&self, shared: &Shared) -> Starter {
        match (&self.runtime.gvisor, &self.runtime.shim) {
            (Some(_), None) => Starter::Wrapper,
            (None, None) if self.runtime.waits_at_fifo() && shared.settings.hooks.poststart.is_empty() => {
                Starter::Driver
            }
            _ => Starter::Shim,
        }
    }

    fn hostname(&self) -> &str {
        self.request.options.hostname.as_deref().unwrap_or(self.container_id.as_str())
    }

    fn bundle(&self, shared: &Shared) -> BundlePaths {
        BundlePaths::of(&shared.settings.places, &self.container_id)
    }

    /// Makes the bundle. A few dozen system calls on local file systems, half a millisecond in all where a root file system
    /// was made ahead: less than handing them to another thread and back would cost on a busy machine. Where sources of mounts
    /// may lie on a dead file system, the mounts are placed on a thread of their own.
    ///
    /// # Errors
    /// When something can't be made or mounted, a file system does not answer, or the task is stopped meanwhile.
    pub(super) async fn make_bundle(
        &self,
        shared: &Shared,
        spec: Spec,
        stop: &CancellationToken,
    ) -> Result<Sources, TaskError> {
        let (paths, mounts) = (self.bundle(shared), self.mounts.clone());
        let sys = task_mounts::sys_targets(shared, self.request);
        let nesting = if self.runtime.gvisor.is_some() { Nesting::ByTheRuntime } else { Nesting::InTheTree };
        let place = move |prepared| placed(&paths, &mounts, spec, (sys, nesting), prepared);
        let pins = if task_mounts::may_hang(self.request) {
            let prepared = tokio::task::block_in_place(|| self.make_root(shared))?;
            let (spec, pins) = off_workers::run(&self.request.task_id, stop, move || place(prepared)).await??;
            tokio::task::block_in_place(|| self.write_bundle(shared, &spec))?;
            pins
        } else {
            tokio::task::block_in_place(|| {
                let (spec, pins) = place(self.make_root(shared)?)?;
                self.write_bundle(shared, &spec).map(|()| pins)
            })?
        };
        Ok(Sources::new(pins, self.mounts.clone()))
    }

    /// Mounts the root file system. Returns a file system for the sources of mounts where one was made ahead with it.
    fn make_root(&self, shared: &Shared) -> Result<Option<PreparedPins>, TaskError> {
        let paths = self.bundle(shared);
        paths.create()?;
        let layers = layers(&self.image);
        let attached = shared.ahead.attach(layers, &paths);
        let is_attached = matches!(attached, Ok(Some(_)));
        let pins = attached.unwrap_or_else(|error| {
            tracing::debug!(%error, "a root file system made ahead can't be used");
            None
        });
        if !is_attached {
            paths.mount(layers, &shared.settings.upper)?;
        }
        fault::point("start.mounted");
        Ok(pins)
    }

    fn write_bundle(&self, shared: &Shared, spec: &Spec) -> Result<(), TaskError> {
        let paths = self.bundle(shared);
        let root = shared.settings.places.runtime_root(&self.runtime.name);
        crate::places::make_dir(&root)
            .map_err(|source| crate::places::PlacesError::Create { path: root.clone(), source })?;
        if let Some(path) = self.shim_config(shared).filter(|path| path.starts_with(shared.settings.places.bundles())) {
            let text = gvisor::shim_config(&self.runtime.binary, &root).map_err(std::io::Error::other);
            let failed = |source| RootfsError::File { doing: "write", path: path.clone(), source };
            paths.write(&path, text.map_err(failed)?.as_bytes())?;
        }
        Ok(paths.write_spec(spec)?)
    }

    pub(super) fn spec(&self, shared: &Shared) -> Result<Spec, TaskError> {
        let Self { request, image, .. } = self;
        let options = &request.options;
        let settings = &shared.settings;
        let flavor = settings.name.flavor();
        let own = &shared.own_capabilities;
        let (privilege, base) = if options.privileged {
            // gVisor has none of the host's devices, whoever asks.
            let devices = if self.runtime.gvisor.is_some() { Vec::new() } else { devices::of_the_host()? };
            (Privilege::Privileged { devices }, own.clone())
        } else {
            (Privilege::Confined, Capabilities::defaults(flavor))
        };
        let capabilities = base.adjusted(&options.cap_add, &options.cap_drop).within(own);
        let seccomp = self.filter(shared, &capabilities)?;
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
            cwd: options.cwd.as_deref(),
            user: &request.user,
            env: &request.env,
            hostname: self.hostname(),
            root: options.root,
            capabilities,
            privilege,
            masked: if self.runtime.gvisor.is_some() { &shared.masked.sandbox } else { &shared.masked.host },
            network: network(request),
            root_propagation: mount_tree::root_propagation(&self.mounts),
            devices: self.devices.clone(),
            resources: &resources,
            ulimits: &options.ulimits,
            ulimit_defaults: settings.security.ceilings.defaults(),
            sysctl: &options.sysctl,
            namespaces: options.namespaces,
            unified: shared.cgroups.mode() == CgroupMode::V2,
            shm_size: options.shm_size,
            groups: &options.groups,
            oom_score_adj: options.oom_score_adj,
            no_new_privileges: options.no_new_privileges,
            terminal: if options.tty { Terminal::Yes } else { Terminal::No },
            hooks: &settings.hooks,
            counts_swap: shared.cgroups.counts_swap(),
            cgroup: self.cgroup.as_str(),
            kernel: shared.kernel,
            seccomp,
            apparmor: self.apparmor.as_ref(),
            annotations,
        })?;
        Ok(spec)
    }

    /// What the task may call: the job's word, else the operator's.
    fn filter(&self, shared: &Shared, capabilities: &Capabilities) -> Result<Option<Filter>, TaskError> {
        let settings = &shared.settings;
        let options = &self.request.options;
        let made = |source| {
            Ok(Some(shared.filters.get(source, capabilities, self.runtime.filters).map_err(RootfsError::from)?))
        };
        let operators = match (&options.seccomp, &settings.security.seccomp) {
            (SeccompRequest::Off, _) => return Ok(None),
            (SeccompRequest::Unsaid, _) if options.privileged => return Ok(None),
            (SeccompRequest::Unsaid, SeccompDefault::Unconfined) => return Ok(None),
            // docker's filter guards the host's kernel, which a task in a sandbox does not reach; gVisor's own kernel would
            // only ask it for each call. One that somebody has named holds in the sandbox, too.
            (SeccompRequest::Unsaid, SeccompDefault::Default) if self.runtime.gvisor.is_some() => return Ok(None),
            (SeccompRequest::File(path), _) => {
                let dirs = AllocDirs { alloc: &self.request.alloc_dir, task: &self.request.name };
                let opened = mounts::open_source(
                    "seccomp profile",
                    path,
                    dirs,
                    settings.name.flavor(),
                    &settings.security.allow_paths,
                )?;
                let text = read_profile(&format!("/proc/self/fd/{}", opened.as_raw_fd()), path)?;
                return made(seccomp::Source::File { path: Path::new(path), text: &text });
            }
            (SeccompRequest::On | SeccompRequest::Unsaid, operators) => operators,
        };
        // The driver's AppArmor profile refuses the forbidden families to every socket, whichever call opens it.
        let has_own_profile = self.apparmor.as_ref() == Some(shared.apparmor.name());
        let multiplexer = if has_own_profile { Multiplexer::Allowed } else { settings.security.multiplexer };
        match operators {
            SeccompDefault::File(path) => {
                let shown = path.to_string_lossy();
                made(seccomp::Source::File { path, text: &read_profile(&shown, &shown)? })
            }
            SeccompDefault::Default | SeccompDefault::Unconfined => made(seccomp::Source::Default(multiplexer)),
        }
    }
}

/// A profile's file; one that is larger than any profile is none.
fn read_profile(path: &str, shown: &str) -> Result<Vec<u8>, RootfsError> {
    use std::io::Read as _;
    let read = || {
        // A FIFO in a profile's place must not hold the start up.
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

/// Places the mounts of a task in its root file system: the spec with those that are left to the runtime, and the file
/// system that the sources are in.
fn placed(
    paths: &BundlePaths,
    mounts: &[TaskMount],
    mut spec: Spec,
    how: (SysTargets, Nesting),
    prepared: Option<PreparedPins>,
) -> Result<(Spec, Pins), RootfsError> {
    let base = spec.mounts().clone().unwrap_or_default();
    let (placed, pins) = mount_tree::place(paths, &base, mounts, how, prepared)?;
    spec.set_mounts(Some([base, placed].concat()));
    // By now the root file system is what the runtime will read accounts from.
    accounts::check(&paths.rootfs(), binds(&spec))?;
    Ok((spec, pins))
}

/// What a spec binds: places in the container, and what is bound there.
fn binds(spec: &Spec) -> impl Iterator<Item = (&Path, &Path)> {
    let mounts = spec.mounts().iter().flatten().filter(|mount| mount.typ().as_deref() == Some("bind"));
    mounts.filter_map(|mount| Some((mount.destination().as_path(), mount.source().as_deref()?)))
}
