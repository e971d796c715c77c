//! The program that is the first process of a task with `init = true` (`init/` in this repository). It is a part of
//! this executable. The driver writes it to a file once, and mounts that file into containers.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use nix::sys::statvfs::{FsFlags, statvfs};

use super::{
    RootfsError,
    mounts::{MountSource, open_path},
};
use crate::files::write_atomically;

/// The program's path in a container. No image has a file there, which the mount would hide.
pub const INIT_PATH: &str = "/.nomad-init";
/// The program, which `build.rs` has compiled.
const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/init"));
/// The mode of its file: users of all tasks execute it.
const MODE: u32 = 0o755;

/// The first process of a task's container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstProcess {
    /// The task's command.
    Command,
    /// The init program, which starts the command as its child.
    Init,
}

impl FirstProcess {
    /// Returns the arguments of the first process for a task with this command.
    pub(crate) fn arguments(self, command: Vec<String>) -> Vec<String> {
        match self {
            Self::Command => command,
            Self::Init => [INIT_PATH.to_owned(), "--".to_owned()].into_iter().chain(command).collect(),
        }
    }
}

/// Returns the path of the program's file in `directory`.
pub fn program_path(directory: &Path) -> PathBuf {
    directory.join("init")
}

/// Opens the program's file, which is written to `directory` if it is not there, or is another version's.
///
/// # Errors
/// Fails when a file system operation fails.
pub fn open_program(directory: &Path) -> Result<MountSource, RootfsError> {
    let path = program_path(directory);
    let failed =
        |doing: &'static str, path: PathBuf| move |source: io::Error| RootfsError::File { doing, path, source };
    if !is_current(&path) {
        write_atomically(&path, PROGRAM, MODE).map_err(failed("write", path.clone()))?;
        // The process's umask may have cleared some bits of the mode.
        fs::set_permissions(&path, fs::Permissions::from_mode(MODE)).map_err(failed("open to all", path.clone()))?;
    }
    check_executable(&path).map_err(failed("execute", path.clone()))?;
    open_path(&path).and_then(MountSource::of).map_err(failed("open", path))
}

/// Refuses a file system on which no program can be executed: a mount of the file would not be executable either.
fn check_executable(path: &Path) -> io::Result<()> {
    if statvfs(path)?.flags().contains(FsFlags::ST_NOEXEC) {
        let problem = "init = true needs a state_dir on a file system that is not mounted noexec";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, problem));
    }
    Ok(())
}

/// Returns whether the file is this version's program. A file that can't be read is written again.
fn is_current(path: &Path) -> bool {
    let has_mode = fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o7777 == MODE);
    has_mode && fs::read(path).is_ok_and(|content| content == PROGRAM)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Containers have no libc that fits, and no loader.
    #[test]
    fn the_program_is_static_and_small() {
        assert_eq!(PROGRAM[..4], *b"\x7fELF");
        let half = |at: usize| usize::from(u16::from_le_bytes([PROGRAM[at], PROGRAM[at + 1]]));
        let word = |at: usize| u32::from_le_bytes(PROGRAM[at..at + 4].try_into().expect("four bytes"));
        let (size, count) = (half(54), half(56));
        let first = usize::try_from(word(32)).expect("an offset");
        let interpreter = 3;
        assert!((0..count).all(|number| word(first + number * size) != interpreter), "it needs a loader");
        assert!(PROGRAM.len() < 20_000, "{} bytes", PROGRAM.len());
    }

    #[test]
    fn the_file_is_written_again_if_it_is_another_one() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let place = dir.path().join("programs");
        let path = place.join("init");
        for damage in ["missing", "old", "closed"] {
            match damage {
                "old" => fs::write(&path, "old").expect("written"),
                "closed" => fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("changed"),
                _ => {}
            }
            open_program(&place).expect("opened");
            assert!(is_current(&path), "{damage}");
        }
    }

    #[test]
    fn the_command_follows_the_program() {
        let command = || vec!["sh".to_owned(), "-c".to_owned()];
        assert_eq!(FirstProcess::Command.arguments(command()), command());
        assert_eq!(FirstProcess::Init.arguments(command()), [INIT_PATH, "--", "sh", "-c"]);
    }
}
