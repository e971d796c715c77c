//! System call numbers of each architecture for which the compiler makes filters.

use std::{collections::HashMap, sync::OnceLock};

use oci_spec::runtime::Arch;

/// An architecture that a filter can recognize: by `AUDIT_ARCH_*` (linux/audit.h), and x32 also by a bit in the number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Machine {
    /// 64-bit x86.
    X86_64,
    /// 32-bit x86.
    X86,
    /// x32: 64-bit x86 with 32-bit pointers.
    X32,
    /// 64-bit ARM.
    Aarch64,
    /// 32-bit ARM.
    Arm,
}

/// The bit that is set in the numbers of x32's calls, which otherwise are those of x86-64 (asm/unistd.h).
pub(super) const X32_BIT: u32 = 0x4000_0000;

/// Calls that x32 has under numbers of its own, from 512 upwards in this order, because their arguments contain
/// pointers or longs (arch/x86/entry/syscalls/syscall_64.tbl).
const X32_OWN: [&str; 36] = [
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];

/// Calls of x86-64 that x32 does not have at all (marked "64" in the same table).
const NOT_X32: [&str; 11] = [
    "_sysctl",
    "create_module",
    "epoll_ctl_old",
    "epoll_wait_old",
    "get_kernel_syms",
    "get_thread_area",
    "nfsservctl",
    "query_module",
    "set_thread_area",
    "uselib",
    "vserver",
];

/// Private calls of 32-bit ARM (asm/unistd.h: `__ARM_NR_BASE`), and calls for which profiles use another name.
const ARM_MORE: [(&str, u32); 5] = [
    ("breakpoint", 0x000f_0001),
    ("cacheflush", 0x000f_0002),
    ("set_tls", 0x000f_0005),
    ("arm_fadvise64_64", 270),
    ("sync_file_range2", 341),
];

impl Machine {
    /// All architectures, each of which has a table of numbers.
    pub(super) const ALL: [Self; 5] = [Self::X86_64, Self::X86, Self::X32, Self::Aarch64, Self::Arm];

    /// Returns the architecture that this program was built for, if the compiler can make a filter for it.
    pub fn of_this_host() -> Option<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Self::X86_64),
            "aarch64" => Some(Self::Aarch64),
            _ => None,
        }
    }

    /// Returns the architecture with the OCI spec's name, which is also libseccomp's.
    pub(super) fn from_oci(arch: Arch) -> Option<Self> {
        match arch {
            Arch::ScmpArchX86_64 => Some(Self::X86_64),
            Arch::ScmpArchX86 => Some(Self::X86),
            Arch::ScmpArchX32 => Some(Self::X32),
            Arch::ScmpArchAarch64 => Some(Self::Aarch64),
            Arch::ScmpArchArm => Some(Self::Arm),
            _ => None,
        }
    }

    /// Returns the kernel's value for the architecture in `seccomp_data.arch`.
    pub(super) fn audit(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
            Self::Aarch64 => 0xc000_00b7,
            Self::Arm => 0x4000_0028,
        }
    }

    /// Returns whether libseccomp compares 64 bits of an argument; it treats x32 as a 32-bit architecture.
    pub(super) fn has_wide_arguments(self) -> bool {
        matches!(self, Self::X86_64 | Self::Aarch64)
    }

    /// Returns the number of a call, or `None` for a call that this architecture does not have.
    pub fn number(self, name: &str) -> Option<u32> {
        static TABLES: OnceLock<HashMap<Machine, HashMap<&'static str, u32>>> = OnceLock::new();
        let tables = TABLES.get_or_init(|| Self::ALL.map(|machine| (machine, machine.table())).into_iter().collect());
        tables.get(&self)?.get(name).copied()
    }

    fn table(self) -> HashMap<&'static str, u32> {
        /// Returns the names and numbers of one architecture's calls. Each architecture's list is a type of its own.
        macro_rules! all {
            ($list:ident) => {
                syscalls::$list::Sysno::iter().filter_map(|call| Some((call.name(), u32::try_from(call.id()).ok()?)))
            };
        }
        match self {
            Self::X86_64 => all!(x86_64).collect(),
            Self::X86 => all!(x86).collect(),
            // Profiles use the kernel's own name of this call (asm-generic/unistd.h).
            Self::Aarch64 => all!(aarch64).chain([("newfstatat", 79)]).collect(),
            Self::Arm => all!(arm).chain(ARM_MORE).collect(),
            Self::X32 => all!(x86_64)
                .filter(|(name, _)| !NOT_X32.contains(name))
                .chain(X32_OWN.into_iter().zip(512..))
                .map(|(name, number)| (name, X32_BIT | number))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_each_architectures_own() {
        assert_eq!(Machine::X86_64.number("openat"), Some(257));
        assert_eq!(Machine::X86.number("openat"), Some(295));
        assert_eq!(Machine::X32.number("rt_sigaction"), Some(X32_BIT + 512));
        assert_eq!(Machine::Aarch64.number("open"), None);
        assert_eq!(Machine::Arm.number("set_tls"), Some(0x000f_0005));
        assert_eq!(Machine::X86_64.number("nonsense"), None);
    }
}
