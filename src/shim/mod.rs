//! Starts shims and talks to them over ttrpc, without containerd.
//!
//! A shim is a small program (`containerd-shim-runc-v2`) that calls the OCI runtime and stays as the parent of the
//! container's process. Any running shim accepts `Create` for any container, and the pool is built on that.

mod adopt;
mod calls;
mod cleanup;
mod client;
mod connection;
mod exec;
mod exec_fifo;
#[cfg(test)]
pub mod fake;
mod hold;
mod identity;
mod launch;
mod pid_files;
mod pool;
mod scope;
mod sealed;
pub mod stdio;
mod version;

use std::{io, path::PathBuf, time::Duration};

use crate::failure::{self, Cause};

pub use adopt::{Adoption, is_alive, is_unusable, kill_hung, kill_shim, shut_down_unrecorded};
pub use calls::{CallKind, RuntimeCallGuard, RuntimeCalls};
pub use cleanup::{DeadContainer, EXIT_FILE, delete_dead_container, has_exit_file};
pub use client::{
    CONNECT_TIMEOUT, Client, CreateTask, ExecProcess, Exit, RuntimeOptions, SignalTarget, TaskApi, WindowSize,
};
pub use exec::{ExecIo, ExecPipes};
pub use exec_fifo::start_via_exec_fifo;
pub use hold::ShimHold;
pub use launch::{Launcher, Shim, ShimReservation};
pub use pid_files::{PidFile, PidFiles};
pub use pool::{Pool, PoolSettings, ReservedShim};
pub use scope::ShimScope;
pub use sealed::SealedCopy;
/// The status code with which a shim refuses a call.
pub use ttrpc::Code as RefusalCode;

/// The reason why an operation on a shim failed.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// An operation on the shim's directory, socket or log failed.
    #[error("shim {id}: could not {doing} {path}")]
    File {
        /// The id of the shim.
        id: String,
        /// The operation that failed.
        doing: &'static str,
        /// The file or directory of the operation.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The shim's program could not be started.
    #[error("could not start the shim {binary}; it comes with containerd")]
    Spawn {
        /// The shim's program.
        binary: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The connection to the shim broke, or could not be made: the shim has died, or never came up.
    #[error("the connection to the shim was lost during {call} ({detail})")]
    ConnectionLost {
        /// The method that was called.
        call: &'static str,
        /// The message of the transport.
        detail: String,
    },
    /// An answer could not be decoded, or a request not encoded. The shim and its containers keep running.
    #[error("a message of the shim's call {call} is malformed ({detail})")]
    Malformed {
        /// The method that was called.
        call: &'static str,
        /// What is wrong with the message.
        detail: String,
    },
    /// The shim did not answer in time.
    #[error("the shim did not complete {call} within {} s", after.as_secs())]
    TimedOut {
        /// The method that was called.
        call: &'static str,
        /// The timeout of the call.
        after: Duration,
    },
    /// The shim accepted the request to shut down, and still runs.
    #[error("the shim does not exit; it may still hold a container")]
    DoesNotExit,
    /// The shim refused the call. The message is mostly the OCI runtime's.
    #[error("{message}")]
    Refused {
        /// The method that was called.
        call: &'static str,
        /// The status code of the refusal.
        code: RefusalCode,
        /// The message of the shim or of the runtime.
        message: String,
    },
    /// The `delete` command of the shim's program failed. The message is mostly the OCI runtime's.
    #[error("{message}")]
    DeleteFailed {
        /// The command's error output.
        message: String,
    },
    /// The OCI runtime that is to delete a container is not known, or not installed any more.
    #[error("the container's runtime is unknown or no longer installed")]
    RuntimeMissing,
    /// gVisor's shim reported success, and runsc's state of the container is still there.
    #[error("runsc has not deleted the container; its state is still there")]
    NotDeleted,
    /// The shim serves neither version of the Task service.
    #[error("the shim serves neither {0} nor {1}")]
    NoTaskService(&'static str, &'static str),
}

impl ShimError {
    /// Returns whether the shim does not know the container or process (any more).
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: RefusalCode::NOT_FOUND, .. })
    }

    /// Returns what has to change before another attempt can succeed: the host's state or the job.
    pub fn failure_cause(&self) -> Cause {
        match self {
            // A runtime is called with what the job asks for, so the runtime's message decides whether the job or the
            // host is the cause. A failure that is not known to be the job's is reported as the host's: many failures
            // of the host have messages that occur nowhere else, and no table lists them all.
            Self::Refused { code, message, .. } => failure::of_message(message).unwrap_or(match *code {
                RefusalCode::INVALID_ARGUMENT | RefusalCode::UNIMPLEMENTED => Cause::Job,
                _ => Cause::Host,
            }),
            Self::DeleteFailed { message } => failure::of_message(message).unwrap_or(Cause::Host),
            Self::File { .. }
            | Self::Spawn { .. }
            | Self::ConnectionLost { .. }
            | Self::Malformed { .. }
            | Self::TimedOut { .. }
            | Self::DoesNotExit
            | Self::RuntimeMissing
            | Self::NotDeleted
            | Self::NoTaskService(..) => Cause::Host,
        }
    }
}
