//! Counts the holds on each shim in this process. The holder that releases the last hold on a shim shuts the shim down.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The shims that have holds in this process, by id.
pub(super) type Holders = Arc<Mutex<HashMap<String, Holding>>>;

/// The state of a shim that has at least one hold.
#[derive(Debug, Default)]
pub(super) struct Holding {
    /// The number of holds on the shim.
    pub(super) count: usize,
    /// Whether the shim has a container that it can't delete.
    pub(super) is_unusable: bool,
}

/// A hold on a shim: the shim is in use by this process until the last hold on it is dropped.
#[derive(Debug)]
pub struct Held {
    id: String,
    pub(super) own: Holders,
    given_up: bool,
}

impl Held {
    pub(super) fn new(id: &str, own: &Holders) -> Self {
        holders(own).entry(id.to_owned()).or_default().count += 1;
        Self { id: id.to_owned(), own: own.clone(), given_up: false }
    }

    /// Releases this hold if there is a further hold on the shim. Returns whether this hold was released.
    pub(super) fn leave_to_others(&mut self) -> bool {
        let mut own = holders(&self.own);
        match own.get_mut(&self.id) {
            Some(holding) if holding.count > 1 => {
                holding.count -= 1;
                self.given_up = true;
                true
            }
            _ => false,
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.given_up {
            return;
        }
        let mut own = holders(&self.own);
        match own.get_mut(&self.id) {
            Some(holding) if holding.count > 1 => holding.count -= 1,
            _ => drop(own.remove(&self.id)),
        }
    }
}

pub(super) fn holders(own: &Holders) -> MutexGuard<'_, HashMap<String, Holding>> {
    own.lock().unwrap_or_else(PoisonError::into_inner)
}
