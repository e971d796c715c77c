//! Restricts what the processes of this program may do. Each process keeps only the capabilities that it needs
//! (capabilities(7)), and helper processes and threads also run under a system call filter (seccomp(2)).
//!
//! The plugin runs as root and starts programs that need every capability: shims, runtimes and an operator's hooks. A
//! program that root executes gets all capabilities of the bounding set, which the plugin therefore leaves unchanged.
//! So the reduction limits what a plugin can be tricked into doing itself, such as setting the clock or loading a
//! kernel module. It does not stop an attacker who executes code of their own in the plugin, since that code can
//! execute a program.

use std::{
    collections::{BTreeMap, HashSet},
    io,
};

use caps::{CapSet, Capability};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, apply_filter};

/// Why a process or thread could not drop all privileges that it does not need.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// The capabilities can't be dropped.
    #[error("could not drop capabilities")]
    Capabilities(#[from] caps::errors::CapsError),
    /// The attribute no_new_privs can't be set, so the process could gain privileges by executing a program.
    #[error("could not set no_new_privs")]
    NoNewPrivileges(#[source] io::Error),
    /// The system call filter can't be built.
    #[error("could not build the seccomp filter")]
    Build(#[from] seccompiler::BackendError),
    /// The kernel refused the system call filter.
    #[error("could not load the seccomp filter")]
    Load(#[from] seccompiler::Error),
}

/// The capabilities that the plugin itself needs, on any host and with any options.
///
/// Overlays are the reason for many of these: the kernel performs a task's operations on its root file system with the
/// capabilities of the process that has mounted the overlay, which is the plugin (linux,
/// `Documentation/filesystems/overlayfs.rst`, "Permission model"). A task can't use a capability on its files that is
/// missing here, whatever capabilities the task itself has.
const PLUGIN_CAPABILITIES: [Capability; 14] = [
    // For the files of tasks, which the kernel accesses through the overlays, and for directories that tasks can
    // change.
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
    // For the same files on kernels before 5.15; since then overlays store the immutable flag themselves.
    Capability::CAP_LINUX_IMMUTABLE,
    // For mounts, and to enter the network namespaces of groups.
    Capability::CAP_SYS_ADMIN,
    // To restore the addresses that a sandbox has removed from a group's network.
    Capability::CAP_NET_ADMIN,
    // To send signals to tasks, which run as other users.
    Capability::CAP_KILL,
    // To follow links below /proc of processes that have capabilities which the plugin lacks: shims and some tasks
    // (ptrace(2), "Ptrace access mode checking").
    Capability::CAP_SYS_PTRACE,
    // To move shims into a cpuset: they have more capabilities than the plugin, and the kernel requires this one for
    // such a process (linux, `security/commoncap.c`, `cap_safe_nice`).
    Capability::CAP_SYS_NICE,
    // For OOM scores below the one that shims inherit, and for the blocks that file systems reserve for root.
    Capability::CAP_SYS_RESOURCE,
    // For a `metrics { address }` with a port below 1024.
    Capability::CAP_NET_BIND_SERVICE,
];

/// The secure bit by which root's programs get no capabilities (linux, `include/uapi/linux/securebits.h`).
const SECBIT_NOROOT: libc::c_int = 1;

/// The outcome of reducing the plugin's capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// The plugin has only the capabilities that it needs.
    Dropped,
    /// The plugin has kept all capabilities that it was started with: programs that it executes would not regain
    /// dropped ones.
    Kept(KeptReason),
}

/// Why a program that the plugin executes could not have more capabilities than the plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeptReason {
    /// The plugin does not run as root.
    NotRoot,
    /// The agent was started with no_new_privs (systemd's `NoNewPrivileges`).
    NoNewPrivileges,
    /// The agent was started with SECBIT_NOROOT (systemd's `SecureBits`).
    NoRoot,
}

impl std::fmt::Display for KeptReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotRoot => "this process does not run as root",
            Self::NoNewPrivileges => "the agent was started with no_new_privs",
            Self::NoRoot => "the agent was started with the secure bit noroot",
        })
    }
}

/// Drops all capabilities that the plugin never needs, in the calling thread and in the threads that it starts later.
/// This function must be called before the process has a second thread. Programs that are executed later regain them
/// from the bounding set.
///
/// # Errors
/// Fails when the kernel refuses.
pub fn reduce_plugin() -> Result<Reduction, PrivilegeError> {
    if let Some(reason) = reason_to_keep() {
        return Ok(Reduction::Kept(reason));
    }
    reduce_capabilities(&PLUGIN_CAPABILITIES)?;
    Ok(Reduction::Dropped)
}

/// Returns why executed programs would not get the bounding set's capabilities (capabilities(7), "Capabilities and
/// execution of programs by root"); `None` if they get them.
fn reason_to_keep() -> Option<KeptReason> {
    // SAFETY: this prctl takes and returns numbers only.
    let secure_bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) };
    if !nix::unistd::geteuid().is_root() || !nix::unistd::getuid().is_root() {
        Some(KeptReason::NotRoot)
    } else if nix::sys::prctl::get_no_new_privs().unwrap_or(true) {
        Some(KeptReason::NoNewPrivileges)
    } else if secure_bits & SECBIT_NOROOT != 0 {
        Some(KeptReason::NoRoot)
    } else {
        None
    }
}

/// The system calls that a process or thread may still make. All others fail with EPERM.
#[derive(Debug, Clone, Copy)]
pub enum SyscallFilter<'a> {
    /// Only these calls are allowed.
    Only(&'a [libc::c_long]),
    /// All calls but these are allowed.
    AllBut(&'a [libc::c_long]),
}

/// Confines the calling thread, and the threads and programs that it starts, for the rest of their lives. They keep the
/// capabilities in `keep` only, and gain none by executing a program. To confine a whole process, this function must be
/// called while the process has one thread.
///
/// # Errors
/// Fails when the kernel has no seccomp, there is no filter for the architecture, or capabilities can't be dropped.
pub fn confine(keep: &[Capability], calls: SyscallFilter<'_>) -> Result<(), PrivilegeError> {
    let program = filter(calls)?;
    nix::sys::prctl::set_no_new_privs().map_err(|errno| PrivilegeError::NoNewPrivileges(errno.into()))?;
    shrink_bounding_set(keep);
    reduce_capabilities(keep)?;
    Ok(apply_filter(&program)?)
}

/// Reduces the capability sets of the calling thread to those in `keep`. The thread's effective and permitted sets can
/// contain only capabilities that are in its permitted set now.
fn reduce_capabilities(keep: &[Capability]) -> Result<(), PrivilegeError> {
    let permitted: HashSet<Capability> =
        caps::read(None, CapSet::Permitted)?.into_iter().filter(|one| keep.contains(one)).collect();
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &permitted)?;
    }
    // The kernel removes from the ambient set what is not in the inheritable set.
    Ok(caps::clear(None, CapSet::Inheritable)?)
}

/// Reduces the bounding set to the capabilities in `keep`. Without CAP_SETPCAP, which the agent may lack, this fails
/// and is not needed: no_new_privs prevents an executed program from gaining anything.
fn shrink_bounding_set(keep: &[Capability]) {
    for number in 0..u64::BITS {
        if !keep.iter().any(|one| u32::from(one.index()) == number) {
            // SAFETY: this prctl takes numbers only, and refuses capabilities that the kernel does not know.
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
        }
    }
}

/// Builds the system call filter.
fn filter(calls: SyscallFilter<'_>) -> Result<BpfProgram, PrivilegeError> {
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let numbers = |calls: &[libc::c_long], abi: libc::c_long| -> BTreeMap<i64, Vec<SeccompRule>> {
        calls.iter().map(|&number| (number | abi, Vec::new())).collect()
    };
    let (rules, others, listed) = match calls {
        SyscallFilter::Only(allowed) => (numbers(allowed, 0), refuse, SeccompAction::Allow),
        SyscallFilter::AllBut(refused) => {
            let mut rules = numbers(refused, 0);
            // The same system calls by the numbers of the x32 ABI, which the filter sees under the same architecture.
            #[cfg(target_arch = "x86_64")]
            rules.extend(numbers(refused, 0x4000_0000));
            (rules, SeccompAction::Allow, refuse)
        }
    };
    Ok(SeccompFilter::new(rules, others, listed, std::env::consts::ARCH.try_into()?)?.try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, thread};

    fn status(field: &str) -> String {
        let text = std::fs::read_to_string("/proc/thread-self/status").expect("the thread's status is readable");
        text.lines().find_map(|line| line.strip_prefix(field)).expect("the status has the field").trim().to_owned()
    }

    #[test]
    fn a_confined_thread_keeps_only_the_named_capabilities() {
        let seen = thread::spawn(|| {
            let refused = [libc::SYS_socket];
            confine(&[Capability::CAP_DAC_OVERRIDE], SyscallFilter::AllBut(&refused)).expect("this kernel has seccomp");
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").map(drop).map_err(|error| error.raw_os_error());
            (["CapEff:", "CapBnd:", "CapInh:"].map(status), status("NoNewPrivs:"), socket)
        });
        let (sets, no_new_privileges, socket) = seen.join().expect("the thread ends");
        let [effective, bounding, inheritable] = sets.map(|set| u64::from_str_radix(&set, 16).expect("a number"));
        let had = u64::from_str_radix(&status("CapPrm:"), 16).expect("a number");
        assert_eq!((effective, inheritable), (had & Capability::CAP_DAC_OVERRIDE.bitmask(), 0));
        assert_eq!(bounding & !Capability::CAP_DAC_OVERRIDE.bitmask(), 0, "{bounding:x}");
        assert_eq!(no_new_privileges, "1");
        assert_eq!(socket, Err(Some(libc::EPERM)));
        assert!(std::net::UdpSocket::bind("127.0.0.1:0").is_ok(), "other threads are not confined");
    }

    #[test]
    fn the_plugin_keeps_its_bounding_set() {
        let bounding = status("CapBnd:");
        let seen = thread::spawn(|| (reduce_plugin().expect("reduced"), status("CapEff:"), status("CapBnd:")));
        let (reduced, effective, left) = seen.join().expect("the thread ends");
        assert_eq!(left, bounding);
        if reduced == Reduction::Dropped {
            let effective = u64::from_str_radix(&effective, 16).expect("a number");
            assert_eq!(effective & !PLUGIN_CAPABILITIES.iter().fold(0, |set, one| set | one.bitmask()), 0);
            assert_ne!(effective, 0);
        }
        assert!(File::open("/dev/null").is_ok());
    }
}
