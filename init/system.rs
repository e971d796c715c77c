//! The system calls that this program makes, by the kernel's numbers.

#[cfg(target_arch = "aarch64")]
#[path = "aarch64.rs"]
mod machine;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod machine;

use machine::{call, number};

/// The number of an error (errno(3)).
pub(crate) type Errno = i32;

pub(crate) const ENOENT: Errno = 2;
pub(crate) const ENOEXEC: Errno = 8;
pub(crate) const EACCES: Errno = 13;
pub(crate) const ENOTDIR: Errno = 20;

/// A child has ended (signal(7)).
pub(crate) const SIGCHLD: i32 = 17;

const STDIN: usize = 0;
const STDERR: usize = 2;
/// Makes the process group of the calling process the foreground group of a terminal (`asm-generic/ioctls.h`).
const TIOCSPGRP: usize = 0x5410;
/// `PR_SET_CHILD_SUBREAPER` (`linux/prctl.h`).
const SET_CHILD_SUBREAPER: usize = 36;
/// `WNOHANG`, and `__WALL`: children that were made by clone(2) with another signal than SIGCHLD count, too (wait(2)).
const WAIT_OPTIONS: usize = 1 | 0x4000_0000;
const SIG_BLOCK: usize = 0;
const SIG_SETMASK: usize = 2;

/// A set of signals in the kernel's form: bit n stands for signal n + 1.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct SignalSet(u64);

impl SignalSet {
    /// All signals. The kernel leaves SIGKILL and SIGSTOP out.
    pub(crate) const ALL: Self = Self(u64::MAX);
}

/// What became of a look for ended children.
pub(crate) enum Wait {
    /// A child has ended.
    Ended {
        /// The child.
        pid: i32,
        /// Its exit code; 128 + n for a death by signal n.
        code: i32,
    },
    /// No child has ended.
    Nothing,
}

/// Makes a system call. Returns its result, or its error.
fn checked(number: usize, arguments: [usize; 4]) -> Result<usize, Errno> {
    // SAFETY: the callers below pass valid arguments.
    let outcome = unsafe { call(number, arguments) };
    // The kernel returns errors as -4095 to -1.
    if (-4095..0).contains(&outcome) { Err(-outcome as Errno) } else { Ok(outcome as usize) }
}

/// Ends this process.
pub(crate) fn exit(code: i32) -> ! {
    loop {
        let _ = checked(number::EXIT_GROUP, [code as usize, 0, 0, 0]);
    }
}

/// Writes a text to standard error. A failure has no remedy.
pub(crate) fn write_error(text: &[u8]) {
    let _ = checked(number::WRITE, [STDERR, text.as_ptr() as usize, text.len(), 0]);
}

/// Makes signals wait, and returns the set of those that waited before.
pub(crate) fn block_signals(signals: SignalSet) -> SignalSet {
    let mut before = SignalSet(0);
    let sets = [&raw const signals as usize, &raw mut before as usize];
    let _ = checked(number::RT_SIGPROCMASK, [SIG_BLOCK, sets[0], sets[1], size_of::<SignalSet>()]);
    before
}

/// Makes these signals wait and no others.
pub(crate) fn set_signals(signals: SignalSet) {
    let set = &raw const signals as usize;
    let _ = checked(number::RT_SIGPROCMASK, [SIG_SETMASK, set, 0, size_of::<SignalSet>()]);
}

/// Waits for a signal and takes it. Returns `None` if the wait was interrupted.
pub(crate) fn wait_for_signal() -> Option<i32> {
    let all = SignalSet::ALL;
    let set = &raw const all as usize;
    checked(number::RT_SIGTIMEDWAIT, [set, 0, 0, size_of::<SignalSet>()]).ok().map(|signal| signal as i32)
}

/// Makes this process the parent of all orphans below it.
pub(crate) fn become_subreaper() {
    let _ = checked(number::PRCTL, [SET_CHILD_SUBREAPER, 1, 0, 0]);
}

/// Copies this process. Returns 0 in the child, and the child's pid in the parent.
pub(crate) fn fork() -> Result<i32, Errno> {
    // clone(2) without flags is fork(2), which arm64 does not have.
    checked(number::CLONE, [SIGCHLD as usize, 0, 0, 0]).map(|pid| pid as i32)
}

/// Moves this process into a process group of its own, which becomes the foreground group of the terminal at standard
/// input, if there is one. SIGTTOU must be blocked, since the kernel sends it to a process that does this from the
/// background.
pub(crate) fn own_foreground_group() {
    let _ = checked(number::SETPGID, [0; 4]);
    let Ok(pid) = checked(number::GETPID, [0; 4]) else { return };
    let group = pid as i32;
    let _ = checked(number::IOCTL, [STDIN, TIOCSPGRP, &raw const group as usize, 0]);
}

/// Executes a file. Returns only if that fails.
pub(crate) fn execve(file: *const u8, arguments: *const *const u8, environment: *const *const u8) -> Errno {
    match checked(number::EXECVE, [file as usize, arguments as usize, environment as usize, 0]) {
        Ok(_) => 0,
        Err(error) => error,
    }
}

/// Sends a signal. A process that is gone needs none.
pub(crate) fn kill(pid: i32, signal: i32) {
    let _ = checked(number::KILL, [pid as usize, signal as usize, 0, 0]);
}

/// Takes the status of a child that has ended.
pub(crate) fn reap() -> Wait {
    let mut status = 0_i32;
    match checked(number::WAIT4, [-1_isize as usize, &raw mut status as usize, WAIT_OPTIONS, 0]) {
        Ok(0) | Err(_) => Wait::Nothing,
        Ok(pid) => {
            let signal = status & 0x7f;
            let code = if signal == 0 { status >> 8 & 0xff } else { 128 + signal };
            Wait::Ended { pid: pid as i32, code }
        }
    }
}
