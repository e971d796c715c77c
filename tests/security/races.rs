//! Directories and links that are swapped all the time while tasks start and stop: no file and no mount reaches the
//! host, and no file of the host reaches a task. The races take some seconds in `make test`;
//! `NOMAD_DRIVER_SHIM_TEST_RACE_SECONDS` sets another duration.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use nix::fcntl::{RenameFlags, renameat2};
use nomad_driver_shim::{
    host::TaskDirs,
    pb::driver::{Mount, TaskState},
};
use serde_json::{Value, json};

use crate::{
    image_with_program, runtimes,
    support::{Env, leak::entries, patience},
};

/// How long a race lasts for each runtime.
fn seconds() -> u64 {
    std::env::var("NOMAD_DRIVER_SHIM_TEST_RACE_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(6)
}

/// Swaps pairs of names forever, as fast as the kernel permits.
const SWAPPER: &str = r#"
    #include <fcntl.h>
    #include <stdio.h>
    int main(int count, char **names) {
        puts("swapping"); fflush(stdout);
        for (;;) {
            for (int i = 1; i + 1 < count; i += 2) {
                if (renameat2(AT_FDCWD, names[i], AT_FDCWD, names[i + 1], RENAME_EXCHANGE)) { perror(names[i]); return 1; }
            }
        }
    }"#;

/// Swaps names on the host, as a task of another driver can in the directories that it shares with tasks of this
/// driver.
struct Swapper {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Swapper {
    fn start(pairs: Vec<(PathBuf, PathBuf)>) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (told, counted) = (stop.clone(), count.clone());
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                for (one, other) in &pairs {
                    let here = nix::fcntl::AT_FDCWD;
                    // The mount point of a container that is starting is busy for a moment.
                    if renameat2(here, one, here, other, RenameFlags::RENAME_EXCHANGE).is_ok() {
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
        Self { stop, count, thread: Some(thread) }
    }

    fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        self.count.load(Ordering::Relaxed)
    }
}

/// Files of the host that must stay unchanged.
struct Host {
    bait: PathBuf,
}

impl Host {
    fn new(env: &Env) -> Self {
        let bait = env.dir.join("bait");
        fs::create_dir_all(bait.join("c")).unwrap();
        fs::write(bait.join("c/secret"), "HOST-SECRET").unwrap();
        Self { bait }
    }

    fn check(&self, what: &str) {
        assert_eq!(
            (entries(&self.bait), entries(&self.bait.join("c"))),
            (vec!["c".to_owned()], vec!["secret".to_owned()]),
            "{what}"
        );
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let below =
            mounts.lines().find(|line| line.split(' ').nth(4).unwrap().starts_with(self.bait.to_str().unwrap()));
        assert_eq!(below, None, "{what}: a mount on the host");
    }
}

/// Makes two names in a directory: a directory with the files that tasks look for, and a link to the host.
fn pair(dir: &Path, name: &str, bait: &Path) -> (PathBuf, PathBuf) {
    let (real, link) = (dir.join(name), dir.join(format!("{name}-link")));
    fs::create_dir_all(real.join("c")).unwrap();
    symlink(bait, &link).unwrap();
    (real, link)
}

fn tasks_config(image: &str, n: usize) -> Value {
    let mounts = [
        json!([{"type": "tmpfs", "target": "/alloc/data/x/c"}, {"type": "tmpfs", "target": "/local/y/c/new"}]),
        json!([{"type": "bind", "source": "local", "target": "/alloc/data/x/c", "options": ["rbind", "ro"]}]),
        json!([{"type": "bind", "source": "alloc/data/x", "target": "/m", "options": ["rbind", "rw"]}]),
        json!([{"type": "bind", "source": "alloc/data/x/c", "target": "/m/new", "options": ["rbind", "ro"]}]),
    ];
    // The task tries to read files of the host, and to write there.
    let script = "cat /m/c/secret /m/new/secret /m/secret /alloc/logs/c/secret /alloc/data/x/c/secret /local/c/secret \
        /secrets/c/secret /v/c/secret 2>/dev/null | grep -q HOST-SECRET && exit 42; echo x 2>/dev/null >/m/made; exit 0";
    json!({"image": image, "command": "/bin/sh", "args": ["-c", script], "mounts": mounts[n % mounts.len()]})
}

/// The path that a volume in the shared directory is mounted at.
fn volume(task: &TaskDirs, host: &Path) -> Mount {
    Mount {
        host_path: host.to_str().unwrap().to_owned(),
        task_path: format!("/alloc/data/x/{}", if task.name.len().is_multiple_of(2) { "c" } else { "new" }),
        propagation_mode: "host-to-task".to_owned(),
        ..Mount::default()
    }
}

/// Starts and stops tasks until the time is over. On a slow machine it continues for a while, until both outcomes have
/// occurred. Returns how many tasks ran and how many were refused.
async fn race(env: &mut Env, host: &Host, swapped: TaskDirs, image: &str) -> (usize, usize) {
    let (mut ran, mut refused) = (0, 0);
    let own = env.dir.join("own-volume");
    fs::create_dir_all(&own).unwrap();
    let deadline = Instant::now() + Duration::from_secs(seconds());
    while Instant::now() < deadline || ((ran == 0 || refused == 0) && Instant::now() < deadline + patience()) {
        let n = ran + refused;
        let mut task = env.prepare_in(swapped.clone(), &format!("attempt-{n}"), tasks_config(image, n)).await;
        if n % 3 == 0 {
            task.config.mounts = vec![volume(&swapped, &own)];
        }
        match env.try_start(&mut task).await {
            Ok(()) => {
                let code = env.wait(&task).await.exit_code;
                assert_ne!(code, 42, "a task has read a file of the host");
                env.destroy(&task).await.unwrap();
                ran += 1;
            }
            Err(_) => refused += 1,
        }
        host.check("while tasks start and stop");
    }
    (ran, refused)
}

/// From inside: a task of the allocation swaps the directories that other tasks use as sources and targets of mounts.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_swaps_directories_for_links_gains_nothing() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({})).await;
        let host = Host::new(&env);
        let image = image_with_program("swapper", SWAPPER).await;
        let names = ["/alloc/data/x", "/alloc/data/x-link"];
        let mut swapper = env.prepare(json!({"image": image, "command": "/attack", "args": names})).await;
        let alloc = env.allocs.last().unwrap().clone();
        pair(&alloc.dir.join("alloc/data"), "x", &host.bait);
        let main = alloc.create_task("main").unwrap();
        pair(&alloc.dir.join("main/local"), "y", &host.bait);
        env.try_start(&mut swapper).await.unwrap();
        swapper.says("swapping").await;
        let (ran, refused) = race(&mut env, &host, main, &image).await;
        assert!(ran > 0 && refused > 0, "{runtime}: {ran} ran, {refused} were refused: the race was none");
        let state = env.inspect(&swapper.id).await.unwrap().task.unwrap().state;
        assert_eq!(state, TaskState::Running as i32, "the swapper has stopped: {}", swapper.stderr.text());
        env.destroy(&swapper).await.unwrap();
        host.check("afterwards");
        env.finish().await;
    }
}

/// From outside: a task of another driver, which may write to the whole shared directory, swaps Nomad's own directories
/// while the node's log writer writes there.
#[tokio::test(flavor = "multi_thread")]
async fn directories_of_nomad_that_are_swapped_lead_nowhere() {
    for runtime in runtimes() {
        let mut env = Env::with_runtime(&runtime, json!({"disable_log_collection": true})).await;
        let host = Host::new(&env);
        let image = env.busybox().await;
        let first = env.prepare(json!({"image": image, "command": "/bin/true"})).await;
        let alloc = env.allocs.last().unwrap().clone();
        let mut pairs = vec![pair(&alloc.dir.join("alloc/data"), "x", &host.bait)];
        let main = alloc.create_task("main").unwrap();
        pair(&alloc.dir.join("main/local"), "y", &host.bait);
        for directory in ["alloc/logs", "main/local", "main/secrets"] {
            let (real, link) = (alloc.dir.join(directory), alloc.dir.join(format!("{directory}-link")));
            symlink(&host.bait, &link).unwrap();
            pairs.push((real, link));
        }
        let swapper = Swapper::start(pairs);
        let (ran, refused) = race(&mut env, &host, main, &image).await;
        let count = swapper.stop();
        assert!(ran > 0 && refused > 0 && count > 1000, "{runtime}: {ran} ran, {refused} were refused, {count} swaps");
        host.check("afterwards");
        drop(first);
        env.finish().await;
    }
}
