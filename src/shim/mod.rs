//! Shims: started by us, spoken to over ttrpc, without containerd.
//!
//! A shim is a small program (`containerd-shim-runc-v2`) that calls the OCI runtime and stays as the parent of the
//! container's process. Any running one takes `Create` for any container, which is what the pool lives on.

mod calls;
mod cleanup;
mod client;
mod connection;
mod exec;
#[cfg(test)]
pub mod fake;
mod found;
mod held;
mod launch;
mod pid_files;
mod pool;
mod release;
mod sealed;
pub mod stdio;
mod version;

use std::{io, path::PathBuf, time::Duration};

use crate::failure::{self, Cause};

pub use calls::{Purpose, RuntimeCall, RuntimeCalls};
pub use cleanup::{DeadTask, EXIT_NOTE, delete_dead, has_noted_exit};
pub use client::{CONNECT, Client, CreateTask, ExecProcess, Exit, Kill, RuntimeOptions, TaskApi, WindowSize};
pub use exec::{ExecIo, ExecPipes};
pub use found::{Found, end_hung, end_stray, is_alive, is_unusable, kill_shim};
pub use held::Held;
pub use launch::{Launcher, Shim, Unborn};
pub use pid_files::{PidFile, PidFiles};
pub use pool::{Pool, PoolSettings, Reserved, ShimScope};
pub use release::release;
pub use sealed::Sealed;

/// Why a shim did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// Its directory, socket or log.
    #[error("shim {id}: {doing} {path}")]
    File {
        /// Which shim.
        id: String,
        /// What was done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The program.
    #[error("start shim {binary}; it comes with containerd")]
    Spawn {
        /// Which program.
        binary: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection to it broke: it died, or never lived.
    #[error("shim: {call}: connection lost ({detail})")]
    Gone {
        /// The call.
        call: &'static str,
        /// The transport's words.
        detail: String,
    },
    /// An answer came that makes no sense. The shim lives, and so does what it holds.
    #[error("shim: {call}: its answer was not understood ({detail})")]
    NotUnderstood {
        /// The call.
        call: &'static str,
        /// What is wrong with the answer.
        detail: String,
    },
    /// It did not answer in time.
    #[error("shim: {call}: no answer in {} s", after.as_secs())]
    Late {
        /// The call.
        call: &'static str,
        /// How long we waited.
        after: Duration,
    },
    /// It was asked to end, and lives.
    #[error("shim: it does not end; it may hold a container")]
    Stays,
    /// It answered no, mostly with the OCI runtime's words.
    #[error("{message}")]
    Refused {
        /// The call.
        call: &'static str,
        /// A gRPC code.
        code: i32,
        /// Its words.
        message: String,
    },
    /// Neither service version is served.
    #[error("shim serves neither {0} nor {1}")]
    NoService(&'static str, &'static str),
}

/// gRPC's INVALID_ARGUMENT.
const INVALID_ARGUMENT: i32 = 3;
/// gRPC's NOT_FOUND.
const NOT_FOUND: i32 = 5;
/// gRPC's UNIMPLEMENTED.
const UNIMPLEMENTED: i32 = 12;

impl ShimError {
    /// Does the shim not know the container or process (any more)?
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: NOT_FOUND, .. })
    }

    /// What has to change before another attempt can succeed.
    pub fn failure_cause(&self) -> Cause {
        match self {
            // A runtime is called with what the job wants, so its words say whose fault it is. Many failures of the host
            // have words that nobody else uses: what is not known to be the job's fault is not told as that.
            Self::Refused { code, message, .. } => failure::of_message(message).unwrap_or(match *code {
                INVALID_ARGUMENT | UNIMPLEMENTED => Cause::Job,
                _ => Cause::Host,
            }),
            Self::File { .. }
            | Self::Spawn { .. }
            | Self::Gone { .. }
            | Self::NotUnderstood { .. }
            | Self::Late { .. }
            | Self::Stays
            | Self::NoService(..) => Cause::Host,
        }
    }
}
