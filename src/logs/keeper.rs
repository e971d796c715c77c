//! The writer's keeper: starts it, starts it again when it dies, and has every FIFO open all the while, so that nothing
//! in them is lost when a task ends while no writer lives. It does so little that there is little to die of.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::{fs::OpenOptionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::inotify::InitFlags,
};

use super::{
    Hold, tasks,
    watch::{Change, Watch},
    writer::outlast_writer,
};
use crate::process::{self, PidFd, ProcessId, unless_vanished};

/// Held by the one keeper; its pid and start time are in it.
const LOCK: &str = ".keeper.lock";
/// The argument by which a keeper asks for the writer itself.
pub const WRITER: &str = "--writer";
/// The command of ours that is the keeper.
pub const COMMAND: &str = "log-writer";
/// A writer that lived shorter than this is given a moment before the next.
const SHORT: Duration = Duration::from_secs(1);

/// Keeps a writer for `logs`, until the directory is gone. Returns at once where another keeper does.
///
/// # Errors
/// When the kernel refuses what it needs.
pub fn keep(logs: &Path) -> io::Result<()> {
    // Our starter moves us out of the agent's cgroup first, and closes its end then.
    io::stdin().read_to_end(&mut Vec::new())?;
    let lock = File::options().create(true).truncate(false).read(true).write(true).mode(0o600).open(logs.join(LOCK))?;
    let Ok(mut lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else { return Ok(()) };
    let own = serde_json::to_vec(&ProcessId::of(std::process::id())?)?;
    lock.set_len(0)?;
    lock.write_all(&own)?;
    // Children inherit nothing of this: the lock's end tells that this very process is gone.
    let watch = Watch::new(logs, LOCK, InitFlags::empty())?;
    let mut held: HashMap<String, Hold> = HashMap::new();
    let hold_all = |held: &mut HashMap<String, Hold>| -> io::Result<()> {
        let all = tasks(logs)?.into_iter();
        held.extend(all.map(|task| (task.clone(), Hold::new(&logs.join(task)))));
        Ok(())
    };
    hold_all(&mut held)?;
    let dir = logs.to_owned();
    thread::spawn(move || restart(&dir));
    loop {
        for change in watch.changes()? {
            match change {
                Change::Came(task) => {
                    let files = Hold::new(&logs.join(&task));
                    held.insert(task, files);
                }
                Change::Gone(task) => drop(held.remove(&task)),
                Change::Missed => hold_all(&mut held)?,
                Change::Over => return Ok(()),
            }
        }
    }
}

/// One writer after the other. Returns when one ends of itself: its directory is gone.
///
/// A writer whose keeper has died goes on, and is taken over as it is: a second one beside it would only wait for it, for as
/// long as it lives.
fn restart(logs: &Path) {
    loop {
        match outlast_writer(logs) {
            Ok(true) => {}
            Ok(false) => return,
            // The writer itself waits for its turn, too.
            Err(error) => tracing::warn!(%error, "the log writer's lock can't be waited for"),
        }
        let began = Instant::now();
        // By what we are, not by our name: the file may have been replaced.
        let mut command = process::command("/proc/self/exe");
        command.arg0("nomad-driver-shim").args([COMMAND, WRITER]).arg(logs).stdin(Stdio::null());
        match command.spawn().and_then(|mut child| child.wait()) {
            Ok(status) if status.success() => return,
            Ok(status) => tracing::warn!(%status, "the log writer died; starting another"),
            Err(error) => tracing::error!(%error, "the log writer can't be started; trying again"),
        }
        if began.elapsed() < SHORT {
            #[allow(clippy::disallowed_methods, reason = "a thread that does nothing else, without a runtime")]
            thread::sleep(SHORT / 4);
        }
    }
}

/// The keeper of `logs`, if one lives.
///
/// # Errors
/// When that can't be told.
pub fn keeper_of(logs: &Path) -> io::Result<Option<PidFd>> {
    let Some(mut lock) = unless_vanished(File::options().read(true).write(true).open(logs.join(LOCK)))? else {
        return Ok(None);
    };
    let mut text = String::new();
    lock.read_to_string(&mut text)?;
    match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
        // Nobody holds it.
        Ok(_) => Ok(None),
        Err((_, Errno::EWOULDBLOCK)) => match serde_json::from_str(&text) {
            Ok(keeper) => unless_vanished(PidFd::of(&keeper)),
            // It has just taken the lock, and not yet written who it is. Another one that is started ends at once.
            Err(_) => Ok(None),
        },
        Err((_, error)) => Err(error.into()),
    }
}

/// Ends keeper and writer, if there are any: no task may have a log any more.
pub fn end(logs: &Path) {
    // They end with their directory.
    match fs::remove_dir_all(logs) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %logs.display(), %error, "the log writer stays");
        }
        _ => {}
    }
}

/// What a keeper is started with, below a run directory's `logs`: arguments of our own program.
pub fn arguments(logs: &Path) -> [PathBuf; 2] {
    [PathBuf::from(COMMAND), logs.to_owned()]
}
