//! Profiles in docker's form: the OCI spec's `linux.seccomp` with additional conditions on each rule (capabilities,
//! architectures, kernel versions). A profile is resolved for a task to the OCI spec's form.

use std::path::Path;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompBuilder, LinuxSeccompFilterFlag,
    LinuxSyscallBuilder,
};
use serde::Deserialize;

use super::SeccompError;
use crate::rootfs::Capabilities;

/// A profile. Unknown keys are refused: if a misspelled key (`Args`) were ignored, a rule for some arguments would
/// apply to all.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Profile {
    pub(super) default_action: LinuxSeccompAction,
    #[serde(default)]
    pub(super) default_errno_ret: Option<u32>,
    #[serde(default, deserialize_with = "or_null")]
    pub(super) architectures: Vec<Arch>,
    #[serde(default, deserialize_with = "or_null")]
    pub(super) arch_map: Vec<ArchMap>,
    #[serde(default, deserialize_with = "or_null")]
    pub(super) flags: Vec<LinuxSeccompFilterFlag>,
    #[serde(default, deserialize_with = "or_null")]
    pub(super) syscalls: Vec<Rule>,
}

/// A 64-bit architecture and the 32-bit ones that it can also run.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ArchMap {
    pub(super) architecture: Arch,
    #[serde(default)]
    pub(super) sub_architectures: Option<Vec<Arch>>,
}

/// The action for some calls, with the conditions under which the rule applies.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Rule {
    #[serde(default)]
    pub(super) comment: Option<String>,
    /// The single name of a rule in docker's older form.
    #[serde(default)]
    pub(super) name: Option<String>,
    #[serde(default, deserialize_with = "or_null")]
    pub(super) names: Vec<String>,
    pub(super) action: LinuxSeccompAction,
    #[serde(default)]
    pub(super) errno_ret: Option<u32>,
    #[serde(default)]
    pub(super) args: Option<Vec<LinuxSeccompArg>>,
    #[serde(default, deserialize_with = "or_null")]
    pub(super) includes: RuleCondition,
    #[serde(default, deserialize_with = "or_null")]
    pub(super) excludes: RuleCondition,
}

/// A condition on the task and the host under which a rule applies (`includes`) or does not apply (`excludes`).
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RuleCondition {
    #[serde(default, deserialize_with = "or_null")]
    pub(super) caps: Vec<String>,
    #[serde(default, deserialize_with = "or_null")]
    pub(super) arches: Vec<String>,
    #[serde(default)]
    pub(super) min_kernel: Option<String>,
}

/// Deserializes a value that may be null: Go writes an empty list as null.
fn or_null<'de, D: serde::Deserializer<'de>, T: Deserialize<'de> + Default>(value: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or_default())
}

/// The properties of a host that a profile's conditions refer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeccompHost {
    /// The architecture, by Go's name.
    pub arch: &'static str,
    /// The kernel's major and minor version.
    pub kernel: (u32, u32),
}

impl SeccompHost {
    /// Returns the properties of this host. A kernel whose version can't be read counts as older than any other.
    pub fn this() -> Self {
        let arch = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            other => other,
        };
        let release = nix::sys::utsname::uname().ok().map(|name| name.release().to_string_lossy().into_owned());
        Self { arch, kernel: release.as_deref().and_then(version).unwrap_or_default() }
    }

    /// Returns the OCI spec's name of the architecture.
    fn native(self) -> Option<Arch> {
        Some(match self.arch {
            "amd64" => Arch::ScmpArchX86_64,
            "arm64" => Arch::ScmpArchAarch64,
            "s390x" => Arch::ScmpArchS390x,
            "riscv64" => Arch::ScmpArchRiscv64,
            "loongarch64" => Arch::ScmpArchLoongarch64,
            "ppc64le" => Arch::ScmpArchPpc64le,
            _ => return None,
        })
    }
}

/// Parses major and minor version of a kernel release such as `6.1.0-18-amd64` or `4.8`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

impl Profile {
    /// Parses the text of a profile file. `path` names the file in errors.
    ///
    /// # Errors
    /// Fails when the text is not a profile.
    pub fn read(path: &Path, text: &[u8]) -> Result<Self, SeccompError> {
        serde_json::from_slice(text).map_err(|source| SeccompError::Parse { path: path.to_owned(), source })
    }

    /// Resolves the profile for a task with these capabilities on this host.
    ///
    /// # Errors
    /// Fails when the profile contradicts itself.
    pub fn resolve(&self, host: SeccompHost, capabilities: &Capabilities) -> Result<LinuxSeccomp, SeccompError> {
        let invalid = |problem: String| SeccompError::Invalid(problem);
        let mut architectures = self.architectures.clone();
        if !self.arch_map.is_empty() {
            if !architectures.is_empty() {
                return Err(invalid("architectures and archMap exclude each other".to_owned()));
            }
            if let Some(map) = self.arch_map.iter().find(|map| Some(map.architecture) == host.native()) {
                architectures.push(map.architecture);
                architectures.extend(map.sub_architectures.iter().flatten());
            }
        }
        let mut syscalls = Vec::new();
        for rule in &self.syscalls {
            if rule.name.is_some() && !rule.names.is_empty() {
                return Err(invalid(format!("a rule has both name {:?} and names", rule.name)));
            }
            if rule.excludes.any(host, capabilities)? || !rule.includes.all(host, capabilities)? {
                continue;
            }
            let names: Vec<String> = rule.name.iter().chain(&rule.names).cloned().collect();
            let mut syscall = LinuxSyscallBuilder::default().names(names).action(rule.action);
            if let Some(errno) = rule.errno_ret {
                syscall = syscall.errno_ret(errno);
            }
            if let Some(args) = rule.args.as_ref().filter(|args| !args.is_empty()) {
                syscall = syscall.args(args.clone());
            }
            syscalls.push(syscall.build().map_err(|error| invalid(error.to_string()))?);
        }
        let mut seccomp = LinuxSeccompBuilder::default().default_action(self.default_action).syscalls(syscalls);
        if let Some(errno) = self.default_errno_ret {
            seccomp = seccomp.default_errno_ret(errno);
        }
        if !architectures.is_empty() {
            seccomp = seccomp.architectures(architectures);
        }
        if !self.flags.is_empty() {
            seccomp = seccomp.flags(self.flags.clone());
        }
        seccomp.build().map_err(|error| invalid(error.to_string()))
    }
}

impl RuleCondition {
    /// Returns whether all parts of the condition hold. A part that is missing holds.
    fn all(&self, host: SeccompHost, capabilities: &Capabilities) -> Result<bool, SeccompError> {
        Ok((self.arches.is_empty() || self.arches.iter().any(|arch| arch == host.arch))
            && self.caps.iter().all(|name| capabilities.has(name))
            && self.kernel(host)?.unwrap_or(true))
    }

    /// Returns whether any part of the condition holds. A part that is missing does not hold.
    fn any(&self, host: SeccompHost, capabilities: &Capabilities) -> Result<bool, SeccompError> {
        Ok(self.arches.iter().any(|arch| arch == host.arch)
            || self.caps.iter().any(|name| capabilities.has(name))
            || self.kernel(host)?.unwrap_or(false))
    }

    fn kernel(&self, host: SeccompHost) -> Result<Option<bool>, SeccompError> {
        let Some(text) = self.min_kernel.as_deref().filter(|text| !text.is_empty()) else { return Ok(None) };
        let wanted =
            version(text).ok_or_else(|| SeccompError::Invalid(format!("minKernel {text:?} is not a version")))?;
        Ok(Some(host.kernel >= wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: SeccompHost = SeccompHost { arch: "amd64", kernel: (6, 1) };

    fn names(profile: &str, capabilities: &[&str]) -> Result<Vec<String>, String> {
        let profile = Profile::read(Path::new("p"), profile.as_bytes()).map_err(|error| crate::error_chain(&error))?;
        let capabilities: Vec<String> = capabilities.iter().map(|name| (*name).to_owned()).collect();
        let capabilities = Capabilities::parse(&capabilities).expect("capabilities");
        let resolved = profile.resolve(HOST, &capabilities).map_err(|error| error.to_string())?;
        Ok(resolved.syscalls().iter().flatten().flat_map(|rule| rule.names().clone()).collect())
    }

    #[test]
    fn conditions_are_dockers() {
        let rule = |name: &str, more: &str| format!(r#"{{"names": ["{name}"], "action": "SCMP_ACT_ALLOW", {more}}}"#);
        let rules = [
            rule("always", r#""args": null, "includes": {}, "excludes": null"#),
            rule("admin", r#""includes": {"caps": ["CAP_SYS_ADMIN"]}"#),
            rule("both", r#""includes": {"caps": ["CAP_SYS_ADMIN", "CAP_BPF"]}"#),
            rule("nobody", r#""excludes": {"caps": ["CAP_SYS_ADMIN"]}"#),
            rule("arm", r#""includes": {"arches": ["arm64"]}"#),
            rule("intel", r#""includes": {"arches": ["arm64", "amd64"]}"#),
            rule("new", r#""includes": {"minKernel": "6.2"}"#),
            rule("old", r#""includes": {"minKernel": "5.19"}"#),
            rule("gone", r#""excludes": {"minKernel": "4.8"}"#),
        ];
        let profile = format!(r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{}]}}"#, rules.join(","));
        assert_eq!(names(&profile, &["CHOWN"]), Ok(["always", "nobody", "intel", "old"].map(str::to_owned).to_vec()));
        assert_eq!(
            names(&profile, &["SYS_ADMIN"]),
            Ok(["always", "admin", "intel", "old"].map(str::to_owned).to_vec())
        );
    }

    #[test]
    fn faulty_profiles_are_refused_with_the_fault() {
        for (profile, part) in [
            ("{}", "defaultAction"),
            (r#"{"defaultAction": "SCMP_ACT_MAYBE"}"#, "SCMP_ACT_MAYBE"),
            (r#"{"defaultAction": "SCMP_ACT_ALLOW", "Syscalls": []}"#, "Syscalls"),
            (
                r#"{"defaultAction": "SCMP_ACT_ERRNO",
                    "syscalls": [{"names": ["clone"], "action": "SCMP_ACT_ALLOW", "Args": []}]}"#,
                "Args",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"],
                    "archMap": [{"architecture": "SCMP_ARCH_X86_64"}]}"#,
                "exclude each other",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW",
                    "syscalls": [{"name": "a", "names": ["b"], "action": "SCMP_ACT_ERRNO"}]}"#,
                "both name",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW",
                    "syscalls": [{"name": "a", "action": "SCMP_ACT_ERRNO", "includes": {"minKernel": "new"}}]}"#,
                "\"new\" is not a version",
            ),
        ] {
            let error = names(profile, &[]).expect_err("refused");
            assert!(error.contains(part), "{part:?} in {error}");
        }
    }
}
