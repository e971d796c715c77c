//! Network namespaces of groups, which the group's tasks share.
//!
//! A gVisor sandbox with a network stack of its own takes over the addresses of its namespace (gVisor's
//! `removeLinkAddresses`), so no other process in the namespace has any. Such a sandbox therefore gets the namespace
//! for itself, and the addresses are put back after its end.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
};

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

use super::{Record, context::EngineContext};
use crate::{
    files::{none_if_missing, remove_file_if_exists, write_atomically},
    ids::{Digest, TaskId},
    netns::{Addresses, find_process_in},
    places::Places,
};

/// The network stack that a task uses in its group's namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkStack {
    /// The kernel's, shared with all others in the namespace.
    Kernel,
    /// The one of the task's sandbox. No other task can use the namespace then.
    Sandbox,
}

/// A task's membership in its group's network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetnsMembership {
    /// The group's namespace.
    pub namespace: PathBuf,
    /// The network stack that the task uses in it.
    pub stack: NetworkStack,
}

/// A task can't use its group's network namespace.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// The task would have no addresses, because another task's sandbox has taken them over.
    #[error(
        "network: the group's namespace {namespace} belongs to the gVisor sandbox of task {other:?} alone; let the group share it with network = \"host\" in that task's runtime block, or give it a group of its own"
    )]
    TakenBySandbox {
        /// The group's namespace.
        namespace: PathBuf,
        /// The name of the task whose sandbox has the namespace.
        other: String,
    },
    /// The task's sandbox would take over the addresses of others in the namespace.
    #[error(
        "network: a gVisor sandbox with network = \"sandbox\" needs the group's namespace {namespace} for itself, and {who} is in it; let the group share it with network = \"host\" in this task's runtime block, or give it a group of its own"
    )]
    InUse {
        /// The group's namespace.
        namespace: PathBuf,
        /// The task or process that is in the namespace.
        who: String,
    },
    /// The namespace's addresses can't be read, saved or put back.
    #[error("network: could not read, save or restore the addresses of the group's namespace {namespace}")]
    Addresses {
        /// The group's namespace.
        namespace: PathBuf,
        /// The error of the kernel or the file system.
        source: io::Error,
    },
}

/// The tasks in each network namespace of a group.
#[derive(Debug, Default)]
pub(crate) struct NetnsRegistry(Mutex<HashMap<PathBuf, Members>>);

/// The tasks in one namespace, with their names and network stacks.
type Members = BTreeMap<TaskId, (String, NetworkStack)>;

impl NetnsRegistry {
    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, Members>> {
        self.0.lock()
    }

    /// Registers a task that an earlier plugin has started. The task is in its namespace already, so nothing is
    /// checked.
    pub(super) fn register_recovered(&self, record: &Record) {
        if let Some(group) = &record.intent.group {
            let mut all = self.lock();
            let members = all.entry(group.namespace.clone()).or_default();
            members.insert(record.intent.task_id.clone(), (record.intent.name.clone(), group.stack));
        }
    }

    /// Registers a task in its namespace, if it can share the namespace with the tasks that are in it.
    fn register(&self, id: &TaskId, name: &str, group: &NetnsMembership) -> Result<(), GroupError> {
        let mut all = self.lock();
        let members = all.entry(group.namespace.clone()).or_default();
        let mut others = members.iter().filter(|(other, _)| *other != id).map(|(_, other)| other);
        let (namespace, conflicting) = match group.stack {
            NetworkStack::Sandbox => (group.namespace.clone(), others.next()),
            NetworkStack::Kernel => {
                (group.namespace.clone(), others.find(|(_, stack)| *stack == NetworkStack::Sandbox))
            }
        };
        match (conflicting, group.stack) {
            (None, stack) => {
                members.insert(id.clone(), (name.to_owned(), stack));
                Ok(())
            }
            (Some((other, _)), NetworkStack::Kernel) => {
                Err(GroupError::TakenBySandbox { namespace, other: other.clone() })
            }
            (Some((other, _)), NetworkStack::Sandbox) => {
                Err(GroupError::InUse { namespace, who: format!("task {other:?}") })
            }
        }
    }

    /// Removes a task from its namespace, and returns the network stack that it used there.
    fn remove(&self, id: &TaskId, namespace: &Path) -> Option<NetworkStack> {
        let mut all = self.lock();
        let members = all.get_mut(namespace)?;
        let (_, stack) = members.remove(id)?;
        if members.is_empty() {
            all.remove(namespace);
        }
        Some(stack)
    }

    fn contains(&self, id: &TaskId, group: &NetnsMembership) -> bool {
        self.lock().get(&group.namespace).is_some_and(|members| members.contains_key(id))
    }
}

/// Registers a task in its group's namespace, and makes sure that the task will find the namespace's addresses there.
///
/// # Errors
/// When the task can't share the namespace with those that are in it.
pub(super) fn enter(
    context: &EngineContext,
    id: &TaskId,
    name: &str,
    group: &NetnsMembership,
) -> Result<(), GroupError> {
    context.groups.register(id, name, group)?;
    // The common case: there is no sandbox, and no addresses were taken over.
    if group.stack == NetworkStack::Kernel && !saved_addresses_path(&context.settings.places, &group.namespace).exists()
    {
        return Ok(());
    }
    let entered = tokio::task::block_in_place(|| prepare_namespace(&context.settings.places, group));
    if entered.is_err() {
        context.groups.remove(id, &group.namespace);
    }
    entered
}

/// Makes sure that the namespace has its addresses and, for a sandbox, that no process is in the namespace, and saves
/// the addresses that the sandbox is going to take over.
fn prepare_namespace(places: &Places, group: &NetnsMembership) -> Result<(), GroupError> {
    let namespace = &group.namespace;
    let failed = |source| GroupError::Addresses { namespace: namespace.clone(), source };
    // A sandbox may have left this namespace without addresses if it ended while no plugin was running.
    restore_addresses(places, namespace).map_err(failed)?;
    if group.stack == NetworkStack::Kernel {
        return Ok(());
    }
    if let Some(pid) = find_process_in(namespace).map_err(failed)? {
        let program = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let who = format!("process {pid} ({})", program.trim());
        return Err(GroupError::InUse { namespace: namespace.clone(), who });
    }
    let addresses = Addresses::of(namespace).map_err(failed)?;
    if addresses.is_empty() {
        return Ok(());
    }
    let text = serde_json::to_vec(&addresses).map_err(io::Error::from);
    text.and_then(|text| write_atomically(&saved_addresses_path(places, namespace), &text, 0o600)).map_err(failed)
}

/// Removes a task whose container is gone from its namespace, and puts the namespace's addresses back.
pub(super) fn leave(context: &EngineContext, record: &Record) {
    // A task that was refused has changed nothing. It must not restore addresses that another task's sandbox has taken
    // over.
    let Some(group) =
        record.intent.group.as_ref().filter(|group| context.groups.contains(&record.intent.task_id, group))
    else {
        return;
    };
    if group.stack == NetworkStack::Sandbox
        && let Err(error) = restore_addresses(&context.settings.places, &group.namespace)
    {
        tracing::warn!(
            namespace = %group.namespace.display(),
            %error,
            "could not restore the addresses of a network namespace"
        );
    }
    context.groups.remove(&record.intent.task_id, &group.namespace);
}

/// Restores the addresses that a sandbox has taken over, if one did.
fn restore_addresses(places: &Places, namespace: &Path) -> io::Result<()> {
    let path = saved_addresses_path(places, namespace);
    let Some(text) = none_if_missing(fs::read(&path))? else { return Ok(()) };
    // If Nomad has removed the namespace already, there is nothing to restore.
    if namespace.exists() {
        serde_json::from_slice::<Addresses>(&text)?.restore(namespace)?;
    }
    // A concurrent call may have restored the addresses and removed the file.
    remove_file_if_exists(&path)
}

/// Returns the file with the addresses that a sandbox has taken over from this namespace.
fn saved_addresses_path(places: &Places, namespace: &Path) -> PathBuf {
    let name = Digest::of(namespace.as_os_str().as_encoded_bytes());
    places.saved_addresses().join(format!("{}.json", name.short()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn register(groups: &NetnsRegistry, id: &str, stack: NetworkStack) -> Result<(), GroupError> {
        let group = NetnsMembership { namespace: "/run/netns/a".into(), stack };
        groups.register(&TaskId(id.to_owned()), id, &group)
    }

    #[test]
    fn a_sandbox_has_its_namespace_to_itself() {
        let groups = NetnsRegistry::default();
        register(&groups, "one", NetworkStack::Kernel).expect("the namespace is empty");
        register(&groups, "two", NetworkStack::Kernel).expect("tasks with the kernel's stack share the namespace");
        let error = register(&groups, "three", NetworkStack::Sandbox).expect_err("refused").to_string();
        assert!(error.contains("task \"one\"") && error.contains("network = \"host\""), "{error}");
        for id in ["one", "two"] {
            groups.remove(&TaskId(id.to_owned()), Path::new("/run/netns/a"));
        }
        register(&groups, "three", NetworkStack::Sandbox).expect("the namespace is empty again");
        register(&groups, "three", NetworkStack::Sandbox).expect("a task does not conflict with itself");
        let error = register(&groups, "one", NetworkStack::Kernel).expect_err("refused").to_string();
        assert!(error.contains("task \"three\" alone"), "{error}");
    }
}
