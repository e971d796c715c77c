//! A process in a gVisor sandbox: only runsc knows it by its pid.

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

/// runsc takes 20 ms to ask a sandbox something.
const ASK: Duration = Duration::from_secs(10);

/// How a process that was exec'd in a sandbox is found again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InSandbox {
    /// Where the shim has noted by what program it calls runsc.
    program: PathBuf,
    /// runsc's state directory.
    root: PathBuf,
    /// Where runsc has written the pid that it has in the sandbox.
    pid_file: PathBuf,
}

/// A process of `runsc ps --format=json`.
#[derive(Debug, Deserialize)]
struct Listed {
    pid: i32,
    ppid: i32,
}

impl InSandbox {
    pub(super) fn of(places: &Places, record: &Record, exec_id: &str) -> Self {
        let bundle = places.bundle(&record.container_id);
        Self {
            program: bundle.join("runtime"),
            root: places.runtime_state(&record.runtime, &record.namespace),
            pid_file: bundle.join(format!("{exec_id}.pid{}", gvisor::INSIDE)),
        }
    }

    /// Kills it and what it has started. What can't be done is the shim's own kill's to do.
    pub(super) async fn kill(&self, container: &ContainerId) {
        let Some(pid) = fs::read_to_string(&self.pid_file).ok().and_then(|text| text.trim().parse().ok()) else {
            return;
        };
        let listed = self.runsc(&["ps", "--format=json", container.as_str()]).await;
        let all: Vec<Listed> = listed.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
        for member in family(pid, &all) {
            let pid = format!("--pid={member}");
            self.runsc(&["kill", &pid, container.as_str(), "KILL"]).await;
        }
    }

    /// It is over.
    pub(super) fn forget(&self) {
        // Not there where it was not kept by our wrapper.
        let _ = fs::remove_file(&self.pid_file);
    }

    /// What it says; None when it fails, as for a sandbox that has ended.
    async fn runsc(&self, words: &[&str]) -> Option<String> {
        let program = fs::read_to_string(&self.program).ok()?;
        let mut command = async_command(Path::new(program.trim()));
        command.arg("--root").arg(&self.root).args(words).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(ASK, command.output()).await.ok()?;
        let output = output.inspect_err(|error| tracing::warn!(%error, program, "call runsc")).ok()?;
        if output.status.success() {
            return Some(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        tracing::debug!(said = %String::from_utf8_lossy(&output.stderr).trim(), "runsc {words:?}");
        None
    }
}

/// A process and its descendants, itself first: so that it can't start others meanwhile.
fn family(pid: i32, all: &[Listed]) -> Vec<i32> {
    let (mut members, mut known, mut next) = (vec![pid], BTreeSet::from([pid]), 0);
    while let Some(&parent) = members.get(next) {
        next += 1;
        members.extend(all.iter().filter(|one| one.ppid == parent && known.insert(one.pid)).map(|one| one.pid));
    }
    members
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_a_process_and_its_descendants() {
        let text = r#"[{"uid":0,"pid":1,"ppid":0},{"pid":7,"ppid":0},{"pid":8,"ppid":7},{"pid":9,"ppid":8},{"pid":10,"ppid":1}]"#;
        let all: Vec<Listed> = serde_json::from_str(text).expect("a list");
        assert_eq!(family(7, &all), [7, 8, 9]);
        assert_eq!(family(99, &all), [99]);
    }
}
