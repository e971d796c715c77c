//! Starts shims. The driver executes the daemon stage of a shim directly, with a listening socket of its own as
//! descriptor 3. This interface is the same in every containerd from 1.6 to 2.4, so the driver does not need the
//! shim's `start` command, of which there are three variants.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    os::fd::{AsRawFd, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use super::{
    Client, RuntimeCalls, ShimError, TaskApi,
    hold::{HoldRegistry, ShimHold, lock_registry},
    identity::ShimIdentity,
    scope::ShimScope,
    sealed::{CurrentSealedCopy, SEALED_FD, SealedCopy},
    version,
};
use crate::{
    files::{
        create_private, create_private_dir, listen_privately, remove_dir_all_if_exists, remove_dir_if_exists,
        remove_file_if_exists, write_private,
    },
    ids::ShimId,
    places::Places,
    process::{Pid, PidFd, ProcessId, async_command, boot_id, detach_from_agent, detach_session},
};

/// The longest time for a shim to exit. After a request to shut down, a shim exits in about 2 ms.
pub(super) const EXIT_TIMEOUT: Duration = Duration::from_secs(5);
/// The most bytes of a shim's log that this plugin logs when the shim does not come up.
const LOG_TAIL_MAX: u64 = 4 << 10;
/// The file in a shim's directory that records its identity, by which the next plugin finds the shim.
pub(super) const PID_FILE: &str = "pid";
/// The socket in a shim's directory at which the shim listens.
const SOCKET_FILE: &str = "sock";
/// The file in a shim's directory that the shim logs to.
const LOG_FILE: &str = "log";
/// The file in a shim's directory that marks a shim with a container that it can't delete.
pub(super) const UNUSABLE_FILE: &str = "unusable";

/// Starts shims and counts the holds on them.
#[derive(Debug)]
pub struct Launcher {
    binary: PathBuf,
    namespace: String,
    scope: ShimScope,
    pub(super) places: Places,
    /// The `cgroup.procs` files of the cgroup for shims, one for each hierarchy.
    cgroup: Vec<PathBuf>,
    /// The version of the Task service that the program serves: 2 or 3, and 0 as long as it is not known.
    api: AtomicU8,
    hold_registry: HoldRegistry,
    sealed_runtime: CurrentSealedCopy,
    calls: RuntimeCalls,
}

/// The id of a shim that is not started yet, and a hold on it.
#[derive(Debug)]
pub struct ShimReservation {
    id: ShimId,
    hold: ShimHold,
    /// The shim's program, if it is not the launcher's.
    program: Option<PathBuf>,
}

impl ShimReservation {
    /// Returns the id that the shim will have.
    pub fn id(&self) -> &ShimId {
        &self.id
    }
}

/// A running shim and a hold on it. This plugin or an earlier one has started the shim. `shut_down` removes its
/// directory.
#[derive(Debug)]
pub struct Shim {
    pub(super) id: ShimId,
    pub(super) pid: u32,
    pub(super) dir: PathBuf,
    pub(super) client: Client,
    pub(super) pidfd: Arc<PidFd>,
    pub(super) ended: watch::Receiver<bool>,
    pub(super) namespace: String,
    pub(super) hold: ShimHold,
    /// The runtime's program of which the shim has a sealed copy.
    pub(super) runtime: Option<PathBuf>,
    /// The shim's program, if it is not the launcher's.
    pub(super) program: Option<PathBuf>,
    /// The number of containers that the shim has had.
    pub(super) uses: u32,
    /// Whether an earlier plugin has started the shim.
    pub(super) adopted: bool,
}

/// The process of a shim that no connection was made to yet.
struct Spawned {
    child: tokio::process::Child,
    pid: u32,
    starting: StartingShim,
    runtime: Option<PathBuf>,
}

/// A shim that is starting. If this is dropped before the shim is up, the shim is killed and its directory removed.
struct StartingShim {
    pidfd: Arc<PidFd>,
    dir: PathBuf,
    is_up: bool,
}

impl Drop for StartingShim {
    fn drop(&mut self) {
        if !self.is_up {
            self.pidfd.signal(libc::SIGKILL);
            remove_dir(&self.dir);
        }
    }
}

impl Launcher {
    /// Creates a launcher of the program `binary`, whose shims use `namespace` and directories below `places`.
    pub fn new(binary: PathBuf, namespace: String, scope: ShimScope, places: Places, cgroup: Vec<PathBuf>) -> Self {
        Self {
            binary,
            namespace,
            scope,
            places,
            cgroup,
            api: AtomicU8::new(0),
            hold_registry: HoldRegistry::default(),
            sealed_runtime: CurrentSealedCopy::default(),
            calls: RuntimeCalls::default(),
        }
    }

    /// Logs a warning if tasks are to share shims and the shim's version starts only one task at a time.
    pub async fn warn_about_version(&self) {
        if self.scope != ShimScope::Task {
            version::warn_if_serial(&self.binary).await;
        }
    }

    /// Returns the shim's program.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// Returns how many threads of a shim run Go code at a time; threads that wait in the kernel are not counted. With
    /// one, a task's shim takes a quarter less memory and a fifth less time for a task (docs/decisions/024). A shared
    /// shim gets as many threads as containerd gives it.
    fn gomaxprocs(&self, program: Option<&Path>) -> &'static str {
        match self.scope {
            // The value with which gVisor's shim starts itself.
            _ if program.is_some() => "2",
            ShimScope::Task => "1",
            ShimScope::Alloc | ShimScope::Node => "4",
        }
    }

    /// Returns the shims' namespace, which is a directory below the runtimes' state roots.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Returns the count of the calls in which this launcher's shims run a runtime.
    pub fn calls(&self) -> &RuntimeCalls {
        &self.calls
    }

    /// Sets the sealed copy of a runtime that new shims get.
    pub fn set_sealed_runtime(&self, sealed: SealedCopy) {
        self.sealed_runtime.set(sealed);
    }

    /// Returns the ids of the shims that have holds in this process.
    pub fn held_ids(&self) -> HashSet<ShimId> {
        lock_registry(&self.hold_registry).keys().cloned().collect()
    }

    /// Returns the number of holds on a shim in this process.
    pub(super) fn hold_count(&self, id: &ShimId) -> usize {
        lock_registry(&self.hold_registry).get(id).map_or(0, |shim| shim.holds)
    }

    /// Takes a hold on a shim that is about to be adopted.
    pub fn acquire(&self, id: &ShimId) -> ShimHold {
        ShimHold::new(id, &self.hold_registry)
    }

    /// Reserves an id for a shim that will be launched, so that the id can be recorded before the shim exists.
    pub fn reserve(&self) -> ShimReservation {
        let id = ShimId::random();
        let hold = self.acquire(&id);
        ShimReservation { id, hold, program: None }
    }

    /// Reserves an id for a dedicated shim, which runs `program` and serves one task only.
    pub fn reserve_with_program(&self, program: &Path) -> ShimReservation {
        ShimReservation { program: Some(program.to_owned()), ..self.reserve() }
    }

    /// Returns the version of the Task service that a shim of this program probably serves.
    pub(super) fn api_hint(&self, program: Option<&Path>) -> Option<TaskApi> {
        match self.api.load(Ordering::Relaxed) {
            _ if program.is_some() => None,
            2 => Some(TaskApi::V2),
            3 => Some(TaskApi::V3),
            _ => None,
        }
    }

    /// Starts a shim and waits until it answers. If this is dropped early, nothing is left behind.
    ///
    /// # Errors
    /// Fails when the shim can't be started or does not answer. Nothing is left behind then.
    pub async fn launch(self: &Arc<Self>, reservation: ShimReservation) -> Result<Shim, ShimError> {
        let ShimReservation { id, hold, program } = reservation;
        let dir = self.places.shim(&id);
        let this = self.clone();
        let (spawn_id, spawn_dir, spawn_program) = (id.clone(), dir.clone(), program.clone());
        let spawned =
            tokio::task::spawn_blocking(move || this.spawn(&spawn_id, &spawn_dir, spawn_program.as_deref())).await;
        let spawned = spawned.unwrap_or_else(|join| {
            Err(ShimError::Spawn { binary: self.binary.clone(), source: io::Error::other(join) })
        });
        let Spawned { mut child, pid, mut starting, runtime } = match spawned {
            Ok(spawned) => spawned,
            Err(error) => {
                remove_dir(&dir);
                return Err(error);
            }
        };
        let (ended_tx, ended) = watch::channel(false);
        tokio::spawn(async move {
            // The shim is a child of this process. It is reaped when it dies, and its end is reported to all receivers.
            if let Err(error) = child.wait().await {
                tracing::warn!(%error, "could not wait for the exit of a shim");
            }
            ended_tx.send_replace(true);
        });
        match Client::connect_to_starting(&dir.join(SOCKET_FILE), self.api_hint(program.as_deref())).await {
            Ok(client) => {
                if program.is_none() {
                    self.api.store(if client.api() == TaskApi::V2 { 2 } else { 3 }, Ordering::Relaxed);
                }
                starting.is_up = true;
                Ok(Shim {
                    id,
                    pid,
                    dir,
                    client: client.with_runtime_calls(&self.calls),
                    pidfd: starting.pidfd.clone(),
                    ended,
                    namespace: self.namespace.clone(),
                    hold,
                    runtime,
                    program,
                    uses: 0,
                    adopted: false,
                })
            }
            Err(error) => {
                let log = log_tail(&dir.join(LOG_FILE)).unwrap_or_default();
                tracing::warn!(shim = %id, log = log.trim(), "a shim did not come up");
                Err(error)
            }
        }
    }

    fn spawn(&self, id: &ShimId, dir: &Path, program: Option<&Path>) -> Result<Spawned, ShimError> {
        let binary = program.unwrap_or(&self.binary);
        let failed = |doing, path: &Path| {
            let (id, path) = (id.to_string(), path.to_owned());
            move |source| ShimError::File { id, doing, path, source }
        };
        create_private_dir(dir).map_err(failed("create", dir))?;
        let (socket, log) = (dir.join(SOCKET_FILE), dir.join(LOG_FILE));
        let listener = listen_privately(&socket).map_err(failed("listen at", &socket))?;
        // The log is a plain file, because a FIFO would need a reader for the shim's whole life. The shim opens it by
        // this name itself.
        let log_file = create_private(&log).map_err(failed("create", &log))?;
        let mut command = async_command(binary);
        command
            .args(["-namespace", &self.namespace, "-id", id.as_str(), "-address"])
            .arg(self.places.run())
            .current_dir(dir)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("GOMAXPROCS", self.gomaxprocs(program))
            .env("TTRPC_ADDRESS", "")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file)
            .kill_on_drop(false);
        // The numbers are well above 3, so that creating descriptors 3 and 4 in the child can't close these
        // descriptors.
        let listener = duplicate_above(&listener, 10).map_err(failed("duplicate", &socket))?;
        let sealed = self.sealed_runtime.get().filter(|_| program.is_none());
        let copy = match &sealed {
            None => None,
            Some(sealed) => Some(duplicate_above(&sealed.fd, 10).map_err(failed("duplicate", &sealed.path))?),
        };
        let runtime = sealed.as_ref().map(|sealed| sealed.path.clone());
        let spawned = spawn_with_descriptors(&mut command, listener, copy);
        let mut child = spawned.map_err(|source| ShimError::Spawn { binary: binary.to_owned(), source })?;
        let pid = Pid::of_child(&child).map_err(failed("record the process of", dir))?;
        // This happens before the shim's identity is recorded, because an adopted shim is not moved any more.
        detach_from_agent(pid, &self.cgroup);
        let pid = pid.get();
        let recorded = PidFd::open(pid).and_then(|pidfd| {
            let identity = ShimIdentity {
                process: ProcessId::of(pid)?,
                boot: boot_id()?,
                namespace: self.namespace.clone(),
                runtime: runtime.clone(),
                program: program.map(Path::to_owned),
            };
            write_private(&dir.join(PID_FILE), &serde_json::to_vec(&identity)?)?;
            Ok(pidfd)
        });
        let pidfd = recorded.inspect_err(|_| drop(child.start_kill())).map_err(failed("record the process of", dir))?;
        let starting = StartingShim { pidfd: Arc::new(pidfd), dir: dir.to_owned(), is_up: false };
        Ok(Spawned { child, pid, starting, runtime })
    }
}

impl Shim {
    /// Returns the shim's id, which is the name of its directory.
    pub fn id(&self) -> &ShimId {
        &self.id
    }

    /// Returns the pid of the shim.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns the shim's namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Returns the connection to the shim.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the path by which the shim calls the runtime `binary`: that of its own sealed copy, if it has one of
    /// this runtime.
    pub fn runtime_path(&self, binary: &Path) -> PathBuf {
        if self.runtime.as_deref() == Some(binary) {
            format!("/proc/{}/fd/{SEALED_FD}", self.pid).into()
        } else {
            binary.to_owned()
        }
    }

    /// Returns whether the shim runs a program other than the launcher's, and serves one task only.
    pub fn is_dedicated(&self) -> bool {
        self.program.is_some()
    }

    /// Returns whether the shim has died. The kernel is asked as well, because the end may not have been reported yet.
    pub fn has_ended(&self) -> bool {
        *self.ended.borrow() || self.pidfd.has_ended()
    }

    /// Returns a receiver of the value `true` once the shim has died.
    pub fn subscribe_exit(&self) -> watch::Receiver<bool> {
        self.ended.clone()
    }

    /// Takes a further hold on the same shim, for another container.
    pub fn share(&self) -> Self {
        Self {
            id: self.id.clone(),
            pid: self.pid,
            dir: self.dir.clone(),
            client: self.client.clone(),
            pidfd: self.pidfd.clone(),
            ended: self.ended.clone(),
            namespace: self.namespace.clone(),
            runtime: self.runtime.clone(),
            program: self.program.clone(),
            hold: ShimHold::new(&self.id, &self.hold.registry),
            uses: self.uses,
            adopted: self.adopted,
        }
    }

    /// Returns only the hold on the shim. The caller keeps the hold for as long as the shim has a container that could
    /// not be ended, so that the shim is not regarded as idle.
    pub fn into_hold(self) -> ShimHold {
        self.hold
    }

    /// Marks the shim as unusable because it has a container that it can't delete, both for all holders and on disk for
    /// the next plugin.
    pub(super) fn mark_unusable(&self) {
        self.set_unusable();
        let path = self.dir.join(UNUSABLE_FILE);
        if let Err(error) = create_private(&path) {
            tracing::warn!(path = %path.display(), %error, "could not mark a shim as unusable for the next plugin");
        }
    }

    /// Marks the shim as unusable in this process only, for all holders.
    pub(super) fn set_unusable(&self) {
        if let Some(shim) = lock_registry(&self.hold.registry).get_mut(&self.id) {
            shim.is_unusable = true;
        }
    }

    /// Returns whether the shim has a container that it can't delete. Such a shim gets no further tasks.
    pub(super) fn is_unusable(&self) -> bool {
        lock_registry(&self.hold.registry).get(&self.id).is_some_and(|shim| shim.is_unusable)
    }

    /// Returns whether there is exactly one hold on the shim in this process.
    pub fn has_single_hold(&self) -> bool {
        lock_registry(&self.hold.registry).get(&self.id).is_some_and(|shim| shim.holds == 1)
    }

    /// Releases the hold on the shim if there is a further one in this process. Returns whether the hold was released.
    pub(super) fn release_if_shared(&mut self) -> bool {
        self.hold.release_if_shared()
    }

    /// Shuts down a shim that has no containers but those that it can't delete, and removes its directory. A shim that
    /// does not exit is killed. Returns whether the shim is gone.
    ///
    /// If there are further holds on the shim, only this hold is released, and the result is `true`.
    pub async fn shut_down(mut self) -> bool {
        if self.release_if_shared() {
            return true;
        }
        if self.is_unusable() {
            // An unusable shim would accept the request and not exit.
            return self.kill_and_wait().await;
        }
        let refused = !self.has_ended() && self.client.shutdown(self.id.as_str()).await.is_err();
        if refused {
            self.pidfd.signal(libc::SIGKILL);
        }
        if tokio::time::timeout(EXIT_TIMEOUT, self.ended.wait_for(|ended| *ended)).await.is_err() {
            if self.adopted && !refused {
                // The shim has accepted the request and does not exit, so it has a container that this plugin does not
                // know.
                tracing::warn!(shim = %self.id, "a shim of an earlier plugin does not exit; it may hold a container");
                return false;
            }
            return self.kill_and_wait().await;
        }
        remove_dir(&self.dir);
        true
    }

    /// Kills the shim, even if it has containers, waits for its exit and removes its directory. Returns whether the
    /// shim is gone.
    pub(super) async fn kill_and_wait(mut self) -> bool {
        self.pidfd.signal(libc::SIGKILL);
        if tokio::time::timeout(EXIT_TIMEOUT, self.ended.wait_for(|ended| *ended)).await.is_err() {
            tracing::error!(shim = %self.id, "a shim survives SIGKILL");
            return false;
        }
        remove_dir(&self.dir);
        true
    }

    /// Kills the shim's process, even if it has containers. Its connection breaks, and the engine cleans up the
    /// containers, as for any dead shim.
    pub fn kill_process(&self) {
        self.pidfd.signal(libc::SIGKILL);
    }

    /// Kills an idle shim without asking it to shut down first, and removes its directory.
    pub fn kill_and_remove(self) {
        self.pidfd.signal(libc::SIGKILL);
        remove_dir(&self.dir);
    }
}

/// Removes a shim's directory. The files that the driver has made there are removed by their names, because listing the
/// directory needs a file descriptor, and the lack of descriptors may be the reason why the shim did not come up.
pub(super) fn remove_dir(dir: &Path) {
    if crate::failpoint::skip("shim-dir") {
        return;
    }
    let by_name = [SOCKET_FILE, LOG_FILE, PID_FILE, UNUSABLE_FILE]
        .iter()
        .try_for_each(|file| remove_file_if_exists(&dir.join(file)));
    let removed = by_name.and_then(|()| remove_dir_if_exists(dir)).or_else(|_| remove_dir_all_if_exists(dir));
    if let Err(error) = removed {
        tracing::warn!(dir = %dir.display(), %error, "could not remove the directory of a shim");
    }
}

/// Returns the end of a shim's log, which has the reason why the shim did not come up. The whole log may be too large
/// for this process's memory.
fn log_tail(log: &Path) -> io::Result<String> {
    let mut log = File::open(log)?;
    let length = log.metadata()?.len();
    log.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_MAX)))?;
    let mut bytes = Vec::new();
    log.take(LOG_TAIL_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Spawns a shim with the listening socket as descriptor 3 and the sealed copy of the runtime, if there is one, as
/// [`SEALED_FD`].
fn spawn_with_descriptors(
    command: &mut tokio::process::Command,
    listener: OwnedFd,
    sealed_copy: Option<OwnedFd>,
) -> io::Result<tokio::process::Child> {
    let raw = listener.as_raw_fd();
    let raw_copy = sealed_copy.as_ref().map_or(-1, AsRawFd::as_raw_fd);
    // SAFETY: between fork and exec only async-signal-safe calls are made, on descriptors that stay open until then
    // (`listener` and `sealed_copy` outlive the spawn). Descriptors 3 and 4 of this process are tokio's own (epoll and
    // the like), so std's error pipe is neither of them.
    unsafe {
        command.pre_exec(move || {
            if libc::dup2(raw, 3) < 0 {
                return Err(io::Error::last_os_error());
            }
            let mut first = 4;
            if raw_copy >= 0 {
                if libc::dup2(raw_copy, SEALED_FD) < 0 {
                    return Err(io::Error::last_os_error());
                }
                first = 5;
            }
            detach_session(first)
        });
    }
    let child = command.spawn();
    drop((listener, sealed_copy));
    child
}

fn duplicate_above(fd: &impl AsRawFd, lowest: i32) -> io::Result<OwnedFd> {
    // SAFETY: fcntl on a descriptor that is open; the result is a new descriptor with no other owner.
    let fd = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, lowest) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just created and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
