//! Images made in memory and pushed to a real registry, both valid and invalid ones.

use std::{io::Write as _, path::Path, sync::OnceLock};

use nomad_driver_shim::ids::Digest;
use serde_json::{Value, json};

/// One entry of a layer.
pub(crate) struct Entry {
    pub path: String,
    pub kind: tar::EntryType,
    pub link: String,
    pub content: Vec<u8>,
    pub mode: u32,
    /// The owner, user and group alike.
    pub owner: u32,
}

impl Entry {
    pub(crate) fn file(path: &str, content: impl Into<Vec<u8>>) -> Self {
        Self {
            path: path.into(),
            kind: tar::EntryType::Regular,
            link: String::new(),
            content: content.into(),
            mode: 0o755,
            owner: 0,
        }
    }
    pub(crate) fn dir(path: &str) -> Self {
        Self {
            path: path.into(),
            kind: tar::EntryType::Directory,
            link: String::new(),
            content: vec![],
            mode: 0o755,
            owner: 0,
        }
    }
    pub(crate) fn symlink(path: &str, target: &str) -> Self {
        Self {
            path: path.into(),
            kind: tar::EntryType::Symlink,
            link: target.into(),
            content: vec![],
            mode: 0o777,
            owner: 0,
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) enum Packing {
    Gzip,
    Zstd,
    None,
}

/// A packed layer.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub diff_id: Digest,
    pub bytes: Vec<u8>,
    pub media_type: &'static str,
}

impl Layer {
    pub(crate) fn new(entries: &[Entry], packing: Packing) -> Self {
        let mut builder = tar::Builder::new(Vec::new());
        for entry in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(entry.kind);
            header.set_size(entry.content.len() as u64);
            header.set_mode(entry.mode);
            header.set_uid(entry.owner.into());
            header.set_gid(entry.owner.into());
            header.set_mtime(1_700_000_000);
            // The raw bytes are set, since the crate's setters refuse the names that the driver must refuse.
            let old = header.as_old_mut();
            old.name[..entry.path.len()].copy_from_slice(entry.path.as_bytes());
            old.linkname[..entry.link.len()].copy_from_slice(entry.link.as_bytes());
            header.set_cksum();
            builder.append(&header, &entry.content[..]).unwrap();
        }
        let plain = builder.into_inner().unwrap();
        let diff_id = Digest::of(&plain);
        let (bytes, media_type) = match packing {
            Packing::None => (plain, "application/vnd.oci.image.layer.v1.tar"),
            Packing::Zstd => (zstd::encode_all(&plain[..], 1).unwrap(), "application/vnd.oci.image.layer.v1.tar+zstd"),
            Packing::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(&plain).unwrap();
                (encoder.finish().unwrap(), "application/vnd.oci.image.layer.v1.tar+gzip")
            }
        };
        Self { diff_id, bytes, media_type }
    }

    /// Returns a layer with a static busybox, all its applets, passwd and group.
    pub(crate) fn busybox() -> &'static Self {
        static LAYER: OnceLock<Layer> = OnceLock::new();
        LAYER.get_or_init(|| {
            let path = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
            let path = path.expect("busybox-static is installed by scripts/setup.sh");
            let mut entries: Vec<Entry> = ["bin", "etc", "tmp", "root", "proc", "sys", "dev"].map(Entry::dir).into();
            entries.push(Entry::file("bin/busybox", std::fs::read(path).unwrap()));
            let applets = super::services::run(std::process::Command::new(path).arg("--list"));
            for applet in applets.lines().filter(|applet| *applet != "busybox") {
                entries.push(Entry::symlink(&format!("bin/{applet}"), "busybox"));
            }
            entries.push(Entry::file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1001::/:/bin/sh\n"));
            entries.push(Entry::file("etc/group", "root:x:0:\nuser:x:1001:\nextra:x:2000:user\n"));
            entries.push(Entry { mode: 0o644, ..Entry::file("etc/not-executable", "text") });
            Self::new(&entries, Packing::Gzip)
        })
    }
}

/// An image.
#[derive(Clone)]
pub(crate) struct Image {
    pub layers: Vec<Layer>,
    pub config: Value,
}

impl Image {
    /// Returns an image of busybox with `sh` as its command.
    pub(crate) fn busybox() -> Self {
        Self {
            layers: vec![Layer::busybox().clone()],
            config: json!({"Cmd": ["/bin/sh"], "Env": ["PATH=/bin", "FROM_IMAGE=yes"]}),
        }
    }

    pub(crate) fn with_config(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    pub(crate) fn with_layer(mut self, layer: Layer) -> Self {
        self.layers.push(layer);
        self
    }

    pub(crate) fn with_file(self, path: &str, text: &str) -> Self {
        self.with_layer(Layer::new(&[Entry { mode: 0o644, ..Entry::file(path, text) }], Packing::None))
    }

    /// Returns the bytes of the image's configuration.
    pub(crate) fn config_bytes(&self) -> Vec<u8> {
        let diffs: Vec<_> = self.layers.iter().map(|layer| layer.diff_id.to_string()).collect();
        let arch = if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
        let config = json!({
            "architecture": arch, "os": "linux", "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": diffs}, "history": [],
        });
        serde_json::to_vec(&config).unwrap()
    }

    /// Returns the bytes of the image's manifest.
    pub(crate) fn manifest_bytes(&self) -> Vec<u8> {
        let config = self.config_bytes();
        let layers: Vec<_> = self.layers.iter().map(|layer| json!({
            "mediaType": layer.media_type, "digest": Digest::of(&layer.bytes).to_string(), "size": layer.bytes.len(),
        })).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(&config).to_string(), "size": config.len()},
            "layers": layers,
        });
        serde_json::to_vec(&manifest).unwrap()
    }

    /// Returns all blobs: configuration and layers.
    pub(crate) fn blobs(&self) -> Vec<Vec<u8>> {
        std::iter::once(self.config_bytes()).chain(self.layers.iter().map(|layer| layer.bytes.clone())).collect()
    }

    /// Pushes the image to a real registry. Returns the image's whole name.
    pub(crate) async fn push(&self, registry: &str, name: &str) -> String {
        let (repository, tag) = name.split_once(':').unwrap();
        let client = reqwest::Client::new();
        for blob in self.blobs() {
            push_blob(&client, registry, repository, blob).await;
        }
        push_manifest(
            &client,
            registry,
            repository,
            tag,
            "application/vnd.oci.image.manifest.v1+json",
            self.manifest_bytes(),
        )
        .await;
        format!("{registry}/{name}")
    }

    /// Pushes the image in an index that also has entries for other platforms. Returns the whole name and the index's
    /// digest.
    pub(crate) async fn push_index(&self, registry: &str, name: &str) -> (String, Digest) {
        let (repository, tag) = name.split_once(':').unwrap();
        let whole = self.push(registry, name).await;
        let manifest = self.manifest_bytes();
        let descriptor = |os: &str, arch: &str| {
            json!({
                "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": Digest::of(&manifest).to_string(),
                "size": manifest.len(), "platform": {"os": os, "architecture": arch},
            })
        };
        let arch = if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
        let index = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [descriptor("linux", "s390x"), descriptor("unknown", "unknown"), descriptor("linux", arch)],
        });
        let bytes = serde_json::to_vec(&index).unwrap();
        push_manifest(
            &reqwest::Client::new(),
            registry,
            repository,
            tag,
            "application/vnd.oci.image.index.v1+json",
            bytes.clone(),
        )
        .await;
        (whole, Digest::of(&bytes))
    }
}

async fn push_blob(client: &reqwest::Client, registry: &str, repository: &str, blob: Vec<u8>) {
    let digest = Digest::of(&blob);
    let address = format!("http://{registry}/v2/{repository}/blobs");
    if client.head(format!("{address}/{digest}")).send().await.unwrap().status().is_success() {
        return;
    }
    let begun = client.post(format!("{address}/uploads/")).send().await.unwrap();
    assert!(begun.status().is_success(), "{begun:?}");
    let location = begun.headers()["location"].to_str().unwrap().to_owned();
    let location = if location.starts_with('/') { format!("http://{registry}{location}") } else { location };
    let mut target = reqwest::Url::parse(&location).unwrap();
    target.query_pairs_mut().append_pair("digest", digest.as_str());
    let done = client.put(target).header("content-type", "application/octet-stream").body(blob).send().await.unwrap();
    assert!(done.status().is_success(), "{done:?}");
}

async fn push_manifest(
    client: &reqwest::Client,
    registry: &str,
    repository: &str,
    tag: &str,
    media_type: &str,
    bytes: Vec<u8>,
) {
    for name in [tag.to_owned(), Digest::of(&bytes).to_string()] {
        let address = format!("http://{registry}/v2/{repository}/manifests/{name}");
        let done = client.put(address).header("content-type", media_type).body(bytes.clone()).send().await.unwrap();
        assert!(done.status().is_success(), "{}", done.text().await.unwrap());
    }
}
