//! How the outcome of an attack is looked at: a start is either refused, or its task runs and says what it saw.

use serde_json::Value;

use crate::support::{Env, Task};

/// The most memory that a process has ever had, in bytes.
pub(crate) fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// What came of a job.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It did not start, for this reason.
    Refused(String),
    /// It ran: exit code, standard output and standard error.
    Ran(i32, String, String),
}

impl Outcome {
    /// All text that somebody who started the job gets to see.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Refused(reason) => reason.clone(),
            Self::Ran(_, out, err) => format!("{out}{err}"),
        }
    }
}

/// Starts a job and sees it through to its end.
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

/// Why a job does not start. Fails when it does.
pub(crate) async fn refusal(env: &mut Env, config: Value) -> String {
    let shown = config.to_string();
    let mut task = env.prepare(config).await;
    refusal_of(env, &mut task, &shown).await
}

/// Why a prepared task does not start. Fails when it does, with what was tried.
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
