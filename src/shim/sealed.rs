//! A copy of the OCI runtime that nobody can write to, for crun.
//!
//! A runtime that a container could overwrite through `/proc/self/exe` would run with the host's rights the next time
//! (CVE-2019-5736). crun therefore clones itself whenever it is called, unless it sees that it runs from a sealed memfd
//! already (memfd_create(2)): 1.4 ms of each call. We make one such copy, and every shim gets it as a descriptor, which
//! it has for as long as it lives, whoever of us dies meanwhile.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{process::command, stamp::Stamp};

/// Where a shim has it: behind its listener.
pub(super) const DESCRIPTOR: i32 = 4;

/// Larger programs are not crun.
const SIZE_MAX: u64 = 32 << 20;

/// A sealed copy, and which file it is of.
#[derive(Debug)]
pub struct Sealed {
    pub(super) fd: OwnedFd,
    pub(super) path: PathBuf,
    stamp: Stamp,
}

/// The runtime that new shims get a copy of.
#[derive(Debug, Default)]
pub(super) struct Current(Mutex<Option<Arc<Sealed>>>);

impl Current {
    pub(super) fn set(&self, sealed: Sealed) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(sealed));
    }

    /// The copy; a new one when the program was replaced on disk. None when that can't be had: the next call tries again.
    pub(super) fn get(&self) -> Option<Arc<Sealed>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        if fs::metadata(&known.path).is_ok_and(|file| Stamp::of(&file) == known.stamp) {
            return Some(known);
        }
        match Sealed::of(&known.path) {
            Ok(renewed) => {
                let renewed = Arc::new(renewed);
                *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(renewed.clone());
                Some(renewed)
            }
            Err(error) => {
                tracing::warn!(runtime = %known.path.display(), %error, "the OCI runtime has changed and can't be copied");
                None
            }
        }
    }
}

impl Sealed {
    /// Copies the program at `path`, seals the copy, and sees that it can be executed: a kernel may be told to allow no
    /// such thing (`vm.memfd_noexec`). Blocks for some milliseconds.
    ///
    /// # Errors
    /// When any of that fails; the program itself serves then.
    pub fn of(path: &Path) -> io::Result<Self> {
        let mut program = File::open(path)?;
        let metadata = program.metadata()?;
        if metadata.len() > SIZE_MAX {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than any crun"));
        }
        let fd = memfd()?;
        let mut copy = File::from(fd);
        io::copy(&mut program, &mut copy)?;
        // Half of a program may be an empty script, which the probe below would find to be fine.
        let is_whole =
            copy.metadata()?.len() == metadata.len() && Stamp::of(&program.metadata()?) == Stamp::of(&metadata);
        if metadata.len() == 0 || !is_whole {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is empty, or was written while it was copied"));
        }
        let seals = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
        // SAFETY: fcntl on a descriptor that is open and ours.
        if unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let sealed = Self { fd: copy.into(), path: path.to_owned(), stamp: Stamp::of(&metadata) };
        let name = format!("/proc/{}/fd/{}", std::process::id(), sealed.fd.as_raw_fd());
        let mut probe = command(name);
        let status =
            probe.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        if status.success() { Ok(sealed) } else { Err(io::Error::other(format!("its copy ends with {status}"))) }
    }
}

fn memfd() -> io::Result<OwnedFd> {
    // Kernels before 6.3 don't know MFD_EXEC, and allow it anyway.
    for more in [libc::MFD_EXEC, 0] {
        // SAFETY: a C string literal and flags.
        let fd = unsafe { libc::memfd_create(c"runtime".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | more) };
        if fd >= 0 {
            // SAFETY: just made, and ours alone.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn program(path: &Path, text: &str) {
        fs::write(path, text).expect("done");
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("done");
    }

    /// A program that is being written is no program: a shell would take an empty file for a script that is fine.
    #[test]
    fn half_written_runtimes_are_not_copied_and_are_tried_again() {
        let dir = tempfile::tempdir().expect("made");
        let path = dir.path().join("runtime");
        program(&path, "#!/bin/sh\n");
        let current = Current::default();
        current.set(Sealed::of(&path).expect("done"));
        let first = current.get().expect("done");
        program(&path, "");
        assert_eq!(Sealed::of(&path).expect_err("copied").kind(), io::ErrorKind::InvalidData);
        assert!(current.get().is_none());
        program(&path, "#!/bin/sh\nexit 0\n");
        assert_ne!(current.get().expect("done").stamp, first.stamp);
    }
}
