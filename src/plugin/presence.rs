//! Who is connected to us, at which sockets besides Nomad's, and whether we are to leave.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
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

/// How many connections hosts have to us right now.
#[derive(Debug, Clone, Default)]
pub struct Clients(Arc<AtomicUsize>);

impl Clients {
    /// Is any agent connected?
    pub fn any(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 0
    }

    /// One more; counted until what is returned is dropped.
    pub fn enter(&self) -> Entered {
        self.0.fetch_add(1, Ordering::SeqCst);
        Entered(self.clone())
    }
}

/// One connection; counted until it is dropped.
#[derive(Debug)]
pub struct Entered(Clients);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}
