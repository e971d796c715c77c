//! Failures of the host that pass: they are reported to Nomad as recoverable, nothing of the attempt is left, and the
//! same start works later. Faults of the job stay unrecoverable, also while the host has no failure.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use nomad_driver_shim::{host::is_recoverable, ids::random_hex};
use serde_json::{Value, json};
use tonic::Status;

use crate::support::{Env, EnvOptions, Task, leak, program, script, services::root};

const RUNTIMES: [&str; 2] = ["crun", "runc"];

/// Asserts that a start failed in a way that a retry by the restart policy may resolve, and that the task is unknown
/// now.
async fn passes(env: &Env, task: &Task, status: &Status, what: &str) {
    assert!(is_recoverable(status), "{what}: told as unrecoverable: {status:?}");
    assert_eq!(env.inspect(&task.id).await.unwrap_err().code(), tonic::Code::NotFound, "{what}");
}

async fn nothing_is_left(env: &Env, what: &str) {
    let leaks = leak::while_alive(env).await;
    assert!(leaks.is_empty(), "{what}: {leaks:#?}\n{}", env.plugin().stderr());
}

/// Repeats the failed start, with the same id, and asserts that it works now.
async fn works_now(env: &Env, task: &Task, config: Value, what: &str) {
    let mut again = env.prepare_in(task.dirs.clone(), "1", config).await;
    env.try_start(&mut again).await.unwrap_or_else(|status| panic!("{what}: {status:?}"));
    assert_eq!(env.finish_task(again).await.0, 7, "{what}");
}

async fn exits_with_7(env: &Env, runtime: &str) -> Value {
    env.shell("exit 7", json!({"runtime": runtime})).await
}

/// A file system in memory, of 2 MiB, as a run directory.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new() -> Self {
        let path = root().join(format!("small-{}", random_hex(4)));
        fs::create_dir_all(&path).unwrap();
        nix::mount::mount(
            Some("tmpfs"),
            &path,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some("size=2m,nr_inodes=4096,mode=700"),
        )
        .unwrap();
        Self(path)
    }

    /// Fills the file system except for `pages` pages.
    fn fill(&self, pages: u64) {
        let path = self.0.join("filler");
        let mut filler = fs::File::create(&path).unwrap();
        while filler.write_all(&[b'x'; 4096]).is_ok() {}
        let length = filler.metadata().unwrap().len();
        filler.set_len(length.next_multiple_of(4096) - 4096 * pages).unwrap();
    }

    fn free(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
        fs::remove_dir(&self.0).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_run_directory_ends_no_task_for_good() {
    let disk = SmallDisk::new();
    // There is no pool, so that each start also makes the directory of its shim in the run directory.
    let mut env = Env::configured(json!({"state": {"run_dir": disk.0}, "shim": {"pool": 0}})).await;
    // The leak checker looks for the run directory under this path.
    std::os::unix::fs::symlink(&disk.0, env.dir.join("run")).unwrap();
    let mut failed = 0;
    for runtime in RUNTIMES {
        let config = exits_with_7(&env, runtime).await;
        assert_eq!(env.run(config.clone()).await.0, 7);
        for pages in [0, 1, 2, 3, 4, 5, 6, 8, 10] {
            let what = format!("{runtime} with {pages} free pages");
            let mut task = env.prepare(config.clone()).await;
            disk.fill(pages);
            let outcome = env.try_start(&mut task).await;
            if let Err(status) = &outcome {
                failed += 1;
                passes(&env, &task, status, &what).await;
            }
            disk.free();
            match outcome {
                Ok(()) => assert_eq!(env.finish_task(task).await.0, 7, "{what}"),
                Err(_) => {
                    nothing_is_left(&env, &what).await;
                    works_now(&env, &task, config.clone(), &what).await;
                }
            }
        }
    }
    assert!(failed >= 8, "only {failed} starts met the full file system");
    env.finish().await;
}

/// Sets the plugin's limit on file descriptors; only the soft limit.
fn limit_descriptors(pid: u32, soft: u64) {
    let pid = libc::pid_t::try_from(pid).unwrap();
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes to and reads from a struct that lives until the call returns.
    unsafe {
        assert_eq!(libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit), 0);
        limit.rlim_cur = soft.min(limit.rlim_max);
        assert_eq!(libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_out_of_descriptors_ends_no_task_for_good() {
    for pool in [0, 1] {
        let mut env = Env::configured(json!({"shim": {"pool": pool}})).await;
        let plugin = env.plugin().pid().unwrap();
        let mut failed = 0;
        for runtime in RUNTIMES {
            let mut config = exits_with_7(&env, runtime).await;
            config["mounts"] = json!([{"type": "bind", "source": "local", "target": "/data"}]);
            assert_eq!(env.run(config.clone()).await.0, 7);
            for more in (0..24).step_by(3) {
                let what = format!("{runtime} with {more} free descriptors, a pool of {pool}");
                let mut task = env.prepare(config.clone()).await;
                let open = fs::read_dir(format!("/proc/{plugin}/fd")).unwrap().count() as u64;
                limit_descriptors(plugin, open + more);
                let outcome = env.try_start(&mut task).await;
                limit_descriptors(plugin, 4096);
                match outcome {
                    Ok(()) => assert_eq!(env.finish_task(task).await.0, 7, "{what}"),
                    Err(status) => {
                        failed += 1;
                        passes(&env, &task, &status, &what).await;
                        nothing_is_left(&env, &what).await;
                        works_now(&env, &task, config.clone(), &what).await;
                    }
                }
            }
        }
        assert!(failed >= 4, "only {failed} starts met the limit");
        env.finish().await;
    }
}

/// Writes a program `name` that replaces the runtime. Its `create` runs `fault` while a file called `fault` is in the
/// same directory.
fn faulty_runtime(dir: &Path, name: &str, fault: &str) {
    let real = nomad_driver_shim::process::which(Path::new(name)).unwrap();
    let (flag, real) = (dir.join("fault"), real.display().to_string());
    let text = format!(
        "real={real}\ncase \" $* \" in *' create '*) if [ -e {} ]; then {fault}; fi;; esac\nexec $real \"$@\"",
        flag.display()
    );
    script(&dir.join(name), &text);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_is_killed_ends_no_task_for_good() {
    let dir = root().join(format!("faulty-{}", random_hex(4)));
    fs::create_dir_all(&dir).unwrap();
    let faults = [
        ("killed", "kill -KILL $$"),
        ("killed when the container is there", "$real \"$@\"; kill -KILL $$"),
        ("killed in the middle", "$real \"$@\" & sleep 0.005; kill -KILL $!; kill -KILL $$"),
        ("terminated", "kill -TERM $$"),
        ("crashed", "kill -SEGV $$"),
        ("out of file descriptors", "ulimit -n 6"),
    ];
    let runtimes = json!({"crun": {"binary": dir.join("crun")}, "runc": {"binary": dir.join("runc")}});
    let config = json!({"runtime": runtimes});
    for runtime in RUNTIMES {
        faulty_runtime(&dir, runtime, ":");
    }
    let mut env = Env::configured(config).await;
    for runtime in RUNTIMES {
        let config = exits_with_7(&env, runtime).await;
        for (name, fault) in faults {
            let what = format!("{runtime} {name}");
            faulty_runtime(&dir, runtime, fault);
            let mut task = env.prepare(config.clone()).await;
            fs::write(dir.join("fault"), "").unwrap();
            let status = env.try_start(&mut task).await.expect_err(&what);
            fs::remove_file(dir.join("fault")).unwrap();
            passes(&env, &task, &status, &what).await;
            nothing_is_left(&env, &what).await;
            works_now(&env, &task, config.clone(), &what).await;
        }
        // Faults of the job, with the same program as the runtime.
        for command in ["/no/such", "no space left on device", "x: signal: killed\""] {
            let mut bad = config.clone();
            bad["command"] = json!(command);
            let mut task = env.prepare(bad).await;
            let status = env.try_start(&mut task).await.unwrap_err();
            // The last command has a colon in its name. Its failure is taken for a recoverable one, and costs the job
            // some attempts.
            assert_eq!(is_recoverable(&status), command.contains(':'), "{runtime} {command}: {status:?}");
        }
    }
    env.finish().await;
    fs::remove_dir_all(dir).unwrap();
}

/// The failpoint of development builds with which the chaos tests introduce exactly this defect.
#[tokio::test(flavor = "multi_thread")]
async fn the_fault_switch_tells_every_failure_as_unrecoverable() {
    for (list, again) in [("", true), ("recoverable", false)] {
        let mut env = EnvOptions::default().var("NOMAD_DRIVER_SHIM_SKIP", list).start().await;
        let mut task = env.prepare(json!({"image": "127.0.0.1:1/x:1"})).await;
        let status = env.try_start(&mut task).await.unwrap_err();
        assert_eq!(is_recoverable(&status), again, "{:?}: {status:?}", program());
        env.finish().await;
    }
}
