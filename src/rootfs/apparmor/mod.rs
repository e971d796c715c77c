//! AppArmor: the driver's own profile with docker's default rules, and how it is loaded.
//!
//! `profile` makes the profile's text, `host` reads the kernel's files, and `loader` calls `apparmor_parser`.
//! `task/apparmor.rs` decides which profile a task gets.

mod host;
mod loader;
mod profile;

use std::{fmt, io, path::PathBuf, str::FromStr, sync::Arc};

pub use host::{AppArmorHost, Support};
pub use loader::Loader;
pub use profile::{DriverProfile, PROFILE_PREFIX, Peer};

/// The package that contains `apparmor_parser`, by its name on Debian and Ubuntu.
pub const PARSER_PACKAGE: &str = "apparmor";

/// The longest name that is accepted, in bytes. A longer name is a mistake in a configuration; the kernel's own limit
/// is a page.
const NAME_MAX: usize = 256;

/// The name of exactly one profile, without any syntax that has another meaning to the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProfileName(String);

impl ProfileName {
    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ProfileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ProfileName {
    type Err = AppArmorError;

    /// Checks a name. Runtimes write `exec NAME` into `/proc/self/attr/apparmor/exec`. In such a name, a leading `&` or
    /// an inner `//&` stacks profiles, a leading `:` names another policy namespace, and the kernel trims white space
    /// (security/apparmor/lsm.c, label.c `aa_label_strn_parse`).
    fn from_str(name: &str) -> Result<Self, AppArmorError> {
        let is_one_profile = !name.is_empty()
            && name.len() <= NAME_MAX
            && name.trim() == name
            && !name.chars().any(char::is_control)
            && !name.starts_with(['&', ':'])
            && !name.contains("//&")
            // This name means no profile. The options have a separate value for that.
            && name != "unconfined";
        if is_one_profile { Ok(Self(name.to_owned())) } else { Err(AppArmorError::Name(name.to_owned())) }
    }
}

/// Why a task can't have an AppArmor profile.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AppArmorError {
    /// The text is not the name of one profile.
    #[error("{0:?} is not the name of an AppArmor profile")]
    Name(String),
    /// The host can't apply AppArmor profiles.
    #[error("AppArmor profile {profile:?} can't be applied: {support}")]
    Unsupported {
        /// The profile that was asked for.
        profile: String,
        /// What the host lacks.
        support: Support,
    },
    /// The profile is not loaded in the kernel, and the driver loads only its own profile.
    #[error(
        "AppArmor profile {0:?} is not loaded on this node; load it with apparmor_parser, or name another one (aa-status lists them)"
    )]
    NotLoaded(String),
    /// The program that would load the driver's profile is not installed.
    #[error(
        "AppArmor profile {0:?} is not loaded, and apparmor_parser is not in the plugin's PATH; install the package {PARSER_PACKAGE}"
    )]
    NoParser(String),
    /// The driver's profile could not be loaded.
    #[error(
        "AppArmor profile {profile:?} could not be loaded by {parser}: {problem}; correct that, or set the plugin option security {{ apparmor = \"unconfined\" }}"
    )]
    Load {
        /// The driver's profile.
        profile: String,
        /// The program that was called.
        parser: PathBuf,
        /// The program's error message, or how it ended.
        problem: String,
    },
    /// The kernel's list of loaded profiles can't be read.
    #[error("could not read the list of loaded AppArmor profiles {path}")]
    List {
        /// The list's path.
        path: PathBuf,
        /// Why it can't be read.
        source: Arc<io::Error>,
    },
    /// gVisor does not support AppArmor.
    #[error(
        "AppArmor profile {profile:?} can't be used with runtime {runtime:?}: gVisor ignores profiles; remove it, or use a runtime without a sandbox"
    )]
    Sandbox {
        /// The profile that was asked for.
        profile: String,
        /// The task's runtime.
        runtime: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_profile() {
        for good in ["docker-default", "/usr/bin/man", "a//b", "with space", "snap.x.y", "ä", "Unconfined"] {
            assert!(good.parse::<ProfileName>().is_ok(), "{good}");
        }
        let long = "x".repeat(NAME_MAX + 1);
        for bad in ["", " a", "a\n", "a\0b", "&a", ":ns:a", ":ns://a", "a//&unconfined", "unconfined", &long] {
            assert!(bad.parse::<ProfileName>().is_err(), "{bad:?}");
        }
    }
}
