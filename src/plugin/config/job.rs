//! Reads a job's `config` block.

use std::time::Duration;

use super::{
    ConfigError, JOB_SUBJECT, credentials, faults::Faults, group_network::GroupNetwork, limits, mounts::mounts,
    privileges,
};
use crate::{
    duration,
    ids::Flavor,
    image::{CredentialScope, PullPolicy, Reference},
    plugin::{
        decode::{Values, decode},
        options::TASK_OPTIONS,
    },
    rootfs::{Command, RootMode, init::FirstProcess},
    task::{Settings, TaskOptions},
    text::{is_printable, quoted},
};

/// Linux's limit on a host name (`HOST_NAME_MAX`, sethostname(2)).
const HOSTNAME_MAX: usize = 64;

/// Reads a job's `config` block and checks it against what the operator allows.
///
/// # Errors
/// When anything is wrong with the block. The error lists all faults.
pub fn task_options(settings: &Settings, group: GroupNetwork, bytes: &[u8]) -> Result<TaskOptions, ConfigError> {
    let mut faults = Faults::default();
    let values = decode(TASK_OPTIONS, bytes, &mut faults.0);
    let (flavor, security) = (settings.name.flavor(), &settings.security);
    let flag = |name: &str| values.flag(name).unwrap_or(false);

    let image = image(&values, &mut faults);
    let image_pull_timeout = image_pull_timeout(&values, &mut faults);
    let command = command(&values, &mut faults);
    let cwd = working_directory(&values, &mut faults);
    let hostname = hostname(&values, flavor, &mut faults);
    privileges::check_isolation(&values, security, group, &mut faults);
    let (cap_add, cap_drop) = privileges::capabilities(&values, flavor, security, &mut faults);
    let mounts = mounts(&values, flavor, &security.ceilings, &mut faults);
    let security_opt = privileges::security_opt(&values, security, &mut faults);
    let seccomp = privileges::seccomp(&values, security_opt.seccomp, flavor, security, &mut faults);
    let image_pull_policy = pull_policy(&values, &mut faults);
    let namespaces = limits::namespaces(&values, security, &mut faults);
    let sysctl = limits::sysctls(&values, (namespaces, group), security, &mut faults);
    let ulimits = limits::ulimits(&values, &security.ceilings, &mut faults);
    let limits = limits::job_limits(&values, settings.pids_limit, &mut faults);
    let shm_size = limits::shm_size(&values, &security.ceilings, &mut faults);
    let oom_score_adj = limits::oom_score(&values, &mut faults);
    let annotations = limits::annotations(&values, &mut faults);
    let extra_hosts = limits::extra_hosts(&values, &mut faults);
    let devices = limits::devices(&values, security, &mut faults);
    let runtime = values.non_empty_text("runtime");
    if settings.runtime(runtime).is_some_and(|runtime| runtime.gvisor.is_some()) {
        let name = runtime.or(settings.default_runtime.as_deref()).unwrap_or_default();
        limits::check_gvisor_support(name, namespaces, &sysctl, &mut faults);
    }
    let log = limits::log_options(&values, &mut faults);
    // The job's author chose both the password and the image, so the image's registry may see the password.
    let auth = credentials(values.block("auth"), || CredentialScope::ImageRegistry, &mut faults);

    let options = image.map(|image| TaskOptions {
        image,
        image_pull_timeout,
        auth,
        command,
        first_process: if flag("init") { FirstProcess::Init } else { FirstProcess::Command },
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
        labels: security_opt.labels,
        runtime: runtime.map(str::to_owned),
        image_pull_policy,
        namespaces,
        host_dns: values.flag("host_dns").unwrap_or(true),
        extra_hosts,
        shm_size,
        sysctl,
        devices,
        ulimits,
        groups: values.list("group_add").unwrap_or_default().to_vec(),
        limits,
        oom_score_adj,
        no_new_privileges: security_opt.no_new_privileges,
        tty: flag("tty"),
        log,
        annotations,
    });
    faults.into_result(JOB_SUBJECT, options)
}

/// Reads the image's name. The decoder has reported a missing image.
fn image(values: &Values, faults: &mut Faults) -> Option<Reference> {
    Reference::parse(values.text("image")?).map_err(|error| faults.push(crate::error_chain(&error))).ok()
}

fn image_pull_timeout(values: &Values, faults: &mut Faults) -> Duration {
    let timeout = duration::parse(values.non_empty_text("image_pull_timeout").unwrap_or("5m"));
    faults.record_err("image_pull_timeout", timeout).unwrap_or_default()
}

fn command(values: &Values, faults: &mut Faults) -> Command {
    let command = Command {
        command: values.non_empty_text("command").map(str::to_owned),
        args: values.list("args").unwrap_or_default().to_vec(),
        entrypoint: values.list("entrypoint").unwrap_or_default().to_vec(),
    };
    if command.command.is_some() && !command.entrypoint.is_empty() {
        faults.push("command and entrypoint exclude each other; only one of them can be set".to_owned());
    }
    command
}

/// Reads `cwd` and `work_dir`, which are the same option.
fn working_directory(values: &Values, faults: &mut Faults) -> Option<String> {
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
    cwd
}

fn hostname(values: &Values, flavor: Flavor, faults: &mut Faults) -> Option<String> {
    let hostname = values.non_empty_text("hostname")?;
    faults.0.extend(hostname_problem(hostname, flavor));
    Some(hostname.to_owned())
}

/// Returns what is wrong with a host name, if anything is.
///
/// docker accepts any text since it has given up its rule (moby/moby#28990: names with underscores are in use), and
/// so does the kernel. Prompts, logs and scripts in the image do not expect that. Under this driver's own name a host
/// name has the characters of RFC 1123 and underscores; under the name containerd-driver only text that is not
/// printable is refused.
fn hostname_problem(name: &str, flavor: Flavor) -> Option<String> {
    if name.len() > HOSTNAME_MAX {
        return Some(format!("hostname = {} is longer than {HOSTNAME_MAX} bytes", quoted(name)));
    }
    let is_valid = match flavor {
        Flavor::Strict => {
            let has_valid_characters = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
            has_valid_characters && !name.starts_with(['.', '-'])
        }
        Flavor::ContainerdDriver => is_printable(name),
    };
    (!is_valid).then(|| {
        format!(
            "hostname = {} is not a valid host name: use letters, digits, dots, dashes and underscores, and begin with neither a dot nor a dash; without the option it is the container's id",
            quoted(name)
        )
    })
}

fn pull_policy(values: &Values, faults: &mut Faults) -> PullPolicy {
    let policy = match values.non_empty_text("image_pull_policy") {
        None => None,
        Some("missing") => Some(PullPolicy::Missing),
        Some("always") => Some(PullPolicy::Always),
        Some("never") => Some(PullPolicy::Never),
        Some(other) => {
            faults.push(format!("image_pull_policy = {other:?} is not missing, always or never"));
            None
        }
    };
    match (policy, values.flag("force_pull").unwrap_or(false)) {
        (None | Some(PullPolicy::Always), true) => PullPolicy::Always,
        (Some(_), true) => {
            faults.push("force_pull = true and image_pull_policy exclude each other; remove one of them".to_owned());
            PullPolicy::Always
        }
        (policy, false) => policy.unwrap_or_default(),
    }
}
