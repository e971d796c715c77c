//! Attributes that belong to a mount and not to its file system, such as read-only or no devices (mount_setattr(2)).

use std::{
    ffi::CString,
    fs, io,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};

/// The options of fstab(5) that are attributes of a mount, each with its bit for mount_setattr(2) (`linux/mount.h`) and
/// its flag for mount(2).
const ATTRIBUTES: [(&str, u64, MsFlags); 6] = [
    ("ro", 0x01, MsFlags::MS_RDONLY),
    ("nosuid", 0x02, MsFlags::MS_NOSUID),
    ("nodev", 0x04, MsFlags::MS_NODEV),
    ("noexec", 0x08, MsFlags::MS_NOEXEC),
    ("noatime", 0x10, MsFlags::MS_NOATIME),
    ("nodiratime", 0x80, MsFlags::MS_NODIRATIME),
];
/// The bits that must be cleared when the access time attribute is changed (`MOUNT_ATTR__ATIME`).
const ATIME_MASK: u64 = 0x70;
const NOATIME: u64 = 0x10;

/// The mounts that attributes are set on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Only the mount itself.
    Top,
    /// The mount and all mounts below it.
    Tree,
}

/// Attributes to be set on a mount. All other attributes of the mount stay as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    bits: u64,
}

impl Attributes {
    /// Returns the attribute `ro`.
    pub(crate) fn read_only() -> Self {
        Self::of_options(&["ro"])
    }

    /// Returns the attributes among the options of a mount. Other options are ignored.
    pub(crate) fn of_options<T: AsRef<str>>(options: &[T]) -> Self {
        let mut found = Self::default();
        for option in options {
            if let Some((_, bit, _)) = ATTRIBUTES.iter().find(|(name, _, _)| *name == option.as_ref()) {
                found.bits |= bit;
            }
        }
        found
    }

    /// Returns the attributes as flags for mount(2).
    fn flags(self) -> MsFlags {
        ATTRIBUTES.iter().filter(|(_, bit, _)| self.bits & bit != 0).map(|(_, _, flag)| *flag).collect()
    }

    /// Returns whether there are no attributes to set.
    pub(crate) fn is_empty(self) -> bool {
        self.bits == 0
    }

    /// Sets the attributes on the mount at `path`. Kernels before 5.12 have no mount_setattr(2); there each mount is
    /// remounted by itself.
    ///
    /// # Errors
    /// Fails as mount_setattr(2) and mount(2) do.
    pub(crate) fn set(self, path: &Path, depth: Depth) -> io::Result<()> {
        match self.set_at_once(path, depth) {
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => self.set_one_by_one(path, depth),
            other => other,
        }
    }

    fn set_at_once(self, path: &Path, depth: Depth) -> io::Result<()> {
        let clear = if self.bits & NOATIME == 0 { 0 } else { ATIME_MASK };
        // The fields of struct mount_attr: attr_set, attr_clr, propagation, userns_fd.
        let attributes: [u64; 4] = [self.bits, clear, 0, 0];
        let path = CString::new(path.as_os_str().as_bytes())?;
        let flags = libc::AT_SYMLINK_NOFOLLOW | if depth == Depth::Tree { libc::AT_RECURSIVE } else { 0 };
        // SAFETY: the arguments are a NUL-terminated string and a structure with its size. The kernel only reads both.
        let outcome = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                libc::AT_FDCWD,
                path.as_ptr(),
                flags,
                attributes.as_ptr(),
                size_of_val(&attributes),
            )
        };
        if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn set_one_by_one(self, path: &Path, depth: Depth) -> io::Result<()> {
        let listed = fs::read("/proc/self/mountinfo")?;
        let path = path.canonicalize()?;
        for (point, known) in mounts_in(&listed, &path) {
            if depth == Depth::Tree || point == path {
                let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | known | self.flags();
                mount(None::<&str>, &point, None::<&str>, flags, None::<&str>)?;
            }
        }
        Ok(())
    }
}

/// Returns the mounts at `path` and below it, with their attributes. These are fields five and six of
/// proc_pid_mountinfo(5), in which blanks and backslashes are escaped as octal numbers.
fn mounts_in(mountinfo: &[u8], path: &Path) -> Vec<(PathBuf, MsFlags)> {
    let mut found = Vec::new();
    for line in mountinfo.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b' ');
        let (Some(point), Some(options)) = (fields.nth(4), fields.next()) else { continue };
        let point = PathBuf::from(std::ffi::OsString::from_vec(unescape(point)));
        if point.starts_with(path) {
            let options: Vec<_> = String::from_utf8_lossy(options).split(',').map(str::to_owned).collect();
            found.push((point, Attributes::of_options(&options).flags()));
        }
    }
    found
}

fn unescape(field: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok();
        match after.get(..3).filter(|_| byte == b'\\').and_then(octal) {
            Some(escaped) => {
                text.push(escaped);
                rest = &after[3..];
            }
            None => {
                text.push(byte);
                rest = after;
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_from_options() {
        let attributes = Attributes::of_options(&["rbind", "ro", "nodev", "rslave"]);
        assert_eq!((attributes.bits, attributes.is_empty()), (0x05, false));
        assert_eq!(attributes.flags(), MsFlags::MS_RDONLY | MsFlags::MS_NODEV);
        assert!(Attributes::of_options(&["rw", "rbind"]).is_empty());
    }

    #[test]
    fn mounts_below_a_path_are_found_with_their_attributes() {
        let text = b"1 0 8:1 / / rw - ext4 x rw\n2 1 0:5 / /a\\040b rw,nosuid - tmpfs x rw\n\
                     3 2 0:6 / /a\\040b/c ro,nodev,relatime - tmpfs x rw\n4 1 0:7 / /a\\040bc rw - tmpfs x rw\n";
        let found = mounts_in(text, Path::new("/a b"));
        assert_eq!(
            found,
            [
                (PathBuf::from("/a b"), MsFlags::MS_NOSUID),
                (PathBuf::from("/a b/c"), MsFlags::MS_RDONLY | MsFlags::MS_NODEV)
            ]
        );
    }

    /// Both methods have the same result: each mount of the tree is read-only, and keeps its other attributes.
    #[test]
    fn both_methods_make_a_tree_read_only() {
        let base = tempfile::tempdir().expect("a temporary directory");
        type SetMethod = fn(Attributes, &Path, Depth) -> io::Result<()>;
        for set in [Attributes::set_at_once as SetMethod, Attributes::set_one_by_one as SetMethod] {
            let (top, below) = (base.path().join("top"), base.path().join("top/below"));
            fs::create_dir_all(&top).expect("made");
            let tmpfs = |path: &Path, flags| {
                mount(Some("tmpfs"), path, Some("tmpfs"), flags, None::<&str>).expect("mounted");
            };
            tmpfs(&top, MsFlags::empty());
            fs::create_dir(&below).expect("made");
            tmpfs(&below, MsFlags::MS_NOSUID);
            let outcome = set(Attributes::read_only(), &top, Depth::Tree);
            let written = [&top, &below].map(|path| fs::write(path.join("file"), "x").is_ok());
            let seen = mounts_in(&fs::read("/proc/self/mountinfo").expect("read"), &top);
            nix::mount::umount2(&top, nix::mount::MntFlags::MNT_DETACH).expect("unmounted");
            outcome.expect("set");
            assert_eq!(written, [false, false]);
            let flags: Vec<_> = seen.into_iter().map(|(_, flags)| flags).collect();
            assert_eq!(flags, [MsFlags::MS_RDONLY, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID]);
        }
    }
}
