//! Addresses and routes of another network namespace: looked at, and put back where somebody has taken them away.
//!
//! rtnetlink(7), with its messages kept as they come: what a dump says of an address or route is what adds it again.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt},
    sys::time::{TimeVal, TimeValLike as _},
};
use serde::{Deserialize, Serialize};

use crate::process;

/// The kernel answers at once.
const LIMIT: i64 = 5;
/// More than any message of a dump.
const BUFFER: usize = 64 << 10;
/// Of `nlmsghdr`, netlink(7).
const HEADER: usize = 16;

/// Addresses and routes of a namespace, but for the loopback device's and what the kernel makes by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// `ifaddrmsg` with its attributes, each.
    addresses: Vec<Vec<u8>>,
    /// `rtmsg` with its attributes, each.
    routes: Vec<Vec<u8>>,
}

impl Addresses {
    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// Those that a namespace has now. Blocks for a moment.
    ///
    /// # Errors
    /// When the namespace can't be entered, or the kernel refuses.
    pub fn of(namespace: &Path) -> io::Result<Self> {
        let socket = route_socket(namespace)?;
        // ifaddrmsg: family, prefix length, flags, scope, then the device's number; 1 is the loopback device's.
        let is_own = |address: &Vec<u8>| address.get(4..8).is_some_and(|index| index != 1_u32.to_ne_bytes());
        // rtmsg: family, two lengths, tos, table, protocol, scope, type.
        let is_set = |route: &Vec<u8>| {
            route.get(4..8).is_some_and(|fields| {
                fields[0] == libc::RT_TABLE_MAIN && fields[1] != libc::RTPROT_KERNEL && fields[3] == libc::RTN_UNICAST
            })
        };
        let mut addresses = dump(&socket, libc::RTM_GETADDR, libc::RTM_NEWADDR, 8)?;
        let mut routes = dump(&socket, libc::RTM_GETROUTE, libc::RTM_NEWROUTE, 12)?;
        addresses.retain(is_own);
        routes.retain(is_set);
        Ok(Self { addresses, routes })
    }

    /// Adds them to a namespace; those that it has are fine. Blocks for a moment.
    ///
    /// # Errors
    /// The first that the kernel refuses; the others are added.
    pub fn put_back(&self, namespace: &Path) -> io::Result<()> {
        let socket = route_socket(namespace)?;
        let all = [(libc::RTM_NEWADDR, &self.addresses), (libc::RTM_NEWROUTE, &self.routes)];
        let mut left: Vec<_> =
            all.iter().flat_map(|(kind, list)| list.iter().map(move |message| (*kind, message))).collect();
        loop {
            let (before, mut refused, mut why) = (left.len(), Vec::new(), None);
            for (kind, message) in left {
                let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
                tell(&socket, kind, flags, message)?;
                match read(&socket, |_, _| {}) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                        refused.push((kind, message));
                        why = why.or(Some(error));
                    }
                    _ => {}
                }
            }
            // A route may need another to reach its gateway, and a dump has the widest first.
            match why {
                None => return Ok(()),
                Some(error) if refused.len() == before => return Err(error),
                Some(_) => left = refused,
            }
        }
    }
}

/// A process whose network namespace this is, if there is one. Looks at every process: 3 µs each.
///
/// # Errors
/// When that can't be told.
pub fn who_is_in(namespace: &Path) -> io::Result<Option<u32>> {
    let Some(wanted) = process::unless_vanished(fs::metadata(namespace))? else { return Ok(None) };
    for pid in process::all()? {
        // A process that is about to end, and has no namespaces any more, reads as one that has ended. One that a security
        // module keeps even from root is not in a task's namespace as far as anybody can tell.
        let own = match fs::metadata(format!("/proc/{pid}/ns/net")) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
            looked => process::unless_vanished(looked)?,
        };
        if own.is_some_and(|own| (own.dev(), own.ino()) == (wanted.dev(), wanted.ino())) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// A socket in that namespace, which it stays in. Only a thread can enter one, and one of its own, because it stays there.
fn route_socket(namespace: &Path) -> io::Result<OwnedFd> {
    let namespace = File::open(namespace)?;
    let enter = || -> io::Result<OwnedFd> {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        let kind = (AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute);
        let socket = socket(kind.0, kind.1, kind.2, kind.3)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(LIMIT))?;
        Ok(socket)
    };
    thread::scope(|scope| scope.spawn(enter).join()).map_err(|_| io::Error::other("a thread ended early"))?
}

fn tell(socket: &OwnedFd, kind: u16, flags: libc::c_int, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
    let flags = u16::try_from(flags).map_err(io::Error::other)?;
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number and port: one question at a time, and the kernel knows whose.
    message.extend([0; 8]);
    message.extend(body);
    send(socket.as_raw_fd(), &message, MsgFlags::empty())?;
    Ok(())
}

/// Hands each message to `take`, until the kernel has no more to say or says that something failed.
fn read(socket: &OwnedFd, mut take: impl FnMut(u16, &[u8])) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some((header, _)) = rest.split_at_checked(HEADER) {
            let number = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_ne_bytes);
            let size = number(&header[..4]) as usize;
            let kind = u16::from_ne_bytes([header[4], header[5]]);
            let Some(body) = rest.get(HEADER..size) else { return Err(io::ErrorKind::InvalidData.into()) };
            match i32::from(kind) {
                libc::NLMSG_DONE => return Ok(()),
                libc::NLMSG_ERROR => {
                    return match number(body.get(..4).unwrap_or_default()).cast_signed() {
                        0 => Ok(()),
                        error => Err(io::Error::from_raw_os_error(-error)),
                    };
                }
                _ => take(kind, body),
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn dump(socket: &OwnedFd, ask: u16, answer: u16, length: usize) -> io::Result<Vec<Vec<u8>>> {
    tell(socket, ask, libc::NLM_F_REQUEST | libc::NLM_F_DUMP, &vec![0; length])?;
    let mut found = Vec::new();
    read(socket, |kind, body| {
        if kind == answer {
            found.push(body.to_vec());
        }
    })?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn ip(words: &str) -> String {
        let output = Command::new("ip").args(words.split(' ')).output().expect("ip runs");
        assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A namespace with a veth pair, gone when this is dropped.
    struct Namespace(String);

    impl Namespace {
        fn new() -> Self {
            let name = format!("ndst-{}", crate::ids::random_hex(4));
            ip(&format!("netns add {name}"));
            let this = Self(name);
            let name = &this.0;
            ip(&format!("-n {name} link add eth0 type veth peer name other"));
            for words in ["link set lo up", "addr add 10.9.8.2/24 dev eth0", "addr add fd00:9::2/64 dev eth0 nodad"] {
                ip(&format!("-n {name} {words}"));
            }
            for words in ["link set other up", "link set eth0 up", "route add default via 10.9.8.1"] {
                ip(&format!("-n {name} {words}"));
            }
            ip(&format!("-n {name} route add 10.20.0.0/16 via 10.9.8.9 metric 7"));
            // A gateway that only another route reaches.
            ip(&format!("-n {name} route add 169.254.1.1 dev eth0 scope link"));
            ip(&format!("-n {name} route add 9.0.0.0/8 via 169.254.1.1 dev eth0"));
            this
        }
    }

    impl Drop for Namespace {
        fn drop(&mut self) {
            ip(&format!("netns del {}", self.0));
        }
    }

    #[test]
    fn what_was_taken_away_is_put_back() {
        let namespace = Namespace::new();
        let name = &namespace.0;
        let path = Path::new("/run/netns").join(name);
        let look = || {
            (
                ip(&format!("-n {name} -4 addr show eth0")),
                ip(&format!("-n {name} route")),
                ip(&format!("-n {name} -6 route")),
            )
        };
        let before = look();
        let kept = Addresses::of(&path).expect("looked at");
        assert!(!kept.is_empty());
        ip(&format!("-n {name} addr flush dev eth0 scope global"));
        assert!(!ip(&format!("-n {name} route")).contains("default"));
        let text = serde_json::to_string(&kept).expect("JSON");
        serde_json::from_str::<Addresses>(&text).expect("read").put_back(&path).expect("put back");
        assert_eq!(look(), before);
        kept.put_back(&path).expect("what is there is fine");
        assert_eq!(look(), before);
    }

    #[test]
    fn who_is_in_a_namespace_is_found() {
        let namespace = Namespace::new();
        let path = Path::new("/run/netns").join(&namespace.0);
        let who_is_in = |path: &Path| who_is_in(path).expect("looked at");
        assert_eq!(who_is_in(&path), None);
        let mut child = Command::new("ip").args(["netns", "exec", &namespace.0, "sleep", "600"]).spawn().expect("runs");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while who_is_in(&path).is_none() && std::time::Instant::now() < deadline {}
        assert_eq!(who_is_in(&path), Some(child.id()));
        child.kill().expect("killed");
        child.wait().expect("reaped");
        assert!(who_is_in(Path::new("/proc/self/ns/net")).is_some());
    }
}
