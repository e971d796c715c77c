//! The benchmark: the same task through this driver, any other Nomad driver plugin, containerd's own path, runc, crun and
//! the bare kernel, in one interleaved run.
//!
//! What is measured is the same for all: a task that stamps its first and its last instruction (`stamp`), read from the
//! same FIFOs by the same reader. It knows this driver only by the wire, and by the spec that it writes, which the paths
//! without a driver are given, too.

#![allow(
    clippy::large_futures,
    reason = "one run in a process, whose futures lie on the heap by the command line's own box"
)]

mod confinement;
mod floor;
mod job;
mod life;
mod machine;
mod measure;
mod path;
mod pictures;
mod plan;
mod report;
mod stamp;
mod summary;
mod template;

use std::{io, path::PathBuf};

pub use machine::Machine;
pub use measure::{Ground, run};
pub use pictures::{Picture, pictures};
pub use plan::{Kind, Mode, PathPlan, Plan, Step};
pub use report::{compare, html, table};
pub use summary::{Results, Row};

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A path did not do what it was asked.
    #[error("{path}: {doing}")]
    Path {
        /// Its name.
        path: String,
        /// What it was asked.
        doing: &'static str,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It took for ever.
    #[error("{path}: {doing}: no answer in {} s", life::LIMIT.as_secs())]
    Late {
        /// Its name.
        path: String,
        /// What it was asked.
        doing: &'static str,
    },
    /// Something is not as it must be for the figures to mean anything.
    #[error("{path}: {problem}")]
    Unsound {
        /// Its name.
        path: String,
        /// What.
        problem: String,
    },
    /// Our own files.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nomad's side.
    #[error(transparent)]
    Host(#[from] crate::host::HostError),
}

fn file(path: &std::path::Path) -> impl Fn(io::Error) -> BenchError {
    let path = path.to_owned();
    move |source| BenchError::File { path: path.clone(), source }
}
