//! Scans a layer while it is downloaded: computes its uncompressed digest, and refuses entries that escape the root.

use std::{
    fmt,
    io::{self, BufReader, Read},
    thread,
};

use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, oneshot};

use super::{
    confine,
    tar_extensions::{ExtensionProblem, ExtensionScanner, escapes_root},
};
use crate::ids::Digest;

/// Why a layer was refused.
#[derive(Debug, thiserror::Error)]
pub enum LayerProblem {
    /// An entry would be unpacked outside of the container's root.
    #[error("entry {entry:?} escapes the image's root")]
    EntryEscapes {
        /// The entry's name.
        entry: String,
    },
    /// The target of a hard link is outside of the container's root.
    #[error("entry {entry:?} is a hard link to {target:?}, which escapes the image's root")]
    LinkEscapes {
        /// The entry's name.
        entry: String,
        /// The link's target.
        target: String,
    },
    /// The compressed stream or the archive ends early.
    #[error("it is cut off")]
    Truncated,
    /// The layer is not a valid gzip, zstd or tar stream.
    #[error("it can't be unpacked")]
    Unreadable {
        /// The error of the decoder.
        source: io::Error,
    },
    /// The layer's uncompressed digest is not the one in the image's configuration.
    #[error("its uncompressed digest is {actual}, the image's config says {expected}")]
    DiffId {
        /// The digest in the configuration.
        expected: Digest,
        /// The digest of the layer's uncompressed bytes.
        actual: Digest,
    },
    /// The layer unpacks to more bytes than the limit.
    #[error("it unpacks to more than {} GiB", UNPACKED_MAX >> 30)]
    TooLarge,
    /// An entry has a name or attributes of more than a megabyte.
    #[error("an entry's name or attributes take more than 1 MiB")]
    LongName,
    /// The thread that scans the layer could not be started, or ended without a result.
    #[error("the thread that scans it could not be started, or ended without a result")]
    ScanFailed,
}

/// The largest number of bytes that a layer may unpack to. Zeroes compress by a factor of more than a thousand, so a
/// layer of megabytes could fill a disk.
const UNPACKED_MAX: u64 = 256 << 30;
/// The number of downloaded chunks that wait for the scanning thread.
const QUEUED_CHUNKS_MAX: usize = 16;

/// A running scan of a layer. The caller passes the compressed bytes to `feed`, and then calls `finish`.
pub(crate) struct LayerScan {
    feed: mpsc::Sender<Vec<u8>>,
    verdict: oneshot::Receiver<Result<Digest, LayerProblem>>,
}

impl fmt::Debug for LayerScan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerScan").finish_non_exhaustive()
    }
}

impl LayerScan {
    /// Starts a confined thread that scans the layer.
    pub(crate) fn start() -> Self {
        let (feed, receive) = mpsc::channel(QUEUED_CHUNKS_MAX);
        let (result_sender, verdict) = oneshot::channel();
        let spawned = thread::Builder::new().name("layer".to_owned()).spawn(move || {
            if let Err(error) = confine::this_thread() {
                tracing::warn!(
                    error = %crate::error_chain(&error),
                    "could not confine the thread that scans a layer; the thread runs without confinement"
                );
            }
            let _ = result_sender.send(scan_layer(ChunkReader { receive, chunk: Vec::new(), at: 0 }));
        });
        if let Err(error) = spawned {
            // The sender of the result was dropped with the closure, so that `finish` returns an error.
            tracing::warn!(%error, "could not start a thread that scans a layer");
        }
        Self { feed, verdict }
    }

    /// Passes the next compressed bytes to the thread. If the thread has already ended, because it has refused the
    /// layer, the bytes are dropped; `finish` returns the reason.
    pub(crate) async fn feed(&self, bytes: Vec<u8>) {
        let _ = self.feed.send(bytes).await;
    }

    /// Ends the input, waits for the thread, and returns the digest of the uncompressed stream.
    ///
    /// # Errors
    /// Fails when the layer is refused, or the thread ended without a result.
    pub(crate) async fn finish(self) -> Result<Digest, LayerProblem> {
        drop(self.feed);
        self.verdict.await.unwrap_or(Err(LayerProblem::ScanFailed))
    }
}

/// A blocking reader of the chunks that come through a channel.
struct ChunkReader {
    receive: mpsc::Receiver<Vec<u8>>,
    chunk: Vec<u8>,
    at: usize,
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.chunk.len() {
            match self.receive.blocking_recv() {
                Some(chunk) => (self.chunk, self.at) = (chunk, 0),
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.chunk.len() - self.at);
        buffer[..count].copy_from_slice(&self.chunk[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// A reader that hashes and counts the bytes of the plain archive, and checks its extension entries.
struct HashingReader<R> {
    inner: R,
    hash: Sha256,
    count: u64,
    extensions: ExtensionScanner,
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.count += count as u64;
        if self.count > UNPACKED_MAX {
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        match self.extensions.feed(&buffer[..count]) {
            Ok(()) => Ok(count),
            Err(ExtensionProblem::TooLarge) => Err(io::Error::from(io::ErrorKind::QuotaExceeded)),
            Err(ExtensionProblem::Ambiguous) => {
                Err(io::Error::new(io::ErrorKind::InvalidData, "a pax header gives the next entry two sizes"))
            }
        }
    }
}

/// Scans a layer and returns the digest of its uncompressed bytes.
fn scan_layer(mut input: impl Read + 'static) -> Result<Digest, LayerProblem> {
    // The first chunk of a download can have any size, so the magic number may be divided between two chunks.
    let mut magic = Vec::new();
    input.by_ref().take(4).read_to_end(&mut magic).map_err(classify_error)?;
    let first_bytes = magic.clone();
    let input = BufReader::with_capacity(256 << 10, io::Cursor::new(magic).chain(input));
    let plain: Box<dyn Read> = match first_bytes[..] {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::Decoder::with_buffer(input).map_err(classify_error)?),
        _ => Box::new(input),
    };
    let mut archive = tar::Archive::new(HashingReader {
        inner: plain,
        hash: Sha256::new(),
        count: 0,
        extensions: ExtensionScanner::default(),
    });
    for entry in archive.entries().map_err(classify_error)? {
        let entry = entry.map_err(classify_error)?;
        let name = entry.path_bytes();
        if escapes_root(&name) {
            return Err(LayerProblem::EntryEscapes { entry: String::from_utf8_lossy(&name).into_owned() });
        }
        if entry.header().entry_type().is_hard_link()
            && let Some(target) = entry.link_name_bytes()
            && escapes_root(&target)
        {
            let (entry, target) = (String::from_utf8_lossy(&name), String::from_utf8_lossy(&target));
            return Err(LayerProblem::LinkEscapes { entry: entry.into_owned(), target: target.into_owned() });
        }
    }
    // The digest includes the bytes after the end-of-archive marker (padding).
    let mut rest = archive.into_inner();
    io::copy(&mut rest, &mut io::sink()).map_err(classify_error)?;
    // `tar_extensions` reads names in pax records as containerd does, which may differ from those of the tar crate
    // above.
    if let Some(name) = rest.extensions.escaping_name() {
        return Err(LayerProblem::EntryEscapes { entry: String::from_utf8_lossy(name).into_owned() });
    }
    Ok(Digest::from_hash(&rest.hash.finalize()))
}

fn classify_error(source: io::Error) -> LayerProblem {
    match source.kind() {
        io::ErrorKind::UnexpectedEof => LayerProblem::Truncated,
        io::ErrorKind::FileTooLarge => LayerProblem::TooLarge,
        io::ErrorKind::QuotaExceeded => LayerProblem::LongName,
        // The tar crate reports a header that is cut off only by the text of its error.
        _ if source.to_string().contains("failed to read entire block") => LayerProblem::Truncated,
        _ => LayerProblem::Unreadable { source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write as _;

    fn archive(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, link) in entries {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(*kind);
            header.set_size(0);
            header.set_mode(0o644);
            // The name is written into the header's bytes, because the crate's own setter refuses the names that this
            // test needs.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_cksum();
            builder.append(&header, io::empty()).expect("written to memory");
        }
        builder.into_inner().expect("written to memory")
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).expect("written to memory");
        encoder.finish().expect("written to memory")
    }

    #[test]
    fn the_digest_is_that_of_the_plain_archive_however_it_is_packed() {
        let plain = archive(&[("bin/", tar::EntryType::Directory, ""), ("bin/sh", tar::EntryType::Regular, "")]);
        let expected = Digest::of(&plain);
        for packed in [plain.clone(), gzip(&plain), zstd::encode_all(&plain[..], 1).expect("compressed")] {
            assert_eq!(scan_layer(io::Cursor::new(packed)).expect("a good layer"), expected);
        }
        let half = plain.len() / 2;
        let members = [gzip(&plain[..half]), gzip(&plain[half..])].concat();
        assert_eq!(scan_layer(io::Cursor::new(members)).expect("several gzip members"), expected);
    }

    #[test]
    fn entries_that_escape_the_root_are_refused() {
        for name in ["../x", "a/../../x", "/../x"] {
            let layer = archive(&[(name, tar::EntryType::Regular, "")]);
            let problem = scan_layer(io::Cursor::new(layer)).expect_err("refused");
            assert!(matches!(&problem, LayerProblem::EntryEscapes { entry } if entry == name), "{problem:?}");
        }
        let layer = archive(&[("x", tar::EntryType::Link, "../../etc/shadow")]);
        assert!(matches!(scan_layer(io::Cursor::new(layer)), Err(LayerProblem::LinkEscapes { .. })));
        let fine = archive(&[("a/../b", tar::EntryType::Regular, ""), ("l", tar::EntryType::Symlink, "../../../x")]);
        assert!(scan_layer(io::Cursor::new(fine)).is_ok(), "a symlink's target is resolved inside the root");
    }

    #[test]
    fn layers_that_are_cut_off_are_recognized() {
        let plain = archive(&[("a", tar::EntryType::Regular, ""), ("b", tar::EntryType::Regular, "")]);
        let packed = gzip(&plain);
        let cut = packed[..packed.len() - 12].to_vec();
        assert!(matches!(scan_layer(io::Cursor::new(cut)), Err(LayerProblem::Truncated)));
        assert!(matches!(scan_layer(io::Cursor::new(plain[..700].to_vec())), Err(LayerProblem::Truncated)));
    }

    #[test]
    fn a_name_of_gigabytes_is_refused_before_it_is_read() {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(1 << 34);
        header.set_cksum();
        let bomb = io::Cursor::new(header.as_bytes().to_vec()).chain(io::repeat(b'a').take(1 << 34));
        assert!(matches!(scan_layer(bomb), Err(LayerProblem::LongName)));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = scan_layer(io::Cursor::new(bytes));
        }
    }
}
