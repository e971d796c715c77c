//! One pull: from a registry into containerd's content store, everything checked on the way.

use std::{
    fmt,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{StreamExt as _, TryStreamExt as _, future::BoxFuture};

use super::{
    Credentials, ImageError, LayerProblem, Reference,
    layer::Scan,
    manifest::{self, Document, Layer, Manifest},
    origin::Origin,
    registry::HttpClients,
};
use crate::{
    containerd::{Client, ContainerdError, Labels, LeaseId},
    ids::Digest,
    pb::types::Descriptor,
};

/// Layers downloaded side by side; docker's and containerd's default too.
const PARALLEL: usize = 3;
/// A pull that was killed leaves its lease behind; containerd drops it after this.
const LEASE_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Configurations are kilobytes; this only ends nonsense.
pub(super) const CONFIG_MAX: usize = 8 << 20;

/// containerd's label on a layer: the digest of what it unpacks to.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// What a pull tells while it goes on.
#[derive(Debug, Clone)]
pub enum PullEvent {
    /// The name stands for this.
    Resolved(Digest),
    /// A layer has come so far.
    Layer {
        /// Which.
        digest: Digest,
        /// Bytes so far.
        done: u64,
        /// Bytes in all.
        size: u64,
    },
    /// Layers are being unpacked: so many of so many are done.
    Unpacked(usize, usize),
}

/// Where a pull tells it.
#[derive(Clone, Default)]
pub struct Progress(Option<Arc<dyn Fn(PullEvent) + Send + Sync>>);

impl Progress {
    /// To `listener`, which must not block.
    pub fn to(listener: impl Fn(PullEvent) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(listener)))
    }

    pub(super) fn tell(&self, event: PullEvent) {
        if let Some(listener) = &self.0 {
            listener(event);
        }
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Progress(listener)" } else { "Progress(none)" })
    }
}

/// An image whose blobs are all in the content store.
#[derive(Debug)]
pub struct Fetched {
    /// What the name stands for.
    pub target: Descriptor,
    /// The manifest for this host.
    pub manifest: Manifest,
    /// The configuration's bytes.
    pub config: Vec<u8>,
}

/// A lease for the time of a pull. Dropped without `end` (a pull given up), it is deleted in the background.
#[derive(Debug)]
pub struct PullLease {
    client: Client,
    id: Option<LeaseId>,
}

impl PullLease {
    /// Makes one called `lease`.
    ///
    /// # Errors
    /// As containerd.
    pub async fn begin(client: &Client, lease: LeaseId) -> Result<Self, ContainerdError> {
        let this = Self { client: client.clone(), id: Some(lease.clone()) };
        client.create_lease(&lease, Some(rfc3339(SystemTime::now() + LEASE_LIFE))).await?;
        Ok(this)
    }

    /// Its name.
    pub fn id(&self) -> &LeaseId {
        self.id.as_ref().expect("taken only by `end`, which consumes self, and by drop")
    }

    /// Deletes it; what an image holds by now stays.
    ///
    /// # Errors
    /// As containerd.
    pub async fn end(mut self) -> Result<(), ContainerdError> {
        match self.id.take() {
            Some(id) => self.client.delete_lease(&id).await,
            None => Ok(()),
        }
    }
}

impl Drop for PullLease {
    fn drop(&mut self) {
        let Some(id) = self.id.take() else { return };
        let client = self.client.clone();
        // Outside of a runtime there is nobody to do it; the lease's expiry does then.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = client.delete_lease(&id).await {
                    tracing::debug!(%error, "the lease of a pull that was given up is left to its expiry");
                }
            });
        }
    }
}

/// RFC 3339 in UTC with whole seconds, which is what containerd's labels want.
fn rfc3339(time: SystemTime) -> String {
    prost_types::Timestamp { nanos: 0, ..prost_types::Timestamp::from(time) }.to_string()
}

/// What a pull needs besides the image's name.
#[derive(Debug)]
pub struct Source<'a> {
    /// Where blobs go.
    pub client: &'a Client,
    /// The connection pools for registries.
    pub http: &'a HttpClients,
    /// Who we are to the registry.
    pub credentials: Option<&'a Credentials>,
    /// An image's file or directory, where somebody has checked what its path leads to.
    pub opened: Option<Arc<OwnedFd>>,
    /// Who hears of it.
    pub progress: &'a Progress,
}

/// Downloads what is missing of `reference` into the content store, under `lease`.
///
/// # Errors
/// When any part can't be had or is not what its name says.
pub async fn fetch(source: &Source<'_>, reference: &Reference, lease: &LeaseId) -> Result<Fetched, ImageError> {
    let origin = Origin::of(source.http, reference, source.credentials, source.opened.clone()).await?;
    let (media_type, bytes) = origin.top().await?;
    let digest = Digest::of(&bytes);
    if let Reference::Registry(name) = reference
        && let Some(expected) = name.digest()
    {
        check(reference, "manifest", &expected, &digest)?;
    }
    source.progress.tell(PullEvent::Resolved(digest.clone()));

    let media_type = manifest::kind(reference, &media_type, &bytes)?;
    let (index, manifest_bytes, manifest_type, manifest) = match manifest::parse(reference, &media_type, &bytes)? {
        Document::Manifest(manifest) => (None, bytes, media_type, manifest),
        Document::Index(chosen) => {
            let (manifest_type, inner) = origin.manifest(&chosen).await?;
            check(reference, "manifest", &chosen, &Digest::of(&inner))?;
            let manifest_type = manifest::kind(reference, &manifest_type, &inner)?;
            match manifest::parse(reference, &manifest_type, &inner)? {
                Document::Manifest(manifest) => (Some((bytes, media_type, chosen)), inner, manifest_type, manifest),
                Document::Index(_) => {
                    return Err(ImageError::Malformed {
                        image: reference.to_string(),
                        what: "index",
                        digest,
                        problem: "it points to another index".to_owned(),
                    });
                }
            }
        }
    };

    let config = fetch_config(&origin, reference, &manifest.config).await?;
    let (_, diffs) = manifest::parse_config(reference, &manifest, &config)?;
    source.client.write_blob(lease, &config, Labels::new()).await?;

    let mut downloads: Vec<BoxFuture<'_, Result<(), ImageError>>> = Vec::new();
    for (layer, diff) in manifest.layers.iter().zip(&diffs) {
        downloads.push(Box::pin(Download { source, origin: &origin, reference, layer, diff }.run(lease)));
    }
    futures_util::stream::iter(downloads).buffer_unordered(PARALLEL).try_collect::<Vec<()>>().await?;

    // Parents come last: what a label names must be there, or the collector may see a hole.
    let manifest_digest = source.client.write_blob(lease, &manifest_bytes, references(&manifest)).await?;
    let target = match index {
        None => descriptor(&manifest_type, &manifest_digest, manifest_bytes.len()),
        Some((bytes, media_type, chosen)) => {
            let labels = Labels::from([("containerd.io/gc.ref.content.m.0".to_owned(), chosen.to_string())]);
            let digest = source.client.write_blob(lease, &bytes, labels).await?;
            descriptor(&media_type, &digest, bytes.len())
        }
    };
    Ok(Fetched { target, manifest, config })
}

/// containerd's garbage collection labels of a manifest: its config and its layers.
fn references(manifest: &Manifest) -> Labels {
    let config = ("containerd.io/gc.ref.content.config".to_owned(), manifest.config.to_string());
    let layers = manifest
        .layers
        .iter()
        .enumerate()
        .map(|(n, layer)| (format!("containerd.io/gc.ref.content.l.{n}"), layer.digest.to_string()));
    layers.chain([config]).collect()
}

fn descriptor(media_type: &str, digest: &Digest, size: usize) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: digest.to_string(),
        size: i64::try_from(size).unwrap_or(i64::MAX),
        ..Default::default()
    }
}

fn check(reference: &Reference, what: &'static str, expected: &Digest, actual: &Digest) -> Result<(), ImageError> {
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

async fn fetch_config(origin: &Origin<'_>, reference: &Reference, digest: &Digest) -> Result<Vec<u8>, ImageError> {
    let mut chunks = origin.blob(digest, None).await?;
    let mut bytes = Vec::new();
    loop {
        match chunks.next().await {
            Ok(Some(chunk)) if bytes.len() + chunk.len() <= CONFIG_MAX => bytes.extend_from_slice(&chunk),
            Ok(Some(_)) => {
                return Err(ImageError::Malformed {
                    image: reference.to_string(),
                    what: "config",
                    digest: digest.clone(),
                    problem: format!("larger than {CONFIG_MAX} bytes"),
                });
            }
            Ok(None) => break,
            Err(source) => {
                return Err(ImageError::Interrupted {
                    registry: origin.name().to_owned(),
                    digest: digest.clone(),
                    received: bytes.len() as u64,
                    size: 0,
                    source: source.map(reqwest::Error::without_url),
                });
            }
        }
    }
    check(reference, "config", digest, &Digest::of(&bytes))?;
    Ok(bytes)
}

/// One layer's way from the registry, past the reader, into the store.
struct Download<'a> {
    source: &'a Source<'a>,
    origin: &'a Origin<'a>,
    reference: &'a Reference,
    layer: &'a Layer,
    diff: &'a Digest,
}

impl Download<'_> {
    async fn run(self, lease: &LeaseId) -> Result<(), ImageError> {
        let Layer { digest, size, .. } = self.layer;
        let tell = |done| self.source.progress.tell(PullEvent::Layer { digest: digest.clone(), done, size: *size });
        let client = self.source.client;
        let labels = Labels::from([(UNCOMPRESSED.to_owned(), self.diff.to_string())]);
        let mut writer = loop {
            if self.is_here(lease, &labels).await? {
                tell(*size);
                return Ok(());
            }
            // None: somebody else's pull of the same layer has just ended well.
            let writer = client.open_blob(lease, digest, i64::try_from(*size).unwrap_or(i64::MAX)).await?;
            if let Some(writer) = writer {
                break writer;
            }
        };
        if writer.is_complete() {
            writer.commit(Labels::new()).await?;
            // Another namespace's, and so not looked through by us.
            if !self.is_here(lease, &labels).await? {
                return Err(self.interrupted(0, None));
            }
            tell(*size);
            return Ok(());
        }
        match self.stream(&mut writer, &tell).await {
            Ok(()) => Ok(writer.commit(labels).await?),
            Err(error) => {
                writer.abandon().await;
                Err(error)
            }
        }
    }

    /// Is the layer in the store, and what this image's configuration says it is? Its label tells; one without a label
    /// is looked through. Believing the configuration would let it name somebody else's unpacked layers.
    async fn is_here(&self, lease: &LeaseId, labels: &Labels) -> Result<bool, ImageError> {
        let client = self.source.client;
        let digest = &self.layer.digest;
        if !client.keep_blob(lease, digest, Labels::new()).await? {
            return Ok(false);
        }
        let Some((_, stored)) = client.blob(digest).await? else { return Ok(false) };
        let actual = match stored.get(UNCOMPRESSED) {
            Some(label) if label == self.diff.as_str() => return Ok(true),
            Some(label) => Digest::new(label).unwrap_or_else(|_| Digest::of(label.as_bytes())),
            None => {
                let scan = Scan::start();
                let mut reader = client.blob_reader(digest).await?;
                while let Some(bytes) = reader.next().await? {
                    scan.feed(bytes).await;
                }
                scan.finish().await.map_err(|source| self.refused(source))?
            }
        };
        if actual != *self.diff {
            return Err(self.refused(LayerProblem::DiffId { expected: self.diff.clone(), actual }));
        }
        Ok(client.keep_blob(lease, digest, labels.clone()).await?)
    }

    fn interrupted(&self, received: u64, source: Option<reqwest::Error>) -> ImageError {
        ImageError::Interrupted {
            registry: self.origin.name().to_owned(),
            digest: self.layer.digest.clone(),
            received,
            size: self.layer.size,
            source: source.map(reqwest::Error::without_url),
        }
    }

    fn refused(&self, source: LayerProblem) -> ImageError {
        ImageError::Layer { image: self.reference.to_string(), digest: self.layer.digest.clone(), source }
    }

    async fn stream(
        &self,
        writer: &mut crate::containerd::BlobWriter,
        tell: &(impl Fn(u64) + Sync),
    ) -> Result<(), ImageError> {
        let Layer { digest, size, .. } = self.layer;
        let mut chunks = self.origin.blob(digest, Some(*size)).await?;
        let scan = Scan::start();
        let mut hash = <sha2::Sha256 as sha2::Digest>::new();
        let mut received = 0_u64;
        while let Some(chunk) = chunks.next().await.map_err(|error| self.interrupted(received, error))? {
            received += chunk.len() as u64;
            if received > *size {
                // Never write past what the manifest promised.
                return Err(self.interrupted(received, None));
            }
            sha2::Digest::update(&mut hash, &chunk);
            writer.write(&chunk).await?;
            scan.feed(chunk).await;
            tell(received);
        }
        if received < *size {
            return Err(self.interrupted(received, None));
        }
        let actual = Digest::from_hash(&sha2::Digest::finalize(hash));
        check(self.reference, "layer", digest, &actual)?;
        let diff = scan.finish().await.map_err(|source| self.refused(source))?;
        if diff != *self.diff {
            return Err(self.refused(LayerProblem::DiffId { expected: self.diff.clone(), actual: diff }));
        }
        Ok(())
    }
}
