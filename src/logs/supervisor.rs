//! The log writer supervisor: starts the log writer, starts another one when it dies, and has every FIFO open, so that
//! no output in a FIFO is lost when a task ends while no log writer runs. The supervisor does nothing else, so that it
//! has few reasons to die.

use std::{
    collections::HashMap,
    fs::File,
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
    FifoGuard, task_names,
    watch::{DirChange, DirWatch},
    writer::wait_for_writer_exit,
};
use crate::{
    files::remove_dir_all_if_exists,
    process::{self, PidFd, ProcessId, none_if_vanished},
};

/// The file that the running supervisor has locked. It contains the supervisor's pid and start time.
const LOCK: &str = ".keeper.lock";
/// The argument with which the supervisor starts the log writer.
pub const WRITER_FLAG: &str = "--writer";
/// The command of this program that runs the supervisor.
pub const SUPERVISOR_COMMAND: &str = "log-writer";
/// If a log writer has run for a shorter time than this, the next one is started after a delay.
const SHORT_RUN_MAX: Duration = Duration::from_secs(1);

/// Runs the supervisor for the directory `logs` until the directory is removed. Returns at once if another supervisor
/// runs.
///
/// # Errors
/// When the lock, the processes or the directory can't be examined.
pub fn run_supervisor(logs: &Path) -> io::Result<()> {
    // The plugin closes its end of the pipe after it has moved this process out of the agent's cgroup.
    io::stdin().read_to_end(&mut Vec::new())?;
    let lock = File::options().create(true).truncate(false).read(true).write(true).mode(0o600).open(logs.join(LOCK))?;
    let Ok(mut lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else { return Ok(()) };
    let own = serde_json::to_vec(&ProcessId::of(std::process::id())?)?;
    lock.set_len(0)?;
    lock.write_all(&own)?;
    // Children do not inherit the lock, so it is free as soon as this process has ended.
    let watch = DirWatch::new(logs, LOCK, InitFlags::empty())?;
    let mut guards: HashMap<String, FifoGuard> = HashMap::new();
    let guard_all = |guards: &mut HashMap<String, FifoGuard>| -> io::Result<()> {
        let all = task_names(logs)?.into_iter();
        guards.extend(all.map(|task| (task.clone(), FifoGuard::new(&logs.join(task)))));
        Ok(())
    };
    guard_all(&mut guards)?;
    let dir = logs.to_owned();
    thread::spawn(move || run_writers(&dir));
    loop {
        for change in watch.changes()? {
            match change {
                DirChange::Added(task) => {
                    let guard = FifoGuard::new(&logs.join(&task));
                    guards.insert(task, guard);
                }
                DirChange::Removed(task) => drop(guards.remove(&task)),
                DirChange::Overflow => guard_all(&mut guards)?,
                DirChange::DirRemoved => return Ok(()),
            }
        }
    }
}

/// Runs one log writer after the other. Returns when a log writer ends successfully, because the directory was removed.
///
/// A log writer whose supervisor has died continues. This function first waits for its end, because a second log writer
/// would only wait for the first one's lock.
fn run_writers(logs: &Path) {
    loop {
        match wait_for_writer_exit(logs) {
            Ok(true) => {}
            Ok(false) => return,
            // The log writer that is started next waits for the lock as well.
            Err(error) => tracing::warn!(%error, "could not wait for the lock of the log writer"),
        }
        let began = Instant::now();
        // This path is the program of this process, even if its file was replaced.
        let mut command = process::command("/proc/self/exe");
        command.arg0("nomad-driver-shim").args([SUPERVISOR_COMMAND, WRITER_FLAG]).arg(logs).stdin(Stdio::null());
        match command.spawn().and_then(|mut child| child.wait()) {
            Ok(status) if status.success() => return,
            Ok(status) => tracing::warn!(%status, "the log writer died; starting another one"),
            Err(error) => tracing::error!(%error, "could not start the log writer; trying again"),
        }
        if began.elapsed() < SHORT_RUN_MAX {
            #[allow(clippy::disallowed_methods, reason = "a thread that does nothing else, without an async runtime")]
            thread::sleep(SHORT_RUN_MAX / 4);
        }
    }
}

/// Returns the running supervisor of the directory `logs`, if there is one.
///
/// # Errors
/// When the lock file or the process can't be examined.
pub fn running_supervisor(logs: &Path) -> io::Result<Option<PidFd>> {
    let Some(mut lock) = none_if_vanished(File::options().read(true).write(true).open(logs.join(LOCK)))? else {
        return Ok(None);
    };
    let mut text = String::new();
    lock.read_to_string(&mut text)?;
    match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
        // No supervisor has the lock.
        Ok(_) => Ok(None),
        Err((_, Errno::EWOULDBLOCK)) => match serde_json::from_str(&text) {
            Ok(supervisor) => none_if_vanished(PidFd::of(&supervisor)),
            // A supervisor has just locked the file and has not written its pid yet. If the caller starts another
            // supervisor, the other one ends at once.
            Err(_) => Ok(None),
        },
        Err((_, error)) => Err(error.into()),
    }
}

/// Ends the supervisor and the log writer, if they run. The caller must have checked that no task has a log any more.
pub fn stop(logs: &Path) {
    // Both processes end when their directory is removed.
    if let Err(error) = remove_dir_all_if_exists(logs) {
        tracing::warn!(
            path = %logs.display(),
            %error,
            "could not remove the directory of logs; the log writer keeps running"
        );
    }
}

/// Returns the arguments of this program that run the supervisor for the directory `logs`.
pub fn supervisor_args(logs: &Path) -> [PathBuf; 2] {
    [PathBuf::from(SUPERVISOR_COMMAND), logs.to_owned()]
}
