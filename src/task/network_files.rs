//! A task's network files: `/etc/hosts` and `/etc/resolv.conf`.

use std::{fs, path::Path};

use super::StartRequest;
use crate::{
    files::none_if_missing,
    ids::Flavor,
    rootfs::{
        NetworkNamespace, RootfsError, gateway,
        network::{self, Dns, ExtraHost, HOSTS, HostAddress},
    },
};

const HOSTS_FILE: &str = "/etc/hosts";

/// The content of a task's network files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NetworkFiles {
    pub(super) hosts: HostsFile,
    /// The text of `/etc/resolv.conf`. `None` keeps the image's own file.
    pub(super) resolv_conf: Option<String>,
}

/// The task's `/etc/hosts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HostsFile {
    /// The host's file, read-only.
    Host,
    /// A file of the task's own, with this text.
    Text(String),
}

impl NetworkFiles {
    /// Builds the files from the options of the job and its group.
    ///
    /// # Errors
    /// When `host-gateway` has no address, or a file of the host can't be read.
    pub(super) fn of(request: &StartRequest, network: &NetworkNamespace, flavor: Flavor) -> Result<Self, RootfsError> {
        let options = &request.options;
        let mut extra = Vec::new();
        for host in &options.extra_hosts {
            match address(host, network) {
                Ok(found) => extra.push(found),
                // nomad-driver-containerd wrote a line without effect.
                Err(error) if flavor == Flavor::ContainerdDriver => {
                    tracing::warn!(
                        task = %request.task_id,
                        error = %crate::error_chain(&error),
                        "left out an entry of extra_hosts that has no address"
                    );
                }
                Err(error) => return Err(error),
            }
        }
        let extra = || extra.iter().map(|(address, name)| (address.as_str(), *name));
        let own = request.group_host.as_ref().map(|(address, name)| (address.as_str(), name.as_str()));
        let hosts = match (options.host_network, options.extra_hosts.is_empty()) {
            (true, true) => HostsFile::Host,
            (true, false) => HostsFile::Text(network::hosts(&read(Path::new(HOSTS_FILE))?, extra())),
            (false, _) => HostsFile::Text(network::hosts(HOSTS, own.into_iter().chain(extra()))),
        };
        // nomad-driver-containerd gave tasks with the host's network the host's name servers, whatever `host_dns` said.
        let host_dns = options.host_dns || (options.host_network && flavor == Flavor::ContainerdDriver);
        let writes_resolv_conf = host_dns || !request.dns.is_unset();
        let resolv_conf = match writes_resolv_conf {
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
            gateway::host_address(network).map_err(|source| RootfsError::Gateway { name: host.name.clone(), source })?
        }
    };
    Ok((address.to_string(), &host.name))
}

fn read(path: &Path) -> Result<String, RootfsError> {
    fs::read_to_string(path).map_err(|source| RootfsError::File { doing: "read", path: path.to_owned(), source })
}

/// Returns the host's name servers. systemd-resolved's stub resolver listens on the host's loopback interface only, so
/// a task with a network of its own gets the servers that the stub forwards to.
fn system_dns(host_network: bool) -> Result<Dns, RootfsError> {
    // A host without the file has no name servers. If the file can't be read, there may be some, so that is an error.
    let read = |path: &str| match none_if_missing(fs::read_to_string(path)) {
        Ok(text) => Ok(text.map(|text| Dns::parse(&text)).unwrap_or_default()),
        Err(source) => Err(RootfsError::File { doing: "read", path: path.into(), source }),
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
