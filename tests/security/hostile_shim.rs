//! Shims that lie: a start fails in time and with a reason, the plugin continues to serve its other tasks, and nothing
//! remains.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    attack,
    probe::peak,
    support::{Env, patience},
};

/// The answers to a shim's first call or to its `Create` call: see hostile_shim.c.
const LIES: [&str; 18] = [
    "connect-exits",
    "connect-closes",
    "connect-silent",
    "connect-garbage",
    "connect-4gib",
    "connect-2gib",
    "connect-5mib",
    "connect-stream",
    "connect-nonsense",
    "connect-short",
    "connect-text",
    "connect-log",
    "create-exits",
    "create-killed",
    "create-closes",
    "create-5mib",
    "create-nonsense",
    "create-text",
];
/// A shim that has just been started has 60 s to answer its first call.
const IN_TIME: Duration = Duration::from_secs(75);
/// The memory that all lies together may take: a frame has at most 4 MiB, and only a little of a program's output is
/// kept.
const GROWTH: u64 = 48 << 20;
/// The maximum length: a shim's text goes into one line of the log.
const LOG_LINE: usize = 64 << 10;

/// One program for each lie, as the runtimes of a plugin's configuration.
fn runtimes(dir: &Path) -> Value {
    let program = dir.join("shim");
    fs::write(&program, attack::compile("hostile-shim", include_str!("hostile_shim.c"))).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let named = LIES.map(|lie| {
        fs::hard_link(&program, dir.join(lie)).unwrap();
        (lie.to_owned(), json!({"shim": dir.join(lie)}))
    });
    Value::Object(named.into_iter().collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_lies_costs_one_start() {
    let programs = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut env = Env::configured(json!({"runtime": runtimes(programs.path()), "shim": {"pool": 1}})).await;
    // From here on the image is in containerd's store.
    let bystander = env.sh("sleep 600").await;
    let plugin = env.plugin().pid();
    let before = peak(plugin.unwrap());
    let mut tasks = Vec::new();
    for lie in LIES {
        let config = env.shell("true", json!({"runtime": lie})).await;
        tasks.push((lie, env.prepare(config).await));
    }
    let plugin_env = &env;
    let starts = tasks.iter_mut().map(|(lie, task)| async move {
        let began = Instant::now();
        let status = plugin_env.try_start(task).await.expect_err(lie);
        let reason = status.message();
        let shown = &reason[..reason.len().min(300)];
        assert!(began.elapsed() < IN_TIME.max(patience()), "{lie} took {:?}: {shown}", began.elapsed());
        assert!(reason.contains("shim") || reason.contains("create the container"), "{lie}: {shown}");
        assert_eq!(plugin_env.inspect(&task.id).await.unwrap_err().code(), tonic::Code::NotFound, "{lie}");
    });
    futures_util::future::join_all(starts).await;
    let grown = peak(plugin.unwrap()) - before;
    assert!(grown < GROWTH, "{} MiB more", grown >> 20);
    let longest = env.plugin().stderr().lines().map(str::len).max().unwrap_or_default();
    assert!(longest < LOG_LINE, "a line of {longest} bytes in the agent's log");
    // The same plugin serves the other tasks as before.
    assert_eq!(env.plugin().pid(), plugin);
    assert_eq!(env.exec_text(&bystander, "echo alive").await, "alive\n");
    env.destroy(&bystander).await.unwrap();
    env.finish().await;
}
