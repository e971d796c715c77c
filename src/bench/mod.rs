//! The benchmark: runs the same task by this driver, other Nomad driver plugins, containerd's own services, runc, crun,
//! runsc, docker, podman and bare system calls (the floor), in one interleaved run.
//!
//! The things that are compared are called subjects in the code, and paths in plan files and results. All subjects run
//! the same program, which writes the time of its first and of its last instruction (`stamp`), and its output is read
//! from the same kind of FIFO by the same reader. The benchmark uses this driver only by Nomad's plugin protocol; it
//! also reads the OCI spec that the driver writes, and runs that spec with the subjects that need one.
//!
//! - `plan`: what is measured. `setup`: what the subjects need. `measure`: the run. `lifecycle`: one task from start to
//!   removal. `job`: a task's files.
//! - `subject`: how each subject starts, stops and removes a task. `floor`, `floor_child`: a container by raw system
//!   calls.
//! - `template`: the OCI spec. `confinement`: checks that the floor confines its task as runc does.
//! - `summary`: figures from samples. `overview`, `report`, `pictures`: results for people. `machine`: the host, and how
//!   quiet it was.

#![allow(clippy::large_futures, reason = "a process makes one run, and the command line boxes its future")]

mod confinement;
mod floor;
mod floor_child;
mod job;
mod lifecycle;
mod machine;
mod measure;
mod overview;
mod pictures;
mod plan;
mod report;
mod setup;
mod stamp;
mod subject;
mod summary;
mod template;

use std::{io, path::PathBuf};

pub use machine::Machine;
pub use measure::run;
pub use overview::overview;
pub use pictures::{Picture, pictures};
pub use plan::{Mode, Plan, Step, SubjectKind, SubjectPlan};
pub use report::{compare, html, table};
pub use setup::Workspace;
pub use summary::{Results, Row};

/// Why the benchmark, or one of its subjects, failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A subject failed to carry out a step.
    #[error("{subject}: could not {doing}")]
    Step {
        /// The subject's name.
        subject: String,
        /// The step, as a verb phrase.
        doing: &'static str,
        /// The error of the step.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A subject did not complete a step in time.
    #[error("{subject}: could not {doing} within {} s", lifecycle::STEP_TIMEOUT.as_secs())]
    Timeout {
        /// The subject's name.
        subject: String,
        /// The step, as a verb phrase.
        doing: &'static str,
    },
    /// A precondition is not met, without which the figures would mean nothing.
    #[error("{subject}: {problem}")]
    Precondition {
        /// The subject's name.
        subject: String,
        /// What is wrong.
        problem: String,
    },
    /// A file or directory of the benchmark can't be used.
    #[error("could not use {path}")]
    File {
        /// The file or directory.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// A plugin can't be started or called, or a task's directories can't be made or removed.
    #[error(transparent)]
    Host(#[from] crate::host::HostError),
}

/// Makes the error of a file operation.
fn file(path: &std::path::Path) -> impl Fn(io::Error) -> BenchError {
    let path = path.to_owned();
    move |source| BenchError::File { path: path.clone(), source }
}
