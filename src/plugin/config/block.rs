//! One block of the agent's configuration.

use std::{path::PathBuf, time::Duration};

use super::faults::Faults;
use crate::{duration, plugin::decode::Values};

/// A block of the agent's configuration. Faults name its options as `BLOCK.OPTION`.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    name: &'static str,
    pub(super) values: &'a Values,
}

impl<'a> Block<'a> {
    /// Returns the block `name` of the configuration; an absent block is empty.
    pub(super) fn of(config: &'a Values, name: &'static str) -> Self {
        Self { name, values: config.block_or_empty(name) }
    }

    /// Returns the text of an option unless it is empty.
    pub(super) fn text(self, option: &str) -> Option<&'a str> {
        self.values.non_empty_text(option)
    }

    /// Reads a duration.
    pub(super) fn duration(self, option: &str, default: &str, faults: &mut Faults) -> Duration {
        let duration = duration::parse(self.text(option).unwrap_or(default));
        faults.record_err(&format!("{}.{option}", self.name), duration).unwrap_or_default()
    }

    /// Reads an absolute path.
    pub(super) fn path(self, option: &str, default: PathBuf, faults: &mut Faults) -> PathBuf {
        let path = self.text(option).map_or(default, PathBuf::from);
        if !path.is_absolute() {
            faults.push(format!("{}.{option} = {:?} is not an absolute path", self.name, path.display()));
        }
        path
    }
}
