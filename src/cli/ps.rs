//! `ps`: lists the tasks of all drivers on this host from their records, whether an agent is running or not.

use clap::Args;
use serde_json::json;

use super::{CliError, CommonArgs, print_data, table, tasks};
use crate::task::{Record, RecordState};

/// List the tasks of all drivers on this host
#[derive(Args, Debug)]
pub(crate) struct Ps {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Ps {
    /// Prints the list.
    ///
    /// # Errors
    /// Fails when the drivers can't be listed, or output fails. Records that can't be read are reported, and the exit
    /// code is 1.
    pub(crate) fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        let all = tasks::all_tasks(common)?;
        let exit_code = all.exit_code();
        let records: Vec<(String, Record)> = all.tasks.into_iter().map(|found| (found.driver, found.record)).collect();
        if self.json {
            let list: Vec<_> = records
                .iter()
                .map(|(driver, record)| {
                    json!({
                        "driver": driver, "task_id": record.intent.task_id, "name": record.intent.name,
                        "alloc_id": record.intent.alloc_id, "container_id": record.intent.container_id,
                        "image": record.intent.image, "runtime": record.intent.runtime,
                        "cgroup": record.intent.cgroup, "state": state(record), "pid": pid(record),
                    })
                })
                .collect();
            print_data(&format!("{}\n", json!(list)))?;
            return Ok(exit_code);
        }
        let rows: Vec<Vec<String>> = records
            .iter()
            .map(|(driver, record)| {
                let pid = pid(record).map_or_else(|| "-".to_owned(), |pid| pid.to_string());
                let alloc = record.intent.alloc_id.short();
                vec![
                    driver.clone(),
                    alloc,
                    record.intent.name.clone(),
                    state(record),
                    pid,
                    record.intent.runtime.clone(),
                    record.intent.image.clone(),
                ]
            })
            .collect();
        print_data(&table::render(&["DRIVER", "ALLOC", "TASK", "STATE", "PID", "RUNTIME", "IMAGE"], &rows))?;
        Ok(exit_code)
    }
}

fn pid(record: &Record) -> Option<u32> {
    record.state.run().map(|run| run.process.pid)
}

/// Returns a task's state by its record, or `gone` if the record says that the task runs and its process is not alive.
pub(crate) fn state(record: &Record) -> String {
    let alive = record.is_current() && record.state.run().is_some_and(|run| run.process.is_alive());
    match &record.state {
        RecordState::Intended => "starting".to_owned(),
        RecordState::Running(_) if alive => "running".to_owned(),
        RecordState::Stopping { .. } if alive => "stopping".to_owned(),
        RecordState::Running(_) | RecordState::Stopping { .. } => "gone".to_owned(),
        RecordState::Exited(exit) if exit.oom_killed => format!("exited ({}, OOM)", exit.code),
        RecordState::Exited(exit) => format!("exited ({})", exit.code),
        RecordState::Destroying => "destroying".to_owned(),
    }
}
