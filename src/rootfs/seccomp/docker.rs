//! Docker's default profile (moby/profiles, June 2026) as a table of the calls that containers may make.

use oci_spec::runtime::{
    Arch, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompOperator as Op,
};

use super::{
    SocketcallPolicy,
    profile::{ArchMap, Profile, Rule, RuleCondition},
};

/// The errno of calls that are not on the list.
const EPERM: u32 = 1;
/// The errno of clone3: C libraries then fall back to clone, whose flags a filter can see.
const ENOSYS: u32 = 38;
/// The address family that tasks may not use, because it does not belong to a network namespace.
const AF_VSOCK: u64 = 40;
/// The flags from CLONE_NEWNS to CLONE_NEWNET, which create namespaces. They need CAP_SYS_ADMIN.
const NAMESPACE_FLAGS: u64 = 0x7e02_0000;

/// Calls that all tasks may make.
const ALLOWED: &str = "
accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32 clock_adjtime
clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1
epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit
exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2
fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat
fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait
futex_waitv futex_wake futimesat getcpu getcwd getdents getdents64 getegid getegid32 geteuid geteuid32 getgid
getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom
getresgid getresgid32 getresuid getresuid32 getrlimit get_robust_list getrusage getsid getsockname getsockopt
get_thread_area gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init
inotify_init1 inotify_rm_watch io_cancel ioctl io_destroy io_getevents io_pgetevents io_pgetevents_time64
ioprio_get ioprio_set io_setup io_submit ipc kill landlock_add_rule landlock_create_ruleset
landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount listxattr listxattrat llistxattr
_llseek lremovexattr lseek lsetxattr lstat lstat64 madvise map_shadow_stack membarrier memfd_create memfd_secret
mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open
mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget
msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat _newselect open openat
openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64
prctl pread64 preadv preadv2 prlimit64 process_mrelease pselect6 pselect6_time64 pwrite64 pwritev pwritev2 read
readahead readlink readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr
removexattrat rename renameat renameat2 restart_syscall riscv_hwprobe rmdir rseq rt_sigaction rt_sigpending
rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64
rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam sched_get_priority_max sched_get_priority_min
sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr
sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64
send sendfile sendfile64 sendmmsg sendmsg sendto setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32
setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid
setresuid32 setreuid setreuid32 setrlimit set_robust_list setsid setsockopt set_thread_area set_tid_address
setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4
sigprocmask sigreturn socketpair splice stat stat64 statfs statfs64 statmount statx symlink symlinkat
sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime
timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime
timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime
utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev
";

/// Calls that only tasks with a capability may make.
const BY_CAPABILITY: &[(&str, &str)] = &[
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "CAP_SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr \
        lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree perf_event_open \
        quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module init_module finit_module"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_PTRACE", "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace"),
    ("CAP_SYS_RAWIO", "iopl ioperm"),
    ("CAP_SYS_TIME", "settimeofday stime clock_settime clock_settime64"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    ("CAP_SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("CAP_SYSLOG", "syslog"),
    ("CAP_BPF", "bpf"),
    ("CAP_PERFMON", "perf_event_open"),
];

/// Calls that are allowed only on some architectures, by Go's names of them.
const BY_ARCHITECTURE: &[(&[&str], &str)] = &[
    (&["ppc64le"], "sync_file_range2 swapcontext"),
    (&["arm", "arm64"], "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls"),
    (&["amd64", "x32"], "arch_prctl"),
    (&["amd64", "x32", "x86"], "modify_ldt"),
    (&["s390", "s390x"], "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr"),
    (&["riscv64"], "riscv_flush_icache"),
];

/// Calls that are harmless since Linux 4.8. Before, a tracer could bypass its tracee's filter.
const SINCE_4_8: &str = "process_vm_readv process_vm_writev ptrace";

/// The allowed arguments of personality: Linux, its 32-bit address space, uname 2.6, both of these, and the query of
/// the current personality.
const PERSONALITIES: [u64; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// The 64-bit architectures, each with the 32-bit ones that it can also run.
const ARCHITECTURES: [(Arch, &[Arch]); 5] = [
    (Arch::ScmpArchX86_64, &[Arch::ScmpArchX86, Arch::ScmpArchX32]),
    (Arch::ScmpArchAarch64, &[Arch::ScmpArchArm]),
    (Arch::ScmpArchS390x, &[Arch::ScmpArchS390]),
    (Arch::ScmpArchRiscv64, &[]),
    (Arch::ScmpArchLoongarch64, &[]),
];

/// Returns docker's default profile.
pub fn profile(socketcall: SocketcallPolicy) -> Profile {
    let mut rules = vec![allow(ALLOWED), Rule { includes: since_kernel("4.8"), ..allow(SINCE_4_8) }];
    // libseccomp derives rules for `socketcall` from the rules for `socket` and similar calls. A rule without
    // conditions takes precedence over those. It can't have the default's EPERM, because runtimes leave out rules that
    // have the same effect as the default.
    rules.push(match socketcall {
        SocketcallPolicy::Allowed => allow("socketcall"),
        SocketcallPolicy::Enosys => fail_with_enosys("socketcall"),
    });
    for (operator, family) in [(Op::ScmpCmpLt, 38), (Op::ScmpCmpEq, AF_VSOCK - 1), (Op::ScmpCmpGt, AF_VSOCK)] {
        rules.push(Rule { args: Some(vec![argument(0, family, operator)]), ..allow("socket") });
    }
    for personality in PERSONALITIES {
        rules.push(Rule { args: Some(vec![argument(0, personality, Op::ScmpCmpEq)]), ..allow("personality") });
    }
    for (arches, names) in BY_ARCHITECTURE {
        rules.push(Rule { includes: on_architectures(arches), ..allow(names) });
    }
    for (capability, names) in BY_CAPABILITY {
        rules.push(Rule { includes: with_capability(capability), ..allow(names) });
    }
    // Without CAP_SYS_ADMIN a task can't create namespaces. On s390, clone's first two arguments are in reverse order.
    let s390: &[&str] = &["s390", "s390x"];
    let admin = with_capability("CAP_SYS_ADMIN");
    let flags = |index| Some(vec![argument(index, NAMESPACE_FLAGS, Op::ScmpCmpMaskedEq)]);
    let admin_or_s390 = RuleCondition { arches: on_architectures(s390).arches, ..admin.clone() };
    rules.push(Rule { args: flags(0), excludes: admin_or_s390, ..allow("clone") });
    rules.push(Rule { args: flags(1), includes: on_architectures(s390), excludes: admin.clone(), ..allow("clone") });
    rules.push(Rule { excludes: admin, ..fail_with_enosys("clone3") });
    Profile {
        default_action: LinuxSeccompAction::ScmpActErrno,
        default_errno_ret: Some(EPERM),
        arch_map: ARCHITECTURES
            .iter()
            .map(|(architecture, compatible)| ArchMap {
                architecture: *architecture,
                sub_architectures: Some(compatible.to_vec()),
            })
            .collect(),
        syscalls: rules,
        ..Profile::default()
    }
}

fn allow(names: &str) -> Rule {
    Rule {
        names: names.split_whitespace().map(str::to_owned).collect(),
        action: LinuxSeccompAction::ScmpActAllow,
        ..Rule::default()
    }
}

/// Returns a rule that fails a call with ENOSYS, as on a kernel that does not have it.
fn fail_with_enosys(name: &str) -> Rule {
    Rule { action: LinuxSeccompAction::ScmpActErrno, errno_ret: Some(ENOSYS), ..allow(name) }
}

fn argument(index: usize, value: u64, operator: Op) -> LinuxSeccompArg {
    // `valueTwo` is left out, which means 0 to docker.
    let argument = LinuxSeccompArgBuilder::default().index(index).value(value).op(operator);
    argument.build().expect("every field has a default")
}

/// Returns a condition that holds for tasks with this capability.
fn with_capability(capability: &str) -> RuleCondition {
    RuleCondition { caps: vec![capability.to_owned()], ..RuleCondition::default() }
}

/// Returns a condition that holds on these architectures.
fn on_architectures(arches: &[&str]) -> RuleCondition {
    RuleCondition { arches: arches.iter().map(|arch| (*arch).to_owned()).collect(), ..RuleCondition::default() }
}

/// Returns a condition that holds for this version of the kernel and later ones.
fn since_kernel(version: &str) -> RuleCondition {
    RuleCondition { min_kernel: Some(version.to_owned()), ..RuleCondition::default() }
}
