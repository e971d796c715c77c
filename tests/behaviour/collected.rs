//! Remains of killed processes are removed: cgroups and directories of probes, sockets, log writers.

use std::{
    fs,
    os::unix::{fs::MetadataExt as _, net::UnixListener},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nix::{
    fcntl::AT_FDCWD,
    sys::{
        signal::{Signal, kill},
        socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket},
        stat::{UtimensatFlags, utimensat},
        time::TimeSpec,
    },
    unistd::Pid,
};
use nomad_driver_shim::{
    cgroup::Cgroups,
    ids::random_hex,
    process::{PidFd, ProcessId, which},
};
use serde_json::json;

use crate::support::{Env, eventually, leak, script, shell_in};

/// A pid and start time that no process has had.
const NOBODY: &str = "1-99999999999";

/// The directories of a cgroup in all hierarchies.
fn groups(name: &str) -> Vec<PathBuf> {
    let cgroups = Cgroups::detect().unwrap();
    cgroups.hierarchies().iter().map(|hierarchy| hierarchy.join(name)).filter(|path| path.exists()).collect()
}

fn make_groups(name: &str) {
    for hierarchy in Cgroups::detect().unwrap().hierarchies() {
        fs::create_dir(hierarchy.join(name)).unwrap();
    }
}

/// Makes a file or directory older than any age that the driver checks.
fn age(path: &Path) {
    let then = SystemTime::now() - Duration::from_secs(3600);
    let time = TimeSpec::from_duration(then.duration_since(SystemTime::UNIX_EPOCH).unwrap());
    utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink).unwrap();
}

/// A plugin whose crun is the script `text`. The script finds the real crun in `$CRUN`, and its own directory in
/// `$DIR`.
async fn with_crun(text: &str) -> (Env, PathBuf) {
    let dir = crate::support::services::root().join(random_hex(4));
    fs::create_dir_all(&dir).unwrap();
    let real = which(Path::new("crun")).unwrap();
    let wrapper = dir.join("crun");
    script(&wrapper, &format!("CRUN={}\nDIR={}\n{text}", real.display(), dir.display()));
    let config = json!({"runtime": {"crun": {"binary": wrapper}}, "default_runtime": "runc"});
    (Env::configured(config).await, dir)
}

/// The last argument of a call is the container's id, after which crun names the container's cgroup.
const LAST_WORD: &str = "for id; do :; done";

/// crun is killed in the middle of a probe, while the plugin lives.
#[tokio::test(flavor = "multi_thread")]
async fn a_probe_whose_runtime_was_killed_leaves_no_cgroup() {
    let (env, dir) = with_crun(&format!(
        "{LAST_WORD}\ncase \" $* \" in *\" run \"*) ;; *) exec $CRUN \"$@\" ;; esac\n\
         for h in /sys/fs/cgroup/*/; do test -e $h/cgroup.procs && mkdir $h/nomad-driver-shim-$id; done\n\
         test -e /sys/fs/cgroup/cgroup.procs && mkdir /sys/fs/cgroup/nomad-driver-shim-$id\n\
         echo $id > $DIR/id; kill -9 $$"
    ))
    .await;
    let id = fs::read_to_string(dir.join("id")).expect("it was probed");
    let name = format!("nomad-driver-shim-{}", id.trim());
    eventually("the probe's cgroup is gone", async || {
        let left = groups(&name);
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    assert!(!env.dir.join("run").join(id.trim()).exists());
    env.finish().await;
}

/// The plugin is killed in the middle of a probe, and then its runtime, which has a process in the container.
#[tokio::test(flavor = "multi_thread")]
async fn a_probe_whose_plugin_was_killed_is_cleared_by_the_next_one() {
    let (mut env, dir) = with_crun(&format!(
        "{LAST_WORD}\ntest -e $DIR/hang || exec $CRUN \"$@\"\ncase \" $* \" in *\" run \"*) ;; *) exit 0 ;; esac\n\
         sleep 600 &\n\
         for h in /sys/fs/cgroup/*/ /sys/fs/cgroup/; do\n\
           test -e $h/cgroup.procs || continue\n\
           mkdir $h/nomad-driver-shim-$id && \
           case $h in *cpuset*) cat $h/cpuset.cpus > $h/nomad-driver-shim-$id/cpuset.cpus; \
           cat $h/cpuset.mems > $h/nomad-driver-shim-$id/cpuset.mems;; esac\n\
           echo $! > $h/nomad-driver-shim-$id/cgroup.procs\n\
         done 2>/dev/null\n\
         echo $! $id > $DIR/hangs.tmp; mv $DIR/hangs.tmp $DIR/hangs; wait"
    ))
    .await;
    env.kill_plugin().await;
    fs::write(dir.join("hang"), "").unwrap();
    // The plugin is killed in the middle of Init, when this future is dropped.
    let hangs = dir.join("hangs");
    tokio::select! {
        () = env.start_plugin() => panic!("it was not probed"),
        () = eventually("the probe hangs", async || if hangs.exists() { Ok(()) } else { Err(()) }) => {}
    }
    for socket in leak::entries(&env.dir).into_iter().filter(|name| name.starts_with("plugin-")) {
        fs::remove_file(env.dir.join(socket)).unwrap();
    }
    let text = fs::read_to_string(&hangs).unwrap();
    let (pid, id) = text.trim().split_once(' ').unwrap();
    let sleeper = PidFd::open(pid.parse().unwrap()).unwrap();
    let name = format!("nomad-driver-shim-{id}");
    assert!(!groups(&name).is_empty() && !sleeper.has_ended());
    fs::remove_file(dir.join("hang")).unwrap();
    env.start_plugin().await;
    eventually("the probe's cgroup and directory are gone", async || {
        let left = (groups(&name), env.dir.join("run").join(id).exists(), sleeper.has_ended());
        if left == (Vec::new(), false, true) { Ok(()) } else { Err(left) }
    })
    .await;
    env.finish().await;
}

/// The cgroup of a probe is at the root of hierarchies that all plugins of a host share. Its name says which plugin has
/// created it.
#[tokio::test(flavor = "multi_thread")]
async fn probes_of_the_living_stay_and_those_of_the_dead_go() {
    let me = ProcessId::of(std::process::id()).unwrap();
    let random = random_hex(6);
    let of = |rest: &str| format!("nomad-driver-shim-probe-{rest}");
    let dead = of(&format!("{NOBODY}-{random}"));
    // These names are in the format of earlier versions.
    let (old, young) = (of(&random_hex(6)), of(&random_hex(6)));
    let living = of(&format!("{}-{}-{random}", me.pid, me.start));
    for name in [&dead, &old, &young, &living] {
        make_groups(name);
    }
    groups(&old).iter().for_each(|path| age(path));
    let env = Env::new().await;
    eventually("probes of the dead are gone", async || {
        let left = [groups(&dead), groups(&old)].concat();
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    for name in [&young, &living] {
        let stay = groups(name);
        assert!(!stay.is_empty(), "{name}");
        stay.iter().for_each(|path| fs::remove_dir(path).unwrap());
    }
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_of_a_killed_plugin_goes_with_the_next_one() {
    let mut env = Env::new().await;
    let killed = env.plugin().socket().to_owned();
    env.plugin.take().unwrap().kill().await;
    assert!(killed.exists());
    let path = |name: &str| env.dir.join(name);
    // The sockets belong to a killed plugin with another driver name, to earlier versions, and to an agent, whose
    // socket no other process may remove.
    let (other, old, young, agents) = (
        path(&format!("plugin-shim-{NOBODY}-{}", random_hex(6))),
        path(&format!("plugin-{}", random_hex(6))),
        path(&format!("plugin-{}", random_hex(6))),
        path("plugin1234567890"),
    );
    for socket in [&other, &old, &young, &agents] {
        drop(UnixListener::bind(socket).unwrap());
    }
    [&old, &agents].iter().for_each(|path| age(path));
    // A process listens at this socket, and the socket's owner is in another pid namespace.
    let listened = path(&format!("plugin-shim-2-99999999999-{}", random_hex(6)));
    let listener = UnixListener::bind(&listened).unwrap();
    // The owner of this socket has bound it, and does not listen yet.
    let me = ProcessId::of(std::process::id()).unwrap();
    let bound = path(&format!("plugin-shim-{}-{}-{}", me.pid, me.start, random_hex(6)));
    let not_yet = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(std::os::fd::AsRawFd::as_raw_fd(&not_yet), &UnixAddr::new(&bound).unwrap()).unwrap();
    // These are a file that is no socket, a socket of another user, and a link to a socket that must stay.
    let (file, theirs, link) = (
        path(&format!("plugin-shim-3-99999999999-{}", random_hex(6))),
        path(&format!("plugin-shim-4-99999999999-{}", random_hex(6))),
        path(&format!("plugin-shim-5-99999999999-{}", random_hex(6))),
    );
    fs::write(&file, "").unwrap();
    drop(UnixListener::bind(&theirs).unwrap());
    std::os::unix::fs::lchown(&theirs, Some(1000), Some(1000)).unwrap();
    std::os::unix::fs::symlink(&agents, &link).unwrap();
    env.start_plugin().await;
    eventually("dead sockets are gone", async || {
        let left: Vec<_> = [&killed, &other, &old].into_iter().filter(|path| path.exists()).collect();
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    // All files were examined by then: the ones that stay were passed over, or come last in the directory.
    let stay = [&young, &agents, &listened, &bound, &file, &theirs, &link];
    for path in stay {
        assert!(path.symlink_metadata().is_ok(), "{}", path.display());
        fs::remove_file(path).unwrap();
    }
    drop((listener, not_yet));
    env.finish().await;
}

/// The log writer supervisor and the log writer of an environment, and processes that wait for a lock of one of them.
fn log_processes(env: &Env) -> (Vec<i32>, Vec<i32>) {
    let place = env.dir.join("run/logs");
    let (mut keepers, mut writers) = (Vec::new(), Vec::new());
    for pid in nomad_driver_shim::process::all_pids().unwrap() {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        if words.iter().any(|word| Path::new(word.as_ref()) == place) {
            let is_writer = words.iter().any(|word| word == "--writer");
            if is_writer { &mut writers } else { &mut keepers }.push(pid.cast_signed());
        }
    }
    (keepers, writers)
}

/// Whether this process waits for the writer's lock. In /proc/locks, `->` marks a waiting process (proc_locks(5)).
fn waits_for_writer(env: &Env, pid: i32) -> bool {
    let lock = fs::metadata(env.dir.join("run/logs/.writer.lock")).unwrap().ino();
    let locks = fs::read_to_string("/proc/locks").unwrap();
    let waits = |line: &&str| line.contains(" -> FLOCK") && line.contains(&format!(":{lock} "));
    locks.lines().filter(waits).any(|line| line.split_whitespace().any(|word| word == pid.to_string()))
}

/// The log writer supervisor dies. Its log writer goes on under the next supervisor. This supervisor starts no second
/// writer, and starts a new one when the writer dies.
#[tokio::test(flavor = "multi_thread")]
async fn a_keepers_death_leaves_one_writer() {
    const LINES: usize = 400;
    let mut env = Env::configured(json!({"disable_log_collection": true})).await;
    let image = env.busybox().await;
    let talk =
        format!("seq 1 {}; until [ -e /alloc/data/go ]; do sleep 0.05; done; seq {} {LINES}", LINES / 2, LINES / 2 + 1);
    let task = env.start(shell_in(&image, &talk)).await;
    let log = task.dirs.alloc_dir.join("alloc/logs/web.stdout.0");
    eventually("the first half is written", async || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        if text.lines().count() == LINES / 2 { Ok(()) } else { Err(text.len()) }
    })
    .await;
    let (keepers, writers) = log_processes(&env);
    let (&[first], &[writer]) = (&keepers[..], &writers[..]) else { panic!("{keepers:?} {writers:?}") };
    let mut keeper = first;
    // The supervisor is killed twice, because a writer that was handed on once must be handed on again.
    for _ in 0..2 {
        kill(Pid::from_raw(keeper), Signal::SIGKILL).unwrap();
        let before = keeper;
        eventually("another keeper has the same writer", async || {
            let seen = log_processes(&env);
            match (&seen.0[..], &seen.1[..]) {
                (&[now], &[same]) if now != before && same == writer && waits_for_writer(&env, now) => {
                    keeper = now;
                    Ok(())
                }
                _ => Err(seen),
            }
        })
        .await;
    }
    kill(Pid::from_raw(writer), Signal::SIGKILL).unwrap();
    fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    eventually("another writer", async || {
        let seen = log_processes(&env);
        if seen.0 == [keeper] && seen.1.len() == 1 && seen.1 != [writer] { Ok(()) } else { Err(seen) }
    })
    .await;
    assert_eq!(env.wait(&task).await.exit_code, 0);
    env.destroy(&task).await.unwrap();
    eventually("every line is there once", async || {
        let text = fs::read_to_string(&log).unwrap();
        let whole = text.lines().eq((1..=LINES).map(|n| n.to_string()));
        if whole { Ok(()) } else { Err(text.len()) }
    })
    .await;
    // When the last task is gone and the plugin has been shut down, neither supervisor nor writer stays.
    env.finish().await;
}
