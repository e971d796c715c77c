//! A task's host name and its network files: `/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf`.

use std::{fs, path::Path};

use super::StartRequest;
use crate::{
    files::none_if_missing,
    ids::{ContainerId, Flavor},
    rootfs::{
        NetworkNamespace, RootfsError, group_network,
        limits::Namespace,
        network::{self, Dns, ExtraHost, HOSTS, HostAddress, OWN_NAME_ADDRESS},
    },
};

const HOSTS_FILE: &str = "/etc/hosts";

/// The host name of a task, and the content of its network files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NetworkFiles {
    /// The host name that the task sees, which `/etc/hostname` contains.
    pub(super) hostname: String,
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
    /// When `host-gateway` has no address, a file of the host can't be read, or the group's network namespace can't be
    /// entered.
    pub(super) fn of(
        request: &StartRequest,
        network: &NetworkNamespace,
        container: &ContainerId,
        flavor: Flavor,
    ) -> Result<Self, RootfsError> {
        let hostname = hostname(request, container)?;
        let hosts = hosts_file(request, network, &hostname, flavor)?;
        // nomad-driver-containerd gave tasks with the host's network the host's name servers, whatever `host_dns` said.
        let options = &request.options;
        let host_dns = options.host_dns || (options.host_network && flavor == Flavor::ContainerdDriver);
        let writes_resolv_conf = host_dns || !request.dns.is_unset();
        let resolv_conf = match writes_resolv_conf {
            true => Some(request.dns.render(&system_dns(options.host_network)?)),
            false => None,
        };
        Ok(Self { hostname, hosts, resolv_conf })
    }
}

/// Returns the job's host name. Without one, a task in the host's network or UTS namespace has the host's name, which
/// the host's own hosts file and name servers know; every other task has its container's id.
fn hostname(request: &StartRequest, container: &ContainerId) -> Result<String, RootfsError> {
    let options = &request.options;
    match &options.hostname {
        Some(name) => Ok(name.clone()),
        None if options.host_network || options.namespaces.uts == Namespace::Host => {
            let name = nix::unistd::gethostname().map_err(|errno| RootfsError::Hostname(errno.into()))?;
            Ok(name.to_string_lossy().into_owned())
        }
        None => Ok(container.as_str().to_owned()),
    }
}

/// Builds `/etc/hosts`: the lines for `localhost` (or, in the host's network, the host's own file), the group's name, the
/// job's `extra_hosts`, and the task's own name at all of its addresses.
fn hosts_file(
    request: &StartRequest,
    network: &NetworkNamespace,
    hostname: &str,
    flavor: Flavor,
) -> Result<HostsFile, RootfsError> {
    let options = &request.options;
    // nomad-driver-containerd mounted the host's own file, which follows the host's changes.
    if options.host_network && options.extra_hosts.is_empty() && flavor == Flavor::ContainerdDriver {
        return Ok(HostsFile::Host);
    }
    let base = if options.host_network { read(Path::new(HOSTS_FILE))? } else { HOSTS.to_owned() };
    let mut lines: Vec<(String, String)> = request.group_host.iter().cloned().collect();
    let is_known =
        network::names(&base).chain(lines.iter().map(|(_, name)| name.as_str())).any(|name| name == hostname);
    for host in &options.extra_hosts {
        match address(host, network) {
            Ok(found) => lines.push(found),
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
    // The own name follows the job's lines, as in docker: a job may give it another address, and the first line wins.
    // nomad-driver-containerd accepts any text as a host name.
    if !is_known && network::is_hosts_name(hostname) {
        lines.extend(own_addresses(network)?.into_iter().map(|address| (address, hostname.to_owned())));
    }
    let lines = lines.iter().map(|(address, name)| (address.as_str(), name.as_str()));
    Ok(HostsFile::Text(network::hosts(&base, lines)))
}

/// Returns the addresses at which a task's own name is found: those of its group's network. A task that has no address
/// of its own, or the host's addresses, has a loopback address instead.
fn own_addresses(network: &NetworkNamespace) -> Result<Vec<String>, RootfsError> {
    let found = match network {
        NetworkNamespace::Path(path) => group_network::addresses(path)
            .map_err(|source| RootfsError::Addresses { namespace: path.clone(), source })?,
        NetworkNamespace::Private | NetworkNamespace::Host => Vec::new(),
    };
    if found.is_empty() {
        return Ok(vec![OWN_NAME_ADDRESS.to_string()]);
    }
    Ok(found.iter().map(ToString::to_string).collect())
}

/// Returns the line of `extra_hosts` as an address and a name. Looks up the address of `host-gateway`.
fn address(host: &ExtraHost, network: &NetworkNamespace) -> Result<(String, String), RootfsError> {
    let address = match host.address {
        HostAddress::At(address) => address,
        HostAddress::Gateway => {
            let found = group_network::host_address(network);
            found.map_err(|source| RootfsError::Gateway { name: host.name.clone(), source })?
        }
    };
    Ok((address.to_string(), host.name.clone()))
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
    let has_stub = dns.servers.iter().any(|server| server == "127.0.0.53");
    if has_stub && !host_network {
        let upstream = read("/run/systemd/resolve/resolv.conf")?;
        if !upstream.is_unset() {
            return Ok(upstream);
        }
    }
    Ok(dns)
}
