//! A job's `mounts`: sources, types, options, targets and propagation give a task nothing of the host.

use std::{fs, os::unix::fs::symlink, path::Path};

use serde_json::{Value, json};

use crate::{
    decoy::{Decoy, SECRET},
    probe::{Outcome, outcome, refusal, refusal_of},
    runtimes,
    support::{Env, Task, each_case, services},
};

fn bind(source: &str, options: &[&str]) -> Value {
    json!({"type": "bind", "source": source, "target": "/m", "options": options})
}

/// Prepares a task whose allocation has another task with a secret, and links that a task of the allocation could make.
async fn prepared(env: &mut Env, decoy: &Decoy, config: Value) -> Task {
    let task = env.prepare(config).await;
    let alloc = env.allocs.last().unwrap().clone();
    alloc.create_task("other").unwrap();
    for private in ["other/secrets/token", "other/private/token", "web/private/token"] {
        fs::write(alloc.dir.join(private), SECRET).unwrap();
    }
    for (name, target) in [
        ("etc", Path::new("/etc")),
        ("root", Path::new("/")),
        ("decoy", &decoy.dir),
        ("up", Path::new("../../../..")),
        ("other", Path::new("../../other/secrets")),
        ("magic", Path::new("/proc/1/root")),
    ] {
        symlink(target, alloc.dir.join("alloc/data").join(name)).unwrap();
    }
    task
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_outside_of_the_tasks_directories_are_refused() {
    let mut env = Env::new().await;
    let decoy = Decoy::new(&env);
    let containerd = services().containerd.display().to_string();
    let (run, control) = (env.dir.join("run"), env.dir.join("run/control.sock"));
    let absolute = ["/", "/etc", "/proc/1/root", "/proc/self/fd", "/run", "/dev", &containerd, decoy.path()];
    let ours = [run.to_str().unwrap(), control.to_str().unwrap()];
    let relative = [
        "../..",
        "..",
        ".",
        "private",
        "private/token",
        "local/../private",
        "alloc",
        "alloc/..",
        "alloc/../..",
        "alloc/../other/private",
        "alloc/../other/secrets/token",
        "../other/secrets/token",
        "local/../../other/private/token",
        "alloc/data/etc",
        "alloc/data/root",
        "alloc/data/root/etc",
        "alloc/data/decoy",
        "alloc/data/decoy/secret",
        "alloc/data/up",
        "alloc/data/other/token",
        "alloc/data/magic",
        "alloc/data\0/../../other/secrets",
        "local\0",
    ];
    each_case(absolute.iter().chain(&ours).chain(&relative), async |source| {
        let config = env.shell("ls -R /m", json!({"mounts": [bind(source, &["rbind", "rw"])]})).await;
        let mut task = prepared(&mut env, &decoy, config).await;
        // Of this list, "alloc" is the only name that every task can see anyway.
        if *source == "alloc" {
            env.try_start(&mut task).await.unwrap();
            env.finish_task(task).await;
            return;
        }
        let reason = refusal_of(&env, &mut task, source).await;
        assert!(reason.contains("mounts"), "{source}: {reason}");
        assert!(!reason.contains(SECRET.trim()), "{source}: {reason}");
    })
    .await;
    // The same sources as absolute paths into the allocation.
    each_case(
        ["", "other", "other/secrets/token", "web", "web/private", "alloc/data/decoy", "alloc/../other/secrets"],
        async |below| {
            let mut task = prepared(&mut env, &decoy, Value::Null).await;
            let source = task.dirs.alloc_dir.join(below).display().to_string();
            let config = env.shell("ls -R /m", json!({"mounts": [bind(&source, &["rbind", "rw"])]})).await;
            task = env.prepare_again(task, "2", config).await;
            let reason = refusal_of(&env, &mut task, &source).await;
            assert!(reason.contains("mounts"), "{source}: {reason}");
        },
    )
    .await;
    decoy.assert_untouched("a mount's source");
    env.finish().await;

    // Control test: under the name `containerd-driver` any path is followed, and the task reads the decoy's secret
    // through it.
    let mut env = Env::drop_in(json!({})).await;
    let decoy = Decoy::new(&env);
    let config = env.shell("cat /m/secret", json!({"mounts": [bind(decoy.path(), &["rbind", "ro"])]})).await;
    assert_eq!(env.run(config).await.1, SECRET);
    env.finish().await;
}

/// Types and options with which a tmpfs mount would be anything but an empty tmpfs.
#[tokio::test(flavor = "multi_thread")]
async fn no_other_file_system_than_a_tmpfs_is_mounted() {
    let mut env = Env::new().await;
    let decoy = Decoy::new(&env);
    let image = env.busybox().await;
    let config = |mount: Value, runtime: &str| {
        json!({
            "image": image, "runtime": runtime, "mounts": [mount],
            "command": "/bin/sh", "args": ["-c", "mount | grep ' /m '; find /m -type f | head"],
        })
    };
    let cases = [
        "overlay", "proc", "sysfs", "cgroup", "cgroup2", "devtmpfs", "devpts", "ext4", "nfs", "9p", "fuse", "mqueue",
        "none", "BIND", "Bind", "bind ", "tmpfs ", "tmpfs\0", "",
    ];
    each_case(cases, async |kind| {
        let mount = json!({"type": kind, "source": "/dev/vda", "target": "/m", "options": ["rw"]});
        let reason = refusal(&mut env, config(mount, "crun")).await;
        assert!(reason.contains("mounts"), "{kind:?}: {reason}");
    })
    .await;
    let lower = format!("lowerdir={}", decoy.path());
    let (joined, sized) = (format!("rw,{lower}"), format!("size=1m,{lower}"));
    let cases = [
        vec!["bind"],
        vec!["rbind"],
        vec!["rw", "rbind"],
        vec!["remount"],
        vec!["rw", "remount", "bind"],
        vec!["move"],
        vec![&lower],
        vec![&joined],
        vec!["rw,bind"],
        vec!["mand"],
        vec!["idmap"],
        vec!["tmpcopyup"],
        vec!["copy-symlink"],
        vec!["src-nofollow"],
        vec!["dest-nofollow"],
        vec!["size=1m", "x-mount.mkdir"],
        vec![" size=1m"],
    ];
    each_case(cases, async |options| {
        let mount = json!({"type": "tmpfs", "source": decoy.path(), "target": "/m", "options": options});
        let reason = refusal(&mut env, config(mount, "crun")).await;
        assert!(reason.contains("mounts"), "{options:?}: {reason}");
    })
    .await;
    // Text that the driver accepts as an option's value must be one for the kernel as well: the mount either fails, or
    // is a tmpfs without files.
    for runtime in runtimes() {
        for option in [sized.as_str(), "size=1m,bind", "size=1m,rbind", "mode=755,remount", "uid=0,lowerdir=/etc"] {
            let mount = json!({"type": "tmpfs", "source": decoy.path(), "target": "/m", "options": [option]});
            match outcome(&mut env, config(mount, &runtime)).await {
                Outcome::Refused(_) => {}
                Outcome::Ran(_, out, _) => {
                    let kinds: Vec<_> = out.lines().map(|line| line.split(' ').nth(4)).collect();
                    assert_eq!(kinds, [Some("tmpfs")], "{runtime}, {option}: {out}");
                }
            }
        }
    }
    decoy.assert_untouched("a tmpfs's options");
    // Control test: a tmpfs is mounted, and a bind shows a file.
    let mount = json!({"type": "tmpfs", "target": "/m", "options": ["size=1m"]});
    assert!(env.run(config(mount, "crun")).await.1.contains(" on /m type tmpfs "));
    let mut task = env.prepare(config(bind("local", &["rbind", "ro"]), "crun")).await;
    std::fs::write(env.allocs.last().unwrap().dir.join("web/local/shown"), "").unwrap();
    env.try_start(&mut task).await.unwrap();
    let (code, out, _) = env.finish_task(task).await;
    assert!(code == 0 && out.contains(" on /m ") && out.contains("/m/shown\n"), "{code}: {out}");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn targets_lie_below_the_root_of_the_container() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    for target in
        ["", "/", "//", "///", "/..", "/../..", "/a/../..", "/a/../../etc", "m", "./m", "../m", "~", "\0", "m\0/x"]
    {
        for kind in ["tmpfs", "bind"] {
            let mount = json!({"type": kind, "source": "local", "target": target, "options": ["rw"]});
            let reason = refusal(&mut env, json!({"image": image, "mounts": [mount]})).await;
            assert!(reason.contains("target"), "{target:?}: {reason}");
        }
    }
    env.finish().await;
}

/// A task makes the device nodes of a disk and of the kernel's log in a directory that other tasks bind.
#[tokio::test(flavor = "multi_thread")]
async fn a_bound_device_node_does_not_open() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({"allow_privileged": true})).await;
        let make = "mknod /alloc/data/loop b 7 0 && mknod /alloc/data/kmsg c 1 11 && chmod 666 /alloc/data/*";
        let config = env.shell(make, json!({})).await;
        assert_eq!(env.run(config).await.0, 0, "{runtime}");
        let alloc = env.allocs.last().unwrap().clone();
        let (both, one) = ("open /m/loop; open /m/kmsg; open /alloc/data/loop; open /alloc/data/kmsg", "open /m");
        for (name, source, script, privileged, opened, refused) in [
            ("directory", "alloc/data", both, false, 0, 4),
            ("disk", "alloc/data/loop", one, false, 0, 1),
            ("log", "alloc/data/kmsg", one, false, 0, 1),
            // Control test: without the confinement the nodes open.
            ("privileged", "alloc/data", both, true, 4, 0),
        ] {
            let script = format!("open() {{ (: < $1) && echo opened; }}; {script}");
            let mounts = json!([bind(source, &["rbind", "rw", "dev"])]);
            let config = env.shell(&script, json!({"mounts": mounts, "privileged": privileged})).await;
            let mut task = env.prepare_in(alloc.create_task(name).unwrap(), "1", config).await;
            env.try_start(&mut task).await.unwrap();
            let (_, out, err) = env.finish_task(task).await;
            let seen = (out.matches("opened").count(), err.matches("Operation not permitted").count());
            assert_eq!(seen, (opened, refused), "{runtime}, {name}: {out}{err}");
        }
        env.finish().await;
    }
}
