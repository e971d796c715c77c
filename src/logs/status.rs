//! What the writer has to say of a task's log: bytes it dropped, and why it can't write just now.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::places::write_private;

/// In a task's directory.
const FILE: &str = "losses.json";
/// Beside the tasks' directories: touched when any of them changes.
const CHANGED: &str = ".losses";

/// Of one stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamLosses {
    /// Bytes dropped so far.
    pub dropped: u64,
    /// Why nothing can be written now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stuck: Option<String>,
}

/// Of both.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Losses {
    /// Standard output.
    #[serde(default)]
    pub stdout: StreamLosses,
    /// Standard error.
    #[serde(default)]
    pub stderr: StreamLosses,
}

impl Losses {
    /// By the stream's name.
    pub fn of(&mut self, stream: &str) -> &mut StreamLosses {
        if stream == "stderr" { &mut self.stderr } else { &mut self.stdout }
    }
}

/// What the writer has said of a task; nothing is nothing lost.
///
/// # Errors
/// When that can't be read.
pub fn read_losses(dir: &Path) -> io::Result<Losses> {
    match fs::read(dir.join(FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Losses::default()),
        read => serde_json::from_slice(&read?).map_err(Into::into),
    }
}

/// Says it. The file is replaced: its reader never sees half of it.
pub(super) fn write_losses(dir: &Path, losses: &Losses) -> io::Result<()> {
    let (path, new) = (dir.join(FILE), dir.join(".losses.new"));
    write_private(&new, &serde_json::to_vec(losses)?)?;
    fs::rename(&new, path)?;
    dir.parent().map_or(Ok(()), |logs| write_private(&changed(logs), b""))
}

/// The file whose time tells that something was said of some task.
pub fn changed(logs: &Path) -> PathBuf {
    logs.join(CHANGED)
}
