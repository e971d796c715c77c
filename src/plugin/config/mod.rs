//! Typed configuration: from decoded values to settings and task options, with every fault in one message.

mod agent;
mod apparmor;
mod ceilings;
#[cfg(test)]
mod differences;
mod job;
mod limits;
mod mounts;
#[cfg(test)]
mod properties;
mod runtime;
#[cfg(test)]
mod tests;

use std::fmt;

pub use agent::settings;
pub use job::{GroupNetwork, task_options};

use super::decode::Values;
use crate::{
    image::{CredentialScope, Credentials, RegistryAddress},
    text,
};

/// What a job's `config` is called in errors.
const JOB: &str = "task config";
/// What a request's own fields are called in errors.
const REQUEST: &str = "request";

/// The longest that one fault is shown, in characters: it may quote a value of a job, of any length.
const FAULT_MAX: usize = 600;
/// The longest list of faults that is shown, in characters.
const FAULTS_MAX: usize = 8000;

/// A configuration with all its faults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    what: &'static str,
    faults: Vec<String>,
}

impl ConfigError {
    /// One fault of a job's `config`.
    pub fn one(fault: String) -> Self {
        Self::many(vec![fault])
    }

    /// Faults of a request's own fields.
    pub fn of_request(faults: Vec<String>) -> Self {
        Self { what: REQUEST, faults }
    }

    /// Faults of a job.
    pub fn many(faults: Vec<String>) -> Self {
        Self { what: JOB, faults }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |fault: &String| text::shown(fault, FAULT_MAX);
        let many = match &self.faults[..] {
            [only] => return write!(f, "{}: {}", self.what, shown(only)),
            many => many,
        };
        write!(f, "{}: {} problems", self.what, many.len())?;
        // Each fault is cut for itself, so that none hides another; a list beyond all measure ends with a count.
        let mut length = 0;
        for (n, fault) in many.iter().map(shown).enumerate() {
            length += fault.len();
            if length > FAULTS_MAX {
                return write!(f, "; and {} more", many.len() - n);
            }
            write!(f, "; ({}) {fault}", n + 1)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

fn finish<T>(what: &'static str, value: Option<T>, faults: Vec<String>) -> Result<T, ConfigError> {
    match value {
        Some(value) if faults.is_empty() => Ok(value),
        _ => Err(ConfigError { what, faults }),
    }
}

/// Reads an `auth` block. `unnamed` is the scope of credentials without a `server_address`.
fn credentials(
    block: Option<&Values>,
    unnamed: impl FnOnce() -> CredentialScope,
    faults: &mut Vec<String>,
) -> Option<Credentials> {
    let block = block?;
    let (username, password) = (block.filled("username")?.to_owned(), block.filled("password")?.to_owned());
    let scope = match block.filled("server_address").map(str::parse::<RegistryAddress>) {
        None => unnamed(),
        Some(Ok(address)) => CredentialScope::Registry(address),
        Some(Err(error)) => {
            faults.push(format!("auth.server_address: {error}"));
            return None;
        }
    };
    Some(Credentials { username, password, scope })
}
