//! Typed configuration: from decoded values to settings and task options, with every fault in one message.

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use super::{
    decode::{Values, decode},
    options::{PLUGIN, TASK},
};
use crate::{
    cgroup::KeepWarm,
    duration,
    ids::{DriverName, Flavor},
    image::{Credentials, Reference},
    places::Places,
    rootfs::{
        Capabilities, CapabilityRequest, Command, RootMode, UpperOn, default_allowed,
        mounts::{MountKind, MountRequest},
        parse_capability,
    },
    task::{
        Compute, ContainerdSettings, MetricsAddress, PoolSettings, SeccompDefault, SeccompRequest, SecuritySettings,
        Settings, ShimScope, ShimSettings, TaskOptions,
    },
};

/// Linux's limit on a host name (`HOST_NAME_MAX`, sethostname(2)).
const HOSTNAME_MAX: usize = 64;
/// More idle shims than this are a mistake: 150 MB.
const POOL_MAX: i64 = 64;

/// What a job may say of a bind, under our own name (mount(8)).
const BIND_OPTIONS: &[&str] = &[
    "bind",
    "rbind",
    "ro",
    "rw",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "private",
    "rprivate",
    "slave",
    "rslave",
    "shared",
    "rshared",
];
/// And of a tmpfs (tmpfs(5)); those with `=` take a value.
const TMPFS_OPTIONS: &[&str] = &[
    "ro",
    "rw",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "noatime",
    "relatime",
    "size=",
    "mode=",
    "uid=",
    "gid=",
    "nr_inodes=",
    "nr_blocks=",
];

/// A configuration with all its faults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    what: &'static str,
    faults: Vec<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.faults[..] {
            [only] => write!(f, "{}: {only}", self.what),
            many => {
                write!(f, "{}: {} problems", self.what, many.len())?;
                many.iter().enumerate().try_for_each(|(n, fault)| write!(f, "; ({}) {fault}", n + 1))
            }
        }
    }
}

impl std::error::Error for ConfigError {}

fn finish<T>(what: &'static str, value: Option<T>, faults: Vec<String>) -> Result<T, ConfigError> {
    match value {
        Some(value) if faults.is_empty() => Ok(value),
        _ => Err(ConfigError { what, faults }),
    }
}

/// Reads the agent's plugin configuration.
///
/// # Errors
/// With everything that is wrong with it.
pub fn settings(name: &DriverName, bytes: &[u8]) -> Result<Settings, ConfigError> {
    let mut faults = Vec::new();
    let values = decode(PLUGIN, bytes, &mut faults);
    let empty = Values::default();
    let block = |name: &str| values.block(name).unwrap_or(&empty);
    let (containerd, state, shim, security) = (block("containerd"), block("state"), block("shim"), block("security"));
    let span = |block: &Values, name: &str, option: &str, default: &str, faults: &mut Vec<String>| {
        duration::parse(block.filled(option).unwrap_or(default)).unwrap_or_else(|error| {
            faults.push(format!("{name}.{option}: {error}"));
            Duration::ZERO
        })
    };
    let grace = span(state, "state", "grace", "5m", &mut faults);
    let orphan_timeout = span(state, "state", "orphan_timeout", "10m", &mut faults);
    let keep_images = match block("image").filled("keep") {
        Some("forever") => None,
        _ => Some(span(block("image"), "image", "keep", "24h", &mut faults)),
    };

    let keep_warm = match block("cgroup").filled("keep_warm") {
        None | Some("starts") => KeepWarm::Starts,
        Some("never") => KeepWarm::Never,
        Some(text) => {
            let every = span(block("cgroup"), "cgroup", "keep_warm", "", &mut faults);
            if !(Duration::from_millis(1)..=Duration::from_secs(1)).contains(&every) {
                faults.push(format!("cgroup.keep_warm = {text:?} is not starts, never, or from 1ms to 1s"));
            }
            KeepWarm::Always(every)
        }
    };
    let upper_size = state.filled("upper_size");
    if let Some(size) = upper_size.filter(|size| !is_tmpfs_size(size)) {
        faults.push(format!("state.upper_size = {size:?} is not a size such as 256m, or a share such as 10%"));
    }
    let upper = match state.filled("upper") {
        None | Some("disk") => {
            if let Some(size) = upper_size {
                faults.push(format!("state.upper_size = {size:?} needs upper = \"tmpfs\""));
            }
            UpperOn::Disk
        }
        Some("tmpfs") => UpperOn::Tmpfs { size: upper_size.map(str::to_owned) },
        Some(other) => {
            faults.push(format!("state.upper = {other:?} is not disk or tmpfs"));
            UpperOn::Disk
        }
    };
    let path = |block: &Values, name: &str, option: &str, default: PathBuf, faults: &mut Vec<String>| {
        let path = block.filled(option).map_or(default, PathBuf::from);
        if !path.is_absolute() {
            faults.push(format!("{name}.{option} = {:?} is not an absolute path", path.display()));
        }
        path
    };
    let defaults = Places::of(name);
    let places = Places::new(
        path(state, "state", "run_dir", defaults.run().to_owned(), &mut faults),
        path(state, "state", "state_dir", defaults.state().to_owned(), &mut faults),
    );
    let address = path(containerd, "containerd", "address", "/run/containerd/containerd.sock".into(), &mut faults);
    let pool = shim.number("pool").unwrap_or(2);
    if !(0..=POOL_MAX).contains(&pool) {
        faults.push(format!("shim.pool = {pool} is not between 0 and {POOL_MAX}"));
    }
    let shim_scope = match values.filled("shim_scope") {
        None | Some("task") => ShimScope::Task,
        Some("alloc") => ShimScope::Alloc,
        Some("node") => ShimScope::Node,
        Some(other) => {
            faults.push(format!("shim_scope = {other:?} is not task, alloc or node"));
            ShimScope::Task
        }
    };
    let mut runtimes: BTreeMap<String, PathBuf> =
        ["crun", "runc"].iter().map(|name| ((*name).to_owned(), PathBuf::from(name))).collect();
    for (label, runtime) in values.labelled("runtime") {
        runtimes.insert(label.clone(), PathBuf::from(runtime.text("binary").unwrap_or_default()));
    }
    if let Some(old) = values.filled("containerd_runtime")
        && !["io.containerd.runc.v2", "io.containerd.runc.v1"].contains(&old)
    {
        faults.push(format!("containerd_runtime = {old:?} is not supported; use io.containerd.runc.v2"));
    }
    let stats_interval = values.filled("stats_interval").and_then(|interval| {
        duration::parse(interval).map_err(|error| faults.push(format!("stats_interval: {error}"))).ok()
    });
    let known = runtimes.keys().cloned().collect::<Vec<_>>().join(", ");
    let default_runtime = values.filled("default_runtime").map(str::to_owned);
    let allow_runtimes = values.list("allow_runtimes").map(<[String]>::to_vec);
    for (option, runtime) in default_runtime
        .iter()
        .map(|name| ("default_runtime", name))
        .chain(allow_runtimes.iter().flatten().map(|name| ("allow_runtimes", name)))
    {
        if !runtimes.contains_key(runtime) {
            faults.push(format!("{option}: runtime {runtime:?} is not configured; there is {known}"));
        }
    }
    let drop_in = name.flavor() == Flavor::DropIn;
    let allow_caps = match security.list("allow_caps") {
        None if drop_in => None,
        None => Some(default_allowed()),
        Some(names) => match Capabilities::parse(names) {
            Ok(allowed) => Some(allowed),
            Err(error) => {
                faults.push(format!("security.allow_caps: {error}"));
                None
            }
        },
    };
    let allow_paths: Vec<PathBuf> =
        security.list("allow_paths").unwrap_or_default().iter().map(PathBuf::from).collect();
    for path in allow_paths.iter().filter(|path| !path.is_absolute()) {
        faults.push(format!("security.allow_paths: {:?} is not an absolute path", path.display()));
    }
    let seccomp = match security.filled("seccomp") {
        None if drop_in => SeccompDefault::Unconfined,
        None | Some("default") => SeccompDefault::Default,
        Some("unconfined") => SeccompDefault::Unconfined,
        Some(path) => {
            if !path.starts_with('/') {
                faults.push(format!("security.seccomp = {path:?} is not default, unconfined or an absolute path"));
            }
            SeccompDefault::File(path.into())
        }
    };
    let metrics = block("metrics").filled("address").and_then(|address| {
        let parsed = address.parse::<MetricsAddress>();
        parsed.map_err(|problem| faults.push(format!("metrics.address = {address:?} {problem}"))).ok()
    });
    let settings = Settings {
        name: name.clone(),
        metrics,
        enabled: values.flag("enabled").unwrap_or(true),
        places,
        containerd: ContainerdSettings {
            address,
            namespace: containerd.filled("namespace").unwrap_or("nomad").to_owned(),
            snapshotter: containerd.filled("snapshotter").unwrap_or("overlayfs").to_owned(),
        },
        shim: ShimSettings {
            binary: shim.filled("binary").unwrap_or("containerd-shim-runc-v2").into(),
            pool: PoolSettings {
                size: usize::try_from(pool).unwrap_or_default(),
                scope: shim_scope,
                reuse: shim.flag("reuse").unwrap_or(true),
            },
        },
        runtimes,
        default_runtime,
        allow_runtimes,
        upper,
        keep_warm,
        grace,
        orphan_timeout,
        stats_interval,
        compute: Compute::default(),
        keep_images,
        auth: credentials(values.block("auth")),
        security: SecuritySettings {
            allow_privileged: values.flag("allow_privileged").unwrap_or(drop_in),
            allow_caps,
            allow_paths,
            allow_host_network: security.flag("allow_host_namespaces").unwrap_or(drop_in),
            seccomp,
            allow_seccomp_override: security.flag("allow_seccomp_override").unwrap_or(drop_in),
        },
    };
    finish("plugin config", Some(settings), faults)
}

/// As tmpfs(5) has it.
fn is_tmpfs_size(text: &str) -> bool {
    let digits = text.trim_end_matches(['k', 'K', 'm', 'M', 'g', 'G', '%']);
    text.len() - digits.len() <= 1 && !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

fn credentials(block: Option<&Values>) -> Option<Credentials> {
    let block = block?;
    Some(Credentials {
        username: block.filled("username")?.to_owned(),
        password: block.filled("password")?.to_owned(),
        server: block.filled("server_address").map(str::to_owned),
    })
}

/// What of a job's surroundings its options can conflict with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupNetwork {
    /// Nomad made a namespace for the group.
    Namespace,
    /// It did not.
    None,
}

/// Reads a job's `config` block and checks it against what the operator allows.
///
/// # Errors
/// With everything that is wrong with it.
pub fn task_options(settings: &Settings, group: GroupNetwork, bytes: &[u8]) -> Result<TaskOptions, ConfigError> {
    let mut faults = Vec::new();
    let values = decode(TASK, bytes, &mut faults);
    let flavor = settings.name.flavor();
    let flag = |name: &str| values.flag(name).unwrap_or(false);

    let image = match values.text("image") {
        // Its absence has been noted.
        None => None,
        Some(image) => Reference::parse(image).map_err(|error| faults.push(crate::chain(&error))).ok(),
    };
    let timeout = values.filled("image_pull_timeout").unwrap_or("5m");
    let image_pull_timeout = duration::parse(timeout).unwrap_or_else(|error| {
        faults.push(format!("image_pull_timeout: {error}"));
        Duration::ZERO
    });
    let command = Command {
        command: values.filled("command").map(str::to_owned),
        args: values.list("args").unwrap_or_default().to_vec(),
        entrypoint: values.list("entrypoint").unwrap_or_default().to_vec(),
    };
    if command.command.is_some() && !command.entrypoint.is_empty() {
        faults.push("command and entrypoint exclude each other; only one of them can be set".to_owned());
    }
    let cwd = values.filled("cwd").map(str::to_owned);
    if let Some(relative) = cwd.as_deref().filter(|cwd| !cwd.starts_with('/')) {
        faults.push(format!("cwd = {relative:?} is not an absolute path"));
    }
    let hostname = values.filled("hostname").map(str::to_owned);
    if let Some(long) = hostname.as_deref().filter(|name| name.len() > HOSTNAME_MAX || name.contains('\0')) {
        faults.push(format!("hostname = {long:?} is longer than {HOSTNAME_MAX} bytes"));
    }
    if flag("privileged") && !settings.security.allow_privileged {
        faults.push(
            "privileged = true: privileged jobs are not allowed on this node (plugin option allow_privileged)"
                .to_owned(),
        );
    }
    if flag("host_network") && group == GroupNetwork::Namespace {
        faults.push(
            "host_network = true and a group network (bridge, cni or none) exclude each other; remove one of them"
                .to_owned(),
        );
    }
    if flag("host_network") && !settings.security.allow_host_network {
        faults.push(
            "host_network = true is not allowed on this node (plugin option security { allow_host_namespaces })"
                .to_owned(),
        );
    }
    let mut capabilities = |option: &str| -> Vec<CapabilityRequest> {
        let names = values.list(option).unwrap_or_default();
        names
            .iter()
            .filter_map(|name| parse_capability(name).map_err(|error| faults.push(format!("{option}: {error}"))).ok())
            .collect()
    };
    let (cap_add, cap_drop) = (capabilities("cap_add"), capabilities("cap_drop"));
    if let Some(missing) = settings.security.allow_caps.as_ref().and_then(|allowed| allowed.first_missing(&cap_add)) {
        faults
            .push(format!("cap_add: {missing} is not allowed on this node (plugin option security {{ allow_caps }})"));
    }
    let mounts = values
        .blocks("mounts")
        .iter()
        .enumerate()
        .filter_map(|(n, block)| mount(block, flavor).map_err(|fault| faults.push(format!("mounts[{n}].{fault}"))).ok())
        .collect();

    let seccomp = match (values.flag("seccomp"), values.filled("seccomp_profile")) {
        (None, None) => SeccompRequest::Unsaid,
        (Some(true), None) => SeccompRequest::On,
        (Some(false), None) => SeccompRequest::Off,
        (Some(true), Some(path)) => SeccompRequest::File(path.to_owned()),
        (None, Some(path)) if flavor == Flavor::Secure => SeccompRequest::File(path.to_owned()),
        (_, Some(path)) => {
            faults.push(format!("seccomp_profile = {path:?} needs seccomp = true"));
            SeccompRequest::Off
        }
    };
    let overrides = match &seccomp {
        SeccompRequest::Off => Some("seccomp = false".to_owned()),
        SeccompRequest::File(path) => Some(format!("seccomp_profile = {path:?}")),
        SeccompRequest::Unsaid | SeccompRequest::On => None,
    };
    if let Some(said) = overrides.filter(|_| !settings.security.allow_seccomp_override) {
        faults
            .push(format!("{said} is not allowed on this node (plugin option security {{ allow_seccomp_override }})"));
    }

    let options = image.map(|image| TaskOptions {
        image,
        image_pull_timeout,
        auth: credentials(values.block("auth")),
        command,
        cwd,
        hostname,
        root: if flag("readonly_rootfs") { RootMode::ReadOnly } else { RootMode::Writable },
        mounts,
        host_network: flag("host_network"),
        privileged: flag("privileged"),
        cap_add,
        cap_drop,
        seccomp,
        runtime: values.filled("runtime").map(str::to_owned),
    });
    finish("task config", options, faults)
}

fn mount(block: &Values, flavor: Flavor) -> Result<MountRequest, String> {
    // A missing target was noted by the decoder; the empty one here is not told twice.
    let target = block.text("target").unwrap_or("/-").to_owned();
    if !target.starts_with('/') || target.split('/').any(|part| part == "..") || target.trim_matches('/').is_empty() {
        return Err(format!("target = {target:?} is not an absolute path below the root"));
    }
    let kind = block.filled("type").unwrap_or("volume");
    let source = block.filled("source");
    let options = block.list("options").unwrap_or_default().to_vec();
    // Runtimes take anything with these options for a bind, whatever its type says.
    let binds = options.iter().any(|option| option == "bind" || option == "rbind");
    let kind = match kind {
        "bind" | "volume" => None,
        _ if binds => None,
        other if other == "tmpfs" || flavor == Flavor::DropIn => Some(other),
        other => return Err(format!("type = {other:?} is not bind, volume or tmpfs")),
    };
    if flavor == Flavor::Secure {
        let allowed = if kind.is_none() { BIND_OPTIONS } else { TMPFS_OPTIONS };
        let known = |option: &str| {
            allowed.iter().any(|known| {
                known
                    .strip_suffix('=')
                    .map_or(option == *known, |key| option.split_once('=').is_some_and(|(name, _)| name == key))
            })
        };
        if let Some(strange) = options.iter().find(|option| !known(option)) {
            return Err(format!("options: {strange:?} is not one of {}", allowed.join(", ")));
        }
    }
    let kind = match kind {
        None => {
            let source = source.ok_or_else(|| "source is required for a bind".to_owned())?;
            if flavor == Flavor::DropIn && options.is_empty() {
                return Err(
                    "options must not be empty for a bind; use [\"rbind\", \"ro\"] or [\"rbind\", \"rw\"]".to_owned()
                );
            }
            MountKind::Bind { source: source.to_owned() }
        }
        // A tmpfs has no source; what a job writes there must not mean anything.
        Some("tmpfs") => MountKind::FileSystem { kind: "tmpfs".to_owned(), source: "tmpfs".to_owned() },
        Some(other) => MountKind::FileSystem { kind: other.to_owned(), source: source.unwrap_or(other).to_owned() },
    };
    Ok(MountRequest { kind, target, options })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rmpv::Value as Wire;

    fn encode(entries: &[(&str, Wire)]) -> Vec<u8> {
        let map = Wire::Map(entries.iter().map(|(key, value)| (Wire::from(*key), value.clone())).collect());
        let mut bytes = Vec::new();
        rmpv::encode::write_value(&mut bytes, &map).expect("in memory");
        bytes
    }

    fn named(name: &str) -> Settings {
        settings(&DriverName::new(name).expect("a name"), &[]).expect("defaults are valid")
    }

    fn list(items: &[&str]) -> Wire {
        Wire::Array(items.iter().map(|item| Wire::from(*item)).collect())
    }

    #[test]
    fn our_own_name_is_closed_and_the_old_one_open() {
        let (ours, old) = (named("shim"), named("containerd-driver"));
        assert!(
            !ours.security.allow_privileged && !ours.security.allow_host_network && ours.security.allow_caps.is_some()
        );
        assert!(old.security.allow_privileged && old.security.allow_host_network && old.security.allow_caps.is_none());
        assert_eq!(ours.places.run(), std::path::Path::new("/run/nomad-driver-shim/shim"));
    }

    #[test]
    fn conflicts_and_gates_are_told_together() {
        let bytes = encode(&[
            ("image", Wire::from("Not An Image")),
            ("image_pull_timeout", Wire::from("soon")),
            ("command", Wire::from("a")),
            ("entrypoint", list(&["b"])),
            ("cwd", Wire::from("tmp")),
            ("hostname", Wire::from("h".repeat(65))),
            ("privileged", Wire::from(true)),
            ("host_network", Wire::from(true)),
            ("cap_add", list(&["NET_ADMIN", "FLY"])),
        ]);
        let error = task_options(&named("shim"), GroupNetwork::Namespace, &bytes).expect_err("refused").to_string();
        for part in [
            "10 problems",
            "Not An Image",
            "image_pull_timeout",
            "exclude each other; only one",
            "cwd",
            "hostname",
            "privileged jobs are not allowed",
            "group network",
            "allow_host_namespaces",
            "FLY",
            "NET_ADMIN is not allowed",
        ] {
            assert!(error.contains(part), "{part:?} in {error}");
        }
        let old = task_options(
            &named("containerd-driver"),
            GroupNetwork::None,
            &encode(&[
                ("image", Wire::from("redis")),
                ("privileged", Wire::from(true)),
                ("cap_add", list(&["SYS_ADMIN"])),
                ("entrypoint", list(&[])),
                ("command", Wire::from("x")),
            ]),
        );
        assert!(old.is_ok(), "{old:?}");
    }

    #[test]
    fn mounts_are_checked_by_kind() {
        let check = |name: &str, entries: &[(&str, Wire)]| {
            let mount = Wire::Map(entries.iter().map(|(key, value)| (Wire::from(*key), value.clone())).collect());
            let bytes = encode(&[("image", Wire::from("a")), ("mounts", Wire::Array(vec![mount]))]);
            task_options(&named(name), GroupNetwork::None, &bytes)
                .map(|options| options.mounts)
                .map_err(|e| e.to_string())
        };
        let target = ("target", Wire::from("/t"));
        assert!(check("shim", &[target.clone(), ("source", Wire::from("local/x"))]).is_ok());
        assert!(
            check("containerd-driver", &[target.clone(), ("source", Wire::from("local/x"))])
                .expect_err("no options")
                .contains("options")
        );
        assert!(check("shim", std::slice::from_ref(&target)).expect_err("no source").contains("source is required"));
        assert!(check("shim", &[target.clone(), ("type", Wire::from("nfs"))]).expect_err("kind").contains("nfs"));
        assert!(check("shim", &[target, ("type", Wire::from("tmpfs"))]).is_ok());
        assert!(check("shim", &[("target", Wire::from("/a/../..")), ("type", Wire::from("tmpfs"))]).is_err());
        let target = ("target", Wire::from("/t"));
        // A "tmpfs" with the options of a bind is one, and checked as one; strange options are refused.
        for name in ["shim", "containerd-driver"] {
            let disguised = [
                target.clone(),
                ("type", Wire::from("tmpfs")),
                ("source", Wire::from("/")),
                ("options", list(&["rbind", "rw"])),
            ];
            let mounts = check(name, &disguised).expect("a bind");
            assert_eq!(mounts[0].kind, MountKind::Bind { source: "/".to_owned() });
        }
        let strange = [target, ("type", Wire::from("tmpfs")), ("options", list(&["size=1m", "lowerdir=/"]))];
        assert!(check("shim", &strange).expect_err("an option").contains("lowerdir"));
    }

    #[test]
    fn a_bad_plugin_configuration_names_its_options() {
        let bytes = encode(&[
            ("shim", Wire::Map(vec![(Wire::from("pool"), Wire::from(1000))])),
            ("state", Wire::Map(vec![(Wire::from("run_dir"), Wire::from("relative"))])),
            ("default_runtime", Wire::from("kata")),
            ("metrics", Wire::Map(vec![(Wire::from("address"), Wire::from("9107"))])),
            ("stats_interval", Wire::from("often")),
        ]);
        let error = settings(&DriverName::new("shim").expect("a name"), &bytes).expect_err("refused").to_string();
        for part in ["shim.pool = 1000", "state.run_dir", "kata", "stats_interval", "metrics.address = \"9107\""] {
            assert!(error.contains(part), "{part:?} in {error}");
        }
    }
}
