//! ExecTask and ExecTaskStreaming: data passes between the pipes of an exec'd process and Nomad's messages.

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
    task::{Engine, Exec, ExecError, ExecIo, ExecRequest, ExecSession, Exit, TaskError, WindowSize},
    text::{self, MESSAGE_MAX},
};

/// ExecTask returns this many bytes of the end of each output stream; Nomad's own drivers return 4 KiB.
const EXEC_OUTPUT_MAX: usize = 1 << 20;
/// The most bytes of output in one message.
const OUTPUT_CHUNK_MAX: usize = 32 << 10;
/// How long output is still read after a process has ended, while its children keep the stream open.
#[derive(Debug, Clone, Copy)]
struct DrainLimits {
    /// Reading stops when no output has arrived for this long.
    idle_timeout: Duration,
    /// Reading stops after this time, however much output still arrives.
    max_duration: Duration,
}

/// Without a terminal, output is read to its end. Reading also ends when no output arrives for a while, because a
/// daemon that the command has started must not block the caller.
const PIPE_DRAIN: DrainLimits = DrainLimits { idle_timeout: Duration::from_secs(2), max_duration: NO_LIMIT };
/// With a terminal, the session ends when the process ends (Nomad's contract); only the process's last output is still
/// read.
const TERMINAL_DRAIN: DrainLimits =
    DrainLimits { idle_timeout: Duration::from_millis(200), max_duration: Duration::from_secs(1) };

/// No limit. It is a year, because `Instant` arithmetic needs a finite duration.
const NO_LIMIT: Duration = Duration::from_secs(365 * 24 * 3600);

type Answer = Result<wire::ExecTaskStreamingResponse, Status>;

/// Runs a command without input until it ends, and returns its output and exit code.
///
/// # Errors
/// When the command can't be run, or does not end within its timeout; it is killed then.
pub(crate) async fn run(
    engine: &Engine,
    id: TaskId,
    request: wire::ExecTaskRequest,
) -> Result<wire::ExecTaskResponse, Status> {
    let timeout = convert::duration(request.timeout);
    let shown = request.command.join(" ");
    // Without a pipe, the shim would give the process the host's /dev/null. crun makes the task's user the owner of its
    // standard streams, and an owner may change the mode.
    let wanted = ExecRequest { command: request.command, terminal: false, stdin: true };
    let work = async {
        let mut session = engine.exec(&id, &wanted).await.map_err(|error| status::from_task_error(&error))?;
        drop(session.io.stdin.take());
        if let Err(error) = session.exec.close_input().await {
            tracing::debug!(%error, "could not close the standard input of an exec'd process");
        }
        let (_no_requests, requests) = mpsc::channel(1);
        let input = Input { stdin: None, requests };
        let (send, output) = mpsc::channel(4);
        let (exit, (stdout, stderr)) = tokio::join!(pump(session, PIPE_DRAIN, input, send), collect(output));
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

/// Runs a command with an interactive client; returns once the command has started.
///
/// # Errors
/// When the command can't be started.
pub(crate) async fn stream(
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
            tokio::spawn(report_start_failure(send, setup.tty, error));
            return Ok(receive);
        }
        Err(error) => return Err(status::from_task_error(&error)),
    };
    tokio::spawn(async move {
        let gone = send.clone();
        tokio::select! {
            () = run_session(session, requests, send, setup.tty) => {}
            // The client has disconnected: dropping the session kills the process.
            () = gone.closed() => {}
        }
    });
    Ok(receive)
}

/// Reports a command that does not exist or can't be executed as output of the session, with the exit code that a shell
/// would give. The agent shows an error of the call only as "unexpected EOF".
async fn report_start_failure(send: mpsc::Sender<Answer>, terminal: bool, error: ExecError) {
    let text = format!("{}\n", text::sanitize(&crate::error_chain(&error), MESSAGE_MAX));
    let text = if terminal { text.replace('\n', "\r\n") } else { text };
    let stream = if terminal { StreamName::Stdout } else { StreamName::Stderr };
    let exit =
        Exit { code: error.exit_code().and_then(|code| u32::try_from(code).ok()).unwrap_or(126), exited_at: None };
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

/// Collects both output streams, and keeps the last `EXEC_OUTPUT_MAX` bytes of each.
async fn collect(mut output: mpsc::Receiver<Answer>) -> (Vec<u8>, Vec<u8>) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    while let Some(Ok(answer)) = output.recv().await {
        for (kept, operation) in [(&mut stdout, answer.stdout), (&mut stderr, answer.stderr)] {
            kept.extend(operation.map(|operation| operation.data).unwrap_or_default());
            if kept.len() > 2 * EXEC_OUTPUT_MAX {
                kept.drain(..kept.len() - EXEC_OUTPUT_MAX);
            }
        }
    }
    for kept in [&mut stdout, &mut stderr] {
        kept.drain(..kept.len().saturating_sub(EXEC_OUTPUT_MAX));
    }
    (stdout, stderr)
}

/// Passes on input and output of an interactive session, and sends its result.
async fn run_session(
    mut session: ExecSession,
    requests: Streaming<wire::ExecTaskStreamingRequest>,
    send: mpsc::Sender<Answer>,
    terminal: bool,
) {
    let (input_sender, input_requests) = mpsc::channel(1);
    let input = Input { stdin: session.io.stdin.take(), requests: input_requests };
    let drain = if terminal { TERMINAL_DRAIN } else { PIPE_DRAIN };
    let outcome = tokio::select! {
        outcome = pump(session, drain, input, send.clone()) => outcome,
        // This future ends only when the call breaks, not when the client closes its side of the stream.
        error = forward_requests(requests, input_sender) => Err(error),
    };
    let last = outcome.map(|exit| wire::ExecTaskStreamingResponse {
        exited: true,
        result: Some(result(&exit)),
        ..Default::default()
    });
    let _ = send.send(last).await;
}

/// Forwards the client's messages until the call breaks, and returns the call's error.
async fn forward_requests(
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

/// A session's input: the process's standard input, and the client's messages that are written to it.
struct Input {
    stdin: Option<pipe::Sender>,
    requests: mpsc::Receiver<wire::ExecTaskStreamingRequest>,
}

/// Passes on a session's input and output, with a closing message for each output stream, until the process has ended
/// and the client has taken all of its output.
async fn pump(
    session: ExecSession,
    drain: DrainLimits,
    input: Input,
    send: mpsc::Sender<Answer>,
) -> Result<Exit, Status> {
    let ExecSession { exec, io } = session;
    let relaying_input = async {
        relay_input(&exec, input).await;
        std::future::pending::<Infallible>().await
    };
    // Input and output run concurrently: a client that does not read for a while must not delay its own input.
    let exit = tokio::select! {
        exit = relay_output(&exec, io, drain, &send) => exit?,
        never = relaying_input => match never {},
    };
    // The shim deletes the process only after its output has ended. The client need not wait for that.
    tokio::spawn(exec.finish());
    Ok(exit)
}

/// Passes on a session's output until the process has ended and its output is drained; returns how the process ended.
async fn relay_output(
    exec: &Exec,
    io: ExecIo,
    drain: DrainLimits,
    send: &mpsc::Sender<Answer>,
) -> Result<Exit, Status> {
    let (mut stdout, mut stderr) = (Some(io.stdout), io.stderr);
    let (mut out, mut err) = (vec![0; OUTPUT_CHUNK_MAX], vec![0; OUTPUT_CHUNK_MAX]);
    let mut exit: Option<Exit> = None;
    let (mut last_output, mut deadline) = (tokio::time::Instant::now(), tokio::time::Instant::now());
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
                last_output = tokio::time::Instant::now();
                deadline = last_output + drain.max_duration;
                continue;
            }
            () = tokio::time::sleep_until(deadline.min(last_output + drain.idle_timeout)), if exit.is_some() => {
                match exit {
                    Some(exit) => break exit,
                    None => continue,
                }
            }
        };
        let bytes = if stream == StreamName::Stdout { &out[..count] } else { &err[..count] };
        let began = tokio::time::Instant::now();
        if send.send(Ok(answer(stream, bytes))).await.is_err() {
            // The caller drops the session, which kills the process.
            return Err(Status::aborted("exec: the client has disconnected"));
        }
        // The time that a slow client takes to read does not count as time without output.
        last_output = tokio::time::Instant::now();
        deadline += began.elapsed();
        match (stream, count) {
            (StreamName::Stdout, 0) => stdout = None,
            (StreamName::Stderr, 0) => stderr = None,
            _ => {}
        }
    };
    // The client gets a closing message for the streams that other processes still have open.
    for (stream, open) in [(StreamName::Stdout, stdout.is_some()), (StreamName::Stderr, stderr.is_some())] {
        if open {
            let _ = send.send(Ok(answer(stream, &[]))).await;
        }
    }
    Ok(exit)
}

/// Makes a message of a piece of output; an empty piece closes its stream.
fn answer(stream: StreamName, bytes: &[u8]) -> wire::ExecTaskStreamingResponse {
    let operation = Some(Operation { data: bytes.to_vec(), close: bytes.is_empty() });
    match stream {
        StreamName::Stdout => wire::ExecTaskStreamingResponse { stdout: operation, ..Default::default() },
        StreamName::Stderr => wire::ExecTaskStreamingResponse { stderr: operation, ..Default::default() },
    }
}

/// Reads from a stream, and returns 0 at its end and on an error. Never returns if there is no stream.
async fn read(stream: &mut Option<pipe::Receiver>, buffer: &mut [u8]) -> usize {
    match stream {
        Some(stream) => stream.read(buffer).await.unwrap_or(0),
        None => std::future::pending().await,
    }
}

/// Passes on the client's input, window sizes and end of input.
async fn relay_input(exec: &Exec, input: Input) {
    let Input { mut stdin, mut requests } = input;
    while let Some(request) = requests.recv().await {
        if let Some(size) = request.tty_size {
            let length = |length: i32| u32::try_from(length).unwrap_or(0);
            let size = WindowSize { width: length(size.width), height: length(size.height) };
            if let Err(error) = exec.resize(size).await {
                tracing::debug!(%error, "could not resize the terminal of an exec'd process");
            }
        }
        let Some(operation) = request.stdin else { continue };
        if let Some(pipe) = &mut stdin
            && !operation.data.is_empty()
            && let Err(error) = pipe.write_all(&operation.data).await
        {
            tracing::debug!(%error, "could not write to the standard input of an exec'd process");
        }
        if operation.close
            && stdin.take().is_some()
            && let Err(error) = exec.close_input().await
        {
            tracing::debug!(%error, "could not close the standard input of an exec'd process");
        }
    }
}
