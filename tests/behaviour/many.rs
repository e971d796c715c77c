//! Many tasks and large outputs, again and again: no task gets the output or exit code of another, nothing is lost, and
//! nothing accumulates.

use std::{fmt::Write as _, future::Future, time::Duration};

use futures_util::{StreamExt as _, stream};
use nomad_driver_shim::{
    host::{Alloc, Collector, Output, encode},
    pb::driver::{
        DestroyTaskRequest, StartTaskRequest, StopTaskRequest, TaskConfigSchemaRequest, TaskStatsRequest,
        WaitTaskRequest,
    },
};
use serde_json::Value;

use crate::support::{Env, patience, program, resident, shell_in};

const ROUNDS: usize = 200;
const AT_ONCE: usize = 8;

/// Each task is started, runs, is stopped or ends by itself, and is destroyed; 8 tasks at a time, each with its own
/// output and exit code.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_hundred_rounds_leave_nothing() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let schema = env.driver().task_config_schema(TaskConfigSchemaRequest {}).await.unwrap().into_inner().spec;
    env.allocs = (0..ROUNDS)
        .map(|n| Alloc::create(&env.dir.join("allocs"), &format!("{}-{n}", env.namespace)).unwrap())
        .collect();
    // The first task pulls the image, fills caches and starts threads.
    assert_eq!(env.run(shell_in(&image, "exit 9")).await.0, 9);
    let before = resident(env.plugin().pid().unwrap()) >> 10;

    let permits = std::sync::Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
    let mut rounds = tokio::task::JoinSet::new();
    for (n, alloc) in env.allocs.clone().into_iter().take(ROUNDS).enumerate() {
        let (mut driver, schema, image, permits) = (env.driver(), schema.clone(), image.clone(), permits.clone());
        rounds.spawn(async move {
            let _permit = permits.acquire().await.unwrap();
            let stopped = n % 3 == 0;
            let script = if stopped {
                format!("trap 'exit 42' TERM; echo {n}; while :; do sleep 0.02; done")
            } else {
                format!("echo {n}; exit {}", n % 100)
            };
            let config = encode(schema.as_ref(), &shell_in(&image, &script)).unwrap();
            let dirs = alloc.create_task("web").unwrap();
            let (stdout, stderr) =
                (Collector::start(&dirs.stdout, Output::Memory), Collector::start(&dirs.stderr, Output::Memory));
            let task = dirs.config("1", config);
            let task_id = task.id.clone();
            driver.start_task(StartTaskRequest { task: Some(task) }).await.unwrap();
            if stopped {
                while !stdout.text().ends_with('\n') {
                    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                }
                let timeout = Some(prost_types::Duration { seconds: 30, nanos: 0 });
                driver
                    .stop_task(StopTaskRequest { task_id: task_id.clone(), timeout, signal: String::new() })
                    .await
                    .unwrap();
            }
            let answer = driver.wait_task(WaitTaskRequest { task_id: task_id.clone() }).await.unwrap().into_inner();
            for stream in [&stdout, &stderr] {
                assert!(stream.wait_for_end(patience()).await.is_some());
            }
            driver.destroy_task(DestroyTaskRequest { task_id, force: true }).await.unwrap();
            let expected = if stopped { 42 } else { n % 100 };
            assert_eq!(answer.result.unwrap().exit_code, i32::try_from(expected).unwrap(), "round {n}");
            assert_eq!(stdout.text(), format!("{n}\n"));
        });
    }
    while let Some(round) = rounds.join_next().await {
        round.unwrap();
    }
    let after = resident(env.plugin().pid().unwrap()) >> 10;
    eprintln!("resident memory of the plugin: {before} kB before, {after} kB after {ROUNDS} rounds");
    // 200 records, connections and logs that were never freed would take many megabytes; allocator noise does not.
    assert!(after < before + 12_000, "resident memory grew from {before} to {after} kB");
    env.finish().await;
}

/// An output of 50 MB is complete, thirty times in a row, as `nomad alloc exec` reads it (hashicorp/nomad#27146).
#[tokio::test(flavor = "multi_thread")]
async fn thirty_outputs_of_fifty_megabytes_are_complete() {
    let mut env = Env::new().await;
    let task = env.sh("seq 10000000 16249999 > /large && echo written; exec sleep 600").await;
    task.says("written").await;
    let mut expected = String::with_capacity(6_250_000 * 9);
    for number in 10_000_000..16_250_000 {
        writeln!(expected, "{number}").unwrap();
    }
    assert!(expected.len() > 50_000_000);
    let command = ["/bin/sh", "-c", "cat /large; echo done >&2; exit 7"];
    for round in 0..30 {
        let seen = env.talk(&task, &command, false).await.unwrap().end().await;
        assert!(seen.stdout == expected, "round {round}: {} of {} bytes", seen.stdout.len(), expected.len());
        assert_eq!((seen.stderr.as_str(), seen.code), ("done\n", Some(7)), "round {round}");
    }
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

const ALIVE: usize = 1000;
/// Half of the tasks sleep; the others wake up each second, without starting a further process.
const WATCHED: usize = ALIVE / 2;
const WAKES: &str = "mkfifo /dev/shm/f; exec 3<>/dev/shm/f; while :; do read -t 1 x <&3; done";

/// Checks whether a full node stays manageable, and measures what watching its tasks costs. This takes a minute on an
/// idle machine. A release build gives better figures for the cost: `make test-thousand`.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "takes minutes of the whole machine: make test-thousand"]
async fn a_thousand_tasks_alive_at_once() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let schema = env.driver().task_config_schema(TaskConfigSchemaRequest {}).await.unwrap().into_inner().spec;
    env.allocs = (0..ALIVE)
        .map(|n| Alloc::create(&env.dir.join("allocs"), &format!("{}-{n}", env.namespace)).unwrap())
        .collect();
    let [sleeping, waking] = ["exec sleep 100000", WAKES].map(|script| {
        let config = shell_in(&image, script);
        encode(schema.as_ref(), &config).unwrap()
    });
    let driver = env.driver();
    let allocs = env.allocs.clone().into_iter().enumerate();
    let began = std::time::Instant::now();
    let started = each(allocs.collect(), |(n, alloc)| {
        let (mut driver, config) = (driver.clone(), if n < WATCHED { &sleeping } else { &waking }.clone());
        async move {
            let dirs = alloc.create_task("web").unwrap();
            // The tasks print nothing: two thousand readers of their FIFOs would only cost memory.
            let streams = [&dirs.stdout, &dirs.stderr]
                .map(|fifo| std::fs::File::options().read(true).write(true).open(fifo).unwrap());
            let task = dirs.config("1", config);
            let id = task.id.clone();
            driver.start_task(StartTaskRequest { task: Some(task) }).await.unwrap();
            (id, streams)
        }
    })
    .await;
    let (ids, held): (Vec<_>, Vec<_>) = started.into_iter().unzip();
    eprintln!("{ALIVE} tasks started in {:.1} s", began.elapsed().as_secs_f64());

    let listed = std::time::Instant::now();
    let output = tokio::process::Command::new(program())
        .args(["ps", "--json", "--run-dir"])
        .arg(&env.dir)
        .output()
        .await
        .unwrap();
    let list: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(list.iter().filter(|task| task["state"] == "running").count(), ALIVE);
    eprintln!("listed in {} ms", listed.elapsed().as_millis());

    for (what, ids) in [("asleep", &ids[..WATCHED]), ("that wake up each second", &ids[WATCHED..])] {
        let share = watch(&env, ids).await;
        eprintln!("TaskStats of {WATCHED} tasks {what}, each second: {share:.2}% of a core in the plugin");
    }

    let began = std::time::Instant::now();
    each(ids, |task_id| {
        let mut driver = driver.clone();
        async move {
            let timeout = Some(prost_types::Duration { seconds: 0, nanos: 0 });
            let request = StopTaskRequest { task_id: task_id.clone(), timeout, signal: String::new() };
            driver.stop_task(request).await.unwrap();
            let answer = driver.wait_task(WaitTaskRequest { task_id: task_id.clone() }).await.unwrap().into_inner();
            assert_eq!(answer.result.unwrap().exit_code, 137);
            driver.destroy_task(DestroyTaskRequest { task_id, force: false }).await.unwrap();
        }
    })
    .await;
    drop(held);
    eprintln!("stopped and destroyed in {:.1} s", began.elapsed().as_secs_f64());
    env.finish().await;
}

/// Returns the processor time that the plugin needs to sample all these tasks each second, in percent of a core.
async fn watch(env: &Env, ids: &[String]) -> f64 {
    let (pid, watched) = (env.plugin().pid().unwrap(), Duration::from_secs(20));
    let collection_interval = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let mut readers = tokio::task::JoinSet::new();
    for id in ids {
        let request = TaskStatsRequest { task_id: id.clone(), collection_interval };
        let mut stream = env.driver().task_stats(request).await.unwrap().into_inner();
        let until = tokio::time::Instant::now() + watched + Duration::from_secs(6);
        readers.spawn(async move {
            let mut samples = 0;
            while let Ok(Ok(Some(_))) = tokio::time::timeout_at(until, stream.message()).await {
                samples += 1;
            }
            samples
        });
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    let before = processor_time(pid);
    tokio::time::sleep(watched).await;
    let spent = processor_time(pid) - before;
    for samples in readers.join_all().await {
        assert!(samples > 10, "a stream gave only {samples} samples in {watched:?}");
    }
    spent.as_secs_f64() / watched.as_secs_f64() * 100.0
}

/// Returns the processor time of a process so far (proc_pid_stat(5): fields 14 and 15, in ticks of 10 ms).
pub(crate) fn processor_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    Duration::from_millis(fields[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap() * 10).sum())
}

/// Applies `what` to each item, `AT_ONCE` at a time, and returns the answers in order.
async fn each<T, F: Future>(all: Vec<T>, what: impl Fn(T) -> F) -> Vec<F::Output> {
    stream::iter(all.into_iter().map(what)).buffered(AT_ONCE).collect().await
}
