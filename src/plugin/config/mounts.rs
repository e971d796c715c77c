//! A job's `mounts`.

use crate::{
    ids::Flavor,
    plugin::decode::Values,
    rootfs::{
        mounts::{MountKind, MountRequest},
        target::{MountTarget, SysTargets},
    },
};

/// What a job may say of a bind, under our own name (mount(8)).
const BIND_OPTIONS: &[&str] = &[
    "bind",
    "rbind",
    "ro",
    "rw",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "private",
    "rprivate",
    "slave",
    "rslave",
    "shared",
    "rshared",
];
/// And of a tmpfs (tmpfs(5)); those with `=` take a value.
const TMPFS_OPTIONS: &[&str] = &[
    "ro",
    "rw",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "noatime",
    "relatime",
    "size=",
    "mode=",
    "uid=",
    "gid=",
    "nr_inodes=",
    "nr_blocks=",
];

pub(super) fn mount(block: &Values, flavor: Flavor, sys: SysTargets) -> Result<MountRequest, String> {
    // A missing target was noted by the decoder; the empty one here is not told twice.
    let target = block.text("target").unwrap_or("/-");
    let target = MountTarget::parse(target).map_err(|problem| format!("target = {problem}"))?;
    target.check(sys).map_err(|problem| format!("target = {problem}"))?;
    let kind = block.filled("type").unwrap_or("volume");
    let source = block.filled("source");
    let options = block.list("options").unwrap_or_default().to_vec();
    // Runtimes take anything with these options for a bind, whatever its type says.
    let binds = options.iter().any(|option| option == "bind" || option == "rbind");
    let kind = match kind {
        "bind" | "volume" => None,
        _ if binds => None,
        other if other == "tmpfs" || flavor == Flavor::DropIn => Some(other),
        other => return Err(format!("type = {other:?} is not bind, volume or tmpfs")),
    };
    if flavor == Flavor::Secure {
        let allowed = if kind.is_none() { BIND_OPTIONS } else { TMPFS_OPTIONS };
        let known = |option: &str| {
            allowed.iter().any(|known| {
                known
                    .strip_suffix('=')
                    .map_or(option == *known, |key| option.split_once('=').is_some_and(|(name, _)| name == key))
            })
        };
        if let Some(strange) = options.iter().find(|option| !known(option)) {
            return Err(format!("options: {strange:?} is not one of {}", allowed.join(", ")));
        }
    }
    let kind = match kind {
        None => {
            let source = source.ok_or_else(|| "source is required for a bind".to_owned())?;
            if flavor == Flavor::DropIn && options.is_empty() {
                return Err(
                    "options must not be empty for a bind; use [\"rbind\", \"ro\"] or [\"rbind\", \"rw\"]".to_owned()
                );
            }
            MountKind::Bind { source: source.to_owned() }
        }
        // A tmpfs has no source; what a job writes there must not mean anything.
        Some("tmpfs") => MountKind::FileSystem { kind: "tmpfs".to_owned(), source: "tmpfs".to_owned() },
        Some(other) => MountKind::FileSystem { kind: other.to_owned(), source: source.unwrap_or(other).to_owned() },
    };
    Ok(MountRequest { kind, target, options })
}
