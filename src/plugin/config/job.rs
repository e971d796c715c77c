//! Reads a job's `config` block.

use std::time::Duration;

use super::{
    ConfigError, JOB_SUBJECT, apparmor, credentials,
    limits::{self, Faults},
    mounts::mount,
    value_or_faults,
};
use crate::{
    duration,
    ids::Flavor,
    image::{CredentialScope, PullPolicy, Reference},
    plugin::{
        decode::{Values, decode},
        options::TASK_OPTIONS,
    },
    rootfs::{CapabilityRequest, Command, RootMode, parse_capability, target::SysTargets},
    task::{AppArmorRequest, SeccompRequest, SecuritySettings, Settings, TaskOptions},
    text::{is_printable, quoted},
};

/// Linux's limit on a host name (`HOST_NAME_MAX`, sethostname(2)).
const HOSTNAME_MAX: usize = 64;

/// Whether the task's group has a network namespace. The option `host_network` conflicts with one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupNetwork {
    /// Nomad has made a network namespace for the group.
    Namespace,
    /// The group has no network namespace.
    None,
}

/// Reads a job's `config` block and checks it against what the operator allows.
///
/// # Errors
/// When anything is wrong with the block; the error has all faults.
pub fn task_options(settings: &Settings, group: GroupNetwork, bytes: &[u8]) -> Result<TaskOptions, ConfigError> {
    let mut faults = Vec::new();
    let values = decode(TASK_OPTIONS, bytes, &mut faults);
    let flavor = settings.name.flavor();
    let flag = |name: &str| values.flag(name).unwrap_or(false);

    let image = match values.text("image") {
        // The decoder has reported the missing image.
        None => None,
        Some(image) => Reference::parse(image).map_err(|error| faults.push(crate::error_chain(&error))).ok(),
    };
    let timeout = values.non_empty_text("image_pull_timeout").unwrap_or("5m");
    let image_pull_timeout = duration::parse(timeout).unwrap_or_else(|error| {
        faults.push(format!("image_pull_timeout: {error}"));
        Duration::ZERO
    });
    let command = Command {
        command: values.non_empty_text("command").map(str::to_owned),
        args: values.list("args").unwrap_or_default().to_vec(),
        entrypoint: values.list("entrypoint").unwrap_or_default().to_vec(),
    };
    if command.command.is_some() && !command.entrypoint.is_empty() {
        faults.push("command and entrypoint exclude each other; only one of them can be set".to_owned());
    }
    let cwd = match (values.non_empty_text("cwd"), values.non_empty_text("work_dir")) {
        (Some(cwd), Some(other)) if cwd != other => {
            faults.push("cwd and work_dir are the same option; remove one of them".to_owned());
            None
        }
        (cwd, other) => cwd.or(other).map(str::to_owned),
    };
    if let Some(relative) = cwd.as_deref().filter(|cwd| !cwd.starts_with('/')) {
        faults.push(format!("cwd = {relative:?} is not an absolute path"));
    }
    let hostname = values.non_empty_text("hostname").map(str::to_owned);
    if let Some(problem) = hostname.as_deref().and_then(|name| hostname_problem(name, flavor)) {
        faults.push(problem);
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
    if flag("host_network") && !settings.security.allow_host_namespaces {
        faults.push(
            "host_network = true is not allowed on this node (plugin option security { allow_host_namespaces })"
                .to_owned(),
        );
    }
    let mut capabilities = |option: &str| -> Vec<CapabilityRequest> {
        let names = values.list(option).unwrap_or_default();
        names
            .iter()
            .filter_map(|name| match parse_capability(name) {
                Ok(capability) => Some(capability),
                // nomad-driver-containerd passed unknown names on, and runc ignores them.
                Err(error) if flavor == Flavor::ContainerdDriver => {
                    tracing::warn!(option, %error, "ignored an unknown capability of a job");
                    None
                }
                Err(error) => {
                    faults.push(format!("{option}: {error}"));
                    None
                }
            })
            .collect()
    };
    let (cap_add, cap_drop) = (capabilities("cap_add"), capabilities("cap_drop"));
    if let Some(missing) = settings.security.allow_caps.as_ref().and_then(|allowed| allowed.first_missing(&cap_add)) {
        faults
            .push(format!("cap_add: {missing} is not allowed on this node (plugin option security {{ allow_caps }})"));
    }
    let sys = SysTargets::of(flavor, flag("privileged"));
    let mut faulty = |n: usize, fault: String| faults.push(format!("mounts[{n}].{fault}"));
    let mounts = values.blocks("mounts").iter().enumerate();
    let mounts = mounts.filter_map(|(n, block)| {
        mount(block, flavor, sys, &settings.security.ceilings).map_err(|fault| faulty(n, fault)).ok()
    });
    let mounts = mounts.collect();

    let security_opt = security_opt(&values, &settings.security, &mut Faults(&mut faults));
    let seccomp = seccomp(&values, security_opt.seccomp, flavor, &settings.security, &mut Faults(&mut faults));
    let image_pull_policy = pull_policy(&values, &mut Faults(&mut faults));
    let noted = &mut Faults(&mut faults);
    let namespaces = limits::namespaces(&values, &settings.security, noted);
    let sysctl = limits::sysctls(&values, (namespaces, group), &settings.security, noted);
    let ulimits = limits::ulimits(&values, &settings.security.ceilings, noted);
    let job_limits = limits::job_limits(&values, settings.pids_limit, noted);
    let shm_size = limits::shm_size(&values, &settings.security.ceilings, noted);
    let oom_score_adj = limits::oom_score(&values, noted);
    let annotations = limits::annotations(&values, noted);
    let extra_hosts = limits::extra_hosts(&values, noted);
    let devices = limits::devices(&values, &settings.security, noted);
    let runtime = values.non_empty_text("runtime");
    if settings.runtime(runtime).is_some_and(|runtime| runtime.gvisor.is_some()) {
        let name = runtime.or(settings.default_runtime.as_deref()).unwrap_or_default();
        limits::check_gvisor_support(name, namespaces, &sysctl, noted);
    }
    let log = limits::log_options(&values, noted);
    // The job's author chose both the password and the image, so the image's registry may see the password.
    let auth = credentials(values.block("auth"), || CredentialScope::ImageRegistry, &mut faults);

    let options = image.map(|image| TaskOptions {
        image,
        image_pull_timeout,
        auth,
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
        apparmor: security_opt.apparmor,
        runtime: values.non_empty_text("runtime").map(str::to_owned),
        image_pull_policy,
        namespaces,
        host_dns: values.flag("host_dns").unwrap_or(true),
        extra_hosts,
        shm_size,
        sysctl,
        devices,
        ulimits,
        groups: values.list("group_add").unwrap_or_default().to_vec(),
        limits: job_limits,
        oom_score_adj,
        no_new_privileges: security_opt.no_new_privileges,
        tty: flag("tty"),
        log,
        annotations,
    });
    value_or_faults(JOB_SUBJECT, options, faults)
}

/// Returns what is wrong with a host name, if anything is.
///
/// docker accepts any text since it gave up its rule (moby/moby#28990: people use underscores), and so does the kernel.
/// Prompts, logs and scripts in the image do not expect that. Under this driver's own name a host name has the
/// characters of RFC 1123 and underscores; under the name containerd-driver only text that is not printable is refused.
fn hostname_problem(name: &str, flavor: Flavor) -> Option<String> {
    if name.len() > HOSTNAME_MAX {
        return Some(format!("hostname = {} is longer than {HOSTNAME_MAX} bytes", quoted(name)));
    }
    let fine = match flavor {
        Flavor::Strict => {
            let letters = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
            letters && !name.starts_with(['.', '-'])
        }
        Flavor::ContainerdDriver => is_printable(name),
    };
    (!fine).then(|| {
        format!(
            "hostname = {} is not a valid host name: use letters, digits, dots, dashes and underscores, and begin with neither a dot nor a dash; without the option it is the container's id",
            quoted(name)
        )
    })
}

fn pull_policy(values: &Values, faults: &mut Faults<'_>) -> PullPolicy {
    let said = match values.non_empty_text("image_pull_policy") {
        None => None,
        Some("missing") => Some(PullPolicy::Missing),
        Some("always") => Some(PullPolicy::Always),
        Some("never") => Some(PullPolicy::Never),
        Some(other) => {
            faults.push(format!("image_pull_policy = {other:?} is not missing, always or never"));
            None
        }
    };
    match (said, values.flag("force_pull").unwrap_or(false)) {
        (None | Some(PullPolicy::Always), true) => PullPolicy::Always,
        (Some(_), true) => {
            faults.push("force_pull = true and image_pull_policy exclude each other; remove one of them".to_owned());
            PullPolicy::Always
        }
        (said, false) => said.unwrap_or_default(),
    }
}

/// The supported part of docker's `security_opt`.
struct SecurityOpt {
    no_new_privileges: Option<bool>,
    seccomp: Option<SeccompRequest>,
    apparmor: AppArmorRequest,
}

fn security_opt(values: &Values, security: &SecuritySettings, faults: &mut Faults<'_>) -> SecurityOpt {
    let mut found = SecurityOpt { no_new_privileges: None, seccomp: None, apparmor: AppArmorRequest::Unset };
    for option in values.list("security_opt").unwrap_or_default() {
        // docker used a colon before it introduced the equals sign.
        let (key, value) = option.split_once(['=', ':']).unwrap_or((option, ""));
        match (key, value) {
            ("no-new-privileges", "" | "true") => found.no_new_privileges = Some(true),
            ("no-new-privileges", "false") if security.allow_privileged => found.no_new_privileges = Some(false),
            ("no-new-privileges", "false") => faults.push(format!(
                "security_opt: {option:?} is not allowed on this node (plugin option allow_privileged)"
            )),
            ("seccomp", "unconfined") => found.seccomp = Some(SeccompRequest::Off),
            ("seccomp", path) if !path.is_empty() => found.seccomp = Some(SeccompRequest::File(path.to_owned())),
            ("apparmor", value) => {
                found.apparmor = apparmor::job_request(option, value, security, faults).unwrap_or_default();
            }
            _ => faults.push(format!(
                "security_opt: {option:?} is not known; the options are no-new-privileges[=false], seccomp=unconfined, seccomp=FILE, apparmor=default, apparmor=unconfined and apparmor=PROFILE"
            )),
        }
    }
    found
}

fn seccomp(
    values: &Values,
    opt: Option<SeccompRequest>,
    flavor: Flavor,
    security: &SecuritySettings,
    faults: &mut Faults<'_>,
) -> SeccompRequest {
    let said = match (values.flag("seccomp"), values.non_empty_text("seccomp_profile")) {
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
    let (said, option) = match (said, opt) {
        (SeccompRequest::Unset, Some(opt)) => (opt, "security_opt: seccomp"),
        (said, Some(opt)) if said != opt => {
            faults.push("seccomp and security_opt seccomp=... exclude each other; remove one of them".to_owned());
            (said, "seccomp")
        }
        (said, _) => (said, "seccomp"),
    };
    let overrides = match &said {
        SeccompRequest::Off => Some(format!("{option} = false")),
        SeccompRequest::File(path) => Some(format!("{option}_profile = {path:?}")),
        SeccompRequest::Unset | SeccompRequest::On => None,
    };
    if let Some(overrides) = overrides.filter(|_| !security.allow_seccomp_override) {
        faults.push(format!(
            "{overrides} is not allowed on this node (plugin option security {{ allow_seccomp_override }})"
        ));
    }
    said
}
