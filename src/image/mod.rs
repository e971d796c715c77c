//! Provides the directories that are mounted for an image's name: references, registries, the pull into containerd's
//! store, and the image records with which a task starts without a request to a registry or to containerd.

mod archive;
mod auth;
mod confine;
mod credentials;
mod download;
mod gc;
mod layer;
mod manifest;
mod origin;
mod provenance;
mod pull;
mod pull_context;
mod record;
mod reference;
mod registry;
mod store;
mod tar_extensions;
mod unpack;
mod view;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

pub use auth::RealmError;
pub use credentials::{AddressError, CredentialScope, Credentials, RegistryAddress};
pub use gc::ImagesInUse;
pub use layer::LayerProblem;
pub use pull_context::{Progress, PullEvent};
pub use record::{ImageConfig, ImageRecord};
pub use reference::{Archive, ArchiveFormat, Reference, ReferenceError, RegistryImage};
pub use store::{ImageStore, PullPolicy, PullRequest};
pub use view::ViewProblem;

use crate::{
    accounts::AccountsError,
    containerd::ContainerdError,
    failure::{self, Cause},
    ids::Digest,
};

/// Why an image can't be pulled, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The registry does not have the image.
    #[error("image {image} was not found: {registry} says {detail}")]
    NotFound {
        /// The image as the caller named it.
        image: String,
        /// The registry that answered.
        registry: String,
        /// The error text of the registry.
        detail: String,
    },
    /// The registry requires credentials, or does not accept those that it got.
    #[error("pull access denied for {image}: {registry} says {detail}; check the name, and `auth` for a private image")]
    AccessDenied {
        /// The image as the caller named it.
        image: String,
        /// The registry that answered.
        registry: String,
        /// The error text of the registry.
        detail: String,
    },
    /// The registry denies the pull. It did not get the configured credentials, because they are for another registry.
    #[error(
        "pull access denied for {image}: {registry} says {detail}; the configured `auth` is for {scope} only and was not \
         sent; to send it to this registry, write auth {{ server_address = {registry:?} }}"
    )]
    CredentialsWithheld {
        /// The image as the caller named it.
        image: String,
        /// The registry that answered.
        registry: String,
        /// The error text of the registry.
        detail: String,
        /// The registry that the credentials are for.
        scope: RegistryAddress,
    },
    /// The registry names a token realm that must not be used.
    #[error("registry {registry} names the token realm {realm:?}, which is not used")]
    Realm {
        /// The registry.
        registry: String,
        /// The realm's URL.
        realm: String,
        /// Why no token is requested there.
        source: RealmError,
    },
    /// The registry did not answer.
    #[error("could not reach registry {registry}")]
    Unreachable {
        /// The registry.
        registry: String,
        /// The error of the connection.
        source: reqwest::Error,
    },
    /// The registry answered with a status that is none of the above.
    #[error("registry {registry} answered {status} to {request}: {detail}")]
    UnexpectedAnswer {
        /// The registry.
        registry: String,
        /// The path of the request, or what the request was for.
        request: String,
        /// The HTTP status.
        status: u16,
        /// The error text of the registry.
        detail: String,
    },
    /// A download ended early, or brought more bytes than the manifest says.
    #[error("download of {digest} from {registry} was interrupted after {received} of {size} bytes")]
    Interrupted {
        /// The registry, or "the archive".
        registry: String,
        /// The digest of the blob.
        digest: Digest,
        /// The bytes that were received.
        received: u64,
        /// The bytes that the blob should have; 0 where that is not known.
        size: u64,
        /// The error of the transport, if it reported one.
        source: Option<reqwest::Error>,
    },
    /// The pull took longer than its caller waits.
    #[error("pull of image {image} did not finish within image_pull_timeout = {after:?}")]
    Timeout {
        /// The image as the caller named it.
        image: String,
        /// The time limit.
        after: Duration,
    },
    /// A downloaded document or layer has another digest than the one it was requested by.
    #[error("{what} of image {image} has digest {actual}, not {expected}")]
    WrongDigest {
        /// The image as the caller named it.
        image: String,
        /// The kind of blob: "manifest", "config" or "layer".
        what: &'static str,
        /// The digest that was requested.
        expected: Digest,
        /// The digest of the bytes.
        actual: Digest,
    },
    /// A manifest, index or configuration can't be parsed, or contradicts itself.
    #[error("{what} {digest} of image {image} is malformed: {problem}")]
    Malformed {
        /// The image as the caller named it.
        image: String,
        /// The kind of document, such as "manifest", "index" or "config".
        what: &'static str,
        /// The document's digest.
        digest: Digest,
        /// What is wrong with the document.
        problem: String,
    },
    /// An index has no manifest for this host's platform.
    #[error("image {image} has no manifest for {wanted}; it has {offered}")]
    Platform {
        /// The image as the caller named it.
        image: String,
        /// This host's platform.
        wanted: String,
        /// The platforms of the index.
        offered: String,
    },
    /// A layer is refused because of its content.
    #[error("layer {digest} of image {image} is refused")]
    Layer {
        /// The image as the caller named it.
        image: String,
        /// The layer's digest.
        digest: Digest,
        /// Why the layer is refused.
        source: LayerProblem,
    },
    /// The image's passwd or group file can't be used.
    #[error("image {image} is refused")]
    Accounts {
        /// The image as the caller named it.
        image: String,
        /// Why the file can't be used.
        source: AccountsError,
    },
    /// The mounts that a snapshotter returned can't become a root file system.
    #[error("snapshotter {snapshotter} returned mounts for image {image} that are refused")]
    SnapshotterMounts {
        /// The image as the caller named it.
        image: String,
        /// The snapshotter's name.
        snapshotter: String,
        /// What is wrong with the mounts.
        source: ViewProblem,
    },
    /// An archive is not in the format that its name says, or lacks a part of the image.
    #[error("image {image} can't be read: {problem}")]
    Archive {
        /// The image as the caller named it.
        image: String,
        /// What is wrong with the archive.
        problem: String,
    },
    /// An archive can't be opened.
    #[error("could not read image {image}")]
    ArchiveFile {
        /// The image as the caller named it.
        image: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// A blob of an archive can't be read.
    #[error("could not read blob {digest} of image {image}")]
    ArchiveBlob {
        /// The image as the caller named it.
        image: String,
        /// The blob's digest.
        digest: Digest,
        /// The error of the system call.
        source: io::Error,
    },
    /// The image can't be removed, because a task uses it.
    #[error("image {image} is in use by a task")]
    InUse {
        /// The image as the caller named it.
        image: String,
    },
    /// The image is not in containerd's store, and may not be pulled or is to be removed.
    #[error("image {image} is not stored on this node")]
    NotStored {
        /// The image as the caller named it.
        image: String,
    },
    /// A call to containerd failed.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// A file or directory of the image store can't be read or written.
    #[error("could not access {path} of the image store")]
    StoreFile {
        /// The file or directory.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The HTTP client could not be made.
    #[error("could not set up HTTPS (trust store: SSL_CERT_FILE, or the system's)")]
    Client {
        /// The error of the HTTP library.
        source: reqwest::Error,
    },
}

impl ImageError {
    /// Returns what has to change before another attempt can succeed.
    pub fn failure_cause(&self) -> Cause {
        match self {
            Self::Unreachable { .. }
            | Self::Interrupted { .. }
            | Self::Timeout { .. }
            | Self::StoreFile { .. }
            | Self::Client { .. }
            | Self::Layer { source: LayerProblem::ScanFailed, .. } => Cause::Host,
            Self::UnexpectedAnswer { status, .. } if *status == 429 || *status >= 500 => Cause::Host,
            Self::Containerd(error) => error.failure_cause(),
            Self::Archive { problem, .. } => failure::of_message(problem).unwrap_or(Cause::Job),
            // The cause is the image, or what the job says about it, unless a system call failed on the way.
            other => failure::of_error(other).unwrap_or(Cause::Job),
        }
    }
}

/// The error of a pull, shared by all callers that waited for the same pull.
pub type SharedPullError = Arc<ImageError>;
