//! Keeps a tar archive's extension entries small.
//!
//! Long names (GNU `L`, `K`) and pax records (`x`, `g`) are read whole into memory by every tar reader. A few megabytes
//! of compressed zeroes could make that a hundred gigabytes. So the plain stream is followed header by header, and an
//! extension larger than Go's own limit ends it.

/// As in Go's archive/tar, so nothing that containerd unpacks is refused here.
const EXTENSION_MAX: u64 = 1 << 20;
/// tar's block (POSIX.1-1988, ustar).
const BLOCK: usize = 512;

/// An extension entry is too large.
#[derive(Debug, PartialEq, Eq)]
pub struct TooLarge;

/// Follows an archive.
#[derive(Debug, Default)]
pub struct Extensions {
    header: Vec<u8>,
    /// Of the entry at hand, padding included.
    left: u64,
    /// The body of a pax record, whose `size` counts for the next entry.
    pax: Option<Vec<u8>>,
    next_size: Option<u64>,
}

impl Extensions {
    /// The next bytes of the plain archive.
    ///
    /// # Errors
    /// When an extension entry is too large.
    pub fn follow(&mut self, mut bytes: &[u8]) -> Result<(), TooLarge> {
        while !bytes.is_empty() {
            if self.left > 0 {
                let count = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
                if let Some(pax) = &mut self.pax {
                    pax.extend_from_slice(&bytes[..count]);
                }
                self.left -= count as u64;
                bytes = &bytes[count..];
            } else {
                let count = (BLOCK - self.header.len()).min(bytes.len());
                self.header.extend_from_slice(&bytes[..count]);
                bytes = &bytes[count..];
                if self.header.len() < BLOCK {
                    return Ok(());
                }
                self.enter()?;
            }
            if self.left == 0
                && let Some(pax) = self.pax.take()
            {
                self.next_size = pax_size(&pax);
            }
        }
        Ok(())
    }

    fn enter(&mut self) -> Result<(), TooLarge> {
        let size = size(&self.header[124..136]);
        let kind = self.header[156];
        self.header.clear();
        let size = match kind {
            b'L' | b'K' | b'x' | b'g' => {
                if size > EXTENSION_MAX {
                    return Err(TooLarge);
                }
                if kind == b'x' {
                    self.pax = Some(Vec::new());
                }
                size
            }
            _ => self.next_size.take().unwrap_or(size),
        };
        self.left = size.div_ceil(BLOCK as u64).saturating_mul(BLOCK as u64);
        Ok(())
    }
}

/// Octal, or GNU's base 256 when the first bit is set. Nonsense is 0: the reader proper refuses it.
fn size(field: &[u8]) -> u64 {
    if field[0] & 0x80 != 0 {
        return field[4..].iter().fold(0, |number: u64, byte| number << 8 | u64::from(*byte));
    }
    let text = String::from_utf8_lossy(field);
    u64::from_str_radix(text.trim_matches(['\0', ' ']), 8).unwrap_or(0)
}

/// `size` of a pax record's body: lines of `LENGTH KEY=VALUE`.
fn pax_size(body: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(body);
    text.lines().find_map(|line| line.split_once(' ')?.1.strip_prefix("size=")?.parse().ok())
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
        // In pieces of any size.
        for piece in [1, 7, 512, 100_000] {
            let mut extensions = Extensions::default();
            let outcome = small.chunks(piece).try_for_each(|chunk| extensions.follow(chunk));
            assert_eq!(outcome, Err(TooLarge), "{piece}");
        }
        assert_eq!(Extensions::default().follow(&small[..small.len() - 512]), Ok(()));
    }

    #[test]
    fn a_pax_size_counts_for_the_next_entry() {
        let record = b"13 size=1024\n";
        let mut archive = header(b'x', record.len() as u64);
        archive.extend_from_slice(record);
        archive.resize(1024, 0);
        archive.extend(header(b'0', 0));
        // The file's body looks like a huge extension; it must be passed over.
        archive.extend(header(b'L', 1 << 40));
        archive.extend(vec![0; 512]);
        assert_eq!(Extensions::default().follow(&archive), Ok(()));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let _ = Extensions::default().follow(&bytes);
        }
    }
}
