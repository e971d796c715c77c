//! The identity of a shim, as recorded in its directory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::process::ProcessId;

/// The identity of a shim, as recorded in its directory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ShimIdentity {
    #[serde(flatten)]
    pub(super) process: ProcessId,
    pub(super) boot: String,
    pub(super) namespace: String,
    /// The runtime's program of which the shim has a sealed copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) runtime: Option<PathBuf>,
    /// The shim's program, if it is not the launcher's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) program: Option<PathBuf>,
}
