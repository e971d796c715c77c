//! Orphans: tasks of an earlier plugin that run, and that no agent has asked this plugin for within the grace period.
//!
//! The operator's setting `state { orphans }` decides what happens to them: they keep running, since their agent may
//! still come back, or they are stopped and destroyed. The grace period counts only while an agent is connected, since
//! an agent that is down can't ask for its tasks.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;

use super::{Engine, Force, TaskError, live::Task};
use crate::{control::Garbage, ids::TaskId};

/// How long an orphan may run after its stop signal. Nomad's `kill_timeout` is not known here, since it comes with
/// StopTask.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// What happens to orphans.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OrphanPolicy {
    /// Orphans keep running, and a warning is logged.
    #[default]
    Keep,
    /// Orphans are stopped and destroyed.
    End,
}

impl Engine {
    /// Applies the operator's setting to orphans. Returns those that were ended (in a dry run: would be ended) and
    /// those that stay.
    pub(super) async fn apply_orphan_policy(&self, orphans: Vec<(TaskId, Arc<Task>)>, dry_run: bool) -> Vec<Garbage> {
        let grace = self.settings().grace;
        let policy = self.settings().orphans;
        let why = match policy {
            OrphanPolicy::Keep => Some("it runs, no agent has asked for it, and state.orphans is \"keep\""),
            OrphanPolicy::End if self.agent_connected_for() < grace => {
                Some("it runs, and no agent has been connected for as long as state.grace")
            }
            OrphanPolicy::End => None,
        };
        match why {
            Some(why) => {
                for (id, _) in orphans.iter().filter(|(_, task)| !dry_run && task.is_first_warning()) {
                    tracing::warn!(task = %id, why, "no agent has asked for a running task; it keeps running");
                }
                orphans.iter().map(|(id, _)| Garbage::kept("task", &id.0, why)).collect()
            }
            None if dry_run => orphans.iter().map(|(id, _)| garbage(id, &Ok(()))).collect(),
            None => {
                let ends = orphans.iter().map(async |(id, task)| {
                    // A task that an agent has asked for meanwhile stays.
                    task.reserve_for_gc().then_some(())?;
                    Some(garbage(id, &self.end_orphan(id, task).await))
                });
                join_all(ends).await.into_iter().flatten().collect()
            }
        }
    }

    /// Stops and destroys an orphan.
    async fn end_orphan(&self, id: &TaskId, task: &Task) -> Result<(), TaskError> {
        let grace_s = self.settings().grace.as_secs();
        tracing::warn!(task = %id, grace_s, "stopping a task that no agent has asked for (state.orphans = \"end\")");
        let outcome = match self.stop(id, STOP_TIMEOUT, "").await {
            Ok(()) => self.destroy(id, Force::Yes).await,
            Err(error) => Err(error),
        };
        match outcome {
            // A task that is no longer found was destroyed meanwhile, by a StartTask for a new attempt.
            Ok(()) | Err(TaskError::NotFound(_)) => Ok(()),
            Err(error) => {
                task.release_from_gc();
                Err(error)
            }
        }
    }
}

fn garbage(id: &TaskId, outcome: &Result<(), TaskError>) -> Garbage {
    let why = "it runs, no agent has asked for it within state.grace, and state.orphans is \"end\"";
    Garbage::removed("task", &id.0, outcome).with_reason(why)
}
