//! Converts between Nomad's messages and the driver's own types.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use super::{
    config::{self, ConfigError, GroupNetwork},
    propagation, request_texts,
};
use crate::{
    ids::{AllocId, Flavor, TaskId},
    pb::{base as pb, driver as wire},
    rootfs::{CpuQuota, MemoryMax, NetworkNamespace, Resources, network::Dns},
    task::{Compute, ExitRecord, JobLimits, Settings, StartRequest, TaskDevice, TaskEvent, Volume},
};

/// The exit message of Nomad's docker driver for a task whose cgroup had an OOM kill.
const OOM_KILLED: &str = "OOM Killed";
/// Go's zero time (0001-01-01T00:00:00Z), which means "not yet".
const ZERO_TIME: prost_types::Timestamp = prost_types::Timestamp { seconds: -62_135_596_800, nanos: 0 };

/// Reads Nomad's request to start a task.
///
/// # Errors
/// When anything is wrong with the request or its `config`. The error lists all faults.
pub(crate) fn start_request(settings: &Settings, task: &wire::TaskConfig) -> Result<StartRequest, ConfigError> {
    request_texts::check(task)?;
    let network = match &task.network_isolation_spec {
        Some(spec) if !spec.path.is_empty() => NetworkNamespace::Path(PathBuf::from(&spec.path)),
        _ => NetworkNamespace::Private,
    };
    let group = match network {
        NetworkNamespace::Path(_) => GroupNetwork::Namespace,
        _ => GroupNetwork::None,
    };
    let hosts = task.network_isolation_spec.as_ref().and_then(|spec| spec.hosts_config.as_ref());
    let group_host = hosts.filter(|hosts| !hosts.address.is_empty() && !hosts.hostname.is_empty());
    let dns = task.dns.clone().unwrap_or_default();
    let options = config::task_options(settings, group, &task.msgpack_driver_config)?;
    let (mut resources, cpuset_cgroup) = resources(task.resources.as_ref());
    apply_job_limits(
        &mut resources,
        &options.limits,
        task.resources.as_ref(),
        (settings.compute, settings.name.flavor()),
    )?;
    let named = [
        ("com.hashicorp.nomad.alloc_id", &task.alloc_id),
        ("com.hashicorp.nomad.job_id", &task.job_id),
        ("com.hashicorp.nomad.job_name", &task.job_name),
        ("com.hashicorp.nomad.namespace", &task.namespace),
        ("com.hashicorp.nomad.node_id", &task.node_id),
        ("com.hashicorp.nomad.node_name", &task.node_name),
        ("com.hashicorp.nomad.task_group_name", &task.task_group_name),
        ("com.hashicorp.nomad.task_name", &task.name),
    ];
    let named = named.iter().filter(|(_, value)| !value.is_empty());
    let named = named.map(|(key, value)| ((*key).to_owned(), (*value).clone()));
    let annotations: BTreeMap<String, String> = options.annotations.clone().into_iter().chain(named).collect();
    let has_network = task.network_isolation_spec.is_some() || options.host_network;
    let lacks_network_for = if has_network { None } else { network_variable(&task.env) };
    let mut request = StartRequest {
        task_id: TaskId(task.id.clone()),
        name: task.name.clone(),
        alloc_id: AllocId::new(&task.alloc_id).map_err(|error| ConfigError::request_faults(vec![error.to_string()]))?,
        alloc_dir: PathBuf::from(&task.alloc_dir),
        stdout: PathBuf::from(&task.stdout_path),
        stderr: PathBuf::from(&task.stderr_path),
        env: task.env.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
        user: task.user.clone(),
        options,
        resources,
        cpuset_cgroup,
        lacks_network_for,
        network,
        dns: Dns { servers: dns.servers, searches: dns.searches, options: dns.options },
        group_host: group_host.map(|hosts| (hosts.address.clone(), hosts.hostname.clone())),
        volumes: task.mounts.iter().map(volume).collect::<Result<_, _>>()?,
        devices: task
            .devices
            .iter()
            .map(|device| TaskDevice {
                host_path: PathBuf::from(&device.host_path),
                task_path: PathBuf::from(&device.task_path),
                access: device.cgroup_permissions.clone(),
            })
            .collect(),
        annotations,
    };
    propagation::restrict_propagation(&mut request, settings.name.flavor());
    Ok(request)
}

/// Returns the first variable that tells a task of a port or an upstream of its group (hashicorp/nomad,
/// client/taskenv/env.go).
fn network_variable(env: &HashMap<String, String>) -> Option<String> {
    const PREFIXES: [&str; 2] = ["NOMAD_PORT_", "NOMAD_UPSTREAM_ADDR_"];
    let matching = env.keys().filter(|name| PREFIXES.iter().any(|prefix| name.starts_with(prefix)));
    matching.min().cloned()
}

fn volume(mount: &wire::Mount) -> Result<Volume, ConfigError> {
    let label = Some(mount.selinux_label.as_str()).filter(|label| !label.is_empty()).map(str::parse);
    let named = |problem: String| ConfigError::job_fault(format!("volume_mount {:?}: {problem}", mount.task_path));
    Ok(Volume {
        label: label.transpose().map_err(named)?,
        host_path: PathBuf::from(&mount.host_path),
        task_path: PathBuf::from(&mount.task_path),
        readonly: mount.readonly,
        propagation: match mount.propagation_mode.as_str() {
            "host-to-task" => "rslave",
            "bidirectional" => "rshared",
            _ => "rprivate",
        },
    })
}

/// Converts a task's resources. The second value is the cgroup that Nomad names for the task.
fn resources(resources: Option<&wire::Resources>) -> (Resources, String) {
    let allocated = resources.and_then(|resources| resources.allocated_resources.as_ref());
    let linux = resources.and_then(|resources| resources.linux_resources.as_ref());
    let memory = allocated.and_then(|allocated| allocated.memory.as_ref());
    let mebibytes = |count: i64| u64::try_from(count).unwrap_or(0) << 20;
    let shares = linux.map(|linux| linux.cpu_shares).filter(|&shares| shares > 0);
    let shares = shares.or_else(|| allocated.and_then(|allocated| allocated.cpu.as_ref()).map(|cpu| cpu.cpu_shares));
    let resources = Resources {
        cpu_shares: shares.and_then(|shares| u64::try_from(shares).ok()).unwrap_or(0),
        memory: memory.map_or(0, |memory| mebibytes(memory.memory_mb)),
        memory_max: match memory.map_or(0, |memory| memory.memory_max_mb) {
            -1 => MemoryMax::Unlimited,
            max if max > 0 => MemoryMax::Bytes(mebibytes(max)),
            _ => MemoryMax::Unset,
        },
        cpuset_cpus: linux.map(|linux| linux.cpuset_cpus.clone()).unwrap_or_default(),
        ..Resources::default()
    };
    (resources, linux.map(|linux| linux.cpuset_cgroup.clone()).unwrap_or_default())
}

/// Applies the limits in the job's `config`.
fn apply_job_limits(
    resources: &mut Resources,
    limits: &JobLimits,
    nomad_resources: Option<&wire::Resources>,
    (compute, flavor): (Compute, Flavor),
) -> Result<(), ConfigError> {
    let fault = |fault: String| Err(ConfigError::job_fault(fault));
    if !limits.cpuset_cpus.is_empty() {
        // In the forks of nomad-driver-containerd the option wins.
        if !resources.cpuset_cpus.is_empty() && flavor == Flavor::Strict {
            return fault("cpuset_cpus and resources.cores exclude each other; remove one of them".to_owned());
        }
        resources.cpuset_cpus.clone_from(&limits.cpuset_cpus);
    }
    resources.cpuset_mems.clone_from(&limits.cpuset_mems);
    resources.pids = limits.pids;
    if let MemoryMax::Bytes(limit) = limits.memory_max {
        if limit < resources.memory {
            let (limit, memory) = (limit >> 20, resources.memory >> 20);
            return fault(format!("memory_hard_limit = {limit} is less than resources.memory = {memory}"));
        }
        resources.memory_max = limits.memory_max;
    }
    if let Some(period) = limits.cfs_period {
        let ticks =
            nomad_resources.and_then(|nomad| nomad.linux_resources.as_ref()).map_or(0.0, |linux| linux.percent_ticks);
        #[allow(clippy::cast_precision_loss, reason = "megahertz are small numbers")]
        let share = if ticks > 0.0 { ticks } else { resources.cpu_shares as f64 / compute.total_mhz.max(1) as f64 };
        resources.cpu_quota = Some(CpuQuota::of(share, compute.cores.max(1), period));
    }
    Ok(())
}

/// Returns the compute capacity of this node: the operator's value, or else the sum of the cores that the agent
/// reports. Agents before 1.7 report none, nor does the agent's validation of the configuration. Then the capacity is
/// read from this host's own files.
pub(crate) fn compute(topology: Option<&pb::ClientTopology>) -> Compute {
    let Some(topology) = topology.filter(|topology| !topology.cores.is_empty()) else { return host_compute() };
    let speed = |core: &pb::ClientTopologyCore| {
        [core.base_speed, core.max_speed, core.guess_speed].into_iter().find(|&mhz| mhz > 0).unwrap_or(0)
    };
    let total_mhz = match topology.override_total_compute {
        0 => topology.cores.iter().map(speed).sum(),
        total => total,
    };
    Compute { total_mhz, cores: u32::try_from(topology.cores.len()).unwrap_or(u32::MAX) }
}

fn host_compute() -> Compute {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mhz = text.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(':').nth(1)?.trim().parse::<f64>().ok());
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a clock rate in megahertz")]
    let per_core = mhz.unwrap_or(0.0).max(0.0) as u64;
    Compute { total_mhz: per_core * cores as u64, cores: u32::try_from(cores).unwrap_or(1) }
}

/// Converts a task's exit. A death by signal has 128 + n as its code and 0 as its signal, as in Nomad's own container
/// drivers.
pub(crate) fn exit_result(exit: &ExitRecord) -> wire::ExitResult {
    wire::ExitResult { exit_code: exit.code, signal: 0, oom_killed: exit.oom_killed }
}

/// Returns the text that Nomad's Terminated event shows as the exit message; empty for none.
///
/// An OOM kill anywhere in the task's cgroup is reported in the words of Nomad's docker driver (hashicorp/nomad
/// drivers/docker/handle.go `run`), since `nomad alloc status` shows neither `oom_killed` nor this driver's event.
/// Nomad keeps the exit code along with the text (plugins/drivers/client.go `handleWaitTask`), but counts every exit
/// with a text as a failure (plugins/drivers/driver.go `Successful`). So there is no text for a task whose first
/// process outlived the OOM kill of another process and then succeeded; otherwise a finished batch job would be run
/// again.
pub(crate) fn exit_message(exit: &ExitRecord) -> String {
    match &exit.error {
        Some(error) if exit.oom_killed => format!("{OOM_KILLED}; {error}"),
        Some(error) => error.clone(),
        None if exit.oom_killed && exit.code != 0 => OOM_KILLED.to_owned(),
        None => String::new(),
    }
}

/// Converts a time; `None` becomes Go's zero time.
pub(crate) fn timestamp(time: Option<SystemTime>) -> prost_types::Timestamp {
    time.map_or(ZERO_TIME, prost_types::Timestamp::from)
}

/// Converts the milliseconds since the epoch that a record holds.
pub(crate) fn from_millis(millis: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
}

/// Converts a duration; an absent or negative one becomes zero.
pub(crate) fn duration(duration: Option<prost_types::Duration>) -> Duration {
    duration.and_then(|duration| Duration::try_from(duration).ok()).unwrap_or_default()
}

/// Converts a task event.
pub(crate) fn event(event: TaskEvent) -> wire::DriverTaskEvent {
    wire::DriverTaskEvent {
        task_id: event.task_id.0,
        alloc_id: event.alloc_id.to_string(),
        task_name: event.task_name,
        timestamp: Some(event.at.into()),
        message: event.message,
        annotations: event.annotations,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_oom_kill_is_in_the_exit_message_unless_the_task_succeeded() {
        let message = |code, oom_killed, error: Option<&str>| {
            exit_message(&ExitRecord { code, oom_killed, error: error.map(str::to_owned), started_at: 1, at: 2 })
        };
        assert_eq!(message(137, true, None), "OOM Killed");
        assert_eq!(message(3, true, None), "OOM Killed");
        assert_eq!(message(0, true, None), "");
        assert_eq!(message(137, false, None), "");
        assert_eq!(message(137, true, Some("the shim died")), "OOM Killed; the shim died");
        assert_eq!(message(137, false, Some("the shim died")), "the shim died");
    }

    #[test]
    fn ports_and_upstreams_need_a_network() {
        let variable =
            |names: &[&str]| network_variable(&names.iter().map(|name| ((*name).to_owned(), "1".to_owned())).collect());
        assert_eq!(variable(&["NOMAD_TASK_NAME", "NOMAD_META_PORT_x", "PORT"]), None);
        assert_eq!(variable(&["NOMAD_PORT_b", "NOMAD_PORT_a"]).as_deref(), Some("NOMAD_PORT_a"));
        assert_eq!(variable(&["NOMAD_UPSTREAM_ADDR_db"]).as_deref(), Some("NOMAD_UPSTREAM_ADDR_db"));
    }

    #[test]
    fn the_jobs_limits_are_checked_against_nomads() {
        let compute = Compute { total_mhz: 4000, cores: 4 };
        let with = |limits: &JobLimits, ticks| {
            let sent = wire::Resources {
                linux_resources: Some(wire::LinuxResources { percent_ticks: ticks, ..Default::default() }),
                ..Default::default()
            };
            let mut resources = Resources { cpu_shares: 500, memory: 64 << 20, ..Resources::default() };
            apply_job_limits(&mut resources, limits, Some(&sent), (compute, Flavor::Strict))
                .map(|()| resources)
                .map_err(|error| error.to_string())
        };
        let hard = JobLimits { cfs_period: Some(100_000), ..JobLimits::default() };
        let quota = |ticks| with(&hard, ticks).expect("limits").cpu_quota.expect("a quota").quota;
        assert_eq!((quota(0.0), quota(0.25)), (50_000, 100_000), "from CPU shares, from Nomad's percentage");
        let low = JobLimits { memory_max: MemoryMax::Bytes(32 << 20), ..JobLimits::default() };
        assert!(with(&low, 0.0).expect_err("refused").contains("memory_hard_limit = 32"));
        let mut reserved = Resources { cpuset_cpus: "0".to_owned(), ..Resources::default() };
        let wanted = JobLimits { cpuset_cpus: "1".to_owned(), ..JobLimits::default() };
        assert!(apply_job_limits(&mut reserved, &wanted, None, (compute, Flavor::Strict)).is_err());
        apply_job_limits(&mut reserved, &wanted, None, (compute, Flavor::ContainerdDriver)).expect("the option wins");
        assert_eq!(reserved.cpuset_cpus, "1");
    }

    #[test]
    fn not_yet_is_gos_zero_time() {
        assert_eq!(timestamp(None).to_string(), "0001-01-01T00:00:00Z");
    }

    #[test]
    fn the_operators_total_compute_takes_precedence() {
        let core = |base, max| pb::ClientTopologyCore { base_speed: base, max_speed: max, ..Default::default() };
        let mut topology = pb::ClientTopology { cores: vec![core(1000, 3000), core(0, 2000)], ..Default::default() };
        assert_eq!(compute(Some(&topology)), Compute { total_mhz: 3000, cores: 2 });
        topology.override_total_compute = 500;
        assert_eq!(compute(Some(&topology)), Compute { total_mhz: 500, cores: 2 });
        assert!(compute(None).cores > 0 && compute(Some(&pb::ClientTopology::default())).cores > 0);
    }

    #[test]
    fn absent_fields_have_defaults() {
        let (none, cgroup) = resources(None);
        assert_eq!((none, cgroup.as_str()), (Resources::default(), ""));
        assert_eq!(duration(None), Duration::ZERO);
        assert_eq!(duration(Some(prost_types::Duration { seconds: -1, nanos: 0 })), Duration::ZERO);
    }
}
