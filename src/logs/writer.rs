//! The log writer: one process with one thread, which writes all streams of the node.

use std::{
    collections::{HashMap, HashSet},
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
    stream::{Scratch, Stream, Turn},
    tasks,
    watch::{Change, Watch},
};
use crate::places::create_private;

/// The file that the running log writer has locked. A second log writer waits for the lock.
const LOCK: &str = ".writer.lock";
/// The id of the inotify descriptor in epoll. Streams have other ids.
const DIRECTORY: u64 = 0;
/// The delay after a round in which no stream brought much, for each stream that was served. The next round then finds
/// more output in each stream: a wakeup for each line would cost more than writing the line.
const LULL: Duration = Duration::from_micros(500);
/// The largest delay after a round. Nomad's log collector flushes at this interval.
const LULL_MAX: Duration = Duration::from_millis(100);
/// If a stream brought this many bytes in a round, the next round begins without delay, because the stream's pipe would
/// fill.
const BUSY: u64 = 16 << 10;
/// The shortest interval between two reports of a stream's losses, and the delay before a failed step is tried again.
const TELL: Duration = Duration::from_secs(1);

/// Writes the logs of the tasks in the directory `logs` until that directory is removed.
///
/// # Errors
/// When the lock, the watch of the directory or epoll fails.
pub fn write(logs: &Path) -> io::Result<()> {
    let Some(_lock) = wait_for_turn(logs)? else { return Ok(()) };
    let mut writer = Writer::new(logs)?;
    // The directory is listed after the watch exists. A task that appears in between is found twice, which is harmless.
    writer.look()?;
    loop {
        if !writer.round()? {
            return Ok(());
        }
    }
}

/// Waits until no other log writer runs, and returns the lock. Returns `None` when this log writer is no longer needed,
/// because its supervisor has died or the directory was removed.
fn wait_for_turn(logs: &Path) -> io::Result<Option<Flock<fs::File>>> {
    let keeper = nix::unistd::getppid();
    let mut lock = create_private(&logs.join(LOCK))?;
    loop {
        match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(locked) if locked.metadata()?.nlink() == 0 => return Ok(None),
            Ok(locked) => return Ok(Some(locked)),
            Err((_, errno)) if errno != Errno::EWOULDBLOCK => return Err(errno.into()),
            Err((file, _)) => lock = file,
        }
        if nix::unistd::getppid() != keeper {
            return Ok(None);
        }
        #[allow(clippy::disallowed_methods, reason = "a process with one thread and no async runtime")]
        thread::sleep(LULL_MAX);
    }
}

/// Waits until no log writer runs. Returns false when no further log writer is needed, because the directory was
/// removed.
///
/// # Errors
/// When the lock file can't be opened or locked.
pub(super) fn outlast_writer(logs: &Path) -> io::Result<bool> {
    let mut lock = match create_private(&logs.join(LOCK)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    loop {
        match Flock::lock(lock, FlockArg::LockExclusive) {
            Ok(locked) => return Ok(locked.metadata()?.nlink() > 0),
            Err((file, Errno::EINTR)) => lock = file,
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

/// A stream that the log writer has open.
struct Taken {
    task: String,
    name: &'static str,
    stream: Stream,
    /// The time of the last report of the stream's losses.
    told: Option<Instant>,
}

impl Taken {
    /// Reports the stream's losses in the task's file of losses.
    fn say(&mut self, logs: &Path) {
        let dir = logs.join(&self.task);
        let said = read_losses(&dir).and_then(|mut losses| {
            let mine = losses.of(self.name);
            (mine.dropped, mine.stuck) = (self.stream.dropped, self.stream.stuck.clone());
            write_losses(&dir, &losses)
        });
        if let Err(error) = said {
            tracing::error!(task = self.task, %error, "could not report the losses of a task's log");
        }
        self.told = Some(Instant::now());
    }
}

struct Writer {
    logs: PathBuf,
    epoll: Epoll,
    watch: Watch,
    streams: HashMap<u64, Taken>,
    /// Tasks whose streams could not be opened, for example for lack of descriptors or memory. They are tried again.
    untaken: HashSet<String>,
    /// Streams that are not served until the given time, because a file can't be written or a FIFO can't be read.
    resting: HashMap<u64, Instant>,
    /// The epoll id of the next stream.
    next: u64,
    scratch: Scratch,
}

impl Writer {
    fn new(logs: &Path) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let watch = Watch::new(logs, LOCK, InitFlags::IN_NONBLOCK)?;
        epoll.add(&watch, EpollEvent::new(EpollFlags::EPOLLIN, DIRECTORY))?;
        Ok(Self {
            logs: logs.to_owned(),
            epoll,
            watch,
            streams: HashMap::new(),
            untaken: HashSet::new(),
            resting: HashMap::new(),
            next: DIRECTORY + 1,
            scratch: Scratch::new()?,
        })
    }

    /// Opens the streams of all tasks that are not open yet.
    fn look(&mut self) -> io::Result<()> {
        for task in tasks(&self.logs)? {
            self.take_on(&task);
        }
        Ok(())
    }

    /// Opens the streams of a task that are not open yet. If the task's description can't be read, its output stays in
    /// the pipes, and an operator must fix the cause.
    fn take_on(&mut self, task: &str) {
        let dir = self.logs.join(task);
        let spec = fs::read(dir.join(SPEC)).and_then(|text| Ok(serde_json::from_slice::<LogSpec>(&text)?));
        let spec = match spec {
            Ok(spec) => spec,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::error!(task, %error, "could not read the description of a task's log");
                }
                return;
            }
        };
        let mut losses = read_losses(&dir).unwrap_or_else(|error| {
            tracing::error!(
                task,
                %error,
                "could not read the earlier losses of a task's log; losses are counted from zero again"
            );
            Losses::default()
        });
        for name in STREAMS {
            if self.streams.values().any(|taken| taken.task == task && taken.name == name) {
                continue;
            }
            let opened = Stream::open(&dir, name, &spec, losses.of(name));
            let added = opened.and_then(|stream| {
                let events = EpollEvent::new(EpollFlags::EPOLLIN, self.next);
                self.epoll.add(stream.fifo(), events)?;
                self.streams.insert(self.next, Taken { task: task.to_owned(), name, stream, told: None });
                self.next += 1;
                Ok(())
            });
            match added {
                // An earlier log writer has written all of the stream, or the task has a terminal and thus one stream.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::error!(task, stream = name, %error, "could not open a stream of a log; trying again");
                    self.untaken.insert(task.to_owned());
                }
                Ok(()) => {}
            }
        }
    }

    /// Waits until a stream has output or the directory has changed, and serves all streams that have output. Returns
    /// false when the directory was removed.
    fn round(&mut self) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); 256];
        let untaken = (!self.untaken.is_empty()).then(|| Instant::now() + TELL);
        let timeout = match self.resting.values().copied().chain(untaken).min() {
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
        if untaken.is_some_and(|again| again <= Instant::now()) {
            for task in std::mem::take(&mut self.untaken) {
                self.take_on(&task);
            }
        }
        ready.retain(|id| *id != DIRECTORY);
        let now = Instant::now();
        let rested: Vec<u64> = self.resting.iter().filter(|(_, again)| **again <= now).map(|(id, _)| *id).collect();
        for id in &rested {
            self.resting.remove(id);
            if let Some(taken) = self.streams.get(id) {
                self.epoll.add(taken.stream.fifo(), EpollEvent::new(EpollFlags::EPOLLIN, *id))?;
            }
        }
        ready.extend(rested);
        let mut busy = ready.is_empty();
        for id in &ready {
            busy |= self.serve(*id)?;
        }
        if !busy {
            let lull = LULL * u32::try_from(ready.len()).unwrap_or(u32::MAX);
            #[allow(clippy::disallowed_methods, reason = "a process with one thread and no async runtime")]
            thread::sleep(lull.min(LULL_MAX));
        }
        Ok(true)
    }

    /// Writes the output of one stream. Returns whether the next round must begin without delay.
    fn serve(&mut self, id: u64) -> io::Result<bool> {
        let Some(taken) = self.streams.get_mut(&id) else { return Ok(false) };
        let (dropped, was_stuck) = (taken.stream.dropped, taken.stream.stuck.is_some());
        let turn = taken.stream.turn(&mut self.scratch);
        // Losses are reported at once when the stream becomes stuck or is no longer stuck, and at intervals in between.
        let turned = taken.stream.stuck.is_some() != was_stuck;
        let more = taken.stream.dropped != dropped && taken.told.is_none_or(|at| at.elapsed() >= TELL);
        if turned || more {
            taken.say(&self.logs);
        }
        match turn {
            Ok(Turn::Idle(moved)) => Ok(moved >= BUSY),
            Ok(Turn::More(_)) => Ok(true),
            Ok(Turn::Stuck(again)) => {
                self.rest(id, again)?;
                Ok(false)
            }
            Ok(Turn::Over) => {
                self.drop_stream(id);
                Ok(false)
            }
            Err(error) => {
                tracing::error!(task = taken.task, %error, "could not read the FIFO of a task's log");
                self.rest(id, Instant::now() + TELL)?;
                Ok(false)
            }
        }
    }

    /// Stops serving a stream until the given time.
    fn rest(&mut self, id: u64, until: Instant) -> io::Result<()> {
        if let Some(taken) = self.streams.get(&id) {
            self.epoll.delete(taken.stream.fifo())?;
            self.resting.insert(id, until);
        }
        Ok(())
    }

    /// Ends a stream whose output is written completely.
    fn drop_stream(&mut self, id: u64) {
        self.resting.remove(&id);
        // Closing the FIFO also removes it from epoll, because no other descriptor shares its open file description.
        let Some(mut taken) = self.streams.remove(&id) else { return };
        if taken.stream.dropped > 0 {
            taken.say(&self.logs);
        }
        if let Err(error) = taken.stream.finish() {
            tracing::error!(task = taken.task, stream = taken.name, %error, "could not remove the FIFO of a log");
        }
    }

    /// Opens the streams of new tasks, and closes those of removed tasks. Returns false when the directory was removed.
    fn directory_changed(&mut self) -> io::Result<bool> {
        for change in self.watch.changes()? {
            match change {
                Change::Came(task) => self.take_on(&task),
                Change::Gone(task) => {
                    // The streams are only closed. Their FIFOs are not removed by name, because a directory of the same
                    // name may belong to another attempt by now.
                    self.streams.retain(|_, taken| taken.task != task);
                    self.resting.retain(|id, _| self.streams.contains_key(id));
                    self.untaken.remove(&task);
                }
                Change::Missed => {
                    // All streams are closed and opened again, because any task may have come or gone. The output in
                    // the pipes stays there.
                    (self.streams, self.resting) = (HashMap::new(), HashMap::new());
                    self.look()?;
                }
                Change::Over => return Ok(false),
            }
        }
        Ok(true)
    }
}
