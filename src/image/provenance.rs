//! The labels in containerd's store that record which repositories a blob was pulled from. A stored layer is used only
//! for an image whose repository has that layer; docs/decisions/014 says why.

use super::{RegistryImage, reference::is_loopback};
use crate::containerd::Labels;

/// The prefix of these labels. A registry's host follows after a dot, and the value is a comma-separated list of its
/// repositories (containerd, core/remotes/docker/handler.go, `AppendDistributionSourceLabel`).
const SOURCE: &str = "containerd.io/distribution.source";
/// The limit on the length of a label's key and value together (containerd, pkg/labels/validate.go).
const LABEL_MAX: usize = 4096;

/// One repository of one registry, as a blob's label names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlobSource {
    key: String,
    repository: String,
}

/// The relation of a stored blob to a repository, according to the blob's labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Provenance {
    /// The blob was pulled from this repository.
    Repository,
    /// The blob was pulled from another repository of the same registry. That registry has the blob, so its answer
    /// about whether one of its other repositories has the blob, too, can be trusted.
    Registry,
    /// The blob was never pulled from this registry, which may belong to an attacker and claim to have any blob.
    Elsewhere,
}

impl BlobSource {
    /// Returns the repository of an image.
    pub(crate) fn of(image_name: &RegistryImage) -> Self {
        let registry = image_name.registry().to_ascii_lowercase();
        // containerd leaves the port out. This driver writes the port, as moby does
        // (daemon/internal/distribution/manifest.go, `makeDistributionSourceLabel`), because another port is another
        // registry, and on this host any task may open one. For a registry on this host, the default port is written,
        // too: a label without a port may be from any port.
        let host = match registry.rsplit_once(':') {
            Some((host, "443")) if !is_loopback(host) => host.to_owned(),
            None if is_loopback(&registry) => format!("{registry}:443"),
            _ => registry,
        };
        Self { key: format!("{SOURCE}.{host}"), repository: image_name.repository().to_owned() }
    }

    /// Returns whether the blob with these `labels` was pulled from this repository.
    pub(crate) fn provenance_by(&self, labels: &Labels) -> Provenance {
        match labels.get(&self.key) {
            Some(list) if list.split(',').any(|repository| repository == self.repository) => Provenance::Repository,
            Some(list) if !list.is_empty() => Provenance::Registry,
            _ => Provenance::Elsewhere,
        }
    }

    /// Adds to `labels` the label with this repository and the repositories that `stored` names already. A label that
    /// would become too long is not changed, as in containerd; the registry is then asked at each pull.
    pub(crate) fn add_to(&self, labels: &mut Labels, stored: &Labels) {
        let mut repositories: Vec<&str> =
            stored.get(&self.key).map(|list| list.split(',').collect()).unwrap_or_default();
        repositories.push(&self.repository);
        repositories.retain(|repository| !repository.is_empty());
        repositories.sort_unstable();
        repositories.dedup();
        let list = repositories.join(",");
        if self.key.len() + list.len() <= LABEL_MAX {
            labels.insert(self.key.clone(), list);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Reference;

    fn source(image: &str) -> BlobSource {
        match Reference::parse(image) {
            Ok(Reference::Registry(place)) => BlobSource::of(&place),
            other => panic!("{image}: {other:?}"),
        }
    }

    fn labelled(images: &[&str]) -> Labels {
        images.iter().fold(Labels::new(), |stored, image| {
            let mut labels = stored.clone();
            source(image).add_to(&mut labels, &stored);
            labels
        })
    }

    #[test]
    fn labels_are_containerds() {
        let key = "containerd.io/distribution.source.docker.io".to_owned();
        assert_eq!(labelled(&["redis:7"]), Labels::from([(key.clone(), "library/redis".to_owned())]));
        let both = labelled(&["redis:7", "a/b", "redis:6"]);
        assert_eq!(both, Labels::from([(key, "a/b,library/redis".to_owned())]));
    }

    #[test]
    fn a_repository_is_not_its_neighbours() {
        let labels = labelled(&["registry.example/team/app"]);
        for (image, provenance) in [
            ("registry.example/team/app:2", Provenance::Repository),
            ("registry.example:443/team/app", Provenance::Repository),
            ("Registry.Example/team/app", Provenance::Repository),
            ("registry.example/team/app2", Provenance::Registry),
            ("registry.example/app", Provenance::Registry),
            ("registry.example:5000/team/app", Provenance::Elsewhere),
            ("registry.example.evil/team/app", Provenance::Elsewhere),
            ("team/app", Provenance::Elsewhere),
        ] {
            assert_eq!(source(image).provenance_by(&labels), provenance, "{image}");
        }
        // The label that `ctr pull 127.0.0.1:5000/app` writes.
        let foreign = Labels::from([(format!("{SOURCE}.127.0.0.1"), "app".to_owned())]);
        for image in ["127.0.0.1:5000/app", "127.0.0.1/app", "127.0.0.1:443/app"] {
            assert_eq!(source(image).provenance_by(&foreign), Provenance::Elsewhere, "{image}");
        }
        assert_eq!(
            source("a/b").provenance_by(&Labels::from([(source("a/b").key, String::new())])),
            Provenance::Elsewhere
        );
    }

    #[test]
    fn a_list_that_is_full_stays_as_it_is() {
        let mut stored = Labels::new();
        for n in 0..400 {
            let mut labels = Labels::new();
            source(&format!("registry.example/team/app-{n}")).add_to(&mut labels, &stored);
            stored.extend(labels);
        }
        assert!(stored.iter().all(|(key, list)| key.len() + list.len() <= LABEL_MAX));
        assert_eq!(source("registry.example/team/app-399").provenance_by(&stored), Provenance::Registry);
        assert_eq!(source("registry.example/team/app-0").provenance_by(&stored), Provenance::Repository);
    }
}
