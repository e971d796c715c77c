//! Parses sizes as docker writes them: `64m`, `1.5g`, `65536k`, or a number of bytes without a unit.

/// A text that is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a size such as 64m, 1.5g or a number of bytes")]
pub struct SizeError(String);

/// Parses a size and returns bytes. Units are powers of 1024, in upper or lower case, with or without `b` or `ib` after
/// them (docker/go-units, `RAMInBytes`).
///
/// # Errors
/// Fails when the text is not a size, or the size is larger than the kernel's counters.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let wrong = || SizeError(text.to_owned());
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..end].parse().map_err(|_| wrong())?;
    let unit = text[end..].trim_start().to_ascii_lowercase();
    let (unit, bytes) = match unit.strip_suffix('b') {
        Some(rest) => (rest.strip_suffix('i').unwrap_or(rest), rest.ends_with('i')),
        None => (unit.as_str(), false),
    };
    let power = match unit {
        "" if !bytes => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err(wrong()),
    };
    let size = number * 1024_f64.powi(power);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "digits only, and the range is checked")]
    if size < 9.0e18 { Ok(size as u64) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_dockers() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1k", 1024),
            ("128M", 128 << 20),
            ("64mb", 64 << 20),
            ("2GiB", 2 << 30),
            ("1.5g", 3 << 29),
            ("7 m", 7 << 20),
            ("3b", 3),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "m", "-1", "1x", "1..2m", "1e3", "10%", "99999999999p", "1ib", "m1"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
