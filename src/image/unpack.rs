//! From blobs to directories: layers applied into containerd's snapshotter, and the view that keeps them.

use std::{fs, io, path::Path};

use nix::mount::{MntFlags, umount2};

use super::{
    ImageError, Reference,
    manifest::Layer,
    pull::{Progress, PullEvent},
    view::Stack,
};
use crate::{
    accounts::{self, AccountsError},
    containerd::{Client, Labels, LeaseId},
    ids::{ChainId, Digest, random_hex},
};

/// Makes sure that all layers are unpacked: the name of the whole stack, None for an image without layers.
///
/// # Errors
/// When containerd can't unpack one, or unpacks something else than the configuration says.
pub async fn unpack(
    client: &Client,
    reference: &Reference,
    lease: &LeaseId,
    layers: &[(Layer, Digest)],
    progress: &Progress,
) -> Result<Option<ChainId>, ImageError> {
    let chains: Vec<ChainId> = layers
        .iter()
        .scan(None, |parent: &mut Option<ChainId>, (_, diff)| {
            *parent = Some(ChainId::next(parent.as_ref(), diff));
            parent.clone()
        })
        .collect();
    let Some(top) = chains.last() else { return Ok(None) };
    if !kept(client, lease, top).await? {
        for (n, ((layer, diff), chain)) in layers.iter().zip(&chains).enumerate() {
            if !kept(client, lease, chain).await? {
                let parent = n.checked_sub(1).map(|below| &chains[below]);
                apply(client, reference, lease, Step { layer, diff, parent, chain }).await?;
            }
            progress.tell(PullEvent::Unpacked(n + 1, layers.len()));
        }
    }
    Ok(Some(top.clone()))
}

/// Is there an unpacked stack of this name? If so it is under the lease from now on; the lease comes first, since the
/// garbage collector may be at work on what an earlier pull left.
async fn kept(client: &Client, lease: &LeaseId, chain: &ChainId) -> Result<bool, ImageError> {
    client.add_to_lease(lease, &client.snapshot_kind(), chain.as_str()).await?;
    Ok(client.has_snapshot(chain.as_str()).await?)
}

struct Step<'a> {
    layer: &'a Layer,
    diff: &'a Digest,
    parent: Option<&'a ChainId>,
    chain: &'a ChainId,
}

async fn apply(client: &Client, reference: &Reference, lease: &LeaseId, step: Step<'_>) -> Result<(), ImageError> {
    let Step { layer, diff, parent, chain } = step;
    let labels = Labels::from([("containerd.io/snapshot.ref".to_owned(), chain.to_string())]);
    // A fresh key: two pulls may unpack the same layer at the same time, and the slower one's commit says so.
    let key = format!("extract-{} {chain}", random_hex(8));
    let mounts = match client.prepare_snapshot(lease, &key, parent, labels.clone()).await {
        // Another pull has committed it since we looked; it is under our lease by its name.
        Err(error) if error.is_already_exists() => return Ok(()),
        prepared => prepared?,
    };
    let outcome = async {
        let actual = client.apply_layer(layer.descriptor(), mounts).await?;
        if actual != *diff {
            return Err(ImageError::Layer {
                image: reference.to_string(),
                digest: layer.digest.clone(),
                source: super::LayerProblem::DiffId { expected: diff.clone(), actual },
            });
        }
        client.commit_snapshot(lease, &key, chain, labels).await.map_err(ImageError::from)
    }
    .await;
    match outcome {
        Ok(()) => Ok(()),
        Err(error) => {
            if let Err(left) = client.remove_snapshot(&key).await {
                tracing::debug!(error = %left, "a half-unpacked layer is left to containerd's own collection");
            }
            match &error {
                ImageError::Containerd(inner) if inner.is_already_exists() => Ok(()),
                _ => Err(error),
            }
        }
    }
}

/// Where an image's users and groups are named; empty where it names none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accounts {
    /// passwd(5).
    pub passwd: String,
    /// group(5).
    pub group: String,
}

/// The image's passwd and group files as its processes would see them, read through a mount that is gone afterwards.
///
/// # Errors
/// When the layers can't be mounted, or a file can't be read or is no plain one. An image without them has empty ones.
pub fn accounts(reference: &Reference, stack: &Stack, scratch: &Path) -> Result<Accounts, ImageError> {
    let path = scratch.join(format!("view-{}", random_hex(8)));
    let failed = |source: io::Error| ImageError::Record { path: path.clone(), source };
    let both = |root: &Path| {
        let (passwd, group) = (accounts::read(root, accounts::PASSWD)?, accounts::read(root, accounts::GROUP)?);
        Ok(Accounts { passwd, group })
    };
    let read = match &stack.lowers[..] {
        [only] => both(only),
        lowers => {
            fs::create_dir(&path).map_err(failed)?;
            let mounted = crate::overlay::mount_read_only(lowers, &stack.options, &path);
            let read = mounted.map(|()| {
                let read = both(&path);
                umount2(&path, MntFlags::MNT_DETACH).map(|()| read)
            });
            fs::remove_dir(&path).map_err(failed)?;
            read.map_err(failed)?.map_err(|errno| failed(errno.into()))?
        }
    };
    read.map_err(|error: AccountsError| match error {
        AccountsError::Read { source, .. } => failed(source),
        source => ImageError::Accounts { image: reference.to_string(), source },
    })
}
