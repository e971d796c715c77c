//! `/etc/mtab`, the traditional list of mounts. docker makes it a link to the kernel's list in containers whose image
//! has none (moby, `daemon/initlayer/setup_unix.go`). Programs such as older versions of df read it.

use std::{
    fs, io,
    os::{fd::AsFd as _, unix::fs::PermissionsExt as _},
    path::Path,
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{Mode, mkdirat},
    unistd::symlinkat,
};

use super::image_links;

/// Makes the link in a root file system, unless the image has an entry of that name. An image whose `/etc` is not a
/// directory gets no link.
///
/// # Errors
/// Fails when a file system operation fails.
pub(super) fn add(rootfs: &Path) -> io::Result<()> {
    let root = image_links::open_root(rootfs)?;
    match mkdirat(root.as_fd(), "etc", Mode::from_bits_truncate(0o755)) {
        // The process's umask may have cleared some bits of the mode.
        Ok(()) => fs::set_permissions(rootfs.join("etc"), fs::Permissions::from_mode(0o755))?,
        Err(nix::Error::EEXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let etc = match openat2(root.as_fd(), "etc", how) {
        Ok(etc) => etc,
        Err(nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::ELOOP) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    match symlinkat("/proc/mounts", etc.as_fd(), "mtab") {
        Ok(()) | Err(nix::Error::EEXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_link_is_made_where_the_image_has_no_entry() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let mtab = root.path().join("etc/mtab");
        for _ in 0..2 {
            add(root.path()).expect("made");
            assert_eq!(fs::read_link(&mtab).expect("a link"), Path::new("/proc/mounts"));
        }
        fs::remove_file(&mtab).expect("removed");
        fs::write(&mtab, "of the image").expect("written");
        add(root.path()).expect("left alone");
        assert_eq!(fs::read_to_string(&mtab).expect("read"), "of the image");
    }

    #[test]
    fn links_of_the_image_do_not_lead_out_of_it() {
        let outside = tempfile::tempdir().expect("a temporary directory");
        let root = tempfile::tempdir().expect("a temporary directory");
        symlink(outside.path(), root.path().join("etc")).expect("linked");
        add(root.path()).expect("left out");
        assert_eq!(fs::read_dir(outside.path()).expect("listed").count(), 0);
        fs::remove_file(root.path().join("etc")).expect("removed");
        fs::create_dir(root.path().join("real")).expect("made");
        symlink("/real", root.path().join("etc")).expect("linked");
        add(root.path()).expect("made");
        assert!(root.path().join("real/mtab").is_symlink());
    }
}
