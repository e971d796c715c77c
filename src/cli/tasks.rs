//! The tasks of all drivers on this host. They are read from their records, without an agent or a plugin.

use std::fs;

use super::{CliError, CommonArgs, print_message};
use crate::{
    image::ImagesInUse,
    places::{MountPoints, Places},
    task::{Record, read_records},
};

/// A task and its driver.
#[derive(Debug, Clone)]
pub(crate) struct FoundTask {
    /// The driver's name.
    pub driver: String,
    /// The driver's directories.
    pub places: Places,
    /// The task's record.
    pub record: Record,
}

/// Returns the drivers on this host by name, with their directories.
pub(crate) fn drivers(common: &CommonArgs) -> Vec<(String, Places)> {
    let entries = fs::read_dir(&common.run_dir).into_iter().flatten().flatten();
    let mut found: Vec<(String, Places)> = entries
        .filter(|entry| entry.path().join("tasks").is_dir())
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let places = Places::new(entry.path(), common.state_dir.join(&name));
            (name, places)
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// Returns whether this is the directory of a `run`, whose images belong to the command line.
pub(crate) fn is_run(driver: &str) -> bool {
    driver.starts_with("run-")
}

/// Returns the images that the tasks of all `run`s use, whether their processes live or not: an image is in use as long
/// as its layers are mounted.
pub(crate) fn in_use_by_runs(common: &CommonArgs) -> ImagesInUse {
    let mounts = MountPoints::read();
    let mounted = |found: &FoundTask| mounts.may_be_below(&found.places.rootfs(&found.record.intent.container_id));
    let runs = all_tasks(common).into_iter().filter(|found| is_run(&found.driver));
    runs.filter(mounted).map(|found| (found.record.intent.image, found.record.intent.lease)).collect()
}

/// Returns all tasks, in the order of drivers and ids. A run directory that can't be read is reported and skipped.
pub(crate) fn all_tasks(common: &CommonArgs) -> Vec<FoundTask> {
    let mut found = Vec::new();
    for (driver, places) in drivers(common) {
        match read_records(&places.tasks()) {
            Ok(records) => found.extend(records.readable.into_iter().map(|record| FoundTask {
                driver: driver.clone(),
                places: places.clone(),
                record,
            })),
            Err(error) => print_message(&format!("nomad-driver-shim: {}", crate::error_chain(&error))),
        }
    }
    found.sort_by(|a, b| (&a.driver, &a.record.intent.task_id).cmp(&(&b.driver, &b.record.intent.task_id)));
    found
}

/// Returns the one task that `wanted` means: by a task's id or name, by an allocation's or a container's id, or by the
/// beginning of one of these two.
///
/// # Errors
/// Fails when there is no such task, or more than one.
pub(crate) fn find_task(common: &CommonArgs, wanted: &str) -> Result<FoundTask, CliError> {
    let tasks = all_tasks(common);
    let exact = |found: &&FoundTask| {
        let record = &found.record;
        [
            record.intent.task_id.0.as_str(),
            record.intent.container_id.as_str(),
            record.intent.name.as_str(),
            record.intent.alloc_id.as_str(),
        ]
        .contains(&wanted)
    };
    let begins = |found: &&FoundTask| {
        let record = &found.record;
        wanted.len() >= 4
            && (record.intent.alloc_id.as_str().starts_with(wanted)
                || record.intent.container_id.as_str().starts_with(wanted))
    };
    let mut fitting: Vec<&FoundTask> = tasks.iter().filter(exact).collect();
    if fitting.is_empty() {
        fitting = tasks.iter().filter(begins).collect();
    }
    match fitting[..] {
        [found] => Ok(found.clone()),
        [] => Err(CliError::Usage(format!("no task {wanted:?} on this host; `ps` lists them"))),
        _ => {
            let names: Vec<String> = fitting.iter().map(|found| found.record.intent.container_id.to_string()).collect();
            Err(CliError::Usage(format!("{wanted:?} means {} tasks: {}; choose one", names.len(), names.join(", "))))
        }
    }
}
