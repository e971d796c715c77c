//! The start of a task. If the image is unpacked and a shim is idle in the pool, a start contacts neither containerd
//! nor a registry, spawns no process other than those of the shim, waits for no timer, and syncs nothing to disk.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio_util::sync::CancellationToken;

use super::{
    Audience, Record, RecordState, StartRequest, TaskError, TaskEvent, apparmor,
    claim::{Attempt, Claim},
    exec, group, interrupt, logs, mounts as task_mounts,
    names::Names,
    plan::{self, Plan, Starter},
    record::{RunRecord, millis},
    share_pool,
    shared::Shared,
    sources::Sources,
    undo::undo_or_keep,
};
use crate::{
    cgroup::{Warm, Warmer},
    fault,
    ids::{ContainerId, TaskId},
    image::{Archive, ImageRecord, Progress, PullPolicy, PullRequest, Reference},
    process::ProcessId,
    rootfs::{
        RootfsError,
        bundle::BundlePaths,
        mounts::{AllocDirs, open_source},
        selinux,
    },
    shim::{self, CreateTask, Found, PidFile, Reserved, RuntimeOptions, Shim, ShimError, stdio},
};

/// How long each phase of a start took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Phases {
    /// From the beginning of the start until the image was available.
    pub image: Duration,
    /// The intent record, the root file system and the bundle.
    pub bundle: Duration,
    /// From the completed bundle until a shim was ready. A shim that does not come from the pool is launched while the
    /// bundle is made.
    pub shim: Duration,
    /// Did the shim come from the pool?
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
pub struct Running {
    pub(super) record: Record,
    pub(super) shim: Shim,
    pub(super) run: RunRecord,
    pub(super) phases: Phases,
    pub(super) image: Arc<ImageRecord>,
    pub(super) stdio: stdio::Stdio,
    pub(super) sources: Sources,
}

/// Starts a task. On success the task's process runs; on failure everything that the start has made is removed.
///
/// # Errors
/// When the task can't be started, or `stop` is cancelled before the task runs.
pub async fn start(
    shared: &Arc<Shared>,
    request: &StartRequest,
    stop: &CancellationToken,
) -> Result<Running, TaskError> {
    let began = Instant::now();
    let _busy = shared.pool.busy();
    if stop.is_cancelled() {
        return Err(TaskError::Stopped(request.task_id.clone()));
    }
    // All checks that change nothing on the host come first.
    let runtime = shared.runtimes.choose(request.options.runtime.as_deref())?;
    plan::fits(&runtime, request)?;
    let default_profile = &shared.settings.security.apparmor;
    let apparmor = tokio::select! {
        profile = apparmor::of_task(&shared.apparmor, default_profile, request, &runtime) => profile?,
        () = stop.cancelled() => return Err(TaskError::Stopped(request.task_id.clone())),
    };
    let names = Names::of(request, &plan::network(request), shared.settings.name.flavor())?;
    let mounts = Arc::new(task_mounts::open(shared, request, names, stop).await?);
    let devices = plan::devices(shared, request)?;
    label_volumes(request).await?;
    let network = plan::network(request);
    let runtime = tokio::select! {
        ready = runtime.made_ready(&network, &shared.settings.hooks) => ready?,
        () = stop.cancelled() => return Err(TaskError::Stopped(request.task_id.clone())),
    };
    let image = self::image(shared, request, stop).await?;
    fault::point("start.image");
    let container_id = ContainerId::derive(&request.alloc_id, &request.name, &request.task_id);
    let cgroup = shared.cgroups.task_path(&request.cpuset_cgroup, &request.alloc_id, &request.name, &container_id);
    let share_pool = share_pool::of(shared, request);
    let mut plan = Plan { request, runtime, apparmor, image, mounts, devices, container_id, cgroup, share_pool };
    match made(shared, &plan, began, stop).await {
        // The image's layers were deleted from containerd's store, although the driver has a record of the image. The
        // record is dropped, the image is pulled again, and the start is tried a second time.
        Err(TaskError::Rootfs(RootfsError::LayersGone { .. }))
            if !shared.leftovers().contains_key(&request.task_id) =>
        {
            tracing::warn!(
                image = plan.image.reference,
                "the image's layers are gone from containerd's store; pulling the image again"
            );
            shared.images.forget(&plan.image);
            plan.image = self::image(shared, request, stop).await?;
            made(shared, &plan, began, stop).await
        }
        other => other,
    }
}

/// Gives volumes the SELinux labels that the job asks for, if SELinux is enabled. As with docker, the volumes of a
/// privileged task get no labels, since no label restricts such a task.
async fn label_volumes(request: &StartRequest) -> Result<(), TaskError> {
    let labelled: Vec<_> =
        request.volumes.iter().filter_map(|volume| Some((volume.host_path.clone(), volume.label?))).collect();
    if labelled.is_empty() || request.options.privileged || !selinux::is_enabled() {
        return Ok(());
    }
    let task = request.task_id.0.bytes().fold(0_u64, |number, byte| number.wrapping_mul(31).wrapping_add(byte.into()));
    let label = move || {
        for (path, kind) in labelled {
            selinux::relabel(&path, kind, task).map_err(|source| RootfsError::Label { path, source })?;
        }
        Ok(())
    };
    tokio::task::spawn_blocking(label).await?.map_err(|error: RootfsError| error.into())
}

/// Returns the task's image, which is pulled if it is not available locally or the job asks for that.
async fn image(
    shared: &Shared,
    request: &StartRequest,
    stop: &CancellationToken,
) -> Result<Arc<ImageRecord>, TaskError> {
    let options = &request.options;
    let (reference, opened) = place(shared, request)?;
    let policy = options.image_pull_policy;
    let cached = shared.images.cached(&reference, opened.as_deref()).filter(|_| policy != PullPolicy::Always);
    if let Some(image) = cached {
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
        policy,
    };
    tokio::select! {
        pulled = shared.images.pull(pull) => {
            shared.metrics.pulled(pulled.is_ok());
            pulled.map_err(|error| super::SharedImageError(error).into())
        }
        // The pull is cancelled here, unless another start waits for it, too.
        () = stop.cancelled() => Err(TaskError::Stopped(request.task_id.clone())),
    }
}

/// Returns the image's reference and, for an image in a file, the opened file. As with mounts, a job may use its own
/// files and those that the operator allows.
fn place(shared: &Shared, request: &StartRequest) -> Result<(Reference, Option<Arc<OwnedFd>>), TaskError> {
    let Reference::Archive(archive) = &request.options.image else { return Ok((request.options.image.clone(), None)) };
    let dirs = AllocDirs { alloc: &request.alloc_dir, task: &request.name };
    let settings = &shared.settings;
    let path = archive.path.to_string_lossy();
    let opened = open_source("image: file", &path, dirs, settings.name.flavor(), &settings.security.allow_paths)?;
    // The reference needs the absolute path, since the same relative path is a different file in another allocation.
    let path = if archive.path.is_absolute() {
        archive.path.clone()
    } else {
        request.alloc_dir.join(&request.name).join(&archive.path)
    };
    Ok((Reference::Archive(Archive { path, ..archive.clone() }), Some(Arc::new(opened))))
}

/// Makes everything that the task needs and starts its process. When that fails, everything that was made is undone.
async fn made(
    shared: &Arc<Shared>,
    plan: &Plan<'_>,
    began: Instant,
    stop: &CancellationToken,
) -> Result<Running, TaskError> {
    let request = plan.request;
    let mut phases = Phases { image: began.elapsed(), ..Phases::default() };
    // The runtime will need the cgroup lock within milliseconds.
    let warm = shared.warmer.as_ref().map(Warmer::warm);
    // Building the spec changes nothing on the host, so that an invalid user or an empty command is found before
    // anything is made.
    let spec = plan.spec(shared)?;
    let nomads = if logs::is_ours(&shared.settings, request) {
        None
    } else {
        Some(stdio::Stdio::open(&request.alloc_dir, &request.stdout, &request.stderr)?)
    };

    let step = Instant::now();
    let own_shim = plan.runtime.shim.as_ref().map(|shim| shim.program.as_path());
    // A shim that several tasks will share is launched within this call, which may take as long as a start.
    let reserved = tokio::select! {
        reserved = shared.pool.reserve(&request.alloc_id, own_shim) => reserved.map_err(no_shim)?,
        () = stop.cancelled() => return Err(TaskError::Stopped(request.task_id.clone())),
    };
    phases.pooled = matches!(reserved, Reserved::Waiting(_));
    fault::point("start.shim");
    let mut record = match plan.record(shared, reserved.id()) {
        Ok(record) => record,
        Err(error) => {
            if let Reserved::Waiting(shim) = reserved {
                shared.pool.take_back(&request.alloc_id, shim).await;
            }
            return Err(error);
        }
    };
    let attempt = Attempt::new(shared, &record);
    let entered = match &record.group {
        Some(group) => group::enter(shared, &request.task_id, &request.name, group),
        None => Ok(()),
    };
    let stdio = match (entered, nomads) {
        (Err(error), _) => Err(error.into()),
        (Ok(()), Some(stdio)) => Ok(stdio),
        (Ok(()), None) => logs::set_up(shared, request, &plan.container_id).await,
    };
    let stdio = match stdio {
        Ok(stdio) => stdio,
        Err(error) => {
            let shim = match reserved {
                Reserved::Waiting(shim) => Found::Alive(shim),
                Reserved::Named(_) => Found::Gone,
            };
            undo_failed(shared, &record, shim).await;
            attempt.over();
            return Err(error);
        }
    };
    fault::intrude(&shared.settings.containerd.address);
    // A shim that has to be launched starts up concurrently with the making of the bundle.
    let coming = match reserved {
        Reserved::Waiting(shim) => Coming::Here(shim),
        Reserved::Named(unborn) => {
            let launcher = shared.pool.launcher().clone();
            Coming::Launched(tokio::spawn(async move { launcher.launch(unborn).await }))
        }
    };
    let bundle = plan.make_bundle(shared, spec, stop).await;
    phases.bundle = step.elapsed();
    let step = Instant::now();
    let shim = coming.arrived(stop, &request.task_id).await;
    phases.shim = step.elapsed();
    let (shim, error) = match (bundle, shim) {
        (Ok(_), Ok(shim)) if stop.is_cancelled() => (Found::Alive(shim), TaskError::Stopped(request.task_id.clone())),
        (Ok(sources), Ok(shim)) => {
            fault::point("start.bundle");
            let parts = Parts { began, warm, shim: &shim, stdio: &stdio };
            let running = Box::pin(run(shared, plan, parts, &mut record, &mut phases));
            match interrupt::unless_stopped(running, stop, plan, &shim).await {
                Ok(run) => {
                    phases.total = began.elapsed();
                    attempt.over();
                    return Ok(Running { record, shim, run, phases, image: plan.image.clone(), stdio, sources });
                }
                Err(error) => (Found::Alive(shim), unless_unmounted(shared, plan, error)),
            }
        }
        (Err(error), Ok(shim)) => (Found::Alive(shim), error),
        (_, Err(error)) => (Found::Gone, error),
    };
    undo_failed(shared, &record, shim).await;
    attempt.over();
    // Dropped only now, because a late shim may still open the FIFOs by the numbers of these descriptors.
    drop(stdio);
    Err(error)
}

/// Returns the error of a failed start, or [`TaskError::RootfsUnmounted`] if the root file system is no longer mounted,
/// which explains any other error.
///
/// A cleanup that an earlier plugin has begun for the same attempt unmounts the root file system of the bundle, which
/// the next start of that attempt uses as well. The driver waits for such a cleanup (`undo.rs`). A cleanup that it
/// overlooks must not be reported as the job's fault.
fn unless_unmounted(shared: &Shared, plan: &Plan<'_>, error: TaskError) -> TaskError {
    let paths = BundlePaths::of(&shared.settings.places, &plan.container_id);
    match paths.is_mounted() {
        Ok(false) => TaskError::Unmounted { source: Box::new(error) },
        // If the mount can't be checked, the original error is returned.
        Ok(true) | Err(_) => error,
    }
}

/// Undoes a failed start. What can't be undone is retried in the background.
async fn undo_failed(shared: &Arc<Shared>, record: &Record, shim: Found) {
    if let Err(left) = undo_or_keep(Claim::new(shared, record), shim).await {
        tracing::error!(
            task = %record.task_id, error = %crate::chain(&left),
            "could not undo a failed start completely; the driver retries in the background"
        );
    }
}

/// The shim of a start: one from the pool, or one that is being launched.
#[allow(clippy::large_enum_variant, reason = "there is one per start, nearly always of the large variant")]
enum Coming {
    /// The shim is ready.
    Here(Shim),
    /// The shim is being launched in a background task.
    Launched(tokio::task::JoinHandle<Result<Shim, ShimError>>),
}

impl Coming {
    /// Waits for the shim. If the task is stopped before the shim is ready, the launch is aborted.
    async fn arrived(self, stop: &CancellationToken, task: &TaskId) -> Result<Shim, TaskError> {
        let mut launched = match self {
            Self::Here(shim) => return Ok(shim),
            Self::Launched(launched) => launched,
        };
        tokio::select! {
            launched = &mut launched => launched?.map_err(no_shim),
            () = stop.cancelled() => {
                launched.abort();
                // The launch may have completed before it was aborted.
                match launched.await {
                    Ok(Ok(shim)) => return Ok(shim),
                    Ok(Err(error)) => {
                        tracing::debug!(
                            %task, error = crate::chain(&error),
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

fn no_shim(source: ShimError) -> TaskError {
    TaskError::Shim { doing: "get a shim", source }
}

/// What [`create_and_start`] needs besides the plan.
struct Parts<'a> {
    began: Instant,
    warm: Option<Warm>,
    shim: &'a Shim,
    stdio: &'a stdio::Stdio,
}

/// Creates the container, starts its process, and writes the running task's record.
async fn run(
    shared: &Arc<Shared>,
    plan: &Plan<'_>,
    parts: Parts<'_>,
    record: &mut Record,
    phases: &mut Phases,
) -> Result<RunRecord, TaskError> {
    let Parts { began, warm, shim, stdio } = parts;
    let places = &shared.settings.places;
    let bundle = places.bundle(&plan.container_id);

    let step = Instant::now();
    let id = plan.container_id.as_str();
    let (stdout, stderr) = stdio.paths();
    let (root, binary) = (places.runtime_root(&plan.runtime.name), shim.runtime(&plan.runtime.binary));
    let config = plan.shim_config(shared);
    let runtime = match (&plan.runtime.shim, &config) {
        (None, _) => RuntimeOptions::Runc { binary: &binary, root: &root },
        (Some(_), Some(path)) => RuntimeOptions::File { kind: &plan.shim_options(), path },
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
    let starter = plan.starter(shared);
    let watched = shared.pid_files.as_ref().filter(|_| starter != Starter::Shim);
    let pid_file = watched.and_then(|files| files.watch(&bundle).ok());
    fault::point_within("start.creating", Duration::from_millis(4));
    let mut creating = pin!(client.create(&create));
    let refused = failed("create the container");
    // The runtime writes the pid file some milliseconds before the shim answers.
    let (pid, created) = tokio::select! {
        created = &mut creating => (created.map_err(refused)?, true),
        pid = PidFile::written(pid_file) => (pid, false),
    };
    // The container's process is in its cgroup by now.
    drop(warm);
    // The process waits for its start now, so that its start time can be read. For a process that has ended already,
    // the start time 0 matches no other process that gets the same pid.
    let process = ProcessId::of(pid).unwrap_or(ProcessId { pid, start: 0 });
    exec::set_oom_score(pid, plan.request.options.oom_score_adj.into());
    let state = places.runtime_state(&plan.runtime.name, &record.namespace).join(id);
    let started = match starter {
        Starter::Driver => {
            let unlike = |error: &std::io::Error| {
                tracing::debug!(%error, "the driver could not start the process; calling the shim's Start");
            };
            shim::release(&state, &process).await.inspect_err(unlike).is_ok()
        }
        Starter::Wrapper => true,
        Starter::Shim => false,
    };
    phases.released = (started && starter == Starter::Driver).then(|| began.elapsed());
    fault::point("start.released");
    if !created {
        creating.await.map_err(refused)?;
    }
    phases.create = step.elapsed();
    fault::await_point("start.creating");
    fault::point("start.created");
    // The shim has opened the log FIFOs by now.
    crate::logs::started(&places.log(&plan.container_id))?;
    if !started {
        let step = Instant::now();
        client.start(id).await.map_err(failed("start the container"))?;
        phases.start = Some(step.elapsed());
    }
    fault::point("start.started");

    let run = RunRecord { process, started_at: millis(SystemTime::now()) };
    record.state = RecordState::Running(run);
    record.save_state(&places.record(&plan.container_id))?;
    fault::point("start.recorded");
    Ok(run)
}
