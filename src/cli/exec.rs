//! `exec`: runs a further process in a task, through the task's shim. Neither the agent nor the plugin takes part.

use std::{
    io::IsTerminal as _,
    os::fd::AsFd as _,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use clap::Args;
use nix::sys::termios::{self, SetArg, Termios};
use tokio::{
    io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::unix::pipe,
    signal::unix::{SignalKind, signal},
};

use super::{CliError, CommonArgs, print_message, tasks};
use crate::task::{self, ExecIo, ExecRequest, ExecSession, Exit, WindowSize, exec_without_engine};

/// If no output arrives for this long after the process's exit, the output counts as complete.
const OUTPUT_SILENCE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the shim may take to say that a process has ended.
const ENDED_TIMEOUT: Duration = Duration::from_secs(1);

/// Run a command in a task
#[derive(Args, Debug)]
pub(crate) struct Exec {
    /// Give the command a terminal
    #[arg(long, short)]
    tty: bool,
    /// Pass standard input on to the command
    #[arg(long, short)]
    interactive: bool,
    /// The task: its id, its name, its container's id, or the beginning of its allocation's id
    task: String,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

/// Restores the terminal's settings when it is dropped.
struct RawModeGuard(Termios);

impl Drop for RawModeGuard {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(std::io::stdin().as_fd(), SetArg::TCSANOW, &self.0);
    }
}

/// Puts the terminal at standard input into raw mode. Returns `None` if that fails.
fn enter_raw_mode() -> Option<RawModeGuard> {
    let stdin = std::io::stdin();
    let before = termios::tcgetattr(stdin.as_fd()).ok()?;
    let mut raw = before.clone();
    termios::cfmakeraw(&mut raw);
    termios::tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw).ok()?;
    Some(RawModeGuard(before))
}

/// Returns the size of the terminal at standard output, if there is a terminal.
fn window_size() -> Option<WindowSize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel fills a structure that this function owns.
    let done = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    (done == 0).then(|| WindowSize { width: size.ws_col.into(), height: size.ws_row.into() })
}

impl Exec {
    /// Runs the command, and returns its exit code.
    ///
    /// # Errors
    /// Fails when the command can't be run.
    pub(crate) async fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        let found = tasks::find_task(common, &self.task)?;
        let request = ExecRequest { command: self.command, terminal: self.tty, stdin: self.interactive };
        let session = exec_without_engine(&found.places, &found.record, &request).await?;
        let _raw = if self.tty && self.interactive && std::io::stdin().is_terminal() { enter_raw_mode() } else { None };
        let ExecSession { exec, io } = session;
        if self.tty
            && let Some(size) = window_size()
            && let Err(error) = exec.resize(size).await
            && !has_ended(&exec).await
        {
            print_message(&format!("nomad-driver-shim: could not resize the terminal: {}", crate::error_chain(&error)));
        }
        match relay_until_exit(&exec, io, self.tty).await? {
            Some(exit) => {
                exec.finish().await;
                Ok(u8::try_from(exit.code).unwrap_or(super::CLI_ERROR_CODE))
            }
            None => {
                exec.kill().await;
                Err(CliError::Interrupted)
            }
        }
    }
}

/// Tells whether the process has ended: a terminal whose process is gone can't be resized, and need not be.
async fn has_ended(exec: &task::Exec) -> bool {
    tokio::time::timeout(ENDED_TIMEOUT, exec.wait()).await.is_ok()
}

/// Passes on the process's streams and the size of the terminal until the process ends. Returns `None` if this command
/// must end first: because of a signal, or because the reader of its output has ended.
async fn relay_until_exit(exec: &task::Exec, io: ExecIo, tty: bool) -> Result<Option<Exit>, CliError> {
    let mut window_changes = signal(SignalKind::window_change())?;
    let mut termination_signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()]
        .map(signal)
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let flow = OutputFlow::default();
    let out = copy(Some(io.stdout), tokio::io::stdout(), &flow);
    let err = copy(io.stderr, tokio::io::stderr(), &flow);
    let output = async { tokio::try_join!(out, err) };
    let (input, waiting) = (relay_stdin(io.stdin), exec.wait());
    let terminated = async {
        futures_util::future::select_all(termination_signals.iter_mut().map(|end| Box::pin(end.recv()))).await
    };
    tokio::pin!(output, input, waiting, terminated);
    let (mut input_ended, mut drained) = (false, false);
    loop {
        tokio::select! {
            exit = &mut waiting => {
                // All output of the process is printed, even if this command's reader is slow. The wait ends when no
                // further output comes: children of the process may keep the stream open without writing.
                if !drained {
                    tokio::select! {
                        _ = &mut output => {}
                        _ = &mut terminated => return Ok(None),
                        () = wait_for_silence(&flow) => {}
                    }
                }
                let exit = exit.map_err(|error| CliError::Usage(format!("the task's shim died: {}", crate::error_chain(&error))))?;
                return Ok(Some(exit));
            }
            read = &mut output, if !drained => match read {
                Ok(_) => drained = true,
                // The reader of this command's output has ended (`exec ... | head`).
                Err(_) => return Ok(None),
            },
            _ = &mut terminated => return Ok(None),
            () = &mut input, if !input_ended => {
                input_ended = true;
                if let Err(error) = exec.close_input().await {
                    tracing::debug!(
                        error = %crate::error_chain(&error),
                        "could not close the standard input of the process"
                    );
                }
            }
            _ = window_changes.recv(), if tty => {
                if let Some(size) = window_size() {
                    let _ = exec.resize(size).await;
                }
            }
        }
    }
}

/// The output that this command passes on: the number of pieces so far, and the number of those that are being written.
#[derive(Default)]
struct OutputFlow {
    pieces: AtomicU64,
    writing: AtomicU64,
}

/// Returns when no output has arrived for `OUTPUT_SILENCE_TIMEOUT`, and none waits to be written.
async fn wait_for_silence(flow: &OutputFlow) {
    loop {
        let before = flow.pieces.load(Ordering::Relaxed);
        tokio::time::sleep(OUTPUT_SILENCE_TIMEOUT).await;
        if flow.pieces.load(Ordering::Relaxed) == before && flow.writing.load(Ordering::Relaxed) == 0 {
            return;
        }
    }
}

/// Writes everything that can be read from `from` to `to`, until the end of `from`.
async fn copy(from: Option<pipe::Receiver>, mut to: impl AsyncWrite + Unpin, flow: &OutputFlow) -> std::io::Result<()> {
    let Some(mut from) = from else { return Ok(()) };
    let mut buffer = vec![0; 32 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        flow.pieces.fetch_add(1, Ordering::Relaxed);
        flow.writing.fetch_add(1, Ordering::Relaxed);
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
        flow.writing.fetch_sub(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Passes this command's standard input on to the process.
async fn relay_stdin(to: Option<pipe::Sender>) {
    let Some(mut to) = to else { return std::future::pending().await };
    let (mut stdin, mut buffer) = (tokio::io::stdin(), vec![0; 4 << 10]);
    while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
