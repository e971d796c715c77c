//! Reads the addresses of a group's network namespace, and the host's address as the group's tasks see it.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags, sys::socket::SockaddrStorage};

use super::{NetworkNamespace, network};
use crate::{files::none_if_missing, netns::in_namespace};

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
            let (route, route6) = in_namespace(path, || routes(Path::new("/proc/thread-self/net")))?;
            network::default_gateway(&route, &route6)
                .ok_or_else(|| io::Error::other("the group's network has no default route"))
        }
    }
}

/// Reads the tables of IPv4 and IPv6 routes in this directory. A kernel without IPv6 does not have the second one.
fn routes(directory: &Path) -> io::Result<(String, String)> {
    let route6 = none_if_missing(fs::read_to_string(directory.join("ipv6_route")))?;
    Ok((fs::read_to_string(directory.join("route"))?, route6.unwrap_or_default()))
}

/// Returns the addresses of a network namespace that the names of its tasks get in /etc/hosts: the addresses of all
/// interfaces that are up, without loopback and link-local ones. IPv4 addresses come first.
///
/// # Errors
/// Fails when the namespace can't be entered, or as getifaddrs(3) does.
pub fn addresses(namespace: &Path) -> io::Result<Vec<IpAddr>> {
    let mut found = in_namespace(namespace, || {
        let interfaces = getifaddrs()?.filter(|interface| {
            interface.flags.contains(InterfaceFlags::IFF_UP) && !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK)
        });
        Ok(interfaces.filter_map(|interface| ip_address(&interface.address?)).collect::<Vec<_>>())
    })?;
    found.retain(|address| !is_link_local(address));
    found.sort_by_key(IpAddr::is_ipv6);
    found.dedup();
    Ok(found)
}

fn ip_address(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
}

fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_missing_table_has_no_routes() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        fs::write(directory.path().join("route"), "table\n").expect("written");
        assert_eq!(routes(directory.path()).expect("read"), ("table\n".to_owned(), String::new()));
        // A directory in the table's place can't be read.
        fs::create_dir(directory.path().join("ipv6_route")).expect("made");
        assert!(routes(directory.path()).is_err());
    }

    #[test]
    fn link_local_addresses_are_recognized() {
        for (address, expected) in [("169.254.3.1", true), ("fe80::1", true), ("10.0.0.1", false), ("fd00::1", false)] {
            assert_eq!(is_link_local(&address.parse().expect("an address")), expected, "{address}");
        }
    }
}
