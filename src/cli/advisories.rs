//! Known vulnerabilities of the programs that tasks depend on, and the versions that fixed them. `doctor` compares
//! installed versions with this table.
//!
//! The versions are those of the projects' change logs and advisories (November 2026). A distribution back-ports fixes
//! and keeps the version, so a match can only be a note. The table has the vulnerabilities that a container, an image
//! or a local user can use against the host.

use std::fmt;

/// A program that tasks depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// opencontainers/runc.
    Runc,
    /// containers/crun.
    Crun,
    /// youki-dev/youki.
    Youki,
    /// containerd/containerd.
    Containerd,
}

impl Program {
    /// Returns the program's name in PATH.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
            Self::Youki => "youki",
            Self::Containerd => "containerd",
        }
    }
}

/// One advisory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Advisory {
    program: Program,
    /// The advisory's id.
    pub id: &'static str,
    /// A short description of the vulnerability.
    pub summary: &'static str,
    /// The first version with the vulnerability; empty if all versions before the fix have it.
    introduced: &'static str,
    /// The first fixed version of each release line, oldest first.
    fixed: &'static [&'static str],
}

impl Advisory {
    /// Returns the fixed version of this release line, or of the next one if this line never got the fix.
    pub(crate) fn fixed_for(&self, version: &Version) -> &'static str {
        let fixes = || self.fixed.iter().filter(|fixed| Version::parse(fixed).is_some_and(|fixed| *version < fixed));
        fixes().next().or(self.fixed.last()).copied().unwrap_or_default()
    }

    fn affects(&self, version: &Version) -> bool {
        if Version::parse(self.introduced).is_some_and(|introduced| *version < introduced) {
            return false;
        }
        let fixes: Vec<Version> = self.fixed.iter().filter_map(|fixed| Version::parse(fixed)).collect();
        match fixes.iter().find(|fixed| fixed.release_line() == version.release_line()) {
            Some(fixed) => version < fixed,
            // A release line that never got the fix has the vulnerability, unless the line began after the fix.
            None => fixes.last().is_some_and(|newest| version < newest),
        }
    }
}

const fn row(
    program: Program,
    id: &'static str,
    introduced: &'static str,
    fixed: &'static [&'static str],
    summary: &'static str,
) -> Advisory {
    Advisory { program, id, summary, introduced, fixed }
}

use Program::{Containerd, Crun, Runc, Youki};

/// Sources: runc's CHANGELOG.md; crun's NEWS; youki's tags; containerd's THREAT_MODEL.md; and for each advisory the
/// record in CVEProject/cvelistV5 or the project's advisory on GitHub, which have the versions.
const ADVISORIES: &[Advisory] = &[
    row(Runc, "CVE-2023-27561", "", &["1.1.5"], "a container's volumes are mounted over its /proc"),
    // GHSA-xr7r-f8xq-vfvv.
    row(Runc, "CVE-2024-21626", "", &["1.1.12"], "an image's WORKDIR reaches the host's files"),
    // GHSA-jfvp-7x6p-h2pv.
    row(Runc, "CVE-2024-45310", "", &["1.1.14", "1.2.0-rc.3"], "empty files are made on the host"),
    // GHSA-9493-h29p-rfm2, GHSA-qw9x-cqr3-wc7r, GHSA-cgrx-mc8f-2prm.
    row(Runc, "CVE-2025-31133", "", &["1.2.8", "1.3.3", "1.4.0-rc.3"], "masked paths are opened or redirected"),
    row(Runc, "CVE-2025-52565", "", &["1.2.8", "1.3.3", "1.4.0-rc.3"], "/dev/console is bound over another file"),
    row(Runc, "CVE-2025-52881", "", &["1.2.8", "1.3.3", "1.4.0-rc.3"], "writes to /proc are redirected"),
    // GHSA-xjvp-4fhw-gc47. Release line 1.2 never got the fix.
    row(Runc, "CVE-2026-41579", "", &["1.3.6", "1.4.3", "1.5.0-rc.3"], "an image's /dev link makes files on the host"),
    row(Crun, "CVE-2022-27650", "", &["1.4.4"], "exec'd processes inherit capabilities"),
    row(Crun, "CVE-2025-24965", "", &["1.20"], "with krun, files are written outside of the container"),
    // GHSA-7vwr-4279-7gq5, where /dev is not mounted.
    row(Crun, "CVE-2026-47766", "", &["1.28"], "an image's /dev link makes files on the host"),
    // crun's release 1.30, where /dev is not mounted.
    row(Crun, "CVE-2026-88264", "", &["1.30"], "an image's /dev/console link makes a file on the host"),
    row(Crun, "CVE-2026-88265", "", &["1.30"], "an image's /dev/null link gives a mounted file away"),
    row(Crun, "CVE-2026-84042", "1.29", &["1.30"], "with krun and passt, an image's program runs as the host's root"),
    // GHSA-j26p-6wx7-f3pw.
    row(Youki, "CVE-2025-54867", "", &["0.5.5"], "an image's /proc and /sys links reach the host's files"),
    // GHSA-4g74-7cff-xcv8, GHSA-vf95-55w6-qmrf.
    row(Youki, "CVE-2025-62161", "", &["0.5.7"], "masked paths are opened"),
    row(Youki, "CVE-2025-62596", "", &["0.5.7"], "writes to /proc are redirected"),
    // GHSA-cm76-qm8v-3j95.
    row(Containerd, "CVE-2025-47290", "2.1.0", &["2.1.1"], "unpacking an image writes to the host's files"),
    // GHSA-pwhc-rpq9-4c8w.
    row(
        Containerd,
        "CVE-2024-25621",
        "",
        &["1.7.29", "2.0.7", "2.1.5", "2.2.0"],
        "local users reach images in /var/lib/containerd",
    ),
    // GHSA-m6hq-p25p-ffr2.
    row(
        Containerd,
        "CVE-2025-64329",
        "",
        &["1.7.29", "2.0.7", "2.1.5", "2.2.0"],
        "attaching uses up memory, with Kubernetes",
    ),
    // GHSA-xhf5-7wjv-pqxp.
    row(
        Containerd,
        "CVE-2026-53488",
        "",
        &["1.7.33", "2.0.10", "2.1.9", "2.2.5", "2.3.2"],
        "an image's label runs a program on the host, with Kubernetes",
    ),
    // GHSA-pg57-6jwg-q645.
    row(
        Containerd,
        "CVE-2026-53493",
        "",
        &["1.7.36", "2.0.13", "2.2.9", "2.3.6", "2.4.1"],
        "pulling an image uses up memory",
    ),
    // GHSA-vwhp-8p66-mq4f.
    row(
        Containerd,
        "CVE-2026-95839",
        "2.2.0",
        &["2.2.10", "2.3.7", "2.4.2"],
        "an image crashes the daemon, if pulled by it",
    ),
];

/// The release lines of containerd that no longer get fixes, and since when (containerd's RELEASES.md).
const UNSUPPORTED_LINES: &[(&str, &str)] = &[("1.6", "August 2025"), ("1.7", "September 2026"), ("2.1", "July 2026")];

/// A version, as far as it can be compared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version {
    numbers: [u32; 3],
    /// The number of the release candidate. An alpha or beta version has 0; a release comes after all candidates.
    candidate: u32,
}

impl Version {
    /// Parses `1.1.5+ds1`, `v2.4.2`, `1.4.0-rc.3`, `1.30`. A distribution's suffix is ignored, because it is not part
    /// of the project's version. Returns `None` for a text that does not begin with a version.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_start_matches('v');
        let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
        let mut numbers = [0; 3];
        let mut rest = text;
        for (n, number) in numbers.iter_mut().enumerate() {
            let after = match n {
                0 => rest,
                _ => match rest.strip_prefix('.') {
                    Some(after) if digits(after) > 0 => after,
                    _ => break,
                },
            };
            let length = digits(after);
            *number = after[..length].parse().ok()?;
            rest = &after[length..];
        }
        // `-rc.3`, `-rc3`, `~rc.3`; a Debian revision (`-1+deb12u1`) is none of these.
        let appendix = rest.trim_start_matches(['-', '~', '.']);
        let candidate = match appendix.strip_prefix("rc") {
            Some(number) => {
                let number = number.trim_start_matches('.');
                number[..digits(number)].parse().unwrap_or(0)
            }
            None if appendix.starts_with("alpha") || appendix.starts_with("beta") => 0,
            None => u32::MAX,
        };
        Some(Self { numbers, candidate })
    }

    /// Returns the release line: major and minor version.
    fn release_line(&self) -> [u32; 2] {
        [self.numbers[0], self.numbers[1]]
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor, patch] = self.numbers;
        write!(f, "{major}.{minor}.{patch}")?;
        if self.candidate == u32::MAX { Ok(()) } else { write!(f, "-rc.{}", self.candidate) }
    }
}

/// Returns the advisories whose fixes this version of a program does not have.
pub(crate) fn affecting(program: Program, version: &Version) -> impl Iterator<Item = &'static Advisory> {
    ADVISORIES.iter().filter(move |advisory| advisory.program == program && advisory.affects(version))
}

/// Returns since when a release line of containerd gets no fixes; `None` if it still gets them.
pub(crate) fn unsupported_since(program: Program, version: &Version) -> Option<&'static str> {
    let lines =
        UNSUPPORTED_LINES.iter().filter_map(|(line, since)| Some((Version::parse(line)?.release_line(), *since)));
    let mut lines = lines.filter(|_| program == Program::Containerd);
    let found = lines.clone().find(|(line, _)| *line == version.release_line());
    // Lines older than the oldest in the list ended before that one.
    found.or_else(|| lines.next().filter(|(oldest, _)| version.release_line() < *oldest)).map(|(_, since)| since)
}

/// Describes the known vulnerabilities of a version of a program in one line. Returns `None` if there are none.
pub(crate) fn note(program: Program, version: &str) -> Option<String> {
    let parsed = Version::parse(version)?;
    let known: Vec<String> = affecting(program, &parsed)
        .map(|advisory| format!("{} ({}; fixed in {})", advisory.id, advisory.summary, advisory.fixed_for(&parsed)))
        .collect();
    let name = program.name();
    let old = (!known.is_empty()).then(|| {
        format!(
            "{name} {version} is older than the fixes of {}; a distribution may have back-ported them to this version: see its security tracker",
            known.join(", ")
        )
    });
    let [major, minor] = parsed.release_line();
    let ended = unsupported_since(program, &parsed);
    let ended = ended.map(|since| format!("the project has made no fixes for {name} {major}.{minor} since {since}"));
    let notes: Vec<String> = old.into_iter().chain(ended).collect();
    (!notes.is_empty()).then(|| notes.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(program: Program, version: &str) -> Vec<&'static str> {
        affecting(program, &Version::parse(version).expect(version)).map(|advisory| advisory.id).collect()
    }

    #[test]
    fn versions_are_read_without_a_distributions_suffix() {
        for (text, shown) in [
            ("1.1.5+ds1", "1.1.5"),
            ("1.1.5+ds1-1+deb12u1", "1.1.5"),
            ("1.6.20~ds1", "1.6.20"),
            ("v2.4.2", "2.4.2"),
            ("1.8.1", "1.8.1"),
            ("1.30", "1.30.0"),
            ("1.4.0-rc.3", "1.4.0-rc.3"),
            ("1.2.0~rc2+ds1", "1.2.0-rc.2"),
            ("2.2.0-beta.1", "2.2.0-rc.0"),
            ("1.7.24-0ubuntu1~24.04.2", "1.7.24"),
            ("1.20.el9", "1.20.0"),
        ] {
            assert_eq!(Version::parse(text).expect(text).to_string(), shown, "{text}");
        }
        for text in ["", "unknown", "-1", "99999999999.1"] {
            assert_eq!(Version::parse(text), None, "{text:?}");
        }
        let order = ["1.4.0-beta.1", "1.4.0-rc.1", "1.4.0-rc.3", "1.4.0", "1.4.1", "1.10.0"].map(Version::parse);
        assert!(order.is_sorted(), "{order:?}");
    }

    #[test]
    fn each_line_of_releases_has_its_own_fix() {
        let three = ["CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"];
        let dev = "CVE-2026-41579";
        assert_eq!(ids(Runc, "1.1.4")[..3], ["CVE-2023-27561", "CVE-2024-21626", "CVE-2024-45310"]);
        assert_eq!(ids(Runc, "1.1.5+ds1")[0], "CVE-2024-21626");
        assert_eq!(ids(Runc, "1.1.11").len(), 6);
        assert_eq!(ids(Runc, "1.1.12")[0], "CVE-2024-45310");
        assert_eq!(ids(Runc, "1.2.0-rc.2")[0], "CVE-2024-45310");
        for old in ["1.1.15", "1.2.0", "1.2.7", "1.3.2", "1.4.0-rc.2"] {
            assert_eq!(ids(Runc, old), [three[0], three[1], three[2], dev], "{old}");
        }
        for newer in ["1.2.8", "1.2.9", "1.3.3", "1.4.0-rc.3", "1.4.2", "1.5.0-rc.2"] {
            assert_eq!(ids(Runc, newer), [dev], "{newer}");
        }
        for new in ["1.3.6", "1.4.3", "1.5.0-rc.3", "1.5.1", "2.0.0"] {
            assert!(ids(Runc, new).is_empty(), "{new}");
        }
        assert_eq!(ids(Crun, "1.8.1").len(), 4);
        assert_eq!(ids(Crun, "1.28"), ["CVE-2026-88264", "CVE-2026-88265"]);
        assert!(ids(Crun, "1.29.1").contains(&"CVE-2026-84042") && ids(Crun, "1.30").is_empty());
        assert_eq!(ids(Youki, "0.5.6"), ["CVE-2025-62161", "CVE-2025-62596"]);
        assert!(
            ids(Containerd, "2.1.0").contains(&"CVE-2025-47290")
                && !ids(Containerd, "2.1.1").contains(&"CVE-2025-47290")
        );
        assert!(ids(Containerd, "1.6.20~ds1").contains(&"CVE-2024-25621"));
        assert!(ids(Containerd, "2.1.9").contains(&"CVE-2026-53493"), "a line that never got the fix");
        assert_eq!(ids(Containerd, "v2.4.1"), ["CVE-2026-95839"]);
        assert!(ids(Containerd, "v2.4.2").is_empty() && ids(Containerd, "2.3.7").is_empty());
    }

    #[test]
    fn notes_say_what_to_do() {
        let runc = note(Runc, "1.1.5+ds1").expect("a note");
        assert!(
            runc.contains("CVE-2024-21626") && runc.contains("fixed in 1.1.12") && runc.contains("tracker"),
            "{runc}"
        );
        assert!(
            note(Runc, "1.2.7")
                .expect("a note")
                .contains("CVE-2026-41579 (an image's /dev link makes files on the host; fixed in 1.3.6)")
        );
        let old = note(Containerd, "1.6.20~ds1").expect("a note");
        assert!(old.contains("no fixes for containerd 1.6 since August 2025"), "{old}");
        assert!(note(Containerd, "1.5.9").expect("a note").contains("since August 2025"));
        assert_eq!(note(Containerd, "2.4.2"), None);
        assert_eq!(note(Crun, "unknown"), None);
    }
}
