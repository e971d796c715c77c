//! Confines a thread that reads untrusted layers: decompressors and tar parsers are common attack surfaces.
//!
//! The thread loses all capabilities, and all system calls except those for computing in memory. It reads no file and
//! opens none; its input comes through a channel. Capabilities and seccomp filters are per thread (capabilities(7),
//! seccomp(2)), so the thread must be made for the purpose: a thread of the async runtime must never be confined.

use crate::privileges::{PrivilegeError, SyscallFilter, confine};

/// The system calls that hashing and parsing need: for memory, for waking other threads, for a panic and for the
/// thread's end.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    // The thread writes to two descriptors that are open already: the runtime's wake-up eventfd, and stderr for a
    // panic.
    libc::SYS_write,
];

/// Confines the calling thread for the rest of its life. Every other system call fails with EPERM.
///
/// # Errors
/// Fails when the kernel has no seccomp, or the filter does not know the architecture.
pub(crate) fn this_thread() -> Result<(), PrivilegeError> {
    confine(&[], SyscallFilter::Only(ALLOWED))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_confined_thread_opens_nothing_but_still_computes() {
        let outcome = std::thread::spawn(|| {
            super::this_thread().expect("this kernel has seccomp");
            let opened = std::fs::File::open("/proc/self/status").map(drop).map_err(|error| error.raw_os_error());
            let large: Vec<u64> = (0..2_000_000).collect();
            (opened, large.iter().sum::<u64>())
        })
        .join()
        .expect("the thread ends");
        assert_eq!(outcome, (Err(Some(libc::EPERM)), 1_999_999_000_000));
        assert!(std::fs::File::open("/proc/self/status").is_ok(), "other threads are free");
    }
}
