//! Reads a job's `mounts` blocks.

use super::faults::Faults;
use crate::{
    ids::Flavor,
    plugin::decode::Values,
    rootfs::{
        ceilings::Ceilings,
        mounts::{MountKind, MountRequest},
        same_target::SameTarget,
        target::{MountTarget, SysTargets},
        tmpfs,
    },
};

/// The options of a bind mount that a job may use under the driver's own name (mount(8)).
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

/// Reads all blocks. A fault names the block by its index.
pub(super) fn mounts(values: &Values, flavor: Flavor, ceilings: &Ceilings, faults: &mut Faults) -> Vec<MountRequest> {
    let sys = SysTargets::of(flavor, values.flag("privileged").unwrap_or(false));
    let mut mounts = Vec::new();
    // The targets so far, each with the number of its block.
    let mut targets: Vec<(usize, MountTarget)> = Vec::new();
    for (n, block) in values.blocks("mounts").iter().enumerate() {
        match mount(block, flavor, sys, ceilings) {
            Ok(mount) => {
                if SameTarget::of(flavor) == SameTarget::Refused
                    && let Some((other, target)) = targets.iter().find(|(_, target)| *target == mount.target)
                {
                    faults.push(format!(
                        "mounts[{n}].target = {:?} is the target of mounts[{other}] as well; remove one of the two, or give it another target",
                        target.path()
                    ));
                }
                targets.push((n, mount.target.clone()));
                mounts.push(mount);
            }
            Err(fault) => faults.push(format!("mounts[{n}].{fault}")),
        }
    }
    mounts
}

fn mount(block: &Values, flavor: Flavor, sys: SysTargets, ceilings: &Ceilings) -> Result<MountRequest, String> {
    // The decoder has reported a missing target; the placeholder keeps it from being reported twice.
    let target = block.text("target").unwrap_or("/-");
    let target = MountTarget::parse(target).map_err(|problem| format!("target = {problem}"))?;
    target.check(sys).map_err(|problem| format!("target = {problem}"))?;
    let kind = block.non_empty_text("type").unwrap_or("volume");
    let source = block.non_empty_text("source");
    let options = block.list("options").unwrap_or_default().to_vec();
    // Runtimes treat every mount with one of these options as a bind, whatever its type is.
    let binds = options.iter().any(|option| option == "bind" || option == "rbind");
    let kind = match kind {
        "bind" | "volume" => None,
        _ if binds => None,
        other if other == "tmpfs" || flavor == Flavor::ContainerdDriver => Some(other),
        other => return Err(format!("type = {other:?} is not bind, volume or tmpfs")),
    };
    let options = match kind {
        Some("tmpfs") => tmpfs::complete_options(&options, flavor, ceilings).map_err(|error| error.to_string())?,
        _ => options,
    };
    if flavor == Flavor::Strict
        && kind.is_none()
        && let Some(unknown) = options.iter().find(|option| !BIND_OPTIONS.contains(&option.as_str()))
    {
        return Err(format!("options: {unknown:?} is not one of {}", BIND_OPTIONS.join(", ")));
    }
    let kind = match kind {
        None => {
            let source = source.ok_or_else(|| "source is required for a bind".to_owned())?;
            if flavor == Flavor::ContainerdDriver && options.is_empty() {
                return Err(
                    "options must not be empty for a bind; use [\"rbind\", \"ro\"] or [\"rbind\", \"rw\"]".to_owned()
                );
            }
            MountKind::Bind { source: source.to_owned() }
        }
        // A tmpfs has no source; a source in the job must have no effect.
        Some("tmpfs") => MountKind::FileSystem { kind: "tmpfs".to_owned(), source: "tmpfs".to_owned() },
        Some(other) => MountKind::FileSystem { kind: other.to_owned(), source: source.unwrap_or(other).to_owned() },
    };
    Ok(MountRequest { kind, target, options })
}
