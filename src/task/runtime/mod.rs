//! OCI runtimes by name, and which one is taken when a job names none.

mod crun;
mod gvisor;
mod kept;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

pub use crun::crun_works;
pub use gvisor::{Gvisor, runsc_works};
use kept::Program;

use super::{RuntimeSettings, Settings};
use crate::{
    cgroup::{CgroupPath, Cgroups},
    gvisor::{Caller, Network, Probed},
    ids::ContainerId,
    places::Places,
    process::{bounded_output, which},
    rootfs::{Hooks, NetworkNamespace, seccomp::Form},
    stamp::Stamp,
};

/// `delete --force` takes 20 to 220 ms.
const DELETE: Duration = Duration::from_secs(30);

/// Why a runtime can't be used.
#[derive(Debug, thiserror::Error)]
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
    /// Installed, and no good on this host.
    #[error("runtime {name:?} does not work on this host: {problem}")]
    Broken {
        /// Its name.
        name: String,
        /// What its probe said.
        problem: String,
    },
    /// The script that shims call it by.
    #[error("runtime {name:?}: write its wrapper")]
    Wrapper {
        /// Its name.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// One that confines nobody.
    #[error("runtime {0:?} was built without seccomp, and would pass any filter over in silence; install one with it")]
    Unfiltered(String),
    /// None at all.
    #[error("neither crun nor runc is installed")]
    None,
}

/// A runtime that can be used.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// Its name.
    pub name: String,
    /// What shims call, as an absolute path.
    pub binary: PathBuf,
    /// How it takes a seccomp filter.
    pub filters: Form,
    /// Its own shim, where it has one.
    pub shim: Option<OwnShim>,
    /// Where it is gVisor's.
    pub gvisor: Option<Arc<Gvisor>>,
}

/// A shim that is not runc's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnShim {
    /// Its program, as an absolute path.
    pub program: PathBuf,
    /// The file that it is configured by, where the operator named one.
    pub config: Option<PathBuf>,
}

impl Runtime {
    /// How a task in this namespace is connected, where that is the runtime's own doing.
    pub fn network(&self, namespace: &NetworkNamespace) -> Option<Network> {
        self.gvisor.as_ref().map(|gvisor| gvisor.network(namespace))
    }

    /// Is it one of those whose containers wait at a FIFO, and do nothing else at `start`? By its name: of a wrapper with
    /// another one nobody knows what it does then.
    pub fn waits_at_fifo(&self) -> bool {
        ["crun", "runc"].iter().any(|name| is_called(&self.binary, name))
    }

    /// Is it known to work here? Only gVisor's is looked at for that.
    ///
    /// # Errors
    /// When it does not.
    pub async fn works(&self) -> Result<Option<Probed>, RuntimeError> {
        let Some(gvisor) = &self.gvisor else { return Ok(None) };
        let broken = |problem| RuntimeError::Broken { name: self.name.clone(), problem };
        gvisor.probed(&self.binary).await.map(Some).map_err(broken)
    }

    /// Waits until it is known to work here, and has what its shim calls for a task in this namespace.
    ///
    /// # Errors
    /// When it does not work here.
    pub async fn made_ready(mut self, namespace: &NetworkNamespace, hooks: &Hooks) -> Result<Self, RuntimeError> {
        let probed = self.works().await?;
        let (Some(gvisor), Some(probed)) = (&self.gvisor, probed) else { return Ok(self) };
        let binary = gvisor.kept(&self.binary).await;
        let failed = |source| RuntimeError::Wrapper { name: self.name.clone(), source };
        let keeper = self.shim.as_ref().map(|_| own_program()).transpose().map_err(failed)?;
        let caller = match &keeper {
            Some(keeper) => Caller::Own { keeper },
            None => Caller::Runc { deletes: !hooks.poststop.is_empty() || gvisor.settings.writes_into_volumes() },
        };
        let wrapper = gvisor.wrapper(&binary, &probed, gvisor.network(namespace), caller);
        self.binary = wrapper.map_err(failed)?;
        Ok(self)
    }
}

/// The runtimes of this host.
#[derive(Debug, Clone)]
pub struct Runtimes {
    configured: BTreeMap<String, RuntimeSettings>,
    /// Those that are gVisor's, by name.
    gvisor: BTreeMap<String, Arc<Gvisor>>,
    /// Those that were seen to honour a compiled filter, and which file that was: another one has to be asked anew.
    take_programs: BTreeMap<String, Asked>,
    /// Those that were seen to honour none.
    unfiltered: BTreeSet<String>,
    allowed: Option<Vec<String>>,
    default: Result<Runtime, String>,
    /// `default_runtime`.
    wanted: Option<String>,
}

/// Does the file's name begin so (`crun`, `crun-1.20`)?
fn is_called(binary: &Path, name: &str) -> bool {
    binary.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name))
}

/// A program's place, and what says that it is still the same file.
type Asked = (PathBuf, Stamp);

fn asked(binary: &Path) -> Option<Asked> {
    Some((binary.to_owned(), Stamp::of(&fs::metadata(binary).ok()?)))
}

/// Names of the old driver and containerd that mean "runc's shim, whatever its binary".
pub const SHIM_NAMES: [&str; 2] = ["io.containerd.runc.v2", "io.containerd.runc.v1"];

impl Runtimes {
    /// Finds the default: the one the operator named, else crun where it works on this host, else runc. Every crun is
    /// asked what it can do.
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
            is_called(&binary, "crun").then_some(async move { (name.clone(), crun_works(&binary, scratch).await) })
        });
        let cruns: BTreeMap<String, Result<Form, String>> =
            futures_util::future::join_all(cruns).await.into_iter().collect();
        let take_programs = cruns
            .iter()
            .filter(|(_, form)| **form == Ok(Form::Program))
            .filter_map(|(name, _)| Some((name.clone(), asked(&which(&configured.get(name)?.binary)?)?)))
            .collect();
        let without = |form: &Result<Form, String>| form.as_ref().is_err_and(|problem| problem == crun::NO_SECCOMP);
        let unfiltered = cruns.iter().filter(|(_, form)| without(form)).map(|(name, _)| name.clone()).collect();
        let allowed = settings.allow_runtimes.clone();
        let mut runtimes = Self {
            configured,
            gvisor,
            take_programs,
            unfiltered,
            allowed,
            default: Err(String::new()),
            wanted: settings.default_runtime.clone(),
        };
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
        let configured = self.configured.get(name)?;
        let binary = which(&configured.binary)?;
        let shim = match &configured.shim {
            None => None,
            Some(shim) => Some(OwnShim { program: which(&shim.program)?, config: shim.config.clone() }),
        };
        let known = self.take_programs.get(name).is_some_and(|known| asked(&binary).as_ref() == Some(known));
        let filters = if known { Form::Program } else { Form::Profile };
        let gvisor = self.gvisor.get(name).cloned();
        Some(Runtime { name: name.to_owned(), binary, filters, shim, gvisor })
    }

    /// The program of a runtime, by its name.
    pub fn binary(&self, name: &str) -> Option<PathBuf> {
        self.configured.get(name).and_then(|runtime| which(&runtime.binary))
    }

    fn missing(&self, name: &str) -> RuntimeError {
        let configured = self.configured.get(name);
        let shim = configured.and_then(|runtime| runtime.shim.as_ref()).map(|shim| &shim.program);
        let binary = configured.map(|runtime| &runtime.binary);
        let missing = [binary, shim].into_iter().flatten().find(|program| which(program).is_none()).or(binary);
        let binary = missing.map_or_else(|| name.to_owned(), |path| path.display().to_string());
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
            _ => match (&self.default, &self.wanted) {
                (Ok(default), _) => &default.name,
                (Err(_), Some(name)) => name,
                (Err(_), None) => return Err(RuntimeError::None),
            },
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

    /// All that are installed and not known to be no good here, with what was found out of gVisor's; one of those that
    /// was not looked at yet is left out.
    pub fn usable(&self) -> Vec<(Runtime, Option<Probed>)> {
        let installed = self.configured.keys().filter_map(|name| self.installed_as(name));
        let usable = installed.filter_map(|runtime| match runtime.gvisor.as_ref().map(|gvisor| gvisor.known()) {
            None => Some((runtime, None)),
            Some(known) => Some((runtime, Some(known?.ok()?))),
        });
        usable.collect()
    }

    /// Is it configured, and gVisor's?
    pub fn is_gvisor(&self, name: &str) -> bool {
        self.gvisor.contains_key(name)
    }

    /// No task of gVisor's is recorded: what is kept of programs that were replaced can go.
    pub fn prune(&self, places: &Places) {
        let binaries = self.gvisor.keys().filter_map(|name| self.binary(name));
        kept::prune(places, &binaries.filter_map(|binary| Program::of(&binary)).collect::<Vec<_>>());
    }

    /// Looks at what gVisor's runtimes can do here: true when something else was found than was known.
    pub async fn look(&self) -> bool {
        let mut news = false;
        for (name, gvisor) in &self.gvisor {
            if let Some(runtime) = self.installed_as(name) {
                let before = gvisor.known();
                news |= Some(gvisor.probed(&runtime.binary).await) != before;
            }
        }
        news
    }

    /// Names of all that are configured.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.configured.keys().map(String::as_str)
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
        let output = tokio::time::timeout(DELETE, bounded_output(&mut command)).await;
        let output = output.map_err(|_| failed("it hangs".to_owned()))?.map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            Ok(())
        } else {
            Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
        }
    }
}

/// This program's file, or what has taken its place since we were started.
fn own_program() -> std::io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let bare = path.to_str().and_then(|path| path.strip_suffix(" (deleted)")).map_or(path.clone(), PathBuf::from);
    // Without it the exit codes of sandboxes would be lost, in silence.
    which(&bare).ok_or_else(|| std::io::Error::new(std::io::ErrorKind::NotFound, format!("{} is gone", bare.display())))
}

/// Where a probe's container is.
fn probe_cgroup(id: &str) -> String {
    format!("/nomad-driver-shim-{id}")
}

/// The least that a runtime runs `program` by, in `rootfs` of the bundle.
fn probe_spec(id: &str, program: &str, namespaces: &[&str]) -> serde_json::Value {
    let namespaces: Vec<_> = namespaces.iter().map(|kind| serde_json::json!({ "type": kind })).collect();
    serde_json::json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs" },
        "process": { "user": { "uid": 0, "gid": 0 }, "args": [program], "cwd": "/", "env": [] },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "linux": { "namespaces": namespaces, "cgroupsPath": probe_cgroup(id) },
    })
}

/// What probes that were cut off left behind.
pub fn clear_probes(scratch: &Path, cgroups: &Cgroups) {
    let stale = fs::read_dir(scratch).into_iter().flatten().flatten();
    for entry in stale {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("probe-") {
            continue;
        }
        let cgroup = CgroupPath::recorded(&probe_cgroup(&name));
        let emptied = cgroups.kill(&cgroup);
        let removed = emptied.and_then(|_| cgroups.remove(&cgroup)).map_err(|error| crate::chain(&error));
        if let Err(problem) = removed.and_then(|()| fs::remove_dir_all(entry.path()).map_err(|error| error.to_string()))
        {
            tracing::debug!(problem, "something of an old probe stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtimes(allowed: Option<&[&str]>) -> Runtimes {
        let of = |binary: &str| RuntimeSettings { binary: binary.into(), ..RuntimeSettings::default() };
        let shell = Runtime {
            name: "runc".to_owned(),
            binary: PathBuf::from("/bin/sh"),
            filters: Form::Profile,
            shim: None,
            gvisor: None,
        };
        let own = OwnShim { program: "/no/shim".into(), config: None };
        Runtimes {
            take_programs: BTreeMap::new(),
            gvisor: BTreeMap::new(),
            unfiltered: BTreeSet::new(),
            configured: BTreeMap::from([
                ("runc".to_owned(), of("/bin/sh")),
                ("kata".to_owned(), of("/no/such")),
                ("odd".to_owned(), RuntimeSettings { shim: Some(own), ..of("/bin/sh") }),
            ]),
            allowed: allowed.map(|names| names.iter().map(|name| (*name).to_owned()).collect()),
            default: Ok(shell),
            wanted: None,
        }
    }

    #[test]
    fn a_named_runtime_is_that_one_or_none() {
        let all = runtimes(None);
        let chosen = |wanted| all.choose(wanted).map(|runtime| runtime.name).map_err(|error| error.to_string());
        assert_eq!(chosen(None), Ok("runc".to_owned()));
        assert_eq!(chosen(Some("io.containerd.runc.v2")), Ok("runc".to_owned()));
        assert!(matches!(all.choose(Some("kata")), Err(RuntimeError::Missing { .. })));
        // Its shim is what is missing, and said to be.
        assert!(chosen(Some("odd")).is_err_and(|problem| problem.contains("/no/shim")));
        assert!(matches!(all.choose(Some("runsc")), Err(RuntimeError::Unknown { .. })));
        assert!(matches!(runtimes(Some(&["crun"])).choose(Some("runc")), Err(RuntimeError::NotAllowed { .. })));
        assert!(matches!(runtimes(Some(&["crun"])).choose(None), Err(RuntimeError::NotAllowed { .. })));
    }
}
