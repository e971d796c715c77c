//! The most that jobs may ask for: limits of setrlimit(2), and the size of file systems in memory. Everything here is
//! pure but [`HostLimits::read`].

use std::collections::BTreeMap;

use nix::{
    sys::resource::getrlimit,
    unistd::{SysconfVar, sysconf},
};

use super::{
    limits::{ULIMITS, Ulimit},
    tmpfs::{SHM_SIZE, TmpfsSize},
};
use crate::{ids::Flavor, process};

/// No job gets a priority over the host's own processes under the driver's own name, whatever the agent has: neither a
/// real-time one (`rtprio`) nor one by nice(2).
const PRIORITIES: [&str; 2] = ["rtprio", "nice"];
/// What the kernel gives a tmpfs without a size, in percent of the host's memory (tmpfs(5)).
const KERNEL_DEFAULT: u64 = 50;
/// The size of a page where the kernel does not say it.
const PAGE: u64 = 4096;

/// What a job asks for is more than the operator allows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CeilingError {
    /// A limit of setrlimit(2).
    #[error(
        "{name} = {} is above {}, the most on this node; ask for no more, or have the operator raise the plugin option security {{ ulimit_max }}",
        shown(*.wanted),
        shown(*.ceiling)
    )]
    Ulimit {
        /// docker's name of the limit.
        name: &'static str,
        /// The hard limit that the job asks for.
        wanted: u64,
        /// The most that it may.
        ceiling: u64,
    },
    /// The size of a file system in memory.
    #[error("{option:?} is above {} MiB, the most on this node; ask for no more, or have the operator raise the plugin option security {{ tmpfs_max }}", .ceiling >> 20)]
    Memory {
        /// The option, as the job has it.
        option: String,
        /// The most that it may ask for, in bytes.
        ceiling: u64,
    },
    /// The size of a file system in memory, where the host's memory is not known.
    #[error(
        "{option:?} is above {ceiling} % of the host's memory; ask for no more, or have the operator raise the plugin option security {{ tmpfs_max }}"
    )]
    Share {
        /// The option, as the job has it.
        option: String,
        /// The most that it may ask for, in percent.
        ceiling: u64,
    },
}

fn shown(limit: u64) -> String {
    if limit == libc::RLIM_INFINITY { "unlimited".to_owned() } else { limit.to_string() }
}

/// What this host and this process have. It bounds jobs where the operator has set no bound.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostLimits {
    /// Soft and hard limits of this process, by docker's names. What it starts inherits them.
    rlimits: BTreeMap<&'static str, (u64, u64)>,
    /// The host's memory in bytes, where the kernel says it.
    memory: Option<u64>,
    /// The size of a page in bytes, likewise.
    page: Option<u64>,
}

impl HostLimits {
    /// Asks the kernel.
    pub fn read() -> Self {
        let limit = |(name, _, resource)| {
            // It fails for limits only that the kernel does not know, and these bound nothing.
            let (soft, hard) = getrlimit(resource).unwrap_or((libc::RLIM_INFINITY, libc::RLIM_INFINITY));
            let soft = if name == "nofile" { process::inherited_descriptor_limit().unwrap_or(soft) } else { soft };
            (name, (soft, hard))
        };
        let number = |variable| sysconf(variable).ok().flatten().and_then(|number| u64::try_from(number).ok());
        let pages = number(SysconfVar::_PHYS_PAGES).filter(|pages| *pages > 0);
        let page = number(SysconfVar::PAGE_SIZE);
        let memory = pages.zip(page).map(|(pages, page)| pages.saturating_mul(page));
        Self { rlimits: ULIMITS.into_iter().map(limit).collect(), memory, page }
    }

    /// A host with this much memory and no limits.
    #[cfg(test)]
    pub fn of_memory(memory: u64) -> Self {
        Self { memory: Some(memory), ..Self::default() }
    }
}

/// The most that jobs may ask for: `security { ulimit_max, tmpfs_max }`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ceilings {
    /// By docker's names.
    ulimits: BTreeMap<&'static str, u64>,
    /// Is every limit that is not in `ulimits` bounded by this process's own?
    own_limits: bool,
    tmpfs: TmpfsSize,
    /// Unknown where a configuration is checked that is another host's.
    host: Option<HostLimits>,
}

impl Ceilings {
    /// The operator's ceilings over the defaults: under the driver's own name, no priorities, no limit above this
    /// process's own, and no file system in memory above the kernel's default. As containerd-driver there are none.
    pub fn new(flavor: Flavor, ulimits: BTreeMap<&'static str, u64>, tmpfs: Option<TmpfsSize>) -> Self {
        let mut all = BTreeMap::new();
        let (own_limits, default) = match flavor {
            Flavor::DropIn => (false, TmpfsSize::Unlimited),
            Flavor::Secure => {
                all.extend(PRIORITIES.map(|name| (name, 0)));
                (true, TmpfsSize::Percent(KERNEL_DEFAULT))
            }
        };
        all.extend(ulimits);
        Self { ulimits: all, own_limits, tmpfs: tmpfs.unwrap_or(default), host: None }
    }

    /// The same on a host with these limits. Until then only those ceilings hold that are the same on every host.
    #[must_use]
    pub fn on_host(self, host: HostLimits) -> Self {
        Self { host: Some(host), ..self }
    }

    fn ulimit(&self, name: &str) -> Option<u64> {
        let own = || self.host.as_ref()?.rlimits.get(name).map(|(_, hard)| *hard);
        self.ulimits.get(name).copied().or_else(|| self.own_limits.then(own).flatten())
    }

    /// Holds a job's limit against the ceiling.
    ///
    /// # Errors
    /// When it is above.
    pub fn check_ulimit(&self, limit: &Ulimit) -> Result<(), CeilingError> {
        let name = limit.name();
        match self.ulimit(name) {
            Some(ceiling) if limit.hard > ceiling => Err(CeilingError::Ulimit { name, wanted: limit.hard, ceiling }),
            _ => Ok(()),
        }
    }

    /// The limits of a task whose job says nothing of them. Without these it would have this process's, which may be
    /// above the ceiling.
    ///
    /// The limit on descriptors is always among them under the driver's own name. A shim that was built by a Go before
    /// 1.19.9 or 1.20.4 raises its own soft limit (src/os/rlimit.go) and hands it down to the runtime and the task.
    pub fn defaults(&self) -> Vec<Ulimit> {
        let own = self.host.as_ref().map(|host| &host.rlimits);
        let inherited = |name| own.and_then(|own| own.get(name)).copied().unwrap_or((0, 0));
        let lowered = ULIMITS.iter().filter_map(|(name, kind, _)| {
            let (soft, hard) = inherited(name);
            match self.ulimits.get(name) {
                Some(&ceiling) if ceiling <= hard => {
                    Some(Ulimit { kind: *kind, soft: soft.min(ceiling), hard: ceiling })
                }
                _ if *name == "nofile" && self.own_limits && own.is_some() => Some(Ulimit { kind: *kind, soft, hard }),
                _ => None,
            }
        });
        lowered.collect()
    }

    /// The size of a page of the host's memory.
    pub fn page(&self) -> u64 {
        self.host.as_ref().and_then(|host| host.page).unwrap_or(PAGE)
    }

    /// Is there a ceiling on file systems in memory?
    pub fn bounds_memory(&self) -> bool {
        self.tmpfs != TmpfsSize::Unlimited
    }

    /// Holds the size of a file system in memory against the ceiling. `option` names it in the error.
    ///
    /// # Errors
    /// When it is above.
    pub fn check_memory(&self, option: &str, size: TmpfsSize) -> Result<(), CeilingError> {
        let memory = self.host.as_ref().and_then(|host| host.memory);
        let option = option.to_owned();
        match (size.bytes(memory), self.tmpfs.bytes(memory)) {
            (Some(size), Some(ceiling)) if size > ceiling => Err(CeilingError::Memory { option, ceiling }),
            (Some(_), Some(_)) => Ok(()),
            // The memory is not known: shares of it can be compared, and nothing is larger than no limit.
            _ => match (size, self.tmpfs) {
                (TmpfsSize::Percent(share), TmpfsSize::Percent(ceiling)) if share > ceiling => {
                    Err(CeilingError::Share { option, ceiling })
                }
                (TmpfsSize::Unlimited, TmpfsSize::Percent(ceiling)) => Err(CeilingError::Share { option, ceiling }),
                _ => Ok(()),
            },
        }
    }

    /// The ceiling on file systems in memory, in bytes, where it is below what the kernel gives one without a size.
    pub fn below_kernel_default(&self) -> Option<u64> {
        let memory = self.host.as_ref()?.memory;
        let default = TmpfsSize::Percent(KERNEL_DEFAULT).bytes(memory)?;
        self.tmpfs.bytes(memory).filter(|ceiling| *ceiling < default)
    }

    /// The size of `/dev/shm` for a task whose job says nothing of it, where the usual one is above the ceiling.
    pub fn shm_size(&self) -> Option<u64> {
        self.below_kernel_default().filter(|ceiling| *ceiling < SHM_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostLimits {
        let rlimits = [("nofile", (1024, 4096)), ("rtprio", (0, 50)), ("nice", (0, 0)), ("memlock", (8, 8))];
        HostLimits { rlimits: rlimits.into(), memory: Some(8 << 30), page: None }
    }

    fn check(ceilings: &Ceilings, name: &str, value: &str) -> Result<(), String> {
        let limit = Ulimit::parse(name, value).expect("a limit");
        ceilings.check_ulimit(&limit).map_err(|error| error.to_string())
    }

    #[test]
    fn no_job_gets_more_than_the_agent_has() {
        let ceilings = Ceilings::new(Flavor::Secure, [].into(), None).on_host(host());
        for (name, value) in [("nofile", "10:4096"), ("memlock", "8"), ("rtprio", "0"), ("core", "unlimited")] {
            assert_eq!(check(&ceilings, name, value), Ok(()), "{name}");
        }
        for (name, value, part) in [
            ("nofile", "10:4097", "nofile = 4097 is above 4096"),
            ("memlock", "-1", "memlock = unlimited is above 8"),
            ("rtprio", "1", "rtprio = 1 is above 0"),
            ("nice", "40", "nice = 40 is above 0"),
        ] {
            let error = check(&ceilings, name, value).expect_err("refused");
            assert!(error.contains(part) && error.contains("security { ulimit_max }"), "{error}");
        }
        let drop_in = Ceilings::new(Flavor::DropIn, [].into(), None).on_host(host());
        assert_eq!(check(&drop_in, "rtprio", "99"), Ok(()));
    }

    #[test]
    fn the_operators_ceiling_beats_the_default() {
        let ulimits = [("rtprio", 20), ("nofile", 1 << 20)].into();
        let ceilings = Ceilings::new(Flavor::Secure, ulimits, None).on_host(host());
        assert_eq!(check(&ceilings, "rtprio", "20"), Ok(()));
        assert_eq!(check(&ceilings, "nofile", "1048576"), Ok(()));
        assert!(check(&ceilings, "rtprio", "21").is_err() && check(&ceilings, "nofile", "-1").is_err());
        let drop_in = Ceilings::new(Flavor::DropIn, [("rtprio", 1)].into(), None);
        assert!(check(&drop_in, "rtprio", "2").is_err(), "one that is set holds under every name");
    }

    #[test]
    fn tasks_inherit_nothing_above_the_ceiling() {
        let ulimits = [("nofile", 2048)].into();
        let ceilings = Ceilings::new(Flavor::Secure, ulimits, None).on_host(host());
        let limits: Vec<_> = ceilings.defaults().iter().map(|limit| (limit.name(), limit.soft, limit.hard)).collect();
        assert_eq!(limits, [("nice", 0, 0), ("nofile", 1024, 2048), ("rtprio", 0, 0)]);
        let above = Ceilings::new(Flavor::DropIn, [("nofile", 8192)].into(), None).on_host(host());
        assert_eq!(above.defaults(), [], "nothing is raised");
        let plain = Ceilings::new(Flavor::Secure, [].into(), None).on_host(host());
        let limits: Vec<_> = plain.defaults().iter().map(|limit| (limit.name(), limit.soft, limit.hard)).collect();
        assert_eq!(
            limits,
            [("nice", 0, 0), ("nofile", 1024, 4096), ("rtprio", 0, 0)],
            "what the driver was started with"
        );
    }

    #[test]
    fn another_hosts_limits_are_not_this_ones() {
        let ceilings = Ceilings::new(Flavor::Secure, [].into(), None);
        assert_eq!(check(&ceilings, "nofile", "unlimited"), Ok(()));
        assert!(check(&ceilings, "rtprio", "1").is_err(), "the same on every host");
        let size = |text: &str| ceilings.check_memory(text, TmpfsSize::parse(text).expect("a size"));
        assert_eq!(size("900t"), Ok(()));
        assert_eq!(size("50%"), Ok(()));
        assert!(size("51%").is_err() && size("0").is_err());
    }

    #[test]
    fn this_process_has_limits_and_memory() {
        let host = HostLimits::read();
        assert_eq!(host.rlimits.len(), ULIMITS.len());
        assert!(host.memory.is_some_and(|memory| memory > 1 << 24), "{:?}", host.memory);
    }
}
