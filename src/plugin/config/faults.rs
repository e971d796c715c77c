//! Collects the faults of a configuration, so that all of them are reported in one message.

use std::fmt::Display;

use super::ConfigError;

/// Everything that is wrong with a configuration.
#[derive(Debug, Default)]
pub(super) struct Faults(pub(super) Vec<String>);

impl Faults {
    /// Adds a fault.
    pub(super) fn push(&mut self, fault: String) {
        self.0.push(fault);
    }

    /// Returns the value of `outcome`; an error becomes a fault of `option`.
    pub(super) fn record_err<T>(&mut self, option: &str, outcome: Result<T, impl Display>) -> Option<T> {
        outcome.map_err(|problem| self.push(format!("{option}: {problem}"))).ok()
    }

    /// Returns the value if there are no faults. `subject` names the configuration in the error.
    pub(super) fn into_result<T>(self, subject: &'static str, value: Option<T>) -> Result<T, ConfigError> {
        match value {
            Some(value) if self.0.is_empty() => Ok(value),
            _ => Err(ConfigError { subject, faults: self.0 }),
        }
    }
}
