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
    subject: &str,
    doing: &'static str,
    future: impl Future<Output = Result<T, Box<dyn std::error::Error + Send + Sync>>>,
) -> Result<T, BenchError> {
    match tokio::time::timeout(STEP_TIMEOUT, future).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(BenchError::Step { subject: subject.to_owned(), doing, source }),
        Err(_) => Err(BenchError::Timeout { subject: subject.to_owned(), doing }),
    }
}

/// The measured times of one task.
pub(super) struct Lifecycle {
    /// Nanoseconds of the metrics in `summary::METRICS`.
    pub(super) main: Vec<(&'static str, u64)>,
    /// Nanoseconds of further metrics.
    pub(super) details: Vec<(String, u64)>,
}

/// Takes a task through a sequence of steps. The task is removed afterwards, even if a step fails.
pub(super) async fn run_lifecycle(subject: &Subject, job: Job, sequence: &[Step]) -> Result<Lifecycle, BenchError> {
    match carry_out(subject, &job, sequence).await {
        Ok(lifecycle) => job.clear(STEP_TIMEOUT).await.map(|()| lifecycle),
        Err(error) => {
            abandon(subject, job).await;
            Err(error)
        }
    }
}

/// Ends and removes a task, whose steps may have failed or may not be complete.
pub(super) async fn abandon(subject: &Subject, job: Job) {
    drop(tokio::time::timeout(ABANDON_TIMEOUT, subject.abandon(&job)).await);
    drop(job.clear(Duration::ZERO).await);
}

/// Carries out the steps of a sequence.
async fn carry_out(subject: &Subject, job: &Job, sequence: &[Step]) -> Result<Lifecycle, BenchError> {
    let mut run = SequenceRun::new(subject, job, sequence);
    for step in sequence {
        run.step(*step).await?;
    }
    job.stdout.wait_for_end(STEP_TIMEOUT).await;
    run.finish()
}

/// A task whose steps are being carried out, with the times that were taken so far. All times are nanoseconds of one
/// clock.
struct SequenceRun<'a> {
    subject: &'a Subject,
    job: &'a Job,
    /// The same moment on two clocks. The reader of the output uses `Instant`, whose times are converted with this
    /// pair.
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
    fn new(subject: &'a Subject, job: &'a Job, sequence: &[Step]) -> Self {
        Self {
            subject,
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
        let (subject, job, before) = (self.subject, self.job, now());
        match step {
            Step::Start => return self.start().await,
            Step::Wait => return self.wait().await,
            Step::Linger => return Ok(()),
            Step::Stop => {
                with_timeout(&subject.name, "stop the task", subject.stop(job)).await?;
                self.stopped = Some(now());
                self.measured.main.push(("stop", now() - before));
                return Ok(());
            }
            Step::Destroy => {
                with_timeout(&subject.name, "remove the task", subject.destroy(job)).await?;
                self.destroyed = Some((before, now()));
                return Ok(());
            }
            Step::Exec => with_timeout(&subject.name, "run a process in the task", subject.exec(job)).await?,
            Step::Stats => with_timeout(&subject.name, "read the usage of the task", subject.stats(job)).await?,
            Step::Signal => with_timeout(&subject.name, "send the task a signal", subject.signal(job)).await?,
        }
        self.measured.details.push((format!("{step:?}").to_lowercase(), now() - before));
        Ok(())
    }

    async fn start(&mut self) -> Result<(), BenchError> {
        let (subject, job) = (self.subject, self.job);
        self.began = now();
        with_timeout(&subject.name, "start the task", subject.start(job)).await?;
        let is_foreground_command = matches!(subject.backend, Backend::Runtime { .. } | Backend::Engine { .. });
        // A foreground command answers only when its task has ended, so it has no such time.
        if !is_foreground_command && self.ends_itself {
            self.measured.main.push(("start_task", now() - self.began));
        }
        if !self.ends_itself {
            wait_until_stoppable(subject, job).await?;
        }
        Ok(())
    }

    async fn wait(&mut self) -> Result<(), BenchError> {
        let (subject, job) = (self.subject, self.job);
        let has_succeeded = with_timeout(&subject.name, "wait for the end of the task", subject.wait(job)).await?;
        self.exit_seen = Some(now());
        if !has_succeeded {
            let problem = format!("the task did not exit with code 0: {}", job.stderr_text());
            return Err(BenchError::Precondition { subject: subject.name.clone(), problem });
        }
        self.measured.details.extend(subject.phases(job).await.into_iter().map(|(name, ms)| {
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
            return Err(BenchError::Precondition { subject: self.subject.name.clone(), problem });
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
pub(super) async fn wait_until_stoppable(subject: &Subject, job: &Job) -> Result<(), BenchError> {
    let deadline = tokio::time::Instant::now() + STEP_TIMEOUT;
    while job.stamps().0.is_none() || !subject.can_be_stopped(job).await {
        if tokio::time::Instant::now() > deadline {
            return Err(BenchError::Timeout { subject: subject.name.clone(), doing: "report that the task runs" });
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}
