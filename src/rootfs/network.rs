//! The text of a container's network files, hosts(5) and resolv.conf(5), and what they are made from.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The address of a task's own name where the task has no other address of its own. It is the loopback address that
/// Debian gives a host's own name, so that the name is not the first one that belongs to 127.0.0.1.
pub const OWN_NAME_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 1, 1);

/// The settings of a resolv.conf. An empty list means that the host's list is used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// The addresses of the `nameserver` lines.
    pub servers: Vec<String>,
    /// The domains of the `search` line.
    pub searches: Vec<String>,
    /// The entries of the `options` line.
    pub options: Vec<String>,
}

impl Dns {
    /// Returns whether all three lists are empty: the job has no `dns` block then.
    pub fn is_unset(&self) -> bool {
        self.servers.is_empty() && self.searches.is_empty() && self.options.is_empty()
    }

    /// Parses a resolv.conf. Other lines are ignored.
    pub fn parse(text: &str) -> Self {
        let mut dns = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let rest = |words: std::str::SplitWhitespace<'_>| words.map(str::to_owned).collect::<Vec<_>>();
            match words.next() {
                Some("nameserver") => dns.servers.extend(words.next().map(str::to_owned)),
                Some("search" | "domain") => dns.searches = rest(words),
                Some("options") => dns.options.extend(rest(words)),
                _ => {}
            }
        }
        dns
    }

    /// Returns the text of a resolv.conf. Each empty list is replaced by the one of `system`.
    pub fn render(&self, system: &Self) -> String {
        fn or<'a>(own: &'a [String], system: &'a [String]) -> &'a [String] {
            if own.is_empty() { system } else { own }
        }
        let mut text = String::new();
        for server in or(&self.servers, &system.servers) {
            text.push_str(&format!("nameserver {server}\n"));
        }
        for (keyword, list) in
            [("search", or(&self.searches, &system.searches)), ("options", or(&self.options, &system.options))]
        {
            if !list.is_empty() {
                text.push_str(&format!("{keyword} {}\n", list.join(" ")));
            }
        }
        text
    }
}

/// One entry of a job's `extra_hosts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtraHost {
    /// The host's name.
    pub name: String,
    /// The host's address.
    pub address: HostAddress,
}

/// The address of an entry of `extra_hosts`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostAddress {
    /// A given address.
    At(IpAddr),
    /// `host-gateway`: the address at which the task reaches its host.
    Gateway,
}

impl ExtraHost {
    /// Parses `name:address`. Everything after the first colon is the address, which may be IPv6, in brackets or not.
    ///
    /// # Errors
    /// Returns a description of what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, address) = text.split_once(':').ok_or_else(|| format!("{text:?} is not name:address"))?;
        if !is_hosts_name(name) {
            return Err(format!("{text:?} has no name that /etc/hosts can contain"));
        }
        let address = match address.trim() {
            "host-gateway" => HostAddress::Gateway,
            other => {
                let bare = other.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(other);
                let address = bare.parse();
                HostAddress::At(
                    address.map_err(|_| format!("{text:?}: {other:?} is not an IP address or host-gateway"))?,
                )
            }
        };
        Ok(Self { name: name.to_owned(), address })
    }
}

/// The lines that each hosts file begins with.
pub const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n\
     ff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n";

/// Returns whether a hosts file can contain this name.
pub fn is_hosts_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(|c: char| c.is_whitespace() || c.is_control() || c == '#')
}

/// Returns all names in a hosts file.
pub fn names(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split('#').next().unwrap_or_default().split_whitespace().skip(1))
}

/// Returns the text of a hosts file: `base`, then a line for each of `names`, which are pairs of address and name.
pub fn hosts<'a>(base: &str, names: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = base.to_owned();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    for (address, name) in names {
        text.push_str(&format!("{address}\t{name}\n"));
    }
    text
}

/// Returns the default gateway of a network namespace, given the text of its /proc/net/route and /proc/net/ipv6_route.
pub fn default_gateway(route: &str, route6: &str) -> Option<IpAddr> {
    // The fields are destination and gateway, hexadecimal and in the host's byte order (linux, fib_route_seq_show).
    let v4 = route.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (destination, gateway) = (fields.get(1)?, fields.get(2)?);
        let gateway = u32::from_str_radix(gateway, 16).ok().filter(|&gateway| gateway != 0)?;
        (*destination == "00000000").then(|| IpAddr::V4(Ipv4Addr::from(gateway.to_ne_bytes())))
    });
    // The fields are destination and its prefix length, source and its prefix length, and next hop, hexadecimal and in
    // network byte order.
    let v6 = || {
        route6.lines().find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let hop = u128::from_str_radix(fields.get(4)?, 16).ok().filter(|&hop| hop != 0)?;
            (*fields.get(1)? == "00").then(|| IpAddr::V6(Ipv6Addr::from(hop)))
        })
    };
    v4.or_else(v6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_hosts_have_addresses_of_both_kinds() {
        let at = |text: &str| ExtraHost::parse(text).map(|host| (host.name, host.address));
        let v6 = HostAddress::At("fd00::1".parse().expect("an address"));
        assert_eq!(at("db:127.0.1.1"), Ok(("db".to_owned(), HostAddress::At(Ipv4Addr::new(127, 0, 1, 1).into()))));
        assert_eq!(at("db:fd00::1"), Ok(("db".to_owned(), v6)));
        assert_eq!(at("db:[fd00::1]"), Ok(("db".to_owned(), v6)));
        assert_eq!(at("host:host-gateway"), Ok(("host".to_owned(), HostAddress::Gateway)));
        for bad in ["db", "db:", ":1.2.3.4", "db:1.2.3", "a b:1.2.3.4", "a\n1.2.3.4 evil:1.2.3.4"] {
            assert!(at(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn gateways_are_found_in_the_kernels_tables() {
        let route =
            "Iface\tDestination\tGateway\tFlags\neth0\t0011A8C0\t00000000\t0001\neth0\t00000000\t011AA8C0\t0003\n";
        let swapped = u32::from_str_radix("011AA8C0", 16).expect("hexadecimal").to_ne_bytes();
        assert_eq!(default_gateway(route, ""), Some(IpAddr::V4(Ipv4Addr::from(swapped))));
        let zero = "0".repeat(32);
        let route6 = format!("{zero} 00 {zero} 00 fd000000000000000000000000000001 00000400 0 0 00000003 eth0\n");
        assert_eq!(default_gateway("Iface\n", &route6), Some("fd00::1".parse().expect("an address")));
        assert_eq!(default_gateway("Iface\n", &format!("{zero} 00 {zero} 00 {zero} ffffffff 1 0 00200200 lo\n")), None);
    }

    #[test]
    fn each_list_falls_back_to_the_systems() {
        let system = Dns::parse("# comment\nnameserver 10.0.0.1\nsearch a.example b.example\noptions ndots:1\n");
        let job = Dns { servers: vec!["127.0.0.1".to_owned()], ..Dns::default() };
        assert_eq!(job.render(&system), "nameserver 127.0.0.1\nsearch a.example b.example\noptions ndots:1\n");
        assert!(Dns::default().is_unset());
        assert_eq!(
            Dns::default().render(&system),
            "nameserver 10.0.0.1\nsearch a.example b.example\noptions ndots:1\n"
        );
    }
}
