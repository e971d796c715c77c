//! Images that nobody needs any more: their records, what keeps them in containerd, and leases that lost their record.

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

/// What records of tasks name.
#[derive(Debug, Clone, Default)]
pub struct InUse {
    names: HashSet<String>,
    /// A name may stand for another image by now; its lease does not.
    leases: HashSet<String>,
}

/// Of pairs of an image's name and its lease.
impl FromIterator<(String, String)> for InUse {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(pairs: T) -> Self {
        let (names, leases) = pairs.into_iter().unzip();
        Self { names, leases }
    }
}

impl ImageStore {
    /// Removes images that no task in `in_use` names, no start is about to use, and no task has used for `keep`: what
    /// it was, or, for a dry run, would be.
    pub async fn collect(&self, keep: Duration, in_use: &InUse, dry_run: bool) -> Vec<Garbage> {
        let mut found = Vec::new();
        for record in self.take_unused(keep, in_use, dry_run) {
            let outcome = if dry_run { Ok(()) } else { self.discard(&record, in_use).await };
            if outcome.is_err() {
                // Known again, and tried again.
                lock(&self.inner().records).entry(record.reference.clone()).or_insert_with(|| record.clone());
            }
            found.push(
                Garbage::removed("image", &record.reference, &outcome)
                    .because("no task uses it, and none has for as long as images are kept"),
            );
        }
        found.extend(self.collect_leases(in_use, dry_run).await);
        found
    }

    /// From here on a start does not find them: it pulls, and waits for the removal.
    fn take_unused(&self, keep: Duration, in_use: &InUse, dry_run: bool) -> Vec<Arc<ImageRecord>> {
        let directory = self.inner().places.images();
        let mut records = lock(&self.inner().records);
        let unused: Vec<String> = records
            .values()
            .filter(|record| {
                let idle = record.last_used(&directory).and_then(|at| SystemTime::now().duration_since(at).ok());
                let free = Arc::strong_count(record) == 1 && !in_use.names.contains(&record.reference);
                free && idle.is_some_and(|idle| idle >= keep)
            })
            .map(|record| record.reference.clone())
            .collect();
        let take = |name: String| if dry_run { records.get(&name).cloned() } else { records.remove(&name) };
        unused.into_iter().filter_map(take).collect()
    }

    /// Removes one image.
    ///
    /// # Errors
    /// When a task uses it, it is not here, or containerd refuses.
    pub async fn remove(&self, name: &str, in_use: &InUse) -> Result<(), ImageError> {
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
            Some(record) => self.discard(&record, in_use).await?,
            None if self.inner().client.image(name).await?.is_none() => {
                return Err(ImageError::NotHere { image: name.to_owned() });
            }
            None => {}
        }
        let _changing = self.inner().leases.lock().await;
        if lock(&self.inner().records).contains_key(name) {
            return Ok(());
        }
        Ok(self.inner().client.delete_image(name).await?)
    }

    /// containerd's lease goes with its last name; its image record only if a pull of ours made it.
    async fn discard(&self, record: &ImageRecord, in_use: &InUse) -> Result<(), ImageError> {
        let inner = self.inner();
        let _changing = inner.leases.lock().await;
        if !self.leases_in_use(in_use).contains(&record.lease) {
            self.release(&record.lease).await?;
        }
        // It came back meanwhile, and what has its name now is somebody's.
        if lock(&inner.records).contains_key(&record.reference) {
            return Ok(());
        }
        if inner.client.image_owner(&record.reference).await?.as_deref() == Some(inner.places.identity().as_str()) {
            inner.client.delete_image(&record.reference).await?;
        }
        record.forget(&inner.places.images())
    }

    /// Gives up a lease, and the view of its name if it has one.
    async fn release(&self, lease: &str) -> Result<(), ContainerdError> {
        let client = &self.inner().client;
        client.delete_lease(&LeaseId(lease.to_owned())).await?;
        // containerd's collector would take the view with it, some time: on a busy host that is after a minute.
        if let Err(error) = client.remove_snapshot(lease).await {
            tracing::debug!(error = %crate::chain(&error), "a view is left to containerd's own collection");
        }
        Ok(())
    }

    /// Of images that are here or are being pulled, and of those that tasks still use though their name has moved on.
    fn leases_in_use(&self, in_use: &InUse) -> HashSet<String> {
        let inner = self.inner();
        let mut leases = in_use.leases.clone();
        leases.extend(lock(&inner.pulls).iter().cloned());
        leases.extend(lock(&inner.records).values().map(|record| record.lease.clone()));
        let mut retired = lock(&inner.retired);
        retired.retain(|record| Arc::strong_count(record) > 1);
        leases.extend(retired.iter().map(|record| record.lease.clone()));
        leases
    }

    /// Leases of ours without a record or a pull: an earlier instance of us was cut off.
    pub async fn collect_leases(&self, in_use: &InUse, dry_run: bool) -> Vec<Garbage> {
        let inner = self.inner();
        let _changing = inner.leases.lock().await;
        let ours = self.lease_prefix();
        let leases = match inner.client.leases().await {
            Ok(leases) => leases,
            Err(error) => {
                tracing::debug!(%error, "leases are looked at another time");
                return Vec::new();
            }
        };
        let claimed = self.leases_in_use(in_use);
        let mut found = Vec::new();
        for lease in leases.into_iter().filter(|lease| lease.starts_with(&ours) && !claimed.contains(lease)) {
            let outcome = if dry_run { Ok(()) } else { self.release(&lease).await };
            found.push(Garbage::removed("lease", &lease, &outcome).because("no image of ours needs it"));
        }
        found
    }
}
