//! Processes, named so that a reused pid deceives nobody: by pid and start time on disk, by pidfd while we live.

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
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _, Interest, unix::AsyncFd};

/// How much of each output stream of a program is kept. Versions, answers and errors are kilobytes.
const OUTPUT_MAX: u64 = 256 << 10;

/// The kernel's name for this boot: pids and start times of another one mean nothing (random(4)).
///
/// # Errors
/// When the kernel does not tell.
pub fn boot_id() -> io::Result<String> {
    if let Some(boot) = crate::fault::boot_id() {
        return Ok(boot);
    }
    static BOOT: OnceLock<String> = OnceLock::new();
    if let Some(boot) = BOOT.get() {
        return Ok(boot.clone());
    }
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(BOOT.get_or_init(|| text.trim().to_owned()).clone())
}

/// The soft limit on descriptors that this process was started with.
static DESCRIPTORS: OnceLock<libc::rlim_t> = OnceLock::new();

/// Raises the soft limit on descriptors to the hard one: each task takes three, and agents are often started with 1024.
/// What we start gets the old limit back.
pub fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        DESCRIPTORS.get_or_init(|| soft);
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit on descriptors stays as it is");
    }
}

/// The soft limit on descriptors that what we start inherits, where it is not our own.
pub fn inherited_descriptor_limit() -> Option<u64> {
    DESCRIPTORS.get().copied()
}

/// Gives a process that is about to be exec'ed the limit that we were started with. Safe between fork and exec.
fn restore_descriptor_limit() {
    if let Some(&soft) = DESCRIPTORS.get() {
        let _ = getrlimit(Resource::RLIMIT_NOFILE)
            .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, soft.min(hard), hard));
    }
}

/// Gives a process that is about to be exec'ed a session of its own and no descriptor from `first` on, not even of those
/// that we have inherited from the agent. Safe between fork and exec.
///
/// # Errors
/// As setsid(2).
pub fn start_anew(first: libc::c_uint) -> io::Result<()> {
    // SAFETY: two calls that touch no memory.
    unsafe {
        if libc::setsid() < 0 {
            return Err(io::Error::last_os_error());
        }
        // Kernels before 5.11 don't know the flag and answer EINVAL; everything of ours is close-on-exec from birth.
        libc::close_range(first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed());
    }
    Ok(())
}

/// A program that starts with default signal dispositions and no signal blocked, whatever this process was started with,
/// and with the limit on descriptors that this process was started with: programs that close all descriptors up to their
/// limit, or that use select(2), don't get along with a large one.
///
/// All that this driver executes is started by this or [`async_command`], because ignored and blocked signals outlive
/// execve(2): through a shim and a runtime they would reach tasks. An agent that was started by `nohup` ignores SIGHUP, a
/// script's `&` leaves SIGINT ignored, and glibc's posix_spawn(3), which std prefers where it can, leaves signal 32 ignored
/// in every child (glibc sysdeps/unix/sysv/linux/spawni.c, `__spawni_child`).
pub fn command(program: impl AsRef<OsStr>) -> std::process::Command {
    let mut command = std::process::Command::new(program);
    // SAFETY: between fork and exec only system calls are made, and no memory of ours is touched.
    unsafe {
        command.pre_exec(|| {
            reset_signals();
            restore_descriptor_limit();
            Ok(())
        });
    }
    command
}

/// The same as [`command`], to be waited for without blocking.
pub fn async_command(program: impl AsRef<OsStr>) -> tokio::process::Command {
    command(program).into()
}

/// Gives a process that is about to be exec'ed the default dispositions of all signals and an empty mask. Safe between
/// fork and exec.
fn reset_signals() {
    /// At least as large as the kernel's `struct sigaction` of any architecture; all zeros are SIG_DFL without flags.
    const DEFAULT: [u64; 8] = [0; 8];
    /// Of the kernel's own signal set, which has 64 bits (rt_sigaction(2)).
    const SET_SIZE: usize = size_of::<u64>();
    const LAST_SIGNAL: libc::c_int = 64;
    for number in 1..=LAST_SIGNAL {
        // The C library's functions refuse 32 and 33, which it uses itself. SIGKILL and SIGSTOP are refused by the kernel,
        // and always have their defaults.
        // SAFETY: the kernel reads a struct that lives until the call returns, and writes nothing.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, number, DEFAULT.as_ptr(), ptr::null_mut::<u64>(), SET_SIZE);
        }
    }
    unblock_signals();
}

/// Blocks no signal in this thread and those that it starts. One that the parent had blocked would never arrive here, such
/// as the SIGTERM by which an agent's service is stopped.
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

/// A process's number, which is never 0: written to `cgroup.procs`, and given to many system calls, 0 means whoever
/// makes the call (cgroups(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pid(NonZeroU32);

impl Pid {
    /// Returns the pid of a child that has not been waited for.
    ///
    /// # Errors
    /// When it was waited for already: its pid may be another process's by now.
    pub fn of_child(child: &tokio::process::Child) -> io::Result<Self> {
        let reaped = || io::Error::other("the process that was just started has been waited for already");
        child.id().and_then(NonZeroU32::new).map(Self).ok_or_else(reaped)
    }

    /// Returns it as a plain number.
    pub fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Moves a process of ours that is to outlive us out of the agent's cgroup, so that stopping the agent's service does not
/// end it, and makes the kernel's OOM killer prefer it to us. `procs`: `cgroup.procs` of the group for it, one for each
/// hierarchy.
pub fn set_apart(pid: Pid, procs: &[PathBuf]) {
    for procs in procs {
        if let Err(error) = fs::write(procs, pid.to_string()) {
            tracing::warn!(path = %procs.display(), %error, "a process of ours stays in the agent's cgroup");
        }
    }
    let own = fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|text| text.trim().parse::<i32>().ok());
    if let Some(own) = own {
        let score = (own + 1).min(1000).to_string();
        if let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), score) {
            tracing::debug!(%error, "a process of ours keeps our OOM score");
        }
    }
}

/// A process of this boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// On the host.
    pub pid: u32,
    /// When it was started, in clock ticks since the boot (proc_pid_stat(5), field 22).
    pub start: u64,
}

impl ProcessId {
    /// The process that has this pid now.
    ///
    /// # Errors
    /// When there is none, or only what is left of it until its parent looks.
    pub fn of(pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (state, start) = parse_stat(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        if matches!(state, "Z" | "X") {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Self { pid, start })
    }

    /// Has it surely ended? That it can't be looked at just now is no proof.
    pub fn is_gone(&self) -> bool {
        match Self::of(self.pid) {
            Ok(now) => now != *self,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    /// Does this very process still live?
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == *self)
    }
}

/// State and start time. The name in parentheses may hold blanks and parentheses itself.
fn parse_stat(text: &str) -> Option<(&str, u64)> {
    let (_, rest) = text.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    // The state is field 3, so the start time is the 19th after it.
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// The parent of a process.
///
/// # Errors
/// When there is no such process, or it can't be looked at.
pub fn parent_of(pid: u32) -> io::Result<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let parent = text.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
    parent.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// A descriptor that names one process, however its number is used later (pidfd_open(2), Linux 5.3).
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// The process that has this pid now. For a child of ours that is the child, since its pid is ours until we reap.
    ///
    /// # Errors
    /// As pidfd_open(2).
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: pidfd_open takes a number and flags and gives a new close-on-exec descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: just made, and ours alone.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// This very process.
    ///
    /// # Errors
    /// As pidfd_open(2); not found when it has ended.
    pub fn of(process: &ProcessId) -> io::Result<Self> {
        let fd = Self::open(process.pid)?;
        // Looked at after the descriptor is had: if it lives now, it is what the descriptor names. That we can't look
        // is another answer than that it is gone.
        match ProcessId::of(process.pid) {
            Ok(now) if now == *process => Ok(fd),
            Ok(_) => Err(io::ErrorKind::NotFound.into()),
            Err(error) => Err(error),
        }
    }

    /// Sends a signal. A process that has ended is fine.
    pub fn signal(&self, number: i32) {
        // SAFETY: a signal to the process that the descriptor names; no memory is passed. ESRCH for a dead one is fine.
        unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), number, std::ptr::null::<u8>(), 0);
        }
    }

    /// Has the process ended? (pidfd_open(2): its descriptor is readable then.)
    pub fn has_ended(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd as _;
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Returns when the process has ended.
    ///
    /// # Errors
    /// When it can't be watched.
    pub async fn ended(&self) -> io::Result<()> {
        self.watch()?.readable().await.map(drop)
    }

    /// Registers the process to be waited for: the descriptor becomes readable when the process has ended.
    ///
    /// # Errors
    /// Where no further descriptor can be had.
    pub fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let own = self.0.try_clone()?;
        // SAFETY: an OwnedFd, which stays open and itself for as long as the AsyncFd has it.
        Ok(unsafe { AsyncFd::register_with_interest(own, Interest::READABLE) }?)
    }
}

/// A program by path or by name in PATH.
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

/// Runs a program to its end and keeps the beginning of what it prints. One that prints more finds its pipe closed, so
/// that a program that never stops costs no memory.
///
/// # Errors
/// When the program can't be started, or its pipes can't be read.
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

/// Did a look at a process below `/proc` fail because the process has ended (proc(5))? Any other failure, of descriptors
/// or memory, says nothing of the process.
pub fn has_vanished(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Will what failed with this error work again by itself, once somebody has closed descriptors or given memory back?
pub fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN | libc::EINTR | libc::ENOBUFS)
    )
}

/// Looks at a process below `/proc`; `None` when it has ended.
///
/// # Errors
/// When that can't be told.
pub fn unless_vanished<T>(looked: io::Result<T>) -> io::Result<Option<T>> {
    match looked {
        Ok(seen) => Ok(Some(seen)),
        Err(error) if has_vanished(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A process and all that it and its children have started and that still live, itself first. Processes that were
/// handed to another parent are not found.
///
/// # Errors
/// When `/proc` can't be read: there may be others then.
pub fn descendants(pid: u32) -> io::Result<Vec<u32>> {
    crate::fault::look("descendants")?;
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(&pid) = all.get(next) {
        next += 1;
        let Some(threads) = unless_vanished(fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task")))?
        else {
            continue;
        };
        for thread in threads {
            let Some(thread) = unless_vanished(thread)? else { break };
            let Some(children) = unless_vanished(fs::read_to_string(thread.path().join("children")))? else { continue };
            all.extend(children.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
    }
    Ok(all)
}

/// All processes there are.
///
/// # Errors
/// When `/proc` can't be listed.
pub fn all() -> io::Result<Vec<u32>> {
    crate::fault::look("processes")?;
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
            let looked = unless_vanished(Err::<(), _>(io::Error::from_raw_os_error(number)));
            assert_eq!(looked.expect("it has ended"), None);
        }
        for number in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EIO, libc::EACCES] {
            unless_vanished(Err::<(), _>(io::Error::from_raw_os_error(number))).expect_err("not known");
        }
        for (number, passing) in [(libc::EMFILE, true), (libc::ENOMEM, true), (libc::EIO, false), (libc::ENOENT, false)]
        {
            assert_eq!(is_passing(&io::Error::from_raw_os_error(number)), passing);
        }
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
        // Without the closed pipe it would not end.
        let endless = bounded_output(&mut shell("yes >&2 & exec yes")).await.expect("runs");
        let kept = usize::try_from(OUTPUT_MAX).expect("a small number");
        assert_eq!((endless.stdout.len(), endless.stderr.len()), (kept, kept));
    }

    /// The number 0 would move this process itself.
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
        assert!(tokio::time::timeout(std::time::Duration::from_millis(50), fd.ended()).await.is_err());
        assert!(!fd.has_ended());
        fd.signal(libc::SIGKILL);
        tokio::time::timeout(std::time::Duration::from_secs(10), fd.ended()).await.expect("in time").expect("watched");
        assert!(fd.has_ended());
        child.wait().expect("reaped");
        assert!(ProcessId::of(child.id()).is_err());
    }
}
