//! Linux capabilities by name (capabilities(7)): the defaults, those that a job adds and drops, and those that an
//! operator allows.

use std::{collections::BTreeSet, str::FromStr as _};

use caps::Capability;
use oci_spec::runtime::Capability as OciCapability;

use crate::ids::Flavor;

/// A text is not the name of a capability.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a capability such as NET_ADMIN, nor ALL")]
pub struct CapabilityError(String);

/// A set of capabilities, in the kernel's order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Capabilities(BTreeSet<u8>);

/// One entry of `cap_add` or `cap_drop`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CapabilityRequest {
    /// All capabilities.
    All,
    /// A single capability.
    One(Capability),
}

/// Parses `NET_ADMIN`, `CAP_NET_ADMIN`, `net_admin` or `ALL`.
///
/// # Errors
/// Fails when the name is unknown.
pub fn parse_capability(name: &str) -> Result<CapabilityRequest, CapabilityError> {
    let upper = name.trim().to_ascii_uppercase();
    if upper == "ALL" || upper == "CAP_ALL" {
        return Ok(CapabilityRequest::All);
    }
    let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
    Capability::from_str(&full).map(CapabilityRequest::One).map_err(|_| CapabilityError(name.to_owned()))
}

/// Docker's default capabilities without `NET_RAW`, which allows ARP spoofing on a shared bridge.
const STRICT_DEFAULTS: [Capability; 13] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FSETID,
    Capability::CAP_FOWNER,
    Capability::CAP_MKNOD,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETPCAP,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_SYS_CHROOT,
    Capability::CAP_KILL,
    Capability::CAP_AUDIT_WRITE,
];

/// Returns the capabilities that a job may add with `Flavor::Strict` if the operator sets nothing: none beyond the
/// defaults, as in Nomad's docker driver.
pub fn default_allowed() -> Capabilities {
    Capabilities::of(STRICT_DEFAULTS)
}

impl Capabilities {
    /// Returns a set of these capabilities.
    pub fn of(list: impl IntoIterator<Item = Capability>) -> Self {
        Self(list.into_iter().map(|capability| capability.index()).collect())
    }

    /// Parses a configuration's list of names.
    ///
    /// # Errors
    /// Fails when a name is unknown.
    pub fn parse(names: &[String]) -> Result<Self, CapabilityError> {
        let mut set = Self::default();
        for name in names {
            match parse_capability(name)? {
                CapabilityRequest::All => set = Self::of(caps::all()),
                CapabilityRequest::One(one) => {
                    set.0.insert(one.index());
                }
            }
        }
        Ok(set)
    }

    /// Returns a container's default capabilities.
    pub fn defaults(flavor: Flavor) -> Self {
        let mut set = Self::of(STRICT_DEFAULTS);
        if flavor == Flavor::ContainerdDriver {
            set.0.insert(Capability::CAP_NET_RAW.index());
        }
        set
    }

    /// Returns this process's bounding set: a runtime can't give a container what its caller's bounding set lacks.
    pub fn bounding_set() -> Self {
        caps::read(None, caps::CapSet::Bounding).map_or_else(|_| Self::default(), Self::of)
    }

    /// Returns whether the set contains a capability, given by the kernel's name, such as `CAP_SYS_ADMIN`.
    pub fn has(&self, name: &str) -> bool {
        Capability::from_str(name).is_ok_and(|capability| self.0.contains(&capability.index()))
    }

    /// Adds capabilities and then drops others, by docker's rules: `ALL` in `drop` empties the set before any is added.
    #[must_use]
    pub fn adjusted(mut self, add: &[CapabilityRequest], drop: &[CapabilityRequest]) -> Self {
        if drop.contains(&CapabilityRequest::All) {
            self.0.clear();
        }
        for request in add {
            match request {
                CapabilityRequest::All => self.0.extend(caps::all().iter().map(Capability::index)),
                CapabilityRequest::One(one) => {
                    self.0.insert(one.index());
                }
            }
        }
        for request in drop {
            if let CapabilityRequest::One(one) = request {
                self.0.remove(&one.index());
            }
        }
        self
    }

    /// Returns the capabilities that are also in `limit`.
    #[must_use]
    pub fn within(self, limit: &Self) -> Self {
        Self(self.0.intersection(&limit.0).copied().collect())
    }

    /// Returns the name of the first of `requests` that is not in the set.
    pub fn first_missing(&self, requests: &[CapabilityRequest]) -> Option<String> {
        requests.iter().find_map(|request| match request {
            CapabilityRequest::All => {
                (!caps::all().iter().all(|one| self.0.contains(&one.index()))).then(|| "ALL".into())
            }
            CapabilityRequest::One(one) => (!self.0.contains(&one.index())).then(|| one.to_string()),
        })
    }

    /// Returns the set in the form of the OCI spec.
    pub fn to_oci(&self) -> oci_spec::runtime::Capabilities {
        caps::all()
            .into_iter()
            .filter(|capability| self.0.contains(&capability.index()))
            .filter_map(|capability| OciCapability::from_str(capability.to_string().trim_start_matches("CAP_")).ok())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(names: &[&str]) -> Vec<CapabilityRequest> {
        names.iter().map(|name| parse_capability(name).expect("known")).collect()
    }

    #[test]
    fn every_capability_of_the_kernel_has_an_oci_name() {
        let all = Capabilities::of(caps::all());
        assert_eq!(all.to_oci().len(), caps::all().len());
    }

    #[test]
    fn names_are_read_with_and_without_prefix_in_any_case() {
        assert_eq!(parse(&["NET_ADMIN", "CAP_NET_ADMIN", "net_admin"]), vec![parse(&["NET_ADMIN"])[0]; 3]);
        assert_eq!(parse_capability("CAP_FLY"), Err(CapabilityError("CAP_FLY".to_owned())));
    }

    #[test]
    fn dropping_all_leaves_what_is_added() {
        let set = Capabilities::defaults(Flavor::Strict).adjusted(&parse(&["net_raw"]), &parse(&["all"]));
        assert_eq!(set, Capabilities::of([Capability::CAP_NET_RAW]));
        let set = Capabilities::defaults(Flavor::Strict).adjusted(&parse(&["ALL"]), &parse(&["SYS_ADMIN"]));
        assert_eq!(set.0.len(), caps::all().len() - 1);
    }

    #[test]
    fn the_flavors_differ_in_raw_sockets() {
        assert_eq!(Capabilities::defaults(Flavor::ContainerdDriver).0.len(), 14);
        assert!(!Capabilities::defaults(Flavor::Strict).0.contains(&Capability::CAP_NET_RAW.index()));
    }
}
