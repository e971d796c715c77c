//! Shims that an earlier instance of us has started: found again by what is noted in their directories.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{
    Client, Launcher, Shim, ShimError,
    launch::{END, PID, UNUSABLE, remove_dir},
};
use crate::process::{PidFd, ProcessId, boot_id, has_vanished};

/// Between two looks.
const AGAIN: Duration = Duration::from_millis(100);

/// Between two attempts to watch a process, for which there are no descriptors.
const WATCH_AGAIN: Duration = Duration::from_secs(1);

/// What became of a shim that an earlier instance of us has started.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one a task, nearly always the large one")]
pub enum Found {
    /// It lives and answers.
    Alive(Shim),
    /// It lives and does not answer.
    Hung(PidFd),
    /// It has ended.
    Gone,
    /// It could not be looked for, or not be connected to, for want of descriptors or memory: it may live, and may hold a
    /// container.
    Unknown(io::Error),
}

impl Found {
    /// A connection, if the shim lives and answers.
    pub fn client(&self) -> Option<&Client> {
        match self {
            Self::Alive(shim) if !shim.has_ended() => Some(shim.client()),
            _ => None,
        }
    }
}

/// What is noted in a shim's directory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Identity {
    #[serde(flatten)]
    pub(super) process: ProcessId,
    pub(super) boot: String,
    pub(super) namespace: String,
    /// What it has a sealed copy of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) runtime: Option<PathBuf>,
    /// Its own program, where that is not the launcher's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) program: Option<PathBuf>,
}

impl Launcher {
    /// Takes over the shim called `id` of an earlier instance of us.
    pub async fn adopt(&self, id: &str) -> Found {
        let held = self.hold(id);
        let dir = self.places.shim(id);
        let (pidfd, identity) = match find(&dir).await {
            Ok(Some(found)) => found,
            Ok(None) => return Found::Gone,
            Err(error) => return Found::Unknown(error),
        };
        let deadline = tokio::time::Instant::now() + END;
        let error = loop {
            match Client::connect(&dir.join("sock"), self.hint(identity.program.as_deref())).await {
                Ok(client) => {
                    let pidfd = Arc::new(pidfd);
                    let ended = watch_over(&pidfd);
                    let is_unusable = is_unusable(&dir);
                    let shim = Shim {
                        id: id.to_owned(),
                        pid: identity.process.pid,
                        dir,
                        client: client.counted_in(self.calls()),
                        pidfd,
                        ended,
                        namespace: identity.namespace,
                        runtime: identity.runtime,
                        program: identity.program,
                        held,
                        uses: 0,
                        adopted: true,
                    };
                    if is_unusable {
                        shim.note_unusable();
                    }
                    return Found::Alive(shim);
                }
                // That we can't connect just now (no descriptors) does not mean that it hangs.
                Err(error) if matches!(error, ShimError::Late { .. }) => break error,
                Err(error) if tokio::time::Instant::now() > deadline => break error,
                Err(_) => match find(&dir).await {
                    Ok(Some(_)) => tokio::time::sleep(AGAIN).await,
                    Ok(None) => return Found::Gone,
                    Err(error) => return Found::Unknown(error),
                },
            }
        };
        // It may have ended while we asked.
        match find(&dir).await {
            // Whether it answers is known only to those who can ask.
            Ok(Some(_)) if !can_connect() => Found::Unknown(io::Error::other(crate::chain(&error))),
            Ok(Some((pidfd, ..))) => {
                tracing::warn!(shim = id, %error, "a shim lives and does not answer");
                Found::Hung(pidfd)
            }
            Ok(None) => Found::Gone,
            Err(error) => Found::Unknown(error),
        }
    }
}

/// Does this process get the descriptors that a connection takes?
fn can_connect() -> bool {
    std::os::unix::net::UnixStream::pair().is_ok()
}

/// Tells when the process has ended. One that can't be watched is not told to be dead; its connection tells, too.
fn watch_over(pidfd: &Arc<PidFd>) -> watch::Receiver<bool> {
    let (tell, ended) = watch::channel(false);
    let pidfd = pidfd.clone();
    tokio::spawn(async move {
        let ended = async {
            while let Err(error) = pidfd.ended().await {
                tracing::warn!(%error, "a shim can't be watched; trying again");
                tokio::time::sleep(WATCH_AGAIN).await;
            }
        };
        tokio::select! {
            () = ended => drop(tell.send_replace(true)),
            // Nobody wants to know any more: the descriptor goes.
            () = tell.closed() => {}
        }
    });
    ended
}

/// The shim whose directory this is, if it lives: its process and what is noted of it. That we can't look just now (no
/// descriptors, no memory) does not mean that it is dead; it is looked for again, for a while.
///
/// # Errors
/// When it could not be looked for in all that time.
async fn find(dir: &Path) -> io::Result<Option<(PidFd, Identity)>> {
    let deadline = tokio::time::Instant::now() + END;
    loop {
        match look(dir) {
            Ok(found) => return Ok(Some(found)),
            Err(error) if has_vanished(&error) => return Ok(None),
            Err(error) if tokio::time::Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    }
}

fn look(dir: &Path) -> io::Result<(PidFd, Identity)> {
    let identity: Identity = serde_json::from_slice(&fs::read(dir.join(PID))?).map_err(|_| io::ErrorKind::NotFound)?;
    if boot_id()? != identity.boot {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok((PidFd::of(&identity.process)?, identity))
}

/// Does the shim whose directory this is live? Where that can't be told, it may.
pub fn is_alive(dir: &Path) -> bool {
    look(dir).map_or_else(|error| !has_vanished(&error), |_| true)
}

/// Does the shim whose directory this is hold a container that it can't delete? It says yes when asked to end, and stays.
pub fn is_unusable(dir: &Path) -> bool {
    dir.join(UNUSABLE).exists()
}

/// Ends a shim at once, whatever it holds: what it held is then the dead-shim case. One that is gone is fine.
pub fn kill_shim(dir: &Path) {
    match look(dir) {
        Ok((pidfd, ..)) => pidfd.signal(libc::SIGKILL),
        Err(error) if has_vanished(&error) => {}
        Err(error) => tracing::error!(dir = %dir.display(), %error, "a shim that is to be killed can't be looked for"),
    }
}

/// Ends a shim that does not answer, by force, and removes its directory: true when it is gone.
pub async fn end_hung(dir: &Path, pidfd: &PidFd) -> bool {
    pidfd.signal(libc::SIGKILL);
    let gone = tokio::time::timeout(END, pidfd.ended()).await.is_ok_and(|ended| ended.is_ok());
    if gone {
        remove_dir(dir);
    }
    gone
}

/// Ends a shim that another instance of us left behind, by its directory: true when it is gone. One that holds a
/// container answers and stays; then its directory stays too, since its socket is the only way to it.
pub async fn end_stray(dir: &Path) -> bool {
    let socket = dir.join("sock");
    let deadline = tokio::time::Instant::now() + END;
    let mut asked = false;
    loop {
        match tokio::time::timeout(END, tokio::net::UnixStream::connect(&socket)).await {
            Ok(Err(error)) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
                // One that listens no more is about to end, and can't be asked anything.
                let Ok((pidfd, _)) = look(dir) else {
                    remove_dir(dir);
                    return true;
                };
                if tokio::time::timeout(END, pidfd.ended()).await.is_err() {
                    return end_hung(dir, &pidfd).await;
                }
            }
            Ok(Ok(_)) if !asked => {
                asked = true;
                if let Ok(client) = Client::connect(&socket, None).await
                    && let Err(error) = client.shutdown("").await
                {
                    tracing::warn!(dir = %dir.display(), %error, "a stray shim refuses to end");
                }
            }
            _ => {}
        }
        if tokio::time::Instant::now() > deadline {
            tracing::warn!(dir = %dir.display(), "a stray shim does not end; it may still hold a container");
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
        places::{Places, make_dir},
        shim::{
            ShimScope,
            fake::{Answer, listen},
        },
    };

    /// A shim with a container says yes when it is asked to end, and stays (containerd, `runtime/v2/runc/task/service.go`,
    /// `Shutdown`). If it can never delete that container, it would stay for ever.
    #[tokio::test]
    async fn a_shim_with_a_container_that_it_can_not_delete_is_ended_by_force() {
        let dir = tempfile::tempdir().expect("a directory");
        let places = Places::new(dir.path().join("run"), dir.path().join("state"));
        let own = places.shim("a");
        make_dir(&own).expect("made");
        listen(&own, |_, _| Answer::Bytes(&[]));
        let mut child = std::process::Command::new("sleep").arg("600").spawn().expect("started");
        let identity = Identity {
            process: ProcessId::of(child.id()).expect("alive"),
            boot: boot_id().expect("known"),
            namespace: "test".to_owned(),
            runtime: None,
            program: None,
        };
        fs::write(own.join(PID), serde_json::to_vec(&identity).expect("encoded")).expect("written");
        fs::write(own.join(UNUSABLE), "").expect("written");
        let launcher = Launcher::new("none".into(), "test".to_owned(), ShimScope::Node, places, Vec::new());
        let Found::Alive(shim) = Arc::new(launcher).adopt("a").await else { panic!("it lives") };
        assert!(shim.end().await);
        assert!(!own.exists());
        assert_eq!(child.wait().expect("waited for").signal(), Some(libc::SIGKILL));
    }
}
