//! The lock that makes one plugin the only one of its name on a host, and how it changes hands.

use std::{fs::File, time::Duration};

use nix::fcntl::{Flock, FlockArg};
use tokio::time::Instant;

use super::TaskError;
use crate::{
    control,
    places::{Places, open_lock},
};

/// A plugin that was asked to leave, by us or by its agent, is gone well within this.
const LOCK: Duration = Duration::from_secs(5);
/// A holder that does not listen is no plugin at work: it is `gc` where no plugin lives, or a plugin that is being started
/// or ends. It is waited for, because Nomad starts the tasks anew whose RecoverTask fails (hashicorp/nomad,
/// client/allocrunner/taskrunner/task_runner.go, `restoreHandle`).
const SILENT: Duration = Duration::from_secs(60);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);
/// Between two requests to leave: the holder refuses while an agent is connected to it, and that may be over soon.
const AGAIN: Duration = Duration::from_millis(250);

/// Takes the lock unless somebody holds it: None then.
///
/// # Errors
/// When the lock's file can't be opened or locked.
pub fn try_take(places: &Places) -> Result<Option<Flock<File>>, TaskError> {
    let failed = |source| TaskError::Lock { path: places.lock(), source };
    let file = open_lock(&places.lock()).map_err(failed)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(failed(errno.into())),
    }
}

/// Takes the lock; a plugin that holds it and has lost its agent is asked to give way.
///
/// # Errors
/// When a plugin keeps the lock, or somebody holds it for long who does not listen.
pub async fn take(places: &Places) -> Result<Flock<File>, TaskError> {
    take_within(places, LOCK, SILENT).await
}

/// Waits for a holder that listens for as long as `listening`, and for one that does not as long as `silent`.
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
        if asked.is_none_or(|at: Instant| at.elapsed() > AGAIN) {
            if asked.is_none() {
                tracing::info!(path = %path.display(), "waiting for the driver's lock, which another process holds");
            }
            asked = Some(Instant::now());
            let answer = control::ask(&places.control(), &control::Request::Leave, AGAIN * 4).await;
            let is_listening = !matches!(&answer, Err(error) if error.is_nobody());
            listens_since = if is_listening { listens_since.or_else(|| Some(Instant::now())) } else { None };
            match answer {
                Ok(_) => tracing::info!("an orphaned plugin was asked to give way"),
                Err(error) => reason = crate::chain(&error),
            }
        }
        if began.elapsed() > silent || listens_since.is_some_and(|since| since.elapsed() > listening) {
            return Err(TaskError::Held { path, reason });
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    const LISTENING: Duration = Duration::from_millis(200);
    const SILENT: Duration = Duration::from_secs(60);

    /// Somebody has the lock of these directories.
    fn held() -> (tempfile::TempDir, Places, Flock<File>) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let places = Places::new(directory.path(), directory.path());
        let lock = try_take(&places).expect("opened").expect("nobody has it");
        (directory, places, lock)
    }

    /// As `gc` does, which works for longer than a plugin needs to leave.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_holder_that_does_not_listen_is_waited_for() {
        let (_directory, places, lock) = held();
        let waiting = tokio::spawn(async move { take_within(&places, LISTENING, SILENT).await });
        tokio::time::sleep(LISTENING * 5).await;
        assert!(!waiting.is_finished(), "{:?}", waiting.await);
        drop(lock);
        waiting.await.expect("no panic").expect("the lock");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_plugin_that_does_not_answer_is_not_waited_for_for_long() {
        let (_directory, places, _lock) = held();
        // The kernel takes connections for it.
        let _hangs = UnixListener::bind(places.control()).expect("bound");
        let error = take_within(&places, LISTENING, SILENT).await.expect_err("it is held");
        assert!(matches!(error, TaskError::Held { .. }), "{error:?}");
    }
}
