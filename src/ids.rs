//! Identifiers that many modules pass on. Most of these types check the text when a value is made. A [`TaskId`] is the
//! text that Nomad sends, without a check. Ids in records are read back as they were written.

use std::{fmt, path::Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Why an identifier was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdError {
    /// A driver's name is not valid.
    #[error("driver name {0:?} is not made of 1 to 63 letters, digits, dots, dashes and underscores")]
    DriverName(String),
    /// The plugin's command line has unknown arguments. They come from `args` of the plugin's block in the agent's
    /// configuration.
    #[error("plugin args {0:?}: only --name NAME is known")]
    PluginArgs(Vec<String>),
    /// An allocation's id is not valid.
    #[error("allocation id {0:?} can't be the name of a directory")]
    AllocId(String),
    /// A content digest is not valid.
    #[error("digest {0:?} is not `sha256:` with 64 lower-case hexadecimal digits")]
    Digest(String),
}

/// The name by which jobs choose this driver (`driver = "..."`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DriverName(String);

/// The name of nomad-driver-containerd. Under this name, the driver has that driver's defaults.
pub const CONTAINERD_DRIVER_NAME: &str = "containerd-driver";

impl DriverName {
    /// Checks a name.
    ///
    /// # Errors
    /// Fails when the name can't be part of a path, a cgroup's name and a node attribute alike.
    pub fn new(name: &str) -> Result<Self, IdError> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let starts = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        if starts && name.len() <= 63 && name.chars().all(is_allowed) {
            Ok(Self(name.to_owned()))
        } else {
            Err(IdError::DriverName(name.to_owned()))
        }
    }

    /// Returns the name that the plugin reports if it was started as `argv0`: the last path component without a leading
    /// `nomad-driver-`. A symlink to the program gives it the link's name, since no link is resolved.
    ///
    /// # Errors
    /// Fails when the result is not a valid name.
    pub fn from_argv0(argv0: &str) -> Result<Self, IdError> {
        let file = Path::new(argv0).file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        Self::new(file.strip_prefix("nomad-driver-").unwrap_or(&file))
    }

    /// Returns the name of a plugin that was started as `argv0` with `args`: the one of `--name NAME`, else the one of
    /// `argv0`.
    ///
    /// # Errors
    /// Fails when `args` contains anything else, or the name is not valid.
    pub fn from_command_line(argv0: &str, args: &[String]) -> Result<Self, IdError> {
        match args {
            [] => Self::from_argv0(argv0),
            [flag, name] if flag == "--name" => Self::new(name),
            [one] if one.starts_with("--name=") => Self::new(&one["--name=".len()..]),
            other => Err(IdError::PluginArgs(other.to_vec())),
        }
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the set of defaults that this name selects.
    pub fn flavor(&self) -> Flavor {
        if self.0 == CONTAINERD_DRIVER_NAME { Flavor::ContainerdDriver } else { Flavor::Strict }
    }
}

impl fmt::Display for DriverName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A set of defaults for the driver's options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavor {
    /// The defaults of every other name: what is not allowed explicitly is forbidden.
    Strict,
    /// The defaults of nomad-driver-containerd, under its name `containerd-driver`.
    ContainerdDriver,
}

/// Nomad's task id: `<alloc id>/<task name>/<8 hex>`, unique for each attempt to start a task. The driver does not
/// parse it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TaskId(pub String);

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The id of an allocation. It becomes a part of names, and of paths of cgroups. An unrecorded container has the empty
/// id, which no allocation has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AllocId(String);

impl AllocId {
    /// Checks an id.
    ///
    /// # Errors
    /// Fails when the id can't be the name of a directory.
    pub fn new(text: &str) -> Result<Self, IdError> {
        if is_file_name(text) { Ok(Self(text.to_owned())) } else { Err(IdError::AllocId(text.to_owned())) }
    }

    /// Returns the id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the first eight characters, to be shown to people.
    pub fn short(&self) -> String {
        self.0.chars().take(8).collect()
    }
}

impl fmt::Display for AllocId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The id of a shim, which is the name of its directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ShimId(String);

impl ShimId {
    /// Makes an id for a new shim.
    pub fn random() -> Self {
        Self(random_hex(6))
    }

    /// Returns the id of the shim with a directory of this name; `None` for a text that can't be a directory's name.
    pub fn from_dir_name(name: &str) -> Option<Self> {
        is_file_name(name).then(|| Self(name.to_owned()))
    }

    /// Returns the id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ShimId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns whether a file or directory can have this name.
fn is_file_name(text: &str) -> bool {
    !matches!(text, "" | "." | "..") && !text.contains(['/', '\0'])
}

/// The id of a task's container, as shims and runtimes get it: at most 64 characters of `[A-Za-z0-9-]`, which
/// containerd (76 characters, no two separators in a row), runc and crun all accept.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ContainerId(String);

impl ContainerId {
    /// Makes an id from a readable prefix of the task's name and a hash of the allocation, the task and the attempt.
    /// Every task name that Nomad allows can be used, also one with spaces, 200 characters or double dashes.
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

    /// Returns the id of the container that a file or directory of this driver is named after; `None` for a name that
    /// the driver never gives.
    pub fn from_file_name(name: &str) -> Option<Self> {
        let is_well_formed =
            name.len() <= 64 && name.contains('-') && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        is_well_formed.then(|| Self(name.to_owned()))
    }

    /// Returns the id as text.
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
    /// Checks a digest's form. Algorithms other than SHA-256 are refused: containerd itself stores no others.
    ///
    /// # Errors
    /// Fails when the form is wrong.
    pub fn new(text: &str) -> Result<Self, IdError> {
        let valid = text.strip_prefix("sha256:").is_some_and(|hex| {
            hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        });
        if valid { Ok(Self(text.to_owned())) } else { Err(IdError::Digest(text.to_owned())) }
    }

    /// Returns the digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_hash(&Sha256::digest(bytes))
    }

    /// Returns the digest that has these 32 bytes, the result of a SHA-256 computation.
    pub fn from_hash(hash: &[u8]) -> Self {
        Self(format!("sha256:{}", hex(hash)))
    }

    /// Returns the digest as text, with the algorithm.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the first 12 hexadecimal digits, to be shown to people.
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

/// The id of a stack of unpacked layers (OCI image spec, "Layer `ChainID`"):
/// `chain(0) = diff(0)`, `chain(n) = sha256(chain(n-1) + " " + diff(n))`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChainId(Digest);

impl ChainId {
    /// Returns the id of the stack that `diff` on top of `parent` makes.
    pub fn next(parent: Option<&Self>, diff: &Digest) -> Self {
        match parent {
            None => Self(diff.clone()),
            Some(parent) => Self(Digest::of(format!("{} {diff}", parent.0).as_bytes())),
        }
    }

    /// Returns the id as text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl fmt::Display for ChainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Formats bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Returns `bytes` random bytes as hexadecimal digits, for names that must not collide.
///
/// # Panics
/// Panics when the kernel returns fewer bytes, which `getrandom(2)` rules out for up to 256 bytes once the system has
/// booted.
pub fn random_hex(bytes: usize) -> String {
    let mut buffer = vec![0u8; bytes];
    // SAFETY: the pointer and the length describe the buffer that was just made.
    let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    assert_eq!(usize::try_from(got), Ok(bytes), "getrandom returns up to 256 bytes at once");
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

    #[test]
    fn ids_that_become_names_are_checked() {
        for text in ["", ".", "..", "a/b", "/", "a\0b"] {
            assert_eq!(AllocId::new(text), Err(IdError::AllocId(text.to_owned())));
            assert_eq!(ShimId::from_dir_name(text), None, "{text:?}");
        }
        assert_eq!(AllocId::new("4f1e").expect("an id").as_str(), "4f1e");
        assert_eq!(ShimId::from_dir_name("630d1a274e5a").expect("an id").as_str(), "630d1a274e5a");
        assert_ne!(ShimId::random(), ShimId::random());
        let text = serde_json::to_string(&(AllocId::default(), ShimId("a".to_owned()))).expect("JSON");
        assert_eq!(text, r#"["","a"]"#, "a newtype has the bytes of its text");
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
