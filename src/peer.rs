//! Checks which user is at the other end of a unix socket (unix(7), SO_PEERCRED). The mode of the socket's file gives
//! the same protection only as long as neither that mode nor the directory above it changes.

use std::{io, os::fd::AsRawFd as _};

use tokio::net::UnixStream;

/// The most groups that a user can have (`NGROUPS_MAX`, credentials(7)).
const GROUPS_MAX: usize = 65_536;
/// The libc crate does not define this yet (linux, `include/uapi/asm-generic/socket.h`).
const SO_PEERGROUPS: libc::c_int = 59;

/// Why a connection is refused.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The kernel doesn't report the process at the other end.
    #[error("the kernel does not report which process is at the other end of the socket")]
    Unknown(#[source] io::Error),
    /// The process at the other end belongs to a user that is not allowed.
    #[error("the other end of the socket is process {pid} of user {uid}, which may not use it")]
    UserNotAllowed {
        /// The pid of the process; 0 when the process is not in this pid namespace.
        pid: i32,
        /// The id of the user that the process runs as.
        uid: u32,
    },
}

/// The users that may be at the other end of a socket: root, the user that this process runs as and, if wanted, the
/// members of one group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AllowedPeers {
    group: Option<u32>,
}

impl AllowedPeers {
    /// Allows root and the user that this process runs as.
    pub fn root() -> Self {
        Self::default()
    }

    /// Allows the members of a group, too. The socket's file belongs to that group.
    pub fn with_group(group: Option<u32>) -> Self {
        Self { group }
    }

    /// Checks the other end of a connection.
    ///
    /// # Errors
    /// Fails when the other end belongs to another user, or the kernel does not report it.
    pub fn check(self, stream: &UnixStream) -> Result<(), PeerError> {
        let peer = stream.peer_cred().map_err(PeerError::Unknown)?;
        let (uid, gid, pid) = (peer.uid(), peer.gid(), peer.pid().unwrap_or_default());
        if uid == 0 || uid == nix::unistd::geteuid().as_raw() {
            return Ok(());
        }
        match self.group {
            Some(group) if gid == group || groups(stream).map_err(PeerError::Unknown)?.contains(&group) => Ok(()),
            _ => Err(PeerError::UserNotAllowed { pid, uid }),
        }
    }
}

/// Returns the supplementary groups of the process at the other end.
fn groups(stream: &UnixStream) -> io::Result<Vec<libc::gid_t>> {
    let mut groups: Vec<libc::gid_t> = vec![0; GROUPS_MAX];
    let size = size_of::<libc::gid_t>();
    let mut length = libc::socklen_t::try_from(GROUPS_MAX * size).map_err(io::Error::other)?;
    // SAFETY: `length` is the buffer's size. The kernel writes no more than that, and stores how much it wrote.
    let outcome = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    groups.truncate(length as usize / size);
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_other_end_of_a_pair_is_this_process() {
        let (one, _other) = UnixStream::pair().expect("a pair");
        assert!(AllowedPeers::root().check(&one).is_ok());
        let own: Vec<u32> = nix::unistd::getgroups().expect("groups").iter().map(|group| group.as_raw()).collect();
        assert_eq!(groups(&one).expect("groups"), own);
    }
}
