//! A runsc kept for as long as sandboxes of it run. A sandbox answers only the runsc that it was made by, so one that was
//! upgraded or removed under running tasks could neither exec in them nor end them.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use crate::{
    ids::{Digest, random_hex},
    places::{Places, make_dir},
};

/// Where runsc looks for programs of its own, beside itself (gVisor's `gvisorbinaries`).
const SIDECARS: &str = "gvisor-bin";
/// Older ones that nothing was made of since are removed.
const OLD: Duration = Duration::from_secs(24 * 3600);

/// A program's file, by what does not change when it gets another name.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Program(String);

impl Program {
    /// That file now; None when it is gone.
    pub(super) fn of(binary: &Path) -> Option<Self> {
        let file = fs::metadata(binary).ok()?;
        let text = format!("{}.{}.{}.{}.{}", file.dev(), file.ino(), file.size(), file.mtime(), file.mtime_nsec());
        Some(Self(Digest::of(text.as_bytes()).short()[..12].to_owned()))
    }

    fn dir(&self, places: &Places) -> PathBuf {
        places.wrappers().join(format!("kept-{}", self.0))
    }
}

/// Another name of the program, or a copy of it where the state directory is on another file system; with its sidecars.
/// Blocks.
///
/// # Errors
/// As the file system; the program itself serves then.
pub(super) fn keep(binary: &Path, program: &Program, places: &Places) -> io::Result<PathBuf> {
    let dir = program.dir(places);
    let kept = dir.join("runsc");
    let size = fs::metadata(binary)?.len();
    match fs::metadata(&kept) {
        Ok(file) if file.len() == size => return Ok(kept),
        // A copy whose content was lost with the host's power.
        Ok(_) => fs::remove_dir_all(&dir)?,
        Err(_) => {}
    }
    let real = fs::canonicalize(binary)?;
    let draft = places.wrappers().join(format!("draft-{}", random_hex(6)));
    make_dir(&draft)?;
    let filled = (|| {
        same(&real, &draft.join("runsc"))?;
        let sidecars = real.with_file_name(SIDECARS);
        if sidecars.is_dir() {
            make_dir(&draft.join(SIDECARS))?;
            for entry in fs::read_dir(&sidecars)? {
                let entry = entry?;
                same(&fs::canonicalize(entry.path())?, &draft.join(SIDECARS).join(entry.file_name()))?;
            }
        }
        fs::rename(&draft, &dir)
    })();
    if filled.is_err() {
        let _ = fs::remove_dir_all(&draft);
        // Somebody else was faster.
        if !kept.exists() {
            filled?;
        }
    }
    Ok(kept)
}

fn same(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            fs::copy(from, to)?;
            fs::File::open(to)?.sync_all()
        }
        other => other,
    }
}

/// Removes those that are not `current` and were made long ago. For when no task runs that could be of one.
pub(super) fn prune(places: &Places, current: &[Program]) {
    let now = SystemTime::now();
    for entry in fs::read_dir(places.wrappers()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let in_use = current.iter().any(|program| entry.path() == program.dir(places));
        let made = entry.metadata().and_then(|file| file.modified()).unwrap_or(now);
        let old = now.duration_since(made).is_ok_and(|age| age > OLD);
        if (name.starts_with("kept-") || name.starts_with("draft-"))
            && old
            && !in_use
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            tracing::debug!(%error, "an old runsc stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_program_outlives_its_name() {
        let directory = tempfile::tempdir().expect("a directory");
        let (places, binary) = (Places::new(directory.path(), directory.path()), directory.path().join("runsc"));
        fs::write(&binary, "one").expect("written");
        fs::create_dir(directory.path().join(SIDECARS)).expect("made");
        fs::write(directory.path().join(SIDECARS).join("sentry"), "s").expect("written");
        let program = Program::of(&binary).expect("it is there");
        let kept = keep(&binary, &program, &places).expect("kept");
        assert_eq!(Program::of(&binary), Some(program.clone()), "another name changes nothing");
        assert_eq!(keep(&binary, &program, &places).expect("kept"), kept);
        fs::remove_file(&binary).expect("removed");
        fs::write(&binary, "two").expect("written");
        assert_ne!(Program::of(&binary), Some(program.clone()));
        assert_eq!(fs::read_to_string(&kept).expect("read"), "one");
        assert_eq!(fs::read_to_string(kept.with_file_name(SIDECARS).join("sentry")).expect("read"), "s");
        prune(&places, &[]);
        assert!(kept.exists(), "it is not old");
    }
}
