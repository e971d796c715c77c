//! The state of a FIFO, asked of the kernel through the reading end.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Returns how many bytes are in the FIFO and have not been read.
///
/// # Errors
/// Fails as ioctl(2) does.
pub fn unread(reader: &File) -> io::Result<u64> {
    let mut count: libc::c_int = 0;
    // SAFETY: the descriptor is open, and FIONREAD writes one int (pipe(7)).
    if unsafe { libc::ioctl(reader.as_raw_fd(), libc::FIONREAD, &raw mut count) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(count).unwrap_or(0))
}

/// Returns whether the last writer has closed the FIFO (poll(2): POLLHUP). False while no writer has opened it since
/// the reader did.
///
/// # Errors
/// Fails as poll(2) does.
pub fn has_hung_up(reader: &File) -> io::Result<bool> {
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)))
}
