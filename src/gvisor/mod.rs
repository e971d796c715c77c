//! gVisor's `runsc`: the settings that an operator has, and the command line that follows from them.
//!
//! Shims can't pass flags to a runtime, so they call runsc through a generated wrapper script that adds the flags.
//! There is one script for each kind of network that a task can have. Apart from the sandbox supervisor, which is a
//! process of its own, this module consists of pure functions; `task::runtime` does the rest.

mod supervisor;
mod wrapper;

use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

pub use supervisor::{COMMAND as SUPERVISOR_COMMAND, SUPERVISOR_COMM, main as supervisor_main};
pub use wrapper::{Caller, shim_config, wrapper};

/// The way in which runsc intercepts the system calls of a task's processes (its `--platform`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Platform {
    /// Seccomp traps, which work everywhere.
    Systrap,
    /// The processor's virtualization, through /dev/kvm.
    Kvm,
    /// ptrace(2), which is slow and works on old kernels.
    Ptrace,
}

/// The network stack of a task's sockets (runsc's `--network`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Network {
    /// gVisor's own network stack, which takes over the namespace's addresses.
    #[default]
    Sandbox,
    /// The kernel's network stack, in the task's namespace.
    Host,
    /// A loopback interface only.
    None,
}

/// Whether processes outside of the sandbox may change the root file system of a running task (runsc's
/// `--file-access`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileAccess {
    /// Only the sandbox changes the root file system, so runsc can cache much of it in memory.
    Exclusive,
    /// Other processes may change the root file system.
    Shared,
}

/// Implements `Display` and `FromStr` for an enum whose variants have these texts.
macro_rules! string_enum {
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

string_enum!(Platform, "systrap, kvm or ptrace",
    Platform::Systrap => "systrap", Platform::Kvm => "kvm", Platform::Ptrace => "ptrace");
string_enum!(Network, "sandbox, host or none", Network::Sandbox => "sandbox", Network::Host => "host", Network::None => "none");
string_enum!(FileAccess, "exclusive or shared", FileAccess::Exclusive => "exclusive", FileAccess::Shared => "shared");

/// The settings that an operator has for a runtime that is runsc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GvisorSettings {
    /// The platform; `None` uses the first one that is found to work on this host.
    pub platform: Option<Platform>,
    /// The network stack in the network namespace of a group. In a task's own namespace there is only a loopback
    /// interface, whatever the value is.
    pub network: Network,
    /// `--overlay2`; `None` uses runsc's default.
    pub overlay: Option<String>,
    /// `--file-access`; `None` uses runsc's default.
    pub file_access: Option<FileAccess>,
    /// Whether the sandbox is in the task's cgroup, and thus has the task's limits.
    pub cgroups: bool,
    /// The directory for debug logs, in which each command has a file.
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

/// The flags that this driver sets. They are not allowed among the operator's further flags.
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

/// Checks one of the operator's further flags.
///
/// # Errors
/// Returns a description of what is wrong with the flag.
pub fn check_flag(flag: &str) -> Result<(), String> {
    let name = flag.split('=').next().unwrap_or_default();
    if name.is_empty() || name.starts_with('-') || flag.contains(['\n', '\0']) {
        Err(format!("{flag:?} is not a flag's name with its value, such as \"host-uds=open\""))
    } else if OWN_FLAGS.contains(&name) {
        Err(format!(
            "{name:?} is not allowed in this list, because the driver sets it; the runtime block has options for what an operator can set"
        ))
    } else {
        Ok(())
    }
}

/// Returns whether a process is a runsc that is creating a container, by the process's name and command line. A
/// sandbox, its file server and its supervisor are not.
pub fn is_creating_container(name: &str, line: &[u8]) -> bool {
    let has = |wanted: &[u8]| line.split(|byte| *byte == 0).any(|word| word == wanted);
    let creates = has(b"create") || (has(b"run") && has(b"--detach"));
    creates && name.trim_end().as_bytes() != SUPERVISOR_COMM.to_bytes()
}

/// Returns whether gVisor passes a device on to a task (by its nvproxy or tpuproxy). gVisor emulates all other devices
/// in a sandbox's `/dev`.
pub fn passes_device_through(device: &Path) -> bool {
    const KNOWN: [&str; 3] = ["/dev/nvidia", "/dev/accel", "/dev/vfio/"];
    let device = device.to_string_lossy();
    KNOWN.iter().any(|prefix| device.starts_with(prefix))
}

/// The kernel parameters that have an effect in gVisor. It accepts all others and ignores them.
pub const SUPPORTED_SYSCTLS: [&str; 2] = ["net.ipv6.conf.all.disable_ipv6", "fs.nr_open"];

/// The result of probing a runsc.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RunscProbe {
    /// The platform that works on this host.
    pub platform: String,
    /// The version, as runsc prints it.
    pub version: String,
    /// Whether runsc knows `--shared-root`. Without it, each sandbox creates a network namespace for its file server.
    pub shares_root: bool,
}

/// Returns the names of the flags in the output of `runsc flags`.
pub fn known_flags(text: &str) -> BTreeSet<&str> {
    // Go's flag package prints a flag as `  -name type`.
    text.lines().filter_map(|line| line.strip_prefix("  -")?.split([' ', '\t']).next()).collect()
}

impl GvisorSettings {
    /// Returns whether a sandbox has files in its volumes that `runsc delete` removes (`--overlay2=all:self`).
    pub fn writes_into_volumes(&self) -> bool {
        self.overlay.as_ref().is_some_and(|overlay| overlay.starts_with("all:"))
    }

    /// Returns the flags for runsc's calls for a task.
    pub fn flags(&self, platform: &str, network: Network, shared_root: Option<&Path>) -> Vec<String> {
        let mut flags = vec![
            format!("--platform={platform}"),
            format!("--network={network}"),
            // With this, a job's own seccomp filter is also enforced inside the sandbox.
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
            // The slash makes it a directory, in which runsc creates a file for each command.
            flags.push(format!("--debug-log={}/", directory.display()));
        }
        flags.extend(self.flags.iter().map(|flag| format!("--{flag}")));
        flags
    }
}

/// Returns the name of the file in runsc's state directory that has a container's state.
pub fn state_file(id: &str) -> String {
    format!("{id}_sandbox:{id}.state")
}

/// Returns the id of the container to which a file in runsc's state directory belongs, by the file's name.
pub fn container_of_state_file(file: &str) -> &str {
    let bare = file.strip_suffix(supervisor::EXIT_CODE_SUFFIX).or_else(|| Some(file.split_once("_sandbox:")?.0));
    bare.or_else(|| file.strip_prefix("runsc-")?.strip_suffix(".sock")).unwrap_or(file)
}

/// The suffix of the file with the pid that an exec'd process has in its sandbox. It follows the name of the shim's pid
/// file.
pub const SANDBOX_PID_SUFFIX: &str = ".inside";

/// The annotation that marks a container as a sandbox for gVisor's own shim. Without it, the shim's Create never
/// returns (reference: gVisor's shim, `SpecContainerType`).
pub const SANDBOX_ANNOTATION: (&str, &str) = ("io.kubernetes.cri.container-type", "sandbox");
/// The type URL of the options that carry the configuration of gVisor's own shim.
pub const SHIM_OPTIONS: &str = "io.containerd.runsc.v1.options";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_become_flags() {
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
    fn flags_that_the_driver_sets_are_refused() {
        assert_eq!(check_flag("host-uds=open"), Ok(()));
        for bad in ["platform=kvm", "root=/x", "--net-raw", "", "=x", "a\nb"] {
            assert!(check_flag(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn state_files_are_known_by_their_names() {
        for file in ["web-1_sandbox:web-1.state", "web-1_sandbox:web-1.lock", "runsc-web-1.sock", "web-1.exit-code"] {
            assert_eq!(container_of_state_file(file), "web-1", "{file}");
        }
        assert_eq!(container_of_state_file("web-1"), "web-1");
    }

    #[test]
    fn known_flags_are_read_from_runscs_list() {
        let text = "  -allow-suid\n    \tallows ID\n  -shared-root string\n    \tdirectory\n";
        assert_eq!(known_flags(text), BTreeSet::from(["allow-suid", "shared-root"]));
    }
}
