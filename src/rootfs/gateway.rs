//! The address at which a task reaches its host.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use nix::sched::{CloneFlags, setns};

use super::{NetworkNamespace, network};

/// Returns the host's address as a task in this network sees it. In a group's namespace this is the default gateway,
/// whose address Nomad's bridge has on the host. In the host's namespace it is the loopback address.
///
/// # Errors
/// Fails when the network has no such address, or its routes can't be read.
pub fn host_address(network: &NetworkNamespace) -> io::Result<IpAddr> {
    match network {
        NetworkNamespace::Host => Ok(Ipv4Addr::LOCALHOST.into()),
        NetworkNamespace::Private => Err(io::Error::other("a task without a network does not reach its host")),
        NetworkNamespace::Path(path) => {
            let (route, route6) = tables(path)?;
            network::default_gateway(&route, &route6)
                .ok_or_else(|| io::Error::other("the group's network has no default route"))
        }
    }
}

/// Returns the IPv4 and IPv6 route tables of a network namespace. They can be read only from within the namespace, so a
/// short-lived thread enters it.
fn tables(namespace: &Path) -> io::Result<(String, String)> {
    let namespace = fs::File::open(namespace)?;
    let inside = std::thread::Builder::new().name("netns".to_owned()).spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        let read = |table: &str| fs::read_to_string(format!("/proc/thread-self/net/{table}"));
        // Kernels without IPv6 have no such table.
        Ok((read("route")?, read("ipv6_route").unwrap_or_default()))
    })?;
    inside.join().map_err(|_| io::Error::other("the thread that read the routes of the group's network panicked"))?
}
