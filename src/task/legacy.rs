//! Legacy tasks: those of nomad-driver-containerd, which this driver replaces. Their handles have version 1, and
//! containerd manages their containers. They can't be recovered, because their output goes through a process that has
//! ended. Their containers are ended instead, so that no task runs twice.

use std::{collections::BTreeSet, time::Duration};

use super::{Engine, TaskError};
use crate::{
    containerd::{Client, ContainerdError},
    ids::AllocId,
};

/// The version of nomad-driver-containerd's handles.
pub const LEGACY_HANDLE_VERSION: i32 = 1;
/// How long a process may survive SIGKILL. Only a process that hangs in the kernel survives it longer.
const KILL_GRACE: Duration = Duration::from_secs(30);

/// A task of nomad-driver-containerd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegacyTask {
    alloc_id: AllocId,
    task: String,
    /// The possible names of its container in containerd.
    container_names: BTreeSet<String>,
}

impl LegacyTask {
    /// Derives the possible container names from the handle (a msgpack map with `ContainerName`), and from the two
    /// schemes that nomad-driver-containerd used, one for each version of cgroups.
    pub fn of(driver_state: &[u8], alloc_id: &AllocId, task: &str) -> Self {
        let mut names = BTreeSet::from([format!("{task}-{alloc_id}"), format!("{alloc_id}.{task}.scope")]);
        if let Ok(rmpv::Value::Map(fields)) = rmpv::decode::read_value(&mut &driver_state[..]) {
            let name = fields.iter().find(|(key, _)| key.as_str() == Some("ContainerName"));
            names.extend(name.and_then(|(_, value)| value.as_str()).map(str::to_owned));
        }
        Self { alloc_id: alloc_id.clone(), task: task.to_owned(), container_names: names }
    }
}

impl Engine {
    /// Ends and deletes the containers of a legacy task, and returns their names. After an error, a container may still
    /// run. The engine then remembers the task, and does not start the same task of the allocation before the
    /// containers have ended.
    ///
    /// # Errors
    /// When containerd does not answer, or does not end a container.
    pub async fn end_legacy(&self, task: LegacyTask) -> Result<Vec<String>, ContainerdError> {
        let key = (task.alloc_id.clone(), task.task.clone());
        let outcome = self.end_legacy_containers(&task).await;
        match &outcome {
            Ok(_) => drop(self.legacy().remove(&key)),
            Err(_) => drop(self.legacy().insert(key, task)),
        }
        outcome
    }

    /// Retries, before a start, to end the containers of the same legacy task that could not be ended yet.
    ///
    /// # Errors
    /// When they can't be ended now either.
    pub(super) async fn end_remaining_legacy(&self, alloc_id: &AllocId, name: &str) -> Result<(), TaskError> {
        let found = self.legacy().get(&(alloc_id.clone(), name.to_owned())).cloned();
        let Some(task) = found else { return Ok(()) };
        self.end_legacy(task).await.map(drop).map_err(TaskError::Legacy)
    }

    async fn end_legacy_containers(&self, task: &LegacyTask) -> Result<Vec<String>, ContainerdError> {
        let containerd = &self.settings().containerd;
        // The two fixed names are the namespaces of nomad-driver-containerd, one for each version of cgroups.
        let namespaces = BTreeSet::from([containerd.namespace.as_str(), "nomad", "nomad.slice"]);
        let mut ended = Vec::new();
        for namespace in namespaces {
            let client = Client::new(&containerd.address, namespace, &containerd.snapshotter);
            for name in &task.container_names {
                if client.has_container(name).await? {
                    end_container(&client, name).await?;
                    ended.push(name.clone());
                }
            }
        }
        Ok(ended)
    }
}

async fn end_container(client: &Client, name: &str) -> Result<(), ContainerdError> {
    tracing::warn!(container = name, "ending a container of nomad-driver-containerd");
    client.kill_all(name).await?;
    // A container without a process answers "not found", and there is nothing to wait for.
    match tokio::time::timeout(KILL_GRACE, client.wait_task(name)).await {
        Ok(Err(error)) if !error.is_not_found() => return Err(error),
        Ok(_) => {}
        Err(_) => tracing::error!(container = name, "a container of nomad-driver-containerd survives SIGKILL"),
    }
    client.delete_task(name).await?;
    client.delete_container(name).await?;
    client.remove_snapshot(&format!("{name}-snapshot")).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_names_come_from_the_handle_and_the_usual_schemes() {
        let state = rmpv::Value::Map(vec![("ContainerName".into(), "other".into()), ("StartedAt".into(), 5.into())]);
        let mut bytes = Vec::new();
        rmpv::encode::write_value(&mut bytes, &state).expect("in memory");
        let alloc = AllocId::new("a1").expect("an id");
        let names = |state: &[u8]| LegacyTask::of(state, &alloc, "web").container_names.into_iter().collect::<Vec<_>>();
        assert_eq!(names(&bytes), ["a1.web.scope", "other", "web-a1"]);
        assert_eq!(names(b"torn"), ["a1.web.scope", "web-a1"]);
    }
}
