//! Compiles the OCI spec's `linux.seccomp` to a BPF program.
//!
//! For each architecture the compiler divides the call numbers into ranges with one verdict each. A balanced tree of
//! greater-or-equal jumps finds a call's range. Docker's list of allowed calls makes some 46 ranges, so a few jumps
//! decide, where libseccomp's default output compares one number after the other. This also saves time at each start:
//! the kernel runs a filter once for each call number when the filter is loaded (for seccomp's bitmap of calls that are
//! always allowed, Linux 5.11).
//!
//! A profile is compiled only if the program is certain to mean the same as libseccomp's. Otherwise the compiler
//! returns the reason, and the profile is left to libseccomp.

use std::collections::{BTreeMap, HashMap};

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg};
use seccompiler::sock_filter;

use super::{
    arguments::{CloneArguments, width},
    conditions::{Alternatives, alternatives},
    program::{Program, Verdict},
    syscalls::{Machine, X32_BIT},
};

/// The kernel's limit on the instructions of a program (`BPF_MAXINSNS`).
const INSTRUCTIONS_MAX: usize = 4096;
/// The kernel's largest errno (`MAX_ERRNO`).
const ERRNO_MAX: u32 = 4095;
/// The verdict on calls of architectures that a profile doesn't name, as in libseccomp: the kernel kills the thread.
const BAD_ARCHITECTURE: u32 = 0;

/// The multiplexers of 32-bit x86: one call for all socket calls and one for all SysV IPC calls, in addition to or
/// instead of the direct calls.
const X86_MULTIPLEXED: [(&str, &[&str]); 2] = [
    (
        "socketcall",
        &[
            "socket",
            "bind",
            "connect",
            "listen",
            "accept",
            "getsockname",
            "getpeername",
            "socketpair",
            "send",
            "recv",
            "sendto",
            "recvfrom",
            "shutdown",
            "setsockopt",
            "getsockopt",
            "sendmsg",
            "recvmsg",
            "accept4",
            "recvmmsg",
            "sendmmsg",
        ],
    ),
    (
        "ipc",
        &[
            "semop",
            "semget",
            "semctl",
            "semtimedop",
            "msgsnd",
            "msgrcv",
            "msgget",
            "msgctl",
            "shmat",
            "shmdt",
            "shmget",
            "shmctl",
        ],
    ),
];

/// Why a profile is left to libseccomp.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotCompiled {
    /// The compiler makes programs only for x86 and ARM.
    #[error("it names the architecture {0}")]
    Architecture(String),
    /// The compiler does not support a feature of the profile. A notifying filter, for example, needs a supervisor
    /// process and not only a program.
    #[error("it uses {0}")]
    Feature(String),
    /// A call has rules of different actions. The order of such rules matters, and only libseccomp knows that order.
    #[error("it has rules of different actions for {0}")]
    Mixed(String),
    /// The multiplexers `socketcall` and `ipc` of 32-bit x86 hide which call is made.
    #[error("it has a rule for {0} and none without conditions for {1}, which 32-bit x86 uses for it")]
    Multiplexed(String, &'static str),
    /// The program is too large.
    #[error("its program has {0} instructions; the kernel accepts at most {INSTRUCTIONS_MAX}")]
    Long(usize),
}

/// The verdict on calls with higher numbers than every call that a profile names: calls of kernels that are newer than
/// the profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewerCalls {
    /// The profile's default, as in libseccomp.
    Default,
    /// The calls fail with ENOSYS if the default is to refuse calls. C libraries then use an older call, while EPERM
    /// would be an error for them. runc does the same (`libcontainer/seccomp/patchbpf`), so programs rely on it under
    /// docker.
    Missing,
}

/// Compiles a profile for a host.
///
/// # Errors
/// Returns the reason why the profile should be left to libseccomp.
pub fn compile(
    profile: &LinuxSeccomp,
    host: Machine,
    newer_calls: NewerCalls,
) -> Result<Vec<sock_filter>, NotCompiled> {
    if profile.flags().as_ref().is_some_and(|flags| !flags.is_empty()) {
        return Err(NotCompiled::Feature("filter flags".to_owned()));
    }
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let newer = match newer_calls {
        NewerCalls::Missing if !is_permissive(default) => {
            LinuxSeccompAction::ScmpActErrno.as_u32(Some(libc::ENOSYS.cast_unsigned()))
        }
        NewerCalls::Missing | NewerCalls::Default => default,
    };
    let mut machines = vec![host];
    for arch in profile.architectures().iter().flatten() {
        match Machine::from_oci(*arch) {
            Some(machine) if machines.contains(&machine) => {}
            Some(machine) => machines.push(machine),
            None if *arch == oci_spec::runtime::Arch::ScmpArchNative => {}
            None => return Err(NotCompiled::Architecture(arch.to_string())),
        }
    }
    let mut program = Program::default();
    let killed = program.return_verdict(BAD_ARCHITECTURE);
    // x32 shares x86-64's architecture value. Its numbers lie above those of x86-64.
    let x32 = if machines.contains(&Machine::X32) { Some(verdicts(profile, Machine::X32, default)?) } else { None };
    let mut bodies = Vec::new();
    for machine in machines.iter().copied().filter(|machine| *machine != Machine::X32) {
        let mut ranges = ranges(&verdicts(profile, machine, default)?, default, newer);
        if machine == Machine::X86_64 {
            // The verdicts on numbers above X32_BIT come only from x32's own rules.
            ranges.retain(|(first, _)| *first < X32_BIT);
            let above = match &x32 {
                Some(x32) => self::ranges(x32, default, newer),
                // A tracer writes -1 to have a call skipped: libseccomp excludes this number from its test for x32.
                None => vec![(X32_BIT, Verdict::Always(BAD_ARCHITECTURE)), (u32::MAX, Verdict::Always(default))],
            };
            ranges.extend(above.into_iter().map(|(first, verdict)| (first.max(X32_BIT), verdict)));
            ranges = merge_ranges(ranges);
        }
        bodies.push((machine, program.by_number(&ranges, machine, default)));
    }
    // The program is written backwards: the last comparison, for the host's own architecture, is executed first.
    let mut start = killed;
    for (machine, body) in bodies.into_iter().rev() {
        start = program.if_architecture(machine, body, start);
    }
    let program = program.finish(start);
    if program.len() > INSTRUCTIONS_MAX { Err(NotCompiled::Long(program.len())) } else { Ok(program) }
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, NotCompiled> {
    match action {
        LinuxSeccompAction::ScmpActNotify => Err(NotCompiled::Feature(action.to_string())),
        LinuxSeccompAction::ScmpActErrno | LinuxSeccompAction::ScmpActTrace
            if errno.is_some_and(|errno| errno > ERRNO_MAX) =>
        {
            Err(NotCompiled::Feature(format!("errnoRet {}", errno.unwrap_or_default())))
        }
        _ => Ok(action.as_u32(errno)),
    }
}

/// Returns the verdict on each call that the profile has a rule for.
fn verdicts(profile: &LinuxSeccomp, machine: Machine, default: u32) -> Result<BTreeMap<u32, Verdict>, NotCompiled> {
    let mut verdicts: BTreeMap<u32, Verdict> = BTreeMap::new();
    let mut names: HashMap<&str, u32> = HashMap::new();
    for rule in profile.syscalls().iter().flatten() {
        let then = action(rule.action(), rule.errno_ret())?;
        if then == default {
            // runc and crun skip such a rule, too: libseccomp refuses a rule with the same action as the default.
            continue;
        }
        for name in rule.names() {
            let before = names.insert(name, then);
            if before.is_some_and(|before| before != then) {
                return Err(NotCompiled::Mixed(name.clone()));
            }
            let any = conditions(name, rule.args().as_deref().unwrap_or_default(), machine)?;
            let Some(number) = machine.number(name) else {
                // A rule restricts a call that is newer than the tables of numbers. A newer libseccomp may know it.
                if is_permissive(default) && !Machine::ALL.iter().any(|machine| machine.number(name).is_some()) {
                    return Err(NotCompiled::Feature(format!("the unknown call {name}")));
                }
                continue;
            };
            let known = verdicts.entry(number).or_insert_with(|| Verdict::If { any: Vec::new(), then });
            if !known.add(any, then) {
                return Err(NotCompiled::Mixed(name.clone()));
            }
        }
    }
    if machine == Machine::X86 {
        refuse_hidden_calls(&verdicts, &names)?;
    }
    Ok(verdicts)
}

/// Refuses rules for calls that 32-bit x86 makes through a multiplexer, unless the multiplexer has a rule of its own
/// without conditions, which then holds for all of its calls.
fn refuse_hidden_calls(verdicts: &BTreeMap<u32, Verdict>, names: &HashMap<&str, u32>) -> Result<(), NotCompiled> {
    for (through, calls) in X86_MULTIPLEXED {
        let outer = Machine::X86.number(through).and_then(|number| verdicts.get(&number));
        // libseccomp adds a rule for `socketcall` to each rule for `socket`, but a rule for `socketcall` without
        // conditions replaces those (src/db.c, `db_rule_add`).
        if matches!(outer, Some(Verdict::Always(_))) {
            continue;
        }
        if let Some(call) = calls.iter().find(|call| names.contains_key(**call)) {
            return Err(NotCompiled::Multiplexed((*call).to_owned(), through));
        }
    }
    Ok(())
}

/// Returns whether a verdict allows a call (`SECCOMP_RET_LOG`, `SECCOMP_RET_ALLOW`).
fn is_permissive(verdict: u32) -> bool {
    verdict >= LinuxSeccompAction::ScmpActLog.as_u32(None)
        && verdict < LinuxSeccompAction::ScmpActKillProcess.as_u32(None)
}

/// Returns a rule's conditions on the arguments of a call.
fn conditions(call: &str, arguments: &[LinuxSeccompArg], machine: Machine) -> Result<Alternatives, NotCompiled> {
    let width = |index| width(call, index, CloneArguments::FlagsFirst);
    let found = alternatives(arguments, width).map_err(|error| NotCompiled::Feature(error.to_string()))?;
    for condition in found.iter().flatten() {
        if condition.mask == 0 {
            return Err(NotCompiled::Feature("an empty mask".to_owned()));
        }
        let is_narrow = |bits| bits <= u64::from(u32::MAX);
        let fits = is_narrow(condition.value) && (condition.mask == u64::MAX || is_narrow(condition.mask));
        if !machine.has_wide_arguments() && !fits {
            return Err(NotCompiled::Feature(format!("a 64-bit argument on {machine:?}")));
        }
    }
    Ok(found)
}

/// Divides the call numbers from 0 upwards into ranges with the same verdict. Returns the first number of each range
/// with its verdict. Numbers above all others have the verdict `newer`.
fn ranges(verdicts: &BTreeMap<u32, Verdict>, default: u32, newer: u32) -> Vec<(u32, Verdict)> {
    let mut ranges = vec![(0, Verdict::Always(default))];
    let mut next = 0;
    for (number, verdict) in verdicts {
        if *number > next {
            ranges.push((next, Verdict::Always(default)));
        }
        ranges.push((*number, verdict.clone()));
        next = number + 1;
    }
    ranges.push((next, Verdict::Always(newer)));
    merge_ranges(ranges)
}

/// Removes redundant ranges: of two that begin at the same number the later one is kept, and adjacent ranges with the
/// same verdict are merged.
fn merge_ranges(mut ranges: Vec<(u32, Verdict)>) -> Vec<(u32, Verdict)> {
    ranges.reverse();
    ranges.dedup_by_key(|(first, _)| *first);
    ranges.reverse();
    ranges.dedup_by(|later, earlier| later.1 == earlier.1);
    ranges
}
