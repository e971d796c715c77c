//! The ids and names by which requests refer to tasks: each is checked before it is used to look up or create anything.

use tonic::Status;

use super::{config::ConfigError, status};
use crate::{ids::TaskId, pb::driver as wire};

/// Returns the task id that a request has in `field`.
///
/// # Errors
/// `InvalidArgument`, with the field's name, when the id is empty or has a NUL byte. No task has such an id; the answer
/// "not found", or the success of `StopTask` for unknown tasks, would hide a mistake of the caller.
pub(crate) fn task_id(field: &str, text: &str) -> Result<TaskId, Status> {
    match fault(text) {
        None => Ok(TaskId(text.to_owned())),
        Some(fault) => {
            let problem = format!("{field} {fault}; send the id that the task was started with");
            Err(status::from_config_error(&ConfigError::request_faults(vec![problem])))
        }
    }
}

/// Checks the ids, name and directory of a task that is to be started. The task's name and its allocation's directory
/// become parts of paths.
///
/// # Errors
/// When a field can't be used; the error has all such fields.
pub(crate) fn check_task(task: &wire::TaskConfig) -> Result<(), ConfigError> {
    let mut faults = Vec::new();
    for (field, text) in [("task.id", &task.id), ("task.name", &task.name), ("task.alloc_id", &task.alloc_id)] {
        if let Some(fault) = fault(text) {
            faults.push(format!("{field} {fault}"));
        }
    }
    for (field, text) in [("task.name", &task.name), ("task.alloc_id", &task.alloc_id)] {
        if text.contains('/') || matches!(text.as_str(), "." | "..") {
            faults.push(format!("{field} = {text:?} can't be the name of a directory"));
        }
    }
    if !task.alloc_dir.starts_with('/') {
        faults.push(format!("task.alloc_dir = {:?} is not an absolute path", task.alloc_dir));
    }
    if faults.is_empty() { Ok(()) } else { Err(ConfigError::request_faults(faults)) }
}

/// Returns what is wrong with an id or a name, if anything is.
fn fault(text: &str) -> Option<&'static str> {
    match text {
        "" => Some("is empty"),
        text if text.contains('\0') => Some("contains a NUL byte"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_no_task_can_have_is_refused_by_its_field() {
        assert_eq!(task_id("task_id", "a/web/1").expect("an id"), TaskId("a/web/1".to_owned()));
        // Everything else that Nomad allows in names is accepted.
        assert!(task_id("task_id", "a/ \u{e9}\n/1").is_ok());
        for (text, part) in [("", "task_id is empty"), ("a\0b", "task_id contains a NUL byte")] {
            let status = task_id("task_id", text).expect_err("refused");
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().contains(part), "{status:?}");
        }
    }

    #[test]
    fn every_field_that_names_a_task_is_checked() {
        let task = || wire::TaskConfig {
            id: "a/web/1".to_owned(),
            name: "web".to_owned(),
            alloc_id: "a".to_owned(),
            alloc_dir: "/allocs/a".to_owned(),
            ..Default::default()
        };
        check_task(&task()).expect("fine");
        let refused = |change: &dyn Fn(&mut wire::TaskConfig)| {
            let mut task = task();
            change(&mut task);
            check_task(&task).expect_err("refused").to_string()
        };
        assert!(refused(&|task| task.id.clear()).contains("task.id is empty"));
        assert!(refused(&|task| task.name.clear()).contains("task.name is empty"));
        assert!(refused(&|task| task.alloc_id.clear()).contains("task.alloc_id is empty"));
        assert!(refused(&|task| task.alloc_dir.clear()).contains("task.alloc_dir = \"\""));
        assert!(refused(&|task| "../x".clone_into(&mut task.name)).contains("task.name = \"../x\""));
        assert!(refused(&|task| "..".clone_into(&mut task.alloc_id)).contains("task.alloc_id = \"..\""));
        assert!(refused(&|task| "a\0".clone_into(&mut task.id)).contains("task.id contains a NUL byte"));
        let all = check_task(&wire::TaskConfig::default()).expect_err("refused").to_string();
        assert!(all.contains("4 problems"), "{all}");
    }
}
