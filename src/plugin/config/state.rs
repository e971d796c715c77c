//! Reads the agent's block `state {}`.

use std::time::Duration;

use super::{block::Block, faults::Faults};
use crate::{ids::DriverName, places::Places, rootfs::UpperStorage, task::OrphanPolicy};

/// The settings of the block `state {}`.
pub(super) struct State {
    pub(super) places: Places,
    pub(super) upper: UpperStorage,
    pub(super) grace: Duration,
    pub(super) orphans: OrphanPolicy,
    pub(super) orphan_timeout: Duration,
}

/// Reads `state {}`. The driver's name decides which directories are the defaults.
pub(super) fn state(block: Block<'_>, name: &DriverName, faults: &mut Faults) -> State {
    State {
        grace: block.duration("grace", "5m", faults),
        orphans: orphans(block, faults),
        orphan_timeout: block.duration("orphan_timeout", "10m", faults),
        upper: upper(block, faults),
        places: places(block, name, faults),
    }
}

fn orphans(block: Block<'_>, faults: &mut Faults) -> OrphanPolicy {
    match block.text("orphans") {
        None | Some("keep") => OrphanPolicy::Keep,
        Some("end") => OrphanPolicy::End,
        Some(other) => {
            faults.push(format!("state.orphans = {other:?} is not keep or end"));
            OrphanPolicy::Keep
        }
    }
}

/// Reads `upper` and `upper_size`.
fn upper(block: Block<'_>, faults: &mut Faults) -> UpperStorage {
    let size = block.text("upper_size");
    if let Some(size) = size.filter(|size| !is_tmpfs_size(size)) {
        faults.push(format!("state.upper_size = {size:?} is not a size such as 256m, or a share such as 10%"));
    }
    match block.text("upper") {
        None | Some("disk") => {
            if let Some(size) = size {
                faults.push(format!("state.upper_size = {size:?} needs upper = \"tmpfs\""));
            }
            UpperStorage::Disk
        }
        Some("tmpfs") => UpperStorage::Tmpfs { size: size.map(str::to_owned) },
        Some(other) => {
            faults.push(format!("state.upper = {other:?} is not disk or tmpfs"));
            UpperStorage::Disk
        }
    }
}

/// Says whether `text` is a size in the format of tmpfs(5).
fn is_tmpfs_size(text: &str) -> bool {
    let digits = text.trim_end_matches(['k', 'K', 'm', 'M', 'g', 'G', '%']);
    text.len() - digits.len() <= 1 && !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

fn places(block: Block<'_>, name: &DriverName, faults: &mut Faults) -> Places {
    let defaults = Places::of(name);
    let run = block.path("run_dir", defaults.run().to_owned(), faults);
    let state = block.path("state_dir", defaults.state().to_owned(), faults);
    Places::new(run, state)
}
