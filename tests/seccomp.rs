//! Our seccomp programs against libseccomp's: both are run in an interpreter, for every number on every architecture,
//! and for arguments at the edges of every rule.

use std::{
    collections::{BTreeSet, HashSet},
    io::{Read as _, Seek as _},
};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nomad_driver_shim::rootfs::{
    Capabilities,
    seccomp::{self, Host, Machine, NotCompiled, Profile, compile},
};
use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompOperator, LinuxSyscall};
use proptest::prelude::*;
use seccompiler::sock_filter;

/// What the kernel shows a filter (linux/seccomp.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Call {
    number: u32,
    arch: u32,
    arguments: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        let argument = |n: u32| self.arguments[n as usize];
        match offset {
            0 => self.number,
            4 => self.arch,
            // The instruction pointer: no rule looks at it.
            8 | 12 => 0,
            16..64 if offset.is_multiple_of(8) => argument((offset - 16) / 8) as u32,
            16..64 if offset % 8 == 4 => (argument((offset - 16) / 8) >> 32) as u32,
            _ => panic!("load from {offset}"),
        }
    }
}

/// Classic BPF as the kernel's seccomp takes it (kernel/seccomp.c, `seccomp_check_filter`); what else a program could
/// hold makes the test fail.
fn verdict(program: &[sock_filter], call: &Call) -> u32 {
    let (mut at, mut a) = (0_usize, 0_u32);
    loop {
        let instruction = program.get(at).unwrap_or_else(|| panic!("ran out of the program at {at}"));
        let k = instruction.k;
        at += 1;
        let holds = match instruction.code {
            0x20 => {
                a = call.word(k);
                continue;
            }
            0x54 => {
                a &= k;
                continue;
            }
            0x05 => {
                at += k as usize;
                continue;
            }
            0x06 => return k,
            0x15 => a == k,
            0x25 => a > k,
            0x35 => a >= k,
            0x45 => a & k != 0,
            code => panic!("instruction {code:#x}"),
        };
        at += usize::from(if holds { instruction.jt } else { instruction.jf });
    }
}

/// With `AUDIT_ARCH_*` of linux/audit.h.
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

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> ScmpAction {
    match action {
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno.unwrap_or(1) as i32),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno.unwrap_or(1) as u16),
        other => panic!("{other:?}"),
    }
}

/// libseccomp's program, asked for as runc and crun ask.
fn theirs(profile: &LinuxSeccomp, host: Arch) -> Vec<sock_filter> {
    let default = action(profile.default_action(), profile.default_errno_ret());
    let mut filter = ScmpFilterContext::new(default).expect("a filter");
    let own = ScmpArch::native();
    filter.add_arch(scmp(host)).expect("the host's");
    for arch in profile.architectures().iter().flatten() {
        filter.add_arch(scmp(*arch)).expect("an architecture");
    }
    if scmp(host) != own && !profile.architectures().iter().flatten().any(|arch| scmp(*arch) == own) {
        filter.remove_arch(own).expect("this machine's own is not meant");
    }
    for rule in profile.syscalls().iter().flatten() {
        let then = action(rule.action(), rule.errno_ret());
        if then == default {
            continue;
        }
        let arguments: Vec<ScmpArgCompare> = rule
            .args()
            .iter()
            .flatten()
            .map(|argument| {
                let op = match argument.op() {
                    LinuxSeccompOperator::ScmpCmpNe => ScmpCompareOp::NotEqual,
                    LinuxSeccompOperator::ScmpCmpLt => ScmpCompareOp::Less,
                    LinuxSeccompOperator::ScmpCmpLe => ScmpCompareOp::LessOrEqual,
                    LinuxSeccompOperator::ScmpCmpEq => ScmpCompareOp::Equal,
                    LinuxSeccompOperator::ScmpCmpGe => ScmpCompareOp::GreaterEqual,
                    LinuxSeccompOperator::ScmpCmpGt => ScmpCompareOp::Greater,
                    LinuxSeccompOperator::ScmpCmpMaskedEq => ScmpCompareOp::MaskedEqual(argument.value()),
                };
                let masked = argument.op() == LinuxSeccompOperator::ScmpCmpMaskedEq;
                let value = if masked { argument.value_two().unwrap_or_default() } else { argument.value() };
                ScmpArgCompare::new(argument.index() as u32, op, value)
            })
            .collect();
        for name in rule.names() {
            // Names that this libseccomp does not know are passed over, as runtimes do.
            let Ok(call) = ScmpSyscall::from_name(name) else { continue };
            let repeated = arguments.len()
                != rule
                    .args()
                    .iter()
                    .flatten()
                    .map(oci_spec::runtime::LinuxSeccompArg::index)
                    .collect::<BTreeSet<_>>()
                    .len();
            if arguments.is_empty() {
                filter.add_rule(then, call).unwrap_or_else(|error| panic!("{name}: {error}"));
            } else if repeated {
                for argument in &arguments {
                    filter.add_rule_conditional(then, call, &[*argument]).expect("a rule");
                }
            } else {
                filter.add_rule_conditional(then, call, &arguments).expect("a rule");
            }
        }
    }
    let mut file = tempfile::tempfile().expect("a file");
    filter.export_bpf(&file).expect("a program");
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("read back");
    let word = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().expect("four"));
    bytes
        .chunks_exact(8)
        .map(|i| sock_filter { code: u16::from_ne_bytes([i[0], i[1]]), jt: i[2], jf: i[3], k: word(&i[4..]) })
        .collect()
}

/// The host's architecture, and those that run on it.
fn family(host: Arch) -> &'static [Arch] {
    match host {
        Arch::ScmpArchX86_64 => &[Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32],
        _ => &[Arch::ScmpArchAarch64, Arch::ScmpArchArm],
    }
}

fn machine(arch: Arch) -> Machine {
    ARCHITECTURES.iter().find(|(name, ..)| *name == arch).expect("an architecture").2
}

/// Arguments at and around every value that a rule compares with.
fn edges(profile: &LinuxSeccomp) -> Vec<u64> {
    let mut values = BTreeSet::from([0, 1, u64::from(u32::MAX), 1 << 32, u64::MAX]);
    for argument in profile.syscalls().iter().flatten().flat_map(|rule| rule.args().iter().flatten()) {
        for value in [argument.value(), argument.value_two().unwrap_or_default()] {
            values.extend([value.wrapping_sub(1), value, value.wrapping_add(1), !value, value | 1 << 40, value << 32]);
            values.extend((0..64).map(|bit| value ^ (1 << bit)).filter(|_| value.count_ones() > 3));
        }
    }
    values.into_iter().collect()
}

/// The numbers that any rule or table is about, and those around the borders of the ranges.
fn numbers(arch: Arch) -> Vec<u32> {
    let base = if arch == Arch::ScmpArchX32 { 0x4000_0000 } else { 0 };
    let mut numbers: Vec<u32> = (0..1100).map(|number| base + number).collect();
    numbers.extend([0x3fff_ffff, 0x4000_0000, 0x4000_0001, 0x7fff_ffff, 0x8000_0000, u32::MAX - 1, u32::MAX]);
    numbers.extend(0x000f_0000..0x000f_0010);
    numbers
}

/// Is it a call that we have a number for and this libseccomp does not? Then only the profile's own words can tell.
fn is_news(arch: Arch, number: u32) -> bool {
    let name = ScmpSyscall::from_raw_syscall(number as i32).get_name_by_arch(scmp(arch));
    name.is_err()
}

/// Compares all verdicts; returns how many were compared, and how many numbers only we know and were given a verdict
/// other than the default's.
fn compare(profile: &LinuxSeccomp, host: Arch) -> (usize, HashSet<(Machine, u32)>) {
    let ours = compile(profile, machine(host)).expect("compiles");
    let theirs = theirs(profile, host);
    let edges = edges(profile);
    let conditional: BTreeSet<&String> = profile
        .syscalls()
        .iter()
        .flatten()
        .filter(|rule| rule.args().is_some())
        .flat_map(oci_spec::runtime::LinuxSyscall::names)
        .collect();
    let default = profile.default_action().as_u32(profile.default_errno_ret());
    let (mut compared, mut news) = (0, HashSet::new());
    for arch in family(host) {
        let audit = ARCHITECTURES.iter().find(|(name, ..)| name == arch).expect("one").3;
        let watched: BTreeSet<u32> = conditional
            .iter()
            .filter_map(|name| ScmpSyscall::from_name_by_arch(name, scmp(*arch)).ok())
            .map(|call| i32::from(call) as u32)
            .collect();
        for number in numbers(*arch) {
            let mut check = |arguments: [u64; 6]| {
                let call = Call { number, arch: audit, arguments };
                let (we, they) = (verdict(&ours, &call), verdict(&theirs, &call));
                let named = profile.syscalls().iter().flatten().flat_map(LinuxSyscall::names);
                let is_named = || named.clone().any(|name| machine(*arch).number(name) == Some(number));
                if we != they && they == default && is_news(*arch, number) && is_named() {
                    news.insert((machine(*arch), number));
                } else {
                    assert_eq!(we, they, "{arch:?} {call:x?}: ours {we:#x}, libseccomp's {they:#x}");
                }
                compared += 1;
            };
            check([0; 6]);
            if watched.contains(&number) {
                for edge in &edges {
                    check([*edge; 6]);
                    for n in 0..6 {
                        let mut arguments = [0; 6];
                        arguments[n] = *edge;
                        check(arguments);
                        let mut arguments = [u64::MAX; 6];
                        arguments[n] = *edge;
                        check(arguments);
                    }
                }
            }
        }
    }
    for strange in [0, 0xc000_00f3, u32::MAX] {
        let call = Call { number: 0, arch: strange, arguments: [0; 6] };
        assert_eq!(verdict(&ours, &call), verdict(&theirs, &call), "architecture {strange:#x}");
        compared += 1;
    }
    (compared, news)
}

fn host(arch: Arch) -> Host {
    Host { arch: if arch == Arch::ScmpArchX86_64 { "amd64" } else { "arm64" }, kernel: (6, 1) }
}

fn capabilities(names: &[&str]) -> Capabilities {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    Capabilities::parse(&names).expect("capabilities")
}

#[test]
fn dockers_profile_has_libseccomps_verdicts_for_every_number_on_every_architecture() {
    let profile = seccomp::default_profile();
    for arch in [Arch::ScmpArchX86_64, Arch::ScmpArchAarch64] {
        for set in [&["CHOWN"][..], &["SYS_ADMIN"], &["SYS_PTRACE", "BPF", "SYS_TIME"], &["ALL"]] {
            let resolved = profile.resolve(host(arch), &capabilities(set)).expect("resolves");
            let (compared, news) = compare(&resolved, arch);
            assert!(compared > 5000, "{compared}");
            // What libseccomp is too old for: the profile must name it, and we must have allowed it.
            let named: BTreeSet<&String> =
                resolved.syscalls().iter().flatten().flat_map(oci_spec::runtime::LinuxSyscall::names).collect();
            for (machine, number) in &news {
                let name = named.iter().find(|name| machine.number(name) == Some(*number));
                assert!(name.is_some(), "{number:#x} on {machine:?} is not in the profile");
            }
            assert!(news.len() < 120, "{} calls that libseccomp does not know", news.len());
        }
    }
}

#[test]
fn the_program_is_a_fraction_of_libseccomps() {
    let resolved = seccomp::default_profile()
        .resolve(host(Arch::ScmpArchX86_64), &Capabilities::defaults(nomad_driver_shim::ids::Flavor::Secure))
        .expect("resolves");
    let ours = compile(&resolved, Machine::X86_64).expect("compiles").len();
    let theirs = theirs(&resolved, Arch::ScmpArchX86_64).len();
    assert!(ours * 2 < theirs, "{ours} against {theirs}");
}

#[test]
fn what_libseccomp_might_read_otherwise_is_left_to_it() {
    let read = |text: &str| {
        let profile = Profile::read(std::path::Path::new("p"), text.as_bytes()).expect("a profile");
        let resolved = profile.resolve(host(Arch::ScmpArchX86_64), &capabilities(&[])).expect("resolves");
        compile(&resolved, Machine::X86_64).map(|program| program.len())
    };
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

/// Calls with a number on each architecture here.
const NAMES: [&str; 10] =
    ["read", "openat", "clone", "prctl", "ioctl", "personality", "fcntl", "mmap", "gettid", "getrandom"];

fn argument() -> impl Strategy<Value = serde_json::Value> {
    let operator = prop::sample::select(vec!["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"]);
    let value = prop_oneof![1..4_u64, Just(0x7e02_0000), Just(u64::from(u32::MAX)), Just((1 << 32) + 7), any::<u64>()];
    (0..3_usize, operator, value.clone(), value).prop_map(|(index, op, value, two)| {
        let mut argument = serde_json::json!({"index": index, "op": format!("SCMP_CMP_{op}"), "value": value.max(1)});
        if op == "MASKED_EQ" {
            argument["valueTwo"] = two.into();
        }
        argument
    })
}

fn made_up(rules: &[(Vec<&str>, Vec<serde_json::Value>)]) -> LinuxSeccomp {
    let rules: Vec<_> = rules
        .iter()
        .map(|(names, args)| serde_json::json!({"names": names, "action": "SCMP_ACT_ALLOW", "args": args}))
        .collect();
    let text = serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "syscalls": rules,
        "architectures": ["SCMP_ARCH_X86_64"],
    });
    let profile = Profile::read(std::path::Path::new("p"), text.to_string().as_bytes()).expect("a profile");
    profile.resolve(host(Arch::ScmpArchX86_64), &capabilities(&[])).expect("resolves")
}

/// The plain reading of the OCI spec: a call is allowed if a rule names it and all its conditions hold, or, with
/// several on one argument, any of them.
fn allowed(profile: &LinuxSeccomp, name: &str, arguments: [u64; 6]) -> bool {
    profile.syscalls().iter().flatten().filter(|rule| rule.names().iter().any(|known| known == name)).any(|rule| {
        let arguments: Vec<(usize, bool)> = rule
            .args()
            .iter()
            .flatten()
            .map(|argument| {
                let (is, value) = (arguments[argument.index()], argument.value());
                let holds = match argument.op() {
                    LinuxSeccompOperator::ScmpCmpNe => is != value,
                    LinuxSeccompOperator::ScmpCmpLt => is < value,
                    LinuxSeccompOperator::ScmpCmpLe => is <= value,
                    LinuxSeccompOperator::ScmpCmpEq => is == value,
                    LinuxSeccompOperator::ScmpCmpGe => is >= value,
                    LinuxSeccompOperator::ScmpCmpGt => is > value,
                    LinuxSeccompOperator::ScmpCmpMaskedEq => {
                        is & value == argument.value_two().unwrap_or_default() & value
                    }
                };
                (argument.index(), holds)
            })
            .collect();
        let distinct: BTreeSet<usize> = arguments.iter().map(|(index, _)| *index).collect();
        let mut holds = arguments.iter().map(|(_, holds)| *holds);
        arguments.is_empty() || if distinct.len() < arguments.len() { holds.any(|h| h) } else { holds.all(|h| h) }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    // One rule a call: of several on one argument libseccomp 2.5 makes a tree that is wrong at times (`arg < 2` and
    // `arg < 1 << 33` together let larger ones pass).
    #[test]
    fn made_up_profiles_have_libseccomps_verdicts(arguments in prop::collection::vec(prop::option::of(argument()), 1..8)) {
        let rules: Vec<_> =
            arguments.into_iter().zip(NAMES).map(|(argument, name)| (vec![name], argument.into_iter().collect())).collect();
        compare(&made_up(&rules), Arch::ScmpArchX86_64);
    }

    #[test]
    fn any_profile_means_what_the_oci_spec_says(
        rules in prop::collection::vec(
            (prop::sample::subsequence(NAMES.to_vec(), 1..4), prop::collection::vec(argument(), 0..4)), 1..10),
        others in prop::collection::vec(any::<[u64; 6]>(), 20),
    ) {
        let profile = made_up(&rules);
        let program = compile(&profile, Machine::X86_64).expect("compiles");
        let edges = edges(&profile);
        let tries: Vec<[u64; 6]> = others
            .into_iter()
            .chain(edges.iter().map(|edge| [*edge; 6]))
            .chain(edges.iter().zip(edges.iter().rev()).map(|(a, b)| [*a, *b, *a, *b, *a, *b]))
            .collect();
        for name in NAMES {
            for arguments in &tries {
                let number = Machine::X86_64.number(name).expect("a call");
                let call = Call { number, arch: 0xc000_003e, arguments: *arguments };
                let expected = if allowed(&profile, name, *arguments) { 0x7fff_0000 } else { 0x0005_0026 };
                prop_assert_eq!(verdict(&program, &call), expected, "{} {:x?}", name, arguments);
            }
        }
    }
}
