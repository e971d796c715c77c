//! The width of each system call's arguments: the bits that the kernel uses.
//!
//! A filter sees every argument as a 64-bit register. A system call that declares an `int` gets only the low word of
//! that register (`SYSCALL_DEFINEx` casts each argument to its declared type: linux, include/linux/syscalls.h,
//! `__SC_CAST`). A task can evade a rule that compares the whole register by setting a bit that the kernel then drops:
//! `socket(1 << 32 | AF_VSOCK, ...)` opens a vsock socket.

use std::{collections::HashMap, sync::OnceLock};

/// The number of bits of an argument that the kernel uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Width {
    /// 16 bits (`umode_t`).
    Half,
    /// 32 bits (`int`, `unsigned int`, `pid_t`, file descriptors, ...).
    Word,
    /// The whole register: pointers, sizes, `long`, and all arguments that the tables don't list.
    Register,
}

impl Width {
    /// Returns the bits of the register that the kernel uses.
    pub(super) fn mask(self) -> u64 {
        match self {
            Self::Half => 0xffff,
            Self::Word => 0xffff_ffff,
            Self::Register => u64::MAX,
        }
    }
}

/// The order of clone's first two arguments: s390 has the stack first (`CONFIG_CLONE_BACKWARDS2`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CloneArguments {
    FlagsFirst,
    StackFirst,
}

impl CloneArguments {
    /// Returns the order on an architecture, given by Go's name.
    pub(super) fn on(arch: &str) -> Self {
        if arch.starts_with("s390") { Self::StackFirst } else { Self::FlagsFirst }
    }
}

/// Returns the width of an argument of a system call.
pub(super) fn width(call: &str, argument: usize, clone: CloneArguments) -> Width {
    static TABLE: OnceLock<HashMap<&'static str, &'static str>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let rows = PROTOTYPES.iter().chain(TRUNCATED_IN_BODY);
        rows.flat_map(|(widths, names)| names.split_whitespace().map(|name| (name, *widths))).collect()
    });
    let widths = match (call, clone) {
        ("clone", CloneArguments::StackFirst) => ".i",
        _ => table.get(call).copied().unwrap_or_default(),
    };
    match widths.as_bytes().get(argument) {
        Some(b'h') => Width::Half,
        Some(b'i') => Width::Word,
        _ => Width::Register,
    }
}

/// Arguments that are narrow in the kernel's own prototype. The table covers every `SYSCALL_DEFINE` of Linux 6.12 that
/// is in the system call table of x86-64 or in the generic one, further calls of other 64-bit machines, and the calls
/// that 6.13 to 6.19 added. One letter stands for one argument: `i` for 32 bits, `h` for 16, a dot for the whole
/// register.
///
/// The prototypes of the old calls with 16-bit user ids (`setuid` and similar calls on 32-bit x86 and ARM) are not in
/// the table: a rule is for a name, and the same name takes 32 bits on the other architectures.
const PROTOTYPES: &[(&str, &str)] = &[
    (
        "i",
        "_newselect accept alarm arch_prctl clock_adjtime clock_getres clock_gettime clock_settime close dup \
        epoll_create epoll_create1 eventfd exit exit_group fchdir fdatasync fgetxattr flistxattr fremovexattr \
        fstat fstatfs fsync ftruncate futimesat get_robust_list getgroups getitimer getpeername getpgid \
        getrlimit getrusage getsid getsockname inotify_init1 io_setup io_uring_setup iopl keyctl memfd_secret \
        migrate_pages mlockall modify_ldt mq_getsetattr mq_notify mq_timedreceive nice openat2 personality \
        pkey_free prctl pread64 process_vm_readv process_vm_writev pselect6 pwrite64 read readahead rt_sigaction \
        rt_sigprocmask s390_guarded_storage sched_get_priority_max sched_get_priority_min sched_getparam \
        sched_getscheduler sched_rr_get_interval sched_setparam select set_mempolicy setfsgid setfsuid setgid \
        setgroups setitimer setrlimit setuid sigaction signal signalfd sigprocmask socketcall ssetmask syncfs \
        sysfs timer_create timer_delete timer_getoverrun timer_gettime timerfd_gettime umask userfaultfd ustat \
        write",
    ),
    (".h", "chmod creat mkdir"),
    (".i", "access delete_module fsopen memfd_create pipe2 ppoll setdomainname sethostname swapon symlinkat umount2"),
    ("ih", "fchmod"),
    (
        "ii",
        "clock_nanosleep dup2 eventfd2 fallocate fanotify_init fcntl flock getpriority inotify_rm_watch ioctl \
        ioprio_get ipc kexec_file_load kill landlock_restrict_self listen msgctl msgget pidfd_open prlimit64 \
        process_mrelease rt_sigqueueinfo s390_runtime_instr sched_getaffinity sched_setaffinity \
        sched_setscheduler seccomp sendfile setns setpgid setregid setreuid shmctl shutdown sync_file_range2 \
        timer_settime timerfd_create timerfd_settime tkill",
    ),
    ("..i", "getrandom ioperm landlock_create_ruleset lsm_list_modules madvise map_shadow_stack mlock2 msync readlink"),
    (".hi", "mknod"),
    (".ih", "mq_open open"),
    (".ii", "chown lchown poll"),
    ("i.h", "fchmodat mkdirat"),
    (
        "i.i",
        "bind bpf connect epoll_pwait2 faccessat finit_module fspick getdents getdents64 getxattrat \
        inotify_add_watch listxattrat lseek mount_setattr open_by_handle_at open_tree open_tree_attr quotactl \
        readdir recvmsg removexattrat renameat sched_setattr semop semtimedop sendmsg setxattrat shmat shmget \
        syslog unlinkat wait4 waitpid",
    ),
    (
        "iii",
        "close_range dup3 epoll_ctl fchown fsmount getsockopt ioprio_set kcmp membarrier pidfd_getfd quotactl_fd \
        reboot rt_tgsigqueueinfo semctl semget setpriority setresgid setresuid socket socketpair tgkill",
    ),
    ("...i", "listmount listns pkey_mprotect request_key statmount"),
    ("..ii", "futex_wake"),
    (".iii", "futex_requeue perf_event_open rseq"),
    (
        "i..i",
        "accept4 cachestat fadvise64 lsm_get_self_attr mq_timedsend msgsnd newfstatat readlinkat recv recvfrom \
        send signalfd4 sync_file_range utimensat vmsplice",
    ),
    ("i.hi", "fchmodat2 mknodat"),
    ("i.ih", "openat"),
    ("i.ii", "epoll_pwait epoll_wait faccessat2 lsm_set_self_attr recvmmsg sched_getattr sendmmsg statx"),
    ("ii.i", "fanotify_mark io_uring_register landlock_add_rule pidfd_send_signal tee waitid"),
    ("iiii", "io_uring_enter"),
    ("....i", "add_key lsetxattr riscv_hwprobe setxattr"),
    (".ii.i", "futex_waitv"),
    ("i...i", "_llseek execveat file_getattr file_setattr fsetxattr msgrcv name_to_handle_at"),
    ("i..ii", "process_madvise"),
    ("i.i.i", "linkat move_mount renameat2"),
    ("i.iii", "fchownat"),
    ("ii..i", "fsconfig"),
    ("iii.i", "setsockopt"),
    (".....i", "preadv2 pwritev2"),
    ("...i.i", "futex_wait"),
    (".ii..i", "futex"),
    ("i....i", "move_pages"),
    ("i..i.i", "sendto"),
    ("i.i..i", "copy_file_range splice"),
];

/// Arguments that are declared as `unsigned long` but that the call's implementation truncates.
const TRUNCATED_IN_BODY: &[(&str, &str)] = &[
    // kernel/fork.c takes `lower_32_bits(clone_flags)`.
    ("i", "clone"),
    // mm/mmap.c passes the file descriptor to `fget(unsigned int)`.
    ("....i", "mmap"),
    // kernel/ptrace.c passes the process id to `find_get_task_by_vpid(pid_t)`.
    (".i", "ptrace"),
    // mm/mempolicy.c copies the mode to an `int`; the prototype declares the flags as an `unsigned int`.
    ("..i..i", "mbind"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::seccomp::Machine;

    #[test]
    fn widths_are_the_kernels() {
        let width = |call, argument| width(call, argument, CloneArguments::FlagsFirst);
        for (call, argument) in [
            ("socket", 0),
            ("socketpair", 0),
            ("clone", 0),
            ("personality", 0),
            ("prctl", 0),
            ("ioctl", 1),
            ("fcntl", 1),
            ("setns", 1),
            ("kill", 0),
            ("openat", 2),
            ("mmap", 4),
        ] {
            assert_eq!(width(call, argument), Width::Word, "{call} {argument}");
        }
        assert_eq!((width("chmod", 1), width("openat", 3)), (Width::Half, Width::Half));
        // The kernel sees, and refuses, high bits of unshare's flags (kernel/fork.c, `check_unshare_flags`).
        for (call, argument) in [("unshare", 0), ("prctl", 1), ("ioctl", 2), ("mmap", 2), ("read", 2), ("unheard", 0)] {
            assert_eq!(width(call, argument), Width::Register, "{call} {argument}");
        }
    }

    #[test]
    fn s390_has_the_flags_of_clone_second() {
        let widths = |clone| [width("clone", 0, clone), width("clone", 1, clone)];
        assert_eq!(widths(CloneArguments::on("amd64")), [Width::Word, Width::Register]);
        assert_eq!(widths(CloneArguments::on("s390x")), [Width::Register, Width::Word]);
    }

    #[test]
    fn each_call_is_in_the_tables_once_and_exists() {
        let names: Vec<&str> =
            PROTOTYPES.iter().chain(TRUNCATED_IN_BODY).flat_map(|(_, names)| names.split_whitespace()).collect();
        let mut distinct = names.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(names.len(), distinct.len());
        let unknown: Vec<_> =
            names.iter().filter(|name| Machine::ALL.iter().all(|machine| machine.number(name).is_none())).collect();
        // These calls are newer than the tables of numbers, or belong to machines that have no table.
        let others = ["file_setattr", "listns", "riscv_hwprobe", "s390_guarded_storage", "s390_runtime_instr"];
        assert!(unknown.iter().all(|name| others.contains(name)), "{unknown:?}");
        assert!(PROTOTYPES.iter().chain(TRUNCATED_IN_BODY).all(|(widths, _)| widths.len() <= 6));
    }
}
