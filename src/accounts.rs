//! Reads and checks the passwd(5) and group(5) files of a root file system whose content is not trusted: an image's.
//!
//! The driver reads the two files to find users by name, and the runtime reads them again when it creates the
//! container: runc for the user's groups and home directory (moby/sys, `user.GetExecUserPath`), crun for the home
//! directory (its `utils.c`, `set_home_env`). A FIFO in the place of such a file would make the runtime wait, and a
//! device could be read without end.

use std::{
    fs::File,
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Component, Path, PathBuf},
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

/// The largest file that is read. Real passwd and group files have a few kilobytes, and none has a megabyte.
const FILE_MAX: u64 = 1 << 20;

/// The passwd file, relative to the root.
pub const PASSWD: &str = "etc/passwd";
/// The group file, relative to the root.
pub const GROUP: &str = "etc/group";

/// Why a passwd or group file is refused.
#[derive(Debug, thiserror::Error)]
pub enum AccountsError {
    /// The file is a directory, FIFO, socket or device.
    #[error("/{name} is {kind}; it must be a plain file")]
    NotPlain {
        /// The file, relative to the root.
        name: String,
        /// What the file is instead, with its article: "a FIFO".
        kind: &'static str,
    },
    /// The file is a symlink that can't be followed within the root file system.
    #[error("/{name} is a link that leads to no file of the image; it must be a plain file")]
    LeadsNowhere {
        /// The file, relative to the root.
        name: String,
    },
    /// The file is too large to be a passwd or group file.
    #[error("/{name} is larger than {FILE_MAX} bytes")]
    TooLarge {
        /// The file, relative to the root.
        name: String,
    },
    /// The file can't be opened or read.
    #[error("could not read /{name}")]
    Read {
        /// The file, relative to the root.
        name: String,
        /// The error of the system call.
        source: io::Error,
    },
}

/// Reads a file with every symlink resolved inside `root`. A missing file counts as empty.
///
/// # Errors
/// Fails when the file is no plain file, is too large, or can't be read.
pub fn read(root: &Path, name: &str) -> Result<String, AccountsError> {
    let failed = |source| AccountsError::Read { name: name.to_owned(), source };
    let root = File::open(root).map_err(failed)?;
    let Some(named) = plain_file(root.as_fd(), name)? else { return Ok(String::new()) };
    let file = File::open(format!("/proc/self/fd/{}", named.as_raw_fd())).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    // A truncated file could end in the middle of an entry and so change the meaning of that entry.
    if bytes.len() as u64 > FILE_MAX {
        return Err(AccountsError::TooLarge { name: name.to_owned() });
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Checks that the runtime will find plain files, both in the mounted root file system and in the bind mounts that
/// cover it. `binds` are pairs of the target in the container and the source on the host. The check makes a few system
/// calls and waits for nothing.
///
/// # Errors
/// Fails with the first file that is not a plain file.
pub fn check<'a>(root: &Path, binds: impl Iterator<Item = (&'a Path, &'a Path)>) -> Result<(), AccountsError> {
    let opened = open(root, "")?;
    for name in [PASSWD, GROUP] {
        plain_file(opened.as_fd(), name)?;
    }
    for (target, source) in binds {
        let target = normal(target);
        for name in [PASSWD, GROUP] {
            match Path::new(name).strip_prefix(&target).map(Path::to_str) {
                Ok(Some("")) => check_is_plain(&open(source, name)?, name)?,
                // The bind mount covers a directory above the file. That is `/etc`: nothing is mounted at the root.
                Ok(Some(below)) if below != name => drop(plain_file(open(source, name)?.as_fd(), below)?),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Removes the leading slash, empty components and single dots from a path in the container.
fn normal(target: &Path) -> PathBuf {
    target.components().filter(|part| matches!(part, Component::Normal(_))).collect()
}

/// Opens a descriptor that only refers to a file (`O_PATH`): the call opens no FIFO and no device.
fn open(path: &Path, name: &str) -> Result<File, AccountsError> {
    let opened = File::options().read(true).custom_flags(libc::O_PATH).open(path);
    opened.map_err(|source| AccountsError::Read { name: name.to_owned(), source })
}

/// Opens a descriptor that only refers to the file (`O_PATH`), with every symlink resolved inside `root`; `None` when
/// there is no such file.
///
/// The file is checked by this descriptor before it is opened for reading, because opening some devices has effects on
/// the host.
fn plain_file(root: BorrowedFd<'_>, name: &str) -> Result<Option<File>, AccountsError> {
    let how = |flags| {
        OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | flags)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS)
    };
    let leads_nowhere = || AccountsError::LeadsNowhere { name: name.to_owned() };
    match openat2(root, name, how(OFlag::empty())) {
        Ok(named) => {
            let named = File::from(named);
            if is_whiteout(&named).map_err(|source| AccountsError::Read { name: name.to_owned(), source })? {
                return Ok(None);
            }
            check_is_plain(&named, name)?;
            Ok(Some(named))
        }
        // This distinguishes a missing file from a link to a missing file. In the container, the link may still lead to
        // a FIFO or device.
        Err(nix::Error::ENOENT) if openat2(root, name, how(OFlag::O_NOFOLLOW)).is_ok() => Err(leads_nowhere()),
        Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => Ok(None),
        Err(nix::Error::ELOOP) => Err(leads_nowhere()),
        Err(errno) => Err(AccountsError::Read { name: name.to_owned(), source: errno.into() }),
    }
}

/// Returns whether the entry is a whiteout, which means that there is no such file. An image of one layer is read
/// without overlayfs, which would hide whiteouts (Documentation/filesystems/overlayfs.rst, "whiteouts").
fn is_whiteout(named: &File) -> io::Result<bool> {
    let metadata = named.metadata()?;
    Ok(metadata.file_type().is_char_device() && metadata.rdev() == 0)
}

/// Refuses everything but a plain file.
fn check_is_plain(named: &File, name: &str) -> Result<(), AccountsError> {
    let failed = |source| AccountsError::Read { name: name.to_owned(), source };
    let kind = named.metadata().map_err(failed)?.file_type();
    let kind = match () {
        () if kind.is_file() => return Ok(()),
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        () if kind.is_char_device() || kind.is_block_device() => "a device",
        () => "something else",
    };
    Err(AccountsError::NotPlain { name: name.to_owned(), kind })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use std::{fs, os::unix::fs::symlink};

    fn root() -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir_all(root.path().join("etc")).expect("made");
        root
    }

    fn fifo(path: &Path) {
        nix::unistd::mkfifo(path, Mode::S_IRWXU).expect("made");
    }

    #[test]
    fn plain_files_are_read_through_links_within_the_image() {
        let root = root();
        assert_eq!(read(root.path(), PASSWD).expect("a missing file is fine"), "");
        fs::write(root.path().join("etc/real"), "a:x:1:1::/:\n").expect("written");
        symlink("/etc/../../etc/real", root.path().join("etc/passwd")).expect("linked");
        assert_eq!(read(root.path(), PASSWD).expect("read"), "a:x:1:1::/:\n");
        check(root.path(), std::iter::empty()).expect("fine");
        let long = fs::File::create(root.path().join("etc/group")).expect("made");
        long.set_len(FILE_MAX + 1).expect("long");
        assert!(matches!(read(root.path(), GROUP), Err(AccountsError::TooLarge { .. })));
    }

    #[test]
    fn everything_else_is_named() {
        type Make = fn(&Path);
        let cases: [(&str, Make); 6] = [
            ("a FIFO", fifo),
            ("a directory", |path| fs::create_dir(path).expect("made")),
            ("a socket", |path| drop(std::os::unix::net::UnixListener::bind(path).expect("bound"))),
            ("a link that leads to no file", |path| symlink("/proc/1/root/etc/passwd", path).expect("linked")),
            ("a link that leads to no file", |path| symlink("passwd", path).expect("linked")),
            ("a link that leads to no file", |path| symlink("/nowhere", path).expect("linked")),
        ];
        for (kind, make) in cases {
            let root = root();
            make(&root.path().join("etc/passwd"));
            for error in [
                read(root.path(), PASSWD).map(drop).expect_err(kind),
                check(root.path(), std::iter::empty()).expect_err(kind),
            ] {
                assert!(error.to_string().starts_with(&format!("/etc/passwd is {kind}")), "{error}");
            }
        }
    }

    #[test]
    fn what_is_bound_over_them_counts_too() {
        let (image, own) = (root(), root());
        fifo(&own.path().join("etc/group"));
        let (fifo, etc) = (own.path().join("etc/group"), own.path().join("etc"));
        for (target, source) in
            [("/etc/group", &fifo), ("//etc/./passwd", &fifo), ("/etc", &etc), ("/etc/", &etc), ("/etc/passwd", &etc)]
        {
            let binds = [(Path::new(target), source.as_path())];
            assert!(check(image.path(), binds.into_iter()).is_err(), "{target}");
        }
        for target in ["/etc/group2", "/srv", "/etc/passwd/x"] {
            let binds = [(Path::new(target), fifo.as_path())];
            check(image.path(), binds.into_iter()).expect(target);
        }
    }
}
