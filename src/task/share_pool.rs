//! Keeps tasks without reserved cores on the processors of Nomad's share pool when the pool grows or shrinks.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use super::{Engine, StartRequest, context::EngineContext, guards::catch_panic};
use crate::{
    cgroup::{CgroupMode, CgroupPath, SharePool},
    ids::TaskId,
};

/// How often the processors of the pools of running tasks are read. That is one small file for each pool. (inotify
/// would miss a pool that is removed and created again.)
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Returns the share pool of a task that has no reserved cores, and the pool's processors at the moment.
pub(super) fn pool_of_task(context: &EngineContext, request: &StartRequest) -> Option<(SharePool, String)> {
    if !request.resources.cpuset_cpus.is_empty() {
        return None;
    }
    let pool = context.cgroups.share_pool(&request.cpuset_cgroup)?;
    match pool.cpus() {
        Ok(cpus) => Some((pool, cpus)),
        Err(error) => {
            tracing::warn!(
                task = %request.task_id,
                error = crate::error_chain(&error),
                "could not read the processors of the task's share pool"
            );
            None
        }
    }
}

impl Engine {
    /// Copies the processors of the share pools to the cgroups of their tasks, for as long as the engine lives.
    pub(super) fn follow_share_pools(&self) {
        if self.context().cgroups.mode() == CgroupMode::V2 {
            return;
        }
        let engine = self.downgrade();
        tokio::spawn(async move {
            let mut applied: HashMap<TaskId, String> = HashMap::new();
            loop {
                tokio::time::sleep(POLL_INTERVAL).await;
                let Some(inner) = engine.upgrade() else { return };
                let engine = Self(inner);
                catch_panic("updating the processors of share pools", async { engine.update_processors(&mut applied) })
                    .await;
            }
        });
    }

    /// Sets the processors of all tasks whose share pool has changed. `applied` has the processors that were last set
    /// for each task.
    fn update_processors(&self, applied: &mut HashMap<TaskId, String>) {
        let running = self.started_tasks().into_iter().filter(|(_, task)| !task.has_ended());
        let in_pools: Vec<(TaskId, SharePool, CgroupPath)> = running
            .filter_map(|(id, task)| {
                let record = task.record();
                Some((id, record.intent.share_pool?, record.intent.cgroup))
            })
            .collect();
        let ids: HashSet<&TaskId> = in_pools.iter().map(|(id, ..)| id).collect();
        applied.retain(|id, _| ids.contains(id));
        let pools: HashSet<&SharePool> = in_pools.iter().map(|(_, pool, _)| pool).collect();
        // Nomad's client may be creating a pool at the moment. Until it can be read, its tasks keep their processors.
        let current: HashMap<&SharePool, String> =
            pools.into_iter().filter_map(|pool| Some((pool, pool.cpus().ok()?))).collect();
        for (id, pool, cgroup) in &in_pools {
            let Some(cpus) = current.get(pool).filter(|cpus| applied.get(id) != Some(cpus)) else { continue };
            match self.context().cgroups.set_cpus(cgroup, cpus) {
                Ok(()) => drop(applied.insert(id.clone(), cpus.clone())),
                // The next poll tries again. The entry in `applied` marks the failure, so that it is logged only once.
                Err(error) => {
                    let refused = format!("not {cpus}");
                    if applied.insert(id.clone(), refused.clone()) != Some(refused) {
                        tracing::warn!(
                            task = %id,
                            cpus,
                            error = crate::error_chain(&error),
                            "could not give a task the processors of its share pool"
                        );
                    }
                }
            }
        }
    }
}
