//! Images in files: `oci:DIR`, `oci-archive:FILE`, `docker-archive:FILE`. This module unpacks nothing: it looks blobs
//! up by digest, and the pull checks and stores them like downloaded blobs.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use oci_spec::image::ImageIndex;
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::{Archive, ArchiveFormat, ImageError, Reference, manifest::LAYERS_MAX};
use crate::ids::Digest;

/// The largest index or manifest that is read. It is the limit of distribution, the reference registry.
const DOCUMENT_MAX: u64 = 4 << 20;
/// The largest number of entries in an archive. An image of 127 layers has some 260 entries.
const ENTRIES_MAX: usize = 100_000;
/// The largest name or attribute of an archive's entry. No real archive has larger ones.
const EXTENSION_MAX: u64 = 1 << 20;
/// The limit on the length of all long names of an archive together.
const NAMES_MAX: usize = 16 << 20;
/// The annotation with the name of an image in an index (image-spec, annotations.md).
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// An image in files whose index or manifest has been read.
#[derive(Debug)]
pub(crate) struct OpenedArchive {
    image: String,
    store: Store,
    /// The names of blobs in docker's archives, which do not follow from the digests as in OCI's layout.
    blobs: HashMap<Digest, String>,
    /// Media type and bytes of the index or manifest that the image's name stands for.
    root_document: (String, Vec<u8>),
}

#[derive(Debug)]
enum Store {
    Dir(OwnedFd),
    /// A tar file, and the offset and length of each entry by name.
    Tar(File, HashMap<String, (u64, u64)>),
}

impl OpenedArchive {
    /// Opens an image and reads its index or manifest. This blocks. The hashing of a docker archive ends early when
    /// `keep_going` becomes false.
    ///
    /// # Errors
    /// Fails when the files can't be read, or are not in the format that the image's name says.
    pub(crate) fn open(
        reference: &Reference,
        archive: &Archive,
        opened: Option<&OwnedFd>,
        keep_going: &AtomicBool,
    ) -> Result<Self, ImageError> {
        let image = reference.to_string();
        let failed = |problem: String| ImageError::Archive { image: image.clone(), problem };
        let unreadable = |source| ImageError::ArchiveFile { image: image.clone(), source };
        let path = archive.path_to_open(opened);
        let store = match archive.format {
            ArchiveFormat::OciDir => Store::Dir(open_path(&path, FileKind::Directory).map_err(unreadable)?.into()),
            ArchiveFormat::OciArchive | ArchiveFormat::DockerArchive => {
                let file = open_path(&path, FileKind::File).map_err(unreadable)?;
                let entries = list_entries(&file).map_err(failed)?;
                Store::Tar(file, entries)
            }
        };
        let mut layout = Self { image: image.clone(), store, blobs: HashMap::new(), root_document: Default::default() };
        layout.root_document = match archive.format {
            ArchiveFormat::DockerArchive => layout.read_docker_manifest(archive.tag.as_deref(), keep_going),
            ArchiveFormat::OciDir | ArchiveFormat::OciArchive => layout.read_oci_index(archive.tag.as_deref()),
        }
        .map_err(failed)?;
        Ok(layout)
    }

    /// Returns media type and bytes of the index or manifest that the image's name stands for.
    pub(crate) fn root_document(&self) -> (String, Vec<u8>) {
        self.root_document.clone()
    }

    /// Returns whether this blob's digest was computed from its bytes when the archive was opened.
    pub(crate) fn has_hashed(&self, digest: &Digest) -> bool {
        self.blobs.contains_key(digest)
    }

    /// Returns a reader of a blob. The caller must check the digest of the bytes.
    ///
    /// # Errors
    /// Fails when the blob does not exist, can't be opened, or does not have `size` bytes.
    pub(crate) fn blob(&self, digest: &Digest, size: Option<u64>) -> Result<io::Take<File>, ImageError> {
        let default = || format!("blobs/{}", digest.as_str().replace(':', "/"));
        let name = self.blobs.get(digest).cloned().unwrap_or_else(default);
        let failed = |problem: String| ImageError::Archive {
            image: self.image.clone(),
            problem: format!("blob {digest}: {problem}"),
        };
        let file = self.read(&name).map_err(|error| self.unreadable(digest, error))?;
        match size {
            Some(size) if size != file.limit() => {
                Err(failed(format!("it has {} bytes, the manifest says {size}", file.limit())))
            }
            _ => Ok(file),
        }
    }

    /// Returns all bytes of a small blob.
    ///
    /// # Errors
    /// Fails as `blob` does, and when the blob is larger than `limit`.
    pub(crate) fn document(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, ImageError> {
        let blob = self.blob(digest, None)?;
        read_all(blob, limit).map_err(|error| self.unreadable(digest, error))
    }

    fn unreadable(&self, digest: &Digest, source: io::Error) -> ImageError {
        ImageError::ArchiveBlob { image: self.image.clone(), digest: digest.clone(), source }
    }

    fn read(&self, name: &str) -> io::Result<io::Take<File>> {
        match &self.store {
            Store::Dir(root) => {
                // Layouts may share blobs by hard links, but a symlink must not lead out of the layout's directory.
                let how = OpenHow::new()
                    .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
                    .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
                let file = reopen(&File::from(openat2(root, name, how)?), FileKind::File)?;
                let length = file.metadata()?.len();
                Ok(file.take(length))
            }
            Store::Tar(file, entries) => {
                let &(offset, length) = entries.get(name).ok_or_else(|| {
                    let problem = format!("there is no {name} in the archive; it may be cut off");
                    io::Error::new(io::ErrorKind::NotFound, problem)
                })?;
                // The file is opened once more, because each concurrent reader needs a file offset of its own.
                let mut own = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
                if offset + length > own.metadata()?.len() {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive is cut off"));
                }
                own.seek(SeekFrom::Start(offset))?;
                Ok(own.take(length))
            }
        }
    }

    fn json(&self, name: &str) -> Result<Vec<u8>, String> {
        let read = self.read(name).and_then(|file| read_all(file, DOCUMENT_MAX));
        read.map_err(|error| format!("{name}: {error}"))
    }

    /// Reads `index.json` (image-spec, image-layout.md) and returns media type and bytes of the image that `tag` names.
    fn read_oci_index(&self, tag: Option<&str>) -> Result<(String, Vec<u8>), String> {
        let bytes = self.json("index.json")?;
        let index: ImageIndex = serde_json::from_slice(&bytes).map_err(|error| format!("index.json: {error}"))?;
        let named = |tag: &str| {
            index.manifests().iter().find(|manifest| {
                manifest.annotations().as_ref().and_then(|notes| notes.get(REF_NAME)).is_some_and(|name| name == tag)
            })
        };
        let chosen = match (tag, index.manifests().as_slice()) {
            (Some(tag), _) => named(tag).ok_or_else(|| format!("it has no image called {tag:?}"))?,
            (None, [only]) => only,
            (None, []) => return Err("it contains no image".to_owned()),
            // Several entries are one image for several platforms if each names its platform. Otherwise they are
            // several images, and the caller must name one.
            (None, many) if many.iter().any(|manifest| manifest.platform().is_none()) => {
                return Err(format!("it contains {} images; name one of them (oci:PATH:NAME)", many.len()));
            }
            (None, _) => return Ok((String::new(), bytes)),
        };
        let digest = Digest::new(chosen.digest().as_ref()).map_err(|error| error.to_string())?;
        let bytes = self.document(&digest, DOCUMENT_MAX).map_err(|error| crate::error_chain(&error))?;
        if Digest::of(&bytes) != digest {
            return Err(format!("the content of manifest {digest} has another digest"));
        }
        Ok((chosen.media_type().to_string(), bytes))
    }

    /// Reads an archive of `docker save` (docker's image-spec v1.2): `manifest.json` names a configuration and plain
    /// tar files. The function makes a manifest from these, as `docker push` does, and returns its media type and
    /// bytes.
    fn read_docker_manifest(
        &mut self,
        tag: Option<&str>,
        keep_going: &AtomicBool,
    ) -> Result<(String, Vec<u8>), String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Saved {
            config: String,
            repo_tags: Option<Vec<String>>,
            layers: Vec<String>,
        }
        let bytes = self.json("manifest.json")?;
        let mut saved: Vec<Saved> =
            serde_json::from_slice(&bytes).map_err(|error| format!("manifest.json: {error}"))?;
        if let Some(tag) = tag {
            saved.retain(|one| one.repo_tags.iter().flatten().any(|name| name == tag));
        }
        let [one] = &saved[..] else {
            let count = saved.len();
            return Err(format!("{count} of its images match; name exactly one (docker-archive:FILE:NAME)"));
        };
        let config = self.json(&one.config)?;
        let config_digest = Digest::of(&config);
        self.blobs.insert(config_digest.clone(), one.config.clone());
        if one.layers.len() > LAYERS_MAX {
            return Err(format!("it has {} layers; an image has at most {LAYERS_MAX}", one.layers.len()));
        }
        let mut layers = Vec::new();
        for name in &one.layers {
            let (digest, size, kind) = self.hash(name, keep_going).map_err(|error| format!("{name}: {error}"))?;
            self.blobs.insert(digest.clone(), name.clone());
            layers.push(json!({"mediaType": kind, "digest": digest, "size": size}));
        }
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": media_type, "layers": layers,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config_digest, "size": config.len(),
            },
        });
        Ok((media_type.to_owned(), manifest.to_string().into_bytes()))
    }

    /// Returns the digest, size and media type of a layer's file.
    fn hash(&self, name: &str, keep_going: &AtomicBool) -> io::Result<(Digest, u64, &'static str)> {
        let mut file = self.read(name)?;
        let (mut hash, mut size, mut buffer) = (Sha256::new(), 0, vec![0; 256 << 10]);
        let mut kind = "application/vnd.oci.image.layer.v1.tar";
        loop {
            if !keep_going.load(Ordering::Relaxed) {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "the pull was cancelled"));
            }
            let count = file.read(&mut buffer)?;
            if count == 0 {
                return Ok((Digest::from_hash(&hash.finalize()), size, kind));
            }
            if size == 0 && buffer.starts_with(&[0x1f, 0x8b]) {
                kind = "application/vnd.oci.image.layer.v1.tar+gzip";
            }
            size += count as u64;
            hash.update(&buffer[..count]);
        }
    }
}

fn read_all(mut file: io::Take<File>, limit: u64) -> io::Result<Vec<u8>> {
    if file.limit() > limit {
        return Err(io::Error::other(format!("it is larger than {limit} bytes")));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Returns the offset and length of each file in a tar archive by name. A link gets the offset and length of its
/// target: older versions of docker save a layer that an image has twice as a link.
fn list_entries(file: &File) -> Result<HashMap<String, (u64, u64)>, String> {
    let mut magic = [0; 4];
    let read = (&*file).read(&mut magic).map_err(|error| error.to_string())?;
    (&*file).rewind().map_err(|error| error.to_string())?;
    if magic.starts_with(&[0x1f, 0x8b]) || magic == [0x28, 0xb5, 0x2f, 0xfd] {
        return Err("it is compressed; unpack it first (gunzip, unzstd)".to_owned());
    }
    if read == 0 {
        return Err("it is empty".to_owned());
    }
    let mut archive = tar::Archive::new(file);
    let (mut found, mut links) = (HashMap::new(), Vec::new());
    let unreadable = |error: io::Error| format!("it is not a tar archive, or it is cut off: {error}");
    let (mut extended, mut names) = (LongNames::default(), 0);
    // Raw entries are read. Otherwise the library would read the extension entry before an entry (its long name, its
    // attributes) into memory as a whole, without a limit.
    for (count, entry) in archive.entries_with_seek().map_err(unreadable)?.raw(true).enumerate() {
        let mut entry = entry.map_err(unreadable)?;
        if count >= ENTRIES_MAX {
            return Err(format!("it has more than {ENTRIES_MAX} entries"));
        }
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() || kind.is_gnu_longlink() || kind.is_pax_local_extensions() {
            if entry.size() > EXTENSION_MAX {
                return Err("an entry's name or attributes take more than 1 MiB".to_owned());
            }
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(unreadable)?;
            extended.take(kind, &bytes)?;
            continue;
        }
        let LongNames { path, link } = std::mem::take(&mut extended);
        names += path.as_ref().map_or(0, String::len) + link.as_ref().map_or(0, String::len);
        if names > NAMES_MAX {
            return Err(format!("its long names take more than {} MiB", NAMES_MAX >> 20));
        }
        let name = match path {
            Some(path) => normalize_name(Path::new(&path)),
            None => normalize_name(&entry.header().path().map_err(unreadable)?),
        };
        if kind.is_file() {
            found.insert(name, (entry.raw_file_position(), entry.size()));
        } else if kind.is_symlink() || kind.is_hard_link() {
            let named = entry.header().link_name().ok().flatten().map(|link| link.to_string_lossy().into_owned());
            let Some(target) = link.or(named) else { continue };
            let target = match Path::new(&name).parent().filter(|_| kind.is_symlink()) {
                Some(parent) => normalize_name(&parent.join(target)),
                None => normalize_name(Path::new(&target)),
            };
            links.push((name, target));
        }
    }
    for (name, target) in links {
        if let Some(&location) = found.get(&target) {
            found.insert(name, location);
        }
    }
    Ok(found)
}

/// The long names that extension entries give to the next entry of a tar archive.
#[derive(Default)]
struct LongNames {
    path: Option<String>,
    link: Option<String>,
}

impl LongNames {
    /// Stores the names in the body of an extension entry.
    fn take(&mut self, kind: tar::EntryType, bytes: &[u8]) -> Result<(), String> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
        if kind.is_gnu_longname() {
            self.path = Some(text(bytes));
        } else if kind.is_gnu_longlink() {
            self.link = Some(text(bytes));
        } else {
            for pair in tar::PaxExtensions::new(bytes) {
                let pair = pair.map_err(|error| format!("an entry's attributes: {error}"))?;
                match pair.key_bytes() {
                    b"path" => self.path = Some(text(pair.value_bytes())),
                    b"linkpath" => self.link = Some(text(pair.value_bytes())),
                    b"size" => return Err("it has an entry of more than 8 GiB".to_owned()),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// The kind of file that a path must lead to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FileKind {
    File,
    Directory,
}

/// Opens a path for reading after its kind was checked through an `O_PATH` descriptor: opening a FIFO would block, and
/// opening some devices has side effects.
fn open_path(path: &Path, wanted: FileKind) -> io::Result<File> {
    reopen(&File::options().read(true).custom_flags(libc::O_PATH).open(path)?, wanted)
}

/// Opens a file for reading to which an `O_PATH` descriptor refers, if it is of the wanted kind.
fn reopen(named: &File, wanted: FileKind) -> io::Result<File> {
    let kind = named.metadata()?.file_type();
    match wanted {
        FileKind::File if !kind.is_file() => Err(io::Error::other("it is not a regular file")),
        FileKind::Directory if !kind.is_dir() => Err(io::Error::other("it is not a directory")),
        _ => File::open(format!("/proc/self/fd/{}", named.as_raw_fd())),
    }
}

/// Normalizes a name in an archive: `./a/../b` becomes `b`. Such names are only looked up in a table, never opened.
fn normalize_name(path: &Path) -> String {
    let mut parts: Vec<String> = Vec::new();
    for part in path.components() {
        match part {
            std::path::Component::Normal(part) => parts.push(part.to_string_lossy().into_owned()),
            std::path::Component::ParentDir => drop(parts.pop()),
            _ => {}
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_normalized() {
        for (name, plain_name) in [("./a/b", "a/b"), ("x/../y", "y"), ("../../etc/passwd", "etc/passwd"), ("/a", "a")] {
            assert_eq!(normalize_name(Path::new(name)), plain_name);
        }
    }

    #[test]
    fn other_files_are_refused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let read = |bytes: &[u8]| {
            let path = directory.path().join("x");
            std::fs::write(&path, bytes).expect("written");
            list_entries(&File::open(path).expect("opened"))
        };
        assert!(read(&[0x1f, 0x8b, 8, 0]).expect_err("gzip").contains("compressed"));
        assert!(read(b"").expect_err("nothing").contains("empty"));
        assert!(read(&[b'x'; 700]).expect_err("no header").contains("not a tar archive"));
    }
}
