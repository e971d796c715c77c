//! A session of `nomad alloc exec`, as the agent holds it.

use nomad_driver_shim::pb::driver::{
    ExecTaskRequest, ExecTaskResponse, ExecTaskStreamingIoOperation, ExecTaskStreamingRequest,
    ExecTaskStreamingResponse,
    exec_task_streaming_request::{Setup, TerminalSize},
};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::{Env, Task, patience};

/// The output and the result of a session.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub stdout: String,
    pub stderr: String,
    pub closed: (bool, bool),
    pub code: Option<i32>,
}

pub(crate) struct Talk {
    pub send: mpsc::Sender<ExecTaskStreamingRequest>,
    pub receive: Streaming<ExecTaskStreamingResponse>,
}

impl Env {
    pub(crate) async fn exec(
        &self,
        task: &Task,
        command: &[&str],
        timeout_ms: i32,
    ) -> Result<ExecTaskResponse, Status> {
        let timeout = Some(prost_types::Duration { seconds: 0, nanos: timeout_ms * 1_000_000 });
        let request = ExecTaskRequest { task_id: task.id.clone(), command: strings(command), timeout };
        let answer = tokio::time::timeout(patience(), async { self.driver().exec_task(request).await }).await;
        answer.expect("ExecTask hangs").map(tonic::Response::into_inner)
    }

    /// Runs a script in the task and returns its output.
    pub(crate) async fn exec_text(&self, task: &Task, script: &str) -> String {
        let answer = self.exec(task, &["/bin/sh", "-c", script], 0).await.unwrap();
        assert_eq!(answer.result.unwrap().exit_code, 0, "{}", String::from_utf8_lossy(&answer.stderr));
        String::from_utf8(answer.stdout).unwrap()
    }

    pub(crate) async fn talk(&self, task: &Task, command: &[&str], tty: bool) -> Result<Talk, Status> {
        let (send, requests) = mpsc::channel(64);
        let setup = Setup { task_id: task.id.clone(), command: strings(command), tty };
        send.send(ExecTaskStreamingRequest { setup: Some(setup), ..Default::default() }).await.unwrap();
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let receive = self.driver().exec_task_streaming(requests).await?.into_inner();
        Ok(Talk { send, receive })
    }
}

fn strings(command: &[&str]) -> Vec<String> {
    command.iter().map(|part| (*part).to_owned()).collect()
}

impl Talk {
    pub(crate) async fn say(&self, request: ExecTaskStreamingRequest) {
        self.send.send(request).await.unwrap();
    }

    pub(crate) async fn type_in(&self, text: &str) {
        let stdin = Some(ExecTaskStreamingIoOperation { data: text.into(), close: false });
        self.say(ExecTaskStreamingRequest { stdin, ..Default::default() }).await;
    }

    pub(crate) async fn close(&self) {
        let stdin = Some(ExecTaskStreamingIoOperation { data: Vec::new(), close: true });
        self.say(ExecTaskStreamingRequest { stdin, ..Default::default() }).await;
    }

    pub(crate) async fn resize(&self, height: i32, width: i32) {
        let tty_size = Some(TerminalSize { height, width });
        self.say(ExecTaskStreamingRequest { tty_size, ..Default::default() }).await;
    }

    /// Reads until `stop` holds or the session ends.
    pub(crate) async fn until(&mut self, outcome: &mut Outcome, stop: impl Fn(&Outcome) -> bool) {
        let reading = async {
            while !stop(outcome) {
                let Some(answer) = self.receive.message().await.unwrap() else { return };
                if let Some(stdout) = answer.stdout {
                    outcome.stdout.push_str(std::str::from_utf8(&stdout.data).unwrap());
                    outcome.closed.0 |= stdout.close;
                }
                if let Some(stderr) = answer.stderr {
                    outcome.stderr.push_str(std::str::from_utf8(&stderr.data).unwrap());
                    outcome.closed.1 |= stderr.close;
                }
                if answer.exited {
                    outcome.code = Some(answer.result.unwrap().exit_code);
                }
            }
        };
        tokio::time::timeout(patience(), reading).await.expect("the session hangs");
    }

    /// Reads until the session ends.
    pub(crate) async fn end(mut self) -> Outcome {
        let mut outcome = Outcome::default();
        self.until(&mut outcome, |_| false).await;
        outcome
    }
}
