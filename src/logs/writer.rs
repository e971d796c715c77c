//! The log writer: one process, one thread, all streams of the node.

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

/// One writer at a time: a second one waits here.
const LOCK: &str = ".writer.lock";
/// The inotify descriptor's number in epoll; streams have others.
const DIRECTORY: u64 = 0;
/// After a round with little to do it waits so long for each stream it had, so that the next round finds more in each:
/// a wakeup a line would cost more than the line.
const LULL: Duration = Duration::from_micros(500);
/// At most; Nomad's collector flushes at this interval.
const LULL_MAX: Duration = Duration::from_millis(100);
/// A stream that brought so much at a turn is not kept waiting: its pipe would fill.
const BUSY: u64 = 16 << 10;
/// What was lost is said so often at most.
const TELL: Duration = Duration::from_secs(1);

/// Writes the logs below `logs`, until it is killed or the directory is gone.
///
/// # Errors
/// When the kernel refuses what it needs.
pub fn write(logs: &Path) -> io::Result<()> {
    let Some(_lock) = wait_for_turn(logs)? else { return Ok(()) };
    let mut writer = Writer::new(logs)?;
    // Watched first, looked through second: what appears in between is seen twice, which is harmless.
    writer.look()?;
    loop {
        if !writer.round()? {
            return Ok(());
        }
    }
}

/// Waits until no other writer lives. None when that is no longer wanted: our keeper has died, or all is over.
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
        #[allow(clippy::disallowed_methods, reason = "a process of one thread, without a runtime")]
        thread::sleep(LULL_MAX);
    }
}

/// Waits until no writer lives. False when there will be nothing to write any more: the directory is gone.
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

/// A stream that is taken on.
struct Taken {
    task: String,
    name: &'static str,
    stream: Stream,
    /// When its losses were said last.
    told: Option<Instant>,
}

impl Taken {
    /// Says what was lost.
    fn say(&mut self, logs: &Path) {
        let dir = logs.join(&self.task);
        let said = read_losses(&dir).and_then(|mut losses| {
            let mine = losses.of(self.name);
            (mine.dropped, mine.stuck) = (self.stream.dropped, self.stream.stuck.clone());
            write_losses(&dir, &losses)
        });
        if let Err(error) = said {
            tracing::error!(task = self.task, %error, "what its log has lost");
        }
        self.told = Some(Instant::now());
    }
}

struct Writer {
    logs: PathBuf,
    epoll: Epoll,
    watch: Watch,
    streams: HashMap<u64, Taken>,
    /// Tasks whose streams could not be opened: descriptors or memory had run out.
    untaken: HashSet<String>,
    /// Those that rest, since their files take nothing.
    resting: HashMap<u64, Instant>,
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

    /// Takes on what is there and not yet known.
    fn look(&mut self) -> io::Result<()> {
        for task in tasks(&self.logs)? {
            self.take_on(&task);
        }
        Ok(())
    }

    /// A task whose description can't be read keeps its output in its pipes; somebody must look.
    fn take_on(&mut self, task: &str) {
        let dir = self.logs.join(task);
        let spec = fs::read(dir.join(SPEC)).and_then(|text| Ok(serde_json::from_slice::<LogSpec>(&text)?));
        let spec = match spec {
            Ok(spec) => spec,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::error!(task, %error, "the description of its log");
                }
                return;
            }
        };
        let mut losses = read_losses(&dir).unwrap_or_else(|error| {
            tracing::error!(task, %error, "what its log had lost before is not known; it is counted anew");
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
                // Written out by an earlier writer, or a terminal has none.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::error!(task, stream = name, %error, "its log; trying again");
                    self.untaken.insert(task.to_owned());
                }
                Ok(()) => {}
            }
        }
    }

    /// Waits for something to do, and does it. False when there will never be anything again.
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
            #[allow(clippy::disallowed_methods, reason = "a process of one thread, without a runtime")]
            thread::sleep(lull.min(LULL_MAX));
        }
        Ok(true)
    }

    /// One stream's turn: is it in a hurry?
    fn serve(&mut self, id: u64) -> io::Result<bool> {
        let Some(taken) = self.streams.get_mut(&id) else { return Ok(false) };
        let (dropped, was_stuck) = (taken.stream.dropped, taken.stream.stuck.is_some());
        let turn = taken.stream.turn(&mut self.scratch);
        // At once when it begins or ends, else now and then.
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
                tracing::error!(task = taken.task, %error, "its FIFO");
                self.rest(id, Instant::now() + TELL)?;
                Ok(false)
            }
        }
    }

    fn rest(&mut self, id: u64, until: Instant) -> io::Result<()> {
        if let Some(taken) = self.streams.get(&id) {
            self.epoll.delete(taken.stream.fifo())?;
            self.resting.insert(id, until);
        }
        Ok(())
    }

    fn drop_stream(&mut self, id: u64) {
        self.resting.remove(&id);
        // Closing it takes it out of epoll: nobody else has this description.
        let Some(mut taken) = self.streams.remove(&id) else { return };
        if taken.stream.dropped > 0 {
            taken.say(&self.logs);
        }
        if let Err(error) = taken.stream.finish() {
            tracing::error!(task = taken.task, stream = taken.name, %error, "its FIFO stays");
        }
    }

    /// What has come or gone. False when the directory itself is gone.
    fn directory_changed(&mut self) -> io::Result<bool> {
        for change in self.watch.changes()? {
            match change {
                Change::Came(task) => self.take_on(&task),
                Change::Gone(task) => {
                    // Not by its name, which may be another attempt's by now.
                    self.streams.retain(|_, taken| taken.task != task);
                    self.resting.retain(|id, _| self.streams.contains_key(id));
                    self.untaken.remove(&task);
                }
                Change::Missed => {
                    // Whatever came or went: what is in the pipes stays there.
                    (self.streams, self.resting) = (HashMap::new(), HashMap::new());
                    self.look()?;
                }
                Change::Over => return Ok(false),
            }
        }
        Ok(true)
    }
}
