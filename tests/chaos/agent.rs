//! A stand-in for Nomad's agent: one runner a task, which starts it, waits for its end, recovers it whenever the plugin has
//! died, and destroys it. What it does after each outcome is what Nomad's `client/allocrunner/taskrunner/task_runner.go` does
//! (`runDriver`, `handleTaskExitResult`, `restoreHandle`, `clearDriverHandle`), but that it tries as often as it takes.

use std::{sync::Arc, time::Duration};

use nomad_driver_shim::{
    host::is_recoverable,
    pb::driver::{
        DestroyTaskRequest, RecoverTaskRequest, StartTaskRequest, StopTaskRequest, TaskHandle, WaitTaskRequest,
    },
};
use tokio::sync::watch;

use crate::{
    model::AttemptId,
    node::{CallError, Node},
    step::Work,
    support::patience,
    task::TaskFiles,
};

/// Longer than any call takes that is not waiting for a task's end.
fn call_limit() -> Duration {
    2 * patience()
}
/// Before a start that was refused is tried again. Nomad waits for 15 s by default.
const RESTART: Duration = Duration::from_millis(500);

/// What is wanted of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Run,
    Stop(Duration),
    Destroy,
}

/// A task that the agent cares for.
pub(crate) struct Runner {
    node: Arc<Node>,
    pub files: TaskFiles,
    work: Work,
    wish: watch::Sender<Wish>,
    /// The attempt that runs, and its handle.
    running: watch::Sender<Option<(AttemptId, TaskHandle)>>,
}

/// How an attempt to start ended.
#[allow(clippy::large_enum_variant, reason = "one a start, and no more than a handle")]
enum Started {
    Running(TaskHandle),
    Refused,
    Forgotten,
}

/// How a running task ended.
#[derive(PartialEq, Eq)]
enum Ended {
    /// With a code.
    Exited,
    /// RecoverTask was refused.
    Lost,
    /// It was destroyed as it ran.
    Destroyed,
}

impl Runner {
    pub(crate) fn new(node: &Arc<Node>, files: TaskFiles, work: Work) -> Arc<Self> {
        node.model().add(files.number, work);
        let (wish, running) = (watch::Sender::new(Wish::Run), watch::Sender::new(None));
        Arc::new(Self { node: node.clone(), files, work, wish, running })
    }

    /// Nomad's id of an attempt.
    pub(crate) fn id(&self, attempt: AttemptId) -> String {
        self.files.config(attempt.1).id
    }

    /// The attempt that runs, as far as the agent knows.
    pub(crate) fn running(&self) -> Option<(AttemptId, TaskHandle)> {
        self.running.borrow().clone()
    }

    /// From now on this is wanted. What is wanted of a task that shall end stays.
    pub(crate) fn wish(&self, wish: Wish) {
        if wish != Wish::Run {
            self.node.model().unwanted(self.files.number);
        }
        self.wish.send_if_modified(|known| {
            let is_news = *known == Wish::Run && wish != Wish::Run;
            if is_news {
                *known = wish;
            }
            is_news
        });
    }

    /// Cares for the task until nothing more is to be done.
    pub(crate) async fn run(self: Arc<Self>) {
        let number = self.files.number;
        let mut must_replace = false;
        while must_replace || *self.wish.borrow() == Wish::Run {
            let attempt = (number, self.node.model().next_attempt(number));
            self.files.collect().await;
            let connection = self.node.connections();
            let started = self.start(attempt).await;
            must_replace = matches!(started, Started::Forgotten);
            match started {
                Started::Running(handle) => {
                    self.running.send_replace(Some((attempt, handle.clone())));
                    let ended = self.follow(attempt, &handle, connection).await;
                    self.running.send_replace(None);
                    if ended != Ended::Destroyed {
                        self.destroy_once(attempt).await;
                    }
                    if matches!(self.work, Work::Batch { .. }) {
                        break;
                    }
                }
                Started::Forgotten => {}
                Started::Refused => {
                    let mut wish = self.wish.subscribe();
                    let _ = tokio::time::timeout(RESTART, wish.wait_for(|wish| *wish != Wish::Run)).await;
                }
            }
        }
        self.files.finish(&self.node).await;
        self.node.model().over(number);
    }

    async fn start(&self, attempt: AttemptId) -> Started {
        let config = self.files.config(attempt.1);
        let mut wish = self.wish.subscribe();
        loop {
            self.node.model().asked(attempt);
            let request = StartTaskRequest { task: Some(config.clone()) };
            let start =
                self.node.call(Some(call_limit()), |mut driver| async move { driver.start_task(request).await });
            let changed = async {
                let _ = wish.wait_for(|wish| *wish != Wish::Run).await;
                self.node.model().told_to_stop(attempt);
                // StopTask breaks off a start that takes long.
                self.stop(attempt, Duration::ZERO).await;
                std::future::pending::<()>().await;
            };
            let answer = tokio::select! {
                answer = start => answer,
                () = changed => unreachable!("it waits for the answer of StartTask"),
            };
            match answer {
                Ok(answer) => {
                    self.node.model().answered(attempt);
                    self.node.note(format!("{attempt:?} was started"));
                    if let Some(handle) = answer.handle {
                        return Started::Running(handle);
                    }
                    self.node.model().violated(format!("{attempt:?} was started, and has no handle"));
                    return Started::Refused;
                }
                Err(CallError::PluginDied) => {}
                Err(CallError::AgentDied) => {
                    self.node.model().forgotten(attempt);
                    return Started::Forgotten;
                }
                Err(CallError::Refused(status)) => {
                    let again = is_recoverable(&status);
                    self.node.note(format!("{attempt:?} was refused (recoverable: {again}): {}", status.message()));
                    let now = self.node.now();
                    self.node.model().refused(attempt, again, status.message(), now);
                    return Started::Refused;
                }
                Err(CallError::Hung) => {
                    self.node.model().violated(format!("StartTask of {attempt:?} is not answered"));
                    return Started::Refused;
                }
            }
        }
    }

    /// Waits for the end of an attempt that was started at this connection or a later one.
    async fn follow(&self, attempt: AttemptId, handle: &TaskHandle, mut connection: u64) -> Ended {
        let mut wish = self.wish.subscribe();
        let id = self.id(attempt);
        loop {
            let now = self.node.connections();
            let request = WaitTaskRequest { task_id: id.clone() };
            let wait = self.node.call(None, |mut driver| async move { driver.wait_task(request).await });
            let end = async {
                let wanted = *wish.wait_for(|wish| *wish != Wish::Run).await.expect("the sender is ours");
                self.node.model().told_to_stop(attempt);
                match wanted {
                    Wish::Stop(timeout) => {
                        self.stop(attempt, timeout).await;
                        std::future::pending().await
                    }
                    Wish::Destroy | Wish::Run => self.destroy_running(attempt, handle).await,
                }
            };
            let answer = tokio::select! {
                answer = wait => answer,
                ended = end => return ended,
            };
            match answer {
                Ok(answer) => {
                    let code = answer.result.map_or(-1, |result| result.exit_code);
                    self.node.note(format!("{attempt:?} has ended with {code} {}", answer.err));
                    self.node.model().exited(attempt, code, &answer.err);
                    return Ended::Exited;
                }
                // The plugin went after the start was answered, so that WaitTask reached one that knows nothing of the task.
                Err(CallError::Refused(_)) if self.node.connections() != connection => {
                    connection = now;
                    if self.recover(attempt, handle).await.is_err() {
                        return Ended::Lost;
                    }
                }
                Err(CallError::Refused(status)) => {
                    self.node.model().violated(format!("WaitTask of {attempt:?}: {}", status.message()));
                    return Ended::Lost;
                }
                Err(CallError::PluginDied | CallError::AgentDied | CallError::Hung) => {
                    connection = self.node.connections();
                    if self.recover(attempt, handle).await.is_err() {
                        return Ended::Lost;
                    }
                }
            }
        }
    }

    /// RecoverTask, as often as it takes.
    async fn recover(&self, attempt: AttemptId, handle: &TaskHandle) -> Result<(), ()> {
        loop {
            // As Nomad asks: the id only inside of the handle.
            let request = RecoverTaskRequest { task_id: String::new(), handle: Some(handle.clone()) };
            let answer =
                self.node.call(Some(call_limit()), |mut driver| async move { driver.recover_task(request).await });
            match answer.await {
                Ok(_) => return Ok(()),
                Err(CallError::PluginDied | CallError::AgentDied) => {}
                Err(CallError::Refused(status)) => {
                    self.node.note(format!("{attempt:?} could not be recovered: {}", status.message()));
                    self.node.model().lost(attempt, status.message());
                    return Err(());
                }
                Err(CallError::Hung) => {
                    self.node.model().violated(format!("RecoverTask of {attempt:?} is not answered"));
                    return Err(());
                }
            }
        }
    }

    /// StopTask, as often as it takes.
    async fn stop(&self, attempt: AttemptId, timeout: Duration) {
        loop {
            let timeout = Some(prost_types::Duration::try_from(timeout).expect("a short time"));
            let request = StopTaskRequest { task_id: self.id(attempt), timeout, signal: String::new() };
            let answer =
                self.node.call(Some(call_limit()), |mut driver| async move { driver.stop_task(request).await });
            match answer.await {
                Ok(_) => return,
                Err(CallError::PluginDied | CallError::AgentDied) => {}
                Err(CallError::Refused(status)) => {
                    self.node.note(format!("StopTask of {attempt:?}: {}", status.message()));
                    tokio::time::sleep(RESTART).await;
                }
                Err(CallError::Hung) => {
                    self.node.model().violated(format!("StopTask of {attempt:?} is not answered"));
                    return;
                }
            }
        }
    }

    /// DestroyTask by force of a task that runs. Where the call was cut off, the task is asked for, and destroyed again if it
    /// is still there.
    async fn destroy_running(&self, attempt: AttemptId, handle: &TaskHandle) -> Ended {
        while self.destroy(attempt, true).await.is_err() {
            if self.recover(attempt, handle).await.is_err() {
                break;
            }
        }
        self.node.model().destroyed(attempt);
        Ended::Destroyed
    }

    /// DestroyTask of a task that has ended: Nomad never asks twice, whatever becomes of the call.
    async fn destroy_once(&self, attempt: AttemptId) {
        self.node.model().destroyed(attempt);
        let _ = self.destroy(attempt, true).await;
    }

    /// DestroyTask: an error when the call was cut off.
    pub(crate) async fn destroy(&self, attempt: AttemptId, force: bool) -> Result<(), ()> {
        let request = DestroyTaskRequest { task_id: self.id(attempt), force };
        let answer = self.node.call(Some(call_limit()), |mut driver| async move { driver.destroy_task(request).await });
        match answer.await {
            Ok(_) => Ok(()),
            Err(CallError::PluginDied | CallError::AgentDied) => Err(()),
            Err(CallError::Refused(status)) => {
                self.node.note(format!("DestroyTask of {attempt:?} (force: {force}): {}", status.message()));
                Ok(())
            }
            Err(CallError::Hung) => {
                self.node.model().violated(format!("DestroyTask of {attempt:?} is not answered"));
                Ok(())
            }
        }
    }
}
