//! Probes what a crun can do on this host.

use std::{fs, path::Path, process::Stdio, time::Duration};

use super::{probe_spec, probes};
use crate::{
    cgroup::Cgroups,
    process::async_command,
    rootfs::seccomp::{self, FilterForm},
};

/// How long a call of crun may take on a loaded machine. On an idle one it takes 10 ms.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// Checks whether crun works on this host, and returns the form in which it takes seccomp filters.
///
/// crun does not work on some hosts with hybrid cgroups and on old kernels, and its build may lack features. So it is
/// probed with a container whose program is an empty file. The container must fail for just that reason, which crun
/// finds last of all. The container also has a seccomp filter under which execve fails with an error of its own. If the
/// container fails with another error, crun has not loaded the filter. The compiled form of the filter is tried first,
/// then the plain form. A crun that was built without seccomp accepts both and ignores them.
///
/// # Errors
/// crun's message if the container fails for another reason.
pub async fn probe_crun(binary: &Path, scratch: &Path, cgroups: &Cgroups) -> Result<FilterForm, String> {
    let id = probes::new_probe_name().map_err(|error| error.to_string())?;
    let bundle = scratch.join(&id);
    let mut outcome = enforces_filter(binary, &bundle, &id, FilterForm::Program).await;
    // crun has run the program without the compiled filter, so the plain form is tried.
    if outcome == Ok(false) {
        outcome = enforces_filter(binary, &bundle, &id, FilterForm::Profile)
            .await
            .and_then(|filtered| if filtered { Ok(false) } else { Err(NO_SECCOMP.to_owned()) });
    }
    let outcome = outcome.map(|program| if program { FilterForm::Program } else { FilterForm::Profile });
    // A crun that was killed has left its cgroup behind.
    if let Err(error) = probes::remove_probe(scratch, cgroups, &id).await {
        tracing::warn!(%error, name = id, "could not remove everything of a runtime's probe");
    }
    outcome
}

/// The error of execve under the probe's filter: EXDEV, which execve never returns by itself.
const PROBE_ERRNO: u32 = libc::EXDEV.cast_unsigned();

/// The problem of a crun that accepts filters in either form and ignores them.
pub(super) const NO_SECCOMP: &str = "it was built without seccomp";

/// Runs the probe's container with a filter in this form. Returns true if the filter was enforced.
async fn enforces_filter(binary: &Path, bundle: &Path, id: &str, form: FilterForm) -> Result<bool, String> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let text = |error: std::io::Error| error.to_string();
    // crun creates links in /dev, and expects that the directory exists.
    for directory in ["rootfs/proc", "rootfs/dev"] {
        fs::create_dir_all(bundle.join(directory)).map_err(text)?;
    }
    let program = bundle.join("rootfs/empty");
    fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o755).open(program).map_err(text)?;
    let mut spec = probe_spec(id, "/empty", &["pid", "mount", "ipc", "uts"]);
    match form {
        FilterForm::Program => {
            if let Some(program) = seccomp::program_failing_one_call("execve", PROBE_ERRNO) {
                spec["annotations"] = serde_json::json!({ seccomp::CRUN_PROGRAM: program });
            }
        }
        FilterForm::Profile => {
            let rule = serde_json::json!({ "names": ["execve"], "action": "SCMP_ACT_ERRNO", "errnoRet": PROBE_ERRNO });
            spec["linux"]["seccomp"] = serde_json::json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule] });
        }
    }
    fs::write(bundle.join("config.json"), spec.to_string()).map_err(text)?;
    let root = bundle.join("state");
    let run = |arguments: &[&str]| {
        let mut command = async_command(binary);
        command.arg("--root").arg(&root).args(arguments).current_dir(bundle).stdin(Stdio::null()).kill_on_drop(true);
        tokio::time::timeout(PROBE_TIMEOUT, command.env("LC_ALL", "C").output())
    };
    let output = run(&["run", "--bundle", ".", id]).await.map_err(|_| "it hangs".to_owned())?.map_err(text)?;
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    // A failed `run` removes the container by itself, except in versions that leave something behind.
    let _ = run(&["delete", "--force", id]).await;
    // These are the texts of glibc and musl for EXDEV and ENOEXEC.
    let lower = message.to_lowercase();
    if lower.contains("cross-device link") {
        Ok(true)
    } else if lower.contains("exec format error") {
        Ok(false)
    } else {
        Err(message)
    }
}
