//! TaskStats: the resources that a task uses, as the kernel counts them, in Nomad's units.

use std::time::Duration;

use nomad_driver_shim::pb::driver::{
    TaskStats, TaskStatsRequest, cpu_usage::Fields as CpuField, memory_usage::Fields as MemoryField,
};
use serde_json::json;
use tonic::Streaming;

use crate::support::{Env, Task, patience};

async fn stats(
    env: &Env,
    task: &Task,
    interval_ms: i32,
) -> Streaming<nomad_driver_shim::pb::driver::TaskStatsResponse> {
    let collection_interval = Some(prost_types::Duration { seconds: 0, nanos: interval_ms * 1_000_000 });
    let request = TaskStatsRequest { task_id: task.id.clone(), collection_interval };
    env.driver().task_stats(request).await.unwrap().into_inner()
}

async fn next(stream: &mut Streaming<nomad_driver_shim::pb::driver::TaskStatsResponse>) -> Option<TaskStats> {
    let answer = tokio::time::timeout(patience(), stream.message()).await.expect("no sample").unwrap();
    answer.map(|answer| answer.stats.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_task_is_told_from_an_idle_one() {
    let mut env = Env::new().await;
    let idle = env.sh("sleep 600").await;
    let busy = env.sh("while :; do :; done").await;
    let mut percents = Vec::new();
    for task in [&idle, &busy] {
        let mut stream = stats(&env, task, 500).await;
        let first = next(&mut stream).await.unwrap();
        let usage = first.agg_resource_usage.unwrap();
        assert_eq!(first.id, task.id);
        assert!(first.timestamp.is_some());
        assert!(usage.cpu.unwrap().percent.abs() < f64::EPSILON, "the first sample has nothing to compare with");
        let memory = usage.memory.unwrap();
        assert!(memory.usage > 0 && memory.usage < 200 << 20, "{memory:?}");
        for field in [MemoryField::Rss, MemoryField::Cache, MemoryField::Usage] {
            assert!(memory.measured_fields.contains(&i32::from(field)), "{field:?}");
        }
        let cpu = next(&mut stream).await.unwrap().agg_resource_usage.unwrap().cpu.unwrap();
        for field in [CpuField::Percent, CpuField::ThrottledPeriods, CpuField::ThrottledTime, CpuField::UserMode] {
            assert!(cpu.measured_fields.contains(&i32::from(field)), "{field:?}");
        }
        percents.push(cpu.percent);
    }
    // The machine is shared: a busy loop may get less than a core, but never a thousand times less, or more than all.
    let cores = std::thread::available_parallelism().unwrap().get();
    #[allow(clippy::cast_precision_loss)]
    let all = cores as f64 * 100.0;
    assert!(percents[1] > 5.0 && percents[1] > 2.0 * percents[0] && percents[1] <= all * 1.1, "{percents:?}");
    for task in [&idle, &busy] {
        env.destroy(task).await.unwrap();
    }
    env.finish().await;
}

/// The counters of user and system time of cgroup version 1 only count the process that runs at a tick: by these
/// counters, such a task used a fifth of this time.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_wakes_for_moments_is_told_whole() {
    let mut env = Env::new().await;
    let task = env.sh("mkfifo /dev/shm/f; exec 3<>/dev/shm/f; echo ready; while :; do read -t 0.002 x <&3; done").await;
    task.says("ready").await;
    let pid = env.attribute(&task, "pid").await;
    // proc_pid_schedstat(5): the time spent on the processor, in nanoseconds.
    let spent = || {
        let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
        text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
    };
    let before = spent();
    let mut stream = stats(&env, &task, 250).await;
    let mut samples = Vec::new();
    for _ in 0..9 {
        let sample = next(&mut stream).await.unwrap();
        let at = sample.timestamp.unwrap();
        let percent = sample.agg_resource_usage.unwrap().cpu.unwrap().percent;
        samples.push((at.seconds as f64 + f64::from(at.nanos) / 1e9, percent));
    }
    let spent = spent() - before;
    let told: f64 = samples.windows(2).map(|pair| (pair[1].0 - pair[0].0) * pair[1].1 / 100.0).sum();
    // The samples don't contain the time that was spent before the first sample and after the last.
    assert!(told > spent * 0.6 && told < spent * 1.1, "{told} s told, {spent} s spent: {samples:?}");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_keeps_its_interval_and_ends_with_the_task() {
    let mut env = Env::new().await;
    let task = env.sh("until [ -e /alloc/data/go ]; do sleep 0.05; done").await;
    let mut stream = stats(&env, &task, 200).await;
    let mut times = Vec::new();
    for _ in 0..4 {
        let at = next(&mut stream).await.unwrap().timestamp.unwrap();
        times.push(at.seconds as f64 + f64::from(at.nanos) / 1e9);
    }
    assert!(times[3] - times[0] > 0.4, "too soon: {times:?}");
    std::fs::write(task.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    env.wait(&task).await;
    while next(&mut stream).await.is_some() {}
    // Nomad calls TaskStats again until it has processed the exit; an error each time would fill Nomad's log.
    assert_eq!(next(&mut stats(&env, &task, 200).await).await, None);
    env.destroy(&task).await.unwrap();
    assert_eq!(next(&mut stats(&env, &task, 200).await).await, None);
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operators_interval_wins_and_stats_outlive_the_plugin() {
    let mut env = Env::configured(json!({"stats_interval": "100ms"})).await;
    let task = env.sh("sleep 600").await;
    for round in 0..2 {
        let mut stream = stats(&env, &task, 990).await;
        let began = std::time::Instant::now();
        for _ in 0..4 {
            next(&mut stream).await.unwrap();
        }
        assert!(began.elapsed() < Duration::from_millis(1900), "round {round}: {:?}", began.elapsed());
        if round == 0 {
            env.kill_plugin().await;
            env.start_plugin().await;
            env.recover(&task).await.unwrap();
        }
    }
    env.destroy(&task).await.unwrap();
    env.finish().await;
}

/// Memory as the task itself uses it: a file on a tmpfs counts as cache, a shell variable does not.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_are_bytes() {
    let mut env = Env::new().await;
    let task = env.sh("dd if=/dev/zero of=/dev/shm/file bs=1M count=20 2>/dev/null; echo ready; sleep 600").await;
    task.says("ready").await;
    let memory = next(&mut stats(&env, &task, 200).await).await.unwrap().agg_resource_usage.unwrap().memory.unwrap();
    let megabytes = 20 << 20;
    assert!(memory.cache >= megabytes && memory.cache < 2 * megabytes, "{memory:?}");
    assert!(memory.usage >= memory.cache && memory.rss < megabytes, "{memory:?}");
    env.destroy(&task).await.unwrap();
    env.finish().await;
}
