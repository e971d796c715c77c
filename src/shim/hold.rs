//! Counts the holds on each shim in this process. The holder that releases the last hold on a shim shuts the shim down.

use std::{collections::HashMap, sync::Arc};

use parking_lot::{Mutex, MutexGuard};

use crate::ids::ShimId;

/// The shims that have holds in this process, by id.
pub(super) type HoldRegistry = Arc<Mutex<HashMap<ShimId, HeldShim>>>;

/// The state of a shim that has at least one hold.
#[derive(Debug, Default)]
pub(super) struct HeldShim {
    /// The number of holds on the shim.
    pub(super) holds: usize,
    /// Whether the shim has a container that it can't delete.
    pub(super) is_unusable: bool,
}

/// A hold on a shim: the shim is in use by this process until the last hold on it is dropped.
#[derive(Debug)]
pub struct ShimHold {
    id: ShimId,
    pub(super) registry: HoldRegistry,
    released: bool,
}

impl ShimHold {
    pub(super) fn new(id: &ShimId, registry: &HoldRegistry) -> Self {
        lock_registry(registry).entry(id.clone()).or_default().holds += 1;
        Self { id: id.clone(), registry: registry.clone(), released: false }
    }

    /// Releases this hold if there is a further hold on the shim. Returns whether this hold was released.
    pub(super) fn release_if_shared(&mut self) -> bool {
        let mut registry = lock_registry(&self.registry);
        match registry.get_mut(&self.id) {
            Some(shim) if shim.holds > 1 => {
                shim.holds -= 1;
                self.released = true;
                true
            }
            _ => false,
        }
    }
}

impl Drop for ShimHold {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        let mut registry = lock_registry(&self.registry);
        match registry.get_mut(&self.id) {
            Some(shim) if shim.holds > 1 => shim.holds -= 1,
            _ => drop(registry.remove(&self.id)),
        }
    }
}

pub(super) fn lock_registry(registry: &HoldRegistry) -> MutexGuard<'_, HashMap<ShimId, HeldShim>> {
    registry.lock()
}
