//! x86-64: the entry point, system calls and their numbers (`asm/unistd_64.h`).

/// The numbers of system calls.
pub(super) mod number {
    pub(crate) const WRITE: usize = 1;
    pub(crate) const RT_SIGPROCMASK: usize = 14;
    pub(crate) const IOCTL: usize = 16;
    pub(crate) const GETPID: usize = 39;
    pub(crate) const CLONE: usize = 56;
    pub(crate) const EXECVE: usize = 59;
    pub(crate) const WAIT4: usize = 61;
    pub(crate) const KILL: usize = 62;
    pub(crate) const SETPGID: usize = 109;
    pub(crate) const RT_SIGTIMEDWAIT: usize = 128;
    pub(crate) const PRCTL: usize = 157;
    pub(crate) const EXIT_GROUP: usize = 231;
}

// The kernel starts the program here. The stack must be a multiple of 16 before a call.
core::arch::global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {run}",
    "ud2",
    run = sym super::super::run,
);

/// Makes a system call with four arguments. The fifth, of clone(2), is 0.
///
/// # Safety
/// The arguments must be valid for the call.
pub(super) unsafe fn call(number: usize, [a, b, c, d]: [usize; 4]) -> isize {
    let outcome: isize;
    // SAFETY: the kernel changes only rax, rcx, r11 and what the arguments point to.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") number => outcome,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") 0,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    outcome
}
