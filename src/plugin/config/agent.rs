//! Reads the agent's plugin configuration.

use std::time::Duration;

use super::{
    ConfigError,
    block::Block,
    ceilings, credentials,
    faults::Faults,
    runtime::{self, Runtimes},
    security,
    state::{self, State},
};
use crate::{
    cgroup::PrimingMode,
    duration,
    ids::{DriverName, Flavor},
    image::{CredentialScope, RegistryAddress},
    plugin::{
        decode::{Values, decode},
        options::PLUGIN_OPTIONS,
    },
    rootfs::Hooks,
    task::{Compute, ContainerdSettings, MetricsAddress, PoolSettings, Settings, ShimScope, ShimSettings},
};

/// The largest size of the pool: more idle shims than this, which take 150 MB, are a mistake.
const POOL_MAX: i64 = 64;

/// Reads the agent's plugin configuration.
///
/// # Errors
/// When anything is wrong with the configuration. The error lists all faults.
pub fn settings(name: &DriverName, bytes: &[u8]) -> Result<Settings, ConfigError> {
    let mut faults = Faults::default();
    let values = decode(PLUGIN_OPTIONS, bytes, &mut faults.0);
    let flavor = name.flavor();
    let block = |name| Block::of(&values, name);
    let State { places, upper, grace, orphans, orphan_timeout } = state::state(block("state"), name, &mut faults);
    let keep_images = keep_images(block("image"), &mut faults);
    let keep_warm = keep_warm(block("cgroup"), &mut faults);
    let containerd = containerd(block("containerd"), &mut faults);
    let shim = shim(&values, &mut faults);
    let Runtimes { runtimes, default_runtime, allow_runtimes } = runtime::runtimes(&values, &mut faults);
    let settings = Settings {
        name: name.clone(),
        enabled: values.flag("enabled").unwrap_or(true),
        places,
        containerd,
        shim,
        runtimes,
        default_runtime,
        allow_runtimes,
        upper,
        keep_warm,
        grace,
        orphans,
        orphan_timeout,
        stats_interval: stats_interval(&values, flavor, &mut faults),
        compute: Compute::default(),
        disable_log_collection: values.flag("disable_log_collection").unwrap_or(false),
        keep_images,
        pids_limit: ceilings::plugin_pids_limit(&values, flavor, &mut faults),
        hooks: hooks(block("hooks").values, &mut faults),
        metrics: metrics(block("metrics"), &mut faults),
        auth: credentials(values.block("auth"), || default_credential_scope(flavor), &mut faults),
        security: security::security(&values, flavor, &mut faults),
    };
    faults.into_result("plugin config", Some(settings))
}

fn keep_images(block: Block<'_>, faults: &mut Faults) -> Option<Duration> {
    match block.text("keep") {
        Some("forever") => None,
        _ => Some(block.duration("keep", "24h", faults)),
    }
}

fn keep_warm(block: Block<'_>, faults: &mut Faults) -> PrimingMode {
    match block.text("keep_warm") {
        None | Some("starts") => PrimingMode::Starts,
        Some("never") => PrimingMode::Never,
        Some(text) => {
            let is_allowed = |every: &Duration| (Duration::from_millis(1)..=Duration::from_secs(1)).contains(every);
            duration::parse(text).ok().filter(is_allowed).map_or_else(
                || {
                    let problem = "is not starts, never, or a duration from 1ms to 1s";
                    faults.push(format!("cgroup.keep_warm = {text:?} {problem}"));
                    PrimingMode::Starts
                },
                PrimingMode::Always,
            )
        }
    }
}

fn containerd(block: Block<'_>, faults: &mut Faults) -> ContainerdSettings {
    ContainerdSettings {
        address: block.path("address", "/run/containerd/containerd.sock".into(), faults),
        namespace: block.text("namespace").unwrap_or("nomad").to_owned(),
        snapshotter: block.text("snapshotter").unwrap_or("overlayfs").to_owned(),
    }
}

/// Reads `shim {}` and `shim_scope`.
fn shim(config: &Values, faults: &mut Faults) -> ShimSettings {
    let block = Block::of(config, "shim");
    let pool = block.values.number("pool").unwrap_or(2);
    if !(0..=POOL_MAX).contains(&pool) {
        faults.push(format!("shim.pool = {pool} is not between 0 and {POOL_MAX}"));
    }
    let scope = match config.non_empty_text("shim_scope") {
        None | Some("task") => ShimScope::Task,
        Some("alloc") => ShimScope::Alloc,
        Some("node") => ShimScope::Node,
        Some(other) => {
            faults.push(format!("shim_scope = {other:?} is not task, alloc or node"));
            ShimScope::Task
        }
    };
    ShimSettings {
        binary: block.text("binary").unwrap_or("containerd-shim-runc-v2").into(),
        pool: PoolSettings {
            size: usize::try_from(pool).unwrap_or_default(),
            scope,
            reuse: block.values.flag("reuse").unwrap_or(true),
        },
    }
}

fn stats_interval(config: &Values, flavor: Flavor, faults: &mut Faults) -> Option<Duration> {
    let parsed = duration::parse(config.non_empty_text("stats_interval")?);
    match flavor {
        Flavor::Strict => faults.record_err("stats_interval", parsed),
        // As in nomad-driver-containerd, the agent's own interval applies.
        Flavor::ContainerdDriver => {
            parsed.inspect_err(|error| tracing::warn!(%error, "ignored the plugin option stats_interval")).ok()
        }
    }
}

fn metrics(block: Block<'_>, faults: &mut Faults) -> Option<MetricsAddress> {
    let address = block.text("address")?;
    let parsed = address.parse();
    parsed.map_err(|problem| faults.push(format!("metrics.address = {address:?} {problem}"))).ok()
}

/// Returns the scope of the operator's credentials if they name no registry. Under the driver's own name, that is
/// Docker Hub and not the image's registry: a job's author could name a registry of their own and read the password
/// there.
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

fn hooks(block: &Values, faults: &mut Faults) -> Hooks {
    let mut commands = |kind: &str| -> Vec<Vec<String>> {
        let lines = block.list(kind).unwrap_or_default();
        let argv = |line: &String| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        for line in lines.iter().filter(|line| !line.trim_start().starts_with('/')) {
            faults.push(format!("hooks.{kind}: {line:?} does not begin with the absolute path of a program"));
        }
        lines.iter().map(argv).filter(|argv| !argv.is_empty()).collect()
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
