//! Unpacks layers into containerd's snapshotter, and reads an image's passwd and group files from the unpacked layers.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::Path,
};

use nix::mount::{MntFlags, umount2};

use super::{
    ImageError, Reference,
    manifest::Layer,
    pull_context::{Progress, PullEvent},
    view::LayerStack,
};
use crate::{
    accounts::{self, AccountsError},
    containerd::{Client, Labels, LeaseId},
    files::none_if_missing,
    ids::{ChainId, Digest, random_hex},
    process_name,
};

/// Unpacks the layers that are not unpacked yet, and returns the chain id of all layers together; `None` for an image
/// without layers.
///
/// # Errors
/// Fails when containerd can't unpack a layer, or a layer's uncompressed digest is not the one in the image's
/// configuration.
pub(crate) async fn unpack(
    client: &Client,
    reference: &Reference,
    lease: &LeaseId,
    layers: &[(Layer, Digest)],
    progress: &Progress,
) -> Result<Option<ChainId>, ImageError> {
    let chains: Vec<ChainId> = layers
        .iter()
        .scan(None, |parent: &mut Option<ChainId>, (_, diff_id)| {
            *parent = Some(ChainId::next(parent.as_ref(), diff_id));
            parent.clone()
        })
        .collect();
    let Some(top) = chains.last() else { return Ok(None) };
    if !lease_if_unpacked(client, lease, top).await? {
        for (n, ((layer, diff_id), chain)) in layers.iter().zip(&chains).enumerate() {
            if !lease_if_unpacked(client, lease, chain).await? {
                let parent = n.checked_sub(1).map(|below| &chains[below]);
                apply_layer(client, reference, lease, LayerStep { layer, diff_id, parent, chain }).await?;
            }
            progress.report(PullEvent::Unpacked(n + 1, layers.len()));
        }
    }
    Ok(Some(top.clone()))
}

/// Adds the snapshot `chain` to the lease and returns whether the snapshot exists. It is added before its existence is
/// checked, because containerd's garbage collector may be about to remove a snapshot that an earlier pull left.
async fn lease_if_unpacked(client: &Client, lease: &LeaseId, chain: &ChainId) -> Result<bool, ImageError> {
    client.add_to_lease(lease, &client.snapshot_kind(), chain.as_str()).await?;
    Ok(client.has_snapshot(chain.as_str()).await?)
}

/// A layer that is unpacked on top of the layers below it.
struct LayerStep<'a> {
    layer: &'a Layer,
    diff_id: &'a Digest,
    parent: Option<&'a ChainId>,
    chain: &'a ChainId,
}

async fn apply_layer(
    client: &Client,
    reference: &Reference,
    lease: &LeaseId,
    step: LayerStep<'_>,
) -> Result<(), ImageError> {
    let LayerStep { layer, diff_id, parent, chain } = step;
    let labels = Labels::from([("containerd.io/snapshot.ref".to_owned(), chain.to_string())]);
    // The key is unique, because two pulls may unpack the same layer at the same time: the commit of the slower one
    // then fails with "already exists".
    let key = format!("extract-{} {chain}", random_hex(8));
    let mounts = match client.prepare_snapshot(lease, &key, parent, labels.clone()).await {
        // Another pull has committed the snapshot since the call of `lease_if_unpacked`, which has added the snapshot's
        // name to the lease.
        Err(error) if error.is_already_exists() => return Ok(()),
        prepared => prepared?,
    };
    let outcome = async {
        let actual = client.apply_layer(layer.descriptor(), mounts).await?;
        if actual != *diff_id {
            return Err(ImageError::Layer {
                image: reference.to_string(),
                digest: layer.digest.clone(),
                source: super::LayerProblem::DiffId { expected: diff_id.clone(), actual },
            });
        }
        client.commit_snapshot(lease, &key, chain, labels).await.map_err(ImageError::from)
    }
    .await;
    match outcome {
        Ok(()) => Ok(()),
        Err(error) => {
            if let Err(error) = client.remove_snapshot(&key).await {
                tracing::debug!(
                    error = %crate::error_chain(&error),
                    "could not remove a partly unpacked layer; containerd's garbage collector will remove it"
                );
            }
            match &error {
                ImageError::Containerd(inner) if inner.is_already_exists() => Ok(()),
                _ => Err(error),
            }
        }
    }
}

/// The passwd and group files of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Accounts {
    /// The content of the passwd file (passwd(5)); empty if the image has none.
    pub passwd: String,
    /// The content of the group file (group(5)); empty if the image has none.
    pub group: String,
}

/// The prefix of the names of directories at which the layers of an image are mounted for a moment. The names contain
/// the process that mounts them.
const VIEW_PREFIX: &str = "view-";

/// Returns whether a name is that of a view whose process has ended. Names without a process are those of an earlier
/// version.
fn is_stale_view(name: &str) -> bool {
    let is_over = || process_name::creator(VIEW_PREFIX, name).is_none_or(|process| process.is_gone());
    name.starts_with(VIEW_PREFIX) && is_over()
}

/// Unmounts and removes the mounts of images that killed processes have left in `scratch`. A mount that can't be removed
/// is left, and the others are removed.
///
/// # Errors
/// The first error: `scratch` can't be listed, or a mount or its directory can't be removed.
pub(crate) fn remove_stale_views(scratch: &Path) -> io::Result<()> {
    let names = crate::places::list_names(scratch).map_err(io::Error::other)?;
    let stale = names.into_iter().filter(|name| is_stale_view(name));
    stale.map(|name| remove_view(&scratch.join(name))).fold(Ok(()), io::Result::and)
}

/// Detaches the mount at a view's directory, if there is one, and removes the directory.
fn remove_view(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // EINVAL means that nothing is mounted there.
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => none_if_missing(fs::remove_dir(path)).map(drop),
        Err(errno) => Err(errno.into()),
    }
}

/// Returns a descriptor of a read-only mount of all layers. The mount exists as long as the descriptor, and is attached
/// in `scratch` only until the function returns.
///
/// # Errors
/// Fails when the layers can't be mounted, or the mount can't be opened or detached.
fn open_view(stack: &LayerStack, scratch: &Path) -> io::Result<File> {
    let path = scratch.join(process_name::new_name(VIEW_PREFIX)?);
    fs::create_dir(&path)?;
    let opened = crate::overlay::mount_read_only(&stack.lowers, &stack.options, &path).and_then(|()| {
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
        File::options().read(true).custom_flags(flags).open(&path)
    });
    let removed = remove_view(&path);
    opened.and_then(|opened| removed.map(|()| opened))
}

/// Reads the image's passwd and group files as its processes would see them: through a mount of all layers.
///
/// # Errors
/// Fails when the layers can't be mounted, or a file can't be read or is not a regular file. A missing file is not an
/// error.
pub(crate) fn read_accounts(reference: &Reference, stack: &LayerStack, scratch: &Path) -> Result<Accounts, ImageError> {
    let failed = |source: io::Error| ImageError::StoreFile { path: scratch.to_owned(), source };
    let read_both = |root: &Path| {
        let (passwd, group) = (accounts::read(root, accounts::PASSWD)?, accounts::read(root, accounts::GROUP)?);
        Ok(Accounts { passwd, group })
    };
    let read = match &stack.lowers[..] {
        [only] => read_both(only),
        _ => {
            let root = open_view(stack, scratch).map_err(failed)?;
            read_both(Path::new(&format!("/proc/self/fd/{}", root.as_raw_fd())))
        }
    };
    read.map_err(|error: AccountsError| match error {
        AccountsError::Read { source, .. } => failed(source),
        source => ImageError::Accounts { image: reference.to_string(), source },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::ProcessId;

    #[test]
    fn only_views_of_ended_processes_are_removed() {
        let scratch = tempfile::tempdir().expect("a directory");
        let own = process_name::new_name(VIEW_PREFIX).expect("a name");
        // An earlier process had the pid of this one.
        let ProcessId { pid, start } = ProcessId::of(std::process::id()).expect("the start time can be read");
        let stale = [format!("view-{pid}-{}-ab", start + 1), "view-0123456789abcdef".to_owned()];
        let others = [own, "0123.json".to_owned()];
        for name in stale.iter().chain(&others) {
            fs::create_dir(scratch.path().join(name)).expect("created");
        }
        // This one can't be removed, which keeps none of the others.
        let used = scratch.path().join("view-used");
        fs::create_dir_all(used.join("content")).expect("created");
        remove_stale_views(scratch.path()).expect_err("one is not empty");
        let left = |name: &String| scratch.path().join(name).exists();
        assert!(others.iter().all(left) && !stale.iter().any(left) && used.exists());
    }
}
