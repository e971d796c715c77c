//! Pins the program of runsc for as long as sandboxes of it run. A sandbox can only be controlled by the runsc that
//! created it. If runsc were upgraded or removed under running tasks, nothing could exec in the tasks or end them.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use crate::{
    files::create_private_dir,
    ids::{Digest, random_hex},
    places::Places,
};

/// The directory next to runsc in which runsc looks for its helper programs (gVisor's `gvisorbinaries`).
const SIDECARS: &str = "gvisor-bin";
/// The age above which copies of replaced programs are removed.
const UNUSED_MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// The identity of a program's file, which does not change when the file gets another name.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct BinaryId(String);

impl BinaryId {
    /// Returns the identity of the file that is at this path now. `None` if there is none.
    pub(super) fn of(binary: &Path) -> Option<Self> {
        let file = fs::metadata(binary).ok()?;
        let text = format!("{}.{}.{}.{}.{}", file.dev(), file.ino(), file.size(), file.mtime(), file.mtime_nsec());
        Some(Self(Digest::of(text.as_bytes()).short()[..12].to_owned()))
    }

    fn dir(&self, places: &Places) -> PathBuf {
        places.wrappers().join(format!("kept-{}", self.0))
    }
}

/// Pins a program and its helper programs: hard links to them, or copies if the state directory is on another file
/// system. Returns the path of the pinned program. This function blocks.
///
/// # Errors
/// When a file can't be linked, copied or written. The caller can use the program itself then.
pub(super) fn pin(binary: &Path, program: &BinaryId, places: &Places) -> io::Result<PathBuf> {
    let dir = program.dir(places);
    let kept = dir.join("runsc");
    let size = fs::metadata(binary)?.len();
    match fs::metadata(&kept) {
        Ok(file) if file.len() == size => return Ok(kept),
        // The content of this copy was lost in a power failure.
        Ok(_) => fs::remove_dir_all(&dir)?,
        Err(_) => {}
    }
    let real = fs::canonicalize(binary)?;
    let draft = places.wrappers().join(format!("draft-{}", random_hex(6)));
    create_private_dir(&draft)?;
    let filled = (|| {
        link_or_copy(&real, &draft.join("runsc"))?;
        let sidecars = real.with_file_name(SIDECARS);
        if sidecars.is_dir() {
            create_private_dir(&draft.join(SIDECARS))?;
            for entry in fs::read_dir(&sidecars)? {
                let entry = entry?;
                link_or_copy(&fs::canonicalize(entry.path())?, &draft.join(SIDECARS).join(entry.file_name()))?;
            }
        }
        fs::rename(&draft, &dir)
    })();
    if filled.is_err() {
        let _ = fs::remove_dir_all(&draft);
        // It is no error if a concurrent call has pinned the program.
        if !kept.exists() {
            filled?;
        }
    }
    Ok(kept)
}

fn link_or_copy(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            fs::copy(from, to)?;
            fs::File::open(to)?.sync_all()
        }
        other => other,
    }
}

/// Removes the pinned programs that are old and not among the `current` ones. The caller makes sure that no task runs
/// that may use one of them.
pub(super) fn prune(places: &Places, current: &[BinaryId]) {
    let now = SystemTime::now();
    for entry in fs::read_dir(places.wrappers()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let in_use = current.iter().any(|program| entry.path() == program.dir(places));
        let made = entry.metadata().and_then(|file| file.modified()).unwrap_or(now);
        let old = now.duration_since(made).is_ok_and(|age| age > UNUSED_MAX_AGE);
        if (name.starts_with("kept-") || name.starts_with("draft-"))
            && old
            && !in_use
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            tracing::debug!(%error, "could not remove an old pinned copy of runsc");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_program_outlives_its_name() {
        let directory = tempfile::tempdir().expect("a directory");
        let (places, binary) = (Places::new(directory.path(), directory.path()), directory.path().join("runsc"));
        fs::write(&binary, "one").expect("written");
        fs::create_dir(directory.path().join(SIDECARS)).expect("made");
        fs::write(directory.path().join(SIDECARS).join("sentry"), "s").expect("written");
        let program = BinaryId::of(&binary).expect("it is there");
        let kept = pin(&binary, &program, &places).expect("pinned");
        assert_eq!(BinaryId::of(&binary), Some(program.clone()), "another name does not change the identity");
        assert_eq!(pin(&binary, &program, &places).expect("pinned"), kept);
        fs::remove_file(&binary).expect("removed");
        fs::write(&binary, "two").expect("written");
        assert_ne!(BinaryId::of(&binary), Some(program.clone()));
        assert_eq!(fs::read_to_string(&kept).expect("read"), "one");
        assert_eq!(fs::read_to_string(kept.with_file_name(SIDECARS).join("sentry")).expect("read"), "s");
        prune(&places, &[]);
        assert!(kept.exists(), "a copy that is not old stays");
    }
}
