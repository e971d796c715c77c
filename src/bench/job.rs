//! One measured task: its directories, its FIFOs and their readers, which are made before the measurement begins.

use std::path::Path;

use super::{BenchError, file, plan::Step, stamp};
use crate::{
    host::{Alloc, Collector, Output, TaskDirs},
    ids::random_hex,
};

/// One measured task.
#[derive(Debug)]
pub(crate) struct Job {
    pub(super) id: String,
    pub(super) alloc: Alloc,
    pub(super) dirs: TaskDirs,
    lifetime: Lifetime,
    pub(super) stdout: Collector,
    stderr: Collector,
}

/// The steps of a task that is not measured itself: it runs until it is stopped.
pub(super) const UNTIL_STOPPED: [Step; 3] = [Step::Start, Step::Stop, Step::Destroy];

/// The time for which the task's program runs.
#[derive(Debug, Clone, Copy)]
enum Lifetime {
    /// The program ends at once.
    EndsAtOnce,
    /// The program waits for longer than any subject takes to answer a start, then ends.
    WaitsBriefly,
    /// The program waits for SIGTERM.
    UntilStopped,
}

impl Job {
    /// Makes a task below `allocs` whose program runs as long as the steps of `sequence` need.
    pub(super) fn new(allocs: &Path, sequence: &[Step]) -> Result<Self, BenchError> {
        let id = format!("bench-{}", random_hex(8));
        let alloc = Alloc::create(allocs, &id)?;
        let dirs = alloc.create_task("task")?;
        let local = alloc.dir.join("task/local");
        stamp::install(&local).map_err(file(&local))?;
        let read = |fifo: &Path| Collector::start(fifo, Output::Memory);
        let (stdout, stderr) = (read(&dirs.stdout), read(&dirs.stderr));
        let lifetime = match (sequence.contains(&Step::Wait), sequence.contains(&Step::Linger)) {
            (false, _) => Lifetime::UntilStopped,
            (true, true) => Lifetime::WaitsBriefly,
            (true, false) => Lifetime::EndsAtOnce,
        };
        Ok(Self { id, alloc, dirs, lifetime, stdout, stderr })
    }

    /// Returns the program and its arguments.
    pub(super) fn command(&self) -> Vec<String> {
        let arguments: &[&str] = match self.lifetime {
            Lifetime::EndsAtOnce => &[],
            Lifetime::WaitsBriefly => &[stamp::WAIT_ARG, stamp::BRIEF_WAIT_ARG],
            Lifetime::UntilStopped => &[stamp::WAIT_ARG],
        };
        [&[stamp::PATH], arguments].concat().into_iter().map(str::to_owned).collect()
    }

    /// Returns the times that the program has written, in nanoseconds: of its first and of its last instruction.
    pub(super) fn stamps(&self) -> (Option<u64>, Option<u64>) {
        stamp::read(&self.stdout.bytes())
    }

    /// Returns what the task has written to stderr.
    pub(super) fn stderr_text(&self) -> String {
        self.stderr.text()
    }

    /// Reads the task's output to its end, for up to `limit`, and removes the task's directories.
    pub(super) async fn clear(self, limit: std::time::Duration) -> Result<(), BenchError> {
        for stream in [&self.stdout, &self.stderr] {
            stream.wait_for_end(limit).await;
        }
        Ok(self.alloc.remove()?)
    }
}
