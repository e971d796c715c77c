//! The engine's side of the log writer, which writes the logs of tasks if the agent collects none
//! (`disable_log_collection`).

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Stdio as ChildStdio,
    sync::Arc,
    time::Duration,
};

use tokio::sync::Mutex;

use super::{Audience, Engine, Phases, Settings, StartRequest, TaskError, context::EngineContext, guards::catch_panic};
use crate::{
    files::{create_private, create_private_dir},
    ids::{ContainerId, TaskId},
    logs::{self, LogSpec, Losses},
    places::{Places, PlacesError},
    process::{Pid, PidFd, async_command, detach_from_agent, detach_session},
    shim::stdio::Stdio,
};

/// How long the remaining output of a task that has ended may take to be written. It is written in a millisecond,
/// unless it can't be written at all.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the losses that the log writer reports are checked, and a start of the log writer that failed is retried.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// The delay before a log writer supervisor that has died is restarted.
const RESTART_DELAY: Duration = Duration::from_millis(50);

/// Starts the log writer supervisor when it is first needed, and again when it dies.
#[derive(Debug)]
pub(super) struct LogWriterSupervisor {
    places: Places,
    /// The `cgroup.procs` files of the cgroup that the supervisor is moved to.
    cgroup: Vec<PathBuf>,
    running: Mutex<Option<Arc<PidFd>>>,
}

impl LogWriterSupervisor {
    pub(super) fn new(places: Places, cgroup: Vec<PathBuf>) -> Arc<Self> {
        Arc::new(Self { places, cgroup, running: Mutex::default() })
    }

    /// Makes sure that a log writer supervisor is running.
    ///
    /// # Errors
    /// When it can't be started.
    pub(super) async fn ensure_running(self: &Arc<Self>) -> Result<(), TaskError> {
        let mut running = self.running.lock().await;
        // The kernel is asked, because the task that watches the supervisor may not have seen its end yet.
        if running.as_ref().is_some_and(|supervisor| !supervisor.has_ended()) {
            return Ok(());
        }
        let pidfd = self.find_or_spawn()?;
        *running = Some(pidfd.clone());
        tokio::spawn(self.clone().restart_when_dead(pidfd));
        Ok(())
    }

    /// Starts another log writer supervisor whenever one dies, as long as there are logs to write.
    async fn restart_when_dead(self: Arc<Self>, mut pidfd: Arc<PidFd>) {
        loop {
            pidfd.wait_for_end().await;
            // The entry is cleared at once, so that a task's start during the delay starts another supervisor.
            self.running.lock().await.take_if(|supervisor| Arc::ptr_eq(supervisor, &pidfd));
            let mut pause = RESTART_DELAY;
            pidfd = loop {
                tokio::time::sleep(pause).await;
                let mut running = self.running.lock().await;
                if running.is_some() || !self.has_work() {
                    return;
                }
                match self.find_or_spawn() {
                    Ok(next) => {
                        *running = Some(next.clone());
                        break next;
                    }
                    Err(error) => {
                        tracing::error!(
                            error = crate::error_chain(&error),
                            "the log writer supervisor died and could not be restarted"
                        );
                        pause = (2 * pause).min(POLL_INTERVAL);
                    }
                }
            };
        }
    }

    /// Does the same as `ensure_running` in the background, and retries until it succeeds.
    pub(super) fn ensure_in_background(self: &Arc<Self>) {
        let this = self.clone();
        tokio::spawn(async move {
            while let Err(error) = this.ensure_running().await {
                tracing::error!(error = crate::error_chain(&error), "could not start the log writer supervisor");
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        });
    }

    fn find_or_spawn(&self) -> Result<Arc<PidFd>, TaskError> {
        let logs = self.places.logs();
        create_private_dir(&logs).map_err(|source| PlacesError::Create { path: logs.clone(), source })?;
        match logs::running_supervisor(&logs).map_err(TaskError::LogWriter)? {
            // An earlier plugin has started it.
            Some(pidfd) => Ok(Arc::new(pidfd)),
            None => self.spawn().map_err(TaskError::LogWriter),
        }
    }

    /// Says whether there is a task whose log this driver writes.
    pub(super) fn has_work(&self) -> bool {
        logs::has_tasks(&self.places.logs())
    }

    fn spawn(&self) -> std::io::Result<Arc<PidFd>> {
        let logs = self.places.logs();
        // This file has the messages of the previous supervisor.
        let _ = std::fs::remove_file(logs.join(".said"));
        let messages = create_private(&logs.join(".said"))?;
        let mut command = async_command("/proc/self/exe");
        command.arg0("nomad-driver-shim").args(logs::supervisor_args(&logs)).env_clear().stdin(ChildStdio::piped());
        command.stdout(ChildStdio::null()).stderr(messages).kill_on_drop(false);
        // SAFETY: only async-signal-safe calls between fork and exec, and no memory of this process is touched.
        unsafe {
            command.pre_exec(|| detach_session(3));
        }
        let mut child = command.spawn()?;
        let pid = Pid::of_child(&child)?;
        detach_from_agent(pid, &self.cgroup);
        // The supervisor waits for the end of its input, so that the log writer is started in the same cgroup.
        drop(child.stdin.take());
        let pidfd = Arc::new(PidFd::open(pid.get())?);
        // The child is reaped when it dies.
        tokio::spawn(async move { child.wait().await });
        Ok(pidfd)
    }

    /// Ends the log writer supervisor and the log writer, if there is no task whose log they write.
    pub(super) fn end_if_idle(&self) {
        if !self.has_work() {
            logs::stop(&self.places.logs());
        }
    }
}

/// Says whether this driver writes this task's log. It does not if the job has disabled the log.
pub(super) fn is_written_by_driver(settings: &Settings, request: &StartRequest) -> bool {
    settings.disable_log_collection && request.stdout != Path::new("/dev/null")
}

/// Sets up a task's log, makes sure that the log writer is running, and returns the task's streams for the shim. A task
/// with a terminal has one stream.
///
/// # Errors
/// When a step fails. The task's teardown removes what is left then.
pub(super) async fn set_up_log(
    context: &EngineContext,
    request: &StartRequest,
    id: &ContainerId,
) -> Result<Stdio, TaskError> {
    let spec =
        LogSpec { alloc_dir: request.alloc_dir.clone(), task: request.name.clone(), options: request.options.log };
    let (dir, terminal) = (context.settings.places.log(id), request.options.tty);
    context.log_writer_supervisor.ensure_running().await?;
    logs::create_task_dir(&dir, &spec, terminal)?;
    // If the supervisor died before the log was prepared, it was not restarted, because there was nothing to write.
    context.log_writer_supervisor.ensure_running().await?;
    let [stdout, stderr] = logs::STREAMS.map(|stream| logs::fifo_path(&dir, stream));
    let stderr = if terminal { PathBuf::from("/dev/null") } else { stderr };
    Ok(Stdio::open(&dir, &stdout, &stderr)?)
}

/// Waits until the log of a task that has ended is written completely, but no longer than `DRAIN_TIMEOUT`.
pub(super) async fn wait_until_written(places: &Places, id: &ContainerId) {
    if !logs::wait_until_drained(&places.log(id), DRAIN_TIMEOUT).await {
        tracing::warn!(container = %id, "could not write the end of a task's log, which is lost");
    }
}

impl Engine {
    /// Reports output that the log writer could not write, for as long as the engine lives.
    pub(super) fn watch_logs(&self) {
        let engine = self.downgrade();
        tokio::spawn(async move {
            let mut last_change = None;
            let mut known: HashMap<TaskId, Losses> = HashMap::new();
            // The earlier plugin has reported the losses of recovered tasks.
            tokio::time::sleep(POLL_INTERVAL).await;
            if let Some(inner) = engine.upgrade() {
                let this = Self(inner);
                let places = &this.settings().places;
                let recovered = this.started_tasks().into_iter().filter(|(_, task)| task.phases == Phases::default());
                known.extend(recovered.filter_map(|(id, task)| {
                    // If the losses can't be read, they are reported once more.
                    Some((id, logs::read_losses(&places.log(&task.record().intent.container_id)).ok()?))
                }));
            }
            loop {
                tokio::time::sleep(POLL_INTERVAL).await;
                let Some(inner) = engine.upgrade() else { return };
                let this = Self(inner);
                let changed = std::fs::metadata(logs::changed_file(&this.settings().places.logs()));
                let changed_at = changed.and_then(|meta| meta.modified()).ok();
                if changed_at != last_change {
                    last_change = changed_at;
                    catch_panic("reporting lost output of logs", async { this.report_losses(&mut known) }).await;
                }
            }
        });
    }

    fn report_losses(&self, known: &mut HashMap<TaskId, Losses>) {
        let live = self.started_tasks();
        known.retain(|id, _| live.iter().any(|(other, _)| other == id));
        for (id, task) in live {
            let record = task.record();
            let mut now = match logs::read_losses(&self.settings().places.log(&record.intent.container_id)) {
                Ok(now) => now,
                // The losses that were reported so far stay known; the next change brings the rest.
                Err(error) => {
                    tracing::warn!(task = %id, %error, "could not read the losses of a task's log");
                    continue;
                }
            };
            let before = known.entry(id).or_default();
            for stream in logs::STREAMS {
                let (old, new) = (before.stream_mut(stream).clone(), now.stream_mut(stream).clone());
                self.context().metrics.log_dropped(new.dropped.saturating_sub(old.dropped));
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
                tracing::warn!(task = %record.intent.task_id, message);
                self.context().events.send_about(&record, message, Audience::Everybody);
            }
            *before = now;
        }
    }
}
