//! Who in this process holds which shim. The last one who lets go of a shim ends it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Who in this process holds which shim, by its name.
pub(super) type Holders = Arc<Mutex<HashMap<String, Holding>>>;

/// What is known here of a shim that somebody holds.
#[derive(Debug, Default)]
pub(super) struct Holding {
    /// How many hold it.
    pub(super) count: usize,
    /// Does it hold a container that it can't delete?
    pub(super) is_unusable: bool,
}

/// Says that somebody here holds a shim, until it is dropped.
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

    /// Lets go, unless nobody else holds it: true when somebody does.
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
