//! The parameters that all steps of a pull share: the clients, the credentials, and the listener to the pull's
//! progress.

use std::{fmt, os::fd::OwnedFd, sync::Arc};

use super::{Credentials, registry::HttpClients};
use crate::{containerd::Client, ids::Digest};

/// The progress of a running pull.
#[derive(Debug, Clone)]
pub enum PullEvent {
    /// The index or manifest that the image's name stands for was received, and has this digest.
    Resolved(Digest),
    /// A part of a layer was received.
    Layer {
        /// The layer's digest.
        digest: Digest,
        /// The bytes that were received so far.
        done: u64,
        /// The layer's compressed size.
        size: u64,
    },
    /// A layer was unpacked: the number of unpacked layers, and the number of all layers.
    Unpacked(usize, usize),
}

/// The listener to a pull's events, if there is one.
#[derive(Clone, Default)]
pub struct Progress(Option<Arc<dyn Fn(PullEvent) + Send + Sync>>);

impl Progress {
    /// Returns a value that passes all events to `listener`, which must not block.
    pub fn with_listener(listener: impl Fn(PullEvent) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(listener)))
    }

    pub(super) fn report(&self, event: PullEvent) {
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

/// The clients and parameters that a pull needs besides the image's name.
#[derive(Debug)]
pub(crate) struct PullContext<'a> {
    /// The client of containerd, which stores the blobs.
    pub client: &'a Client,
    /// The HTTP clients for registries.
    pub http: &'a HttpClients,
    /// The credentials for the registry.
    pub credentials: Option<&'a Credentials>,
    /// The descriptor of an image in files, if the caller has already checked and opened it.
    pub opened: Option<Arc<OwnedFd>>,
    /// The listener to the pull's progress.
    pub progress: &'a Progress,
}
