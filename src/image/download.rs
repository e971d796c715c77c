//! Downloads one layer from a registry, or reads it from an archive, into containerd's store. A layer that is stored
//! already is checked before another image uses it.

use tokio::sync::Semaphore;

use super::{
    ImageError, LayerProblem, Reference,
    layer::LayerScan,
    manifest::{Layer, check_digest},
    origin::Origin,
    pull_context::{PullContext, PullEvent},
};
use crate::{
    containerd::{BlobWriter, Labels, LeaseId},
    ids::Digest,
};

/// containerd's label on a layer with the digest of the layer's uncompressed bytes.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// The transfer of one layer of an image that is pulled.
pub(crate) struct LayerDownload<'a> {
    /// The clients and parameters of the pull.
    pub context: &'a PullContext<'a>,
    /// The registry or archive that the image comes from.
    pub origin: &'a Origin<'a>,
    /// The image.
    pub reference: &'a Reference,
    /// The layer.
    pub layer: &'a Layer,
    /// The digest of its uncompressed bytes, as the image's configuration states it.
    pub diff_id: &'a Digest,
    /// Limits how many layers are transferred or read at the same time.
    pub transfers: &'a Semaphore,
}

impl LayerDownload<'_> {
    /// Makes sure that the layer is in the store, and adds it to `lease`.
    ///
    /// # Errors
    /// Fails when the layer can't be downloaded, or has another digest than its name or the image's configuration says.
    pub(crate) async fn run(self, lease: &LeaseId) -> Result<(), ImageError> {
        let Layer { digest, size, .. } = self.layer;
        let client = self.context.client;
        let (transfer, mut writer) = loop {
            if let Some(stored) = self.lease_stored(lease).await? {
                return self.use_stored(lease, &stored).await;
            }
            let transfer = self.transfers.acquire().await;
            // `None` means that another pull of the same layer has just completed.
            let writer = client.open_blob(lease, digest, i64::try_from(*size).unwrap_or(i64::MAX)).await?;
            if let Some(writer) = writer {
                break (transfer, writer);
            }
        };
        if writer.is_complete() {
            // Another namespace of containerd has the layer, and containerd shares the bytes but not the labels.
            writer.commit(Labels::new()).await?;
            drop(transfer);
            let stored = self.lease_stored(lease).await?.ok_or_else(|| self.interrupted(0, None))?;
            return self.use_stored(lease, &stored).await;
        }
        match self.download_into(&mut writer).await {
            Ok(()) => Ok(writer.commit(self.labels(&Labels::new())).await?),
            Err(error) => {
                writer.abandon().await;
                Err(error)
            }
        }
    }

    /// Returns the labels of the layer if it is in the store, and adds it to the lease.
    async fn lease_stored(&self, lease: &LeaseId) -> Result<Option<Labels>, ImageError> {
        let client = self.context.client;
        if !client.add_blob_to_lease(lease, &self.layer.digest, Labels::new()).await? {
            return Ok(None);
        }
        Ok(client.blob(&self.layer.digest).await?.map(|(_, labels)| labels))
    }

    /// Uses the stored layer for this image after two checks. First, the image's own registry or archive must have the
    /// layer: otherwise a user who knows the digest of a private layer could read the layer by naming it in an image of
    /// their own. Second, the layer's uncompressed digest must be the one in this image's configuration: otherwise the
    /// configuration could claim the unpacked layers of another image. The order matters, because the second error
    /// contains the real digest.
    async fn use_stored(&self, lease: &LeaseId, stored: &Labels) -> Result<(), ImageError> {
        let label = stored.get(UNCOMPRESSED);
        let scanned = if self.origin.is_known_to_have(&self.layer.digest, stored).await {
            None
        } else {
            self.download_as_proof(label.is_none()).await?
        };
        let actual = match (label, scanned) {
            (Some(label), _) => Digest::new(label).unwrap_or_else(|_| Digest::of(label.as_bytes())),
            (None, Some(scanned)) => scanned,
            (None, None) => self.scan_stored().await?,
        };
        self.check_diff_id(actual)?;
        let mut labels = self.labels(stored);
        labels.retain(|key, value| stored.get(key) != Some(value));
        if !labels.is_empty() && !self.context.client.add_blob_to_lease(lease, &self.layer.digest, labels).await? {
            return Err(self.interrupted(0, None));
        }
        self.report(self.layer.size);
        Ok(())
    }

    /// Returns the labels that the layer should get in addition to those in `stored`.
    fn labels(&self, stored: &Labels) -> Labels {
        let mut labels = Labels::from([(UNCOMPRESSED.to_owned(), self.diff_id.to_string())]);
        self.origin.add_label(&mut labels, stored);
        labels
    }

    /// Downloads the layer into `writer`.
    async fn download_into(&self, writer: &mut BlobWriter) -> Result<(), ImageError> {
        let scan = LayerScan::start();
        self.transfer(Some(writer), Some(&scan)).await?;
        self.check_diff_id(self.scanned(scan).await?)
    }

    /// Downloads a layer that is stored already without storing it again, as proof that the image's registry or archive
    /// has it: only a party that has the layer can send bytes with its digest. With `scan`, returns the layer's
    /// uncompressed digest.
    async fn download_as_proof(&self, scan: bool) -> Result<Option<Digest>, ImageError> {
        let _transfer = self.transfers.acquire().await;
        let scan = scan.then(LayerScan::start);
        self.transfer(None, scan.as_ref()).await?;
        match scan {
            Some(scan) => self.scanned(scan).await.map(Some),
            None => Ok(None),
        }
    }

    /// Reads the layer from its registry or archive, passes the bytes to `writer` and `scan`, and checks size and
    /// digest.
    async fn transfer(&self, mut writer: Option<&mut BlobWriter>, scan: Option<&LayerScan>) -> Result<(), ImageError> {
        let Layer { digest, size, .. } = self.layer;
        let mut chunks = self.origin.blob(digest, Some(*size)).await?;
        let mut hash = <sha2::Sha256 as sha2::Digest>::new();
        let mut received = 0_u64;
        while let Some(chunk) = chunks.next().await.map_err(|error| self.interrupted(received, error))? {
            received += chunk.len() as u64;
            if received > *size {
                // More bytes than the manifest states are never read.
                return Err(self.interrupted(received, None));
            }
            sha2::Digest::update(&mut hash, &chunk);
            if let Some(writer) = &mut writer {
                writer.write(&chunk).await?;
            }
            if let Some(scan) = scan {
                scan.feed(chunk).await;
            }
            self.report(received);
        }
        if received < *size {
            return Err(self.interrupted(received, None));
        }
        check_digest(self.reference, "layer", digest, &Digest::from_hash(&sha2::Digest::finalize(hash)))
    }

    /// Scans the stored layer and returns its uncompressed digest.
    async fn scan_stored(&self) -> Result<Digest, ImageError> {
        let _transfer = self.transfers.acquire().await;
        let scan = LayerScan::start();
        let mut reader = self.context.client.blob_reader(&self.layer.digest).await?;
        while let Some(bytes) = reader.next().await? {
            scan.feed(bytes).await;
        }
        self.scanned(scan).await
    }

    async fn scanned(&self, scan: LayerScan) -> Result<Digest, ImageError> {
        scan.finish().await.map_err(|source| self.refused(source))
    }

    fn check_diff_id(&self, actual: Digest) -> Result<(), ImageError> {
        if actual == *self.diff_id {
            return Ok(());
        }
        Err(self.refused(LayerProblem::DiffId { expected: self.diff_id.clone(), actual }))
    }

    fn report(&self, done: u64) {
        let Layer { digest, size, .. } = self.layer;
        self.context.progress.report(PullEvent::Layer { digest: digest.clone(), done, size: *size });
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
}
