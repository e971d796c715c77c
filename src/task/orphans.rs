//! Tasks of an earlier plugin that no agent has asked this one for within the grace period.
//!
//! What they do is the operator's choice, `state { orphans }`: they run on, since their agent may still come back, or they
//! are stopped and destroyed. An agent that is down is no agent that does not ask: the period counts while one is connected.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;

use super::{Engine, Force, TaskError, live::Task};
use crate::{control::Garbage, ids::TaskId};

/// How long such a task has after its stop signal. Nomad's `kill_timeout` comes with its StopTask, which nobody sends here.
const STOP: Duration = Duration::from_secs(30);

/// What becomes of tasks that run and that no agent asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Orphans {
    /// They run on, and the log says so.
    #[default]
    Keep,
    /// They are stopped and destroyed.
    End,
}

impl Engine {
    /// Treats tasks that run and that no agent has asked for as the operator wants it: what was ended, or, for a dry run,
    /// would be; and what stays.
    pub(super) async fn treat_orphans(&self, orphans: Vec<(TaskId, Arc<Task>)>, dry_run: bool) -> Vec<Garbage> {
        let grace = self.settings().grace;
        let policy = self.settings().orphans;
        let why = match policy {
            Orphans::Keep => Some("it runs, no agent has asked for it, and state.orphans is \"keep\""),
            Orphans::End if self.attended_for() < grace => {
                Some("it runs, and no agent has been connected for as long as state.grace")
            }
            Orphans::End => None,
        };
        match why {
            Some(why) => {
                for (id, _) in orphans.iter().filter(|(_, task)| !dry_run && task.is_first_warning()) {
                    tracing::warn!(task = %id, why, "runs, and no agent has asked for it");
                }
                orphans.iter().map(|(id, _)| Garbage::staying("task", &id.0, why)).collect()
            }
            None if dry_run => orphans.iter().map(|(id, _)| garbage(id, &Ok(()))).collect(),
            None => {
                let ends = orphans.iter().map(async |(id, task)| {
                    // An agent that has asked a moment ago has it.
                    task.claim_for_reaper().then_some(())?;
                    Some(garbage(id, &self.end_orphan(id, task).await))
                });
                join_all(ends).await.into_iter().flatten().collect()
            }
        }
    }

    async fn end_orphan(&self, id: &TaskId, task: &Task) -> Result<(), TaskError> {
        let grace_s = self.settings().grace.as_secs();
        tracing::warn!(task = %id, grace_s, "stopping a task that no agent has asked for (state.orphans = \"end\")");
        let outcome = match self.stop(id, STOP, "").await {
            Ok(()) => self.destroy(id, Force::Yes).await,
            Err(error) => Err(error),
        };
        match outcome {
            // An agent that starts it anew has done it meanwhile.
            Ok(()) | Err(TaskError::NotFound(_)) => Ok(()),
            Err(error) => {
                task.release_by_reaper();
                Err(error)
            }
        }
    }
}

fn garbage(id: &TaskId, outcome: &Result<(), TaskError>) -> Garbage {
    let why = "it runs, no agent has asked for it within state.grace, and state.orphans is \"end\"";
    Garbage::removed("task", &id.0, outcome).because(why)
}
