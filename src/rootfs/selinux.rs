//! SELinux labels of files. Those of volumes have the meaning of docker's `z` and `Z`: a volume that all containers may
//! use, or only this one.

use std::{
    ffi::{CString, OsStr, OsString},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    str::FromStr,
};

use nix::{
    dir::Dir,
    fcntl::{AT_FDCWD, OFlag, openat},
    sys::stat::{Mode, SFlag},
};

use super::{image_links::kind_of, mounts::try_open_without_links};

/// The containers that may use a volume, by docker's letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeLabel {
    /// `z`: all containers may use it.
    Shared,
    /// `Z`: only this task may use it, and no other container that has a label.
    Private,
}

impl FromStr for VolumeLabel {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "z" => Ok(Self::Shared),
            "Z" => Ok(Self::Private),
            other => Err(format!("selinux_label = {other:?} is not z (shared) or Z (private)")),
        }
    }
}

/// The extended attribute that holds a label (a security attribute, xattr(7)).
const ATTRIBUTE: &str = "security.selinux";
/// The number of categories of the targeted policy, which are c0 to c1023.
const CATEGORIES: u64 = 1024;

/// Files and directories of the host that must not be relabelled, because the host's own programs would lose access.
/// The list is docker's.
const NOT_RELABELLED: [&str; 24] = [
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/etc/passwd",
    "/etc/pki",
    "/etc/shadow",
    "/home",
    "/lib",
    "/lib64",
    "/media",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/var",
    "/var/lib",
    "/var/log",
];

/// Returns whether SELinux is enabled in the kernel.
pub fn is_enabled() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

/// Returns the number of a task, from which the categories of its labels follow.
pub fn task_number(task: &str) -> u64 {
    task.bytes().fold(0_u64, |number, byte| number.wrapping_mul(31).wrapping_add(byte.into()))
}

/// Returns the level of a task: its sensitivity, and two categories that follow from its number.
pub(super) fn level_of_task(task: u64) -> String {
    let (one, other) = (task % CATEGORIES, task / CATEGORIES % (CATEGORIES - 1));
    // The categories must differ, and the smaller one comes first.
    let other = if other >= one { other + 1 } else { other };
    format!("s0:c{},c{}", one.min(other), one.max(other))
}

/// Returns the label of a volume. The two categories of a private one are derived from the task's number.
fn label(kind: VolumeLabel, task: u64) -> String {
    let level = match kind {
        VolumeLabel::Shared => "s0".to_owned(),
        VolumeLabel::Private => level_of_task(task),
    };
    format!("system_u:object_r:container_file_t:{level}")
}

/// Returns the option of mount(2) by which all files of a new file system have this label. Labels have commas.
pub fn mount_option(label: &str) -> String {
    format!("context=\"{label}\"")
}

/// Labels a volume and everything below it. Symlinks below it are labelled and never followed, since a task may be able
/// to change them. Blocks for about 10 µs for each file.
///
/// # Errors
/// Fails for directories of the system, and when a file system operation fails. A file system without labels is not an
/// error.
pub fn relabel(path: &Path, kind: VolumeLabel, task: u64) -> io::Result<()> {
    let real = path.canonicalize()?;
    if NOT_RELABELLED.iter().any(|system| real == Path::new(system)) {
        let problem = format!("{} belongs to the host's system, and is not relabelled", real.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    relabel_tree(&real, &label(kind, task))
}

/// Gives this label to a directory of the driver or of Nomad, and to everything below it, like [`relabel`].
///
/// # Errors
/// As [`relabel`].
pub fn relabel_tree(path: &Path, label: &str) -> io::Result<()> {
    let label = CString::new(label).map_err(io::Error::other)?;
    let root = openat(AT_FDCWD, path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    if set_label(&root, &label)? == LabelSupport::Supported && is_directory(&root)? {
        label_below(&root, &label)?;
    }
    Ok(())
}

/// Labels everything below a directory. It has at most three descriptors open at a time, however many entries there
/// are: directories are remembered by their paths below `root`, and opened again without following links.
fn label_below(root: &OwnedFd, label: &CString) -> io::Result<()> {
    let mut waiting = vec![PathBuf::from(".")];
    while let Some(path) = waiting.pop() {
        let directory = match try_open_without_links(root, &path) {
            Ok(directory) => directory,
            // The directory was removed, or another entry took its place, after it had been listed.
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::ELOOP) => continue,
            Err(error) => return Err(error.into()),
        };
        if !is_directory(&directory)? {
            continue;
        }
        let names = match names(directory.as_fd()) {
            Ok(names) => names,
            // The directory was removed after it had been opened.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for name in names {
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let entry = match openat(&directory, name.as_os_str(), flags, Mode::empty()) {
                Ok(entry) => entry,
                // The entry was removed after it had been listed.
                Err(nix::Error::ENOENT) => continue,
                Err(error) => return Err(error.into()),
            };
            // Another file system may be mounted below the volume.
            if set_label(&entry, label)? == LabelSupport::Supported && is_directory(&entry)? {
                waiting.push(path.join(name));
            }
        }
    }
    Ok(())
}

fn is_directory(node: &OwnedFd) -> io::Result<bool> {
    Ok(kind_of(node)? == SFlag::S_IFDIR)
}

fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<OsString>> {
    let mut opened =
        Dir::openat(directory, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut found = Vec::new();
    for entry in opened.iter() {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            found.push(name.to_owned());
        }
    }
    Ok(found)
}

/// Whether a file's file system supports labels.
#[derive(PartialEq, Eq)]
enum LabelSupport {
    Supported,
    Unsupported,
}

fn set_label(node: &OwnedFd, label: &CString) -> io::Result<LabelSupport> {
    let path = CString::new(format!("/proc/self/fd/{}", node.as_raw_fd())).map_err(io::Error::other)?;
    let name = CString::new(ATTRIBUTE).map_err(io::Error::other)?;
    let value = label.as_bytes_with_nul();
    // SAFETY: the arguments are three C strings, which live until the call returns, and the length of the third.
    let outcome = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    if outcome == 0 {
        return Ok(LabelSupport::Supported);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENOTSUP) => Ok(LabelSupport::Unsupported),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, process::Command};

    fn seen(path: &Path) -> Option<String> {
        let path = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
        let name = CString::new(ATTRIBUTE).expect("no NUL");
        let mut value = [0_u8; 256];
        // SAFETY: the arguments are two C strings, and a buffer with its length.
        let length = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        let length = usize::try_from(length).ok()?;
        Some(String::from_utf8_lossy(&value[..length]).trim_end_matches('\0').to_owned())
    }

    #[test]
    fn a_private_label_has_two_categories() {
        assert_eq!(label(VolumeLabel::Shared, 7), "system_u:object_r:container_file_t:s0");
        for task in [0, 1, 1023, 1024, u64::MAX] {
            let label = label(VolumeLabel::Private, task);
            let (_, pair) = label.split_once(":s0:c").expect("categories");
            let (one, other) = pair.split_once(",c").expect("two");
            let (one, other): (u64, u64) = (one.parse().expect("a number"), other.parse().expect("a number"));
            assert!(one < other && other < CATEGORIES, "{label}");
        }
    }

    /// This test also works without SELinux: root may set the attribute, even if the kernel ignores it.
    #[test]
    fn all_of_a_volume_is_labelled_and_nothing_else() {
        let (volume, outside) = (tempfile::tempdir().expect("made"), tempfile::tempdir().expect("made"));
        let (root, file) = (volume.path(), outside.path().join("file"));
        fs::create_dir_all(root.join("a/b")).expect("made");
        fs::write(root.join("a/b/c"), "").expect("written");
        fs::write(&file, "").expect("written");
        std::os::unix::fs::symlink(outside.path(), root.join("a/out")).expect("linked");
        std::os::unix::fs::symlink(&file, root.join("f")).expect("linked");
        let (before, before_dir) = (seen(&file), seen(outside.path()));
        let not_utf8 = OsStr::from_bytes(b"a/\xff");
        fs::write(root.join(not_utf8), "").expect("written");
        relabel(root, VolumeLabel::Shared, 0).expect("labelled");
        for path in ["", "a", "a/b", "a/b/c"].map(OsStr::new).into_iter().chain([not_utf8]) {
            let own = "system_u:object_r:container_file_t:s0";
            assert_eq!(seen(&root.join(path)).as_deref(), Some(own), "{path:?}");
        }
        assert_eq!((seen(&file), seen(outside.path())), (before, before_dir), "symlinks are not followed");
        assert!(relabel(Path::new("/usr"), VolumeLabel::Shared, 0).expect_err("refused").to_string().contains("/usr"));
    }

    /// A process with few descriptors labels a directory with many entries. The limit is the process's own, so the test
    /// runs itself once more.
    #[test]
    fn a_large_directory_needs_few_descriptors() {
        const IN_CHILD: &str = "NOMAD_DRIVER_SHIM_TEST_RELABEL";
        if let Some(volume) = std::env::var_os(IN_CHILD) {
            return relabel(Path::new(&volume), VolumeLabel::Shared, 0).expect("labelled");
        }
        let volume = tempfile::tempdir().expect("made");
        for number in 0..200 {
            fs::create_dir(volume.path().join(number.to_string())).expect("made");
        }
        let mut child = Command::new("/bin/sh");
        child.args([
            "-c",
            "ulimit -n 100 && exec \"$0\" --exact rootfs::selinux::tests::a_large_directory_needs_few_descriptors",
        ]);
        child.arg(std::env::current_exe().expect("known")).env(IN_CHILD, volume.path());
        let output = child.output().expect("started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        assert_eq!(seen(&volume.path().join("199")).as_deref(), Some("system_u:object_r:container_file_t:s0"));
    }
}
