//! gVisor's `runsc`: what an operator can set of it, and the command line that follows.
//!
//! Shims have no place for a runtime's flags, so runsc is called through a generated script that carries them: one for
//! each way in which a task can be connected. Pure functions; `task::runtime` does the rest.

mod keeper;
mod wrapper;

use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

pub use keeper::{COMMAND as KEEPER_COMMAND, KEEPING, main as keeper_main};
pub use wrapper::{Caller, shim_config, wrapper};

/// How runsc gets hold of what a task's processes ask of the kernel (its `--platform`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Platform {
    /// Seccomp traps; works everywhere.
    Systrap,
    /// The processor's virtualisation, by /dev/kvm.
    Kvm,
    /// ptrace(2): slow, and works on old kernels.
    Ptrace,
}

/// What a task's sockets are (its `--network`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Network {
    /// gVisor's own network stack, which takes the namespace's addresses over.
    #[default]
    Sandbox,
    /// Those of the kernel, in the task's namespace.
    Host,
    /// Loopback only.
    None,
}

/// May others change the root file system under a running task (its `--file-access`)?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileAccess {
    /// No, so that much can be kept in memory.
    Exclusive,
    /// Yes.
    Shared,
}

macro_rules! words {
    ($kind:ty, $one_of:literal, $($variant:path => $word:literal),+) => {
        impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $($variant => $word),+ })
            }
        }
        impl FromStr for $kind {
            type Err = &'static str;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                match text { $($word => Ok($variant),)+ _ => Err(concat!("is not ", $one_of)) }
            }
        }
    };
}

words!(Platform, "systrap, kvm or ptrace",
    Platform::Systrap => "systrap", Platform::Kvm => "kvm", Platform::Ptrace => "ptrace");
words!(Network, "sandbox, host or none", Network::Sandbox => "sandbox", Network::Host => "host", Network::None => "none");
words!(FileAccess, "exclusive or shared", FileAccess::Exclusive => "exclusive", FileAccess::Shared => "shared");

/// What an operator can set of a runtime that is runsc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GvisorSettings {
    /// None: the first one that is seen to work on this host.
    pub platform: Option<Platform>,
    /// In the network namespace of a group. One of a task's own has nothing but loopback, whose ever it is.
    pub network: Network,
    /// `--overlay2`; None: runsc's default.
    pub overlay: Option<String>,
    /// None: runsc's default.
    pub file_access: Option<FileAccess>,
    /// Is the sandbox in the task's cgroup, with its limits?
    pub cgroups: bool,
    /// Where debug logs go, a file for each command.
    pub debug_log: Option<PathBuf>,
    /// Further flags, as `name=value` or `name`.
    pub flags: Vec<String>,
}

impl Default for GvisorSettings {
    fn default() -> Self {
        Self {
            platform: None,
            network: Network::default(),
            overlay: None,
            file_access: None,
            cgroups: true,
            debug_log: None,
            flags: Vec::new(),
        }
    }
}

/// Flags that are ours to set.
const OWN_FLAGS: [&str; 12] = [
    "root",
    "log",
    "log-format",
    "platform",
    "network",
    "overlay2",
    "file-access",
    "ignore-cgroups",
    "debug-log",
    "oci-seccomp",
    "systemd-cgroup",
    "allow-flag-override",
];

/// Checks a further flag.
///
/// # Errors
/// With what is wrong with it.
pub fn check_flag(flag: &str) -> Result<(), String> {
    let name = flag.split('=').next().unwrap_or_default();
    if name.is_empty() || name.starts_with('-') || flag.contains(['\n', '\0']) {
        Err(format!("{flag:?} is not a flag's name with its value, such as \"host-uds=open\""))
    } else if OWN_FLAGS.contains(&name) {
        Err(format!("{name:?} is not for this list; there are options for what an operator can set of it"))
    } else {
        Ok(())
    }
}

/// Is this process making a container, by its name and command line? A sandbox, its file server and its keeper are not.
pub fn is_at_work(name: &str, line: &[u8]) -> bool {
    let has = |wanted: &[u8]| line.split(|byte| *byte == 0).any(|word| word == wanted);
    let creates = has(b"create") || (has(b"run") && has(b"--detach"));
    creates && name.trim_end().as_bytes() != KEEPING.to_bytes()
}

/// Devices that gVisor passes on to a task (its nvproxy, tpuproxy): everything else of `/dev` is its own.
pub fn passes_on(device: &Path) -> bool {
    const KNOWN: [&str; 3] = ["/dev/nvidia", "/dev/accel", "/dev/vfio/"];
    let device = device.to_string_lossy();
    KNOWN.iter().any(|prefix| device.starts_with(prefix))
}

/// Kernel parameters that gVisor acts on; it takes all others and does nothing.
pub const SYSCTLS: [&str; 2] = ["net.ipv6.conf.all.disable_ipv6", "fs.nr_open"];

/// What was found out about a runsc.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Probed {
    /// The platform that works here.
    pub platform: String,
    /// Its own words.
    pub version: String,
    /// Does it know `--shared-root`? Without it each sandbox makes a network namespace anew for its file server.
    pub shares_root: bool,
}

/// Names of the flags in what `runsc flags` prints.
pub fn known_flags(text: &str) -> BTreeSet<&str> {
    // `  -name type`, as Go's flag package prints them.
    text.lines().filter_map(|line| line.strip_prefix("  -")?.split([' ', '\t']).next()).collect()
}

impl GvisorSettings {
    /// Are there files of a sandbox in its volumes, for `runsc delete` to remove? (`--overlay2=all:self`.)
    pub fn writes_into_volumes(&self) -> bool {
        self.overlay.as_ref().is_some_and(|overlay| overlay.starts_with("all:"))
    }

    /// The flags of a task's calls.
    pub fn flags(&self, platform: &str, network: Network, shared_root: Option<&Path>) -> Vec<String> {
        let mut flags = vec![
            format!("--platform={platform}"),
            format!("--network={network}"),
            // A job's own filter holds inside of the sandbox, too.
            "--oci-seccomp=true".to_owned(),
        ];
        if let Some(root) = shared_root {
            flags.push(format!("--shared-root={}", root.display()));
        }
        if !self.cgroups {
            flags.push("--ignore-cgroups=true".to_owned());
        }
        if let Some(overlay) = &self.overlay {
            flags.push(format!("--overlay2={overlay}"));
        }
        if let Some(access) = self.file_access {
            flags.push(format!("--file-access={access}"));
        }
        if let Some(directory) = &self.debug_log {
            flags.push("--debug=true".to_owned());
            // A directory: a file for each command in it, by runsc's own names.
            flags.push(format!("--debug-log={}/", directory.display()));
        }
        flags.extend(self.flags.iter().map(|flag| format!("--{flag}")));
        flags
    }
}

/// Where runsc has a container's state, in its state directory.
pub fn state_file(id: &str) -> String {
    format!("{id}_sandbox:{id}.state")
}

/// Whose container's such a file is, by its name.
pub fn container_of(file: &str) -> &str {
    let bare = file.strip_suffix(keeper::SUFFIX).or_else(|| Some(file.split_once("_sandbox:")?.0));
    bare.or_else(|| file.strip_prefix("runsc-")?.strip_suffix(".sock")).unwrap_or(file)
}

/// Follows the name of a shim's pid file in that of the file with the pid that an exec'd process has in its sandbox.
pub const INSIDE: &str = ".inside";

/// What gVisor's own shim wants to be told by a container's annotations: that it is a sandbox of its own. Without it, its
/// Create never ends (reference: gVisor's shim, `SpecContainerType`).
pub const SANDBOX_ANNOTATION: (&str, &str) = ("io.kubernetes.cri.container-type", "sandbox");
/// The type of the options by which gVisor's own shim is told of its configuration.
pub const SHIM_OPTIONS: &str = "io.containerd.runsc.v1.options";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_what_was_set() {
        let plain = GvisorSettings::default();
        assert_eq!(
            plain.flags("systrap", Network::Sandbox, None),
            ["--platform=systrap", "--network=sandbox", "--oci-seccomp=true"]
        );
        let all = GvisorSettings {
            overlay: Some("none".to_owned()),
            file_access: Some(FileAccess::Shared),
            cgroups: false,
            debug_log: Some("/var/log/runsc".into()),
            flags: vec!["host-uds=open".to_owned(), "net-raw".to_owned()],
            ..plain
        };
        let flags = all.flags("kvm", Network::None, Some(Path::new("/run/x")));
        for flag in [
            "--platform=kvm",
            "--network=none",
            "--shared-root=/run/x",
            "--ignore-cgroups=true",
            "--overlay2=none",
            "--file-access=shared",
            "--debug=true",
            "--debug-log=/var/log/runsc/",
            "--host-uds=open",
            "--net-raw",
        ] {
            assert!(flags.iter().any(|one| one == flag), "{flag} in {flags:?}");
        }
    }

    #[test]
    fn flags_of_ours_are_not_for_the_list() {
        assert_eq!(check_flag("host-uds=open"), Ok(()));
        for bad in ["platform=kvm", "root=/x", "--net-raw", "", "=x", "a\nb"] {
            assert!(check_flag(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn state_files_are_known_by_their_names() {
        for file in ["web-1_sandbox:web-1.state", "web-1_sandbox:web-1.lock", "runsc-web-1.sock", "web-1.exit-code"] {
            assert_eq!(container_of(file), "web-1", "{file}");
        }
        assert_eq!(container_of("web-1"), "web-1");
    }

    #[test]
    fn known_flags_are_read_from_its_list() {
        let text = "  -allow-suid\n    \tallows ID\n  -shared-root string\n    \tdirectory\n";
        assert_eq!(known_flags(text), BTreeSet::from(["allow-suid", "shared-root"]));
    }
}
