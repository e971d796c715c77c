//! The intended differences between docker and the driver. docs/compatibility.md has the same list; a test holds both
//! together, and each line must occur, so that the list stays true.

/// An intended difference, and a row of the page.
pub(crate) struct Difference {
    pub what: &'static str,
    /// What docker does, in words.
    pub docker: &'static str,
    /// What the driver does, in words.
    pub driver: &'static str,
    pub reason: &'static str,
    /// The change since which docker does the same as the driver. Its lines need not occur with a docker of today.
    pub current: Option<&'static str>,
    pub lines: &'static [Line],
}

/// Lines of the probe that differ. `*` in a pattern stands for any text, and `(absent)` for a key that is not there.
pub(crate) struct Line {
    /// The names of the cases in which the line must occur; empty if it may occur in all, and must in one.
    pub cases: &'static [&'static str],
    /// The runtime; `None` for all.
    pub runtime: Option<&'static str>,
    /// Whether the line occurs only on some hosts.
    pub is_of_host: bool,
    pub key: &'static str,
    pub docker: &'static str,
    pub ours: &'static str,
}

impl Line {
    /// Tells whether the line is for this case and this runtime.
    pub(crate) fn applies(&self, case: &str, runtime: &str) -> bool {
        (self.cases.is_empty() || self.cases.contains(&case)) && self.runtime.is_none_or(|own| own == runtime)
    }

    const fn only_in(self, cases: &'static [&'static str]) -> Self {
        Self { cases, ..self }
    }

    const fn on_some_hosts(self) -> Self {
        Self { is_of_host: true, ..self }
    }
}

/// A line of all cases and runtimes.
const fn line(key: &'static str, docker: &'static str, ours: &'static str) -> Line {
    Line { cases: &[], runtime: None, is_of_host: false, key, docker, ours }
}

/// A line of all cases with crun.
const fn crun(key: &'static str, docker: &'static str, ours: &'static str) -> Line {
    Line { runtime: Some("crun"), ..line(key, docker, ours) }
}

/// A line of all cases with gVisor's runsc.
const fn runsc(key: &'static str, docker: &'static str, ours: &'static str) -> Line {
    Line { runtime: Some("runsc"), ..line(key, docker, ours) }
}

/// A line of all cases with runc.
const fn runc(key: &'static str, docker: &'static str, ours: &'static str) -> Line {
    Line { runtime: Some("runc"), ..line(key, docker, ours) }
}

/// The cases of commands that are executed without input.
const EXECUTED: &[&str] = &[
    "exec",
    "exec in a task with an init",
    "exec as the task's user",
    "exec in a task with a terminal",
    "exec in a privileged task",
];

/// The cases of privileged tasks.
const PRIVILEGED: &[&str] = &["privileged", "exec in a privileged task"];

/// The cases of tasks with an init.
const INIT: &[&str] = &["init", "exec in a task with an init"];

/// All intended differences.
pub(crate) const DIFFERENCES: &[Difference] = &[
    Difference {
        what: "Nomad's directories",
        docker: "none",
        driver: "`/alloc`, `/local` and `/secrets`",
        reason: "Nomad makes them for each task and tells it their paths. They are slaves of the host's directories, because the agent may mount the secrets again.",
        current: None,
        lines: &[
            line("mount /alloc", "(absent)", "*"),
            line("mount /alloc attributes", "(absent)", "*"),
            line("mount /alloc options", "(absent)", "*").on_some_hosts(),
            line("mount /alloc propagation", "(absent)", "*"),
            line("mount /local", "(absent)", "*"),
            line("mount /local attributes", "(absent)", "*"),
            line("mount /local options", "(absent)", "*").on_some_hosts(),
            line("mount /local propagation", "(absent)", "*"),
            line("mount /secrets", "(absent)", "*"),
            line("mount /secrets attributes", "(absent)", "*"),
            line("mount /secrets options", "(absent)", "*").on_some_hosts(),
            line("mount /secrets propagation", "(absent)", "*"),
            line("root /alloc", "(absent)", "directory 777 0:0"),
            line("root /local", "(absent)", "directory 777 0:0"),
            line("root /secrets", "(absent)", "directory 777 0:0"),
        ],
    },
    Difference {
        what: "Nomad's variables",
        docker: "none",
        driver: "`NOMAD_*`",
        reason: "Nomad sets them for each task.",
        current: None,
        lines: &[line("env NOMAD_*", "(absent)", "*")],
    },
    Difference {
        what: "`/.dockerenv`",
        docker: "there",
        driver: "not there",
        reason: "The container is not docker's. Programs that look for the file expect docker's daemon outside.",
        current: None,
        lines: &[line("root /.dockerenv", "file 755 0:0", "(absent)")],
    },
    Difference {
        what: "`CAP_NET_RAW`",
        docker: "granted",
        driver: "not granted",
        reason: "It allows to forge packets on the bridge that the tasks of a node share. Programs can ping without it. A job may add it if the operator allows that.",
        current: None,
        lines: &[
            line("capability Bnd net_raw", "yes", "(absent)"),
            line("capability Eff net_raw", "yes", "(absent)"),
            line("capability Prm net_raw", "yes", "(absent)"),
            line("socket inet raw", "ok", "EPERM"),
            line("socket packet", "ok", "EPERM"),
            line("socket xdp", "ok", "EPERM"),
        ],
    },
    Difference {
        what: "sudo, su and other set-user-id programs",
        docker: "gain privileges",
        driver: "gain none, unless the operator sets `security { allow_new_privileges = true }` and the job `security_opt = [\"no-new-privileges=false\"]`",
        reason: "A program that breaks out of a job's control stays without further privileges.",
        current: None,
        lines: &[line("status NoNewPrivs", "0", "1")],
    },
    Difference {
        what: "Number of processes",
        docker: "not limited",
        driver: "2048",
        reason: "A task must not take all process ids of its node. The operator's `pids_limit` sets another number, or none.",
        current: None,
        lines: &[line("cgroup *pids.max", "max", "2048")],
    },
    Difference {
        what: "Own name without a network",
        docker: "`--network none` has no line for it in `/etc/hosts`",
        driver: "`127.0.1.1`",
        reason: "Java's `getLocalHost` and `hostname -i` fail without it.",
        current: None,
        lines: &[line("text /etc/hosts", "*ff02::2\\tip6-allrouters", "*ff02::2\\tip6-allrouters\\n127.0.1.1\\t*")],
    },
    Difference {
        what: "`uts_mode = \"host\"`",
        docker: "`HOSTNAME` and `/etc/hostname` are the container's id",
        driver: "the host's name, as uname(2) says",
        reason: "A name that the container does not have is of no use.",
        current: None,
        lines: &[
            line("env HOSTNAME", "*", "<host>").only_in(&["uts_mode"]),
            line("text /etc/hostname", "*", "<host>").only_in(&["uts_mode"]),
        ],
    },
    Difference {
        what: "`/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf`",
        docker: "on the disk of the host",
        driver: "in memory, with room for 1 MiB together",
        reason: "A task can't fill the host's disk by them, and a start writes nothing to the disk.",
        current: None,
        lines: &[
            line("mount /etc/hostname", "*", "tmpfs"),
            line("mount /etc/hostname options", "*", "rw,size=*"),
            runc("mount /etc/hostname attributes", "rw,relatime", "rw,nosuid,nodev,noexec,relatime"),
            line("mount /etc/hosts", "*", "tmpfs"),
            line("mount /etc/hosts options", "*", "rw,size=*"),
            runc("mount /etc/hosts attributes", "rw,relatime", "rw,nosuid,nodev,noexec,relatime"),
            line("mount /etc/resolv.conf", "*", "tmpfs"),
            line("mount /etc/resolv.conf options", "*", "rw,size=*"),
            runc("mount /etc/resolv.conf attributes", "rw,relatime", "rw,nosuid,nodev,noexec,relatime"),
        ],
    },
    Difference {
        what: "Propagation of a bind without an option for it",
        docker: "`rprivate`",
        driver: "`rslave`",
        reason: "nomad-driver-containerd passes such a mount to runc as it is, and jobs rely on mounts that the host makes later. `rprivate` in the job's options is docker's default.",
        current: None,
        lines: &[line("mount /data propagation", "private", "master").only_in(&["bind", "bind, read-only"])],
    },
    Difference {
        what: "`rshared` in a task that may not mount",
        docker: "shared",
        driver: "a slave",
        reason: "The task can't mount anything, so it has nothing to share; the host's mounts reach it.",
        current: None,
        lines: &[
            line("mount /data propagation", "shared", "master").only_in(&["bind, rshared", "bind, shared"]),
            runc("mount / propagation", "private", "master").only_in(&["bind, rshared", "bind, shared"]),
        ],
    },
    Difference {
        what: "VOLUME of the image",
        docker: "a slave of the host's directory",
        driver: "private",
        reason: "Nothing is mounted below the directory on the host.",
        current: None,
        lines: &[line("mount /volume propagation", "master", "private")
            .only_in(&["volume of the image", "volume of the image, read-only"])],
    },
    Difference {
        what: "IPv6 in a group's network",
        docker: "off, unless the network has IPv6",
        driver: "as Nomad has made the network",
        reason: "Nomad makes the network, and no container of the driver owns it.",
        current: None,
        lines: &[line("sysctl net/ipv6/conf/eth0/disable_ipv6", "1", "0")],
    },
    Difference {
        what: "`TERM` in `nomad alloc exec` without a terminal, in a task with one",
        docker: "not set",
        driver: "`xterm`",
        reason: "The process has the task's environment. A program without a terminal does not use the variable.",
        current: None,
        lines: &[line("env TERM", "(absent)", "xterm").only_in(&["exec in a task with a terminal"])],
    },
    Difference {
        what: "Soft limit on descriptors where the host's is lower than its hard limit",
        docker: "the hard limit",
        driver: "the host's soft limit",
        reason: "A program that is built with Go 1.19 raises its own limit and passes it on, and dockerd is such a program. Programs that use select(2) need the low limit.",
        current: None,
        lines: &[line("rlimit nofile", "*", "1024:*").on_some_hosts()],
    },
    Difference {
        what: "Standard input of a command that is executed without input (a script check)",
        docker: "the host's `/dev/null`",
        driver: "a pipe at its end",
        reason: "crun makes the process's user the owner of its standard input, and the host's device must not belong to a task.",
        current: None,
        lines: &[
            line("descriptor 0", "/dev/null blocking", "pipe blocking").only_in(EXECUTED),
            runsc("descriptor 0", "host:* blocking", "pipe blocking").only_in(EXECUTED),
        ],
    },
    Difference {
        what: "Where the init of `init = true` is",
        docker: "`/sbin/docker-init`",
        driver: "`/.nomad-init`",
        reason: "docker makes `/sbin` in images that have none. No image has anything at `/.nomad-init`.",
        current: None,
        lines: &[
            line("first process cmdline", "/sbin/docker-init -- *", "/.nomad-init -- *").only_in(INIT),
            line("mount /.nomad-init", "(absent)", "*").only_in(INIT),
            line("mount /.nomad-init attributes", "(absent)", "ro,nosuid*").only_in(INIT),
            line("mount /.nomad-init propagation", "(absent)", "private").only_in(INIT),
            line("mount /sbin/docker-init", "*", "(absent)").only_in(INIT),
            line("mount /sbin/docker-init attributes", "ro*", "(absent)").only_in(INIT),
            line("mount /sbin/docker-init propagation", "private", "(absent)").only_in(INIT),
            line("root /.nomad-init", "(absent)", "file 755 0:0").only_in(INIT),
            line("root /sbin", "directory 755 0:0", "(absent)").only_in(INIT),
        ],
    },
    Difference {
        what: "IPv6 on loopback",
        docker: "off",
        driver: "on",
        reason: "Programs connect to `localhost` by `::1`.",
        current: Some("moby/moby#47406"),
        lines: &[
            line("interface lo inet6", "(absent)", "::1"),
            line("sysctl net/ipv6/conf/all/disable_ipv6", "1", "0"),
            line("sysctl net/ipv6/conf/default/disable_ipv6", "1", "0"),
            line("sysctl net/ipv6/conf/lo/disable_ipv6", "1", "0"),
        ],
    },
    Difference {
        what: "Lines of `/etc/resolv.conf`",
        docker: "`search` first",
        driver: "`nameserver` first",
        reason: "The order of these lines means nothing.",
        current: Some("moby/moby#47041"),
        lines: &[
            line("text /etc/resolv.conf", "search *nameserver *", "nameserver *search *").only_in(&["name servers"])
        ],
    },
    Difference {
        what: "`/proc/interrupts`",
        docker: "readable",
        driver: "hidden",
        reason: "It reveals what other programs on the host compute (GHSA-6fw5-f8r9-fgfm).",
        current: Some("moby/moby#49560"),
        lines: &[
            line("access /proc/interrupts", "read ok, write *", "device, read ok, write ok"),
            line("mount /proc/interrupts", "(absent)", "*"),
            line("mount /proc/interrupts attributes", "(absent)", "*"),
            line("mount /proc/interrupts propagation", "(absent)", "private"),
            runc("mount /proc/interrupts options", "(absent)", "*"),
        ],
    },
    Difference {
        what: "AF_VSOCK and AF_ALG sockets",
        docker: "allowed",
        driver: "forbidden",
        reason: "The address families do not belong to a network namespace.",
        current: Some("moby/moby#44562, moby/moby#52494"),
        lines: &[line("socket vsock", "ok", "EPERM"), line("socket alg", "*", "EPERM")],
    },
    Difference {
        what: "io_uring",
        docker: "allowed",
        driver: "forbidden",
        reason: "It has had many holes, and seccomp does not see what it does.",
        current: Some("moby/moby#46762"),
        lines: &[
            line("syscall io_uring_setup", "*", "EPERM"),
            line("syscall io_uring_enter", "*", "EPERM"),
            line("syscall io_uring_register", "*", "EPERM"),
        ],
    },
    Difference {
        what: "System calls that docker's list did not have",
        docker: "forbidden, or missing",
        driver: "allowed",
        reason: "They are on docker's list of June 2026, which the driver has.",
        current: Some("moby/profiles, `seccomp/default_linux.go`"),
        lines: &[
            line("syscall landlock_restrict_self", "EPERM", "EINVAL"),
            line("syscall name_to_handle_at", "EPERM", "EINVAL"),
            line("syscall pkey_alloc", "EPERM", "EINVAL"),
            line("syscall process_vm_readv", "EPERM", "EINVAL"),
            line("syscall process_vm_writev", "EPERM", "EINVAL"),
            line("syscall cachestat", "ENOSYS", "EBADF"),
            line("syscall fchmodat2", "ENOSYS", "EINVAL"),
            line("syscall futex_requeue", "ENOSYS", "EINVAL"),
            line("syscall futex_wait", "ENOSYS", "EINVAL"),
            line("syscall futex_wake", "ENOSYS", "EINVAL"),
            line("syscall set_mempolicy_home_node", "ENOSYS", "EPERM"),
            line("syscall set_mempolicy_home_node", "ENOSYS", "EINVAL"),
            crun("syscall getxattrat", "ENOSYS", "E2BIG"),
            crun("syscall setxattrat", "ENOSYS", "E2BIG"),
            crun("syscall listxattrat", "ENOSYS", "EINVAL"),
            crun("syscall removexattrat", "ENOSYS", "EINVAL"),
            crun("syscall listmount", "ENOSYS", "EINVAL"),
            crun("syscall statmount", "ENOSYS", "EINVAL"),
            crun("syscall mseal", "ENOSYS", "EINVAL"),
            crun("syscall lsm_get_self_attr", "ENOSYS", "EPERM"),
            crun("syscall lsm_set_self_attr", "ENOSYS", "EPERM"),
            crun("syscall lsm_list_modules", "ENOSYS", "EPERM"),
            crun("syscall lsm_get_self_attr", "ENOSYS", "EFAULT"),
            crun("syscall lsm_set_self_attr", "ENOSYS", "EINVAL"),
            crun("syscall lsm_list_modules", "ENOSYS", "EINVAL"),
        ],
    },
    Difference {
        what: "crun: hidden and read-only paths",
        docker: "file systems of their own; read-only binds keep `nosuid`, `nodev` and `noexec`",
        driver: "the host's `/dev/null`; binds without these attributes",
        reason: "The mounts are crun's own. What they hide or protect is the same.",
        current: None,
        lines: &[
            crun("mount /proc/keys", "tmpfs", "devtmpfs"),
            crun("mount /proc/timer_list", "tmpfs", "devtmpfs"),
            crun("mount /proc/keys attributes", "rw,nosuid", "ro,relatime"),
            crun("mount /proc/timer_list attributes", "rw,nosuid", "ro,relatime"),
            crun("mount /proc/keys options", "rw,size=65536k,mode=755*", "(absent)"),
            crun("mount /proc/timer_list options", "rw,size=65536k,mode=755*", "(absent)"),
            crun("mount /proc/bus attributes", "ro,nosuid,nodev,noexec,relatime", "ro,relatime"),
            crun("mount /proc/fs attributes", "ro,nosuid,nodev,noexec,relatime", "ro,relatime"),
            crun("mount /proc/irq attributes", "ro,nosuid,nodev,noexec,relatime", "ro,relatime"),
            crun("mount /proc/sys attributes", "ro,nosuid,nodev,noexec,relatime", "ro,relatime"),
            crun("mount /proc/acpi options", "ro*", "rw,size=0k*").on_some_hosts(),
            crun("mount /sys/firmware options", "ro*", "rw,size=0k*").on_some_hosts(),
            crun("mount /proc/kcore", "tmpfs", "devtmpfs").on_some_hosts(),
            crun("mount /proc/kcore attributes", "rw,nosuid", "ro,relatime").on_some_hosts(),
            crun("mount /proc/kcore options", "rw,size=65536k,mode=755*", "(absent)").on_some_hosts(),
            crun("mount /proc/sysrq-trigger attributes", "ro,nosuid,nodev,noexec,relatime", "ro,relatime")
                .on_some_hosts(),
        ],
    },
    Difference {
        what: "crun: controllers of cgroup version 2",
        docker: "all of the host's",
        driver: "those for processors, memory, I/O, huge pages and processes",
        reason: "crun turns on the controllers whose limits a container can have, and not `rdma` and `misc`.",
        current: None,
        lines: &[
            crun("cgroup /cgroup.controllers", "cpuset cpu io memory *", "cpuset cpu io memory *").on_some_hosts(),
            crun("cgroup entry /sys/fs/cgroup/misc.*", "file *", "(absent)").on_some_hosts(),
            crun("cgroup entry /sys/fs/cgroup/rdma.*", "file *", "(absent)").on_some_hosts(),
        ],
    },
    Difference {
        what: "crun: `/sys` and `/sys/fs/cgroup`",
        docker: "a read-only file system; a directory of root",
        driver: "a read-only mount; with cgroup version 1, a directory that everyone may write to",
        reason: "crun mounts them. `/sys/fs/cgroup` is the container's own file system in memory, and the hierarchies in it are read-only.",
        current: None,
        lines: &[
            crun("mount /sys options", "ro", "rw"),
            crun("mount /sys/fs/cgroup options", "rw,mode=755", "rw,size=1024k").on_some_hosts(),
            crun(
                "access /sys/fs/cgroup",
                "directory with entries, new entry EACCES",
                "directory with entries, new entry ok",
            )
            .on_some_hosts(),
            crun("access /sys/kernel/vmcoreinfo", "read ok, write EROFS", "read ok, write EACCES").on_some_hosts(),
        ],
    },
    Difference {
        what: "crun: propagation of the root",
        docker: "a slave of the host's; private in a task with an `rshared` bind",
        driver: "private; shared in such a task",
        reason: "crun sets it. Nobody mounts anything on the host below a task's root.",
        current: None,
        lines: &[
            crun("mount / propagation", "master", "private"),
            crun("mount / propagation", "private", "shared").only_in(&["bind, rshared, of a task that may mount"]),
        ],
    },
    Difference {
        what: "crun: `/dev`",
        docker: "`/dev/null` is root's; `/dev/console` has `nosuid` and `noexec`",
        driver: "`/dev/null` is the user's if it is the task's standard input; `/dev/console` has no such attributes; `/dev/core`",
        reason: "crun makes the devices.",
        current: None,
        lines: &[
            crun("device /dev/core", "(absent)", "link /proc/kcore").on_some_hosts(),
            crun("device /dev/null", "c 1:3 666 0:0", "c 1:3 666 *"),
            crun("mount /dev/console attributes", "rw,nosuid,noexec,relatime", "rw,relatime")
                .only_in(&["terminal", "exec in a task with a terminal"]),
        ],
    },
    Difference {
        what: "crun: session of `nomad alloc exec` without a terminal",
        docker: "its own",
        driver: "the shim's",
        reason: "crun starts a session only with a terminal.",
        current: None,
        lines: &[crun("process leads", "session 1 group 1", "session 0 group 0").only_in(EXECUTED)],
    },
    Difference {
        what: "gVisor: the host's network",
        docker: "gVisor's own network stack, with the host's addresses",
        driver: "the host's network stack",
        reason: "gVisor's stack would take the addresses away from the host. With the host's stack, the host's limits on ping hold.",
        current: None,
        lines: &[
            runsc("access /dev/net/tun", "device, *", "ENOENT").only_in(&["host_network"]),
            runsc("device /dev/char/10:200", "link ../net/tun", "(absent)").only_in(&["host_network"]),
            runsc("device /dev/net", "directory 755 0:0", "(absent)").only_in(&["host_network"]),
            runsc("device /dev/net/tun", "c 10:200 666 0:0", "(absent)").only_in(&["host_network"]),
            runsc("node tun", "made ok, opened ok", "made ok, opened ENXIO").only_in(&["host_network"]),
            runsc("socket inet ping", "ok", "EACCES").only_in(&["host_network"]).on_some_hosts(),
        ],
    },
    Difference {
        what: "gVisor: devices of a privileged task",
        docker: "all devices of the host",
        driver: "those that the job names",
        reason: "gVisor's kernel can open none of the host's devices except for some graphics processors.",
        current: None,
        lines: &[
            runsc("access /dev/*", "device, *", "ENOENT").only_in(PRIVILEGED),
            runsc("device /dev/*", "*", "(absent)").only_in(PRIVILEGED),
        ],
    },
    Difference {
        what: "gVisor: capabilities of a privileged task",
        docker: "all that docker knows",
        driver: "those that the driver itself has",
        reason: "Docker before 23.0 does not know the newest ones, and asks for those that the machine does not have.",
        current: Some("moby/moby#42933"),
        lines: &[
            runsc("capability *", "(absent)", "yes").only_in(PRIVILEGED).on_some_hosts(),
            runsc("capability *", "yes", "(absent)").only_in(PRIVILEGED).on_some_hosts(),
        ],
    },
];
