//! Rows that gVisor can't satisfy unchanged. For each, this module names the limit and checks the behaviour that holds
//! instead. If gVisor removes a limit, the check that replaces the row turns red.

use std::{fs, net::TcpListener};

use nomad_driver_shim::pb::driver::{Device, DnsConfig, NetworkIsolationSpec};
use serde_json::{Value, json};

use crate::{
    options::{SharedVolume, tmpfs, with_volume},
    peer,
    resources::Pool,
    row::{Row, Run},
    seen::{keeper, kill, limit, linux, parent, prints, processes, refused, start_with},
    support::{Env, Task, eventually},
};

/// A limit of gVisor, with the check that replaces a row.
pub(crate) struct Limit {
    /// The replaced row's function, by module and name.
    test: &'static str,
    /// Why gVisor behaves differently.
    pub reason: &'static str,
    config: Value,
    run: Run,
}

macro_rules! limit {
    ($test:literal, $pin:ident, $reason:literal) => {
        Limit { test: $test, reason: $reason, config: json!({}), run: |env| Box::pin($pin(env)) }
    };
}

const CPUSET: &str = "the processors that a sandbox may use";

fn limits() -> Vec<Limit> {
    vec![
        limit!(
            "options::privileged",
            privileged,
            "/proc/sys is gVisor's own and mostly read-only, and none of the host's devices are in a sandbox: a privileged task has all capabilities but NET_RAW (runsc's net-raw flag), over the sandbox"
        ),
        limit!(
            "options::limits",
            limits_of_the_sandbox,
            "kernel parameters are not gVisor's (two of them excepted); they are refused, not passed over"
        ),
        limit!("options::devices", devices, "only GPUs and TPUs are passed on; other devices are refused"),
        limit!(
            "options::host_namespaces",
            host_namespaces,
            "a sandbox has processes, IPC and names of its own: pid_mode, ipc_mode and uts_mode are refused. host_network is the host's sockets, under a namespace number of gVisor's"
        ),
        limit!(
            "options::volumes",
            volumes,
            "a sandbox has mounts of its own: what the host mounts later below a volume is not among them"
        ),
        limit!("options::mounts", mounts, "a mount's device has no name in a sandbox: df says \"none\""),
        limit!(
            "resources::share_pool",
            share_pool,
            "/proc/self/status has no Cpus_allowed_list in a sandbox; the sandbox itself is held to the processors"
        ),
        limit!(
            "resources::weights",
            weights,
            "/proc/self/status has no Cpus_allowed_list in a sandbox; the sandbox itself is held to the processors"
        ),
        limit!(
            "defects::b23_the_cpuset_is_nomads",
            cpuset,
            "/proc/self/status has no Cpus_allowed_list in a sandbox; the sandbox itself is held to the processors"
        ),
        limit!(
            "defects::b24_devices_of_plugins",
            devices,
            "only GPUs and TPUs are passed on; other devices are refused"
        ),
        limit!("peer::privileged", privileged, "none of the host's devices are in a sandbox"),
        limit!(
            "peer::capabilities",
            capabilities,
            "gVisor mounts an empty /tmp as a tmpfs, writable under a read-only root"
        ),
        limit!("peer::dns", dns, "kernel parameters are not gVisor's; name servers are the job's"),
        Limit {
            test: "client::group_network",
            reason: "a sandbox with a network stack of its own has its group's namespace to itself, and others are refused; with network = \"host\" they share it, and the row holds",
            config: json!({"runtime": {"runsc": {"network": "host"}, "io.containerd.runsc.v1": {"network": "host"}}}),
            run: |env| Box::pin(group_network(env)),
        },
    ]
}

/// Replaces the rows that gVisor has a limit for. Returns each row with its limit, if it has one.
pub(crate) fn adapt(runtime: &str, rows: Vec<Row>) -> Vec<(Row, Option<&'static str>)> {
    let mut limits = limits();
    if runtime.starts_with("io.containerd.") {
        limits.push(limit!(
            "lifecycle::keeper_killed",
            shim_killed,
            "a sandbox of gVisor's own shim has a process between the two, which keeps its exit code and may be killed: the row is about the shim"
        ));
    }
    let adapted = rows
        .into_iter()
        .map(|row| match limits.iter().position(|limit| limit.test == row.test) {
            None => (row, None),
            Some(at) => {
                let limit = limits.swap_remove(at);
                (row.kept_as(limit.config, limit.run), Some(limit.reason))
            }
        })
        .collect();
    assert!(limits.is_empty(), "no such rows: {:?}", limits.iter().map(|limit| limit.test).collect::<Vec<_>>());
    adapted
}

async fn shim_killed(env: &mut Env) {
    let task = env.sh("echo ready; sleep 600").await;
    task.says("ready").await;
    let between = keeper(env, &task);
    kill(parent(between));
    let answer = env.try_wait(&task.id).await.unwrap();
    let failed = answer.result.as_ref().is_none_or(|result| result.exit_code != 0) || !answer.err.is_empty();
    assert!(failed, "{answer:?}");
}

async fn privileged(env: &mut Env) {
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("CapBnd:\t")).unwrap();
    // runsc withholds CAP_NET_RAW (bit 13) unless its net-raw flag is set.
    let all = u64::from_str_radix(own, 16).unwrap() & !(1 << 13);
    let script = "grep CapBnd /proc/self/status; ls /dev/kmsg /dev/loop-control /dev/loop0 2>/dev/null; mount -t tmpfs none /mnt 2>/dev/null || mkdir -p /m && mount -t tmpfs none /m && echo mounted; echo x 2>/dev/null > /proc/sys/kernel/domainname && echo wrote; true";
    assert_eq!(prints(env, script, json!({"privileged": true})).await, format!("CapBnd:\t{all:016x}\nmounted\n"));
}

async fn limits_of_the_sandbox(env: &mut Env) {
    let why = refused(env, json!({"sysctl": {"net.core.somaxconn": "16384"}})).await;
    assert!(why.contains("\"net.core.somaxconn\" has no effect with runtime"), "{why}");
    let script = "df -k /dev/shm | tail -1 | awk '{print $2}'";
    assert_eq!(prints(env, script, json!({"shm_size": "3m"})).await, "3072\n");
    let config = env.shell("sleep 600", json!({"pids_limit": 400})).await;
    let task = env.start(config).await;
    assert_eq!(limit(env, &task, ("pids", "pids.max"), "pids.max"), "400");
}

async fn devices(env: &mut Env) {
    let why = refused(env, json!({"devices": ["/dev/loop0"]})).await;
    assert!(why.contains("\"/dev/loop0\" is not available with runtime"), "{why}");
    let config = env.shell("true", json!({})).await;
    let mut task = env.prepare(config).await;
    let (task_path, host_path) = ("/dev/card".to_owned(), "/dev/zero".to_owned());
    task.config.devices.push(Device { task_path, host_path, cgroup_permissions: "rwm".to_owned() });
    let why = env.try_start(&mut task).await.expect_err("a device").message().to_owned();
    assert!(why.contains("\"/dev/zero\" is not available with runtime"), "{why}");
}

async fn host_namespaces(env: &mut Env) {
    for option in ["pid_mode", "ipc_mode", "uts_mode"] {
        let why = refused(env, json!({option: "host"})).await;
        assert!(why.contains(&format!("{option} = \"host\" is not possible with runtime")), "{why}");
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let script = format!("nc -w 3 127.0.0.1 {port} < /dev/null && echo reached || echo not");
    for (options, expected) in [(json!({"host_network": true}), "reached\n"), (json!({}), "not\n")] {
        assert_eq!(prints(env, &script, options).await, expected);
    }
}

async fn volumes(env: &mut Env) {
    let volume = SharedVolume::new(env.dir.join("volume"));
    let task = with_volume(env, &volume).await;
    tmpfs(&volume.0.join("later"));
    let seen = env.exec_text(&task, "grep -o ' /r[wo]/later ' /proc/self/mountinfo || echo none").await;
    assert_eq!(seen, "none\n");
    env.destroy(&task).await.unwrap();
}

async fn mounts(env: &mut Env) {
    let host = env.dir.join("host");
    fs::create_dir_all(&host).unwrap();
    fs::write(host.join("f"), "of the host\n").unwrap();
    let mounts = json!([
        {"type": "bind", "source": host, "target": "/ro", "options": ["rbind", "ro"]},
        {"type": "volume", "source": host, "target": "/rw", "options": ["rbind", "rw"]},
        {"type": "tmpfs", "target": "/scratch", "options": ["size=1m", "nosuid"]},
    ]);
    let script = "cat /ro/f; echo no 2>/dev/null > /ro/g; echo yes > /rw/w; df -k /scratch | tail -1 | awk '{print $1, $2}'; grep -c ' /scratch tmpfs ' /proc/mounts";
    assert_eq!(prints(env, script, json!({"mounts": mounts})).await, "of the host\nnone 1024\n1\n");
    assert_eq!(fs::read_to_string(host.join("w")).unwrap(), "yes\n");
    assert!(!host.join("g").exists());
    let mounts = json!([{"type": "bind", "source": "../../other", "target": "/m", "options": ["rbind", "rw"]}]);
    refused(env, json!({"mounts": mounts})).await;
}

/// Checks that all processes of the sandbox are bound to `cpus`, and that the task itself does not see this.
async fn held_to(env: &Env, task: &Task, cpus: &str) {
    eventually(&format!("{CPUSET}: {cpus}"), async || {
        let pids = processes(env, task);
        let lists: Vec<String> = pids
            .iter()
            .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/status")).ok())
            .filter_map(|text| {
                Some(text.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:\t"))?.to_owned())
            })
            .collect();
        if !lists.is_empty() && lists.iter().all(|list| list == cpus) { Ok(()) } else { Err(lists) }
    })
    .await;
    let said = env.exec_text(task, "grep Cpus_allowed_list /proc/self/status || echo none").await;
    assert_eq!(said, "none\n");
}

async fn share_pool(env: &mut Env) {
    let pool = Pool::new(env, "0");
    let task = pool.task(env).await;
    for cpus in ["0", "0-1", "1"] {
        pool.set(cpus);
        held_to(env, &task, cpus).await;
    }
    env.destroy(&task).await.unwrap();
}

async fn cpuset(env: &mut Env) {
    let pool = Pool::new(env, "1");
    let task = pool.task(env).await;
    held_to(env, &task, "1").await;
    env.destroy(&task).await.unwrap();
}

async fn weights(env: &mut Env) {
    let config = env.shell("sleep 600", json!({})).await;
    let task = start_with(env, config, |config| {
        let resources = config.resources.as_mut().unwrap().allocated_resources.as_mut().unwrap();
        resources.cpu.as_mut().unwrap().cpu_shares = 1_000_000;
        linux(config).cpu_shares = 1_000_000;
        linux(config).cpuset_cpus = "0".to_owned();
    })
    .await;
    let weight: u64 = limit(env, &task, ("cpu", "cpu.shares"), "cpu.weight").parse().unwrap();
    assert!(weight == 262_144 || weight == 10_000, "{weight}");
    held_to(env, &task, "0").await;
    env.destroy(&task).await.unwrap();
}

async fn capabilities(env: &mut Env) {
    let task = peer::with_capabilities(env).await;
    let script = "touch /tmp/file.txt && grep -c ' /tmp tmpfs ' /proc/mounts; touch /bin/file.txt 2>&1 || true";
    let said = env.exec_text(&task, script).await;
    assert!(said.starts_with("1\n") && said.contains("Read-only file system"), "{said}");
}

async fn dns(env: &mut Env) {
    let why = refused(env, json!({"sysctl": {"net.ipv4.ip_forward": "1"}})).await;
    assert!(why.contains("\"net.ipv4.ip_forward\" has no effect with runtime"), "{why}");
    let config = env.shell("cat /etc/resolv.conf", json!({})).await;
    let task = start_with(env, config, |config| {
        config.dns = Some(DnsConfig {
            servers: vec!["127.0.0.1".to_owned()],
            searches: vec!["internal.corp".to_owned()],
            options: vec!["ndots:2".to_owned()],
        });
    })
    .await;
    let out = env.finish_task(task).await.1;
    for line in ["nameserver 127.0.0.1\n", "search internal.corp\n", "options ndots:2\n"] {
        assert!(out.contains(line), "{line:?} in {out}");
    }
}

/// Runs the original row, and checks that the start is refused without the runtime option `network = "host"`.
async fn group_network(env: &mut Env) {
    crate::client::group_network(env).await;
    env.plugin.take().unwrap().shut_down().await;
    let runtimes = env.config["runtime"].as_object_mut().unwrap();
    runtimes.values_mut().for_each(|runtime| runtime["network"] = json!("sandbox"));
    env.start_plugin().await;
    let path = format!("/proc/{}/ns/net", std::process::id());
    let group = NetworkIsolationSpec { mode: 1, path, ..Default::default() };
    let config = env.shell("true", json!({})).await;
    let mut task = env.prepare(config).await;
    task.config.network_isolation_spec = Some(group);
    let why = env.try_start(&mut task).await.expect_err("a namespace with others in it").message().to_owned();
    assert!(why.contains("needs the group's namespace") && why.contains("is in it"), "{why}");
}
