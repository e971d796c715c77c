//! The options of a job that change its limits, namespaces, devices and names. The tests check them in the task, in a
//! process that is executed in the task, and in the kernel's files.

use std::fs;

use nomad_driver_shim::pb::driver::{DnsConfig, NetworkIsolationSpec};
use serde_json::{Value, json};

use crate::support::{Env, Image, Task, each_case, services};

/// Returns an environment whose operator allows everything that these options need.
async fn open_env() -> Env {
    let security = json!({"allow_host_namespaces": true, "allow_devices": ["/dev/*"], "allow_caps": ["ALL"]});
    let config = json!({"allow_privileged": true, "security": security});
    Env::configured(config).await
}

async fn idle(env: &mut Env, mut options: Value) -> Task {
    options["image"] = json!(env.busybox().await);
    options["command"] = json!("/bin/sleep");
    options["args"] = json!(["600"]);
    env.start(options).await
}

/// Returns what `script` prints in a task with these options. Asserts that the output is the same as the task's own
/// program and as a process that is executed in the task.
async fn seen(env: &mut Env, mut options: Value, script: &str) -> String {
    let task = idle(env, options.clone()).await;
    let in_exec = env.exec_text(&task, script).await;
    env.destroy(&task).await.unwrap();
    options["image"] = json!(env.busybox().await);
    options["command"] = json!("/bin/sh");
    options["args"] = json!(["-c", script]);
    let (code, own, err) = env.run(options).await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(own, in_exec, "{script}");
    own
}

/// Returns the error message with which a start is refused.
async fn refused(env: &mut Env, mut options: Value) -> String {
    options["image"] = json!(env.busybox().await);
    let mut task = env.prepare(options).await;
    env.try_start(&mut task).await.expect_err("refused").message().to_owned()
}

fn host_link(namespace: &str) -> String {
    fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap().to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_are_the_tasks_or_the_hosts() {
    let mut env = open_env().await;
    for (option, namespace) in [("pid_mode", "pid"), ("ipc_mode", "ipc"), ("uts_mode", "uts"), ("cgroupns", "cgroup")] {
        let script = format!("readlink /proc/self/ns/{namespace}");
        for host in ["host", "HOST"] {
            let own = seen(&mut env, json!({option: host}), &script).await;
            assert_eq!(own.trim_end(), host_link(namespace), "{option} = {host}");
        }
        let task = idle(&mut env, json!({option: "private"})).await;
        assert_ne!(env.exec_text(&task, &script).await.trim_end(), host_link(namespace), "{option}");
        env.destroy(&task).await.unwrap();
    }
    assert_eq!(
        seen(&mut env, json!({"userns_mode": "host"}), "readlink /proc/self/ns/user").await.trim_end(),
        host_link("user")
    );
    // In the host's uts namespace, the task sees the host's name.
    let name = nix::unistd::gethostname().unwrap();
    assert_eq!(seen(&mut env, json!({"uts_mode": "host"}), "hostname").await.trim_end(), name.to_str().unwrap());
    env.finish().await;
}

/// When the task's first process ends, the task's other processes end as well, though they are in the host's pid
/// namespace.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_task_with_the_hosts_processes_outlives_it() {
    let mut env = open_env().await;
    let image = env.busybox().await;
    let script = "sleep 98765 & echo started; exit 3";
    let config = json!({"image": image, "command": "/bin/sh", "args": ["-c", script], "pid_mode": "host"});
    assert_eq!(env.run(config).await.0, 3);
    let left = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .any(|process| fs::read(process.path().join("cmdline")).is_ok_and(|line| line == b"sleep\098765\0"));
    assert!(!left, "a process of the task lives on");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_keeps_the_host_to_himself() {
    let mut env = Env::new().await;
    // The other refusals are tested in `src/plugin/config/refusals.rs`.
    let error = refused(&mut env, json!({"devices": ["/dev/null"]})).await;
    assert!(error.contains("allow_devices"), "{error}");
    env.finish().await;
    let mut env =
        Env::configured(json!({"security": {"allow_sysctls": ["net.ipv4.*"], "allow_devices": ["/dev/full"]}})).await;
    let allowed = json!({"sysctl": {"net.ipv4.ip_forward": "1"}, "devices": ["/dev/full"]});
    assert_eq!(seen(&mut env, allowed, "cat /proc/sys/net/ipv4/ip_forward").await, "1\n");
    // A device is allowed by the target of a symlink, not by the symlink's name.
    let link = env.dir.join("full");
    std::os::unix::fs::symlink("/dev/zero", &link).unwrap();
    let error = refused(&mut env, json!({"devices": [link]})).await;
    assert!(error.contains("allow_devices"), "{error}");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_the_job_are_the_kernels() {
    let mut env = open_env().await;
    let limit = "ulimit -S -n; ulimit -H -n; ulimit -S -c";
    assert_eq!(seen(&mut env, json!({"ulimit": {"nofile": "100:200", "core": "0"}}), limit).await, "100\n200\n0\n");
    assert_eq!(seen(&mut env, json!({"file_limit": 333}), "ulimit -S -n; ulimit -H -n").await, "333\n333\n");
    assert_eq!(
        seen(&mut env, json!({"shm_size": "3m"}), "df -k /dev/shm | tail -1 | awk '{print $2}'").await,
        "3072\n"
    );
    assert_eq!(seen(&mut env, json!({"oom_score_adj": 500}), "sleep 1; cat /proc/self/oom_score_adj").await, "500\n");
    // The task does not inherit the shim's value, which is the agent's value plus one.
    assert_eq!(seen(&mut env, json!({}), "sleep 1; cat /proc/self/oom_score_adj").await, "0\n");
    let sysctl =
        json!({"sysctl": [{"net.core.somaxconn": "16384"}, {"net/ipv4/ip_forward": "1", "kernel.shmmni": "77"}]});
    let script = "cat /proc/sys/net/core/somaxconn /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni";
    assert_eq!(seen(&mut env, sysctl, script).await, "16384\n1\n77\n");
    let groups = json!({"group_add": ["extra", "4321"]});
    assert_eq!(seen(&mut env, groups, "grep ^Groups /proc/self/status").await.trim_end(), "Groups:\t0 2000 4321");
    let nnp = json!({"security_opt": ["no-new-privileges=false"]});
    assert_eq!(seen(&mut env, nnp, "grep ^NoNewPrivs /proc/self/status").await, "NoNewPrivs:\t0\n");
    assert_eq!(seen(&mut env, json!({"work_dir": "/etc"}), "pwd").await, "/etc\n");

    // The refusals that need neither the host nor the image are tested in `src/plugin/config/refusals.rs`.
    let cases = [
        (json!({"group_add": ["ghosts"]}), "group \"ghosts\" is not in the image's"),
        (json!({"memory_hard_limit": 1}), "memory_hard_limit = 1 is less"),
        (json!({"devices": ["/dev/nothing"]}), "use device /dev/nothing"),
        (json!({"devices": ["/dev/shm"]}), "it is not a device"),
        (json!({"extra_hosts": ["up:host-gateway"]}), "extra_hosts: up:host-gateway has no address"),
    ];
    each_case(cases, async |(options, part)| {
        let error = refused(&mut env, options.clone()).await;
        assert!(error.contains(part), "{options}: {error}");
    })
    .await;
    env.finish().await;
}

/// Checks every file of the task's cgroup, on either cgroup version.
#[tokio::test(flavor = "multi_thread")]
async fn cgroups_hold_what_the_job_says() {
    let mut env = open_env().await;
    let options = json!({
        "pids_limit": 40, "cpuset_cpus": "0", "cpuset_mems": "0", "cpu_hard_limit": true, "cpu_cfs_period": 50_000,
        "memory_hard_limit": 96,
    });
    let task = idle(&mut env, options).await;
    let cgroup = env.record(&task).await.1["cgroup"].as_str().unwrap().to_owned();
    let read = |controller: &str, v1: &str, v2: &str| {
        let old = format!("/sys/fs/cgroup/{controller}{cgroup}/{v1}");
        let new = format!("/sys/fs/cgroup{cgroup}/{v2}");
        fs::read_to_string(&old).or_else(|_| fs::read_to_string(&new)).unwrap_or_else(|_| panic!("{old} or {new}"))
    };
    assert_eq!(read("pids", "pids.max", "pids.max"), "40\n");
    assert_eq!(read("cpuset", "cpuset.cpus", "cpuset.cpus"), "0\n");
    assert_eq!(read("cpuset", "cpuset.mems", "cpuset.mems"), "0\n");
    assert_eq!(read("memory", "memory.limit_in_bytes", "memory.max"), format!("{}\n", 96 << 20));
    let reserved = read("memory", "memory.soft_limit_in_bytes", "memory.low");
    assert_eq!(reserved, format!("{}\n", 64 << 20), "what resources.memory says");
    let quota = read("cpu", "cpu.cfs_quota_us", "cpu.max");
    let quota: u64 = quota.split_whitespace().next().unwrap().parse().unwrap();
    assert!((1000..50_000).contains(&quota), "100 MHz of this node: {quota}");
    env.destroy(&task).await.unwrap();
    // The limit holds: a shell can't have forty children.
    let script = "for i in $(seq 60); do sleep 5 & done 2>/dev/null; jobs | wc -l";
    let config = env.shell(script, json!({"pids_limit": 20})).await;
    let (_, out, err) = env.run(config).await;
    assert!(out.trim().parse::<u32>().unwrap_or(0) < 25, "{out} {err}");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_are_there_and_others_are_not() {
    let mut env = open_env().await;
    // A device that no container has by default.
    let device = "/dev/loop0";
    let script = "[ -b /dev/loop0 ] && : < /dev/loop0 && echo opened";
    assert_eq!(seen(&mut env, json!({"devices": [device]}), script).await, "opened\n");
    let task = idle(&mut env, json!({})).await;
    assert_eq!(env.exec_text(&task, "ls /dev/loop0 2>/dev/null | wc -l").await, "0\n");
    // The task can't add the device itself: it can make the device node, but it can't open the node.
    let script = "mknod /k b 7 0; (: < /k) 2>&1 | grep -c 'not permitted\\|No such'";
    assert_eq!(env.exec_text(&task, script).await, "1\n");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_and_name_servers_are_as_the_job_says() {
    let mut env = open_env().await;
    let extra = json!({"hostname": "own", "extra_hosts": ["postgres:127.0.1.1", "v6:fd00::5"]});
    let hosts = seen(&mut env, extra.clone(), "cat /etc/hosts").await;
    for line in ["127.0.0.1\tlocalhost\n", "127.0.1.1\tpostgres\n", "fd00::5\tv6\n"] {
        assert!(hosts.contains(line), "{line:?} in {hosts}");
    }
    // With the host's network, the host's file is the base of the task's own one.
    let of_the_host = fs::read_to_string("/etc/hosts").unwrap();
    let mut shared = extra;
    shared["host_network"] = json!(true);
    shared["extra_hosts"] = json!(["up:host-gateway", "redis:127.0.1.2"]);
    let hosts = seen(&mut env, shared, "cat /etc/hosts").await;
    assert!(
        hosts.starts_with(&of_the_host) && hosts.ends_with("127.0.0.1\tup\n127.0.1.2\tredis\n127.0.1.1\town\n"),
        "{hosts}"
    );
    assert_eq!(fs::read_to_string("/etc/hosts").unwrap(), of_the_host);

    // host_dns = false: the image's own file, unless the group has a dns block.
    let image = Image::busybox()
        .with_file("etc/resolv.conf", "nameserver 9.9.9.9\n")
        .push(&services().registry, "test/dns:1")
        .await;
    let config = |host_dns: bool| json!({"image": image, "command": "/bin/cat", "args": ["/etc/resolv.conf"], "host_dns": host_dns});
    assert_eq!(env.run(config(false)).await.1, "nameserver 9.9.9.9\n");
    assert_ne!(env.run(config(true)).await.1, "nameserver 9.9.9.9\n");
    let mut task = env.prepare(config(false)).await;
    task.config.dns = Some(DnsConfig { servers: vec!["127.0.0.1".to_owned()], ..Default::default() });
    env.try_start(&mut task).await.unwrap();
    assert!(env.finish_task(task).await.1.contains("nameserver 127.0.0.1\n"));
    env.finish().await;
}

/// A group's namespace as Nomad's bridge mode makes it: the default route leads to the host.
#[tokio::test(flavor = "multi_thread")]
async fn the_hosts_gateway_is_found_in_the_groups_network() {
    let mut env = open_env().await;
    let name = format!("nds-{}", env.namespace);
    let ip = |arguments: &str| {
        let status = std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap();
        assert!(status.success(), "ip {arguments}");
    };
    ip(&format!("netns add {name}"));
    for step in
        ["link add v0 type veth peer name v1", "addr add 10.99.7.2/24 dev v0", "link set v0 up", "link set v1 up"]
    {
        ip(&format!("-n {name} {step}"));
    }
    ip(&format!("-n {name} route add default via 10.99.7.1"));
    let image = env.busybox().await;
    let config =
        json!({"image": image, "command": "/bin/cat", "args": ["/etc/hosts"], "extra_hosts": ["up:host-gateway"]});
    let mut task = env.prepare(config).await;
    let path = format!("/run/netns/{name}");
    task.config.network_isolation_spec = Some(NetworkIsolationSpec { path, ..Default::default() });
    env.try_start(&mut task).await.unwrap();
    let (_, out, _) = env.finish_task(task).await;
    ip(&format!("netns del {name}"));
    assert!(out.contains("10.99.7.1\tup\n"), "{out}");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_is_one_and_its_output_is_the_logs() {
    let mut env = Env::new().await;
    let script = "[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo terminal; echo err >&2; exit 4";
    let config = env.shell(script, json!({"tty": true})).await;
    let (code, out, err) = env.run(config).await;
    assert_eq!((code, out.as_str(), err.as_str()), (4, "terminal\r\nerr\r\n", ""));
    // Nomad passes these paths for `logs { disabled = true }`.
    let config = env.shell(script, json!({"tty": true})).await;
    let mut task = env.prepare(config).await;
    (task.config.stdout_path, task.config.stderr_path) = ("/dev/null".to_owned(), "/dev/null".to_owned());
    env.try_start(&mut task).await.unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 4);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_and_annotations_are_the_containers() {
    let mut env = Env::new().await;
    let task = idle(&mut env, json!({"labels": {"team": "a"}, "annotations": {"example.com/owner": "b"}})).await;
    let id = env.attribute(&task, "container_id").await;
    let spec = fs::read(env.dir.join("run/bundles").join(id).join("config.json")).unwrap();
    let annotations = serde_json::from_slice::<Value>(&spec).unwrap()["annotations"].clone();
    assert_eq!((annotations["team"].as_str(), annotations["example.com/owner"].as_str()), (Some("a"), Some("b")));
    assert_eq!(annotations["com.hashicorp.nomad.task_name"], "web");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_pulled_when_the_job_says() {
    let mut env = Env::new().await;
    let push = |text: &str| {
        let image = Image::busybox().with_file("which", text);
        async move { image.push(&services().registry, "test/moving:1").await }
    };
    let image = push("one\n").await;
    let config =
        |policy: &str| json!({"image": image, "command": "/bin/cat", "args": ["/which"], "image_pull_policy": policy});
    let error = {
        let mut task = env.prepare(config("never")).await;
        env.try_start(&mut task).await.expect_err("refused").message().to_owned()
    };
    assert!(error.contains("is not stored on this node"), "{error}");
    assert_eq!(env.run(config("missing")).await.1, "one\n");
    push("two\n").await;
    assert_eq!(env.run(config("missing")).await.1, "one\n");
    assert_eq!(env.run(config("never")).await.1, "one\n");
    assert_eq!(env.run(config("always")).await.1, "two\n");
    push("three\n").await;
    let forced = json!({"image": image, "command": "/bin/cat", "args": ["/which"], "force_pull": true});
    assert_eq!(env.run(forced).await.1, "three\n");
    assert_eq!(env.run(config("missing")).await.1, "three\n");
    // The next garbage collection removes the images that the name stood for before.
    assert_eq!(crate::archives::gc(&env, false).await.len(), 2);
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operators_hooks_are_run() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("hook");
    crate::support::script(&script, "cat > \"$1\"");
    let at = |name: &str| format!("{} {}", script.display(), directory.path().join(name).display());
    let mut env =
        Env::configured(json!({"hooks": {"create_runtime": [at("created")], "poststop": [at("stopped")]}})).await;
    assert_eq!(env.run(json!({"image": env.busybox().await, "command": "/bin/true"})).await.0, 0);
    for name in ["created", "stopped"] {
        let state: Value = serde_json::from_slice(&fs::read(directory.path().join(name)).unwrap()).unwrap();
        assert!(state["bundle"].as_str().unwrap().contains("bundles/"), "{name}: {state}");
    }
    env.finish().await;
}
