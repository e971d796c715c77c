//! From the OCI spec's `linux.seccomp` to a BPF program.
//!
//! For each architecture the numbers from 0 upwards are cut into ranges with one verdict each, and the ranges are found
//! by a balanced tree of "at least this?" jumps. Docker's allow list is some 46 ranges, so a few jumps decide, where
//! libseccomp's default output compares one number after the other. The kernel runs a filter once for every number when
//! it is loaded (seccomp's bitmap of calls that are always allowed, Linux 5.11), so this is a start's time, too.
//!
//! Only what surely means the same as in libseccomp is compiled. The rest says why not, and is left to libseccomp.

use std::collections::{BTreeMap, HashMap};

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator};
use seccompiler::sock_filter;

use super::syscalls::{Machine, X32_BIT};

/// The kernel's limit on a program (`BPF_MAXINSNS`).
const INSTRUCTIONS_MAX: usize = 4096;
/// The kernel's largest errno (`MAX_ERRNO`).
const ERRNO_MAX: u32 = 4095;
/// What libseccomp does with calls of architectures that a profile doesn't name: it kills the thread.
const BAD_ARCHITECTURE: u32 = 0;

// Classic BPF (linux/bpf_common.h).
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

// struct seccomp_data (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// 32-bit x86 has one call for all of sockets and one for all of SysV IPC, beside or instead of one for each.
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
    /// We make programs for x86 and ARM.
    #[error("it names the architecture {0}")]
    Architecture(String),
    /// A task that is watched from outside needs more than a program.
    #[error("it uses {0}")]
    Feature(String),
    /// The order of such rules matters, and is libseccomp's to know.
    #[error("it has rules of different actions for {0}")]
    Mixed(String),
    /// 32-bit x86's `socketcall` and `ipc` hide what is called.
    #[error("it treats {0} otherwise than {1}, which 32-bit x86 uses for it")]
    Multiplexed(String, &'static str),
    /// The program has grown too large.
    #[error("its program has {0} instructions; the kernel takes {INSTRUCTIONS_MAX}")]
    Long(usize),
}

/// What is done with a call.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Always(u32),
    /// `then` if one of these lists of conditions holds as a whole, else the default.
    If {
        any: Vec<Vec<Condition>>,
        then: u32,
    },
}

/// A condition on an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Condition {
    argument: u32,
    operator: LinuxSeccompOperator,
    value: u64,
    mask: u64,
}

/// Compiles a profile for a host.
///
/// # Errors
/// When it should be left to libseccomp.
pub fn compile(profile: &LinuxSeccomp, host: Machine) -> Result<Vec<sock_filter>, NotCompiled> {
    if profile.flags().as_ref().is_some_and(|flags| !flags.is_empty()) {
        return Err(NotCompiled::Feature("filter flags".to_owned()));
    }
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut machines = vec![host];
    for arch in profile.architectures().iter().flatten() {
        match Machine::named(*arch) {
            Some(machine) if machines.contains(&machine) => {}
            Some(machine) => machines.push(machine),
            None if *arch == oci_spec::runtime::Arch::ScmpArchNative => {}
            None => return Err(NotCompiled::Architecture(arch.to_string())),
        }
    }
    let mut program = Program::default();
    let killed = program.give(BAD_ARCHITECTURE);
    // x32 shares x86-64's architecture, and its numbers lie above.
    let x32 = if machines.contains(&Machine::X32) { Some(verdicts(profile, Machine::X32, default)?) } else { None };
    let mut bodies = Vec::new();
    for machine in machines.iter().copied().filter(|machine| *machine != Machine::X32) {
        let mut ranges = ranges(&verdicts(profile, machine, default)?, default);
        if machine == Machine::X86_64 {
            // All that the numbers above X32_BIT hold comes from x32's own rules.
            ranges.retain(|(first, _)| *first < X32_BIT);
            let above = match &x32 {
                Some(x32) => self::ranges(x32, default),
                // -1 is what a tracer writes to have a call skipped: libseccomp leaves it out of its test for x32.
                None => vec![(X32_BIT, Verdict::Always(BAD_ARCHITECTURE)), (u32::MAX, Verdict::Always(default))],
            };
            ranges.extend(above.into_iter().map(|(first, verdict)| (first.max(X32_BIT), verdict)));
            ranges = tidy(ranges);
        }
        let tree = program.tree(&ranges, machine, default);
        bodies.push((machine, program.push(LOAD, NUMBER, tree)));
    }
    // The last one pushed is met first: the host's own architecture.
    let mut start = killed;
    for (machine, body) in bodies.into_iter().rev() {
        start = program.branch(JUMP_EQUAL, machine.audit(), body, start);
    }
    program.push(LOAD, ARCHITECTURE, start);
    let program = program.finish();
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

/// What is done with each call that the profile has a rule for.
fn verdicts(profile: &LinuxSeccomp, machine: Machine, default: u32) -> Result<BTreeMap<u32, Verdict>, NotCompiled> {
    let mut verdicts: BTreeMap<u32, Verdict> = BTreeMap::new();
    let mut names: HashMap<&str, u32> = HashMap::new();
    for rule in profile.syscalls().iter().flatten() {
        let then = action(rule.action(), rule.errno_ret())?;
        if then == default {
            // As runc and crun do: libseccomp refuses a rule that says what the default says.
            continue;
        }
        let any = alternatives(rule.args().as_deref().unwrap_or_default(), machine)?;
        for name in rule.names() {
            let before = names.insert(name, then);
            if before.is_some_and(|before| before != then) {
                return Err(NotCompiled::Mixed(name.clone()));
            }
            let Some(number) = machine.number(name) else {
                // Newer than our tables, and forbidden: a newer libseccomp may know it.
                if is_permissive(default) && !Machine::ALL.iter().any(|machine| machine.number(name).is_some()) {
                    return Err(NotCompiled::Feature(format!("the unknown call {name}")));
                }
                continue;
            };
            match (verdicts.get_mut(&number), &any) {
                (Some(Verdict::Always(known) | Verdict::If { then: known, .. }), _) if *known != then => {
                    return Err(NotCompiled::Mixed(name.clone()));
                }
                (Some(Verdict::Always(_)), _) => {}
                (Some(Verdict::If { any: known, .. }), Some(any)) => known.extend(any.iter().cloned()),
                (Some(verdict @ Verdict::If { .. }), None) => *verdict = Verdict::Always(then),
                (None, Some(any)) => {
                    verdicts.insert(number, Verdict::If { any: any.clone(), then });
                }
                (None, None) => {
                    verdicts.insert(number, Verdict::Always(then));
                }
            }
        }
    }
    if machine == Machine::X86 {
        for (through, calls) in X86_MULTIPLEXED {
            let outer = machine.number(through).and_then(|number| verdicts.get(&number));
            for call in calls {
                if let Some(then) = names.get(call)
                    && outer != Some(&Verdict::Always(*then))
                {
                    return Err(NotCompiled::Multiplexed((*call).to_owned(), through));
                }
            }
        }
    }
    Ok(verdicts)
}

/// Does this verdict let a call pass (`SECCOMP_RET_LOG`, `SECCOMP_RET_ALLOW`)?
fn is_permissive(verdict: u32) -> bool {
    verdict >= LinuxSeccompAction::ScmpActLog.as_u32(None)
        && verdict < LinuxSeccompAction::ScmpActKillProcess.as_u32(None)
}

/// A rule's conditions, which all have to hold; or, as runc and crun read several on one argument, any of them. None
/// for a rule without conditions.
fn alternatives(arguments: &[LinuxSeccompArg], machine: Machine) -> Result<Option<Vec<Vec<Condition>>>, NotCompiled> {
    if arguments.is_empty() {
        return Ok(None);
    }
    let mut conditions = Vec::new();
    for argument in arguments {
        let index = u32::try_from(argument.index()).ok().filter(|index| *index < 6);
        let index = index.ok_or_else(|| NotCompiled::Feature(format!("argument {}", argument.index())))?;
        let (mut value, mut mask) = (argument.value(), u64::MAX);
        if argument.op() == LinuxSeccompOperator::ScmpCmpMaskedEq {
            mask = argument.value();
            value = argument.value_two().unwrap_or_default() & mask;
            if mask == 0 {
                return Err(NotCompiled::Feature("an empty mask".to_owned()));
            }
        }
        let narrow = value <= u64::from(u32::MAX) && (mask == u64::MAX || mask <= u64::from(u32::MAX));
        if !machine.has_wide_arguments() && !narrow {
            return Err(NotCompiled::Feature(format!("a 64-bit argument on {machine:?}")));
        }
        conditions.push(Condition { argument: index, operator: argument.op(), value, mask });
    }
    let mut seen = [0_u32; 6];
    conditions.iter().for_each(|condition| seen[condition.argument as usize] += 1);
    Ok(Some(if seen.iter().any(|times| *times > 1) {
        conditions.into_iter().map(|condition| vec![condition]).collect()
    } else {
        vec![conditions]
    }))
}

/// The numbers from 0 upwards, cut where the verdict changes: where each range begins.
fn ranges(verdicts: &BTreeMap<u32, Verdict>, default: u32) -> Vec<(u32, Verdict)> {
    let mut ranges = vec![(0, Verdict::Always(default))];
    let mut next = 0;
    for (number, verdict) in verdicts {
        if *number > next {
            ranges.push((next, Verdict::Always(default)));
        }
        ranges.push((*number, verdict.clone()));
        next = number + 1;
    }
    ranges.push((next, Verdict::Always(default)));
    tidy(ranges)
}

/// Of two that begin at the same number the later one holds; neighbours with one verdict are one.
fn tidy(mut ranges: Vec<(u32, Verdict)>) -> Vec<(u32, Verdict)> {
    ranges.reverse();
    ranges.dedup_by_key(|(first, _)| *first);
    ranges.reverse();
    ranges.dedup_by(|later, earlier| later.1 == earlier.1);
    ranges
}

/// A place in a program: how many instructions follow it, itself included.
type Place = usize;

/// A program, written from its end to its start, because jumps only go forwards.
#[derive(Default)]
struct Program {
    backwards: Vec<sock_filter>,
    /// The latest `return` of each verdict.
    returns: HashMap<u32, Place>,
}

impl Program {
    /// An instruction that goes on at `next`.
    fn push(&mut self, code: u16, k: u32, next: Place) -> Place {
        if next != self.backwards.len() {
            self.jump(next);
        }
        self.put(code, 0, 0, k)
    }

    fn put(&mut self, code: u16, jt: u8, jf: u8, k: u32) -> Place {
        self.backwards.push(sock_filter { code, jt, jf, k });
        self.backwards.len()
    }

    fn jump(&mut self, to: Place) -> Place {
        let distance = u32::try_from(self.backwards.len() - to).unwrap_or(u32::MAX);
        self.put(JUMP, 0, 0, distance)
    }

    fn give(&mut self, verdict: u32) -> Place {
        match self.returns.get(&verdict) {
            // Near enough that a few more instructions in between don't put it out of reach.
            Some(place) if self.backwards.len() - place < 200 => *place,
            _ => {
                let place = self.put(RETURN, 0, 0, verdict);
                self.returns.insert(verdict, place);
                place
            }
        }
    }

    /// A comparison with `k`. Targets that lie too far away are reached by a jump right behind it.
    fn branch(&mut self, code: u16, k: u32, yes: Place, no: Place) -> Place {
        let far = |program: &Self, place: Place| program.backwards.len() + 1 - place > usize::from(u8::MAX);
        let yes = if far(self, yes) { self.jump(yes) } else { yes };
        let no = if far(self, no) { self.jump(no) } else { no };
        // The second of two jumps may have pushed a near target out of reach by one.
        let yes = if far(self, yes) { self.jump(yes) } else { yes };
        let offset = |place: Place| u8::try_from(self.backwards.len() - place).unwrap_or(u8::MAX);
        let (jt, jf) = (offset(yes), offset(no));
        self.put(code, jt, jf, k)
    }

    /// Finds the range that the number, which has been loaded, is in.
    fn tree(&mut self, ranges: &[(u32, Verdict)], machine: Machine, default: u32) -> Place {
        match ranges {
            [] => self.give(default),
            [(_, verdict)] => self.verdict(verdict, machine, default),
            _ => {
                let (low, high) = ranges.split_at(ranges.len() / 2);
                // Numbers above X32_BIT have x32's arguments, though the architecture is x86-64's.
                let of = |range: &[(u32, Verdict)]| {
                    let x32 = machine == Machine::X86_64 && range.first().is_some_and(|(first, _)| *first >= X32_BIT);
                    if x32 { Machine::X32 } else { machine }
                };
                let high_place = self.tree(high, of(high), default);
                let low_place = self.tree(low, of(low), default);
                self.branch(JUMP_AT_LEAST, high[0].0, high_place, low_place)
            }
        }
    }

    fn verdict(&mut self, verdict: &Verdict, machine: Machine, default: u32) -> Place {
        let (any, then) = match verdict {
            Verdict::Always(verdict) => return self.give(*verdict),
            Verdict::If { any, then } => (any, *then),
        };
        let mut next = self.give(default);
        for all in any.iter().rev() {
            let mut here = self.give(then);
            for condition in all.iter().rev() {
                here = self.condition(condition, machine, here, next);
            }
            next = here;
        }
        next
    }

    fn condition(&mut self, condition: &Condition, machine: Machine, yes: Place, no: Place) -> Place {
        use LinuxSeccompOperator as Op;
        let (yes, no) = match condition.operator {
            Op::ScmpCmpNe | Op::ScmpCmpLt | Op::ScmpCmpLe => (no, yes),
            _ => (yes, no),
        };
        // struct seccomp_data is in the machine's byte order; all of ours are little-endian.
        let offset = ARGUMENTS + condition.argument * 8;
        #[allow(clippy::cast_possible_truncation, reason = "the halves of a 64-bit number")]
        let (low, high) = (condition.value as u32, (condition.value >> 32) as u32);
        #[allow(clippy::cast_possible_truncation, reason = "the halves of a 64-bit number")]
        let (low_mask, high_mask) = (condition.mask as u32, (condition.mask >> 32) as u32);
        let compare = match condition.operator {
            Op::ScmpCmpEq | Op::ScmpCmpNe | Op::ScmpCmpMaskedEq => JUMP_EQUAL,
            Op::ScmpCmpGe | Op::ScmpCmpLt => JUMP_AT_LEAST,
            Op::ScmpCmpGt | Op::ScmpCmpLe => JUMP_GREATER,
        };
        let mut here = self.branch(compare, low, yes, no);
        here = self.load(offset, low_mask, here);
        if !machine.has_wide_arguments() || (compare == JUMP_EQUAL && high_mask == 0) {
            return here;
        }
        here = self.branch(JUMP_EQUAL, high, here, no);
        if compare != JUMP_EQUAL {
            here = self.branch(JUMP_GREATER, high, yes, here);
        }
        self.load(offset + 4, high_mask, here)
    }

    fn load(&mut self, offset: u32, mask: u32, next: Place) -> Place {
        let next = if mask == u32::MAX { next } else { self.push(AND, mask, next) };
        self.push(LOAD, offset, next)
    }

    fn finish(mut self) -> Vec<sock_filter> {
        self.backwards.reverse();
        self.backwards
    }
}
