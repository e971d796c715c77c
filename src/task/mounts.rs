//! The mounts of a task: the job's own, Nomad's volumes, and what every task has. Each source is opened here, before
//! anything is made.

use std::path::{Path, PathBuf};

use super::{
    StartRequest,
    names::{Hosts, Names},
    shared::Shared,
};
use crate::{
    ids::Flavor,
    rootfs::{
        self, RootfsError, check_mount,
        limits::Namespace,
        mounts::{AllocDirs, MountContent, TaskMount, open_alloc_dir, open_host_path},
        target::{MountTarget, SysTargets},
    },
};

/// The directories that Nomad makes for a task, by the variable that says where the task has them.
const DIRECTORIES: [(&str, &str); 3] =
    [("NOMAD_SECRETS_DIR", "secrets"), ("NOMAD_TASK_DIR", "local"), ("NOMAD_ALLOC_DIR", "alloc")];

/// Where mounts of this task may go.
pub(super) fn sys_targets(shared: &Shared, request: &StartRequest) -> SysTargets {
    SysTargets::of(shared.settings.name.flavor(), request.options.privileged)
}

/// Opens the sources of all mounts. Those that every task has come last: of two with one target the later is seen, so
/// that no job hides `/secrets` by accident.
///
/// # Errors
/// When a source is missing or may not be mounted, or a target may not be mounted over.
pub(super) fn open(shared: &Shared, request: &StartRequest, names: Names) -> Result<Vec<TaskMount>, RootfsError> {
    let settings = &shared.settings;
    let flavor = settings.name.flavor();
    let dirs = AllocDirs { alloc: &request.alloc_dir, task: &request.name };
    let mut mounts = Vec::new();
    if request.options.namespaces.ipc == Namespace::Host {
        let source = MountContent::Bind(open_host_path(Path::new("/dev/shm"))?);
        mounts.push(mount("ipc_mode", "/dev/shm", source, &["rbind", "nosuid", "noexec", "nodev"])?);
    }
    mounts.extend(rootfs::mounts::resolve(&request.options.mounts, dirs, flavor, &settings.security.allow_paths)?);
    for volume in &request.volumes {
        let mode = if volume.readonly { "ro" } else { "rw" };
        let source = MountContent::Bind(open_host_path(&volume.host_path)?);
        let target = volume.task_path.to_string_lossy();
        mounts.push(mount("volume_mount", &target, source, &["rbind", mode, volume.propagation])?);
    }
    mounts.extend(network_files(names)?);
    mounts.extend(nomads(settings.own_logs, flavor, request)?);
    let sys = sys_targets(shared, request);
    for mount in &mounts {
        let refused = |problem| RootfsError::Target { option: mount.option, target: mount.target.to_string(), problem };
        mount.target.check(sys).map_err(refused)?;
        let source = match &mount.content {
            MountContent::FileSystem { source, .. } => Some(Path::new(source)),
            MountContent::Bind(_) | MountContent::File(_) => None,
        };
        check_mount(mount.target.path(), source, mount.options.iter())?;
    }
    Ok(mounts)
}

fn network_files(names: Names) -> Result<Vec<TaskMount>, RootfsError> {
    let resolv_conf = names.resolv_conf.map(MountContent::File);
    let (hosts, mode) = match names.hosts {
        Hosts::OfTheHost => (MountContent::Bind(open_host_path(Path::new("/etc/hosts"))?), "ro"),
        // The old driver let a task edit its hosts file; some images' entry points do.
        Hosts::Text(text) => (MountContent::File(text), "rw"),
    };
    let resolv_conf = resolv_conf.map(|text| mount("host_dns", "/etc/resolv.conf", text, &["rbind", "ro"]));
    resolv_conf.into_iter().chain([mount("extra_hosts", "/etc/hosts", hosts, &["rbind", mode])]).collect()
}

/// Nomad's own directories. Where this driver writes the logs of tasks, their directory is read-only in all tasks, also in
/// those whose logs are disabled: what has been logged is not a task's to change, and no task can put a link in its place.
fn nomads(own_logs: bool, flavor: Flavor, request: &StartRequest) -> Result<Vec<TaskMount>, RootfsError> {
    // The secrets file system may be mounted anew by the agent: its new mount must reach the task.
    let propagation = if flavor == Flavor::DropIn { "rprivate" } else { "rslave" };
    let open = |below: &Path| Ok::<_, RootfsError>(MountContent::Bind(open_alloc_dir(&request.alloc_dir, below)?));
    let mut mounts = Vec::new();
    for (variable, directory) in DIRECTORIES {
        let Some(target) = request.env.get(variable).filter(|target| !target.is_empty()) else { continue };
        let shared = variable == "NOMAD_ALLOC_DIR";
        let below = if shared { PathBuf::from(directory) } else { Path::new(&request.name).join(directory) };
        mounts.push(mount(variable, target, open(&below)?, &["rbind", "rw", propagation])?);
        if shared && own_logs {
            let logs = Path::new(target).join("logs");
            let source = open(&below.join("logs"))?;
            mounts.push(mount("disable_log_collection", &logs.to_string_lossy(), source, &["bind", "ro"])?);
        }
    }
    Ok(mounts)
}

fn mount(
    option: &'static str,
    target: &str,
    content: MountContent,
    options: &[&str],
) -> Result<TaskMount, RootfsError> {
    let refused = |problem| RootfsError::Target { option, target: target.to_owned(), problem };
    let options = options.iter().map(|option| (*option).to_owned()).collect();
    Ok(TaskMount { option, target: MountTarget::parse(target).map_err(refused)?, content, options })
}
