//! Writes a BPF program: the tree that finds the verdict for a call's number, and the comparisons of its arguments.

use std::collections::HashMap;

use oci_spec::runtime::LinuxSeccompOperator;
use seccompiler::sock_filter;

use super::{
    conditions::{Alternatives, ArgumentCondition},
    syscalls::{Machine, X32_BIT},
};

// Instruction codes of classic BPF (linux/bpf_common.h).
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

// Offsets in struct seccomp_data (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// The verdict on a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    Always(u32),
    /// The verdict is `then` if all conditions of one of these lists hold, else the default.
    If {
        any: Alternatives,
        then: u32,
    },
}

impl Verdict {
    /// Adds a rule's alternatives. Returns false if the call has another action already.
    pub(super) fn add(&mut self, alternatives: Alternatives, action: u32) -> bool {
        match self {
            Self::Always(known) | Self::If { then: known, .. } if *known != action => return false,
            Self::Always(_) => {}
            Self::If { any, .. } => {
                any.extend(alternatives);
                if any.iter().any(Vec::is_empty) {
                    *self = Self::Always(action);
                }
            }
        }
        true
    }
}

/// A position in a program: the number of instructions from it to the program's end, including its own.
pub(super) type Position = usize;

/// A program, which is written from its end to its start, because jumps only go forwards.
#[derive(Default)]
pub(super) struct Program {
    backwards: Vec<sock_filter>,
    /// The position of the latest `return` instruction for each verdict.
    returns: HashMap<u32, Position>,
}

impl Program {
    /// Appends the decision by the call's number, for calls of this machine's architecture.
    pub(super) fn by_number(&mut self, ranges: &[(u32, Verdict)], machine: Machine, default: u32) -> Position {
        let tree = self.tree(ranges, machine, default);
        self.push(LOAD, NUMBER, tree)
    }

    /// Appends a branch on the call's architecture, which [`Program::finish`] loads.
    pub(super) fn if_architecture(&mut self, machine: Machine, yes: Position, no: Position) -> Position {
        self.branch(JUMP_EQUAL, machine.audit(), yes, no)
    }

    /// Returns the program, which begins with the comparisons of the architecture.
    pub(super) fn finish(mut self, start: Position) -> Vec<sock_filter> {
        self.push(LOAD, ARCHITECTURE, start);
        self.backwards.reverse();
        self.backwards
    }

    /// Appends an instruction after which the program continues at `next`.
    fn push(&mut self, code: u16, k: u32, next: Position) -> Position {
        if next != self.backwards.len() {
            self.jump(next);
        }
        self.put(code, 0, 0, k)
    }

    /// Appends an instruction.
    fn put(&mut self, code: u16, jt: u8, jf: u8, k: u32) -> Position {
        self.backwards.push(sock_filter { code, jt, jf, k });
        self.backwards.len()
    }

    /// Appends an unconditional jump.
    fn jump(&mut self, to: Position) -> Position {
        let distance = u32::try_from(self.backwards.len() - to).unwrap_or(u32::MAX);
        self.put(JUMP, 0, 0, distance)
    }

    /// Returns the position of an instruction that returns `verdict`. An instruction that is near is used again.
    pub(super) fn return_verdict(&mut self, verdict: u32) -> Position {
        match self.returns.get(&verdict) {
            // A jump can still reach this instruction after a few more instructions were added.
            Some(place) if self.backwards.len() - place < 200 => *place,
            _ => {
                let place = self.put(RETURN, 0, 0, verdict);
                self.returns.insert(verdict, place);
                place
            }
        }
    }

    /// Appends a comparison with `k`. Targets that are too far away are reached by an unconditional jump right after
    /// it.
    fn branch(&mut self, code: u16, k: u32, yes: Position, no: Position) -> Position {
        let far = |program: &Self, place: Position| program.backwards.len() + 1 - place > usize::from(u8::MAX);
        let yes = if far(self, yes) { self.jump(yes) } else { yes };
        let no = if far(self, no) { self.jump(no) } else { no };
        // The second jump may have moved the first target too far away by one instruction.
        let yes = if far(self, yes) { self.jump(yes) } else { yes };
        let offset = |place: Position| u8::try_from(self.backwards.len() - place).unwrap_or(u8::MAX);
        let (jt, jf) = (offset(yes), offset(no));
        self.put(code, jt, jf, k)
    }

    /// Appends the tree that finds the range of the call's number, which has been loaded.
    fn tree(&mut self, ranges: &[(u32, Verdict)], machine: Machine, default: u32) -> Position {
        match ranges {
            [] => self.return_verdict(default),
            [(_, verdict)] => self.verdict(verdict, machine, default),
            _ => {
                let (low, high) = ranges.split_at(ranges.len() / 2);
                // Numbers above X32_BIT have x32's arguments, though the architecture is x86-64's.
                let machine_of = |range: &[(u32, Verdict)]| {
                    let x32 = machine == Machine::X86_64 && range.first().is_some_and(|(first, _)| *first >= X32_BIT);
                    if x32 { Machine::X32 } else { machine }
                };
                let high_place = self.tree(high, machine_of(high), default);
                let low_place = self.tree(low, machine_of(low), default);
                self.branch(JUMP_AT_LEAST, high[0].0, high_place, low_place)
            }
        }
    }

    /// Appends the instructions that return a verdict.
    fn verdict(&mut self, verdict: &Verdict, machine: Machine, default: u32) -> Position {
        let (any, then) = match verdict {
            Verdict::Always(verdict) => return self.return_verdict(*verdict),
            Verdict::If { any, then } => (any, *then),
        };
        let mut next = self.return_verdict(default);
        for all in any.iter().rev() {
            let mut here = self.return_verdict(then);
            for condition in all.iter().rev() {
                here = self.condition(condition, machine, here, next);
            }
            next = here;
        }
        next
    }

    /// Appends the comparison of an argument, which continues at `yes` or `no`.
    fn condition(&mut self, condition: &ArgumentCondition, machine: Machine, yes: Position, no: Position) -> Position {
        use LinuxSeccompOperator as Op;
        let (yes, no) = match condition.operator {
            Op::ScmpCmpNe | Op::ScmpCmpLt | Op::ScmpCmpLe => (no, yes),
            _ => (yes, no),
        };
        // struct seccomp_data is in the machine's byte order. All machines that this compiler supports are
        // little-endian.
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
        // The mask of an argument that the kernel truncates has no high half.
        if !machine.has_wide_arguments() || high_mask == 0 {
            return here;
        }
        here = self.branch(JUMP_EQUAL, high, here, no);
        if compare != JUMP_EQUAL {
            here = self.branch(JUMP_GREATER, high, yes, here);
        }
        self.load(offset + 4, high_mask, here)
    }

    /// Appends the load of one half of an argument, and the mask if the comparison has one.
    fn load(&mut self, offset: u32, mask: u32, next: Position) -> Position {
        let next = if mask == u32::MAX { next } else { self.push(AND, mask, next) };
        self.push(LOAD, offset, next)
    }
}
