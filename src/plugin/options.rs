//! Every option, as a row: what Nomad may send, what it is checked against, and what users read about it.

/// What an option holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Text.
    Text,
    /// true or false.
    Flag,
    /// A whole number.
    Number,
    /// A list of texts.
    List,
    /// At most one block.
    Block(&'static [Row]),
    /// Any number of blocks, in order.
    Blocks(&'static [Row]),
    /// Blocks with a label each.
    Labelled(&'static [Row]),
}

/// Must it be there?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Yes.
    Required,
    /// No.
    Optional,
    /// No, and then it is this (an HCL expression: texts with their quotes).
    Default(&'static str),
}

/// One option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// What it holds.
    pub kind: Kind,
    /// Must it be there?
    pub presence: Presence,
    /// What it does, in a sentence.
    pub help: &'static str,
}

const fn row(name: &'static str, kind: Kind, help: &'static str) -> Row {
    Row { name, kind, presence: Presence::Optional, help }
}

const fn required(name: &'static str, kind: Kind, help: &'static str) -> Row {
    Row { name, kind, presence: Presence::Required, help }
}

const fn default(name: &'static str, kind: Kind, value: &'static str, help: &'static str) -> Row {
    Row { name, kind, presence: Presence::Default(value), help }
}

const AUTH: &[Row] = &[
    required("username", Kind::Text, "User name."),
    required("password", Kind::Text, "Password or token. Never logged."),
    row("server_address", Kind::Text, "The only registry these are for; without it they are offered to the image's."),
];

const MOUNT: &[Row] = &[
    default("type", Kind::Text, "\"volume\"", "`bind`, `volume` (a bind, too) or `tmpfs`."),
    required("target", Kind::Text, "Absolute path in the container."),
    row("source", Kind::Text, "Path on the host; a relative one is below the task's directory, or `alloc/...`."),
    row("options", Kind::List, "Options as in fstab(5): `ro`, `rbind`, `size=64m`."),
];

/// Options of a job's `config` block.
pub const TASK: &[Row] = &[
    required("image", Kind::Text, "The image: `redis:7`, `registry.example:5000/app@sha256:...`."),
    default("image_pull_timeout", Kind::Text, "\"5m\"", "How long a pull may take."),
    row("auth", Kind::Block(AUTH), "Credentials for the image's registry; they beat the plugin's."),
    row("command", Kind::Text, "Replaces the image's CMD; its ENTRYPOINT stays."),
    row("args", Kind::List, "Follows `command` or `entrypoint`; alone it replaces CMD."),
    row("entrypoint", Kind::List, "Replaces the image's ENTRYPOINT and CMD. Excludes `command`."),
    row("cwd", Kind::Text, "Working directory; the image's otherwise."),
    row("hostname", Kind::Text, "Host name in the container, at most 64 bytes; the container's id otherwise."),
    row("readonly_rootfs", Kind::Flag, "Makes the root file system read-only."),
    row("mounts", Kind::Blocks(MOUNT), "Further mounts, in order."),
    row("host_network", Kind::Flag, "Uses the host's network. Excludes a group network."),
    row("privileged", Kind::Flag, "Takes (nearly) all confinement away, where the operator allows it."),
    row("cap_add", Kind::List, "Capabilities to add (`NET_ADMIN`, `CAP_NET_ADMIN`, `ALL`)."),
    row("cap_drop", Kind::List, "Capabilities to drop; `ALL` drops the defaults before `cap_add`."),
    row(
        "seccomp",
        Kind::Flag,
        "The operator's seccomp profile, docker's default. Default: true; as containerd-driver: false.",
    ),
    row(
        "seccomp_profile",
        Kind::Text,
        "A seccomp profile of the job's own, as docker writes them: a path as in `mounts`.",
    ),
    row("runtime", Kind::Text, "OCI runtime: `crun`, `runc`, or one from the plugin's configuration."),
];

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
        "How large a writable layer in memory may grow: `256m`, `10%`. Default: half of the memory.",
    ),
    default("grace", Kind::Text, "\"5m\"", "How long remains that no agent has asked for are kept."),
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
    default("pool", Kind::Number, "2", "How many idle shims wait for the next task (0 to 64)."),
    default("reuse", Kind::Flag, "true", "A shim whose task is gone serves the next one."),
];

const METRICS: &[Row] =
    &[row("address", Kind::Text, "Where Prometheus finds /metrics: `127.0.0.1:9107`, or `unix:/path` (root only).")];

const RUNTIME: &[Row] = &[required("binary", Kind::Text, "The OCI runtime, by path or by name in PATH.")];

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
    row("allow_host_namespaces", Kind::Flag, "Lets jobs use `host_network`. Default: false."),
];

/// Options of the agent's `plugin "..." { config { ... } }` block.
pub const PLUGIN: &[Row] = &[
    default("enabled", Kind::Flag, "true", "false: the driver is not offered."),
    row("containerd_runtime", Kind::Text, "The old driver's choice of shim: `io.containerd.runc.v2`."),
    row("stats_interval", Kind::Text, "The old driver's: overrides the interval of task statistics."),
    row("allow_privileged", Kind::Flag, "Lets jobs set `privileged`. Default: false; as containerd-driver: true."),
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
        "Who shares a shim: nobody (`task`), the tasks of an allocation (`alloc`), or all of the node (`node`).",
    ),
    row("runtime", Kind::Labelled(RUNTIME), "A further OCI runtime, by name."),
    row("cgroup", Kind::Block(CGROUP), "How cgroups are treated."),
    row("security", Kind::Block(SECURITY), "What jobs may do."),
    row("metrics", Kind::Block(METRICS), "Numbers for Prometheus. Default: none."),
];
