//! The sizes of file systems in memory (tmpfs(5)).

/// The size of `/dev/shm` for a job that does not set it, as in docker.
pub const SHM_SIZE: u64 = 64 << 20;

/// How large a tmpfs may grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TmpfsSize {
    /// This many bytes, blocks or inodes.
    Count(u64),
    /// This share of the host's memory.
    Percent(u64),
    /// There is no limit. The kernel reads a size of 0 as no limit.
    Unlimited,
}

impl TmpfsSize {
    /// Parses a size as the kernel does: a decimal number with a suffix, or a percentage. Returns `None` for a text
    /// that the kernel would read as another number than a person does (`010m` is octal, `0x10` hexadecimal: linux,
    /// `lib/cmdline.c`, `memparse`).
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, suffix) = text.split_at(digits);
        if number.len() > 1 && number.starts_with('0') {
            return None;
        }
        let number: u64 = number.parse().ok()?;
        let shift = match suffix.to_ascii_lowercase().as_str() {
            "" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            "p" => 50,
            "e" => 60,
            "%" if number == 0 => return Some(Self::Unlimited),
            "%" => return Some(Self::Percent(number)),
            _ => return None,
        };
        match number.checked_mul(1 << shift)? {
            0 => Some(Self::Unlimited),
            count => Some(Self::Count(count)),
        }
    }

    /// Returns the size in bytes on a host with this much memory; `None` for a share of a memory whose size is not
    /// known.
    pub fn bytes(self, memory: Option<u64>) -> Option<u64> {
        match self {
            Self::Count(count) => Some(count),
            Self::Percent(share) => memory.map(|memory| memory.saturating_mul(share) / 100),
            Self::Unlimited => Some(u64::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_kernels() {
        for (text, size) in [
            ("4096", Some(TmpfsSize::Count(4096))),
            ("64m", Some(TmpfsSize::Count(64 << 20))),
            ("1T", Some(TmpfsSize::Count(1 << 40))),
            ("10%", Some(TmpfsSize::Percent(10))),
            ("0", Some(TmpfsSize::Unlimited)),
            ("0g", Some(TmpfsSize::Unlimited)),
            ("0%", Some(TmpfsSize::Unlimited)),
        ] {
            assert_eq!(TmpfsSize::parse(text), size, "{text}");
        }
        for text in ["", "m", "1.5g", "010m", "0x10", "1mb", "1 m", "-1", "+1", "99999999e", "10k%", "1,2"] {
            assert_eq!(TmpfsSize::parse(text), None, "{text}");
        }
    }
}
