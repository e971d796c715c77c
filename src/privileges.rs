//! What the processes of this program may do: each keeps the capabilities that it needs (capabilities(7)), and helpers
//! run under a filter of system calls besides (seccomp(2)).
//!
//! The plugin runs as root and starts programs that need every capability: shims, runtimes, an operator's hooks. A
//! program that root executes has all that is in the bounding set, which the plugin leaves as it is. The reduction
//! therefore limits what a confused plugin can be made to do, such as setting the clock or loading a module. It does not
//! stop an attacker who runs code of his own in the plugin: that code can execute a program.

use std::{
    collections::{BTreeMap, HashSet},
    io,
};

use caps::{CapSet, Capability};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, apply_filter};

/// Why a process or thread kept what it does not need.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// Capabilities stayed.
    #[error("drop capabilities")]
    Capabilities(#[from] caps::errors::CapsError),
    /// It could still gain privileges by executing a program.
    #[error("set no_new_privs")]
    NoNewPrivileges(#[source] io::Error),
    /// The filter was not made.
    #[error("build the seccomp filter")]
    Build(#[from] seccompiler::BackendError),
    /// The kernel refused it.
    #[error("load the seccomp filter")]
    Load(#[from] seccompiler::Error),
}

/// What the plugin itself needs, on any host and with any option.
///
/// Overlays are the reason for many of these: the kernel does what a task does to its root file system with the rights
/// of the process that has mounted it, which is the plugin (linux, `Documentation/filesystems/overlayfs.rst`,
/// "Permission model"). What is not here, a task can't do to its files, whatever capabilities it has itself.
const PLUGIN: [Capability; 14] = [
    // Tasks' files, by way of their overlays, and directories that tasks can change.
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
    // The same, on kernels before 5.15: later overlays keep the immutable flag themselves.
    Capability::CAP_LINUX_IMMUTABLE,
    // Mounts, and the network namespaces of groups, which are entered.
    Capability::CAP_SYS_ADMIN,
    // The addresses that a sandbox has taken from a group's network.
    Capability::CAP_NET_ADMIN,
    // Tasks have users of their own.
    Capability::CAP_KILL,
    // Links below /proc of processes that have capabilities which the plugin lacks: shims, and some tasks (ptrace(2),
    // "Ptrace access mode checking").
    Capability::CAP_SYS_PTRACE,
    // A process that has more capabilities than the plugin is moved into a cpuset only with this (linux,
    // `security/commoncap.c`, `cap_safe_nice`): shims are.
    Capability::CAP_SYS_NICE,
    // OOM scores below the one that shims inherit; the blocks that file systems reserve for root.
    Capability::CAP_SYS_RESOURCE,
    // `metrics { address }` may have a port below 1024.
    Capability::CAP_NET_BIND_SERVICE,
];

/// linux, `include/uapi/linux/securebits.h`.
const SECBIT_NOROOT: libc::c_int = 1;

/// What became of the plugin's capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduced {
    /// It has only those that it needs.
    Yes,
    /// It kept all that it was started with, since programs that it executes would not get the others back.
    No(Inheritance),
}

/// Why a program that the plugin executes would have no more capabilities than the plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inheritance {
    /// It does not run as root.
    NotRoot,
    /// The agent was started with no_new_privs (systemd's `NoNewPrivileges`).
    NoNewPrivileges,
    /// The agent was started with SECBIT_NOROOT (systemd's `SecureBits`).
    NoRoot,
}

impl std::fmt::Display for Inheritance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotRoot => "this process does not run as root",
            Self::NoNewPrivileges => "the agent was started with no_new_privs",
            Self::NoRoot => "the agent was started with the secure bit noroot",
        })
    }
}

/// Takes from the calling thread, and from those that it starts, all capabilities that the plugin never needs. Must be
/// called before there is a second thread. Programs that are executed later have them again, by the bounding set.
///
/// # Errors
/// When the kernel refuses.
pub fn reduce_plugin() -> Result<Reduced, PrivilegeError> {
    if let Some(reason) = inheritance() {
        return Ok(Reduced::No(reason));
    }
    keep_only(&PLUGIN)?;
    Ok(Reduced::Yes)
}

/// Why executed programs would not have the bounding set's capabilities (capabilities(7), "Capabilities and execution of
/// programs by root"); `None` where they have.
fn inheritance() -> Option<Inheritance> {
    // SAFETY: prctl with numbers only.
    let secure_bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0) };
    if !nix::unistd::geteuid().is_root() || !nix::unistd::getuid().is_root() {
        Some(Inheritance::NotRoot)
    } else if nix::sys::prctl::get_no_new_privs().unwrap_or(true) {
        Some(Inheritance::NoNewPrivileges)
    } else if secure_bits & SECBIT_NOROOT != 0 {
        Some(Inheritance::NoRoot)
    } else {
        None
    }
}

/// Which system calls a process or thread may still make. All others answer EPERM.
#[derive(Debug, Clone, Copy)]
pub enum Calls<'a> {
    /// These only.
    Only(&'a [libc::c_long]),
    /// All but these.
    AllBut(&'a [libc::c_long]),
}

/// Confines the calling thread for the rest of its life, and what it starts: of its capabilities it keeps those in
/// `keep`, and gains none by executing a program. A process must call it while it has one thread.
///
/// # Errors
/// When the kernel has no seccomp, the architecture no filter, or capabilities stay.
pub fn confine(keep: &[Capability], calls: Calls<'_>) -> Result<(), PrivilegeError> {
    let program = filter(calls)?;
    nix::sys::prctl::set_no_new_privs().map_err(|errno| PrivilegeError::NoNewPrivileges(errno.into()))?;
    shrink_bounding_set(keep);
    keep_only(keep)?;
    Ok(apply_filter(&program)?)
}

/// The sets of the calling thread, of which it can have the effective and permitted one only as far as it has them now.
fn keep_only(keep: &[Capability]) -> Result<(), PrivilegeError> {
    let permitted: HashSet<Capability> =
        caps::read(None, CapSet::Permitted)?.into_iter().filter(|one| keep.contains(one)).collect();
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &permitted)?;
    }
    // The ambient set goes with the inheritable one.
    Ok(caps::clear(None, CapSet::Inheritable)?)
}

/// Leaves those in `keep` only. An agent without CAP_SETPCAP may not do that, nor need it be done: no_new_privs keeps an
/// executed program from gaining anything.
fn shrink_bounding_set(keep: &[Capability]) {
    for number in 0..u64::BITS {
        if !keep.iter().any(|one| u32::from(one.index()) == number) {
            // SAFETY: prctl with numbers only; one that the kernel does not know is refused.
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
        }
    }
}

fn filter(calls: Calls<'_>) -> Result<BpfProgram, PrivilegeError> {
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let numbers = |calls: &[libc::c_long], abi: libc::c_long| -> BTreeMap<i64, Vec<SeccompRule>> {
        calls.iter().map(|&number| (number | abi, Vec::new())).collect()
    };
    let (rules, others, listed) = match calls {
        Calls::Only(allowed) => (numbers(allowed, 0), refuse, SeccompAction::Allow),
        Calls::AllBut(refused) => {
            let mut rules = numbers(refused, 0);
            // The same calls by x32's numbers, which count as this architecture's.
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
        let text = std::fs::read_to_string("/proc/thread-self/status").expect("read");
        text.lines().find_map(|line| line.strip_prefix(field)).expect("a line").trim().to_owned()
    }

    #[test]
    fn a_thread_keeps_what_it_is_left_and_no_more() {
        let seen = thread::spawn(|| {
            let refused = [libc::SYS_socket];
            confine(&[Capability::CAP_DAC_OVERRIDE], Calls::AllBut(&refused)).expect("this kernel has seccomp");
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
        assert!(std::net::UdpSocket::bind("127.0.0.1:0").is_ok(), "other threads are free");
    }

    #[test]
    fn the_plugin_keeps_its_bounding_set() {
        let bounding = status("CapBnd:");
        let seen = thread::spawn(|| (reduce_plugin().expect("reduced"), status("CapEff:"), status("CapBnd:")));
        let (reduced, effective, left) = seen.join().expect("the thread ends");
        assert_eq!(left, bounding);
        if reduced == Reduced::Yes {
            let effective = u64::from_str_radix(&effective, 16).expect("a number");
            assert_eq!(effective & !PLUGIN.iter().fold(0, |set, one| set | one.bitmask()), 0);
            assert_ne!(effective, 0);
        }
        assert!(File::open("/dev/null").is_ok());
    }
}
