//! Image records: all that a start needs to know about an image. They are kept in memory and on disk, so that a start
//! needs no call to containerd or to a registry.

use std::{
    fs,
    path::{Path, PathBuf},
};

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use super::{ImageError, Reference};
use crate::{
    containerd::LeaseId,
    file_id::FileId,
    files::{remove_file_if_exists, write_atomically},
    ids::{ChainId, Digest},
};

/// The version of the record file's format.
const VERSION: u32 = 1;

/// The part of an image's configuration that describes the container's process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// The image's ENTRYPOINT.
    pub entrypoint: Vec<String>,
    /// The image's CMD.
    pub cmd: Vec<String>,
    /// The image's ENV, as `KEY=value`.
    pub env: Vec<String>,
    /// The image's USER; empty for root.
    pub user: String,
    /// The image's WORKDIR; empty for `/`.
    pub working_dir: String,
    /// The image's STOPSIGNAL; empty for SIGTERM.
    pub stop_signal: String,
    /// The image's VOLUME: paths at which each task has a directory of its own. Records of earlier versions do not have
    /// them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
}

impl From<&ImageConfiguration> for ImageConfig {
    fn from(configuration: &ImageConfiguration) -> Self {
        let Some(config) = configuration.config() else { return Self::default() };
        Self {
            entrypoint: config.entrypoint().clone().unwrap_or_default(),
            cmd: config.cmd().clone().unwrap_or_default(),
            env: config.env().clone().unwrap_or_default(),
            user: config.user().clone().unwrap_or_default(),
            working_dir: config.working_dir().clone().unwrap_or_default(),
            stop_signal: config.stop_signal().clone().unwrap_or_default(),
            volumes: config.volumes().clone().unwrap_or_default(),
        }
    }
}

/// An image that is unpacked, so that a task can start from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    version: u32,
    /// The completed name.
    pub reference: String,
    /// The digest of the index or manifest that the name stood for when the image was pulled.
    pub digest: Digest,
    /// The chain id of all layers together; `None` for an image without layers.
    pub chain_id: Option<ChainId>,
    /// The lease that protects the image's layers and view from containerd's garbage collector.
    pub lease: LeaseId,
    /// The key of the read-only snapshot that the directories in `lowers` belong to.
    pub view: Option<String>,
    /// Read-only directories, topmost first, as overlayfs wants them.
    pub lowers: Vec<PathBuf>,
    /// Mount options of overlayfs that the snapshotter asked for (`index=off`, `userxattr`).
    pub overlay_options: Vec<String>,
    /// Compressed size of all layers in bytes.
    pub size: u64,
    /// The description of the container's process.
    pub config: ImageConfig,
    /// The identity of the file that the image was read from, for an image in files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<FileId>,
    /// The image's `/etc/passwd`, empty when it has none.
    pub passwd: String,
    /// The image's `/etc/group`, empty when it has none.
    pub group: String,
}

/// The fields of an [`ImageRecord`] that a pull determines, for `ImageRecord::new`.
#[derive(Debug)]
pub struct RecordParts {
    /// The digest of the index or manifest that the name stands for.
    pub digest: Digest,
    /// The chain id of all layers together; `None` for an image without layers.
    pub chain_id: Option<ChainId>,
    /// The lease that protects layers and view.
    pub lease: LeaseId,
    /// The key of the view.
    pub view: Option<String>,
    /// Compressed size of all layers in bytes.
    pub size: u64,
}

impl ImageRecord {
    /// Makes a record whose directories, accounts and file identity are still empty.
    pub fn new(reference: &Reference, parts: RecordParts, config: ImageConfig) -> Self {
        let RecordParts { digest, chain_id, lease, view, size } = parts;
        Self {
            version: VERSION,
            reference: reference.to_string(),
            digest,
            chain_id,
            lease,
            view,
            lowers: Vec::new(),
            overlay_options: Vec::new(),
            size,
            config,
            stamp: None,
            passwd: String::new(),
            group: String::new(),
        }
    }

    fn path(directory: &Path, reference: &str) -> PathBuf {
        directory.join(format!("{}.json", &Digest::of(reference.as_bytes()).as_str()[7..39]))
    }

    /// Writes the record's file in `directory`, completely or not at all.
    ///
    /// # Errors
    /// Fails when the file can't be written.
    pub fn save(&self, directory: &Path) -> Result<(), ImageError> {
        let path = Self::path(directory, &self.reference);
        let write = || write_atomically(&path, &serde_json::to_vec(self)?, 0o600);
        write().map_err(|source| ImageError::StoreFile { path: path.clone(), source })
    }

    /// Removes the record's file. It is not an error if the file does not exist.
    ///
    /// # Errors
    /// Fails when the file can't be removed.
    pub fn delete(&self, directory: &Path) -> Result<(), ImageError> {
        let path = Self::path(directory, &self.reference);
        remove_file_if_exists(&path).map_err(|source| ImageError::StoreFile { path, source })
    }

    /// Stores the current time as the time of the image's last use, after a task has stopped using it. The time of
    /// modification of the record's file has this meaning, and the period of the option `image { keep }` begins then.
    pub fn touch(&self, directory: &Path) {
        let now = fs::File::options().append(true).open(Self::path(directory, &self.reference));
        if let Err(error) = now.and_then(|file| file.set_modified(std::time::SystemTime::now())) {
            tracing::debug!(image = self.reference, %error, "could not store the time of an image's last use");
        }
    }

    /// Returns when a task last used the image, or when the image was pulled if none did; `None` when the record is not
    /// on disk.
    pub fn last_used(&self, directory: &Path) -> Option<std::time::SystemTime> {
        fs::metadata(Self::path(directory, &self.reference)).and_then(|file| file.modified()).ok()
    }

    /// Reads all records of a directory. A record that is corrupt or of another version is renamed to `.bad` and
    /// logged; the others are read.
    ///
    /// # Errors
    /// Fails when the directory can't be read, or a record can't be read for a temporary reason: if such a record were
    /// skipped, garbage collection would remove the layers of its image.
    pub fn load_all(directory: &Path) -> Result<Vec<Self>, ImageError> {
        let unreadable = |source| ImageError::StoreFile { path: directory.to_owned(), source };
        let mut records = Vec::new();
        for entry in fs::read_dir(directory).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let bytes = match fs::read(&path) {
                Err(source) if crate::process::is_transient(&source) => {
                    return Err(ImageError::StoreFile { path, source });
                }
                read => read.map_err(|error| error.to_string()),
            };
            let record = bytes.and_then(|bytes| {
                let record: Self = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
                if record.version == VERSION { Ok(record) } else { Err(format!("version {}", record.version)) }
            });
            match record {
                Ok(record) => records.push(record),
                Err(problem) => {
                    tracing::warn!(
                        path = %path.display(),
                        problem,
                        "an image record can't be used and is renamed to .bad; the next start pulls the image again"
                    );
                    if let Err(error) = fs::rename(&path, path.with_extension("bad")) {
                        tracing::warn!(path = %path.display(), %error, "could not rename an unusable image record");
                    }
                }
            }
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incomplete_records_are_renamed_and_the_others_are_read() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let reference = Reference::parse("app:1").expect("a reference");
        let parts = RecordParts {
            digest: Digest::of(b"x"),
            chain_id: None,
            lease: LeaseId("l".to_owned()),
            view: None,
            size: 0,
        };
        let record = ImageRecord::new(&reference, parts, ImageConfig::default());
        record.save(directory.path()).expect("saved");
        fs::write(directory.path().join("torn.json"), b"{\"version\":1,").expect("written");
        fs::write(directory.path().join("future.json"), b"{\"version\":99}").expect("written");
        assert_eq!(ImageRecord::load_all(directory.path()).expect("read"), vec![record.clone()]);
        assert!(directory.path().join("torn.bad").exists() && directory.path().join("future.bad").exists());
        record.delete(directory.path()).expect("deleted");
        assert_eq!(ImageRecord::load_all(directory.path()).expect("read"), vec![]);
    }
}
