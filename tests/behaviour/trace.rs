//! What a cached start makes the kernel do, as strace shows it: the plugin, the shim and the runtime are traced.

use std::{
    fs,
    path::Path,
    process::Stdio,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::support::{Env, EnvOptions, eventually, leak, services};

/// The system calls that a start must not make, and execve, which shows the programs that a start runs.
const CALLS: &str = "connect,fsync,fdatasync,sync,syncfs,sync_file_range,msync,execve";

/// Returns the forbidden calls that a start made, the programs that it ran, and whether the task's program ran. The
/// failpoint `intrusion` makes a forbidden call or starts a process.
async fn traced(intrusion: Option<&str>) -> (Vec<String>, Vec<String>, bool) {
    let switch = intrusion.map(|name| ("NOMAD_DRIVER_SHIM_INTRUDE".to_owned(), name.to_owned()));
    // The pool has its default size. While another shim waits, a refill begins long after the answer, even if this test
    // sees the answer late.
    let config = json!({"shim": {"pool": 2}});
    let mut env = Env::with(EnvOptions { config, env: switch.into_iter().collect(), ..EnvOptions::default() }).await;
    // This first start pulls the image and makes the shims, so that the traced start is a cached one.
    assert_eq!(env.run(json!({"image": env.busybox().await, "command": "/bin/true"})).await.0, 0);
    let shims = env.dir.join("run/shims");
    let bundles = env.dir.join("run/bundles");
    eventually("two shims wait", async || {
        let (shims, bundles) = (leak::entries(&shims), leak::entries(&bundles));
        if shims.len() == 2 && bundles.is_empty() { Ok(()) } else { Err((shims, bundles)) }
    })
    .await;
    // After this delay, the refill that follows the first start has seen that no shim is missing.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut pids = vec![u64::from(env.plugin().pid().unwrap())];
    for shim in leak::entries(&shims) {
        let identity: Value = serde_json::from_slice(&fs::read(shims.join(shim).join("pid")).unwrap()).unwrap();
        pids.push(identity["pid"].as_u64().unwrap());
    }
    let file = env.dir.join("trace");
    let mut strace = tokio::process::Command::new("strace")
        .args(["-f", "-ttt", "-e", &format!("trace={CALLS}"), "-o"])
        .arg(&file)
        .args(pids.iter().flat_map(|pid| ["-p".to_owned(), pid.to_string()]))
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("strace");
    eventually("all are traced", async || {
        let is_traced = |pid: &u64| {
            let tasks = leak::entries(Path::new(&format!("/proc/{pid}/task")));
            tasks.iter().all(|task| {
                let status = fs::read_to_string(format!("/proc/{pid}/task/{task}/status")).unwrap_or_default();
                status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
            })
        };
        if pids.iter().all(is_traced) { Ok(()) } else { Err("not yet") }
    })
    .await;
    let mut task = env.prepare(env.shell("echo up; sleep 600", json!({})).await).await;
    let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    env.try_start(&mut task).await.unwrap();
    let seen = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    // The task's own program may come a moment after the answer.
    task.says("up").await;
    kill(Pid::from_raw(i32::try_from(strace.id().unwrap()).unwrap()), Signal::SIGINT).unwrap();
    strace.wait().await.unwrap();
    // A refill begins half a second after the start at the earliest. On a loaded machine, the traced plugin's answer
    // may be seen later than that.
    let running = env.record(&task).await.1["state"]["started_at"].as_f64().unwrap() / 1e3;
    let answered = seen.min(running + 0.25);

    let text = fs::read_to_string(&file).unwrap();
    let (mut wrong, mut programs, mut ran) = (Vec::new(), Vec::new(), false);
    for line in text.lines() {
        // Each line has the process, the time and the call.
        let rest = line.split_once(' ').unwrap_or_default().1.trim_start();
        let (at, call) = rest.split_once(' ').unwrap_or_default();
        let at: f64 = at.trim().parse().unwrap_or_default();
        let call = call.trim();
        ran |= call.starts_with("execve(\"/bin/sh\"");
        if !(began..answered).contains(&at) || call.starts_with("<...") || call.starts_with("---") {
            continue;
        }
        if let Some(arguments) = call.strip_prefix("execve(") {
            programs.push(arguments.split_once(", 0x").map_or(arguments, |(arguments, _)| arguments).to_owned());
        } else if call.contains("sync") || call.contains(&*services().containerd.to_string_lossy()) {
            wrong.push(call.to_owned());
        }
    }
    fs::remove_file(file).unwrap();
    env.destroy(&task).await.unwrap();
    env.finish().await;
    (wrong, programs, ran)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_start_asks_nobody_syncs_nothing_and_runs_only_the_runtime() {
    let (wrong, programs, ran) = traced(None).await;
    assert_eq!(wrong, Vec::<String>::new());
    // Expected programs: the runtime's `create`, perhaps its own second stage (runc), and the task's program; no
    // `start`.
    assert!(programs.iter().any(|program| program.contains("\"create\"")), "{programs:#?}");
    assert!(ran, "{programs:#?}");
    let others: Vec<_> = programs
        .iter()
        .filter(|program| {
            !["\"create\"", "/bin/sh", "[\"sleep\"", "\"init\"]"].iter().any(|known| program.contains(known))
        })
        .collect();
    assert!(others.is_empty(), "{others:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trace_notices_an_intrusion() {
    for intrusion in ["fsync", "connect"] {
        let (wrong, ..) = traced(Some(intrusion)).await;
        assert_eq!(wrong.len(), 1, "{intrusion}: {wrong:#?}");
        assert!(wrong[0].starts_with(intrusion), "{wrong:#?}");
    }
    let (_, programs, _) = traced(Some("process")).await;
    assert!(programs.iter().any(|program| program.contains("true")), "{programs:#?}");
}
