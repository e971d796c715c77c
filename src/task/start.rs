//! The start of a task. If the image is unpacked and a shim is idle in the pool, a start contacts neither containerd
//! nor a registry, spawns no process other than those of the shim, waits for no timer, and syncs nothing to disk.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    path::Path,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio_util::sync::CancellationToken;

use super::{
    Audience, Record, RecordState, StartRequest, TaskError, TaskEvent, apparmor,
    context::EngineContext,
    dedicated_thread, exec, group,
    guards::{StartGuard, TeardownGuard},
    interrupt, labels, logs, mounts as task_mounts,
    network_files::NetworkFiles,
    plan::{self, HostFiles, Plan, StartedBy},
    record::{RunRecord, epoch_millis},
    share_pool,
    sources::MountSources,
    undo::undo_or_retry,
};
use crate::{
    cgroup::{CgroupLockPrimer, Priming},
    failpoint,
    ids::{ContainerId, TaskId},
    image::{Archive, ImageRecord, Progress, PullPolicy, PullRequest, Reference},
    process::ProcessId,
    rootfs::{
        RootfsError,
        bundle::BundlePaths,
        mounts::{AllocDirs, open_source},
    },
    shim::{self, Adoption, CreateTask, PidFile, ReservedShim, RuntimeOptions, Shim, ShimError, stdio},
};

/// How long each phase of a start took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Phases {
    /// From the beginning of the start until the image was available.
    pub image: Duration,
    /// From the reservation of a shim until the bundle was complete, with the record and the root file system. A shim
    /// that several tasks share is launched at its reservation.
    pub bundle: Duration,
    /// From the completed bundle until a shim was ready. A shim that does not come from the pool is launched while the
    /// bundle is made.
    pub shim: Duration,
    /// Whether the shim came from the pool.
    pub pooled: bool,
    /// The shim's `Create`.
    pub create: Duration,
    /// From the beginning of the start until the driver started the container's process, mostly before the shim
    /// answered `Create`. `None` if the shim or gVisor's wrapper started the process.
    pub released: Option<Duration>,
    /// The shim's `Start`, if it was called.
    pub start: Option<Duration>,
    /// The whole start.
    pub total: Duration,
}

impl Phases {
    /// The number of phases that [`Self::by_name`] returns.
    pub const COUNT: usize = 8;

    /// Returns all phases with their names in metrics and in InspectTask.
    pub fn by_name(&self) -> [(&'static str, Option<Duration>); Self::COUNT] {
        [
            ("image", Some(self.image)),
            ("shim", Some(self.shim)),
            ("bundle", Some(self.bundle)),
            ("create", Some(self.create)),
            ("released", self.released),
            ("start", self.start),
            ("own", Some(self.own())),
            ("total", Some(self.total)),
        ]
    }

    /// Returns the driver's own part of the start: the total without the pull, the launch of the shim and the shim's
    /// calls.
    pub fn own(&self) -> Duration {
        let others = [self.image, self.shim, self.create, self.start.unwrap_or_default()];
        self.total.saturating_sub(others.iter().sum())
    }
}

/// A task that has just been started.
pub(crate) struct StartedTask {
    pub(super) record: Record,
    pub(super) shim: Shim,
    pub(super) run: RunRecord,
    pub(super) phases: Phases,
    pub(super) image: Arc<ImageRecord>,
    pub(super) stdio: stdio::Stdio,
    pub(super) sources: MountSources,
}

/// Starts a task. On success the task's process runs; on failure everything that the start has made is removed.
///
/// # Errors
/// When the task can't be started, or `stop` is cancelled before the task runs.
pub(crate) async fn start(
    context: &Arc<EngineContext>,
    request: &StartRequest,
    stop: &CancellationToken,
) -> Result<StartedTask, TaskError> {
    let began = Instant::now();
    let _busy = context.pool.start_guard();
    if stop.is_cancelled() {
        return Err(TaskError::Stopped(request.task_id.clone()));
    }
    // All checks that change nothing on the host come first.
    let runtime = context.runtimes.choose(request.options.runtime.as_deref())?;
    let default_profile = &context.settings.security.apparmor;
    let apparmor = tokio::select! {
        profile = apparmor::profile_of_task(&context.apparmor, default_profile, request, &runtime) => profile?,
        () = stop.cancelled() => return Err(TaskError::Stopped(request.task_id.clone())),
    };
    let container_id = ContainerId::derive(request.alloc_id.as_str(), &request.name, &request.task_id);
    let network = plan::network_namespace(request);
    let network_files = NetworkFiles::of(request, &network, &container_id, context.settings.name.flavor())?;
    let hostname = network_files.hostname.clone();
    let mut mounts = task_mounts::open(context, request, network_files, stop).await?;
    let HostFiles { devices, seccomp_profile } = HostFiles::open(context, request, &runtime, stop).await?;
    let labels = labels::of_task(context, request, &runtime);
    labels::label_directories(context, request, labels.is_some()).await?;
    let runtime = tokio::select! {
        ready = runtime.prepare(&network, &context.settings.hooks) => ready?,
        () = stop.cancelled() => return Err(TaskError::Stopped(request.task_id.clone())),
    };
    let image = ensure_image(context, request, stop).await?;
    failpoint::kill_at("start.image");
    task_mounts::add_volumes(&mut mounts, &image, task_mounts::sys_targets(context, request));
    let mounts = Arc::new(mounts);
    let cgroup =
        context.cgroups.task_path(&request.cpuset_cgroup, request.alloc_id.as_str(), &request.name, &container_id);
    let share_pool = share_pool::pool_of_task(context, request);
    let mut plan = Plan {
        request,
        runtime,
        apparmor,
        labels,
        image,
        mounts,
        devices,
        seccomp_profile,
        container_id,
        hostname,
        cgroup,
        share_pool,
    };
    match create_task(context, &plan, began, stop).await {
        // The image's layers were deleted from containerd's store, although the driver has a record of the image. The
        // record is dropped, the image is pulled again, and the start is tried a second time.
        Err(TaskError::Rootfs(RootfsError::LayersGone { .. }))
            if !context.pending_teardowns().contains_key(&request.task_id) =>
        {
            tracing::warn!(
                image = plan.image.reference,
                "the image's layers are gone from containerd's store; pulling the image again"
            );
            context.images.discard_stale(&plan.image);
            plan.image = ensure_image(context, request, stop).await?;
            create_task(context, &plan, began, stop).await
        }
        other => other,
    }
}

/// Returns the task's image, which is pulled if it is not available locally or the job asks for that.
async fn ensure_image(
    context: &EngineContext,
    request: &StartRequest,
    stop: &CancellationToken,
) -> Result<Arc<ImageRecord>, TaskError> {
    let options = &request.options;
    let (reference, opened) = resolve_image(context, request, stop).await?;
    let policy = options.image_pull_policy;
    let cached = context.images.cached(&reference, opened.as_deref()).filter(|_| policy != PullPolicy::Always);
    if let Some(image) = cached {
        return Ok(image);
    }
    context.events.send(TaskEvent {
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
        credentials: options.auth.clone().or_else(|| context.settings.auth.clone()),
        timeout: options.image_pull_timeout,
        progress: Progress::default(),
        policy,
    };
    tokio::select! {
        pulled = context.images.pull(pull) => {
            context.metrics.pulled(pulled.is_ok());
            pulled.map_err(|error| super::SharedImageError(error).into())
        }
        // The pull is cancelled here, unless another start waits for it, too.
        () = stop.cancelled() => Err(TaskError::Stopped(request.task_id.clone())),
    }
}

/// Returns the image's reference and, for an image in a file, the opened file. As with mounts, a job may use its own
/// files and those that the operator allows. The file may be on a dead file system, so a thread of its own opens it.
async fn resolve_image(
    context: &EngineContext,
    request: &StartRequest,
    stop: &CancellationToken,
) -> Result<(Reference, Option<Arc<OwnedFd>>), TaskError> {
    let Reference::Archive(archive) = &request.options.image else { return Ok((request.options.image.clone(), None)) };
    let settings = &context.settings;
    let (flavor, allow_paths) = (settings.name.flavor(), settings.security.allow_paths.clone());
    let (path, alloc, task) = (archive.path.clone(), request.alloc_dir.clone(), request.name.clone());
    let open = move || {
        let dirs = AllocDirs { alloc: &alloc, task: &task };
        open_source("image: file", &path.to_string_lossy(), dirs, flavor, &allow_paths)
    };
    let opened = dedicated_thread::run(&request.task_id, stop, open).await??;
    // The reference needs the absolute path, since the same relative path is a different file in another allocation.
    let path = if archive.path.is_absolute() {
        archive.path.clone()
    } else {
        request.alloc_dir.join(&request.name).join(&archive.path)
    };
    Ok((Reference::Archive(Archive { path, ..archive.clone() }), Some(Arc::new(opened))))
}

/// Reserves a shim, and writes the record of the attempt, which names the shim.
async fn reserve_shim(
    context: &Arc<EngineContext>,
    plan: &Plan<'_>,
    stop: &CancellationToken,
) -> Result<(ReservedShim, Record), TaskError> {
    let request = plan.request;
    let own_shim = plan.runtime.shim.as_ref().map(|shim| shim.program.as_path());
    // A shim that several tasks will share is launched within this call, which may take as long as a start.
    let reserved = tokio::select! {
        reserved = context.pool.reserve(&request.alloc_id, own_shim) => reserved.map_err(shim_error)?,
        () = stop.cancelled() => return Err(TaskError::Stopped(request.task_id.clone())),
    };
    failpoint::kill_at("start.shim");
    match plan.write_record(context, reserved.id()) {
        Ok(record) => Ok((reserved, record)),
        Err(error) => {
            if let ReservedShim::Running(shim) = reserved {
                context.pool.recycle(&request.alloc_id, shim).await;
            }
            Err(error)
        }
    }
}

/// Registers the task with its group's network namespace, and returns the task's output streams: those that the log
/// collector reads, or else FIFOs of the log writer, which are created here.
async fn join_group_and_logs(
    context: &Arc<EngineContext>,
    plan: &Plan<'_>,
    record: &Record,
    collector_stdio: Option<stdio::Stdio>,
) -> Result<stdio::Stdio, TaskError> {
    let request = plan.request;
    if let Some(group) = &record.intent.group {
        group::enter(context, &request.task_id, &request.name, group)?;
    }
    match collector_stdio {
        Some(stdio) => Ok(stdio),
        None => logs::set_up_log(context, request, &plan.container_id).await,
    }
}

/// Makes everything that the task needs and starts its process. When that fails, everything that was made is undone.
async fn create_task(
    context: &Arc<EngineContext>,
    plan: &Plan<'_>,
    began: Instant,
    stop: &CancellationToken,
) -> Result<StartedTask, TaskError> {
    let request = plan.request;
    let mut phases = Phases { image: began.elapsed(), ..Phases::default() };
    // The runtime will need the cgroup lock within milliseconds.
    let priming = context.cgroup_primer.as_ref().map(CgroupLockPrimer::prime);
    // The descriptor of the namespace is closed when this function returns. The container's process has joined the
    // namespace by then.
    let prepared_netns = plan.take_prepared_netns(context);
    // Building the spec changes nothing on the host, so that an invalid user or an empty command is found before
    // anything is made.
    let spec = plan.spec(context, prepared_netns.as_ref())?;
    let collector_stdio = if logs::is_written_by_driver(&context.settings, request) {
        None
    } else {
        Some(stdio::Stdio::open(&request.alloc_dir, &request.stdout, &request.stderr)?)
    };

    let step = Instant::now();
    let (reserved, mut record) = reserve_shim(context, plan, stop).await?;
    phases.pooled = matches!(reserved, ReservedShim::Running(_));
    let start_guard = StartGuard::new(context, &record);
    let stdio = match join_group_and_logs(context, plan, &record, collector_stdio).await {
        Ok(stdio) => stdio,
        Err(error) => {
            let shim = match reserved {
                ReservedShim::Running(shim) => Adoption::Alive(shim),
                ReservedShim::ToLaunch(_) => Adoption::Gone,
            };
            undo_failed_start(context, &record, shim).await;
            start_guard.disarm();
            return Err(error);
        }
    };
    failpoint::violate(&context.settings.containerd.address);
    // A shim that has to be launched starts up concurrently with the making of the bundle.
    let pending_shim = match reserved {
        ReservedShim::Running(shim) => PendingShim::Ready(shim),
        ReservedShim::ToLaunch(reservation) => {
            let launcher = context.pool.launcher().clone();
            PendingShim::Launching(tokio::spawn(async move { launcher.launch(reservation).await }))
        }
    };
    let bundle = plan.make_bundle(context, spec, stop).await;
    phases.bundle = step.elapsed();
    let step = Instant::now();
    let shim = pending_shim.wait(stop, &request.task_id).await;
    phases.shim = step.elapsed();
    let (shim, error) = match (bundle, shim) {
        (Ok(_), Ok(shim)) if stop.is_cancelled() => {
            (Adoption::Alive(shim), TaskError::Stopped(request.task_id.clone()))
        }
        (Ok(sources), Ok(shim)) => {
            failpoint::kill_at("start.bundle");
            let inputs = CreateInputs { began, priming, shim: &shim, stdio: &stdio };
            let running = Box::pin(create_and_start(context, plan, inputs, &mut record, &mut phases));
            match interrupt::run_until_stopped(running, stop, plan, &shim).await {
                Ok(run) => {
                    phases.total = began.elapsed();
                    start_guard.disarm();
                    return Ok(StartedTask { record, shim, run, phases, image: plan.image.clone(), stdio, sources });
                }
                Err(error) => (Adoption::Alive(shim), explain_if_unmounted(context, plan, error)),
            }
        }
        (Err(error), Ok(shim)) => (Adoption::Alive(shim), error),
        (_, Err(error)) => (Adoption::Gone, error),
    };
    undo_failed_start(context, &record, shim).await;
    start_guard.disarm();
    // The descriptors are closed only now, because a shim that is late may still open the FIFOs by their numbers.
    drop(stdio);
    Err(error)
}

/// Returns the error of a failed start, or [`TaskError::RootfsUnmounted`] if the root file system is no longer mounted,
/// which explains any other error.
///
/// A cleanup that an earlier plugin has begun for the same attempt unmounts the root file system of the bundle, which
/// the next start of that attempt uses as well. The driver waits for such a cleanup (`undo.rs`). A cleanup that it
/// overlooks must not be reported as the job's fault.
fn explain_if_unmounted(context: &EngineContext, plan: &Plan<'_>, error: TaskError) -> TaskError {
    let paths = BundlePaths::of(&context.settings.places, &plan.container_id);
    match paths.is_mounted() {
        Ok(false) => TaskError::RootfsUnmounted { source: Box::new(error) },
        // If the mount can't be checked, the original error is returned.
        Ok(true) | Err(_) => error,
    }
}

/// Undoes a failed start. What can't be undone is retried in the background.
async fn undo_failed_start(context: &Arc<EngineContext>, record: &Record, shim: Adoption) {
    if let Err(error) = undo_or_retry(TeardownGuard::new(context, record), shim).await {
        tracing::error!(
            task = %record.intent.task_id, error = %crate::error_chain(&error),
            "could not undo a failed start completely; the driver retries in the background"
        );
    }
}

/// The shim of a start: one from the pool, or one that is being launched.
#[allow(clippy::large_enum_variant, reason = "there is one per start, nearly always of the large variant")]
enum PendingShim {
    /// The shim is ready.
    Ready(Shim),
    /// The shim is being launched in a background task.
    Launching(tokio::task::JoinHandle<Result<Shim, ShimError>>),
}

impl PendingShim {
    /// Waits for the shim. If the task is stopped before the shim is ready, the launch is aborted.
    async fn wait(self, stop: &CancellationToken, task: &TaskId) -> Result<Shim, TaskError> {
        let mut launched = match self {
            Self::Ready(shim) => return Ok(shim),
            Self::Launching(launched) => launched,
        };
        tokio::select! {
            launched = &mut launched => launched?.map_err(shim_error),
            () = stop.cancelled() => {
                launched.abort();
                // The launch may have completed before it was aborted.
                match launched.await {
                    Ok(Ok(shim)) => return Ok(shim),
                    Ok(Err(error)) => {
                        tracing::debug!(
                            %task, error = crate::error_chain(&error),
                            "the shim of a cancelled start could not be launched"
                        );
                    }
                    Err(error) => tracing::debug!(%task, %error, "the launch of a shim was cancelled"),
                }
                Err(TaskError::Stopped(task.clone()))
            }
        }
    }
}

fn shim_error(source: ShimError) -> TaskError {
    TaskError::Shim { doing: "get a shim", source }
}

/// The arguments of [`create_and_start`] in addition to the plan.
struct CreateInputs<'a> {
    began: Instant,
    priming: Option<Priming>,
    shim: &'a Shim,
    stdio: &'a stdio::Stdio,
}

/// Starts the process of a container that was created, unless the shim is to start it. Returns whether the process was
/// started. If it was not, the caller calls the shim's Start.
async fn start_without_shim(started_by: StartedBy, state: &Path, process: &ProcessId) -> bool {
    match started_by {
        StartedBy::Driver => {
            let log_fallback = |error: &std::io::Error| {
                tracing::debug!(%error, "the driver could not start the process; calling the shim's Start");
            };
            shim::start_via_exec_fifo(state, process).await.inspect_err(log_fallback).is_ok()
        }
        StartedBy::Wrapper => true,
        StartedBy::Shim => false,
    }
}

/// Creates the container, starts its process, and writes the running task's record.
async fn create_and_start(
    context: &Arc<EngineContext>,
    plan: &Plan<'_>,
    inputs: CreateInputs<'_>,
    record: &mut Record,
    phases: &mut Phases,
) -> Result<RunRecord, TaskError> {
    let CreateInputs { began, priming, shim, stdio } = inputs;
    let places = &context.settings.places;
    let bundle = places.bundle(&plan.container_id);

    let step = Instant::now();
    let id = plan.container_id.as_str();
    let (stdout, stderr) = stdio.paths();
    let (root, binary) = (places.runtime_root(&plan.runtime.name), shim.runtime_path(&plan.runtime.binary));
    let config = plan.shim_config(context);
    let runtime = match (&plan.runtime.shim, &config) {
        (None, _) => RuntimeOptions::Runc { binary: &binary, root: &root },
        (Some(_), Some(path)) => RuntimeOptions::File { kind: &plan.shim_options_type(), path },
        (Some(_), None) => RuntimeOptions::Default,
    };
    let create = CreateTask {
        id,
        bundle: &bundle,
        stdout: &stdout,
        stderr: &stderr,
        runtime,
        terminal: plan.request.options.tty,
    };
    let failed = |doing| move |source: ShimError| TaskError::Shim { doing, source };
    let client = shim.client();
    let started_by = plan.started_by(context);
    let watched = context.pid_files.as_ref().filter(|_| started_by != StartedBy::Shim);
    let pid_file = watched.and_then(|files| files.watch(&bundle).ok());
    failpoint::kill_after("start.creating", Duration::from_millis(4));
    let mut creating = pin!(client.create(&create));
    let create_failed = failed("create the container");
    // The runtime writes the pid file some milliseconds before the shim answers.
    let (pid, created) = tokio::select! {
        created = &mut creating => (created.map_err(create_failed)?, true),
        pid = PidFile::wait(pid_file) => (pid, false),
    };
    // The container's process is in its cgroup by now.
    drop(priming);
    // The process exists and waits to be started, so its start time can be read, unless the process has ended already.
    let process = ProcessId::of(pid).unwrap_or_else(|_| ProcessId::ended(pid));
    exec::set_oom_score(pid, plan.request.options.oom_score_adj.into());
    let state = places.runtime_state(&plan.runtime.name, &record.intent.namespace).join(id);
    let started = start_without_shim(started_by, &state, &process).await;
    phases.released = (started && started_by == StartedBy::Driver).then(|| began.elapsed());
    failpoint::kill_at("start.released");
    if !created {
        creating.await.map_err(create_failed)?;
    }
    phases.create = step.elapsed();
    failpoint::wait_for_kill("start.creating");
    failpoint::kill_at("start.created");
    // The shim has opened the log FIFOs by now.
    crate::logs::mark_started(&places.log(&plan.container_id))?;
    if !started {
        let step = Instant::now();
        client.start(id).await.map_err(failed("start the container"))?;
        phases.start = Some(step.elapsed());
    }
    failpoint::kill_at("start.started");

    let run = RunRecord { process, started_at: epoch_millis(SystemTime::now()) };
    record.state = RecordState::Running(run);
    record.save_state(&places.record(&plan.container_id))?;
    failpoint::kill_at("start.recorded");
    Ok(run)
}
