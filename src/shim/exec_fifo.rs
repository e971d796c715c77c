//! Starts the process of a created container without a further run of the runtime.
//!
//! Between `create` and `start` the process waits at a FIFO, `exec.fifo` in the runtime's state directory. For a
//! container without `poststart` hooks, `runc start` and `crun start` only open and remove that FIFO: runc reads the
//! byte that the process then writes (libcontainer's `container_linux.go`, since 1.0.0-rc2), and crun writes the byte
//! that the process then reads (crun's `status.c`, `libcrun_status_write_exec_fifo`). Running the runtime for that
//! takes 3 to 10 ms. The shim still reports such a container as created, and supports every operation on it that it
//! supports for a running one, except pause.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::Duration,
};

use tokio::net::unix::pipe;

use crate::process::{PidFd, ProcessId};

/// The longest time until the process opens the FIFO. After `create`, the process has little left to do before that.
const FIFO_TIMEOUT: Duration = Duration::from_secs(30);

/// Starts the process of a created container. `state` is the runtime's directory for this container.
///
/// # Errors
/// Fails when the process could not be started; it is not running then. The error is NotFound if this runtime has no
/// such FIFO. The caller uses the shim's `Start` instead, which reports what is wrong.
pub async fn start_via_exec_fifo(state: &Path, process: &ProcessId) -> io::Result<()> {
    let path = state.join("exec.fifo");
    let open = |options: &mut OpenOptions| options.custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(&path);
    match open(OpenOptions::new().write(true)) {
        Ok(mut fifo) => {
            // The FIFO is removed first, as crun does: a missing FIFO means that the container runs.
            fs::remove_file(&path)?;
            fifo.write_all(&[0])
        }
        // No process has the FIFO open for reading (fifo(7)): runc's process waits, or will wait, until it can write.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            let init = PidFd::of(process)?.watch()?;
            // No descriptor is opened after this one, because the process runs from here on. If a later lack of
            // descriptors were reported as "not started", `runc start` would wait forever for a process that runs
            // already.
            let fifo = pipe::Receiver::from_file(open(OpenOptions::new().read(true))?)?;
            tokio::select! {
                written = tokio::time::timeout(FIFO_TIMEOUT, fifo.readable()) => written??,
                ended = init.readable() => drop(ended?),
            }
            // The byte is read even if the process has ended meanwhile, because the process may have written it before.
            if !has_byte(fifo)? {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            // The process runs, even if the file can't be removed.
            if let Err(error) = fs::remove_file(&path) {
                tracing::debug!(%error, path = %path.display(), "could not remove a started container's exec FIFO");
            }
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Reads the byte that a started process has written. Returns `false` if there is none.
///
/// This function reads from the descriptor directly. `Receiver::try_read` asks tokio's I/O driver, which may not know
/// yet that the FIFO is readable: a short process may have written the byte and ended before the FIFO was registered.
fn has_byte(fifo: pipe::Receiver) -> io::Result<bool> {
    let mut fifo = fs::File::from(fifo.into_nonblocking_fd()?);
    Ok(fifo.read(&mut [0])? == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// If the byte is missed, the start of a process that has run fails ("cannot start a stopped process").
    #[tokio::test]
    async fn a_byte_is_found_before_tokio_reports_the_fifo_as_readable() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("exec.fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("made");
        let open = || OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).expect("opened");
        let written = open();
        OpenOptions::new().write(true).open(&path).expect("opened").write_all(&[0]).expect("written");
        let receiver = || pipe::Receiver::from_file(written.try_clone().expect("duplicated")).expect("registered");
        assert!(has_byte(receiver()).expect("read"), "tokio has not polled the FIFO since the registration");
        assert!(!has_byte(receiver()).expect("read"), "there is only one byte");
    }
}
