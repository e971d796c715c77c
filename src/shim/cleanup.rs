//! Removes the remains of a container whose shim has died, with the `delete` command of the shim's program.

use std::{path::Path, process::Stdio, time::Duration};

use protobuf::Message as _;

use super::{Exit, Launcher, ShimError};
use crate::{
    files::{none_if_missing, replace_private},
    pb::shim as wire,
    process::{async_command, bounded_output},
    text::{self, EXCERPT_MAX},
};

/// The longest time for the shim's `delete` command; its `runtime delete --force` takes 20 to 220 ms.
const DELETE_TIMEOUT: Duration = Duration::from_secs(30);

/// The file in a bundle in which shims of containerd 2.4.2 and newer record how the container ended.
pub const EXIT_FILE: &str = "exit.json";

/// A container whose shim has died.
#[derive(Debug, Clone, Copy)]
pub struct DeadContainer<'a> {
    /// The id of the container.
    pub id: &'a str,
    /// The namespace of the shim, below which the runtime keeps its state.
    pub namespace: &'a str,
    /// The shim's program, if it is not the launcher's.
    pub program: Option<&'a Path>,
    /// The OCI runtime's program, if it is known.
    pub runtime: Option<&'a Path>,
    /// Whether the shim is gVisor's.
    pub is_gvisor: bool,
    /// The container's bundle. The name of its directory is the id, because the `delete` command reads `../<id>`.
    pub bundle: &'a Path,
}

/// Returns whether the shim has seen the container's end and recorded it in the bundle (see [`EXIT_FILE`]).
pub fn has_exit_file(bundle: &Path) -> bool {
    bundle.join(EXIT_FILE).exists()
}

/// Kills the processes of the container that still run, and removes the runtime's state. Returns how the container
/// ended, if the shim has recorded that (without a record the command always reports 137). Does nothing if nothing is
/// left.
///
/// # Errors
/// Fails when the command can't be run or fails.
pub async fn delete_dead_container(
    launcher: &Launcher,
    container: DeadContainer<'_>,
) -> Result<Option<Exit>, ShimError> {
    // At Create the shim writes these files, one after the other, before it calls the runtime. The driver removes them
    // once the container is gone. If one of them is missing, there is no container.
    let create_markers: &[&str] = match container.program {
        None => &["options.json", "runtime"],
        Some(_) if container.is_gvisor => &["state.json"],
        // The driver writes this file last when it makes a bundle.
        Some(_) => &["config.json"],
    };
    for path in create_markers.iter().map(|file| container.bundle.join(file)) {
        let exists = path.try_exists();
        let failed = |source| ShimError::File { id: container.id.to_owned(), doing: "look for", path, source };
        if !exists.map_err(failed)? {
            return Ok(None);
        }
    }
    let program = container.program.unwrap_or(launcher.binary());
    // The file may name the runtime by a descriptor of the shim. A dead shim has no descriptors.
    let runtime_file = container.bundle.join("runtime");
    let failed = |doing| {
        let (id, path) = (container.id.to_owned(), runtime_file.clone());
        move |source| ShimError::File { id, doing, path, source }
    };
    // gVisor's shim writes no such file.
    let runtime_name = none_if_missing(std::fs::read(&runtime_file)).map_err(failed("read"))?;
    if runtime_name.is_some_and(|name| name.starts_with(b"/proc/")) {
        let Some(runtime) = container.runtime else {
            return Err(ShimError::RuntimeMissing);
        };
        let draft = container.bundle.join("runtime.tmp");
        let replaced = replace_private(&runtime_file, &draft, runtime.as_os_str().as_encoded_bytes());
        replaced.map_err(|error| failed("write")(error.into()))?;
    }
    let has_exit = has_exit_file(container.bundle);
    let failed = |source| ShimError::Spawn { binary: program.to_owned(), source };
    let mut command = async_command(program);
    command
        .args([
            "-namespace",
            container.namespace,
            "-address",
            "",
            "-publish-binary",
            "",
            "-id",
            container.id,
            "-bundle",
        ])
        .arg(container.bundle)
        .arg("delete")
        .current_dir(container.bundle)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(DELETE_TIMEOUT, bounded_output(&mut command))
        .await
        .map_err(|_| ShimError::TimedOut { call: "delete", after: DELETE_TIMEOUT })?
        .map_err(failed)?;
    if output.status.success() {
        let answer = wire::DeleteResponse::parse_from_bytes(&output.stdout).ok().filter(|_| has_exit);
        return Ok(answer.map(|answer| Exit::new(answer.exit_status, answer.exited_at.as_ref())));
    }
    let message = text::sanitize(String::from_utf8_lossy(&output.stderr).trim(), EXCERPT_MAX);
    Err(ShimError::DeleteFailed { message })
}
