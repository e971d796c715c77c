//! Checks the version of a shim's program.

use std::{path::Path, process::Stdio, time::Duration};

use crate::process::{async_command, bounded_output};

/// The first version that serves several Creates at a time. Earlier shims hold one lock over Create, so tasks that
/// share a shim start one at a time (containerd's release notes).
const FIRST_PARALLEL_VERSION: [u32; 3] = [2, 3, 2];
/// How long a program may take to print its version.
pub(super) const VERSION_TIMEOUT: Duration = Duration::from_secs(5);

/// Logs a warning if the shim starts one task at a time, so that tasks which share it would queue.
pub(super) async fn warn_if_serial(binary: &Path) {
    let mut command = async_command(binary);
    command.arg("-v").stdin(Stdio::null()).kill_on_drop(true);
    let Ok(Ok(output)) = tokio::time::timeout(VERSION_TIMEOUT, bounded_output(&mut command)).await else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(version) = parse_version(&text).filter(|version| *version < FIRST_PARALLEL_VERSION) {
        let [major, minor, patch] = version;
        tracing::warn!(
            shim = %binary.display(),
            "shim_scope: this shim has version {major}.{minor}.{patch} and starts one task at a time; tasks that \
             share it wait for each other. Use containerd-shim-runc-v2 2.3.2 or newer, or shim_scope = \"task\""
        );
    }
}

/// Parses the output of `containerd-shim-runc-v2 -v`, which has a line such as `Version:  v2.3.1`. Distributions have
/// versions such as `1.6.20~ds1`.
fn parse_version(text: &str) -> Option<[u32; 3]> {
    let line = text.lines().find_map(|line| line.trim().strip_prefix("Version:"))?;
    let number = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok();
    let mut parts = line.trim().trim_start_matches('v').splitn(3, '.').map(number);
    Some([parts.next()??, parts.next()??, parts.next().flatten().unwrap_or(0)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_releases_and_of_distributions_are_parsed() {
        let debian = "containerd-shim-runc-v2:\n  Version:  1.6.20~ds1\n  Revision: 1.6.20~ds1-1+deb12u4\n";
        assert_eq!(parse_version(debian), Some([1, 6, 20]));
        assert_eq!(parse_version("  Version:  v2.4.0-rc.1\n"), Some([2, 4, 0]));
        assert_eq!(parse_version("shim 7"), None);
        assert!([2, 3, 1] < FIRST_PARALLEL_VERSION && [2, 4, 0] > FIRST_PARALLEL_VERSION);
    }
}
