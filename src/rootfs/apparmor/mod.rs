//! AppArmor: the driver's own profile with docker's default rules, how it is loaded, and what the host says about it.
//!
//! `profile` makes the text, `host` reads the kernel's files, `loader` calls `apparmor_parser`. `task/apparmor.rs` decides
//! which profile a task gets.

mod host;
mod loader;
mod profile;

use std::{fmt, io, path::PathBuf, str::FromStr, sync::Arc};

pub use host::{Host, Support};
pub use loader::Loader;
pub use profile::{OWN_PREFIX, OwnProfile, Peer};

/// The package that has `apparmor_parser`, under Debian's and Ubuntu's name.
pub const PARSER_PACKAGE: &str = "apparmor";

/// Longer names are a mistake; the kernel's own limit is a page.
const NAME_MAX: usize = 256;

/// The name of one profile, which the kernel can't take for anything else.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProfileName(String);

impl ProfileName {
    /// The name as text.
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

    /// Checks a name. Runtimes write `exec NAME` into `/proc/self/attr/apparmor/exec`. There, a leading `&` and an inner `//&` stack
    /// profiles, a leading `:` names another policy namespace, and the kernel trims white space
    /// (security/apparmor/lsm.c, label.c `aa_label_strn_parse`).
    fn from_str(name: &str) -> Result<Self, AppArmorError> {
        let is_one_profile = !name.is_empty()
            && name.len() <= NAME_MAX
            && name.trim() == name
            && !name.chars().any(char::is_control)
            && !name.starts_with(['&', ':'])
            && !name.contains("//&")
            // This means no profile. The options have a value of their own for it.
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
    /// The host can't confine anything.
    #[error("AppArmor profile {profile:?} can't be applied: {support}")]
    Unsupported {
        /// The profile that was asked for.
        profile: String,
        /// What the host lacks.
        support: Support,
    },
    /// The profile is not in the kernel, and is not ours to load.
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
        /// What it said, or what became of it.
        problem: String,
    },
    /// The kernel's list of loaded profiles can't be read.
    #[error("read {path}")]
    List {
        /// The list.
        path: PathBuf,
        /// Why it can't be read.
        source: Arc<io::Error>,
    },
    /// gVisor has no AppArmor.
    #[error(
        "AppArmor profile {profile:?} can't be had with runtime {runtime:?}: gVisor ignores profiles; remove it, or use a runtime without a sandbox"
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
