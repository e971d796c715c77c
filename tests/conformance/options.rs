//! docs/protocol/nomad-plugin.md#6.3, rows 16 to 18: the options of a job, seen from inside the task.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nomad_driver_shim::pb::driver::{Device, Mount, NetworkIsolationSpec};
use serde_json::{Value, json};

use crate::{
    row,
    row::Row,
    seen::{limit, prints, refused, start_with},
    support::{Env, Task},
};

pub(crate) fn rows() -> Vec<Row> {
    let open = || {
        json!({
            "allow_privileged": true,
            "security": {"allow_caps": ["ALL"], "allow_host_namespaces": true, "allow_devices": ["/dev/*"],
                         "allow_seccomp_override": true, "allow_paths": ["/var/tmp"]},
        })
    };
    vec![
        row!(
            environment,
            "6.3.16 env",
            "the job's environment over the image's, whose PATH is kept; hostname; directory"
        ),
        row!(users, "6.3.16 user", "user by name, uid, uid:gid; who does not exist is refused"),
        row!(root, "6.3.16 root", "the root file system is the task's own, or read-only"),
        row!(privileged_denied, "6.3.16 denied", "privileged is refused where the operator does not allow it")
            .config(json!({"allow_privileged": false})),
        row!(privileged, "6.3.16 privileged", "privileged has all capabilities and devices").config(open()),
        row!(
            capabilities,
            "6.3.16 caps",
            "cap_add and cap_drop, with and without CAP_, also in exec; nonsense is refused"
        )
        .config(open()),
        row!(
            seccomp,
            "6.3.16 seccomp",
            "seccomp by default profile and from a file; a profile without seccomp is refused"
        )
        .config(open())
        .drop_in(),
        row!(limits, "6.3.16 limits", "sysctl, pids_limit, shm_size").config(open()),
        row!(devices, "6.3.16 devices", "devices by path, and no others").config(open()),
        row!(names, "6.3.16 hosts", "extra_hosts; a bad one is refused").config(open()),
        row!(host_namespaces, "6.3.16 host", "pid_mode = host; host_network, not beside a group's network")
            .config(open()),
        row!(mounts, "6.3.16 mounts", "mounts of each type with their options; no way out of the task's directories")
            .config(open()),
        row!(volumes, "6.3.16 volumes", "Nomad's volumes: read-only, propagation"),
        row!(directories, "6.3.17", "/alloc and /local are written to, /secrets read; private is not there"),
        row!(
            templates_and_signals,
            "6.3.18",
            "a template's file is there at the start; SIGHUP arrives; no signal of that name is refused"
        ),
    ]
}

async fn environment(env: &mut Env) {
    let script = "pwd; hostname; echo $FROM_IMAGE $FROM_JOB; echo $PATH";
    let config = env.shell(script, json!({"cwd": "/made/by/runtime", "hostname": "thehost"})).await;
    let task = start_with(env, config, |config| {
        config.env.insert("FROM_JOB".to_owned(), "a b\nc".to_owned());
    })
    .await;
    let (_, out, err) = env.finish_task(task).await;
    assert_eq!(out, "/made/by/runtime\nthehost\nyes a b c\n/bin\n", "{err}");
}

async fn users(env: &mut Env) {
    for (user, expected) in [
        ("", "uid=0(root) gid=0(root)"),
        ("user", "uid=1000(user) gid=1001(user) groups=1001(user),2000(extra)"),
        ("1234", "uid=1234 gid=0(root)"),
        ("1234:5678", "uid=1234 gid=5678"),
        ("user:extra", "uid=1000(user) gid=2000(extra)"),
    ] {
        let config = env.shell("id", json!({})).await;
        let task = start_with(env, config, |config| config.user = user.to_owned()).await;
        let out = env.finish_task(task).await.1;
        assert!(out.starts_with(expected), "{user}: {out}");
    }
    let config = env.shell("id", json!({})).await;
    let mut task = env.prepare(config).await;
    task.config.user = "nobody-has-this-name".to_owned();
    env.try_start(&mut task).await.expect_err("a user that does not exist");
}

async fn root(env: &mut Env) {
    let script = "echo x > /bin/new && cat /bin/new";
    assert_eq!(prints(env, script, json!({})).await, "x\n");
    assert_eq!(prints(env, "ls /bin/new 2>/dev/null || echo none", json!({})).await, "none\n", "the image is changed");
    let config = env.shell(script, json!({"readonly_rootfs": true})).await;
    let (code, _, err) = env.run(config).await;
    assert!(code != 0 && err.contains("Read-only file system"), "{code} {err}");
}

async fn privileged_denied(env: &mut Env) {
    let why = refused(env, json!({"privileged": true})).await;
    assert!(why.to_lowercase().contains("privileged jobs are not allowed"), "{why}");
}

async fn privileged(env: &mut Env) {
    let script = "grep CapBnd /proc/self/status; ls /dev/kmsg /dev/loop-control; echo x > /proc/sys/kernel/domainname && echo wrote";
    let out = prints(env, script, json!({"privileged": true})).await;
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find(|line| line.starts_with("CapBnd")).unwrap();
    for part in [own, "/dev/kmsg", "/dev/loop-control", "wrote"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let script = "echo x 2>/dev/null > /proc/sys/kernel/domainname || echo refused; ls /dev/kmsg 2>/dev/null; true";
    assert_eq!(prints(env, script, json!({})).await, "refused\n", "without it");
}

fn mask(text: &str) -> u64 {
    u64::from_str_radix(text.split_whitespace().nth(1).unwrap(), 16).unwrap()
}

async fn capabilities(env: &mut Env) {
    const CHOWN: u64 = 1;
    const NET_ADMIN: u64 = 1 << 12;
    let script = "grep CapEff /proc/self/status";
    let default = mask(&prints(env, script, json!({})).await);
    assert_eq!((default & CHOWN, default & NET_ADMIN), (CHOWN, 0), "{default:x}");
    for (add, drop) in [("NET_ADMIN", "CHOWN"), ("CAP_NET_ADMIN", "CAP_CHOWN"), ("net_admin", "chown")] {
        let config = env.shell("sleep 600", json!({"cap_add": [add], "cap_drop": [drop]})).await;
        let task = env.start(config).await;
        let changed = mask(&env.exec_text(&task, script).await);
        assert_eq!(changed, default & !CHOWN | NET_ADMIN, "{add} {drop}: {changed:x}");
        env.destroy(&task).await.unwrap();
    }
    refused(env, json!({"cap_add": ["CAP_NONSENSE"]})).await;
}

async fn seccomp(env: &mut Env) {
    let script = "grep ^Seccomp: /proc/self/status";
    let on = "Seccomp:\t2\n";
    let config = env.shell("sleep 600", json!({"seccomp": true})).await;
    let task = env.start(config).await;
    assert_eq!(env.exec_text(&task, script).await, on);
    env.destroy(&task).await.unwrap();
    let profile = env.dir.join("profile.json");
    let refuses_mkdir = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
    });
    fs::write(&profile, refuses_mkdir.to_string()).unwrap();
    let script = "grep ^Seccomp: /proc/self/status; mkdir /tmp/x 2>/dev/null || echo refused";
    let out = prints(env, script, json!({"seccomp": true, "seccomp_profile": profile})).await;
    assert_eq!(out, format!("{on}refused\n"));
    refused(env, json!({"seccomp": false, "seccomp_profile": profile})).await;
}

async fn limits(env: &mut Env) {
    let options = json!({"sysctl": {"net.core.somaxconn": "16384"}, "shm_size": "3m"});
    let script = "cat /proc/sys/net/core/somaxconn; df -k /dev/shm | tail -1 | awk '{print $2}'";
    assert_eq!(prints(env, script, options).await, "16384\n3072\n");
    let config = env.shell("sleep 600", json!({"pids_limit": 40})).await;
    let task = env.start(config).await;
    assert_eq!(limit(env, &task, ("pids", "pids.max"), "pids.max"), "40");
}

async fn devices(env: &mut Env) {
    let script = "for i in 0 1; do [ -b /dev/loop$i ] && : < /dev/loop$i && echo loop$i; done; true";
    assert_eq!(prints(env, script, json!({"devices": ["/dev/loop0"]})).await, "loop0\n");
    // A device from a device plugin, under another name in the task.
    let config = env.shell("[ -c /dev/given ] && head -c 1 /dev/given | wc -c", json!({})).await;
    let task = start_with(env, config, |config| {
        config.devices.push(Device {
            task_path: "/dev/given".to_owned(),
            host_path: "/dev/zero".to_owned(),
            cgroup_permissions: "rwm".to_owned(),
        });
    })
    .await;
    assert_eq!(env.finish_task(task).await.1, "1\n");
}

async fn names(env: &mut Env) {
    let hosts = prints(env, "cat /etc/hosts", json!({"extra_hosts": ["postgres:127.0.1.1", "redis:127.0.1.2"]})).await;
    for line in ["127.0.1.1\tpostgres\n", "127.0.1.2\tredis\n", "localhost"] {
        assert!(hosts.contains(line), "{line:?} in {hosts}");
    }
    refused(env, json!({"extra_hosts": ["postgres"]})).await;
}

async fn host_namespaces(env: &mut Env) {
    let link = |namespace: &str| fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap().display().to_string();
    for (options, namespace) in [(json!({"pid_mode": "host"}), "pid"), (json!({"host_network": true}), "net")] {
        let script = format!("readlink /proc/self/ns/{namespace}");
        assert_eq!(prints(env, &script, options).await.trim_end(), link(namespace));
        assert_ne!(prints(env, &script, json!({})).await.trim_end(), link(namespace), "by itself");
    }
    refused(env, json!({"pid_mode": "weird"})).await;
    let config = env.shell("true", json!({"host_network": true})).await;
    let mut task = env.prepare(config).await;
    let group = NetworkIsolationSpec { mode: 1, path: "/proc/1/ns/net".to_owned(), ..Default::default() };
    task.config.network_isolation_spec = Some(group);
    env.try_start(&mut task).await.expect_err("host_network beside a group's network");
}

async fn mounts(env: &mut Env) {
    let host = env.dir.join("host");
    fs::create_dir_all(&host).unwrap();
    fs::write(host.join("f"), "of the host\n").unwrap();
    let mounts = json!([
        {"type": "bind", "source": host, "target": "/ro", "options": ["rbind", "ro"]},
        {"type": "volume", "source": host, "target": "/rw", "options": ["rbind", "rw"]},
        {"type": "tmpfs", "target": "/scratch", "options": ["size=1m", "nosuid"]},
        {"type": "bind", "source": "local/config", "target": "/etc/app.conf", "options": ["rbind", "ro"]},
    ]);
    let script = "cat /ro/f /etc/app.conf; echo no 2>/dev/null > /ro/g; echo yes > /rw/w; df -k /scratch | tail -1 | awk '{print $1, $2}'";
    let config = env.shell(script, json!({"mounts": mounts})).await;
    let mut task = env.prepare(config).await;
    fs::write(task.dirs.alloc_dir.join("web/local/config"), "configured\n").unwrap();
    env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{}", status.message()));
    assert_eq!(env.finish_task(task).await.1, "of the host\nconfigured\ntmpfs 1024\n");
    assert_eq!(fs::read_to_string(host.join("w")).unwrap(), "yes\n");
    assert!(!host.join("g").exists());
    for source in ["../../other", "local/../../../other", "local/link"] {
        let mounts = json!([{"type": "bind", "source": source, "target": "/m", "options": ["rbind", "rw"]}]);
        let config = env.shell("true", json!({"mounts": mounts})).await;
        let mut task = env.prepare(config).await;
        std::os::unix::fs::symlink("/etc", task.dirs.alloc_dir.join("web/local/link")).unwrap();
        env.try_start(&mut task).await.expect_err(source);
    }
}

async fn volumes(env: &mut Env) {
    let volume = SharedVolume::new(env.dir.join("volume"));
    let task = with_volume(env, &volume).await;
    // A mount that the host makes later appears only where the job has asked for propagation.
    tmpfs(&volume.0.join("later"));
    let seen = env.exec_text(&task, "grep -o ' /r[wo]/later ' /proc/self/mountinfo || true").await;
    assert_eq!(seen, " /rw/later \n");
    env.destroy(&task).await.unwrap();
}

/// Starts a task that has the volume twice, writable and read-only, and that has tried to write to both.
pub(crate) async fn with_volume(env: &mut Env, volume: &SharedVolume) -> Task {
    let volume = &volume.0;
    fs::write(volume.join("f"), "from the host\n").unwrap();
    fs::create_dir(volume.join("later")).unwrap();
    let script = "cat /rw/f /ro/f; echo w > /rw/w; echo w 2>/dev/null > /ro/w2; echo ready; sleep 600";
    let config = env.shell(script, json!({})).await;
    let task = start_with(env, config, |config| {
        for (task_path, readonly, propagation) in [("/rw", false, "host-to-task"), ("/ro", true, "private")] {
            config.mounts.push(Mount {
                task_path: task_path.to_owned(),
                host_path: volume.to_str().unwrap().to_owned(),
                readonly,
                propagation_mode: propagation.to_owned(),
                ..Default::default()
            });
        }
    })
    .await;
    task.says("from the host\nfrom the host\nready\n").await;
    assert!(volume.join("w").exists() && !volume.join("w2").exists());
    task
}

/// A file system with shared mount propagation.
pub(crate) struct SharedVolume(pub PathBuf);

impl SharedVolume {
    pub(crate) fn new(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        tmpfs(&path);
        mount(None::<&str>, &path, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        Self(path)
    }
}

impl Drop for SharedVolume {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

pub(crate) fn tmpfs(path: &Path) {
    mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
}

async fn directories(env: &mut Env) {
    let script = "cat /secrets/token; echo a > /alloc/data/a; echo l > /local/l; ls -d /private /web 2>/dev/null; true";
    let config = env.shell(script, json!({})).await;
    let mut task = env.prepare(config).await;
    let own = task.dirs.alloc_dir.join("web");
    fs::write(own.join("secrets/token"), "t0ken\n").unwrap();
    env.try_start(&mut task).await.unwrap();
    let alloc = task.dirs.alloc_dir.clone();
    assert_eq!(env.finish_task(task).await.1, "t0ken\n");
    assert_eq!(fs::read_to_string(alloc.join("alloc/data/a")).unwrap(), "a\n");
    assert_eq!(fs::read_to_string(own.join("local/l")).unwrap(), "l\n");
}

async fn templates_and_signals(env: &mut Env) {
    let script = "cat /local/template; trap 'echo hup' HUP; echo ready; while :; do sleep 0.05; done";
    let config: Value = env.shell(script, json!({})).await;
    let mut task = env.prepare(config).await;
    fs::write(task.dirs.alloc_dir.join("web/local/template"), "rendered\n").unwrap();
    env.try_start(&mut task).await.unwrap();
    task.says("rendered\nready\n").await;
    env.signal(&task, "SIGHUP").await.unwrap();
    task.says("hup").await;
    let error = env.signal(&task, "INVALID").await.unwrap_err();
    assert!(error.message().to_lowercase().contains("invalid signal"), "{error:?}");
}
