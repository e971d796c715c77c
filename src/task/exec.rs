//! Further processes in a running task: with the task's user, directory, environment, capabilities and limits, since
//! their description is the task's own with another command in it. Needs the task's record and its shim, no engine.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Record, TaskError, in_sandbox::InSandbox, undo::RETRIES};
use crate::{
    ids::{ContainerId, random_hex},
    places::{Places, PlacesError, make_dir, names, write_private},
    process::{PidFd, ProcessId, descendants, is_passing, parent_of, unless_vanished},
    rootfs::{KernelLimits, StringError},
    shim::{Client, ExecIo, ExecPipes, ExecProcess, Exit, Kill, ShimError, WindowSize},
    text::quoted,
};

/// SIGKILL works at once, or the process hangs in the kernel.
const KILLED: Duration = Duration::from_secs(10);

/// Ten times this is more than a process needs to be gone that has let go of its lock.
const GOING: Duration = Duration::from_millis(10);

/// Why a process can't be run in a task.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// Nothing to run.
    #[error("exec: the command is empty")]
    Empty,
    /// A string that the kernel does not take.
    #[error("exec")]
    String(#[from] StringError),
    /// The task's own description.
    #[error("exec: {path}")]
    Bundle {
        /// Its file.
        path: PathBuf,
        /// Why it can't be used.
        source: io::Error,
    },
    /// Descriptors have run out.
    #[error("exec: pipes")]
    Pipes(#[source] io::Error),
    /// The shim or the runtime.
    #[error("exec {}", quoted(.command))]
    Shim {
        /// What was to be run.
        command: String,
        /// Their words.
        source: ShimError,
    },
}

impl ExecError {
    /// The exit code that shells and docker give when the runtime refuses a command: 127 for one that is not there, 126
    /// for one that can't be run. None when it is not the command's fault.
    pub fn exit_code(&self) -> Option<i32> {
        match self {
            Self::Shim { source: ShimError::Refused { message, .. }, .. } => Some(refusal_code(message).unwrap_or(126)),
            Self::String(_) => Some(126),
            _ => None,
        }
    }
}

/// What a runtime's words say of a command: 127 when it is not there, 126 when it may not be run.
pub fn refusal_code(message: &str) -> Option<i32> {
    let missing = ["no such file or directory", "not found in $PATH", "executable file not found", "executable file `"];
    if message.to_ascii_lowercase().contains("permission denied") {
        Some(126)
    } else {
        missing.iter().any(|text| message.contains(text)).then_some(127)
    }
}

/// What is to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecRequest {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Give it a terminal?
    pub terminal: bool,
    /// Will there be input?
    pub stdin: bool,
}

/// A process that was started, and its streams.
#[derive(Debug)]
pub struct Session {
    /// The process.
    pub exec: Exec,
    /// Our ends of its streams.
    pub io: ExecIo,
}

/// A process that was started. Dropped before `finish`, it is killed, and what it has started with it.
#[derive(Debug)]
pub struct Exec {
    client: Client,
    container: ContainerId,
    exec_id: String,
    marker: PathBuf,
    over: bool,
}

/// Starts a process in the task of `record`, whose shim is `client`.
///
/// # Errors
/// When it can't be started; nothing is left of it then.
pub async fn start(
    client: &Client,
    places: &Places,
    record: &Record,
    request: &ExecRequest,
) -> Result<Session, ExecError> {
    let command = request.command.first().filter(|command| !command.is_empty()).ok_or(ExecError::Empty)?;
    let config = places.bundle(&record.container_id).join("config.json");
    let unusable = |path: &Path| {
        let path = path.to_owned();
        move |source| ExecError::Bundle { path, source }
    };
    let text = fs::read(&config).map_err(unusable(&config))?;
    let Described { spec, oom_score } = describe(&text, request).map_err(|error| unusable(&config)(error.into()))?;
    let process = serde_json::from_slice(&spec).map_err(|error| unusable(&config)(error.into()))?;
    KernelLimits::of_this_process().check_process(&process)?;
    let pipes = ExecPipes::new(request.stdin, request.terminal).map_err(ExecError::Pipes)?;
    let [stdin, stdout, stderr] = pipes.paths();
    // Noted first: whatever becomes of us, our successor finds it.
    let (exec_id, execs) = (random_hex(8), places.execs(&record.container_id));
    let marker = execs.join(&exec_id);
    let owner = ProcessId::of(std::process::id()).ok();
    let sandbox = record.gvisor.then(|| InSandbox::of(places, record, &exec_id));
    let note = |process| json!(Marker { owner, process, sandbox: sandbox.clone() }).to_string();
    make_dir(&execs).and_then(|()| write_whole(&marker, &note(None))).map_err(unusable(&marker))?;
    let id = record.container_id.as_str();
    let mut exec =
        Exec { client: client.clone(), container: record.container_id.clone(), exec_id, marker, over: false };
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
            exec.forget().await;
            return Err(ExecError::Shim { command: command.clone(), source });
        }
        Err(source) => {
            // Late: it may still be run, and open the pipes by the numbers they have here.
            tokio::spawn(async move {
                exec.kill().await;
                drop(pipes);
            });
            return Err(ExecError::Shim { command: command.clone(), source });
        }
    };
    if let Ok(process) = ProcessId::of(pid)
        && let Err(error) = write_whole(&exec.marker, &note(Some(process)))
    {
        tracing::warn!(path = %exec.marker.display(), %error, "an exec'd process is not noted");
    }
    set_oom_score(pid, oom_score);
    let io = pipes.handed_over().map_err(ExecError::Pipes)?;
    Ok(Session { exec, io })
}

/// Gives a process of a task its score. Runtimes leave some as the shim's, which is the agent's and one more: crun before
/// 1.9 a task's own where it is 0, both an exec'd process's. An agent is often protected; its tasks must not be.
pub(super) fn set_oom_score(pid: u32, score: i64) {
    if let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
        tracing::debug!(pid, %error, "oom_score_adj; it has ended, most likely");
    }
}

/// As `start`, for somebody who has no engine.
///
/// # Errors
/// When the task's shim can't be reached, or the process can't be started.
pub async fn start_alone(places: &Places, record: &Record, request: &ExecRequest) -> Result<Session, ExecError> {
    let command = request.command.first().cloned().unwrap_or_default();
    let client = reach(places, record).await.map_err(|source| ExecError::Shim { command, source })?;
    start(&client, places, record, request).await
}

/// Sends a signal to a task's first process, or kills all of it; for somebody who has no engine.
///
/// # Errors
/// When the task's shim can't be reached or refuses.
pub async fn kill_alone(places: &Places, record: &Record, signal: Option<i32>) -> Result<(), TaskError> {
    let failed = |source| TaskError::Shim { doing: "send the signal", source };
    let client = reach(places, record).await.map_err(failed)?;
    let whom = if signal.is_some() { Kill::Init } else { Kill::All };
    client.kill(record.container_id.as_str(), signal.unwrap_or(libc::SIGKILL), whom).await.map_err(failed)
}

async fn reach(places: &Places, record: &Record) -> Result<Client, ShimError> {
    Client::connect(&places.shim(&record.shim).join("sock"), None).await
}

/// What is to be run.
struct Described {
    /// OCI's process, as JSON.
    spec: Vec<u8>,
    oom_score: i64,
}

/// The task's own process with another command.
fn describe(config: &[u8], request: &ExecRequest) -> serde_json::Result<Described> {
    let mut config: Value = serde_json::from_slice(config)?;
    let mut process = config["process"].take();
    process["args"] = json!(request.command);
    process["terminal"] = json!(request.terminal);
    if let Some(fields) = process.as_object_mut() {
        // Its parents' lines are the task's own.
        fields.remove("commandLine");
        fields.remove("consoleSize");
    }
    if request.terminal
        && let Some(env) = process["env"].as_array_mut()
        && !env.iter().any(|entry| entry.as_str().is_some_and(|entry| entry.starts_with("TERM=")))
    {
        env.push(json!("TERM=xterm"));
    }
    Ok(Described { spec: serde_json::to_vec(&process)?, oom_score: process["oomScoreAdj"].as_i64().unwrap_or(0) })
}

impl Exec {
    /// Waits for its end.
    ///
    /// # Errors
    /// When the shim dies first.
    pub async fn wait(&self) -> Result<Exit, ShimError> {
        self.client.wait_exec(self.container.as_str(), &self.exec_id).await
    }

    /// Sets its terminal's size.
    ///
    /// # Errors
    /// With the shim's words.
    pub async fn resize(&self, size: WindowSize) -> Result<(), ShimError> {
        self.client.resize_exec(self.container.as_str(), &self.exec_id, size).await
    }

    /// Lets it see the end of its input; our end of the pipe must be closed first.
    ///
    /// # Errors
    /// With the shim's words.
    pub async fn close_input(&self) -> Result<(), ShimError> {
        self.client.close_exec_input(self.container.as_str(), &self.exec_id).await
    }

    /// Ends it, with all that it has started.
    pub async fn kill(mut self) {
        self.over = true;
        end(&self.client, &self.container, &self.exec_id, &self.marker).await;
    }

    /// It has ended and its output was read: nothing of it is kept. Its own children may go on, in the task.
    pub async fn finish(mut self) {
        self.forget().await;
    }

    async fn forget(&mut self) {
        self.over = true;
        forget(&self.client, &self.container, &self.exec_id, &self.marker).await;
    }
}

impl Drop for Exec {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let (client, container) = (self.client.clone(), self.container.clone());
        let (exec_id, marker) = (self.exec_id.clone(), self.marker.clone());
        // Outside of a runtime we are leaving, and our successor does it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { end(&client, &container, &exec_id, &marker).await });
        }
    }
}

/// Notes of processes that somebody else than this process has had run in a task.
///
/// # Errors
/// When they can't be listed.
pub fn abandoned(execs: &Path) -> Result<Vec<PathBuf>, PlacesError> {
    Ok(names(execs)?.into_iter().map(|marker| execs.join(marker)).collect())
}

/// Ends the processes of these notes whose owners are gone: an earlier instance of us, most likely. Notes that could not be
/// listed are listed again later; those of this process, which may be there by then, have an owner that lives. `shim` is the
/// process of the task's shim.
pub async fn end_abandoned(
    client: Client,
    shim: u32,
    container: ContainerId,
    execs: PathBuf,
    mut listed: Result<Vec<PathBuf>, PlacesError>,
) {
    let mut pauses = RETRIES.into_iter();
    let markers = loop {
        match (listed, pauses.next()) {
            (Ok(markers), _) => break markers,
            (Err(error), Some(pause)) => {
                tracing::warn!(%container, error = %crate::chain(&error), "the notes of exec'd processes are listed again later");
                tokio::time::sleep(pause).await;
                listed = abandoned(&execs);
            }
            (Err(error), None) => {
                let error = crate::chain(&error);
                return tracing::error!(%container, error, "processes that were exec'd for an earlier plugin may go on");
            }
        }
    };
    for marker in markers {
        if !is_abandoned(&marker).await {
            continue;
        }
        let exec_id = marker.file_name().unwrap_or_default().to_string_lossy().into_owned();
        tracing::info!(%container, exec_id, "ends what was exec'd for somebody who is gone");
        match unknown_to_shim(&marker, shim) {
            Ok(unknown) => {
                end(&client, &container, &exec_id, &marker).await;
                unknown.iter().for_each(|process| process.signal(libc::SIGKILL));
            }
            // The note stays, by which the next plugin ends it.
            Err(error) => tracing::warn!(%container, exec_id, %error, "an exec that was cut off can't be looked for"),
        }
    }
}

/// The processes of an exec that was cut off after its process was there: the shim has killed the runtime, and does not
/// know of the process.
///
/// # Errors
/// When they can't be found.
fn unknown_to_shim(marker: &Path, shim: u32) -> io::Result<Vec<PidFd>> {
    if noted(marker)?.process.is_some() {
        return Ok(Vec::new());
    }
    let Some(path) = pid_file(marker) else { return Ok(Vec::new()) };
    let text = unless_vanished(fs::read_to_string(path))?;
    let Some(pid) = text.and_then(|text| text.trim().parse().ok()) else { return Ok(Vec::new()) };
    let Some(process) = unless_vanished(PidFd::open(pid))? else { return Ok(Vec::new()) };
    // A pid may have been reused: an exec'd process is a child of its shim, which inherits the children of runtimes.
    if unless_vanished(parent_of(pid))? != Some(shim) {
        return Ok(Vec::new());
    }
    let mut found = family(pid)?;
    found.push(process);
    Ok(found)
}

/// Where a runtime writes the pid of an exec'd process, as its last act: in the task's bundle (containerd,
/// `cmd/containerd-shim-runc-v2/process/exec.go`).
fn pid_file(marker: &Path) -> Option<PathBuf> {
    let name = marker.file_name()?.to_str()?;
    Some(marker.parent()?.parent()?.join(format!("{name}.pid")))
}

/// What is noted of an exec'd process.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Marker {
    /// Who has it run: a plugin, or somebody at the command line.
    owner: Option<ProcessId>,
    /// The process, once it runs.
    process: Option<ProcessId>,
    /// How it is found in its sandbox, where that is gVisor's: on the host there is only a runsc that waits for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sandbox: Option<InSandbox>,
}

/// A reader sees the old text or the new one, never half of one.
fn write_whole(marker: &Path, text: &str) -> io::Result<()> {
    // Beside the directory, which is listed for markers.
    let name = marker.file_name().unwrap_or_default().to_string_lossy();
    let draft = marker.with_file_name("..").join(format!("exec-{name}.tmp"));
    write_private(&draft, text.as_bytes())?;
    fs::rename(&draft, marker)
}

fn read_marker(marker: &Path) -> io::Result<Marker> {
    serde_json::from_slice(&fs::read(marker)?).map_err(Into::into)
}

/// What is noted; nothing where the note is gone or torn.
///
/// # Errors
/// When the note can't be read just now.
fn noted(marker: &Path) -> io::Result<Marker> {
    match read_marker(marker) {
        Err(error) if is_passing(&error) => Err(error),
        other => Ok(other.unwrap_or_default()),
    }
}

/// Is whoever had it run surely gone? A plugin that has just given way to us is about to be.
async fn is_abandoned(marker: &Path) -> bool {
    for _ in 0..10 {
        match read_marker(marker) {
            // Over already.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return false,
            Ok(marker) if marker.owner.is_none_or(|owner| owner.is_gone()) => return true,
            // Its owner lives, or can't be looked at just now.
            _ => tokio::time::sleep(GOING).await,
        }
    }
    false
}

/// Kills an exec'd process with all that it has started, and forgets it.
async fn end(client: &Client, container: &ContainerId, exec_id: &str, marker: &Path) {
    let looked = noted(marker);
    if let Ok(Marker { sandbox: Some(sandbox), .. }) = &looked {
        sandbox.kill(container).await;
    }
    let family = looked.and_then(|noted| match noted.process {
        Some(process) if is_alive(&process)? => family(process.pid),
        _ => Ok(Vec::new()),
    });
    let killed = client.kill_exec(container.as_str(), exec_id).await;
    if killed.is_ok() {
        let ended = tokio::time::timeout(KILLED, client.wait_exec(container.as_str(), exec_id)).await;
        if ended.is_err() {
            tracing::warn!(%container, exec_id, "an exec'd process survives SIGKILL");
        }
    }
    let family = family.map(|family| family.iter().for_each(|member| member.signal(libc::SIGKILL)));
    match (killed, family) {
        (Ok(()) | Err(ShimError::Gone { .. }), Ok(())) => forget(client, container, exec_id, marker).await,
        // The note stays, by which the next plugin ends them.
        (Err(error), _) => tracing::warn!(%container, exec_id, %error, "an exec'd process can't be killed"),
        (_, Err(error)) => {
            tracing::warn!(%container, exec_id, %error, "what an exec'd process has started can't be found");
        }
    }
}

/// Does this very process still live?
fn is_alive(process: &ProcessId) -> io::Result<bool> {
    Ok(unless_vanished(ProcessId::of(process.pid))?.is_some_and(|now| now == *process))
}

/// What a process has started, each surely so at the time it was looked at.
fn family(pid: u32) -> io::Result<Vec<PidFd>> {
    let mut opened = Vec::new();
    for pid in descendants(pid)?.into_iter().skip(1) {
        opened.extend(unless_vanished(PidFd::open(pid))?.map(|process| (pid, process)));
    }
    let still = descendants(pid)?;
    Ok(opened.into_iter().filter(|(pid, _)| still.contains(pid)).map(|(_, fd)| fd).collect())
}

async fn forget(client: &Client, container: &ContainerId, exec_id: &str, marker: &Path) {
    match client.delete_exec(container.as_str(), exec_id).await {
        Ok(()) | Err(ShimError::Gone { .. }) => {}
        Err(error) => {
            return tracing::warn!(%container, exec_id, %error, "the shim keeps an exec'd process in mind");
        }
    }
    match noted(marker) {
        Ok(noted) => noted.sandbox.iter().for_each(InSandbox::forget),
        Err(error) => tracing::debug!(path = %marker.display(), %error, "its pid in the sandbox stays noted"),
    }
    // Shims leave it, one for each exec.
    if let Some(path) = pid_file(marker)
        && let Err(error) = fs::remove_file(&path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "the pid file of an exec'd process can't be removed");
    }
    match fs::remove_file(marker) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %marker.display(), %error, "note of an exec'd process");
        }
        _ => {}
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
        let spec = describe(config.to_string().as_bytes(), &request).expect("described");
        let spec: Value = serde_json::from_slice(&spec.spec).expect("JSON");
        let mut expected = config["process"].clone();
        expected["args"] = json!(["ls", "-l"]);
        expected["terminal"] = json!(true);
        expected["env"] = json!(["PATH=/bin", "TERM=xterm"]);
        assert_eq!(spec, expected);
    }
}
