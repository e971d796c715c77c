//! A group's network namespace, as Nomad makes one for an allocation.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::support::services::run;

/// A named network namespace. Dropping this value removes it.
pub(crate) struct Network(PathBuf);

impl Network {
    pub(crate) fn new(name: &str) -> Self {
        run(Command::new("ip").args(["netns", "add", name]));
        run(Command::new("ip").args(["-n", name, "link", "set", "lo", "up"]));
        Self(Path::new("/run/netns").join(name))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let name = self.0.file_name().unwrap_or_default();
        let _ = Command::new("ip").args(["netns", "del"]).arg(name).output();
    }
}
