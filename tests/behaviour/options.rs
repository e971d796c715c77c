//! Each option of a task, seen from inside the container or from the kernel.

use std::fs;

use nomad_driver_shim::pb::driver::NetworkIsolationSpec;
use serde_json::{Value, json};

use crate::support::{Env, EnvOptions, Image, patience, services, shell_in as sh, with_options};

fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn command_args_and_entrypoint_follow_dockers_rules() {
    let mut env = Env::new().await;
    let image = Image::busybox()
        .with_config("Entrypoint", json!(["/bin/echo", "entry"]))
        .with_config("Cmd", json!(["cmd"]))
        .push(&services().registry, "test/entrypoint:1")
        .await;
    for (options, expected) in [
        (json!({}), "entry cmd"),
        (json!({"args": ["a", "b"]}), "entry a b"),
        (json!({"command": "c"}), "entry c"),
        (json!({"command": "c", "args": ["a"]}), "entry c a"),
        (json!({"entrypoint": ["/bin/echo", "own"], "args": ["a"]}), "own a"),
        (json!({"entrypoint": []}), "entry cmd"),
        (json!({"entrypoint": [""], "args": ["/bin/echo", "only"]}), "only"),
    ] {
        let mut config = options.clone();
        config["image"] = json!(image);
        let (code, out, _) = env.run(config).await;
        assert_eq!((code, out.trim_end()), (0, expected), "{options}");
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cwd_hostname_user_and_environment() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let script = "pwd; hostname; id; echo $FROM_IMAGE $FROM_JOB; echo $PATH; grep '^NoNewPrivs' /proc/self/status";
    let config = with(with(sh(&image, script), "cwd", json!("/made/by/runtime")), "hostname", json!("thehost"));
    let mut task = env.prepare(config).await;
    task.config.env.insert("FROM_JOB".to_owned(), "a b\nc".to_owned());
    task.config.env.insert("PATH".to_owned(), "/bin:/job".to_owned());
    task.config.user = "user".to_owned();
    env.try_start(&mut task).await.unwrap();
    let (code, out, err) = env.finish_task(task).await;
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(code, 0, "{err}");
    assert_eq!(
        lines,
        [
            "/made/by/runtime",
            "thehost",
            "uid=1000(user) gid=1001(user) groups=1001(user),2000(extra)",
            "yes a b c",
            "/bin:/job",
            "NoNewPrivs:\t1"
        ]
    );
    for (user, expected) in [
        ("1234:5678", "uid=1234 gid=5678"),
        ("user:extra", "uid=1000(user) gid=2000(extra)"),
        ("", "uid=0(root) gid=0(root)"),
    ] {
        let mut task = env.prepare(sh(&image, "id")).await;
        task.config.user = user.to_owned();
        env.try_start(&mut task).await.unwrap();
        let (_, out, _) = env.finish_task(task).await;
        assert!(out.starts_with(expected), "{user}: {out}");
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn alloc_local_and_secrets_are_the_hosts_directories_and_private_is_not_there() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let script = "cat /secrets/token; echo a > /alloc/data/a; echo l > /local/l; ls -d /private /web 2>&1; ls /";
    let mut task = env.prepare(sh(&image, script)).await;
    let task_dir = task.dirs.alloc_dir.join("web");
    fs::write(task_dir.join("secrets/token"), "t0ken\n").unwrap();
    env.try_start(&mut task).await.unwrap();
    let alloc = task.dirs.alloc_dir.clone();
    let (_, out, _) = env.finish_task(task).await;
    assert!(out.starts_with("t0ken\n") && out.contains("/private: No such file"), "{out}");
    assert_eq!(fs::read_to_string(alloc.join("alloc/data/a")).unwrap(), "a\n");
    assert_eq!(fs::read_to_string(task_dir.join("local/l")).unwrap(), "l\n");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_is_the_tasks_own_or_read_only() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    assert_eq!(env.run(sh(&image, "echo x > /bin/new && cat /bin/new")).await, (0, "x\n".to_owned(), String::new()));
    let (code, _, err) = env.run(with(sh(&image, "echo x > /bin/new"), "readonly_rootfs", json!(true))).await;
    assert!(code != 0 && err.contains("Read-only file system"), "{code} {err}");
    assert_eq!(env.run(sh(&image, "ls /bin/new")).await.0, 1, "the first task's file is not in the image");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_of_each_kind() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let mounts = json!([
        {"type": "bind", "source": "local/config", "target": "/etc/app.conf", "options": ["ro"]},
        {"type": "volume", "source": "alloc/data", "target": "/shared", "options": ["rbind", "rw"]},
        {"type": "tmpfs", "target": "/scratch", "options": ["size=1m", "nosuid"]},
    ]);
    let script = "cat /etc/app.conf; echo no > /etc/app.conf; echo yes > /shared/f; df -k /scratch | tail -1 | awk '{print $1, $2}'";
    for runtime in ["crun", "runc"] {
        let config = with(with(sh(&image, script), "mounts", mounts.clone()), "runtime", json!(runtime));
        let mut task = env.prepare(config).await;
        fs::write(task.dirs.alloc_dir.join("web/local/config"), "configured\n").unwrap();
        env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{runtime}: {}", status.message()));
        let alloc = task.dirs.alloc_dir.clone();
        let (_, out, err) = env.finish_task(task).await;
        assert_eq!(out, "configured\ntmpfs 1024\n", "{runtime}");
        assert!(err.contains("Read-only file system"), "{runtime}: {err}");
        assert_eq!(fs::read_to_string(alloc.join("alloc/data/f")).unwrap(), "yes\n");
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_do_not_leave_the_tasks_directories() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let outside = env.dir.join("outside");
    fs::create_dir_all(&outside).unwrap();
    for source in ["../../other", "private/x", "local/link", "local/missing", outside.to_str().unwrap()] {
        let mounts = json!([{"type": "bind", "source": source, "target": "/m", "options": ["rw"]}]);
        let mut task = env.prepare(with(sh(&image, "true"), "mounts", mounts)).await;
        std::os::unix::fs::symlink(&outside, task.dirs.alloc_dir.join("web/local/link")).unwrap();
        let error = env.try_start(&mut task).await.unwrap_err();
        assert!(error.message().contains("mounts: source"), "{source}: {error:?}");
    }
    env.finish().await;
    let mut env = Env::configured(json!({"security": {"allow_paths": [outside]}})).await;
    let mounts = json!([{"type": "bind", "source": outside, "target": "/m", "options": ["rw"]}]);
    assert_eq!(env.run(with(sh(&image, "touch /m/made"), "mounts", mounts)).await.0, 0);
    assert!(outside.join("made").exists());
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_is_private_the_groups_or_the_hosts() {
    let mut env = Env::configured(json!({"security": {"allow_host_namespaces": true}})).await;
    let image = env.busybox().await;
    let script = "readlink /proc/self/ns/net; ip -o link | wc -l; ip -o addr show lo | grep -c 127.0.0.1";
    let host = fs::read_link("/proc/self/ns/net").unwrap().to_string_lossy().into_owned();
    let (_, private, _) = env.run(sh(&image, script)).await;
    assert!(!private.contains(&host) && private.ends_with("\n1\n1\n"), "its own, with lo up: {private}");
    let (_, shared, _) = env.run(with(sh(&image, "readlink /proc/self/ns/net"), "host_network", json!(true))).await;
    assert_eq!(shared.trim_end(), host);

    let name = format!("nds-{}", env.namespace);
    crate::support::services::run(std::process::Command::new("ip").args(["netns", "add", &name]));
    let path = format!("/run/netns/{name}");
    let group = NetworkIsolationSpec { mode: 1, path: path.clone(), ..Default::default() };
    let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap());
    let mut task = env.prepare(sh(&image, "readlink /proc/self/ns/net")).await;
    task.config.network_isolation_spec = Some(group.clone());
    env.try_start(&mut task).await.unwrap();
    let (_, out, _) = env.finish_task(task).await;
    let mut conflict = env.prepare(with(sh(&image, "true"), "host_network", json!(true))).await;
    conflict.config.network_isolation_spec = Some(group);
    let error = env.try_start(&mut conflict).await.unwrap_err();
    crate::support::services::run(std::process::Command::new("ip").args(["netns", "del", &name]));
    assert_eq!(out.trim_end(), format!("net:[{inode}]"));
    assert!(error.message().contains("exclude each other"), "{error:?}");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_resolved_as_the_group_or_the_host_says() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let script = "cat /etc/resolv.conf; grep -c localhost /etc/hosts";
    let mut task = env.prepare(sh(&image, script)).await;
    task.config.dns = Some(nomad_driver_shim::pb::driver::DnsConfig {
        servers: vec!["127.0.0.1".to_owned()],
        searches: vec!["internal.corp".to_owned()],
        options: vec!["ndots:2".to_owned()],
    });
    env.try_start(&mut task).await.unwrap();
    let (_, out, _) = env.finish_task(task).await;
    assert_eq!(out, "nameserver 127.0.0.1\nsearch internal.corp\noptions ndots:2\n2\n");
    env.finish().await;
}

/// Returns the bits of the task's `CapEff`.
async fn capabilities(env: &mut Env, image: &str, options: Value) -> u64 {
    let config = with_options(sh(image, "grep CapEff /proc/self/status"), options);
    let (code, out, err) = env.run(config).await;
    assert_eq!(code, 0, "{err}");
    u64::from_str_radix(out.split_whitespace().nth(1).unwrap(), 16).unwrap()
}

const CHOWN: u64 = 1;
const NET_RAW: u64 = 1 << 13;
const NET_ADMIN: u64 = 1 << 12;

#[tokio::test(flavor = "multi_thread")]
async fn capabilities_are_the_defaults_changed_by_the_job() {
    let mut env = Env::configured(json!({"security": {"allow_caps": ["ALL"]}})).await;
    let image = env.busybox().await;
    let default = capabilities(&mut env, &image, json!({})).await;
    assert_eq!((default.count_ones(), default & NET_RAW, default & CHOWN), (13, 0, CHOWN));
    let changed = capabilities(&mut env, &image, json!({"cap_add": ["net_admin"], "cap_drop": ["CAP_CHOWN"]})).await;
    assert_eq!(changed, default & !CHOWN | NET_ADMIN);
    assert_eq!(capabilities(&mut env, &image, json!({"cap_add": ["NET_RAW"], "cap_drop": ["ALL"]})).await, NET_RAW);
    env.finish().await;

    let mut env = Env::new().await;
    let mut task = env.prepare(with(sh(&image, "true"), "cap_add", json!(["NET_ADMIN"]))).await;
    let error = env.try_start(&mut task).await.unwrap_err();
    assert!(error.message().contains("NET_ADMIN is not allowed"), "{error:?}");
    env.finish().await;

    let mut env = Env::drop_in(json!({})).await;
    let old = capabilities(&mut env, &image, json!({"cap_add": []})).await;
    assert_eq!((old.count_ones(), old & NET_RAW), (14, NET_RAW), "the old driver's fourteen");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_is_for_those_whom_the_operator_lets() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let privileged = with(
        sh(
            &image,
            "grep CapBnd /proc/self/status; ls -l /dev/loop-control /dev/kmsg; echo x > /proc/sys/kernel/domainname && echo wrote",
        ),
        "privileged",
        json!(true),
    );
    let mut task = env.prepare(privileged.clone()).await;
    let error = env.try_start(&mut task).await.unwrap_err();
    assert!(error.message().to_lowercase().contains("privileged jobs are not allowed"), "{error:?}");
    env.finish().await;
    for runtime in ["crun", "runc"] {
        let mut env = Env::configured(json!({"allow_privileged": true})).await;
        let (_, out, err) = env.run(with(privileged.clone(), "runtime", json!(runtime))).await;
        let own = fs::read_to_string("/proc/self/status").unwrap();
        let own = own.lines().find(|line| line.starts_with("CapBnd")).unwrap();
        assert!(out.contains(own) && out.contains("/dev/kmsg") && out.contains("wrote"), "{runtime}: {out}{err}");
        env.finish().await;
    }
    let mut env = Env::new().await;
    let (_, out, _) = env
        .run(sh(
            &image,
            "echo x > /proc/sys/kernel/domainname || echo refused; ls /dev/kmsg; cat /proc/kcore | head -c1 | wc -c",
        ))
        .await;
    assert_eq!(out, "refused\n0\n", "without it, neither sysctls nor devices nor memory");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_runtime_is_the_jobs_choice_and_never_another() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    for (wanted, expected) in [
        (json!("crun"), "crun"),
        (json!("runc"), "runc"),
        (json!("io.containerd.runc.v2"), "crun"),
        (json!(null), "crun"),
    ] {
        let task = env.start(with(sh(&image, "sleep 600"), "runtime", wanted.clone())).await;
        assert_eq!(env.attribute(&task, "runtime").await, expected, "{wanted}");
        env.destroy(&task).await.unwrap();
    }
    let mut task = env.prepare(with(sh(&image, "true"), "runtime", json!("kata"))).await;
    let error = env.try_start(&mut task).await.unwrap_err();
    assert!(error.message().contains("kata") && error.message().contains("crun, io.containerd"), "{error:?}");
    env.finish().await;
}

/// Returns the extended attribute `security.selinux` (xattr(7)) of the path; empty where there is none.
fn security_label(path: &std::path::Path) -> String {
    let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let mut value = [0_u8; 256];
    // SAFETY: the call gets two C strings, and a buffer with its length.
    let length =
        unsafe { libc::getxattr(path.as_ptr(), c"security.selinux".as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    String::from_utf8_lossy(&value[..usize::try_from(length).unwrap_or_default()]).into_owned()
}

/// Labels are set where SELinux is enabled; elsewhere, as on most test machines, volumes stay as they are.
#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_labelled_as_the_job_says() {
    use nomad_driver_shim::pb::driver::Mount;
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let volume = env.dir.join("volume");
    fs::create_dir_all(volume.join("below")).unwrap();
    let mut task = env.prepare(sh(&image, "ls /v")).await;
    let mount = |label: &str| Mount {
        host_path: volume.to_str().unwrap().to_owned(),
        task_path: "/v".to_owned(),
        selinux_label: label.to_owned(),
        ..Mount::default()
    };
    task.config.mounts = vec![mount("shared")];
    let error = env.try_start(&mut task).await.unwrap_err();
    assert!(error.message().contains("\"/v\": selinux_label = \"shared\" is not z (shared) or Z"), "{error:?}");
    let selinux = fs::exists("/sys/fs/selinux/enforce").unwrap();
    for (label, ending) in [("z", ":container_file_t:s0"), ("Z", ":container_file_t:s0:c")] {
        let mut task = env.prepare(sh(&image, "ls /v")).await;
        task.config.mounts = vec![mount(label)];
        env.try_start(&mut task).await.unwrap();
        assert_eq!(env.finish_task(task).await.1, "below\n");
        let seen = security_label(&volume.join("below"));
        assert_eq!(seen.contains(ending), selinux, "{label}: {seen}");
    }
    env.finish().await;
}

/// Tasks have labels of their own where the plugin has `security { selinux = true }` and the node has SELinux with a
/// policy. Elsewhere, as on most test machines, the options have no effect, as with docker.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_have_selinux_labels_where_the_policy_has_some() {
    let security = json!({"selinux": true, "allow_label_override": true});
    let mut env = Env::with(EnvOptions { config: json!({"security": security}), ..EnvOptions::default() }).await;
    let image = env.busybox().await;
    let current = fs::read_to_string("/proc/self/attr/current").unwrap_or_default();
    let policy = fs::read_to_string("/etc/selinux/config").unwrap_or_default();
    let has_policy = fs::exists("/sys/fs/selinux/enforce").unwrap()
        && current.trim_end_matches(['\0', '\n']) != "kernel"
        && policy.lines().any(|line| line.starts_with("SELINUXTYPE="));
    for runtime in ["crun", "runc"] {
        for (options, label) in [(json!([]), ":s0:c"), (json!(["label=type:spc_t"]), ":spc_t:")] {
            let config = with(sh(&image, "cat /local/x; sleep 600"), "security_opt", options);
            let task = env.start(with(config, "runtime", json!(runtime))).await;
            let bundle = env.dir.join("run/bundles").join(env.attribute(&task, "container_id").await);
            let spec: Value = serde_json::from_slice(&fs::read(bundle.join("config.json")).unwrap()).unwrap();
            let seen = spec["process"]["selinuxLabel"].as_str().unwrap_or_default();
            assert_eq!(seen.contains(label), has_policy, "{runtime}: {seen}");
            assert_eq!(spec["linux"]["mountLabel"].is_string(), has_policy, "{runtime}");
            env.destroy(&task).await.unwrap();
        }
    }
    env.finish().await;
}

/// Any shim can be used by configuration only, as for kata. It is launched for one task alone, and gets no arguments
/// that it might not know.
#[tokio::test(flavor = "multi_thread")]
async fn a_shim_of_another_kind_is_its_tasks_alone() {
    let shim = json!({"shim": "containerd-shim-runc-v2"});
    let mut env =
        Env::configured(json!({"runtime": {"other": shim, "io.containerd.nosuch.v2": {}}, "shim": {"pool": 1}})).await;
    let image = env.busybox().await;
    let mut task = env.prepare(with(sh(&image, "true"), "runtime", json!("io.containerd.nosuch.v2"))).await;
    let error = env.try_start(&mut task).await.unwrap_err();
    assert!(error.message().contains("containerd-shim-nosuch-v2 is not installed"), "{error:?}");
    let others =
        with(sh(&image, "trap 'exit 6' TERM; echo ready; while :; do sleep 0.02; done"), "runtime", json!("other"));
    for killed in [false, true] {
        let task = env.start(others.clone()).await;
        task.says("ready").await;
        let shim = env.record(&task).await.1["shim"].as_str().unwrap().to_owned();
        // This shim outlives its plugin as any other shim does.
        env.kill_plugin().await;
        env.start_plugin().await;
        env.recover(&task).await.unwrap();
        assert_eq!(env.exec_text(&task, "echo in there").await, "in there\n");
        let expected = if killed {
            let pid = fs::read(env.dir.join("run/shims").join(&shim).join("pid")).unwrap();
            let pid: Value = serde_json::from_slice(&pid).unwrap();
            assert_eq!(pid["program"].as_str().map(|path| path.ends_with("containerd-shim-runc-v2")), Some(true));
            let pid = nix::unistd::Pid::from_raw(i32::try_from(pid["pid"].as_i64().unwrap()).unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            137
        } else {
            env.stop(&task, patience(), "").await.unwrap();
            6
        };
        assert_eq!(env.wait(&task).await.exit_code, expected);
        env.destroy(&task).await.unwrap();
        crate::support::eventually("its shim is gone with it", async || {
            if env.dir.join("run/shims").join(&shim).exists() { Err(shim.clone()) } else { Ok(()) }
        })
        .await;
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_in_the_kernels_files() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let mut task = env.prepare(sh(&image, "sleep 600")).await;
    let resources = task.config.resources.as_mut().unwrap().allocated_resources.as_mut().unwrap();
    let memory = resources.memory.as_mut().unwrap();
    (memory.memory_mb, memory.memory_max_mb) = (32, 48);
    env.try_start(&mut task).await.unwrap();
    let cgroup = env.attribute(&task, "cgroup").await;
    let read = |controller: &str, file: &str| {
        let path = format!("/sys/fs/cgroup/{controller}{cgroup}/{file}");
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}")).trim().to_owned()
    };
    let (limit, reserved) = ((48 << 20).to_string(), (32 << 20).to_string());
    match nomad_driver_shim::cgroup::Cgroups::detect().unwrap().mode() {
        nomad_driver_shim::cgroup::CgroupMode::V1 => {
            assert_eq!(cgroup, format!("/nomad/{}.web", task.dirs.alloc_id));
            assert_eq!(read("memory", "memory.limit_in_bytes"), limit);
            assert_eq!(read("memory", "memory.soft_limit_in_bytes"), reserved);
            assert_eq!(read("cpu", "cpu.shares"), "100");
        }
        nomad_driver_shim::cgroup::CgroupMode::V2 => {
            assert_eq!(cgroup, format!("/nomad.slice/{}.web.scope", task.dirs.alloc_id));
            assert_eq!((read("", "memory.max"), read("", "memory.low")), (limit, reserved));
            assert_eq!(read("", "memory.swap.max"), "0");
            // Runtimes convert shares into a weight in different ways; a tenth of the default gives a lower weight in
            // all of them.
            assert!(read("", "cpu.weight").parse::<u64>().unwrap() < 100);
        }
    }
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// A lazy unmount also reaches the peers of a shared mount: the mounts below the host's own directory must stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_binds_end_leaves_the_hosts_mounts_alone() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let none = None::<&str>;
    let source = crate::support::services::root().join("shared-source");
    fs::create_dir_all(&source).unwrap();
    mount(Some("tmpfs"), &source, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    mount(none, &source, none, MsFlags::MS_SHARED, none).unwrap();
    let below = source.join("below");
    fs::create_dir_all(&below).unwrap();
    mount(Some("tmpfs"), &below, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    fs::write(below.join("f"), "there").unwrap();

    let mut env = Env::configured(json!({"security": {"allow_paths": [source]}})).await;
    let mounts = json!([{"type": "bind", "source": source, "target": "/m", "options": ["rbind", "ro"]}]);
    let image = env.busybox().await;
    let (_, out, _) = env.run(with(sh(&image, "cat /m/below/f"), "mounts", mounts)).await;
    let after = fs::read_to_string(below.join("f"));
    env.finish().await;
    umount2(&source, MntFlags::MNT_DETACH).unwrap();
    assert_eq!((out.as_str(), after.unwrap().as_str()), ("there", "there"));
}

/// A mount of type "tmpfs" with the options of a bind would be a bind for the runtime, of any path of the host.
#[tokio::test(flavor = "multi_thread")]
async fn a_bind_in_disguise_is_checked_as_one() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let mounts = json!([{"type": "tmpfs", "source": "/", "target": "/host", "options": ["rbind", "rw"]}]);
    let mut task = env.prepare(with(sh(&image, "ls /host"), "mounts", mounts)).await;
    let error = env.try_start(&mut task).await.unwrap_err();
    assert!(error.message().contains("mounts: source \"/\" is outside"), "{error:?}");
    env.finish().await;
}
