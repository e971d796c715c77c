//! Logs without Nomad's log collector: the log writer keeps them whole, whichever process dies and whatever object is
//! put in a log file's place.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        signal::{Signal, kill},
        stat::{Mode, SFlag, makedev, mknod},
    },
    unistd::Pid,
};
use nomad_driver_shim::{
    host::Plugin,
    ids::random_hex,
    pb::driver::{CapabilitiesRequest, TaskEventsRequest},
};
use serde_json::{Value, json};

use crate::support::{Env, Task, eventually, leak, patience};

async fn environment() -> Env {
    let config = json!({"disable_log_collection": true});
    Env::configured(config).await
}

fn logs(task: &Task) -> PathBuf {
    task.dirs.alloc_dir.join("alloc/logs")
}

/// Returns the files of a stream, sorted by number.
fn files(task: &Task, stream: &str) -> Vec<(u64, PathBuf)> {
    let prefix = format!("{}.{stream}.", task.dirs.name);
    let number = |name: &String| name.strip_prefix(&prefix)?.parse().ok();
    let mut files: Vec<(u64, PathBuf)> = leak::entries(&logs(task))
        .into_iter()
        .filter_map(|name| Some((number(&name)?, logs(task).join(name))))
        .filter(|(_, path)| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.nlink() == 1))
        .collect();
    files.sort();
    files
}

fn log(task: &Task, stream: &str) -> String {
    files(task, stream).into_iter().map(|(_, path)| fs::read_to_string(path).unwrap()).collect()
}

async fn says(task: &Task, text: &str) {
    eventually(&format!("the log has {text:?}"), async || {
        let seen = log(task, "stdout");
        if seen.contains(text) { Ok(()) } else { Err(seen.chars().rev().take(200).collect::<String>()) }
    })
    .await;
}

async fn sh(env: &mut Env, script: &str, options: Value) -> Task {
    let config = env.shell(script, options).await;
    env.start(config).await
}

/// Waits for a task's end and destroys the task. Returns its exit code and both of its streams.
async fn finish(env: &Env, task: &Task) -> (i32, String, String) {
    let code = env.wait(task).await.exit_code;
    let place = env.dir.join("run/logs").join(env.attribute(task, "container_id").await);
    env.destroy(task).await.unwrap();
    // The log writer writes out the remaining output before it removes the task's directory in `run/logs`.
    eventually("its log is whole", async || if place.exists() { Err(leak::entries(&place)) } else { Ok(()) }).await;
    (code, log(task, "stdout"), log(task, "stderr"))
}

/// Returns the processes that write this environment's logs: the log writer, and as `keeper` the log writer supervisor.
fn writers(env: &Env) -> HashMap<&'static str, i32> {
    let place = env.dir.join("run/logs");
    let pids = leak::entries(Path::new("/proc")).into_iter().filter_map(|pid| pid.parse::<i32>().ok());
    let mut found = HashMap::new();
    for pid in pids {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        if words.iter().any(|word| Path::new(word.as_ref()) == place) {
            found.insert(if words.iter().any(|word| word == "--writer") { "writer" } else { "keeper" }, pid);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn both_streams_are_in_nomads_files() {
    let mut env = environment().await;
    let capabilities = env.driver().capabilities(CapabilitiesRequest {}).await.unwrap().into_inner();
    assert!(capabilities.capabilities.unwrap().disable_log_collection);
    let task =
        sh(&mut env, "echo out; echo err >&2; ls -d /alloc/logs; echo x > /alloc/logs/x; exit 3", json!({})).await;
    let (code, out, err) = finish(&env, &task).await;
    assert_eq!((code, out.as_str()), (3, "out\n/alloc/logs\n"));
    assert!(err.starts_with("err\n") && err.contains("Read-only file system"), "{err}");
    let mode = fs::metadata(logs(&task).join("web.stdout.0")).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777, 0o644);
    // A further attempt appends to the same file.
    let config = json!({"image": env.busybox().await, "command": "/bin/echo", "args": ["again"]});
    let mut again = env.prepare_again(task, "2", config).await;
    env.try_start(&mut again).await.unwrap();
    assert_eq!(finish(&env, &again).await.1, "out\n/alloc/logs\nagain\n");
    // A task with a terminal has one stream; a task with disabled logs has none.
    let task = sh(&mut env, "echo out; echo err >&2", json!({"tty": true})).await;
    assert_eq!(finish(&env, &task).await.1, "out\r\nerr\r\n");
    let config = json!({"image": env.busybox().await, "command": "/bin/echo", "args": ["nothing"]});
    let mut quiet = env.prepare(config).await;
    (quiet.config.stdout_path, quiet.config.stderr_path) = ("/dev/null".to_owned(), "/dev/null".to_owned());
    env.try_start(&mut quiet).await.unwrap();
    assert_eq!(finish(&env, &quiet).await, (0, String::new(), String::new()));
    assert!(files(&quiet, "stdout").is_empty());
    // The log files exist before the task prints anything, so that a client can follow them.
    let task = sh(&mut env, "sleep 600", json!({})).await;
    eventually("empty files", async || {
        if [files(&task, "stdout"), files(&task, "stderr")].iter().all(|files| files.len() == 1) {
            Ok(())
        } else {
            Err(())
        }
    })
    .await;
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// An exec'd process writes to its client. What it writes to the streams of the task's first process is in the task's
/// log.
#[tokio::test(flavor = "multi_thread")]
async fn execd_processes_and_failed_starts_leave_the_log_alone() {
    let mut env = environment().await;
    let task = sh(&mut env, "echo task; sleep 600", json!({})).await;
    says(&task, "task\n").await;
    assert_eq!(env.exec_text(&task, "echo session; echo into the log > /proc/1/fd/1").await, "session\n");
    says(&task, "task\ninto the log\n").await;
    let mut failed = env.prepare(json!({"image": env.busybox().await, "command": "/no/such"})).await;
    env.try_start(&mut failed).await.unwrap_err();
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_rotated_by_size_and_count() {
    let mut env = environment().await;
    let options = json!({"log_max_size": "8k", "log_max_files": 3});
    let task = sh(&mut env, "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo line $i; done", options).await;
    let (code, out, _) = finish(&env, &task).await;
    assert_eq!(code, 0);
    let files = files(&task, "stdout");
    let numbers: Vec<u64> = files.iter().map(|(number, _)| *number).collect();
    assert!(numbers.len() == 3 && numbers[2] == numbers[0] + 2 && numbers[0] > 20, "{numbers:?}");
    let sizes: Vec<u64> = files.iter().map(|(_, path)| fs::metadata(path).unwrap().len()).collect();
    assert!(sizes.iter().all(|size| *size <= 8 << 10), "{sizes:?}");
    assert!(sizes[..2].iter().all(|size| *size > (8 << 10) - "line 20000\n".len() as u64), "{sizes:?}");
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines.iter().rev().zip((1..=20_000).rev()).all(|(line, n)| *line == format!("line {n}")), "in order");
    assert_eq!(lines.last(), Some(&"line 20000"));
    for (_, path) in files {
        assert!(fs::read_to_string(path).unwrap().ends_with('\n'), "no line is split");
    }
    env.finish().await;
}

const TALKERS: usize = 10;
const LINES: usize = 100_000;

/// Ten tasks print while the processes that handle their logs are killed, one after the other and in random order.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_lost_or_doubled_whoever_dies() {
    let mut env = environment().await;
    let options = json!({"log_max_size": "64k", "log_max_files": 1000});
    let script =
        format!("seq 1 {} ; until [ -e /alloc/data/go ]; do sleep 0.1; done; seq {} {LINES}", LINES / 2, LINES / 2 + 1);
    let mut tasks = Vec::new();
    for _ in 0..TALKERS {
        tasks.push(sh(&mut env, &script, options.clone()).await);
    }
    let mut killed = 0;
    for round in 0..24 {
        if round == 8 {
            tasks.iter().for_each(|task| fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap());
        }
        let dice = u8::from_str_radix(&random_hex(1), 16).unwrap();
        let victim = ["writer", "keeper", "plugin", "agent", "writer"][usize::from(dice) % 5];
        match victim {
            "plugin" => {
                env.kill_plugin().await;
                env.start_plugin().await;
                for task in &tasks {
                    env.recover(task).await.unwrap();
                }
            }
            "agent" => {
                let plugin = env.plugin.take().unwrap();
                let socket = plugin.socket().to_owned();
                let child = plugin.detach();
                // The handle is forgotten, since dropping it would kill the plugin.
                std::mem::forget(child);
                env.plugin = Some(Plugin::reattach(&socket).await.unwrap());
                // The test can't kill a plugin that it has only reattached to, so it shuts that plugin down and starts
                // a new one.
                env.plugin.take().unwrap().shut_down().await;
                env.start_plugin().await;
                for task in &tasks {
                    env.recover(task).await.unwrap();
                }
            }
            writer => {
                if let Some(pid) = writers(&env).get(writer) {
                    let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
                    killed += 1;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(u64::from(dice))).await;
    }
    assert!(killed > 3, "dice without luck");
    let expected: String = (1..=LINES).map(|n| format!("{n}\n")).collect();
    for task in &tasks {
        let (code, out, _) = finish(&env, task).await;
        assert_eq!(code, 0);
        if out != expected {
            let at = out.lines().zip(expected.lines()).position(|(seen, wanted)| seen != wanted);
            let near = at.map(|at| out.lines().skip(at.saturating_sub(2)).take(5).collect::<Vec<_>>());
            panic!("{} of {} bytes; differs at line {at:?}: {near:?}", out.len(), expected.len());
        }
        let files = files(task, "stdout");
        for (_, path) in &files[..files.len() - 1] {
            let size = fs::metadata(path).unwrap().len();
            assert!(size <= 64 << 10 && size > (64 << 10) - 8, "{}: {size}", path.display());
        }
    }
    env.finish().await;
}

/// Other tasks of the group can put these objects where a log file would be.
#[tokio::test(flavor = "multi_thread")]
async fn what_lies_in_the_way_is_not_touched() {
    let mut env = environment().await;
    let outside = env.dir.join("precious");
    type Put = fn(&Path, &Path);
    let in_the_way: [(&str, Put); 5] = [
        ("a symlink", |path, outside| std::os::unix::fs::symlink(outside, path).unwrap()),
        ("a hard link", |path, outside| fs::hard_link(outside, path).unwrap()),
        ("a directory", |path, _| fs::create_dir(path).unwrap()),
        ("a FIFO", |path, _| nix::unistd::mkfifo(path, Mode::S_IRWXU).unwrap()),
        ("a device", |path, _| mknod(path, SFlag::S_IFCHR, Mode::S_IRWXU, makedev(1, 3)).unwrap()),
    ];
    for (what, put) in in_the_way {
        fs::write(&outside, "untouched").unwrap();
        let config = json!({
            "image": env.busybox().await, "command": "/bin/sh", "log_max_size": "4k",
            "args": ["-c", "echo first; until [ -e /alloc/data/go ]; do sleep 0.05; done; seq 1 2000; echo last"],
        });
        let mut task = env.prepare(config).await;
        put(&logs(&task).join("web.stdout.0"), &outside);
        env.try_start(&mut task).await.unwrap();
        says(&task, "first\n").await;
        // Another such object is put, in the middle of the output, where a later file would be.
        put(&logs(&task).join("web.stdout.2"), &outside);
        fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
        let (code, out, _) = finish(&env, &task).await;
        assert_eq!(code, 0);
        let numbers: String = (1..=2000).map(|n| format!("{n}\n")).collect();
        assert_eq!(out, format!("first\n{numbers}last\n"), "{what}");
        assert_eq!(fs::read_to_string(&outside).unwrap(), "untouched", "{what}");
        fs::remove_file(&outside).unwrap();
    }
    env.finish().await;
}

/// Replaces the log directory itself, and removes the file that is being written to.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_was_replaced_is_said_and_a_file_that_was_removed_is_made_anew() {
    let mut env = environment().await;
    let mut events = env.driver().task_events(TaskEventsRequest {}).await.unwrap().into_inner();
    let script = "echo first; until [ -e /alloc/data/go ]; do sleep 0.05; done; echo second; until [ -e /alloc/data/on ]; do sleep 0.05; done; echo third; sleep 600";
    let task = sh(&mut env, script, json!({})).await;
    says(&task, "first\n").await;
    fs::remove_file(logs(&task).join("web.stdout.0")).unwrap();
    fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    says(&task, "second\n").await;
    // Now the directory is a symlink to somewhere else.
    let elsewhere = env.dir.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::remove_dir_all(logs(&task)).unwrap();
    std::os::unix::fs::symlink(&elsewhere, logs(&task)).unwrap();
    fs::write(task.dirs.alloc_dir.join("alloc/data/on"), "").unwrap();
    let told = async {
        loop {
            let event = events.message().await.unwrap().unwrap();
            if event.message.contains("can't be written") {
                return event.message;
            }
        }
    };
    let told = tokio::time::timeout(patience(), told).await.expect("nothing is said");
    assert!(told.contains("stdout"), "{told}");
    assert_eq!(leak::entries(&elsewhere), Vec::<String>::new());
    // The path is a directory again.
    fs::remove_file(logs(&task)).unwrap();
    fs::create_dir(logs(&task)).unwrap();
    says(&task, "third\n").await;
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// A small disk for some of the allocations.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(env: &Env) -> Self {
        let path = env.dir.join("small");
        fs::create_dir_all(&path).unwrap();
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
        Self(path)
    }

    fn fill(&self) {
        let file = fs::File::create(self.0.join("filler")).unwrap();
        let mut writer = std::io::BufWriter::new(file);
        while std::io::Write::write_all(&mut writer, &[0; 4096]).is_ok() {}
    }

    fn empty(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

async fn on(disk: &SmallDisk, env: &mut Env, script: &str, policy: &str) -> Task {
    let alloc =
        nomad_driver_shim::host::Alloc::create(&disk.0, &format!("{}-{}", env.namespace, random_hex(4))).unwrap();
    env.allocs.push(alloc.clone());
    let config = json!({
        "image": env.busybox().await, "command": "/bin/sh", "args": ["-c", script], "log_policy": policy,
    });
    let mut task = env.prepare_in(alloc.create_task("web").unwrap(), "1", config).await;
    env.try_start(&mut task).await.unwrap();
    task
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_blocks_or_drops_as_the_job_says() {
    let mut env = Env::configured(json!({"disable_log_collection": true, "metrics": {"address": "127.0.0.1:0"}})).await;
    let disk = SmallDisk::new(&env);
    let script = "echo first; until [ -e /secrets/go ]; do sleep 0.05; done; seq 1 60000; echo done > /proc/self/fd/3; sleep 600";
    let script = script.replace("/proc/self/fd/3", "/tmp/done");
    let blocked = on(&disk, &mut env, &script, "block").await;
    let dropping = on(&disk, &mut env, &script, "drop").await;
    let fine = sh(&mut env, "while :; do echo alive; sleep 0.05; done", json!({})).await;
    for task in [&blocked, &dropping] {
        says(task, "first\n").await;
    }
    let mut events = env.driver().task_events(TaskEventsRequest {}).await.unwrap().into_inner();
    // Names need no blocks on a tmpfs.
    disk.fill();
    for task in [&blocked, &dropping] {
        fs::write(task.dirs.alloc_dir.join("web/secrets/go"), "").unwrap();
    }
    let is_done =
        async |task: &Task| env.exec(task, &["/bin/ls", "/tmp/done"], 0).await.unwrap().result.unwrap().exit_code == 0;
    eventually("who drops is not held up", async || if is_done(&dropping).await { Ok(()) } else { Err(()) }).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!is_done(&blocked).await, "who blocks has written all of it to a full disk");
    let before = log(&fine, "stdout").len();
    eventually("the others go on", async || if log(&fine, "stdout").len() > before { Ok(()) } else { Err(()) }).await;
    disk.empty();
    eventually("who was blocked goes on", async || if is_done(&blocked).await { Ok(()) } else { Err(()) }).await;
    let numbers: String = (1..=60_000).map(|n| format!("{n}\n")).collect();
    says(&blocked, "\n60000\n").await;
    assert_eq!(log(&blocked, "stdout"), format!("first\n{numbers}"), "nothing is lost");
    // The task that drops output has the number of dropped bytes in its log, and in an event that Nomad shows.
    env.exec_text(&dropping, "echo after > /proc/1/fd/1").await;
    says(&dropping, "after\n").await;
    let said = log(&dropping, "stdout");
    let count: usize = said
        .split(" bytes of output were dropped")
        .next()
        .unwrap()
        .rsplit('[')
        .next()
        .unwrap()
        .rsplit(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let note = said.lines().find(|line| line.contains("were dropped")).unwrap();
    assert!(note.contains("No space left on device"), "{note}");
    let kept = said.len() - "first\n".len() - "after\n".len() - note.len() - 2;
    assert_eq!(kept + count, numbers.len(), "{note}");
    let told = async {
        loop {
            let event = events.message().await.unwrap().unwrap();
            if event.message.contains(&format!("{count} bytes were dropped")) {
                return;
            }
        }
    };
    tokio::time::timeout(patience(), told).await.expect("no event tells of it");
    for task in [&blocked, &dropping, &fine] {
        env.destroy(task).await.unwrap();
    }
    eventually("all is cleared away", async || {
        let left = leak::entries(&env.dir.join("run/logs")).into_iter().filter(|name| !name.starts_with('.')).count();
        if left == 0 { Ok(()) } else { Err(left) }
    })
    .await;
    drop(disk);
    env.finish().await;
}

/// No log writer process runs when there is nothing to write; all of them run again when there is.
#[tokio::test(flavor = "multi_thread")]
async fn the_writer_is_in_a_group_of_its_own_and_goes_when_nobody_needs_it() {
    let mut env = environment().await;
    assert!(writers(&env).is_empty(), "started before it is needed");
    let task = sh(&mut env, "echo one; sleep 600", json!({})).await;
    says(&task, "one\n").await;
    let found = writers(&env);
    for pid in found.values() {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert!(
            groups
                .lines()
                .filter(|line| line.contains(":memory:") || line.starts_with("0::"))
                .any(|line| line.contains("nomad-driver-shim")),
            "{groups}"
        );
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let session: i32 = stat.rsplit(") ").next().unwrap().split(' ').nth(3).unwrap().parse().unwrap();
        assert_eq!(session, found["keeper"], "a session of its own");
    }
    // The processes of a task's log go on when the plugin ends.
    env.plugin.take().unwrap().shut_down().await;
    assert_eq!(writers(&env), found);
    env.start_plugin().await;
    env.recover(&task).await.unwrap();
    env.exec_text(&task, "echo two > /proc/1/fd/1").await;
    says(&task, "one\ntwo\n").await;
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// Measures the log writer's share of a core, and its memory, with 500 tasks that write 10,000 lines a second. This
/// needs a release build.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "minutes of the whole machine; make test-thousand"]
async fn five_hundred_chatty_tasks_cost_little() {
    const TASKS: usize = 500;
    let mut env = environment().await;
    let options = json!({"log_max_size": "64k", "log_max_files": 2});
    // The script starts no process for each line: that would measure fork.
    let script = "mkfifo /tmp/f; exec 3<>/tmp/f; until [ -e /alloc/data/go ]; do read -t 1 x <&3; done; \
                  while :; do echo a line of some length, as programs print them; read -t 0.048 x <&3; done";
    let mut tasks = Vec::new();
    for _ in 0..TASKS {
        tasks.push(sh(&mut env, script, options.clone()).await);
    }
    tasks.iter().for_each(|task| fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap());
    let pids = writers(&env);
    let used =
        || -> Duration { pids.values().map(|pid| crate::many::processor_time(u32::try_from(*pid).unwrap())).sum() };
    let resident = || -> u64 { pids.values().map(|pid| crate::support::resident(u32::try_from(*pid).unwrap())).sum() };
    tokio::time::sleep(Duration::from_secs(5)).await;
    let written = || -> u64 {
        tasks
            .iter()
            .map(|task| {
                files(task, "stdout")
                    .last()
                    .map_or(0, |(n, path)| n * (64 << 10) + fs::metadata(path).map_or(0, |meta| meta.len()))
            })
            .sum()
    };
    let (began, before, bytes, memory) = (Instant::now(), used(), written(), resident());
    tokio::time::sleep(Duration::from_secs(30)).await;
    let (took, cost) = (began.elapsed(), used() - before);
    let lines = (written() - bytes) / 48;
    eprintln!(
        "{:.0} lines a second from {TASKS} tasks: {:.2} % of a core, {} KiB resident before, {} after",
        lines as f64 / took.as_secs_f64(),
        100.0 * cost.as_secs_f64() / took.as_secs_f64(),
        memory >> 10,
        resident() >> 10
    );
    assert!(resident() < memory + (1 << 20), "it grows");
    for task in &tasks {
        env.destroy(task).await.unwrap();
    }
    env.finish().await;
}
