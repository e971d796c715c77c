//! Limits the size of a tar archive's extension entries, and checks the names in pax records.
//!
//! Every tar reader reads long names (GNU `L`, `K`) and pax records (`x`, `g`) into memory as a whole. A few megabytes
//! of compressed zeroes could become a name of a hundred gigabytes. So this module parses the plain stream header by
//! header, and refuses an archive with an extension entry that is larger than the limit of Go's archive/tar.
//!
//! This module reads the records of a pax header by their lengths, as containerd does (Go's archive/tar,
//! `parsePAXRecord`). The tar crate reads them by lines and uses the first record of a key, where Go uses the last.

/// The largest extension entry that is accepted. Go's archive/tar has the same limit, so that every archive that
/// containerd can unpack is accepted.
const EXTENSION_MAX: u64 = 1 << 20;
/// The type of a hard link in an entry's header.
const HARD_LINK: u8 = b'1';
/// The size of a tar block (POSIX.1-1988, ustar).
const BLOCK: usize = 512;

/// Why an archive is refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ExtensionProblem {
    /// An extension entry is too large.
    TooLarge,
    /// Readers of pax records disagree about the length of the next entry: bytes that are a file's content to one
    /// reader are a further entry to another reader, and this further entry would not have been checked.
    Ambiguous,
}

/// A parser of a tar archive's headers and extension entries.
#[derive(Debug, Default)]
pub(crate) struct ExtensionScanner {
    header: Vec<u8>,
    /// The bytes of the current entry that are still to come, padding included.
    remaining: u64,
    /// The body of the current pax header, whose record `size` applies to the next entry.
    pax: Option<Vec<u8>>,
    next_size: Option<u64>,
    /// The target of the next entry according to a pax record, if that target escapes the root. It counts only if that
    /// entry is a hard link.
    next_link: Option<Vec<u8>>,
    /// The first name in a pax record that escapes the root.
    escaping_name: Option<Vec<u8>>,
}

impl ExtensionScanner {
    /// Returns the first name in a pax record that escapes the root: the name of an entry or the target of a hard link.
    pub(crate) fn escaping_name(&self) -> Option<&[u8]> {
        self.escaping_name.as_deref()
    }

    /// Parses the next bytes of the plain archive.
    ///
    /// # Errors
    /// Fails when an extension entry is too large or ambiguous.
    pub(crate) fn feed(&mut self, mut bytes: &[u8]) -> Result<(), ExtensionProblem> {
        while !bytes.is_empty() {
            if self.remaining > 0 {
                let count = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(bytes.len());
                if let Some(pax) = &mut self.pax {
                    pax.extend_from_slice(&bytes[..count]);
                }
                self.remaining -= count as u64;
                bytes = &bytes[count..];
            } else {
                let count = (BLOCK - self.header.len()).min(bytes.len());
                self.header.extend_from_slice(&bytes[..count]);
                bytes = &bytes[count..];
                if self.header.len() < BLOCK {
                    return Ok(());
                }
                self.begin_entry()?;
            }
            if self.remaining == 0
                && let Some(pax) = self.pax.take()
            {
                self.next_size = pax_size_by_lines(&pax);
                self.check_pax_records(&pax)?;
            }
        }
        Ok(())
    }

    /// Checks the records of a pax header: whether readers agree about the size, and whether a name escapes the root.
    fn check_pax_records(&mut self, pax: &[u8]) -> Result<(), ExtensionProblem> {
        let values_of =
            |wanted: &'static [u8]| records(pax).filter(move |(key, _)| *key == wanted).map(|(_, value)| value);
        let size = values_of(b"size").last().and_then(|value| std::str::from_utf8(value).ok()?.parse().ok());
        if size != self.next_size {
            return Err(ExtensionProblem::Ambiguous);
        }
        let name = values_of(b"path").chain(values_of(b"GNU.sparse.name")).find(|name| escapes_root(name));
        self.escaping_name = self.escaping_name.take().or(name.map(<[u8]>::to_vec));
        self.next_link = values_of(b"linkpath").find(|target| escapes_root(target)).map(<[u8]>::to_vec);
        Ok(())
    }

    /// Begins the entry whose header is complete.
    fn begin_entry(&mut self) -> Result<(), ExtensionProblem> {
        let size = parse_size(&self.header[124..136]);
        let kind = self.header[156];
        self.header.clear();
        let size = match kind {
            b'L' | b'K' | b'x' | b'g' => {
                if size > EXTENSION_MAX {
                    return Err(ExtensionProblem::TooLarge);
                }
                if kind == b'x' {
                    self.pax = Some(Vec::new());
                }
                size
            }
            _ => {
                let link = self.next_link.take().filter(|_| kind == HARD_LINK);
                self.escaping_name = self.escaping_name.take().or(link);
                self.next_size.take().unwrap_or(size)
            }
        };
        self.remaining = size.div_ceil(BLOCK as u64).saturating_mul(BLOCK as u64);
        Ok(())
    }
}

/// Parses the size field of a header: octal, or GNU's base 256 when the first bit is set. A malformed field counts as
/// 0, because the tar reader refuses it.
fn parse_size(field: &[u8]) -> u64 {
    if field[0] & 0x80 != 0 {
        return field[4..].iter().fold(0, |number: u64, byte| number << 8 | u64::from(*byte));
    }
    let text = String::from_utf8_lossy(field);
    u64::from_str_radix(text.trim_matches(['\0', ' ']), 8).unwrap_or(0)
}

/// Returns the record `size` of a pax header's body as the tar crate reads it: by lines of `LENGTH KEY=VALUE`.
fn pax_size_by_lines(body: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(body);
    text.lines().find_map(|line| line.split_once(' ')?.1.strip_prefix("size=")?.parse().ok())
}

/// Returns the records of a pax header's body, each read by its own length. Records after a malformed one are left out,
/// as no reader uses them.
fn records(mut body: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    std::iter::from_fn(move || {
        let blank = body.iter().position(|byte| *byte == b' ')?;
        let length: usize = std::str::from_utf8(&body[..blank]).ok()?.parse().ok()?;
        let record = body.get(blank + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        body = &body[length..];
        Some((&record[..equals], &record[equals + 1..]))
    })
}

/// Returns whether any prefix of a path leads above the root: `a/../../b` does, `a/../b` does not.
pub(super) fn escapes_root(path: &[u8]) -> bool {
    let mut depth = 0_i64;
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => depth -= 1,
            _ => depth += 1,
        }
        if depth < 0 {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(kind: u8, size: u64) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_size(size);
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    #[test]
    fn only_large_extensions_are_refused() {
        let mut small = header(b'L', 300);
        small.extend(vec![b'a'; 512]);
        small.extend(header(b'0', 5000));
        small.extend(vec![0; 5120]);
        small.extend(header(b'x', EXTENSION_MAX + 1));
        // The outcome must not depend on the size of the pieces.
        for piece in [1, 7, 512, 100_000] {
            let mut extensions = ExtensionScanner::default();
            let outcome = small.chunks(piece).try_for_each(|chunk| extensions.feed(chunk));
            assert_eq!(outcome, Err(ExtensionProblem::TooLarge), "{piece}");
        }
        assert_eq!(ExtensionScanner::default().feed(&small[..small.len() - 512]), Ok(()));
    }

    #[test]
    fn a_pax_size_applies_to_the_next_entry() {
        let record = b"13 size=1024\n";
        let mut archive = header(b'x', record.len() as u64);
        archive.extend_from_slice(record);
        archive.resize(1024, 0);
        archive.extend(header(b'0', 0));
        // The file's content looks like a huge extension entry. It must be skipped.
        archive.extend(header(b'L', 1 << 40));
        archive.extend(vec![0; 512]);
        assert_eq!(ExtensionScanner::default().feed(&archive), Ok(()));
    }

    /// Parses a pax header with this body and an entry of this kind after it. Returns the outcome and the name that
    /// escapes the root.
    fn followed(body: &str, kind: u8) -> (Result<(), ExtensionProblem>, Option<String>) {
        let mut archive = header(b'x', body.len() as u64);
        archive.extend_from_slice(body.as_bytes());
        archive.resize(archive.len().next_multiple_of(BLOCK), 0);
        archive.extend(header(kind, 0));
        let mut extensions = ExtensionScanner::default();
        let outcome = extensions.feed(&archive);
        (outcome, extensions.escaping_name().map(|name| String::from_utf8_lossy(name).into_owned()))
    }

    #[test]
    fn names_are_read_by_their_lengths() {
        for (body, kind, climbing) in [
            ("8 path=a\n12 path=../x\n", b'0', None),
            ("9 path=a\n13 path=../x\n", b'0', Some("../x")),
            ("15 path=../x\ny\n", b'0', Some("../x\ny")),
            ("27 comment=a\n13 path=../x\n\n", b'0', None),
            ("24 GNU.sparse.name=../x\n", b'0', Some("../x")),
            ("17 linkpath=../x\n", HARD_LINK, Some("../x")),
            ("17 linkpath=../x\n", b'2', None),
            ("13 path=a/../b\n", b'0', None),
        ] {
            assert_eq!(followed(body, kind), (Ok(()), climbing.map(str::to_owned)), "{body:?}");
        }
    }

    #[test]
    fn sizes_that_readers_disagree_on_are_refused() {
        assert_eq!(followed("10 size=0\n12 size=512\n", b'0').0, Err(ExtensionProblem::Ambiguous));
        assert_eq!(followed("26 comment=a\n12 size=512\n\n", b'0').0, Err(ExtensionProblem::Ambiguous));
        assert_eq!(followed("12 size=512\n", b'0').0, Ok(()));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let _ = ExtensionScanner::default().feed(&bytes);
        }
    }
}
