//! Processes in a running task: script checks (ExecTask) and `nomad alloc exec` (ExecTaskStreaming). The conformance
//! suite has the cases of Nomad's own harness.

use std::time::Duration;

use serde_json::json;

use crate::support::{Env, Task, eventually, exec::Outcome};

const SH: [&str; 2] = ["/bin/sh", "-c"];

async fn session(env: &Env, task: &Task, script: &str, tty: bool) -> Outcome {
    env.talk(task, &[SH[0], SH[1], script], tty).await.unwrap().end().await
}

/// Pids on the host of the processes whose command line contains `mark`.
fn alive(mark: &str) -> Vec<i32> {
    let pids = crate::support::leak::entries(std::path::Path::new("/proc"));
    pids.into_iter()
        .filter_map(|pid| pid.parse::<i32>().ok())
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(mark)
        })
        .collect()
}

/// An exec'd process has the same privileges as its task, and is in the same cgroup.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_execd_is_as_confined_as_the_task() {
    let mut env = Env::new().await;
    // An exec'd process gets its OOM score a moment after its start.
    let look = "grep -E '^(Seccomp|NoNewPrivs|Cap...|Uid|Gid|Groups):' /proc/self/status; cat /proc/self/cgroup; \
                sleep 1; cat /proc/self/oom_score_adj; pwd; id; ulimit -n; echo $MARK-$FROM_IMAGE";
    let mut task = env
        .prepare(json!({
            "image": env.busybox().await, "command": "/bin/sh", "args": ["-c", format!("{look}; echo done; sleep 600")],
            "cwd": "/tmp", "cap_drop": ["CHOWN"],
        }))
        .await;
    task.config.user = "user".to_owned();
    task.config.env.insert("MARK".to_owned(), "from job".to_owned());
    env.try_start(&mut task).await.unwrap();
    task.says("done").await;
    let own = task.stdout.text().replace("done\n", "");
    assert!(own.contains("uid=1000(user)") && own.contains("from job-yes"), "{own}");
    assert_eq!(env.exec_text(&task, look).await, own);
    let streamed = session(&env, &task, look, false).await;
    assert_eq!(streamed.stdout, own);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// crun gives a process's standard streams to its user. If one of them were the host's /dev/null, the user could then
/// change its mode.
#[tokio::test(flavor = "multi_thread")]
async fn a_script_check_does_not_become_the_owner_of_the_hosts_null_device() {
    for runtime in ["crun", "runc"] {
        let mut env = Env::with_runtime(runtime, json!({})).await;
        let config = env.shell("sleep 600", json!({})).await;
        let mut task = env.prepare(config).await;
        "1000:1001".clone_into(&mut task.config.user);
        env.try_start(&mut task).await.unwrap();
        let look = "stat -L -c '%F %u' /proc/self/fd/0; cat";
        assert_eq!(env.exec_text(&task, look).await, "fifo 1000\n", "{runtime}: an input without content");
        let null = std::fs::metadata("/dev/null").unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&null), 0, "{runtime}");
        env.destroy(&task).await.unwrap();
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn script_checks_get_output_and_code_and_are_killed_in_time() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let answer = env.exec(&task, &[SH[0], SH[1], "echo out; echo err >&2; exit 1"], 0).await.unwrap();
    assert_eq!((&answer.stdout[..], &answer.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(answer.result.unwrap().exit_code, 1);

    let mark = format!("sleep 4321{}", std::process::id());
    let error = env.exec(&task, &[SH[0], SH[1], &format!("{mark} & {mark}")], 300).await.unwrap_err();
    assert!(error.message().contains("did not end within 300ms"), "{error:?}");
    eventually("the killed command and its child are gone", async || {
        let left = alive(&mark);
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;

    // Of a large output, the answer has only the last bytes.
    let answer = env.exec(&task, &[SH[0], SH[1], "yes | head -c 3000000; echo; echo the end"], 0).await.unwrap();
    assert!(answer.stdout.len() <= 1 << 20 && answer.stdout.ends_with(b"the end\n"), "{}", answer.stdout.len());
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_large_output_is_lost() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    for round in 0..5 {
        let seen = session(&env, &task, "seq 1 50000; echo last", false).await;
        let mut expected: String = (1..=50_000).map(|n| format!("{n}\n")).collect();
        expected.push_str("last\n");
        assert!(seen.stdout == expected, "round {round}: {} of {} bytes", seen.stdout.len(), expected.len());
        assert_eq!(seen.code, Some(0));
    }
    for _ in 0..30 {
        let seen = session(&env, &task, "echo one; echo last", true).await;
        assert_eq!(seen.stdout, "one\r\nlast\r\n");
    }
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_its_processes_along() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let mark = format!("sleep 5432{}", std::process::id());
    for tty in [false, true] {
        let mut talk = env.talk(&task, &[SH[0], SH[1], &format!("echo up; {mark} & {mark}; true")], tty).await.unwrap();
        talk.until(&mut Outcome::default(), |seen| seen.stdout.contains("up")).await;
        assert!(!alive(&mark).is_empty());
        drop(talk);
        eventually("nothing of it is left", async || {
            let left = alive(&mark);
            if left.is_empty() { Ok(()) } else { Err(left) }
        })
        .await;
    }
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_harms_nobody() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let talk = env.talk(&task, &["yes"], false).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(env.exec_text(&task, "echo fine").await, "fine\n");
    let memory = crate::support::resident(env.plugin().pid().unwrap());
    assert!(memory < 200 << 20, "the plugin has {memory} bytes");
    drop(talk);
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_run_is_refused_with_a_reason() {
    let mut env = Env::new().await;
    let task = env.sh("trap 'exit 0' TERM; while :; do sleep 0.05; done").await;
    let error = env.exec(&task, &["/no/such"], 0).await.unwrap_err();
    assert!(error.message().contains("/no/such"), "{error:?}");
    for (command, code) in [("/no/such", 127), ("/etc/not-executable", 126)] {
        for tty in [false, true] {
            let refused = env.talk(&task, &[command], tty).await.unwrap().end().await;
            let (said, silent) =
                if tty { (&refused.stdout, &refused.stderr) } else { (&refused.stderr, &refused.stdout) };
            assert!(said.contains(command) && said.ends_with('\n') && silent.is_empty(), "{refused:?}");
            assert_eq!((refused.code, refused.closed), (Some(code), (true, !tty)), "{command}");
        }
    }
    let error = env.exec(&task, &[], 0).await.unwrap_err();
    assert!(error.message().contains("empty"), "{error:?}");
    env.stop(&task, Duration::from_secs(30), "").await.unwrap();
    let error = env.exec(&task, &["true"], 0).await.unwrap_err();
    assert!(error.message().contains("has ended"), "{error:?}");
    env.destroy(&task).await.unwrap();
    let error = env.exec(&task, &["true"], 0).await.unwrap_err();
    assert!(error.message().contains("not found"), "{error:?}");
    let Err(error) = env.talk(&task, &["true"], false).await else { panic!("the task is gone") };
    assert!(error.message().contains("not found"), "{error:?}");
    env.finish().await;
}

/// A dead plugin leaves the exec'd processes of its clients to the next plugin, which ends them.
#[tokio::test(flavor = "multi_thread")]
async fn execs_of_a_dead_plugin_are_ended() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let mark = format!("sleep 6543{}", std::process::id());
    let mut talk = env.talk(&task, &[SH[0], SH[1], &format!("echo up; {mark}; true")], false).await.unwrap();
    talk.until(&mut Outcome::default(), |seen| seen.stdout.contains("up")).await;
    env.kill_plugin().await;
    assert!(!alive(&mark).is_empty());
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    eventually("the session of nobody is ended", async || {
        let left = alive(&mark);
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    assert_eq!(env.exec_text(&task, "echo again").await, "again\n");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}
