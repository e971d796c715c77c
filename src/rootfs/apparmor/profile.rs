//! The text of the driver's own profile: a pure function of the driver's name and of the host's AppArmor.
//!
//! The rules are docker's (moby/profiles, apparmor/template.go, as of June 2026; `deny network alg` came with
//! moby/moby#52547). Some of docker's patterns allow names that its comments deny, such as `/proc/sys/kernel/sysrq`.
//! The patterns here are exact.

use std::fmt::Write as _;

use super::ProfileName;
use crate::ids::DriverName;

/// The prefix of the names of all profiles of this driver.
pub const PROFILE_PREFIX: &str = "nomad-driver-shim-";

/// Another profile, whose name can be used in a rule as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer(String);

impl Peer {
    /// Returns the peer of this label. Returns `None` for a label that the parser would read as a pattern, and for a
    /// stack of several profiles.
    pub fn of_label(label: &str) -> Option<Self> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
        (!label.is_empty() && label.chars().all(is_plain)).then(|| Self(label.to_owned()))
    }
}

/// The profile of one driver's tasks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverProfile {
    name: ProfileName,
}

impl DriverProfile {
    /// Returns the profile of the driver of this name. A [`DriverName`] contains no character that has a special
    /// meaning in profiles.
    pub fn of(driver: &DriverName) -> Self {
        Self { name: ProfileName(format!("{PROFILE_PREFIX}{driver}")) }
    }

    /// Returns the profile's name in the kernel.
    pub fn name(&self) -> &ProfileName {
        &self.name
    }

    /// Returns the text for `apparmor_parser`.
    ///
    /// `plugin` is the plugin's own profile, if it has one: the plugin and its shims send signals to tasks. `abi` is a
    /// file that fixes the meaning of rules, such as `abi/3.0`. Without it, the parser's own version decides.
    pub fn text(&self, plugin: Option<&Peer>, abi: Option<&str>) -> String {
        let name = &self.name;
        let mut text = String::new();
        if let Some(abi) = abi {
            let _ = writeln!(text, "abi <{abi}>,");
        }
        // With attach_disconnected, the kernel has paths also for files from outside of the task's mount namespace,
        // such as its logs.
        let _ = writeln!(text, "profile \"{name}\" flags=(attach_disconnected,mediate_deleted) {{");
        for rule in ALLOWED {
            let _ = writeln!(text, "  {rule},");
        }
        for peer in SENDERS.into_iter().chain(plugin.map(|peer| peer.0.as_str())) {
            let _ = writeln!(text, "  signal (receive) peer=\"{peer}\",");
        }
        let _ = writeln!(text, "  signal (send,receive) peer=\"{name}\",");
        let _ = writeln!(text, "  ptrace (trace,read) peer=\"{name}\",");
        for rule in DENY_RULES {
            let _ = writeln!(text, "  deny {rule},");
        }
        for path in deny_patterns("/proc/", "0-9", "sys/kernel/shm") {
            let _ = writeln!(text, "  deny {path} w,");
        }
        for path in deny_patterns("/sys/", "", "fs/cgroup/") {
            let _ = writeln!(text, "  deny {path} wklx,");
        }
        text.push_str("}\n");
        text
    }
}

/// Rules that allow everything that no rule in `DENY_RULES` denies. Since version 4 of the ABI, `network` does not
/// include unix sockets (containerd/containerd#12726). As in abstractions/base, which docker includes, processes under
/// other profiles may observe and trace tasks if their own rules allow it; monitoring and `runc exec` need this.
const ALLOWED: [&str; 7] =
    ["capability", "file", "umount", "network", "unix", "signal (receive) set=(exists)", "ptrace (readby,tracedby)"];

/// Senders of signals to tasks: root's own processes, and the runtimes, which have profiles of these names on Ubuntu.
const SENDERS: [&str; 3] = ["unconfined", "runc", "crun"];

/// Rules that deny, besides those against writing below `/proc` and `/sys`.
const DENY_RULES: [&str; 8] = [
    "mount",
    // AF_ALG is denied for CVE-2026-31431, and AF_VSOCK as the channel to the hypervisor (moby/moby#53551). A seccomp
    // filter can't see the address family of a 32-bit `socketcall`.
    "network alg",
    "network vsock",
    "/proc/sysrq-trigger rwklx",
    "/proc/kcore rwklx",
    "/sys/firmware/** rwklx",
    "/sys/devices/virtual/powercap/** rwklx",
    "/sys/kernel/security/** rwklx",
];

/// Returns patterns that match every path below `base`, except those that continue with `exempt` and those whose first
/// character is in `class`.
///
/// AppArmor has no exceptions from a rule that denies. So there is one pattern for each character at which a path can
/// differ from `exempt`. A path that ends before it differs is a parent directory of `exempt`, and no pattern matches
/// it.
fn deny_patterns(base: &str, class: &str, exempt: &str) -> Vec<String> {
    let pattern = |(at, c): (usize, char)| {
        let class = if at == 0 { class } else { "" };
        format!("{base}{}[^{class}{c}]**", &exempt[..at])
    };
    exempt.char_indices().map(pattern).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn profile(name: &str) -> DriverProfile {
        DriverProfile::of(&DriverName::new(name).expect("a name"))
    }

    /// Matches a path against a pattern of `deny_patterns`: literal text, one negated class, and the rest of the path.
    fn matches(pattern: &str, path: &str) -> bool {
        let (literal, rest) = pattern.split_once("[^").expect("a class");
        let class = rest.strip_suffix("]**").expect("the rest of a path");
        let Some(next) = path.strip_prefix(literal).and_then(|rest| rest.chars().next()) else { return false };
        let digits = class.contains("0-9") && next.is_ascii_digit();
        !digits && !class.replace("0-9", "").contains(next)
    }

    #[test]
    fn the_text_has_dockers_rules() {
        let text = profile("shim").text(None, Some("abi/3.0"));
        for line in [
            "abi <abi/3.0>,",
            "profile \"nomad-driver-shim-shim\" flags=(attach_disconnected,mediate_deleted) {",
            "  network,",
            "  capability,",
            "  file,",
            "  umount,",
            "  deny network alg,",
            "  deny network vsock,",
            "  deny mount,",
            "  signal (receive) peer=\"unconfined\",",
            "  signal (receive) peer=\"runc\",",
            "  signal (receive) peer=\"crun\",",
            "  signal (send,receive) peer=\"nomad-driver-shim-shim\",",
            "  ptrace (trace,read) peer=\"nomad-driver-shim-shim\",",
            "  deny /proc/sysrq-trigger rwklx,",
            "  deny /proc/kcore rwklx,",
            "  deny /sys/firmware/** rwklx,",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} in {text}");
        }
        assert!(text.ends_with("}\n"));
        // No file of the host is included, so that a driver has the same profile on all hosts.
        assert!(!text.contains("include"), "{text}");
        assert!(profile("shim").text(None, None).starts_with("profile "));
    }

    #[test]
    fn a_confined_plugin_may_end_its_tasks() {
        let rule = |label: &str| {
            let peer = Peer::of_label(label)?;
            let text = profile("shim").text(Some(&peer), None);
            Some(text.contains(&format!("  signal (receive) peer=\"{label}\",\n")))
        };
        assert_eq!(rule("/usr/bin/nomad"), Some(true));
        for odd in ["", "a b", "a\",\n  capability,\n#", "a//&b", "*", "a{b,c}", "[a]", "a\\", "@{x}", "a^b"] {
            assert_eq!(rule(odd), None, "{odd:?}");
        }
    }

    #[test]
    fn writes_below_proc_and_sys_are_denied_but_where_a_container_has_its_own() {
        let (proc, sys) = (deny_patterns("/proc/", "0-9", "sys/kernel/shm"), deny_patterns("/sys/", "", "fs/cgroup/"));
        let denied = |path: &str| proc.iter().chain(&sys).any(|pattern| matches(pattern, path));
        for path in [
            "/proc/sysrq-trigger",
            "/proc/sys/kernel/core_pattern",
            // Docker's patterns allow these two.
            "/proc/sys/kernel/sysrq",
            "/proc/sys/kernel/sem",
            "/proc/sys/kernel/modprobe",
            "/proc/sys/kernelx",
            "/proc/sys/vm/overcommit_memory",
            "/proc/sys/net/ipv4/ip_forward",
            "/proc/irq/0/smp_affinity",
            "/proc/acpi/wakeup",
            "/proc/scsi/scsi",
            "/sys/kernel/uevent_helper",
            "/sys/module/x/parameters/y",
            "/sys/fs/bpf/x",
            "/sys/fs/cgroup2/x",
            "/sys/fs/cgrp",
            "/sys/firmware/efi/vars",
        ] {
            assert!(denied(path), "{path}");
        }
        for path in [
            "/proc/1/oom_score_adj",
            "/proc/4711/attr/current",
            "/proc/sys/kernel/shmmax",
            "/proc/sys/kernel/shm_rmid_forced",
            "/sys/fs/cgroup/memory/x",
            "/sys/fs/cgroup/cgroup.procs",
            "/etc/passwd",
        ] {
            assert!(!denied(path), "{path}");
        }
    }

    proptest! {
        /// The profiles of two drivers differ only in the name.
        #[test]
        fn a_drivers_name_is_only_a_name(name in "[A-Za-z0-9][A-Za-z0-9._-]{0,62}") {
            let (own, plain) = (profile(&name), profile("x"));
            let renamed = plain.text(None, None).replace(plain.name().as_str(), own.name().as_str());
            prop_assert_eq!(own.text(None, None), renamed);
            let parsed = own.name().as_str().parse::<ProfileName>().ok();
            prop_assert_eq!(parsed.as_ref(), Some(own.name()));
        }

        /// A path is denied exactly when it is not exempt.
        #[test]
        fn what_is_not_exempt_is_denied(path in "(sys/|sys/kernel/|sys/kernel/sh|fs/|[a-z0-9]{0,3}/?)[a-z0-9/_]{1,12}") {
            let denied = |base: &str, class: &str, exempt: &str| {
                deny_patterns(base, class, exempt).iter().any(|pattern| matches(pattern, &format!("{base}{path}")))
            };
            let below = |exempt: &str| path.starts_with(exempt) || exempt.starts_with(&path);
            let is_process = path.starts_with(|c: char| c.is_ascii_digit());
            prop_assert_eq!(denied("/proc/", "0-9", "sys/kernel/shm"), !is_process && !below("sys/kernel/shm"));
            prop_assert_eq!(denied("/sys/", "", "fs/cgroup/"), !below("fs/cgroup/"));
        }
    }
}
