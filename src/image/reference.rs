//! Image names, normalised the way docker and containerd do it.

use std::{fmt, net::IpAddr};

use oci_spec::distribution::{ParseError, Reference as Parsed};

use crate::ids::Digest;

/// Why an image name was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "image {image:?} is not an image reference such as redis:7, registry.example:5000/team/app:1 or app@sha256:..."
)]
pub struct ReferenceError {
    image: String,
    source: ParseError,
}

/// A checked and completed image name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference(Parsed);

impl Reference {
    /// Compiles the pattern behind `parse`, which the first use does otherwise: 40 ms in a debug build, and the first
    /// task's start would pay for it.
    pub fn prepare() {
        let _ = Parsed::try_from("prepare");
    }

    /// Reads a name; short ones are completed with Docker Hub, `library/` and `latest`. An `https://` in front, which
    /// docker's driver takes, is taken off.
    ///
    /// # Errors
    /// When it is no reference.
    pub fn parse(image: &str) -> Result<Self, ReferenceError> {
        let bare = image.strip_prefix("https://").unwrap_or(image);
        let refused = |source| ReferenceError { image: image.to_owned(), source };
        let parsed = Parsed::try_from(bare).map_err(refused)?;
        if let Some(digest) = parsed.digest() {
            Digest::new(digest).map_err(|_| refused(ParseError::DigestUnsupported))?;
        }
        Ok(Self(parsed))
    }

    /// The registry's host and port as the user wrote them, `docker.io` for Docker Hub.
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// Where that registry's API is.
    pub fn api_host(&self) -> &str {
        match self.0.registry() {
            "docker.io" => "registry-1.docker.io",
            other => other,
        }
    }

    /// The repository's path.
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// What to ask the registry for: the digest if there is one, else the tag.
    pub fn target(&self) -> &str {
        self.0.digest().or(self.0.tag()).unwrap_or("latest")
    }

    /// The digest, when the name has one.
    pub fn digest(&self) -> Option<Digest> {
        self.0.digest().and_then(|digest| Digest::new(digest).ok())
    }

    /// May this registry be spoken to without TLS? Only on this very host.
    pub fn is_loopback(&self) -> bool {
        let host = self.registry();
        let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn short_names_are_completed_as_docker_does() {
        for (short, whole) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("team/app:1", "docker.io/team/app:1"),
            ("https://redis:7", "docker.io/library/redis:7"),
            ("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest"),
            ("localhost/app", "localhost/app:latest"),
        ] {
            assert_eq!(Reference::parse(short).map(|r| r.to_string()), Ok(whole.to_owned()));
        }
        let digest = format!("sha256:{}", "0".repeat(64));
        let by_digest = Reference::parse(&format!("app@{digest}")).expect("a reference");
        assert_eq!(by_digest.target(), digest);
    }

    #[test]
    fn only_this_host_may_go_without_tls() {
        for (image, loopback) in [
            ("localhost:5000/a", true),
            ("127.0.0.9/a", true),
            ("registry.example/a", false),
            ("localhost.example:5000/a", false),
        ] {
            assert_eq!(Reference::parse(image).expect("a reference").is_loopback(), loopback, "{image}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in ".*") {
            if let Ok(reference) = Reference::parse(&text) {
                let again = Reference::parse(&reference.to_string());
                prop_assert_eq!(again, Ok(reference));
            }
        }
    }
}
