//! Identifies, starts and watches processes.
//!
//! A pid alone may belong to another process later. A process is therefore identified by its pid and start time on
//! disk, and by a pidfd while this process runs.

use std::{
    ffi::OsStr,
    fmt, fs, io,
    num::NonZeroU32,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Output, Stdio},
    ptr,
    sync::OnceLock,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit, setrlimit},
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _, Interest, unix::AsyncFd};

/// The number of bytes of each output stream of a program that are kept. Versions, answers and errors have a few
/// kilobytes.
const OUTPUT_MAX: u64 = 256 << 10;

/// The interval at which a process that can't be watched or opened is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Returns the kernel's id of this boot (random(4)). Pids and start times of another boot mean nothing.
///
/// # Errors
/// Fails when the id can't be read.
pub fn boot_id() -> io::Result<String> {
    if let Some(boot) = crate::failpoint::boot_id() {
        return Ok(boot);
    }
    static BOOT: OnceLock<String> = OnceLock::new();
    if let Some(boot) = BOOT.get() {
        return Ok(boot.clone());
    }
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(BOOT.get_or_init(|| text.trim().to_owned()).clone())
}

/// The soft limit on file descriptors that this process was started with; not set before [`raise_descriptor_limit`] was
/// called.
static ORIGINAL_DESCRIPTOR_LIMIT: OnceLock<libc::rlim_t> = OnceLock::new();

/// Raises the soft limit on file descriptors to the hard limit: each task needs three, and agents are often started
/// with a limit of 1024. Programs that this process executes get the old limit back.
pub fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        ORIGINAL_DESCRIPTOR_LIMIT.get_or_init(|| soft);
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "could not raise the limit on file descriptors");
    }
}

/// Returns the soft limit on file descriptors that executed programs get, if it differs from this process's own.
pub fn inherited_descriptor_limit() -> Option<u64> {
    ORIGINAL_DESCRIPTOR_LIMIT.get().copied()
}

/// Sets the soft limit on file descriptors that this process was started with, in a forked child before it executes a
/// program. Safe between fork and exec.
fn restore_descriptor_limit() {
    if let Some(&soft) = ORIGINAL_DESCRIPTOR_LIMIT.get() {
        let _ = getrlimit(Resource::RLIMIT_NOFILE)
            .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, soft.min(hard), hard));
    }
}

/// Gives a forked child a session of its own and marks all its descriptors from `first` on as close-on-exec, including
/// those that this process has inherited from the agent. Safe between fork and exec.
///
/// # Errors
/// Fails as setsid(2) does.
pub fn detach_session(first: libc::c_uint) -> io::Result<()> {
    // SAFETY: neither call accesses memory.
    unsafe {
        if libc::setsid() < 0 {
            return Err(io::Error::last_os_error());
        }
        // Kernels before 5.11 don't know the flag and answer EINVAL. That is fine: this driver opens every descriptor
        // as close-on-exec.
        libc::close_range(first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed());
    }
    Ok(())
}

/// Returns a command whose program starts with default signal dispositions and no signal blocked, however this process
/// was started, and with the limit on file descriptors that this process was started with. A large limit is a problem
/// for programs that close all descriptors up to their limit, or that use select(2).
///
/// The driver starts every program by this function or [`async_command`], because ignored and blocked signals survive
/// execve(2) and would reach tasks through a shim and a runtime. An agent that was started by `nohup` ignores SIGHUP, a
/// script's `&` leaves SIGINT ignored, and glibc's posix_spawn(3), which std prefers where it can, leaves signal 32
/// ignored in every child (glibc sysdeps/unix/sysv/linux/spawni.c, `__spawni_child`).
pub fn command(program: impl AsRef<OsStr>) -> std::process::Command {
    let mut command = std::process::Command::new(program);
    // SAFETY: between fork and exec, the closure makes only system calls and writes no memory.
    unsafe {
        command.pre_exec(|| {
            reset_signals();
            restore_descriptor_limit();
            Ok(())
        });
    }
    command
}

/// Returns the same as [`command`], for a caller that waits for the program without blocking its thread.
pub fn async_command(program: impl AsRef<OsStr>) -> tokio::process::Command {
    command(program).into()
}

/// Sets the default dispositions of all signals and an empty signal mask, in a forked child before it executes a
/// program. Safe between fork and exec.
fn reset_signals() {
    /// A `struct sigaction`: all zeros mean SIG_DFL without flags. It is at least as large as the kernel's struct on
    /// every architecture.
    const DEFAULT: [u64; 8] = [0; 8];
    /// Size of the kernel's signal set, which has 64 bits (rt_sigaction(2)).
    const SET_SIZE: usize = size_of::<u64>();
    const LAST_SIGNAL: libc::c_int = 64;
    for number in 1..=LAST_SIGNAL {
        // This is a system call because the C library's functions refuse 32 and 33, which the library uses itself. The
        // kernel refuses SIGKILL and SIGSTOP, which always have their defaults.
        // SAFETY: the kernel reads a struct that lives until the call returns, and writes nothing.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, number, DEFAULT.as_ptr(), ptr::null_mut::<u64>(), SET_SIZE);
        }
    }
    unblock_signals();
}

/// Unblocks all signals in this thread and in the threads that it starts later. A signal that the parent process had
/// blocked would never arrive, such as the SIGTERM by which an agent's service is stopped.
pub fn unblock_signals() {
    let none: u64 = 0;
    // SAFETY: the kernel reads 8 bytes that live until the call returns, and writes nothing.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            ptr::from_ref(&none),
            ptr::null_mut::<u64>(),
            size_of::<u64>(),
        );
    }
}

/// A pid, which is never 0: in `cgroup.procs` and for many system calls, 0 means the calling process (cgroups(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pid(NonZeroU32);

impl Pid {
    /// Returns the pid of a child that has not been waited for.
    ///
    /// # Errors
    /// Fails when the child was waited for already: its pid may belong to another process by now.
    pub fn of_child(child: &tokio::process::Child) -> io::Result<Self> {
        let reaped = || io::Error::other("the process that was just started has been waited for already");
        child.id().and_then(NonZeroU32::new).map(Self).ok_or_else(reaped)
    }

    /// Returns the pid as a plain number.
    pub fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Moves a helper process that is to outlive this one out of the agent's cgroup, so that stopping the agent's service
/// does not end it, and makes the kernel's OOM killer prefer the helper to this process. `procs` are the `cgroup.procs`
/// files of the helper's new cgroup, one for each hierarchy.
pub fn detach_from_agent(pid: Pid, procs: &[PathBuf]) {
    for procs in procs {
        if let Err(error) = fs::write(procs, pid.to_string()) {
            tracing::warn!(path = %procs.display(), %error, "could not move a process out of the agent's cgroup");
        }
    }
    let own = fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|text| text.trim().parse::<i32>().ok());
    if let Some(own) = own {
        let score = (own + 1).min(1000).to_string();
        if let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), score) {
            tracing::debug!(%error, "could not raise a process's OOM score");
        }
    }
}

/// The identity of a process of this boot: a later process with the same pid has another start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The pid on the host.
    pub pid: u32,
    /// When the process was started, in clock ticks since the boot (proc_pid_stat(5), field 22).
    pub start: u64,
}

impl ProcessId {
    /// Returns the identity of the process that has this pid now.
    ///
    /// # Errors
    /// Fails when there is no such process, or it is a zombie; when its status can't be read.
    pub fn of(pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (state, start) = parse_stat(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        if matches!(state, "Z" | "X") {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Self { pid, start })
    }

    /// Returns the identity of a process that ended before its start time could be read. The identity matches no later
    /// process that gets the same pid, since only the kernel's first threads start at tick 0.
    pub fn ended(pid: u32) -> Self {
        Self { pid, start: 0 }
    }

    /// Returns whether the process has certainly ended. A failure to read its status is no proof of that.
    pub fn is_gone(&self) -> bool {
        match Self::of(self.pid) {
            Ok(now) => now != *self,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    /// Returns whether the process that has this identity still runs.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == *self)
    }
}

/// Returns the state and the start time of a process from its `stat` file. The name in parentheses may itself contain
/// blanks and parentheses.
fn parse_stat(text: &str) -> Option<(&str, u64)> {
    let (_, rest) = text.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    // The state is field 3, so the start time is the 19th after it.
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// Returns the pid of a process's parent.
///
/// # Errors
/// Fails when there is no such process, or its status can't be read.
pub fn parent_of(pid: u32) -> io::Result<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let parent = text.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
    parent.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// A descriptor of one process, which stays valid when the pid is reused (pidfd_open(2), Linux 5.3).
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens the process that has this pid now. For a child of this process that is the child itself, whose pid is not
    /// reused until it is waited for.
    ///
    /// # Errors
    /// Fails as pidfd_open(2) does.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: pidfd_open takes a number and flags, and returns a new close-on-exec descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the descriptor was just created, and nothing else uses it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Opens the process that has this identity.
    ///
    /// # Errors
    /// Fails as pidfd_open(2) does; `NotFound` when the process has ended.
    pub fn of(process: &ProcessId) -> io::Result<Self> {
        // If the pid belongs to another process's thread by now, pidfd_open fails with EINVAL (ENOENT on newer kernels).
        let gone_or = |error| if process.is_gone() { io::ErrorKind::NotFound.into() } else { error };
        let fd = Self::open(process.pid).map_err(gone_or)?;
        // The identity is read after the descriptor was opened: if the process still runs now, the descriptor names it.
        // A failure to read it does not mean that the process has ended.
        match ProcessId::of(process.pid) {
            Ok(now) if now == *process => Ok(fd),
            Ok(_) => Err(io::ErrorKind::NotFound.into()),
            Err(error) => Err(error),
        }
    }

    /// Opens the process that has this identity, or returns `None` if it has ended. While neither is known, for lack of
    /// descriptors or memory, the call does not return.
    pub async fn of_when_known(process: &ProcessId) -> Option<Self> {
        when_known(process, || Self::of(process)).await
    }

    /// Sends a signal. Does nothing if the process has ended.
    pub fn signal(&self, number: i32) {
        // SAFETY: sends a signal to the process that the descriptor names; no memory is passed. ESRCH, for a process
        // that has ended, is ignored.
        unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), number, std::ptr::null::<u8>(), 0);
        }
    }

    /// Returns whether the process has ended (pidfd_open(2): the descriptor is readable then).
    pub fn has_ended(&self) -> bool {
        self.ends_within(Duration::ZERO)
    }

    /// Blocks until the process has ended, but no longer than `limit`, and returns whether it has ended.
    pub fn ends_within(&self, limit: Duration) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd as _;
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                // The signal may be the SIGCHLD of this very process.
                Err(Errno::EINTR) if !left.is_zero() => {}
                polled => return polled.is_ok_and(|ready| ready > 0),
            }
        }
    }

    /// Waits until the process has ended. A process that can't be watched, for lack of descriptors, is polled.
    pub async fn wait_for_end(&self) {
        let watched = async { self.watch()?.readable().await.map(drop) };
        if watched.await.is_err() {
            self.poll_for_end().await;
        }
    }

    /// Polls the process until it has ended. This needs no further descriptor.
    async fn poll_for_end(&self) {
        while !self.has_ended() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Registers the process, so that the caller can wait for its end: the descriptor becomes readable then.
    ///
    /// # Errors
    /// Fails when no further descriptor can be had.
    pub fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let own = self.0.try_clone()?;
        // SAFETY: the AsyncFd owns the OwnedFd, which stays open and unchanged for as long.
        Ok(unsafe { AsyncFd::register_with_interest(own, Interest::READABLE) }?)
    }
}

/// Calls `open` until it opens the process, or finds out that the process has ended.
async fn when_known<T>(process: &ProcessId, open: impl Fn() -> io::Result<T>) -> Option<T> {
    let mut is_logged = false;
    loop {
        match none_if_vanished(open()) {
            Ok(found) => return found,
            Err(error) if !is_logged => {
                tracing::warn!(pid = process.pid, %error, "could not open a process; trying again");
                is_logged = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Finds an executable program by its path, or by its name in the directories of PATH.
pub fn which(program: &Path) -> Option<PathBuf> {
    let executable = |path: &Path| {
        use std::os::unix::fs::PermissionsExt as _;
        fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    if program.components().count() > 1 {
        return executable(program).then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|path| executable(path))
}

/// Runs a program to its end and keeps the beginning of what it prints. The pipe of a program that prints more is
/// closed, so that endless output takes no memory.
///
/// # Errors
/// Fails when the program can't be started, or its pipes can't be read.
pub async fn bounded_output(command: &mut tokio::process::Command) -> io::Result<Output> {
    async fn beginning(pipe: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            pipe.take(OUTPUT_MAX).read_to_end(&mut bytes).await?;
        }
        Ok(bytes)
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (stdout, stderr) = (beginning(child.stdout.take()), beginning(child.stderr.take()));
    let (stdout, stderr, status) = tokio::try_join!(stdout, stderr, child.wait())?;
    Ok(Output { status, stdout, stderr })
}

/// Returns whether reading a file below `/proc/<pid>` failed because the process has ended (proc(5)). Any other
/// failure, such as a lack of descriptors or memory, says nothing about the process.
pub fn has_vanished(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Returns whether an operation that failed with this error can succeed later by itself, once other operations have
/// freed descriptors or memory.
pub fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN | libc::EINTR | libc::ENOBUFS)
    )
}

/// Turns the error of reading a file below `/proc/<pid>` into `None` if the process has ended.
///
/// # Errors
/// Returns every other error: whether the process has ended is not known then.
pub fn none_if_vanished<T>(looked: io::Result<T>) -> io::Result<Option<T>> {
    match looked {
        Ok(seen) => Ok(Some(seen)),
        Err(error) if has_vanished(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns the pids of a process and all its living descendants, the process itself first. Descendants that were
/// reparented, because their parent has ended, are not found.
///
/// # Errors
/// Fails when `/proc` can't be read: there may be more descendants then.
pub fn descendants(pid: u32) -> io::Result<Vec<u32>> {
    crate::failpoint::fail_lookup("descendants")?;
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(&pid) = all.get(next) {
        next += 1;
        let Some(threads) = none_if_vanished(fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task")))?
        else {
            continue;
        };
        for thread in threads {
            let Some(thread) = none_if_vanished(thread)? else { break };
            let Some(children) = none_if_vanished(fs::read_to_string(thread.path().join("children")))? else {
                continue;
            };
            all.extend(children.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
    }
    Ok(all)
}

/// Returns the pids of all processes.
///
/// # Errors
/// Fails when `/proc` can't be listed.
pub fn all_pids() -> io::Result<Vec<u32>> {
    crate::failpoint::fail_lookup("processes")?;
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")? {
        all.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_blanks_and_parentheses_do_not_confuse() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(parse_stat(&format!("12 (a) b (c) {tail}")), Some(("S", 4711)));
        assert_eq!(parse_stat("12 (sh"), None);
    }

    #[test]
    fn another_process_with_the_same_pid_is_not_taken_for_it() {
        let me = ProcessId::of(std::process::id()).expect("this process");
        assert!(me.is_alive() && PidFd::of(&me).is_ok());
        let other = ProcessId { start: me.start + 1, ..me };
        assert!(!other.is_alive() && PidFd::of(&other).is_err());
    }

    #[test]
    fn only_a_process_that_has_ended_is_taken_for_gone() {
        for number in [libc::ENOENT, libc::ESRCH] {
            let looked = none_if_vanished(Err::<(), _>(io::Error::from_raw_os_error(number)));
            assert_eq!(looked.expect("the process has ended"), None);
        }
        for number in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EIO, libc::EACCES] {
            none_if_vanished(Err::<(), _>(io::Error::from_raw_os_error(number))).expect_err("nothing is known");
        }
        for (number, passing) in [(libc::EMFILE, true), (libc::ENOMEM, true), (libc::EIO, false), (libc::ENOENT, false)]
        {
            assert_eq!(is_transient(&io::Error::from_raw_os_error(number)), passing);
        }
    }

    /// A pid may be used again for a thread, whose pidfd can't be opened.
    #[test]
    fn a_thread_with_the_same_pid_is_not_taken_for_the_process() {
        let (_hold, held) = std::sync::mpsc::channel::<()>();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            sender.send(nix::unistd::gettid()).expect("sent");
            held.recv().ok();
        });
        let thread = receiver.recv().expect("the thread runs").as_raw().unsigned_abs();
        let earlier = ProcessId { pid: thread, start: 1 };
        assert!(has_vanished(&PidFd::of(&earlier).expect_err("gone")));
    }

    /// Without descriptors, it is not known whether a process has ended.
    #[tokio::test]
    async fn a_process_that_can_not_be_opened_is_not_taken_for_gone() {
        let process = ProcessId::of(std::process::id()).expect("this process");
        let tries = std::cell::Cell::new(0);
        let opened = when_known(&process, || {
            tries.set(tries.get() + 1);
            if tries.get() < 5 { Err(io::Error::from_raw_os_error(libc::EMFILE)) } else { PidFd::of(&process) }
        });
        assert!(opened.await.is_some());
        assert_eq!(tries.get(), 5);
        assert!(PidFd::of_when_known(&ProcessId::ended(process.pid)).await.is_none());
    }

    #[tokio::test]
    async fn the_end_of_a_process_is_noticed_without_a_watch() {
        let mut child = async_command("sleep").arg("600").kill_on_drop(true).spawn().expect("started");
        let pidfd = PidFd::open(child.id().expect("it runs")).expect("opened");
        let early = tokio::time::timeout(4 * POLL_INTERVAL, pidfd.poll_for_end()).await;
        early.expect_err("it has not ended");
        child.start_kill().expect("killed");
        tokio::join!(pidfd.poll_for_end(), pidfd.wait_for_end());
        assert!(!child.wait().await.expect("waited for").success());
    }

    #[tokio::test]
    async fn only_the_beginning_of_an_output_is_kept() {
        let shell = |script: &str| {
            let mut command = tokio::process::Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let small = bounded_output(&mut shell("echo out; echo err >&2; exit 3")).await.expect("runs");
        assert_eq!(
            (&small.stdout[..], &small.stderr[..], small.status.code()),
            (&b"out\n"[..], &b"err\n"[..], Some(3))
        );
        // These programs end only because their pipes are closed.
        let endless = bounded_output(&mut shell("yes >&2 & exec yes")).await.expect("runs");
        let kept = usize::try_from(OUTPUT_MAX).expect("a small number");
        assert_eq!((endless.stdout.len(), endless.stderr.len()), (kept, kept));
    }

    /// A pid of 0 would make a caller move this process itself.
    #[tokio::test]
    async fn a_child_that_was_waited_for_has_no_pid() {
        let mut child = tokio::process::Command::new("true").spawn().expect("spawned");
        let number = child.id().expect("not waited for");
        assert_eq!(Pid::of_child(&child).expect("a pid").get(), number);
        child.wait().await.expect("waited for");
        Pid::of_child(&child).expect_err("no pid any more");
    }

    #[tokio::test]
    async fn the_end_of_a_process_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().expect("spawned");
        let fd = PidFd::open(child.id()).expect("opened");
        assert!(tokio::time::timeout(Duration::from_millis(50), fd.wait_for_end()).await.is_err());
        assert!(!fd.has_ended());
        fd.signal(libc::SIGKILL);
        tokio::time::timeout(Duration::from_secs(10), fd.wait_for_end()).await.expect("in time");
        assert!(fd.has_ended());
        child.wait().expect("reaped");
        assert!(ProcessId::of(child.id()).is_err());
    }
}
