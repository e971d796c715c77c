//! Durations as Nomad's users write them: Go's syntax (`"5m"`, `"1h30m"`, `"1.5s"`, `"500ms"`).

use std::time::Duration;

/// A text that is not a duration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a duration such as \"5m\", \"1h30m\" or \"500ms\"")]
pub struct DurationError(String);

/// Parses Go's duration syntax (`time.ParseDuration`). Negative durations are refused: no option of this driver takes
/// one.
///
/// # Errors
/// Fails when the text does not have that syntax, or the duration is longer than 290 years, which is Go's own limit.
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    let refused = || DurationError(text.to_owned());
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(refused());
    }
    let mut nanos = 0.0_f64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(refused)?;
        let number: f64 = rest[..digits].parse().map_err(|_| refused())?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        nanos += number
            * match &rest[..unit] {
                "ns" => 1.0,
                "us" | "µs" | "μs" => 1e3,
                "ms" => 1e6,
                "s" => 1e9,
                "m" => 60e9,
                "h" => 3600e9,
                _ => return Err(refused()),
            };
        rest = &rest[unit..];
    }
    if nanos > 9.2e18 {
        return Err(refused());
    }
    Ok(Duration::from_secs_f64(nanos / 1e9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_durations_parse() {
        for (text, millis) in [
            ("5m", 300_000),
            ("1h30m", 5_400_000),
            ("500ms", 500),
            ("1.5s", 1_500),
            ("0", 0),
            ("0s", 0),
            ("2h", 7_200_000),
        ] {
            assert_eq!(parse(text).map(|d| d.as_millis()), Ok(millis), "{text}");
        }
        for text in ["", "5", "m", "5 m", "-5m", "5x", "1..5s", "99999999999h"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
