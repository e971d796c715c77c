//! Builds the OCI runtime spec of a task, by pure functions of its inputs.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
};

use oci_spec::runtime::{
    Hook, HookBuilder, HooksBuilder, Linux, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxDevice, LinuxNamespace,
    LinuxNamespaceBuilder, LinuxNamespaceType, PosixRlimit, PosixRlimitBuilder, Process, ProcessBuilder, RootBuilder,
    Spec, SpecBuilder, User, UserBuilder,
};

use super::{
    Capabilities, Command, KernelLimits, Resources, RootfsError,
    apparmor::ProfileName,
    defaults::{self, BaseMounts, MaskedPaths, READONLY_PATHS},
    init::FirstProcess,
    labels::Labels,
    limits::{Namespace, Namespaces, Ulimit},
    process::{self, EnvironmentDefaults, Terminal},
    resources,
    seccomp::{CRUN_PROGRAM, Filter},
    users,
};
use crate::ids::Flavor;

/// The version of the OCI runtime spec that runc 1.1 and crun 1.8 support.
const OCI_VERSION: &str = "1.0.2";

/// The settings of the image, and its user database.
#[derive(Debug, Clone, Copy)]
pub struct ImageDefaults<'a> {
    /// The image's ENTRYPOINT.
    pub entrypoint: &'a [String],
    /// The image's CMD.
    pub cmd: &'a [String],
    /// The image's ENV.
    pub env: &'a [String],
    /// The image's USER.
    pub user: &'a str,
    /// The image's WORKDIR.
    pub working_dir: &'a str,
    /// The content of the image's /etc/passwd.
    pub passwd: &'a str,
    /// The content of the image's /etc/group.
    pub group: &'a str,
}

/// The network namespace of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkNamespace {
    /// A namespace of its own, with loopback only.
    Private,
    /// The host's namespace.
    Host,
    /// The namespace that Nomad has made for the group.
    Path(PathBuf),
}

/// Whether a task is privileged.
#[derive(Debug, Clone, PartialEq)]
pub enum Privilege {
    /// The task is confined, and has only its capabilities.
    Confined,
    /// The task may do everything that the driver may, and has these devices of the host.
    Privileged {
        /// The host's devices.
        devices: Vec<LinuxDevice>,
    },
}

/// Whether a task may write to its root file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootMode {
    /// The task may write, to its own writable layer.
    Writable,
    /// The task may not write.
    ReadOnly,
}

/// Programs that the runtime calls when a container is created, started and deleted (OCI runtime-spec, config.md,
/// "POSIX-platform Hooks"), each with its arguments.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hooks {
    /// The hooks `prestart`.
    pub prestart: Vec<Vec<String>>,
    /// The hooks `createRuntime`.
    pub create_runtime: Vec<Vec<String>>,
    /// The hooks `createContainer`.
    pub create_container: Vec<Vec<String>>,
    /// The hooks `startContainer`.
    pub start_container: Vec<Vec<String>>,
    /// The hooks `poststart`.
    pub poststart: Vec<Vec<String>>,
    /// The hooks `poststop`.
    pub poststop: Vec<Vec<String>>,
}

/// The inputs of a spec.
#[derive(Debug)]
pub struct SpecInput<'a> {
    /// The flavor whose defaults apply.
    pub flavor: Flavor,
    /// The image's settings.
    pub image: ImageDefaults<'a>,
    /// The job's command.
    pub command: &'a Command,
    /// Whether the command is the container's first process.
    pub first_process: FirstProcess,
    /// The job's working directory; `None` for the image's.
    pub cwd: Option<&'a str>,
    /// The job's user; empty for the image's.
    pub user: &'a str,
    /// The task's environment, as Nomad passes it.
    pub env: &'a BTreeMap<String, String>,
    /// The host name in the task's UTS namespace.
    pub hostname: &'a str,
    /// Whether the root file system is writable.
    pub root: RootMode,
    /// The process's capabilities.
    pub capabilities: Capabilities,
    /// Whether the task is privileged.
    pub privilege: Privilege,
    /// The paths that are hidden from a task that is not privileged.
    pub masked: &'a MaskedPaths,
    /// The task's network namespace.
    pub network: NetworkNamespace,
    /// The propagation of the root of the task's mounts; `None` leaves it to the runtime.
    pub root_propagation: Option<&'static str>,
    /// The devices that the task is given, each with the allowed access.
    pub devices: Vec<(LinuxDevice, String)>,
    /// The limits of the task's cgroup.
    pub resources: &'a Resources,
    /// The job's limits of setrlimit(2), which override the defaults.
    pub ulimits: &'a [Ulimit],
    /// The limits of setrlimit(2) that the task gets where the job sets none (`Ceilings::default_ulimits`).
    pub ulimit_defaults: Vec<Ulimit>,
    /// The kernel parameters of the task's namespaces.
    pub sysctl: &'a BTreeMap<String, String>,
    /// The task's other namespaces.
    pub namespaces: Namespaces,
    /// Whether the host has cgroup version 2.
    pub is_cgroup_v2: bool,
    /// The size of /dev/shm in bytes; `None` for the default.
    pub shm_size: Option<u64>,
    /// Supplementary groups, by the image's names or by number.
    pub groups: &'a [String],
    /// The task's OOM score adjustment (proc(5)).
    pub oom_score_adj: i32,
    /// Whether the process may never gain privileges; with `None` only a privileged task may.
    pub no_new_privileges: Option<bool>,
    /// Whether the task has a terminal.
    pub terminal: Terminal,
    /// The operator's hooks.
    pub hooks: &'a Hooks,
    /// Whether the kernel can count swap.
    pub counts_swap: bool,
    /// The path of the task's cgroup.
    pub cgroup: &'a str,
    /// The limits of this host's kernel on strings.
    pub kernel: KernelLimits,
    /// The task's seccomp filter.
    pub seccomp: Option<Filter>,
    /// The task's AppArmor profile.
    pub apparmor: Option<&'a ProfileName>,
    /// The task's SELinux labels; `None` where tasks have none.
    pub labels: Option<&'a Labels>,
    /// The container's annotations, for people and tools that inspect it.
    pub annotations: BTreeMap<String, String>,
}

/// Builds the spec. The root file system is expected at `rootfs` in the bundle. The spec contains only the mounts that
/// every container has; the task's own mounts are added when they have been placed (`mount_tree`).
///
/// # Errors
/// Fails when there is no command, the user is unknown, a path is not absolute, or the kernel would not accept a
/// string.
pub fn build(mut input: SpecInput<'_>) -> Result<Spec, RootfsError> {
    let process = build_process(&input)?;
    let mounts = defaults::base_mounts(BaseMounts {
        flavor: input.flavor,
        privileged: is_privileged(&input),
        host_ipc: input.namespaces.ipc == Namespace::Host,
        shm_size: input.shm_size,
    })?;
    let mut annotations: HashMap<String, String> = std::mem::take(&mut input.annotations).into_iter().collect();
    if let Some(Filter::Program(program)) = &input.seccomp {
        annotations.insert(CRUN_PROGRAM.to_owned(), program.to_string());
    }
    let mut spec = SpecBuilder::default()
        .version(OCI_VERSION)
        .hostname(input.hostname)
        .root(RootBuilder::default().path("rootfs").readonly(input.root == RootMode::ReadOnly).build()?)
        .process(process)
        .mounts(mounts)
        .annotations(annotations);
    if *input.hooks != Hooks::default() {
        spec = spec.hooks(hooks(input.hooks)?);
    }
    let (namespaces, kernel) = (input.namespaces, input.kernel);
    let mut spec = spec.linux(build_linux(input)?).build()?;
    if namespaces.uts == Namespace::Host {
        // The host name would be set for the whole host.
        spec.set_hostname(None);
    }
    kernel.check(&spec)?;
    Ok(spec)
}

fn is_privileged(input: &SpecInput<'_>) -> bool {
    matches!(input.privilege, Privilege::Privileged { .. })
}

/// Builds the process: its program, user, directory, environment, capabilities and limits.
fn build_process(input: &SpecInput<'_>) -> Result<Process, RootfsError> {
    let cwd = match input.cwd {
        Some(cwd) => cwd,
        None if input.image.working_dir.is_empty() => "/",
        None => input.image.working_dir,
    };
    if !cwd.starts_with('/') {
        return Err(RootfsError::Cwd(cwd.to_owned()));
    }
    let user = build_user(input)?;
    let defaults = EnvironmentDefaults {
        hostname: input.hostname,
        home: users::home(user.uid(), input.image.passwd),
        terminal: input.terminal,
    };
    let mut process = ProcessBuilder::default()
        .terminal(input.terminal == Terminal::Yes)
        .user(user)
        .args(input.first_process.arguments(process::arguments(
            input.command,
            input.image.entrypoint,
            input.image.cmd,
        )?))
        .env(process::environment(defaults, input.image.env, input.env, input.flavor))
        .cwd(PathBuf::from(cwd))
        .no_new_privileges(input.no_new_privileges.unwrap_or(!is_privileged(input)))
        // Without this value, the task would inherit the agent's score, which is often set so that the agent outlives
        // its tasks.
        .oom_score_adj(input.oom_score_adj)
        // Without this call, the crate `oci_spec` would set default limits of its own.
        .rlimits(rlimits(input.flavor, &input.ulimit_defaults, input.ulimits)?)
        .capabilities(capability_sets(&input.capabilities)?);
    if let Some(profile) = input.apparmor {
        process = process.apparmor_profile(profile.as_str());
    }
    // As with docker, a privileged task's processes have no label of their own.
    if let Some(label) = input.labels.and_then(|labels| labels.process.as_ref()).filter(|_| !is_privileged(input)) {
        process = process.selinux_label(label.as_str());
    }
    Ok(process.build()?)
}

/// Looks up the job's user, or else the image's, with its groups.
fn build_user(input: &SpecInput<'_>) -> Result<User, RootfsError> {
    let user = if input.user.is_empty() { input.image.user } else { input.user };
    let ids = users::resolve_user(user, input.image.passwd, input.image.group)?;
    // The primary group is also listed as a supplementary group. Otherwise a program could drop the primary group and
    // so get around a restriction of that group (CVE-2022-36109).
    let mut groups = vec![ids.gid];
    let mut seen = HashSet::from([ids.gid]);
    let further = ids.groups.iter().copied().chain(users::resolve_groups(input.groups, input.image.group)?);
    groups.extend(further.filter(|group| seen.insert(*group)));
    if groups.len() > users::GROUPS_MAX {
        return Err(users::UserError::Groups { name: user.to_owned(), count: groups.len() }.into());
    }
    Ok(UserBuilder::default().uid(ids.uid).gid(ids.gid).additional_gids(groups).build()?)
}

/// Builds the Linux part: namespaces, cgroup and its limits, devices, hidden paths, kernel parameters and the seccomp
/// profile.
fn build_linux(input: SpecInput<'_>) -> Result<Linux, RootfsError> {
    let mut rules = defaults::device_rules(is_privileged(&input))?;
    for (device, access) in &input.devices {
        rules.push(defaults::allow_device(device, access)?);
    }
    let resources = resources::build(input.resources, input.counts_swap, rules)?;
    let mut devices: Vec<LinuxDevice> = input.devices.into_iter().map(|(device, _)| device).collect();
    let mut linux = LinuxBuilder::default()
        .cgroups_path(PathBuf::from(input.cgroup))
        .namespaces(namespaces(&input.network, input.namespaces, input.is_cgroup_v2)?)
        .resources(resources)
        .masked_paths(Vec::<String>::new())
        .readonly_paths(Vec::<String>::new());
    match input.privilege {
        Privilege::Confined => {
            linux =
                linux.masked_paths(input.masked.as_slice()).readonly_paths(READONLY_PATHS.map(str::to_owned).to_vec());
        }
        Privilege::Privileged { devices: host } => devices.extend(host),
    }
    if !devices.is_empty() {
        linux = linux.devices(devices);
    }
    if let Some(labels) = input.labels {
        linux = linux.mount_label(labels.files.as_str());
    }
    if let Some(propagation) = input.root_propagation {
        linux = linux.rootfs_propagation(propagation);
    }
    if !input.sysctl.is_empty() {
        linux = linux.sysctl(input.sysctl.clone().into_iter().collect::<HashMap<_, _>>());
    }
    if let Some(Filter::Profile(profile)) = &input.seccomp {
        linux = linux.seccomp(profile.as_ref().clone());
    }
    Ok(linux.build()?)
}

fn hooks(hooks: &Hooks) -> Result<oci_spec::runtime::Hooks, RootfsError> {
    let built = |commands: &[Vec<String>]| -> Result<Vec<Hook>, RootfsError> {
        let programs = commands.iter().filter_map(|command| Some((command.first()?, command)));
        programs.map(|(path, command)| Ok(HookBuilder::default().path(path).args(command.clone()).build()?)).collect()
    };
    #[allow(deprecated, reason = "NVIDIA's and other older tools are installed as prestart hooks")]
    let prestart = HooksBuilder::default().prestart(built(&hooks.prestart)?);
    Ok(prestart
        .create_runtime(built(&hooks.create_runtime)?)
        .create_container(built(&hooks.create_container)?)
        .start_container(built(&hooks.start_container)?)
        .poststart(built(&hooks.poststart)?)
        .poststop(built(&hooks.poststop)?)
        .build()?)
}

/// Returns the capability sets of a process. The inheritable and ambient sets stay empty: with them, a set-user-id
/// program that is run by another user would keep too many capabilities (CVE-2022-24769).
fn capability_sets(capabilities: &Capabilities) -> Result<oci_spec::runtime::LinuxCapabilities, RootfsError> {
    let none = oci_spec::runtime::Capabilities::default();
    Ok(LinuxCapabilitiesBuilder::default()
        .bounding(capabilities.to_oci())
        .effective(capabilities.to_oci())
        .permitted(capabilities.to_oci())
        .inheritable(none.clone())
        .ambient(none)
        .build()?)
}

fn rlimits(flavor: Flavor, defaults: &[Ulimit], wanted: &[Ulimit]) -> Result<Vec<PosixRlimit>, RootfsError> {
    let mut limits = defaults.to_vec();
    if flavor == Flavor::ContainerdDriver {
        // nomad-driver-containerd has this limit from containerd's default spec.
        let files = Ulimit::files(1024);
        match limits.iter_mut().find(|limit| limit.kind == files.kind) {
            Some(limit) => (limit.soft, limit.hard) = (limit.soft.min(files.soft), limit.hard.min(files.hard)),
            None => limits.push(files),
        }
    }
    for limit in wanted {
        limits.retain(|other| other.kind != limit.kind);
        limits.push(*limit);
    }
    let build = |limit: Ulimit| PosixRlimitBuilder::default().typ(limit.kind).soft(limit.soft).hard(limit.hard).build();
    Ok(limits.into_iter().map(build).collect::<Result<_, _>>()?)
}

fn namespaces(
    network: &NetworkNamespace,
    others: Namespaces,
    is_cgroup_v2: bool,
) -> Result<Vec<LinuxNamespace>, RootfsError> {
    let cgroup = others.cgroup.unwrap_or(if is_cgroup_v2 { Namespace::Private } else { Namespace::Host });
    let wanted = [
        (LinuxNamespaceType::Pid, others.pid),
        (LinuxNamespaceType::Ipc, others.ipc),
        (LinuxNamespaceType::Uts, others.uts),
        (LinuxNamespaceType::Mount, Namespace::Private),
        (LinuxNamespaceType::Cgroup, cgroup),
    ];
    let mut namespaces = Vec::new();
    for (kind, namespace) in wanted {
        if namespace == Namespace::Private {
            namespaces.push(LinuxNamespaceBuilder::default().typ(kind).build()?);
        }
    }
    let net = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network);
    match network {
        NetworkNamespace::Host => {}
        NetworkNamespace::Private => namespaces.push(net.build()?),
        NetworkNamespace::Path(path) => namespaces.push(net.path(path.clone()).build()?),
    }
    Ok(namespaces)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn build_with(change: impl FnOnce(&mut SpecInput<'_>)) -> Result<Value, RootfsError> {
        let (entrypoint, cmd, env) = (Vec::new(), vec!["sh".to_owned()], vec!["A=1".to_owned()]);
        let (command, task_env, resources) = (Command::default(), BTreeMap::new(), Resources::default());
        let (sysctl, hooks) = (BTreeMap::new(), Hooks::default());
        let mut input = SpecInput {
            flavor: Flavor::Strict,
            image: ImageDefaults {
                entrypoint: &entrypoint,
                cmd: &cmd,
                env: &env,
                user: "",
                working_dir: "",
                passwd: "user:x:1000:1000::/:\n",
                group: "",
            },
            command: &command,
            first_process: FirstProcess::Command,
            cwd: None,
            user: "",
            env: &task_env,
            hostname: "host",
            root: RootMode::Writable,
            capabilities: Capabilities::defaults(Flavor::Strict),
            privilege: Privilege::Confined,
            masked: Box::leak(Box::new(MaskedPaths::for_sandbox())),
            network: NetworkNamespace::Private,
            root_propagation: None,
            devices: Vec::new(),
            resources: &resources,
            ulimits: &[],
            ulimit_defaults: Vec::new(),
            sysctl: &sysctl,
            namespaces: Namespaces::default(),
            is_cgroup_v2: false,
            shm_size: None,
            groups: &[],
            oom_score_adj: 0,
            no_new_privileges: None,
            terminal: Terminal::No,
            hooks: &hooks,
            counts_swap: true,
            cgroup: "/nomad/a.t",
            kernel: KernelLimits::of_this_process(),
            seccomp: None,
            apparmor: None,
            labels: None,
            annotations: BTreeMap::new(),
        };
        change(&mut input);
        build(input).map(|spec| serde_json::to_value(spec).expect("a spec is JSON"))
    }

    #[test]
    fn the_crates_own_defaults_are_not_used() {
        let spec = build_with(|_| {}).expect("builds");
        assert_eq!(spec["hostname"], "host");
        assert_eq!(spec["process"]["args"], json!(["sh"]));
        assert_eq!(spec["process"]["cwd"], "/");
        assert_eq!(spec["process"]["noNewPrivileges"], true);
        assert_eq!(spec["process"]["oomScoreAdj"], 0);
        assert_eq!(spec["process"]["rlimits"], json!([]));
        assert_eq!(spec["root"], json!({"path": "rootfs", "readonly": false}));
        assert_eq!(spec["linux"]["cgroupsPath"], "/nomad/a.t");
        assert_eq!(spec["linux"]["maskedPaths"].as_array().map(Vec::len), Some(12));
        let kinds: Vec<_> =
            spec["linux"]["namespaces"].as_array().expect("a list").iter().map(|n| n["type"].clone()).collect();
        assert_eq!(kinds, ["pid", "ipc", "uts", "mount", "network"]);
    }

    #[test]
    fn networks_are_private_shared_or_the_hosts() {
        let net = |network| {
            let spec = build_with(|input| input.network = network).expect("builds");
            let namespaces = spec["linux"]["namespaces"].as_array().expect("a list").clone();
            namespaces.into_iter().find(|namespace| namespace["type"] == "network")
        };
        assert_eq!(net(NetworkNamespace::Host), None);
        assert_eq!(net(NetworkNamespace::Path("/run/netns/x".into())).expect("joined")["path"], "/run/netns/x");
    }

    #[test]
    fn a_job_sets_its_own_limits_and_namespaces() {
        let (sysctl, groups) = (BTreeMap::from([("net.core.somaxconn".to_owned(), "9".to_owned())]), ["7".to_owned()]);
        let hooks = Hooks { poststop: vec![vec!["/bin/true".to_owned(), "x".to_owned()]], ..Hooks::default() };
        let spec = build_with(|input| {
            input.flavor = Flavor::ContainerdDriver;
            input.ulimits = &[Ulimit { kind: oci_spec::runtime::PosixRlimitType::RlimitNofile, soft: 5, hard: 6 }];
            input.namespaces =
                Namespaces { pid: Namespace::Host, ipc: Namespace::Host, uts: Namespace::Host, cgroup: None };
            input.is_cgroup_v2 = true;
            (input.sysctl, input.groups, input.hooks) =
                (Box::leak(Box::new(sysctl)), Box::leak(Box::new(groups)), Box::leak(Box::new(hooks)));
            input.oom_score_adj = 100;
            input.no_new_privileges = Some(false);
            input.terminal = Terminal::Yes;
        })
        .expect("builds");
        assert_eq!(spec["process"]["rlimits"], json!([{"type": "RLIMIT_NOFILE", "hard": 6, "soft": 5}]));
        let namespaces = spec["linux"]["namespaces"].as_array().expect("a list");
        let kinds: Vec<_> = namespaces.iter().map(|namespace| namespace["type"].clone()).collect();
        assert_eq!(kinds, ["mount", "cgroup", "network"]);
        assert_eq!(spec["hostname"], Value::Null);
        assert_eq!(spec["linux"]["sysctl"], json!({"net.core.somaxconn": "9"}));
        assert_eq!(spec["process"]["user"]["additionalGids"], json!([0, 7]));
        assert_eq!(spec["hooks"]["poststop"][0]["args"], json!(["/bin/true", "x"]));
        assert_eq!((&spec["process"]["oomScoreAdj"], &spec["process"]["terminal"]), (&json!(100), &json!(true)));
        assert_eq!(spec["process"]["noNewPrivileges"], false);
        let shm = spec["mounts"].as_array().expect("a list").iter().find(|mount| mount["destination"] == "/dev/shm");
        assert_eq!(shm, None, "the host's own /dev/shm is placed with the task's mounts");
    }

    #[test]
    fn privileged_tasks_have_no_masked_paths() {
        let spec = build_with(|input| input.privilege = Privilege::Privileged { devices: Vec::new() }).expect("builds");
        assert_eq!(spec["linux"]["maskedPaths"], json!([]));
        assert_eq!(spec["process"]["noNewPrivileges"], false);
        assert_eq!(spec["linux"]["resources"]["devices"][0]["allow"], true);
    }

    #[test]
    fn selinux_labels_are_the_processes_and_the_mounts() {
        let labels = Labels { process: Some("u:r:t:s0:c1,c2".to_owned()), files: "u:object_r:f:s0:c1,c2".to_owned() };
        let labels: &Labels = Box::leak(Box::new(labels));
        let spec = build_with(|input| input.labels = Some(labels)).expect("builds");
        assert_eq!(spec["process"]["selinuxLabel"], "u:r:t:s0:c1,c2");
        assert_eq!(spec["linux"]["mountLabel"], "u:object_r:f:s0:c1,c2");
        let privileged = build_with(|input| {
            input.labels = Some(labels);
            input.privilege = Privilege::Privileged { devices: Vec::new() };
        })
        .expect("builds");
        assert_eq!(privileged["process"]["selinuxLabel"], Value::Null);
        assert_eq!(privileged["linux"]["mountLabel"], "u:object_r:f:s0:c1,c2");
        let none = build_with(|_| {}).expect("builds");
        assert_eq!((&none["process"]["selinuxLabel"], &none["linux"]["mountLabel"]), (&Value::Null, &Value::Null));
    }

    #[test]
    fn nobody_is_in_more_groups_than_the_kernel_takes() {
        let group: &str =
            Box::leak((1..=65537).map(|n| format!("g:x:{n}:user\n")).collect::<String>().into_boxed_str());
        let with = |user: &'static str| build_with(|input| (input.user, input.image.group) = (user, group));
        let error = with("user").expect_err("refused").to_string();
        assert!(error.contains("has 65537 groups"), "{error}");
        with("user:user").expect_err("no such group");
        with("user:g").expect("one group");
    }

    #[test]
    fn bad_users_and_directories_are_named() {
        let error = build_with(|input| input.user = "ghost").expect_err("refused").to_string();
        assert!(error.contains("ghost"), "{error}");
        let error = build_with(|input| input.cwd = Some("tmp")).expect_err("refused").to_string();
        assert!(error.contains("tmp"), "{error}");
    }

    #[test]
    fn the_flavor_containerd_driver_keeps_that_drivers_defaults() {
        let spec = build_with(|input| input.flavor = Flavor::ContainerdDriver).expect("builds");
        assert_eq!(spec["process"]["rlimits"], json!([{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}]));
        assert!(spec["mounts"].as_array().expect("a list").iter().any(|mount| mount["destination"] == "/run"));
    }
}
