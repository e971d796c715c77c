//! A task's output and Nomad's log FIFOs.

use std::{fs, path::Path, time::Duration};

use nomad_driver_shim::host::{Collector, Output};
use serde_json::json;

use crate::support::{Env, patience};

/// On a busy node, a short task can end before Nomad's log collector has opened the FIFOs.
#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_comes_late_gets_everything() {
    let mut env = Env::new().await;
    let config = env.shell("echo out; echo err >&2", json!({})).await;
    // A first run pulls the image and fills the caches, so that the task under test is quick.
    assert_eq!(env.run(config.clone()).await.0, 0);
    let mut task = env.prepare(config).await;
    let logs = task.dirs.alloc_dir.join("alloc/logs");
    let fifos = ["late.stdout", "late.stderr"].map(|name| logs.join(name));
    for fifo in &fifos {
        nix::unistd::mkfifo(fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    let [stdout, stderr] = fifos.clone().map(|fifo| fifo.to_str().unwrap().to_owned());
    (task.config.stdout_path, task.config.stderr_path) = (stdout, stderr);
    env.try_start(&mut task).await.unwrap();
    assert_eq!(env.wait(&task).await.exit_code, 0);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let late = fifos.map(|fifo| Collector::start(&fifo, Output::Memory));
    for (collector, expected) in late.iter().zip(["out\n", "err\n"]) {
        assert!(collector.wait_for_end(patience()).await.is_some());
        assert_eq!(collector.text(), expected);
    }
    env.destroy(&task).await.unwrap();
    release(&task.dirs.stdout);
    release(&task.dirs.stderr);
    env.finish().await;
}

/// Ends a log collector whose FIFO no task has written to: it sees the FIFO opened and closed.
fn release(fifo: &Path) {
    use std::os::unix::fs::OpenOptionsExt as _;
    drop(fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(fifo));
}

/// The log directory is writable from inside the task: the plugin must not write to an object that the task has put in
/// a FIFO's place.
#[tokio::test(flavor = "multi_thread")]
async fn a_symlink_in_place_of_a_fifo_leaves_its_target_untouched() {
    let mut env = Env::new().await;
    let target = env.dir.join("precious");
    fs::write(&target, "untouched").unwrap();
    let config = env.shell("echo gotcha", json!({})).await;
    let mut task = env.prepare(config).await;
    let logs = task.dirs.alloc_dir.join("alloc/logs");
    for swap in ["file", "directory"] {
        release(&task.dirs.stdout);
        match swap {
            "file" => {
                fs::remove_file(&task.dirs.stdout).unwrap();
                std::os::unix::fs::symlink(&target, &task.dirs.stdout).unwrap();
            }
            _ => {
                fs::remove_file(&task.dirs.stdout).unwrap();
                fs::rename(&logs, env.dir.join("elsewhere")).unwrap();
                std::os::unix::fs::symlink(env.dir.join("elsewhere"), &logs).unwrap();
                nix::unistd::mkfifo(&task.dirs.stdout, nix::sys::stat::Mode::S_IRWXU).unwrap();
            }
        }
        let error = env.try_start(&mut task).await.unwrap_err();
        assert!(error.message().contains("log FIFO"), "{swap}: {error:?}");
        assert_eq!(fs::read_to_string(&target).unwrap(), "untouched");
    }
    release(&env.dir.join("elsewhere").join(task.dirs.stderr.file_name().unwrap()));
    env.finish().await;
}

/// Nomad's log collector opens both FIFOs and waits for a writer. After a failed start the collector waits four
/// seconds, unless it sees both FIFOs opened and closed.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_does_not_make_the_log_collector_wait() {
    let mut env = Env::new().await;
    let good = env.busybox().await;
    for config in [
        json!({"image": good, "command": "/no/such"}),
        json!({"image": "127.0.0.1:1/no/such:1"}),
        json!({"image": good, "no_such_option": 1}),
        json!({"image": good, "runtime": "no-such"}),
    ] {
        let mut task = env.prepare(config.clone()).await;
        env.try_start(&mut task).await.unwrap_err();
        for stream in [&task.stdout, &task.stderr] {
            let waited = stream.wait_for_end(Duration::from_secs(2)).await;
            assert!(waited.is_some(), "the collector still waits after {config}");
        }
    }
    env.finish().await;
}
