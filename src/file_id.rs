//! Identifies a file's content without reading it, to notice that the file was changed or that another file has its
//! name now.

use std::{fs::Metadata, os::unix::fs::MetadataExt as _};

use serde::{Deserialize, Serialize};

/// The identity of a file at one moment. Two equal values mean the same unchanged file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileId {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl FileId {
    /// Returns the identity of the file that has this metadata.
    pub fn of(file: &Metadata) -> Self {
        Self {
            device: file.dev(),
            inode: file.ino(),
            size: file.size(),
            // The time of the last status change (ctime). Programs that copy or unpack files set the time of the last
            // modification (mtime) to any value.
            changed: (file.ctime(), file.ctime_nsec()),
        }
    }
}
