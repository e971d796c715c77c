//! The log writer: one process with one thread, which writes all streams of the node.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        inotify::InitFlags,
    },
};

use super::{
    LogSpec, SPEC, STREAMS,
    status::{Losses, read_losses, write_losses},
    stream::{PeekPipe, Stream, TransferOutcome},
    task_names,
    watch::{DirChange, DirWatch},
};
use crate::files::{create_private, none_if_missing};

/// The file that the running log writer has locked. A second log writer waits for the lock.
const LOCK: &str = ".writer.lock";
/// The id of the inotify descriptor in epoll. Streams have other ids.
const DIRECTORY: u64 = 0;
/// The delay after a round in which no stream had much output, for each stream that was served. The next round then
/// finds more output in each stream: a wakeup for each line would cost more than writing the line.
const BATCH_DELAY: Duration = Duration::from_micros(500);
/// The largest delay after a round. Nomad's log collector flushes at this interval.
const BATCH_MAX_DELAY: Duration = Duration::from_millis(100);
/// If a stream had at least this many bytes of output in a round, the next round begins without delay, because the
/// stream's pipe would fill.
const BUSY_STREAM_BYTES: u64 = 16 << 10;
/// The shortest interval between two reports of a stream's losses, and the delay before a failed step is tried again.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// Writes the logs of the tasks in the directory `logs` until that directory is removed.
///
/// # Errors
/// When the lock, the watch of the directory or epoll fails.
pub fn run_writer(logs: &Path) -> io::Result<()> {
    let Some(_lock) = acquire_lock(logs)? else { return Ok(()) };
    let mut writer = Writer::new(logs)?;
    // The directory is listed after the watch exists. A task that appears in between is found twice, which is harmless.
    writer.open_all()?;
    loop {
        if !writer.run_round()? {
            return Ok(());
        }
    }
}

/// Waits until no other log writer runs, and returns the lock. Returns `None` when this log writer is no longer needed,
/// because its supervisor has died or the directory was removed.
fn acquire_lock(logs: &Path) -> io::Result<Option<Flock<fs::File>>> {
    let supervisor = nix::unistd::getppid();
    let mut lock = create_private(&logs.join(LOCK))?;
    loop {
        match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(locked) if locked.metadata()?.nlink() == 0 => return Ok(None),
            Ok(locked) => return Ok(Some(locked)),
            Err((_, errno)) if errno != Errno::EWOULDBLOCK => return Err(errno.into()),
            Err((file, _)) => lock = file,
        }
        if nix::unistd::getppid() != supervisor {
            return Ok(None);
        }
        #[allow(clippy::disallowed_methods, reason = "a process with one thread and no async runtime")]
        thread::sleep(BATCH_MAX_DELAY);
    }
}

/// Waits until no log writer runs. Returns false when no further log writer is needed, because the directory was
/// removed.
///
/// # Errors
/// When the lock file can't be opened or locked.
pub(super) fn wait_for_writer_exit(logs: &Path) -> io::Result<bool> {
    let Some(mut lock) = none_if_missing(create_private(&logs.join(LOCK)))? else { return Ok(false) };
    loop {
        match Flock::lock(lock, FlockArg::LockExclusive) {
            Ok(locked) => return Ok(locked.metadata()?.nlink() > 0),
            Err((file, Errno::EINTR)) => lock = file,
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

/// A stream that the log writer has open.
struct OpenStream {
    task: String,
    name: &'static str,
    stream: Stream,
    /// The time of the last report of the stream's losses.
    reported_at: Option<Instant>,
}

impl OpenStream {
    /// Reports the stream's losses in the task's file of losses.
    fn report_losses(&mut self, logs: &Path) {
        let dir = logs.join(&self.task);
        let reported = read_losses(&dir).and_then(|mut losses| {
            let stream = losses.stream_mut(self.name);
            (stream.dropped, stream.stuck) = (self.stream.dropped, self.stream.stuck.clone());
            write_losses(&dir, &losses)
        });
        if let Err(error) = reported {
            tracing::error!(task = self.task, %error, "could not report the losses of a task's log");
        }
        self.reported_at = Some(Instant::now());
    }
}

/// The state of the log writer.
struct Writer {
    logs: PathBuf,
    epoll: Epoll,
    watch: DirWatch,
    streams: HashMap<u64, OpenStream>,
    /// Tasks whose streams could not be opened, for example for lack of descriptors or memory, each with the time at
    /// which they are tried again.
    unopened: HashMap<String, Instant>,
    /// Streams that are not served until the given time, because a file can't be written or a FIFO can't be read.
    paused: HashMap<u64, Instant>,
    /// The epoll id of the next stream.
    next: u64,
    peek_pipe: PeekPipe,
}

impl Writer {
    fn new(logs: &Path) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let watch = DirWatch::new(logs, LOCK, InitFlags::IN_NONBLOCK)?;
        epoll.add(&watch, EpollEvent::new(EpollFlags::EPOLLIN, DIRECTORY))?;
        Ok(Self {
            logs: logs.to_owned(),
            epoll,
            watch,
            streams: HashMap::new(),
            unopened: HashMap::new(),
            paused: HashMap::new(),
            next: DIRECTORY + 1,
            peek_pipe: PeekPipe::new()?,
        })
    }

    /// Opens the streams of all tasks that are not open yet.
    fn open_all(&mut self) -> io::Result<()> {
        for task in task_names(&self.logs)? {
            self.open_task(&task);
        }
        Ok(())
    }

    /// Opens the streams of a task that are not open yet. If the task's description is damaged, its output stays in the
    /// pipes, and an operator must fix the cause.
    fn open_task(&mut self, task: &str) {
        let dir = self.logs.join(task);
        let text = match none_if_missing(fs::read(dir.join(SPEC))) {
            Ok(Some(text)) => text,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(task, %error, "could not read the description of a task's log; trying again");
                return self.open_later(task);
            }
        };
        let spec: LogSpec = match serde_json::from_slice(&text) {
            Ok(spec) => spec,
            Err(error) => return tracing::error!(task, %error, "the description of a task's log is damaged"),
        };
        let mut losses = read_losses(&dir).unwrap_or_else(|error| {
            tracing::error!(
                task,
                %error,
                "could not read the earlier losses of a task's log; its losses are counted from zero again"
            );
            Losses::default()
        });
        for name in STREAMS {
            if self.streams.values().any(|entry| entry.task == task && entry.name == name) {
                continue;
            }
            let opened = Stream::open(&dir, name, &spec, losses.stream_mut(name));
            let added = opened.and_then(|stream| {
                let events = EpollEvent::new(EpollFlags::EPOLLIN, self.next);
                self.epoll.add(stream.fifo(), events)?;
                self.streams.insert(self.next, OpenStream { task: task.to_owned(), name, stream, reported_at: None });
                self.next += 1;
                Ok(())
            });
            // If the FIFO does not exist, an earlier log writer has written all of the stream, or the task has a
            // terminal and thus only one stream.
            if let Err(error) = none_if_missing(added) {
                tracing::error!(task, stream = name, %error, "could not open a stream of a log; trying again");
                self.open_later(task);
            }
        }
    }

    /// Has the streams of a task opened again after an interval. The time is fixed here, since other streams may have
    /// output, and thus begin a new round, more often than that.
    fn open_later(&mut self, task: &str) {
        self.unopened.insert(task.to_owned(), Instant::now() + REPORT_INTERVAL);
    }

    /// Opens the streams that could not be opened before and that are due now.
    fn open_due(&mut self) {
        let now = Instant::now();
        for (task, _) in self.unopened.extract_if(|_, at| *at <= now).collect::<Vec<_>>() {
            self.open_task(&task);
        }
    }

    /// Waits until a stream has output or the directory has changed, and serves all streams that have output. Returns
    /// false when the directory was removed.
    fn run_round(&mut self) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); 256];
        let timeout = match self.paused.values().chain(self.unopened.values()).min() {
            None => EpollTimeout::NONE,
            Some(again) => {
                let left = again.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                EpollTimeout::try_from(left).map_err(io::Error::other)?
            }
        };
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        let mut ready: Vec<u64> = events[..count].iter().map(EpollEvent::data).collect();
        if ready.contains(&DIRECTORY) && !self.directory_changed()? {
            return Ok(false);
        }
        self.open_due();
        ready.retain(|id| *id != DIRECTORY);
        let now = Instant::now();
        let resumed: Vec<u64> = self.paused.iter().filter(|(_, again)| **again <= now).map(|(id, _)| *id).collect();
        for id in &resumed {
            self.paused.remove(id);
            if let Some(entry) = self.streams.get(id) {
                self.epoll.add(entry.stream.fifo(), EpollEvent::new(EpollFlags::EPOLLIN, *id))?;
            }
        }
        ready.extend(resumed);
        let mut busy = ready.is_empty();
        for id in &ready {
            busy |= self.serve_stream(*id)?;
        }
        if !busy {
            let delay = BATCH_DELAY * u32::try_from(ready.len()).unwrap_or(u32::MAX);
            #[allow(clippy::disallowed_methods, reason = "a process with one thread and no async runtime")]
            thread::sleep(delay.min(BATCH_MAX_DELAY));
        }
        Ok(true)
    }

    /// Writes the output of one stream. Returns whether the next round must begin without delay.
    fn serve_stream(&mut self, id: u64) -> io::Result<bool> {
        let Some(entry) = self.streams.get_mut(&id) else { return Ok(false) };
        let (dropped, was_stuck) = (entry.stream.dropped, entry.stream.stuck.is_some());
        let outcome = entry.stream.transfer(&mut self.peek_pipe);
        // Losses are reported at once when the stream becomes stuck or is no longer stuck, and at intervals in between.
        let stuck_changed = entry.stream.stuck.is_some() != was_stuck;
        let is_report_due =
            entry.stream.dropped != dropped && entry.reported_at.is_none_or(|at| at.elapsed() >= REPORT_INTERVAL);
        if stuck_changed || is_report_due {
            entry.report_losses(&self.logs);
        }
        match outcome {
            Ok(TransferOutcome::Drained(moved)) => Ok(moved >= BUSY_STREAM_BYTES),
            Ok(TransferOutcome::Pending(_)) => Ok(true),
            Ok(TransferOutcome::Stuck(again)) => {
                self.pause(id, again)?;
                Ok(false)
            }
            Ok(TransferOutcome::Finished) => {
                self.finish_stream(id);
                Ok(false)
            }
            Err(error) => {
                tracing::error!(task = entry.task, %error, "could not read the FIFO of a task's log");
                self.pause(id, Instant::now() + REPORT_INTERVAL)?;
                Ok(false)
            }
        }
    }

    /// Stops serving a stream until the given time.
    fn pause(&mut self, id: u64, until: Instant) -> io::Result<()> {
        if let Some(entry) = self.streams.get(&id) {
            self.epoll.delete(entry.stream.fifo())?;
            self.paused.insert(id, until);
        }
        Ok(())
    }

    /// Ends a stream whose output is written completely.
    fn finish_stream(&mut self, id: u64) {
        self.paused.remove(&id);
        // Closing the FIFO also removes it from epoll, because no other descriptor shares its open file description.
        let Some(mut entry) = self.streams.remove(&id) else { return };
        if entry.stream.dropped > 0 {
            entry.report_losses(&self.logs);
        }
        if let Err(error) = entry.stream.remove_fifo() {
            tracing::error!(task = entry.task, stream = entry.name, %error, "could not remove the FIFO of a log");
        }
    }

    /// Opens the streams of new tasks, and closes those of removed tasks. Returns false when the directory was removed.
    fn directory_changed(&mut self) -> io::Result<bool> {
        for change in self.watch.changes()? {
            match change {
                DirChange::Added(task) => self.open_task(&task),
                DirChange::Removed(task) => {
                    // The streams are only closed. Their FIFOs are not removed by name, because a directory of the same
                    // name may belong to another attempt by now.
                    self.streams.retain(|_, entry| entry.task != task);
                    self.paused.retain(|id, _| self.streams.contains_key(id));
                    self.unopened.remove(&task);
                }
                DirChange::Overflow => {
                    // All streams are closed and opened again, because any task may have come or gone. The output in
                    // the pipes stays there.
                    (self.streams, self.paused) = (HashMap::new(), HashMap::new());
                    self.open_all()?;
                }
                DirChange::DirRemoved => return Ok(false),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, os::unix::fs::symlink};

    use super::*;
    use crate::logs::{LogOptions, create_task_dir, fifo_path};

    /// The streams of a task can't be opened at first, while another task has output in every round.
    #[test]
    fn streams_are_opened_again_although_other_streams_have_output() {
        let root = tempfile::tempdir().expect("a directory");
        let logs = root.path().join("logs");
        fs::create_dir(&logs).expect("created");
        fs::create_dir_all(root.path().join("alloc/logs")).expect("created");
        let add = |task: &str| {
            let spec =
                LogSpec { alloc_dir: root.path().to_owned(), task: task.to_owned(), options: LogOptions::default() };
            create_task_dir(&logs.join(task), &spec, false).expect("created");
            fifo_path(&logs.join(task), "stdout")
        };
        let (busy, other) = (add("busy"), add("other"));
        let hidden = other.with_file_name("hidden");
        fs::rename(&other, &hidden).expect("renamed");
        symlink("hidden", &other).expect("linked");
        let mut writer = Writer::new(&logs).expect("a log writer");
        writer.open_all().expect("listed");
        fs::remove_file(&other).expect("removed");
        fs::rename(&hidden, &other).expect("renamed");
        let mut busy = fs::File::options().write(true).open(busy).expect("the writer has it open");
        let is_open = |writer: &Writer| writer.streams.values().any(|it| it.task == "other" && it.name == "stdout");
        assert!(!is_open(&writer), "a link is not opened");
        let deadline = Instant::now() + 10 * REPORT_INTERVAL;
        while !is_open(&writer) && Instant::now() < deadline {
            busy.write_all(b"a line\n").expect("written");
            assert!(writer.run_round().expect("a round"));
        }
        assert!(is_open(&writer) && writer.unopened.is_empty());
    }
}
