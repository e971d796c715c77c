//! A runtime that is gVisor's runsc. What it can do on this host is found out by running a small sandbox once. Shims
//! call a wrapper script that adds runsc's flags.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{
    pinned_binary::{self, BinaryId},
    probe_spec, probes,
};
use crate::{
    cgroup::Cgroups,
    elf,
    failure::{self, Cause},
    files::{create_private_dir, write_atomically},
    gvisor::{Caller, GvisorSettings, Network, Platform, RunscProbe, known_flags, wrapper},
    ids::{Digest, random_hex},
    places::Places,
    process::{self, PidFd, async_command, boot_id},
    rootfs::NetworkNamespace,
};

/// How long the probe's sandbox may take. It takes 0.1 to 0.3 s, and a platform that hangs is never used.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long runsc may take to print its version or its flags.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the failure of a probe is remembered before runsc is probed again.
const RETRY_INTERVAL: Duration = Duration::from_secs(30);
/// The exit code of the probe's program.
const PROBE_EXIT_CODE: u8 = 42;

/// One configured runtime that is gVisor's runsc.
#[derive(Debug)]
pub struct Gvisor {
    name: String,
    pub(super) settings: GvisorSettings,
    places: Places,
    cgroups: Cgroups,
    last_probe: Mutex<Option<CachedProbe>>,
    /// The lock of a running probe, so that there is one at a time.
    probe_lock: tokio::sync::Mutex<()>,
}

/// The result of the last probe, the program that was probed, and the time.
#[derive(Debug, Clone)]
struct CachedProbe {
    binary: BinaryId,
    at: Instant,
    outcome: Result<RunscProbe, String>,
}

impl CachedProbe {
    /// Says whether this result can be used instead of another probe. A failure that comes from the host's state, such
    /// as a lack of descriptors, says nothing about the program.
    fn is_fresh(&self) -> bool {
        match &self.outcome {
            Ok(_) => true,
            Err(problem) => failure::of_message(problem) != Some(Cause::Host) && self.at.elapsed() < RETRY_INTERVAL,
        }
    }
}

/// The result of a successful probe on disk. It is valid until the host is rebooted.
#[derive(Serialize, Deserialize)]
struct SavedProbe {
    boot: String,
    of: BinaryId,
    settings: String,
    probed: RunscProbe,
}

impl Gvisor {
    pub(super) fn new(name: String, settings: GvisorSettings, places: Places, cgroups: Cgroups) -> Self {
        Self {
            name,
            settings,
            places,
            cgroups,
            last_probe: Mutex::default(),
            probe_lock: tokio::sync::Mutex::default(),
        }
    }

    /// Returns the result of the last probe. `None` if there was none yet.
    pub fn last_probe(&self) -> Option<Result<RunscProbe, String>> {
        self.last_probe.lock().as_ref().map(|known| known.outcome.clone())
    }

    /// Returns what runsc can do on this host. It is probed with a sandbox if that was not done since the host was
    /// booted or the program was replaced.
    ///
    /// # Errors
    /// runsc's message, or that it hangs.
    pub async fn probe(self: &Arc<Self>, binary: &Path) -> Result<RunscProbe, String> {
        if let Some(outcome) = self.fresh_outcome(binary) {
            return outcome;
        }
        // The probe runs to its end even if the caller stops waiting, because an interrupted sandbox leaves remains.
        let (this, binary) = (self.clone(), binary.to_owned());
        let probed = tokio::spawn(async move { this.probe_once(&binary).await });
        probed.await.unwrap_or_else(|join| Err(format!("its probe ended early: {join}")))
    }

    async fn probe_once(&self, binary: &Path) -> Result<RunscProbe, String> {
        let _probe_lock = self.probe_lock.lock().await;
        if let Some(outcome) = self.fresh_outcome(binary) {
            return outcome;
        }
        let of = BinaryId::of(binary).ok_or_else(|| format!("{} is gone", binary.display()))?;
        let outcome = match self.load_saved_probe(&of) {
            Some(probed) => Ok(probed),
            None => {
                let outcome = self.probe_platforms(&self.pinned_binary(binary).await).await;
                match &outcome {
                    Ok(probed) => self.save_probe(&of, probed),
                    Err(problem) => {
                        tracing::warn!(runtime = self.name, problem, "a runtime does not work on this host");
                    }
                }
                outcome
            }
        };
        let known = CachedProbe { binary: of, at: Instant::now(), outcome: outcome.clone() };
        *self.last_probe.lock() = Some(known);
        outcome
    }

    fn fresh_outcome(&self, binary: &Path) -> Option<Result<RunscProbe, String>> {
        let known = self.last_probe.lock();
        let known = known.as_ref().filter(|known| known.is_fresh())?;
        (BinaryId::of(binary).as_ref() == Some(&known.binary)).then(|| known.outcome.clone())
    }

    /// Returns the path of the pinned program, which stays when the program is upgraded or removed.
    pub(super) async fn pinned_binary(&self, binary: &Path) -> PathBuf {
        let (places, owned) = (self.places.clone(), binary.to_owned());
        let pin = move || match BinaryId::of(&owned) {
            Some(program) => pinned_binary::pin(&owned, &program, &places),
            None => Err(std::io::ErrorKind::NotFound.into()),
        };
        let pinned = tokio::task::spawn_blocking(pin).await.map_err(std::io::Error::other).and_then(|pinned| pinned);
        pinned.unwrap_or_else(|error| {
            tracing::warn!(
                binary = %binary.display(),
                %error,
                "could not pin the program of runsc; it must be upgraded only while no task uses it"
            );
            binary.to_owned()
        })
    }

    fn saved_probe_path(&self) -> PathBuf {
        self.places.wrappers().join(format!("{}.json", self.name))
    }

    fn load_saved_probe(&self, of: &BinaryId) -> Option<RunscProbe> {
        let saved: SavedProbe = serde_json::from_slice(&fs::read(self.saved_probe_path()).ok()?).ok()?;
        let same = saved.of == *of && saved.settings == format!("{:?}", self.settings);
        (same && boot_id().is_ok_and(|boot| boot == saved.boot)).then_some(saved.probed)
    }

    fn save_probe(&self, of: &BinaryId, probed: &RunscProbe) {
        let Ok(boot) = boot_id() else { return };
        let saved =
            SavedProbe { boot, of: of.clone(), settings: format!("{:?}", self.settings), probed: probed.clone() };
        let text = serde_json::json!(saved).to_string();
        if let Err(error) = write_atomically(&self.saved_probe_path(), text.as_bytes(), 0o600) {
            tracing::debug!(%error, "could not save the result of runsc's probe");
        }
    }

    /// Returns the platforms to try, in the order of preference. KVM is used only if the operator asks for it, because
    /// in virtual machines it is often available and very slow.
    fn platforms(&self) -> Vec<Platform> {
        self.settings.platform.map_or_else(|| vec![Platform::Systrap, Platform::Ptrace], |one| vec![one])
    }

    async fn probe_platforms(&self, binary: &Path) -> Result<RunscProbe, String> {
        let version = query(binary, "--version").await?;
        let flags = query(binary, "flags").await?;
        let shares_root = known_flags(&flags).contains("shared-root");
        let mut problems = Vec::new();
        for platform in self.platforms() {
            let probed = RunscProbe {
                platform: platform.to_string(),
                version: version.lines().next().unwrap_or_default().trim_start_matches("runsc version ").to_owned(),
                shares_root,
            };
            match self.run_sandbox(binary, &probed).await {
                Ok(()) => return Ok(probed),
                Err(problem) => problems.push(format!("platform {platform}: {problem}")),
            }
        }
        Err(problems.join("; "))
    }

    async fn run_sandbox(&self, binary: &Path, probed: &RunscProbe) -> Result<(), String> {
        let id = probes::new_probe_name().map_err(|error| error.to_string())?;
        let bundle = self.places.run().join(&id);
        let outcome = self.run_sandbox_in(&bundle, &id, binary, probed).await;
        if let Err(error) = probes::remove_probe(self.places.run(), &self.cgroups, &id).await {
            tracing::warn!(%error, name = id, "could not remove everything of a runtime's probe");
        }
        outcome
    }

    async fn run_sandbox_in(&self, bundle: &Path, id: &str, binary: &Path, probed: &RunscProbe) -> Result<(), String> {
        let text = |error: std::io::Error| error.to_string();
        create_private_dir(&bundle.join("rootfs/proc")).map_err(text)?;
        write_atomically(&bundle.join("rootfs/probe"), &elf::exits_with(PROBE_EXIT_CODE), 0o755).map_err(text)?;
        let spec = probe_spec(id, "/probe", &["pid", "mount", "ipc", "uts", "network"]);
        fs::write(bundle.join("config.json"), spec.to_string()).map_err(text)?;
        let mut command = async_command(binary);
        command
            .args(self.settings.flags(&probed.platform, Network::None, self.shared_root(probed).as_deref()))
            .arg("--root")
            .arg(bundle.join("state"))
            .args(["run", "--bundle"])
            .arg(bundle)
            .arg(id)
            .current_dir(bundle)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let child = command.spawn().map_err(text)?;
        let pid = child.id();
        let Ok(output) = tokio::time::timeout(PROBE_TIMEOUT, child.wait_with_output()).await else {
            // The sandbox and its file server may not be in the cgroup yet, so they are killed as descendants of runsc.
            let descendants = pid.map_or(Ok(Vec::new()), process::descendants).unwrap_or_else(|error| {
                tracing::warn!(%error, "could not list the processes of a hung sandbox; its cgroup is emptied later");
                Vec::new()
            });
            let opened: Vec<PidFd> = descendants.into_iter().filter_map(|pid| PidFd::open(pid).ok()).collect();
            opened.iter().for_each(|process| process.signal(libc::SIGKILL));
            return Err(format!("a sandbox was not done after {} s", PROBE_TIMEOUT.as_secs()));
        };
        let output = output.map_err(text)?;
        if output.status.code() == Some(PROBE_EXIT_CODE.into()) {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        Err(format!("{}: {}", output.status, stderr.trim().lines().last().unwrap_or_default()))
    }

    fn shared_root(&self, probed: &RunscProbe) -> Option<PathBuf> {
        let root = Places::gvisor_shared_root();
        (probed.shares_root && create_private_dir(&root).is_ok()).then_some(root)
    }

    /// Returns the kind of network that a task in this namespace has.
    pub fn network(&self, namespace: &NetworkNamespace) -> Network {
        match namespace {
            // runsc copies the interfaces of a namespace that are up, and in a new namespace none is up. With
            // `Network::None`, the sandbox has a loopback interface.
            NetworkNamespace::Private => Network::None,
            NetworkNamespace::Path(_) => self.settings.network,
            // A sandbox must not take over the addresses of the host's own namespace.
            NetworkNamespace::Host if self.settings.network == Network::None => Network::None,
            NetworkNamespace::Host => Network::Host,
        }
    }

    /// Writes the wrapper script that a shim calls, and returns its path.
    ///
    /// # Errors
    /// When the script can't be written.
    pub(super) fn write_wrapper(
        &self,
        binary: &Path,
        probed: &RunscProbe,
        network: Network,
        caller: Caller<'_>,
    ) -> std::io::Result<PathBuf> {
        let flags = self.settings.flags(&probed.platform, network, self.shared_root(probed).as_deref());
        let text = wrapper(binary, &flags, caller);
        // The name contains a digest of the content, so the script that a task was started with never changes.
        let digest = Digest::of(text.as_bytes());
        let path = self.places.wrappers().join(format!("{}-{network}-{}", self.name, &digest.short()[..8]));
        // The content is compared, too, because after a power failure the file may be empty.
        if !fs::read(&path).is_ok_and(|written| written == text.as_bytes()) {
            write_atomically(&path, text.as_bytes(), 0o755)?;
        }
        Ok(path)
    }
}

/// Probes what this runsc can do on this host, for callers that have no engine.
///
/// # Errors
/// runsc's message, or that it hangs.
pub async fn probe_runsc(binary: &Path) -> Result<RunscProbe, String> {
    let dir = std::env::temp_dir().join(format!("nomad-driver-shim-{}", random_hex(6)));
    let cgroups = Cgroups::detect().map_err(|error| crate::error_chain(&error))?;
    let settings = GvisorSettings::default();
    let outcome =
        Gvisor::new("runsc".to_owned(), settings, Places::new(&dir, &dir), cgroups).probe_platforms(binary).await;
    if let Err(error) = fs::remove_dir_all(&dir) {
        tracing::debug!(%error, "could not remove the directory of runsc's probe");
    }
    outcome
}

/// Calls runsc with one argument and returns what it prints.
async fn query(binary: &Path, argument: &str) -> Result<String, String> {
    let mut command = async_command(binary);
    command.arg(argument).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(QUERY_TIMEOUT, command.output()).await;
    let output =
        output.map_err(|_| format!("{argument}: it hangs"))?.map_err(|error| format!("{argument}: {error}"))?;
    // Go programs print help to standard output or to standard error.
    Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_of_the_host_is_not_cached_for_a_program() {
        let of = BinaryId::of(Path::new("/proc/self/exe")).expect("this program");
        let known =
            |problem: &str| CachedProbe { binary: of.clone(), at: Instant::now(), outcome: Err(problem.to_owned()) };
        assert!(known("--version: exit status: 127").is_fresh());
        for passing in ["--version: Too many open files (os error 24)", "platform systrap: no answer: timed out"] {
            assert!(!known(passing).is_fresh(), "{passing}");
        }
    }
}
