//! Creates, writes, replaces and removes files and directories.

use std::{
    fs,
    io::{self, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::{
            fs::{DirBuilderExt as _, OpenOptionsExt as _},
            net::UnixListener,
        },
    },
    path::Path,
};

use nix::sys::{
    socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket},
    stat::{Mode, fchmod},
};

use crate::ids::random_hex;

/// A step of replacing a file has failed.
#[derive(Debug, thiserror::Error)]
#[error("could not {doing} the file")]
pub struct ReplaceError {
    /// The step that failed: `write` or `rename`.
    pub doing: &'static str,
    /// The error of the system call.
    pub source: io::Error,
}

impl From<ReplaceError> for io::Error {
    fn from(error: ReplaceError) -> Self {
        error.source
    }
}

/// Creates `path` and its parents with access for root only (0700). The root file systems of tasks are below: a local
/// user with access could run a task's set-user-id programs on the host (CVE-2021-41091).
///
/// # Errors
/// Fails as mkdir(2) does.
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Creates a directory that every user may list and enter (0755), because containers see it.
///
/// # Errors
/// Fails as mkdir(2) does.
pub fn create_public_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(path)
}

/// Opens a lock file of the driver, and creates it if it is missing. Only root can open it, because read access is
/// enough to take a lock.
///
/// # Errors
/// Fails as open(2) does.
pub fn open_lock_file(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Opens a new or truncated file that only root can read (0600).
///
/// # Errors
/// Fails as open(2) does.
pub fn create_private(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Listens at a socket to which only root can connect (0600). The socket's file has this mode from its beginning: the
/// kernel creates it with the mode of the descriptor (linux, `unix_bind_bsd`).
///
/// # Errors
/// Fails as bind(2) and listen(2) do.
pub fn listen_privately(path: &Path) -> io::Result<UnixListener> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::MAXCONN)?;
    Ok(fd.into())
}

/// Writes a file that only root can read (0600), and removes it if writing fails, as on a full file system.
///
/// # Errors
/// Fails when the file can't be created or written.
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    create_private(path)?.write_all(content).inspect_err(|_| remove_incomplete(path))
}

/// Writes a file completely or not at all: the function writes a draft in the same directory and renames it. It creates
/// the directory if it is missing.
///
/// # Errors
/// Fails when a step fails; the draft is removed then.
pub fn write_atomically(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        create_private_dir(parent)?;
    }
    let draft = path.with_extension(format!("{}.tmp", random_hex(4)));
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
    Ok(replace_by_draft(path, (&draft, file), content)?)
}

/// Writes a file that only root can read (0600), completely or not at all. Unlike [`write_atomically`], the caller
/// names the draft, because other code lists the directory and would take a draft of any other name for something else.
/// The directory must exist.
///
/// # Errors
/// Fails when a step fails; the draft is removed then.
pub fn replace_private(path: &Path, draft: &Path, content: &[u8]) -> Result<(), ReplaceError> {
    let file = create_private(draft).map_err(|source| ReplaceError { doing: "write", source })?;
    replace_by_draft(path, (draft, file), content)
}

/// Writes the draft and renames it. The draft is not synced to disk: what the driver writes is of no use after a crash
/// of the host, or can be made again.
fn replace_by_draft(path: &Path, (draft, mut file): (&Path, fs::File), content: &[u8]) -> Result<(), ReplaceError> {
    let failed = |doing| move |source| ReplaceError { doing, source };
    let written = file.write_all(content).map_err(failed("write"));
    let replaced = written.and_then(|()| fs::rename(draft, path).map_err(failed("rename")));
    replaced.inspect_err(|_| remove_incomplete(draft))
}

/// Removes a file that could not be written completely: half of it is of no use and takes space.
fn remove_incomplete(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!(path = %path.display(), %error, "could not remove an incompletely written file");
    }
}

/// Turns the error that a file does not exist into `None`.
///
/// # Errors
/// Returns every other error.
pub fn none_if_missing<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes a file, if there is one.
///
/// # Errors
/// Fails as unlink(2) does, but for a missing file.
pub fn remove_file_if_exists(path: &Path) -> io::Result<()> {
    none_if_missing(fs::remove_file(path)).map(drop)
}

/// Removes an empty directory, if there is one.
///
/// # Errors
/// Fails as rmdir(2) does, but for a missing directory.
pub fn remove_dir_if_exists(path: &Path) -> io::Result<()> {
    none_if_missing(fs::remove_dir(path)).map(drop)
}

/// Removes a directory with everything in it, if there is one.
///
/// # Errors
/// Fails when the directory can't be listed, or an entry can't be removed.
pub fn remove_dir_all_if_exists(path: &Path) -> io::Result<()> {
    none_if_missing(fs::remove_dir_all(path)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_can_not_be_replaced_leaves_no_draft() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        // rename(2) does not put a file in the place of a directory.
        let (path, draft) = (directory.path().join("x.json"), directory.path().join("draft"));
        fs::create_dir(&path).expect("made");
        write_atomically(&path, b"text", 0o600).expect_err("a directory is in its place");
        let failed = replace_private(&path, &draft, b"text").expect_err("a directory is in its place");
        assert_eq!(failed.doing, "rename");
        assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1);
    }

    #[test]
    fn a_private_socket_is_never_open_to_others() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("sock");
        let _listener = listen_privately(&path).expect("bound");
        // Nothing has changed the mode of the file since bind(2).
        let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(&path).expect("there"));
        assert_eq!(mode & 0o777, 0o600);
        std::os::unix::net::UnixStream::connect(&path).expect("it listens");
        listen_privately(&path).expect_err("the path is taken");
    }

    #[test]
    fn only_what_is_missing_counts_as_removed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("x");
        for remove in [remove_file_if_exists, remove_dir_if_exists, remove_dir_all_if_exists] {
            remove(&path).expect("it is missing");
        }
        fs::create_dir(&path).expect("made");
        fs::write(path.join("y"), "").expect("written");
        remove_file_if_exists(&path).expect_err("a directory");
        remove_dir_if_exists(&path).expect_err("not empty");
        remove_dir_all_if_exists(&path).expect("removed");
        assert!(!path.exists());
    }
}
