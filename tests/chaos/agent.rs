//! A stand-in for Nomad's agent. It has one runner for each task. The runner starts the task, waits for its end,
//! recovers it whenever the plugin has died, and destroys it. After each outcome the runner does what Nomad's
//! `client/allocrunner/taskrunner/task_runner.go` does (`runDriver`, `handleTaskExitResult`, `restoreHandle`,
//! `clearDriverHandle`), except that it tries a call as often as necessary.

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

/// Time limit of every call except WaitTask. No such call takes this long.
fn call_limit() -> Duration {
    2 * patience()
}
/// Delay before a refused start is tried again. Nomad's default is 15 s.
const RESTART: Duration = Duration::from_millis(500);

/// What the test wants the agent to do with a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Run,
    Stop(Duration),
    Destroy,
}

/// A task that the agent manages.
pub(crate) struct Runner {
    node: Arc<Node>,
    pub files: TaskFiles,
    work: Work,
    wish: watch::Sender<Wish>,
    /// The running attempt and its handle.
    running: watch::Sender<Option<(AttemptId, TaskHandle)>>,
}

/// The outcome of one attempt to start a task.
#[allow(clippy::large_enum_variant, reason = "one a start, and no more than a handle")]
enum Started {
    Running(TaskHandle),
    Refused,
    Forgotten,
}

/// How a running task ended.
#[derive(PartialEq, Eq)]
enum Ended {
    /// The task has ended with an exit code.
    Exited,
    /// RecoverTask was refused.
    Lost,
    /// The task was destroyed while it ran.
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

    /// The running attempt, as far as the agent knows.
    pub(crate) fn running(&self) -> Option<(AttemptId, TaskHandle)> {
        self.running.borrow().clone()
    }

    /// Changes what is wanted of the task. Once the task is to stop or to be destroyed, a further wish changes nothing.
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

    /// Manages the task until nothing more is to be done for it.
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
                // StopTask aborts a start that takes long.
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

    /// Waits for the end of an attempt that was started on this connection or on a later one.
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
                // The plugin died after it had answered StartTask, so that WaitTask reached a plugin that does not know
                // the task.
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

    /// Calls RecoverTask until there is an answer.
    async fn recover(&self, attempt: AttemptId, handle: &TaskHandle) -> Result<(), ()> {
        loop {
            // The id is only inside of the handle, as in Nomad's own request.
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

    /// Calls StopTask until it succeeds or hangs.
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

    /// Calls DestroyTask with force for a running task. If the call was cut off, recovers the task to see whether it is
    /// still there, and if so destroys it again.
    async fn destroy_running(&self, attempt: AttemptId, handle: &TaskHandle) -> Ended {
        while self.destroy(attempt, true).await.is_err() {
            if self.recover(attempt, handle).await.is_err() {
                break;
            }
        }
        self.node.model().destroyed(attempt);
        Ended::Destroyed
    }

    /// Calls DestroyTask for a task that has ended. Nomad calls it only once, whatever the result.
    async fn destroy_once(&self, attempt: AttemptId) {
        self.node.model().destroyed(attempt);
        let _ = self.destroy(attempt, true).await;
    }

    /// Calls DestroyTask. Returns an error if the call was cut off.
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
