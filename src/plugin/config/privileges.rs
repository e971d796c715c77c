//! Reads a job's options for privileges, capabilities, seccomp and AppArmor, and checks them against what the operator
//! allows.

use super::{apparmor, faults::Faults, group_network::GroupNetwork};
use crate::{
    ids::Flavor,
    plugin::decode::Values,
    rootfs::{CapabilityRequest, labels::LabelRequest, parse_capability},
    task::{AppArmorRequest, SeccompRequest, SecuritySettings},
};

/// Checks `privileged` and `host_network`.
pub(super) fn check_isolation(values: &Values, security: &SecuritySettings, group: GroupNetwork, faults: &mut Faults) {
    let flag = |name: &str| values.flag(name).unwrap_or(false);
    if flag("privileged") && !security.allow_privileged {
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
    if flag("host_network") && !security.allow_host_namespaces {
        faults.push(
            "host_network = true is not allowed on this node (plugin option security { allow_host_namespaces })"
                .to_owned(),
        );
    }
}

/// Reads `cap_add` and `cap_drop`.
pub(super) fn capabilities(
    values: &Values,
    flavor: Flavor,
    security: &SecuritySettings,
    faults: &mut Faults,
) -> (Vec<CapabilityRequest>, Vec<CapabilityRequest>) {
    let mut read = |option: &str| -> Vec<CapabilityRequest> {
        let names = values.list(option).unwrap_or_default();
        names
            .iter()
            .filter_map(|name| match parse_capability(name) {
                // nomad-driver-containerd passed unknown names on, and runc ignores them.
                Err(error) if flavor == Flavor::ContainerdDriver => {
                    tracing::warn!(option, %error, "ignored an unknown capability of a job");
                    None
                }
                parsed => faults.record_err(option, parsed),
            })
            .collect()
    };
    let (added, dropped) = (read("cap_add"), read("cap_drop"));
    if let Some(missing) = security.allow_caps.as_ref().and_then(|allowed| allowed.first_missing(&added)) {
        faults
            .push(format!("cap_add: {missing} is not allowed on this node (plugin option security {{ allow_caps }})"));
    }
    (added, dropped)
}

/// The supported part of docker's `security_opt`.
pub(super) struct SecurityOpt {
    pub(super) no_new_privileges: Option<bool>,
    pub(super) seccomp: Option<SeccompRequest>,
    pub(super) apparmor: AppArmorRequest,
    pub(super) labels: LabelRequest,
}

/// Reads `security_opt`. Of two entries with the same key, the later one counts.
pub(super) fn security_opt(values: &Values, security: &SecuritySettings, faults: &mut Faults) -> SecurityOpt {
    let mut found = SecurityOpt {
        no_new_privileges: None,
        seccomp: None,
        apparmor: AppArmorRequest::Unset,
        labels: LabelRequest::default(),
    };
    for option in values.list("security_opt").unwrap_or_default() {
        // docker used a colon before it introduced the equals sign.
        let (key, value) = option.split_once(['=', ':']).unwrap_or((option, ""));
        match (key, value) {
            ("no-new-privileges", "" | "true") => found.no_new_privileges = Some(true),
            ("no-new-privileges", "false") if security.allow_new_privileges || security.allow_privileged => {
                found.no_new_privileges = Some(false);
            }
            ("no-new-privileges", "false") => faults.push(format!(
                "security_opt: {option:?} is not allowed on this node (plugin option security {{ allow_new_privileges }}, or allow_privileged)"
            )),
            ("seccomp", "unconfined") => found.seccomp = Some(SeccompRequest::Off),
            ("seccomp", path) if !path.is_empty() => found.seccomp = Some(SeccompRequest::File(path.to_owned())),
            ("apparmor", value) => {
                found.apparmor = apparmor::job_request(option, value, security, faults).unwrap_or_default();
            }
            ("label", value) => label(&mut found.labels, option, value, security, faults),
            _ => faults.push(format!(
                "security_opt: {option:?} is not known; the options are no-new-privileges[=false], seccomp=unconfined, seccomp=FILE, apparmor=default, apparmor=unconfined, apparmor=PROFILE and label=..."
            )),
        }
    }
    found
}

/// Reads `value`, which follows `label=` in the job's `option`. As with docker, such an option is accepted where tasks
/// have no labels, and has no effect there.
fn label(labels: &mut LabelRequest, option: &str, value: &str, security: &SecuritySettings, faults: &mut Faults) {
    if let Err(problem) = labels.add(value) {
        faults.push(format!("security_opt: {option:?}: {problem}"));
    } else if security.selinux && !security.allow_label_override {
        faults.push(format!(
            "security_opt: {option:?} is not allowed on this node (plugin option security {{ allow_label_override }})"
        ));
    }
}

/// Reads `seccomp` and `seccomp_profile`. `opt` is the seccomp entry of `security_opt`.
pub(super) fn seccomp(
    values: &Values,
    opt: Option<SeccompRequest>,
    flavor: Flavor,
    security: &SecuritySettings,
    faults: &mut Faults,
) -> SeccompRequest {
    let own = match (values.flag("seccomp"), values.non_empty_text("seccomp_profile")) {
        (None, None) => SeccompRequest::Unset,
        (Some(true), None) => SeccompRequest::On,
        (Some(false), None) => SeccompRequest::Off,
        (Some(true), Some(path)) => SeccompRequest::File(path.to_owned()),
        (None, Some(path)) if flavor == Flavor::Strict => SeccompRequest::File(path.to_owned()),
        (_, Some(path)) => {
            faults.push(format!("seccomp_profile = {path:?} needs seccomp = true"));
            SeccompRequest::Off
        }
    };
    let (request, is_in_security_opt) = match (own, opt) {
        (SeccompRequest::Unset, Some(opt)) => (opt, true),
        (own, Some(opt)) if own != opt => {
            faults.push("seccomp and security_opt seccomp=... exclude each other; remove one of them".to_owned());
            (own, false)
        }
        (own, _) => (own, false),
    };
    let overrides = match (&request, is_in_security_opt) {
        (SeccompRequest::Off, true) => Some("security_opt: \"seccomp=unconfined\"".to_owned()),
        (SeccompRequest::Off, false) => Some("seccomp = false".to_owned()),
        (SeccompRequest::File(path), true) => Some(format!("security_opt: {:?}", format!("seccomp={path}"))),
        (SeccompRequest::File(path), false) => Some(format!("seccomp_profile = {path:?}")),
        (SeccompRequest::Unset | SeccompRequest::On, _) => None,
    };
    if let Some(overrides) = overrides.filter(|_| !security.allow_seccomp_override) {
        faults.push(format!(
            "{overrides} is not allowed on this node (plugin option security {{ allow_seccomp_override }})"
        ));
    }
    request
}
