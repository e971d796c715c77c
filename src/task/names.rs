//! By which names a task finds others: its hosts file and its name servers.

use std::{fs, io, path::Path};

use super::StartRequest;
use crate::{
    ids::Flavor,
    rootfs::{
        NetworkNamespace, RootfsError, gateway,
        network::{self, Dns, ExtraHost, HOSTS, HostAddress},
    },
};

const HOSTS_FILE: &str = "/etc/hosts";

/// A task's network files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) hosts: Hosts,
    /// None: the image's own.
    pub(super) resolv_conf: Option<String>,
}

/// What `/etc/hosts` is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hosts {
    /// The host's, read-only.
    OfTheHost,
    /// A file of the task's own.
    Text(String),
}

impl Names {
    /// As the job and its group say.
    ///
    /// # Errors
    /// When `host-gateway` has no address.
    pub(super) fn of(request: &StartRequest, network: &NetworkNamespace, flavor: Flavor) -> Result<Self, RootfsError> {
        let options = &request.options;
        let mut extra = Vec::new();
        for host in &options.extra_hosts {
            match address(host, network) {
                Ok(found) => extra.push(found),
                // The old driver wrote a line that meant nothing.
                Err(error) if flavor == Flavor::DropIn => {
                    tracing::warn!(task = %request.task_id, error = %crate::chain(&error), "a line of extra_hosts is left out");
                }
                Err(error) => return Err(error),
            }
        }
        let extra = || extra.iter().map(|(address, name)| (address.as_str(), *name));
        let own = request.group_host.as_ref().map(|(address, name)| (address.as_str(), name.as_str()));
        let hosts = match (options.host_network, options.extra_hosts.is_empty()) {
            (true, true) => Hosts::OfTheHost,
            (true, false) => Hosts::Text(network::hosts(&read(Path::new(HOSTS_FILE))?, extra())),
            (false, _) => Hosts::Text(network::hosts(HOSTS, own.into_iter().chain(extra()))),
        };
        // The old driver gave tasks with the host's network its name servers, too, whatever `host_dns` said.
        let host_dns = options.host_dns || (options.host_network && flavor == Flavor::DropIn);
        let servers = host_dns || !request.dns.is_unset();
        let resolv_conf = match servers {
            true => Some(request.dns.render(&system_dns(options.host_network)?)),
            false => None,
        };
        Ok(Self { hosts, resolv_conf })
    }
}

fn address<'a>(host: &'a ExtraHost, network: &NetworkNamespace) -> Result<(String, &'a str), RootfsError> {
    let address = match host.address {
        HostAddress::At(address) => address,
        HostAddress::Gateway => {
            gateway::of(network).map_err(|source| RootfsError::Gateway { name: host.name.clone(), source })?
        }
    };
    Ok((address.to_string(), &host.name))
}

fn read(path: &Path) -> Result<String, RootfsError> {
    fs::read_to_string(path).map_err(|source| RootfsError::File { doing: "read", path: path.to_owned(), source })
}

/// The host's name servers. systemd-resolved's stub listens on the host's loopback only; a task with a network of its
/// own needs the servers behind it.
fn system_dns(host_network: bool) -> Result<Dns, RootfsError> {
    // A host without the file has no name servers; one whose file can't be read has some.
    let read = |path: &str| match fs::read_to_string(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(RootfsError::File { doing: "read", path: path.into(), source })
        }
        read => Ok(read.map(|text| Dns::parse(&text)).unwrap_or_default()),
    };
    let dns = read("/etc/resolv.conf")?;
    let stub = dns.servers.iter().any(|server| server == "127.0.0.53");
    if stub && !host_network {
        let behind = read("/run/systemd/resolve/resolv.conf")?;
        if !behind.is_unset() {
            return Ok(behind);
        }
    }
    Ok(dns)
}
