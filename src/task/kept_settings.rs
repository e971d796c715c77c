//! What of the settings others need who look after a driver's directories while no plugin lives: where things are and
//! which programs made them. Each plugin writes it down in its run directory; it has no secrets.

use std::{collections::BTreeMap, fs, io, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{ContainerdSettings, OwnShim, RuntimeSettings, Settings};
use crate::{
    gvisor::GvisorSettings,
    places::{Places, write_whole},
};

/// Settings as the last plugin of a run directory had them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptSettings {
    state_dir: PathBuf,
    address: PathBuf,
    namespace: String,
    snapshotter: String,
    shim: PathBuf,
    runtimes: BTreeMap<String, KeptRuntime>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KeptRuntime {
    binary: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shim: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    config: Option<PathBuf>,
    gvisor: bool,
}

impl KeptSettings {
    /// What of these settings is kept.
    pub fn of(settings: &Settings) -> Self {
        let kept = |runtime: &RuntimeSettings| KeptRuntime {
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
            runtimes: settings.runtimes.iter().map(|(name, runtime)| (name.clone(), kept(runtime))).collect(),
        }
    }

    /// Writes it into the run directory.
    ///
    /// # Errors
    /// As the file system.
    pub fn save(&self, places: &Places) -> io::Result<()> {
        write_whole(&places.kept_settings(), &serde_json::to_vec(self)?, 0o600)
    }

    /// What the last plugin of this run directory has written; None where no plugin did, as those of earlier versions.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn read(places: &Places) -> io::Result<Option<Self>> {
        match fs::read(places.kept_settings()) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// These settings with what was kept in place of their own.
    pub fn apply(self, settings: Settings) -> Settings {
        let runtime = |kept: KeptRuntime| RuntimeSettings {
            binary: kept.binary,
            shim: kept.shim.map(|program| OwnShim { program, config: kept.config }),
            gvisor: kept.gvisor.then(GvisorSettings::default),
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
            runtimes: self.runtimes.into_iter().map(|(name, kept)| (name, runtime(kept))).collect(),
            ..settings
        }
    }
}
