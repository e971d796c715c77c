//! Compares every verdict of this driver's program for a profile with libseccomp's, and applies this to docker's
//! profile.

use std::collections::{BTreeSet, HashSet};

use libseccomp::ScmpSyscall;
use nomad_driver_shim::{
    ids::Flavor,
    rootfs::{
        Capabilities,
        seccomp::{self, Machine, NewerCalls, SocketcallPolicy, compile, for_libseccomp},
    },
};
use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSyscall};
use seccompiler::sock_filter;

use super::{
    ARCHITECTURES, capabilities, family, host,
    interpreter::{Call, verdict},
    kernel::twins,
    machine,
    reference::theirs,
    resolved, scmp,
};

/// Returns argument values at and around every value that a rule compares with.
pub(crate) fn edges(profile: &LinuxSeccomp) -> Vec<u64> {
    let mut values = BTreeSet::from([0, 1, u64::from(u32::MAX), 1 << 32, u64::MAX]);
    for argument in profile.syscalls().iter().flatten().flat_map(|rule| rule.args().iter().flatten()) {
        for value in [argument.value(), argument.value_two().unwrap_or_default()] {
            values.extend([value.wrapping_sub(1), value, value.wrapping_add(1), !value, value | 1 << 40, value << 32]);
            values.extend([value | 1 << 32, value | 1 << 63, value | 0xffff_ffff_0000_0000, value | 1 << 16]);
            values.extend((0..64).map(|bit| value ^ (1 << bit)).filter(|_| value.count_ones() > 3));
        }
    }
    values.into_iter().collect()
}

/// Returns the call numbers that any rule or table contains, and those around the borders of the ranges.
fn numbers(arch: Arch) -> Vec<u32> {
    let base = if arch == Arch::ScmpArchX32 { 0x4000_0000 } else { 0 };
    let mut numbers: Vec<u32> = (0..1100).map(|number| base + number).collect();
    numbers.extend([0x3fff_ffff, 0x4000_0000, 0x4000_0001, 0x7fff_ffff, 0x8000_0000, u32::MAX - 1, u32::MAX]);
    numbers.extend(0x000f_0000..0x000f_0010);
    numbers
}

/// Returns whether this libseccomp does not know the call's number. If the driver knows it, only the profile's text can
/// decide.
fn is_news(arch: Arch, number: u32) -> bool {
    let name = ScmpSyscall::from_raw_syscall(number as i32).get_name_by_arch(scmp(arch));
    name.is_err()
}

/// The programs of a profile: this driver's, and libseccomp's, which is made from the form that runc gets.
struct Pair {
    ours: Vec<sock_filter>,
    theirs: Vec<sock_filter>,
}

/// How many verdicts were compared, and the numbers that only this driver knows and that have a verdict other than the
/// default's.
#[derive(Default)]
pub(crate) struct Compared {
    pub verdicts: usize,
    news: HashSet<(Machine, u32)>,
}

/// Compares all verdicts of both programs.
pub(crate) fn compare(profile: &LinuxSeccomp, arch: Arch) -> Compared {
    let restated = for_libseccomp(profile, host(arch)).expect("restated");
    let pair = Pair {
        ours: compile(profile, machine(arch), NewerCalls::Default).expect("compiles"),
        theirs: theirs(&restated, arch),
    };
    let edges = edges(profile);
    let mut compared = Compared::default();
    for arch in family(arch) {
        let conditional = conditional(profile, *arch);
        for number in numbers(*arch) {
            compare_call(&pair, profile, (*arch, number), [0; 6], &mut compared);
            let Some(name) = conditional.iter().find(|(_, watched)| *watched == number).map(|(name, _)| *name) else {
                continue;
            };
            for arguments in edges.iter().flat_map(|edge| around(*edge)) {
                compare_call(&pair, profile, (*arch, number), arguments, &mut compared);
            }
            for edge in &edges {
                compare_twins(&pair, name, (*arch, number), [*edge; 6]);
            }
        }
    }
    for strange in [0, 0xc000_00f3, u32::MAX] {
        let call = Call { number: 0, arch: strange, arguments: [0; 6] };
        assert_eq!(verdict(&pair.ours, &call), verdict(&pair.theirs, &call), "architecture {strange:#x}");
        compared.verdicts += 1;
    }
    compared
}

/// Returns the calls that have rules with conditions in the profile, and their numbers.
fn conditional(profile: &LinuxSeccomp, arch: Arch) -> Vec<(&str, u32)> {
    let rules = profile.syscalls().iter().flatten().filter(|rule| rule.args().is_some());
    let names: BTreeSet<&String> = rules.flat_map(LinuxSyscall::names).collect();
    let number =
        |name: &String| ScmpSyscall::from_name_by_arch(name, scmp(arch)).ok().map(|call| i32::from(call) as u32);
    names.into_iter().filter_map(|name| Some((name.as_str(), number(name)?))).collect()
}

/// Returns argument lists with the value in each position, among zeros and among ones.
fn around(edge: u64) -> impl Iterator<Item = [u64; 6]> {
    let one = move |others: u64, n: usize| std::array::from_fn(|at| if at == n { edge } else { others });
    std::iter::once([edge; 6]).chain((0..6).flat_map(move |n| [one(0, n), one(u64::MAX, n)]))
}

fn call((arch, number): (Arch, u32), arguments: [u64; 6]) -> Call {
    let audit = ARCHITECTURES.iter().find(|(name, ..)| *name == arch).expect("one").3;
    Call { number, arch: audit, arguments }
}

fn compare_call(
    pair: &Pair,
    profile: &LinuxSeccomp,
    (arch, number): (Arch, u32),
    arguments: [u64; 6],
    compared: &mut Compared,
) {
    let call = call((arch, number), arguments);
    let (we, they) = (verdict(&pair.ours, &call), verdict(&pair.theirs, &call));
    let default = profile.default_action().as_u32(profile.default_errno_ret());
    let mut named = profile.syscalls().iter().flatten().flat_map(LinuxSyscall::names);
    if we != they
        && they == default
        && is_news(arch, number)
        && named.any(|name| machine(arch).number(name) == Some(number))
    {
        compared.news.insert((machine(arch), number));
    } else {
        assert_eq!(we, they, "{arch:?} {call:x?}: ours {we:#x}, libseccomp's {they:#x}");
    }
    compared.verdicts += 1;
}

/// Calls that the kernel can't distinguish must have the same verdict, in either program.
fn compare_twins(pair: &Pair, name: &str, at: (Arch, u32), arguments: [u64; 6]) {
    for twin in twins(name, arguments) {
        for (whose, program) in [("ours", &pair.ours), ("libseccomp's", &pair.theirs)] {
            let (one, other) = (verdict(program, &call(at, arguments)), verdict(program, &call(at, twin)));
            assert_eq!(one, other, "{name} on {at:?}, {whose}: {arguments:x?} is the same as {twin:x?} to the kernel");
        }
    }
}

#[test]
fn dockers_profile_has_libseccomps_verdicts_for_every_number_on_every_architecture() {
    for multiplexer in [SocketcallPolicy::Enosys, SocketcallPolicy::Allowed] {
        let profile = seccomp::default_profile(multiplexer);
        for arch in [Arch::ScmpArchX86_64, Arch::ScmpArchAarch64] {
            for set in [&["CHOWN"][..], &["SYS_ADMIN"], &["SYS_PTRACE", "BPF", "SYS_TIME"], &["ALL"]] {
                let resolved = profile.resolve(host(arch), &capabilities(set)).expect("resolves");
                let Compared { verdicts, news } = compare(&resolved, arch);
                assert!(verdicts > 5000, "{verdicts}");
                // These calls are newer than libseccomp, and only this driver applies a rule to them. The profile must
                // name each of them.
                let named: BTreeSet<&String> =
                    resolved.syscalls().iter().flatten().flat_map(LinuxSyscall::names).collect();
                for (machine, number) in &news {
                    let name = named.iter().find(|name| machine.number(name) == Some(*number));
                    assert!(name.is_some(), "{number:#x} on {machine:?} is not in the profile");
                }
                assert!(news.len() < 120, "{} calls that libseccomp does not know", news.len());
            }
        }
    }
}

const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0001;
const ENOSYS: u32 = 0x0005_0026;

/// Returns the verdict of docker's profile on x86-64, which must be the same in both programs.
fn dockers(multiplexer: SocketcallPolicy, arch: Arch, name: &str, argument: u64) -> u32 {
    let profile = seccomp::default_profile(multiplexer);
    let own = Arch::ScmpArchX86_64;
    let resolved = profile.resolve(host(own), &Capabilities::defaults(Flavor::Strict)).expect("resolves");
    let ours = compile(&resolved, Machine::X86_64, NewerCalls::Default).expect("compiles");
    let theirs = theirs(&for_libseccomp(&resolved, host(own)).expect("restated"), own);
    let call = call((arch, machine(arch).number(name).expect("a call")), [argument, 0, 0, 0, 0, 0]);
    assert_eq!(verdict(&ours, &call), verdict(&theirs, &call), "{name} {argument:#x}");
    verdict(&ours, &call)
}

/// runc's rule: a call above all calls that the profile names does not exist, instead of being forbidden.
#[test]
fn calls_that_are_newer_than_the_profile_are_missing() {
    for own in [Arch::ScmpArchX86_64, Arch::ScmpArchAarch64] {
        let profile = seccomp::default_profile(SocketcallPolicy::Enosys);
        let profile = profile.resolve(host(own), &capabilities(&["CHOWN"])).expect("resolves");
        let made = |newer| compile(&profile, machine(own), newer).expect("compiles");
        let (plain, tasks) = (made(NewerCalls::Default), made(NewerCalls::Missing));
        let last = |arch| {
            let names = profile.syscalls().iter().flatten().flat_map(LinuxSyscall::names);
            names.filter_map(|name| machine(arch).number(name)).max().expect("calls")
        };
        for arch in family(own) {
            for number in numbers(*arch) {
                // x32 has x86-64's value, and only the number tells them apart.
                let counted = match *arch {
                    Arch::ScmpArchX86_64 | Arch::ScmpArchX32 if number < 0x4000_0000 => Arch::ScmpArchX86_64,
                    Arch::ScmpArchX86_64 => Arch::ScmpArchX32,
                    other => other,
                };
                let newer = number > last(counted);
                let call = call((*arch, number), [0; 6]);
                let expected = if newer { ENOSYS } else { verdict(&plain, &call) };
                assert_eq!(verdict(&tasks, &call), expected, "{arch:?} {number:#x}");
            }
        }
    }
    // A profile that allows what it does not name allows newer calls as well.
    let text = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["kill"], "action": "SCMP_ACT_ERRNO"}]}"#;
    let program = compile(&resolved(text), Machine::X86_64, NewerCalls::Missing).expect("compiles");
    assert_eq!(verdict(&program, &call((Arch::ScmpArchX86_64, 1000), [0; 6])), ALLOW);
}

#[test]
fn no_bit_beyond_an_int_gets_past_dockers_profile() {
    let native = |name, argument| dockers(SocketcallPolicy::Enosys, Arch::ScmpArchX86_64, name, argument);
    for noise in [0, 1 << 32, 1 << 40, 1 << 63, 0xffff_ffff_0000_0000] {
        for family in 0..64 {
            let expected = if matches!(family, 38 | 40) { EPERM } else { ALLOW };
            assert_eq!(native("socket", noise | family), expected, "socket {family} {noise:#x}");
        }
        for (persona, expected) in [(0, ALLOW), (8, ALLOW), (0x0004_0000, EPERM), (0xffff_ffff, ALLOW)] {
            assert_eq!(native("personality", noise | persona), expected, "personality {persona:#x} {noise:#x}");
        }
        for flag in [0x0002_0000, 0x1000_0000, 0x4000_0000] {
            assert_eq!(native("clone", noise | flag), EPERM, "clone {flag:#x} {noise:#x}");
        }
        assert_eq!(native("clone", noise | 0x003d_0f00), ALLOW, "a thread, {noise:#x}");
    }
}

#[test]
fn socketcall_is_missing_unless_it_is_allowed() {
    // All 20 sub-calls of socketcall, and some numbers that are none.
    for sub_call in 0..24 {
        let of = |multiplexer| dockers(multiplexer, Arch::ScmpArchX86, "socketcall", sub_call);
        assert_eq!((of(SocketcallPolicy::Enosys), of(SocketcallPolicy::Allowed)), (ENOSYS, ALLOW), "{sub_call}");
    }
    let direct = |name, argument| dockers(SocketcallPolicy::Enosys, Arch::ScmpArchX86, name, argument);
    assert_eq!((direct("socket", 2), direct("socket", 40), direct("bind", 0)), (ALLOW, EPERM, ALLOW));
}

#[test]
fn the_program_is_a_fraction_of_libseccomps() {
    let resolved = seccomp::default_profile(SocketcallPolicy::Enosys)
        .resolve(host(Arch::ScmpArchX86_64), &Capabilities::defaults(Flavor::Strict))
        .expect("resolves");
    let ours = compile(&resolved, Machine::X86_64, NewerCalls::Default).expect("compiles").len();
    let theirs = theirs(&resolved, Arch::ScmpArchX86_64).len();
    assert!(ours * 2 < theirs, "{ours} against {theirs}");
}
