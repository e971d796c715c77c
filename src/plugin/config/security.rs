//! Reads what the agent allows jobs to do: `security {}` and `allow_privileged`.

use std::path::PathBuf;

use super::{apparmor, block::Block, ceilings, faults::Faults};
use crate::{
    ids::Flavor,
    plugin::decode::Values,
    rootfs::{Capabilities, default_allowed, seccomp::SocketcallPolicy},
    task::{SeccompDefault, SecuritySettings},
};

/// Reads `security {}` and `allow_privileged`. Under the name `containerd-driver`, what the operator does not restrict
/// is allowed, as in nomad-driver-containerd.
pub(super) fn security(config: &Values, flavor: Flavor, faults: &mut Faults) -> SecuritySettings {
    let block = Block::of(config, "security");
    let drop_in = flavor == Flavor::ContainerdDriver;
    let flag = |option: &str| block.values.flag(option).unwrap_or(drop_in);
    SecuritySettings {
        allow_privileged: config.flag("allow_privileged").unwrap_or(drop_in),
        allow_caps: allow_caps(block, flavor, faults),
        allow_paths: allow_paths(block, faults),
        allow_host_namespaces: flag("allow_host_namespaces"),
        allow_devices: match block.values.list("allow_devices") {
            None if drop_in => None,
            patterns => Some(patterns.unwrap_or_default().to_vec()),
        },
        allow_sysctls: block.values.list("allow_sysctls").map(<[String]>::to_vec),
        seccomp: seccomp(block, flavor, faults),
        allow_new_privileges: flag("allow_new_privileges"),
        allow_seccomp_override: flag("allow_seccomp_override"),
        socketcall: match flag("allow_socketcall") {
            true => SocketcallPolicy::Allowed,
            false => SocketcallPolicy::Enosys,
        },
        apparmor: apparmor::agent_default(block.values, flavor, faults),
        allow_apparmor_override: flag("allow_apparmor_override"),
        selinux: block.values.flag("selinux").unwrap_or(false),
        allow_label_override: flag("allow_label_override"),
        ceilings: ceilings::ceilings(block.values, flavor, faults),
    }
}

fn allow_caps(block: Block<'_>, flavor: Flavor, faults: &mut Faults) -> Option<Capabilities> {
    match block.values.list("allow_caps") {
        None if flavor == Flavor::ContainerdDriver => None,
        None => Some(default_allowed()),
        Some(names) => faults.record_err("security.allow_caps", Capabilities::parse(names)),
    }
}

fn allow_paths(block: Block<'_>, faults: &mut Faults) -> Vec<PathBuf> {
    let paths: Vec<PathBuf> = block.values.list("allow_paths").unwrap_or_default().iter().map(PathBuf::from).collect();
    for path in paths.iter().filter(|path| !path.is_absolute()) {
        faults.push(format!("security.allow_paths: {:?} is not an absolute path", path.display()));
    }
    paths
}

fn seccomp(block: Block<'_>, flavor: Flavor, faults: &mut Faults) -> SeccompDefault {
    match block.text("seccomp") {
        None if flavor == Flavor::ContainerdDriver => SeccompDefault::Unconfined,
        None | Some("default") => SeccompDefault::Default,
        Some("unconfined") => SeccompDefault::Unconfined,
        Some(path) => {
            if !path.starts_with('/') {
                faults.push(format!("security.seccomp = {path:?} is not default, unconfined or an absolute path"));
            }
            SeccompDefault::File(path.into())
        }
    }
}
