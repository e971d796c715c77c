//! Parses and completes image names in the same way as docker and containerd.

use std::{
    fmt, io,
    net::IpAddr,
    os::fd::{AsRawFd as _, OwnedFd},
    path::PathBuf,
};

use oci_spec::distribution::{ParseError, Reference as Parsed};

use crate::{file_id::FileId, ids::Digest};

/// The format of an image in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ArchiveFormat {
    /// A directory in OCI's image layout.
    OciDir,
    /// A tar file of a directory in OCI's image layout.
    OciArchive,
    /// A tar file as `docker save` writes it.
    DockerArchive,
}

/// The location of an image in files.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Archive {
    /// The format of the files.
    pub format: ArchiveFormat,
    /// The directory or tar file.
    pub path: PathBuf,
    /// The name of the image, which is required where the files contain several images.
    pub tag: Option<String>,
}

impl Archive {
    /// Returns the identity of the tar file or of the layout's `index.json`. A caller that has already checked and
    /// opened the path passes the descriptor as `opened`, which is then used instead of the path.
    ///
    /// # Errors
    /// Fails when the file does not exist or can't be examined.
    pub fn file_id(&self, opened: Option<&OwnedFd>) -> io::Result<FileId> {
        let path = self.path_to_open(opened);
        let path = if self.format == ArchiveFormat::OciDir { path.join("index.json") } else { path };
        Ok(FileId::of(&std::fs::metadata(path)?))
    }

    /// Returns the path by which the files are opened: that of the descriptor, if there is one.
    pub(super) fn path_to_open(&self, opened: Option<&OwnedFd>) -> PathBuf {
        opened.map_or_else(|| self.path.clone(), |fd| PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())))
    }
}

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
pub enum Reference {
    /// The image is in a registry.
    Registry(RegistryImage),
    /// The image is in files on this host.
    Archive(Archive),
}

/// The completed name of an image in a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RegistryImage(Parsed);

/// The prefixes of names of images in files.
const ARCHIVE_PREFIXES: [(&str, ArchiveFormat); 3] = [
    ("oci-archive:", ArchiveFormat::OciArchive),
    ("docker-archive:", ArchiveFormat::DockerArchive),
    ("oci:", ArchiveFormat::OciDir),
];

impl Reference {
    /// Compiles the regular expression that `parse` uses. Otherwise the first call of `parse` would compile it, which
    /// takes 40 ms in a debug build and delays the first task's start.
    pub fn precompile_pattern() {
        let _ = Parsed::try_from("prepare");
    }

    /// Parses a name. A short name is completed with Docker Hub, `library/` and `latest`. The prefix `https://`, which
    /// Nomad's docker driver accepts, is removed. `oci:DIR`, `oci-archive:FILE` and `docker-archive:FILE` are images in
    /// files; `:NAME` after the path selects one of several images.
    ///
    /// # Errors
    /// Fails when the text is not an image reference.
    pub fn parse(image: &str) -> Result<Self, ReferenceError> {
        if let Some(archive) = parse_archive(image) {
            return Ok(Self::Archive(archive));
        }
        let bare = image.strip_prefix("https://").unwrap_or(image);
        let refused = |source| ReferenceError { image: image.to_owned(), source };
        let parsed = Parsed::try_from(bare).map_err(refused)?;
        if let Some(digest) = parsed.digest() {
            Digest::new(digest).map_err(|_| refused(ParseError::DigestUnsupported))?;
        }
        // Some parsers take `A` in `A/b` for a host, others for a part of the repository, and the completed name would
        // not be parsed again in the same way.
        if parsed.repository().bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(refused(ParseError::NameContainsUppercase));
        }
        Ok(Self::Registry(RegistryImage(parsed)))
    }

    /// Returns the location of the files, if the image is in files.
    pub fn archive(&self) -> Option<&Archive> {
        match self {
            Self::Archive(archive) => Some(archive),
            Self::Registry(_) => None,
        }
    }
}

/// Parses the name of an image in files; `None` for an image in a registry. `oci:5000/app` is an image of a registry on
/// the host `oci`; everything else after one of the prefixes is a path.
fn parse_archive(image: &str) -> Option<Archive> {
    let (prefix, format) = ARCHIVE_PREFIXES.iter().find(|(prefix, _)| image.starts_with(prefix))?;
    let rest = &image[prefix.len()..];
    let port =
        rest.split_once('/').is_some_and(|(port, _)| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()));
    if rest.is_empty() || (port && *format == ArchiveFormat::OciDir) {
        return None;
    }
    // As in skopeo, the path can't contain a colon, but the image's name after it can.
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag.to_owned()).filter(|tag| !tag.is_empty())),
        None => (rest, None),
    };
    Some(Archive { format: *format, path: path.into(), tag })
}

impl RegistryImage {
    /// Returns the registry's host and port as the user wrote them, `docker.io` for Docker Hub.
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// Returns the host and port of the registry's API.
    pub fn api_host(&self) -> &str {
        match self.0.registry() {
            "docker.io" => "registry-1.docker.io",
            other => other,
        }
    }

    /// Returns the repository's path.
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// Returns the digest if the name has one, else the tag. The registry's API uses it to name a manifest.
    pub fn tag_or_digest(&self) -> &str {
        self.0.digest().or(self.0.tag()).unwrap_or("latest")
    }

    /// Returns the digest, if the name has one.
    pub fn digest(&self) -> Option<Digest> {
        self.0.digest().and_then(|digest| Digest::new(digest).ok())
    }

    /// Returns whether the registry is on this host. Only then may it be used without TLS.
    pub fn is_loopback(&self) -> bool {
        let host = self.registry();
        is_loopback(host.rsplit_once(':').map_or(host, |(host, _)| host))
    }
}

/// Returns whether a URL's host is a loopback name or address. The name is compared as text and never resolved.
pub(super) fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(name) => name.0.fmt(f),
            Self::Archive(archive) => {
                let prefix = ARCHIVE_PREFIXES
                    .iter()
                    .find(|(_, format)| *format == archive.format)
                    .map_or("", |(prefix, _)| prefix);
                write!(f, "{prefix}{}", archive.path.display())?;
                archive.tag.iter().try_for_each(|tag| write!(f, ":{tag}"))
            }
        }
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
        let Ok(Reference::Registry(by_digest)) = Reference::parse(&format!("app@{digest}")) else { panic!("a name") };
        assert_eq!(by_digest.tag_or_digest(), digest);
    }

    #[test]
    fn only_registries_on_this_host_may_be_used_without_tls() {
        for (image, loopback) in [
            ("localhost:5000/a", true),
            ("127.0.0.9/a", true),
            ("registry.example/a", false),
            ("localhost.example:5000/a", false),
        ] {
            let Ok(Reference::Registry(name)) = Reference::parse(image) else { panic!("a name") };
            assert_eq!(name.is_loopback(), loopback, "{image}");
        }
    }

    #[test]
    fn images_in_files_are_recognized() {
        for (image, path, tag) in [
            ("oci:/images/app", "/images/app", None),
            ("oci:/images/app:1.2", "/images/app", Some("1.2")),
            ("oci-archive:local/app.tar", "local/app.tar", None),
            ("docker-archive:/a/b.tar:app:1", "/a/b.tar", Some("app:1")),
            ("docker-archive:/a/b.tar:team/app:1", "/a/b.tar", Some("team/app:1")),
            ("docker-archive:b.tar", "b.tar", None),
        ] {
            let reference = Reference::parse(image).expect("a reference");
            let archive = reference.archive().unwrap_or_else(|| panic!("{image}"));
            assert_eq!((archive.path.to_str(), archive.tag.as_deref()), (Some(path), tag), "{image}");
            assert_eq!(reference.to_string(), image);
        }
        assert!(Reference::parse("oci:5000/app").expect("a host").archive().is_none());
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
