//! Tasks' logs where the agent collects none (`disable_log_collection`): the engine's side of the log writer.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Stdio as ChildStdio,
    sync::Arc,
    time::Duration,
};

use tokio::sync::Mutex;

use super::{Audience, Engine, Phases, Settings, StartRequest, TaskError, claim::caught, shared::Shared};
use crate::{
    ids::{ContainerId, TaskId},
    logs::{self, LogSpec, Losses},
    places::{Places, PlacesError, create_private, make_dir},
    process::{Pid, PidFd, async_command, set_apart, start_anew},
    shim::stdio::Stdio,
};

/// What a task left in its FIFOs is written out in a millisecond; where it can't be, nobody waits for ever.
const DRAIN: Duration = Duration::from_secs(5);
/// What the writer says of losses is looked at so often.
const LOOK: Duration = Duration::from_secs(2);
/// A keeper that dies over and over is not restarted faster than this.
const BREATH: Duration = Duration::from_millis(50);

/// The log writer's keeper, started when it is first needed, and again when it dies.
#[derive(Debug)]
pub(super) struct LogKeeper {
    places: Places,
    /// `cgroup.procs` of the group that it belongs in.
    cgroup: Vec<PathBuf>,
    living: Mutex<Option<Arc<PidFd>>>,
}

impl LogKeeper {
    pub(super) fn new(places: Places, cgroup: Vec<PathBuf>) -> Arc<Self> {
        Arc::new(Self { places, cgroup, living: Mutex::default() })
    }

    /// Sees to it that one lives.
    ///
    /// # Errors
    /// When it can't be started.
    pub(super) async fn ensure(self: &Arc<Self>) -> Result<(), TaskError> {
        let mut living = self.living.lock().await;
        // Asked of the kernel: who watches it may not have seen its end yet.
        if living.as_ref().is_some_and(|keeper| !keeper.has_ended()) {
            return Ok(());
        }
        let pidfd = self.find_or_spawn()?;
        *living = Some(pidfd.clone());
        tokio::spawn(self.clone().stand_by(pidfd));
        Ok(())
    }

    /// Starts another one when one dies, as long as somebody needs it.
    async fn stand_by(self: Arc<Self>, mut pidfd: Arc<PidFd>) {
        loop {
            if let Err(error) = pidfd.ended().await {
                tracing::warn!(%error, "the log writer's keeper can't be watched");
            }
            // At once: who starts a task meanwhile starts one.
            self.living.lock().await.take_if(|keeper| Arc::ptr_eq(keeper, &pidfd));
            let mut pause = BREATH;
            pidfd = loop {
                tokio::time::sleep(pause).await;
                let mut living = self.living.lock().await;
                if living.is_some() || !self.has_work() {
                    return;
                }
                match self.find_or_spawn() {
                    Ok(next) => {
                        *living = Some(next.clone());
                        break next;
                    }
                    Err(error) => {
                        tracing::error!(error = crate::chain(&error), "the log writer died and can't be started again");
                        pause = (2 * pause).min(LOOK);
                    }
                }
            };
        }
    }

    /// The same as [`Self::ensure`], until it works.
    pub(super) fn insist(self: &Arc<Self>) {
        let this = self.clone();
        tokio::spawn(async move {
            while let Err(error) = this.ensure().await {
                tracing::error!(error = crate::chain(&error), "the log writer can't be started");
                tokio::time::sleep(LOOK).await;
            }
        });
    }

    fn find_or_spawn(&self) -> Result<Arc<PidFd>, TaskError> {
        let logs = self.places.logs();
        make_dir(&logs).map_err(|source| PlacesError::Create { path: logs.clone(), source })?;
        match logs::keeper_of(&logs).map_err(TaskError::LogWriter)? {
            // An earlier instance of us has started it.
            Some(pidfd) => Ok(Arc::new(pidfd)),
            None => self.spawn().map_err(TaskError::LogWriter),
        }
    }

    /// Is there a task with a log of ours?
    pub(super) fn has_work(&self) -> bool {
        logs::has_tasks(&self.places.logs())
    }

    fn spawn(&self) -> std::io::Result<Arc<PidFd>> {
        let logs = self.places.logs();
        // Of the one before.
        let _ = std::fs::remove_file(logs.join(".said"));
        let said = create_private(&logs.join(".said"))?;
        let mut command = async_command("/proc/self/exe");
        command.arg0("nomad-driver-shim").args(logs::arguments(&logs)).env_clear().stdin(ChildStdio::piped());
        command.stdout(ChildStdio::null()).stderr(said).kill_on_drop(false);
        // SAFETY: only async-signal-safe calls between fork and exec, and no memory of ours is touched.
        unsafe {
            command.pre_exec(|| start_anew(3));
        }
        let mut child = command.spawn()?;
        let pid = Pid::of_child(&child)?;
        set_apart(pid, &self.cgroup);
        // It has waited for this: what it starts is where it is.
        drop(child.stdin.take());
        let pidfd = Arc::new(PidFd::open(pid.get())?);
        // Reaped when it dies.
        tokio::spawn(async move { child.wait().await });
        Ok(pidfd)
    }

    /// Nobody needs it: it ends, and the writer with it.
    pub(super) fn end_idle(&self) {
        if !self.has_work() {
            logs::end(&self.places.logs());
        }
    }
}

/// Is this task's log ours to write? Not when the job has disabled it.
pub(super) fn is_ours(settings: &Settings, request: &StartRequest) -> bool {
    settings.own_logs && request.stdout != Path::new("/dev/null")
}

/// Sets a task's log up, and sees to it that somebody writes it: its streams, for the shim. With a terminal there is one.
///
/// # Errors
/// When that can't be done. What is left then, the task's undoing takes away.
pub(super) async fn set_up(shared: &Shared, request: &StartRequest, id: &ContainerId) -> Result<Stdio, TaskError> {
    let spec =
        LogSpec { alloc_dir: request.alloc_dir.clone(), task: request.name.clone(), options: request.options.log };
    let (dir, terminal) = (shared.settings.places.log(id), request.options.tty);
    shared.log_keeper.ensure().await?;
    logs::prepare(&dir, &spec, terminal)?;
    // Had it died just before, it would have seen nothing to do.
    shared.log_keeper.ensure().await?;
    let [stdout, stderr] = logs::STREAMS.map(|stream| logs::fifo(&dir, stream));
    let stderr = if terminal { PathBuf::from("/dev/null") } else { stderr };
    Ok(Stdio::open(&dir, &stdout, &stderr)?)
}

/// Waits until the log of a task that has ended is written out, but not for what can't be written.
pub(super) async fn written_out(places: &Places, id: &ContainerId) {
    if !logs::drained(&places.log(id), DRAIN).await {
        tracing::warn!(container = %id, "the end of its log could not be written and is lost");
    }
}

impl Engine {
    /// Tells of output that the log writer could not write, for as long as the engine lives.
    pub(super) fn watch_logs(&self) {
        let engine = self.downgrade();
        tokio::spawn(async move {
            let mut seen = None;
            let mut known: HashMap<TaskId, Losses> = HashMap::new();
            // What an earlier instance of us has told of is known.
            tokio::time::sleep(LOOK).await;
            if let Some(inner) = engine.upgrade() {
                let this = Self(inner);
                let places = &this.settings().places;
                let recovered = this.live().into_iter().filter(|(_, task)| task.phases == Phases::default());
                known.extend(recovered.filter_map(|(id, task)| {
                    // Otherwise it is told once more.
                    Some((id, logs::read_losses(&places.log(&task.record().container_id)).ok()?))
                }));
            }
            loop {
                tokio::time::sleep(LOOK).await;
                let Some(inner) = engine.upgrade() else { return };
                let this = Self(inner);
                let changed = std::fs::metadata(logs::changed(&this.settings().places.logs()));
                let now = changed.and_then(|meta| meta.modified()).ok();
                if now != seen {
                    seen = now;
                    caught("what logs have lost", async { this.tell_losses(&mut known) }).await;
                }
            }
        });
    }

    fn tell_losses(&self, known: &mut HashMap<TaskId, Losses>) {
        let live = self.live();
        known.retain(|id, _| live.iter().any(|(other, _)| other == id));
        for (id, task) in live {
            let record = task.record();
            let mut now = match logs::read_losses(&self.settings().places.log(&record.container_id)) {
                Ok(now) => now,
                // What was told stays told; the next change brings the rest.
                Err(error) => {
                    tracing::warn!(task = %id, %error, "what its log has lost can't be read");
                    continue;
                }
            };
            let before = known.entry(id).or_default();
            for stream in logs::STREAMS {
                let (old, new) = (before.of(stream).clone(), now.of(stream).clone());
                self.shared().metrics.log_dropped(new.dropped.saturating_sub(old.dropped));
                let message = match (&new.stuck, new.dropped) {
                    (Some(why), _) if old.stuck.is_none() => {
                        format!("The log of {stream} can't be written: {why}")
                    }
                    (None, dropped) if dropped > old.dropped || old.stuck.is_some() => match dropped {
                        0 => format!("The log of {stream} is written again"),
                        _ => format!("The log of {stream} is written again; {dropped} bytes were dropped in all"),
                    },
                    _ => continue,
                };
                tracing::warn!(task = %record.task_id, message);
                self.shared().events.tell_of(&record, message, Audience::Everybody);
            }
            *before = now;
        }
    }
}
