//! The log writer: one process, one thread, all streams of the node.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs, io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        inotify::{AddWatchFlags, InitFlags, Inotify},
    },
};

use super::{
    LogSpec, SPEC, STREAMS,
    status::{Losses, read_losses, write_losses},
    stream::{Scratch, Stream, Turn},
    tasks,
};

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
    let mut lock = fs::File::create(logs.join(LOCK))?;
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

type Streams = HashMap<u64, (String, &'static str, Stream)>;

struct Writer {
    logs: PathBuf,
    epoll: Epoll,
    inotify: Inotify,
    streams: Streams,
    /// Tasks whose streams could not be opened: descriptors or memory had run out.
    untaken: HashSet<String>,
    /// Those that rest, since their files take nothing.
    resting: HashMap<u64, Instant>,
    /// Said last, and when.
    told: HashMap<String, (Losses, Instant)>,
    next: u64,
    scratch: Scratch,
}

impl Writer {
    fn new(logs: &Path) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(logs, AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE)?;
        epoll.add(inotify.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, DIRECTORY))?;
        Ok(Self {
            logs: logs.to_owned(),
            epoll,
            inotify,
            streams: HashMap::new(),
            untaken: HashSet::new(),
            resting: HashMap::new(),
            told: HashMap::new(),
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
        let has = |streams: &Streams, name| streams.values().any(|(known, stream, _)| known == task && *stream == name);
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
        let mut losses = read_losses(&dir);
        for name in STREAMS.into_iter().filter(|name| !has(&self.streams, *name)).collect::<Vec<_>>() {
            let opened = Stream::open(&dir, name, &spec, losses.of(name));
            let added = opened.and_then(|stream| {
                let events = EpollEvent::new(EpollFlags::EPOLLIN, self.next);
                self.epoll.add(stream.fifo(), events)?;
                self.streams.insert(self.next, (task.to_owned(), name, stream));
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
            if let Some((_, _, stream)) = self.streams.get(id) {
                self.epoll.add(stream.fifo(), EpollEvent::new(EpollFlags::EPOLLIN, *id))?;
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
        let Some((task, name, stream)) = self.streams.get_mut(&id) else { return Ok(false) };
        let dropped = stream.dropped;
        let was_stuck = stream.stuck.is_some();
        let turn = stream.turn(&mut self.scratch);
        let changed = stream.dropped != dropped || stream.stuck.is_some() != was_stuck;
        if changed {
            let (task, name) = (task.clone(), *name);
            self.tell(&task, name, id);
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
                let task = self.streams.get(&id).map(|(task, ..)| task.clone()).unwrap_or_default();
                tracing::error!(task, %error, "its FIFO");
                self.rest(id, Instant::now() + TELL)?;
                Ok(false)
            }
        }
    }

    fn rest(&mut self, id: u64, until: Instant) -> io::Result<()> {
        if let Some((_, _, stream)) = self.streams.get(&id) {
            self.epoll.delete(stream.fifo())?;
            self.resting.insert(id, until);
        }
        Ok(())
    }

    fn drop_stream(&mut self, id: u64) {
        self.resting.remove(&id);
        let Some((task, name, stream)) = self.streams.remove(&id) else { return };
        // Closing it takes it out of epoll: nobody else has this description.
        if stream.dropped > 0 {
            self.say(&task, name, &stream);
        }
        if let Err(error) = stream.finish() {
            tracing::error!(task, stream = name, %error, "its FIFO stays");
        }
        if !self.streams.values().any(|(other, ..)| *other == task) {
            self.told.remove(&task);
        }
    }

    /// Says what was lost: at once when it begins or ends, else now and then.
    fn tell(&mut self, task: &str, name: &'static str, id: u64) {
        let Some((_, _, stream)) = self.streams.get(&id) else { return };
        let again = self.told.get_mut(task).is_some_and(|(losses, at)| {
            let same = losses.of(name).stuck.is_some() == stream.stuck.is_some();
            same && at.elapsed() < TELL
        });
        if !again && let Some((task, name, stream)) = self.streams.remove(&id) {
            self.say(&task, name, &stream);
            self.streams.insert(id, (task, name, stream));
        }
    }

    fn say(&mut self, task: &str, name: &'static str, stream: &Stream) {
        let dir = self.logs.join(task);
        let mut losses = read_losses(&dir);
        let mine = losses.of(name);
        (mine.dropped, mine.stuck) = (stream.dropped, stream.stuck.clone());
        if let Err(error) = write_losses(&dir, &losses) {
            tracing::error!(task, %error, "what its log has lost");
        }
        self.told.insert(task.to_owned(), (losses, Instant::now()));
    }

    /// What has come or gone. False when the directory itself is gone.
    fn directory_changed(&mut self) -> io::Result<bool> {
        let events = match self.inotify.read_events() {
            Ok(events) => events,
            Err(Errno::EAGAIN) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        };
        for event in events {
            // The directory is being removed. (It is not told itself: our open files keep it.)
            if event.mask.contains(AddWatchFlags::IN_DELETE) && event.name.as_deref() == Some(OsStr::new(LOCK)) {
                return Ok(false);
            }
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                // Whatever came or went: what is in the pipes stays there.
                (self.streams, self.resting) = (HashMap::new(), HashMap::new());
                self.look()?;
            }
            let Some(task) = event.name.map(|name| name.to_string_lossy().into_owned()) else { continue };
            if task.starts_with('.') {
                continue;
            }
            if event.mask.contains(AddWatchFlags::IN_MOVED_TO) {
                self.take_on(&task);
            } else {
                // Not by its name, which may be another attempt's by now.
                self.streams.retain(|_, (known, ..)| *known != task);
                self.resting.retain(|id, _| self.streams.contains_key(id));
                self.untaken.remove(&task);
                self.told.remove(&task);
            }
        }
        Ok(true)
    }
}
