//! A client of containerd's image services: leases, content, snapshots, diff and image records (containerd 1.6 to 2.x).
//!
//! Starting a task whose image is cached makes none of these calls. Only pulls, the image list and the fingerprint do.

mod content;
pub mod private;
mod snapshots;
mod tasks;

pub use content::BlobWriter;

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
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

/// The timeout of a call. containerd answers metadata calls in milliseconds, but was seen to take seconds on a busy
/// disk (bolt's fsync).
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// The timeout of the check whether containerd is running. The check is made often, so the timeout is short.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// The largest message, which is containerd's own limit.
const MESSAGE_MAX: usize = 16 << 20;

/// The status with which containerd, or the transport, refused a call.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The gRPC status code.
    pub code: Code,
    /// The message.
    pub message: String,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self { code: status.code(), message: status.message().to_owned() }
    }
}

/// The reason why a call to containerd failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ContainerdError {
    /// No daemon listens at the socket, or the daemon has stopped during the call.
    #[error("could not reach containerd at {address}")]
    Unreachable {
        /// containerd's socket.
        address: PathBuf,
        /// The error of the transport.
        source: Refusal,
    },
    /// containerd refused the call.
    #[error("containerd refused {call} {subject}")]
    Refused {
        /// The method that was called.
        call: &'static str,
        /// The object of the call.
        subject: String,
        /// The refusal.
        source: Refusal,
    },
    /// containerd did not answer in time.
    #[error("containerd did not answer {call} {subject} within {} s", after.as_secs())]
    TimedOut {
        /// The method that was called.
        call: &'static str,
        /// The object of the call.
        subject: String,
        /// The timeout of the call.
        after: Duration,
    },
    /// containerd answered in a way that no version of it should.
    #[error("containerd gave a faulty answer to {call} {subject}: {problem}")]
    MalformedAnswer {
        /// The method that was called.
        call: &'static str,
        /// The object of the call.
        subject: String,
        /// What is wrong with the answer.
        problem: String,
    },
}

impl ContainerdError {
    /// Returns whether containerd answered "not found".
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(Code::NotFound)
    }

    /// Returns whether containerd answered "already exists".
    pub fn is_already_exists(&self) -> bool {
        self.code() == Some(Code::AlreadyExists)
    }

    /// Returns what has to change before another attempt can succeed: the host's state or the job.
    pub fn failure_cause(&self) -> Cause {
        match self {
            Self::Unreachable { .. } | Self::TimedOut { .. } | Self::MalformedAnswer { .. } => Cause::Host,
            // containerd returns most errors of Go code with the code Unknown, so the message is classified before the
            // code.
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

/// A client of one containerd, for one of its namespaces and one of its snapshotters. A clone is cheap and uses the
/// same connection. The client connects at its first call, and again after a restart of the daemon.
#[derive(Debug, Clone)]
pub struct Client {
    address: PathBuf,
    namespace: String,
    snapshotter: String,
    channel: Channel,
}

/// The id of a lease. Objects that are created by a call with a lease belong to that lease.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LeaseId(pub String);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// containerd's label for the expiry of a lease (an RFC 3339 time), after which containerd's garbage collector deletes
/// the lease.
const LABEL_EXPIRE: &str = "containerd.io/gc.expire";

/// This driver's label on an image record. Its value identifies the state directory of the driver whose pull has
/// created the record.
const LABEL_OWNER: &str = "nomad-driver-shim/owner";

impl Client {
    /// Creates a client for the socket at `address`. No connection is made yet.
    pub fn new(address: &Path, namespace: &str, snapshotter: &str) -> Self {
        let socket = address.to_owned();
        // The URI is never used: the connector dials the socket.
        let channel = Endpoint::from_static("http://containerd")
            .connect_timeout(PROBE_TIMEOUT)
            .connect_with_connector_lazy(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
            }));
        Self {
            address: address.to_owned(),
            namespace: namespace.to_owned(),
            snapshotter: snapshotter.to_owned(),
            channel,
        }
    }

    /// Returns the name of the snapshotter that this client uses.
    pub fn snapshotter(&self) -> &str {
        &self.snapshotter
    }

    /// Returns the path of containerd's socket.
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// Returns containerd's version and revision.
    ///
    /// # Errors
    /// Fails when containerd does not answer within 2 s.
    pub async fn version(&self) -> Result<(String, String), ContainerdError> {
        let mut client = VersionClient::new(self.channel.clone());
        let answer = self.call_within(PROBE_TIMEOUT, "Version", "", client.version(self.request(None, ()))).await?;
        Ok((answer.version, answer.revision))
    }

    /// Creates a lease. `expires` is an RFC 3339 time after which containerd deletes the lease by itself; with `None`
    /// the lease does not expire. Succeeds if the lease exists already.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn create_lease(&self, lease: &LeaseId, expires: Option<String>) -> Result<(), ContainerdError> {
        let labels = expires.map(|time| (LABEL_EXPIRE.to_owned(), time)).into_iter().collect();
        let request = leases::CreateRequest { id: lease.0.clone(), labels };
        let mut client = LeasesClient::new(self.channel.clone());
        match self.call("Leases.Create", &lease.0, client.create(self.request(None, request))).await {
            Err(error) if !error.is_already_exists() => Err(error),
            _ => Ok(()),
        }
    }

    /// Deletes a lease. containerd's garbage collector then removes the objects that only this lease kept. Succeeds if
    /// the lease is gone already.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn delete_lease(&self, lease: &LeaseId) -> Result<(), ContainerdError> {
        let mut client = LeasesClient::new(self.channel.clone());
        let request = leases::DeleteRequest { id: lease.0.clone(), sync: false };
        match self.call("Leases.Delete", &lease.0, client.delete(self.request(None, request))).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// Returns the ids of all leases of the namespace.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn leases(&self) -> Result<Vec<LeaseId>, ContainerdError> {
        let mut client = LeasesClient::new(self.channel.clone());
        let request = self.request(None, leases::ListRequest::default());
        let answer = self.call("Leases.List", "", client.list(request)).await?;
        Ok(answer.leases.into_iter().map(|lease| LeaseId(lease.id)).collect())
    }

    /// Adds an existing object to a lease. The kind is `content` or `snapshots/<snapshotter>`.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn add_to_lease(&self, lease: &LeaseId, kind: &str, id: &str) -> Result<(), ContainerdError> {
        let resource = leases::Resource { id: id.to_owned(), r#type: kind.to_owned() };
        let request = leases::AddResourceRequest { id: lease.0.clone(), resource: Some(resource) };
        let mut client = LeasesClient::new(self.channel.clone());
        self.call("Leases.AddResource", id, client.add_resource(self.request(None, request))).await
    }

    /// Returns the target of the image record `name`, if there is such a record.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn image(&self, name: &str) -> Result<Option<Descriptor>, ContainerdError> {
        let mut client = ImagesClient::new(self.channel.clone());
        let request = self.request(None, images::GetImageRequest { name: name.to_owned() });
        match self.call("Images.Get", name, client.get(request)).await {
            Ok(answer) => Ok(answer.image.and_then(|image| image.target)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns the names and targets of all image records of the namespace.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn images(&self) -> Result<Vec<(String, Descriptor)>, ContainerdError> {
        let mut client = ImagesClient::new(self.channel.clone());
        let request = self.request(None, images::ListImagesRequest::default());
        let answer = self.call("Images.List", "", client.list(request)).await?;
        Ok(answer.images.into_iter().filter_map(|image| Some((image.name, image.target?))).collect())
    }

    /// Returns the owner in the label of the image record `name`. Returns `None` if there is no such record, or if this
    /// driver has not created it.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn image_owner(&self, name: &str) -> Result<Option<String>, ContainerdError> {
        let mut client = ImagesClient::new(self.channel.clone());
        let request = self.request(None, images::GetImageRequest { name: name.to_owned() });
        match self.call("Images.Get", name, client.get(request)).await {
            Ok(answer) => Ok(answer.image.and_then(|image| image.labels.get(LABEL_OWNER).cloned())),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes the image record `name`. containerd's garbage collector then removes the objects that only this record
    /// kept. Succeeds if the record is gone already.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn delete_image(&self, name: &str) -> Result<(), ContainerdError> {
        let mut client = ImagesClient::new(self.channel.clone());
        let request = self.request(None, images::DeleteImageRequest { name: name.to_owned(), sync: false });
        match self.call("Images.Delete", name, client.delete(request)).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// Creates the image record `name` with this target, or changes the target of an existing record. A new record is
    /// labelled with `owner`.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
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

    /// Creates a request with the metadata that containerd requires.
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

    /// Makes a call with the usual timeout. `subject` names the object of the call in errors.
    async fn call<T>(
        &self,
        call: &'static str,
        subject: &str,
        future: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, ContainerdError> {
        self.call_within(CALL_TIMEOUT, call, subject, future).await
    }

    async fn call_within<T>(
        &self,
        limit: Duration,
        call: &'static str,
        subject: &str,
        future: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, ContainerdError> {
        match tokio::time::timeout(limit, future).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.refused(call, subject, status)),
            Err(_) => Err(ContainerdError::TimedOut { call, subject: subject.to_owned(), after: limit }),
        }
    }

    fn refused(&self, call: &'static str, subject: &str, status: Status) -> ContainerdError {
        // containerd answers Unavailable for a locked ingest, too. So only a status whose cause is an error of the
        // transport means that containerd has not answered.
        let is_transport_error = std::error::Error::source(&status)
            .and_then(|source| source.downcast_ref::<tonic::transport::Error>())
            .is_some();
        if is_transport_error {
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

/// The labels of a blob, snapshot, lease or image record.
pub type Labels = HashMap<String, String>;
