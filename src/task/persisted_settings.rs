//! The settings that commands need to manage a driver's directories while no plugin is running: where files are, and
//! which programs have created containers. Each plugin saves them in its run directory. They contain no secrets.

use std::{collections::BTreeMap, fs, io, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{ContainerdSettings, OwnShim, RuntimeSettings, Settings};
use crate::{
    files::{none_if_missing, write_atomically},
    gvisor::GvisorSettings,
    places::Places,
};

/// The settings of the last plugin of a run directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PersistedSettings {
    state_dir: PathBuf,
    address: PathBuf,
    namespace: String,
    snapshotter: String,
    shim: PathBuf,
    runtimes: BTreeMap<String, PersistedRuntime>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PersistedRuntime {
    binary: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shim: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    config: Option<PathBuf>,
    gvisor: bool,
}

impl PersistedSettings {
    /// Extracts the part of the settings that is saved.
    pub fn of(settings: &Settings) -> Self {
        let persisted = |runtime: &RuntimeSettings| PersistedRuntime {
            binary: runtime.binary.clone(),
            shim: runtime.shim.as_ref().map(|shim| shim.program.clone()),
            config: runtime.shim.as_ref().and_then(|shim| shim.config.clone()),
            gvisor: runtime.gvisor.is_some(),
        };
        Self {
            state_dir: settings.places.state().to_owned(),
            address: settings.containerd.address.clone(),
            namespace: settings.containerd.namespace.clone(),
            snapshotter: settings.containerd.snapshotter.clone(),
            shim: settings.shim.binary.clone(),
            runtimes: settings.runtimes.iter().map(|(name, runtime)| (name.clone(), persisted(runtime))).collect(),
        }
    }

    /// Saves the settings in the run directory.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn save(&self, places: &Places) -> io::Result<()> {
        write_atomically(&places.kept_settings(), &serde_json::to_vec(self)?, 0o600)
    }

    /// Reads the settings that the last plugin of this run directory has saved. `None` if there are none, as after a
    /// plugin of an earlier version.
    ///
    /// # Errors
    /// When the file can't be read.
    pub fn read(places: &Places) -> io::Result<Option<Self>> {
        let text = none_if_missing(fs::read(places.kept_settings()))?;
        text.map(|text| serde_json::from_slice(&text).map_err(Into::into)).transpose()
    }

    /// Returns `settings` with the saved values in place of its own.
    pub fn apply(self, settings: Settings) -> Settings {
        let runtime = |saved: PersistedRuntime| RuntimeSettings {
            binary: saved.binary,
            shim: saved.shim.map(|program| OwnShim { program, config: saved.config }),
            gvisor: saved.gvisor.then(GvisorSettings::default),
        };
        let mut shim = settings.shim;
        shim.binary = self.shim;
        Settings {
            places: Places::new(settings.places.run(), &self.state_dir),
            containerd: ContainerdSettings {
                address: self.address,
                namespace: self.namespace,
                snapshotter: self.snapshotter,
            },
            shim,
            runtimes: self.runtimes.into_iter().map(|(name, saved)| (name, runtime(saved))).collect(),
            ..settings
        }
    }
}
