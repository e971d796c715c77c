//! Symbolic links in an image at paths where something is written or mounted before the task's process runs.
//!
//! A runtime that follows such a link may leave the container (runc 1.1 creates its device nodes behind a link at
//! `/dev`). So no runtime may find such a link. This module replaces links at the paths that every container has, and
//! resolves the targets of mounts below the root. Docker does both, too (moby, `daemon/initlayer/setup_unix.go` and
//! `moby/sys/symlink`, `FollowSymlinkInScope`).

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use crate::files::none_if_missing;
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat},
    sys::stat::{Mode, SFlag, fstat, mkdirat},
    unistd::{UnlinkatFlags, unlinkat},
};

/// The number of links that the kernel follows in one path (path_resolution(7)).
const LINKS_MAX: usize = 40;

/// The kind of entry that a path of the image must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryKind {
    /// A directory, in which a file system is mounted or files are created.
    Directory,
    /// A regular file, over which another file is mounted.
    File,
}

/// Makes sure that `path` (relative to the root file system) is of the wanted kind or does not exist, and that no
/// component on the way to it is a link. An entry of another kind is changed in the container's own layer: where a
/// directory is wanted, an empty directory replaces the entry; where a file is wanted, the entry is only removed, since
/// runtimes create the file.
///
/// # Errors
/// Fails when a directory is where a file must be, or when a file system operation fails.
pub(super) fn ensure_plain(root: BorrowedFd<'_>, path: &Path, wanted: EntryKind) -> io::Result<()> {
    let mut parent: Option<OwnedFd> = None;
    let mut components = path.components().peekable();
    while let Some(component) = components.next() {
        let name = component.as_os_str();
        let at = parent.as_ref().map_or(root, OwnedFd::as_fd);
        let is_last = components.peek().is_none();
        let here = if is_last { wanted } else { EntryKind::Directory };
        match open_or_replace(at, name, here)? {
            Some(opened) => parent = Some(opened),
            None => return Ok(()),
        }
    }
    Ok(())
}

/// Opens an entry, and replaces it first if it is not of the wanted kind. Returns `None` when there is no such entry.
fn open_or_replace(at: BorrowedFd<'_>, name: &OsStr, wanted: EntryKind) -> io::Result<Option<OwnedFd>> {
    let Some(opened) = none_if_missing(open_entry(at, name))? else { return Ok(None) };
    let kind = kind_of(&opened)?;
    match wanted {
        EntryKind::Directory if kind == SFlag::S_IFDIR => return Ok(Some(opened)),
        EntryKind::File if kind == SFlag::S_IFREG => return Ok(Some(opened)),
        EntryKind::File if kind == SFlag::S_IFDIR => return Err(io::ErrorKind::IsADirectory.into()),
        EntryKind::Directory | EntryKind::File => {}
    }
    let wanted_kind = if wanted == EntryKind::File { "a regular file" } else { "a directory" };
    tracing::debug!(
        name = %name.display(),
        "an entry of the image is replaced in the container, because it is not {wanted_kind}"
    );
    unlinkat(at, name, UnlinkatFlags::NoRemoveDir)?;
    if wanted == EntryKind::File {
        return Ok(None);
    }
    mkdirat(at, name, Mode::from_bits_truncate(0o755))?;
    Ok(Some(open_entry(at, name)?))
}

/// Resolves `target` in the root file system. It follows the image's links, but never leaves the root. The resulting
/// path contains no link. Components that do not exist are taken literally. `is_mount` returns whether a mount will be
/// at a path. Entries below a mount do not belong to the image, so components there are taken literally, too.
///
/// # Errors
/// Fails when there are too many links, when a component on the way is a file, or when a file system operation fails.
pub(super) fn resolve(root: BorrowedFd<'_>, target: &Path, is_mount: impl Fn(&Path) -> bool) -> io::Result<PathBuf> {
    let outermost = target.ancestors().filter(|path| is_mount(path)).last();
    let relative = |path: &Path| path.strip_prefix("/").map(Path::to_owned).unwrap_or_default();
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
    match openat2(root, &relative(outermost.unwrap_or(target)), how) {
        // There is no link on the way, as in nearly all images.
        Ok(_) | Err(nix::Error::ENOENT) => Ok(target.to_owned()),
        Err(nix::Error::ELOOP) => resolve_stepwise(root, target, is_mount),
        Err(error) => Err(error.into()),
    }
}

/// Returns whether the image has a directory at `path`, if the links on the way are followed and never leave the root.
pub(super) fn leads_to_directory(root: BorrowedFd<'_>, path: &Path, is_mount: impl Fn(&Path) -> bool) -> bool {
    let Ok(found) = resolve(root, path, &is_mount) else { return false };
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let in_image = !found.ancestors().any(is_mount);
    in_image && openat2(root, found.strip_prefix("/").unwrap_or(&found), how).is_ok()
}

/// Resolves `target` component by component. It is the slow path of `resolve`, for a target that has links on the way.
fn resolve_stepwise(root: BorrowedFd<'_>, target: &Path, is_mount: impl Fn(&Path) -> bool) -> io::Result<PathBuf> {
    let mut waiting: VecDeque<OsString> = names(target).collect();
    // The image's entries from the root to the current one.
    let mut opened: Vec<OwnedFd> = Vec::new();
    let mut found = PathBuf::from("/");
    // The number of the last components that are taken literally: the image has no links in another mount, and none
    // below a component that does not exist.
    let mut literal = 0_usize;
    let mut links = 0;
    while let Some(name) = waiting.pop_front() {
        if name == ".." {
            found.pop();
            if literal > 0 {
                literal -= 1;
            } else {
                drop(opened.pop());
            }
            continue;
        }
        let next = found.join(&name);
        if literal > 0 || is_mount(&next) {
            literal += 1;
            found = next;
            continue;
        }
        let at = opened.last().map_or(root, OwnedFd::as_fd);
        let Some(entry) = none_if_missing(open_entry(at, &name))? else {
            literal = 1;
            found = next;
            continue;
        };
        if kind_of(&entry)? == SFlag::S_IFLNK {
            links += 1;
            if links > LINKS_MAX {
                return Err(io::Error::from_raw_os_error(libc::ELOOP));
            }
            let leads_to = PathBuf::from(readlinkat(&entry, "")?);
            if leads_to.is_absolute() {
                opened.clear();
                found = PathBuf::from("/");
            }
            names(&leads_to).rev().for_each(|name| waiting.push_front(name));
        } else {
            opened.push(entry);
            found = next;
        }
    }
    if found == Path::new("/") {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a link of the image leads to the root"));
    }
    Ok(found)
}

/// Returns the components of a path that are resolved one after the other: names and `..`.
fn names(path: &Path) -> impl DoubleEndedIterator<Item = OsString> + '_ {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

/// Opens an entry. A link is opened itself and not followed.
fn open_entry(at: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::openat(at, Path::new(name), flags, Mode::empty())?)
}

/// Returns the type of an opened entry, such as directory, regular file or link.
pub(super) fn kind_of(opened: &OwnedFd) -> io::Result<SFlag> {
    Ok(SFlag::from_bits_truncate(fstat(opened)?.st_mode & SFlag::S_IFMT.bits()))
}

/// Opens the root file system that is mounted at `path`.
///
/// # Errors
/// Fails as open(2) does.
pub(super) fn open_root(path: &Path) -> io::Result<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    File::options().read(true).custom_flags(flags).open(path).map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    fn image() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for path in ["etc", "run", "usr/lib", "data"] {
            fs::create_dir_all(dir.path().join(path)).expect("made");
        }
        fs::create_dir(dir.path().join("var")).expect("made");
        for (link, leads_to) in [
            ("var/run", "/run"),
            ("lib", "usr/lib"),
            ("out", "../../../etc"),
            ("self", "self"),
            ("top", "/"),
            ("usr/up", "../data"),
            ("mount", "/proc/1/root"),
            ("chain", "var/run/../lib"),
            ("through", "/proc/../lib"),
        ] {
            symlink(leads_to, dir.path().join(link)).expect("linked");
        }
        fs::write(dir.path().join("file"), "x").expect("written");
        let root = open_root(dir.path()).expect("opened");
        (dir, root)
    }

    #[test]
    fn targets_are_resolved_below_the_root() {
        let (_dir, root) = image();
        let is_mount = |path: &Path| path == Path::new("/proc") || path == Path::new("/data/inner");
        let resolve = |target: &str| resolve(root.as_fd(), Path::new(target), is_mount);
        for (target, path) in [
            ("/etc/hosts", "/etc/hosts"),
            ("/var/run/app.sock", "/run/app.sock"),
            ("/lib/x/y", "/usr/lib/x/y"),
            ("/out", "/etc"),
            ("/usr/up/inner/link", "/data/inner/link"),
            ("/missing/a", "/missing/a"),
            ("/chain/x", "/usr/lib/x"),
            ("/through/x", "/usr/lib/x"),
            ("/mount/etc", "/proc/1/root/etc"),
        ] {
            assert_eq!(resolve(target).expect(target), Path::new(path), "{target}");
        }
        for target in ["/self", "/self/x", "/top", "/file/x"] {
            assert!(resolve(target).is_err(), "{target}");
        }
    }

    #[test]
    fn links_at_fixed_places_are_replaced() {
        let (dir, root) = image();
        let outside = tempfile::tempdir().expect("a temporary directory");
        fs::write(outside.path().join("ptmx"), "keep").expect("written");
        symlink(outside.path(), dir.path().join("dev")).expect("linked");
        symlink(outside.path().join("ptmx"), dir.path().join("etc/hosts")).expect("linked");
        nix::unistd::mkfifo(&dir.path().join("etc/resolv.conf"), Mode::S_IRWXU).expect("made");
        fs::create_dir(dir.path().join("etc/directory")).expect("made");
        let make = |path: &str, wanted| ensure_plain(root.as_fd(), Path::new(path), wanted);
        make("dev", EntryKind::Directory).expect("replaced");
        make("etc/hosts", EntryKind::File).expect("replaced");
        make("etc/resolv.conf", EntryKind::File).expect("replaced");
        make("lib/modules", EntryKind::Directory).expect("replaced");
        make("not/there", EntryKind::File).expect("nothing to do");
        make("file", EntryKind::File).expect("left");
        assert!(make("etc/directory", EntryKind::File).is_err());
        let is_dir = |path: &str| fs::symlink_metadata(dir.path().join(path)).is_ok_and(|meta| meta.is_dir());
        assert!(is_dir("dev") && is_dir("lib") && is_dir("usr/lib"));
        assert!(!dir.path().join("etc/hosts").exists() && !dir.path().join("etc/resolv.conf").exists());
        assert_eq!(fs::read_to_string(outside.path().join("ptmx")).expect("read"), "keep");
        assert_eq!(fs::read_to_string(dir.path().join("file")).expect("read"), "x");
    }
}
