//! docs/protocol/nomad-driver-containerd.md#10: the eleven shell tests of that driver, as behaviours.

use std::fs;

use nomad_driver_shim::pb::driver::{DnsConfig, Mount};
use serde_json::json;

use crate::{
    row,
    row::Row,
    seen::{limit, linux, memory, prints, prompt, promptly, refused, start_with},
    support::{Env, Task, services},
};

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row!(redis, "001-test-redis", "directory, hostname, seccomp, memory and memory_max, as its redis job has them")
            .drop_in(),
        row!(signal_handler, "002-test-signal-handler", "a signal that does not exist is refused").drop_in(),
        row!(capabilities, "003-test-capabilities", "cap_add, cap_drop, read-only root, seen by exec").drop_in(),
        row!(privileged, "004-test-privileged", "all capabilities, devices, a read-only bind of a host directory")
            .drop_in(),
        row!(volume_mount, "005-test-volume-mount", "a host volume twice, read-write and read-only").drop_in(),
        row!(dns, "006-test-dns", "the group's dns block, and sysctls").drop_in(),
        row!(extra_hosts, "007-test-extra-hosts", "extra_hosts beside host_network").drop_in(),
        row!(entrypoint, "008-test-entrypoint", "entrypoint and args, seen in the logs").drop_in(),
        row!(auth, "009-test-auth", "a private image without credentials: the registry's word comes through").drop_in(),
        row!(template, "010-test-template-stanza", "a template bound by a source relative to the task").drop_in(),
        row!(
            allow_privileged,
            "011-test-allow-privileged",
            "privileged jobs are not allowed, when the operator says so"
        )
        .config(json!({"allow_privileged": false}))
        .drop_in(),
    ]
}

pub(crate) async fn redis(env: &mut Env) {
    // The first task pulls the image, so that the measured start does not include the pull.
    prints(env, "true", json!({})).await;
    let options = json!({"hostname": "foobar", "seccomp": true, "cwd": "/home/redis"});
    let config = env.shell("trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done", options).await;
    let task = prompt(
        "StartTask",
        start_with(env, config, |config| {
            (memory(config).memory_mb, memory(config).memory_max_mb) = (256, 512);
            linux(config).memory_limit_bytes = 512 << 20;
        }),
    )
    .await;
    task.says("ready").await;
    assert_eq!(env.exec_text(&task, "pwd").await, "/home/redis\n");
    assert_eq!(env.exec_text(&task, "hostname").await, "foobar\n");
    assert_eq!(env.exec_text(&task, "grep ^Seccomp: /proc/1/status").await, "Seccomp:\t2\n");
    let soft = limit(env, &task, ("memory", "memory.soft_limit_in_bytes"), "memory.low");
    let hard = limit(env, &task, ("memory", "memory.limit_in_bytes"), "memory.max");
    assert_eq!((soft, hard), ((256 << 20).to_string(), (512 << 20).to_string()));
    prompt("StopTask", env.stop(&task, 3 * promptly(), "")).await.unwrap();
    env.destroy(&task).await.unwrap();
}

async fn signal_handler(env: &mut Env) {
    let task = env.sh("trap 'echo usr1' USR1; echo ready; while :; do sleep 0.05; done").await;
    task.says("ready").await;
    let error = env.signal(&task, "INVALID").await.unwrap_err();
    assert!(error.message().to_lowercase().contains("invalid signal"), "{error:?}");
    env.signal(&task, "SIGUSR1").await.unwrap();
    task.says("usr1").await;
}

async fn capabilities(env: &mut Env) {
    let task = with_capabilities(env).await;
    let said = env.exec_text(&task, "touch /tmp/file.txt 2>&1 || true").await;
    assert!(said.contains("Read-only file system"), "{said}");
}

/// Starts a task with some capabilities added, some dropped, and a read-only root file system.
pub(crate) async fn with_capabilities(env: &mut Env) -> Task {
    let options = json!({
        "readonly_rootfs": true, "cap_add": ["CAP_SYS_ADMIN", "CAP_IPC_OWNER", "CAP_IPC_LOCK"],
        "cap_drop": ["CAP_CHOWN", "CAP_SYS_CHROOT", "CAP_DAC_OVERRIDE"],
    });
    let config = env.shell("sleep 600", options).await;
    let task = env.start(config).await;
    let mask = env.exec_text(&task, "grep CapEff /proc/self/status").await;
    let mask = u64::from_str_radix(mask.split_whitespace().nth(1).unwrap(), 16).unwrap();
    for (bit, there) in [(21, true), (15, true), (14, true), (0, false), (18, false), (1, false)] {
        assert_eq!(mask & (1 << bit) != 0, there, "capability {bit} in {mask:x}");
    }
    task
}

async fn privileged(env: &mut Env) {
    let host = env.dir.join("s1");
    fs::create_dir_all(&host).unwrap();
    fs::write(host.join("bind.txt"), "hello\n").unwrap();
    let mounts = json!([{"type": "bind", "source": host, "target": "/tmp/t1", "options": ["rbind", "ro"]}]);
    let options = json!({"privileged": true, "devices": ["/dev/loop0", "/dev/loop1"], "mounts": mounts});
    let script = "grep CapBnd /proc/self/status; cat /tmp/t1/bind.txt; [ -b /dev/loop0 ] && echo there";
    let out = prints(env, script, options).await;
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find(|line| line.starts_with("CapBnd")).unwrap();
    assert_eq!(out, format!("{own}\nhello\nthere\n"));
}

async fn volume_mount(env: &mut Env) {
    let host = env.dir.join("s1");
    fs::create_dir_all(&host).unwrap();
    fs::write(host.join("host.txt"), "hello\n").unwrap();
    let script = "cat /tmp/t1/host.txt /tmp/ro/host.txt; echo x 2>/dev/null > /tmp/ro/bad; echo x > /tmp/t1/good";
    let config = env.shell(script, json!({})).await;
    let task = start_with(env, config, |config| {
        for (target, readonly) in [("/tmp/t1", false), ("/tmp/ro", true)] {
            let (task_path, host_path) = (target.to_owned(), host.to_str().unwrap().to_owned());
            config.mounts.push(Mount { task_path, host_path, readonly, ..Default::default() });
        }
    })
    .await;
    assert_eq!(env.finish_task(task).await.1, "hello\nhello\n");
    assert!(host.join("good").exists() && !host.join("bad").exists());
}

async fn dns(env: &mut Env) {
    let sysctl = json!({"sysctl": {"net.core.somaxconn": "16384", "net.ipv4.ip_forward": "1"}});
    let script = "cat /etc/resolv.conf /proc/sys/net/core/somaxconn /proc/sys/net/ipv4/ip_forward";
    let config = env.shell(script, sysctl).await;
    let task = start_with(env, config, |config| {
        config.dns = Some(DnsConfig {
            servers: vec!["127.0.0.1".to_owned(), "127.0.0.2".to_owned()],
            searches: vec!["internal.corp".to_owned()],
            options: vec!["ndots:2".to_owned()],
        });
    })
    .await;
    let out = env.finish_task(task).await.1;
    for line in [
        "nameserver 127.0.0.1\n",
        "nameserver 127.0.0.2\n",
        "search internal.corp\n",
        "options ndots:2\n",
        "\n16384\n1\n",
    ] {
        assert!(out.contains(line), "{line:?} in {out}");
    }
}

async fn extra_hosts(env: &mut Env) {
    let options = json!({"host_network": true, "extra_hosts": ["postgres:127.0.1.1", "redis:127.0.1.2"]});
    let hosts = prints(env, "cat /etc/hosts", options).await;
    assert!(hosts.contains("127.0.1.1\tpostgres\n") && hosts.contains("127.0.1.2\tredis\n"), "{hosts}");
}

async fn entrypoint(env: &mut Env) {
    let image = env.busybox().await;
    let (_, out, _) = env
        .run(json!({"image": image, "entrypoint": ["/bin/sh"], "args": ["-c", "for c in container1 container2; do echo $c; done"]}))
        .await;
    assert_eq!(out, "container1\ncontainer2\n");
}

async fn auth(env: &mut Env) {
    let services = services();
    crate::support::Image::busybox().push(&services.basic_backdoor, "private/peer:1").await;
    let mut task = env.prepare(json!({"image": format!("{}/private/peer:1", services.basic_registry)})).await;
    let said = env.try_start(&mut task).await.unwrap_err().message().to_lowercase();
    assert!(["denied", "unauthorized", "authorization failed"].iter().any(|word| said.contains(word)), "{said}");
}

async fn template(env: &mut Env) {
    let mounts = json!([{
        "type": "bind", "source": "local/mosquitto.conf", "target": "/mosquitto/config/mosquitto.conf",
        "options": ["rbind", "rw"],
    }]);
    let config = env.shell("cat /mosquitto/config/mosquitto.conf", json!({"mounts": mounts})).await;
    let mut task = env.prepare(config).await;
    fs::write(task.dirs.alloc_dir.join("web/local/mosquitto.conf"), "bind_address 0.0.0.0\n").unwrap();
    env.try_start(&mut task).await.unwrap();
    assert_eq!(env.finish_task(task).await.1, "bind_address 0.0.0.0\n");
}

async fn allow_privileged(env: &mut Env) {
    let said = refused(env, json!({"privileged": true})).await;
    assert!(said.to_lowercase().contains("privileged jobs are not allowed"), "{said}");
}
