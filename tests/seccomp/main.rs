//! Compares this driver's seccomp programs with libseccomp's. Both run in an interpreter, for every number on every
//! architecture, and for arguments at the edges of every rule, with and without bits that the kernel drops.

mod interpreter;
mod kernel;
mod profiles;
mod reference;
mod verdicts;

use std::path::Path;

use libseccomp::ScmpArch;
use nomad_driver_shim::rootfs::{
    Capabilities,
    seccomp::{Machine, NewerCalls, NotCompiled, Profile, SeccompHost, compile},
};
use oci_spec::runtime::{Arch, LinuxSeccomp};

/// The architectures, each with its `AUDIT_ARCH_*` of linux/audit.h.
const ARCHITECTURES: [(Arch, ScmpArch, Machine, u32); 5] = [
    (Arch::ScmpArchX86_64, ScmpArch::X8664, Machine::X86_64, 0xc000_003e),
    (Arch::ScmpArchX86, ScmpArch::X86, Machine::X86, 0x4000_0003),
    (Arch::ScmpArchX32, ScmpArch::X32, Machine::X32, 0xc000_003e),
    (Arch::ScmpArchAarch64, ScmpArch::Aarch64, Machine::Aarch64, 0xc000_00b7),
    (Arch::ScmpArchArm, ScmpArch::Arm, Machine::Arm, 0x4000_0028),
];

fn scmp(arch: Arch) -> ScmpArch {
    ARCHITECTURES.iter().find(|(name, ..)| *name == arch).expect("an architecture").1
}

/// Returns the host's architecture, and those that its kernel also runs.
fn family(host: Arch) -> &'static [Arch] {
    match host {
        Arch::ScmpArchX86_64 => &[Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32],
        _ => &[Arch::ScmpArchAarch64, Arch::ScmpArchArm],
    }
}

fn machine(arch: Arch) -> Machine {
    ARCHITECTURES.iter().find(|(name, ..)| *name == arch).expect("an architecture").2
}

fn host(arch: Arch) -> SeccompHost {
    SeccompHost { arch: if arch == Arch::ScmpArchX86_64 { "amd64" } else { "arm64" }, kernel: (6, 1) }
}

fn capabilities(names: &[&str]) -> Capabilities {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    Capabilities::parse(&names).expect("capabilities")
}

/// Returns a profile's text, resolved for a task without capabilities on x86-64.
fn resolved(text: &str) -> LinuxSeccomp {
    let profile = Profile::read(Path::new("p"), text.as_bytes()).expect("a profile");
    profile.resolve(host(Arch::ScmpArchX86_64), &capabilities(&[])).expect("resolves")
}

#[test]
fn what_libseccomp_might_read_otherwise_is_left_to_it() {
    let read = |text: &str| compile(&resolved(text), Machine::X86_64, NewerCalls::Default).map(|program| program.len());
    let rules = |rules: &str, more: &str| {
        read(&format!(r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{rules}] {more}}}"#))
    };
    assert!(rules(r#"{"names": ["read"], "action": "SCMP_ACT_ALLOW"}"#, "").is_ok());
    let forbids =
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["brand_new"], "action": "SCMP_ACT_ERRNO"}]}"#;
    assert_eq!(read(forbids), Err(NotCompiled::Feature("the unknown call brand_new".to_owned())));
    assert_eq!(
        rules(r#"{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}"#, ""),
        Err(NotCompiled::Feature("SCMP_ACT_NOTIFY".to_owned()))
    );
    assert_eq!(
        rules(r#"{"names": ["read"], "action": "SCMP_ACT_ALLOW"}, {"names": ["read"], "action": "SCMP_ACT_LOG"}"#, ""),
        Err(NotCompiled::Mixed("read".to_owned()))
    );
    assert_eq!(
        rules(r#"{"names": ["socket"], "action": "SCMP_ACT_ALLOW"}"#, r#", "architectures": ["SCMP_ARCH_X86"]"#),
        Err(NotCompiled::Multiplexed("socket".to_owned(), "socketcall"))
    );
    assert!(matches!(
        rules(r#"{"names": ["read"], "action": "SCMP_ACT_ALLOW"}"#, r#", "architectures": ["SCMP_ARCH_MIPS"]"#),
        Err(NotCompiled::Architecture(_))
    ));
    assert!(matches!(
        rules(r#"{"names": ["read"], "action": "SCMP_ACT_ALLOW"}"#, r#", "flags": ["SECCOMP_FILTER_FLAG_LOG"]"#),
        Err(NotCompiled::Feature(_))
    ));
}
