//! `stats`: shows the resource usage of running tasks, as the kernel counts it.

use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use super::{CliError, CommonArgs, print_data, print_message, ps, table, tasks};
use crate::cgroup::{CgroupError, Cgroups, Usage, cpu_percent};

/// The time between the two samples from which processor usage is computed.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Show the resource usage of running tasks
#[derive(Args, Debug)]
pub(crate) struct Stats {
    /// Show only this task
    task: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl From<CgroupError> for CliError {
    fn from(error: CgroupError) -> Self {
        Self::Usage(crate::error_chain(&error))
    }
}

impl Stats {
    /// Prints the list.
    ///
    /// # Errors
    /// Fails when the task does not exist, or output fails. A task whose cgroup can't be read is left out with a
    /// message, and the exit code is 1.
    pub(crate) async fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        let tasks = match &self.task {
            Some(task) => tasks::AllTasks { tasks: vec![tasks::find_task(common, task)?], is_complete: true },
            None => tasks::all_tasks(common)?,
        };
        let mut exit_code = tasks.exit_code();
        let cgroups = Cgroups::detect()?;
        let running: Vec<_> = tasks.tasks.into_iter().filter(|found| ps::state(&found.record) == "running").collect();
        let mut measure = |found: &tasks::FoundTask| -> Option<Usage> {
            cgroups.usage(&found.record.intent.cgroup).unwrap_or_else(|error| {
                let error = crate::error_chain(&error);
                print_message(&format!("nomad-driver-shim: task {}: {error}", found.record.intent.task_id));
                exit_code = 1;
                None
            })
        };
        let first: Vec<Option<Usage>> = running.iter().map(&mut measure).collect();
        let began = Instant::now();
        if !running.is_empty() {
            tokio::time::sleep(SAMPLE_INTERVAL).await;
        }
        // A task whose usage could not be read before is not tried again.
        let again = |(found, before): (_, &Option<Usage>)| before.as_ref().and_then(|_| measure(found));
        let second: Vec<Option<Usage>> = running.iter().zip(&first).map(again).collect();
        let time = began.elapsed();
        let mut list = Vec::new();
        let mut rows = Vec::new();
        for (found, (before, after)) in running.iter().zip(first.iter().zip(&second)) {
            let (Some(before), Some(after)) = (before, after) else { continue };
            let percent = cpu_percent(before.cpu.total_ns, after.cpu.total_ns, time);
            let record = &found.record;
            list.push(json!({
                "driver": found.driver, "task_id": record.intent.task_id, "container_id": record.intent.container_id,
                "cpu_percent": percent, "cpu_ns": after.cpu.total_ns, "throttled_ns": after.cpu.throttled_ns,
                "memory": after.memory.usage, "rss": after.memory.rss, "cache": after.memory.cache,
                "swap": after.memory.swap, "max_memory": after.memory.max_usage,
            }));
            let bytes =
                |bytes: Option<u64>| bytes.map_or("-".to_owned(), |bytes| indicatif::HumanBytes(bytes).to_string());
            rows.push(vec![
                found.driver.clone(),
                record.intent.alloc_id.short(),
                record.intent.name.clone(),
                format!("{percent:.1}"),
                bytes(after.memory.usage),
                bytes(after.memory.rss),
                bytes(after.memory.cache),
                bytes(after.memory.swap),
            ]);
        }
        if self.json {
            print_data(&format!("{}\n", json!(list)))?;
        } else {
            print_data(&table::render(&["DRIVER", "ALLOC", "TASK", "CPU %", "MEMORY", "RSS", "CACHE", "SWAP"], &rows))?;
        }
        Ok(exit_code)
    }
}
