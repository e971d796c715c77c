//! The driver's files on disk: users of the host other than root have no access to them, and a task can't fill them.

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        process::CommandExt as _,
    },
    path::Path,
    process::Command,
};

use serde_json::json;

use crate::{
    image_with_program, runtimes,
    support::{Env, Image, leak::entries, modes, services},
};

/// The user id of `nobody`, which owns nothing here.
const STRANGER: u32 = 65534;

/// Runs a shell script as an unprivileged user and returns its output.
fn as_stranger(script: &str) -> String {
    let output = Command::new("/bin/sh").args(["-c", script]).uid(STRANGER).gid(STRANGER).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A user of the host runs a set-user-id program of a task.
#[tokio::test(flavor = "multi_thread")]
async fn no_user_of_the_host_reaches_a_tasks_root() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let source = r#"#include <stdio.h>
            #include <unistd.h>
            int main(void) { printf("user %d\n", geteuid()); return 0; }"#;
        let image = image_with_program("euid", source).await;
        let script = "chmod 4755 /attack && echo secret >/readable && echo made && sleep 600";
        let config = env.shell(script, json!({"image": image})).await;
        let task = env.start(config).await;
        task.says("made").await;
        let id = env.attribute(&task, "container_id").await;
        let rootfs = env.dir.join("run/bundles").join(&id).join("rootfs");
        assert_eq!(fs::read_to_string(rootfs.join("readable")).unwrap(), "secret\n", "root can look at it");
        // A user who reached the program would become root, and the program would print "user 0".
        let seen = as_stranger(&format!("{0}/attack; cat {0}/readable", rootfs.display()));
        assert_eq!(seen, "", "{runtime}");
        // The neighbouring files: the writable layer, records, sockets, locks.
        let uppers = env.dir.join("state/uppers");
        let part = uppers.join(&entries(&uppers)[0]).join(&id).join("upper/readable");
        assert!(part.exists(), "{part:?}");
        let places = ["run/tasks", "run/shims", "run/bundles", "run/runtimes", "state/images", "state/uppers"];
        let places = places.map(|place| env.dir.join(place).display().to_string()).join(" ");
        let record = env.dir.join("run/tasks").join(format!("{id}.json"));
        let script = format!(
            "ls {places}; cat {} {}; : <{}",
            part.display(),
            record.display(),
            env.dir.join("run/lock").display()
        );
        assert_eq!(as_stranger(&script), "", "{runtime}");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

/// Checks the modes and owners of all files while a task runs, has had an exec, and has its logs written by the driver.
#[tokio::test(flavor = "multi_thread")]
async fn everything_on_disk_is_roots_alone() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({"disable_log_collection": true})).await;
        let image = Image::busybox().with_file("readable", "x").push(&services().registry, "directories/own:1").await;
        let config = json!({"image": image, "command": "/bin/sh", "args": ["-c", "sleep 600"], "cwd": "/tmp"});
        let task = env.start(config).await;
        assert_eq!(env.exec_text(&task, "echo from exec").await, "from exec\n");
        assert_eq!(modes::open_to_others(&env), Vec::<String>::new(), "{runtime}");
        // Control test: the check finds a file with an open mode.
        let record = env.dir.join("run/tasks").join(&entries(&env.dir.join("run/tasks"))[0]);
        fs::set_permissions(&record, fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(modes::open_to_others(&env).len(), 1);
        fs::set_permissions(&record, fs::Permissions::from_mode(0o600)).unwrap();
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

/// A plugin that starts closes directories that an earlier version has left open, also while tasks run.
#[tokio::test(flavor = "multi_thread")]
async fn open_directories_are_closed_at_start() {
    let mut env = Env::with_runtime(&runtimes()[0], json!({})).await;
    let config = env.shell("sleep 600", json!({})).await;
    let task = env.start(config).await;
    env.kill_plugin().await;
    let mut opened = 0;
    for top in ["run", "state"] {
        open_up(&env.dir.join(top), &mut opened);
    }
    assert!(opened > 10, "{opened}");
    // Files of a task may belong to another user than root, so the plugin leaves them as they are.
    let id = entries(&env.dir.join("run/bundles")).remove(0);
    let tmp = env.dir.join("run/bundles").join(&id).join("rootfs/tmp");
    let before = fs::metadata(&tmp).unwrap().mode();
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    assert_eq!(modes::open_to_others(&env), Vec::<String>::new());
    assert_eq!(fs::metadata(&tmp).unwrap().mode(), before);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// Sets the modes that the previous version gave to everything.
fn open_up(path: &Path, count: &mut usize) {
    for name in entries(path) {
        let path = path.join(name);
        let meta = fs::symlink_metadata(&path).unwrap();
        let is_containers =
            ["rootfs", "upper", "work", "mounts", "wrappers", "empty"].iter().any(|name| path.ends_with(name));
        if meta.is_dir() && !is_containers {
            open_up(&path, count);
        }
        let own = path.components().any(|part| ["tasks", "images"].iter().any(|name| part.as_os_str() == *name));
        if meta.is_dir() && !is_containers || meta.is_file() && own {
            fs::set_permissions(&path, fs::Permissions::from_mode(if meta.is_dir() { 0o711 } else { 0o644 })).unwrap();
            *count += 1;
        }
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o711)).unwrap();
}

/// A task can write its network files, but can't fill the host's run directory with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_hosts_file_is_the_tasks_own_and_bounded() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let script = "echo 127.0.0.9 added >>/etc/hosts && grep -c added /etc/hosts
            head -c 24000000 /dev/zero >>/etc/hosts || echo full
            head -c 24000000 /dev/zero >>/etc/resolv.conf || echo full; echo done; sleep 600";
        let config = env.shell(script, json!({})).await;
        let task = env.start(config).await;
        task.says("done").await;
        assert_eq!(task.stdout.text(), "1\nfull\nfull\ndone\n", "{runtime}");
        let used = disk_usage(&env);
        assert!(used < 8 << 20, "{runtime}: {used} bytes below the run directory");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

/// The size in bytes of the files below the run directory that are not in the task's own layers.
fn disk_usage(env: &Env) -> u64 {
    fn sum(path: &Path) -> u64 {
        let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
        if meta.is_dir() && !path.ends_with("rootfs") {
            entries(path).into_iter().map(|name| sum(&path.join(name))).sum()
        } else {
            meta.blocks() * 512
        }
    }
    sum(&env.dir.join("run"))
}
