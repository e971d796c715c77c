//! User names and passwords for registries, and the rules about which registry may see them. docs/decisions/014
//! explains the rules.

use std::{fmt, str::FromStr};

use super::RegistryImage;

/// The host of Docker Hub in image names.
const DOCKER_HUB: &str = "docker.io";
/// Docker Hub's other names (moby, daemon/pkg/registry/config.go: `IndexHostname`, `DefaultRegistryHost`).
const DOCKER_HUB_ALIASES: [&str; 2] = ["index.docker.io", "registry-1.docker.io"];

/// A user name and a password for a registry. Neither is ever printed.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// The user name.
    pub username: String,
    /// The password or token.
    pub password: String,
    /// The registry that may see the credentials.
    pub scope: CredentialScope,
}

/// The registry that credentials may be sent to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CredentialScope {
    /// Only the registry with this address.
    Registry(RegistryAddress),
    /// The registry of the image that is pulled. This is the scope of a job's own credentials, because the job's author
    /// chooses the image as well.
    ImageRegistry,
}

/// The transport of requests to a registry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Transport {
    /// HTTPS.
    #[default]
    Tls,
    /// Plain HTTP, only for registries on this host.
    Plain,
}

impl Transport {
    /// Returns the scheme of URLs with this transport.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::Tls => "https",
            Self::Plain => "http",
        }
    }

    fn default_port(self) -> u16 {
        match self {
            Self::Tls => 443,
            Self::Plain => 80,
        }
    }
}

impl Credentials {
    /// Returns whether the credentials may be sent to the registry of `image_name` over `transport`.
    pub fn may_be_sent_to(&self, image_name: &RegistryImage, transport: Transport) -> bool {
        match &self.scope {
            CredentialScope::ImageRegistry => true,
            CredentialScope::Registry(address) => {
                image_name.registry().parse().is_ok_and(|asked| address.is_same_registry(&asked, transport))
            }
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("scope", &self.scope).finish_non_exhaustive()
    }
}

/// A registry's host and port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RegistryAddress {
    /// In lower case, and without Docker Hub's aliases.
    host: String,
    /// The port; `None` stands for the transport's default.
    port: Option<u16>,
}

/// Why a text is not the address of a registry.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AddressError {
    /// The text has a user name before the host, and perhaps a password. Therefore the message does not contain the
    /// text.
    #[error("a registry's address must not contain a user name; write the host alone, such as registry.example:5000")]
    UserInfo,
    /// The text is malformed in another way.
    #[error("{text:?} is not a registry's address such as registry.example or registry.example:5000")]
    Malformed {
        /// The text.
        text: String,
    },
}

impl RegistryAddress {
    /// Returns the address of Docker Hub.
    pub fn docker_hub() -> Self {
        Self { host: DOCKER_HUB.to_owned(), port: None }
    }

    /// Returns whether both addresses mean the same registry. An address without a port has the transport's default
    /// port.
    fn is_same_registry(&self, other: &Self, transport: Transport) -> bool {
        let port = |address: &Self| address.port.unwrap_or(transport.default_port());
        self.host == other.host && port(self) == port(other)
    }
}

impl FromStr for RegistryAddress {
    type Err = AddressError;

    /// Parses an address. As in docker's `server_address`, a scheme before the host and a path after it are ignored
    /// (moby, daemon/pkg/registry/auth.go, `ConvertToHostname`). Unlike docker, this function refuses a text that can't
    /// be a host: such credentials would silently not be sent, or be sent to another host than their author means.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        if text.contains('@') {
            return Err(AddressError::UserInfo);
        }
        let malformed = || AddressError::Malformed { text: text.to_owned() };
        let lower = text.trim().to_ascii_lowercase();
        let bare = ["https://", "http://"].iter().find_map(|scheme| lower.strip_prefix(scheme)).unwrap_or(&lower);
        let authority = bare.split('/').next().unwrap_or(bare);
        let (host, port) = match authority.split_once(':') {
            Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
                (host, Some(port.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(malformed)?))
            }
            Some(_) => return Err(malformed()),
            None => (authority, None),
        };
        if !host.split('.').all(is_host_label) {
            return Err(malformed());
        }
        let is_hub = port.is_none_or(|port| port == Transport::Tls.default_port())
            && (host == DOCKER_HUB || DOCKER_HUB_ALIASES.contains(&host));
        Ok(if is_hub { Self::docker_hub() } else { Self { host: host.to_owned(), port } })
    }
}

/// Returns whether the text is a component of a host's name in an image's name, in lower case (distribution,
/// reference/regexp.go, `domain-component`).
fn is_host_label(label: &str) -> bool {
    !label.is_empty()
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

impl fmt::Display for RegistryAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.host)?;
        self.port.iter().try_for_each(|port| write!(f, ":{port}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::image::Reference;

    fn for_server(server: &str) -> Credentials {
        let scope = CredentialScope::Registry(server.parse().unwrap_or_else(|error| panic!("{server}: {error}")));
        Credentials { username: "u".into(), password: "hidden".into(), scope }
    }

    fn place(image: &str) -> RegistryImage {
        match Reference::parse(image) {
            Ok(Reference::Registry(name)) => name,
            other => panic!("{image}: {other:?}"),
        }
    }

    #[test]
    fn credentials_are_for_one_host_and_port() {
        for (server, image, same) in [
            ("registry.example", "registry.example/a", true),
            ("registry.example", "registry.example:443/a", true),
            ("registry.example:443", "registry.example/a", true),
            ("registry.example:5000", "registry.example:5000/a", true),
            ("Registry.Example", "registry.EXAMPLE/a", true),
            ("https://registry.example/", "registry.example/a", true),
            ("http://registry.example:5000/v2/team", "registry.example:5000/a", true),
            ("registry.example", "registry.example:5000/a", false),
            ("registry.example:5000", "registry.example/a", false),
            ("registry.example:5000", "registry.example:5001/a", false),
            ("registry.example", "registry.example.evil/a", false),
            ("registry.example", "evil-registry.example/a", false),
            ("registry.example", "sub.registry.example/a", false),
            ("registry.example", "evil.example/registry.example/a", false),
            ("registry.example:80", "registry.example/a", false),
            ("registry.example", "a", false),
        ] {
            assert_eq!(for_server(server).may_be_sent_to(&place(image), Transport::Tls), same, "{server} {image}");
        }
    }

    #[test]
    fn docker_hub_has_three_names() {
        for server in ["docker.io", "index.docker.io", "registry-1.docker.io", "https://index.docker.io/v1/"] {
            for image in ["redis:7", "team/app", "docker.io/a/b", "index.docker.io/a/b", "registry-1.docker.io/a/b"] {
                assert!(for_server(server).may_be_sent_to(&place(image), Transport::Tls), "{server} {image}");
            }
            for image in ["docker.io:5000/a/b", "docker.io.evil.example/a/b", "auth.docker.io/a", "localhost/a"] {
                assert!(!for_server(server).may_be_sent_to(&place(image), Transport::Tls), "{server} {image}");
            }
        }
    }

    /// An address with port 443 and one without a port are the same over TLS, and different over plain HTTP.
    #[test]
    fn an_address_without_a_port_has_the_transports_port() {
        assert!(for_server("127.0.0.1:443").may_be_sent_to(&place("127.0.0.1/a"), Transport::Tls));
        assert!(!for_server("127.0.0.1:443").may_be_sent_to(&place("127.0.0.1/a"), Transport::Plain));
        assert!(for_server("127.0.0.1:80").may_be_sent_to(&place("127.0.0.1/a"), Transport::Plain));
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "https://", ":5000", "a:b", "a:0", "a:65536", "a:", "a.", ".a", "-a", "a b", "a\\b", "a?b"] {
            assert!(matches!(text.parse::<RegistryAddress>(), Err(AddressError::Malformed { .. })), "{text}");
        }
        for text in ["ftp://registry.example", "registry_1:5000", "a:5000:5000", "[::1]:5000", "registry%2eexample"] {
            assert!(matches!(text.parse::<RegistryAddress>(), Err(AddressError::Malformed { .. })), "{text}");
        }
        for text in ["user:hidden@registry.example", "https://user:hi/dden@registry.example", "registry.example@evil"] {
            let error = text.parse::<RegistryAddress>().expect_err(text);
            assert_eq!(error, AddressError::UserInfo);
            assert!(!error.to_string().contains("dden"), "{error}");
        }
    }

    #[test]
    fn credentials_are_not_printed() {
        let printed = format!("{:?}", for_server("registry.example"));
        assert!(!printed.contains("hidden") && !printed.contains("\"u\""), "{printed}");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            if let Ok(address) = text.parse::<RegistryAddress>() {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }
}
