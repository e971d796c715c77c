//! docs/protocol/nomad-plugin.md#6.3, rows 22 and 23: a task's output in Nomad's log collector.

use std::{fs, os::unix::fs::MetadataExt as _, os::unix::fs::OpenOptionsExt as _, path::Path};

use nomad_driver_shim::host::{Collector, Output};
use serde_json::json;

use crate::{
    row,
    row::Row,
    support::{Env, patience},
};

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row!(everything_in_order, "6.3.22 order", "both streams, in order, nothing lost at the end"),
        row!(a_terminal, "6.3.22 tty", "a terminal's output is the log"),
        row!(disabled, "6.3.22 disabled", "with disabled logs (/dev/null) the task runs as ever"),
        row!(
            a_collector_restarts,
            "6.3.22 restart",
            "the collector is killed and comes back: the task goes on, and its output"
        ),
        row!(fifos_stay_private, "6.3.22 permissions", "the FIFOs' owner and mode are as Nomad made them"),
        row!(without_a_plugin, "6.3.23", "output goes on while the plugin is dead"),
    ]
}

/// Opens and closes the FIFO's write end, so that a collector without a writer ends.
pub(crate) fn release(fifo: &Path) {
    drop(fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(fifo));
}

async fn everything_in_order(env: &mut Env) {
    let config =
        env.shell("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; echo err >&2", json!({})).await;
    let (code, out, err) = env.run(config).await;
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!((code, lines.len(), err.as_str()), (0, 20_000, "err\n"));
    assert!(lines.iter().enumerate().all(|(n, line)| *line == format!("line {n}")), "out of order");
}

async fn a_terminal(env: &mut Env) {
    let config = env.shell("[ -t 1 ] && echo terminal; echo err >&2; exit 4", json!({"tty": true})).await;
    let (code, out, _) = env.run(config).await;
    assert_eq!((code, out.as_str()), (4, "terminal\r\nerr\r\n"));
}

async fn disabled(env: &mut Env) {
    let config = env.shell("echo lost; exit 2", json!({})).await;
    let mut task = env.prepare(config).await;
    (task.config.stdout_path, task.config.stderr_path) = ("/dev/null".to_owned(), "/dev/null".to_owned());
    env.try_start(&mut task).await.unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 2);
    release(&task.dirs.stdout);
    release(&task.dirs.stderr);
}

/// The first collector is a process, since a thread that blocks in open or read can't be killed.
async fn a_collector_restarts(env: &mut Env) {
    let script = "n=0; while [ ! -e /alloc/data/go ]; do n=$((n+1)); echo line $n; sleep 0.02; done; echo the end";
    let config = env.shell(script, json!({})).await;
    let mut task = env.prepare(config).await;
    let fifo = task.dirs.alloc_dir.join("alloc/logs/second.fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    task.config.stdout_path = fifo.to_str().unwrap().to_owned();
    let cat = || std::process::Command::new("cat").arg(&fifo).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut first = cat();
    env.try_start(&mut task).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    first.kill().unwrap();
    first.wait().unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let second = Collector::start(&fifo, Output::Memory);
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 0);
    assert!(second.wait_for_end(patience()).await.is_some(), "no end of output");
    let text = second.text();
    assert!(text.ends_with("the end\n"), "{text}");
    let numbers: Vec<u32> = text.lines().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect();
    assert!(numbers.len() > 3 && numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
    release(&task.dirs.stdout);
}

async fn fifos_stay_private(env: &mut Env) {
    let config = env.shell("echo out", json!({})).await;
    let mut task = env.prepare(config).await;
    task.config.user = "1234:5678".to_owned();
    let state = |path: &Path| fs::metadata(path).map(|meta| (meta.uid(), meta.gid(), meta.mode())).unwrap();
    let before = (state(&task.dirs.stdout), state(&task.dirs.stderr));
    env.try_start(&mut task).await.unwrap();
    env.wait(&task).await;
    assert_eq!((state(&task.dirs.stdout), state(&task.dirs.stderr)), before);
    assert_eq!(env.finish_task(task).await.1, "out\n", "the output of a user who may not open the FIFO");
}

pub(crate) async fn without_a_plugin(env: &mut Env) {
    // The output is larger than a pipe's buffer.
    let script = "echo first; until [ -e /alloc/data/go ]; do sleep 0.02; done; seq 1 30000; echo done > /alloc/data/over; exit 6";
    let task = env.sh(script).await;
    task.says("first").await;
    env.kill_plugin().await;
    fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    task.says("\n30000\n").await;
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    let (code, out, _) = env.finish_task(task).await;
    assert_eq!((code, out.lines().count()), (6, 30_001));
}
