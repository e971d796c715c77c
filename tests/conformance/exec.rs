//! docs/protocol/nomad-plugin.md#6.1: the cases that Nomad's own harness has for every driver that announces `exec`,
//! and the one for DNS.

use std::time::Duration;

use nomad_driver_shim::pb::driver::DnsConfig;
use serde_json::json;

use crate::{
    row,
    row::Row,
    seen::{promptly, start_with},
    support::{Env, Task, exec::Outcome},
};

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row!(no_tty_streams_and_code, "6.1.1", "exec without a terminal: both streams apart, and the exit code"),
        row!(no_tty_output_over_time, "6.1.2", "exec without a terminal: output that takes three seconds, all of it"),
        row!(no_tty_has_no_size, "6.1.3", "exec without a terminal: `stty size` fails in words"),
        row!(no_tty_input, "6.1.4", "exec without a terminal: input is passed on, and its end"),
        row!(tty_merges_streams, "6.1.5", "exec with a terminal: one stream, lines end in CRLF, exit code"),
        row!(tty_is_resized, "6.1.6", "exec with a terminal: resizes reach it, the last one counts"),
        row!(
            tty_echoes_input,
            "6.1.7",
            "exec with a terminal: input is echoed; the session ends though input stays open"
        ),
        row!(
            tty_ends_with_its_lead,
            "6.1.8",
            "exec with a terminal: ends with its first process, whatever that leaves behind"
        ),
        row!(exec_is_inside, "6.1.9", "exec isolation: the task's files, not the host's; its cgroup"),
        row!(dns_is_the_groups_or_the_hosts, "6.1.10", "resolv.conf has what the group says, else what the host has"),
    ]
}

async fn idle(env: &mut Env) -> Task {
    env.sh("sleep 600").await
}

async fn session(env: &Env, task: &Task, script: &str, tty: bool) -> Outcome {
    env.talk(task, &["/bin/sh", "-c", script], tty).await.unwrap().end().await
}

fn is(outcome: &Outcome, stdout: &str, stderr: &str, code: i32) {
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str(), outcome.code), (stdout, stderr, Some(code)));
}

async fn no_tty_streams_and_code(env: &mut Env) {
    let task = idle(env).await;
    is(&session(env, &task, "echo hi; echo err >&2; exit 43", false).await, "hi\n", "err\n", 43);
}

async fn no_tty_output_over_time(env: &mut Env) {
    let task = idle(env).await;
    is(&session(env, &task, "for n in 1 2 3; do echo $n; sleep 1; done", false).await, "1\n2\n3\n", "", 0);
}

async fn no_tty_has_no_size(env: &mut Env) {
    let task = idle(env).await;
    let seen = session(env, &task, "stty size", false).await;
    assert_eq!((seen.code, seen.stdout.as_str()), (Some(1), ""));
    assert!(seen.stderr.contains("stty"), "{seen:?}");
}

async fn no_tty_input(env: &mut Env) {
    let task = idle(env).await;
    let talk = env.talk(&task, &["/bin/cat"], false).await.unwrap();
    talk.type_in("hello from the other side").await;
    talk.close().await;
    is(&talk.end().await, "hello from the other side", "", 0);
}

async fn tty_merges_streams(env: &mut Env) {
    let task = idle(env).await;
    is(&session(env, &task, "echo hi; echo err >&2; exit 43", true).await, "hi\r\nerr\r\n", "", 43);
}

pub(crate) async fn tty_is_resized(env: &mut Env) {
    let task = idle(env).await;
    let talk = env.talk(&task, &["/bin/sh", "-c", "sleep 1; stty size"], true).await.unwrap();
    talk.resize(50, 40).await;
    talk.resize(100, 100).await;
    is(&talk.end().await, "100 100\r\n", "", 0);
}

async fn tty_echoes_input(env: &mut Env) {
    let task = idle(env).await;
    let mut talk = env.talk(&task, &["/bin/sh", "-c", "read line; echo $line"], true).await.unwrap();
    talk.say(Default::default()).await;
    talk.type_in("hello\n").await;
    let mut seen = Outcome::default();
    talk.until(&mut seen, |_| false).await;
    is(&seen, "hello\r\nhello\r\n", "", 0);
}

async fn tty_ends_with_its_lead(env: &mut Env) {
    let task = idle(env).await;
    let began = std::time::Instant::now();
    let seen = session(env, &task, "(sleep 30; echo late) & sleep 0.2; echo main", true).await;
    is(&seen, "main\r\n", "", 0);
    // The session does not wait for a background process that never stops writing either.
    let flood = session(env, &task, "(trap '' HUP; timeout 30 yes) & sleep 0.2; exit 5", true).await;
    assert_eq!(flood.code, Some(5));
    assert!(
        began.elapsed() < Duration::from_secs(25).max(promptly()),
        "waited {:?} for what was left behind",
        began.elapsed()
    );
}

async fn exec_is_inside(env: &mut Env) {
    let task = idle(env).await;
    let path = format!("/tmp/nds-isolation-{}", task.dirs.alloc_id);
    env.exec_text(&task, &format!("echo inside > {path}")).await;
    assert!(!std::path::Path::new(&path).exists());
    assert_eq!(env.exec_text(&task, &format!("cat {path}")).await, "inside\n");
    let groups = env.exec_text(&task, "cat /proc/self/cgroup").await;
    if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        // Nomad's harness expects the scope's name here, and exempts docker, which has a cgroup namespace.
        assert!(groups == "0::/\n" || groups.trim().ends_with(".scope"), "{groups}");
    } else if let Some(freezer) = groups.lines().find(|line| line.contains(":freezer:")) {
        assert!(freezer.split(':').next_back().unwrap().starts_with("/nomad"), "{freezer}");
    }
}

async fn dns_is_the_groups_or_the_hosts(env: &mut Env) {
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
        let config = env.shell("sleep 600", json!({})).await;
        let task = start_with(env, config, |config| config.dns.clone_from(&dns)).await;
        let inside = env.exec_text(&task, "cat /etc/resolv.conf").await;
        for (key, given) in [("nameserver", &own.servers), ("search", &own.searches), ("options", &own.options)] {
            let expected = if dns.is_some() { given.clone() } else { words(&host, key) };
            assert_eq!(words(&inside, key), expected, "{key} of {inside}");
        }
        env.destroy(&task).await.unwrap();
    }
}
