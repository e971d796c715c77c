//! What a start needs of an image, kept in memory and on disk, so that nobody has to be asked.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use super::{ImageError, Reference};
use crate::{
    ids::{ChainId, Digest},
    places::write_whole,
    stamp::Stamp,
};

/// The form of the record's file.
const VERSION: u32 = 1;

/// The part of an image's configuration that shapes a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// ENTRYPOINT.
    pub entrypoint: Vec<String>,
    /// CMD.
    pub cmd: Vec<String>,
    /// ENV, as `KEY=value`.
    pub env: Vec<String>,
    /// USER, empty for root.
    pub user: String,
    /// WORKDIR, empty for `/`.
    pub working_dir: String,
    /// STOPSIGNAL, empty for SIGTERM.
    pub stop_signal: String,
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
        }
    }
}

/// One image, ready to be started from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    version: u32,
    /// The completed name.
    pub reference: String,
    /// What the name stood for when it was pulled: an index or a manifest.
    pub digest: Digest,
    /// Its stack of layers; None for an image without any.
    pub chain_id: Option<ChainId>,
    /// containerd's lease that keeps layers and view from its garbage collector.
    pub lease: String,
    /// The read-only snapshot that the directories below belong to.
    pub view: Option<String>,
    /// Read-only directories, topmost first, as overlayfs wants them.
    pub lowers: Vec<PathBuf>,
    /// Overlay options that the snapshotter asked for (`index=off`, `userxattr`).
    pub overlay_options: Vec<String>,
    /// Compressed size in bytes.
    pub size: u64,
    /// What its process is to be.
    pub config: ImageConfig,
    /// The file it was read from, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<Stamp>,
    /// The image's `/etc/passwd`, empty when it has none.
    pub passwd: String,
    /// The image's `/etc/group`, empty when it has none.
    pub group: String,
}

/// What `ImageRecord::new` takes besides what it can tell by itself.
#[derive(Debug)]
pub struct Parts {
    /// What the name stands for.
    pub digest: Digest,
    /// The stack of layers.
    pub chain_id: Option<ChainId>,
    /// The lease.
    pub lease: String,
    /// The view's key.
    pub view: Option<String>,
    /// Compressed size in bytes.
    pub size: u64,
}

impl ImageRecord {
    /// A record without directories and accounts yet.
    pub fn new(reference: &Reference, parts: Parts, config: ImageConfig) -> Self {
        let Parts { digest, chain_id, lease, view, size } = parts;
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

    /// Writes the record beside its siblings, whole or not at all.
    ///
    /// # Errors
    /// As the file system.
    pub fn save(&self, directory: &Path) -> Result<(), ImageError> {
        let path = Self::path(directory, &self.reference);
        let write = || write_whole(&path, &serde_json::to_vec(self)?, 0o600);
        write().map_err(|source| ImageError::Record { path: path.clone(), source })
    }

    /// Removes the record's file; one that is gone is fine.
    ///
    /// # Errors
    /// As the file system.
    pub fn forget(&self, directory: &Path) -> Result<(), ImageError> {
        let path = Self::path(directory, &self.reference);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(ImageError::Record { path, source }),
            _ => Ok(()),
        }
    }

    /// A task has just stopped using it. Kept as the file's time: `keep` is counted from there.
    pub fn touch(&self, directory: &Path) {
        let now = fs::File::options().append(true).open(Self::path(directory, &self.reference));
        if let Err(error) = now.and_then(|file| file.set_modified(std::time::SystemTime::now())) {
            tracing::debug!(image = self.reference, %error, "time of last use");
        }
    }

    /// When a task last used it, or it was pulled; None when the record is not on disk.
    pub fn last_used(&self, directory: &Path) -> Option<std::time::SystemTime> {
        fs::metadata(Self::path(directory, &self.reference)).and_then(|file| file.modified()).ok()
    }

    /// All records of a directory. One that is torn is renamed to `.bad` and reported; the rest goes on.
    ///
    /// # Errors
    /// When the directory or one of the records can't be read just now: an image that is forgotten loses its layers.
    pub fn load_all(directory: &Path) -> Result<Vec<Self>, ImageError> {
        let unreadable = |source| ImageError::Record { path: directory.to_owned(), source };
        let mut records = Vec::new();
        for entry in fs::read_dir(directory).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let bytes = match fs::read(&path) {
                Err(source) if crate::process::is_passing(&source) => return Err(ImageError::Record { path, source }),
                read => read.map_err(|error| error.to_string()),
            };
            let record = bytes.and_then(|bytes| {
                let record: Self = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
                if record.version == VERSION { Ok(record) } else { Err(format!("version {}", record.version)) }
            });
            match record {
                Ok(record) => records.push(record),
                Err(problem) => {
                    tracing::warn!(path = %path.display(), problem, "image record set aside; the image is pulled anew");
                    if let Err(error) = fs::rename(&path, path.with_extension("bad")) {
                        tracing::warn!(path = %path.display(), %error, "it could not even be renamed");
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
    fn torn_records_are_set_aside_and_the_rest_is_read() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let reference = Reference::parse("app:1").expect("a reference");
        let parts = Parts { digest: Digest::of(b"x"), chain_id: None, lease: "l".to_owned(), view: None, size: 0 };
        let record = ImageRecord::new(&reference, parts, ImageConfig::default());
        record.save(directory.path()).expect("saved");
        fs::write(directory.path().join("torn.json"), b"{\"version\":1,").expect("written");
        fs::write(directory.path().join("future.json"), b"{\"version\":99}").expect("written");
        assert_eq!(ImageRecord::load_all(directory.path()).expect("read"), vec![record.clone()]);
        assert!(directory.path().join("torn.bad").exists() && directory.path().join("future.bad").exists());
        record.forget(directory.path()).expect("forgotten");
        assert_eq!(ImageRecord::load_all(directory.path()).expect("read"), vec![]);
    }
}
