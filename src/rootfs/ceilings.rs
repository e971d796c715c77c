//! Upper bounds on what jobs may ask for: limits of setrlimit(2), and the size of file systems in memory. Everything
//! here is pure except [`HostLimits::read`].

use std::collections::BTreeMap;

use nix::{
    sys::resource::getrlimit,
    unistd::{SysconfVar, sysconf},
};

use super::{
    limits::{ULIMITS, Ulimit},
    tmpfs_size::{SHM_SIZE, TmpfsSize},
};
use crate::{ids::Flavor, process};

/// Limits that would give a job a priority above the host's own processes: a real-time one (`rtprio`), or one set by
/// nice(2). With `Flavor::Strict` they are 0 by default, whatever limits the agent itself has.
const PRIORITIES: [&str; 2] = ["rtprio", "nice"];
/// The size that the kernel gives a tmpfs without a size option, in percent of the host's memory (tmpfs(5)).
const KERNEL_DEFAULT_PERCENT: u64 = 50;
/// The page size that is assumed where the kernel does not report one.
const FALLBACK_PAGE_SIZE: u64 = 4096;

/// Why a job's limit or file system is refused: it is larger than the operator allows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CeilingError {
    /// A limit of setrlimit(2) is above its ceiling.
    #[error(
        "{name} = {} is above {}, the maximum on this node; lower it, or have the operator raise the plugin option security {{ ulimit_max }}",
        limit_text(*.wanted),
        limit_text(*.ceiling)
    )]
    Ulimit {
        /// docker's name of the limit.
        name: &'static str,
        /// The hard limit that the job asks for.
        wanted: u64,
        /// The highest value that is allowed.
        ceiling: u64,
    },
    /// A file system in memory is larger than the ceiling.
    #[error("{option:?} is above {} MiB, the maximum on this node; lower it, or have the operator raise the plugin option security {{ tmpfs_max }}", .ceiling >> 20)]
    Memory {
        /// The option, as the job has it.
        option: String,
        /// The largest size that is allowed, in bytes.
        ceiling: u64,
    },
    /// A file system in memory is larger than the ceiling, and the size of the host's memory is not known.
    #[error(
        "{option:?} is above {ceiling} % of the host's memory, the maximum on this node; lower it, or have the operator raise the plugin option security {{ tmpfs_max }}"
    )]
    Share {
        /// The option, as the job has it.
        option: String,
        /// The largest share of the host's memory that is allowed, in percent.
        ceiling: u64,
    },
}

fn limit_text(limit: u64) -> String {
    if limit == libc::RLIM_INFINITY { "unlimited".to_owned() } else { limit.to_string() }
}

/// The limits of this host and this process. They bound jobs where the operator has set no ceiling.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostLimits {
    /// Soft and hard limits of this process, by docker's names. Its child processes inherit them.
    rlimits: BTreeMap<&'static str, (u64, u64)>,
    /// The host's memory in bytes, where the kernel reports it.
    memory: Option<u64>,
    /// The size of a page in bytes, where the kernel reports it.
    page: Option<u64>,
}

impl HostLimits {
    /// Reads the limits from the kernel.
    pub fn read() -> Self {
        let limit = |(name, _, resource)| {
            // getrlimit(2) fails only for limits that the kernel does not know, and such limits bound nothing.
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

    /// Returns a host with this much memory and no limits.
    #[cfg(test)]
    pub fn of_memory(memory: u64) -> Self {
        Self { memory: Some(memory), ..Self::default() }
    }
}

/// Upper bounds on what jobs may ask for: `security { ulimit_max, tmpfs_max }`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ceilings {
    /// The ceilings of setrlimit(2) limits, by docker's names.
    ulimits: BTreeMap<&'static str, u64>,
    /// Whether each limit that is not in `ulimits` is bounded by this process's own limit.
    is_bounded_by_own_limits: bool,
    tmpfs: TmpfsSize,
    /// The host's limits; `None` when another host's configuration is checked.
    host: Option<HostLimits>,
}

impl Ceilings {
    /// Merges the operator's ceilings with the defaults. With `Flavor::Strict` jobs get by default no priorities, no
    /// limit above this process's own, and no file system in memory above the kernel's default size. With
    /// `Flavor::ContainerdDriver` there are no default ceilings.
    pub fn new(flavor: Flavor, ulimits: BTreeMap<&'static str, u64>, tmpfs: Option<TmpfsSize>) -> Self {
        let mut all = BTreeMap::new();
        let (own_limits, default) = match flavor {
            Flavor::ContainerdDriver => (false, TmpfsSize::Unlimited),
            Flavor::Strict => {
                all.extend(PRIORITIES.map(|name| (name, 0)));
                (true, TmpfsSize::Percent(KERNEL_DEFAULT_PERCENT))
            }
        };
        all.extend(ulimits);
        Self { ulimits: all, is_bounded_by_own_limits: own_limits, tmpfs: tmpfs.unwrap_or(default), host: None }
    }

    /// Adds the limits of the host. Without the host's limits, only the ceilings apply that are the same on every host.
    #[must_use]
    pub fn on_host(self, host: HostLimits) -> Self {
        Self { host: Some(host), ..self }
    }

    fn ulimit(&self, name: &str) -> Option<u64> {
        let own = || self.host.as_ref()?.rlimits.get(name).map(|(_, hard)| *hard);
        self.ulimits.get(name).copied().or_else(|| self.is_bounded_by_own_limits.then(own).flatten())
    }

    /// Checks a job's limit against the ceiling.
    ///
    /// # Errors
    /// Fails when the hard limit is above the ceiling.
    pub fn check_ulimit(&self, limit: &Ulimit) -> Result<(), CeilingError> {
        let name = limit.name();
        match self.ulimit(name) {
            Some(ceiling) if limit.hard > ceiling => Err(CeilingError::Ulimit { name, wanted: limit.hard, ceiling }),
            _ => Ok(()),
        }
    }

    /// Returns the limits that a task gets where its job sets none. Otherwise the task would inherit this process's
    /// limits, which may be above the ceiling.
    ///
    /// With `Flavor::Strict` the limit on open files is always one of these: a shim that was built with Go before
    /// 1.19.9 or 1.20.4 raises its own soft limit (src/os/rlimit.go), and the runtime and the task inherit it.
    pub fn default_ulimits(&self) -> Vec<Ulimit> {
        let own = self.host.as_ref().map(|host| &host.rlimits);
        let inherited = |name| own.and_then(|own| own.get(name)).copied().unwrap_or((0, 0));
        let lowered = ULIMITS.iter().filter_map(|(name, kind, _)| {
            let (soft, hard) = inherited(name);
            match self.ulimits.get(name) {
                Some(&ceiling) if ceiling <= hard => {
                    Some(Ulimit { kind: *kind, soft: soft.min(ceiling), hard: ceiling })
                }
                _ if *name == "nofile" && self.is_bounded_by_own_limits && own.is_some() => {
                    Some(Ulimit { kind: *kind, soft, hard })
                }
                _ => None,
            }
        });
        lowered.collect()
    }

    /// Returns the size of a page of the host's memory.
    pub fn page(&self) -> u64 {
        self.host.as_ref().and_then(|host| host.page).unwrap_or(FALLBACK_PAGE_SIZE)
    }

    /// Returns whether there is a ceiling on file systems in memory.
    pub fn bounds_memory(&self) -> bool {
        self.tmpfs != TmpfsSize::Unlimited
    }

    /// Checks the size of a file system in memory against the ceiling. `option` names it in the error.
    ///
    /// # Errors
    /// Fails when the size is above the ceiling.
    pub fn check_memory(&self, option: &str, size: TmpfsSize) -> Result<(), CeilingError> {
        let memory = self.host.as_ref().and_then(|host| host.memory);
        let option = option.to_owned();
        match (size.bytes(memory), self.tmpfs.bytes(memory)) {
            (Some(size), Some(ceiling)) if size > ceiling => Err(CeilingError::Memory { option, ceiling }),
            (Some(_), Some(_)) => Ok(()),
            // The host's memory is not known. Shares of it can still be compared, and "unlimited" is above every share.
            _ => match (size, self.tmpfs) {
                (TmpfsSize::Percent(share), TmpfsSize::Percent(ceiling)) if share > ceiling => {
                    Err(CeilingError::Share { option, ceiling })
                }
                (TmpfsSize::Unlimited, TmpfsSize::Percent(ceiling)) => Err(CeilingError::Share { option, ceiling }),
                _ => Ok(()),
            },
        }
    }

    /// Returns the ceiling on file systems in memory, in bytes, if it is below the kernel's default size.
    pub fn below_kernel_default(&self) -> Option<u64> {
        let memory = self.host.as_ref()?.memory;
        let default = TmpfsSize::Percent(KERNEL_DEFAULT_PERCENT).bytes(memory)?;
        self.tmpfs.bytes(memory).filter(|ceiling| *ceiling < default)
    }

    /// Returns the size of `/dev/shm` for a task whose job does not set it, if the default size is above the ceiling.
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
        let ceilings = Ceilings::new(Flavor::Strict, [].into(), None).on_host(host());
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
        let drop_in = Ceilings::new(Flavor::ContainerdDriver, [].into(), None).on_host(host());
        assert_eq!(check(&drop_in, "rtprio", "99"), Ok(()));
    }

    #[test]
    fn the_operators_ceiling_beats_the_default() {
        let ulimits = [("rtprio", 20), ("nofile", 1 << 20)].into();
        let ceilings = Ceilings::new(Flavor::Strict, ulimits, None).on_host(host());
        assert_eq!(check(&ceilings, "rtprio", "20"), Ok(()));
        assert_eq!(check(&ceilings, "nofile", "1048576"), Ok(()));
        assert!(check(&ceilings, "rtprio", "21").is_err() && check(&ceilings, "nofile", "-1").is_err());
        let drop_in = Ceilings::new(Flavor::ContainerdDriver, [("rtprio", 1)].into(), None);
        assert!(check(&drop_in, "rtprio", "2").is_err(), "the operator's ceiling applies with every flavor");
    }

    #[test]
    fn tasks_inherit_nothing_above_the_ceiling() {
        let ulimits = [("nofile", 2048)].into();
        let ceilings = Ceilings::new(Flavor::Strict, ulimits, None).on_host(host());
        let limits: Vec<_> =
            ceilings.default_ulimits().iter().map(|limit| (limit.name(), limit.soft, limit.hard)).collect();
        assert_eq!(limits, [("nice", 0, 0), ("nofile", 1024, 2048), ("rtprio", 0, 0)]);
        let above = Ceilings::new(Flavor::ContainerdDriver, [("nofile", 8192)].into(), None).on_host(host());
        assert_eq!(above.default_ulimits(), [], "nothing is raised");
        let plain = Ceilings::new(Flavor::Strict, [].into(), None).on_host(host());
        let limits: Vec<_> =
            plain.default_ulimits().iter().map(|limit| (limit.name(), limit.soft, limit.hard)).collect();
        assert_eq!(
            limits,
            [("nice", 0, 0), ("nofile", 1024, 4096), ("rtprio", 0, 0)],
            "the limit on open files is the one that the driver was started with"
        );
    }

    #[test]
    fn without_a_host_only_fixed_ceilings_apply() {
        let ceilings = Ceilings::new(Flavor::Strict, [].into(), None);
        assert_eq!(check(&ceilings, "nofile", "unlimited"), Ok(()));
        assert!(check(&ceilings, "rtprio", "1").is_err(), "this ceiling is the same on every host");
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
