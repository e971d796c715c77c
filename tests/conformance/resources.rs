//! docs/protocol/nomad-plugin.md#6.3, rows 19 to 21: memory, processors, statistics.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use nomad_driver_shim::{
    cgroup::{CgroupMode, Cgroups},
    pb::driver::{
        TaskStats, TaskStatsRequest, TaskStatsResponse, cpu_usage::Fields as CpuField,
        memory_usage::Fields as MemoryField,
    },
};
use serde_json::json;
use tonic::Streaming;

use crate::{
    row,
    row::Row,
    seen::{limit, linux, memory, start_with},
    support::{Env, Task, eventually, not_applicable, patience},
};

pub(crate) fn rows() -> Vec<Row> {
    vec![
        row!(memory_limits, "6.3.19", "memory and memory_max, with -1: limit and reservation; no swap beyond"),
        row!(out_of_memory, "6.3.19 OOM", "a task that passes its memory is killed, and said to be"),
        row!(weights, "6.3.20", "processor shares are clamped to what the kernel takes; cores are all that is seen"),
        row!(share_pool, "6.3.20 pool", "the pool of shared processors is the task's, and stays so when it changes"),
        row!(statistics, "6.3.21", "statistics: soon, sane, at the interval, and ending with the task"),
    ]
}

const MIB: i64 = 1 << 20;

async fn memory_limits(env: &mut Env) {
    for (reserved, max, expected, kept) in [
        (32, 0, Some(32), 0),
        (32, 48, Some(48), 32),
        (32, 32, Some(32), 0),
        (64, 96, Some(96), 64),
        (32, -1, None, 32),
    ] {
        let config = env.shell("sleep 600", json!({})).await;
        let task = start_with(env, config, |config| {
            (memory(config).memory_mb, memory(config).memory_max_mb) = (reserved, max);
            linux(config).memory_limit_bytes = reserved.max(max) * MIB;
        })
        .await;
        let what = format!("memory {reserved}, memory_max {max}");
        let set = limit(env, &task, ("memory", "memory.limit_in_bytes"), "memory.max");
        let set = set.parse::<i64>().ok().filter(|set| *set < 1 << 50);
        assert_eq!(set, expected.map(|expected: i64| expected * MIB), "{what}");
        if kept != 0 {
            let low = limit(env, &task, ("memory", "memory.soft_limit_in_bytes"), "memory.low");
            assert_eq!(low, (kept * MIB).to_string(), "{what}");
        }
        if expected.is_some() {
            match Cgroups::detect().unwrap().mode() {
                CgroupMode::V2 => assert_eq!(limit(env, &task, ("", ""), "memory.swap.max"), "0", "{what}"),
                CgroupMode::V1 if Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists() => {
                    let both = limit(env, &task, ("memory", "memory.memsw.limit_in_bytes"), "");
                    assert_eq!(both.parse::<i64>().ok(), set, "{what}");
                }
                CgroupMode::V1 => {}
            }
        }
        env.destroy(&task).await.unwrap();
    }
}

pub(crate) async fn out_of_memory(env: &mut Env) {
    let config = env.shell("exec tail /dev/zero", json!({})).await;
    let task = start_with(env, config, |config| {
        memory(config).memory_mb = 20;
        linux(config).memory_limit_bytes = 20 * MIB;
    })
    .await;
    let result = env.wait(&task).await;
    assert!(result.oom_killed && result.exit_code != 0, "{result:?}");
    let config = env.shell("kill -9 $$; sleep 5; exit 9", json!({})).await;
    let task = env.start(config).await;
    env.stop(&task, Duration::ZERO, "").await.unwrap();
    assert!(!env.wait(&task).await.oom_killed, "a kill is no OOM");
}

async fn weights(env: &mut Env) {
    let mut weights = Vec::new();
    for (shares, expected) in [(1, 2), (1000, 1000), (1_000_000, 262_144)] {
        let config = env.shell("sleep 600", json!({})).await;
        let task = start_with(env, config, |config| {
            let resources = config.resources.as_mut().unwrap().allocated_resources.as_mut().unwrap();
            resources.cpu.as_mut().unwrap().cpu_shares = shares;
            linux(config).cpu_shares = shares;
        })
        .await;
        let seen: u64 = limit(env, &task, ("cpu", "cpu.shares"), "cpu.weight").parse().unwrap();
        match Cgroups::detect().unwrap().mode() {
            CgroupMode::V1 => assert_eq!(seen, expected),
            // Runtimes convert shares into a weight in different ways.
            CgroupMode::V2 => weights.push(seen),
        }
        env.destroy(&task).await.unwrap();
    }
    assert!(weights.is_sorted() && weights.iter().all(|weight| (1..=10_000).contains(weight)), "{weights:?}");

    let config = env.shell("grep Cpus_allowed_list /proc/self/status", json!({})).await;
    let task = start_with(env, config, |config| linux(config).cpuset_cpus = "0".to_owned()).await;
    assert_eq!(env.finish_task(task).await.1, "Cpus_allowed_list:\t0\n");
}

/// A pool of processors as Nomad's client makes it, outside Nomad's own cgroups.
pub(crate) struct Pool {
    /// The cgroup that sets the pool's processors.
    dir: PathBuf,
    /// The cgroup path that Nomad passes to a driver.
    pub told: String,
    parent: String,
}

impl Pool {
    pub(crate) fn new(env: &Env, cpus: &str) -> Self {
        if std::thread::available_parallelism().unwrap().get() < 2 {
            not_applicable("this machine has one processor");
        }
        let root = Path::new("/sys/fs/cgroup");
        match Cgroups::detect().unwrap().mode() {
            CgroupMode::V1 => {
                let parent = env.namespace.clone();
                let own = root.join("cpuset").join(&parent);
                let dir = own.join("share");
                for (dir, cpus) in [(&own, "0-1"), (&dir, cpus)] {
                    fs::create_dir(dir).unwrap();
                    let mems = fs::read_to_string(root.join("cpuset/cpuset.mems")).unwrap();
                    fs::write(dir.join("cpuset.mems"), mems).unwrap();
                    fs::write(dir.join("cpuset.cpus"), cpus).unwrap();
                }
                Self { told: dir.to_str().unwrap().to_owned(), dir, parent }
            }
            CgroupMode::V2 => {
                let parent = format!("{}.slice", env.namespace);
                let dir = root.join(&parent).join("share.slice");
                fs::create_dir_all(&dir).unwrap();
                for dir in [root, &root.join(&parent), &dir] {
                    for controller in ["cpuset", "cpu", "memory", "pids"] {
                        fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}")).unwrap();
                    }
                }
                fs::write(dir.join("cpuset.cpus"), cpus).unwrap();
                let scope = dir.join(format!("{}.web.scope", env.namespace));
                fs::create_dir(&scope).unwrap();
                Self { told: scope.to_str().unwrap().to_owned(), dir, parent }
            }
        }
    }

    /// Starts a task in the pool, as Nomad does.
    pub(crate) async fn task(&self, env: &mut Env) -> Task {
        let config = env.shell("sleep 600", json!({})).await;
        start_with(env, config, |config| linux(config).cpuset_cgroup.clone_from(&self.told)).await
    }

    pub(crate) fn set(&self, cpus: &str) {
        fs::write(self.dir.join("cpuset.cpus"), cpus).unwrap();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.told);
        let _ = fs::remove_dir(&self.dir);
        for hierarchy in Cgroups::detect().unwrap().hierarchies() {
            let _ = fs::remove_dir(hierarchy.join(&self.parent));
        }
    }
}

async fn share_pool(env: &mut Env) {
    let pool = Pool::new(env, "0");
    let task = pool.task(env).await;
    for cpus in ["0", "0-1", "1"] {
        pool.set(cpus);
        eventually(&format!("the task has processors {cpus}"), async || {
            let seen = env.exec_text(&task, "grep Cpus_allowed_list /proc/1/status").await;
            if seen == format!("Cpus_allowed_list:\t{cpus}\n") { Ok(()) } else { Err(seen) }
        })
        .await;
    }
    env.destroy(&task).await.unwrap();
}

pub(crate) async fn stats(env: &Env, task: &Task, interval_ms: i32) -> Streaming<TaskStatsResponse> {
    let collection_interval = Some(prost_types::Duration { seconds: 0, nanos: interval_ms * 1_000_000 });
    let request = TaskStatsRequest { task_id: task.id.clone(), collection_interval };
    env.driver().task_stats(request).await.unwrap().into_inner()
}

pub(crate) async fn sample(stream: &mut Streaming<TaskStatsResponse>) -> Option<TaskStats> {
    let answer = tokio::time::timeout(patience(), stream.message()).await.expect("no sample").unwrap();
    answer.map(|answer| answer.stats.unwrap())
}

async fn statistics(env: &mut Env) {
    let busy = env.sh("until [ -e /alloc/data/go ]; do :; done").await;
    let idle = env.sh("sleep 600").await;
    let mut percents = Vec::new();
    for task in [&idle, &busy] {
        let mut stream = stats(env, task, 400).await;
        let mut times = Vec::new();
        let mut last = None;
        for _ in 0..3 {
            let now = sample(&mut stream).await.expect("the task runs");
            let at = now.timestamp.expect("a timestamp");
            times.push(at.seconds as f64 + f64::from(at.nanos) / 1e9);
            last = now.agg_resource_usage;
        }
        assert!(times[2] - times[0] > 0.4, "samples at {times:?} for an interval of 0.4 s");
        let usage = last.unwrap();
        let (cpu, memory) = (usage.cpu.unwrap(), usage.memory.unwrap());
        assert!(cpu.measured_fields.contains(&i32::from(CpuField::Percent)), "{cpu:?}");
        assert!(!memory.measured_fields.is_empty() && memory.usage.max(memory.rss) > 0, "{memory:?}");
        percents.push(cpu.percent);
    }
    // On a shared machine, a busy loop may get less than a core, but not a thousand times less, and not more than all
    // cores.
    let cores = std::thread::available_parallelism().unwrap().get();
    #[allow(clippy::cast_precision_loss)]
    let all = cores as f64 * 110.0;
    assert!(percents[1] > 5.0 && percents[1] > 2.0 * percents[0] && percents[1] < all, "{percents:?}");
    let mut stream = stats(env, &busy, 400).await;
    fs::write(busy.dirs.alloc_dir.join("alloc/data/go"), "").unwrap();
    env.wait(&busy).await;
    while sample(&mut stream).await.is_some() {}
}

/// Returns whether all `wanted` fields are reported. Row B12 uses it.
pub(crate) fn has(fields: &[i32], wanted: &[MemoryField]) -> bool {
    wanted.iter().all(|field| fields.contains(&i32::from(*field)))
}
