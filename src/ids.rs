//! Names that travel through the driver, as types that check on creation.

use std::{fmt, path::Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Why a name was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdError {
    /// The driver name in job files.
    #[error("driver name {0:?} is not made of 1 to 63 letters, digits, dots, dashes and underscores")]
    DriverName(String),
    /// What Nomad starts a plugin with.
    #[error("plugin args {0:?}: only --name NAME is known")]
    PluginArgs(Vec<String>),
    /// A content digest.
    #[error("digest {0:?} is not `sha256:` with 64 lower-case hexadecimal digits")]
    Digest(String),
}

/// The name in job files (`driver = "..."`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DriverName(String);

/// The old driver's name: under it, all defaults are the old driver's.
pub const DROP_IN_NAME: &str = "containerd-driver";

impl DriverName {
    /// Checks a name.
    ///
    /// # Errors
    /// When it could not stand in a path, a cgroup name and a node attribute alike.
    pub fn new(name: &str) -> Result<Self, IdError> {
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let starts = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        if starts && name.len() <= 63 && name.chars().all(fine) {
            Ok(Self(name.to_owned()))
        } else {
            Err(IdError::DriverName(name.to_owned()))
        }
    }

    /// The name that a program called `argv0` reports: its last path component without a leading `nomad-driver-`.
    /// Links work, since nothing is resolved.
    ///
    /// # Errors
    /// When what remains is no name.
    pub fn from_argv0(argv0: &str) -> Result<Self, IdError> {
        let file = Path::new(argv0).file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        Self::new(file.strip_prefix("nomad-driver-").unwrap_or(&file))
    }

    /// The name of a plugin that is called `argv0` and has these `args`: `--name NAME`, else what it is called.
    ///
    /// # Errors
    /// When there is something else in `args`, or what remains is no name.
    pub fn of_plugin(argv0: &str, args: &[String]) -> Result<Self, IdError> {
        match args {
            [] => Self::from_argv0(argv0),
            [flag, name] if flag == "--name" => Self::new(name),
            [one] if one.starts_with("--name=") => Self::new(&one["--name=".len()..]),
            other => Err(IdError::PluginArgs(other.to_vec())),
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whose defaults hold.
    pub fn flavor(&self) -> Flavor {
        if self.0 == DROP_IN_NAME { Flavor::DropIn } else { Flavor::Secure }
    }
}

impl fmt::Display for DriverName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which set of defaults holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavor {
    /// Our own name: closed unless opened.
    Secure,
    /// `containerd-driver`: what the old driver did.
    DropIn,
}

/// Nomad's task id: `<alloc id>/<task name>/<8 hex>`, unique per start attempt, opaque to us.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TaskId(pub String);

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A container's name for shims and runtimes: at most 64 characters of `[A-Za-z0-9-]`, which suits containerd (76,
/// single separators), runc and crun alike.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ContainerId(String);

impl ContainerId {
    /// A readable prefix from the task's name and a hash of allocation, task and attempt. Any name Nomad allows works:
    /// spaces, 200 characters, double dashes.
    pub fn derive(alloc_id: &str, task_name: &str, task_id: &TaskId) -> Self {
        let mut hash = Sha256::new();
        for part in [alloc_id, task_name, task_id.0.as_str()] {
            hash.update(part.as_bytes());
            hash.update([0]);
        }
        let hash = hex(&hash.finalize()[..10]);
        let mut prefix = String::new();
        for c in task_name.chars() {
            if prefix.len() == 32 {
                break;
            }
            if c.is_ascii_alphanumeric() {
                prefix.push(c);
            } else if !prefix.is_empty() && !prefix.ends_with('-') {
                prefix.push('-');
            }
        }
        let prefix = prefix.trim_end_matches('-');
        Self(if prefix.is_empty() { format!("task-{hash}") } else { format!("{prefix}-{hash}") })
    }

    /// The container that a file or directory of ours is named after; None for a name that we never gave.
    pub fn from_file_name(name: &str) -> Option<Self> {
        let ours =
            name.len() <= 64 && name.contains('-') && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        ours.then(|| Self(name.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A content digest, `sha256:<64 hex>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// Checks a digest's form. Other algorithms than SHA-256 are refused: containerd itself stores no others.
    ///
    /// # Errors
    /// When the form is wrong.
    pub fn new(text: &str) -> Result<Self, IdError> {
        let valid = text.strip_prefix("sha256:").is_some_and(|hex| {
            hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        });
        if valid { Ok(Self(text.to_owned())) } else { Err(IdError::Digest(text.to_owned())) }
    }

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_hash(&Sha256::digest(bytes))
    }

    /// The digest of a finished SHA-256.
    pub fn from_hash(hash: &[u8]) -> Self {
        Self(format!("sha256:{}", hex(hash)))
    }

    /// The digest as text, algorithm included.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 12 hexadecimal digits, for people.
    pub fn short(&self) -> &str {
        &self.0[7..19]
    }
}

impl TryFrom<String> for Digest {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        Self::new(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a stack of unpacked layers
/// (OCI image spec, "Layer `ChainID`"): `chain(0) = diff(0)`, `chain(n) = sha256(chain(n-1) + " " + diff(n))`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChainId(Digest);

impl ChainId {
    /// The chain after `diff` is laid on `parent`.
    pub fn next(parent: Option<&Self>, diff: &Digest) -> Self {
        match parent {
            None => Self(diff.clone()),
            Some(parent) => Self(Digest::of(format!("{} {diff}", parent.0).as_bytes())),
        }
    }

    /// The chain as text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl fmt::Display for ChainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// `bytes` fresh random bytes in hexadecimal, for names that must not collide.
///
/// # Panics
/// When the kernel has no randomness to give, which `getrandom(2)` rules out once the system has booted.
pub fn random_hex(bytes: usize) -> String {
    let mut buffer = vec![0u8; bytes];
    // SAFETY: the pointer and the length describe the buffer just made.
    let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    assert_eq!(usize::try_from(got), Ok(bytes), "getrandom gives up to 256 bytes whole");
    hex(&buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn driver_name_follows_the_link() {
        for (argv0, name) in [
            ("/opt/plugins/nomad-driver-shim", "shim"),
            ("/opt/plugins/containerd-driver", "containerd-driver"),
            ("nomad-driver-x", "x"),
        ] {
            assert_eq!(DriverName::from_argv0(argv0).map(|n| n.0), Ok(name.to_owned()));
        }
        assert!(DriverName::from_argv0("nomad-driver-").is_err());
        assert!(DriverName::new("a/b").is_err());
        assert!(DriverName::new("..").is_err());
    }

    #[test]
    fn chain_ids_are_those_of_the_image_spec() {
        let diff = |c: char| Digest::new(&format!("sha256:{}", c.to_string().repeat(64))).expect("well formed");
        let first = ChainId::next(None, &diff('a'));
        assert_eq!(first.as_str(), diff('a').as_str());
        let second = ChainId::next(Some(&first), &diff('b'));
        let expected = Digest::of(format!("{} {}", diff('a'), diff('b')).as_bytes());
        assert_eq!(second.as_str(), expected.as_str());
    }

    proptest! {
        #[test]
        fn container_ids_fit_the_strictest_rule(alloc in ".*", task in ".*", attempt in ".*") {
            let id = ContainerId::derive(&alloc, &task, &TaskId(attempt));
            let text = id.as_str();
            prop_assert!(text.len() <= 64);
            prop_assert!(text.split('-').all(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric())));
        }
    }
}
