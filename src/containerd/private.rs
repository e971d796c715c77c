//! A private containerd, for a host on which none is running. It has a generated configuration and a root, state and
//! socket of its own.
//!
//! Several programs may share one private containerd. Each has a shared lock on the directory while it uses the daemon.
//! The first program starts the daemon, and the last one stops it. The store remains.

use std::{
    fs::{self, File},
    io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{Client, ContainerdError};
use crate::{
    files::{create_private, create_private_dir, open_lock_file, write_private},
    process::command,
};

/// The time within which the daemon must answer its first call. Usually it takes well under a second, and longer when
/// its program and database are not in the page cache.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// The time within which the daemon must exit after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// The time within which another program must release its lock. A program that starts or stops the daemon takes no
/// longer.
const LOCK_TIMEOUT: Duration = Duration::from_secs(45);
/// The interval at which the lock is tried.
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// The reason why a private containerd could not be started or joined.
#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    /// An operation on a file or directory of the daemon failed.
    #[error("could not use {path} for a private containerd")]
    File {
        /// The path of the file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The daemon's program could not be started.
    #[error(
        "could not start {program:?} as a private containerd; install containerd, or name a running one with --address"
    )]
    Spawn {
        /// The program.
        program: String,
        /// The cause.
        source: io::Error,
    },
    /// Another program uses the daemon, which does not answer, or that program takes too long to start or stop it.
    #[error(
        "another program has locked {path} for {} s, and its containerd does not answer; end that program, or name a running containerd with --address",
        after.as_secs()
    )]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// How long this program has waited.
        after: Duration,
    },
    /// The daemon exited, or did not answer in time.
    #[error("the private containerd did not start; its log is {log}")]
    DidNotStart {
        /// The daemon's log.
        log: PathBuf,
        /// The error of the last call to the daemon.
        source: ContainerdError,
    },
}

/// A hold on the private containerd below one directory. It keeps the daemon running until `release` is called.
#[derive(Debug)]
pub struct DaemonHold {
    lock: Option<Flock<File>>,
    run: PathBuf,
}

impl DaemonHold {
    /// Returns the path of the daemon's socket.
    pub fn socket(&self) -> PathBuf {
        socket(&self.run)
    }

    /// Releases the hold. The daemon is stopped if no other program uses it.
    pub async fn release(mut self) {
        let Some(lock) = self.lock.take() else { return };
        if let Ok(exclusive) = lock
            .unlock()
            .map_err(|(_, errno)| errno)
            .and_then(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno))
        {
            stop(&self.run).await;
            drop(exclusive);
        }
    }
}

fn socket(run: &Path) -> PathBuf {
    run.join("containerd.sock")
}

/// Returns the daemon's configuration: no CRI, no metrics, and all files below the directories `root` and `run`.
fn configuration(root: &Path, run: &Path) -> String {
    format!(
        "version = 2\nroot = {root:?}\nstate = {state:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\n  address = {socket:?}\n[ttrpc]\n  address = {ttrpc:?}\n",
        state = run.join("state"),
        socket = socket(run),
        ttrpc = run.join("containerd.sock.ttrpc"),
    )
}

/// Starts the private containerd with its store in `root` and its sockets in `run`, or joins one that is running.
///
/// # Errors
/// Fails when the daemon can't be started or does not answer.
pub async fn acquire(root: &Path, run: &Path) -> Result<DaemonHold, PrivateError> {
    acquire_within(root, run, LOCK_TIMEOUT).await
}

async fn acquire_within(root: &Path, run: &Path, limit: Duration) -> Result<DaemonHold, PrivateError> {
    let file = |path: &Path| {
        let path = path.to_owned();
        move |source| PrivateError::File { path, source }
    };
    create_private_dir(root).map_err(file(root))?;
    create_private_dir(run).map_err(file(run))?;
    let path = run.join("lock");
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        // Another program holds the lock exclusively while it starts or stops the daemon, and shared while it uses it.
        if let Some(shared) = try_lock(&path, FlockArg::LockSharedNonblock)? {
            if client(run).version().await.is_ok() {
                return Ok(DaemonHold { lock: Some(shared), run: run.to_owned() });
            }
            // The daemon does not run. Only one program may start the daemon, and only while no other program uses it.
            drop(shared);
            if let Some(exclusive) = try_lock(&path, FlockArg::LockExclusiveNonblock)? {
                if client(run).version().await.is_err() {
                    start(root, run).await?;
                }
                // Before this function takes the shared lock again, another program may release its hold as the last
                // one and stop the daemon. The loop then starts the daemon once more.
                drop(exclusive);
                continue;
            }
        }
        if tokio::time::Instant::now() > deadline {
            return Err(PrivateError::Locked { path, after: limit });
        }
        tokio::time::sleep(LOCK_INTERVAL).await;
    }
}

/// Takes the lock, if that is possible at once. `how` must not block.
fn try_lock(path: &Path, how: FlockArg) -> Result<Option<Flock<File>>, PrivateError> {
    let failed = |source| PrivateError::File { path: path.to_owned(), source };
    let handle = open_lock_file(path).map_err(failed)?;
    match Flock::lock(handle, how) {
        Ok(locked) => Ok(Some(locked)),
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(failed(errno.into())),
    }
}

fn client(run: &Path) -> Client {
    Client::new(&socket(run), "default", "overlayfs")
}

async fn start(root: &Path, run: &Path) -> Result<(), PrivateError> {
    let config = run.join("config.toml");
    let log_path = run.join("containerd.log");
    let file = |path: &Path| {
        let path = path.to_owned();
        move |source| PrivateError::File { path, source }
    };
    write_private(&config, configuration(root, run).as_bytes()).map_err(file(&config))?;
    let log = create_private(&log_path).map_err(file(&log_path))?;
    let program = "containerd";
    // The daemon gets a process group of its own: Ctrl-C at the terminal is meant for this program, which stops the
    // daemon itself when it exits.
    let mut child = command(program)
        .arg("--config")
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .process_group(0)
        .spawn()
        .map_err(|source| PrivateError::Spawn { program: program.to_owned(), source })?;
    let started = wait_until_started(run, &mut child, &log_path).await;
    if started.is_err() {
        let _ = child.kill();
    }
    // The thread reaps the daemon if it exits before this program; the daemon may also outlive it.
    std::thread::spawn(move || child.wait());
    started
}

/// Writes the daemon's pid file and waits until the daemon answers.
async fn wait_until_started(run: &Path, child: &mut std::process::Child, log: &Path) -> Result<(), PrivateError> {
    let pid = run.join("pid");
    write_private(&pid, child.id().to_string().as_bytes())
        .map_err(|source| PrivateError::File { path: pid, source })?;
    let client = client(run);
    let deadline = tokio::time::Instant::now() + START_TIMEOUT;
    loop {
        let Err(source) = client.version().await else { return Ok(()) };
        let ended = matches!(child.try_wait(), Ok(Some(_)));
        if ended || tokio::time::Instant::now() > deadline {
            return Err(PrivateError::DidNotStart { log: log.to_owned(), source });
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Stops the daemon of the recorded pid, after checking that the process is this daemon.
async fn stop(run: &Path) {
    let Ok(pid) = fs::read_to_string(run.join("pid")).unwrap_or_default().parse::<i32>() else { return };
    let is_private_daemon = fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.windows(run.as_os_str().len()).any(|part| part == run.as_os_str().as_encoded_bytes()));
    if !is_private_daemon {
        return;
    }
    let pid = Pid::from_raw(pid);
    let _ = kill(pid, Signal::SIGTERM);
    let deadline = tokio::time::Instant::now() + STOP_TIMEOUT;
    while fs::metadata(format!("/proc/{pid}/cmdline")).is_ok() && kill(pid, None).is_ok() {
        if tokio::time::Instant::now() > deadline {
            tracing::warn!(%pid, "the private containerd still runs some seconds after SIGTERM");
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let _ = fs::remove_file(run.join("pid"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lock_that_is_not_released_is_named() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("lock");
        // Another program uses a daemon that does not answer, or starts one that never comes up.
        for how in [FlockArg::LockSharedNonblock, FlockArg::LockExclusiveNonblock] {
            let held = try_lock(&path, how).expect("a lock file").expect("free");
            let acquired = acquire_within(directory.path(), directory.path(), Duration::from_millis(50)).await;
            let Err(error) = acquired else { panic!("no daemon runs") };
            assert!(matches!(&error, PrivateError::Locked { path: named, .. } if *named == path), "{error}");
            drop(held);
        }
    }
}
