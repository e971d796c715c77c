//! The streams of an exec'd process: anonymous pipes, which a shim opens by their names below `/proc`, so that nothing
//! is left on disk however we end.

use std::{io, os::fd::AsRawFd as _, os::fd::OwnedFd};

use nix::{fcntl::OFlag, unistd::pipe2};
use tokio::net::unix::pipe;

/// One pipe: the end we use, and the end that keeps its name valid until the shim has opened it.
#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        // Non-blocking is a property of our descriptions; the shim opens its own.
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Self { read, write })
    }
}

/// Pipes that wait for the shim to open them.
#[derive(Debug)]
pub struct ExecPipes {
    stdin: Option<Pipe>,
    stdout: Pipe,
    stderr: Option<Pipe>,
}

/// Our ends.
#[derive(Debug)]
pub struct ExecIo {
    /// What is written here, the process reads. None without input.
    pub stdin: Option<pipe::Sender>,
    /// What the process writes; with a terminal, all of it.
    pub stdout: pipe::Receiver,
    /// None with a terminal.
    pub stderr: Option<pipe::Receiver>,
    /// The shim opens its input in the background, some time after it has said that the process runs: until then this
    /// keeps the pipe, and what was written into it, alive.
    _input: Option<OwnedFd>,
}

impl ExecPipes {
    /// Makes them. A terminal has no stream for errors.
    ///
    /// # Errors
    /// When descriptors have run out.
    pub fn new(stdin: bool, terminal: bool) -> io::Result<Self> {
        let when = |wanted: bool| wanted.then(Pipe::new).transpose();
        Ok(Self { stdin: when(stdin)?, stdout: Pipe::new()?, stderr: when(!terminal)? })
    }

    /// What the shim is to open: stdin, stdout, stderr; empty for none.
    pub fn paths(&self) -> [String; 3] {
        let path = |fd: &OwnedFd| format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
        [
            self.stdin.as_ref().map(|pipe| path(&pipe.read)).unwrap_or_default(),
            path(&self.stdout.write),
            self.stderr.as_ref().map(|pipe| path(&pipe.write)).unwrap_or_default(),
        ]
    }

    /// The shim has opened them: closes its ends here, so that we see the end of its output.
    ///
    /// # Errors
    /// When our ends can't be watched.
    pub fn handed_over(self) -> io::Result<ExecIo> {
        let (write, read) = self.stdin.map(|pipe| (pipe.write, pipe.read)).unzip();
        Ok(ExecIo {
            stdin: write.map(pipe::Sender::from_owned_fd).transpose()?,
            _input: read,
            stdout: pipe::Receiver::from_owned_fd(self.stdout.read)?,
            stderr: self.stderr.map(|pipe| pipe::Receiver::from_owned_fd(pipe.read)).transpose()?,
        })
    }
}
