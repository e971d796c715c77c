//! ExecTask and ExecTaskStreaming: a session's pipes on one side, Nomad's messages on the other.

use std::{convert::Infallible, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::unix::pipe,
    sync::mpsc,
};
use tonic::{Code, Status, Streaming};

use super::{convert, identity::task_id, status};
use crate::{
    ids::TaskId,
    pb::driver::{self as wire, ExecTaskStreamingIoOperation as Operation},
    task::{Engine, Exec, ExecError, ExecIo, ExecRequest, Exit, Session, TaskError, WindowSize},
    text::{self, MESSAGE_MAX},
};

/// Of each stream of ExecTask the last so many bytes are kept; Nomad's own drivers keep 4 KiB.
const KEPT: usize = 1 << 20;
/// One message's worth.
const CHUNK: usize = 32 << 10;
/// How long output is waited for after a process's end, while its children keep the stream open.
#[derive(Debug, Clone, Copy)]
struct Drain {
    /// Nothing has come for this long.
    silence: Duration,
    /// However much still comes.
    at_most: Duration,
}

/// Without a terminal output is read to its end; a daemon that was started in passing must not keep its caller, though.
const PIPES: Drain = Drain { silence: Duration::from_secs(2), at_most: FOR_EVER };
/// With one, the end of the process is the end (Nomad's contract); only what it wrote last is waited for.
const TERMINAL: Drain = Drain { silence: Duration::from_millis(200), at_most: Duration::from_secs(1) };

/// As good as never.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);

type Answer = Result<wire::ExecTaskStreamingResponse, Status>;

/// Runs a command to its end, with no input: its output and exit code.
///
/// # Errors
/// When it can't be run, or does not end in time; then it is killed.
pub async fn run(
    engine: &Engine,
    id: TaskId,
    request: wire::ExecTaskRequest,
) -> Result<wire::ExecTaskResponse, Status> {
    let timeout = convert::duration(request.timeout);
    let shown = request.command.join(" ");
    let wanted = ExecRequest { command: request.command, terminal: false, stdin: false };
    let work = async {
        let session = engine.exec(&id, &wanted).await.map_err(|error| status::of(&error))?;
        let (_nobody, typed) = mpsc::channel(1);
        let (send, output) = mpsc::channel(4);
        let input = Input { stdin: None, typed };
        let (exit, (stdout, stderr)) = tokio::join!(pump(session, PIPES, input, send), collect(output));
        Ok(wire::ExecTaskResponse { stdout, stderr, result: Some(result(&exit?)) })
    };
    if timeout.is_zero() {
        return work.await;
    }
    tokio::time::timeout(timeout, work).await.unwrap_or_else(|_| {
        let problem = format!("exec {} did not end within {timeout:?} and was killed", text::quoted(&shown));
        Err(status::new(Code::DeadlineExceeded, &problem))
    })
}

/// Runs a command for somebody who talks with it; returns when it was started.
///
/// # Errors
/// When it can't be started.
pub async fn stream(
    engine: &Engine,
    mut requests: Streaming<wire::ExecTaskStreamingRequest>,
) -> Result<mpsc::Receiver<Answer>, Status> {
    let first = requests.message().await?;
    let setup = first.and_then(|request| request.setup);
    let setup =
        setup.ok_or_else(|| Status::invalid_argument("exec: the first message must say what to run (setup)"))?;
    let id = task_id("setup.task_id", &setup.task_id)?;
    let wanted = ExecRequest { command: setup.command, terminal: setup.tty, stdin: true };
    let (send, receive) = mpsc::channel(4);
    let session = match engine.exec(&id, &wanted).await {
        Ok(session) => session,
        Err(TaskError::Exec(error)) if error.exit_code().is_some() => {
            tokio::spawn(refuse(send, setup.tty, error));
            return Ok(receive);
        }
        Err(error) => return Err(status::of(&error)),
    };
    tokio::spawn(async move {
        let gone = send.clone();
        tokio::select! {
            () = converse(session, requests, send, setup.tty) => {}
            // The client has left: dropping the session kills what it had started.
            () = gone.closed() => {}
        }
    });
    Ok(receive)
}

/// A command that is not there or can't be run: said where the user looks, with the code that a shell would give. The
/// agent shows an error of the call as "unexpected EOF".
async fn refuse(send: mpsc::Sender<Answer>, terminal: bool, error: ExecError) {
    let text = format!("{}\n", text::shown(&crate::chain(&error), MESSAGE_MAX));
    let text = if terminal { text.replace('\n', "\r\n") } else { text };
    let stream = if terminal { StreamName::Stdout } else { StreamName::Stderr };
    let exit = Exit { code: error.exit_code().and_then(|code| u32::try_from(code).ok()).unwrap_or(126), at: None };
    let ends = [StreamName::Stdout, StreamName::Stderr].into_iter().take(if terminal { 1 } else { 2 });
    let mut answers = vec![answer(stream, text.as_bytes())];
    answers.extend(ends.map(|stream| answer(stream, &[])));
    answers.push(wire::ExecTaskStreamingResponse { exited: true, result: Some(result(&exit)), ..Default::default() });
    for answer in answers {
        if send.send(Ok(answer)).await.is_err() {
            return;
        }
    }
}

/// The last of both streams.
async fn collect(mut output: mpsc::Receiver<Answer>) -> (Vec<u8>, Vec<u8>) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    while let Some(Ok(answer)) = output.recv().await {
        for (kept, operation) in [(&mut stdout, answer.stdout), (&mut stderr, answer.stderr)] {
            kept.extend(operation.map(|operation| operation.data).unwrap_or_default());
            if kept.len() > 2 * KEPT {
                kept.drain(..kept.len() - KEPT);
            }
        }
    }
    for kept in [&mut stdout, &mut stderr] {
        kept.drain(..kept.len().saturating_sub(KEPT));
    }
    (stdout, stderr)
}

async fn converse(
    mut session: Session,
    requests: Streaming<wire::ExecTaskStreamingRequest>,
    send: mpsc::Sender<Answer>,
    terminal: bool,
) {
    let (typist, typed) = mpsc::channel(1);
    let input = Input { stdin: session.io.stdin.take(), typed };
    let drain = if terminal { TERMINAL } else { PIPES };
    let outcome = tokio::select! {
        outcome = pump(session, drain, input, send.clone()) => outcome,
        // Only a broken call ends the listening; a client that has no more to say does not.
        error = listen(requests, typist) => Err(error),
    };
    let last = outcome.map(|exit| wire::ExecTaskStreamingResponse {
        exited: true,
        result: Some(result(&exit)),
        ..Default::default()
    });
    let _ = send.send(last).await;
}

/// Reads what the client sends, until the call breaks.
async fn listen(
    mut requests: Streaming<wire::ExecTaskStreamingRequest>,
    input: mpsc::Sender<wire::ExecTaskStreamingRequest>,
) -> Status {
    loop {
        match requests.message().await {
            Ok(Some(request)) => {
                if input.send(request).await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            Ok(None) => std::future::pending().await,
            Err(status) => return status,
        }
    }
}

fn result(exit: &Exit) -> wire::ExitResult {
    wire::ExitResult { exit_code: i32::try_from(exit.code).unwrap_or(255), signal: 0, oom_killed: false }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StreamName {
    Stdout,
    Stderr,
}

/// Where a session's input comes from.
struct Input {
    stdin: Option<pipe::Sender>,
    typed: mpsc::Receiver<wire::ExecTaskStreamingRequest>,
}

/// Hands on a session's output, with a word at the end of each stream, until the process has gone and all it wrote was
/// taken.
async fn pump(session: Session, drain: Drain, input: Input, send: mpsc::Sender<Answer>) -> Result<Exit, Status> {
    let Session { exec, io } = session;
    let feeding = async {
        feed(&exec, input).await;
        std::future::pending::<Infallible>().await
    };
    // Side by side: a client that does not read for a while must not keep its own input from the process.
    let exit = tokio::select! {
        exit = hand_on(&exec, io, drain, &send) => exit?,
        never = feeding => match never {},
    };
    // The shim waits for the output's end before it answers this; nobody needs to wait with it.
    tokio::spawn(exec.finish());
    Ok(exit)
}

async fn hand_on(exec: &Exec, io: ExecIo, drain: Drain, send: &mpsc::Sender<Answer>) -> Result<Exit, Status> {
    let (mut stdout, mut stderr) = (Some(io.stdout), io.stderr);
    let (mut out, mut err) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut exit: Option<Exit> = None;
    let (mut quiet, mut limit) = (tokio::time::Instant::now(), tokio::time::Instant::now());
    let waiting = exec.wait();
    tokio::pin!(waiting);
    let exit = loop {
        if let (Some(exit), None, None) = (exit, &stdout, &stderr) {
            break exit;
        }
        let (stream, count) = tokio::select! {
            count = read(&mut stdout, &mut out), if stdout.is_some() => (StreamName::Stdout, count),
            count = read(&mut stderr, &mut err), if stderr.is_some() => (StreamName::Stderr, count),
            ended = &mut waiting, if exit.is_none() => {
                let broken = |error| status::new(Code::Unknown, &format!("exec: the task's shim died ({error})"));
                exit = Some(ended.map_err(broken)?);
                quiet = tokio::time::Instant::now();
                limit = quiet + drain.at_most;
                continue;
            }
            () = tokio::time::sleep_until(limit.min(quiet + drain.silence)), if exit.is_some() => match exit {
                Some(exit) => break exit,
                None => continue,
            },
        };
        let bytes = if stream == StreamName::Stdout { &out[..count] } else { &err[..count] };
        let began = tokio::time::Instant::now();
        if send.send(Ok(answer(stream, bytes))).await.is_err() {
            // Nobody is there any more; the session's end kills the process.
            return Err(Status::aborted("exec: the client has left"));
        }
        // A client that is slow to take it is not silence of the process.
        quiet = tokio::time::Instant::now();
        limit += began.elapsed();
        match (stream, count) {
            (StreamName::Stdout, 0) => stdout = None,
            (StreamName::Stderr, 0) => stderr = None,
            _ => {}
        }
    };
    // Streams that somebody else keeps open.
    for (stream, open) in [(StreamName::Stdout, stdout.is_some()), (StreamName::Stderr, stderr.is_some())] {
        if open {
            let _ = send.send(Ok(answer(stream, &[]))).await;
        }
    }
    Ok(exit)
}

/// A piece of output; the empty one is the end of its stream.
fn answer(stream: StreamName, bytes: &[u8]) -> wire::ExecTaskStreamingResponse {
    let operation = Some(Operation { data: bytes.to_vec(), close: bytes.is_empty() });
    match stream {
        StreamName::Stdout => wire::ExecTaskStreamingResponse { stdout: operation, ..Default::default() },
        StreamName::Stderr => wire::ExecTaskStreamingResponse { stderr: operation, ..Default::default() },
    }
}

async fn read(stream: &mut Option<pipe::Receiver>, buffer: &mut [u8]) -> usize {
    match stream {
        Some(stream) => stream.read(buffer).await.unwrap_or(0),
        None => std::future::pending().await,
    }
}

/// Hands on what the client types, sizes and closes.
async fn feed(exec: &Exec, input: Input) {
    let Input { mut stdin, mut typed } = input;
    while let Some(request) = typed.recv().await {
        if let Some(size) = request.tty_size {
            let length = |length: i32| u32::try_from(length).unwrap_or(0);
            let size = WindowSize { width: length(size.width), height: length(size.height) };
            if let Err(error) = exec.resize(size).await {
                tracing::debug!(%error, "resize");
            }
        }
        let Some(operation) = request.stdin else { continue };
        if let Some(pipe) = &mut stdin
            && !operation.data.is_empty()
            && let Err(error) = pipe.write_all(&operation.data).await
        {
            tracing::debug!(%error, "the exec'd process takes no more input");
        }
        if operation.close
            && stdin.take().is_some()
            && let Err(error) = exec.close_input().await
        {
            tracing::debug!(%error, "close stdin");
        }
    }
}
