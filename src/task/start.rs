//! The start path. With the image here and a shim waiting, it asks neither containerd nor a registry, spawns nothing
//! but what the shim spawns, waits on no timer, and syncs nothing to disk.

use std::{
    collections::HashMap,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use oci_spec::runtime::{Mount, MountBuilder};
use tokio_util::sync::CancellationToken;

use super::{
    Audience, Record, RecordState, StartRequest, TaskError, TaskEvent,
    record::{Intent, RunRecord, millis},
    runtime::Runtime,
    shared::Shared,
    signal,
    undo::undo_or_keep,
};
use crate::{
    fault,
    ids::{ContainerId, Flavor},
    image::{Archive, ImageRecord, Progress, PullRequest, Reference},
    process::ProcessId,
    rootfs::{
        self, Capabilities, ImageDefaults, NetworkNamespace, Privilege, RootfsError, SpecInput,
        bundle::{BundlePaths, Layers},
        devices,
        mounts::{self, AllocDirs, ResolvedMount},
        network,
    },
    shim::{CreateTask, Found, Shim, ShimError, stdio},
};

/// How long each part of a start took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Phases {
    /// Until the image was here.
    pub image: Duration,
    /// Until a shim was at hand.
    pub shim: Duration,
    /// Had one waited?
    pub pooled: bool,
    /// Record, root file system and bundle.
    pub bundle: Duration,
    /// The shim's `Create`.
    pub create: Duration,
    /// The shim's `Start`.
    pub start: Duration,
    /// All of it.
    pub total: Duration,
}

/// A task that has just been started.
pub struct Running {
    pub(super) record: Record,
    pub(super) shim: Shim,
    pub(super) run: RunRecord,
    pub(super) phases: Phases,
    pub(super) image: Arc<ImageRecord>,
}

/// Starts a task: on success its process runs; on failure nothing is left.
///
/// # Errors
/// When it can't be started, or `stop` comes before its image.
pub async fn start(
    shared: &Arc<Shared>,
    request: &StartRequest,
    stop: &CancellationToken,
) -> Result<Running, TaskError> {
    let began = Instant::now();
    if stop.is_cancelled() {
        return Err(TaskError::Stopped(request.task_id.clone()));
    }
    // Everything that can be found wrong without touching anything comes first.
    let runtime = shared.runtimes.choose(request.options.runtime.as_deref())?;
    let resolved = resolve_mounts(shared, request)?;
    let image = self::image(shared, request, stop).await?;
    fault::point("start.image");
    let container_id = ContainerId::derive(&request.alloc_id, &request.name, &request.task_id);
    let cgroup = shared.cgroups.task_path(&request.cpuset_cgroup, &request.alloc_id, &request.name, &container_id);
    let mut plan = Plan { request, runtime, image, resolved, container_id, cgroup };
    match made(shared, &plan, began).await {
        // containerd's store was wiped under a record of ours: forget it, pull, and try once more.
        Err(TaskError::Rootfs(RootfsError::LayersGone { .. }))
            if !shared.leftovers().contains_key(&request.task_id) =>
        {
            tracing::warn!(
                image = plan.image.reference,
                "its layers are gone from containerd's store; pulling it again"
            );
            shared.images.forget(&plan.image);
            plan.image = self::image(shared, request, stop).await?;
            made(shared, &plan, began).await
        }
        other => other,
    }
}

fn resolve_mounts(shared: &Shared, request: &StartRequest) -> Result<Vec<ResolvedMount>, TaskError> {
    let dirs = AllocDirs { alloc: &request.alloc_dir, task: &request.name };
    let settings = &shared.settings;
    Ok(rootfs::mounts::resolve(&request.options.mounts, dirs, settings.name.flavor(), &settings.security.allow_paths)?)
}

async fn image(
    shared: &Shared,
    request: &StartRequest,
    stop: &CancellationToken,
) -> Result<Arc<ImageRecord>, TaskError> {
    let options = &request.options;
    let (reference, opened) = place(shared, request)?;
    if let Some(image) = shared.images.cached(&reference, opened.as_deref()) {
        return Ok(image);
    }
    shared.events.tell(TaskEvent {
        task_id: request.task_id.clone(),
        alloc_id: request.alloc_id.clone(),
        task_name: request.name.clone(),
        at: SystemTime::now(),
        message: "Downloading image".to_owned(),
        annotations: HashMap::from([("image".to_owned(), options.image.to_string())]),
        audience: Audience::Everybody,
    });
    let pull = PullRequest {
        reference,
        opened,
        credentials: options.auth.clone().or_else(|| shared.settings.auth.clone()),
        timeout: options.image_pull_timeout,
        progress: Progress::default(),
    };
    tokio::select! {
        pulled = shared.images.pull(pull) => {
            shared.metrics.pulled(pulled.is_ok());
            pulled.map_err(|error| super::SharedImageError(error).into())
        }
        // A pull that nobody else waits for ends with this.
        () = stop.cancelled() => Err(TaskError::Stopped(request.task_id.clone())),
    }
}

/// The image's name, and for one in files what that leads to: a job may use its own files and what the operator allows,
/// as with mounts.
fn place(shared: &Shared, request: &StartRequest) -> Result<(Reference, Option<Arc<OwnedFd>>), TaskError> {
    let Reference::Archive(archive) = &request.options.image else { return Ok((request.options.image.clone(), None)) };
    let dirs = AllocDirs { alloc: &request.alloc_dir, task: &request.name };
    let settings = &shared.settings;
    let path = archive.path.to_string_lossy();
    let opened = mounts::open_source(&path, dirs, settings.name.flavor(), &settings.security.allow_paths)?;
    // The same relative path is another file in another allocation.
    let path = if archive.path.is_absolute() {
        archive.path.clone()
    } else {
        request.alloc_dir.join(&request.name).join(&archive.path)
    };
    Ok((Reference::Archive(Archive { path, ..archive.clone() }), Some(Arc::new(opened))))
}

/// From here on there is something to undo.
async fn made(shared: &Arc<Shared>, plan: &Plan<'_>, began: Instant) -> Result<Running, TaskError> {
    let request = plan.request;
    let mut phases = Phases { image: began.elapsed(), ..Phases::default() };
    // The spec is pure: a bad user or an empty command shows before anything is made.
    let spec = plan.spec(shared)?;
    let stdio = stdio::Stdio::open(&request.alloc_dir, &request.stdout, &request.stderr)?;

    let step = Instant::now();
    let taking = |source| TaskError::Shim { doing: "get a shim", source };
    let (shim, pooled) = shared.pool.take().await.map_err(taking)?;
    (phases.shim, phases.pooled) = (step.elapsed(), pooled);
    fault::point("start.shim");

    let mut record = match plan.record(shared, &shim) {
        Ok(record) => record,
        Err(error) => {
            let _ = shim.end().await;
            return Err(error);
        }
    };
    let parts = Parts { spec: &spec, shim: &shim, stdio: &stdio };
    match Box::pin(run(shared, plan, parts, &mut record, &mut phases)).await {
        Ok(run) => {
            stdio.handed_over();
            phases.total = began.elapsed();
            Ok(Running { record, shim, run, phases, image: plan.image.clone() })
        }
        Err(error) => {
            if let Err(left) = undo_or_keep(shared, &record, Found::Alive(shim)).await {
                tracing::error!(task = %request.task_id, error = %crate::chain(&left), "a failed start left something");
            }
            // Only now: a shim that was late may still open them by the numbers they have here.
            drop(stdio);
            Err(error)
        }
    }
}

/// What one start works with.
struct Parts<'a> {
    spec: &'a oci_spec::runtime::Spec,
    shim: &'a Shim,
    stdio: &'a stdio::Stdio,
}

async fn run(
    shared: &Arc<Shared>,
    plan: &Plan<'_>,
    parts: Parts<'_>,
    record: &mut Record,
    phases: &mut Phases,
) -> Result<RunRecord, TaskError> {
    let Parts { spec, shim, stdio } = parts;
    let step = Instant::now();
    let places = &shared.settings.places;
    let paths = BundlePaths { bundle: places.bundle(&plan.container_id), upper: places.upper(&plan.container_id) };
    // A few dozen system calls on local file systems, 0.2 ms in all: less than handing them to another thread and
    // back would cost on a busy machine, so they are made right here, with the worker told that it may block.
    tokio::task::block_in_place(|| plan.make_bundle(shared, &paths, spec))?;
    fault::point("start.bundle");
    phases.bundle = step.elapsed();

    let step = Instant::now();
    let id = plan.container_id.as_str();
    let (stdout, stderr) = stdio.paths();
    let root = places.runtime_root(&plan.runtime.name);
    let create = CreateTask {
        id,
        bundle: &paths.bundle,
        stdout: &stdout,
        stderr: &stderr,
        runtime_binary: &plan.runtime.binary,
        runtime_root: &root,
    };
    let failed = |doing| move |source: ShimError| TaskError::Shim { doing, source };
    let client = shim.client();
    fault::point_within("start.creating", Duration::from_millis(4));
    let pid = client.create(&create).await.map_err(failed("create the container"))?;
    fault::point("start.created");
    // Now, while it surely lives: it waits for its start. One that does not is never taken for another by this.
    let process = ProcessId::of(pid).unwrap_or(ProcessId { pid, start: 0 });
    phases.create = step.elapsed();

    let step = Instant::now();
    client.start(id).await.map_err(failed("start the container"))?;
    phases.start = step.elapsed();

    fault::point("start.started");

    let run = RunRecord { process, started_at: millis(SystemTime::now()) };
    record.state = RecordState::Running(run);
    record.save(&places.record(&plan.container_id))?;
    fault::point("start.recorded");
    Ok(run)
}

/// What is known about a task before anything is made.
struct Plan<'a> {
    request: &'a StartRequest,
    runtime: Runtime,
    image: Arc<ImageRecord>,
    resolved: Vec<ResolvedMount>,
    container_id: ContainerId,
    cgroup: crate::cgroup::CgroupPath,
}

impl Plan<'_> {
    fn record(&self, shared: &Shared, shim: &Shim) -> Result<Record, TaskError> {
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
            shim: shim.id().to_owned(),
            namespace: shim.namespace().to_owned(),
            cgroup: self.cgroup.as_str().to_owned(),
            stop_signal,
        })?;
        record.save(&shared.settings.places.record(&self.container_id))?;
        fault::point("start.intent");
        Ok(record)
    }

    fn hostname(&self) -> &str {
        self.request.options.hostname.as_deref().unwrap_or(self.container_id.as_str())
    }

    fn make_bundle(
        &self,
        shared: &Shared,
        paths: &BundlePaths,
        spec: &oci_spec::runtime::Spec,
    ) -> Result<(), TaskError> {
        let layers = Layers { lowers: &self.image.lowers, options: &self.image.overlay_options };
        paths.mount(layers)?;
        fault::point("start.mounted");
        for (n, resolved) in self.resolved.iter().enumerate() {
            if let ResolvedMount::Bind { source, .. } = resolved {
                paths.pin(n, source.as_fd())?;
            }
        }
        let own = self.request.group_host.as_ref().map(|(address, name)| (address.as_str(), name.as_str()));
        paths.write(&paths.hosts(), &network::hosts(own))?;
        paths.write(&paths.resolv_conf(), &self.request.dns.render(&system_dns(self.request)))?;
        let root = shared.settings.places.runtime_root(&self.runtime.name);
        crate::places::make_dir(&root).map_err(|source| crate::places::PlacesError::Create { path: root, source })?;
        Ok(paths.write_spec(spec)?)
    }

    fn spec(&self, shared: &Shared) -> Result<oci_spec::runtime::Spec, TaskError> {
        let Self { request, image, .. } = self;
        let options = &request.options;
        let settings = &shared.settings;
        let flavor = settings.name.flavor();
        let own = Capabilities::of_this_process();
        let (privilege, base) = if options.privileged {
            (Privilege::Privileged { devices: devices::of_the_host()? }, own.clone())
        } else {
            (Privilege::Confined, Capabilities::defaults(flavor))
        };
        let config = &image.config;
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
            capabilities: base.adjusted(&options.cap_add, &options.cap_drop).within(&own),
            privilege,
            network: if options.host_network { NetworkNamespace::Host } else { request.network.clone() },
            mounts: self.mounts(shared, flavor)?,
            devices: devices::of_the_task(request.devices.iter().map(|device| devices::DeviceRequest {
                host_path: &device.host_path,
                task_path: &device.task_path,
                access: &device.access,
            }))?,
            resources: &request.resources,
            counts_swap: shared.cgroups.counts_swap(),
            cgroup: self.cgroup.as_str(),
            annotations: request.annotations.clone(),
        })?;
        Ok(spec)
    }

    /// The job's own mounts, Nomad's volumes, then what every task has: so nobody hides `/secrets` by accident.
    fn mounts(&self, shared: &Shared, flavor: Flavor) -> Result<Vec<Mount>, TaskError> {
        let Self { request, .. } = self;
        let places = &shared.settings.places;
        let paths = BundlePaths { bundle: places.bundle(&self.container_id), upper: places.upper(&self.container_id) };
        let mut mounts = Vec::new();
        for (n, resolved) in self.resolved.iter().enumerate() {
            mounts.push(match resolved {
                ResolvedMount::FileSystem(mount) => mount.clone(),
                ResolvedMount::Bind { target, options, .. } => {
                    let options: Vec<&str> = options.iter().map(String::as_str).collect();
                    bind(&paths.pinned(n), Path::new(target), &options)?
                }
            });
        }
        for volume in &request.volumes {
            let mode = if volume.readonly { "ro" } else { "rw" };
            mounts.push(bind(&volume.host_path, &volume.task_path, &["rbind", mode, volume.propagation])?);
        }
        mounts.push(bind(&paths.resolv_conf(), Path::new("/etc/resolv.conf"), &["rbind", "ro"])?);
        // The old driver let a task edit its hosts file; some images' entry points do.
        mounts.push(bind(&paths.hosts(), Path::new("/etc/hosts"), &["rbind", "rw"])?);
        let task_dir = request.alloc_dir.join(&request.name);
        for (host, variable) in [
            (task_dir.join("secrets"), "NOMAD_SECRETS_DIR"),
            (task_dir.join("local"), "NOMAD_TASK_DIR"),
            (request.alloc_dir.join("alloc"), "NOMAD_ALLOC_DIR"),
        ] {
            if let Some(target) = request.env.get(variable).filter(|target| target.starts_with('/')) {
                // The secrets file system may be mounted anew by the agent: its new mount must reach the task.
                let propagation = if flavor == Flavor::DropIn { "rprivate" } else { "rslave" };
                mounts.push(bind(&host, Path::new(target), &["rbind", "rw", propagation])?);
            }
        }
        Ok(mounts)
    }
}

fn bind(source: &Path, target: &Path, options: &[&str]) -> Result<Mount, RootfsError> {
    Ok(MountBuilder::default()
        .destination(target)
        .typ("bind")
        .source(source)
        .options(options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
        .build()?)
}

/// The host's name servers. systemd-resolved's stub listens on the host's loopback only; a task with a network of its
/// own needs the servers behind it.
fn system_dns(request: &StartRequest) -> network::Dns {
    let read = |path: &str| std::fs::read_to_string(path).map(|text| network::Dns::parse(&text)).unwrap_or_default();
    let dns = read("/etc/resolv.conf");
    let stub = dns.servers.iter().any(|server| server == "127.0.0.53");
    if stub && !request.options.host_network {
        let behind = read("/run/systemd/resolve/resolv.conf");
        if !behind.is_unset() {
            return behind;
        }
    }
    dns
}
