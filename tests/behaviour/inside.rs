//! What a program finds inside of its container, where `docker run` is the measure: its name, its network files, its
//! environment, its cgroup, and the kernel parameters of its network.

use std::{fs, process::Command};

use nomad_driver_shim::pb::driver::{DnsConfig, NetworkIsolationSpec};
use serde_json::{Value, json};

use crate::support::{Env, EnvOptions, Image, services, services::run};

const RUNTIMES: [&str; 2] = ["crun", "runc"];

/// Returns the configuration of a task that runs a script.
async fn shell(env: &Env, script: &str, options: Value) -> Value {
    let mut config = json!({"image": env.busybox().await, "command": "/bin/sh", "args": ["-c", script]});
    config.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    config
}

/// Returns what a script prints in a task.
async fn printed(env: &mut Env, script: &str, options: Value) -> String {
    let (code, out, err) = env.run(shell(env, script, options.clone()).await).await;
    assert_eq!(code, 0, "{options}, {script}: {out}{err}");
    out
}

fn with(config: Value) -> EnvOptions {
    EnvOptions { config, ..EnvOptions::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_knows_its_own_name() {
    let mut env = Env::new().await;
    // `env` is executed without a shell, because a shell sets HOSTNAME itself.
    let script = "hostname; cat /etc/hostname; grep -w \"$(hostname)\" /etc/hosts; hostname -i";
    for runtime in RUNTIMES {
        let out = printed(&mut env, script, json!({"hostname": "api", "runtime": runtime})).await;
        assert_eq!(out, "api\napi\n127.0.1.1\tapi\n127.0.1.1\n", "{runtime}");
        let image = env.busybox().await;
        let own = json!({"image": image, "command": "/bin/env", "hostname": "api", "runtime": runtime});
        assert!(env.run(own).await.1.lines().any(|line| line == "HOSTNAME=api"), "{runtime}");
        // Without the option, the name is the container's id.
        let out = printed(&mut env, script, json!({"runtime": runtime})).await;
        let lines: Vec<&str> = out.lines().collect();
        assert!(lines.len() == 4 && lines[0] == lines[1] && lines[2] == format!("127.0.1.1\t{}", lines[0]), "{out}");
    }
    env.finish().await;
}

/// Nomad makes the group's namespace, and tells the driver neither its addresses nor a name.
#[tokio::test(flavor = "multi_thread")]
async fn the_tasks_of_a_group_know_themselves_by_the_groups_addresses() {
    let mut env = Env::new().await;
    let name = format!("nds-{}", env.namespace);
    let ip = |arguments: &str| run(Command::new("ip").args(arguments.split(' ')));
    ip(&format!("netns add {name}"));
    for step in [
        "link set lo up",
        "link add v0 type veth peer name v1",
        "addr add 10.99.8.2/24 dev v0",
        "addr add fd00:8::2/64 dev v0 nodad",
        "link set v0 up",
        "link set v1 up",
    ] {
        ip(&format!("-n {name} {step}"));
    }
    for (runtime, own) in [("crun", "first"), ("runc", "second")] {
        let script = format!("grep -w {own} /etc/hosts; hostname -i | tr ' ' '\\n' | grep -x 10.99.8.2");
        let mut task = env.prepare(shell(&env, &script, json!({"hostname": own, "runtime": runtime})).await).await;
        let path = format!("/run/netns/{name}");
        task.config.network_isolation_spec = Some(NetworkIsolationSpec { path, ..Default::default() });
        env.try_start(&mut task).await.unwrap();
        let (_, out, err) = env.finish_task(task).await;
        assert_eq!(out, format!("10.99.8.2\t{own}\nfd00:8::2\t{own}\n10.99.8.2\n"), "{runtime}: {err}");
    }
    ip(&format!("netns del {name}"));
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_hosts_network_a_task_has_the_hosts_name() {
    let mut env = Env::with(with(json!({"security": {"allow_host_namespaces": true}}))).await;
    let host = nix::unistd::gethostname().unwrap().into_string().unwrap();
    let hosts = fs::read_to_string("/etc/hosts").unwrap();
    let script = "hostname; cat /etc/hostname; grep -cw \"$(hostname)\" /etc/hosts";
    let out = printed(&mut env, script, json!({"host_network": true})).await;
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!((lines[0], lines[1]), (&*host, &*host));
    assert_ne!(lines[2], "0", "the host's own name is in the task's hosts file");
    // The job's own name wins, and can be resolved as well.
    let out = printed(&mut env, "hostname; hostname -i", json!({"host_network": true, "hostname": "api"})).await;
    assert_eq!(out, "api\n127.0.1.1\n");
    // The file is the task's own, as with docker: what the task writes does not reach the host.
    let script = "head -n 1 /etc/hosts; echo 127.0.0.9 added >> /etc/hosts; grep -c added /etc/hosts";
    let out = printed(&mut env, script, json!({"host_network": true})).await;
    assert_eq!(out, format!("{}\n1\n", hosts.lines().next().unwrap_or_default()));
    assert_eq!(fs::read_to_string("/etc/hosts").unwrap(), hosts);
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn network_files_can_be_written_unless_the_root_is_read_only() {
    let script = "for f in hostname hosts resolv.conf; do echo x >> /etc/$f && echo $f; done 2>/dev/null; true";
    for (driver, read_only, expected) in [
        ("shim", false, "hostname\nhosts\nresolv.conf\n"),
        ("shim", true, ""),
        // nomad-driver-containerd's hosts file is always writable.
        ("containerd-driver", true, "hosts\n"),
    ] {
        let mut env = Env::with(EnvOptions { name: driver, ..EnvOptions::default() }).await;
        for runtime in RUNTIMES {
            let options = json!({"readonly_rootfs": read_only, "runtime": runtime});
            let options = if driver == "shim" { options } else { json!({"readonly_rootfs": read_only}) };
            assert_eq!(printed(&mut env, script, options).await, expected, "{driver}, {runtime}, {read_only}");
        }
        env.finish().await;
    }
    // A group's `dns` block does not change that.
    let mut env = Env::new().await;
    let script = "echo nameserver 10.64.0.1 > /etc/resolv.conf && cat /etc/resolv.conf";
    let mut task = env.prepare(shell(&env, script, json!({})).await).await;
    task.config.dns = Some(DnsConfig { servers: vec!["127.0.0.1".to_owned()], ..Default::default() });
    env.try_start(&mut task).await.unwrap();
    assert_eq!(env.finish_task(task).await.1, "nameserver 10.64.0.1\n");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dockers_variables_are_in_the_environment() {
    let mut env = Env::new().await;
    let script = "echo \"$HOME|$TERM\"";
    for runtime in RUNTIMES {
        for (user, tty, expected) in [
            ("", false, "/root|"),
            ("", true, "/root|xterm"),
            // These users have no entry, and no home directory, in the image.
            ("4242", false, "/|"),
            ("1000", true, "/|xterm"),
        ] {
            let mut task = env.prepare(shell(&env, script, json!({"tty": tty, "runtime": runtime})).await).await;
            user.clone_into(&mut task.config.user);
            env.try_start(&mut task).await.unwrap();
            assert_eq!(env.finish_task(task).await.1.trim_end(), expected, "{runtime}, {user:?}, {tty}");
        }
    }
    // What the image or the job says wins.
    let variables = json!(["HOME=/app", "TERM=vt100", "HOSTNAME=image"]);
    let image = Image::busybox().with_config("Env", variables).push(&services().registry, "test/variables:1").await;
    let config = json!({"image": image, "command": "/bin/env", "tty": true, "hostname": "api"});
    let mut task = env.prepare(config).await;
    task.config.env.insert("TERM".to_owned(), "dumb".to_owned());
    env.try_start(&mut task).await.unwrap();
    let out = env.finish_task(task).await.1;
    for line in ["HOME=/app", "TERM=dumb", "HOSTNAME=image"] {
        assert_eq!(out.lines().filter(|found| found.trim_end() == line).count(), 1, "{line} in {out}");
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_other_than_root_may_listen_on_low_ports_and_ping() {
    let mut env = Env::with(with(json!({"security": {"allow_host_namespaces": true}}))).await;
    let parameters = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range";
    for runtime in RUNTIMES {
        // busybox's ping wants CAP_NET_RAW, so only the parameter is checked for ping.
        let script = "timeout 1 httpd -f -p 80; echo $?; cat /proc/sys/net/ipv4/ping_group_range";
        let mut task = env.prepare(shell(&env, script, json!({"runtime": runtime})).await).await;
        "1000".clone_into(&mut task.config.user);
        env.try_start(&mut task).await.unwrap();
        let (_, out, err) = env.finish_task(task).await;
        assert_eq!(out, "143\n0\t2147483647\n", "{runtime}: {err}");
        // The job's own value wins.
        let own = json!({"sysctl": {"net.ipv4.ip_unprivileged_port_start": "500"}, "runtime": runtime});
        assert_eq!(printed(&mut env, parameters, own).await, "500\n0\t2147483647\n", "{runtime}");
        // The host's parameters stay as they are.
        let of_the_host = ["ip_unprivileged_port_start", "ping_group_range"]
            .map(|name| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap())
            .concat();
        let shared = json!({"host_network": true, "runtime": runtime});
        assert_eq!(printed(&mut env, parameters, shared).await, of_the_host, "{runtime}");
    }
    env.finish().await;
}

/// Prints the task's memory limit as a JVM finds it, with version 1 or 2 of cgroups.
const MEMORY_LIMIT: &str =
    "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";

#[tokio::test(flavor = "multi_thread")]
async fn a_task_sees_its_own_limits_at_sys_fs_cgroup() {
    let config = json!({"allow_privileged": true, "security": {"allow_host_namespaces": true}});
    let mut env = Env::with(with(config)).await;
    for runtime in RUNTIMES {
        let options = json!({"memory_hard_limit": 64, "runtime": runtime});
        assert_eq!(printed(&mut env, MEMORY_LIMIT, options.clone()).await, "67108864\n", "{runtime}");
        let task = env.start(shell(&env, "echo ready; sleep 600", options.clone()).await).await;
        task.says("ready").await;
        assert_eq!(env.exec_text(&task, MEMORY_LIMIT).await, "67108864\n", "{runtime}, in an executed process");
        env.destroy(&task).await.unwrap();
        let is_written = "f=/sys/fs/cgroup/memory.max; [ -e $f ] || f=/sys/fs/cgroup/memory/memory.limit_in_bytes; \
            cat $f > /tmp/limit; cat /tmp/limit > $f 2>/dev/null && echo written || echo read-only";
        assert_eq!(printed(&mut env, is_written, options.clone()).await, "read-only\n", "{runtime}");
        let mut private = options.clone();
        private["cgroupns"] = json!("private");
        assert_eq!(printed(&mut env, MEMORY_LIMIT, private).await, "67108864\n", "{runtime}, private");
        let mut privileged = options;
        privileged["privileged"] = json!(true);
        assert_eq!(printed(&mut env, is_written, privileged).await, "written\n", "{runtime}, privileged");
    }
    env.finish().await;
}
