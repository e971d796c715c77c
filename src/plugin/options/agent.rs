//! Options of the agent's `plugin "..." { config { ... } }` block.

use super::{AUTH_OPTIONS, OptionKind, OptionRow, default, row};

const CONTAINERD: &[OptionRow] = &[
    default("address", OptionKind::Text, "\"/run/containerd/containerd.sock\"", "containerd's socket."),
    default("namespace", OptionKind::Text, "\"nomad\"", "containerd's namespace for this driver's images."),
    default("snapshotter", OptionKind::Text, "\"overlayfs\"", "containerd's snapshotter: `overlayfs` or `native`."),
];

const STATE: &[OptionRow] = &[
    row(
        "run_dir",
        OptionKind::Text,
        "The directory of records, bundles and sockets. Default: /run/nomad-driver-shim/<driver name>.",
    ),
    row(
        "state_dir",
        OptionKind::Text,
        "The directory of writable layers and image records. Default: /var/lib/nomad-driver-shim/<driver name>.",
    ),
    default(
        "upper",
        OptionKind::Text,
        "\"disk\"",
        "Where writable layers are kept: on `disk`, below `state_dir`, or in memory, each in a `tmpfs` of its own.",
    ),
    row(
        "upper_size",
        OptionKind::Text,
        "How large a writable layer in memory may grow: `256m`, or `10%` of the host's memory; its contents count as the task's memory. Default: half of the host's memory.",
    ),
    default("grace", OptionKind::Text, "\"5m\"", "How long the remains of tasks are kept that no agent has asked for."),
    default(
        "orphans",
        OptionKind::Text,
        "\"keep\"",
        "What happens to running tasks that no agent has asked for within `grace`, for example because the agent has lost its data directory: `keep` lets them run and reports them once; `end` sends them their stop signal, kills those that still run 30 s later, and destroys them. The time is counted only while an agent is connected, and starts anew with each connection, so that tasks outlive an agent that is down. Make `grace` longer than an agent takes to ask for its tasks.",
    ),
    default(
        "orphan_timeout",
        OptionKind::Text,
        "\"10m\"",
        "How long a plugin keeps running after it has lost its agent; its tasks keep running in any case.",
    ),
];

const CGROUP: &[OptionRow] = &[default(
    "keep_warm",
    OptionKind::Text,
    "\"starts\"",
    "cgroup version 1: when the kernel's cgroup migration lock is kept primed: `starts`, while a task starts; `never`; or always, at an interval such as `3ms`.",
)];

const IMAGE: &[OptionRow] = &[default(
    "keep",
    OptionKind::Text,
    "\"24h\"",
    "How long an image is kept that no task uses: a duration, or `forever`.",
)];

const SHIM: &[OptionRow] = &[
    default("binary", OptionKind::Text, "\"containerd-shim-runc-v2\"", "The shim, by path or by name in PATH."),
    default(
        "pool",
        OptionKind::Number,
        "2",
        "How many idle shims, prepared network namespaces, and prepared root file systems of the most recently used images wait for the next tasks (0 to 64).",
    ),
    default("reuse", OptionKind::Flag, "true", "A shim whose task has been destroyed serves the next task."),
];

const METRICS: &[OptionRow] = &[row(
    "address",
    OptionKind::Text,
    "The address at which Prometheus finds `/metrics`: `127.0.0.1:9107`, or `unix:/path` (root only).",
)];

const RUNTIME: &[OptionRow] = &[
    row("binary", OptionKind::Text, "The OCI runtime, by path or by name in PATH. Default: the block's name."),
    row(
        "type",
        OptionKind::Text,
        "`oci`, or `gvisor` for runsc, to which the options marked gVisor apply. Default: `gvisor` if the binary's name begins with runsc, else `oci`.",
    ),
    row(
        "shim",
        OptionKind::Text,
        "A shim other than runc's, by path or by name in PATH: `containerd-shim-kata-v2`. Default: runc's shim; for names such as `io.containerd.kata.v2` the shim that containerd would use.",
    ),
    row("config", OptionKind::Text, "The configuration file of such a shim."),
    row(
        "platform",
        OptionKind::Text,
        "gVisor: `systrap`, `kvm` or `ptrace`. Default: systrap if a small sandbox has run with it on this host, else ptrace.",
    ),
    row(
        "network",
        OptionKind::Text,
        "gVisor: the network stack of tasks in a group's network namespace: `sandbox` (default), a stack of the sandbox's own, which needs the namespace for itself; `host`, the kernel's stack, which the tasks of a group share as without gVisor; or `none`, loopback only.",
    ),
    row(
        "overlay",
        OptionKind::Text,
        "gVisor: where the files that tasks write are kept: `root:self`, `root:memory`, `all:memory`, `none`, ... Default: runsc's.",
    ),
    row(
        "file_access",
        OptionKind::Text,
        "gVisor: `exclusive`, or `shared` if other processes change the root file systems of running tasks. Default: runsc's.",
    ),
    row("cgroups", OptionKind::Flag, "gVisor: false runs sandboxes without limits and statistics. Default: true."),
    row("debug_log", OptionKind::Text, "gVisor: a directory for debug logs, which slow sandboxes down."),
    row("flags", OptionKind::List, "gVisor: further flags of runsc: `host-uds=open`."),
];

const HOOKS: &[OptionRow] = &[
    row(
        "prestart",
        OptionKind::List,
        "Run before the container's process is started; deprecated by OCI, but needed by old tools.",
    ),
    row(
        "create_runtime",
        OptionKind::List,
        "Run after the container's namespaces have been created, in the host's namespaces.",
    ),
    row(
        "create_container",
        OptionKind::List,
        "Run after the container's namespaces have been created, in the container's namespaces.",
    ),
    row(
        "start_container",
        OptionKind::List,
        "Run right before the container's program is executed, in the container's namespaces.",
    ),
    row("poststart", OptionKind::List, "Run after the container's program has been started, in the host's namespaces."),
    row("poststop", OptionKind::List, "Run after the container has been deleted."),
];

const SECURITY: &[OptionRow] = &[
    row(
        "allow_caps",
        OptionKind::List,
        "The capabilities that jobs may name in `cap_add`; `ALL` allows every one. Default: docker's defaults.",
    ),
    row("allow_paths", OptionKind::List, "Host paths that jobs may bind mount, in addition to their own directories."),
    row(
        "seccomp",
        OptionKind::Text,
        "The seccomp profile of tasks that choose none: `default` (docker's), `unconfined`, or a file. Default: `default`; as containerd-driver: `unconfined`.",
    ),
    row(
        "allow_new_privileges",
        OptionKind::Flag,
        "Lets jobs set `security_opt = [\"no-new-privileges=false\"]`, which sudo, su and other set-user-id programs need. Jobs may set it on nodes with `allow_privileged` anyway. Default: false; as containerd-driver: true.",
    ),
    row(
        "allow_seccomp_override",
        OptionKind::Flag,
        "Lets jobs set `seccomp = false` or a profile of their own. Default: false; as containerd-driver: true.",
    ),
    row(
        "allow_socketcall",
        OptionKind::Flag,
        "Allows 32-bit x86 programs under docker's profile the system call `socketcall`. Go, and glibc as Debian, Fedora and Ubuntu build it, need it for every socket of a 32-bit program; but no seccomp filter sees its arguments, so it also opens sockets that the profile forbids (AF_ALG, AF_VSOCK). Without this option the call fails with ENOSYS, except in tasks with the driver's AppArmor profile, which refuses those sockets itself. Default: false; as containerd-driver: true.",
    ),
    row(
        "apparmor",
        OptionKind::Text,
        "The AppArmor profile of unprivileged tasks that choose none: `default` (this driver's profile, with docker's rules), `unconfined`, or the name of a loaded profile. If this option names a profile that can't be applied, tasks fail. Unset: this driver's profile if the node has AppArmor and either `apparmor_parser` or the loaded profile, else none; as containerd-driver: `unconfined`.",
    ),
    row(
        "allow_apparmor_override",
        OptionKind::Flag,
        "Lets jobs choose another AppArmor profile, or none, with `security_opt`. Default: false; as containerd-driver: true.",
    ),
    row(
        "selinux",
        OptionKind::Flag,
        "true: tasks and their files have SELinux labels, as with dockerd's `--selinux-enabled`, and the directories `alloc`, `local` and `secrets` of tasks are labelled for containers. It has no effect on nodes without SELinux or without a policy that has labels for containers (`lxc_contexts`), nor on tasks in gVisor sandboxes. Default: false.",
    ),
    row(
        "allow_label_override",
        OptionKind::Flag,
        "With `selinux = true`: lets jobs choose other SELinux labels, or none, with `security_opt`. Default: false; as containerd-driver: true.",
    ),
    row(
        "allow_host_namespaces",
        OptionKind::Flag,
        "Lets jobs use `host_network`, `pid_mode`, `ipc_mode`, `uts_mode` and `cgroupns` of the host. Default: false; as containerd-driver: true.",
    ),
    row(
        "allow_devices",
        OptionKind::List,
        "Devices of the host that jobs may have: `/dev/fuse`, `/dev/dri/*`. Default: none; as containerd-driver: all.",
    ),
    row(
        "allow_sysctls",
        OptionKind::List,
        "Kernel parameters that jobs may set: `net.core.somaxconn`, `net.ipv4.*`. Default: all that belong to a container's own namespaces.",
    ),
    row(
        "ulimit_max",
        OptionKind::Map,
        "The highest values that jobs may set as `ulimit`, by the same names: `ulimit_max { nofile = \"1048576\" }`; `-1` means no ceiling. Default: 0 for `rtprio` and `nice`, and for all others the hard limit that the driver itself was started with; as containerd-driver: no ceilings.",
    ),
    row(
        "tmpfs_max",
        OptionKind::Text,
        "The largest tmpfs and `/dev/shm` that jobs may ask for: `256m`, `10%` of the host's memory, or `unlimited`. Their contents count as the task's memory. Default: `50%`, which is also the kernel's default; as containerd-driver: `unlimited`.",
    ),
];

/// The options of the agent's `plugin "..." { config { ... } }` block.
pub const PLUGIN_OPTIONS: &[OptionRow] = &[
    default("enabled", OptionKind::Flag, "true", "false: the driver is not offered to jobs."),
    row(
        "containerd_runtime",
        OptionKind::Text,
        "nomad-driver-containerd's option: `io.containerd.runc.v2` leaves the choice to `default_runtime`; any other value is the default runtime itself.",
    ),
    row(
        "stats_interval",
        OptionKind::Text,
        "nomad-driver-containerd's option: overrides the interval of task statistics that the agent asks for.",
    ),
    row(
        "allow_privileged",
        OptionKind::Flag,
        "Lets jobs set `privileged`. Default: false; as containerd-driver: true.",
    ),
    row(
        "pids_limit",
        OptionKind::Number,
        "How many processes and threads a task may have: the default of jobs that set no limit, and the most that a job may ask for; 0 or less: no limit. Default: 2048; as containerd-driver: no limit.",
    ),
    row("auth", OptionKind::Block(AUTH_OPTIONS), "Registry credentials for jobs that have none of their own."),
    row(
        "default_runtime",
        OptionKind::Text,
        "The runtime of jobs that choose none. Default: crun if it works, else runc.",
    ),
    row("allow_runtimes", OptionKind::List, "The runtimes that jobs may choose. Default: all that are configured."),
    row("containerd", OptionKind::Block(CONTAINERD), "The containerd that keeps the images."),
    row("state", OptionKind::Block(STATE), "Where the driver keeps its own files, and for how long."),
    row("image", OptionKind::Block(IMAGE), "How long images are kept."),
    row("shim", OptionKind::Block(SHIM), "Which shim is used, and how shims are pooled."),
    default(
        "shim_scope",
        OptionKind::Text,
        "\"task\"",
        "Which tasks share a shim: none (`task`), the tasks of an allocation (`alloc`), or all tasks of the node (`node`: this takes a tenth of the memory, but if the shim dies, all its tasks die, and shims before 2.3.2 start one task at a time).",
    ),
    row(
        "runtime",
        OptionKind::Labelled(RUNTIME),
        "An OCI runtime, by name: an additional one, or other settings for `crun`, `runc`, `runsc` or `io.containerd.runsc.v1`.",
    ),
    row("cgroup", OptionKind::Block(CGROUP), "How cgroups are handled."),
    row("security", OptionKind::Block(SECURITY), "What jobs may do."),
    row(
        "hooks",
        OptionKind::Block(HOOKS),
        "OCI hooks of all tasks: programs by absolute path, with their arguments (`/usr/bin/nvidia-container-runtime-hook prestart`).",
    ),
    default(
        "disable_log_collection",
        OptionKind::Flag,
        "false",
        "true: Nomad starts no log collectors for tasks of this driver, which take a third to a half of Nomad's own start time; one log writer per node writes the same files.",
    ),
    row(
        "metrics",
        OptionKind::Block(METRICS),
        "Prometheus metrics: starts, failures by cause, phases of a start, pool hits and misses, pulls, exits, tasks by state. Default: none.",
    ),
];
