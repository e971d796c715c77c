//! The mounts of a task: the job's own, Nomad's volumes, and those that every task has. Their sources are opened here,
//! before anything of the task is created.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio_util::sync::CancellationToken;

use super::{
    StartRequest, TaskError,
    context::EngineContext,
    dedicated_thread,
    network_files::{HostsFile, NetworkFiles},
};
use crate::{
    ids::Flavor,
    image::ImageRecord,
    rootfs::{
        self, RootMode, RootfsError, check_mount,
        init::{self, FirstProcess, INIT_PATH},
        limits::Namespace,
        mount_origin::MountOrigin,
        mount_tree,
        mounts::{AllocDirs, MountContent, MountKind, MountRequest, TaskMount, open_alloc_dir, open_host_path},
        same_target::SameTarget,
        target::{MountTarget, SysTargets},
    },
};

/// The origin of the read-only mounts of log directories. A job's own mount at the same target takes such a mount's
/// place: it is either of something else, or read-only itself ([`make_logs_read_only`]).
const LOGS: MountOrigin = MountOrigin::Default("disable_log_collection");

/// The directories that Nomad makes for a task, each with the environment variable that has its path in the task.
const NOMAD_DIRECTORIES: [(&str, &str); 3] =
    [("NOMAD_SECRETS_DIR", "secrets"), ("NOMAD_TASK_DIR", "local"), ("NOMAD_ALLOC_DIR", "alloc")];

/// Says whether this task's mounts may have targets below `/sys`.
pub(super) fn sys_targets(context: &EngineContext, request: &StartRequest) -> SysTargets {
    SysTargets::of(context.settings.name.flavor(), request.options.privileged)
}

/// Says whether sources of this task's mounts may be on a file system that does not answer. Nomad's own directories are
/// on the agent's disk.
pub(super) fn may_hang(request: &StartRequest) -> bool {
    let is_absolute =
        |mount: &MountRequest| matches!(&mount.kind, MountKind::Bind { source } if source.starts_with('/'));
    !request.volumes.is_empty() || request.options.mounts.iter().any(is_absolute)
}

/// Puts the volumes of an image (VOLUME) before the other mounts of a task, which take a volume's place at the same
/// target. A volume is left out if the task may have no mount at its target, or if the target is below a mount of the
/// job that can't contain other mounts.
pub(super) fn add_volumes(mounts: &mut Vec<TaskMount>, image: &ImageRecord, sys: SysTargets) {
    let may_be_held = |target: &MountTarget| {
        !mounts.iter().any(|mount| {
            let is_shared = mount.options.iter().any(|option| option == "shared" || option == "rshared");
            let holds_none = is_shared || matches!(mount.content, MountContent::File(_));
            holds_none && target != &mount.target && target.path().starts_with(mount.target.path())
        })
    };
    let mut volumes = Vec::new();
    for path in &image.config.volumes {
        let placed = MountTarget::parse_volume(path).and_then(|target| {
            let options = ["rbind", "rw", "rprivate"].map(str::to_owned).to_vec();
            let volume = TaskMount { origin: MountOrigin::Image, target, content: MountContent::Volume, options };
            mount_tree::check_target(&volume, &volume.target, sys).map_err(|error| crate::error_chain(&error))?;
            if may_be_held(&volume.target) {
                Ok(volume)
            } else {
                Err("it is below a mount that can't contain other mounts".to_owned())
            }
        });
        match placed {
            Ok(volume) => volumes.push(volume),
            Err(reason) => tracing::info!(image = image.reference, path, reason, "left out a VOLUME of the image"),
        }
    }
    mounts.splice(0..0, volumes);
}

/// Opens the sources of all mounts. If one of them may be on a dead file system, a thread of its own opens them, so
/// that nothing else is blocked.
///
/// # Errors
/// Those of [`open_all`], and when a file system does not answer.
pub(super) async fn open(
    context: &Arc<EngineContext>,
    request: &StartRequest,
    names: NetworkFiles,
    stop: &CancellationToken,
) -> Result<Vec<TaskMount>, TaskError> {
    if !may_hang(request) {
        return Ok(open_all(context, request, names)?);
    }
    let (context, owned) = (context.clone(), request.clone());
    Ok(dedicated_thread::run(&request.task_id, stop, move || open_all(&context, &owned, names)).await??)
}

/// Opens the sources of all mounts. They are in the order of nomad-driver-containerd, by whose name the last of several
/// mounts with one target is visible.
///
/// # Errors
/// When a source is missing or may not be mounted, a target may not be mounted over, or two mounts have the same target.
fn open_all(
    context: &EngineContext,
    request: &StartRequest,
    names: NetworkFiles,
) -> Result<Vec<TaskMount>, RootfsError> {
    let settings = &context.settings;
    let flavor = settings.name.flavor();
    let dirs = AllocDirs { alloc: &request.alloc_dir, task: &request.name };
    let mut mounts = Vec::new();
    if request.options.namespaces.ipc == Namespace::Host {
        let source = MountContent::Bind(open_host_path("ipc_mode:", Path::new("/dev/shm"))?);
        // It has the attributes that it has on the host, as with docker.
        let options = ["rbind", "rprivate"];
        mounts.push(mount(MountOrigin::Default("ipc_mode"), "/dev/shm", source, &options)?);
    }
    mounts.extend(rootfs::mounts::resolve_sources(
        &request.options.mounts,
        dirs,
        flavor,
        &settings.security.allow_paths,
    )?);
    if settings.disable_log_collection {
        make_logs_read_only(&mut mounts, request)?;
    }
    for volume in &request.volumes {
        let mode = if volume.readonly { "ro" } else { "rw" };
        let source = MountContent::Bind(open_host_path("volume_mount: source", &volume.host_path)?);
        let written = volume.task_path.to_string_lossy();
        let origin = MountOrigin::Volume(volume.host_path.clone());
        let refused =
            |problem| RootfsError::Target { origin: origin.clone(), target: written.clone().into_owned(), problem };
        let target = MountTarget::parse_volume(&written).map_err(refused)?;
        let options = ["rbind", mode, volume.propagation].map(str::to_owned).to_vec();
        mounts.push(TaskMount { origin, target, content: source, options });
    }
    if request.options.first_process == FirstProcess::Init {
        let source = MountContent::Bind(init::open_program(&settings.places.wrappers())?);
        mounts.push(mount(
            MountOrigin::Required("init"),
            INIT_PATH,
            source,
            &["bind", "rprivate", "ro", "nosuid", "nodev"],
        )?);
    }
    mounts.extend(network_files(names, flavor, request.options.root)?);
    mounts.extend(alloc_dir_mounts(settings.disable_log_collection, flavor, request)?);
    let sys = sys_targets(context, request);
    for mount in &mounts {
        mount_tree::check_target(mount, &mount.target, sys)?;
        let source = match &mount.content {
            MountContent::FileSystem { source, .. } => Some(Path::new(source)),
            MountContent::Bind(_) | MountContent::File(_) | MountContent::Volume => None,
        };
        check_mount(mount.target.path(), source, mount.options.iter())?;
    }
    SameTarget::of(flavor).retain_visible(&mut mounts)?;
    Ok(mounts)
}

/// Makes the log files that this driver writes read-only in the job's own bind mounts. A bind mount of the log
/// directory, or of something in it, becomes read-only itself. In a bind mount of a directory above it, the log
/// directory is mounted read-only.
fn make_logs_read_only(mounts: &mut Vec<TaskMount>, request: &StartRequest) -> Result<(), RootfsError> {
    if !mounts.iter().any(|mount| matches!(mount.content, MountContent::Bind(_))) {
        return Ok(());
    }
    let below = Path::new("alloc/logs");
    let failed = |source| RootfsError::AllocDir { path: request.alloc_dir.join(below), source };
    let logs = open_alloc_dir(&request.alloc_dir, below)?.path().map_err(failed)?;
    let mut guards = Vec::new();
    for job in mounts.iter_mut() {
        let MountContent::Bind(source) = &job.content else { continue };
        let path = source.path().map_err(failed)?;
        if path.starts_with(&logs) {
            job.options.retain(|option| option != "rw" && option != "ro");
            job.options.push("ro".to_owned());
        } else if let Ok(inside) = logs.strip_prefix(&path) {
            let target = job.target.path().join(inside);
            let source = MountContent::Bind(open_alloc_dir(&request.alloc_dir, below)?);
            guards.push(mount(LOGS, &target.to_string_lossy(), source, &["bind", "ro"])?);
        }
    }
    mounts.extend(guards);
    Ok(())
}

/// Returns the mounts of the task's host name and network files. As with docker, the task may write to its own files
/// unless its root file system is read-only: VPN clients rewrite resolv.conf, and entry points of images add lines to
/// the hosts file.
fn network_files(names: NetworkFiles, flavor: Flavor, root: RootMode) -> Result<Vec<TaskMount>, RootfsError> {
    let mode = if root == RootMode::Writable { "rw" } else { "ro" };
    let (hosts, hosts_mode) = match names.hosts {
        HostsFile::Host => (MountContent::Bind(open_host_path("host_network:", Path::new("/etc/hosts"))?), "ro"),
        // In nomad-driver-containerd, the hosts file of a task with a read-only root file system is writable.
        HostsFile::Text(text) if flavor == Flavor::ContainerdDriver => (MountContent::File(text), "rw"),
        HostsFile::Text(text) => (MountContent::File(text), mode),
    };
    let file = MountContent::File;
    let mut mounts = vec![
        mount(
            MountOrigin::Default("hostname"),
            "/etc/hostname",
            file(format!("{}\n", names.hostname)),
            &["rbind", "rprivate", mode],
        )?,
        mount(MountOrigin::Default("extra_hosts"), "/etc/hosts", hosts, &["rbind", "rprivate", hosts_mode])?,
    ];
    if let Some(text) = names.resolv_conf {
        mounts.push(mount(
            MountOrigin::Default("host_dns"),
            "/etc/resolv.conf",
            file(text),
            &["rbind", "rprivate", mode],
        )?);
    }
    Ok(mounts)
}

/// Returns the mounts of Nomad's own directories. If this driver writes the logs of tasks, the log directory is
/// read-only in all tasks, also in those whose logs are disabled: no task may change what has been logged or put a link
/// in its place.
fn alloc_dir_mounts(
    disable_log_collection: bool,
    flavor: Flavor,
    request: &StartRequest,
) -> Result<Vec<TaskMount>, RootfsError> {
    // The agent may mount the secrets file system again, and the new mount must reach the task.
    let propagation = if flavor == Flavor::ContainerdDriver { "rprivate" } else { "rslave" };
    let open = |below: &Path| Ok::<_, RootfsError>(MountContent::Bind(open_alloc_dir(&request.alloc_dir, below)?));
    let mut mounts = Vec::new();
    for (variable, directory) in NOMAD_DIRECTORIES {
        let Some(target) = request.env.get(variable).filter(|target| !target.is_empty()) else { continue };
        let is_alloc_dir = variable == "NOMAD_ALLOC_DIR";
        let below = if is_alloc_dir { PathBuf::from(directory) } else { Path::new(&request.name).join(directory) };
        mounts.push(mount(MountOrigin::Required(variable), target, open(&below)?, &["rbind", "rw", propagation])?);
        if is_alloc_dir && disable_log_collection {
            let logs = Path::new(target).join("logs");
            let source = open(&below.join("logs"))?;
            mounts.push(mount(LOGS, &logs.to_string_lossy(), source, &["bind", "ro"])?);
        }
    }
    Ok(mounts)
}

fn mount(origin: MountOrigin, target: &str, content: MountContent, options: &[&str]) -> Result<TaskMount, RootfsError> {
    let parsed = MountTarget::parse(target).map_err(|problem| RootfsError::Target {
        origin: origin.clone(),
        target: target.to_owned(),
        problem,
    })?;
    let options = options.iter().map(|option| (*option).to_owned()).collect();
    Ok(TaskMount { origin, target: parsed, content, options })
}
