//! The OCI spec that all subjects share: the one that this driver has written for a task, with that task's names
//! replaced by placeholders.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{BenchError, job::Job};

/// The annotation by which an OCI spec carries a compiled seccomp filter, for runtimes that accept one (crun).
const SECCOMP_ANNOTATION: &str = "run.oci.seccomp_bpf_data";

/// A spec with placeholders for names.
#[derive(Debug, Clone)]
pub(crate) struct Template {
    text: String,
    /// The image's read-only layers, topmost first.
    pub(super) lowers: Vec<PathBuf>,
    /// Further options of the overlay mount.
    pub(super) overlay_options: Vec<String>,
    /// The chain id of those layers: the name of their snapshot in containerd.
    pub(super) chain_id: String,
    /// The compiled seccomp filter in base64, if the driver has written one.
    pub(super) seccomp_filter: Option<String>,
}

/// Returns the names that differ from task to task, by their placeholders.
fn names(job: &Job, bundle: &Path, id: &str) -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        ("{BUNDLE}", bundle.to_string_lossy().into_owned()),
        ("{ALLOC_DIR}", job.alloc.dir.to_string_lossy().into_owned()),
        ("{ALLOC}", job.alloc.id.clone()),
        ("{CONTAINER}", id.to_owned()),
    ])
}

/// The placeholders in the order of their replacement: longer names come first, since an allocation's directory
/// contains its id.
const PLACEHOLDERS: [&str; 4] = ["{BUNDLE}", "{ALLOC_DIR}", "{ALLOC}", "{CONTAINER}"];

/// Replaces the source of a mount. The driver mounts each source below its bundle and lets the runtime mount it from
/// there; the other subjects mount it from its original path.
fn replace_source(mount: &mut Value, task: &str) {
    let is_pinned = mount["source"].as_str().is_some_and(|source| source.starts_with("{BUNDLE}/mounts/"));
    let source = match mount["destination"].as_str().filter(|_| is_pinned) {
        Some("/etc/hostname") => "{BUNDLE}/hostname".to_owned(),
        Some("/etc/hosts") => "{BUNDLE}/hosts".to_owned(),
        Some("/etc/resolv.conf") => "{BUNDLE}/resolv.conf".to_owned(),
        Some("/alloc") => "{ALLOC_DIR}/alloc".to_owned(),
        Some(own @ ("/local" | "/secrets")) => format!("{{ALLOC_DIR}}/{task}{own}"),
        _ => return,
    };
    mount["source"] = source.into();
}

impl Template {
    /// Makes a template from what the driver has written for `job`, which must be its only running task.
    pub(super) fn of_driver(run: &Path, state: &Path, image: &str, job: &Job) -> Result<Self, BenchError> {
        let invalid = |problem: String| BenchError::Precondition { subject: "driver".to_owned(), problem };
        let list = |path: &Path| -> Result<Vec<PathBuf>, BenchError> {
            let entries = fs::read_dir(path).map_err(super::file(path))?;
            Ok(entries.flatten().map(|entry| entry.path()).collect())
        };
        let bundles = list(&run.join("bundles"))?;
        let [bundle] = &bundles[..] else { return Err(invalid(format!("{} bundles for one task", bundles.len()))) };
        let config = bundle.join("config.json");
        let mut text = fs::read_to_string(&config).map_err(super::file(&config))?;
        let id = bundle.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let names = names(job, bundle, &id);
        for placeholder in PLACEHOLDERS {
            text = text.replace(&names[placeholder], placeholder);
        }
        let mut value: Value = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
        for mount in value["mounts"].as_array_mut().into_iter().flatten() {
            replace_source(mount, &job.dirs.name);
        }
        let program =
            value["annotations"].as_object_mut().and_then(|annotations| annotations.remove(SECCOMP_ANNOTATION));
        let records = list(&state.join("images"))?.into_iter().filter_map(|path| fs::read(path).ok());
        let mut records = records.filter_map(|text| serde_json::from_slice::<Value>(&text).ok());
        let image = records.find(|record| record["reference"] == image);
        let image = image.ok_or_else(|| invalid("it has no record of the image".to_owned()))?;
        let strings = |key: &str| -> Vec<String> {
            let list = image[key].as_array().into_iter().flatten();
            list.filter_map(|item| item.as_str().map(str::to_owned)).collect()
        };
        Ok(Self {
            text: value.to_string(),
            lowers: strings("lowers").into_iter().map(PathBuf::from).collect(),
            overlay_options: strings("overlay_options"),
            chain_id: image["chain_id"].as_str().unwrap_or_default().to_owned(),
            seccomp_filter: program.and_then(|program| program.as_str().map(str::to_owned)),
        })
    }

    /// Returns a hash of the spec without names and without the seccomp filter, whose form depends on the runtime. Two
    /// subjects with the same hash run the same container.
    pub(super) fn hash(&self) -> String {
        let mut value: Value = serde_json::from_str(&self.text).unwrap_or_default();
        if let Some(linux) = value["linux"].as_object_mut() {
            linux.remove("seccomp");
        }
        // The capabilities are a set, whose order means nothing.
        for set in value["process"]["capabilities"].as_object_mut().into_iter().flat_map(serde_json::Map::values_mut) {
            if let Some(names) = set.as_array_mut() {
                names.sort_by_key(ToString::to_string);
            }
        }
        // serde_json sorts the keys of all maps, so annotations need no sorting.
        Sha256::digest(value.to_string()).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Returns the spec for `job`, with the root file system at `root`.
    pub(super) fn fill(&self, job: &Job, bundle: &Path, id: &str, root: &str) -> Value {
        let mut text = self.text.clone();
        let names = names(job, bundle, id);
        for placeholder in PLACEHOLDERS {
            text = text.replace(placeholder, &names[placeholder]);
        }
        let mut spec: Value = serde_json::from_str(&text).unwrap_or_default();
        spec["root"]["path"] = root.into();
        spec["process"]["args"] = job.command().into();
        spec
    }
}
