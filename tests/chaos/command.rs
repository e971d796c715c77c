//! Commands that the agent sends for a running task, and what must come of them.

use std::time::Duration;

use nomad_driver_shim::pb::driver::{
    ExecTaskRequest, InspectTaskRequest, RecoverTaskRequest, SignalTaskRequest, TaskState, TaskStatsRequest,
};
use tonic::Response;

use crate::{
    agent::Runner,
    model::AttemptId,
    node::{CallError, Node},
    step::Step,
    support::patience,
};

/// Time limit of these calls. None of them takes this long.
fn call_limit() -> Duration {
    patience()
}

impl Runner {
    /// Runs a command, if the task is running.
    pub(crate) async fn command(&self, node: &Node, step: Step) {
        let Some((attempt, handle)) = self.running() else { return };
        let task_id = self.id(attempt);
        let outcome = match step {
            Step::Exec { code, .. } => return self.execute(node, attempt, i32::from(code)).await,
            Step::Destroy { .. } => {
                let _ = self.destroy(attempt, false).await;
                // Without force, a running task is not destroyed. It goes on running, which the next `Settle` step
                // checks.
                return;
            }
            Step::Signal { .. } => {
                let request = SignalTaskRequest { task_id, signal: "SIGUSR1".to_owned() };
                node.call(Some(call_limit()), |mut driver| async move { driver.signal_task(request).await })
                    .await
                    .map(drop)
            }
            Step::Stats { .. } => {
                let interval = Some(prost_types::Duration { seconds: 1, nanos: 0 });
                let request = TaskStatsRequest { task_id, collection_interval: interval };
                let first = |mut driver: nomad_driver_shim::pb::driver::driver_client::DriverClient<_>| async move {
                    let mut stream = driver.task_stats(request).await?.into_inner();
                    stream.message().await.map(Response::new)
                };
                node.call(Some(call_limit()), first).await.map(drop)
            }
            Step::Recover { .. } => {
                let request = RecoverTaskRequest { task_id: String::new(), handle: Some(handle) };
                node.call(Some(call_limit()), |mut driver| async move { driver.recover_task(request).await })
                    .await
                    .map(drop)
            }
            _ => {
                let request = InspectTaskRequest { task_id };
                let answer =
                    node.call(Some(call_limit()), |mut driver| async move { driver.inspect_task(request).await }).await;
                answer.map(|answer| {
                    let state = answer.task.map(|task| task.state);
                    if state != Some(TaskState::Running as i32) && node.model().is_quiet(attempt, node.now()) {
                        node.model().violated(format!("{attempt:?} runs, and InspectTask says {state:?}"));
                    }
                })
            }
        };
        if let Err(CallError::Refused(status)) = outcome
            && node.model().is_quiet(attempt, node.now())
        {
            node.model().violated(format!("`{step}` failed without a cause: {}", status.message()));
        }
    }

    async fn execute(&self, node: &Node, attempt: AttemptId, code: i32) {
        let command = ["/bin/sh", "-c", &format!("echo here; exit {code}")].map(str::to_owned).to_vec();
        let timeout = Some(prost_types::Duration { seconds: 30, nanos: 0 });
        let request = ExecTaskRequest { task_id: self.id(attempt), command, timeout };
        let answer = node.call(Some(call_limit()), |mut driver| async move { driver.exec_task(request).await }).await;
        let got = match answer {
            Ok(answer) => {
                let got = answer.result.map_or(-1, |result| result.exit_code);
                if got == code && answer.stdout != b"here\n" {
                    node.model().violated(format!("a command in {attempt:?} has written {:?}", answer.stdout));
                }
                Ok(got)
            }
            Err(CallError::Refused(status)) => Err(status.message().to_owned()),
            Err(other) => Err(format!("{other:?}")),
        };
        let now = node.now();
        node.model().executed(attempt, code, got, now);
    }
}
