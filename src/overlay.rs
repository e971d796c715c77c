//! Overlay mounts of many layers by mount(2).
//!
//! mount(2) takes one page (4096 bytes) of options. A few dozen layers fit into that as absolute paths. For more
//! layers, the paths are written relative to their common parent directory, and the call is made by a new thread that
//! has a working directory of its own (`unshare(CLONE_FS)`). The newer mount API is not used, because `fsconfig`
//! strings are limited to 256 bytes and `lowerdir+` needs Linux 6.5 (docs/decisions/003).

use std::{
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// The longest option string. The kernel copies one page, which ends with a terminator, and ignores the rest
/// (mount(2)).
const OPTIONS_MAX: usize = 4095;

/// Whether this kernel lacks the overlay option `volatile` (Linux before 5.10). The first mount finds this out.
static VOLATILE_UNSUPPORTED: AtomicBool = AtomicBool::new(false);

/// Mounts the read-only layers `lowers` (topmost first) with a writable layer on top at `target`. `upper` is the
/// directory that contains the writable layer's `upper` and `work`. The kernel never syncs that layer to disk
/// (`volatile`, overlayfs.rst): the layer doesn't outlive the mount, and a sync at each unmount would cost a flush of
/// the disk.
///
/// # Errors
/// Fails as mount(2) does; `InvalidInput` when a path contains a character that overlayfs reads as a separator.
pub fn mount_writable(lowers: &[PathBuf], options: &[String], upper: &Path, target: &Path) -> io::Result<()> {
    let layers = [
        format!("upperdir={}", checked_path(&upper.join("upper"))?),
        format!("workdir={}", checked_path(&upper.join("work"))?),
    ];
    let options = [&layers[..], options].concat();
    if !VOLATILE_UNSUPPORTED.load(Ordering::Relaxed) {
        let volatile = [&options[..], &["volatile".to_owned()]].concat();
        match overlay(lowers, &volatile, MsFlags::empty(), target) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            other => return other,
        }
    }
    overlay(lowers, &options, MsFlags::empty(), target)?;
    // The mount works without `volatile`, so that option was the invalid one.
    VOLATILE_UNSUPPORTED.store(true, Ordering::Relaxed);
    Ok(())
}

/// Mounts two or more layers `lowers` (topmost first) read-only at `target`.
///
/// # Errors
/// Fails as [`mount_writable`] does.
pub fn mount_read_only(lowers: &[PathBuf], options: &[String], target: &Path) -> io::Result<()> {
    // The mount is for reading files, not for running programs: device nodes of the image must not work there.
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    overlay(lowers, options, flags, target)
}

/// Mounts an overlay with absolute paths if they fit into the options, else with relative ones.
fn overlay(lowers: &[PathBuf], options: &[String], flags: MsFlags, target: &Path) -> io::Result<()> {
    let absolute = lowers.iter().map(|lower| checked_path(lower)).collect::<io::Result<Vec<_>>>()?;
    let data = join(&absolute, options);
    if data.len() <= OPTIONS_MAX {
        return mount_overlay(target, flags, &data);
    }
    let parent = common_parent(lowers);
    let relative: Vec<&str> = absolute
        .iter()
        .map(|lower| {
            lower.strip_prefix(checked_path(&parent)?).map(|rest| rest.trim_start_matches('/')).ok_or_else(too_long)
        })
        .collect::<io::Result<_>>()?;
    let data = join(&relative, options);
    if data.len() > OPTIONS_MAX {
        return Err(too_long());
    }
    std::thread::scope(|scope| {
        let mounted = scope.spawn(|| {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(&parent)?;
            mount_overlay(target, flags, &data)
        });
        mounted.join().unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
    })
}

fn mount_overlay(target: &Path, flags: MsFlags, data: &str) -> io::Result<()> {
    Ok(mount(Some("overlay"), target, Some("overlay"), flags, Some(data))?)
}

/// Formats the mount options.
fn join<T: AsRef<str>>(lowers: &[T], options: &[String]) -> String {
    let mut data = String::from("lowerdir=");
    for (n, lower) in lowers.iter().enumerate() {
        if n > 0 {
            data.push(':');
        }
        data.push_str(lower.as_ref());
    }
    for option in options {
        data.push(',');
        data.push_str(option);
    }
    data
}

fn common_parent(paths: &[PathBuf]) -> PathBuf {
    let mut parent = paths.first().and_then(|path| path.parent()).unwrap_or(Path::new("/")).to_owned();
    while !paths.iter().all(|path| path.starts_with(&parent)) && parent.pop() {}
    parent
}

/// Returns the path as text, unless overlayfs would misread it in its options.
fn checked_path(path: &Path) -> io::Result<&str> {
    let text = path.to_str().filter(|text| !text.contains([':', ',', '\\']));
    text.ok_or_else(|| {
        let problem = format!("overlayfs can't take the path {}: it has a colon, comma or backslash", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, problem)
    })
}

fn too_long() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "the image's layers do not fit into one page of mount options")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_parents_are_found() {
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(common_parent(&paths(&["/s/1/fs", "/s/22/fs"])), Path::new("/s"));
        assert_eq!(common_parent(&paths(&["/a/1/fs", "/b/1/fs"])), Path::new("/"));
    }

    #[test]
    fn separators_in_paths_are_refused_by_name() {
        let error =
            mount_writable(&[PathBuf::from("/a:b")], &[], Path::new("/u"), Path::new("/t")).expect_err("refused");
        assert!(error.to_string().contains("/a:b"), "{error}");
    }
}
