//! AppArmor on the host: the kernel's files, the parser, and the distribution's profile directory.

use std::{fmt, fs, path::PathBuf, sync::Arc};

use super::{AppArmorError, Peer, ProfileName};

/// The files that describe AppArmor on a host. Tests use files in a directory of their own instead.
#[derive(Debug, Clone)]
pub struct AppArmorHost {
    /// The kernel's file that contains `Y` if AppArmor is built in and active.
    pub(super) enabled: PathBuf,
    /// AppArmor's directory in securityfs.
    pub(super) policy: PathBuf,
    /// The distribution's profile directory.
    pub(super) profile_dir: PathBuf,
    /// The files that contain this process's own label: the current one (since Linux 5.8) and the older one.
    pub(super) own_label: [PathBuf; 2],
    /// The program that loads profiles, as a path or as a name to look up in PATH.
    pub(super) parser: PathBuf,
}

/// Whether profiles can be applied on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// The kernel applies profiles.
    Enabled,
    /// The kernel has no AppArmor, or another security module was chosen at boot.
    Disabled,
    /// The kernel has AppArmor, but securityfs is not mounted. runc refuses profiles in this case
    /// (opencontainers/runc, libcontainer/apparmor/apparmor_linux.go).
    NoSecurityFs,
}

impl fmt::Display for Support {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enabled => "AppArmor is enabled in this node's kernel",
            Self::Disabled => "AppArmor is not enabled in this node's kernel",
            Self::NoSecurityFs => "securityfs is not mounted at /sys/kernel/security",
        })
    }
}

impl Default for AppArmorHost {
    fn default() -> Self {
        Self {
            enabled: "/sys/module/apparmor/parameters/enabled".into(),
            policy: "/sys/kernel/security/apparmor".into(),
            profile_dir: "/etc/apparmor.d".into(),
            own_label: ["/proc/self/attr/apparmor/current".into(), "/proc/self/attr/current".into()],
            parser: "apparmor_parser".into(),
        }
    }
}

impl AppArmorHost {
    /// Returns whether the kernel applies profiles, else why it does not.
    pub fn support(&self) -> Support {
        if !fs::read_to_string(&self.enabled).is_ok_and(|text| text.starts_with('Y')) {
            Support::Disabled
        } else if !self.policy.is_dir() {
            Support::NoSecurityFs
        } else {
            Support::Enabled
        }
    }

    /// Returns the path of the kernel's list of loaded profiles.
    fn list(&self) -> PathBuf {
        self.policy.join("profiles")
    }

    /// Returns the names of all loaded profiles.
    ///
    /// # Errors
    /// Fails when the kernel's list can't be read; only root may read it.
    pub fn loaded(&self) -> Result<Vec<String>, AppArmorError> {
        let path = self.list();
        let text = fs::read_to_string(&path)
            .map_err(|source| AppArmorError::List { path: path.clone(), source: Arc::new(source) })?;
        Ok(text.lines().map(|line| label_of(line).to_owned()).collect())
    }

    /// Returns whether this profile is loaded. This reads one file of the kernel, which has a line for each profile.
    ///
    /// # Errors
    /// Fails when the kernel's list can't be read.
    pub fn is_loaded(&self, name: &ProfileName) -> Result<bool, AppArmorError> {
        Ok(self.loaded()?.iter().any(|loaded| loaded == name.as_str()))
    }

    /// Returns the plugin's own profile as a peer for rules. Usually the plugin has no profile.
    pub(super) fn plugin_peer(&self) -> Option<Peer> {
        let text = self.own_label.iter().find_map(|path| fs::read_to_string(path).ok())?;
        let label = label_of(text.trim_end_matches(['\n', '\0']));
        if label.is_empty() || label == "unconfined" {
            return None;
        }
        let peer = Peer::of_label(label);
        if peer.is_none() {
            tracing::warn!(
                label,
                "the plugin's own AppArmor label can't be named in the tasks' profile; tasks may not accept the plugin's signals"
            );
        }
        peer
    }

    /// Returns the file that fixes the meaning of rules (their ABI), if it is installed. Version 3.0 is the newest that
    /// all supported distributions have (moby/profiles, apparmor/template.go).
    pub(super) fn abi(&self) -> Option<&'static str> {
        let abi = "abi/3.0";
        self.profile_dir.join(abi).is_file().then_some(abi)
    }

    /// Returns the program that loads profiles, if it is installed.
    pub fn parser(&self) -> Option<PathBuf> {
        crate::process::which(&self.parser)
    }
}

/// Returns the label in a line such as `docker-default (enforce)`. Names may contain blanks and parentheses, so the
/// mode begins at the last ` (`.
fn label_of(line: &str) -> &str {
    match line.strip_suffix(')').and_then(|line| line.rsplit_once(" (")) {
        Some((label, _)) => label,
        None => line,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::{io, path::Path};

    /// Returns a simulated host with AppArmor enabled and these profiles loaded.
    pub(in crate::rootfs::apparmor) fn host(directory: &Path, profiles: &[&str]) -> io::Result<AppArmorHost> {
        let host = AppArmorHost {
            enabled: directory.join("enabled"),
            policy: directory.join("policy"),
            profile_dir: directory.join("includes"),
            own_label: [directory.join("none"), directory.join("label")],
            parser: directory.join("parser"),
        };
        fs::create_dir_all(&host.policy)?;
        fs::write(&host.enabled, "Y\n")?;
        fs::write(host.list(), profiles.iter().map(|name| format!("{name} (enforce)\n")).collect::<String>())?;
        Ok(host)
    }

    #[test]
    fn support_follows_the_kernels_files() {
        let directory = tempfile::tempdir().expect("made");
        let host = host(directory.path(), &[]).expect("made");
        assert_eq!(host.support(), Support::Enabled);
        fs::write(&host.enabled, "N\n").expect("written");
        assert_eq!(host.support(), Support::Disabled);
        fs::remove_file(&host.enabled).expect("removed");
        assert_eq!(host.support(), Support::Disabled);
        fs::write(&host.enabled, "Y\n").expect("written");
        fs::remove_dir_all(&host.policy).expect("removed");
        assert_eq!(host.support(), Support::NoSecurityFs);
    }

    #[test]
    fn a_profile_is_loaded_by_its_whole_name() {
        let directory = tempfile::tempdir().expect("made");
        let host = host(directory.path(), &["a", "b (c)", "with space", "x//y"]).expect("made");
        let loaded = |name: &str| host.is_loaded(&name.parse().expect("a name")).expect("read");
        for name in ["a", "b (c)", "with space", "x//y"] {
            assert!(loaded(name), "{name}");
        }
        for name in ["b", "with", "x", "y", "a (enforce)", "enforce"] {
            assert!(!loaded(name), "{name}");
        }
        fs::remove_file(host.list()).expect("removed");
        let error = host.is_loaded(&"a".parse().expect("a name")).expect_err("no list");
        assert!(crate::error_chain(&error).contains("policy/profiles"), "{error}");
    }

    #[test]
    fn the_plugins_own_label_is_a_peer_where_it_is_confined() {
        let directory = tempfile::tempdir().expect("made");
        let host = host(directory.path(), &[]).expect("made");
        let peer = |label: &str| {
            fs::write(&host.own_label[1], label).expect("written");
            host.plugin_peer()
        };
        assert_eq!(peer("unconfined\n"), None);
        assert_eq!(peer(""), None);
        assert_eq!(peer("/usr/bin/nomad (enforce)\n"), Peer::of_label("/usr/bin/nomad"));
        assert_eq!(peer("a//&b (enforce)\n"), None);
    }
}
