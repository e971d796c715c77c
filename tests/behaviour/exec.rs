//! Processes in a running task: script checks (ExecTask) and `nomad alloc exec` (ExecTaskStreaming). The names of the
//! `upstream_` tests are those of Nomad's own harness.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Env, Task, eventually, exec::Outcome};

const SH: [&str; 2] = ["/bin/sh", "-c"];

async fn session(env: &Env, task: &Task, script: &str, tty: bool) -> Outcome {
    env.talk(task, &[SH[0], SH[1], script], tty).await.unwrap().end().await
}

fn outcome(stdout: &str, stderr: &str, tty: bool, code: i32) -> Outcome {
    Outcome { stdout: stdout.into(), stderr: stderr.into(), closed: (true, !tty), code: Some(code) }
}

/// Pids of the host whose command line has `mark`.
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

#[tokio::test(flavor = "multi_thread")]
async fn upstream_no_tty() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let both = session(&env, &task, "echo hi; echo err >&2; exit 43", false).await;
    assert_eq!(both, outcome("hi\n", "err\n", false, 43));
    let streaming = session(&env, &task, "for n in 1 2 3; do echo $n; sleep 1; done", false).await;
    assert_eq!(streaming, outcome("1\n2\n3\n", "", false, 0));
    let not_a_tty = session(&env, &task, "stty size", false).await;
    assert_eq!((not_a_tty.code, not_a_tty.stdout.as_str()), (Some(1), ""));
    assert!(not_a_tty.stderr.contains("stty"), "{not_a_tty:?}");
    let talk = env.talk(&task, &["/bin/cat"], false).await.unwrap();
    talk.type_in("hello from the other side").await;
    talk.close().await;
    assert_eq!(talk.end().await, outcome("hello from the other side", "", false, 0));
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_tty() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let both = session(&env, &task, "echo hi; echo err >&2; exit 43", true).await;
    assert_eq!(both, outcome("hi\r\nerr\r\n", "", true, 43));

    let talk = env.talk(&task, &[SH[0], SH[1], "sleep 1; stty size"], true).await.unwrap();
    talk.resize(50, 40).await;
    talk.resize(100, 100).await;
    assert_eq!(talk.end().await, outcome("100 100\r\n", "", true, 0));

    // Echoed by the terminal, then printed; stdin stays open all the while.
    let mut talk = env.talk(&task, &[SH[0], SH[1], "read line; echo $line"], true).await.unwrap();
    talk.say(Default::default()).await;
    talk.type_in("hello\n").await;
    let mut seen = Outcome::default();
    talk.until(&mut seen, |_| false).await;
    assert_eq!(seen, outcome("hello\r\nhello\r\n", "", true, 0));

    let began = Instant::now();
    let left = session(&env, &task, "(sleep 5; echo late) & sleep 0.2; echo main", true).await;
    assert_eq!(left, outcome("main\r\n", "", true, 0));
    assert!(began.elapsed() < Duration::from_secs(4), "a background child was waited for: {:?}", began.elapsed());
    // Not even one that never falls silent.
    let began = Instant::now();
    let flood = session(&env, &task, "(trap '' HUP; timeout 20 yes) & sleep 0.2; exit 5", true).await;
    assert_eq!(flood.code, Some(5));
    assert!(began.elapsed() < Duration::from_secs(15), "a flood was waited for: {:?}", began.elapsed());
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_isolation() {
    let mut env = Env::new().await;
    let task = env.sh("sleep 600").await;
    let path = format!("/tmp/nds-isolation-{}", task.dirs.alloc_id);
    env.exec_text(&task, &format!("echo inside > {path}")).await;
    assert!(!std::path::Path::new(&path).exists());
    assert_eq!(env.exec_text(&task, &format!("cat {path}")).await, "inside\n");
    let groups = env.exec_text(&task, "cat /proc/self/cgroup").await;
    if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        // Upstream wants the scope's name there, and exempts docker, which has a namespace of cgroups, as we have.
        assert_eq!(groups, "0::/\n");
        let task_pid = env.attribute(&task, "pid").await;
        let groups = std::fs::read_to_string(format!("/proc/{task_pid}/cgroup")).unwrap();
        assert!(groups.trim().ends_with(".scope"), "{groups}");
    } else {
        let freezer = groups.lines().find(|line| line.contains(":freezer:")).unwrap();
        assert!(freezer.split(':').next_back().unwrap().starts_with("/nomad"), "{freezer}");
    }
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// What a process may do and where it is counted is the same for the task and for what is exec'd in it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_execd_is_as_confined_as_the_task() {
    let mut env = Env::new().await;
    // What is run in it gets its score a moment after its start.
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

    // The last so many bytes of a flood.
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

/// A plugin that dies leaves what was exec'd for its clients to the next one, which ends it.
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

#[tokio::test(flavor = "multi_thread")]
async fn upstream_dns() {
    use nomad_driver_shim::pb::driver::DnsConfig;
    let mut env = Env::new().await;
    let own = DnsConfig {
        servers: vec!["1.2.3.4".to_owned(), "5.6.7.8".to_owned()],
        searches: vec!["one.test".to_owned(), "two.test".to_owned()],
        options: vec!["ndots:2".to_owned()],
    };
    let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let words = |text: &str, key: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        lines.flat_map(|line| line.split_whitespace().map(str::to_owned)).collect()
    };
    for dns in [Some(own.clone()), None] {
        let mut task =
            env.prepare(json!({"image": env.busybox().await, "command": "/bin/sleep", "args": ["600"]})).await;
        task.config.dns.clone_from(&dns);
        env.try_start(&mut task).await.unwrap();
        let inside = env.exec_text(&task, "cat /etc/resolv.conf").await;
        for (key, given) in [("nameserver", &own.servers), ("search", &own.searches), ("options", &own.options)] {
            let expected = if dns.is_some() { given.clone() } else { words(&host, key) };
            assert_eq!(words(&inside, key), expected, "{key} of {inside}");
        }
        env.destroy(&task).await.unwrap();
    }
    env.finish().await;
}
