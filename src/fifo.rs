//! What the kernel says of a FIFO that we read.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Bytes that are in it.
///
/// # Errors
/// As ioctl(2).
pub fn unread(reader: &File) -> io::Result<u64> {
    let mut count: libc::c_int = 0;
    // SAFETY: the descriptor is open, and FIONREAD writes one int (pipe(7)).
    if unsafe { libc::ioctl(reader.as_raw_fd(), libc::FIONREAD, &raw mut count) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(count).unwrap_or(0))
}

/// Has its last writer gone (poll(2): POLLHUP)? Not for a reader that has seen none.
///
/// # Errors
/// As poll(2).
pub fn is_closed(reader: &File) -> io::Result<bool> {
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)))
}
