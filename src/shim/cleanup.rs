//! What is left of a container whose shim died: the shim binary's own `delete` command knows how to end it.

use std::{io, path::Path, process::Stdio, time::Duration};

use protobuf::Message as _;

use super::{Exit, Launcher, ShimError};
use crate::{
    pb::shim as wire,
    places::write_private,
    process::{async_command, bounded_output},
    text::{self, FOREIGN_MAX},
};

/// `runtime delete --force` takes 20 to 220 ms.
const DELETE: Duration = Duration::from_secs(30);

/// In a bundle: where shims since 2.4.2 note how the container ended.
pub const EXIT_NOTE: &str = "exit.json";

/// A container without a shim.
#[derive(Debug, Clone, Copy)]
pub struct DeadTask<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its shim's namespace, below which the runtime keeps its state.
    pub namespace: &'a str,
    /// Its shim's program, where that is not the launcher's.
    pub program: Option<&'a Path>,
    /// The OCI runtime's program, where that is known.
    pub runtime: Option<&'a Path>,
    /// Is its shim gVisor's?
    pub is_gvisor: bool,
    /// Its bundle, whose directory name is the id (the command looks at `../<id>`).
    pub bundle: &'a Path,
}

/// Did the shim live to see the container's end, and note it in the bundle? Those since 2.4.2 do.
pub fn has_noted_exit(bundle: &Path) -> bool {
    bundle.join(EXIT_NOTE).exists()
}

/// Kills what still runs of the container and removes the runtime's state: how it had ended, where the shim noted that
/// (without a note the command always says 137). Harmless when nothing is left.
///
/// # Errors
/// When the command can't be run or fails.
pub async fn delete_dead(launcher: &Launcher, task: DeadTask<'_>) -> Result<Option<Exit>, ShimError> {
    // Written by the shim at Create, one after the other, before it calls the runtime; removed by us once the container
    // is gone. Without one of them there is none.
    let written: &[&str] = match task.program {
        None => &["options.json", "runtime"],
        Some(_) if task.is_gvisor => &["state.json"],
        // Written last of a bundle.
        Some(_) => &["config.json"],
    };
    for path in written.iter().map(|file| task.bundle.join(file)) {
        let looked = path.try_exists();
        let failed = |source| ShimError::File { id: task.id.to_owned(), doing: "look for", path, source };
        if !looked.map_err(failed)? {
            return Ok(None);
        }
    }
    let program = task.program.unwrap_or(launcher.binary());
    // The name that the shim knew the runtime by, its own descriptor, died with it.
    let named = task.bundle.join("runtime");
    let failed = |doing| {
        let (id, path) = (task.id.to_owned(), named.clone());
        move |source| ShimError::File { id, doing, path, source }
    };
    let name = match std::fs::read(&named) {
        // gVisor's own shim has none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        read => read.map_err(failed("read"))?,
    };
    if name.starts_with(b"/proc/") {
        let Some(runtime) = task.runtime else {
            let message = "its runtime is not known or not installed any more".to_owned();
            return Err(ShimError::Refused { call: "delete", code: -1, message });
        };
        let draft = task.bundle.join("runtime.tmp");
        let written = write_private(&draft, runtime.as_os_str().as_encoded_bytes());
        written.and_then(|()| std::fs::rename(&draft, &named)).map_err(failed("write"))?;
    }
    let noted = has_noted_exit(task.bundle);
    let failed = |source| ShimError::Spawn { binary: program.to_owned(), source };
    let mut command = async_command(program);
    command
        .args(["-namespace", task.namespace, "-address", "", "-publish-binary", "", "-id", task.id, "-bundle"])
        .arg(task.bundle)
        .arg("delete")
        .current_dir(task.bundle)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(DELETE, bounded_output(&mut command))
        .await
        .map_err(|_| ShimError::Late { call: "delete", after: DELETE })?
        .map_err(failed)?;
    if output.status.success() {
        let answer = wire::DeleteResponse::parse_from_bytes(&output.stdout).ok().filter(|_| noted);
        return Ok(answer.map(|answer| Exit::new(answer.exit_status, answer.exited_at.as_ref())));
    }
    let message = text::shown(String::from_utf8_lossy(&output.stderr).trim(), FOREIGN_MAX);
    Err(ShimError::Refused { call: "delete", code: output.status.code().unwrap_or(-1), message })
}
