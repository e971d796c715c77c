//! Tasks of the driver that this one replaces: their handles have version 1, and their containers are containerd's own.
//! They can't be taken over (their output goes through a process that is gone); they are ended, so that none runs twice.

use std::{collections::BTreeSet, time::Duration};

use super::{Engine, TaskError};
use crate::containerd::{Client, ContainerdError};

/// The version of the old driver's handles.
pub const FORMER_VERSION: i32 = 1;
/// Nothing survives SIGKILL longer than this but a process that hangs in the kernel.
const KILL_GRACE: Duration = Duration::from_secs(30);

/// A task as the old driver knew it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormerTask {
    alloc_id: String,
    task: String,
    /// What its container may be called in containerd.
    names: BTreeSet<String>,
}

impl FormerTask {
    /// By its handle (a msgpack map with `ContainerName`), and by the names that the old driver gave on both versions of
    /// cgroups.
    pub fn of(driver_state: &[u8], alloc_id: &str, task: &str) -> Self {
        let mut names = BTreeSet::from([format!("{task}-{alloc_id}"), format!("{alloc_id}.{task}.scope")]);
        if let Ok(rmpv::Value::Map(fields)) = rmpv::decode::read_value(&mut &driver_state[..]) {
            let name = fields.iter().find(|(key, _)| key.as_str() == Some("ContainerName"));
            names.extend(name.and_then(|(_, value)| value.as_str()).map(str::to_owned));
        }
        Self { alloc_id: alloc_id.to_owned(), task: task.to_owned(), names }
    }
}

impl Engine {
    /// Ends what is left of a task of the old driver: the containers that were ended. One that may still run is kept in
    /// mind: the same task of the same allocation is not started beside it.
    ///
    /// # Errors
    /// When containerd can't be asked, or does not end it.
    pub async fn end_former(&self, task: FormerTask) -> Result<Vec<String>, ContainerdError> {
        let owner = (task.alloc_id.clone(), task.task.clone());
        let outcome = self.end_now(&task).await;
        match &outcome {
            Ok(_) => drop(self.former().remove(&owner)),
            Err(_) => drop(self.former().insert(owner, task)),
        }
        outcome
    }

    /// A start comes: what could not be ended before must be by now.
    pub(super) async fn clear_former(&self, alloc_id: &str, name: &str) -> Result<(), TaskError> {
        let found = self.former().get(&(alloc_id.to_owned(), name.to_owned())).cloned();
        let Some(task) = found else { return Ok(()) };
        self.end_former(task).await.map(drop).map_err(TaskError::Former)
    }

    async fn end_now(&self, task: &FormerTask) -> Result<Vec<String>, ContainerdError> {
        let at = &self.settings().containerd;
        // The old driver had these two, by the version of cgroups.
        let namespaces = BTreeSet::from([at.namespace.as_str(), "nomad", "nomad.slice"]);
        let mut ended = Vec::new();
        for namespace in namespaces {
            let client = Client::new(&at.address, namespace, &at.snapshotter);
            for name in &task.names {
                if client.has_container(name).await? {
                    end(&client, name).await?;
                    ended.push(name.clone());
                }
            }
        }
        Ok(ended)
    }
}

async fn end(client: &Client, name: &str) -> Result<(), ContainerdError> {
    tracing::warn!(container = name, "ending a container of the driver that was here before");
    client.kill_all(name).await?;
    // One that has never had a process, or has none any more, is not waited for.
    match tokio::time::timeout(KILL_GRACE, client.wait_task(name)).await {
        Ok(Err(error)) if !error.is_not_found() => return Err(error),
        Ok(_) => {}
        Err(_) => tracing::error!(container = name, "it is still there after SIGKILL"),
    }
    client.delete_task(name).await?;
    client.delete_container(name).await?;
    client.remove_snapshot(&format!("{name}-snapshot")).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_container_has_the_name_in_the_handle_or_the_usual_one() {
        let state = rmpv::Value::Map(vec![("ContainerName".into(), "other".into()), ("StartedAt".into(), 5.into())]);
        let mut bytes = Vec::new();
        rmpv::encode::write_value(&mut bytes, &state).expect("in memory");
        let names = |state: &[u8]| FormerTask::of(state, "a1", "web").names.into_iter().collect::<Vec<_>>();
        assert_eq!(names(&bytes), ["a1.web.scope", "other", "web-a1"]);
        assert_eq!(names(b"torn"), ["a1.web.scope", "web-a1"]);
    }
}
