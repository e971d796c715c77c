//! The lock that makes one plugin the only one of its name on a host, and how it changes hands.

use std::{fs::File, time::Duration};

use nix::fcntl::{Flock, FlockArg};

use super::TaskError;
use crate::{
    control,
    places::{Places, open_lock},
};

/// A plugin that was asked to leave, by us or by its agent, is gone well within this.
const LOCK: Duration = Duration::from_secs(5);
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
pub async fn take(places: &Places) -> Result<Flock<File>, TaskError> {
    let path = places.lock();
    let began = tokio::time::Instant::now();
    let mut asked = None;
    let mut reason = "it does not answer".to_owned();
    loop {
        if let Some(lock) = try_take(places)? {
            return Ok(lock);
        }
        if asked.is_none_or(|at: tokio::time::Instant| at.elapsed() > AGAIN) {
            asked = Some(tokio::time::Instant::now());
            match control::ask(&places.control(), &control::Request::Leave, AGAIN * 4).await {
                Ok(_) => tracing::info!("an orphaned plugin was asked to give way"),
                Err(error) => reason = crate::chain(&error),
            }
        }
        if began.elapsed() > LOCK {
            return Err(TaskError::Held { path, reason });
        }
        tokio::time::sleep(PAUSE).await;
    }
}
