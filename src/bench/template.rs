//! The spec that all paths share: this driver's own, as it wrote it for a task, with that task's names taken out.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{BenchError, job::Job};

/// Where the OCI spec has a compiled seccomp filter, for runtimes that take one.
const PROGRAM: &str = "run.oci.seccomp_bpf_data";

/// A spec with blanks for names.
#[derive(Debug, Clone)]
pub struct Template {
    text: String,
    /// Read-only layers, topmost first, and what overlayfs is told besides.
    pub(super) lowers: Vec<PathBuf>,
    pub(super) overlay_options: Vec<String>,
    /// The snapshot that those are.
    pub(super) chain_id: String,
    /// The compiled filter, if the driver gave one.
    pub(super) program: Option<String>,
}

/// Names that differ from task to task.
fn names(job: &Job, bundle: &Path, id: &str) -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        ("{BUNDLE}", bundle.to_string_lossy().into_owned()),
        ("{ALLOC_DIR}", job.alloc.dir.to_string_lossy().into_owned()),
        ("{ALLOC}", job.alloc.id.clone()),
        ("{CONTAINER}", id.to_owned()),
    ])
}

/// The longer ones first: an allocation's directory holds its id.
const ORDER: [&str; 4] = ["{BUNDLE}", "{ALLOC_DIR}", "{ALLOC}", "{CONTAINER}"];

/// The driver takes sources of mounts from below its bundle, where it has put what others take from its own place.
fn name_source(mount: &mut Value, task: &str) {
    let is_pinned = mount["source"].as_str().is_some_and(|source| source.starts_with("{BUNDLE}/mounts/"));
    let source = match mount["destination"].as_str().filter(|_| is_pinned) {
        Some("/etc/hosts") => "{BUNDLE}/hosts".to_owned(),
        Some("/etc/resolv.conf") => "{BUNDLE}/resolv.conf".to_owned(),
        Some("/alloc") => "{ALLOC_DIR}/alloc".to_owned(),
        Some(own @ ("/local" | "/secrets")) => format!("{{ALLOC_DIR}}/{task}{own}"),
        _ => return,
    };
    mount["source"] = source.into();
}

impl Template {
    /// Reads what the driver wrote for `job`, its only running task.
    pub(super) fn of_driver(run: &Path, state: &Path, image: &str, job: &Job) -> Result<Self, BenchError> {
        let unsound = |problem: String| BenchError::Unsound { path: "driver".to_owned(), problem };
        let list = |path: &Path| -> Result<Vec<PathBuf>, BenchError> {
            let entries = fs::read_dir(path).map_err(super::file(path))?;
            Ok(entries.flatten().map(|entry| entry.path()).collect())
        };
        let bundles = list(&run.join("bundles"))?;
        let [bundle] = &bundles[..] else { return Err(unsound(format!("{} bundles for one task", bundles.len()))) };
        let config = bundle.join("config.json");
        let mut text = fs::read_to_string(&config).map_err(super::file(&config))?;
        let id = bundle.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let names = names(job, bundle, &id);
        for blank in ORDER {
            text = text.replace(&names[blank], blank);
        }
        let mut value: Value = serde_json::from_str(&text).map_err(|error| unsound(error.to_string()))?;
        for mount in value["mounts"].as_array_mut().into_iter().flatten() {
            name_source(mount, &job.dirs.name);
        }
        let program = value["annotations"].as_object_mut().and_then(|annotations| annotations.remove(PROGRAM));
        let records = list(&state.join("images"))?.into_iter().filter_map(|path| fs::read(path).ok());
        let mut records = records.filter_map(|text| serde_json::from_slice::<Value>(&text).ok());
        let image = records.find(|record| record["reference"] == image);
        let image = image.ok_or_else(|| unsound("no record of the image".to_owned()))?;
        let strings = |key: &str| -> Vec<String> {
            let list = image[key].as_array().into_iter().flatten();
            list.filter_map(|item| item.as_str().map(str::to_owned)).collect()
        };
        Ok(Self {
            text: value.to_string(),
            lowers: strings("lowers").into_iter().map(PathBuf::from).collect(),
            overlay_options: strings("overlay_options"),
            chain_id: image["chain_id"].as_str().unwrap_or_default().to_owned(),
            program: program.and_then(|program| program.as_str().map(str::to_owned)),
        })
    }

    /// Of all but names and the form of the filter: two paths with the same one run the same container.
    pub(super) fn hash(&self) -> String {
        let mut value: Value = serde_json::from_str(&self.text).unwrap_or_default();
        if let Some(linux) = value["linux"].as_object_mut() {
            linux.remove("seccomp");
        }
        // A set, in whatever order.
        for set in value["process"]["capabilities"].as_object_mut().into_iter().flat_map(serde_json::Map::values_mut) {
            if let Some(names) = set.as_array_mut() {
                names.sort_by_key(ToString::to_string);
            }
        }
        // Maps are sorted by serde_json, annotations and the rest alike.
        Sha256::digest(value.to_string()).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The spec for `job`, with its root file system at `root`.
    pub(super) fn fill(&self, job: &Job, bundle: &Path, id: &str, root: &str) -> Value {
        let mut text = self.text.clone();
        let names = names(job, bundle, id);
        for blank in ORDER {
            text = text.replace(blank, &names[blank]);
        }
        let mut spec: Value = serde_json::from_str(&text).unwrap_or_default();
        spec["root"]["path"] = root.into();
        spec["process"]["args"] = job.command().into();
        spec
    }
}
