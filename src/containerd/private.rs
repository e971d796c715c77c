//! A containerd of our own, for a host that has none running: generated configuration, own root, state and socket.
//!
//! Several programs share one: each holds a shared lock on the directory while it uses the daemon, the first starts
//! it, and the last ends it. The store stays.

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
    places::{create_private, make_dir, open_lock, write_private},
    process::command,
};

/// Bolt and the plugins are up in well under a second; a cold disk takes longer.
const START: Duration = Duration::from_secs(30);
/// After SIGTERM.
const STOP: Duration = Duration::from_secs(10);

/// Why a private containerd could not be had.
#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    /// A file or directory of it.
    #[error("private containerd: {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The program.
    #[error("private containerd: start {program:?}; install containerd, or name a running one with --address")]
    Spawn {
        /// Which.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// It ended or never answered.
    #[error("private containerd did not come up; its log is {log}")]
    Silent {
        /// Where to look.
        log: PathBuf,
        /// The last answer.
        source: ContainerdError,
    },
}

/// A hold on the private containerd below one directory. Ended with `release`.
#[derive(Debug)]
pub struct Hold {
    lock: Option<Flock<File>>,
    run: PathBuf,
}

impl Hold {
    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        socket(&self.run)
    }

    /// Ends our use; the daemon stops if nobody else uses it.
    pub async fn release(mut self) {
        let Some(lock) = self.lock.take() else { return };
        if let Ok(mine) = lock
            .unlock()
            .map_err(|(_, errno)| errno)
            .and_then(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno))
        {
            stop(&self.run).await;
            drop(mine);
        }
    }
}

fn socket(run: &Path) -> PathBuf {
    run.join("containerd.sock")
}

/// The configuration: no CRI, no metrics, everything below our own directories.
fn configuration(root: &Path, run: &Path) -> String {
    format!(
        "version = 2\nroot = {root:?}\nstate = {state:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\n  address = {socket:?}\n[ttrpc]\n  address = {ttrpc:?}\n",
        state = run.join("state"),
        socket = socket(run),
        ttrpc = run.join("containerd.sock.ttrpc"),
    )
}

/// Starts the private containerd with its store in `root` and its sockets in `run`, or joins the one that runs.
///
/// # Errors
/// When it can't be started or does not answer.
pub async fn hold(root: &Path, run: &Path) -> Result<Hold, PrivateError> {
    let file = |path: &Path| {
        let path = path.to_owned();
        move |source| PrivateError::File { path, source }
    };
    make_dir(root).map_err(file(root))?;
    make_dir(run).map_err(file(run))?;
    let path = run.join("lock");
    loop {
        let shared = lock(&path, FlockArg::LockShared).await?;
        if client(run).version().await.is_ok() {
            return Ok(Hold { lock: Some(shared), run: run.to_owned() });
        }
        // Nobody there, or somebody is just ending it. Starting is for one at a time, with nobody else using it.
        drop(shared);
        let exclusive = lock(&path, FlockArg::LockExclusive).await?;
        if client(run).version().await.is_err() {
            start(root, run).await?;
        }
        // Between this lock and the next a last user may end the daemon again; then it is started once more.
        drop(exclusive);
    }
}

/// Waits for the lock off the runtime's workers: another program may be starting the daemon right now.
async fn lock(path: &Path, how: FlockArg) -> Result<Flock<File>, PrivateError> {
    let failed = |source| PrivateError::File { path: path.to_owned(), source };
    let handle = open_lock(path).map_err(failed)?;
    let locked = tokio::task::spawn_blocking(move || Flock::lock(handle, how).map_err(|(_, errno)| errno)).await;
    locked.map_err(|join| failed(io::Error::other(join)))?.map_err(|errno| failed(errno.into()))
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
    // Its own process group: Ctrl-C at the terminal is for the command, which ends the daemon itself when it leaves.
    let mut child = command(program)
        .arg("--config")
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .process_group(0)
        .spawn()
        .map_err(|source| PrivateError::Spawn { program: program.to_owned(), source })?;
    let up = wait_until_up(run, &mut child, &log_path).await;
    if up.is_err() {
        let _ = child.kill();
    }
    // Reaped here for as long as we live; it may well outlive us.
    std::thread::spawn(move || child.wait());
    up
}

async fn wait_until_up(run: &Path, child: &mut std::process::Child, log: &Path) -> Result<(), PrivateError> {
    let pid = run.join("pid");
    write_private(&pid, child.id().to_string().as_bytes())
        .map_err(|source| PrivateError::File { path: pid, source })?;
    let client = client(run);
    let deadline = tokio::time::Instant::now() + START;
    loop {
        let Err(source) = client.version().await else { return Ok(()) };
        let ended = matches!(child.try_wait(), Ok(Some(_)));
        if ended || tokio::time::Instant::now() > deadline {
            return Err(PrivateError::Silent { log: log.to_owned(), source });
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Ends the daemon whose pid we recorded, after checking that it is the one.
async fn stop(run: &Path) {
    let Ok(pid) = fs::read_to_string(run.join("pid")).unwrap_or_default().parse::<i32>() else { return };
    let ours = fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.windows(run.as_os_str().len()).any(|part| part == run.as_os_str().as_encoded_bytes()));
    if !ours {
        return;
    }
    let pid = Pid::from_raw(pid);
    let _ = kill(pid, Signal::SIGTERM);
    let deadline = tokio::time::Instant::now() + STOP;
    while fs::metadata(format!("/proc/{pid}/cmdline")).is_ok() && kill(pid, None).is_ok() {
        if tokio::time::Instant::now() > deadline {
            tracing::warn!(%pid, "the private containerd ignores SIGTERM");
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let _ = fs::remove_file(run.join("pid"));
}
