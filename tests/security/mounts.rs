//! Mounts: whatever obstacles a task, another task of its allocation or an image puts in the way, nothing of the host
//! appears in a container and nothing of a container appears on the host.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use nomad_driver_shim::pb::driver::Mount;
use serde_json::{Value, json};

use crate::{
    runtimes,
    support::{Env, Task, eventually, services::run},
};

/// A file of the host that no task may see, in a separate directory.
struct Secret(PathBuf);

impl Secret {
    fn new(env: &Env) -> Self {
        let dir = env.dir.join("of-the-host");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("secret"), "HOST-SECRET").unwrap();
        Self(dir)
    }

    /// Fails if the directory has further files, or if the secret has changed.
    fn is_untouched(&self) {
        assert_eq!(fs::read_to_string(self.0.join("secret")).unwrap(), "HOST-SECRET");
        assert_eq!(fs::read_dir(&self.0).unwrap().count(), 1, "{:?}", crate::support::leak::entries(&self.0));
    }
}

fn volume(host: &Path, target: &str, readonly: bool, propagation: &str) -> Mount {
    Mount {
        host_path: host.to_str().unwrap().to_owned(),
        task_path: target.to_owned(),
        readonly,
        propagation_mode: propagation.to_owned(),
        ..Mount::default()
    }
}

/// Starts a task whose start may be refused. Returns its output, or the error text.
async fn outcome(env: &Env, mut task: Task) -> Result<String, String> {
    match env.try_start(&mut task).await {
        Ok(()) => {
            let (_, out, err) = env.finish_task(task).await;
            Ok(out + &err)
        }
        Err(status) => Err(status.message().to_owned()),
    }
}

/// A task with disabled logs replaces the log directory with a link to a directory of the host.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_in_place_of_the_logs_leads_nowhere() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({"disable_log_collection": true})).await;
        let secret = Secret::new(&env);
        // With a link to the root, crun mounted the host's root over the container's, and the host's path led to the
        // secret.
        let look = format!("grep -q HOST-SECRET /alloc/logs/secret {}/secret && exit 42; exit 0", secret.0.display());
        for leads_to in [Path::new("/"), Path::new("/etc"), &secret.0] {
            let options = env.shell(&look, json!({})).await;
            // The link exists before the task starts, as if another task of the group had made it.
            let mut task = env.prepare(options).await;
            let logs = task.dirs.alloc_dir.join("alloc/logs");
            fs::rename(&logs, task.dirs.alloc_dir.join("alloc/old")).unwrap();
            symlink(leads_to, &logs).unwrap();
            let seen = env.try_start(&mut task).await;
            if seen.is_ok() {
                let code = env.wait(&task).await.exit_code;
                panic!("{runtime}: {leads_to:?} was mounted; exit code {code} (42: the task has read the host's file)");
            }
            secret.is_untouched();
            let refused = seen.unwrap_err().message().to_owned();
            assert!(refused.contains("alloc/logs") && refused.contains("symbolic link"), "{runtime}: {refused}");
        }
        env.finish().await;
    }
}

/// The same attack, but the first task, whose logs are disabled, makes the link itself.
#[tokio::test(flavor = "multi_thread")]
async fn no_task_moves_the_directory_of_the_logs() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({"disable_log_collection": true})).await;
        let secret = Secret::new(&env);
        let script =
            format!("mv /alloc/logs /alloc/old && ln -s {} /alloc/logs; ls -ld /alloc/logs", secret.0.display());
        let options = env.shell(&script, json!({})).await;
        let mut task = env.prepare(options).await;
        // The value that Nomad sends for `logs { disabled = true }`.
        (task.config.stdout_path, task.config.stderr_path) = ("/dev/null".to_owned(), "/dev/null".to_owned());
        env.try_start(&mut task).await.unwrap();
        env.wait(&task).await;
        let logs = task.dirs.alloc_dir.join("alloc/logs");
        assert!(fs::symlink_metadata(&logs).unwrap().is_dir(), "{runtime}: the task has put a link there");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

/// The directories that Nomad makes are replaced by links, with and without logs that the driver writes.
#[tokio::test(flavor = "multi_thread")]
async fn links_in_place_of_nomads_directories_are_refused() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let secret = Secret::new(&env);
        for directory in ["web/local", "web/secrets", "alloc"] {
            let options = env.shell("cat /local/secret /secrets/secret /alloc/secret", json!({})).await;
            let task = env.prepare(options).await;
            let path = task.dirs.alloc_dir.join(directory);
            let moved = task.dirs.alloc_dir.join("moved");
            fs::rename(&path, &moved).unwrap();
            symlink(&secret.0, &path).unwrap();
            let seen = outcome(&env, task).await;
            // The log FIFOs lie in `alloc`.
            let refused = seen.expect_err("the link was followed");
            assert!(refused.contains(directory) && refused.contains("symbolic link"), "{runtime}: {refused}");
            fs::remove_file(&path).unwrap();
            fs::rename(&moved, &path).unwrap();
        }
        secret.is_untouched();
        env.finish().await;
    }
}

/// Targets of a job's own mounts and of volumes, in a directory where another task makes links.
#[tokio::test(flavor = "multi_thread")]
async fn targets_below_a_bind_are_not_reached_through_links() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let secret = Secret::new(&env);
        let tmpfs = json!([{"type": "tmpfs", "target": "/alloc/data/cache", "options": ["size=1m"]}]);
        let bind =
            json!([{"type": "bind", "source": "local", "target": "/alloc/data/cache", "options": ["rbind", "rw"]}]);
        for mounts in [tmpfs, bind] {
            for leads_to in [secret.0.to_str().unwrap(), "/", "/etc", "../../web/secrets"] {
                let script = "ls -ld /alloc/data/cache; cat /secret; grep -c ' / / ' /proc/self/mountinfo";
                let options = env.shell(script, json!({"mounts": mounts})).await;
                let task = env.prepare(options).await;
                symlink(leads_to, task.dirs.alloc_dir.join("alloc/data/cache")).unwrap();
                let refused = outcome(&env, task).await.expect_err("the link was followed");
                assert!(refused.contains("/alloc/data/cache") && refused.contains("link"), "{runtime}: {refused}");
            }
        }
        let place = env.dir.join("volume");
        fs::create_dir_all(&place).unwrap();
        let mut task = env.prepare(env.shell("cat /alloc/data/v/*", json!({})).await).await;
        symlink("/etc", task.dirs.alloc_dir.join("alloc/data/v")).unwrap();
        task.config.mounts = vec![volume(&place, "/alloc/data/v", false, "private")];
        let refused = outcome(&env, task).await.expect_err("the link was followed");
        assert!(refused.contains("volume_mount") && refused.contains("link"), "{runtime}: {refused}");
        secret.is_untouched();
        env.finish().await;
    }
}

/// A job's own mount at the place of the logs hides them from the task, and gives no way to write to them.
#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_mount_over_the_logs_does_not_open_them() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({"disable_log_collection": true})).await;
        let bind =
            |source: &str, target: &str| json!({"type": "bind", "source": source, "target": target, "options": ["rw"]});
        for (mounts, place, is_written) in [
            (json!([bind("alloc/logs", "/alloc/logs")]), "/alloc/logs", false),
            (json!([bind("local", "/alloc/logs")]), "/alloc/logs", true),
            (json!([bind("alloc", "/x"), bind("local", "/x/logs")]), "/x/logs", true),
            (json!([bind("alloc", "/x"), bind("alloc/logs", "/x/logs")]), "/x/logs", false),
        ] {
            let script = format!("echo x 2>/dev/null >{place}/planted; exit 0");
            let task = env.start(env.shell(&script, json!({"mounts": mounts})).await).await;
            let alloc_dir = task.dirs.alloc_dir.clone();
            env.wait(&task).await;
            env.destroy(&task).await.unwrap();
            assert!(!alloc_dir.join("alloc/logs/planted").exists(), "{runtime}: {mounts}");
            assert_eq!(alloc_dir.join("web/local/planted").exists(), is_written, "{runtime}: {mounts}");
        }
        env.finish().await;
    }
}

/// Legitimate uses of such mounts work: below Nomad's directories, below a volume, one mount in another, files and
/// directories.
#[tokio::test(flavor = "multi_thread")]
async fn mounts_in_mounts_are_there_and_leave_nothing() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let place = env.dir.join("volume");
        fs::create_dir_all(place.join("there")).unwrap();
        fs::write(place.join("file"), "of the volume").unwrap();
        let mounts = json!([
            {"type": "tmpfs", "target": "/data/there/cache", "options": ["size=1m", "noexec"]},
            {"type": "bind", "source": "local/conf", "target": "/data/conf", "options": ["ro"]},
            {"type": "bind", "source": "alloc/data", "target": "/local/shared", "options": ["rbind", "rw"]},
            {"type": "bind", "source": "local/deep", "target": "/data/there/cache/deep/er", "options": ["rbind", "rw"]},
        ]);
        let script = "cat /data/file /data/conf; echo x >/data/conf; echo a >/local/shared/a; echo b >/data/there/cache/b
            cat /data/there/cache/deep/er/of; grep ' /data/there/cache ' /proc/self/mountinfo | grep -c noexec; ls /data";
        let options = env.shell(script, json!({"mounts": mounts})).await;
        let mut task = env.prepare(options).await;
        let local = task.dirs.alloc_dir.join("web/local");
        fs::write(local.join("conf"), "configuration\n").unwrap();
        fs::create_dir(local.join("deep")).unwrap();
        fs::write(local.join("deep/of"), "deep\n").unwrap();
        task.config.mounts = vec![volume(&place, "/data", false, "private")];
        env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{runtime}: {}", status.message()));
        no_mounts_stay(&env, &task).await;
        let alloc_dir = task.dirs.alloc_dir.clone();
        let (_, out, err) = env.finish_task(task).await;
        assert_eq!(out, "of the volumeconfiguration\ndeep\n1\nconf\nfile\nthere\n", "{runtime}: {err}");
        assert!(err.contains("Read-only file system"), "{runtime}: {err}");
        assert_eq!(fs::read_to_string(alloc_dir.join("alloc/data/a")).unwrap(), "a\n");
        // Mount points stay, as runtimes make them; files that were written to the file system in memory do not.
        assert!(!place.join("there/cache/b").exists() && place.join("there/cache").is_dir());
        env.finish().await;
    }
}

/// Soon after a task's start, none of its mounts is left on the host, where a mount would keep directories busy.
async fn no_mounts_stay(env: &Env, task: &Task) {
    eventually("the task's mounts are the container's alone", async || {
        let mounts = mounts_of_the_host(env, task);
        if mounts.is_empty() { Ok(()) } else { Err(mounts) }
    })
    .await;
}

/// The same for a task whose plugin died directly after the task's start.
#[tokio::test(flavor = "multi_thread")]
async fn mounts_of_a_dead_plugins_task_go_with_its_recovery() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        env.set_var("NOMAD_DRIVER_SHIM_KILL_AT", Some("start.recorded"));
        env.kill_plugin().await;
        env.start_plugin().await;
        let options = env.shell("sleep 600", json!({})).await;
        let mut task = env.prepare(options).await;
        env.try_start(&mut task).await.expect_err("the plugin survives its end");
        env.plugin_died().await;
        assert_ne!(mounts_of_the_host(&env, &task), Vec::<String>::new(), "{runtime}");
        env.set_var("NOMAD_DRIVER_SHIM_KILL_AT", None);
        env.start_plugin().await;
        no_mounts_stay(&env, &task).await;
        env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{runtime}: {}", status.message()));
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

/// An attempt that follows another one at once has its mounts: no deferred cleanup of an earlier attempt unmounts them.
#[tokio::test(flavor = "multi_thread")]
async fn attempts_in_quick_succession_have_their_mounts() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let options = env
            .shell("grep -c ' /local ' /proc/self/mountinfo; cat /etc/hosts | grep -c localhost; sleep 600", json!({}))
            .await;
        let mut task = env.prepare(options).await;
        for _ in 0..20 {
            env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{runtime}: {}", status.message()));
            env.destroy(&task).await.unwrap();
        }
        env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{runtime}: {}", status.message()));
        no_mounts_stay(&env, &task).await;
        assert_eq!(env.exec_text(&task, "grep -c ' /local ' /proc/1/mountinfo").await, "1\n", "{runtime}");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

/// The mounts on the host that belong to this task, without its root file system.
fn mounts_of_the_host(env: &Env, task: &Task) -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let dirs = [env.dir.join("run/bundles"), task.dirs.alloc_dir.clone(), env.dir.join("volume")];
    let has = |line: &&str| dirs.iter().any(|dir| line.split(' ').nth(4).unwrap().starts_with(dir.to_str().unwrap()));
    text.lines().filter(has).filter(|line| !line.contains("/rootfs ")).map(str::to_owned).collect()
}

/// The host's mounts below a read-only volume are read-only as well.
#[tokio::test(flavor = "multi_thread")]
async fn read_only_holds_for_the_mounts_below() {
    for runtime in runtimes() {
        let config = json!({"security": {"allow_paths": ["/"]}});
        let mut env = Env::with_runtime(&runtime, config).await;
        let place = env.dir.join("volume");
        let below = place.join("below/deeper");
        fs::create_dir_all(&below).unwrap();
        run(std::process::Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&below));
        let script = "for d in /v /v/below /v/below/deeper /m/below/deeper /w/below/deeper
            do echo x 2>/dev/null >$d/f && echo written to $d; done; true";
        let mounts = json!([{"type": "bind", "source": place, "target": "/m", "options": ["rbind", "ro"]},
            {"type": "bind", "source": place, "target": "/w", "options": ["rbind", "rw"]}]);
        let mut task = env.prepare(env.shell(script, json!({"mounts": mounts})).await).await;
        task.config.mounts = vec![volume(&place, "/v", true, "private")];
        let seen = outcome(&env, task).await;
        run(std::process::Command::new("umount").arg(&below));
        assert_eq!(seen.unwrap(), "written to /w/below/deeper\n", "{runtime}");
        env.finish().await;
    }
}

/// A mount that a task makes in a shared volume reaches the host, also where the volume lies below another mount (as
/// Nomad mounts the directories of CSI plugins). A mount that the host makes there reaches the task.
#[tokio::test(flavor = "multi_thread")]
async fn volumes_spread_mounts_as_they_say() {
    for runtime in runtimes() {
        let config = json!({"allow_privileged": true});
        let mut env = Env::with_runtime(&runtime, config).await;
        let place = env.dir.join("csi");
        fs::create_dir_all(place.join("theirs")).unwrap();
        fs::create_dir_all(place.join("ours")).unwrap();
        // A shared mount, as systemd makes it. A volume must be shared to propagate mounts.
        run(std::process::Command::new("mount").arg("--bind").arg(&place).arg(&place));
        run(std::process::Command::new("mount").arg("--make-shared").arg(&place));
        let script = "mount -t tmpfs tmpfs /local/csi/ours && echo mounted
            while ! grep -q ' /local/csi/theirs ' /proc/self/mountinfo; do sleep 0.05; done; echo seen; sleep 600";
        let mut task = env.prepare(env.shell(script, json!({"privileged": true})).await).await;
        task.config.mounts = vec![volume(&place, "/local/csi", false, "bidirectional")];
        env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{runtime}: {}", status.message()));
        task.says("mounted").await;
        let is_mounted = |path: PathBuf| {
            let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
            text.lines().any(|line| line.split(' ').nth(4) == path.to_str())
        };
        eventually("the task's mount is the host's", async || {
            if is_mounted(place.join("ours")) { Ok(()) } else { Err("not there") }
        })
        .await;
        run(std::process::Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(place.join("theirs")));
        task.says("seen").await;
        env.destroy(&task).await.unwrap();
        for mount in ["ours", "theirs", ""] {
            run(std::process::Command::new("umount").arg(place.join(mount)));
        }
        env.finish().await;
    }
}

/// The runtime never gets a path that a task can change: all binds of every kind of task have their source in the
/// bundle.
#[tokio::test(flavor = "multi_thread")]
async fn every_bind_comes_from_the_bundle() {
    for runtime in runtimes() {
        let config = json!({
            "disable_log_collection": true, "allow_privileged": true,
            "security": {"allow_host_namespaces": true, "allow_paths": ["/var"], "allow_devices": ["/dev/null"]},
        });
        let mut env = Env::with_runtime(&runtime, config).await;
        let place = env.dir.join("volume");
        fs::create_dir_all(&place).unwrap();
        let own = json!([
            {"type": "bind", "source": "alloc/data", "target": "/a", "options": ["bind", "ro"]},
            {"type": "volume", "source": place, "target": "/b"},
            {"type": "tmpfs", "target": "/b/c"},
            {"type": "tmpfs", "target": "/d"},
        ]);
        let shapes = [
            json!({}),
            json!({"mounts": own}),
            json!({"host_network": true}),
            json!({"host_network": true, "extra_hosts": ["a:127.0.0.9"]}),
            json!({"host_dns": false}),
            json!({"ipc_mode": "host", "pid_mode": "host", "uts_mode": "host"}),
            json!({"privileged": true}),
            json!({"readonly_rootfs": true, "tty": true}),
            json!({"devices": ["/dev/null"]}),
        ];
        let mut binds = 0;
        for shape in shapes {
            let mut task = env.prepare(env.shell("sleep 600", shape.clone()).await).await;
            task.config.mounts =
                vec![volume(&place, "/v", true, "private"), volume(&place, "/alloc/v", false, "host-to-task")];
            env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{runtime} {shape}: {}", status.message()));
            let bundle = env.dir.join("run/bundles").join(env.attribute(&task, "container_id").await);
            let spec: Value = serde_json::from_slice(&fs::read(bundle.join("config.json")).unwrap()).unwrap();
            for mount in spec["mounts"].as_array().unwrap() {
                let is_bind = |option: &Value| option == "bind" || option == "rbind";
                if mount["type"] == "bind" || mount["options"].as_array().into_iter().flatten().any(is_bind) {
                    let source = Path::new(mount["source"].as_str().unwrap());
                    assert!(source.starts_with(bundle.join("mounts")), "{runtime} {shape}: {mount}");
                    binds += 1;
                }
            }
            env.destroy(&task).await.unwrap();
        }
        assert!(binds > 30, "{binds}");
        env.finish().await;
    }
}

/// No mount hides /proc or /sys, whether a job's mounts, a volume or one of Nomad's variables names the target.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_mounted_over_proc_and_sys() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        for target in [
            "/proc",
            "/proc/sys",
            "/proc/self/attr",
            "/proc/1",
            "//proc/./sys",
            "/sys",
            "/sys/kernel",
            "/.",
            "/dev",
            "/dev/null",
        ] {
            for mount in [
                json!({"type": "tmpfs", "target": target}),
                json!({"type": "bind", "source": "alloc/data", "target": target, "options": ["rbind", "rw"]}),
            ] {
                let options = env.shell("mount", json!({"mounts": [mount]})).await;
                let refused = {
                    let task = env.prepare(options).await;
                    outcome(&env, task).await
                }
                .expect_err("it was mounted");
                assert!(refused.contains("target"), "{runtime} {target}: {refused}");
            }
        }
        for (variable, target) in [
            ("NOMAD_TASK_DIR", "/proc"),
            ("NOMAD_TASK_DIR", "/sys"),
            ("NOMAD_ALLOC_DIR", "/"),
            ("NOMAD_SECRETS_DIR", "/../../x"),
            ("NOMAD_SECRETS_DIR", "relative"),
        ] {
            let mut task = env.prepare(env.shell("mount", json!({})).await).await;
            task.config.env.insert(variable.to_owned(), target.to_owned());
            let refused = outcome(&env, task).await.expect_err("it was mounted");
            assert!(refused.contains(variable) && refused.contains("target"), "{runtime} {target}: {refused}");
        }
        let mut task = env.prepare(env.shell("mount", json!({})).await).await;
        task.config.mounts = vec![volume(Path::new("/var"), "/proc/sys", true, "private")];
        let refused = outcome(&env, task).await.expect_err("it was mounted");
        assert!(refused.contains("volume_mount"), "{runtime}: {refused}");
        env.finish().await;
    }
}

/// CSI plugins get the host's /dev. No other directory may be mounted in its place, since runc uses its /dev/null for
/// masks.
#[tokio::test(flavor = "multi_thread")]
async fn only_the_hosts_own_dev_is_mounted_at_dev() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let mut task = env.prepare(env.shell("[ -c /dev/null ] && echo right", json!({})).await).await;
        task.config.mounts = vec![volume(Path::new("/dev"), "/dev", false, "private")];
        assert_eq!(outcome(&env, task).await.unwrap(), "right\n", "{runtime}");
        let place = env.dir.join("volume");
        fs::create_dir_all(&place).unwrap();
        symlink("/proc/timer_list", place.join("null")).unwrap();
        let mut task = env.prepare(env.shell("cat /proc/timer_list /proc/keys", json!({})).await).await;
        task.config.mounts = vec![volume(&place, "/dev", false, "private")];
        let refused = outcome(&env, task).await.expect_err("it was mounted");
        assert!(refused.contains("may mount over /dev"), "{runtime}: {refused}");
        env.finish().await;
    }
}

/// A job's own binds could also lead to the log directory.
#[tokio::test(flavor = "multi_thread")]
async fn logs_are_out_of_reach_of_a_jobs_own_binds() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({"disable_log_collection": true})).await;
        for (source, path, variable) in
            [("alloc/logs", "/x", "/alloc"), ("alloc", "/x/logs", "/alloc"), ("alloc", "/x/logs", "")]
        {
            let script = format!("echo forged >{path}/other.stdout.0; mv {path} /x/old; mv {path} /x/data/old; true");
            let mounts = json!([{"type": "bind", "source": source, "target": "/x", "options": ["rbind", "rw"]}]);
            let mut task = env.prepare(env.shell(&script, json!({"mounts": mounts})).await).await;
            task.config.env.insert("NOMAD_ALLOC_DIR".to_owned(), variable.to_owned());
            (task.config.stdout_path, task.config.stderr_path) = ("/dev/null".to_owned(), "/dev/null".to_owned());
            let logs = task.dirs.alloc_dir.join("alloc/logs");
            env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{source}: {}", status.message()));
            env.wait(&task).await;
            assert!(logs.is_dir() && !logs.join("other.stdout.0").exists(), "{runtime}: {source}, {variable:?}");
            env.destroy(&task).await.unwrap();
        }
        env.finish().await;
    }
}

/// A mount below a read-only mount that lacks the mount point is made all the same, and the rest stays read-only.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_mount_holds_other_mounts() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let mounts = json!([
            {"type": "bind", "source": "local/d", "target": "/app", "options": ["rbind", "ro"]},
            {"type": "tmpfs", "target": "/app/cache"},
            {"type": "bind", "source": "local/f", "target": "/app/conf.yml", "options": ["ro"]},
            {"type": "bind", "source": "local/etc", "target": "/etc", "options": ["rbind", "ro"]},
        ]);
        let script =
            "echo x >/app/cache/y && cat /app/conf.yml && grep -c localhost /etc/hosts; echo x >/app/z; echo x >/etc/z";
        let mut task = env.prepare(env.shell(script, json!({"mounts": mounts})).await).await;
        let local = task.dirs.alloc_dir.join("web/local");
        fs::create_dir_all(local.join("d")).unwrap();
        fs::create_dir_all(local.join("etc")).unwrap();
        fs::write(local.join("f"), "conf\n").unwrap();
        // A destination that runtimes normalize.
        let place = env.dir.join("volume");
        fs::create_dir_all(&place).unwrap();
        task.config.mounts = vec![volume(&place, "a/../app/volume", true, "private")];
        let seen = outcome(&env, task).await.unwrap();
        assert!(seen.starts_with("conf\n2\n") && seen.matches("Read-only").count() == 2, "{runtime}: {seen}");
        env.finish().await;
    }
}
