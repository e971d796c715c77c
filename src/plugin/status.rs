//! Converts the errors of tasks and of configurations to the statuses that Nomad reads: the code, the text, and whether
//! the restart policy may try again.
//!
//! Every text passes through [`crate::text::sanitize`]: it may contain text of images, registries, runtimes and jobs.

use prost::Message as _;
use tonic::{Code, Status};

use super::config::ConfigError;
use crate::{
    pb::{rpc, structs::RecoverableError},
    task::TaskError,
    text::{self, MESSAGE_MAX},
};

/// The type URL by which Nomad finds the detail of a recoverable error.
const RECOVERABLE_TYPE_URL: &str = "type.googleapis.com/hashicorp.nomad.plugins.shared.structs.RecoverableError";

/// Converts a task's error. `Unavailable` and `Canceled` are never used: Nomad reads them as "the plugin is going
/// away".
pub(crate) fn from_task_error(error: &TaskError) -> Status {
    let text = crate::error_chain(error);
    if error.is_recoverable() {
        return recoverable(&text);
    }
    let code = match error {
        TaskError::NotFound(_) => Code::NotFound,
        TaskError::AlreadyStarted(_) => Code::AlreadyExists,
        TaskError::Signal(_)
        | TaskError::Reference(_)
        | TaskError::Runtime(_)
        | TaskError::NotInSandbox { .. }
        | TaskError::AppArmor(_) => Code::InvalidArgument,
        _ => Code::Unknown,
    };
    new(code, &text)
}

/// Converts a configuration's error, which is not recoverable: trying again changes nothing.
pub(crate) fn from_config_error(error: &ConfigError) -> Status {
    // The text is bounded already: it may list many faults, and each of them was truncated separately.
    Status::invalid_argument(error.to_string())
}

/// Creates a status from a text that may contain foreign text.
pub(crate) fn new(code: Code, text: &str) -> Status {
    Status::new(code, text::sanitize(text, MESSAGE_MAX))
}

/// Creates the status of an error that may pass: `FailedPrecondition` with Nomad's detail first
/// (docs/protocol/nomad-plugin.md#4.1).
pub(crate) fn recoverable(text: &str) -> Status {
    let text = text::sanitize(text, MESSAGE_MAX);
    let detail = prost_types::Any {
        type_url: RECOVERABLE_TYPE_URL.to_owned(),
        value: RecoverableError { recoverable: true }.encode_to_vec(),
    };
    let details = rpc::Status { code: Code::FailedPrecondition as i32, message: text.clone(), details: vec![detail] };
    Status::with_details(Code::FailedPrecondition, text, details.encode_to_vec().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        host::is_recoverable,
        ids::TaskId,
        shim::{RefusalCode, ShimError},
    };

    #[test]
    fn each_kind_of_error_has_its_code() {
        let id = || TaskId("a/b/1".to_owned());
        let gone = ShimError::ConnectionLost { call: "Create", detail: "x".to_owned() };
        let refused = ShimError::Refused {
            call: "Create",
            code: RefusalCode::UNKNOWN,
            message: "executable file `/x` not found".to_owned(),
        };
        let message = "runc did not terminate successfully: exit status 137".to_owned();
        let killed = ShimError::Refused { call: "Create", code: RefusalCode::UNKNOWN, message };
        for (error, code, again) in [
            (TaskError::NotFound(id()), Code::NotFound, false),
            (TaskError::AlreadyStarted("x".to_owned()), Code::AlreadyExists, false),
            (TaskError::StillRunning(id()), Code::Unknown, false),
            (TaskError::Signal("X".to_owned()), Code::InvalidArgument, false),
            (TaskError::Shim { doing: "create", source: gone }, Code::FailedPrecondition, true),
            (TaskError::Shim { doing: "create", source: refused }, Code::Unknown, false),
            (TaskError::Shim { doing: "create", source: killed }, Code::FailedPrecondition, true),
            (TaskError::LockHeld { path: "/x".into(), reason: "no".to_owned() }, Code::FailedPrecondition, true),
        ] {
            let status = from_task_error(&error);
            assert_eq!((status.code(), is_recoverable(&status)), (code, again), "{error:?}");
        }
        assert_eq!(from_task_error(&TaskError::NotFound(id())).message(), "task not found for given id");
    }

    #[test]
    fn foreign_texts_are_truncated_and_escaped() {
        let words = format!("exec \u{1b}]0;x\u{7}{}\r\nno such file", "A".repeat(1 << 20));
        let refused = ShimError::Refused { call: "Create", code: RefusalCode::UNKNOWN, message: words.clone() };
        let gone = ShimError::ConnectionLost { call: "Create", detail: words.clone() };
        for status in [
            from_task_error(&TaskError::Shim { doing: "create the container", source: refused }),
            from_task_error(&TaskError::Shim { doing: "create the container", source: gone }),
            from_task_error(&TaskError::Signal(words.clone())),
            new(Code::Internal, &words),
            recoverable(&words),
            from_config_error(&ConfigError::job_fault(words)),
        ] {
            let text = status.message();
            assert!(text.chars().count() < 2 * MESSAGE_MAX && status.details().len() < 2 * MESSAGE_MAX, "{text}");
            assert!(!text.chars().any(char::is_control) && text.contains("no such file"), "{text}");
        }
    }

    #[test]
    fn the_detail_has_the_bytes_of_the_reference() {
        let status = recoverable("x");
        let decoded = rpc::Status::decode(status.details()).expect("our own bytes");
        assert_eq!((decoded.code, decoded.message.as_str()), (9, "x"));
        assert_eq!(decoded.details[0].value, [0x08, 0x01]);
    }
}
