//! A process that was exec'd in a gVisor sandbox. Its pid in the sandbox is known to runsc only, so runsc kills it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::Record;
use crate::{gvisor, ids::ContainerId, places::Places, process::async_command};

/// How long a call of runsc may take. A query to a sandbox takes 20 ms.
const RUNSC_TIMEOUT: Duration = Duration::from_secs(10);

/// The files by which a process that was exec'd in a sandbox is found again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SandboxExec {
    /// The file in which the shim has written the path of the program that it calls as runsc.
    program: PathBuf,
    /// runsc's state directory.
    root: PathBuf,
    /// The file in which runsc has written the pid that the process has in the sandbox.
    pid_file: PathBuf,
}

/// A process in the output of `runsc ps --format=json`.
#[derive(Debug, Deserialize)]
struct ListedProcess {
    pid: i32,
    ppid: i32,
}

impl SandboxExec {
    pub(super) fn of(places: &Places, record: &Record, exec_id: &str) -> Self {
        let bundle = places.bundle(&record.intent.container_id);
        Self {
            program: bundle.join("runtime"),
            root: places.runtime_state(&record.intent.runtime, &record.intent.namespace),
            pid_file: bundle.join(format!("{exec_id}.pid{}", gvisor::SANDBOX_PID_SUFFIX)),
        }
    }

    /// Kills the process and its descendants in the sandbox. A failure is not reported, because the caller has the shim
    /// kill the process as well.
    pub(super) async fn kill(&self, container: &ContainerId) {
        let Some(pid) = fs::read_to_string(&self.pid_file).ok().and_then(|text| text.trim().parse().ok()) else {
            return;
        };
        let listed = self.run_runsc(&["ps", "--format=json", container.as_str()]).await;
        let all: Vec<ListedProcess> = listed.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
        for pid in with_descendants(pid, &all) {
            let pid = format!("--pid={pid}");
            self.run_runsc(&["kill", &pid, container.as_str(), "KILL"]).await;
        }
    }

    /// Removes the file with the pid of a process that has ended.
    pub(super) fn remove_pid_file(&self) {
        // Without this driver's wrapper script there is no such file.
        let _ = fs::remove_file(&self.pid_file);
    }

    /// Runs runsc and returns its output. `None` if runsc fails, which it does for a sandbox that has ended.
    async fn run_runsc(&self, args: &[&str]) -> Option<String> {
        let program = fs::read_to_string(&self.program).ok()?;
        let mut command = async_command(Path::new(program.trim()));
        command.arg("--root").arg(&self.root).args(args).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(RUNSC_TIMEOUT, command.output()).await.ok()?;
        let output = output.inspect_err(|error| tracing::warn!(%error, program, "could not run runsc")).ok()?;
        if output.status.success() {
            return Some(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        tracing::debug!(?args, stderr = %String::from_utf8_lossy(&output.stderr).trim(), "a call of runsc failed");
        None
    }
}

/// Returns the pids of a process and its descendants. The process itself is the first, so that it is killed first and
/// can't start others meanwhile.
fn with_descendants(pid: i32, all: &[ListedProcess]) -> Vec<i32> {
    let (mut found, mut known, mut next) = (vec![pid], BTreeSet::from([pid]), 0);
    while let Some(&parent) = found.get(next) {
        next += 1;
        found.extend(all.iter().filter(|one| one.ppid == parent && known.insert(one.pid)).map(|one| one.pid));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_listed_with_its_descendants() {
        let text = r#"[{"uid":0,"pid":1,"ppid":0},{"pid":7,"ppid":0},{"pid":8,"ppid":7},{"pid":9,"ppid":8},{"pid":10,"ppid":1}]"#;
        let all: Vec<ListedProcess> = serde_json::from_str(text).expect("a list");
        assert_eq!(with_descendants(7, &all), [7, 8, 9]);
        assert_eq!(with_descendants(99, &all), [99]);
    }
}
