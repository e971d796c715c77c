//! Where a task reaches its host.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use nix::sched::{CloneFlags, setns};

use super::{NetworkNamespace, network};

/// The host's address as a task in this network sees it: the default gateway of a group's namespace, which Nomad's bridge
/// has on the host; loopback in the host's own.
///
/// # Errors
/// When there is none.
pub fn of(network: &NetworkNamespace) -> io::Result<IpAddr> {
    match network {
        NetworkNamespace::Host => Ok(Ipv4Addr::LOCALHOST.into()),
        NetworkNamespace::Private => Err(io::Error::other("a task without a network does not reach its host")),
        NetworkNamespace::Path(path) => {
            let (route, route6) = tables(path)?;
            network::gateway(&route, &route6)
                .ok_or_else(|| io::Error::other("the group's network has no default route"))
        }
    }
}

/// The routes of a namespace can be read from within it only: by a thread of its own, which ends with that.
fn tables(namespace: &Path) -> io::Result<(String, String)> {
    let namespace = fs::File::open(namespace)?;
    let inside = std::thread::Builder::new().name("netns".to_owned()).spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        let read = |table: &str| fs::read_to_string(format!("/proc/thread-self/net/{table}"));
        // Kernels without IPv6 have no such table.
        Ok((read("route")?, read("ipv6_route").unwrap_or_default()))
    })?;
    inside.join().map_err(|_| io::Error::other("the thread that looked into it ended early"))?
}
