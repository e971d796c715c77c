//! One pull: stores an image from a registry or from files in containerd's content store, and checks every document and
//! layer first.

use std::time::{Duration, SystemTime};

use futures_util::{StreamExt as _, TryStreamExt as _, future::BoxFuture};
use tokio::sync::Semaphore;

use super::{
    ImageError, Reference,
    download::LayerDownload,
    manifest::{self, Document, Manifest, check_digest},
    origin::Origin,
    pull_context::{PullContext, PullEvent},
};
use crate::{
    containerd::{Client, ContainerdError, Labels, LeaseId},
    ids::Digest,
    pb::types::Descriptor,
};

/// The maximum number of layers that are downloaded concurrently. docker and containerd have the same default.
const TRANSFERS_MAX: usize = 3;
/// The time after which containerd removes the lease of a pull that was killed.
const LEASE_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// The largest configuration that is read. A real configuration has some kilobytes.
pub(super) const CONFIG_MAX: usize = 8 << 20;

/// The maximum number of layers that are checked concurrently. A layer that is stored already mostly costs one short
/// request.
const CHECKS_MAX: usize = 8;

/// An image whose blobs are all in the content store.
#[derive(Debug)]
pub(crate) struct FetchedImage {
    /// The index or manifest that the name stands for.
    pub target: Descriptor,
    /// The manifest for this host.
    pub manifest: Manifest,
    /// The configuration's bytes.
    pub config: Vec<u8>,
}

/// The delays before the two deletions of a cancelled pull's lease.
const LEASE_DELETION_DELAYS: [Duration; 2] = [Duration::ZERO, Duration::from_secs(1)];

/// The lease that protects a pull's blobs while the pull runs. If it is dropped without a call to `release`, because
/// the pull was cancelled, it is deleted in the background.
#[derive(Debug)]
pub(crate) struct PullLease {
    client: Client,
    id: Option<LeaseId>,
}

impl PullLease {
    /// Creates a lease with the name `lease`.
    ///
    /// # Errors
    /// Fails when containerd does not create it.
    pub(crate) async fn create(client: &Client, lease: LeaseId) -> Result<Self, ContainerdError> {
        let this = Self { client: client.clone(), id: Some(lease.clone()) };
        client.create_lease(&lease, Some(rfc3339(SystemTime::now() + LEASE_LIFETIME))).await?;
        Ok(this)
    }

    /// Returns the lease's name.
    pub(crate) fn id(&self) -> &LeaseId {
        self.id.as_ref().expect("taken only by `release`, which consumes self, and by drop")
    }

    /// Deletes the lease. Blobs that an image refers to by now stay.
    ///
    /// # Errors
    /// Fails when containerd does not delete it.
    pub(crate) async fn release(mut self) -> Result<(), ContainerdError> {
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
        // Without an async runtime the lease can't be deleted here. Then containerd removes it when it expires.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                // If the pull was cancelled while the lease was being created, containerd may create the lease after
                // the first deletion.
                for delay in LEASE_DELETION_DELAYS {
                    tokio::time::sleep(delay).await;
                    if let Err(error) = client.delete_lease(&id).await {
                        tracing::debug!(
                            error = %crate::error_chain(&error),
                            "could not delete the lease of a cancelled pull; the lease will expire"
                        );
                    }
                }
            });
        }
    }
}

/// Formats a time for containerd's labels: RFC 3339 in UTC with whole seconds.
fn rfc3339(time: SystemTime) -> String {
    prost_types::Timestamp { nanos: 0, ..prost_types::Timestamp::from(time) }.to_string()
}

/// Downloads the blobs of an image that the content store does not have, and adds all blobs of the image to `lease`.
///
/// # Errors
/// Fails when a blob can't be downloaded, or has another digest than the one it was requested by.
pub(crate) async fn fetch(
    context: &PullContext<'_>,
    reference: &Reference,
    lease: &LeaseId,
) -> Result<FetchedImage, ImageError> {
    let origin = Origin::of(context.http, reference, context.credentials, context.opened.clone()).await?;
    let (media_type, bytes) = origin.root_document().await?;
    let digest = Digest::of(&bytes);
    if let Reference::Registry(name) = reference
        && let Some(expected) = name.digest()
    {
        check_digest(reference, "manifest", &expected, &digest)?;
    }
    context.progress.report(PullEvent::Resolved(digest.clone()));

    let media_type = manifest::media_type_of(reference, &media_type, &bytes)?;
    let (index, manifest_bytes, manifest_type, manifest) = match manifest::parse(reference, &media_type, &bytes)? {
        Document::Manifest(manifest) => (None, bytes, media_type, manifest),
        Document::Index(chosen) => {
            let (manifest_type, inner) = origin.manifest(&chosen).await?;
            check_digest(reference, "manifest", &chosen, &Digest::of(&inner))?;
            let manifest_type = manifest::media_type_of(reference, &manifest_type, &inner)?;
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
    let (_, diff_ids) = manifest::parse_config(reference, &manifest, &config)?;
    context.client.write_blob(lease, &config, Labels::new()).await?;

    let transfers = Semaphore::new(TRANSFERS_MAX);
    let mut downloads: Vec<BoxFuture<'_, Result<(), ImageError>>> = Vec::new();
    for (layer, diff_id) in manifest.layers.iter().zip(&diff_ids) {
        let download = LayerDownload { context, origin: &origin, reference, layer, diff_id, transfers: &transfers };
        downloads.push(Box::pin(download.run(lease)));
    }
    futures_util::stream::iter(downloads).buffer_unordered(CHECKS_MAX).try_collect::<Vec<()>>().await?;

    // Manifest and index are stored last: their labels refer to the other blobs. If these did not exist yet,
    // containerd's garbage collector might find a reference to a missing blob.
    let manifest_digest = context.client.write_blob(lease, &manifest_bytes, gc_labels(&manifest)).await?;
    let target = match index {
        None => descriptor(&manifest_type, &manifest_digest, manifest_bytes.len()),
        Some((bytes, media_type, chosen)) => {
            let labels = Labels::from([("containerd.io/gc.ref.content.m.0".to_owned(), chosen.to_string())]);
            let digest = context.client.write_blob(lease, &bytes, labels).await?;
            descriptor(&media_type, &digest, bytes.len())
        }
    };
    Ok(FetchedImage { target, manifest, config })
}

/// Returns the labels by which containerd's garbage collector finds a manifest's configuration and layers.
fn gc_labels(manifest: &Manifest) -> Labels {
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
    check_digest(reference, "config", digest, &Digest::of(&bytes))?;
    Ok(bytes)
}
