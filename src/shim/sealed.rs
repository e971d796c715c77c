//! A sealed copy of the OCI runtime's program, which can't be written to. It is meant for crun.
//!
//! If a container could overwrite the runtime through `/proc/self/exe`, the container's code would run as root on the
//! host at the runtime's next call (CVE-2019-5736). crun therefore clones itself at every call, which takes 1.4 ms,
//! unless it already runs from a sealed memfd (memfd_create(2)). This plugin makes one such copy and passes its
//! descriptor to every shim. A shim keeps the descriptor for as long as it lives, even if the plugin dies.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;

use super::version::VERSION_TIMEOUT;
use crate::{
    file_id::FileId,
    process::{PidFd, command},
};

/// The descriptor number of the sealed copy in a shim, the one after the listening socket.
pub(super) const SEALED_FD: i32 = 4;

/// The largest size of a program that is copied; crun is never larger.
const SIZE_MAX: u64 = 32 << 20;

/// A sealed copy of a program, and the identity of the file that was copied.
#[derive(Debug)]
pub struct SealedCopy {
    pub(super) fd: OwnedFd,
    pub(super) path: PathBuf,
    file_id: FileId,
}

/// The sealed copy of the runtime that new shims get, if one was set.
#[derive(Debug, Default)]
pub(super) struct CurrentSealedCopy(Mutex<Option<Arc<SealedCopy>>>);

impl CurrentSealedCopy {
    pub(super) fn set(&self, sealed: SealedCopy) {
        *self.0.lock() = Some(Arc::new(sealed));
    }

    /// Returns the sealed copy, or a new copy if the program was replaced on disk. Returns `None` if the new copy can't
    /// be made; the next call tries again.
    pub(super) fn get(&self) -> Option<Arc<SealedCopy>> {
        let known = self.0.lock().clone()?;
        if fs::metadata(&known.path).is_ok_and(|file| FileId::of(&file) == known.file_id) {
            return Some(known);
        }
        match SealedCopy::of(&known.path) {
            Ok(renewed) => {
                let renewed = Arc::new(renewed);
                *self.0.lock() = Some(renewed.clone());
                Some(renewed)
            }
            Err(error) => {
                tracing::warn!(
                    runtime = %known.path.display(), %error,
                    "could not make a sealed copy of the changed OCI runtime; new shims call the runtime itself"
                );
                None
            }
        }
    }
}

impl SealedCopy {
    /// Copies the program at `path`, seals the copy, and checks that it can be executed, because a kernel may be
    /// configured to forbid that (`vm.memfd_noexec`). This blocks for some milliseconds, and at most for the time that a
    /// program may take to print its version.
    ///
    /// # Errors
    /// Fails when any of these steps fails. The program itself is used then.
    pub fn of(path: &Path) -> io::Result<Self> {
        Self::checked_within(path, VERSION_TIMEOUT)
    }

    fn checked_within(path: &Path, limit: Duration) -> io::Result<Self> {
        let mut program = File::open(path)?;
        let metadata = program.metadata()?;
        if metadata.len() > SIZE_MAX {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the program is larger than any crun"));
        }
        let fd = memfd()?;
        let mut copy = File::from(fd);
        io::copy(&mut program, &mut copy)?;
        // A half-written program may be an empty script, and the check below would accept it.
        let is_whole =
            copy.metadata()?.len() == metadata.len() && FileId::of(&program.metadata()?) == FileId::of(&metadata);
        if metadata.len() == 0 || !is_whole {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the program is empty, or was written to while it was copied",
            ));
        }
        let seals = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
        // SAFETY: fcntl on a descriptor that is open and owned by `copy`.
        if unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let sealed = Self { fd: copy.into(), path: path.to_owned(), file_id: FileId::of(&metadata) };
        let name = format!("/proc/{}/fd/{}", std::process::id(), sealed.fd.as_raw_fd());
        let mut probe = command(name);
        probe.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let status = status_within(&mut probe, limit)?;
        if status.success() { Ok(sealed) } else { Err(io::Error::other(format!("the copy fails with {status}"))) }
    }
}

/// Runs a program to its end. A program that takes longer than `limit` is killed.
fn status_within(command: &mut Command, limit: Duration) -> io::Result<ExitStatus> {
    let mut child = command.spawn()?;
    let has_ended = PidFd::open(child.id()).map(|pidfd| pidfd.ends_within(limit));
    if !matches!(has_ended, Ok(true)) {
        child.kill()?;
        child.wait()?;
    }
    match has_ended? {
        true => child.wait(),
        false => Err(io::Error::new(io::ErrorKind::TimedOut, "the copy does not print its version")),
    }
}

fn memfd() -> io::Result<OwnedFd> {
    // Kernels before 6.3 don't know MFD_EXEC, and allow execution without it.
    for more in [libc::MFD_EXEC, 0] {
        // SAFETY: a C string literal and flags.
        let fd = unsafe { libc::memfd_create(c"runtime".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | more) };
        if fd >= 0 {
            // SAFETY: the descriptor was just created and has no other owner.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, time::Instant};

    use super::*;

    fn program(path: &Path, text: &str) {
        fs::write(path, text).expect("written");
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("made executable");
    }

    /// A program that is still being written must not be copied: a shell would run an empty file as a script without an
    /// error.
    #[test]
    fn half_written_runtimes_are_not_copied_and_are_tried_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("runtime");
        program(&path, "#!/bin/sh\n");
        let current = CurrentSealedCopy::default();
        current.set(SealedCopy::of(&path).expect("the program is copied"));
        let first = current.get().expect("a copy");
        program(&path, "");
        assert_eq!(SealedCopy::of(&path).expect_err("an empty program is refused").kind(), io::ErrorKind::InvalidData);
        assert!(current.get().is_none());
        program(&path, "#!/bin/sh\nexit 0\n");
        assert_ne!(current.get().expect("a new copy").file_id, first.file_id);
    }

    /// A runtime that hangs must not keep the plugin from starting.
    #[test]
    fn a_runtime_that_hangs_is_not_waited_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("runtime");
        program(&path, "#!/bin/sh\nexec sleep 600\n");
        let began = Instant::now();
        let error = SealedCopy::checked_within(&path, Duration::from_millis(200)).expect_err("it hangs");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() < Duration::from_secs(300), "the program was not killed");
    }
}
