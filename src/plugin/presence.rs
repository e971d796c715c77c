//! Who is connected to us, at which sockets besides Nomad's, and whether we are to leave.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::net::UnixListener;

/// Listens where only root can connect. We hold the driver's lock: a socket that is there is a dead plugin's.
///
/// # Errors
/// When the socket can't be made.
pub fn listen_privately(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Whether the plugin is to leave, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// It stays.
    Not,
    /// Its agent has no more use for it: what only it uses goes with it.
    Ending,
    /// Another plugin takes its place: what it has prepared is left to that one.
    GivingWay,
}

/// How many connections hosts have to us right now, and since when there is one.
#[derive(Debug, Clone, Default)]
pub struct Clients(Arc<Mutex<Connected>>);

#[derive(Debug, Default)]
struct Connected {
    count: usize,
    /// When the first of those came that are connected now, or were without a break in between.
    since: Option<Instant>,
}

impl Clients {
    /// Is any agent connected?
    pub fn any(&self) -> bool {
        self.connected().count > 0
    }

    /// For how long an agent has been connected without a break; zero when none is.
    pub fn attended_for(&self) -> Duration {
        self.connected().since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// One more; counted until what is returned is dropped.
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

/// One connection; counted until it is dropped.
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
