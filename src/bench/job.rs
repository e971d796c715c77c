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
    lives: Lives,
    pub(super) stdout: Collector,
    stderr: Collector,
}

/// How long its program goes on.
#[derive(Debug, Clone, Copy)]
enum Lives {
    /// It ends at once.
    NotAtAll,
    /// It waits for longer than any start's answer takes.
    Awhile,
    /// It waits for SIGTERM.
    UntilStopped,
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
        let lives = match (sequence.contains(&Step::Wait), sequence.contains(&Step::Linger)) {
            (false, _) => Lives::UntilStopped,
            (true, true) => Lives::Awhile,
            (true, false) => Lives::NotAtAll,
        };
        Ok(Self { id, alloc, dirs, lives, stdout, stderr })
    }

    /// Its command.
    pub(super) fn command(&self) -> Vec<String> {
        let arguments: &[&str] = match self.lives {
            Lives::NotAtAll => &[],
            Lives::Awhile => &[stamp::WAIT, stamp::AWHILE],
            Lives::UntilStopped => &[stamp::WAIT],
        };
        [&[stamp::PATH], arguments].concat().into_iter().map(str::to_owned).collect()
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
