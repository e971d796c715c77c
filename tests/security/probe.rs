//! Finds out the outcome of an attack: a start is either refused, or its task runs and prints what it saw.

use serde_json::Value;

use crate::support::{Env, Task};

/// The most resident memory that a process has ever had, in bytes.
pub(crate) fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// The outcome of a job.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The job did not start, for this reason.
    Refused(String),
    /// The job ran; its exit code, standard output and standard error.
    Ran(i32, String, String),
}

impl Outcome {
    /// All text that the job's author can see.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Refused(reason) => reason.clone(),
            Self::Ran(_, out, err) => format!("{out}{err}"),
        }
    }
}

/// Starts a job and waits for its end.
pub(crate) async fn outcome(env: &mut Env, config: Value) -> Outcome {
    let mut task = env.prepare(config).await;
    match env.try_start(&mut task).await {
        Err(status) => Outcome::Refused(status.message().to_owned()),
        Ok(()) => {
            let (code, out, err) = env.finish_task(task).await;
            Outcome::Ran(code, out, err)
        }
    }
}

/// Returns the reason for which a job does not start. Fails if the job starts.
pub(crate) async fn refusal(env: &mut Env, config: Value) -> String {
    let shown = config.to_string();
    let mut task = env.prepare(config).await;
    refusal_of(env, &mut task, &shown).await
}

/// Returns the reason for which a prepared task does not start. Fails with the attack's name if the task starts.
pub(crate) async fn refusal_of(env: &Env, task: &mut Task, attack: &str) -> String {
    match env.try_start(task).await {
        Err(status) => status.message().to_owned(),
        Ok(()) => {
            env.destroy(task).await.unwrap();
            let shown = &attack[..attack.len().min(400)];
            panic!("started: {shown}: {}", task.stdout.text());
        }
    }
}
