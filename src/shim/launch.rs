//! Starting a shim: its daemon stage is exec'ed directly with our listening socket as descriptor 3, which is the same
//! for every containerd from 1.6 to 2.4 (the `start` helper's three dialects are not needed).

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::{
        fd::{AsRawFd, FromRawFd as _, OwnedFd},
        unix::{fs::PermissionsExt as _, net::UnixListener},
    },
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
    found::Identity,
    held::{Held, Holders, holders},
    pool::ShimScope,
    sealed::{Current, DESCRIPTOR, Sealed},
    version,
};
use crate::{
    ids::random_hex,
    places::{Places, create_private, make_dir, write_private},
    process::{Pid, PidFd, ProcessId, async_command, boot_id, set_apart, start_anew},
};

/// A shim that was asked to end does so in about 2 ms.
pub(super) const END: Duration = Duration::from_secs(5);
/// How much of its log is shown of a shim that did not come up.
const LAST_WORDS_MAX: u64 = 4 << 10;
/// In a shim's directory: who it is, so that another instance of us finds it again.
pub(super) const PID: &str = "pid";
/// There, too: where it listens.
const SOCKET: &str = "sock";
/// There, too: what it has to say.
const LOG: &str = "log";
/// In a shim's directory: it holds a container that it can't delete.
pub(super) const UNUSABLE: &str = "unusable";

/// How shims are started.
#[derive(Debug)]
pub struct Launcher {
    binary: PathBuf,
    namespace: String,
    scope: ShimScope,
    pub(super) places: Places,
    /// `cgroup.procs` of the group that shims belong in, one for each hierarchy.
    cgroup: Vec<PathBuf>,
    /// The service this binary turned out to serve: 0 unknown, 2, 3.
    api: AtomicU8,
    own: Holders,
    runtime: Current,
    calls: RuntimeCalls,
}

/// The name of a shim that is not there yet.
#[derive(Debug)]
pub struct Unborn {
    id: String,
    held: Held,
    /// A program other than the launcher's own.
    program: Option<PathBuf>,
}

impl Unborn {
    /// The name it will have.
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// A running shim, started by us or by an earlier instance of us. Its directory goes with `end`.
#[derive(Debug)]
pub struct Shim {
    pub(super) id: String,
    pub(super) pid: u32,
    pub(super) dir: PathBuf,
    pub(super) client: Client,
    pub(super) pidfd: Arc<PidFd>,
    pub(super) ended: watch::Receiver<bool>,
    pub(super) namespace: String,
    pub(super) held: Held,
    /// The program that it has a sealed copy of.
    pub(super) runtime: Option<PathBuf>,
    /// Its own program, where that is not the launcher's.
    pub(super) program: Option<PathBuf>,
    /// How many containers it has had.
    pub(super) uses: u32,
    /// Was it started by an earlier instance of us?
    pub(super) adopted: bool,
}

/// A shim's process, not spoken to yet.
struct Spawned {
    child: tokio::process::Child,
    pid: u32,
    coming: Coming,
    runtime: Option<PathBuf>,
}

/// A shim that is coming up. It goes when nobody waits for that any more.
struct Coming {
    pidfd: Arc<PidFd>,
    dir: PathBuf,
    is_up: bool,
}

impl Drop for Coming {
    fn drop(&mut self) {
        if !self.is_up {
            self.pidfd.signal(libc::SIGKILL);
            remove_dir(&self.dir);
        }
    }
}

impl Launcher {
    /// Shims from `binary`, in `namespace`, each with a directory below `places`.
    pub fn new(binary: PathBuf, namespace: String, scope: ShimScope, places: Places, cgroup: Vec<PathBuf>) -> Self {
        Self {
            binary,
            namespace,
            scope,
            places,
            cgroup,
            api: AtomicU8::new(0),
            own: Holders::default(),
            runtime: Current::default(),
            calls: RuntimeCalls::default(),
        }
    }

    /// Says what an operator should know of this shim, where tasks are to share it.
    pub async fn warn(&self) {
        if self.scope != ShimScope::Task {
            version::warn_of_queues(&self.binary).await;
        }
    }

    /// The program.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// How many threads of a shim run Go code at a time. With one, a task's shim takes a quarter less memory and a fifth
    /// less time over a task (docs/decisions/010); what waits in the kernel is not counted. Shared ones get as many as
    /// containerd gives them.
    fn processors(&self, program: Option<&Path>) -> &'static str {
        match self.scope {
            // As gVisor's starts itself.
            _ if program.is_some() => "2",
            ShimScope::Task => "1",
            ShimScope::Alloc | ShimScope::Node => "4",
        }
    }

    /// The namespace that ends up below the runtimes' state roots.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The calls in which its shims run a runtime.
    pub fn calls(&self) -> &RuntimeCalls {
        &self.calls
    }

    /// New shims get this copy of a runtime.
    pub fn hand_out(&self, sealed: Sealed) {
        self.runtime.set(sealed);
    }

    /// Names of the shims that somebody in this process holds.
    pub fn own(&self) -> HashSet<String> {
        holders(&self.own).keys().cloned().collect()
    }

    /// How many in this process hold this one.
    pub(super) fn holders_of(&self, id: &str) -> usize {
        holders(&self.own).get(id).map_or(0, |holding| holding.count)
    }

    /// Says that somebody here is about to take this one over.
    pub fn hold(&self, id: &str) -> Held {
        Held::new(id, &self.own)
    }

    /// A name for a shim that will be launched: it can be noted before there is anything.
    pub fn name(&self) -> Unborn {
        let id = random_hex(6);
        let held = self.hold(&id);
        Unborn { id, held, program: None }
    }

    /// The same for a shim of another kind, whose program this is.
    pub fn name_of(&self, program: &Path) -> Unborn {
        Unborn { program: Some(program.to_owned()), ..self.name() }
    }

    /// What a shim of this kind is likely to serve.
    pub(super) fn hint(&self, program: Option<&Path>) -> Option<TaskApi> {
        match self.api.load(Ordering::Relaxed) {
            _ if program.is_some() => None,
            2 => Some(TaskApi::V2),
            3 => Some(TaskApi::V3),
            _ => None,
        }
    }

    /// Starts a shim and waits until it answers.
    ///
    /// # Errors
    /// When it can't be started or does not answer; nothing is left behind then, nor when this is dropped.
    pub async fn launch(self: &Arc<Self>, unborn: Unborn) -> Result<Shim, ShimError> {
        let Unborn { id, held, program } = unborn;
        let dir = self.places.shim(&id);
        let this = self.clone();
        let (spawn_id, spawn_dir, spawn_program) = (id.clone(), dir.clone(), program.clone());
        let spawned =
            tokio::task::spawn_blocking(move || this.spawn(&spawn_id, &spawn_dir, spawn_program.as_deref())).await;
        let spawned = spawned.unwrap_or_else(|join| {
            Err(ShimError::Spawn { binary: self.binary.clone(), source: io::Error::other(join) })
        });
        let Spawned { mut child, pid, mut coming, runtime } = match spawned {
            Ok(spawned) => spawned,
            Err(error) => {
                remove_dir(&dir);
                return Err(error);
            }
        };
        let (tell, ended) = watch::channel(false);
        tokio::spawn(async move {
            // Our child: reaped the moment it dies, and everybody who waits for its end is told.
            if let Err(error) = child.wait().await {
                tracing::warn!(%error, "a shim could not be waited for");
            }
            tell.send_replace(true);
        });
        match Client::connect_to_starting(&dir.join(SOCKET), self.hint(program.as_deref())).await {
            Ok(client) => {
                if program.is_none() {
                    self.api.store(if client.api() == TaskApi::V2 { 2 } else { 3 }, Ordering::Relaxed);
                }
                coming.is_up = true;
                Ok(Shim {
                    id,
                    pid,
                    dir,
                    client: client.counted_in(&self.calls),
                    pidfd: coming.pidfd.clone(),
                    ended,
                    namespace: self.namespace.clone(),
                    held,
                    runtime,
                    program,
                    uses: 0,
                    adopted: false,
                })
            }
            Err(error) => {
                let log = last_words(&dir.join(LOG)).unwrap_or_default();
                tracing::warn!(shim = id, log = log.trim(), "a shim did not come up");
                Err(error)
            }
        }
    }

    fn spawn(&self, id: &str, dir: &Path, program: Option<&Path>) -> Result<Spawned, ShimError> {
        let binary = program.unwrap_or(&self.binary);
        let failed = |doing, path: &Path| {
            let (id, path) = (id.to_owned(), path.to_owned());
            move |source| ShimError::File { id, doing, path, source }
        };
        make_dir(dir).map_err(failed("create", dir))?;
        let (socket, log) = (dir.join(SOCKET), dir.join(LOG));
        let listener = UnixListener::bind(&socket).map_err(failed("listen at", &socket))?;
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o600)).map_err(failed("protect", &socket))?;
        // A plain file: a FIFO would need a reader for the shim's whole life. The shim opens it by this name itself.
        let log_file = create_private(&log).map_err(failed("create", &log))?;
        let mut command = async_command(binary);
        command
            .args(["-namespace", &self.namespace, "-id", id, "-address"])
            .arg(self.places.run())
            .current_dir(dir)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("GOMAXPROCS", self.processors(program))
            .env("TTRPC_ADDRESS", "")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file)
            .kill_on_drop(false);
        // Well above 3, so that making descriptor 3 in the child can't close it.
        let listener = duplicate_above(&listener, 10).map_err(failed("keep", &socket))?;
        let raw = listener.as_raw_fd();
        let sealed = self.runtime.get().filter(|_| program.is_none());
        let copy = match &sealed {
            None => None,
            Some(sealed) => Some(duplicate_above(&sealed.fd, 10).map_err(failed("keep", &sealed.path))?),
        };
        let raw_copy = copy.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let runtime = sealed.as_ref().map(|sealed| sealed.path.clone());
        // SAFETY: between fork and exec only async-signal-safe calls are made, on descriptors that stay open until
        // then (`listener` and `copy` outlive the spawn). The runtime's own epoll descriptor and the like occupy 3 and
        // 4 in this process, so std's error pipe is not there.
        unsafe {
            command.pre_exec(move || {
                if libc::dup2(raw, 3) < 0 {
                    return Err(io::Error::last_os_error());
                }
                let mut first = 4;
                if raw_copy >= 0 {
                    if libc::dup2(raw_copy, DESCRIPTOR) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                    first = 5;
                }
                start_anew(first)
            });
        }
        let mut child = command.spawn().map_err(|source| ShimError::Spawn { binary: binary.to_owned(), source })?;
        drop((listener, copy));
        let pid = Pid::of_child(&child).map_err(failed("watch", dir))?;
        // Before it can be found: whoever adopts it takes it as it is.
        set_apart(pid, &self.cgroup);
        let pid = pid.get();
        let named = PidFd::open(pid).and_then(|pidfd| {
            let (process, boot, namespace) = (ProcessId::of(pid)?, boot_id()?, self.namespace.clone());
            write_private(
                &dir.join(PID),
                &serde_json::to_vec(&Identity {
                    process,
                    boot,
                    namespace,
                    runtime: runtime.clone(),
                    program: program.map(Path::to_owned),
                })?,
            )?;
            Ok(pidfd)
        });
        let pidfd = named.inspect_err(|_| drop(child.start_kill())).map_err(failed("watch", dir))?;
        let coming = Coming { pidfd: Arc::new(pidfd), dir: dir.to_owned(), is_up: false };
        Ok(Spawned { child, pid, coming, runtime })
    }
}

impl Shim {
    /// Its name, which is its directory's.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Calls go through this.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// By what name it finds this runtime: its own sealed copy, if it has one of it.
    pub fn runtime(&self, binary: &Path) -> PathBuf {
        if self.runtime.as_deref() == Some(binary) {
            format!("/proc/{}/fd/{DESCRIPTOR}", self.pid).into()
        } else {
            binary.to_owned()
        }
    }

    /// Is it of another kind than those that wait for tasks?
    pub fn is_of_another_kind(&self) -> bool {
        self.program.is_some()
    }

    /// Has it died? Asked of the kernel: who waits for it may not have been told yet.
    pub fn has_ended(&self) -> bool {
        *self.ended.borrow() || self.pidfd.has_ended()
    }

    /// Returns when it has died.
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.ended.clone()
    }

    /// Another hold on the same shim, for another container.
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
            held: Held::new(&self.id, &self.held.own),
            uses: self.uses,
            adopted: self.adopted,
        }
    }

    /// Only the hold on it, for as long as it has a container that could not be ended: nobody takes it for idle meanwhile.
    pub fn into_hold(self) -> Held {
        self.held
    }

    /// Says that it holds a container which it can't delete, to all who hold it and to the next plugin.
    pub(super) fn mark_unusable(&self) {
        self.note_unusable();
        let path = self.dir.join(UNUSABLE);
        if let Err(error) = create_private(&path) {
            tracing::warn!(path = %path.display(), %error, "the next plugin will not know that this shim can't be used again");
        }
    }

    /// Notes what an earlier plugin has found out.
    pub(super) fn note_unusable(&self) {
        if let Some(holding) = holders(&self.held.own).get_mut(&self.id) {
            holding.is_unusable = true;
        }
    }

    /// Does it hold a container that it can't delete? Then it is of no use to further tasks.
    pub(super) fn is_unusable(&self) -> bool {
        holders(&self.held.own).get(&self.id).is_some_and(|holding| holding.is_unusable)
    }

    /// Is this the only hold on it here?
    pub fn is_held_once(&self) -> bool {
        holders(&self.held.own).get(&self.id).is_some_and(|holding| holding.count == 1)
    }

    /// Lets go of it if somebody else here holds it, too: true then.
    pub(super) fn leave_to_others(&mut self) -> bool {
        self.held.leave_to_others()
    }

    /// Ends a shim that holds no container, or none but those that it can't delete, by force if it does not go, and removes its
    /// directory: true when it is gone.
    ///
    /// One that others hold, too, is left to them.
    pub async fn end(mut self) -> bool {
        if self.leave_to_others() {
            return true;
        }
        if self.is_unusable() {
            // It would say yes and stay.
            return self.end_by_force().await;
        }
        let refused = !self.has_ended() && self.client.shutdown(&self.id).await.is_err();
        if refused {
            self.pidfd.signal(libc::SIGKILL);
        }
        if tokio::time::timeout(END, self.ended.wait_for(|ended| *ended)).await.is_err() {
            if self.adopted && !refused {
                // It says yes and stays: then it holds a container that nobody here knows of.
                tracing::warn!(shim = self.id, "a shim of an earlier plugin does not end; it may hold a container");
                return false;
            }
            return self.end_by_force().await;
        }
        remove_dir(&self.dir);
        true
    }

    /// Ends a shim with SIGKILL, whatever it holds, and removes its directory: true when it is gone.
    pub(super) async fn end_by_force(mut self) -> bool {
        self.pidfd.signal(libc::SIGKILL);
        if tokio::time::timeout(END, self.ended.wait_for(|ended| *ended)).await.is_err() {
            tracing::error!(shim = self.id, "it survives SIGKILL");
            return false;
        }
        remove_dir(&self.dir);
        true
    }

    /// Ends the shim's process, whatever it holds: its connection breaks, and the rest is the dead-shim case.
    pub fn kill_process(&self) {
        self.pidfd.signal(libc::SIGKILL);
    }

    /// Ends an idle shim at once, without asking: for a plugin that is told to leave.
    pub fn kill(self) {
        self.pidfd.signal(libc::SIGKILL);
        remove_dir(&self.dir);
    }
}

/// Removes a shim's directory. The files that the driver has made there are removed by their names, since a listing needs a
/// descriptor, and the want of those may be the reason why the shim did not come up.
pub(super) fn remove_dir(dir: &Path) {
    if crate::fault::skipped("shim-dir") {
        return;
    }
    let by_name = [SOCKET, LOG, PID, UNUSABLE].iter().try_for_each(|file| absent(fs::remove_file(dir.join(file))));
    let removed = by_name.and_then(|()| absent(fs::remove_dir(dir))).or_else(|_| absent(fs::remove_dir_all(dir)));
    if let Err(error) = removed {
        tracing::warn!(dir = %dir.display(), %error, "a shim's directory stays");
    }
}

/// What was removed, or was not there.
fn absent(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The end of a shim's log, where it says why it gave up. All of it may be more than this process should hold.
fn last_words(log: &Path) -> io::Result<String> {
    let mut log = File::open(log)?;
    let length = log.metadata()?.len();
    log.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS_MAX)))?;
    let mut bytes = Vec::new();
    log.take(LAST_WORDS_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn duplicate_above(fd: &impl AsRawFd, lowest: i32) -> io::Result<OwnedFd> {
    // SAFETY: fcntl on a descriptor that is open; the result is a new descriptor that nobody else has.
    let fd = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, lowest) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
