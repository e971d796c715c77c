//! The images of one driver: image records in memory, and pulls. Callers with the same request share one pull.

use std::{
    collections::{HashMap, HashSet},
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{Shared, WeakShared},
};
use parking_lot::Mutex;

use super::{
    Credentials, ImageConfig, ImageError, ImageRecord, Progress, Reference, SharedPullError,
    manifest::{self, Document, Manifest},
    pull::{self, CONFIG_MAX, FetchedImage, PullLease},
    pull_context::PullContext,
    record::RecordParts,
    registry::HttpClients,
    unpack::{self, Accounts},
    view::LayerStack,
};
use crate::{
    containerd::{Client, Labels, LeaseId},
    file_id::FileId,
    ids::{ChainId, Digest, random_hex},
    pb::types::{Descriptor, Mount},
    places::Places,
};

/// The largest manifest that is read from containerd's store, where `ctr` may have put it. It is the limit of
/// distribution, the reference registry.
const MANIFEST_MAX: usize = 4 << 20;

type PullResult = Result<Arc<ImageRecord>, SharedPullError>;
/// The properties in which two requests must be equal to share a pull. The credentials are among them, so that a caller
/// with other credentials gets an answer of its own.
type PullKey = (Reference, Option<Credentials>, Option<FileId>, PullPolicy);
type PullFuture = Pin<Box<dyn Future<Output = PullResult> + Send>>;

/// The condition under which an image is requested from its registry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum PullPolicy {
    /// The registry is asked when a part of the image is missing in containerd's store.
    #[default]
    Missing,
    /// The registry is asked at every pull, because the stored image may be an older one of the same name.
    Always,
    /// The registry is never asked.
    Never,
}

/// The parameters of a pull.
#[derive(Debug, Clone)]
pub struct PullRequest {
    /// The image.
    pub reference: Reference,
    /// The credentials for the image's registry.
    pub credentials: Option<Credentials>,
    /// The descriptor of an image in files, if the caller has already checked and opened it.
    pub opened: Option<Arc<OwnedFd>>,
    /// The time for which the caller waits.
    pub timeout: Duration,
    /// The listener to the pull's progress. Where several callers share a pull, only the first caller's is used.
    pub progress: Progress,
    /// The condition under which the registry is asked.
    pub policy: PullPolicy,
}

/// The images of one driver. A clone is cheap and refers to the same images.
#[derive(Clone)]
pub struct ImageStore(Arc<Inner>);

pub(super) struct Inner {
    pub(super) places: Places,
    pub(super) client: Client,
    http: HttpClients,
    pub(super) records: Mutex<HashMap<String, Arc<ImageRecord>>>,
    shared_pulls: Mutex<HashMap<PullKey, WeakShared<PullFuture>>>,
    /// Records whose name stands for another image by now, but which a start or a task still uses.
    pub(super) superseded: Mutex<Vec<Arc<ImageRecord>>>,
    /// The leases of running pulls.
    pub(super) pull_leases: Mutex<HashSet<LeaseId>>,
    /// Locked while a lease and its record are created or removed, because several names may share a lease.
    pub(super) lease_lock: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for ImageStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageStore").field("places", &self.0.places).finish_non_exhaustive()
    }
}

impl ImageStore {
    /// Reads the records. containerd is not called.
    ///
    /// # Errors
    /// Fails when the directory of the records can't be read.
    pub fn open(places: &Places, client: Client) -> Result<Self, ImageError> {
        let records = ImageRecord::load_all(&places.images())?
            .into_iter()
            .map(|record| (record.reference.clone(), Arc::new(record)))
            .collect();
        Ok(Self(Arc::new(Inner {
            places: places.clone(),
            client,
            http: HttpClients::default(),
            records: Mutex::new(records),
            shared_pulls: Mutex::default(),
            superseded: Mutex::default(),
            pull_leases: Mutex::default(),
            lease_lock: tokio::sync::Mutex::default(),
        })))
    }

    /// Removes the mounts of images that a killed plugin has left. A failure is logged, since it disturbs no pull.
    pub fn remove_stale_views(&self) {
        if let Err(error) = unpack::remove_stale_views(&self.0.places.images()) {
            tracing::warn!(%error, "could not remove the mounts of images that an earlier plugin has left");
        }
    }

    pub(super) fn inner(&self) -> &Inner {
        &self.0
    }

    /// Returns the record of an image that is stored. For an image in files, the file must not have changed since.
    pub fn cached(&self, reference: &Reference, opened: Option<&OwnedFd>) -> Option<Arc<ImageRecord>> {
        let record = self.by_name(&reference.to_string())?;
        match reference.archive() {
            None => Some(record),
            Some(archive) => {
                let stamp = archive.file_id(opened).ok();
                (stamp.is_some() && record.stamp == stamp).then_some(record)
            }
        }
    }

    /// Returns the record of an image by its completed name.
    pub fn by_name(&self, name: &str) -> Option<Arc<ImageRecord>> {
        lock(&self.0.records).get(name).cloned()
    }

    /// Stores the current time as the time of an image's last use, after a task that used it was destroyed.
    pub fn touch(&self, name: &str) {
        if let Some(record) = self.by_name(name) {
            record.touch(&self.0.places.images());
        }
    }

    /// Returns all records, sorted by name.
    pub fn records(&self) -> Vec<Arc<ImageRecord>> {
        let mut records: Vec<_> = lock(&self.0.records).values().cloned().collect();
        records.sort_by(|a, b| a.reference.cmp(&b.reference));
        records
    }

    /// Removes a record whose directories no longer exist, because containerd's store was emptied. The next caller
    /// pulls the image again.
    pub fn discard_stale(&self, record: &ImageRecord) {
        lock(&self.0.records).remove(&record.reference);
        if let Err(error) = record.delete(&self.0.places.images()) {
            tracing::warn!(error = %crate::error_chain(&error), "could not remove the record of an image whose layers are gone");
        }
    }

    /// Pulls the image if that is necessary, and returns its record. Callers that want the same image with the same
    /// credentials share one pull. The pull runs as long as at least one of them waits.
    ///
    /// # Errors
    /// Fails when the pull fails, or is not complete within the request's `timeout`.
    pub async fn pull(&self, request: PullRequest) -> PullResult {
        let PullRequest { reference, credentials, opened, timeout, progress, policy } = request;
        // The file's identity is taken before the file is read. If the file changes meanwhile, the next caller finds
        // another identity and reads the file again.
        let stamp = reference.archive().and_then(|archive| archive.file_id(opened.as_deref()).ok());
        let pull = {
            let mut pulls = lock(&self.0.shared_pulls);
            pulls.retain(|_, pull| pull.upgrade().is_some_and(|pull| pull.peek().is_none()));
            let key = (reference.clone(), credentials.clone(), stamp, policy);
            match pulls.get(&key).and_then(WeakShared::upgrade) {
                Some(running) => running,
                None => {
                    let (store, reference) = (self.clone(), reference.clone());
                    let work = async move {
                        store.run_pull(&reference, credentials.as_ref(), (opened, stamp), (policy, &progress)).await
                    };
                    let new: Shared<PullFuture> = (Box::pin(work) as PullFuture).shared();
                    if let Some(weak) = new.downgrade() {
                        pulls.insert(key, weak);
                    }
                    new
                }
            }
        };
        tokio::time::timeout(timeout, pull)
            .await
            .unwrap_or_else(|_| Err(Arc::new(ImageError::Timeout { image: reference.to_string(), after: timeout })))
    }

    async fn run_pull(
        &self,
        reference: &Reference,
        credentials: Option<&Credentials>,
        (opened, stamp): (Option<Arc<OwnedFd>>, Option<FileId>),
        (policy, progress): (PullPolicy, &Progress),
    ) -> PullResult {
        let name = reference.to_string();
        let client = &self.0.client;
        let work = async {
            let protected = self.protect_new_lease();
            let lease = PullLease::create(client, protected.0.clone()).await?;
            let local = match (reference, policy) {
                // containerd may have an older image under this name.
                (Reference::Archive(_), _) | (_, PullPolicy::Always) => None,
                (Reference::Registry(_), _) => self.find_in_containerd(reference, progress, lease.id()).await?,
            };
            let is_in_containerd = local.is_some();
            let (fetched, chain) = match local {
                Some(found) => found,
                None if policy == PullPolicy::Never && reference.archive().is_none() => {
                    return Err(ImageError::NotStored { image: name.clone() });
                }
                None => {
                    let context = PullContext { client, http: &self.0.http, credentials, opened, progress };
                    let fetched = pull::fetch(&context, reference, lease.id()).await?;
                    let chain = self.unpack(reference, &fetched, progress, lease.id()).await?;
                    (fetched, chain)
                }
            };
            // The account files are checked first, because everything that is created from here on outlives the pull.
            let accounts = self.read_accounts(reference, chain.as_ref(), lease.id()).await?;
            if !is_in_containerd {
                client.set_image(&name, fetched.target.clone(), &self.0.places.state_dir_hash()).await?;
            }
            let record = self.save_record(reference, &fetched, chain, (stamp, accounts)).await?;
            lease.release().await?;
            Ok::<_, ImageError>(record)
        };
        work.await.map_err(Arc::new)
    }

    /// Makes a name for the lease of a pull, and protects that lease from garbage collection until the guard is
    /// dropped.
    fn protect_new_lease(&self) -> ProtectedLease<'_> {
        let lease = LeaseId(format!("{}pull-{}", self.lease_prefix(), random_hex(8)));
        lock(&self.0.pull_leases).insert(lease.clone());
        ProtectedLease(lease, &self.0.pull_leases)
    }

    /// Returns the prefix of the names of this driver's leases.
    pub(super) fn lease_prefix(&self) -> String {
        format!("nomad-driver-shim-{}-", self.0.places.state_dir_hash())
    }

    /// Looks for the image in containerd's store, where any client of containerd may have pulled it. Returns `None`
    /// when the store does not have the image, or lacks a part of it for this host's platform.
    async fn find_in_containerd(
        &self,
        reference: &Reference,
        progress: &Progress,
        lease: &LeaseId,
    ) -> Result<Option<(FetchedImage, Option<ChainId>)>, ImageError> {
        let Some(target) = self.0.client.image(&reference.to_string()).await? else { return Ok(None) };
        match self.read_from_containerd(reference, target).await {
            Ok(fetched) => match self.unpack(reference, &fetched, progress, lease).await {
                Ok(chain) => Ok(Some((fetched, chain))),
                Err(ImageError::Containerd(error)) if error.is_not_found() => Ok(None),
                Err(error) => Err(error),
            },
            // Blobs are missing, because the image was pulled for another platform, or only its metadata was pulled.
            // The registry has them.
            Err(ImageError::Containerd(error)) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn read_from_containerd(
        &self,
        reference: &Reference,
        target: Descriptor,
    ) -> Result<FetchedImage, ImageError> {
        let client = &self.0.client;
        let digest_of = |text: &str| {
            Digest::new(text).map_err(|error| ImageError::Malformed {
                image: reference.to_string(),
                what: "image record of containerd",
                digest: Digest::of(text.as_bytes()),
                problem: error.to_string(),
            })
        };
        let digest = digest_of(&target.digest)?;
        let mut document =
            manifest::parse(reference, &target.media_type, &client.read_blob(&digest, MANIFEST_MAX).await?)?;
        if let Document::Index(chosen) = document {
            document = manifest::parse(reference, "", &client.read_blob(&chosen, MANIFEST_MAX).await?)?;
        }
        let Document::Manifest(manifest) = document else {
            let problem = "it points to another index".to_owned();
            return Err(ImageError::Malformed { image: reference.to_string(), what: "index", digest, problem });
        };
        let config = client.read_blob(&manifest.config, CONFIG_MAX).await?;
        Ok(FetchedImage { target, manifest, config })
    }

    async fn unpack(
        &self,
        reference: &Reference,
        fetched: &FetchedImage,
        progress: &Progress,
        lease: &LeaseId,
    ) -> Result<Option<ChainId>, ImageError> {
        let Manifest { layers, config } = &fetched.manifest;
        let (_, diff_ids) = manifest::parse_config(reference, &fetched.manifest, &fetched.config)?;
        let layers: Vec<_> = layers.iter().cloned().zip(diff_ids).collect();
        let client = &self.0.client;
        let chain = unpack::unpack(client, reference, lease, &layers, progress).await?;
        if let Some(chain) = &chain {
            // This label protects the unpacked layers from garbage collection for as long as the image exists, also
            // when another client of containerd uses the image.
            let label = format!("containerd.io/gc.ref.snapshot.{}", client.snapshotter());
            client.add_blob_to_lease(lease, config, Labels::from([(label, chain.to_string())])).await?;
        }
        Ok(chain)
    }

    /// Reads the image's passwd and group files through a view, which is removed before the function returns.
    async fn read_accounts(
        &self,
        reference: &Reference,
        chain: Option<&ChainId>,
        lease: &LeaseId,
    ) -> Result<Accounts, ImageError> {
        let Some(chain) = chain else { return Ok(Accounts::default()) };
        let Inner { places, client, .. } = &*self.0;
        // The key of the view is the lease's name, which no other pull has.
        let mounts = client.view_snapshot(lease, &lease.0, chain).await?;
        let (named, scratch) = (reference.clone(), places.images());
        let read = match self.checked_layers(reference, &mounts).await {
            Ok(stack) => tokio::task::spawn_blocking(move || unpack::read_accounts(&named, &stack, &scratch)).await,
            Err(error) => Ok(Err(error)),
        };
        client.remove_snapshot(&lease.0).await?;
        read.unwrap_or_else(|join| {
            Err(ImageError::StoreFile { path: places.images(), source: std::io::Error::other(join) })
        })
    }

    /// Creates the image's lease and a view of the layers under it, and writes the record.
    async fn save_record(
        &self,
        reference: &Reference,
        fetched: &FetchedImage,
        chain: Option<ChainId>,
        (stamp, accounts): (Option<FileId>, Accounts),
    ) -> Result<Arc<ImageRecord>, ImageError> {
        let Inner { places, client, .. } = &*self.0;
        let (configuration, _) = manifest::parse_config(reference, &fetched.manifest, &fetched.config)?;
        let digest = Digest::new(&fetched.target.digest).map_err(|error| ImageError::Malformed {
            image: reference.to_string(),
            what: "target",
            digest: fetched.manifest.config.clone(),
            problem: error.to_string(),
        })?;
        // Images with the same layers share one lease and one view in each driver, however many names they have.
        let layers = chain.as_ref().map_or("empty", ChainId::as_str).trim_start_matches("sha256:");
        let name = format!("{}{}", self.lease_prefix(), &layers[..layers.len().min(20)]);
        let lease = LeaseId(name.clone());
        let _changing = self.0.lease_lock.lock().await;
        let (view, stack) = match &chain {
            Some(chain) => {
                client.create_lease(&lease, None).await?;
                let mounts = client.view_snapshot(&lease, &name, chain).await?;
                (Some(name), self.checked_layers(reference, &mounts).await?)
            }
            None => (None, LayerStack { lowers: vec![self.empty_layer()?], options: Vec::new() }),
        };
        let parts = RecordParts {
            digest,
            chain_id: chain,
            lease,
            view,
            size: fetched.manifest.layers.iter().map(|layer| layer.size).sum(),
        };
        let mut record = ImageRecord::new(reference, parts, ImageConfig::from(&configuration));
        (record.passwd, record.group) = (accounts.passwd, accounts.group);
        (record.lowers, record.overlay_options, record.stamp) = (stack.lowers, stack.options, stamp);
        record.save(&places.images())?;
        let record = Arc::new(record);
        if let Some(old) = lock(&self.0.records).insert(record.reference.clone(), record.clone())
            && old.lease != record.lease
        {
            lock(&self.0.superseded).push(old);
        }
        Ok(record)
    }

    /// Reads the layers of a view and checks them as `view` describes.
    async fn checked_layers(&self, reference: &Reference, mounts: &[Mount]) -> Result<LayerStack, ImageError> {
        let refused = |source| ImageError::SnapshotterMounts {
            image: reference.to_string(),
            snapshotter: self.0.client.snapshotter().to_owned(),
            source,
        };
        let stack = LayerStack::from_mounts(mounts).map_err(refused)?;
        let checked = stack.clone();
        let outcome = tokio::task::spawn_blocking(move || checked.check_ownership()).await;
        let path = self.0.places.images();
        outcome
            .map_err(|join| ImageError::StoreFile { path, source: std::io::Error::other(join) })?
            .map_err(refused)?;
        Ok(stack)
    }

    /// Creates and returns the empty directory that is the lower layer of an image without layers.
    fn empty_layer(&self) -> Result<std::path::PathBuf, ImageError> {
        let path = self.0.places.empty_layer();
        crate::files::create_public_dir(&path)
            .map_err(|source| ImageError::StoreFile { path: path.clone(), source })?;
        Ok(path)
    }
}

/// A guard that protects the lease of a running pull from garbage collection until it is dropped.
struct ProtectedLease<'a>(LeaseId, &'a Mutex<HashSet<LeaseId>>);

impl Drop for ProtectedLease<'_> {
    fn drop(&mut self) {
        lock(self.1).remove(&self.0);
    }
}

/// Locks a mutex.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> parking_lot::MutexGuard<'_, T> {
    mutex.lock()
}
