//! Where a pull has its blobs from: a registry, or files on this host.

use std::{
    io::Read as _,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::mpsc;

use super::{
    Archive, Credentials, ImageError, Reference, RegistryName,
    archive::Layout,
    provenance::{BlobSource, Provenance},
    registry::{HttpClients, Registry},
};
use crate::{containerd::Labels, ids::Digest};

/// Read from files at a time.
const CHUNK: usize = 256 << 10;
/// Chunks that wait for the store.
const BACKLOG: usize = 4;
/// Indexes and manifests; distribution's limit on them.
const DOCUMENT_MAX: u64 = 4 << 20;

/// One of them.
#[derive(Debug)]
pub enum Origin<'a> {
    /// A registry.
    Registry(Registry<'a>, &'a RegistryName),
    /// Files.
    Files(Arc<Layout>),
}

/// A blob that comes in pieces.
#[derive(Debug)]
pub enum Chunks {
    /// From a registry.
    Body(reqwest::Response),
    /// From a thread that reads a file.
    File(mpsc::Receiver<std::io::Result<Vec<u8>>>),
}

/// Says that somebody waits, until it is dropped: a thread can't be given up otherwise.
struct Wanted(Arc<AtomicBool>);

impl Default for Wanted {
    fn default() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl<'a> Origin<'a> {
    /// The place that a name stands for.
    ///
    /// # Errors
    /// When files are not what the name says.
    pub async fn of(
        http: &'a HttpClients,
        reference: &'a Reference,
        credentials: Option<&'a Credentials>,
        opened: Option<Arc<OwnedFd>>,
    ) -> Result<Self, ImageError> {
        match reference {
            Reference::Registry(place) => Ok(Self::Registry(Registry::new(http, reference, place, credentials), place)),
            Reference::Archive(archive) => {
                let (reference, archive): (Reference, Archive) = (reference.clone(), archive.clone());
                let image = reference.to_string();
                let wanted = Wanted::default();
                let asked = wanted.0.clone();
                let open = move || Layout::open(&reference, &archive, opened.as_deref(), &asked);
                let layout = tokio::task::spawn_blocking(open)
                    .await
                    .map_err(|join| ImageError::Archive { image, problem: join.to_string() })??;
                Ok(Self::Files(Arc::new(layout)))
            }
        }
    }

    /// What the whole name stands for: media type and bytes of an index or a manifest.
    ///
    /// # Errors
    /// When it can't be had.
    pub async fn top(&self) -> Result<(String, Vec<u8>), ImageError> {
        match self {
            Self::Registry(registry, place) => registry.manifest(place.target()).await,
            Self::Files(layout) => Ok(layout.top()),
        }
    }

    /// A manifest that an index names. The digest is for the caller to check.
    ///
    /// # Errors
    /// When it can't be had.
    pub async fn manifest(&self, digest: &Digest) -> Result<(String, Vec<u8>), ImageError> {
        match self {
            Self::Registry(registry, _) => registry.manifest(digest.as_str()).await,
            Self::Files(layout) => Ok((String::new(), layout.document(digest, DOCUMENT_MAX)?)),
        }
    }

    /// A blob's bytes, of which there should be `size`. They are the caller's to check.
    ///
    /// # Errors
    /// When it can't be had.
    pub async fn blob(&self, digest: &Digest, size: Option<u64>) -> Result<Chunks, ImageError> {
        match self {
            Self::Registry(registry, _) => registry.blob(digest).await.map(Chunks::Body),
            Self::Files(layout) => {
                let mut file = layout.blob(digest, size)?;
                let (send, receive) = mpsc::channel(BACKLOG);
                tokio::task::spawn_blocking(move || {
                    loop {
                        let mut bytes = vec![0; CHUNK];
                        let read = file.read(&mut bytes).map(|count| {
                            bytes.truncate(count);
                            bytes
                        });
                        let last = !matches!(&read, Ok(bytes) if !bytes.is_empty());
                        let told = matches!(&read, Ok(bytes) if bytes.is_empty());
                        if told || send.blocking_send(read).is_err() || last {
                            return;
                        }
                    }
                });
                Ok(Chunks::File(receive))
            }
        }
    }

    /// Returns whether this origin is known to have a blob that is stored with these labels. If not, only reading the blob
    /// from here can show it.
    pub async fn confirms(&self, digest: &Digest, labels: &Labels) -> bool {
        match self {
            Self::Registry(registry, place) => match BlobSource::of(place).in_labels(labels) {
                Provenance::Repository => true,
                Provenance::Registry => registry.has_blob(digest).await,
                Provenance::Elsewhere => false,
            },
            Self::Files(layout) => layout.has_hashed(digest),
        }
    }

    /// Adds to `labels` the one that records this origin, for a blob with the labels `stored`. Archives leave none.
    pub fn label(&self, labels: &mut Labels, stored: &Labels) {
        if let Self::Registry(_, place) = self {
            BlobSource::of(place).add_to(labels, stored);
        }
    }

    /// Its name, for messages.
    pub fn name(&self) -> &str {
        match self {
            Self::Registry(registry, _) => registry.name(),
            Self::Files(_) => "the archive",
        }
    }
}

impl Chunks {
    /// The next piece; None at the end.
    ///
    /// # Errors
    /// When it breaks off; without a reason where a file can't be read on.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, Option<reqwest::Error>> {
        match self {
            Self::Body(response) => response.chunk().await.map(|chunk| chunk.map(|bytes| bytes.to_vec())).map_err(Some),
            Self::File(receive) => match receive.recv().await {
                None => Ok(None),
                Some(Ok(bytes)) => Ok(Some(bytes)),
                Some(Err(error)) => {
                    tracing::warn!(%error, "an image's file");
                    Err(None)
                }
            },
        }
    }
}
