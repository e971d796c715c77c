//! The cases: equal options for `docker run` and for a task of the driver.

use nomad_driver_shim::pb::driver::{DnsConfig, TaskConfig};
use serde_json::{Value, json};

use crate::{probe::NAME, support::Image};

/// Options of a container, for docker and for the driver. In texts, `{dir}` stands for a directory, and `{shared}` for
/// one that is a shared mount.
pub(crate) struct Case {
    pub name: &'static str,
    /// The options of `docker run`.
    pub docker: Vec<&'static str>,
    /// The options of the task.
    pub task: Value,
    /// What Nomad sends besides the task's options.
    pub request: fn(&mut TaskConfig),
    /// What the container's image has besides busybox and the probe.
    pub image: fn(Image) -> Image,
    pub way: Way,
    pub network: Network,
}

/// How the probe is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// It is the container's first process.
    First,
    /// It is the image's own command.
    ByImage,
    /// It is executed in a running container.
    Executed,
    /// It is executed in a running container, with a terminal.
    ExecutedWithTerminal,
}

/// The network of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Network {
    /// Loopback only.
    None,
    /// docker's bridge, and a group's network that Nomad has made.
    Bridge,
    /// The host's network.
    Host,
}

/// Cases that the driver refuses in a sandbox: those with kernel parameters that gVisor does not have, and with
/// namespaces, devices and shared mounts of the host.
const IMPOSSIBLE_IN_SANDBOX: [&str; 10] = [
    "device",
    "sysctl",
    "bind, rslave",
    "bind, rshared",
    "bind, rshared, of a task that may mount",
    "bind, slave",
    "bind, shared",
    "pid_mode",
    "ipc_mode",
    "uts_mode",
];

impl Case {
    /// Tells whether a task in a sandbox of gVisor can have these options.
    pub(crate) fn is_possible_in_sandbox(&self) -> bool {
        !IMPOSSIBLE_IN_SANDBOX.contains(&self.name)
    }

    fn request(self, request: fn(&mut TaskConfig)) -> Self {
        Self { request, ..self }
    }

    fn image(self, image: fn(Image) -> Image) -> Self {
        Self { image, ..self }
    }

    fn way(self, way: Way) -> Self {
        Self { way, ..self }
    }

    fn network(self, network: Network) -> Self {
        Self { network, ..self }
    }
}

/// Makes a case of options of `docker run`, separated by blanks, and options of a task.
fn case(name: &'static str, docker: &'static str, task: Value) -> Case {
    Case {
        name,
        docker: docker.split_whitespace().collect(),
        task,
        request: |_| {},
        image: |image| image,
        way: Way::First,
        network: Network::None,
    }
}

/// Returns all cases.
pub(crate) fn cases() -> Vec<Case> {
    [identity(), privileges(), files(), resources(), namespaces(), commands()].into_iter().flatten().collect()
}

fn identity() -> Vec<Case> {
    vec![
        case("default", "", json!({})),
        case("user", "--user 1000:1001", json!({})).request(|task| "1000:1001".clone_into(&mut task.user)),
        case("user by name", "--user user", json!({})).request(|task| "user".clone_into(&mut task.user)),
        case("unknown user id", "--user 4242", json!({})).request(|task| "4242".clone_into(&mut task.user)),
        case("group_add", "--group-add extra --group-add 77", json!({"group_add": ["extra", "77"]})),
        case("terminal", "--tty", json!({"tty": true})),
        case("hostname", "--hostname api", json!({"hostname": NAME})),
        case("environment", "--env A=1 --env PATH=/bin:/sbin --env FROM_IMAGE=no", json!({})).request(|task| {
            for (name, value) in [("A", "1"), ("PATH", "/bin:/sbin"), ("FROM_IMAGE", "no")] {
                task.env.insert(name.to_owned(), value.to_owned());
            }
        }),
    ]
}

fn privileges() -> Vec<Case> {
    vec![
        case("privileged", "--privileged --runtime bounded", json!({"privileged": true})),
        case("cap_add", "--cap-add NET_ADMIN --cap-add SYS_PTRACE", json!({"cap_add": ["NET_ADMIN", "SYS_PTRACE"]})),
        case("cap_add SYS_ADMIN", "--cap-add SYS_ADMIN", json!({"cap_add": ["SYS_ADMIN"]})),
        case(
            "cap_add with rules of seccomp",
            "--cap-add SYS_MODULE --cap-add SYS_TIME --cap-add SYS_BOOT --cap-add SYS_NICE --cap-add SYSLOG \
             --cap-add DAC_READ_SEARCH --cap-add SYS_PACCT --cap-add SYS_RAWIO",
            json!({"cap_add": ["SYS_MODULE", "SYS_TIME", "SYS_BOOT", "SYS_NICE", "SYSLOG",
                "DAC_READ_SEARCH", "SYS_PACCT", "SYS_RAWIO"]}),
        ),
        case("cap_drop", "--cap-drop CHOWN --cap-drop MKNOD", json!({"cap_drop": ["CHOWN", "MKNOD"]})),
        case("cap_drop ALL", "--cap-drop ALL --cap-add CHOWN", json!({"cap_drop": ["ALL"], "cap_add": ["CHOWN"]})),
        case("capabilities of a user", "--user 1000:1001 --cap-add NET_ADMIN", json!({"cap_add": ["NET_ADMIN"]}))
            .request(|task| "1000:1001".clone_into(&mut task.user)),
        case("no-new-privileges", "--security-opt no-new-privileges", json!({"security_opt": ["no-new-privileges"]})),
        case("new privileges", "", json!({"security_opt": ["no-new-privileges=false"]})),
        case(
            "seccomp unconfined",
            "--security-opt seccomp=unconfined",
            json!({"security_opt": ["seccomp=unconfined"]}),
        ),
        case("device", "--device /dev/kmsg", json!({"devices": ["/dev/kmsg"]})),
    ]
}

fn files() -> Vec<Case> {
    let bind = |options: &[&str]| json!({"mounts": [{"type": "bind", "source": "{dir}", "target": "/data", "options": options}]});
    let shared = |options: &[&str]| json!({"mounts": [{"type": "bind", "source": "{shared}", "target": "/data", "options": options}]});
    vec![
        case("readonly_rootfs", "--read-only", json!({"readonly_rootfs": true})),
        case("tmpfs", "--tmpfs /scratch", json!({"mounts": [{"type": "tmpfs", "target": "/scratch"}]})),
        case(
            "tmpfs with options",
            "--tmpfs /scratch:size=1m,mode=700,exec",
            json!({"mounts": [{"type": "tmpfs", "target": "/scratch", "options": ["size=1m", "mode=700", "exec"]}]}),
        ),
        case("bind", "--volume {dir}:/data", bind(&["rbind"])),
        case("bind, read-only", "--volume {dir}:/data:ro", bind(&["rbind", "ro"])),
        case("bind, rprivate", "--volume {dir}:/data:rprivate", bind(&["rbind", "rprivate"])),
        case("bind, rslave", "--volume {shared}:/data:rslave", shared(&["rbind", "rslave"])),
        case("bind, rshared", "--volume {shared}:/data:rshared", shared(&["rbind", "rshared"])),
        case("bind, rshared, of a task that may mount", "--cap-add SYS_ADMIN --volume {shared}:/data:rshared", {
            let mut task = shared(&["rbind", "rshared"]);
            task["cap_add"] = json!(["SYS_ADMIN"]);
            task
        }),
        case("bind, private", "--volume {dir}:/data:private", bind(&["bind", "private"])),
        case("bind, slave", "--volume {shared}:/data:slave", shared(&["bind", "slave"])),
        case("bind, shared", "--volume {shared}:/data:shared", shared(&["bind", "shared"])),
        case("shm_size", "--shm-size 128m", json!({"shm_size": "128m"})),
        case("volume of the image", "", json!({})).image(|image| image.with_config("Volumes", json!({"/volume": {}}))),
        case("volume of the image, read-only", "--read-only", json!({"readonly_rootfs": true}))
            .image(|image| image.with_config("Volumes", json!({"/volume": {}}))),
    ]
}

fn resources() -> Vec<Case> {
    vec![
        case("memory", "--memory 128m --memory-swap 128m --memory-reservation 64m", json!({"memory_hard_limit": 128})),
        case(
            "processor time",
            "--cpu-quota 50000 --cpu-period 50000",
            json!({"cpu_hard_limit": true, "cpu_cfs_period": 50000}),
        )
        .request(|task| {
            let resources = task.resources.as_mut().unwrap().linux_resources.as_mut().unwrap();
            // One of the host's processors.
            resources.percent_ticks = 1.0 / std::thread::available_parallelism().unwrap().get() as f64;
        }),
        case("processors", "--cpuset-cpus 0 --cpuset-mems 0", json!({"cpuset_cpus": "0", "cpuset_mems": "0"})),
        case("pids_limit", "--pids-limit 100", json!({"pids_limit": 100})),
        case("oom_score_adj", "--oom-score-adj 500", json!({"oom_score_adj": 500})),
        case(
            "ulimit",
            "--ulimit nofile=512:1024 --ulimit core=0 --ulimit nproc=100:200",
            json!({"ulimit": {"nofile": "512:1024", "core": "0", "nproc": "100:200"}}),
        ),
        case(
            "sysctl",
            "--sysctl net.core.somaxconn=1024 --sysctl kernel.shmmax=1048576 --sysctl fs.mqueue.msg_max=20 \
             --sysctl net.ipv4.ip_unprivileged_port_start=80",
            json!({"sysctl": {"net.core.somaxconn": "1024", "kernel.shmmax": "1048576", "fs.mqueue.msg_max": "20",
                "net.ipv4.ip_unprivileged_port_start": "80"}}),
        ),
    ]
}

fn namespaces() -> Vec<Case> {
    vec![
        case("host_network", "", json!({"host_network": true})).network(Network::Host),
        case("pid_mode", "--pid host", json!({"pid_mode": "host"})),
        case("ipc_mode", "--ipc host", json!({"ipc_mode": "host"})),
        case("uts_mode", "--uts host", json!({"uts_mode": "host"})),
        case("cgroupns private", "--cgroupns private", json!({"cgroupns": "private"})),
        case("cgroupns host", "--cgroupns host", json!({"cgroupns": "host"})),
        case("bridge", "", json!({})).network(Network::Bridge),
        case("hostname in a bridge", "--hostname api", json!({"hostname": NAME})).network(Network::Bridge),
        case("extra_hosts", "--add-host db:10.0.0.9", json!({"extra_hosts": ["db:10.0.0.9"]})).network(Network::Bridge),
        case("name servers", "--dns 10.0.0.1 --dns-search example.org --dns-option ndots:2", json!({}))
            .network(Network::Bridge)
            .request(|task| {
                let list = |text: &str| vec![text.to_owned()];
                task.dns = Some(DnsConfig {
                    servers: list("10.0.0.1"),
                    searches: list("example.org"),
                    options: list("ndots:2"),
                });
            }),
    ]
}

fn commands() -> Vec<Case> {
    vec![
        case("init", "--init", json!({"init": true})),
        case("exec in a task with an init", "--init", json!({"init": true})).way(Way::Executed),
        case("exec", "", json!({})).way(Way::Executed),
        case("exec with a terminal", "", json!({})).way(Way::ExecutedWithTerminal),
        case("exec in a privileged task", "--privileged --runtime bounded", json!({"privileged": true}))
            .way(Way::Executed),
        case("exec as the task's user", "--user user --cap-add NET_ADMIN", json!({"cap_add": ["NET_ADMIN"]}))
            .way(Way::Executed)
            .request(|task| "user".clone_into(&mut task.user)),
        case("exec in a task with a terminal", "--tty", json!({"tty": true})).way(Way::Executed),
        case("working directory", "--workdir /tmp", json!({"work_dir": "/tmp"})),
        case(
            "working directory that does not exist",
            "--workdir /made/by/docker",
            json!({"work_dir": "/made/by/docker"}),
        ),
        case("settings of the image", "", json!({})).way(Way::ByImage).image(|image| {
            image
                .with_config("Entrypoint", json!(["/probe"]))
                .with_config("Cmd", json!(["argument", "two words"]))
                .with_config("User", json!("user"))
                .with_config("WorkingDir", json!("/srv/here"))
                .with_config("Env", json!(["A=b=c", "EMPTY=", "HOME=/elsewhere"]))
        }),
    ]
}
