//! Typed configuration: turns decoded values into settings and task options, and reports all faults in one message.

mod agent;
mod apparmor;
mod block;
mod ceilings;
#[cfg(test)]
mod differences;
mod faults;
mod group_network;
mod job;
mod limits;
mod mounts;
mod privileges;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod refusals;
mod runtime;
mod security;
mod state;
#[cfg(test)]
mod tests;

use std::fmt;

pub use agent::settings;
use faults::Faults;
pub use group_network::GroupNetwork;
pub use job::task_options;

use super::decode::Values;
use crate::{
    image::{CredentialScope, Credentials, RegistryAddress},
    text,
};

/// The name of a job's `config` in errors.
const JOB_SUBJECT: &str = "task config";
/// The name of a request's own fields in errors.
const REQUEST_SUBJECT: &str = "request";

/// The most characters of one fault in a message: a fault may quote a job's value, of any length.
const FAULT_MAX: usize = 600;
/// The most characters of all faults in a message.
const FAULTS_MAX: usize = 8000;

/// All faults of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    subject: &'static str,
    faults: Vec<String>,
}

impl ConfigError {
    /// Makes an error of one fault of a job's `config`.
    pub fn job_fault(fault: String) -> Self {
        Self::job_faults(vec![fault])
    }

    /// Makes an error of the faults of a request's own fields.
    pub fn request_faults(faults: Vec<String>) -> Self {
        Self { subject: REQUEST_SUBJECT, faults }
    }

    /// Makes an error of the faults of a job's `config`.
    pub fn job_faults(faults: Vec<String>) -> Self {
        Self { subject: JOB_SUBJECT, faults }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |fault: &String| text::sanitize(fault, FAULT_MAX);
        let many = match &self.faults[..] {
            [only] => return write!(f, "{}: {}", self.subject, shown(only)),
            many => many,
        };
        write!(f, "{}: {} problems", self.subject, many.len())?;
        // Each fault is truncated separately, so that none hides another; a list that is too long ends with a count.
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

/// Reads an `auth` block. `unnamed` is the scope of credentials without a `server_address`.
fn credentials(
    block: Option<&Values>,
    unnamed: impl FnOnce() -> CredentialScope,
    faults: &mut Faults,
) -> Option<Credentials> {
    let block = block?;
    let (username, password) =
        (block.non_empty_text("username")?.to_owned(), block.non_empty_text("password")?.to_owned());
    let scope = match block.non_empty_text("server_address").map(str::parse::<RegistryAddress>) {
        None => unnamed(),
        Some(Ok(address)) => CredentialScope::Registry(address),
        Some(Err(error)) => {
            faults.push(format!("auth.server_address: {error}"));
            return None;
        }
    };
    Some(Credentials { username, password, scope })
}
