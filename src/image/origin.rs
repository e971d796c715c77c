//! The origin of an image that is pulled: a registry, or files on this host.

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
    Archive, Credentials, ImageError, Reference, RegistryImage,
    archive::OpenedArchive,
    provenance::{BlobSource, Provenance},
    registry::{HttpClients, Registry},
};
use crate::{containerd::Labels, ids::Digest};

/// The number of bytes that are read from a file at a time.
const CHUNK: usize = 256 << 10;
/// The maximum number of chunks of a file that wait to be stored.
const QUEUED_CHUNKS_MAX: usize = 4;
/// The largest index or manifest that is read. It is the limit of distribution, the reference registry.
const DOCUMENT_MAX: u64 = 4 << 20;

/// The origin of an image that is pulled.
#[derive(Debug)]
pub(crate) enum Origin<'a> {
    /// A registry, and the image's name there.
    Registry(Registry<'a>, &'a RegistryImage),
    /// Files on this host.
    Files(Arc<OpenedArchive>),
}

/// The bytes of a blob, which arrive in chunks.
#[derive(Debug)]
pub(crate) enum Chunks {
    /// The body of a registry's response.
    Body(reqwest::Response),
    /// A channel from a thread that reads a file.
    File(mpsc::Receiver<std::io::Result<Vec<u8>>>),
}

/// A guard that sets its flag to false when it is dropped. A blocking thread can't be cancelled. It reads the flag and
/// ends by itself.
struct CancelOnDrop(Arc<AtomicBool>);

impl Default for CancelOnDrop {
    fn default() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl<'a> Origin<'a> {
    /// Returns the origin of an image. For files, `opened` is a descriptor of them that the caller has already checked.
    ///
    /// # Errors
    /// Fails when files can't be read, or are not in the format that the image's name says.
    pub(crate) async fn of(
        http: &'a HttpClients,
        reference: &'a Reference,
        credentials: Option<&'a Credentials>,
        opened: Option<Arc<OwnedFd>>,
    ) -> Result<Self, ImageError> {
        match reference {
            Reference::Registry(image_name) => {
                Ok(Self::Registry(Registry::new(http, reference, image_name, credentials), image_name))
            }
            Reference::Archive(archive) => {
                let (reference, archive): (Reference, Archive) = (reference.clone(), archive.clone());
                let image = reference.to_string();
                let cancel_guard = CancelOnDrop::default();
                let keep_going = cancel_guard.0.clone();
                let open = move || OpenedArchive::open(&reference, &archive, opened.as_deref(), &keep_going);
                let layout = tokio::task::spawn_blocking(open)
                    .await
                    .map_err(|join| ImageError::Archive { image, problem: join.to_string() })??;
                Ok(Self::Files(Arc::new(layout)))
            }
        }
    }

    /// Returns media type and bytes of the index or manifest that the image's name stands for.
    ///
    /// # Errors
    /// Fails when the registry does not send it.
    pub(crate) async fn root_document(&self) -> Result<(String, Vec<u8>), ImageError> {
        match self {
            Self::Registry(registry, image_name) => registry.manifest(image_name.tag_or_digest()).await,
            Self::Files(layout) => Ok(layout.root_document()),
        }
    }

    /// Returns media type and bytes of a manifest that an index names. The caller must check the digest.
    ///
    /// # Errors
    /// Fails when the registry does not send the manifest, or the files do not contain it.
    pub(crate) async fn manifest(&self, digest: &Digest) -> Result<(String, Vec<u8>), ImageError> {
        match self {
            Self::Registry(registry, _) => registry.manifest(digest.as_str()).await,
            Self::Files(layout) => Ok((String::new(), layout.document(digest, DOCUMENT_MAX)?)),
        }
    }

    /// Returns the bytes of a blob, of which there should be `size`. The caller must check size and digest.
    ///
    /// # Errors
    /// Fails when the registry does not send the blob, or the files do not contain it.
    pub(crate) async fn blob(&self, digest: &Digest, size: Option<u64>) -> Result<Chunks, ImageError> {
        match self {
            Self::Registry(registry, _) => registry.blob(digest).await.map(Chunks::Body),
            Self::Files(layout) => {
                let mut file = layout.blob(digest, size)?;
                let (send, receive) = mpsc::channel(QUEUED_CHUNKS_MAX);
                tokio::task::spawn_blocking(move || {
                    loop {
                        let mut bytes = vec![0; CHUNK];
                        let read = file.read(&mut bytes).map(|count| {
                            bytes.truncate(count);
                            bytes
                        });
                        let at_end = matches!(&read, Ok(bytes) if bytes.is_empty());
                        let has_failed = read.is_err();
                        if at_end || send.blocking_send(read).is_err() || has_failed {
                            return;
                        }
                    }
                });
                Ok(Chunks::File(receive))
            }
        }
    }

    /// Returns whether this origin is known to have a blob that is stored with these labels. If not, only reading the
    /// blob from the origin can prove that the origin has it.
    pub(crate) async fn is_known_to_have(&self, digest: &Digest, labels: &Labels) -> bool {
        match self {
            Self::Registry(registry, image_name) => match BlobSource::of(image_name).provenance_by(labels) {
                Provenance::Repository => true,
                Provenance::Registry => registry.has_blob(digest).await,
                Provenance::Elsewhere => false,
            },
            Self::Files(layout) => layout.has_hashed(digest),
        }
    }

    /// Adds to `labels` the label that records this origin, for a blob with the labels `stored`. An origin in files is
    /// not recorded.
    pub(crate) fn add_label(&self, labels: &mut Labels, stored: &Labels) {
        if let Self::Registry(_, image_name) = self {
            BlobSource::of(image_name).add_to(labels, stored);
        }
    }

    /// Returns the origin's name for messages.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Registry(registry, _) => registry.name(),
            Self::Files(_) => "the archive",
        }
    }
}

impl Chunks {
    /// Returns the next chunk; `None` at the end.
    ///
    /// # Errors
    /// Fails when the transfer is interrupted. The error is `None` where a file can't be read, because its error is
    /// logged here.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>, Option<reqwest::Error>> {
        match self {
            Self::Body(response) => response.chunk().await.map(|chunk| chunk.map(|bytes| bytes.to_vec())).map_err(Some),
            Self::File(receive) => match receive.recv().await {
                None => Ok(None),
                Some(Ok(bytes)) => Ok(Some(bytes)),
                Some(Err(error)) => {
                    tracing::warn!(%error, "could not read a blob of an image from its file");
                    Err(None)
                }
            },
        }
    }
}
