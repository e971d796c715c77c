//! The SELinux labels of a task, its volumes and Nomad's directories.

use super::{StartRequest, TaskError, context::EngineContext, runtime::Runtime};
use crate::rootfs::{
    RootfsError,
    init::{self, FirstProcess},
    labels::{LabelRequest, Labels},
    limits::Namespace,
    selinux::{self, VolumeLabel},
};

/// Returns the SELinux labels of a task. As with docker, a privileged task has no process label, and neither has one that
/// shares the host's processes or IPC unless its job asks for a label. gVisor's sandboxes take no labels.
pub(super) fn of_task(context: &EngineContext, request: &StartRequest, runtime: &Runtime) -> Option<Labels> {
    let options = &request.options;
    let policy = context.policy_labels.as_ref().filter(|_| runtime.gvisor.is_none())?;
    let is_open = options.privileged
        || [options.namespaces.pid, options.namespaces.ipc].contains(&Namespace::Host) && !options.labels.is_set();
    let disabled = LabelRequest::disabled();
    let wanted = if is_open { &disabled } else { &options.labels };
    Some(policy.of_task(wanted, selinux::task_number(&request.task_id.0)))
}

/// Gives volumes the SELinux labels that the job asks for, if SELinux is enabled. As with docker, the volumes of a
/// privileged task get no labels, since no label restricts such a task. For a task that has labels itself, Nomad's
/// directories and the init program are labelled for all containers.
///
/// # Errors
/// When a label can't be set.
pub(super) async fn label_directories(
    context: &EngineContext,
    request: &StartRequest,
    has_label: bool,
) -> Result<(), TaskError> {
    let mut labelled: Vec<_> =
        request.volumes.iter().filter_map(|volume| Some((volume.host_path.clone(), volume.label?))).collect();
    if request.options.privileged || !selinux::is_enabled() {
        labelled.clear();
    }
    if has_label {
        let own = request.alloc_dir.join(&request.name);
        let directories = [request.alloc_dir.join("alloc"), own.join("local"), own.join("secrets")];
        labelled.extend(directories.map(|path| (path, VolumeLabel::Shared)));
        if request.options.first_process == FirstProcess::Init {
            labelled.push((init::program_path(&context.settings.places.wrappers()), VolumeLabel::Shared));
        }
    }
    if labelled.is_empty() {
        return Ok(());
    }
    let task = selinux::task_number(&request.task_id.0);
    let label = move || {
        for (path, kind) in labelled {
            selinux::relabel(&path, kind, task).map_err(|source| RootfsError::Label { path, source })?;
        }
        Ok(())
    };
    tokio::task::spawn_blocking(label).await?.map_err(|error: RootfsError| error.into())
}
