//! The streams of an exec'd process: anonymous pipes, which a shim opens by their names below `/proc`. Nothing is left
//! on disk, however this process ends.

use std::{io, os::fd::AsRawFd as _, os::fd::OwnedFd};

use nix::{fcntl::OFlag, unistd::pipe2};
use tokio::net::unix::pipe;

/// One pipe. This process uses one end; the other end keeps the pipe's name valid until the shim has opened it.
#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        // O_NONBLOCK holds for the open file descriptions of this process; the shim opens its own.
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Self { read, write })
    }
}

/// The pipes of an exec'd process before the shim has opened them.
#[derive(Debug)]
pub struct ExecPipes {
    stdin: Option<Pipe>,
    stdout: Pipe,
    stderr: Option<Pipe>,
}

/// This process's ends of the pipes of an exec'd process.
#[derive(Debug)]
pub struct ExecIo {
    /// The write end of the process's standard input; `None` without input.
    pub stdin: Option<pipe::Sender>,
    /// The read end of the process's standard output; with a terminal, of all its output.
    pub stdout: pipe::Receiver,
    /// The read end of the process's standard error; `None` with a terminal.
    pub stderr: Option<pipe::Receiver>,
    /// The read end of the process's standard input. The shim opens its own in the background, some time after it has
    /// reported that the process runs. Until then, this descriptor keeps the pipe and its content alive.
    _stdin_reader: Option<OwnedFd>,
}

impl ExecPipes {
    /// Creates the pipes. A process with a terminal has no separate standard error.
    ///
    /// # Errors
    /// Fails when no file descriptors are left.
    pub fn new(stdin: bool, terminal: bool) -> io::Result<Self> {
        let pipe_if = |wanted: bool| wanted.then(Pipe::new).transpose();
        Ok(Self { stdin: pipe_if(stdin)?, stdout: Pipe::new()?, stderr: pipe_if(!terminal)? })
    }

    /// Returns the paths of stdin, stdout and stderr that the shim opens; a path is empty if there is no such stream.
    pub fn paths(&self) -> [String; 3] {
        let path = |fd: &OwnedFd| format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
        [
            self.stdin.as_ref().map(|pipe| path(&pipe.read)).unwrap_or_default(),
            path(&self.stdout.write),
            self.stderr.as_ref().map(|pipe| path(&pipe.write)).unwrap_or_default(),
        ]
    }

    /// Closes the shim's ends in this process once the shim has opened the pipes, so that the end of the output can be
    /// seen here.
    ///
    /// # Errors
    /// Fails when this process's ends can't be registered with tokio.
    pub fn into_io(self) -> io::Result<ExecIo> {
        let (write, read) = self.stdin.map(|pipe| (pipe.write, pipe.read)).unzip();
        Ok(ExecIo {
            stdin: write.map(pipe::Sender::from_owned_fd).transpose()?,
            _stdin_reader: read,
            stdout: pipe::Receiver::from_owned_fd(self.stdout.read)?,
            stderr: self.stderr.map(|pipe| pipe::Receiver::from_owned_fd(pipe.read)).transpose()?,
        })
    }
}
