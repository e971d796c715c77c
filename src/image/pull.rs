//! One pull: from a registry into containerd's content store, everything checked on the way.

use std::{
    fmt,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{StreamExt as _, TryStreamExt as _, future::BoxFuture};
use tokio::sync::Semaphore;

use super::{
    Credentials, ImageError, Reference,
    download::Download,
    manifest::{self, Document, Manifest},
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

/// Layers that are checked side by side. A layer that is stored already mostly costs one short request.
const CHECKED: usize = 8;

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

    let transfers = Semaphore::new(PARALLEL);
    let mut downloads: Vec<BoxFuture<'_, Result<(), ImageError>>> = Vec::new();
    for (layer, diff) in manifest.layers.iter().zip(&diffs) {
        let download = Download { source, origin: &origin, reference, layer, diff, transfers: &transfers };
        downloads.push(Box::pin(download.run(lease)));
    }
    futures_util::stream::iter(downloads).buffer_unordered(CHECKED).try_collect::<Vec<()>>().await?;

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

pub(super) fn check(
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
