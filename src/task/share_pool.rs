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

/// How often the processors of a pool are read, which is one small file, while there are such tasks. (inotify would
/// miss a pool that is created again.)
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
            let mut given: HashMap<TaskId, String> = HashMap::new();
            loop {
                tokio::time::sleep(POLL_INTERVAL).await;
                let Some(inner) = engine.upgrade() else { return };
                let engine = Self(inner);
                catch_panic("updating the processors of share pools", async { engine.update_processors(&mut given) })
                    .await;
            }
        });
    }

    /// Sets the processors of all tasks whose share pool has changed.
    fn update_processors(&self, given: &mut HashMap<TaskId, String>) {
        let running = self.started_tasks().into_iter().filter(|(_, task)| !task.has_ended());
        let in_pools: Vec<(TaskId, SharePool, CgroupPath)> = running
            .filter_map(|(id, task)| {
                let record = task.record();
                Some((id, record.intent.share_pool?, record.intent.cgroup))
            })
            .collect();
        let ids: HashSet<&TaskId> = in_pools.iter().map(|(id, ..)| id).collect();
        given.retain(|id, _| ids.contains(id));
        let pools: HashSet<&SharePool> = in_pools.iter().map(|(_, pool, _)| pool).collect();
        // Nomad's client may be creating a pool at the moment. Until it can be read, its tasks keep their processors.
        let now: HashMap<&SharePool, String> =
            pools.into_iter().filter_map(|pool| Some((pool, pool.cpus().ok()?))).collect();
        for (id, pool, cgroup) in &in_pools {
            let Some(cpus) = now.get(pool).filter(|cpus| given.get(id) != Some(cpus)) else { continue };
            match self.context().cgroups.set_cpus(cgroup, cpus) {
                Ok(()) => drop(given.insert(id.clone(), cpus.clone())),
                // This is tried again with the next poll, but logged only once.
                Err(error) => {
                    let refused = format!("not {cpus}");
                    if given.insert(id.clone(), refused.clone()) != Some(refused) {
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
