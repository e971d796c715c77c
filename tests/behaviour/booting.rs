//! Shims that take long to start, as on a node that boots under load.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::json;

use crate::support::{Env, eventually, script, shell_in};

/// A shim's program that starts up when a line is written to the FIFO `hold`, and creates the file `called` when it is
/// executed.
fn slow_shim(dir: &Path) -> PathBuf {
    let real = nomad_driver_shim::process::which("containerd-shim-runc-v2".as_ref()).unwrap();
    let program = dir.join("slow-shim");
    let (called, hold) = (dir.join("called"), dir.join("hold"));
    nix::unistd::mkfifo(&hold, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // The shell itself waits in open(2), so that no process is left when the shell is killed.
    let text = format!(
        "case \" $* \" in *' delete '*|*' -v '*) ;; *) touch {}; read line < {};; esac\nexec {} \"$@\"",
        called.display(),
        hold.display(),
        real.display()
    );
    script(&program, &text);
    program
}

async fn called(dir: &Path) {
    let called = dir.join("called");
    eventually("the shim is executed", async || if called.exists() { Ok(()) } else { Err("not yet") }).await;
}

/// Longer than the timeout for an answer of a running shim (10 s).
const SLOW: Duration = Duration::from_secs(12);

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_boots_slowly_is_waited_for() {
    for scope in ["task", "alloc"] {
        let dir = tempfile::tempdir_in(crate::support::services::root()).unwrap();
        let mut env =
            Env::configured(json!({"shim": {"binary": slow_shim(dir.path()), "pool": 0}, "shim_scope": scope})).await;
        let image = env.busybox().await;
        let mut task = env.prepare(shell_in(&image, "exit 7")).await;
        let boots = async {
            called(dir.path()).await;
            // The slow start that this test is about.
            tokio::time::sleep(SLOW).await;
            // The FIFO is opened for reading and writing: this succeeds although the shim may be gone, and the FIFO
            // keeps the written line.
            let mut hold = fs::File::options().read(true).write(true).open(dir.path().join("hold")).unwrap();
            hold.write_all(b"come up\n").unwrap();
            hold
        };
        let (started, _hold) = tokio::join!(env.try_start(&mut task), boots);
        started.unwrap_or_else(|status| panic!("{scope}: {status:?}"));
        assert_eq!(env.finish_task(task).await.0, 7, "{scope}");
        env.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_waits_for_a_booting_shim_can_be_stopped() {
    for scope in ["task", "alloc", "node"] {
        let dir = tempfile::tempdir_in(crate::support::services::root()).unwrap();
        let mut env =
            Env::configured(json!({"shim": {"binary": slow_shim(dir.path()), "pool": 0}, "shim_scope": scope})).await;
        let image = env.busybox().await;
        let mut task = env.prepare(shell_in(&image, "exit 7")).await;
        let id = task.id.clone();
        let plugin = &env;
        let starting = async { plugin.try_start(&mut task).await };
        let stopping = async {
            called(dir.path()).await;
            let began = Instant::now();
            let request = nomad_driver_shim::pb::driver::StopTaskRequest {
                task_id: id,
                timeout: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
                signal: String::new(),
            };
            plugin.driver().stop_task(request).await.unwrap();
            began.elapsed()
        };
        let (started, took) = tokio::join!(starting, stopping);
        let status = started.unwrap_err();
        assert!(status.message().contains("stopped"), "{scope}: {status:?}");
        assert!(took < Duration::from_secs(8), "{scope}: StopTask took {took:?}");
        env.finish().await;
    }
}
