//! The OCI runtimes by name, and the choice of one for a job that names none.

mod crun;
mod gvisor;
mod pinned_binary;
mod probes;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

pub use crun::probe_crun;
pub(crate) use gvisor::Gvisor;
pub use gvisor::probe_runsc;
use pinned_binary::BinaryId;
pub use probes::{remove_probe, stale_probes};

use super::{RuntimeSettings, Settings};
use crate::{
    cgroup::Cgroups,
    file_id::FileId,
    gvisor::{Caller, Network, RunscProbe},
    ids::ContainerId,
    places::Places,
    process::{async_command, bounded_output, which},
    rootfs::{Hooks, NetworkNamespace, seccomp::FilterForm},
};

/// How long a runtime's `delete --force` may take. It usually takes 20 to 220 ms.
const DELETE_TIMEOUT: Duration = Duration::from_secs(30);

/// A runtime can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// No runtime of this name is configured.
    #[error("runtime {name:?} is not configured; the runtimes are {known}")]
    Unknown {
        /// The name that the job uses.
        name: String,
        /// The names that are configured.
        known: String,
    },
    /// The operator does not allow the runtime.
    #[error("runtime {name:?} is not among allow_runtimes = {allowed}")]
    NotAllowed {
        /// The name that the job uses.
        name: String,
        /// The names that are allowed.
        allowed: String,
    },
    /// The runtime or its shim is not installed.
    #[error("runtime {name:?}: {binary} is not installed")]
    Missing {
        /// The runtime's name.
        name: String,
        /// The program that is missing.
        binary: String,
    },
    /// The runtime did not delete a container.
    #[error("runtime {name:?} can't delete a container: {problem}")]
    Delete {
        /// The runtime's name.
        name: String,
        /// The runtime's message, or why it could not be called.
        problem: String,
    },
    /// The runtime is installed, but does not work on this host.
    #[error("runtime {name:?} does not work on this host: {problem}")]
    Broken {
        /// The runtime's name.
        name: String,
        /// The problem that the runtime's probe has found.
        problem: String,
    },
    /// The script that shims call instead of runsc can't be written.
    #[error("runtime {name:?}: can't write its wrapper script")]
    Wrapper {
        /// The runtime's name.
        name: String,
        /// The error of the file system.
        source: std::io::Error,
    },
    /// The runtime has no support for seccomp, so it would ignore a task's filter.
    #[error("runtime {0:?} was built without seccomp and would silently ignore any filter; install one with seccomp")]
    Unfiltered(String),
    /// There is no runtime at all.
    #[error("neither crun nor runc is installed")]
    None,
}

/// A runtime that can be used.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// The runtime's name.
    pub name: String,
    /// The program that shims call, as an absolute path.
    pub binary: PathBuf,
    /// The form in which the runtime takes a seccomp filter.
    pub filters: FilterForm,
    /// The runtime's own shim, if it has one.
    pub shim: Option<OwnShim>,
    /// gVisor's part, if the runtime is gVisor's runsc.
    pub gvisor: Option<Arc<Gvisor>>,
}

/// A shim other than runc's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnShim {
    /// The shim's program, as an absolute path.
    pub program: PathBuf,
    /// The shim's configuration file, if the operator named one.
    pub config: Option<PathBuf>,
}

impl Runtime {
    /// Returns the kind of network that a task in this namespace has, if the runtime provides the network itself.
    pub fn network(&self, namespace: &NetworkNamespace) -> Option<Network> {
        self.gvisor.as_ref().map(|gvisor| gvisor.network(namespace))
    }

    /// Says whether this runtime's containers wait at a FIFO after `create`, and its `start` only opens that FIFO. The
    /// program's name decides, because a wrapper with another name may do anything at `start`.
    pub fn waits_at_fifo(&self) -> bool {
        ["crun", "runc"].iter().any(|name| name_starts_with(&self.binary, name))
    }

    /// Says whether this runtime is crun or runc itself, by its name and without a shim of another kind. The name may
    /// end with a version, as in `runc-1.2`. Unlike [`Self::waits_at_fifo`], this excludes programs such as
    /// `crun-vm`, which start something other than a plain container.
    pub fn is_crun_or_runc(&self) -> bool {
        let name = self.binary.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let rest = ["crun", "runc"].iter().find_map(|known| name.strip_prefix(known));
        let is_version = |rest: &str| {
            rest.strip_prefix('-').is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
        };
        self.gvisor.is_none() && self.shim.is_none() && rest.is_some_and(|rest| rest.is_empty() || is_version(rest))
    }

    /// Returns the result of the runtime's probe. Only gVisor is probed; `None` for other runtimes.
    ///
    /// # Errors
    /// When the runtime does not work on this host.
    pub async fn probe(&self) -> Result<Option<RunscProbe>, RuntimeError> {
        let Some(gvisor) = &self.gvisor else { return Ok(None) };
        let broken = |problem| RuntimeError::Broken { name: self.name.clone(), problem };
        gvisor.probe(&self.binary).await.map(Some).map_err(broken)
    }

    /// Waits for the runtime's probe, and writes the wrapper script that its shim calls for a task in this namespace.
    ///
    /// # Errors
    /// When the runtime does not work on this host, or the wrapper script can't be written.
    pub async fn prepare(mut self, namespace: &NetworkNamespace, hooks: &Hooks) -> Result<Self, RuntimeError> {
        let probed = self.probe().await?;
        let (Some(gvisor), Some(probed)) = (&self.gvisor, probed) else { return Ok(self) };
        let binary = gvisor.pinned_binary(&self.binary).await;
        let failed = |source| RuntimeError::Wrapper { name: self.name.clone(), source };
        let supervisor = self.shim.as_ref().map(|_| own_program()).transpose().map_err(failed)?;
        let caller = match &supervisor {
            Some(supervisor) => Caller::Own { supervisor },
            None => Caller::Runc { needs_delete: !hooks.poststop.is_empty() || gvisor.settings.writes_into_volumes() },
        };
        let wrapper = gvisor.write_wrapper(&binary, &probed, gvisor.network(namespace), caller);
        self.binary = wrapper.map_err(failed)?;
        Ok(self)
    }
}

/// The runtimes of this host.
#[derive(Debug, Clone)]
pub struct Runtimes {
    configured: BTreeMap<String, RuntimeSettings>,
    /// The runtimes that are gVisor's runsc, by name.
    gvisor: BTreeMap<String, Arc<Gvisor>>,
    /// The runtimes whose probe has shown that they enforce a compiled filter, and the program that was probed. If the
    /// program is replaced by another one, it counts as not probed.
    accept_compiled_filters: BTreeMap<String, ProbedBinary>,
    /// The runtimes whose probe has shown that they enforce no filter.
    unfiltered: BTreeSet<String>,
    /// `allow_runtimes`.
    allowed: Option<Vec<String>>,
    /// The default runtime, or the reason why there is none.
    default: Result<Runtime, String>,
    /// `default_runtime`.
    default_name: Option<String>,
}

/// Says whether the file's name begins with `name`, as `crun` and `crun-1.20` begin with `crun`.
fn name_starts_with(binary: &Path, name: &str) -> bool {
    binary.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name))
}

/// A program's path, and the identity of the file that was there when the program was probed.
type ProbedBinary = (PathBuf, FileId);

fn probed_binary(binary: &Path) -> Option<ProbedBinary> {
    Some((binary.to_owned(), FileId::of(&fs::metadata(binary).ok()?)))
}

/// Names that nomad-driver-containerd and containerd use for runc's shim, whatever the runtime's program is. In this
/// driver's options, they mean the default runtime.
pub const RUNC_SHIM_NAMES: [&str; 2] = ["io.containerd.runc.v2", "io.containerd.runc.v1"];

impl Runtimes {
    /// Probes every crun, and finds the default runtime: the one that the operator named, or else crun if it works on
    /// this host, or else runc.
    pub async fn find(settings: &Settings, cgroups: &Cgroups) -> Self {
        let scratch = settings.places.run();
        let configured = settings.runtimes.clone();
        let gvisor = configured.iter().filter_map(|(name, runtime)| {
            let own = runtime.gvisor.clone()?;
            Some((name.clone(), Arc::new(Gvisor::new(name.clone(), own, settings.places.clone(), cgroups.clone()))))
        });
        let gvisor = gvisor.collect();
        let cruns = configured.iter().filter_map(|(name, runtime)| {
            let binary = which(&runtime.binary)?;
            name_starts_with(&binary, "crun")
                .then_some(async move { (name.clone(), probe_crun(&binary, scratch, cgroups).await) })
        });
        let cruns: BTreeMap<String, Result<FilterForm, String>> =
            futures_util::future::join_all(cruns).await.into_iter().collect();
        let accept_compiled_filters = cruns
            .iter()
            .filter(|(_, form)| **form == Ok(FilterForm::Program))
            .filter_map(|(name, _)| Some((name.clone(), probed_binary(&which(&configured.get(name)?.binary)?)?)))
            .collect();
        let lacks_seccomp =
            |form: &Result<FilterForm, String>| form.as_ref().is_err_and(|problem| problem == crun::NO_SECCOMP);
        let unfiltered = cruns.iter().filter(|(_, form)| lacks_seccomp(form)).map(|(name, _)| name.clone()).collect();
        let allowed = settings.allow_runtimes.clone();
        let mut runtimes = Self {
            configured,
            gvisor,
            accept_compiled_filters,
            unfiltered,
            allowed,
            default: Err(String::new()),
            default_name: settings.default_runtime.clone(),
        };
        runtimes.default = match &settings.default_runtime {
            Some(name) => runtimes.find_installed(name).ok_or_else(|| runtimes.missing_error(name).to_string()),
            None => {
                if let Some(Err(problem)) = cruns.get("crun") {
                    tracing::info!(problem, "crun does not work on this host; runc is the default");
                }
                let crun = runtimes.find_installed("crun").filter(|_| cruns.get("crun").is_some_and(Result::is_ok));
                crun.or_else(|| runtimes.find_installed("runc")).ok_or_else(|| RuntimeError::None.to_string())
            }
        };
        runtimes
    }

    fn find_installed(&self, name: &str) -> Option<Runtime> {
        let configured = self.configured.get(name)?;
        let binary = which(&configured.binary)?;
        let shim = match &configured.shim {
            None => None,
            Some(shim) => Some(OwnShim { program: which(&shim.program)?, config: shim.config.clone() }),
        };
        let known =
            self.accept_compiled_filters.get(name).is_some_and(|known| probed_binary(&binary).as_ref() == Some(known));
        let filters = if known { FilterForm::Program } else { FilterForm::Profile };
        let gvisor = self.gvisor.get(name).cloned();
        Some(Runtime { name: name.to_owned(), binary, filters, shim, gvisor })
    }

    /// Returns the path of a runtime's program, if it is installed.
    pub fn binary(&self, name: &str) -> Option<PathBuf> {
        self.configured.get(name).and_then(|runtime| which(&runtime.binary))
    }

    fn missing_error(&self, name: &str) -> RuntimeError {
        let configured = self.configured.get(name);
        let shim = configured.and_then(|runtime| runtime.shim.as_ref()).map(|shim| &shim.program);
        let binary = configured.map(|runtime| &runtime.binary);
        let missing = [binary, shim].into_iter().flatten().find(|program| which(program).is_none()).or(binary);
        let binary = missing.map_or_else(|| name.to_owned(), |path| path.display().to_string());
        RuntimeError::Missing { name: name.to_owned(), binary }
    }

    /// Returns the default runtime.
    ///
    /// # Errors
    /// The reason why there is none.
    pub fn default_runtime(&self) -> Result<&Runtime, &str> {
        self.default.as_ref().map_err(String::as_str)
    }

    /// Returns the runtime that a job asks for, or the default runtime.
    ///
    /// # Errors
    /// When the runtime is not configured, not allowed or not installed. It is never replaced by another one.
    pub fn choose(&self, wanted: Option<&str>) -> Result<Runtime, RuntimeError> {
        let name = match wanted {
            Some(name) if !RUNC_SHIM_NAMES.contains(&name) => name,
            // The default is looked up again by its name, because its program may have been replaced since.
            _ => match (&self.default, &self.default_name) {
                (Ok(default), _) => &default.name,
                (Err(_), Some(name)) => name,
                (Err(_), None) => return Err(RuntimeError::None),
            },
        };
        if !self.configured.contains_key(name) {
            let known =
                self.configured.keys().map(String::as_str).chain(RUNC_SHIM_NAMES).collect::<Vec<_>>().join(", ");
            return Err(RuntimeError::Unknown { name: name.to_owned(), known });
        }
        self.allow(self.find_installed(name).ok_or_else(|| self.missing_error(name))?)
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

    /// Returns all runtimes that are installed and not known to fail on this host. A gVisor runtime comes with the
    /// result of its probe, and is left out if it was not probed yet.
    pub fn usable(&self) -> Vec<(Runtime, Option<RunscProbe>)> {
        let installed = self.configured.keys().filter_map(|name| self.find_installed(name));
        let usable = installed.filter_map(|runtime| match runtime.gvisor.as_ref().map(|gvisor| gvisor.last_probe()) {
            None => Some((runtime, None)),
            Some(known) => Some((runtime, Some(known?.ok()?))),
        });
        usable.collect()
    }

    /// Says whether a runtime of this name is configured and is gVisor's.
    pub fn is_gvisor(&self, name: &str) -> bool {
        self.gvisor.contains_key(name)
    }

    /// Removes old pinned copies of runsc. The caller has made sure that no task is recorded that runs in gVisor.
    pub fn prune_pinned(&self, places: &Places) {
        let binaries = self.gvisor.keys().filter_map(|name| self.binary(name));
        pinned_binary::prune(places, &binaries.filter_map(|binary| BinaryId::of(&binary)).collect::<Vec<_>>());
    }

    /// Probes the runtimes of gVisor that have to be probed. Returns true if a result differs from the last one.
    pub async fn refresh_probes(&self) -> bool {
        let mut changed = false;
        for (name, gvisor) in &self.gvisor {
            if let Some(runtime) = self.find_installed(name) {
                let before = gvisor.last_probe();
                changed |= Some(gvisor.probe(&runtime.binary).await) != before;
            }
        }
        changed
    }

    /// Returns the names of all runtimes that are configured.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.configured.keys().map(String::as_str)
    }

    /// Calls a runtime's `delete --force`, which kills a container and removes its state. `root` is the runtime's state
    /// directory.
    ///
    /// # Errors
    /// When the runtime is not installed, hangs or refuses.
    pub async fn delete(&self, runtime: &str, root: &Path, id: &ContainerId) -> Result<(), RuntimeError> {
        let failed = |problem: String| RuntimeError::Delete { name: runtime.to_owned(), problem };
        let binary = self.binary(runtime).ok_or_else(|| failed("it is not installed".to_owned()))?;
        let mut command = async_command(binary);
        command.arg("--root").arg(root).args(["delete", "--force", id.as_str()]);
        command.stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(DELETE_TIMEOUT, bounded_output(&mut command)).await;
        let output = output.map_err(|_| failed("it hangs".to_owned()))?.map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            Ok(())
        } else {
            Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
        }
    }
}

/// Returns the path of this program's file, or of the file that has replaced it since this process was started.
fn own_program() -> std::io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let path = path.to_str().and_then(|path| path.strip_suffix(" (deleted)")).map_or(path.clone(), PathBuf::from);
    // A missing program is an error, because the exit codes of sandboxes would be lost silently without it.
    which(&path).ok_or_else(|| std::io::Error::new(std::io::ErrorKind::NotFound, format!("{} is gone", path.display())))
}

/// Returns the smallest description of a container by which a runtime runs `program` in the bundle's directory
/// `rootfs`.
fn probe_spec(id: &str, program: &str, namespaces: &[&str]) -> serde_json::Value {
    let namespaces: Vec<_> = namespaces.iter().map(|kind| serde_json::json!({ "type": kind })).collect();
    serde_json::json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs" },
        "process": { "user": { "uid": 0, "gid": 0 }, "args": [program], "cwd": "/", "env": [] },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "linux": { "namespaces": namespaces, "cgroupsPath": probes::cgroup(id).as_str() },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtimes(allowed: Option<&[&str]>) -> Runtimes {
        let of = |binary: &str| RuntimeSettings { binary: binary.into(), ..RuntimeSettings::default() };
        let shell = Runtime {
            name: "runc".to_owned(),
            binary: PathBuf::from("/bin/sh"),
            filters: FilterForm::Profile,
            shim: None,
            gvisor: None,
        };
        let own = OwnShim { program: "/no/shim".into(), config: None };
        Runtimes {
            accept_compiled_filters: BTreeMap::new(),
            gvisor: BTreeMap::new(),
            unfiltered: BTreeSet::new(),
            configured: BTreeMap::from([
                ("runc".to_owned(), of("/bin/sh")),
                ("kata".to_owned(), of("/no/such")),
                ("odd".to_owned(), RuntimeSettings { shim: Some(own), ..of("/bin/sh") }),
            ]),
            allowed: allowed.map(|names| names.iter().map(|name| (*name).to_owned()).collect()),
            default: Ok(shell),
            default_name: None,
        }
    }

    #[test]
    fn crun_and_runc_are_known_by_their_names() {
        let runtime = |binary: &str, shim: Option<OwnShim>| Runtime {
            name: "any".to_owned(),
            binary: binary.into(),
            filters: FilterForm::Profile,
            shim,
            gvisor: None,
        };
        for (binary, is_known) in [
            ("/usr/bin/crun", true),
            ("/usr/local/sbin/runc", true),
            ("/opt/runc-1.2.4", true),
            ("/usr/bin/crun-vm", false),
            ("/usr/bin/runcvm", false),
            ("/usr/bin/sysbox-runc", false),
            ("/usr/bin/nvidia-container-runtime", false),
        ] {
            assert_eq!(runtime(binary, None).is_crun_or_runc(), is_known, "{binary}");
        }
        let shim = OwnShim { program: "/usr/bin/containerd-shim-kata-v2".into(), config: None };
        assert!(!runtime("/usr/bin/runc", Some(shim)).is_crun_or_runc());
    }

    #[test]
    fn a_named_runtime_is_that_one_or_none() {
        let all = runtimes(None);
        let chosen = |wanted| all.choose(wanted).map(|runtime| runtime.name).map_err(|error| error.to_string());
        assert_eq!(chosen(None), Ok("runc".to_owned()));
        assert_eq!(chosen(Some("io.containerd.runc.v2")), Ok("runc".to_owned()));
        assert!(matches!(all.choose(Some("kata")), Err(RuntimeError::Missing { .. })));
        // The shim is missing, not the runtime, and the error names the shim.
        assert!(chosen(Some("odd")).is_err_and(|problem| problem.contains("/no/shim")));
        assert!(matches!(all.choose(Some("runsc")), Err(RuntimeError::Unknown { .. })));
        assert!(matches!(runtimes(Some(&["crun"])).choose(Some("runc")), Err(RuntimeError::NotAllowed { .. })));
        assert!(matches!(runtimes(Some(&["crun"])).choose(None), Err(RuntimeError::NotAllowed { .. })));
    }
}
