//! The calls of containerd for snapshots, and for unpacking layers into them.

use std::time::Duration;

use super::{Client, ContainerdError, Labels, LeaseId};
use crate::{
    ids::{ChainId, Digest},
    pb::{
        services::{
            diff::v1::{ApplyRequest, diff_client::DiffClient},
            snapshots::v1::{
                CommitSnapshotRequest, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
                RemoveSnapshotRequest, StatSnapshotRequest, ViewSnapshotRequest, snapshots_client::SnapshotsClient,
            },
        },
        types::{Descriptor, Mount},
    },
};

/// The timeout of unpacking one layer, which may be gigabytes on a slow disk. Users set the timeout of the whole pull;
/// this one only ends a call that hangs.
const APPLY_TIMEOUT: Duration = Duration::from_secs(30 * 60);

impl Client {
    fn snapshots(&self) -> SnapshotsClient<tonic::transport::Channel> {
        SnapshotsClient::new(self.channel.clone())
    }

    /// Returns the kind that this client's snapshots have as objects of a lease.
    pub fn snapshot_kind(&self) -> String {
        format!("snapshots/{}", self.snapshotter)
    }

    /// Returns whether the snapshot `key` exists.
    ///
    /// # Errors
    /// Fails when a call to containerd fails.
    pub async fn has_snapshot(&self, key: &str) -> Result<bool, ContainerdError> {
        let request = StatSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        match self.call("Snapshots.Stat", key, self.snapshots().stat(self.request(None, request))).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Creates the writable snapshot `key` on `parent`, adds it to the lease, and returns its mounts.
    ///
    /// # Errors
    /// Fails when a call to containerd fails.
    pub async fn prepare_snapshot(
        &self,
        lease: &LeaseId,
        key: &str,
        parent: Option<&ChainId>,
        labels: Labels,
    ) -> Result<Vec<Mount>, ContainerdError> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.map(ToString::to_string).unwrap_or_default(),
            labels,
        };
        let answer =
            self.call("Snapshots.Prepare", key, self.snapshots().prepare(self.request(Some(lease), request))).await?;
        Ok(answer.mounts)
    }

    /// Creates the read-only view `key` of `parent`, or uses an existing one, adds it to the lease, and returns its
    /// mounts.
    ///
    /// # Errors
    /// Fails when a call to containerd fails.
    pub async fn view_snapshot(
        &self,
        lease: &LeaseId,
        key: &str,
        parent: &ChainId,
    ) -> Result<Vec<Mount>, ContainerdError> {
        let request = ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_string(),
            labels: Labels::new(),
        };
        match self.call("Snapshots.View", key, self.snapshots().view(self.request(Some(lease), request))).await {
            Ok(answer) => Ok(answer.mounts),
            Err(error) if error.is_already_exists() => {
                self.add_to_lease(lease, &self.snapshot_kind(), key).await?;
                let request = MountsRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
                let answer =
                    self.call("Snapshots.Mounts", key, self.snapshots().mounts(self.request(None, request))).await?;
                Ok(answer.mounts)
            }
            Err(error) => Err(error),
        }
    }

    /// Unpacks a layer into `mounts`, and returns the digest of the uncompressed stream.
    ///
    /// # Errors
    /// Fails when a call to containerd fails.
    pub async fn apply_layer(&self, layer: Descriptor, mounts: Vec<Mount>) -> Result<Digest, ContainerdError> {
        let subject = layer.digest.clone();
        let request = self.request(None, ApplyRequest { diff: Some(layer), mounts });
        let mut client = DiffClient::new(self.channel.clone());
        let answer = self.call_within(APPLY_TIMEOUT, "Diff.Apply", &subject, client.apply(request)).await?;
        let digest = answer.applied.map(|applied| applied.digest).unwrap_or_default();
        Digest::new(&digest).map_err(|error| ContainerdError::MalformedAnswer {
            call: "Diff.Apply",
            subject,
            problem: error.to_string(),
        })
    }

    /// Commits the writable snapshot `key` as the permanent snapshot `name`.
    ///
    /// # Errors
    /// Fails when the call to containerd fails, and with `AlreadyExists` when another pull has already committed
    /// `name`.
    pub async fn commit_snapshot(
        &self,
        lease: &LeaseId,
        key: &str,
        name: &ChainId,
        labels: Labels,
    ) -> Result<(), ContainerdError> {
        let request = CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.to_string(),
            key: key.to_owned(),
            labels,
        };
        // The snapshotter counts every file of the layer before it answers.
        let request = self.request(Some(lease), request);
        self.call_within(APPLY_TIMEOUT, "Snapshots.Commit", name.as_str(), self.snapshots().commit(request)).await
    }

    /// Removes a snapshot. Succeeds if the snapshot is gone already.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn remove_snapshot(&self, key: &str) -> Result<(), ContainerdError> {
        let request = RemoveSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        match self.call("Snapshots.Remove", key, self.snapshots().remove(self.request(None, request))).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// Returns the keys of all snapshots of the namespace.
    ///
    /// # Errors
    /// Fails when a call to containerd fails.
    pub async fn snapshot_keys(&self) -> Result<Vec<String>, ContainerdError> {
        let request = ListSnapshotsRequest { snapshotter: self.snapshotter.clone(), ..Default::default() };
        let mut stream = self.call("Snapshots.List", "", self.snapshots().list(self.request(None, request))).await?;
        let mut keys = Vec::new();
        while let Some(part) = self.next_message("Snapshots.List", "", &mut stream).await? {
            keys.extend(part.info.into_iter().map(|info| info.name));
        }
        Ok(keys)
    }
}
