//! Lets a created container's process go without a further run of the runtime.
//!
//! Between `create` and `start` the process waits at a FIFO, `exec.fifo` in the runtime's state directory, and all that
//! `runc start` and `crun start` do for a container without `poststart` hooks is to open it and remove it: runc reads the
//! byte that the process then writes (libcontainer's `container_linux.go`, since 1.0.0-rc2), crun writes the byte that the
//! process then reads (its `status.c`, `libcrun_status_write_exec_fifo`). Running them for that takes 3 to 10 ms. The shim
//! goes on to call such a container created, and does all that it does for a running one but to pause it.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::Duration,
};

use tokio::net::unix::pipe;

use crate::process::{PidFd, ProcessId};

/// The process has little left to do until it comes to the FIFO.
const COMING: Duration = Duration::from_secs(30);

/// Lets the created container's process go, whose state is in `state` (the runtime's directory for this container).
///
/// # Errors
/// When that could not be done, and nothing was: NotFound if this runtime has no such FIFO. The shim's `Start` is the way
/// then, and tells what is wrong.
pub async fn release(state: &Path, process: &ProcessId) -> io::Result<()> {
    let path = state.join("exec.fifo");
    let open = |options: &mut OpenOptions| options.custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(&path);
    match open(OpenOptions::new().write(true)) {
        Ok(mut fifo) => {
            // crun's order: who finds no FIFO knows that the container runs.
            fs::remove_file(&path)?;
            fifo.write_all(&[0])
        }
        // Nobody has it open to read (fifo(7)): runc's process waits, or will, until it can write.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            let init = PidFd::of(process)?.watch()?;
            // The last descriptor that is needed: from here on the process runs. A shortage later would be told as "nothing
            // was done", and `runc start` waits for ever for a process that runs already.
            let fifo = pipe::Receiver::from_file(open(OpenOptions::new().read(true))?)?;
            tokio::select! {
                written = tokio::time::timeout(COMING, fifo.readable()) => written??,
                ended = init.readable() => drop(ended?),
            }
            // Also of one that has ended meanwhile: it may have been that quick.
            if fifo.try_read(&mut [0])? == 0 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            // It runs, whatever becomes of the file.
            if let Err(error) = fs::remove_file(&path) {
                tracing::debug!(%error, path = %path.display(), "stays");
            }
            Ok(())
        }
        Err(error) => Err(error),
    }
}
