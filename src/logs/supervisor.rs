//! The log writer supervisor: starts the log writer, starts another one when it dies, and has every FIFO open, so that
//! no output in a FIFO is lost when a task ends while no log writer runs. The supervisor does nothing else, so that it
//! has few reasons to die.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, Read as _, Write as _},
    os::unix::{fs::OpenOptionsExt as _, process::CommandExt as _},
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    poll::PollTimeout,
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
/// The interval, in milliseconds, between two attempts to open a FIFO that could not be opened.
const GUARD_RETRY_INTERVAL: u8 = 100;

/// Runs the supervisor for the directory `logs` until the directory is removed. Returns at once if another supervisor
/// runs.
///
/// # Errors
/// When the lock, the processes or the directory can't be examined.
pub fn run_supervisor(logs: &Path) -> io::Result<()> {
    // The plugin closes its end of the pipe after it has moved this process out of the agent's cgroup.
    io::stdin().read_to_end(&mut Vec::new())?;
    let lock = File::options().create(true).truncate(false).read(true).write(true).mode(0o600).open(logs.join(LOCK))?;
    let mut lock = match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((_, Errno::EWOULDBLOCK)) => return Ok(()),
        Err((_, errno)) => return Err(errno.into()),
    };
    let own = serde_json::to_vec(&ProcessId::of(std::process::id())?)?;
    lock.set_len(0)?;
    lock.write_all(&own)?;
    // Children do not inherit the lock, so it is free as soon as this process has ended.
    let watch = DirWatch::new(logs, LOCK, InitFlags::empty())?;
    let mut guards = Guards::new(logs);
    guards.add_all()?;
    let dir = logs.to_owned();
    thread::spawn(move || run_until_done(|| run_writers(&dir)));
    loop {
        if !watch.wait(guards.retry_interval())? {
            guards.open_missing();
            continue;
        }
        for change in watch.changes()? {
            match change {
                DirChange::Added(task) => guards.add(task),
                DirChange::Removed(task) => guards.remove(&task),
                DirChange::Overflow => guards.add_all()?,
                DirChange::DirRemoved => return Ok(()),
            }
        }
        guards.open_missing();
    }
}

/// The guards of all tasks' FIFOs.
struct Guards {
    logs: PathBuf,
    guards: HashMap<String, FifoGuard>,
    /// Tasks with a FIFO that could not be opened, for example for lack of descriptors. Without it, output in the FIFO
    /// is lost when its task ends while no log writer runs.
    incomplete: HashSet<String>,
}

impl Guards {
    fn new(logs: &Path) -> Self {
        Self { logs: logs.to_owned(), guards: HashMap::new(), incomplete: HashSet::new() }
    }

    /// Opens the FIFOs of all tasks, and drops the guards of tasks that are gone.
    fn add_all(&mut self) -> io::Result<()> {
        let tasks = task_names(&self.logs)?;
        self.guards.retain(|task, _| tasks.contains(task));
        self.incomplete.retain(|task| tasks.contains(task));
        tasks.into_iter().for_each(|task| self.add(task));
        Ok(())
    }

    /// Opens the FIFOs of a task, unless they are open already: another task may have the name of a removed one. If a
    /// FIFO can't be opened, that is logged once and tried again later.
    fn add(&mut self, task: String) {
        let dir = self.logs.join(&task);
        let guard = self.guards.entry(task.clone()).or_default();
        guard.drop_replaced(&dir);
        if let Err(error) = guard.open_missing(&dir) {
            tracing::error!(task, %error, "could not open a FIFO of a task's log; trying again");
            self.incomplete.insert(task);
        }
    }

    fn remove(&mut self, task: &str) {
        self.guards.remove(task);
        self.incomplete.remove(task);
    }

    /// Tries again to open the FIFOs that could not be opened.
    fn open_missing(&mut self) {
        let Self { logs, guards, incomplete } = self;
        incomplete
            .retain(|task| guards.get_mut(task).is_some_and(|guard| guard.open_missing(&logs.join(task)).is_err()));
    }

    /// Returns how long to wait before `open_missing` is called again.
    fn retry_interval(&self) -> PollTimeout {
        if self.incomplete.is_empty() { PollTimeout::NONE } else { GUARD_RETRY_INTERVAL.into() }
    }
}

/// Repeats the work until it returns without a panic. A panic would otherwise end only its thread, and nothing would
/// start a log writer any more.
fn run_until_done(work: impl Fn()) {
    while panic::catch_unwind(AssertUnwindSafe(&work)).is_err() {
        tracing::error!("the thread that starts the log writer panicked; it continues");
        #[allow(clippy::disallowed_methods, reason = "a thread that does nothing else, without an async runtime")]
        thread::sleep(SHORT_RUN_MAX / 4);
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

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        fs,
        io::{Read as _, Write as _},
        os::unix::fs::{OpenOptionsExt as _, symlink},
    };

    use super::*;
    use crate::logs::{LogOptions, LogSpec, create_task_dir, fifo_path};

    /// Creates the directory of a task, with both FIFOs, and returns its path.
    fn create_task(logs: &Path) -> PathBuf {
        let dir = logs.join("task");
        let spec = LogSpec { alloc_dir: "/x".into(), task: "task".to_owned(), options: LogOptions::default() };
        create_task_dir(&dir, &spec, false).expect("created");
        dir
    }

    #[test]
    fn a_fifo_that_could_not_be_opened_is_opened_later() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = create_task(root.path());
        let (fifo, hidden) = (fifo_path(&dir, "stderr"), dir.join("hidden"));
        fs::rename(&fifo, &hidden).expect("renamed");
        symlink("hidden", &fifo).expect("linked");
        let mut guards = Guards::new(root.path());
        guards.add_all().expect("listed");
        let count = |guards: &Guards| guards.guards["task"].0.iter().flatten().count();
        guards.open_missing();
        assert_eq!((count(&guards), guards.retry_interval()), (1, GUARD_RETRY_INTERVAL.into()));
        fs::rename(&hidden, &fifo).expect("renamed");
        guards.open_missing();
        assert_eq!((count(&guards), guards.retry_interval()), (2, PollTimeout::NONE));
        // A FIFO that does not exist is not missing.
        fs::remove_file(&fifo).expect("removed");
        guards.add("task".to_owned());
        assert_eq!((count(&guards), guards.retry_interval()), (1, PollTimeout::NONE));
    }

    #[test]
    fn a_fifo_that_can_not_be_opened_again_keeps_its_content() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = create_task(root.path());
        let mut guards = Guards::new(root.path());
        guards.add_all().expect("listed");
        let (fifo, hidden) = (fifo_path(&dir, "stdout"), dir.join("hidden"));
        let open = |path: &Path| {
            let mut options = fs::File::options();
            options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).expect("opened")
        };
        open(&fifo).write_all(b"said").expect("written");
        fs::rename(&fifo, &hidden).expect("renamed");
        symlink("hidden", &fifo).expect("linked");
        guards.add_all().expect("listed");
        let mut text = [0; 4];
        open(&hidden).read_exact(&mut text).expect("read");
        assert_eq!(&text, b"said");
        fs::rename(&hidden, &fifo).expect("renamed");
        // Another task has the name now: its FIFO is another one, and what the first task left is gone.
        fs::remove_dir_all(&dir).expect("removed");
        create_task(root.path());
        guards.add_all().expect("listed");
        open(&fifo).write_all(b"next").expect("written");
        open(&fifo).read_exact(&mut text).expect("read");
        assert_eq!(&text, b"next");
        fs::remove_dir_all(&dir).expect("removed");
        guards.add_all().expect("listed");
        assert!(guards.guards.is_empty(), "the guard of a task that is gone is dropped");
    }

    #[test]
    fn work_is_repeated_after_a_panic() {
        let calls = Cell::new(0);
        run_until_done(|| {
            calls.set(calls.get() + 1);
            assert_ne!(calls.get(), 1, "on purpose");
        });
        assert_eq!(calls.get(), 2);
    }
}
