//! The operator's bounds on what jobs may ask for: `pids_limit`, `security { ulimit_max, tmpfs_max }`.

use std::collections::BTreeMap;

use super::faults::Faults;
use crate::{
    ids::Flavor,
    plugin::decode::Values,
    rootfs::{ceilings::Ceilings, limits::Ulimit, tmpfs_size::TmpfsSize},
};

/// The default of the plugin's `pids_limit`; it is podman's (containers/common, `pkg/config/default.go`,
/// `DefaultPidsLimit`).
const DEFAULT_PIDS_LIMIT: i64 = 2048;
/// The kernel refuses a larger `pids.max` (linux, `kernel/cgroup/pids.c`, `PIDS_MAX`).
const PIDS_MAX: i64 = 4_194_304;

/// Reads the plugin's `pids_limit`; `None` means no limit.
pub(super) fn plugin_pids_limit(values: &Values, flavor: Flavor, faults: &mut Faults) -> Option<i64> {
    let default = match flavor {
        Flavor::Strict => Some(DEFAULT_PIDS_LIMIT),
        Flavor::ContainerdDriver => None,
    };
    match values.number("pids_limit") {
        None => default,
        Some(limit) if limit > PIDS_MAX => {
            faults.push(format!("pids_limit = {limit} is above the kernel's maximum ({PIDS_MAX})"));
            default
        }
        // As in a job, and as in Nomad's docker driver, 0 or less means no limit.
        Some(limit) => Some(limit).filter(|limit| *limit > 0),
    }
}

/// Reads a job's `pids_limit`. The plugin's limit is the default and the most that a job may have, as in Nomad's docker
/// driver (hashicorp/nomad, `drivers/docker/driver.go`). The docker driver ignores a job's request for no limit; this
/// driver refuses it.
pub(super) fn job_pids_limit(values: &Values, ceiling: Option<i64>, faults: &mut Faults) -> Option<i64> {
    let Some(limit) = values.number("pids_limit") else { return ceiling };
    match ceiling {
        Some(ceiling) if limit <= 0 => faults.push(format!(
            "pids_limit = {limit} means no limit, but {ceiling} is the maximum on this node (plugin option pids_limit); remove it, or ask for no more than that"
        )),
        Some(ceiling) if limit > ceiling => faults.push(format!(
            "pids_limit = {limit} is above {ceiling}, the maximum on this node (plugin option pids_limit); remove it, or ask for no more than that"
        )),
        None if limit > PIDS_MAX => {
            faults.push(format!("pids_limit = {limit} is above the kernel's maximum ({PIDS_MAX})"));
        }
        _ => {}
    }
    Some(limit).filter(|limit| *limit > 0)
}

/// Reads `security { ulimit_max, tmpfs_max }`.
pub(super) fn ceilings(security: &Values, flavor: Flavor, faults: &mut Faults) -> Ceilings {
    let mut ulimits = BTreeMap::new();
    for (name, value) in security.map("ulimit_max") {
        let parsed = match Ulimit::parse(&name, &value) {
            Ok(limit) if limit.soft == limit.hard => Ok(limit),
            Ok(_) => Err(format!("{name} = {value:?} has two numbers; a ceiling has one")),
            Err(problem) => Err(problem),
        };
        if let Some(limit) = faults.record_err("security.ulimit_max", parsed) {
            ulimits.insert(limit.name(), limit.hard);
        }
    }
    let tmpfs = security.non_empty_text("tmpfs_max").and_then(|text| {
        let size = match (text, TmpfsSize::parse(text)) {
            ("unlimited", _) => Ok(TmpfsSize::Unlimited),
            (_, Some(size)) if size != TmpfsSize::Unlimited => Ok(size),
            _ => Err(format!("{text:?} is not a size such as 256m, a share such as 10%, or unlimited")),
        };
        faults.record_err("security.tmpfs_max", size)
    });
    Ceilings::new(flavor, ulimits, tmpfs)
}
