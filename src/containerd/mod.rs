//! A client of containerd's image side: leases, content, snapshots, diff and image records (containerd 1.6 to 2.x).
//!
//! Nothing here is called while a cached image's task starts; only pulls, the image list and the fingerprint come here.

mod content;
pub mod private;
mod snapshots;
mod tasks;

pub use content::BlobWriter;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tonic::{
    Code, Request, Status,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};

use crate::{
    failure::{self, Cause},
    pb::{
        services::{
            images::v1::{self as images, images_client::ImagesClient},
            leases::v1::{self as leases, leases_client::LeasesClient},
            version::v1::version_client::VersionClient,
        },
        types::Descriptor,
    },
};

/// containerd answers metadata calls in milliseconds; a busy disk (bolt's fsync) has been seen to take seconds.
const CALL: Duration = Duration::from_secs(30);
/// Is it there at all? Asked often, so kept short.
const PROBE: Duration = Duration::from_secs(2);
/// containerd's own limit on a message.
const MESSAGE_MAX: usize = 16 << 20;

/// What containerd said no with.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Its gRPC code.
    pub code: Code,
    /// Its words.
    pub message: String,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self { code: status.code(), message: status.message().to_owned() }
    }
}

/// Why a call to containerd failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ContainerdError {
    /// Nobody listens, or the daemon went away.
    #[error("containerd at {address} is out of reach")]
    Unreachable {
        /// Its socket.
        address: PathBuf,
        /// The transport's words.
        source: Refusal,
    },
    /// It answered, with a refusal.
    #[error("containerd: {call} {subject}")]
    Refused {
        /// The call.
        call: &'static str,
        /// What it was about.
        subject: String,
        /// The answer.
        source: Refusal,
    },
    /// It did not answer in time.
    #[error("containerd: {call} {subject}: no answer in {} s", after.as_secs())]
    Late {
        /// The call.
        call: &'static str,
        /// What it was about.
        subject: String,
        /// How long we waited.
        after: Duration,
    },
    /// It answered something that no version of it should.
    #[error("containerd: {call} {subject}: {problem}")]
    Nonsense {
        /// The call.
        call: &'static str,
        /// What it was about.
        subject: String,
        /// What was wrong.
        problem: String,
    },
}

impl ContainerdError {
    /// Did containerd say "not found"?
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(Code::NotFound)
    }

    /// Did containerd say "already exists"?
    pub fn is_already_exists(&self) -> bool {
        self.code() == Some(Code::AlreadyExists)
    }

    /// What has to change before another attempt can succeed.
    pub fn failure_cause(&self) -> Cause {
        match self {
            Self::Unreachable { .. } | Self::Late { .. } | Self::Nonsense { .. } => Cause::Host,
            // Go's errors come with the code Unknown whatever they are, so the words come first.
            Self::Refused { source, .. } => failure::of_message(&source.message).unwrap_or(match source.code {
                Code::InvalidArgument
                | Code::NotFound
                | Code::PermissionDenied
                | Code::Unauthenticated
                | Code::FailedPrecondition
                | Code::OutOfRange
                | Code::Unimplemented => Cause::Job,
                _ => Cause::Host,
            }),
        }
    }

    fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { source, .. } => Some(source.code),
            _ => None,
        }
    }
}

/// One containerd, one of its namespaces, one of its snapshotters. Cheap to clone; connects when first used, and again
/// after the daemon was restarted.
#[derive(Debug, Clone)]
pub struct Client {
    address: PathBuf,
    namespace: String,
    snapshotter: String,
    channel: Channel,
}

/// Which objects a call makes belong to which lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseId(pub String);

/// containerd's own name for a lease's expiry (an RFC 3339 time), after which its garbage collector drops it.
const LABEL_EXPIRE: &str = "containerd.io/gc.expire";

/// Our note on an image's name: which state directory's pull made it.
const LABEL_OWNER: &str = "nomad-driver-shim/owner";

impl Client {
    /// A client for the socket at `address`. Nothing is dialled yet.
    pub fn new(address: &Path, namespace: &str, snapshotter: &str) -> Self {
        let socket = address.to_owned();
        // The URI is never used: the connector dials the socket.
        let channel = Endpoint::from_static("http://containerd").connect_timeout(PROBE).connect_with_connector_lazy(
            tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
            }),
        );
        Self {
            address: address.to_owned(),
            namespace: namespace.to_owned(),
            snapshotter: snapshotter.to_owned(),
            channel,
        }
    }

    /// The snapshotter in use.
    pub fn snapshotter(&self) -> &str {
        &self.snapshotter
    }

    /// The socket.
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// Its version and revision.
    ///
    /// # Errors
    /// When it does not answer within 2 s.
    pub async fn version(&self) -> Result<(String, String), ContainerdError> {
        let mut client = VersionClient::new(self.channel.clone());
        let answer = self.within(PROBE, "Version", "", client.version(self.request(None, ()))).await?;
        Ok((answer.version, answer.revision))
    }

    /// Makes a lease. `expires` is an RFC 3339 time after which containerd drops it by itself; None keeps it.
    ///
    /// # Errors
    /// As containerd; a lease that exists already is fine.
    pub async fn create_lease(&self, lease: &LeaseId, expires: Option<String>) -> Result<(), ContainerdError> {
        let labels = expires.map(|time| (LABEL_EXPIRE.to_owned(), time)).into_iter().collect();
        let request = leases::CreateRequest { id: lease.0.clone(), labels };
        let mut client = LeasesClient::new(self.channel.clone());
        match self.call("Leases.Create", &lease.0, client.create(self.request(None, request))).await {
            Err(error) if !error.is_already_exists() => Err(error),
            _ => Ok(()),
        }
    }

    /// Drops a lease; what only it held is collected afterwards.
    ///
    /// # Errors
    /// As containerd; a lease that is gone already is fine.
    pub async fn delete_lease(&self, lease: &LeaseId) -> Result<(), ContainerdError> {
        let mut client = LeasesClient::new(self.channel.clone());
        let request = leases::DeleteRequest { id: lease.0.clone(), sync: false };
        match self.call("Leases.Delete", &lease.0, client.delete(self.request(None, request))).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// All leases of the namespace.
    ///
    /// # Errors
    /// As containerd.
    pub async fn leases(&self) -> Result<Vec<String>, ContainerdError> {
        let mut client = LeasesClient::new(self.channel.clone());
        let request = self.request(None, leases::ListRequest::default());
        let answer = self.call("Leases.List", "", client.list(request)).await?;
        Ok(answer.leases.into_iter().map(|lease| lease.id).collect())
    }

    /// Puts an existing object under a lease. Kinds are `content` and `snapshots/<snapshotter>`.
    ///
    /// # Errors
    /// As containerd.
    pub async fn add_to_lease(&self, lease: &LeaseId, kind: &str, id: &str) -> Result<(), ContainerdError> {
        let resource = leases::Resource { id: id.to_owned(), r#type: kind.to_owned() };
        let request = leases::AddResourceRequest { id: lease.0.clone(), resource: Some(resource) };
        let mut client = LeasesClient::new(self.channel.clone());
        self.call("Leases.AddResource", id, client.add_resource(self.request(None, request))).await
    }

    /// The image called `name`, if there is one.
    ///
    /// # Errors
    /// As containerd.
    pub async fn image(&self, name: &str) -> Result<Option<Descriptor>, ContainerdError> {
        let mut client = ImagesClient::new(self.channel.clone());
        let request = self.request(None, images::GetImageRequest { name: name.to_owned() });
        match self.call("Images.Get", name, client.get(request)).await {
            Ok(answer) => Ok(answer.image.and_then(|image| image.target)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All images of the namespace, by name.
    ///
    /// # Errors
    /// As containerd.
    pub async fn images(&self) -> Result<Vec<(String, Descriptor)>, ContainerdError> {
        let mut client = ImagesClient::new(self.channel.clone());
        let request = self.request(None, images::ListImagesRequest::default());
        let answer = self.call("Images.List", "", client.list(request)).await?;
        Ok(answer.images.into_iter().filter_map(|image| Some((image.name, image.target?))).collect())
    }

    /// Who made the image called `name`, if it was one of us.
    ///
    /// # Errors
    /// As containerd.
    pub async fn image_owner(&self, name: &str) -> Result<Option<String>, ContainerdError> {
        let mut client = ImagesClient::new(self.channel.clone());
        let request = self.request(None, images::GetImageRequest { name: name.to_owned() });
        match self.call("Images.Get", name, client.get(request)).await {
            Ok(answer) => Ok(answer.image.and_then(|image| image.labels.get(LABEL_OWNER).cloned())),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Forgets a name; what only it held is collected afterwards.
    ///
    /// # Errors
    /// As containerd; a name that is gone already is fine.
    pub async fn delete_image(&self, name: &str) -> Result<(), ContainerdError> {
        let mut client = ImagesClient::new(self.channel.clone());
        let request = self.request(None, images::DeleteImageRequest { name: name.to_owned(), sync: false });
        match self.call("Images.Delete", name, client.delete(request)).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// Makes `name` stand for `target`, whatever it stood for before. `owner` is noted if the name is new.
    ///
    /// # Errors
    /// As containerd.
    pub async fn set_image(&self, name: &str, target: Descriptor, owner: &str) -> Result<(), ContainerdError> {
        let labels = Labels::from([(LABEL_OWNER.to_owned(), owner.to_owned())]);
        let image = images::Image { name: name.to_owned(), target: Some(target), labels, ..Default::default() };
        let mut client = ImagesClient::new(self.channel.clone());
        let request = self.request(None, images::CreateImageRequest { image: Some(image.clone()) });
        match self.call("Images.Create", name, client.create(request)).await {
            Err(error) if error.is_already_exists() => {
                let update_mask = Some(prost_types::FieldMask { paths: vec!["target".to_owned()] });
                let request = images::UpdateImageRequest { image: Some(image), update_mask };
                self.call("Images.Update", name, client.update(self.request(None, request))).await.map(drop)
            }
            other => other.map(drop),
        }
    }

    /// A request with the metadata that containerd wants.
    fn request<T>(&self, lease: Option<&LeaseId>, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let mut put = |key: &'static str, text: &str| {
            if let Ok(value) = MetadataValue::try_from(text) {
                request.metadata_mut().insert(key, value);
            }
        };
        put("containerd-namespace", &self.namespace);
        if let Some(lease) = lease {
            put("containerd-lease", &lease.0);
        }
        request
    }

    async fn call<T>(
        &self,
        call: &'static str,
        subject: &str,
        future: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, ContainerdError> {
        self.within(CALL, call, subject, future).await
    }

    async fn within<T>(
        &self,
        limit: Duration,
        call: &'static str,
        subject: &str,
        future: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, ContainerdError> {
        match tokio::time::timeout(limit, future).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.refused(call, subject, status)),
            Err(_) => Err(ContainerdError::Late { call, subject: subject.to_owned(), after: limit }),
        }
    }

    fn refused(&self, call: &'static str, subject: &str, status: Status) -> ContainerdError {
        // containerd says Unavailable for a locked ingest too; without a transport error below it, it did answer.
        let transport = std::error::Error::source(&status)
            .and_then(|source| source.downcast_ref::<tonic::transport::Error>())
            .is_some();
        if transport {
            let mut message = status.message().to_owned();
            let mut cause = std::error::Error::source(&status).and_then(std::error::Error::source);
            while let Some(error) = cause {
                message = error.to_string();
                cause = error.source();
            }
            let source = Refusal { code: status.code(), message };
            ContainerdError::Unreachable { address: self.address.clone(), source }
        } else {
            ContainerdError::Refused { call, subject: subject.to_owned(), source: status.into() }
        }
    }
}

/// Labels on a content blob or snapshot.
pub type Labels = HashMap<String, String>;
