//! Copies a directory of the image with its content: owners, modes, times of modification, extended attributes, hard
//! links, symbolic links and special files are kept.
//!
//! No other process may change the source or the copy while this module copies, since it looks both up by path.

use std::{
    collections::HashMap,
    fs::{self, Metadata, Permissions},
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown, lchown, symlink},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::AT_FDCWD,
    sys::{
        stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat},
        time::TimeSpec,
    },
};
use rustix::{
    fs::{XattrFlags, lgetxattr, llistxattr, lsetxattr},
    io::Errno,
};

/// The first copies of files that have several names, by device and inode.
type HardLinks = HashMap<(u64, u64), PathBuf>;

/// Copies everything in the directory `from`, and its own properties, to the empty directory `to`.
///
/// # Errors
/// Fails when a file can't be read or written. The copy may be incomplete then.
pub(super) fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    copy_directory(from, to, &fs::symlink_metadata(from)?, &mut HardLinks::new())
}

fn copy_directory(from: &Path, to: &Path, properties: &Metadata, links: &mut HardLinks) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let name = entry?.file_name();
        copy_entry(&from.join(&name), &to.join(&name), links)?;
    }
    // The properties come last: new entries change the time of modification, and the mode may forbid new entries.
    copy_properties(from, to, properties)
}

fn copy_entry(from: &Path, to: &Path, links: &mut HardLinks) -> io::Result<()> {
    let properties = fs::symlink_metadata(from)?;
    let kind = properties.file_type();
    if kind.is_dir() {
        fs::create_dir(to)?;
        return copy_directory(from, to, &properties, links);
    }
    if properties.nlink() > 1 {
        let first = links.entry((properties.dev(), properties.ino())).or_insert_with(|| to.to_owned());
        if first != to {
            return fs::hard_link(first, to);
        }
    }
    if kind.is_file() {
        fs::copy(from, to)?;
    } else if kind.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
    } else {
        let node = match () {
            () if kind.is_block_device() => SFlag::S_IFBLK,
            () if kind.is_char_device() => SFlag::S_IFCHR,
            () if kind.is_fifo() => SFlag::S_IFIFO,
            () => SFlag::S_IFSOCK,
        };
        mknod(to, node, Mode::S_IRUSR, properties.rdev())?;
    }
    copy_properties(from, to, &properties)
}

/// Copies owner, mode, extended attributes and time of modification.
fn copy_properties(from: &Path, to: &Path, properties: &Metadata) -> io::Result<()> {
    let is_symlink = properties.file_type().is_symlink();
    let change_owner = if is_symlink { lchown } else { chown };
    change_owner(to, Some(properties.uid()), Some(properties.gid()))?;
    if !is_symlink {
        // The mode comes after the owner, whose change clears set-user-id and set-group-id bits.
        fs::set_permissions(to, Permissions::from_mode(properties.mode() & 0o7777))?;
    }
    copy_attributes(from, to)?;
    let modified = TimeSpec::new(properties.mtime(), properties.mtime_nsec());
    Ok(utimensat(AT_FDCWD, to, &TimeSpec::UTIME_OMIT, &modified, UtimensatFlags::NoFollowSymlink)?)
}

/// Copies extended attributes, such as the capabilities of programs. SELinux labels are left out: a file's label
/// depends on its path. An attribute that the target's file system does not support is left out, as with docker.
fn copy_attributes(from: &Path, to: &Path) -> io::Result<()> {
    let mut names = vec![0; 1 << 16];
    let length = match llistxattr(from, &mut names[..]) {
        Err(Errno::NOTSUP) => return Ok(()),
        listed => listed?,
    };
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if name == b"security.selinux" {
            continue;
        }
        let mut value = vec![0; 1 << 16];
        let length = lgetxattr(from, name, &mut value[..])?;
        match lsetxattr(to, name, &value[..length], XattrFlags::empty()) {
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
