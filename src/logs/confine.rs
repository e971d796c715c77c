//! What the log writer and its keeper may do. They run as root, since the directories that they write to are root's.

use caps::Capability;

use crate::privileges::{Calls, PrivilegeError, confine};

/// One of the two processes that write the logs of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It moves what tasks write to Nomad's files.
    Writer,
    /// It starts writers, and holds every FIFO open all the while.
    Keeper,
}

/// The capabilities of both. The keeper does not use the first; a writer could not have it if its keeper had not.
const KEPT: [Capability; 2] = [
    // The directory of an allocation's logs may be anybody's: Nomad gives it to nobody, and tasks can change that.
    Capability::CAP_DAC_OVERRIDE,
    // The kernel cuts the pipes of a user who has more than a thousand to two pages each, unless the process has this
    // (pipe(7), `pipe-user-pages-soft`). It also opens the blocks that file systems reserve for root.
    Capability::CAP_SYS_RESOURCE,
];

/// Calls that moving bytes from FIFOs to files never needs: the network, other processes' memory, mounts and namespaces,
/// keys, and the kernel's own settings. It lists what is refused instead of what is allowed, so that a C library which
/// makes another call for a read or a wait does not cost a task its log.
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

/// A writer starts no program either.
const REFUSED_TO_WRITERS: &[libc::c_long] = &[libc::SYS_execve, libc::SYS_execveat];

impl Role {
    /// Confines the calling process, which has one thread yet, for the rest of its life.
    ///
    /// # Errors
    /// When the kernel has no seccomp, or capabilities stay.
    pub fn confine(self) -> Result<(), PrivilegeError> {
        let refused = match self {
            // The keeper's filter holds for it already: filters are inherited (seccomp(2)).
            Self::Writer => REFUSED_TO_WRITERS,
            Self::Keeper => REFUSED,
        };
        confine(&KEPT, Calls::AllBut(refused))
    }
}
