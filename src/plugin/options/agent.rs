//! Options of the agent's `plugin "..." { config { ... } }` block.

use super::{AUTH, Kind, Row, default, row};

const CONTAINERD: &[Row] = &[
    default("address", Kind::Text, "\"/run/containerd/containerd.sock\"", "containerd's socket."),
    default("namespace", Kind::Text, "\"nomad\"", "Its namespace for our images."),
    default("snapshotter", Kind::Text, "\"overlayfs\"", "Its snapshotter: `overlayfs` or `native`."),
];

const STATE: &[Row] = &[
    row("run_dir", Kind::Text, "Records, bundles, sockets. Default: /run/nomad-driver-shim/<driver name>."),
    row("state_dir", Kind::Text, "Writable layers, image records. Default: /var/lib/nomad-driver-shim/<driver name>."),
    default(
        "upper",
        Kind::Text,
        "\"disk\"",
        "Where writable layers are: below `state_dir` on `disk`, or in memory, a `tmpfs` each.",
    ),
    row(
        "upper_size",
        Kind::Text,
        "How large a writable layer in memory may grow: `256m`, `10%`; it counts as the task's memory. Default: half of the host's.",
    ),
    default("grace", Kind::Text, "\"5m\"", "How long remains that no agent has asked for are kept."),
    default(
        "orphans",
        Kind::Text,
        "\"keep\"",
        "What becomes of tasks that run and that no agent has asked for within `grace`, for example because the agent has lost its data directory: `keep` lets them run and says so once; `end` sends them their stop signal, kills what still runs 30 s later, and destroys them. The time is counted only while an agent is connected, and starts anew with each connection, so that tasks outlive an agent that is down. Make `grace` longer than an agent takes to ask for its tasks.",
    ),
    default(
        "orphan_timeout",
        Kind::Text,
        "\"10m\"",
        "How long a plugin stays that has lost its agent; its tasks go on.",
    ),
];

const CGROUP: &[Row] = &[default(
    "keep_warm",
    Kind::Text,
    "\"starts\"",
    "cgroup version 1: when the kernel's migration lock is kept warm: while a task `starts`, `never`, or always, every `3ms`.",
)];

const IMAGE: &[Row] =
    &[default("keep", Kind::Text, "\"24h\"", "How long an image stays that no task uses: a duration, or `forever`.")];

const SHIM: &[Row] = &[
    default("binary", Kind::Text, "\"containerd-shim-runc-v2\"", "The shim, by path or by name in PATH."),
    default(
        "pool",
        Kind::Number,
        "2",
        "How many idle shims wait for the next task (0 to 64), and how many of the images used last have a root file system waiting.",
    ),
    default("reuse", Kind::Flag, "true", "A shim whose task is gone serves the next one."),
];

const METRICS: &[Row] =
    &[row("address", Kind::Text, "Where Prometheus finds `/metrics`: `127.0.0.1:9107`, or `unix:/path` (root only).")];

const RUNTIME: &[Row] = &[
    row("binary", Kind::Text, "The OCI runtime, by path or by name in PATH. Default: the block's name."),
    row(
        "type",
        Kind::Text,
        "`oci`, or `gvisor` for runsc, which has the options below. Default: by the binary's name.",
    ),
    row(
        "shim",
        Kind::Text,
        "A shim other than runc's, by path or by name in PATH: `containerd-shim-kata-v2`. Default: runc's; for names such as `io.containerd.kata.v2` the one that containerd takes.",
    ),
    row("config", Kind::Text, "The file that such a shim is configured by."),
    row(
        "platform",
        Kind::Text,
        "gVisor: `systrap`, `kvm` or `ptrace`. Default: systrap where a small sandbox was seen to run with it, else ptrace.",
    ),
    row(
        "network",
        Kind::Text,
        "gVisor: of tasks in a group's network namespace: `sandbox` (default), a network stack of their own, which has the namespace to itself; `host`, the kernel's, which tasks of a group share as without gVisor; or `none`, loopback only.",
    ),
    row(
        "overlay",
        Kind::Text,
        "gVisor: where what tasks write goes: `root:self`, `root:memory`, `all:memory`, `none`, ... Default: runsc's.",
    ),
    row(
        "file_access",
        Kind::Text,
        "gVisor: `exclusive`, or `shared` where others change root file systems under tasks. Default: runsc's.",
    ),
    row("cgroups", Kind::Flag, "gVisor: false leaves sandboxes without limits and statistics. Default: true."),
    row("debug_log", Kind::Text, "gVisor: a directory for debug logs; slow."),
    row("flags", Kind::List, "gVisor: further flags of runsc: `host-uds=open`."),
];

const HOOKS: &[Row] = &[
    row(
        "prestart",
        Kind::List,
        "Before the container's process is started; deprecated by OCI, and what old tools want.",
    ),
    row("create_runtime", Kind::List, "When its namespaces are there, in the host's."),
    row("create_container", Kind::List, "When its namespaces are there, in its own."),
    row("start_container", Kind::List, "Right before its program is run, in its own."),
    row("poststart", Kind::List, "After that, in the host's namespaces."),
    row("poststop", Kind::List, "When it has been deleted."),
];

const SECURITY: &[Row] = &[
    row(
        "allow_caps",
        Kind::List,
        "What jobs may put into `cap_add`; `ALL` for everything. Default: docker's defaults.",
    ),
    row("allow_paths", Kind::List, "Host paths that jobs may bind from, besides their own directories."),
    row(
        "seccomp",
        Kind::Text,
        "The profile of tasks that say nothing: `default` (docker's), `unconfined`, or a file. As containerd-driver: `unconfined`.",
    ),
    row(
        "allow_seccomp_override",
        Kind::Flag,
        "Lets jobs set `seccomp = false` or a profile of their own. Default: false; as containerd-driver: true.",
    ),
    row(
        "allow_socketcall",
        Kind::Flag,
        "Lets 32-bit x86 programs under docker's profile make the call `socketcall`. Go, and glibc as Debian, Fedora and Ubuntu build it, need it for every socket of a 32-bit program; but no filter sees its arguments, so it also opens sockets that the profile forbids (AF_ALG, AF_VSOCK). Without it the call answers ENOSYS, except in tasks with the driver's AppArmor profile, which refuses those sockets itself. Default: false; as containerd-driver: true.",
    ),
    row(
        "apparmor",
        Kind::Text,
        "The AppArmor profile of unprivileged tasks that say nothing: `default` (ours, with docker's rules), `unconfined`, or the name of a loaded profile. A value that is set fails tasks where it can't be had. Unset: ours where the node has AppArmor and `apparmor_parser` or the loaded profile, else none; as containerd-driver: `unconfined`.",
    ),
    row(
        "allow_apparmor_override",
        Kind::Flag,
        "Lets jobs name another AppArmor profile, or none, by `security_opt`. Default: false; as containerd-driver: true.",
    ),
    row(
        "allow_host_namespaces",
        Kind::Flag,
        "Lets jobs use `host_network`, `pid_mode`, `ipc_mode`, `uts_mode` and `cgroupns` of the host. Default: false; as containerd-driver: true.",
    ),
    row(
        "allow_devices",
        Kind::List,
        "Devices of the host that jobs may have: `/dev/fuse`, `/dev/dri/*`. Default: none; as containerd-driver: all.",
    ),
    row(
        "allow_sysctls",
        Kind::List,
        "Kernel parameters that jobs may set: `net.core.somaxconn`, `net.ipv4.*`. Default: all that are a container's own.",
    ),
    row(
        "ulimit_max",
        Kind::Map,
        "The most that jobs may set as `ulimit`, by the same names: `ulimit_max { nofile = \"1048576\" }`; `-1` is no ceiling. Default: 0 for `rtprio` and `nice`, and for all others the hard limit that the driver itself was started with; as containerd-driver: no ceilings.",
    ),
    row(
        "tmpfs_max",
        Kind::Text,
        "The largest tmpfs and `/dev/shm` that jobs may ask for: `256m`, `10%` of the host's memory, or `unlimited`. What they hold counts as the task's memory. Default: `50%`, the kernel's own; as containerd-driver: `unlimited`.",
    ),
];

/// Options of the agent's `plugin "..." { config { ... } }` block.
pub const PLUGIN: &[Row] = &[
    default("enabled", Kind::Flag, "true", "false: the driver is not offered."),
    row(
        "containerd_runtime",
        Kind::Text,
        "The old driver's choice: `io.containerd.runc.v2` leaves it to `default_runtime`, any other is that.",
    ),
    row("stats_interval", Kind::Text, "The old driver's: overrides the interval of task statistics."),
    row("allow_privileged", Kind::Flag, "Lets jobs set `privileged`. Default: false; as containerd-driver: true."),
    row(
        "pids_limit",
        Kind::Number,
        "How many processes and threads a task may have: the default of jobs that say nothing, and the most that a job may ask for; 0 or less: any number. Default: 2048; as containerd-driver: any number.",
    ),
    row("auth", Kind::Block(AUTH), "Credentials for registries, for jobs without their own."),
    row("default_runtime", Kind::Text, "The runtime of jobs that name none. Default: crun where it works, else runc."),
    row("allow_runtimes", Kind::List, "The runtimes that jobs may have. Default: all that are configured."),
    row("containerd", Kind::Block(CONTAINERD), "Where images are kept."),
    row("state", Kind::Block(STATE), "Where our own files are."),
    row("image", Kind::Block(IMAGE), "How images are kept."),
    row("shim", Kind::Block(SHIM), "How shims are had."),
    default(
        "shim_scope",
        Kind::Text,
        "\"task\"",
        "Who shares a shim: nobody (`task`), the tasks of an allocation (`alloc`), or all of the node (`node`: a tenth of the memory; the death of the shim is the death of all its tasks, and shims before 2.3.2 start one task at a time).",
    ),
    row(
        "runtime",
        Kind::Labelled(RUNTIME),
        "An OCI runtime, by name: a further one, or other settings for `crun`, `runc`, `runsc` or `io.containerd.runsc.v1`.",
    ),
    row("cgroup", Kind::Block(CGROUP), "How cgroups are treated."),
    row("security", Kind::Block(SECURITY), "What jobs may do."),
    row(
        "hooks",
        Kind::Block(HOOKS),
        "OCI hooks of all tasks: programs with their arguments, by absolute path (`/usr/bin/nvidia-container-runtime-hook prestart`).",
    ),
    default(
        "disable_log_collection",
        Kind::Flag,
        "false",
        "true: Nomad starts no log collector for tasks of this driver, a third to a half of its own start time; one log writer a node writes the same files.",
    ),
    row(
        "metrics",
        Kind::Block(METRICS),
        "Starts, failures by cause, phases of a start, pool hits and misses, pulls, exits, tasks by state. Default: none.",
    ),
];
