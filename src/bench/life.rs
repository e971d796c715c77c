//! One task's life, step by step, and how long each took.

use std::time::Duration;

use super::{
    BenchError, Step,
    job::Job,
    path::{Path, Way},
    stamp::now,
};

/// No step of a task's life takes longer.
pub const LIMIT: Duration = Duration::from_secs(120);
/// Nor does giving up one that failed.
const ABANDON: Duration = Duration::from_secs(30);

/// Has a path do something, within the limit.
pub(super) async fn within<T>(
    path: &str,
    doing: &'static str,
    future: impl Future<Output = Result<T, Box<dyn std::error::Error + Send + Sync>>>,
) -> Result<T, BenchError> {
    match tokio::time::timeout(LIMIT, future).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(BenchError::Path { path: path.to_owned(), doing, source }),
        Err(_) => Err(BenchError::Late { path: path.to_owned(), doing }),
    }
}

/// One task's life: nanoseconds by metric.
pub(super) struct Life {
    pub(super) main: Vec<(&'static str, u64)>,
    pub(super) details: Vec<(String, u64)>,
}

/// Takes a task through a sequence. Nothing of it is left, however that goes.
pub(super) async fn life(path: &Path, job: Job, sequence: &[Step]) -> Result<Life, BenchError> {
    match steps(path, &job, sequence).await {
        Ok(life) => job.clear(LIMIT).await.map(|()| life),
        Err(error) => {
            abandon(path, job).await;
            Err(error)
        }
    }
}

/// Gives up a task that something went wrong with, or that nothing more is asked of.
pub(super) async fn abandon(path: &Path, job: Job) {
    drop(tokio::time::timeout(ABANDON, path.abandon(&job)).await);
    drop(job.clear(Duration::ZERO).await);
}

async fn steps(path: &Path, job: &Job, sequence: &[Step]) -> Result<Life, BenchError> {
    // One clock for all: what the reader notes is carried over to it.
    let (instant, base) = (std::time::Instant::now(), now());
    let mut life = Life { main: Vec::new(), details: Vec::new() };
    let (mut seen, mut stopped, mut destroyed) = (None, None, None);
    let mut began = 0;
    let ends_itself = sequence.contains(&Step::Wait);
    let lingers = sequence.contains(&Step::Linger);
    for step in sequence {
        let before = now();
        match step {
            Step::Start => {
                began = before;
                within(&path.name, "start", path.start(job)).await?;
                let command = matches!(path.way, Way::Runtime { .. } | Way::Engine { .. });
                // A foreground command has no answer but the task's own.
                if !command && ends_itself {
                    life.main.push(("start_task", now() - before));
                }
                if !ends_itself {
                    stoppable(path, job).await?;
                }
                continue;
            }
            Step::Wait => {
                let well = within(&path.name, "wait", path.wait(job)).await?;
                seen = Some(now());
                if !well {
                    let problem = format!("the task did not end well: {}", job.complaints());
                    return Err(BenchError::Unsound { path: path.name.clone(), problem });
                }
                life.details.extend(path.phases(job).await.into_iter().map(|(name, ms)| {
                    #[allow(
                        clippy::cast_possible_truncation,
                        clippy::cast_sign_loss,
                        reason = "milliseconds of a start"
                    )]
                    let nanoseconds = (ms * 1e6) as u64;
                    (format!("phase.{name}"), nanoseconds)
                }));
                continue;
            }
            Step::Stop => {
                within(&path.name, "stop", path.stop(job)).await?;
                stopped = Some(now());
                life.main.push(("stop", now() - before));
                continue;
            }
            Step::Linger => continue,
            Step::Exec => within(&path.name, "exec", path.exec(job)).await?,
            Step::Stats => within(&path.name, "stats", path.stats(job)).await?,
            Step::Signal => within(&path.name, "signal", path.signal(job)).await?,
            Step::Destroy => {
                within(&path.name, "destroy", path.destroy(job)).await?;
                destroyed = Some((before, now()));
                continue;
            }
        }
        life.details.push((format!("{step:?}").to_lowercase(), now() - before));
    }
    job.stdout.ended(LIMIT).await;
    let (first, last) = job.stamps();
    let (Some(first), Some(last)) = (first, last) else {
        let problem = format!("the task did not say when it ran: {}", job.complaints());
        return Err(BenchError::Unsound { path: path.name.clone(), problem });
    };
    // A sandbox has a clock of its own, which begins with it: its stamps tell that it ran, and nothing else.
    let (first, last) = if first < began { (None, None) } else { (Some(first), Some(last)) };
    if lingers {
        let gone = last.zip(seen).map(|(last, seen)| seen.saturating_sub(last));
        let details = gone.map(|gone| ("last_instruction_to_exit_seen".to_owned(), gone)).into_iter().collect();
        return Ok(Life { main: Vec::new(), details });
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

/// A stop before the task is ready for it would measure something else.
pub(super) async fn stoppable(path: &Path, job: &Job) -> Result<(), BenchError> {
    let deadline = tokio::time::Instant::now() + LIMIT;
    while job.stamps().0.is_none() || !path.is_known(job).await {
        if tokio::time::Instant::now() > deadline {
            return Err(BenchError::Late { path: path.name.clone(), doing: "say that it runs" });
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}
