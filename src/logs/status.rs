//! The losses of tasks' logs, which the log writer reports in files: the bytes that it has dropped, and why it can't
//! write at present.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::files::{none_if_missing, replace_private, write_private};

/// The file of losses in a task's directory.
const FILE: &str = "losses.json";
/// The file in the directory of logs whose modification time changes with any file of losses.
const CHANGED: &str = ".losses";

/// The losses of one stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamLosses {
    /// The number of bytes that were dropped.
    pub dropped: u64,
    /// The error because of which nothing can be written at present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stuck: Option<String>,
}

/// The losses of both streams of a task.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Losses {
    /// The losses of standard output.
    #[serde(default)]
    pub stdout: StreamLosses,
    /// The losses of standard error.
    #[serde(default)]
    pub stderr: StreamLosses,
}

impl Losses {
    /// Returns the losses of the stream with this name.
    pub fn stream_mut(&mut self, stream: &str) -> &mut StreamLosses {
        if stream == "stderr" { &mut self.stderr } else { &mut self.stdout }
    }
}

/// Reads the losses of the task in `dir`. If the file does not exist, nothing was lost.
///
/// # Errors
/// When the file can't be read.
pub fn read_losses(dir: &Path) -> io::Result<Losses> {
    let Some(text) = none_if_missing(fs::read(dir.join(FILE)))? else { return Ok(Losses::default()) };
    serde_json::from_slice(&text).map_err(Into::into)
}

/// Writes the losses of the task in `dir`. The file is replaced by rename, so that a reader never sees a part of it.
pub(super) fn write_losses(dir: &Path, losses: &Losses) -> io::Result<()> {
    replace_private(&dir.join(FILE), &dir.join(".losses.new"), &serde_json::to_vec(losses)?)?;
    dir.parent().map_or(Ok(()), |logs| write_private(&changed_file(logs), b""))
}

/// Returns the file whose modification time shows that the losses of a task have changed.
pub fn changed_file(logs: &Path) -> PathBuf {
    logs.join(CHANGED)
}
