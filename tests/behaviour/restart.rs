//! Measures how long an agent waits for a plugin's restart, with many tasks and with none.

use std::time::{Duration, Instant};

use nomad_driver_shim::pb::driver::{RecoverTaskRequest, TaskHandle};
use serde_json::{Value, json};

use crate::support::{Env, Task};

const TASKS: usize = 300;
const ROUNDS: usize = 15;
/// The delay after a start in which a plugin fills its pool.
const QUIET: Duration = Duration::from_secs(2);

/// The times of one restart: from exec to the answer of the handshake, and from exec to that of the first StartTask.
struct Restart {
    handshake: Duration,
    first_start: Duration,
}

/// Ends the plugin with SIGKILL and starts the next one. As an agent does, asks the new plugin to recover all tasks and
/// to start a new one.
async fn restart(env: &mut Env, tasks: &[TaskHandle], config: &Value) -> Restart {
    let mut task = env.prepare(config.clone()).await;
    env.kill_plugin().await;
    let began = Instant::now();
    let handshake = env.start_plugin_timed(began).await;
    let driver = env.driver();
    let mut recoveries = tokio::task::JoinSet::new();
    for handle in tasks.iter().cloned() {
        let mut driver = driver.clone();
        recoveries.spawn(async move {
            let request = RecoverTaskRequest { task_id: String::new(), handle: Some(handle) };
            driver.recover_task(request).await.map(drop)
        });
    }
    env.try_start(&mut task).await.unwrap();
    let first_start = began.elapsed();
    assert_eq!(env.finish_task(task).await.0, 0);
    // Recoveries that are still in progress would slow down the restart of the other plugin.
    while let Some(recovered) = recoveries.join_next().await {
        recovered.unwrap().unwrap();
    }
    tokio::time::sleep(QUIET).await;
    Restart { handshake, first_start }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1000.0
}

/// The restarts of both plugins alternate, so that both meet the same load of the machine. `make test-thousand` prints
/// the figures.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "takes minutes of the whole machine: make test-thousand"]
async fn a_plugin_with_many_tasks_is_soon_at_work_again() {
    let (mut empty, mut full) = (Env::new().await, Env::new().await);
    let image = full.busybox().await;
    let sleeper = json!({"image": image, "command": "/bin/sleep", "args": ["100000"]});
    let short = json!({"image": image, "command": "/bin/true"});
    let mut tasks: Vec<Task> = Vec::new();
    for _ in 0..TASKS {
        tasks.push(full.start(sleeper.clone()).await);
    }
    let handles: Vec<TaskHandle> = tasks.iter().map(|task| task.handle.clone().unwrap()).collect();
    let (mut of_empty, mut of_full) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        of_empty.push(restart(&mut empty, &[], &short).await);
        of_full.push(restart(&mut full, &handles, &short).await);
    }
    let figures = |what: fn(&Restart) -> Duration| {
        let [empty, full] = [&of_empty, &of_full].map(|all| median(all.iter().map(what).collect()));
        format!("{empty:.1} ms empty, {full:.1} ms with {TASKS} tasks, ratio {:.2}", full / empty)
    };
    eprintln!("exec to handshake, median of {ROUNDS}: {}", figures(|restart| restart.handshake));
    eprintln!("exec to the first StartTask's answer: {}", figures(|restart| restart.first_start));
    for task in &tasks {
        assert!(full.inspect(&task.id).await.is_ok(), "a task was lost");
        full.destroy(task).await.unwrap();
    }
    full.finish().await;
    empty.finish().await;
}
