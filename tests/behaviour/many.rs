//! Many tasks, again and again: nothing mixes up, nothing adds up.

use nomad_driver_shim::{
    host::{Alloc, Collector, Output, encode},
    pb::driver::{DestroyTaskRequest, StartTaskRequest, StopTaskRequest, TaskConfigSchemaRequest, WaitTaskRequest},
};
use serde_json::json;

use crate::support::{Env, PATIENCE, resident};

const ROUNDS: usize = 200;
const AT_ONCE: usize = 8;

/// Start, run, stop or end by itself, destroy; 8 at a time, each with its own output and exit code.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_hundred_rounds_leave_nothing() {
    let mut env = Env::new().await;
    let image = env.busybox().await;
    let schema = env.driver().task_config_schema(TaskConfigSchemaRequest {}).await.unwrap().into_inner().spec;
    env.allocs = (0..ROUNDS)
        .map(|n| Alloc::create(&env.dir.join("allocs"), &format!("{}-{n}", env.namespace)).unwrap())
        .collect();
    // Warm: the first task pulls, fills caches and makes threads.
    assert_eq!(env.run(json!({"image": image, "command": "/bin/sh", "args": ["-c", "exit 9"]})).await.0, 9);
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
            let config =
                encode(schema.as_ref(), &json!({"image": image, "command": "/bin/sh", "args": ["-c", script]}))
                    .unwrap();
            let dirs = alloc.task("web").unwrap();
            let (stdout, stderr) =
                (Collector::start(&dirs.stdout, Output::Keep), Collector::start(&dirs.stderr, Output::Keep));
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
                assert!(stream.ended(PATIENCE).await.is_some());
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
    // 200 records, connections and logs that stayed would be many megabytes; allocator noise is not.
    assert!(after < before + 12_000, "resident memory grew from {before} to {after} kB");
    env.finish().await;
}
