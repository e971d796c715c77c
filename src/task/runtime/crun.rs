//! What a crun can do on this host: it is asked.

use std::{fs, path::Path, process::Stdio, time::Duration};

use super::{probe_spec, probes};
use crate::{
    cgroup::Cgroups,
    process::async_command,
    rootfs::seccomp::{self, Form},
};

/// `crun create` on a loaded machine; a quiet one needs 10 ms.
const PROBE: Duration = Duration::from_secs(10);

/// Does crun work here? It refuses hybrid cgroup hosts in part, old kernels, and what its build left out, so it is
/// asked: a container whose program is an empty file must fail for just that reason, which crun finds after everything
/// else. It is given a filter, too, that has execve fail in a way of its own: who does not fail in that way has not loaded
/// it. First a compiled one, then the plain form: a crun without seccomp takes both, and does nothing.
///
/// # Errors
/// Its own words when it fails for another reason.
pub async fn crun_works(binary: &Path, scratch: &Path, cgroups: &Cgroups) -> Result<Form, String> {
    let id = probes::new_name().map_err(|error| error.to_string())?;
    let bundle = scratch.join(&id);
    let mut outcome = probe(binary, &bundle, &id, Form::Program).await;
    // It has run the program, and not under the filter: does it know the plain form?
    if outcome == Ok(false) {
        outcome = probe(binary, &bundle, &id, Form::Profile)
            .await
            .and_then(|filtered| if filtered { Ok(false) } else { Err(NO_SECCOMP.to_owned()) });
    }
    let outcome = outcome.map(|program| if program { Form::Program } else { Form::Profile });
    // A crun that was killed has not removed its cgroup.
    if let Err(error) = probes::remove_probe(scratch, cgroups, &id).await {
        tracing::warn!(%error, name = id, "something of a runtime's probe stays");
    }
    outcome
}

/// What execve answers under the probe's filter: EXDEV, which it never answers by itself.
const TELLTALE: u32 = libc::EXDEV.cast_unsigned();

/// Such a crun reads filters in either form and does nothing with them.
pub(super) const NO_SECCOMP: &str = "it was built without seccomp";

/// Was the filter, in this form, seen to hold?
async fn probe(binary: &Path, bundle: &Path, id: &str, form: Form) -> Result<bool, String> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let text = |error: std::io::Error| error.to_string();
    // crun makes links in /dev, and expects the directory.
    for directory in ["rootfs/proc", "rootfs/dev"] {
        fs::create_dir_all(bundle.join(directory)).map_err(text)?;
    }
    let program = bundle.join("rootfs/empty");
    fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o755).open(program).map_err(text)?;
    let mut spec = probe_spec(id, "/empty", &["pid", "mount", "ipc", "uts"]);
    match form {
        Form::Program => {
            if let Some(program) = seccomp::failing("execve", TELLTALE) {
                spec["annotations"] = serde_json::json!({ seccomp::CRUN_PROGRAM: program });
            }
        }
        Form::Profile => {
            let rule = serde_json::json!({ "names": ["execve"], "action": "SCMP_ACT_ERRNO", "errnoRet": TELLTALE });
            spec["linux"]["seccomp"] = serde_json::json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule] });
        }
    }
    fs::write(bundle.join("config.json"), spec.to_string()).map_err(text)?;
    let root = bundle.join("state");
    let run = |arguments: &[&str]| {
        let mut command = async_command(binary);
        command.arg("--root").arg(&root).args(arguments).current_dir(bundle).stdin(Stdio::null()).kill_on_drop(true);
        tokio::time::timeout(PROBE, command.env("LC_ALL", "C").output())
    };
    let output = run(&["run", "--bundle", ".", id]).await.map_err(|_| "it hangs".to_owned())?.map_err(text)?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    // Gone by itself after a failed `run`; asked for in case this version leaves something.
    let _ = run(&["delete", "--force", id]).await;
    // As glibc and musl say EXDEV and ENOEXEC.
    let lower = said.to_lowercase();
    if lower.contains("cross-device link") {
        Ok(true)
    } else if lower.contains("exec format error") {
        Ok(false)
    } else {
        Err(said)
    }
}
