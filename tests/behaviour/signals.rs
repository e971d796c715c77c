//! Every program that the plugin executes starts with default signal dispositions and an empty mask, whatever
//! dispositions and mask the plugin was started with.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use nomad_driver_shim::ids::random_hex;
use serde_json::json;

use crate::support::{Env, EnvOptions, Image, program, script, services, services::root, shell_in};

/// The lines of proc_pid_status(5) for the masks that execve(2) preserves, and for the one that it clears.
const LINES: &str = "^Sig(Blk|Ign|Cgt)";
const DEFAULTS: &str = "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\nSigCgt:\t0000000000000000\n";
/// SIGPIPE, which Rust's runtime ignores in every Rust program.
const SIGPIPE: u64 = 1 << 12;

/// Writes a program that starts the program under test with odd signal dispositions, as `nohup` and some init scripts
/// start an agent, and with worse ones.
fn odd_start() -> PathBuf {
    let dir = root().join(random_hex(4));
    fs::create_dir_all(&dir).unwrap();
    let path = dir.join("odd-start");
    let signals = "--ignore-signal=HUP,INT,PIPE,QUIT,CHLD,USR2,RTMIN --block-signal=USR1,TERM,RTMAX";
    script(&path, &format!("exec env {signals} \"$PROGRAM\" \"$@\""));
    path
}

/// Returns the masks of the signals that a process ignores and of those that it blocks.
fn ignored_and_blocked(pid: u32) -> (u64, u64) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
    };
    (of("SigIgn"), of("SigBlk"))
}

/// Returns the processes with this directory in their command line, and with this word unless it is empty.
fn processes(dir: &Path, word: &str) -> Vec<u32> {
    let dir = dir.to_str().unwrap();
    let of = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(dir) && line.contains(word)
    };
    nomad_driver_shim::process::all_pids().unwrap().into_iter().filter(of).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_and_exec_have_defaults_under_a_plugin_with_odd_ones() {
    for pool in [0, 1] {
        let hooked = root().join(random_hex(4));
        fs::create_dir_all(&hooked).unwrap();
        let hook = hooked.join("hook");
        script(&hook, &format!("exec cat /proc/self/status > {}/status", hooked.display()));
        let config = json!({"shim": {"pool": pool}, "hooks": {"create_runtime": [hook.to_str().unwrap()]}});
        let options = EnvOptions { config, wrapper: Some(odd_start()), ..EnvOptions::default() };
        let mut env = Env::with(options).await;
        let (ignored, blocked) = ignored_and_blocked(env.plugin().pid().unwrap());
        assert_eq!(ignored & 1, 1, "the plugin ignores SIGHUP as it was started to");
        assert_eq!(blocked, 0, "the plugin can be asked to leave by SIGTERM");
        for runtime in ["crun", "runc"] {
            let image = env.busybox().await;
            let show = json!({
                "image": image, "runtime": runtime, "command": "/bin/grep", "args": ["-E", LINES, "/proc/self/status"],
            });
            let (code, out, _) = env.run(show).await;
            assert_eq!((code, out.as_str()), (0, DEFAULTS), "{runtime}, a pool of {pool}: the task");
            let hook = fs::read_to_string(hooked.join("status")).unwrap();
            assert!(hook.contains("SigIgn:\t0000000000000000\n"), "{runtime}: its hook has {hook}");
            // crun itself blocks signals while hooks run (containers/crun src/libcrun/container.c, `block_signals`).
            let blocks_none = hook.contains("SigBlk:\t0000000000000000\n");
            assert!(blocks_none || runtime == "crun", "{runtime}: its hook has {hook}");
            let sleeps = json!({"image": image, "runtime": runtime, "command": "/bin/sh", "args": ["-c", "sleep 600"]});
            let task = env.start(sleeps).await;
            let answer = env.exec(&task, &["/bin/grep", "-E", LINES, "/proc/self/status"], 0).await.unwrap();
            assert_eq!(String::from_utf8(answer.stdout).unwrap(), DEFAULTS, "{runtime}, a pool of {pool}: exec");
            for shim in processes(&env.dir, "containerd-shim") {
                assert_eq!(ignored_and_blocked(shim).0 & !SIGPIPE, 0, "a shim");
            }
            env.destroy(&task).await.unwrap();
        }
        env.finish().await;
        fs::remove_dir_all(hooked).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_writer_and_its_keeper_have_defaults_too() {
    let config = json!({"disable_log_collection": true});
    let options = EnvOptions { config, wrapper: Some(odd_start()), ..EnvOptions::default() };
    let mut env = Env::with(options).await;
    let image = env.busybox().await;
    let task = env.start(shell_in(&image, "sleep 600")).await;
    crate::support::eventually("keeper and writer", async || {
        let found = processes(&env.dir, "log-writer");
        if found.len() == 2 { Ok(()) } else { Err(found) }
    })
    .await;
    for process in processes(&env.dir, "log-writer") {
        let (ignored, blocked) = ignored_and_blocked(process);
        assert_eq!((ignored & !SIGPIPE, blocked), (0, 0));
    }
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// The driver's command line starts the plugin here. A shell or a script may have started the command line in any way,
/// and posix_spawn leaves signal 32 ignored in the plugin.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_of_run_have_defaults() {
    let id = random_hex(4);
    let (dir, image) = (root().join(&id), Image::busybox().push(&services().registry, "test/busybox:1").await);
    for started in [program(), odd_start()] {
        for runtime in ["crun", "runc"] {
            let mut command = Command::new(&started);
            command
                .args(["run", "--runtime", runtime, &image, "grep", "-E", LINES, "/proc/self/status"])
                .env("PROGRAM", program())
                .env("NOMAD_DRIVER_SHIM_ADDRESS", &services().containerd)
                .env("NOMAD_DRIVER_SHIM_NAMESPACE", format!("signals-{id}"))
                .env("NOMAD_DRIVER_SHIM_RUN_DIR", dir.join("run"))
                .env("NOMAD_DRIVER_SHIM_STATE_DIR", dir.join("state"));
            let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(String::from_utf8_lossy(&output.stdout), DEFAULTS, "{runtime} by {}: {said}", started.display());
        }
    }
}
