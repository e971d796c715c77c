//! `init = true`: the task's first process passes signals on to the command, reaps orphans, and ends with the command's
//! exit code, as docker's `--init`.

use std::{fs, time::Duration};

use nomad_driver_shim::pb::driver::Mount;
use serde_json::{Value, json};

use crate::support::{Entry, Env, Image, Layer, Packing, eventually, services, with_options};

const RUNTIMES: [&str; 2] = ["crun", "runc"];

async fn shell(env: &Env, runtime: &str, script: &str, options: Value) -> Value {
    with_options(env.shell(script, json!({"init": true, "runtime": runtime})).await, options)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_is_a_child_of_the_init() {
    let mut env = Env::configured(json!({"security": {"allow_host_namespaces": true}})).await;
    let script = "tr '\\0' ' ' < /proc/1/cmdline | cut -d' ' -f1-3; awk '/^PPid/ { print $2 }' /proc/$$/status; \
        ls -l /.nomad-init | cut -c1-10; echo x 2>/dev/null > /.nomad-init || echo read-only";
    for runtime in RUNTIMES {
        for (user, options) in [("", json!({})), ("1000", json!({"readonly_rootfs": true}))] {
            let mut task = env.prepare(shell(&env, runtime, script, options).await).await;
            user.clone_into(&mut task.config.user);
            env.try_start(&mut task).await.unwrap_or_else(|status| panic!("{runtime}: {}", status.message()));
            let (_, out, err) = env.finish_task(task).await;
            let lines: Vec<&str> = out.lines().collect();
            assert_eq!(lines[..2], ["/.nomad-init -- /bin/sh", "1"], "{runtime} {user}: {out}{err}");
            assert_eq!(lines[2..], ["-rwxr-xr-x", "read-only"], "{runtime} {user}: {out}{err}");
        }
        // In the host's PID namespace it is not process 1, and is the parent of orphans nevertheless.
        let script = "(sleep 5 & echo $! > /local/orphan); \
            for pid in $$ $(cat /local/orphan); do awk '/^PPid/ { print $2 }' /proc/$pid/status; done | uniq | wc -l; \
            exit 5";
        let (code, out, err) = env.run(shell(&env, runtime, script, json!({"pid_mode": "host"})).await).await;
        assert_eq!((code, out.as_str()), (5, "1\n"), "{runtime}: {err}");
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn orphans_are_reaped() {
    let mut env = Env::new().await;
    let zombies = "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l";
    let processes = "echo $(grep -l '^sleep' /proc/[0-9]*/cmdline | wc -l) $(grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l)";
    for runtime in RUNTIMES {
        for init in [true, false] {
            // `sleep` takes the shell's place and never reaps anything.
            let script = "(sleep 0.1 &); echo ready; exec sleep 600";
            let task = env.start(shell(&env, runtime, script, json!({"init": init})).await).await;
            task.says("ready").await;
            // What a session leaves behind is reaped as well.
            env.exec_text(&task, "(sleep 0 &); true").await;
            // Both orphans end at some time. Without the init they stay as zombies.
            let (probe, expected) = if init { (processes, "1 0\n") } else { (zombies, "2\n") };
            eventually("orphans", async || {
                let seen = env.exec_text(&task, probe).await;
                if seen == expected { Ok(()) } else { Err((runtime, init, seen)) }
            })
            .await;
            env.stop(&task, Duration::ZERO, "").await.unwrap();
            env.destroy(&task).await.unwrap();
        }
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exit_code_is_the_commands() {
    let mut env = Env::new().await;
    let script = Entry { mode: 0o755, ..Entry::file("bin/no-interpreter", "echo \"script $1\"; exit 4\n") };
    let script = Layer::new(&[script], Packing::None);
    let image = Image::busybox().with_layer(script).push(&services().registry, "test/init-codes:1").await;
    for runtime in RUNTIMES {
        for (command, args, code, said) in [
            ("/bin/sh", json!(["-c", "exit 7"]), 7, ""),
            ("sh", json!(["-c", "kill -TERM $$; sleep 60"]), 143, ""),
            ("sh", json!(["-c", "kill -KILL $$; sleep 60"]), 137, ""),
            ("echo", json!(["found in PATH"]), 0, "found in PATH\n"),
            ("no-interpreter", json!(["argument"]), 4, "script argument\n"),
            ("no-such-command", json!([]), 127, "init: exec no-such-command: not found\n"),
            ("/no/such/command", json!([]), 127, "init: exec /no/such/command: not found\n"),
            ("/etc/not-executable", json!([]), 126, "init: exec /etc/not-executable: permission denied\n"),
        ] {
            let config = json!({"image": image, "command": command, "args": args, "init": true, "runtime": runtime});
            let (seen, out, err) = env.run(config).await;
            assert_eq!((seen, out + &err), (code, said.to_owned()), "{runtime}: {command} {args}");
        }
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_reach_the_command() {
    let mut env = Env::new().await;
    for runtime in RUNTIMES {
        for (signal, number, name) in
            [("SIGUSR1", 10, "usr1"), ("SIGABRT", 6, "abrt"), ("SIGWINCH", 28, "winch"), ("SIGRTMIN+3", 37, "rt")]
        {
            let script = format!("trap 'echo {name}; exit 3' {number}; echo ready; while :; do sleep 0.02; done");
            let task = env.start(shell(&env, runtime, &script, json!({})).await).await;
            task.says("ready").await;
            env.signal(&task, signal).await.unwrap();
            let (code, out, _) = env.finish_task(task).await;
            assert_eq!((code, out), (3, format!("ready\n{name}\n")), "{runtime}: {signal}");
        }
        // A stop gives the command its time, and kills it afterwards.
        let script = "trap 'echo stopped; exit 9' TERM; echo ready; while :; do sleep 0.02; done";
        let task = env.start(shell(&env, runtime, script, json!({})).await).await;
        task.says("ready").await;
        env.stop(&task, Duration::from_secs(60), "").await.unwrap();
        let (code, out, _) = env.finish_task(task).await;
        assert_eq!((code, out.as_str()), (9, "ready\nstopped\n"), "{runtime}");
        let task = env.start(shell(&env, runtime, "trap '' TERM; echo ready; sleep 600", json!({})).await).await;
        task.says("ready").await;
        env.stop(&task, Duration::from_millis(100), "").await.unwrap();
        assert_eq!(env.finish_task(task).await.0, 137, "{runtime}");
    }
    env.finish().await;
}

/// The command's process group has the terminal, so that Ctrl-C reaches it and job control works.
#[tokio::test(flavor = "multi_thread")]
async fn the_command_has_the_terminal() {
    let mut env = Env::new().await;
    let script = "awk '{ print ($5 == $8) ? \"foreground\" : \"background\" }' /proc/$$/stat; tty; \
        [ $$ = \"$(awk '{ print $5 }' /proc/$$/stat)\" ] && echo leads its group";
    for runtime in RUNTIMES {
        let (code, out, _) = env.run(shell(&env, runtime, script, json!({"tty": true})).await).await;
        assert_eq!(
            (code, out.replace('\r', "").as_str()),
            (0, "foreground\n/dev/pts/0\nleads its group\n"),
            "{runtime}"
        );
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oom_kill_of_the_command_is_told() {
    let mut env = Env::new().await;
    for runtime in RUNTIMES {
        let script = "exec dd if=/dev/zero of=/dev/null bs=200M count=1";
        let mut task = env.prepare(shell(&env, runtime, script, json!({})).await).await;
        let resources = task.config.resources.as_mut().unwrap().allocated_resources.as_mut().unwrap();
        resources.memory.as_mut().unwrap().memory_mb = 20;
        env.try_start(&mut task).await.unwrap();
        let answer = env.try_wait(&task.id).await.unwrap();
        let result = answer.result.unwrap();
        assert_eq!((result.exit_code, result.oom_killed, answer.err.as_str()), (137, true, "OOM Killed"), "{runtime}");
        env.destroy(&task).await.unwrap();
    }
    env.finish().await;
}

/// The program is mounted from the state directory, where it can't be executed if that is mounted noexec.
#[tokio::test(flavor = "multi_thread")]
async fn a_state_directory_without_programs_is_named() {
    let mut env = Env::new().await;
    let place = env.dir.join("state/wrappers");
    fs::create_dir_all(&place).unwrap();
    fs::set_permissions(&place, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    services::run(
        std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "noexec,mode=700", "tmpfs"]).arg(&place),
    );
    let mut task = env.prepare(shell(&env, "crun", "true", json!({})).await).await;
    let refused = env.try_start(&mut task).await;
    services::run(std::process::Command::new("umount").arg(&place));
    let message = refused.expect_err("refused").message().to_owned();
    assert!(message.contains("init = true") && message.contains("noexec"), "{message}");
    assert_eq!(env.run(shell(&env, "crun", "exit 4", json!({})).await).await.0, 4);
    env.finish().await;
}

/// The program's file is the driver's own: it is made again where it was changed, and nothing else may be at its path.
#[tokio::test(flavor = "multi_thread")]
async fn the_program_is_always_the_drivers_own() {
    let mut env = Env::new().await;
    let file = env.dir.join("state/wrappers/init");
    for damage in ["missing", "changed"] {
        if damage == "changed" {
            fs::write(&file, "#!/bin/sh\necho not the init\n").unwrap();
        }
        assert_eq!(env.run(shell(&env, "crun", "exit 6", json!({})).await).await.0, 6, "{damage}");
    }
    let mut task = env.prepare(shell(&env, "crun", "true", json!({})).await).await;
    task.config.mounts = vec![Mount {
        host_path: env.dir.to_str().unwrap().to_owned(),
        task_path: "/.nomad-init".to_owned(),
        ..Mount::default()
    }];
    let refused = env.try_start(&mut task).await.expect_err("refused");
    assert!(refused.message().contains("init: target") && refused.message().contains("volume_mount of"), "{refused:?}");
    env.finish().await;
}
