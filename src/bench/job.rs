//! One measured task: its directories, FIFOs and reader, made before any clock runs.

use std::path::Path;

use super::{BenchError, file, plan::Step, stamp};
use crate::{
    host::{Alloc, Collector, Output, TaskDirs},
    ids::random_hex,
};

/// One task.
#[derive(Debug)]
pub struct Job {
    pub(super) id: String,
    pub(super) alloc: Alloc,
    pub(super) dirs: TaskDirs,
    pub(super) waits: bool,
    pub(super) stdout: Collector,
    stderr: Collector,
}

impl Job {
    /// Makes one below `allocs` that lives as `sequence` says.
    pub(super) fn new(allocs: &Path, sequence: &[Step]) -> Result<Self, BenchError> {
        let id = format!("bench-{}", random_hex(8));
        let alloc = Alloc::create(allocs, &id)?;
        let dirs = alloc.task("task")?;
        let local = alloc.dir.join("task/local");
        stamp::put(&local).map_err(file(&local))?;
        let read = |fifo: &Path| Collector::start(fifo, Output::Keep);
        let (stdout, stderr) = (read(&dirs.stdout), read(&dirs.stderr));
        Ok(Self { id, alloc, dirs, waits: !sequence.contains(&Step::Wait), stdout, stderr })
    }

    /// Its command.
    pub(super) fn command(&self) -> Vec<String> {
        let mut command = vec![stamp::PATH.to_owned()];
        if self.waits {
            command.push(stamp::WAIT.to_owned());
        }
        command
    }

    /// What it has said: its first and its last stamp.
    pub(super) fn stamps(&self) -> (Option<u64>, Option<u64>) {
        stamp::read(&self.stdout.bytes())
    }

    /// What it has complained of.
    pub(super) fn complaints(&self) -> String {
        self.stderr.text()
    }

    /// Its output is read to the end, and its directories go.
    pub(super) async fn clear(self, limit: std::time::Duration) -> Result<(), BenchError> {
        for stream in [&self.stdout, &self.stderr] {
            stream.ended(limit).await;
        }
        Ok(self.alloc.remove()?)
    }
}
