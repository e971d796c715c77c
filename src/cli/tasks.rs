//! The tasks of all drivers on this host. They are read from their records, without an agent or a plugin.

use std::{fs, io, path::Path};

use super::{CliError, CommonArgs, print_message};
use crate::{
    files::none_if_missing,
    image::ImagesInUse,
    places::{MountPoints, Places},
    task::{Record, TaskError, read_records},
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

/// The tasks of all drivers on this host.
#[derive(Debug)]
pub(crate) struct AllTasks {
    /// The tasks, in the order of drivers and ids.
    pub tasks: Vec<FoundTask>,
    /// Whether the records of all drivers could be read.
    pub is_complete: bool,
}

impl AllTasks {
    /// Returns the exit code of a command that has listed these tasks: 1 if there may be more of them.
    pub(crate) fn exit_code(&self) -> u8 {
        u8::from(!self.is_complete)
    }
}

/// Returns the drivers on this host by name, with their directories.
///
/// # Errors
/// Fails when a directory can't be read. There may be drivers then, and the caller must not conclude that there are
/// none.
pub(crate) fn drivers(common: &CommonArgs) -> Result<Vec<(String, Places)>, CliError> {
    let unreadable = |path: &Path, source| CliError::Unreadable { path: path.to_owned(), source };
    let listed = none_if_missing(fs::read_dir(&common.run_dir)).map_err(|error| unreadable(&common.run_dir, error))?;
    let mut found = Vec::new();
    for entry in listed.into_iter().flatten() {
        let entry = entry.map_err(|error| unreadable(&common.run_dir, error))?;
        let tasks = entry.path().join("tasks");
        match fs::metadata(&tasks) {
            Ok(metadata) if metadata.is_dir() => {
                let name = entry.file_name().to_string_lossy().into_owned();
                let places = Places::new(entry.path(), common.state_dir.join(&name));
                found.push((name, places));
            }
            Ok(_) => {}
            // This is not the directory of a driver.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(error) => return Err(unreadable(&tasks, error)),
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// Returns whether this is the directory of a `run`, whose images belong to the command line.
pub(crate) fn is_run(driver: &str) -> bool {
    driver.starts_with("run-")
}

/// Returns the images that the tasks of all `run`s use, whether their processes live or not: an image is in use as long
/// as its layers are mounted.
///
/// # Errors
/// Fails when the record of a run can't be read: its image may be in use.
pub(crate) fn in_use_by_runs(common: &CommonArgs) -> Result<ImagesInUse, CliError> {
    let mounts = MountPoints::read();
    let mut in_use = Vec::new();
    for (_, places) in drivers(common)?.into_iter().filter(|(driver, _)| is_run(driver)) {
        let records = read_records(&places.tasks()).map_err(TaskError::from)?;
        if let Some(path) = records.unreadable.first().filter(|_| mounts.may_be_below(places.run())) {
            let problem = format!("the record {} is damaged, and the image of its run may be in use", path.display());
            return Err(CliError::Usage(problem));
        }
        let mounted = |record: &Record| mounts.may_be_below(&places.rootfs(&record.intent.container_id));
        let records = records.readable.into_iter().filter(mounted);
        in_use.extend(records.map(|record| (record.intent.image, record.intent.lease)));
    }
    Ok(in_use.into_iter().collect())
}

/// Returns all tasks. If a driver's records can't be read at the moment, that is reported, and its tasks are left out.
///
/// # Errors
/// Fails when the drivers can't be listed.
pub(crate) fn all_tasks(common: &CommonArgs) -> Result<AllTasks, CliError> {
    let mut found = AllTasks { tasks: Vec::new(), is_complete: true };
    for (driver, places) in drivers(common)? {
        match read_records(&places.tasks()) {
            Ok(records) => found.tasks.extend(records.readable.into_iter().map(|record| FoundTask {
                driver: driver.clone(),
                places: places.clone(),
                record,
            })),
            Err(error) => {
                print_message(&format!("nomad-driver-shim: {}", crate::error_chain(&error)));
                found.is_complete = false;
            }
        }
    }
    found.tasks.sort_by(|a, b| (&a.driver, &a.record.intent.task_id).cmp(&(&b.driver, &b.record.intent.task_id)));
    Ok(found)
}

/// Returns the one task that `wanted` means: by a task's id or name, by an allocation's or a container's id, or by the
/// beginning of one of these two.
///
/// # Errors
/// Fails when there is no such task, or more than one.
pub(crate) fn find_task(common: &CommonArgs, wanted: &str) -> Result<FoundTask, CliError> {
    let AllTasks { tasks, is_complete } = all_tasks(common)?;
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
        [] if is_complete => Err(CliError::Usage(format!("no task {wanted:?} on this host; `ps` lists them"))),
        [] => Err(CliError::Usage(format!("no task {wanted:?} among those whose records could be read"))),
        _ => {
            let names: Vec<String> = fitting.iter().map(|found| found.record.intent.container_id.to_string()).collect();
            Err(CliError::Usage(format!("{wanted:?} means {} tasks: {}; choose one", names.len(), names.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::symlink,
        path::{Path, PathBuf},
    };

    use super::*;

    fn common(directory: &Path) -> CommonArgs {
        CommonArgs {
            address: None,
            namespace: "test".to_owned(),
            run_dir: directory.join("run"),
            state_dir: PathBuf::from("/nonexistent"),
        }
    }

    /// A link that leads to itself stands for a directory that can't be opened, for example for lack of descriptors.
    #[test]
    fn an_unreadable_directory_is_not_taken_for_an_empty_one() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let common = common(directory.path());
        assert_eq!(drivers(&common).expect("listed").len(), 0, "a missing directory is empty");
        symlink("run", &common.run_dir).expect("linked");
        assert!(drivers(&common).is_err() && all_tasks(&common).is_err() && in_use_by_runs(&common).is_err());
        fs::remove_file(&common.run_dir).expect("removed");
        fs::create_dir_all(common.run_dir.join("shim/tasks")).expect("made");
        fs::create_dir(common.run_dir.join("other")).expect("made");
        fs::write(common.run_dir.join("file"), "").expect("written");
        assert_eq!(drivers(&common).expect("listed").len(), 1);
        symlink("tasks", common.run_dir.join("other/tasks")).expect("linked");
        assert!(drivers(&common).is_err());
    }
}
