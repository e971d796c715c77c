//! Options of a job's `config` block.

use super::{AUTH, Kind, Row, default, required, row};

const MOUNT: &[Row] = &[
    default("type", Kind::Text, "\"volume\"", "`bind`, `volume` (a bind, too) or `tmpfs`."),
    required("target", Kind::Text, "Absolute path in the container."),
    row("source", Kind::Text, "Path on the host; a relative one is below the task's directory, or `alloc/...`."),
    row(
        "options",
        Kind::List,
        "Options as in fstab(5): `ro`, `rbind`, `size=64m`. A tmpfs is `nosuid` and `nodev` without `suid` and `dev`, except as containerd-driver.",
    ),
];

/// The table. Names are the old driver's, its forks', and docker's where the meaning is the same.
pub const TASK: &[Row] = &[
    required(
        "image",
        Kind::Text,
        "`redis:7`, `registry.example:5000/app@sha256:...`; short names mean Docker Hub. `oci:DIR`, `oci-archive:FILE`, `docker-archive:FILE` (with `:NAME` where there are several) are images in files, by the rules of bind sources: relative ones below the task's directory (`docker-archive:local/app.tar`).",
    ),
    default("image_pull_timeout", Kind::Text, "\"5m\"", "How long a pull may take."),
    row(
        "image_pull_policy",
        Kind::Text,
        "When the registry is asked: `missing` (the default), `always`, or `never`; then the image must be here.",
    ),
    row("force_pull", Kind::Flag, "docker's word for `image_pull_policy = \"always\"`."),
    row("auth", Kind::Block(AUTH), "Credentials for the image's registry; they beat the plugin's."),
    row("command", Kind::Text, "Replaces the image's CMD; its ENTRYPOINT stays."),
    row("args", Kind::List, "Follows `command` or `entrypoint`; alone it replaces CMD."),
    row("entrypoint", Kind::List, "Replaces the image's ENTRYPOINT and CMD. Excludes `command`."),
    row("cwd", Kind::Text, "Working directory; the image's otherwise."),
    row("work_dir", Kind::Text, "docker's word for `cwd`."),
    row(
        "hostname",
        Kind::Text,
        "Host name in the container: at most 64 letters, digits, dots, dashes and underscores, the first of them no dot or dash (as containerd-driver: any text without control characters). Default: the container's id.",
    ),
    row("tty", Kind::Flag, "Gives the task a terminal; its standard error is its standard output then."),
    row("readonly_rootfs", Kind::Flag, "Makes the root file system read-only."),
    row("mounts", Kind::Blocks(MOUNT), "Further mounts, in order."),
    row(
        "devices",
        Kind::List,
        "Devices of the host by path, at the same path and with all access, where the operator allows them.",
    ),
    row(
        "shm_size",
        Kind::Text,
        "Size of `/dev/shm`: `128m`, up to the plugin's `security { tmpfs_max }`. Default: 64 MiB.",
    ),
    row("host_network", Kind::Flag, "Uses the host's network. Excludes a group network."),
    default(
        "host_dns",
        Kind::Flag,
        "true",
        "The host's name servers, unless the group has a `dns` block; false: the image's own `/etc/resolv.conf`.",
    ),
    row(
        "extra_hosts",
        Kind::List,
        "Lines of `/etc/hosts`: `name:address`, IPv6 as well; the address `host-gateway` is the host as the task reaches it.",
    ),
    row("pid_mode", Kind::Text, "`host`: sees the host's processes. Default: its own."),
    row("ipc_mode", Kind::Text, "`host`: shares the host's IPC and `/dev/shm`. Default: its own (`private`)."),
    row("uts_mode", Kind::Text, "`host`: has the host's name. Default: its own."),
    row(
        "cgroupns",
        Kind::Text,
        "`private` or `host`: how it sees cgroups. Default: private on cgroup version 2, host on version 1.",
    ),
    row("userns_mode", Kind::Text, "`host`, the only one there is: user ids are the host's."),
    row(
        "pids_limit",
        Kind::Number,
        "How many processes and threads it may have, up to the plugin's `pids_limit`, which is the default; 0 or less: any number, where the plugin sets no limit.",
    ),
    row("cpu_hard_limit", Kind::Flag, "`resources.cpu` is a limit, and not only a weight."),
    row(
        "cpu_cfs_period",
        Kind::Number,
        "Microseconds over which `cpu_hard_limit` is kept, 1000 to 1000000. Default: 100000.",
    ),
    row("cpuset_cpus", Kind::Text, "Processors it may use: `0-3,5`. Excludes `resources.cores`."),
    row("cpuset_mems", Kind::Text, "Memory nodes it may use: `0,1`."),
    row(
        "memory_hard_limit",
        Kind::Number,
        "Its limit in MiB; `resources.memory` is what is kept for it then. Beats `memory_max`.",
    ),
    row("oom_score_adj", Kind::Number, "Makes the OOM killer prefer it: 0 to 1000."),
    row(
        "ulimit",
        Kind::Map,
        "Limits by docker's names: `ulimit { nofile = \"1024:2048\" }`; one number is both. Up to the plugin's `security { ulimit_max }`.",
    ),
    row("file_limit", Kind::Number, "`ulimit { nofile }`, soft and hard. Excludes it."),
    row("sysctl", Kind::Map, "Kernel parameters of its namespaces: `sysctl = { \"net.core.somaxconn\" = \"16384\" }`."),
    row("group_add", Kind::List, "Further groups of its user, by the image's names or by number."),
    row("privileged", Kind::Flag, "Takes (nearly) all confinement away, where the operator allows it."),
    row("cap_add", Kind::List, "Capabilities to add (`NET_ADMIN`, `CAP_NET_ADMIN`, `ALL`)."),
    row("cap_drop", Kind::List, "Capabilities to drop; `ALL` drops the defaults before `cap_add`."),
    row(
        "security_opt",
        Kind::List,
        "docker's: `no-new-privileges[=false]` (false is for nodes with `allow_privileged`), `seccomp=unconfined`, `seccomp=FILE`; `apparmor=default` (the node's profile, for a privileged task, too), and, where the operator allows it, `apparmor=PROFILE` (one that is loaded) or `apparmor=unconfined`.",
    ),
    row(
        "seccomp",
        Kind::Flag,
        "`true`: the operator's seccomp profile, or docker's; `false`: none, where the operator allows it. Default: the operator's, none for privileged tasks; as containerd-driver: none.",
    ),
    row(
        "seccomp_profile",
        Kind::Text,
        "A profile of the job's own, as docker or OCI write them, where the operator allows it; a path by the rules of bind sources.",
    ),
    row("labels", Kind::Map, "Annotations of the container, for people and tools that look at it."),
    row("annotations", Kind::Map, "The same; keys that runtimes act on are refused."),
    row(
        "log_max_size",
        Kind::Text,
        "Size of one log file, where the plugin has `disable_log_collection`: `64k`, `10m`. Default: Nomad's 10 MiB.",
    ),
    row("log_max_files", Kind::Number, "Files kept of each of its streams then. Default: Nomad's 10."),
    row(
        "log_policy",
        Kind::Text,
        "When its log can't be written, as on a full disk: `block` (default): it waits in its write; `drop`: the output is dropped, and how much is said in the log.",
    ),
    row("runtime", Kind::Text, "OCI runtime: `crun`, `runc`, `runsc`, or one from the plugin's configuration."),
];
