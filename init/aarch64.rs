//! arm64: the entry point, system calls and their numbers (`asm-generic/unistd.h`).

/// The numbers of system calls.
pub(super) mod number {
    pub(crate) const IOCTL: usize = 29;
    pub(crate) const WRITE: usize = 64;
    pub(crate) const EXIT_GROUP: usize = 94;
    pub(crate) const KILL: usize = 129;
    pub(crate) const RT_SIGPROCMASK: usize = 135;
    pub(crate) const RT_SIGTIMEDWAIT: usize = 137;
    pub(crate) const SETPGID: usize = 154;
    pub(crate) const PRCTL: usize = 167;
    pub(crate) const GETPID: usize = 172;
    pub(crate) const CLONE: usize = 220;
    pub(crate) const EXECVE: usize = 221;
    pub(crate) const WAIT4: usize = 260;
}

// The kernel starts the program here, with a stack that is a multiple of 16.
core::arch::global_asm!(
    ".globl _start",
    "_start:",
    "mov x29, #0",
    "mov x30, #0",
    "mov x0, sp",
    "bl {run}",
    "brk #1",
    run = sym super::super::run,
);

/// Makes a system call with four arguments. The fifth, of clone(2), is 0.
///
/// # Safety
/// The arguments must be valid for the call.
pub(super) unsafe fn call(number: usize, [a, b, c, d]: [usize; 4]) -> isize {
    let outcome: isize;
    // SAFETY: the kernel changes only x0 and what the arguments point to.
    unsafe {
        core::arch::asm!(
            "svc 0",
            inlateout("x0") a => outcome,
            in("x1") b, in("x2") c, in("x3") d, in("x4") 0, in("x8") number,
            options(nostack),
        );
    }
    outcome
}
