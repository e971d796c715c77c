//! Further processes in a running task (`nomad alloc exec`).
//!
//! The description of such a process is the task's own with another command in it, so the process has the task's user,
//! directory, environment, capabilities and limits. This module needs the task's record and its shim, but no engine.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Record, TaskError, sandbox_exec::SandboxExec, undo::RETRY_DELAYS};
use crate::{
    files::{create_private_dir, remove_file_if_exists, replace_private},
    ids::{ContainerId, random_hex},
    places::{Places, PlacesError, list_names},
    process::{PidFd, ProcessId, descendants, is_transient, none_if_vanished, parent_of},
    rootfs::{DEFAULT_TERM, KernelLimits, StringError},
    shim::{Client, ExecIo, ExecPipes, ExecProcess, Exit, ShimError, SignalTarget, WindowSize},
    text::quoted,
};

/// How long the driver waits for the end of a process after SIGKILL. Only a process that hangs in the kernel takes
/// longer.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How often the owner of an exec'd process is checked while it may be about to exit, ten times at most. Ten times this
/// interval is more than a plugin needs to exit once it has released its lock.
const OWNER_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A process can't be run in a task.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The request has no command.
    #[error("exec: the command is empty")]
    Empty,
    /// The kernel does not accept a string of the command or its environment.
    #[error("exec")]
    String(#[from] StringError),
    /// A file of the task's bundle can't be used: its description, or the marker of the process.
    #[error("exec: could not use {path}")]
    Bundle {
        /// The file.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// The pipes of the process can't be set up, usually because there are no descriptors left.
    #[error("exec: can't set up the pipes of the process")]
    Pipes(#[source] io::Error),
    /// The shim or the runtime failed.
    #[error("exec {}", quoted(.command))]
    Shim {
        /// The command that was to be run.
        command: String,
        /// The error of the shim or the runtime.
        source: ShimError,
    },
}

impl ExecError {
    /// Returns the exit code that shells and docker use when the runtime refuses a command: 127 for a command that does
    /// not exist, 126 for one that can't be run. `None` if the command is not at fault.
    pub fn exit_code(&self) -> Option<i32> {
        match self {
            Self::Shim { source: ShimError::Refused { message, .. }, .. } => Some(refusal_code(message).unwrap_or(126)),
            Self::String(_) => Some(126),
            _ => None,
        }
    }
}

/// Derives an exit code from the message of a runtime that refused a command: 127 if the command does not exist, 126 if
/// it may not be run. `None` if the message says neither.
pub fn refusal_code(message: &str) -> Option<i32> {
    let missing = ["no such file or directory", "not found in $PATH", "executable file not found", "executable file `"];
    if message.to_ascii_lowercase().contains("permission denied") {
        Some(126)
    } else {
        missing.iter().any(|text| message.contains(text)).then_some(127)
    }
}

/// A request to run a process in a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecRequest {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Whether the process gets a terminal.
    pub terminal: bool,
    /// Whether the process gets input.
    pub stdin: bool,
}

/// A process that was started in a task, and its streams.
#[derive(Debug)]
pub struct ExecSession {
    /// The process.
    pub exec: Exec,
    /// This side's ends of the process's streams.
    pub io: ExecIo,
}

/// A process that was started in a task. If it is dropped before `finish`, the process and its descendants are killed.
#[derive(Debug)]
pub struct Exec {
    client: Client,
    container: ContainerId,
    exec_id: String,
    marker: PathBuf,
    is_finished: bool,
}

/// Starts a process in the task of `record`. `client` is connected to the task's shim.
///
/// # Errors
/// When the process can't be started. Nothing is left of it then.
pub(crate) async fn start(
    client: &Client,
    places: &Places,
    record: &Record,
    request: &ExecRequest,
) -> Result<ExecSession, ExecError> {
    let command = request.command.first().filter(|command| !command.is_empty()).ok_or(ExecError::Empty)?;
    let config = places.bundle(&record.intent.container_id).join("config.json");
    let unusable = |path: &Path| {
        let path = path.to_owned();
        move |source| ExecError::Bundle { path, source }
    };
    let text = fs::read(&config).map_err(unusable(&config))?;
    let ProcessDescription { spec, oom_score } =
        describe_process(&text, request).map_err(|error| unusable(&config)(error.into()))?;
    let process = serde_json::from_slice(&spec).map_err(|error| unusable(&config)(error.into()))?;
    KernelLimits::of_this_process().check_process(&process)?;
    let pipes = ExecPipes::new(request.stdin, request.terminal).map_err(ExecError::Pipes)?;
    let [stdin, stdout, stderr] = pipes.paths();
    // The marker is written first: if this plugin dies, the next one finds the process by it.
    let (exec_id, execs) = (random_hex(8), places.execs(&record.intent.container_id));
    let marker = execs.join(&exec_id);
    let owner = ProcessId::of(std::process::id()).ok();
    let sandbox = record.intent.gvisor.then(|| SandboxExec::of(places, record, &exec_id));
    let marker_text = |process| json!(Marker { owner, process, sandbox: sandbox.clone() }).to_string();
    create_private_dir(&execs).and_then(|()| write_marker(&marker, &marker_text(None))).map_err(unusable(&marker))?;
    let id = record.intent.container_id.as_str();
    let mut exec = Exec {
        client: client.clone(),
        container: record.intent.container_id.clone(),
        exec_id,
        marker,
        is_finished: false,
    };
    let process = ExecProcess {
        id,
        exec_id: &exec.exec_id,
        terminal: request.terminal,
        stdin: &stdin,
        stdout: &stdout,
        stderr: &stderr,
        spec,
    };
    let started = async {
        client.exec(process).await?;
        client.start_exec(id, &exec.exec_id).await
    };
    let pid = match started.await {
        Ok(pid) => pid,
        Err(source @ ShimError::Refused { .. }) => {
            exec.remove_traces().await;
            return Err(ExecError::Shim { command: command.clone(), source });
        }
        Err(source) => {
            // The shim may still run the process, which then opens the pipes by the descriptor numbers that they have
            // in this process. So the pipes stay open until the process is killed.
            tokio::spawn(async move {
                exec.kill().await;
                drop(pipes);
            });
            return Err(ExecError::Shim { command: command.clone(), source });
        }
    };
    if let Ok(process) = ProcessId::of(pid)
        && let Err(error) = write_marker(&exec.marker, &marker_text(Some(process)))
    {
        tracing::warn!(path = %exec.marker.display(), %error, "could not write an exec'd process's pid to its marker");
    }
    set_oom_score(pid, oom_score);
    let io = pipes.into_io().map_err(ExecError::Pipes)?;
    Ok(ExecSession { exec, io })
}

/// Sets the `oom_score_adj` of a task's process, because runtimes leave some processes with the shim's value, which is
/// the agent's plus one. crun before 1.9 does so with a task's first process if the task's value is 0, and both crun
/// and runc do so with exec'd processes. An agent is often protected from the OOM killer; its tasks must not be.
pub(super) fn set_oom_score(pid: u32, score: i64) {
    if let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
        tracing::debug!(pid, %error, "could not set oom_score_adj of a process, which most likely has ended");
    }
}

/// Does the same as `start` for callers that have no engine, such as the command line.
///
/// # Errors
/// When the task's shim can't be reached, or the process can't be started.
pub async fn start_without_engine(
    places: &Places,
    record: &Record,
    request: &ExecRequest,
) -> Result<ExecSession, ExecError> {
    let command = request.command.first().cloned().unwrap_or_default();
    let client = connect_to_shim(places, record).await.map_err(|source| ExecError::Shim { command, source })?;
    start(&client, places, record, request).await
}

/// Sends a signal to a task's first process or, without a signal, kills all processes of the task. For callers that
/// have no engine, such as the command line.
///
/// # Errors
/// When the task's shim can't be reached or refuses.
pub async fn signal_without_engine(places: &Places, record: &Record, signal: Option<i32>) -> Result<(), TaskError> {
    let failed = |source| TaskError::Shim { doing: "send the signal", source };
    let client = connect_to_shim(places, record).await.map_err(failed)?;
    let target = if signal.is_some() { SignalTarget::Init } else { SignalTarget::All };
    client.kill(record.intent.container_id.as_str(), signal.unwrap_or(libc::SIGKILL), target).await.map_err(failed)
}

async fn connect_to_shim(places: &Places, record: &Record) -> Result<Client, ShimError> {
    Client::connect(&places.shim(&record.intent.shim).join("sock"), None).await
}

/// The description of a process that is to be run in a task.
struct ProcessDescription {
    /// The `process` object of the OCI runtime specification, as JSON.
    spec: Vec<u8>,
    oom_score: i64,
}

/// Describes the task's own process with another command.
fn describe_process(config: &[u8], request: &ExecRequest) -> serde_json::Result<ProcessDescription> {
    let mut config: Value = serde_json::from_slice(config)?;
    let mut process = config["process"].take();
    process["args"] = json!(request.command);
    process["terminal"] = json!(request.terminal);
    if let Some(fields) = process.as_object_mut() {
        // These describe the task's own command and terminal.
        fields.remove("commandLine");
        fields.remove("consoleSize");
    }
    if request.terminal
        && let Some(env) = process["env"].as_array_mut()
        && !env.iter().any(|entry| entry.as_str().is_some_and(|entry| entry.starts_with("TERM=")))
    {
        env.push(json!(DEFAULT_TERM));
    }
    Ok(ProcessDescription {
        spec: serde_json::to_vec(&process)?,
        oom_score: process["oomScoreAdj"].as_i64().unwrap_or(0),
    })
}

impl Exec {
    /// Waits for the end of the process.
    ///
    /// # Errors
    /// When the shim dies before the process.
    pub async fn wait(&self) -> Result<Exit, ShimError> {
        self.client.wait_exec(self.container.as_str(), &self.exec_id).await
    }

    /// Sets the size of the process's terminal.
    ///
    /// # Errors
    /// When the shim refuses.
    pub async fn resize(&self, size: WindowSize) -> Result<(), ShimError> {
        self.client.resize_exec(self.container.as_str(), &self.exec_id, size).await
    }

    /// Lets the process see the end of its input. The caller must close this side's end of the pipe before.
    ///
    /// # Errors
    /// When the shim refuses.
    pub async fn close_input(&self) -> Result<(), ShimError> {
        self.client.close_exec_input(self.container.as_str(), &self.exec_id).await
    }

    /// Kills the process and its descendants.
    pub async fn kill(mut self) {
        self.is_finished = true;
        kill_and_remove(&self.client, &self.container, &self.exec_id, &self.marker).await;
    }

    /// Removes all traces of a process that has ended and whose output was read. Its children may continue to run in
    /// the task.
    pub async fn finish(mut self) {
        self.remove_traces().await;
    }

    async fn remove_traces(&mut self) {
        self.is_finished = true;
        remove_traces(&self.client, &self.container, &self.exec_id, &self.marker).await;
    }
}

impl Drop for Exec {
    fn drop(&mut self) {
        if self.is_finished {
            return;
        }
        let (client, container) = (self.client.clone(), self.container.clone());
        let (exec_id, marker) = (self.exec_id.clone(), self.marker.clone());
        // Without a tokio runtime this plugin is shutting down, and the next one kills the process.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { kill_and_remove(&client, &container, &exec_id, &marker).await });
        }
    }
}

/// Lists the markers of the processes that were exec'd in a task: `execs` is their directory. As long as this plugin
/// has not exec'd a process in the task, all of them belong to other owners.
///
/// # Errors
/// When the directory can't be listed.
pub(crate) fn list_markers(execs: &Path) -> Result<Vec<PathBuf>, PlacesError> {
    Ok(list_names(execs)?.into_iter().map(|marker| execs.join(marker)).collect())
}

/// Kills those processes of the listed markers whose owners are gone. Such owners are usually earlier plugins. Markers
/// that could not be listed are listed again later. By then there may be markers of this process, but their owner is
/// alive. `shim` is the pid of the task's shim.
pub(crate) async fn kill_abandoned(
    client: Client,
    shim: u32,
    container: ContainerId,
    execs: PathBuf,
    mut listed: Result<Vec<PathBuf>, PlacesError>,
) {
    let mut pauses = RETRY_DELAYS.into_iter();
    let markers = loop {
        match (listed, pauses.next()) {
            (Ok(markers), _) => break markers,
            (Err(error), Some(pause)) => {
                tracing::warn!(
                    %container,
                    error = %crate::error_chain(&error),
                    "could not list the markers of exec'd processes; trying again later"
                );
                tokio::time::sleep(pause).await;
                listed = list_markers(&execs);
            }
            (Err(error), None) => {
                let error = crate::error_chain(&error);
                return tracing::error!(
                    %container,
                    error,
                    "could not list the markers of exec'd processes; those of an earlier plugin may keep running"
                );
            }
        }
    };
    for marker in markers {
        if !is_abandoned(&marker).await {
            continue;
        }
        let exec_id = marker.file_name().unwrap_or_default().to_string_lossy().into_owned();
        tracing::info!(%container, exec_id, "killing an exec'd process whose owner is gone");
        match find_unknown_to_shim(&marker, shim) {
            Ok(unknown) => {
                kill_and_remove(&client, &container, &exec_id, &marker).await;
                unknown.iter().for_each(|process| process.signal(libc::SIGKILL));
            }
            // The marker stays, so that the next plugin can kill the process.
            Err(error) => {
                tracing::warn!(%container, exec_id, %error, "could not look for the process of an interrupted exec");
            }
        }
    }
}

/// Finds the processes of an exec that was interrupted after its process had been created: the shim has killed the
/// runtime, and does not know the process.
///
/// # Errors
/// When the marker, the pid file or `/proc` can't be read.
fn find_unknown_to_shim(marker: &Path, shim: u32) -> io::Result<Vec<PidFd>> {
    if read_marker_or_default(marker)?.process.is_some() {
        return Ok(Vec::new());
    }
    let Some(path) = pid_file(marker) else { return Ok(Vec::new()) };
    let text = none_if_vanished(fs::read_to_string(path))?;
    let Some(pid) = text.and_then(|text| text.trim().parse().ok()) else { return Ok(Vec::new()) };
    let Some(process) = none_if_vanished(PidFd::open(pid))? else { return Ok(Vec::new()) };
    // The pid may have been reused. An exec'd process is a child of its shim, which inherits the children of runtimes.
    if none_if_vanished(parent_of(pid))? != Some(shim) {
        return Ok(Vec::new());
    }
    let mut found = open_descendants(pid)?;
    found.push(process);
    Ok(found)
}

/// Returns the file in the task's bundle to which a runtime writes the pid of an exec'd process, as its last act
/// (containerd, `cmd/containerd-shim-runc-v2/process/exec.go`).
fn pid_file(marker: &Path) -> Option<PathBuf> {
    let name = marker.file_name()?.to_str()?;
    Some(marker.parent()?.parent()?.join(format!("{name}.pid")))
}

/// The content of the marker file of an exec'd process.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Marker {
    /// The process that requested the exec: a plugin, or a command line.
    owner: Option<ProcessId>,
    /// The exec'd process, once it runs.
    process: Option<ProcessId>,
    /// The files by which the process is found in its sandbox, if the task runs in gVisor. On the host, there is only a
    /// runsc that waits for the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sandbox: Option<SandboxExec>,
}

/// Writes a marker. A reader sees the old text or the new one, never a part of one.
fn write_marker(marker: &Path, text: &str) -> io::Result<()> {
    // The draft is not in the directory itself, which is listed for markers.
    let name = marker.file_name().unwrap_or_default().to_string_lossy();
    let draft = marker.with_file_name("..").join(format!("exec-{name}.tmp"));
    Ok(replace_private(marker, &draft, text.as_bytes())?)
}

fn read_marker(marker: &Path) -> io::Result<Marker> {
    serde_json::from_slice(&fs::read(marker)?).map_err(Into::into)
}

/// Reads a marker. A marker that is gone or torn is an empty one.
///
/// # Errors
/// When the marker can't be read at the moment.
fn read_marker_or_default(marker: &Path) -> io::Result<Marker> {
    match read_marker(marker) {
        Err(error) if is_transient(&error) => Err(error),
        other => Ok(other.unwrap_or_default()),
    }
}

/// Says whether the owner of a marker is known to be gone. Waits a moment for the owner's exit, because a plugin that
/// has just handed over to this one exits soon.
async fn is_abandoned(marker: &Path) -> bool {
    for _ in 0..10 {
        match read_marker(marker) {
            // The exec is over already.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return false,
            Ok(marker) if marker.owner.is_none_or(|owner| owner.is_gone()) => return true,
            // The owner lives, or can't be checked at the moment.
            _ => tokio::time::sleep(OWNER_POLL_INTERVAL).await,
        }
    }
    false
}

/// Kills an exec'd process and its descendants, and removes its traces.
async fn kill_and_remove(client: &Client, container: &ContainerId, exec_id: &str, marker: &Path) {
    let content = read_marker_or_default(marker);
    if let Ok(Marker { sandbox: Some(sandbox), .. }) = &content {
        sandbox.kill(container).await;
    }
    let descendants = content.and_then(|content| match content.process {
        Some(process) if is_alive(&process)? => open_descendants(process.pid),
        _ => Ok(Vec::new()),
    });
    let killed = client.kill_exec(container.as_str(), exec_id).await;
    if killed.is_ok() {
        let ended = tokio::time::timeout(KILL_TIMEOUT, client.wait_exec(container.as_str(), exec_id)).await;
        if ended.is_err() {
            tracing::warn!(%container, exec_id, "an exec'd process survives SIGKILL");
        }
    }
    let descendants = descendants.map(|opened| opened.iter().for_each(|process| process.signal(libc::SIGKILL)));
    match (killed, descendants) {
        (Ok(()) | Err(ShimError::ConnectionLost { .. }), Ok(())) => {
            remove_traces(client, container, exec_id, marker).await;
        }
        // The marker stays, so that the next plugin can kill the processes.
        (Err(error), _) => tracing::warn!(%container, exec_id, %error, "could not kill an exec'd process"),
        (_, Err(error)) => {
            tracing::warn!(%container, exec_id, %error, "could not find the descendants of an exec'd process");
        }
    }
}

/// Says whether the process still lives. Another process may have its pid, but not also its start time.
fn is_alive(process: &ProcessId) -> io::Result<bool> {
    Ok(none_if_vanished(ProcessId::of(process.pid))?.is_some_and(|now| now == *process))
}

/// Opens the descendants of a process. Each of them was a descendant after its pidfd had been opened, so none is an
/// unrelated process with a reused pid.
fn open_descendants(pid: u32) -> io::Result<Vec<PidFd>> {
    let mut opened = Vec::new();
    for pid in descendants(pid)?.into_iter().skip(1) {
        opened.extend(none_if_vanished(PidFd::open(pid))?.map(|process| (pid, process)));
    }
    let still = descendants(pid)?;
    Ok(opened.into_iter().filter(|(pid, _)| still.contains(pid)).map(|(_, fd)| fd).collect())
}

async fn remove_traces(client: &Client, container: &ContainerId, exec_id: &str, marker: &Path) {
    match client.delete_exec(container.as_str(), exec_id).await {
        Ok(()) | Err(ShimError::ConnectionLost { .. }) => {}
        Err(error) => {
            return tracing::warn!(%container, exec_id, %error, "the shim could not delete an exec'd process");
        }
    }
    match read_marker_or_default(marker) {
        Ok(content) => content.sandbox.iter().for_each(SandboxExec::remove_pid_file),
        Err(error) => {
            tracing::debug!(path = %marker.display(), %error, "could not read a marker; its sandbox's pid file stays");
        }
    }
    // Shims leave this file behind, one for each exec.
    if let Some(path) = pid_file(marker)
        && let Err(error) = remove_file_if_exists(&path)
    {
        tracing::warn!(path = %path.display(), %error, "could not remove the pid file of an exec'd process");
    }
    if let Err(error) = remove_file_if_exists(marker) {
        tracing::warn!(path = %marker.display(), %error, "could not remove the marker of an exec'd process");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_is_the_tasks_process_with_another_command() {
        let config = json!({"process": {
            "args": ["/app"], "cwd": "/srv", "env": ["PATH=/bin"], "user": {"uid": 7, "gid": 8},
            "capabilities": {"bounding": ["CAP_CHOWN"]}, "noNewPrivileges": true,
        }});
        let request = ExecRequest { command: vec!["ls".to_owned(), "-l".to_owned()], terminal: true, stdin: false };
        let spec = describe_process(config.to_string().as_bytes(), &request).expect("described");
        let spec: Value = serde_json::from_slice(&spec.spec).expect("JSON");
        let mut expected = config["process"].clone();
        expected["args"] = json!(["ls", "-l"]);
        expected["terminal"] = json!(true);
        expected["env"] = json!(["PATH=/bin", "TERM=xterm"]);
        assert_eq!(spec, expected);
    }
}
