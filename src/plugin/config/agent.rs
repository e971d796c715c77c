//! Reads the agent's plugin configuration.

use std::{path::PathBuf, time::Duration};

use super::{ConfigError, apparmor, ceilings, credentials, limits::Faults, runtime, value_or_faults};
use crate::{
    cgroup::PrimingMode,
    duration,
    ids::{DriverName, Flavor},
    image::{CredentialScope, RegistryAddress},
    places::Places,
    plugin::{
        decode::{Values, decode},
        options::PLUGIN_OPTIONS,
    },
    rootfs::{Capabilities, Hooks, UpperStorage, default_allowed, seccomp::SocketcallPolicy},
    task::{
        Compute, ContainerdSettings, MetricsAddress, OrphanPolicy, PoolSettings, RUNC_SHIM_NAMES, SeccompDefault,
        SecuritySettings, Settings, ShimScope, ShimSettings,
    },
};

/// The largest size of the pool: more idle shims than this, which take 150 MB, are a mistake.
const POOL_MAX: i64 = 64;

/// Reads the agent's plugin configuration.
///
/// # Errors
/// When anything is wrong with the configuration; the error has all faults.
pub fn settings(name: &DriverName, bytes: &[u8]) -> Result<Settings, ConfigError> {
    let mut faults = Vec::new();
    let values = decode(PLUGIN_OPTIONS, bytes, &mut faults);
    let empty = Values::default();
    let block = |name: &str| values.block(name).unwrap_or(&empty);
    let (containerd, state, shim, security) = (block("containerd"), block("state"), block("shim"), block("security"));
    let parse_duration = |block: &Values, name: &str, option: &str, default: &str, faults: &mut Vec<String>| {
        duration::parse(block.non_empty_text(option).unwrap_or(default)).unwrap_or_else(|error| {
            faults.push(format!("{name}.{option}: {error}"));
            Duration::ZERO
        })
    };
    let grace = parse_duration(state, "state", "grace", "5m", &mut faults);
    let orphans = match state.non_empty_text("orphans") {
        None | Some("keep") => OrphanPolicy::Keep,
        Some("end") => OrphanPolicy::End,
        Some(other) => {
            faults.push(format!("state.orphans = {other:?} is not keep or end"));
            OrphanPolicy::Keep
        }
    };
    let orphan_timeout = parse_duration(state, "state", "orphan_timeout", "10m", &mut faults);
    let keep_images = match block("image").non_empty_text("keep") {
        Some("forever") => None,
        _ => Some(parse_duration(block("image"), "image", "keep", "24h", &mut faults)),
    };

    let keep_warm = match block("cgroup").non_empty_text("keep_warm") {
        None | Some("starts") => PrimingMode::Starts,
        Some("never") => PrimingMode::Never,
        Some(text) => {
            let every = parse_duration(block("cgroup"), "cgroup", "keep_warm", "", &mut faults);
            if !(Duration::from_millis(1)..=Duration::from_secs(1)).contains(&every) {
                faults.push(format!("cgroup.keep_warm = {text:?} is not starts, never, or a duration from 1ms to 1s"));
            }
            PrimingMode::Always(every)
        }
    };
    let upper_size = state.non_empty_text("upper_size");
    if let Some(size) = upper_size.filter(|size| !is_tmpfs_size(size)) {
        faults.push(format!("state.upper_size = {size:?} is not a size such as 256m, or a share such as 10%"));
    }
    let upper = match state.non_empty_text("upper") {
        None | Some("disk") => {
            if let Some(size) = upper_size {
                faults.push(format!("state.upper_size = {size:?} needs upper = \"tmpfs\""));
            }
            UpperStorage::Disk
        }
        Some("tmpfs") => UpperStorage::Tmpfs { size: upper_size.map(str::to_owned) },
        Some(other) => {
            faults.push(format!("state.upper = {other:?} is not disk or tmpfs"));
            UpperStorage::Disk
        }
    };
    let path = |block: &Values, name: &str, option: &str, default: PathBuf, faults: &mut Vec<String>| {
        let path = block.non_empty_text(option).map_or(default, PathBuf::from);
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
    let shim_scope = match values.non_empty_text("shim_scope") {
        None | Some("task") => ShimScope::Task,
        Some("alloc") => ShimScope::Alloc,
        Some("node") => ShimScope::Node,
        Some(other) => {
            faults.push(format!("shim_scope = {other:?} is not task, alloc or node"));
            ShimScope::Task
        }
    };
    let runtimes = runtime::runtimes(&values, &mut Faults(&mut faults));
    let known_runtimes = runtimes.keys().cloned().collect::<Vec<_>>().join(", ");
    // nomad-driver-containerd's option for the runtime of all tasks. The name of runc's shim leaves the binary open.
    let old_runtime =
        values.non_empty_text("containerd_runtime").filter(|old| !RUNC_SHIM_NAMES.contains(old)).map(str::to_owned);
    if let Some(old) = old_runtime.as_ref().filter(|old| !runtimes.contains_key(*old)) {
        faults.push(format!(
            "containerd_runtime = {old:?} is not configured; the runtimes are {}, {known_runtimes}, and those of runtime blocks",
            RUNC_SHIM_NAMES.join(", ")
        ));
    }
    let stats_interval = values.non_empty_text("stats_interval").and_then(|interval| {
        let parsed = duration::parse(interval);
        parsed
            .map_err(|error| match name.flavor() {
                // As in nomad-driver-containerd, the agent's own interval applies.
                Flavor::ContainerdDriver => tracing::warn!(%error, "ignored the plugin option stats_interval"),
                Flavor::Strict => faults.push(format!("stats_interval: {error}")),
            })
            .ok()
    });
    let default_runtime = match (values.non_empty_text("default_runtime").map(str::to_owned), old_runtime) {
        (Some(new), Some(old)) if new != old => {
            faults.push(format!(
                "default_runtime = {new:?} and containerd_runtime = {old:?} exclude each other; remove one of them"
            ));
            None
        }
        (new, old) => new.or(old),
    };
    let allow_runtimes = values.list("allow_runtimes").map(<[String]>::to_vec);
    for (option, runtime) in default_runtime
        .iter()
        .map(|name| ("default_runtime", name))
        .chain(allow_runtimes.iter().flatten().map(|name| ("allow_runtimes", name)))
    {
        if !runtimes.contains_key(runtime) {
            faults.push(format!("{option}: runtime {runtime:?} is not configured; the runtimes are {known_runtimes}"));
        }
    }
    let drop_in = name.flavor() == Flavor::ContainerdDriver;
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
    let seccomp = match security.non_empty_text("seccomp") {
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
    let apparmor = apparmor::agent_default(security, name.flavor(), &mut Faults(&mut faults));
    let metrics = block("metrics").non_empty_text("address").and_then(|address| {
        let parsed = address.parse::<MetricsAddress>();
        parsed.map_err(|problem| faults.push(format!("metrics.address = {address:?} {problem}"))).ok()
    });
    let hooks = hooks(block("hooks"), &mut faults);
    let auth = credentials(values.block("auth"), || default_credential_scope(name.flavor()), &mut faults);
    let pids_limit = ceilings::plugin_pids_limit(&values, name.flavor(), &mut Faults(&mut faults));
    let ceilings = ceilings::ceilings(security, name.flavor(), &mut Faults(&mut faults));
    let settings = Settings {
        name: name.clone(),
        hooks,
        metrics,
        enabled: values.flag("enabled").unwrap_or(true),
        places,
        containerd: ContainerdSettings {
            address,
            namespace: containerd.non_empty_text("namespace").unwrap_or("nomad").to_owned(),
            snapshotter: containerd.non_empty_text("snapshotter").unwrap_or("overlayfs").to_owned(),
        },
        shim: ShimSettings {
            binary: shim.non_empty_text("binary").unwrap_or("containerd-shim-runc-v2").into(),
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
        orphans,
        orphan_timeout,
        disable_log_collection: values.flag("disable_log_collection").unwrap_or(false),
        stats_interval,
        compute: Compute::default(),
        keep_images,
        auth,
        pids_limit,
        security: SecuritySettings {
            allow_privileged: values.flag("allow_privileged").unwrap_or(drop_in),
            allow_caps,
            allow_paths,
            allow_host_namespaces: security.flag("allow_host_namespaces").unwrap_or(drop_in),
            allow_devices: match security.list("allow_devices") {
                None if drop_in => None,
                patterns => Some(patterns.unwrap_or_default().to_vec()),
            },
            allow_sysctls: security.list("allow_sysctls").map(<[String]>::to_vec),
            ceilings,
            seccomp,
            allow_seccomp_override: security.flag("allow_seccomp_override").unwrap_or(drop_in),
            multiplexer: match security.flag("allow_socketcall").unwrap_or(drop_in) {
                true => SocketcallPolicy::Allowed,
                false => SocketcallPolicy::Enosys,
            },
            apparmor,
            allow_apparmor_override: security.flag("allow_apparmor_override").unwrap_or(drop_in),
        },
    };
    value_or_faults("plugin config", Some(settings), faults)
}

/// Returns the scope of the operator's credentials if they name no registry. Under the driver's own name it is not the
/// image's registry: any job author could name a registry of their own and read the password there.
fn default_credential_scope(flavor: Flavor) -> CredentialScope {
    match flavor {
        Flavor::Strict => CredentialScope::Registry(RegistryAddress::docker_hub()),
        Flavor::ContainerdDriver => {
            tracing::warn!(
                "auth has no server_address, so its password is sent to the registry of every image that a job names; \
                 write auth {{ server_address = \"registry.example\" }}"
            );
            CredentialScope::ImageRegistry
        }
    }
}

/// Whether `text` is a size as tmpfs(5) writes it.
fn is_tmpfs_size(text: &str) -> bool {
    let digits = text.trim_end_matches(['k', 'K', 'm', 'M', 'g', 'G', '%']);
    text.len() - digits.len() <= 1 && !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

fn hooks(block: &Values, faults: &mut Vec<String>) -> Hooks {
    let mut commands = |kind: &str| -> Vec<Vec<String>> {
        let lines = block.list(kind).unwrap_or_default();
        let argv = |line: &String| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        for line in lines.iter().filter(|line| !line.trim_start().starts_with('/')) {
            faults.push(format!("hooks.{kind}: {line:?} does not begin with the absolute path of a program"));
        }
        lines.iter().map(argv).filter(|words| !words.is_empty()).collect()
    };
    Hooks {
        prestart: commands("prestart"),
        create_runtime: commands("create_runtime"),
        create_container: commands("create_container"),
        start_container: commands("start_container"),
        poststart: commands("poststart"),
        poststop: commands("poststop"),
    }
}
