//! The control socket, at which a running plugin answers the command line and its successor.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{broadcast::error::RecvError, watch},
};

use super::connections::{Connections, ShutdownMode, listen_root_only};
use crate::{
    control::{Answer, Event, REQUEST_MAX, Request},
    error_chain,
    ids::TaskId,
    image::Reference,
    peer::AllowedPeers,
    task::{Engine, TaskError, epoch_millis},
    text::{self, MESSAGE_MAX},
};

/// How long a client may take to send its request. Clients send it as soon as they are connected.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a client waits for a full pool of shims. A shim comes up in some 10 ms.
const FILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves the control socket.
#[derive(Clone)]
pub(crate) struct ControlServer {
    /// The engine that requests are about.
    pub engine: Engine,
    /// The control server sets this to `ShutdownMode::HandOver` when another plugin takes over.
    pub shutdown_mode: watch::Sender<ShutdownMode>,
    /// The agents' connections: while there is one, another plugin can't take over.
    pub clients: Connections,
}

impl ControlServer {
    /// Listens at the control socket, and answers requests in the background.
    ///
    /// # Errors
    /// When the socket can't be created.
    pub(crate) fn listen(self) -> io::Result<()> {
        let listener = listen_root_only(&self.engine.settings().places.control())?;
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => drop(tokio::spawn(self.clone().serve(stream))),
                    Err(error) => {
                        tracing::warn!(%error, "could not accept a connection to the control socket");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            }
        });
        Ok(())
    }

    async fn serve(self, stream: UnixStream) {
        if let Err(error) = AllowedPeers::root().check(&stream) {
            return tracing::warn!(error = error_chain(&error), "a connection to the control socket was refused");
        }
        let (read, mut write) = stream.into_split();
        let mut line = String::new();
        let mut reader = BufReader::new(read.take(REQUEST_MAX));
        let read = tokio::time::timeout(REQUEST_TIMEOUT, reader.read_line(&mut line)).await;
        if !matches!(read, Ok(Ok(1..))) {
            return;
        }
        let answer = match serde_json::from_str(&line) {
            Ok(Request::Events) => return self.events(write).await,
            Ok(request) => self.answer(request).await,
            Err(error) => Answer::Refused(format!("the request can't be parsed: {error}")),
        };
        let _ = send(&mut write, &answer).await;
    }

    async fn answer(&self, request: Request) -> Answer {
        match request {
            Request::Leave if self.clients.any_connected() => {
                Answer::Refused(format!("plugin {} has an agent connected", std::process::id()))
            }
            Request::Leave => {
                tracing::info!(
                    "another plugin asked this plugin to exit, and no agent is connected; this plugin exits"
                );
                self.shutdown_mode.send_replace(ShutdownMode::HandOver);
                Answer::Done
            }
            Request::Gc { dry_run } => Answer::Removed(self.engine.gc(dry_run).await),
            Request::RemoveImage { image } => match Reference::parse(&image) {
                Ok(reference) => match self.engine.remove_image(&reference).await {
                    Err(TaskError::Image(error)) if error.is_missing() => Answer::NotHere,
                    other => to_answer(other),
                },
                Err(error) => Answer::Refused(text::sanitize(&error_chain(&error), MESSAGE_MAX)),
            },
            Request::Kill { task, signal } => {
                let id = TaskId(task);
                to_answer(match signal {
                    Some(signal) => self.engine.signal(&id, &signal).await,
                    None => match self.engine.inspect(&id).await {
                        Ok(_) => self.engine.stop(&id, Duration::ZERO, "").await,
                        Err(error) => Err(error),
                    },
                })
            }
            Request::FillPool => match self.engine.wait_for_full_shim_pool(FILL_TIMEOUT).await {
                true => Answer::Done,
                false => Answer::Refused(format!("the pool of shims was not filled in {} s", FILL_TIMEOUT.as_secs())),
            },
            Request::Events => Answer::Done,
        }
    }

    /// Sends task events until the client disconnects.
    async fn events(&self, mut write: OwnedWriteHalf) {
        let mut events = self.engine.subscribe();
        loop {
            let event = match events.recv().await {
                Ok(event) => event,
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return,
            };
            let event = Event {
                at: epoch_millis(event.at),
                task_id: event.task_id.0,
                alloc_id: event.alloc_id.to_string(),
                task_name: event.task_name,
                message: event.message,
            };
            if send(&mut write, &Answer::Event(event)).await.is_err() {
                return;
            }
        }
    }
}

fn to_answer(outcome: Result<(), TaskError>) -> Answer {
    match outcome {
        Ok(()) => Answer::Done,
        Err(error) => Answer::Refused(text::sanitize(&error_chain(&error), MESSAGE_MAX)),
    }
}

async fn send(write: &mut OwnedWriteHalf, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    write.write_all(&line).await
}
