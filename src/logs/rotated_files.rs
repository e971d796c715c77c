//! The rotated files of one stream: `<task>.stdout.0`, `.1`, …, with the names of Nomad's own rotator, so that
//! `nomad alloc logs` finds them.
//!
//! Other tasks of the group can write to the directory, so nothing in it is trusted. Files are opened beneath the
//! allocation's directory without following a symlink, and are checked before they are opened for writing. A name is
//! skipped if it does not belong to a regular file with a single hard link. A new log writer continues the last file;
//! after that, it writes only to files that it has created itself.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    },
    path::PathBuf,
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2},
    sys::stat::Mode,
    unistd::{UnlinkatFlags, unlinkat},
};

/// The directory of logs below an allocation's directory (Nomad's client, `allocdir`).
const LOGS: &str = "alloc/logs";
/// The largest number of consecutive names that are skipped because other files have them.
const SKIPPED_NAMES_MAX: u64 = 1000;
/// The largest number of old files that one rotation removes. Later rotations remove the others.
const REMOVALS_MAX: usize = 16;

/// The rotated files of one stream.
#[derive(Debug)]
pub(crate) struct RotatedFiles {
    alloc_dir: PathBuf,
    /// The names of the files without the index: `<task>.stdout`.
    base: String,
    max_files: usize,
    /// The current file, which is written to.
    open: Option<File>,
    /// The indices of the stream's files, the oldest first. The directory is listed only once, because a file that
    /// appears later was not created by this driver.
    known_indices: Option<VecDeque<u64>>,
}

impl RotatedFiles {
    /// Describes the files `<base>.N` of an allocation, of which at most `max_files` are kept. Opens no file yet.
    pub(crate) fn new(alloc_dir: PathBuf, base: String, max_files: u32) -> Self {
        Self { alloc_dir, base, max_files: max_files.max(1) as usize, open: None, known_indices: None }
    }

    /// Returns the file to write to and its size. If the current file was removed, another one is created.
    ///
    /// # Errors
    /// When no file can be opened or created.
    pub(crate) fn current(&mut self) -> io::Result<(&File, u64)> {
        let known = self.open.as_ref().and_then(|file| file.metadata().ok()).filter(|meta| meta.nlink() > 0);
        if known.is_none() {
            self.open = None;
            let directory = self.open_directory()?;
            let is_first_open = self.known_indices.is_none();
            if is_first_open {
                self.known_indices = Some(self.list_indices(&directory)?);
            }
            let last = self.known_indices.iter().flatten().next_back().copied();
            let reopened = last.filter(|_| is_first_open).map(|last| open_regular(&directory, &self.name(last)));
            self.open = match reopened {
                Some(Ok(file)) => Some(file),
                Some(Err(error)) if !is_name_unusable(&error) => return Err(error),
                // The last file was removed meanwhile, or its name does not belong to a log file of this driver.
                _ => Some(self.create_from(&directory, last.unwrap_or(0))?),
            };
        }
        let Some(file) = &self.open else { return Err(io::ErrorKind::NotFound.into()) };
        let size = known.map_or_else(|| file.metadata(), Ok)?.len();
        Ok((file, size))
    }

    /// Creates the next file, makes it the current one, and removes the oldest file if there are too many.
    ///
    /// # Errors
    /// When no file can be created, or the oldest can't be removed.
    pub(crate) fn rotate(&mut self) -> io::Result<()> {
        if self.open.take().is_none() {
            return self.current().map(drop);
        }
        // The directory is opened again by its name, so that nothing is written to a directory that has been replaced.
        let directory = self.open_directory()?;
        let last = self.known_indices.iter().flatten().next_back().copied().unwrap_or(0);
        self.open = Some(self.create_from(&directory, last + 1)?);
        Ok(())
    }

    /// Creates the file with the first free name from `index` on. Names that other files have are skipped.
    fn create_from(&mut self, directory: &OwnedFd, index: u64) -> io::Result<File> {
        let end = index.saturating_add(SKIPPED_NAMES_MAX);
        for index in index..end {
            match create_file(directory, &self.name(index)) {
                Ok(file) => {
                    self.add_and_prune(directory, index)?;
                    return Ok(file);
                }
                Err(error) if is_name_unusable(&error) => {}
                Err(error) => return Err(error),
            }
        }
        // The next attempt begins after the names that were skipped.
        self.known_indices.get_or_insert_default().push_back(end);
        Err(name_unusable(&self.name(end)))
    }

    /// Adds a new file to the known ones, and removes the oldest files if there are too many.
    fn add_and_prune(&mut self, directory: &OwnedFd, index: u64) -> io::Result<()> {
        let indices = self.known_indices.get_or_insert_default();
        if indices.back() != Some(&index) {
            indices.push_back(index);
        }
        let too_many = indices.len().saturating_sub(self.max_files);
        let old: Vec<u64> = indices.drain(..too_many.min(REMOVALS_MAX)).collect();
        for index in old {
            match unlinkat(directory, self.name(index).as_str(), UnlinkatFlags::NoRemoveDir) {
                // The file was removed already, or its name belongs to something that this driver did not create.
                Ok(()) | Err(Errno::ENOENT | Errno::EISDIR | Errno::EPERM) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn name(&self, index: u64) -> String {
        format!("{}.{index}", self.base)
    }

    /// Opens the directory of logs.
    fn open_directory(&self) -> io::Result<OwnedFd> {
        let root = File::open(&self.alloc_dir)?;
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        Ok(openat2(&root, LOGS, how)?)
    }

    /// Lists the indices of the files that exist, in ascending order. Only the highest ones are returned, as many as
    /// may be kept or removed by one rotation.
    fn list_indices(&self, directory: &OwnedFd) -> io::Result<VecDeque<u64>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut listing = Dir::from_fd(openat(directory, ".", flags, Mode::empty())?)?;
        let mut found = Vec::new();
        for entry in listing.iter() {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy();
            let number = name.strip_prefix(&self.base).and_then(|rest| rest.strip_prefix('.'));
            // This driver and Nomad write an index without a sign and without leading zeros. No log reaches the upper
            // half of the indices by rotation; a task has created such a file.
            let number = number.and_then(|text| text.parse::<u32>().ok().filter(|index| index.to_string() == text));
            found.extend(number.filter(|index| *index < u32::MAX / 2).map(u64::from));
        }
        found.sort_unstable();
        Ok(found.split_off(found.len().saturating_sub(self.max_files + REMOVALS_MAX)).into())
    }
}

/// Creates a file. If the name is taken, the error is one for which `is_name_unusable` is true.
fn create_file(directory: &OwnedFd, name: &str) -> io::Result<File> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IRGRP | Mode::S_IROTH;
    match openat(directory, name, flags, mode) {
        Ok(made) => {
            let file = File::from(made);
            file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
            Ok(file)
        }
        Err(Errno::EEXIST) => Err(name_unusable(name)),
        Err(errno) => Err(errno.into()),
    }
}

/// Opens a regular file with a single hard link for writing. Anything else is not touched; the error is then one for
/// which `is_name_unusable` is true. The same holds for a file whose owner prevents it from being opened, by a lease
/// (fcntl(2)) or by executing it.
fn open_regular(directory: &OwnedFd, name: &str) -> io::Result<File> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let found = match openat2(directory.as_fd(), name, how) {
        Ok(found) => File::from(found),
        Err(Errno::ELOOP | Errno::ENOENT) => return Err(name_unusable(name)),
        Err(errno) => return Err(errno.into()),
    };
    let meta = found.metadata()?;
    if !meta.is_file() || meta.nlink() != 1 {
        return Err(name_unusable(name));
    }
    // This path opens the same inode that was checked.
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    match File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EWOULDBLOCK | libc::ETXTBSY | libc::EPERM)) => {
            Err(name_unusable(name))
        }
        other => other,
    }
}

/// Returns whether the error means that the name belongs to another file, so that the next name must be tried.
fn is_name_unusable(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AlreadyExists
}

fn name_unusable(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::AlreadyExists, format!("the name {name} belongs to another file"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::FileExt as _, path::Path};

    fn write(files: &mut RotatedFiles, text: &str) {
        let (file, size) = files.current().expect("a file");
        file.write_all_at(text.as_bytes(), size).expect("written");
    }

    fn names(logs: &Path) -> Vec<String> {
        let entries = fs::read_dir(logs).expect("listed").flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_later_writer_continues_and_files_of_others_are_not_written_to() {
        let alloc = tempfile::tempdir().expect("a temporary directory");
        let logs = alloc.path().join("alloc/logs");
        fs::create_dir_all(&logs).expect("created");
        let new = || RotatedFiles::new(alloc.path().to_owned(), "web.stdout".to_owned(), 2);
        write(&mut new(), "one ");
        // An index that no log reaches by rotation, or one in another form, is not taken for that of the last file.
        for name in ["web.stdout.4294967295", "web.stdout.99999999999999999999", "web.stdout.07", "web.stdout.x"] {
            fs::write(logs.join(name), "").expect("written");
        }
        let mut files = new();
        write(&mut files, "two");
        assert_eq!(fs::read_to_string(logs.join("web.stdout.0")).expect("read"), "one two");
        // Another process has created a regular file with the name of the next log file.
        fs::write(logs.join("web.stdout.1"), "theirs").expect("written");
        files.rotate().expect("rotated");
        write(&mut files, "three");
        assert_eq!(fs::read_to_string(logs.join("web.stdout.1")).expect("read"), "theirs");
        assert_eq!(fs::read_to_string(logs.join("web.stdout.2")).expect("read"), "three");
        files.rotate().expect("rotated");
        assert!(!names(&logs).contains(&"web.stdout.0".to_owned()), "two are kept: {:?}", names(&logs));
        // When the current file is removed, another one is created.
        fs::remove_file(logs.join("web.stdout.3")).expect("removed");
        write(&mut files, "four");
        assert_eq!(fs::read_to_string(logs.join("web.stdout.3")).expect("read"), "four");
    }
}
