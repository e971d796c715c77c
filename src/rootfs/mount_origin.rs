//! What asks for a mount.

use std::{fmt, path::PathBuf};

/// What asks for a mount. Errors name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountOrigin {
    /// A `mounts` block of the job, by its number.
    Job(usize),
    /// A volume of the job or another mount that Nomad sends, by its path on the host.
    Volume(PathBuf),
    /// An option or a variable whose mount the task can't do without, such as `NOMAD_TASK_DIR`.
    Required(&'static str),
    /// An option whose mount is only a default: what the job mounts at the same target takes its place.
    Default(&'static str),
    /// A VOLUME of the image.
    Image,
}

impl fmt::Display for MountOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Job(number) => write!(f, "mounts[{number}]"),
            Self::Volume(host_path) => write!(f, "volume_mount of {host_path:?}"),
            Self::Required(option) | Self::Default(option) => f.write_str(option),
            Self::Image => f.write_str("VOLUME"),
        }
    }
}

/// How strongly a mount is asked for. Of two mounts with one target the stronger one is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Strength {
    /// Only the image names the target.
    OfImage,
    /// The driver makes the mount unless the job makes another one.
    Default,
    /// The job or Nomad demands the mount.
    Demanded,
}

impl MountOrigin {
    /// Returns how strongly the mount is asked for.
    pub(super) fn strength(&self) -> Strength {
        match self {
            Self::Job(_) | Self::Volume(_) | Self::Required(_) => Strength::Demanded,
            Self::Default(_) => Strength::Default,
            Self::Image => Strength::OfImage,
        }
    }
}
