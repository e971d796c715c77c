//! The confinement of the log writer and the log writer supervisor. They run as root, because the directories that they
//! write to belong to root.

use caps::Capability;

use crate::privileges::{PrivilegeError, SyscallFilter, confine};

/// One of the two processes that write the logs of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The log writer, which moves the output of tasks to Nomad's files.
    Writer,
    /// The log writer supervisor, which starts log writers and has every FIFO open.
    Supervisor,
}

/// The capabilities of both processes. The supervisor does not use the first, but a log writer inherits its
/// capabilities from its supervisor.
const KEPT_CAPABILITIES: [Capability; 2] = [
    // The directory of an allocation's logs may belong to any user: Nomad gives it to the user `nobody`, and tasks can
    // change that.
    Capability::CAP_DAC_OVERRIDE,
    // If a user has more than a thousand pipes, the kernel reduces each further pipe to two pages, unless the process
    // has this capability (pipe(7), `pipe-user-pages-soft`). With it, a process can also use the blocks that file
    // systems reserve for root.
    Capability::CAP_SYS_RESOURCE,
];

/// The system calls that are refused, because they are never needed to move bytes from FIFOs to files: those for the
/// network, other processes' memory, mounts and namespaces, keys, and the kernel's own settings. The filter lists the
/// refused calls and not the allowed ones, so that a task does not lose its log when a C library uses another call for
/// a read or a wait.
const REFUSED: &[libc::c_long] = &[
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bind,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_connect,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kcmp,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_listen,
    libc::SYS_mknodat,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_socket,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

/// The system calls that are refused to a log writer in addition, because it executes no programs.
const REFUSED_TO_WRITERS: &[libc::c_long] = &[libc::SYS_execve, libc::SYS_execveat];

impl Role {
    /// Confines the calling process for the rest of its life. The process must have only one thread.
    ///
    /// # Errors
    /// When the kernel has no seccomp, or capabilities can't be dropped.
    pub fn confine(self) -> Result<(), PrivilegeError> {
        let refused = match self {
            // The filter of the supervisor applies already, because a log writer inherits it (seccomp(2)).
            Self::Writer => REFUSED_TO_WRITERS,
            Self::Supervisor => REFUSED,
        };
        confine(&KEPT_CAPABILITIES, SyscallFilter::AllBut(refused))
    }
}
