//! OCI runtimes by name, and which one is taken when a job names none.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use super::Settings;
use crate::{
    ids::{ContainerId, random_hex},
    process::which,
    rootfs::seccomp::{self, Form},
    stamp::Stamp,
};

/// `crun create` on a loaded machine; a quiet one needs 10 ms.
const PROBE: Duration = Duration::from_secs(10);

/// `delete --force` takes 20 to 220 ms.
const DELETE: Duration = Duration::from_secs(30);

/// Why a runtime can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RuntimeError {
    /// Not configured.
    #[error("runtime {name:?} is not configured; there is {known}")]
    Unknown {
        /// As the job has it.
        name: String,
        /// What there is.
        known: String,
    },
    /// Not allowed.
    #[error("runtime {name:?} is not among allow_runtimes = {allowed}")]
    NotAllowed {
        /// As the job has it.
        name: String,
        /// What is.
        allowed: String,
    },
    /// Not installed.
    #[error("runtime {name:?}: {binary} is not installed")]
    Missing {
        /// Its name.
        name: String,
        /// Its program.
        binary: String,
    },
    /// A clean-up that it did not do.
    #[error("runtime {name:?} can't delete a container: {problem}")]
    Delete {
        /// Its name.
        name: String,
        /// Why.
        problem: String,
    },
    /// One that confines nobody.
    #[error("runtime {0:?} was built without seccomp, and would pass any filter over in silence; install one with it")]
    Unfiltered(String),
    /// None at all.
    #[error("neither crun nor runc is installed")]
    None,
}

/// A runtime that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runtime {
    /// Its name.
    pub name: String,
    /// Its program, as an absolute path.
    pub binary: PathBuf,
    /// How it takes a seccomp filter.
    pub filters: Form,
}

/// The runtimes of this host.
#[derive(Debug, Clone)]
pub struct Runtimes {
    configured: BTreeMap<String, PathBuf>,
    /// Those that were seen to honour a compiled filter, and which file that was: another one has to be asked anew.
    take_programs: BTreeMap<String, Asked>,
    /// Those that were seen to honour none.
    unfiltered: BTreeSet<String>,
    allowed: Option<Vec<String>>,
    default: Result<Runtime, String>,
}

/// A program's place, and what says that it is still the same file.
type Asked = (PathBuf, Stamp);

fn asked(binary: &Path) -> Option<Asked> {
    Some((binary.to_owned(), Stamp::of(&fs::metadata(binary).ok()?)))
}

/// Names of the old driver and containerd that mean "runc's shim, whatever its binary".
const SHIM_NAMES: [&str; 2] = ["io.containerd.runc.v2", "io.containerd.runc.v1"];

impl Runtimes {
    /// Finds the default: the one the operator named, else crun where it works on this host, else runc. Every crun is
    /// asked what it can do.
    pub async fn find(settings: &Settings, scratch: &Path) -> Self {
        let configured = settings.runtimes.clone();
        let cruns = configured.iter().filter_map(|(name, binary)| {
            let binary = which(binary)?;
            let is_crun = binary.file_name().is_some_and(|file| file.to_string_lossy().starts_with("crun"));
            is_crun.then_some(async move { (name.clone(), crun_works(&binary, scratch).await) })
        });
        let cruns: BTreeMap<String, Result<Form, String>> =
            futures_util::future::join_all(cruns).await.into_iter().collect();
        let take_programs = cruns
            .iter()
            .filter(|(_, form)| **form == Ok(Form::Program))
            .filter_map(|(name, _)| Some((name.clone(), asked(&which(configured.get(name)?)?)?)))
            .collect();
        let without = |form: &Result<Form, String>| form.as_ref().is_err_and(|problem| problem == NO_SECCOMP);
        let unfiltered = cruns.iter().filter(|(_, form)| without(form)).map(|(name, _)| name.clone()).collect();
        let allowed = settings.allow_runtimes.clone();
        let mut runtimes = Self { configured, take_programs, unfiltered, allowed, default: Err(String::new()) };
        runtimes.default = match &settings.default_runtime {
            Some(name) => runtimes.installed_as(name).ok_or_else(|| runtimes.missing(name).to_string()),
            None => {
                if let Some(Err(problem)) = cruns.get("crun") {
                    tracing::info!(problem, "crun does not work on this host; runc is the default");
                }
                let crun = runtimes.installed_as("crun").filter(|_| cruns.get("crun").is_some_and(Result::is_ok));
                crun.or_else(|| runtimes.installed_as("runc")).ok_or_else(|| RuntimeError::None.to_string())
            }
        };
        runtimes
    }

    fn installed_as(&self, name: &str) -> Option<Runtime> {
        let binary = which(self.configured.get(name)?)?;
        let known = self.take_programs.get(name).is_some_and(|known| asked(&binary).as_ref() == Some(known));
        let filters = if known { Form::Program } else { Form::Profile };
        Some(Runtime { name: name.to_owned(), binary, filters })
    }

    /// The program of a runtime, by its name.
    pub fn binary(&self, name: &str) -> Option<PathBuf> {
        self.configured.get(name).and_then(|binary| which(binary))
    }

    fn missing(&self, name: &str) -> RuntimeError {
        let binary = self.configured.get(name).map_or_else(|| name.to_owned(), |path| path.display().to_string());
        RuntimeError::Missing { name: name.to_owned(), binary }
    }

    /// The default.
    ///
    /// # Errors
    /// Why there is none.
    pub fn default_runtime(&self) -> Result<&Runtime, &str> {
        self.default.as_ref().map_err(String::as_str)
    }

    /// The runtime a job asks for.
    ///
    /// # Errors
    /// When it is not configured, not allowed or not installed: never another one instead.
    pub fn choose(&self, wanted: Option<&str>) -> Result<Runtime, RuntimeError> {
        let name = match wanted {
            Some(name) if !SHIM_NAMES.contains(&name) => name,
            // By its name: what was found out about its file may hold no longer.
            _ => &self.default.as_ref().map_err(|_| RuntimeError::None)?.name,
        };
        if !self.configured.contains_key(name) {
            let known = self.configured.keys().map(String::as_str).chain(SHIM_NAMES).collect::<Vec<_>>().join(", ");
            return Err(RuntimeError::Unknown { name: name.to_owned(), known });
        }
        self.allow(self.installed_as(name).ok_or_else(|| self.missing(name))?)
    }

    fn allow(&self, runtime: Runtime) -> Result<Runtime, RuntimeError> {
        if self.unfiltered.contains(&runtime.name) {
            return Err(RuntimeError::Unfiltered(runtime.name));
        }
        match &self.allowed {
            Some(allowed) if !allowed.contains(&runtime.name) => {
                Err(RuntimeError::NotAllowed { name: runtime.name, allowed: format!("{allowed:?}") })
            }
            _ => Ok(runtime),
        }
    }

    /// All that are installed, for node attributes.
    pub fn installed(&self) -> Vec<Runtime> {
        self.configured.keys().filter_map(|name| self.installed_as(name)).collect()
    }

    /// Has a runtime end and forget a container, by its own command. `root` is its state directory.
    ///
    /// # Errors
    /// When it is not installed, hangs or refuses.
    pub async fn delete(&self, runtime: &str, root: &Path, id: &ContainerId) -> Result<(), RuntimeError> {
        let failed = |problem: String| RuntimeError::Delete { name: runtime.to_owned(), problem };
        let binary = self.binary(runtime).ok_or_else(|| failed("it is not installed".to_owned()))?;
        let mut command = tokio::process::Command::new(binary);
        command.arg("--root").arg(root).args(["delete", "--force", id.as_str()]);
        command.stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(DELETE, command.output()).await;
        let output = output.map_err(|_| failed("it hangs".to_owned()))?.map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            Ok(())
        } else {
            Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
        }
    }
}

/// What probes that were cut off left behind.
pub fn clear_probes(scratch: &Path) {
    let stale = fs::read_dir(scratch).into_iter().flatten().flatten();
    for entry in stale.filter(|entry| entry.file_name().to_string_lossy().starts_with("probe-")) {
        if let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::debug!(%error, "an old probe's bundle stays");
        }
    }
}

/// Does crun work here? It refuses hybrid cgroup hosts in part, old kernels, and what its build left out, so it is
/// asked: a container whose program is an empty file must fail for just that reason, which crun finds after everything
/// else. It is given a filter, too, that has execve fail in a way of its own: who does not fail in that way has not loaded
/// it. First a compiled one, then the plain form: a crun without seccomp takes both, and does nothing.
///
/// # Errors
/// Its own words when it fails for another reason.
pub async fn crun_works(binary: &Path, scratch: &Path) -> Result<Form, String> {
    let id = format!("probe-{}", random_hex(6));
    let bundle = scratch.join(&id);
    let mut outcome = probe(binary, &bundle, &id, Form::Program).await;
    // It has run the program, and not under the filter: does it know the plain form?
    if outcome == Ok(false) {
        outcome = probe(binary, &bundle, &id, Form::Profile)
            .await
            .and_then(|filtered| if filtered { Ok(false) } else { Err(NO_SECCOMP.to_owned()) });
    }
    let outcome = outcome.map(|program| if program { Form::Program } else { Form::Profile });
    if let Err(error) = fs::remove_dir_all(&bundle) {
        tracing::debug!(%error, "the probe's bundle stays");
    }
    outcome
}

/// What execve answers under the probe's filter: EXDEV, which it never answers by itself.
const TELLTALE: u32 = libc::EXDEV.cast_unsigned();

/// Such a crun reads filters in either form and does nothing with them.
const NO_SECCOMP: &str = "it was built without seccomp";

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
    let namespaces: Vec<_> =
        ["pid", "mount", "ipc", "uts"].iter().map(|kind| serde_json::json!({ "type": kind })).collect();
    let mut spec = serde_json::json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs" },
        "process": { "user": { "uid": 0, "gid": 0 }, "args": ["/empty"], "cwd": "/", "env": [] },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "linux": { "namespaces": namespaces, "cgroupsPath": format!("/nomad-driver-shim-{id}") },
    });
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
        let mut command = tokio::process::Command::new(binary);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn runtimes(allowed: Option<&[&str]>) -> Runtimes {
        let shell = Runtime { name: "runc".to_owned(), binary: PathBuf::from("/bin/sh"), filters: Form::Profile };
        Runtimes {
            take_programs: BTreeMap::new(),
            unfiltered: BTreeSet::new(),
            configured: BTreeMap::from([
                ("runc".to_owned(), PathBuf::from("/bin/sh")),
                ("kata".to_owned(), PathBuf::from("/no/such")),
            ]),
            allowed: allowed.map(|names| names.iter().map(|name| (*name).to_owned()).collect()),
            default: Ok(shell),
        }
    }

    #[test]
    fn a_named_runtime_is_that_one_or_none() {
        let all = runtimes(None);
        assert_eq!(all.choose(None).map(|r| r.name), Ok("runc".to_owned()));
        assert_eq!(all.choose(Some("io.containerd.runc.v2")).map(|r| r.name), Ok("runc".to_owned()));
        assert!(matches!(all.choose(Some("kata")), Err(RuntimeError::Missing { .. })));
        assert!(matches!(all.choose(Some("runsc")), Err(RuntimeError::Unknown { .. })));
        assert!(matches!(runtimes(Some(&["crun"])).choose(Some("runc")), Err(RuntimeError::NotAllowed { .. })));
        assert!(matches!(runtimes(Some(&["crun"])).choose(None), Err(RuntimeError::NotAllowed { .. })));
    }
}
