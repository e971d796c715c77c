//! Garbage collection of images: removes the records of unused images, their leases and views in containerd, and leases
//! without a record.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{ImageError, ImageRecord, ImageStore, store::lock};
use crate::{
    containerd::{ContainerdError, LeaseId},
    control::Garbage,
};

/// The images that task records name.
#[derive(Debug, Clone, Default)]
pub struct ImagesInUse {
    names: HashSet<String>,
    /// The leases of the images. A name alone does not identify an image, because it may stand for another one by now.
    leases: HashSet<LeaseId>,
}

/// Collects pairs of an image's name and its lease.
impl FromIterator<(String, LeaseId)> for ImagesInUse {
    fn from_iter<T: IntoIterator<Item = (String, LeaseId)>>(pairs: T) -> Self {
        let (names, leases) = pairs.into_iter().unzip();
        Self { names, leases }
    }
}

impl ImageStore {
    /// Removes images that are not in `in_use`, that no start is about to use, and that no task has used for the time
    /// `keep`. Also removes leases without a record. Returns what was removed, or would be removed without `dry_run`.
    pub async fn collect_garbage(&self, keep: Duration, in_use: &ImagesInUse, dry_run: bool) -> Vec<Garbage> {
        let mut found = Vec::new();
        for record in self.take_unused(keep, in_use, dry_run) {
            let outcome = if dry_run { Ok(()) } else { self.remove_image_of(&record, in_use).await };
            found.push(
                Garbage::removed("image", &record.reference, &outcome)
                    .with_reason("no task uses it, and none has used it within `image { keep }`"),
            );
        }
        found.extend(self.collect_unrecorded_leases(in_use, dry_run).await);
        found
    }

    /// Takes the records of unused images out of the store, or only lists them with `dry_run`. A start no longer finds
    /// such a record: it pulls the image, and waits for the removal.
    fn take_unused(&self, keep: Duration, in_use: &ImagesInUse, dry_run: bool) -> Vec<Arc<ImageRecord>> {
        let directory = self.inner().places.images();
        let mut records = lock(&self.inner().records);
        let unused: Vec<String> = records
            .values()
            .filter(|record| {
                let idle = record.last_used(&directory).and_then(|at| SystemTime::now().duration_since(at).ok());
                let is_unused = Arc::strong_count(record) == 1 && !in_use.names.contains(&record.reference);
                is_unused && idle.is_some_and(|idle| idle >= keep)
            })
            .map(|record| record.reference.clone())
            .collect();
        let take = |name: String| if dry_run { records.get(&name).cloned() } else { records.remove(&name) };
        unused.into_iter().filter_map(take).collect()
    }

    /// Removes one image.
    ///
    /// # Errors
    /// Fails when a task uses the image, the image is not stored, or containerd refuses.
    pub async fn remove(&self, name: &str, in_use: &ImagesInUse) -> Result<(), ImageError> {
        let record = {
            let mut records = lock(&self.inner().records);
            let busy =
                in_use.names.contains(name) || records.get(name).is_some_and(|record| Arc::strong_count(record) > 1);
            if busy {
                return Err(ImageError::InUse { image: name.to_owned() });
            }
            records.remove(name)
        };
        match record {
            Some(record) => self.remove_image_of(&record, in_use).await?,
            None if self.inner().client.image(name).await?.is_none() => {
                return Err(ImageError::NotStored { image: name.to_owned() });
            }
            None => {}
        }
        let _changing = self.inner().lease_lock.lock().await;
        if lock(&self.inner().records).contains_key(name) {
            return Ok(());
        }
        Ok(self.inner().client.delete_image(name).await?)
    }

    /// Removes an image whose record the caller has taken out of the store. If that fails, the record is put back: the
    /// image can still be used, and the removal can be tried again.
    async fn remove_image_of(&self, record: &Arc<ImageRecord>, in_use: &ImagesInUse) -> Result<(), ImageError> {
        let outcome = self.remove_record(record, in_use).await;
        if outcome.is_err() {
            lock(&self.inner().records).entry(record.reference.clone()).or_insert_with(|| record.clone());
        }
        outcome
    }

    /// Removes an image's record. The image's lease is removed if no other image needs it, and containerd's image
    /// record if this driver created that. The lease goes after containerd's image record: an image that could only be
    /// removed in part still has its layers.
    async fn remove_record(&self, record: &ImageRecord, in_use: &ImagesInUse) -> Result<(), ImageError> {
        let inner = self.inner();
        let _changing = inner.lease_lock.lock().await;
        // If a pull has stored an image under this name meanwhile, that image must stay.
        let is_replaced = lock(&inner.records).contains_key(&record.reference);
        if !is_replaced {
            let owner = inner.client.image_owner(&record.reference).await?;
            if owner.as_deref() == Some(inner.places.state_dir_hash().as_str()) {
                inner.client.delete_image(&record.reference).await?;
            }
        }
        if !self.leases_in_use(in_use).contains(&record.lease) {
            self.delete_lease_and_view(&record.lease).await?;
        }
        if is_replaced { Ok(()) } else { record.delete(&inner.places.images()) }
    }

    /// Deletes a lease, and the view of the same name if there is one.
    async fn delete_lease_and_view(&self, lease: &LeaseId) -> Result<(), ContainerdError> {
        let client = &self.inner().client;
        client.delete_lease(lease).await?;
        // containerd's garbage collector would remove the view as well, but on a busy host only after a minute.
        if let Err(error) = client.remove_snapshot(&lease.0).await {
            tracing::debug!(
                error = %crate::error_chain(&error),
                "could not remove the view of an image; containerd's garbage collector will remove it"
            );
        }
        Ok(())
    }

    /// Returns the leases of images that are stored or are being pulled, and of images that tasks still use although
    /// their name stands for another image by now.
    fn leases_in_use(&self, in_use: &ImagesInUse) -> HashSet<LeaseId> {
        let inner = self.inner();
        let mut leases = in_use.leases.clone();
        leases.extend(lock(&inner.pull_leases).iter().cloned());
        leases.extend(lock(&inner.records).values().map(|record| record.lease.clone()));
        let mut superseded = lock(&inner.superseded);
        superseded.retain(|record| Arc::strong_count(record) > 1);
        leases.extend(superseded.iter().map(|record| record.lease.clone()));
        leases
    }

    /// Removes this driver's leases that belong to no record and to no running pull. An earlier plugin left them when
    /// it was killed.
    pub async fn collect_unrecorded_leases(&self, in_use: &ImagesInUse, dry_run: bool) -> Vec<Garbage> {
        let inner = self.inner();
        let _changing = inner.lease_lock.lock().await;
        let prefix = self.lease_prefix();
        let leases = match inner.client.leases().await {
            Ok(leases) => leases,
            Err(error) => {
                tracing::debug!(
                    error = %crate::error_chain(&error),
                    "could not list containerd's leases; the next garbage collection tries again"
                );
                return Vec::new();
            }
        };
        let in_use_leases = self.leases_in_use(in_use);
        let mut found = Vec::new();
        for lease in leases.into_iter().filter(|lease| lease.0.starts_with(&prefix) && !in_use_leases.contains(lease)) {
            let outcome = if dry_run { Ok(()) } else { self.delete_lease_and_view(&lease).await };
            found.push(Garbage::removed("lease", &lease.0, &outcome).with_reason("no image of this driver needs it"));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::image::ImageConfiguration;

    use super::*;
    use crate::{
        containerd::Client,
        ids::Digest,
        image::{ImageConfig, Reference, record::RecordParts},
        places::Places,
    };

    #[tokio::test]
    async fn an_image_that_containerd_does_not_remove_stays_known() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let places = Places::new(directory.path().join("run"), directory.path().join("state"));
        std::fs::create_dir_all(places.images()).expect("made");
        let reference = Reference::parse("registry.example/app:1").expect("a name");
        let parts = RecordParts {
            digest: Digest::of(b"manifest"),
            chain_id: None,
            lease: LeaseId("lease".to_owned()),
            view: None,
            size: 0,
        };
        let config = ImageConfig::from(&ImageConfiguration::default());
        ImageRecord::new(&reference, parts, config).save(&places.images()).expect("saved");
        let client = Client::new(&directory.path().join("no-containerd.sock"), "test", "overlayfs");
        let store = ImageStore::open(&places, client).expect("opened");
        let name = reference.to_string();
        store.remove(&name, &ImagesInUse::default()).await.expect_err("no containerd listens");
        assert!(store.by_name(&name).is_some(), "the record is put back");
        let found = store.collect_garbage(Duration::ZERO, &ImagesInUse::default(), false).await;
        assert!(found.iter().any(|one| one.name == name && one.problem.is_some()), "{found:?}");
        assert!(store.by_name(&name).is_some(), "the record is put back");
    }
}
