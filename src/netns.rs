//! Network namespaces: creates them, finds processes in them, reads the addresses and routes of another namespace, and
//! restores them after a program has removed them.
//!
//! This uses rtnetlink(7) and keeps its messages unchanged: the message by which a dump reports an address or a route
//! is also the one that adds it again.

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
    sched::{CloneFlags, setns, unshare},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt},
    sys::time::{TimeVal, TimeValLike as _},
};
use serde::{Deserialize, Serialize};

use crate::process;

/// The timeout for an answer of the kernel, in seconds. The kernel answers at once.
const ANSWER_TIMEOUT_SECONDS: i64 = 5;
/// The size of the receive buffer in bytes: larger than any message of a dump.
const BUFFER_SIZE: usize = 64 << 10;
/// The size of `nlmsghdr` in bytes (netlink(7)).
const HEADER_SIZE: usize = 16;
/// The index that the loopback device has in every network namespace (linux, `include/net/net_namespace.h`).
const LOOPBACK_INDEX: u32 = 1;

/// The addresses and routes of a network namespace, without those of the loopback device and those that the kernel
/// makes by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// Each address as an `ifaddrmsg` with its attributes.
    addresses: Vec<Vec<u8>>,
    /// Each route as an `rtmsg` with its attributes.
    routes: Vec<Vec<u8>>,
}

impl Addresses {
    /// Returns whether the namespace has no address.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// Reads the addresses and routes that a namespace has now. Blocks for a moment.
    ///
    /// # Errors
    /// Fails when the namespace can't be entered, or the kernel refuses the request.
    pub fn of(namespace: &Path) -> io::Result<Self> {
        let socket = route_socket(namespace)?;
        // ifaddrmsg: family, prefix length, flags, scope, then the device's index.
        let is_own = |address: &Vec<u8>| address.get(4..8).is_some_and(|index| index != LOOPBACK_INDEX.to_ne_bytes());
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

    /// Adds the addresses and routes to a namespace, which may still have some of them. Blocks for a moment.
    ///
    /// # Errors
    /// Fails with the kernel's first refusal of an address or route. The others are added nevertheless.
    pub fn restore(&self, namespace: &Path) -> io::Result<()> {
        let socket = route_socket(namespace)?;
        let all = [(libc::RTM_NEWADDR, &self.addresses), (libc::RTM_NEWROUTE, &self.routes)];
        let mut pending: Vec<_> =
            all.iter().flat_map(|(kind, list)| list.iter().map(move |message| (*kind, message))).collect();
        loop {
            let (before, mut refused, mut first_error) = (pending.len(), Vec::new(), None);
            for (kind, message) in pending {
                let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
                send_request(&socket, kind, flags, message)?;
                match receive(&socket, |_, _| {}) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                        refused.push((kind, message));
                        first_error = first_error.or(Some(error));
                    }
                    _ => {}
                }
            }
            // A route may need another route to reach its gateway, and a dump lists the widest routes first, so refused
            // messages are tried again as long as others succeed.
            match first_error {
                None => return Ok(()),
                Some(error) if refused.len() == before => return Err(error),
                Some(_) => pending = refused,
            }
        }
    }
}

/// Finds a process that is in a network namespace. Looks at every process of the host, which takes 3 µs for each.
///
/// # Errors
/// Fails when the namespace, the list of processes or the namespace of a process can't be read.
pub fn find_process_in(namespace: &Path) -> io::Result<Option<u32>> {
    let Some(wanted) = process::none_if_vanished(fs::metadata(namespace))? else { return Ok(None) };
    for pid in process::all_pids()? {
        // A process that is about to end and has no namespaces any more looks as if it had ended. A process that a
        // security module hides even from root counts as one outside of the namespace, because its namespace can't be
        // known.
        let own = match fs::metadata(format!("/proc/{pid}/ns/net")) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
            looked => process::none_if_vanished(looked)?,
        };
        if own.is_some_and(|own| (own.dev(), own.ino()) == (wanted.dev(), wanted.ino())) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// Creates a network namespace whose loopback device is up, as container runtimes do for a new container. The namespace
/// exists as long as the returned descriptor, or a process in it. Blocks for half a millisecond.
///
/// # Errors
/// Fails as unshare(2) does, or when the kernel refuses to bring the device up.
pub fn create() -> io::Result<OwnedFd> {
    in_new_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        bring_up_loopback(&own_route_socket()?)?;
        File::open("/proc/thread-self/ns/net").map(OwnedFd::from)
    })
}

/// Brings up the loopback device of the socket's namespace. The kernel then gives it its addresses.
fn bring_up_loopback(socket: &OwnedFd) -> io::Result<()> {
    let up = u32::try_from(libc::IFF_UP).map_err(io::Error::other)?;
    // ifinfomsg: family, padding and type; the device's index; its flags; the flags to change (rtnetlink(7)).
    let message = [[0; 4], LOOPBACK_INDEX.to_ne_bytes(), up.to_ne_bytes(), up.to_ne_bytes()].concat();
    send_request(socket, libc::RTM_NEWLINK, libc::NLM_F_REQUEST | libc::NLM_F_ACK, &message)?;
    receive(socket, |_, _| {})
}

/// Opens a socket in the namespace, where the socket stays.
fn route_socket(namespace: &Path) -> io::Result<OwnedFd> {
    in_namespace(namespace, own_route_socket)
}

/// Calls a function in a network namespace, and returns its result.
///
/// # Errors
/// Fails when the namespace can't be entered, and as the function does.
pub(crate) fn in_namespace<T: Send>(
    namespace: &Path,
    function: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let namespace = File::open(namespace)?;
    in_new_thread(|| {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        function()
    })
}

/// Opens a socket in the calling thread's namespace.
fn own_route_socket() -> io::Result<OwnedFd> {
    let kind = (AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute);
    let socket = socket(kind.0, kind.1, kind.2, kind.3)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_TIMEOUT_SECONDS))?;
    Ok(socket)
}

/// Calls `enter`, which enters another namespace, in a new thread that ends then: a thread that has entered a namespace
/// stays there.
fn in_new_thread<T: Send>(enter: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, enter)?;
        thread.join().map_err(|_| io::Error::other("the namespace's thread panicked"))?
    })
}

/// Sends a request to the kernel.
fn send_request(socket: &OwnedFd, kind: u16, flags: libc::c_int, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(HEADER_SIZE + body.len()).map_err(io::Error::other)?;
    let flags = u16::try_from(flags).map_err(io::Error::other)?;
    let mut message = Vec::with_capacity(HEADER_SIZE + body.len());
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number and port id may be 0: one request at a time is made on this socket.
    message.extend([0; 8]);
    message.extend(body);
    send(socket.as_raw_fd(), &message, MsgFlags::empty())?;
    Ok(())
}

/// Receives messages and passes each to `take`, until the kernel reports the end of a dump, a success or an error.
fn receive(socket: &OwnedFd, mut take: impl FnMut(u16, &[u8])) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_SIZE];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some((header, _)) = rest.split_at_checked(HEADER_SIZE) {
            let number = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_ne_bytes);
            let size = number(&header[..4]) as usize;
            let kind = u16::from_ne_bytes([header[4], header[5]]);
            let Some(body) = rest.get(HEADER_SIZE..size) else { return Err(io::ErrorKind::InvalidData.into()) };
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

/// Requests a dump of all objects of a kind from the kernel: `request` is the type of the request, whose body has
/// `length` zeros, and `answer` is the type of the messages to return.
fn dump(socket: &OwnedFd, request: u16, answer: u16, length: usize) -> io::Result<Vec<Vec<u8>>> {
    send_request(socket, request, libc::NLM_F_REQUEST | libc::NLM_F_DUMP, &vec![0; length])?;
    let mut found = Vec::new();
    receive(socket, |kind, body| {
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

    /// A network namespace with a veth pair, which is removed on drop.
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
            // A gateway that is reachable only by another route.
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
    fn removed_addresses_and_routes_are_restored() {
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
        let kept = Addresses::of(&path).expect("the namespace can be read");
        assert!(!kept.is_empty());
        ip(&format!("-n {name} addr flush dev eth0 scope global"));
        assert!(!ip(&format!("-n {name} route")).contains("default"));
        let text = serde_json::to_string(&kept).expect("serialized");
        serde_json::from_str::<Addresses>(&text).expect("deserialized").restore(&path).expect("restored");
        assert_eq!(look(), before);
        kept.restore(&path).expect("addresses that exist are fine");
        assert_eq!(look(), before);
    }

    #[test]
    fn a_process_in_a_namespace_is_found() {
        let namespace = Namespace::new();
        let path = Path::new("/run/netns").join(&namespace.0);
        let process_in = |path: &Path| find_process_in(path).expect("processes can be read");
        assert_eq!(process_in(&path), None);
        let mut child = Command::new("ip").args(["netns", "exec", &namespace.0, "sleep", "600"]).spawn().expect("runs");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while process_in(&path).is_none() && std::time::Instant::now() < deadline {}
        assert_eq!(process_in(&path), Some(child.id()));
        child.kill().expect("killed");
        child.wait().expect("reaped");
        assert!(process_in(Path::new("/proc/self/ns/net")).is_some());
    }
}
