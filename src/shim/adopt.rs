//! Adopts shims that an earlier plugin has started. They are found by the identity files in their directories.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use tokio::sync::watch;

use super::{
    Client, Launcher, Shim, ShimError,
    identity::ShimIdentity,
    launch::{EXIT_TIMEOUT, PID_FILE, UNUSABLE_FILE, remove_dir},
};
use crate::{
    ids::ShimId,
    process::{PidFd, boot_id, has_vanished},
};

/// The interval between two attempts to find a shim, or to connect to it.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The outcome of adopting a shim that an earlier plugin has started.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one a task, nearly always the large one")]
pub enum Adoption {
    /// The shim lives and answers.
    Alive(Shim),
    /// The shim lives and does not answer.
    Hung(PidFd),
    /// The shim has ended.
    Gone,
    /// The shim could not be looked up, or not be connected to, for lack of file descriptors or memory. It may live,
    /// and may have a container.
    Unknown(io::Error),
}

impl Adoption {
    /// Returns the connection, if the shim lives and answers.
    pub fn client(&self) -> Option<&Client> {
        match self {
            Self::Alive(shim) if !shim.has_ended() => Some(shim.client()),
            _ => None,
        }
    }
}

impl Launcher {
    /// Adopts the shim `id` of an earlier plugin.
    pub async fn adopt(&self, id: &ShimId) -> Adoption {
        let hold = self.acquire(id);
        let dir = self.places.shim(id);
        let (pidfd, identity) = match find_alive(&dir).await {
            Ok(Some(found)) => found,
            Ok(None) => return Adoption::Gone,
            Err(error) => return Adoption::Unknown(error),
        };
        let deadline = tokio::time::Instant::now() + EXIT_TIMEOUT;
        let error = loop {
            match Client::connect(&dir.join("sock"), self.api_hint(identity.program.as_deref())).await {
                Ok(client) => {
                    let pidfd = Arc::new(pidfd);
                    let ended = spawn_exit_watcher(&pidfd);
                    let is_unusable = is_unusable(&dir);
                    let shim = Shim {
                        id: id.clone(),
                        pid: identity.process.pid,
                        dir,
                        client: client.with_runtime_calls(self.calls()),
                        pidfd,
                        ended,
                        namespace: identity.namespace,
                        runtime: identity.runtime,
                        program: identity.program,
                        hold,
                        uses: 0,
                        adopted: true,
                    };
                    if is_unusable {
                        shim.set_unusable();
                    }
                    return Adoption::Alive(shim);
                }
                // If no connection can be made at the moment, for lack of file descriptors, the shim need not hang.
                Err(error) if matches!(error, ShimError::TimedOut { .. }) => break error,
                Err(error) if tokio::time::Instant::now() > deadline => break error,
                Err(_) => match find_alive(&dir).await {
                    Ok(Some(_)) => tokio::time::sleep(RETRY_INTERVAL).await,
                    Ok(None) => return Adoption::Gone,
                    Err(error) => return Adoption::Unknown(error),
                },
            }
        };
        // The shim may have ended in the meantime.
        match find_alive(&dir).await {
            // If this process can't make connections, it does not know whether the shim answers.
            Ok(Some(_)) if !can_connect() => Adoption::Unknown(io::Error::other(crate::error_chain(&error))),
            Ok(Some((pidfd, ..))) => {
                tracing::warn!(shim = %id, %error, "a shim of an earlier plugin lives and does not answer");
                Adoption::Hung(pidfd)
            }
            Ok(None) => Adoption::Gone,
            Err(error) => Adoption::Unknown(error),
        }
    }
}

/// Returns whether this process can still open as many file descriptors as a connection needs.
fn can_connect() -> bool {
    std::os::unix::net::UnixStream::pair().is_ok()
}

/// Spawns a task that reports when the process has ended.
fn spawn_exit_watcher(pidfd: &Arc<PidFd>) -> watch::Receiver<bool> {
    let (ended_tx, ended) = watch::channel(false);
    let pidfd = pidfd.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = pidfd.wait_for_end() => drop(ended_tx.send_replace(true)),
            // All receivers are gone, so the descriptor can be closed.
            () = ended_tx.closed() => {}
        }
    });
    ended
}

/// Returns the process and the identity of the shim that belongs to this directory, if the shim lives. A lookup that
/// fails for lack of file descriptors or memory does not mean that the shim is dead, so it is repeated until
/// `EXIT_TIMEOUT` is over.
///
/// # Errors
/// Fails when no lookup succeeds in that time.
async fn find_alive(dir: &Path) -> io::Result<Option<(PidFd, ShimIdentity)>> {
    let deadline = tokio::time::Instant::now() + EXIT_TIMEOUT;
    loop {
        match open_recorded(dir) {
            Ok(found) => return Ok(Some(found)),
            Err(error) if has_vanished(&error) => return Ok(None),
            Err(error) if tokio::time::Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(RETRY_INTERVAL).await,
        }
    }
}

fn open_recorded(dir: &Path) -> io::Result<(PidFd, ShimIdentity)> {
    let identity: ShimIdentity =
        serde_json::from_slice(&fs::read(dir.join(PID_FILE))?).map_err(|_| io::ErrorKind::NotFound)?;
    if boot_id()? != identity.boot {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok((PidFd::of(&identity.process)?, identity))
}

/// Returns whether the shim that belongs to this directory lives. Returns `true` if that is not known.
pub fn is_alive(dir: &Path) -> bool {
    open_recorded(dir).map_or_else(|error| !has_vanished(&error), |_| true)
}

/// Returns whether the shim that belongs to this directory has a container that it can't delete. Such a shim accepts
/// the request to shut down and does not exit.
pub fn is_unusable(dir: &Path) -> bool {
    dir.join(UNUSABLE_FILE).exists()
}

/// Kills the shim that belongs to this directory, even if it has containers. The engine then cleans up the containers,
/// as for any dead shim. Does nothing if the shim is gone.
pub fn kill_shim(dir: &Path) {
    match open_recorded(dir) {
        Ok((pidfd, ..)) => pidfd.signal(libc::SIGKILL),
        Err(error) if has_vanished(&error) => {}
        Err(error) => tracing::error!(dir = %dir.display(), %error, "could not look up a shim that is to be killed"),
    }
}

/// Kills a shim that does not answer, and removes its directory. Returns whether the shim is gone.
pub async fn kill_hung(dir: &Path, pidfd: &PidFd) -> bool {
    pidfd.signal(libc::SIGKILL);
    let gone = tokio::time::timeout(EXIT_TIMEOUT, pidfd.wait_for_end()).await.is_ok();
    if gone {
        remove_dir(dir);
    }
    gone
}

/// Shuts down an unrecorded shim that another plugin has left behind, found by its directory. Returns whether the shim
/// is gone. A shim that has a container answers and does not exit. Its directory is kept then, because the socket in it
/// is the only way to reach the shim.
pub async fn shut_down_unrecorded(dir: &Path) -> bool {
    let socket = dir.join("sock");
    let deadline = tokio::time::Instant::now() + EXIT_TIMEOUT;
    let mut shutdown_requested = false;
    loop {
        match tokio::time::timeout(EXIT_TIMEOUT, tokio::net::UnixStream::connect(&socket)).await {
            Ok(Err(error)) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
                // A shim that no longer listens is about to exit, and accepts no calls.
                match open_recorded(dir) {
                    Ok((pidfd, _)) => {
                        if tokio::time::timeout(EXIT_TIMEOUT, pidfd.wait_for_end()).await.is_err() {
                            return kill_hung(dir, &pidfd).await;
                        }
                    }
                    Err(error) if has_vanished(&error) => {
                        remove_dir(dir);
                        return true;
                    }
                    // Whether it still runs is not known, for lack of descriptors.
                    Err(_) => {}
                }
            }
            Ok(Ok(_)) if !shutdown_requested => {
                shutdown_requested = true;
                if let Ok(client) = Client::connect(&socket, None).await
                    && let Err(error) = client.shutdown("").await
                {
                    tracing::warn!(dir = %dir.display(), %error, "an unrecorded shim refuses to shut down");
                }
            }
            _ => {}
        }
        if tokio::time::Instant::now() > deadline {
            tracing::warn!(dir = %dir.display(), "an unrecorded shim does not exit; it may still hold a container");
            return false;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt as _, sync::Arc};

    use super::*;
    use crate::{
        files::create_private_dir,
        places::Places,
        process::ProcessId,
        shim::{
            ShimScope,
            fake::{Answer, listen},
        },
    };

    /// A shim with a container accepts the request to shut down and does not exit (containerd,
    /// `runtime/v2/runc/task/service.go`, `Shutdown`). If the shim can't delete that container, it would never exit.
    #[tokio::test]
    async fn a_shim_with_a_container_that_it_can_not_delete_is_ended_by_force() {
        let dir = tempfile::tempdir().expect("a directory");
        let places = Places::new(dir.path().join("run"), dir.path().join("state"));
        let id = ShimId::from_dir_name("a").expect("an id");
        let own = places.shim(&id);
        create_private_dir(&own).expect("made");
        listen(&own, |_, _| Answer::Bytes(&[]));
        let mut child = std::process::Command::new("sleep").arg("600").spawn().expect("started");
        let identity = ShimIdentity {
            process: ProcessId::of(child.id()).expect("alive"),
            boot: boot_id().expect("known"),
            namespace: "test".to_owned(),
            runtime: None,
            program: None,
        };
        fs::write(own.join(PID_FILE), serde_json::to_vec(&identity).expect("encoded")).expect("written");
        fs::write(own.join(UNUSABLE_FILE), "").expect("written");
        let launcher = Launcher::new("none".into(), "test".to_owned(), ShimScope::Node, places, Vec::new());
        let Adoption::Alive(shim) = Arc::new(launcher).adopt(&id).await else { panic!("the shim lives and answers") };
        assert!(shim.shut_down().await);
        assert!(!own.exists());
        assert_eq!(child.wait().expect("waited for").signal(), Some(libc::SIGKILL));
    }
}
