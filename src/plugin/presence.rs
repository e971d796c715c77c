//! The plugin's connections: how many hosts are connected, private sockets besides Nomad's, and whether the plugin is
//! to shut down.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::net::UnixListener;

/// Listens at a socket to which only root can connect. An existing socket is removed: this process holds the driver's
/// lock, so the socket is a dead plugin's.
///
/// # Errors
/// When the socket can't be created.
pub fn listen_privately(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Whether the plugin is to shut down, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// The plugin keeps running.
    Not,
    /// The agent does not need the plugin any more: what only this plugin uses is removed.
    Ending,
    /// Another plugin takes over: what this plugin has prepared is left to the other one.
    GivingWay,
}

/// How many connections hosts have to the plugin, and since when there has been at least one.
#[derive(Debug, Clone, Default)]
pub struct Clients(Arc<Mutex<Connected>>);

#[derive(Debug, Default)]
struct Connected {
    count: usize,
    /// Since when there has been at least one connection without a break.
    since: Option<Instant>,
}

impl Clients {
    /// Whether any agent is connected.
    pub fn any(&self) -> bool {
        self.connected().count > 0
    }

    /// Returns for how long an agent has been connected without a break; zero when none is.
    pub fn attended_for(&self) -> Duration {
        self.connected().since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Counts one more connection until the returned guard is dropped.
    pub fn enter(&self) -> Entered {
        let mut connected = self.connected();
        connected.count += 1;
        connected.since.get_or_insert_with(Instant::now);
        drop(connected);
        Entered(self.clone())
    }

    fn connected(&self) -> MutexGuard<'_, Connected> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A guard for one connection, which is counted until the guard is dropped.
#[derive(Debug)]
pub struct Entered(Clients);

impl Drop for Entered {
    fn drop(&mut self) {
        let mut connected = self.0.connected();
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
    fn attendance_begins_anew_after_a_break() {
        let clients = Clients::default();
        assert_eq!((clients.any(), clients.attended_for()), (false, Duration::ZERO));
        let first = clients.enter();
        let second = clients.enter();
        drop(first);
        let attended = clients.attended_for();
        assert!(clients.any() && attended > Duration::ZERO);
        drop(second);
        assert_eq!((clients.any(), clients.attended_for()), (false, Duration::ZERO));
        let _third = clients.enter();
        assert!(clients.any());
    }
}
