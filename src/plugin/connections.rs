//! The plugin's connections: how many agents are connected, sockets for root only, and whether the plugin is to shut
//! down.

use std::{
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::files::{listen_privately, remove_file_if_exists};
use parking_lot::{Mutex, MutexGuard};
use tokio::net::UnixListener;

/// Listens at a socket to which only root can connect. An existing socket is removed: this process holds the driver's
/// lock, so the socket is a dead plugin's.
///
/// # Errors
/// When the socket can't be created.
pub(crate) fn listen_root_only(path: &Path) -> io::Result<UnixListener> {
    remove_file_if_exists(path)?;
    let listener = listen_privately(path)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Whether the plugin is to shut down, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ShutdownMode {
    /// The plugin keeps running.
    NotRequested,
    /// The agent does not need the plugin any more: what only this plugin uses is removed.
    Exit,
    /// Another plugin takes over: what this plugin has prepared is left to the other one.
    HandOver,
}

/// The number of connections of agents to the plugin, and the time since which there has been at least one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Connections(Arc<Mutex<ConnectionState>>);

#[derive(Debug, Default)]
struct ConnectionState {
    count: usize,
    /// The time since which there has been at least one connection without interruption; `None` if there is none.
    since: Option<Instant>,
}

impl Connections {
    /// Says whether any agent is connected.
    pub(crate) fn any_connected(&self) -> bool {
        self.state().count > 0
    }

    /// Returns for how long an agent has been connected without interruption; zero when none is connected.
    pub(crate) fn connected_for(&self) -> Duration {
        self.state().since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Counts one more connection until the returned guard is dropped.
    pub(crate) fn register(&self) -> ConnectionGuard {
        let mut connected = self.state();
        connected.count += 1;
        connected.since.get_or_insert_with(Instant::now);
        drop(connected);
        ConnectionGuard(self.clone())
    }

    fn state(&self) -> MutexGuard<'_, ConnectionState> {
        self.0.lock()
    }
}

/// A guard for one connection, which is counted until the guard is dropped.
#[derive(Debug)]
pub(crate) struct ConnectionGuard(Connections);

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        let mut connected = self.0.state();
        connected.count -= 1;
        if connected.count == 0 {
            connected.since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connected_for_starts_again_after_a_disconnection() {
        let clients = Connections::default();
        assert_eq!((clients.any_connected(), clients.connected_for()), (false, Duration::ZERO));
        let first = clients.register();
        let second = clients.register();
        drop(first);
        let connected_for = clients.connected_for();
        assert!(clients.any_connected() && connected_for > Duration::ZERO);
        drop(second);
        assert_eq!((clients.any_connected(), clients.connected_for()), (false, Duration::ZERO));
        let _third = clients.register();
        assert!(clients.any_connected());
    }
}
