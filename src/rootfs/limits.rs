//! Options of a job that change a container's defaults, and the checks of their form: limits of setrlimit(2), kernel
//! parameters, namespaces and annotations.

use std::{collections::BTreeMap, path::Path};

use nix::sys::resource::Resource;
use oci_spec::runtime::PosixRlimitType;

/// A limit of setrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ulimit {
    /// The resource that is limited.
    pub kind: PosixRlimitType,
    /// The soft limit, which the kernel enforces.
    pub soft: u64,
    /// The hard limit, up to which the task may raise the soft one.
    pub hard: u64,
}

/// The limits of setrlimit(2): docker's names (docker/go-units, `ulimit.go`), OCI's and the kernel's.
pub const ULIMITS: [(&str, PosixRlimitType, Resource); 15] = [
    ("core", PosixRlimitType::RlimitCore, Resource::RLIMIT_CORE),
    ("cpu", PosixRlimitType::RlimitCpu, Resource::RLIMIT_CPU),
    ("data", PosixRlimitType::RlimitData, Resource::RLIMIT_DATA),
    ("fsize", PosixRlimitType::RlimitFsize, Resource::RLIMIT_FSIZE),
    ("locks", PosixRlimitType::RlimitLocks, Resource::RLIMIT_LOCKS),
    ("memlock", PosixRlimitType::RlimitMemlock, Resource::RLIMIT_MEMLOCK),
    ("msgqueue", PosixRlimitType::RlimitMsgqueue, Resource::RLIMIT_MSGQUEUE),
    ("nice", PosixRlimitType::RlimitNice, Resource::RLIMIT_NICE),
    ("nofile", PosixRlimitType::RlimitNofile, Resource::RLIMIT_NOFILE),
    ("nproc", PosixRlimitType::RlimitNproc, Resource::RLIMIT_NPROC),
    ("rss", PosixRlimitType::RlimitRss, Resource::RLIMIT_RSS),
    ("rtprio", PosixRlimitType::RlimitRtprio, Resource::RLIMIT_RTPRIO),
    ("rttime", PosixRlimitType::RlimitRttime, Resource::RLIMIT_RTTIME),
    ("sigpending", PosixRlimitType::RlimitSigpending, Resource::RLIMIT_SIGPENDING),
    ("stack", PosixRlimitType::RlimitStack, Resource::RLIMIT_STACK),
];

impl Ulimit {
    /// Returns a limit on open files, with the same soft and hard value.
    pub fn files(limit: u64) -> Self {
        Self { kind: PosixRlimitType::RlimitNofile, soft: limit, hard: limit }
    }

    /// Returns docker's name of the limit.
    pub fn name(&self) -> &'static str {
        ULIMITS.iter().find(|(_, kind, _)| *kind == self.kind).map_or("ulimit", |(name, ..)| name)
    }

    /// Parses a limit such as `nofile` with the value `1024:2048` (soft and hard). A single number is both. `-1` and
    /// `unlimited` mean no limit.
    ///
    /// # Errors
    /// Returns a description of what is wrong.
    pub fn parse(name: &str, value: &str) -> Result<Self, String> {
        let known = ULIMITS.iter().find(|(known, ..)| *known == name);
        let Some((_, kind, _)) = known else {
            let names = ULIMITS.map(|(name, ..)| name).join(", ");
            return Err(format!("{name:?} is not a limit; the limits are {names}"));
        };
        let number = |text: &str| match text {
            "-1" | "unlimited" => Some(libc::RLIM_INFINITY),
            text => text.parse::<u64>().ok(),
        };
        let (soft, hard) = value.split_once(':').unwrap_or((value, value));
        match (number(soft), number(hard)) {
            (Some(soft), Some(hard)) if soft <= hard => Ok(Self { kind: *kind, soft, hard }),
            (Some(_), Some(_)) => Err(format!("{name} = {value:?}: the soft limit is above the hard one")),
            _ => Err(format!("{name} = {value:?} is not a number, or soft:hard")),
        }
    }
}

/// Whether a task has a namespace of its own or shares the host's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Namespace {
    /// The task has a namespace of its own.
    #[default]
    Private,
    /// The task is in the host's namespace.
    Host,
}

/// The namespaces of a task. Its mount namespace is always its own, and its network is a `NetworkNamespace`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// The namespace of process ids.
    pub pid: Namespace,
    /// The namespace of System V IPC and POSIX message queues. /dev/shm is the task's own or the host's accordingly.
    pub ipc: Namespace,
    /// The namespace of the host name.
    pub uts: Namespace,
    /// The cgroup namespace. With `None` it is the task's own on cgroup version 2 and the host's on version 1, as in
    /// docker.
    pub cgroup: Option<Namespace>,
}

/// Kernel parameters that belong to an IPC namespace (`ipc_namespaces(7)`), besides those that begin with `fs.mqueue.`.
const IPC_SYSCTLS: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Checks whether a task with these namespaces may set this kernel parameter. A parameter that does not belong to one
/// of the task's own namespaces would be set for the whole host.
///
/// # Errors
/// Returns the reason why the task may not set it.
pub fn check_sysctl(name: &str, namespaces: Namespaces, network: Namespace) -> Result<(), String> {
    let (owner, option) = if name.starts_with("net.") {
        (network, "host_network")
    } else if name.starts_with("fs.mqueue.") || IPC_SYSCTLS.contains(&name) {
        (namespaces.ipc, "ipc_mode = \"host\"")
    } else if name == "kernel.domainname" {
        (namespaces.uts, "uts_mode = \"host\"")
    } else {
        return Err(format!("{name:?} belongs to no namespace of a container; it would be set for the whole host"));
    };
    match owner {
        Namespace::Private => Ok(()),
        Namespace::Host => Err(format!("{name:?} would be set for the whole host with {option}")),
    }
}

/// Kernel parameters that docker sets in the network namespaces of its containers (moby, `daemon/oci_linux.go`):
/// programs that are not root may listen on every port, and may send ICMP echo requests.
const NETWORK_SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// The kernel parameters that tasks with a network namespace have by default.
#[derive(Debug, Clone, Default)]
pub struct DefaultSysctls(Vec<(&'static str, &'static str)>);

impl DefaultSysctls {
    /// Returns docker's parameters, without those that this host's kernel does not have.
    pub fn for_this_host() -> Self {
        let exists = |name: &str| Path::new("/proc/sys").join(name.replace('.', "/")).exists();
        Self(NETWORK_SYSCTLS.into_iter().filter(|(name, _)| exists(name)).collect())
    }

    /// Adds the parameters that the job does not set itself.
    pub fn add_missing(&self, job: &mut BTreeMap<String, String>) {
        for (name, value) in &self.0 {
            job.entry((*name).to_owned()).or_insert_with(|| (*value).to_owned());
        }
    }
}

/// Prefixes of keys that runtimes and this driver act on. A job that could set them could change its own confinement.
const RESERVED_PREFIXES: [&str; 13] = [
    "module.wasm.",
    "krun.",
    "cdi.k8s.io/",
    "nvidia.cdi.k8s.io/",
    "run.oci.",
    "org.systemd.property.",
    "org.criu.",
    "dev.gvisor.",
    "io.kubernetes.",
    "io.containerd.",
    "io.katacontainers.",
    "com.hashicorp.nomad.",
    "org.opencontainers.",
];

/// Checks the keys of labels and annotations.
///
/// # Errors
/// Fails with the first key that a job may not set.
pub fn check_annotations(annotations: &BTreeMap<String, String>) -> Result<(), String> {
    match annotations
        .keys()
        .find(|key| key.is_empty() || RESERVED_PREFIXES.iter().any(|prefix| key.starts_with(prefix)))
    {
        None => Ok(()),
        Some(key) if key.is_empty() => Err("a key is empty".to_owned()),
        Some(key) => Err(format!("{key:?} is reserved for the runtime and this driver")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ulimits_are_dockers() {
        let nofile = Ulimit::parse("nofile", "1024:2048").expect("a limit");
        assert_eq!((nofile.kind, nofile.soft, nofile.hard), (PosixRlimitType::RlimitNofile, 1024, 2048));
        let core = Ulimit::parse("core", "unlimited").expect("a limit");
        assert_eq!((core.soft, core.hard), (u64::MAX, u64::MAX));
        assert_eq!(Ulimit::parse("nproc", "7").expect("a limit").hard, 7);
        for (name, value, part) in
            [("files", "1", "is not a limit"), ("nofile", "2:1", "above the hard"), ("nofile", "x", "not a number")]
        {
            assert!(Ulimit::parse(name, value).expect_err("refused").contains(part), "{name} {value}");
        }
    }

    #[test]
    fn only_parameters_of_own_namespaces_can_be_set() {
        let own = Namespaces::default();
        for name in ["net.core.somaxconn", "kernel.shmmax", "fs.mqueue.msg_max", "kernel.domainname"] {
            assert_eq!(check_sysctl(name, own, Namespace::Private), Ok(()), "{name}");
            let hosts = Namespaces { ipc: Namespace::Host, uts: Namespace::Host, ..own };
            assert!(check_sysctl(name, hosts, Namespace::Host).is_err(), "{name}");
        }
        for name in ["kernel.panic", "vm.swappiness", "kernel.hostname", "kernel.shm", ""] {
            assert!(check_sysctl(name, own, Namespace::Private).is_err(), "{name}");
        }
    }

    #[test]
    fn keys_that_runtimes_act_on_are_refused() {
        let with = |key: &str| check_annotations(&BTreeMap::from([(key.to_owned(), String::new())]));
        assert!(with("team").is_ok() && with("example.com/run.oci.x").is_ok());
        for key in ["run.oci.seccomp_bpf_data", "dev.gvisor.flag.network", ""] {
            assert!(with(key).is_err(), "{key}");
        }
    }
}
