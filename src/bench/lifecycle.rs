//! Takes one task through the steps of a sequence and measures each step.

use std::time::{Duration, Instant};

use super::{
    BenchError, Step,
    job::Job,
    stamp::now,
    subject::{Backend, Subject},
};

/// The limit for each step of a task.
pub(crate) const STEP_TIMEOUT: Duration = Duration::from_secs(120);
/// The limit for cleaning up after a task that failed.
const ABANDON_TIMEOUT: Duration = Duration::from_secs(30);

/// Waits for a step of a subject, for at most `STEP_TIMEOUT`. `doing` names the step in errors.
pub(super) async fn with_timeout<T>(
    path: &str,
    doing: &'static str,
    future: impl Future<Output = Result<T, Box<dyn std::error::Error + Send + Sync>>>,
) -> Result<T, BenchError> {
    match tokio::time::timeout(STEP_TIMEOUT, future).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(BenchError::Step { path: path.to_owned(), doing, source }),
        Err(_) => Err(BenchError::Timeout { path: path.to_owned(), doing }),
    }
}

/// What was measured of one task.
pub(super) struct Lifecycle {
    /// Nanoseconds of the metrics in `summary::METRICS`.
    pub(super) main: Vec<(&'static str, u64)>,
    /// Nanoseconds of further metrics.
    pub(super) details: Vec<(String, u64)>,
}

/// Takes a task through a sequence of steps. Nothing of the task is left afterwards, even if a step fails.
pub(super) async fn run_lifecycle(path: &Subject, job: Job, sequence: &[Step]) -> Result<Lifecycle, BenchError> {
    match carry_out(path, &job, sequence).await {
        Ok(life) => job.clear(STEP_TIMEOUT).await.map(|()| life),
        Err(error) => {
            abandon(path, job).await;
            Err(error)
        }
    }
}

/// Ends and removes a task, whose steps may have failed or may not be complete.
pub(super) async fn abandon(path: &Subject, job: Job) {
    drop(tokio::time::timeout(ABANDON_TIMEOUT, path.abandon(&job)).await);
    drop(job.clear(Duration::ZERO).await);
}

/// Carries out the steps of a sequence.
async fn carry_out(path: &Subject, job: &Job, sequence: &[Step]) -> Result<Lifecycle, BenchError> {
    let mut run = SequenceRun::new(path, job, sequence);
    for step in sequence {
        run.step(*step).await?;
    }
    job.stdout.wait_for_end(STEP_TIMEOUT).await;
    run.finish()
}

/// A task whose steps are being carried out, with the times that were taken so far. All times are nanoseconds of one
/// clock.
struct SequenceRun<'a> {
    path: &'a Subject,
    job: &'a Job,
    /// The same moment on two clocks. The reader of the output uses `Instant`, whose times are converted by this pair.
    clocks: (Instant, u64),
    ends_itself: bool,
    lingers: bool,
    measured: Lifecycle,
    began: u64,
    exit_seen: Option<u64>,
    stopped: Option<u64>,
    /// When the removal began and ended.
    destroyed: Option<(u64, u64)>,
}

impl<'a> SequenceRun<'a> {
    fn new(path: &'a Subject, job: &'a Job, sequence: &[Step]) -> Self {
        Self {
            path,
            job,
            clocks: (Instant::now(), now()),
            ends_itself: sequence.contains(&Step::Wait),
            lingers: sequence.contains(&Step::Linger),
            measured: Lifecycle { main: Vec::new(), details: Vec::new() },
            began: 0,
            exit_seen: None,
            stopped: None,
            destroyed: None,
        }
    }

    async fn step(&mut self, step: Step) -> Result<(), BenchError> {
        let (path, job, before) = (self.path, self.job, now());
        match step {
            Step::Start => return self.start().await,
            Step::Wait => return self.wait().await,
            Step::Linger => return Ok(()),
            Step::Stop => {
                with_timeout(&path.name, "stop", path.stop(job)).await?;
                self.stopped = Some(now());
                self.measured.main.push(("stop", now() - before));
                return Ok(());
            }
            Step::Destroy => {
                with_timeout(&path.name, "destroy", path.destroy(job)).await?;
                self.destroyed = Some((before, now()));
                return Ok(());
            }
            Step::Exec => with_timeout(&path.name, "exec", path.exec(job)).await?,
            Step::Stats => with_timeout(&path.name, "stats", path.stats(job)).await?,
            Step::Signal => with_timeout(&path.name, "signal", path.signal(job)).await?,
        }
        self.measured.details.push((format!("{step:?}").to_lowercase(), now() - before));
        Ok(())
    }

    async fn start(&mut self) -> Result<(), BenchError> {
        let (path, job) = (self.path, self.job);
        self.began = now();
        with_timeout(&path.name, "start", path.start(job)).await?;
        let command = matches!(path.backend, Backend::Runtime { .. } | Backend::Engine { .. });
        // A foreground command answers only when the task has ended.
        if !command && self.ends_itself {
            self.measured.main.push(("start_task", now() - self.began));
        }
        if !self.ends_itself {
            wait_until_stoppable(path, job).await?;
        }
        Ok(())
    }

    async fn wait(&mut self) -> Result<(), BenchError> {
        let (path, job) = (self.path, self.job);
        let well = with_timeout(&path.name, "wait", path.wait(job)).await?;
        self.exit_seen = Some(now());
        if !well {
            let problem = format!("the task did not exit with code 0: {}", job.stderr_text());
            return Err(BenchError::Precondition { path: path.name.clone(), problem });
        }
        self.measured.details.extend(path.phases(job).await.into_iter().map(|(name, ms)| {
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a start takes few milliseconds"
            )]
            let nanoseconds = (ms * 1e6) as u64;
            (format!("phase.{name}"), nanoseconds)
        }));
        Ok(())
    }

    /// Returns what was measured. All steps must have been carried out, and the task's output must be complete.
    fn finish(mut self) -> Result<Lifecycle, BenchError> {
        let (Some(first), Some(last)) = self.job.stamps() else {
            let problem = format!("the task did not write when it ran: {}", self.job.stderr_text());
            return Err(BenchError::Precondition { path: self.path.name.clone(), problem });
        };
        // A gVisor sandbox has a clock of its own, which begins with the sandbox: its times show only that the task
        // ran.
        let (first, last) = if first < self.began { (None, None) } else { (Some(first), Some(last)) };
        if self.lingers {
            let gone = last.zip(self.exit_seen).map(|(last, seen)| seen.saturating_sub(last));
            let details = gone.map(|gone| ("last_instruction_to_exit_seen".to_owned(), gone)).into_iter().collect();
            return Ok(Lifecycle { main: Vec::new(), details });
        }
        let Lifecycle { main, details } = &mut self.measured;
        if let Some((before, after)) = self.destroyed {
            details.push(("destroy".to_owned(), after - before));
            if self.ends_itself {
                main.push(("destroyed", after - self.began));
            }
        }
        if self.ends_itself {
            main.extend(first.map(|first| ("first_instruction", first - self.began)));
            if let Some(byte) = self.job.stdout.first_byte() {
                let (instant, base) = self.clocks;
                let byte = base + u64::try_from(byte.duration_since(instant).as_nanos()).unwrap_or_default();
                main.push(("first_byte", byte.saturating_sub(self.began)));
            }
        }
        main.extend(self.exit_seen.map(|seen| ("exit_seen", seen - self.began)));
        if let Some(stopped) = self.stopped {
            let after = last.map(|last| ("last_instruction_to_stopped".to_owned(), stopped.saturating_sub(last)));
            details.extend(after);
        }
        Ok(self.measured)
    }
}

/// Waits until the task can be stopped. Stopping it earlier would measure something else.
pub(super) async fn wait_until_stoppable(path: &Subject, job: &Job) -> Result<(), BenchError> {
    let deadline = tokio::time::Instant::now() + STEP_TIMEOUT;
    while job.stamps().0.is_none() || !path.can_be_stopped(job).await {
        if tokio::time::Instant::now() > deadline {
            return Err(BenchError::Timeout { path: path.name.clone(), doing: "report that the task runs" });
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}
