//! The files of one stream: `<task>.stdout.0`, `.1`, …, as Nomad's own rotator names them, so that `nomad alloc logs`
//! finds them.
//!
//! Other tasks of the group can write to the directory. Nothing there is trusted: names are opened beneath the
//! allocation's directory without following a symlink, looked at before they are opened for writing, and what is no
//! plain file of one name is passed by.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::{MetadataExt as _, PermissionsExt as _},
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

/// Below an allocation's directory (Nomad's client, `allocdir`).
const LOGS: &str = "alloc/logs";
/// Foreign things in the way of a name that are passed by, one after the other.
const IN_THE_WAY: u64 = 1000;

/// One stream's files.
#[derive(Debug)]
pub struct Series {
    alloc_dir: PathBuf,
    /// `<task>.stdout`.
    base: String,
    max_files: u64,
    open: Option<Open>,
}

/// The file that is written to.
#[derive(Debug)]
struct Open {
    directory: OwnedFd,
    file: File,
    index: u64,
}

impl Series {
    /// Files `<base>.N` of an allocation, of which `max_files` are kept.
    pub fn new(alloc_dir: PathBuf, base: String, max_files: u32) -> Self {
        Self { alloc_dir, base, max_files: u64::from(max_files.max(1)), open: None }
    }

    /// The file to write to, and its size. Whoever removed it gets a new one.
    ///
    /// # Errors
    /// When there is none that may be written to.
    pub fn current(&mut self) -> io::Result<(&File, u64)> {
        let usable = match &self.open {
            Some(open) => open.file.metadata().is_ok_and(|meta| meta.nlink() > 0),
            None => false,
        };
        if !usable {
            self.open = None;
            let directory = self.directory()?;
            let last = self.indices(&directory)?.into_iter().max();
            self.open = Some(self.open_from(directory, last.unwrap_or(0))?);
        }
        let Some(open) = &self.open else { return Err(io::ErrorKind::NotFound.into()) };
        Ok((&open.file, open.file.metadata()?.len()))
    }

    /// Goes on to the next file, and removes the oldest.
    ///
    /// # Errors
    /// When there is none.
    pub fn rotate(&mut self) -> io::Result<()> {
        let Some(open) = self.open.take() else { return self.current().map(drop) };
        // Again by its name: what was put in the directory's place is not written to.
        let directory = self.directory()?;
        let next = self.open_from(directory, open.index + 1)?;
        let oldest = (next.index + 1).saturating_sub(self.max_files);
        for index in self.indices(&next.directory)?.into_iter().filter(|index| *index < oldest) {
            match unlinkat(&next.directory, self.name(index).as_str(), UnlinkatFlags::NoRemoveDir) {
                // Not a file of ours.
                Ok(()) | Err(Errno::ENOENT | Errno::EISDIR | Errno::EPERM) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        self.open = Some(next);
        Ok(())
    }

    fn name(&self, index: u64) -> String {
        format!("{}.{index}", self.base)
    }

    fn directory(&self) -> io::Result<OwnedFd> {
        let root = File::open(&self.alloc_dir)?;
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        Ok(openat2(&root, LOGS, how)?)
    }

    /// Numbers of the files that are there.
    fn indices(&self, directory: &OwnedFd) -> io::Result<Vec<u64>> {
        let mut listing = Dir::from_fd(openat(
            directory,
            ".",
            OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?)?;
        let mut found = Vec::new();
        for entry in listing.iter() {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy();
            let number = name.strip_prefix(&self.base).and_then(|rest| rest.strip_prefix('.'));
            // As it is written by us and by Nomad: no sign, no zeros in front.
            found.extend(number.and_then(|text| text.parse::<u64>().ok().filter(|index| index.to_string() == text)));
        }
        Ok(found)
    }

    /// The first name from `index` on that can be ours.
    fn open_from(&self, directory: OwnedFd, index: u64) -> io::Result<Open> {
        let mut refused = io::Error::from(io::ErrorKind::NotFound);
        for index in index..index.saturating_add(IN_THE_WAY) {
            match open_one(&directory, &self.name(index)) {
                Ok(file) => return Ok(Open { directory, file, index }),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => refused = error,
                Err(error) => return Err(error),
            }
        }
        Err(refused)
    }
}

/// Opens a plain file of one name, or makes it. Anything else in its place is an invalid input, and not touched.
fn open_one(directory: &OwnedFd, name: &str) -> io::Result<File> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let found = match openat2(directory.as_fd(), name, how) {
        Ok(found) => File::from(found),
        // A symlink.
        Err(Errno::ELOOP) => return Err(in_the_way(name)),
        Err(Errno::ENOENT) => {
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let mode = Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IRGRP | Mode::S_IROTH;
            return match openat(directory, name, flags, mode) {
                Ok(made) => {
                    let file = File::from(made);
                    file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
                    Ok(file)
                }
                Err(Errno::EEXIST) => Err(in_the_way(name)),
                Err(errno) => Err(errno.into()),
            };
        }
        Err(errno) => return Err(errno.into()),
    };
    let meta = found.metadata()?;
    if !meta.is_file() || meta.nlink() != 1 {
        return Err(in_the_way(name));
    }
    // The very inode that was looked at.
    File::options().write(true).open(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

fn in_the_way(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is no plain file, or has several names"))
}
