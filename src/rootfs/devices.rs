//! Device nodes: all of the host's devices for a privileged container, and the devices that a job asks for.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType};

use super::RootfsError;
use crate::files::none_if_missing;

/// Entries of the host's /dev that a container does not get, because it has entries of its own with these names.
const NOT_COPIED: [&str; 6] = ["pts", "shm", "fd", "mqueue", "console", ".lxc"];

/// Returns all character and block devices below `/dev`, as containerd's `HostDevices` does.
///
/// # Errors
/// Fails when `/dev` can't be read.
pub fn host_devices() -> Result<Vec<LinuxDevice>, RootfsError> {
    let mut devices = Vec::new();
    walk(Path::new("/dev"), &|path| fs::read_dir(path), &mut devices).map_err(|source| RootfsError::File {
        doing: "list devices below",
        path: PathBuf::from("/dev"),
        source,
    })?;
    Ok(devices)
}

/// A device that a job asks for.
#[derive(Debug, Clone, Copy)]
pub struct DeviceRequest<'a> {
    /// The device's path on the host.
    pub host_path: &'a Path,
    /// The device's path in the container.
    pub task_path: &'a Path,
    /// The allowed kinds of access, a subset of `rwm`; empty for all of them.
    pub access: &'a str,
}

/// Returns the nodes of the devices that a job asks for, each with the allowed access.
///
/// # Errors
/// Fails when a path does not exist, or is not a device.
pub fn task_devices<'a>(
    requests: impl Iterator<Item = DeviceRequest<'a>>,
) -> Result<Vec<(LinuxDevice, String)>, RootfsError> {
    requests
        .map(|request| {
            let failed = |source| RootfsError::File { doing: "use device", path: request.host_path.to_owned(), source };
            let metadata = fs::metadata(request.host_path).map_err(failed)?;
            let device = node(request.task_path.to_owned(), &metadata)
                .ok_or_else(|| failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not a device")))?;
            let access = if request.access.is_empty() { "rwm" } else { request.access };
            Ok((device, access.to_owned()))
        })
        .collect()
}

fn node(path: PathBuf, metadata: &fs::Metadata) -> Option<LinuxDevice> {
    let kind = metadata.file_type();
    let device_type = match () {
        () if kind.is_char_device() => LinuxDeviceType::C,
        () if kind.is_block_device() => LinuxDeviceType::B,
        () => return None,
    };
    LinuxDeviceBuilder::default()
        .path(path)
        .typ(device_type)
        .major(i64::from(libc::major(metadata.rdev())))
        .minor(i64::from(libc::minor(metadata.rdev())))
        .file_mode(metadata.mode() & 0o7777)
        .uid(metadata.uid())
        .gid(metadata.gid())
        .build()
        .ok()
}

/// Collects the devices below a directory. `list` lists one directory.
fn walk(
    directory: &Path,
    list: &impl Fn(&Path) -> io::Result<fs::ReadDir>,
    devices: &mut Vec<LinuxDevice>,
) -> io::Result<()> {
    for entry in list(directory)? {
        let entry = entry?;
        let path = entry.path();
        if NOT_COPIED.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        // Symlinks such as /dev/stdin and /dev/cdrom are not followed: the runtime creates them, or the image has them.
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if metadata.is_dir() {
            // A directory that was removed after it had been listed has no devices: udev may be removing a disk.
            none_if_missing(walk(&path, list, devices))?;
        } else {
            devices.extend(node(path, &metadata));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_removed_during_the_walk_has_no_devices() {
        let dev = tempfile::tempdir().expect("a temporary directory");
        let disk = dev.path().join("disk");
        fs::create_dir(&disk).expect("made");
        let remove_and_list = |path: &Path| {
            if path == disk {
                fs::remove_dir(path)?;
            }
            fs::read_dir(path)
        };
        walk(dev.path(), &remove_and_list, &mut Vec::new()).expect("walked");
        assert!(!disk.exists());
        assert!(walk(&disk, &|path| fs::read_dir(path), &mut Vec::new()).is_err(), "/dev itself must exist");
    }
}
