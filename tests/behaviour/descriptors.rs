//! The plugin raises its own limit on descriptors. All processes that it starts have the limits that the plugin was
//! started with.

use std::{
    fs,
    process::{Command, Stdio},
};

use nomad_driver_shim::{host::PluginCommand, ids::random_hex};
use serde_json::json;

use crate::support::{Env, EnvOptions, Image, program, script, services, services::root};

/// The limits that the plugin is started with. They are far from the defaults of every distribution.
const SOFT: &str = "777";
const HARD: &str = "5555";

/// The plugin, started with these limits. util-linux's prlimit sets them and becomes the plugin.
fn limited() -> PluginCommand {
    let mut launch = PluginCommand::new("prlimit");
    let nofile = format!("--nofile={SOFT}:{HARD}");
    launch.args = [&nofile, program().to_str().unwrap(), "--name", "shim"].map(str::to_owned).to_vec();
    launch
}

/// The soft and the hard limit, from the lines of proc_pid_limits(5).
fn limits(text: &str) -> (String, String) {
    let line =
        text.lines().find(|line| line.starts_with("Max open files")).unwrap_or_else(|| panic!("no limit in {text}"));
    let mut words = line.split_ascii_whitespace().skip(3).map(str::to_owned);
    (words.next().unwrap(), words.next().unwrap())
}

fn original() -> (String, String) {
    (SOFT.to_owned(), HARD.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_shims_and_runtimes_have_the_limits_that_the_plugin_was_started_with() {
    for pool in [0, 1] {
        let programs = tempfile::tempdir_in(root()).unwrap();
        let mut runtimes = json!({});
        for name in ["crun", "runc"] {
            let real = nomad_driver_shim::process::which(name.as_ref()).unwrap();
            let seen = programs.path().join(format!("{name}.limits"));
            script(
                &programs.path().join(name),
                &format!("grep 'open files' /proc/self/limits >> {}\nexec {} \"$@\"", seen.display(), real.display()),
            );
            runtimes[name] = json!({"binary": programs.path().join(name)});
        }
        let config = json!({"shim": {"pool": pool}, "runtime": runtimes});
        let options = EnvOptions { config, driver: Some(limited()), ..EnvOptions::default() };
        let mut env = Env::with(options).await;
        let plugin = env.plugin().pid().unwrap();
        let own = limits(&fs::read_to_string(format!("/proc/{plugin}/limits")).unwrap());
        assert_eq!(own, (HARD.to_owned(), HARD.to_owned()), "the plugin has raised its own");
        for runtime in ["crun", "runc"] {
            let what = format!("{runtime}, a pool of {pool}");
            let config = json!({
                "image": env.busybox().await, "runtime": runtime, "command": "/bin/sh",
                "args": ["-c", "cat /proc/self/limits; echo end; sleep 600"],
            });
            let task = env.start(config).await;
            task.says("end").await;
            assert_eq!(limits(&task.stdout.text()), original(), "{what}: the task");
            let exec = env.exec_text(&task, "cat /proc/self/limits").await;
            let exec = limits(&exec);
            // Before 1.1.13, runc races with Go's start-up for the soft limit of an exec'd process
            // (opencontainers/runc#4195).
            assert_eq!(exec.1, HARD, "{what}: a process of exec");
            assert!(exec == original() || runtime == "runc", "{what}: a process of exec has {exec:?}");
            let (_, record) = env.record(&task).await;
            let shim = env.dir.join("run/shims").join(record["shim"].as_str().unwrap()).join("pid");
            let shim: serde_json::Value = serde_json::from_slice(&fs::read(shim).unwrap()).unwrap();
            let text = fs::read_to_string(format!("/proc/{}/limits", shim["pid"])).unwrap();
            // Go raises the soft limit of its own programs (src/os/rlimit.go), and before 1.19.9 that of their children
            // as well.
            assert_eq!(limits(&text).1, HARD, "{what}: the shim");
            env.destroy(&task).await.unwrap();
            let seen = fs::read_to_string(programs.path().join(format!("{runtime}.limits"))).unwrap();
            for line in seen.lines() {
                assert_eq!(limits(line).1, HARD, "{what}: a call of the runtime");
            }
            assert!(seen.lines().count() >= 3, "{what}: create, exec and delete: {seen}");
        }
        env.finish().await;
    }
}

/// The command line does not raise its own limit, and starts a plugin that raises the plugin's limit.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_of_run_have_the_limits_of_the_command_line() {
    let id = random_hex(4);
    let (dir, image) = (root().join(&id), Image::busybox().push(&services().registry, "test/busybox:1").await);
    for runtime in ["crun", "runc"] {
        let mut command = Command::new("prlimit");
        command
            .arg(format!("--nofile={SOFT}:{HARD}"))
            .arg(program())
            .args(["run", "--runtime", runtime, &image, "cat", "/proc/self/limits"])
            .env("NOMAD_DRIVER_SHIM_ADDRESS", &services().containerd)
            .env("NOMAD_DRIVER_SHIM_NAMESPACE", format!("test-{id}"))
            .env("NOMAD_DRIVER_SHIM_RUN_DIR", dir.join("run"))
            .env("NOMAD_DRIVER_SHIM_STATE_DIR", dir.join("state"))
            .stdin(Stdio::null());
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{runtime}: {said}");
        assert_eq!(limits(&String::from_utf8_lossy(&output.stdout)), original(), "{runtime}");
    }
}
