//! Runs many short tasks, and samples what resources the driver uses meanwhile.

use std::{fs, path::Path, sync::Arc, time::Instant};

use nomad_driver_shim::pb::driver::{DestroyTaskRequest, StartTaskRequest, WaitTaskRequest};
use serde_json::json;
use tokio::task::JoinSet;

use crate::support::{Env, leak, resident};

/// How many tasks run at a time.
const WORKERS: usize = 4;
/// The number of lines of the table.
const SAMPLES: usize = 10;

/// Runs this many tasks to their ends and prints a table of samples.
pub(crate) async fn soak(tasks: usize) {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let began = Instant::now();
    eprintln!(
        "| after | seconds | memory kB | descriptors | threads | mounts | cgroups | files of run / state | wrong codes |"
    );
    eprintln!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    let (mut done, mut wrong) = (0, 0);
    while done < tasks {
        let count = tasks.div_ceil(SAMPLES).min(tasks - done);
        wrong += batch(&mut env, &image, done, count).await;
        done += count;
        sample(&env, done, began, wrong);
    }
    assert_eq!(wrong, 0, "wrong exit codes");
    env.finish().await;
}

/// Runs `count` tasks with the numbers from `first` on, several at a time. Returns how many had a wrong exit code or
/// output.
async fn batch(env: &mut Env, image: &str, first: usize, count: usize) -> usize {
    let mut prepared = Vec::new();
    let mut wrong = 0;
    for chunk in (first..first + count).collect::<Vec<_>>().chunks(WORKERS * 8) {
        for number in chunk {
            let runtime = if number % 2 == 0 { "crun" } else { "runc" };
            let script = format!("echo {number}; exit {}", number % 5);
            let config = json!({"image": image, "command": "/bin/sh", "args": ["-c", script], "runtime": runtime});
            prepared.push((env.prepare(config).await, *number));
        }
        let driver = env.driver();
        let mut at_work = JoinSet::new();
        let limit = Arc::new(tokio::sync::Semaphore::new(WORKERS));
        for (task, number) in prepared.drain(..) {
            let (mut driver, limit) = (driver.clone(), limit.clone());
            at_work.spawn(async move {
                let _permit = limit.acquire_owned().await.unwrap();
                driver.start_task(StartTaskRequest { task: Some(task.config.clone()) }).await.unwrap();
                let answer = driver.wait_task(WaitTaskRequest { task_id: task.id.clone() }).await.unwrap().into_inner();
                driver.destroy_task(DestroyTaskRequest { task_id: task.id.clone(), force: true }).await.unwrap();
                let (out, _) = task.output().await;
                let is_right = answer.result.unwrap().exit_code == i32::try_from(number % 5).unwrap();
                is_right && out == format!("{number}\n")
            });
        }
        while let Some(is_right) = at_work.join_next().await {
            wrong += usize::from(!is_right.unwrap());
        }
        // A sample is meaningful only when no teardown is still in progress.
        let left = leak::while_alive(env).await;
        assert!(left.is_empty(), "{left:#?}");
        env.allocs.drain(..).for_each(|alloc| alloc.remove().unwrap());
    }
    wrong
}

fn sample(env: &Env, done: usize, began: Instant, wrong: usize) {
    let pid = env.plugin().pid().unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let threads = status.lines().find_map(|line| line.strip_prefix("Threads:")).unwrap().trim();
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let mounts = mounts.lines().filter(|line| line.contains(env.dir.to_str().unwrap())).count();
    eprintln!(
        "| {done} | {} | {} | {} | {threads} | {mounts} | {} | {} / {} | {wrong} |",
        began.elapsed().as_secs(),
        resident(pid) >> 10,
        leak::entries(Path::new(&format!("/proc/{pid}/fd"))).len(),
        leak::cgroups(env).len(),
        files(&env.dir.join("run")),
        files(&env.dir.join("state")),
    );
}

fn files(path: &Path) -> usize {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| if entry.file_type().is_ok_and(|kind| kind.is_dir()) { files(&entry.path()) } else { 1 }).sum()
}
