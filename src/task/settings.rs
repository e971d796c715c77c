//! The driver's settings, as the agent's configuration has them, checked.

use std::{collections::BTreeMap, path::PathBuf};

use crate::{ids::DriverName, image::Credentials, places::Places, rootfs::Capabilities};

/// Everything an operator can set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The driver's name in job files.
    pub name: DriverName,
    /// `enabled`.
    pub enabled: bool,
    /// `state { run_dir, state_dir }`.
    pub places: Places,
    /// `containerd { … }`.
    pub containerd: ContainerdSettings,
    /// `shim { … }`.
    pub shim: ShimSettings,
    /// `runtime "NAME" { binary }`, the built-in ones included.
    pub runtimes: BTreeMap<String, PathBuf>,
    /// `default_runtime`.
    pub default_runtime: Option<String>,
    /// `allow_runtimes`; None allows all that are configured.
    pub allow_runtimes: Option<Vec<String>>,
    /// `auth { … }`.
    pub auth: Option<Credentials>,
    /// What jobs may do.
    pub security: SecuritySettings,
}

/// Where images are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerdSettings {
    /// Its socket.
    pub address: PathBuf,
    /// Its namespace.
    pub namespace: String,
    /// Its snapshotter.
    pub snapshotter: String,
}

/// How shims are had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShimSettings {
    /// The program.
    pub binary: PathBuf,
    /// How many wait.
    pub pool: usize,
}

/// What jobs may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecuritySettings {
    /// `allow_privileged`.
    pub allow_privileged: bool,
    /// `security { allow_caps }`; None allows all (the old driver's way).
    pub allow_caps: Option<Capabilities>,
    /// `security { allow_paths }`.
    pub allow_paths: Vec<PathBuf>,
    /// May jobs use the host's network?
    pub allow_host_network: bool,
}
