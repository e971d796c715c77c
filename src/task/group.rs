//! Network namespaces of groups, which tasks share: a gVisor sandbox with a network stack of its own takes a namespace's
//! addresses over, so that nobody else in it has any (its `removeLinkAddresses`). It has the namespace to itself, then,
//! and gives it back as it was.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::{Record, shared::Shared};
use crate::{
    ids::{Digest, TaskId},
    netns::{Addresses, who_is_in},
    places::{Places, write_whole},
};

/// Whose network stack a task uses in its group's namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stack {
    /// The kernel's, with all others in the namespace.
    Kernel,
    /// Its sandbox's, alone.
    Sandbox,
}

/// What a task is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The group's namespace.
    pub namespace: PathBuf,
    /// How it uses that.
    pub stack: Stack,
}

/// Why a task can't be in its group's namespace.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// It would have no addresses.
    #[error(
        "network: the group's namespace {namespace} belongs to the gVisor sandbox of task {other:?} alone; let the group share it with network = \"host\" in that task's runtime block, or give it a group of its own"
    )]
    Taken {
        /// Which.
        namespace: PathBuf,
        /// Whose it is.
        other: String,
    },
    /// Others would have none.
    #[error(
        "network: a gVisor sandbox with network = \"sandbox\" needs the group's namespace {namespace} for itself, and {who} is in it; let the group share it with network = \"host\" in this task's runtime block, or give it a group of its own"
    )]
    Shared {
        /// Which.
        namespace: PathBuf,
        /// Who is there.
        who: String,
    },
    /// Its addresses.
    #[error("network: addresses of the group's namespace {namespace}")]
    Addresses {
        /// Which.
        namespace: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Who is in which namespace.
#[derive(Debug, Default)]
pub struct Groups(Mutex<HashMap<PathBuf, Members>>);

/// Tasks in one namespace, with their names.
type Members = BTreeMap<TaskId, (String, Stack)>;

impl Groups {
    fn all(&self) -> MutexGuard<'_, HashMap<PathBuf, Members>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A task of an earlier instance of us is in its namespace, whatever we think of that.
    pub(super) fn known(&self, record: &Record) {
        if let Some(group) = &record.group {
            let mut all = self.all();
            let members = all.entry(group.namespace.clone()).or_default();
            members.insert(record.task_id.clone(), (record.name.clone(), group.stack));
        }
    }

    fn claim(&self, id: &TaskId, name: &str, group: &Membership) -> Result<(), GroupError> {
        let mut all = self.all();
        let members = all.entry(group.namespace.clone()).or_default();
        let mut others = members.iter().filter(|(other, _)| *other != id).map(|(_, other)| other);
        let (namespace, in_the_way) = match group.stack {
            Stack::Sandbox => (group.namespace.clone(), others.next()),
            Stack::Kernel => (group.namespace.clone(), others.find(|(_, stack)| *stack == Stack::Sandbox)),
        };
        match (in_the_way, group.stack) {
            (None, stack) => {
                members.insert(id.clone(), (name.to_owned(), stack));
                Ok(())
            }
            (Some((other, _)), Stack::Kernel) => Err(GroupError::Taken { namespace, other: other.clone() }),
            (Some((other, _)), Stack::Sandbox) => Err(GroupError::Shared { namespace, who: format!("task {other:?}") }),
        }
    }

    /// It is not in there any more: how it was.
    fn release(&self, id: &TaskId, namespace: &Path) -> Option<Stack> {
        let mut all = self.all();
        let members = all.get_mut(namespace)?;
        let (_, stack) = members.remove(id)?;
        if members.is_empty() {
            all.remove(namespace);
        }
        Some(stack)
    }

    fn has(&self, id: &TaskId, group: &Membership) -> bool {
        self.all().get(&group.namespace).is_some_and(|members| members.contains_key(id))
    }
}

/// Has a task enter its group's namespace, and sees that it finds addresses there.
///
/// # Errors
/// When it can't share it with who is there.
pub(super) fn enter(shared: &Shared, id: &TaskId, name: &str, group: &Membership) -> Result<(), GroupError> {
    shared.groups.claim(id, name, group)?;
    // Nearly all are here without a sandbox, and nothing was taken.
    if group.stack == Stack::Kernel && !note(&shared.settings.places, &group.namespace).exists() {
        return Ok(());
    }
    let entered = tokio::task::block_in_place(|| settle(&shared.settings.places, group));
    if entered.is_err() {
        shared.groups.release(id, &group.namespace);
    }
    entered
}

fn settle(places: &Places, group: &Membership) -> Result<(), GroupError> {
    let namespace = &group.namespace;
    let failed = |source| GroupError::Addresses { namespace: namespace.clone(), source };
    // Of a sandbox whose end we did not live to see.
    restore(places, namespace).map_err(failed)?;
    if group.stack == Stack::Kernel {
        return Ok(());
    }
    if let Some(pid) = who_is_in(namespace).map_err(failed)? {
        let program = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let who = format!("process {pid} ({})", program.trim());
        return Err(GroupError::Shared { namespace: namespace.clone(), who });
    }
    let addresses = Addresses::of(namespace).map_err(failed)?;
    if addresses.is_empty() {
        return Ok(());
    }
    let text = serde_json::to_vec(&addresses).map_err(io::Error::from);
    text.and_then(|text| write_whole(&note(places, namespace), &text, 0o600)).map_err(failed)
}

/// A task's container is gone: its namespace is as it was before.
pub(super) fn leave(shared: &Shared, record: &Record) {
    // One that was refused has left nothing, and what another has left is not its to put back.
    let Some(group) = record.group.as_ref().filter(|group| shared.groups.has(&record.task_id, group)) else { return };
    if group.stack == Stack::Sandbox
        && let Err(error) = restore(&shared.settings.places, &group.namespace)
    {
        tracing::warn!(namespace = %group.namespace.display(), %error, "its addresses are not put back");
    }
    shared.groups.release(&record.task_id, &group.namespace);
}

/// Puts back what a sandbox took away, if one did.
fn restore(places: &Places, namespace: &Path) -> io::Result<()> {
    let path = note(places, namespace);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    // Nomad may have removed the namespace already: then there is nothing to be put back.
    if namespace.exists() {
        serde_json::from_slice::<Addresses>(&text)?.put_back(namespace)?;
    }
    match fs::remove_file(&path) {
        // Somebody who came at the same time has done the same.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn note(places: &Places, namespace: &Path) -> PathBuf {
    let name = Digest::of(namespace.as_os_str().as_encoded_bytes());
    places.namespaces().join(format!("{}.json", name.short()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(groups: &Groups, id: &str, stack: Stack) -> Result<(), GroupError> {
        let group = Membership { namespace: "/run/netns/a".into(), stack };
        groups.claim(&TaskId(id.to_owned()), id, &group)
    }

    #[test]
    fn a_sandbox_has_its_namespace_to_itself() {
        let groups = Groups::default();
        claim(&groups, "one", Stack::Kernel).expect("the first");
        claim(&groups, "two", Stack::Kernel).expect("they share");
        let error = claim(&groups, "three", Stack::Sandbox).expect_err("refused").to_string();
        assert!(error.contains("task \"one\"") && error.contains("network = \"host\""), "{error}");
        for id in ["one", "two"] {
            groups.release(&TaskId(id.to_owned()), Path::new("/run/netns/a"));
        }
        claim(&groups, "three", Stack::Sandbox).expect("alone now");
        claim(&groups, "three", Stack::Sandbox).expect("itself is not in its way");
        let error = claim(&groups, "one", Stack::Kernel).expect_err("refused").to_string();
        assert!(error.contains("task \"three\" alone"), "{error}");
    }
}
