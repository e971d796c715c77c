//! Parses indexes, manifests and configurations, and checks everything in them that is used.

use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os};

use super::{ImageError, Reference};
use crate::{ids::Digest, pb::types};

/// A layer as its manifest describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layer {
    /// The digest of the compressed bytes.
    pub digest: Digest,
    /// The number of compressed bytes.
    pub size: u64,
    /// The media type, which states the compression.
    pub media_type: String,
}

impl Layer {
    /// Returns the layer's descriptor for containerd.
    pub(crate) fn descriptor(&self) -> types::Descriptor {
        types::Descriptor {
            media_type: self.media_type.clone(),
            digest: self.digest.to_string(),
            size: i64::try_from(self.size).unwrap_or(i64::MAX),
            ..Default::default()
        }
    }
}

/// A manifest whose digests are well-formed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// The configuration's digest.
    pub config: Digest,
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
}

/// A parsed index or manifest.
#[derive(Debug)]
pub(crate) enum Document {
    /// An index. The digest is that of its manifest for this host's platform.
    Index(Digest),
    /// A manifest.
    Manifest(Manifest),
}

/// The media types of layers that can be unpacked. All others (foreign layers, encrypted layers, artifacts) are
/// refused.
const LAYER_TYPES: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// The largest number of layers of an image. docker has the same limit; overlayfs allows 500 lower directories
/// (`OVL_MAX_STACK`).
pub(crate) const LAYERS_MAX: usize = 127;

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

fn parse_json(image: &Reference, bytes: &[u8]) -> Result<serde_json::Value, ImageError> {
    serde_json::from_slice(bytes).map_err(|error| ImageError::Malformed {
        image: image.to_string(),
        what: "manifest",
        digest: Digest::of(bytes),
        problem: format!("not JSON: {error}"),
    })
}

/// Returns a document's media type: the one that the document states, else the one that the registry stated, else the
/// one that follows from the document's fields.
///
/// # Errors
/// Fails when the document is not JSON, or could be read both as an index and as a manifest (CVE-2021-41190: one digest
/// must not mean two images).
pub(crate) fn media_type_of(image: &Reference, media_type: &str, bytes: &[u8]) -> Result<String, ImageError> {
    let value = parse_json(image, bytes)?;
    let (manifests, layers) = (value.get("manifests").is_some(), value.get("layers").is_some());
    if manifests && (layers || value.get("config").is_some()) {
        return Err(ImageError::Malformed {
            image: image.to_string(),
            what: "manifest",
            digest: Digest::of(bytes),
            problem: "both an index and a manifest".to_owned(),
        });
    }
    let declared = value.get("mediaType").and_then(serde_json::Value::as_str).unwrap_or_default();
    let known = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST];
    let stated = [declared, media_type].into_iter().find(|kind| known.contains(kind));
    Ok(stated.unwrap_or(if manifests { OCI_INDEX } else { OCI_MANIFEST }).to_owned())
}

/// Parses an index or manifest. `media_type` is the type that the registry stated, empty if it stated none.
///
/// # Errors
/// Fails when the document is malformed, or an index has no manifest for this host.
pub(crate) fn parse(image: &Reference, media_type: &str, bytes: &[u8]) -> Result<Document, ImageError> {
    let digest = Digest::of(bytes);
    let malformed = |what: &'static str, problem: String| ImageError::Malformed {
        image: image.to_string(),
        what,
        digest: digest.clone(),
        problem,
    };
    let value = parse_json(image, bytes)?;
    if value.get("schemaVersion").and_then(serde_json::Value::as_u64) == Some(1) {
        return Err(malformed("manifest", "schema version 1, which is obsolete; rebuild the image".to_owned()));
    }
    let kind = media_type_of(image, media_type, bytes)?;
    let is_index = kind == OCI_INDEX || kind == DOCKER_LIST;
    if is_index {
        let index: ImageIndex = serde_json::from_value(value).map_err(|error| malformed("index", error.to_string()))?;
        let chosen = choose_manifest(image, &index)?;
        let chosen = Digest::new(chosen.digest().as_ref()).map_err(|error| malformed("index", error.to_string()))?;
        return Ok(Document::Index(chosen));
    }
    let manifest: ImageManifest =
        serde_json::from_value(value).map_err(|error| malformed("manifest", error.to_string()))?;
    let config = manifest.config();
    match config.media_type() {
        MediaType::ImageConfig => {}
        MediaType::Other(other) if other == "application/vnd.docker.container.image.v1+json" => {}
        other => return Err(malformed("manifest", format!("not a container image: its config is of type {other}"))),
    }
    let digest_of = |descriptor: &Descriptor| {
        Digest::new(descriptor.digest().as_ref()).map_err(|error| malformed("manifest", error.to_string()))
    };
    let layers = manifest
        .layers()
        .iter()
        .map(|layer| {
            let media_type = layer.media_type().to_string();
            if !LAYER_TYPES.contains(&media_type.as_str()) {
                return Err(malformed(
                    "manifest",
                    format!("layer {} has the unsupported type {media_type}", layer.digest()),
                ));
            }
            Ok(Layer { digest: digest_of(layer)?, size: layer.size(), media_type })
        })
        .collect::<Result<Vec<_>, _>>()?;
    if layers.len() > LAYERS_MAX {
        return Err(malformed(
            "manifest",
            format!("it has {} layers; an image has at most {LAYERS_MAX}", layers.len()),
        ));
    }
    Ok(Document::Manifest(Manifest { config: digest_of(config)?, layers }))
}

/// Parses a configuration, and returns it with the uncompressed digests of its layers.
///
/// # Errors
/// Fails when the configuration is malformed, or has another number of layers than the manifest.
pub(crate) fn parse_config(
    image: &Reference,
    manifest: &Manifest,
    bytes: &[u8],
) -> Result<(ImageConfiguration, Vec<Digest>), ImageError> {
    let malformed = |problem: String| ImageError::Malformed {
        image: image.to_string(),
        what: "config",
        digest: manifest.config.clone(),
        problem,
    };
    let config: ImageConfiguration = serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
    let diff_ids = config
        .rootfs()
        .diff_ids()
        .iter()
        .map(|diff| Digest::new(diff).map_err(|error| malformed(error.to_string())))
        .collect::<Result<Vec<_>, _>>()?;
    if diff_ids.len() != manifest.layers.len() {
        return Err(malformed(format!("it has {} diff_ids for {} layers", diff_ids.len(), manifest.layers.len())));
    }
    Ok((config, diff_ids))
}

/// Returns the manifest of an index that fits this host best.
fn choose_manifest<'a>(image: &Reference, index: &'a ImageIndex) -> Result<&'a Descriptor, ImageError> {
    let wanted = host_arch();
    let fits = |descriptor: &&Descriptor| {
        descriptor
            .platform()
            .as_ref()
            .is_none_or(|platform| *platform.os() == Os::Linux && *platform.architecture() == wanted)
    };
    // Manifests without a variant come first, because amd64's variants (v2, v3) may not run on this host. arm64 has the
    // variant "v8" where it has one at all. A manifest without a platform may be for any platform, and comes last.
    let rank = |descriptor: &&Descriptor| {
        descriptor.platform().as_ref().map_or(3, |platform| match platform.variant().as_deref() {
            None => 0,
            Some("v8") => 1,
            Some(_) => 2,
        })
    };
    index.manifests().iter().filter(fits).min_by_key(rank).ok_or_else(|| {
        let mut offered: Vec<String> = index
            .manifests()
            .iter()
            .filter_map(|descriptor| descriptor.platform().as_ref())
            .map(|platform| format!("{}/{}", platform.os(), platform.architecture()))
            .collect();
        offered.dedup();
        ImageError::Platform {
            image: image.to_string(),
            wanted: format!("linux/{wanted}"),
            offered: if offered.is_empty() { "none".to_owned() } else { offered.join(", ") },
        }
    })
}

/// Returns this host's architecture by the image specification's names, which are Go's.
pub(crate) fn host_arch() -> Arch {
    match std::env::consts::ARCH {
        "x86_64" => Arch::Amd64,
        "aarch64" => Arch::ARM64,
        other => Arch::from(other),
    }
}

/// Checks that a blob has the digest by which it was requested.
pub(super) fn check_digest(
    reference: &Reference,
    what: &'static str,
    expected: &Digest,
    actual: &Digest,
) -> Result<(), ImageError> {
    if expected == actual {
        return Ok(());
    }
    Err(ImageError::WrongDigest {
        image: reference.to_string(),
        what,
        expected: expected.clone(),
        actual: actual.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reference() -> Reference {
        Reference::parse("registry.example/app:1").expect("a reference")
    }

    fn manifest(layer_type: &str) -> String {
        let digest = format!("sha256:{}", "a".repeat(64));
        format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{digest}","size":1}},
               "layers":[{{"mediaType":"{layer_type}","digest":"{digest}","size":7}}]}}"#
        )
    }

    #[test]
    fn a_manifest_is_read_and_unsupported_layers_are_named() {
        let good = manifest("application/vnd.oci.image.layer.v1.tar+zstd");
        assert!(matches!(parse(&reference(), "", good.as_bytes()), Ok(Document::Manifest(m)) if m.layers[0].size == 7));
        let foreign = manifest("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip");
        let error = parse(&reference(), "", foreign.as_bytes()).expect_err("refused").to_string();
        assert!(error.contains("foreign.diff"), "{error}");
    }

    #[test]
    fn the_error_names_the_platforms_of_an_index() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":1,
                "platform":{{"os":"linux","architecture":"s390x"}}}}]}}"#
        );
        let error = parse(&reference(), "", index.as_bytes()).expect_err("refused").to_string();
        assert!(error.contains("linux/s390x"), "{error}");
    }

    proptest! {
        #[test]
        fn no_document_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&reference(), "", &bytes);
        }
    }
}
