//! Options of a job's `config` block.

use super::{AUTH_OPTIONS, OptionKind, OptionRow, default, required, row};

const MOUNT: &[OptionRow] = &[
    default("type", OptionKind::Text, "\"volume\"", "`bind`, `volume` (also a bind) or `tmpfs`."),
    required("target", OptionKind::Text, "Absolute path in the container."),
    row(
        "source",
        OptionKind::Text,
        "Path on the host; a relative path is below the task's directory, or `alloc/...` in the allocation's.",
    ),
    row(
        "options",
        OptionKind::List,
        "Options as in fstab(5): `ro`, `rbind`, `size=64m`. A tmpfs is `nosuid`, `nodev` and `noexec` unless `suid`, `dev` or `exec` is given, except as containerd-driver.",
    ),
];

/// The options of a job's `config` block. Their names are those of nomad-driver-containerd and its forks, and docker's
/// where the meaning is the same.
pub const TASK_OPTIONS: &[OptionRow] = &[
    required(
        "image",
        OptionKind::Text,
        "`redis:7`, `registry.example:5000/app@sha256:...`; short names mean Docker Hub. `oci:DIR`, `oci-archive:FILE`, `docker-archive:FILE` (with `:NAME` if the file has several images) are images in files; their paths follow the rules of bind sources: relative paths are below the task's directory (`docker-archive:local/app.tar`).",
    ),
    default("image_pull_timeout", OptionKind::Text, "\"5m\"", "How long a pull may take."),
    row(
        "image_pull_policy",
        OptionKind::Text,
        "When the registry is asked for the image: `missing` (the default), `always`, or `never`, which fails if the image is not on the node.",
    ),
    row("force_pull", OptionKind::Flag, "docker's name for `image_pull_policy = \"always\"`."),
    row(
        "auth",
        OptionKind::Block(AUTH_OPTIONS),
        "Credentials for the image's registry; they take precedence over the plugin's.",
    ),
    row("command", OptionKind::Text, "Replaces the image's CMD; its ENTRYPOINT stays."),
    row(
        "args",
        OptionKind::List,
        "Arguments after `command` or `entrypoint`; without either they replace the image's CMD.",
    ),
    row("entrypoint", OptionKind::List, "Replaces the image's ENTRYPOINT and CMD. Excludes `command`."),
    row(
        "init",
        OptionKind::Flag,
        "true: the task's first process is a small init, which passes signals on to the command, reaps orphans and ends with the command's exit code, as docker's `--init`. Its path in the task is `/.nomad-init`.",
    ),
    row("cwd", OptionKind::Text, "Working directory. Default: the image's."),
    row("work_dir", OptionKind::Text, "docker's name for `cwd`."),
    row(
        "hostname",
        OptionKind::Text,
        "Host name in the container: at most 64 letters, digits, dots, dashes and underscores, without a dot or dash at the beginning (as containerd-driver: any text without control characters). Default: the container's id; with the host's network or UTS namespace, the host's name.",
    ),
    row("tty", OptionKind::Flag, "Gives the task a terminal; its standard error then goes to its standard output."),
    row("readonly_rootfs", OptionKind::Flag, "Makes the root file system read-only."),
    row(
        "mounts",
        OptionKind::Blocks(MOUNT),
        "Additional mounts. Parents are mounted before what lies in them, in whatever order the blocks are. Two mounts with one target are refused; as containerd-driver the last one is visible.",
    ),
    row(
        "devices",
        OptionKind::List,
        "Devices of the host by path, given at the same path with full access, if the operator allows them.",
    ),
    row(
        "shm_size",
        OptionKind::Text,
        "Size of `/dev/shm`: `128m`, up to the plugin's `security { tmpfs_max }`. Default: 64 MiB.",
    ),
    row("host_network", OptionKind::Flag, "Uses the host's network. Excludes a group network."),
    default(
        "host_dns",
        OptionKind::Flag,
        "true",
        "true: the host's name servers, unless the group has a `dns` block; false: the image's own `/etc/resolv.conf`.",
    ),
    row(
        "extra_hosts",
        OptionKind::List,
        "Lines of `/etc/hosts`: `name:address`, also for IPv6; the address `host-gateway` stands for the address at which the task reaches the host.",
    ),
    row("pid_mode", OptionKind::Text, "`host`: the task sees the host's processes. Default: its own (`private`)."),
    row(
        "ipc_mode",
        OptionKind::Text,
        "`host`: the task shares the host's IPC and `/dev/shm`. Default: its own (`private`).",
    ),
    row("uts_mode", OptionKind::Text, "`host`: the task has the host's name. Default: its own (`private`)."),
    row(
        "cgroupns",
        OptionKind::Text,
        "`private` or `host`: in which namespace the task sees cgroups. Default: private on cgroup version 2, host on version 1.",
    ),
    row("userns_mode", OptionKind::Text, "`host` is the only value: user ids are the host's."),
    row(
        "pids_limit",
        OptionKind::Number,
        "How many processes and threads the task may have, up to the plugin's `pids_limit`, which is the default; 0 or less: no limit, if the plugin sets none.",
    ),
    row("cpu_hard_limit", OptionKind::Flag, "true: `resources.cpu` is a hard limit, and not only a weight."),
    row(
        "cpu_cfs_period",
        OptionKind::Number,
        "The period in microseconds over which `cpu_hard_limit` is enforced, 1000 to 1000000. Default: 100000.",
    ),
    row("cpuset_cpus", OptionKind::Text, "Processors that the task may use: `0-3,5`. Excludes `resources.cores`."),
    row("cpuset_mems", OptionKind::Text, "Memory nodes that the task may use: `0,1`."),
    row(
        "memory_hard_limit",
        OptionKind::Number,
        "The task's memory limit in MiB; `resources.memory` is then what is reserved for the task. Takes precedence over `memory_max`.",
    ),
    row("oom_score_adj", OptionKind::Number, "Makes the OOM killer prefer the task: 0 to 1000."),
    row(
        "ulimit",
        OptionKind::Map,
        "Resource limits by docker's names: `ulimit { nofile = \"1024:2048\" }`; a single number is both soft and hard limit. Up to the plugin's `security { ulimit_max }`.",
    ),
    row("file_limit", OptionKind::Number, "The soft and hard `ulimit { nofile }`. Excludes that option."),
    row(
        "sysctl",
        OptionKind::Map,
        "Kernel parameters of the task's namespaces: `sysctl = { \"net.core.somaxconn\" = \"16384\" }`.",
    ),
    row("group_add", OptionKind::List, "Additional groups of the task's user, by the image's names or by number."),
    row("privileged", OptionKind::Flag, "Removes (nearly) all confinement, if the operator allows it."),
    row("cap_add", OptionKind::List, "Capabilities to add (`NET_ADMIN`, `CAP_NET_ADMIN`, `ALL`)."),
    row("cap_drop", OptionKind::List, "Capabilities to drop; `ALL` drops the defaults before `cap_add`."),
    row(
        "security_opt",
        OptionKind::List,
        "docker's options: `no-new-privileges[=false]` (false only on nodes with `security { allow_new_privileges }` or `allow_privileged`), `seccomp=unconfined`, `seccomp=FILE`; `apparmor=default` (the node's profile, also for a privileged task), and, if the operator allows it, `apparmor=PROFILE` (a loaded profile) or `apparmor=unconfined`; `label=disable` and `label=user:`, `role:`, `type:`, `level:` or `filetype:` with a value, for SELinux (no effect where the plugin has no `security { selinux = true }`).",
    ),
    row(
        "seccomp",
        OptionKind::Flag,
        "`true`: the operator's seccomp profile, or docker's; `false`: none, if the operator allows it. Default: the operator's profile, none for privileged tasks; as containerd-driver: none.",
    ),
    row(
        "seccomp_profile",
        OptionKind::Text,
        "The path of a seccomp profile of the job's own, in docker's or OCI's format, if the operator allows it; the path follows the rules of bind sources.",
    ),
    row("labels", OptionKind::Map, "Annotations of the container, for people and tools that inspect it."),
    row("annotations", OptionKind::Map, "The same as `labels`; keys that runtimes act on are refused."),
    row(
        "log_max_size",
        OptionKind::Text,
        "Size of one log file, if the plugin has `disable_log_collection`: `64k`, `10m`. Default: Nomad's 10 MiB.",
    ),
    row(
        "log_max_files",
        OptionKind::Number,
        "How many log files are kept of each of the task's streams, if the plugin has `disable_log_collection`. Default: Nomad's 10.",
    ),
    row(
        "log_policy",
        OptionKind::Text,
        "What happens when the task's log can't be written, as on a full disk: `block` (default): the task's writes block; `drop`: the output is dropped, and the log says how much.",
    ),
    row("runtime", OptionKind::Text, "OCI runtime: `crun`, `runc`, `runsc`, or one from the plugin's configuration."),
];
