//! The identity of a shim: the content of the file `pid` in its directory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::process::ProcessId;

/// The identity of a shim, as recorded in its directory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ShimIdentity {
    /// The shim's process.
    #[serde(flatten)]
    pub(super) process: ProcessId,
    /// The kernel's boot id. After a reboot no shim is alive.
    pub(super) boot: String,
    /// The shim's namespace, which is a directory below the runtimes' state roots.
    pub(super) namespace: String,
    /// The runtime's program of which the shim has a sealed copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) runtime: Option<PathBuf>,
    /// The shim's program, if it is not the launcher's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) program: Option<PathBuf>,
}
