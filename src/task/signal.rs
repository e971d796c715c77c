//! Parses signals as Nomad's users write them.

use std::str::FromStr as _;

use nix::sys::signal::Signal;

use super::TaskError;

/// Parses a signal such as `SIGHUP`, `hup`, `1` or `SIGRTMIN+3`, and returns its number.
///
/// # Errors
/// When Linux has no such signal.
pub fn parse(name: &str) -> Result<i32, TaskError> {
    let refused = || TaskError::Signal(name.to_owned());
    let upper = name.trim().to_ascii_uppercase();
    if let Ok(number) = upper.parse::<i32>() {
        return if (1..=libc::SIGRTMAX()).contains(&number) { Ok(number) } else { Err(refused()) };
    }
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(rest) = bare.strip_prefix("RTMIN") {
        let offset: i32 = if rest.is_empty() {
            0
        } else {
            rest.strip_prefix('+').and_then(|n| n.parse().ok()).ok_or_else(refused)?
        };
        let number = libc::SIGRTMIN() + offset;
        return if (libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&number) { Ok(number) } else { Err(refused()) };
    }
    Signal::from_str(&format!("SIG{bare}")).map(|signal| signal as i32).map_err(|_| refused())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_come_in_any_spelling() {
        for (name, number) in [("SIGHUP", 1), ("hup", 1), ("1", 1), ("SIGKILL", 9), ("sigusr1", 10), ("RTMIN+3", 37)] {
            assert_eq!(parse(name).expect(name), number);
        }
        for name in ["", "SIG", "INVALID", "0", "65", "-1", "RTMIN+99"] {
            let error = parse(name).expect_err(name).to_string();
            assert!(error.contains("invalid signal"), "{error}");
        }
    }
}
