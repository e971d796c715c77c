//! The lock that allows only one plugin of a driver name on a host, and its handover from one plugin to the next.

use std::{fs::File, time::Duration};

use nix::fcntl::{Flock, FlockArg};
use tokio::time::Instant;

use super::TaskError;
use crate::{control, files::open_lock_file, places::Places};

/// How long to wait for a lock whose holder listens on the control socket. A plugin that was asked to exit, by this
/// plugin or by its agent, has exited well within this time.
const LISTENING_HOLDER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for a lock whose holder does not listen. Such a holder is not a plugin that serves requests, but
/// the command `gc`, or a plugin that is starting or exiting. The wait is this long because Nomad starts a task again
/// when its RecoverTask fails (hashicorp/nomad, client/allocrunner/taskrunner/task_runner.go, `restoreHandle`).
const SILENT_HOLDER_TIMEOUT: Duration = Duration::from_secs(60);
/// How often the lock is tried.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How often the holder is asked to exit. It refuses while an agent is connected to it, and that agent may disconnect
/// soon.
const REQUEST_INTERVAL: Duration = Duration::from_millis(250);

/// Takes the lock. Returns `None` when another process holds it.
///
/// # Errors
/// When the lock's file can't be opened or locked.
pub(crate) fn try_take(places: &Places) -> Result<Option<Flock<File>>, TaskError> {
    let failed = |source| TaskError::Lock { path: places.lock(), source };
    let file = open_lock_file(&places.lock()).map_err(failed)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(failed(errno.into())),
    }
}

/// Takes the lock, and waits for it if necessary. A plugin that holds the lock is asked to exit, and does so if no
/// agent is connected to it.
///
/// # Errors
/// When a plugin does not release the lock, or a process that does not listen holds it for too long.
pub(crate) async fn take(places: &Places) -> Result<Flock<File>, TaskError> {
    take_within(places, LISTENING_HOLDER_TIMEOUT, SILENT_HOLDER_TIMEOUT).await
}

/// Takes the lock as [`take`] does. Waits up to `listening` for a holder that listens, and up to `silent` for any other
/// holder.
async fn take_within(places: &Places, listening: Duration, silent: Duration) -> Result<Flock<File>, TaskError> {
    let path = places.lock();
    let began = Instant::now();
    let mut listens_since: Option<Instant> = None;
    let mut asked = None;
    let mut reason = "it does not answer".to_owned();
    loop {
        if let Some(lock) = try_take(places)? {
            return Ok(lock);
        }
        if asked.is_none_or(|at: Instant| at.elapsed() > REQUEST_INTERVAL) {
            if asked.is_none() {
                tracing::info!(path = %path.display(), "waiting for the driver's lock, which another process holds");
            }
            asked = Some(Instant::now());
            let answer = control::send_request(&places.control(), &control::Request::Leave, REQUEST_INTERVAL * 4).await;
            let is_listening = !matches!(&answer, Err(error) if error.no_plugin_listens());
            listens_since = if is_listening { listens_since.or_else(|| Some(Instant::now())) } else { None };
            match answer {
                Ok(_) => tracing::info!("asked a plugin without an agent to exit"),
                Err(error) => reason = crate::error_chain(&error),
            }
        }
        if began.elapsed() > silent || listens_since.is_some_and(|since| since.elapsed() > listening) {
            return Err(TaskError::LockHeld { path, reason });
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    const LISTENING: Duration = Duration::from_millis(200);
    const SILENT: Duration = Duration::from_secs(60);

    /// Returns directories whose lock is held.
    fn with_held_lock() -> (tempfile::TempDir, Places, Flock<File>) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let places = Places::new(directory.path(), directory.path());
        let lock = try_take(&places).expect("opened").expect("the lock is free");
        (directory, places, lock)
    }

    /// `gc` is such a holder, and may run for longer than a plugin needs to exit.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_holder_that_does_not_listen_is_waited_for() {
        let (_directory, places, lock) = with_held_lock();
        let waiting = tokio::spawn(async move { take_within(&places, LISTENING, SILENT).await });
        tokio::time::sleep(LISTENING * 5).await;
        assert!(!waiting.is_finished(), "{:?}", waiting.await);
        drop(lock);
        waiting.await.expect("no panic").expect("the lock");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_plugin_that_does_not_answer_is_not_waited_for_for_long() {
        let (_directory, places, _lock) = with_held_lock();
        // The kernel accepts connections on behalf of the process that does not answer.
        let _hangs = UnixListener::bind(places.control()).expect("bound");
        let error = take_within(&places, LISTENING, SILENT).await.expect_err("the lock is held");
        assert!(matches!(error, TaskError::LockHeld { .. }), "{error:?}");
    }
}
