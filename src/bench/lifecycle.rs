//! Takes one task through the steps of a sequence and measures each step.

use std::time::Duration;

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
    match steps(path, &job, sequence).await {
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
async fn steps(path: &Subject, job: &Job, sequence: &[Step]) -> Result<Lifecycle, BenchError> {
    // All times are of one clock. The reader of the output uses `Instant`, whose times are converted by this pair.
    let (instant, base) = (std::time::Instant::now(), now());
    let mut life = Lifecycle { main: Vec::new(), details: Vec::new() };
    let (mut seen, mut stopped, mut destroyed) = (None, None, None);
    let mut began = 0;
    let ends_itself = sequence.contains(&Step::Wait);
    let lingers = sequence.contains(&Step::Linger);
    for step in sequence {
        let before = now();
        match step {
            Step::Start => {
                began = before;
                with_timeout(&path.name, "start", path.start(job)).await?;
                let command = matches!(path.backend, Backend::Runtime { .. } | Backend::Engine { .. });
                // A foreground command answers only when the task has ended.
                if !command && ends_itself {
                    life.main.push(("start_task", now() - before));
                }
                if !ends_itself {
                    wait_until_stoppable(path, job).await?;
                }
                continue;
            }
            Step::Wait => {
                let well = with_timeout(&path.name, "wait", path.wait(job)).await?;
                seen = Some(now());
                if !well {
                    let problem = format!("the task did not exit with code 0: {}", job.stderr_text());
                    return Err(BenchError::Precondition { path: path.name.clone(), problem });
                }
                life.details.extend(path.phases(job).await.into_iter().map(|(name, ms)| {
                    #[allow(
                        clippy::cast_possible_truncation,
                        clippy::cast_sign_loss,
                        reason = "a start takes few milliseconds"
                    )]
                    let nanoseconds = (ms * 1e6) as u64;
                    (format!("phase.{name}"), nanoseconds)
                }));
                continue;
            }
            Step::Stop => {
                with_timeout(&path.name, "stop", path.stop(job)).await?;
                stopped = Some(now());
                life.main.push(("stop", now() - before));
                continue;
            }
            Step::Linger => continue,
            Step::Exec => with_timeout(&path.name, "exec", path.exec(job)).await?,
            Step::Stats => with_timeout(&path.name, "stats", path.stats(job)).await?,
            Step::Signal => with_timeout(&path.name, "signal", path.signal(job)).await?,
            Step::Destroy => {
                with_timeout(&path.name, "destroy", path.destroy(job)).await?;
                destroyed = Some((before, now()));
                continue;
            }
        }
        life.details.push((format!("{step:?}").to_lowercase(), now() - before));
    }
    job.stdout.wait_for_end(STEP_TIMEOUT).await;
    let (first, last) = job.stamps();
    let (Some(first), Some(last)) = (first, last) else {
        let problem = format!("the task did not write when it ran: {}", job.stderr_text());
        return Err(BenchError::Precondition { path: path.name.clone(), problem });
    };
    // A gVisor sandbox has a clock of its own, which begins with the sandbox: its times show only that the task ran.
    let (first, last) = if first < began { (None, None) } else { (Some(first), Some(last)) };
    if lingers {
        let gone = last.zip(seen).map(|(last, seen)| seen.saturating_sub(last));
        let details = gone.map(|gone| ("last_instruction_to_exit_seen".to_owned(), gone)).into_iter().collect();
        return Ok(Lifecycle { main: Vec::new(), details });
    }
    if let Some((before, after)) = destroyed {
        life.details.push(("destroy".to_owned(), after - before));
        if ends_itself {
            life.main.push(("destroyed", after - began));
        }
    }
    if ends_itself {
        life.main.extend(first.map(|first| ("first_instruction", first - began)));
        if let Some(byte) = job.stdout.first_byte() {
            let byte = base + u64::try_from(byte.duration_since(instant).as_nanos()).unwrap_or_default();
            life.main.push(("first_byte", byte.saturating_sub(began)));
        }
    }
    if let Some(seen) = seen {
        life.main.push(("exit_seen", seen - began));
    }
    if let Some(stopped) = stopped {
        let after = last.map(|last| ("last_instruction_to_stopped".to_owned(), stopped.saturating_sub(last)));
        life.details.extend(after);
    }
    Ok(life)
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
