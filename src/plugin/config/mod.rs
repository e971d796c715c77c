//! Typed configuration: from decoded values to settings and task options, with every fault in one message.

mod agent;
mod ceilings;
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
use crate::image::{CredentialScope, Credentials, RegistryAddress};

/// What a job's `config` is called in errors.
const JOB: &str = "task config";

/// A configuration with all its faults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    what: &'static str,
    faults: Vec<String>,
}

impl ConfigError {
    /// One fault of a job's `config`.
    pub fn one(fault: String) -> Self {
        Self { what: JOB, faults: vec![fault] }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.faults[..] {
            [only] => write!(f, "{}: {only}", self.what),
            many => {
                write!(f, "{}: {} problems", self.what, many.len())?;
                many.iter().enumerate().try_for_each(|(n, fault)| write!(f, "; ({}) {fault}", n + 1))
            }
        }
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
