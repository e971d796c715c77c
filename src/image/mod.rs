//! From an image's name to directories that can be mounted: references, registries, the pull into containerd's store,
//! and the records that let a task start without asking anybody.

mod archive;
mod auth;
mod collect;
mod confine;
mod credentials;
mod download;
mod extensions;
mod layer;
mod manifest;
mod origin;
mod provenance;
mod pull;
mod record;
mod reference;
mod registry;
mod store;
mod unpack;
mod view;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

pub use archive::{Archive, ArchiveFormat};
pub use auth::RealmError;
pub use collect::InUse;
pub use credentials::{AddressError, CredentialScope, Credentials, RegistryAddress};
pub use layer::LayerProblem;
pub use pull::{Progress, PullEvent};
pub use record::{ImageConfig, ImageRecord};
pub use reference::{Reference, ReferenceError, RegistryName};
pub use store::{ImageStore, PullPolicy, PullRequest};
pub use view::ViewProblem;

use crate::{
    accounts::AccountsError,
    containerd::ContainerdError,
    failure::{self, Cause},
    ids::Digest,
};

/// Why an image can't be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The registry doesn't know it.
    #[error("image {image} was not found: {registry} says {detail}")]
    NotFound {
        /// As asked for.
        image: String,
        /// Who said so.
        registry: String,
        /// In its words.
        detail: String,
    },
    /// The registry knows us not, or well enough.
    #[error("pull access denied for {image}: {registry} says {detail}; check the name, and `auth` for a private image")]
    Denied {
        /// As asked for.
        image: String,
        /// Who said so.
        registry: String,
        /// In its words.
        detail: String,
    },
    /// The registry denies the pull. It did not see the credentials, because they are for another registry.
    #[error(
        "pull access denied for {image}: {registry} says {detail}; the configured `auth` is for {scope} only and was not \
         sent; to send it to this registry, write auth {{ server_address = {registry:?} }}"
    )]
    Withheld {
        /// As asked for.
        image: String,
        /// Who said so.
        registry: String,
        /// In its words.
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
        /// Why it is not used.
        source: RealmError,
    },
    /// The registry did not answer.
    #[error("registry {registry} is out of reach")]
    Unreachable {
        /// Which.
        registry: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The registry answered something else.
    #[error("registry {registry} answered {status} to {request}: {detail}")]
    Answer {
        /// Which.
        registry: String,
        /// What it was asked.
        request: String,
        /// The HTTP status.
        status: u16,
        /// In its words.
        detail: String,
    },
    /// A download was cut off.
    #[error("download of {digest} from {registry} broke off after {received} of {size} bytes")]
    Interrupted {
        /// Whence.
        registry: String,
        /// What.
        digest: Digest,
        /// How far it came.
        received: u64,
        /// How far it should have come.
        size: u64,
        /// Why, where the transport says.
        source: Option<reqwest::Error>,
    },
    /// Time is up.
    #[error("pull of image {image} did not end within image_pull_timeout = {after:?}")]
    Timeout {
        /// As asked for.
        image: String,
        /// The limit.
        after: Duration,
    },
    /// What came is not what its name says.
    #[error("{what} of image {image} has digest {actual}, not {expected}")]
    WrongDigest {
        /// As asked for.
        image: String,
        /// Manifest, config or layer.
        what: &'static str,
        /// Its name.
        expected: Digest,
        /// What it is.
        actual: Digest,
    },
    /// A manifest, index or configuration that makes no sense.
    #[error("{what} {digest} of image {image} is malformed: {problem}")]
    Malformed {
        /// As asked for.
        image: String,
        /// Manifest, index or config.
        what: &'static str,
        /// Its digest.
        digest: Digest,
        /// What is wrong.
        problem: String,
    },
    /// An index without our platform.
    #[error("image {image} has no manifest for {wanted}; it has {offered}")]
    Platform {
        /// As asked for.
        image: String,
        /// What this host is.
        wanted: String,
        /// What there is.
        offered: String,
    },
    /// A layer that is refused.
    #[error("layer {digest} of image {image} is refused")]
    Layer {
        /// As asked for.
        image: String,
        /// Which.
        digest: Digest,
        /// Why.
        source: LayerProblem,
    },
    /// Accounts files that can't be used.
    #[error("image {image} is refused")]
    Accounts {
        /// As asked for.
        image: String,
        /// Why.
        source: AccountsError,
    },
    /// Mounts of a snapshotter that no root file system is made of.
    #[error("snapshotter {snapshotter} gives mounts for image {image} that are refused")]
    View {
        /// As asked for.
        image: String,
        /// The snapshotter's name.
        snapshotter: String,
        /// What is wrong with them.
        source: ViewProblem,
    },
    /// Files that don't hold what their name says.
    #[error("image {image} can't be read: {problem}")]
    Archive {
        /// As asked for.
        image: String,
        /// What is wrong.
        problem: String,
    },
    /// Files that can't be opened.
    #[error("image {image} can't be read")]
    ArchiveFile {
        /// As asked for.
        image: String,
        /// Why.
        source: io::Error,
    },
    /// A blob in files that can't be read.
    #[error("image {image} can't be read: blob {digest}")]
    ArchiveBlob {
        /// As asked for.
        image: String,
        /// Which.
        digest: Digest,
        /// Why.
        source: io::Error,
    },
    /// Not to be removed.
    #[error("image {image} is in use by a task")]
    InUse {
        /// As asked for.
        image: String,
    },
    /// Nothing to be removed.
    #[error("image {image} is not here")]
    NotHere {
        /// As asked for.
        image: String,
    },
    /// containerd said no.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// A file of ours.
    #[error("image record {path}")]
    Record {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The HTTP client could not be made.
    #[error("set up HTTPS (trust store: SSL_CERT_FILE, or the system's)")]
    Client {
        /// Why.
        source: reqwest::Error,
    },
}

impl ImageError {
    /// What has to change before another attempt can succeed.
    pub fn failure_cause(&self) -> Cause {
        match self {
            Self::Unreachable { .. }
            | Self::Interrupted { .. }
            | Self::Timeout { .. }
            | Self::Record { .. }
            | Self::Client { .. }
            | Self::Layer { source: LayerProblem::Thread, .. } => Cause::Host,
            Self::Answer { status, .. } if *status == 429 || *status >= 500 => Cause::Host,
            Self::Containerd(error) => error.failure_cause(),
            Self::Archive { problem, .. } => failure::of_message(problem).unwrap_or(Cause::Job),
            // The image, or what the job says about it, unless the kernel failed on the way.
            other => failure::of_error(other).unwrap_or(Cause::Job),
        }
    }
}

/// Errors are shared by all who waited for the same pull.
pub type SharedError = Arc<ImageError>;
