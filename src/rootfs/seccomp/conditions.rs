//! A rule's conditions on arguments, reduced to the bits that the kernel uses of each argument.

use oci_spec::runtime::{LinuxSeccompArg, LinuxSeccompOperator as Op};

use super::arguments::Width;

/// A condition on an argument: `(argument & mask) operator value`. The mask of an argument that the kernel truncates
/// has no bits above the argument's width; any operator may have one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ArgumentCondition {
    pub(super) argument: u32,
    pub(super) operator: Op,
    pub(super) value: u64,
    pub(super) mask: u64,
}

/// The alternatives under which a rule applies: all conditions of one of these lists must hold. An empty inner list
/// always holds.
pub(super) type Alternatives = Vec<Vec<ArgumentCondition>>;

/// A rule names an argument that does not exist: system calls have six arguments.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("argument {0} (system calls have the arguments 0 to 5)")]
pub(super) struct NoSuchArgument(usize);

/// Returns the alternatives under which a rule with these arguments applies. All conditions must hold, unless one
/// argument has several conditions: then each condition of the rule is an alternative, as in runc
/// (libcontainer/seccomp/seccomp_linux.go, `matchCall`) and in crun.
///
/// # Errors
/// Fails when there is no such argument.
pub(super) fn alternatives(
    arguments: &[LinuxSeccompArg],
    width: impl Fn(usize) -> Width,
) -> Result<Alternatives, NoSuchArgument> {
    let mut seen = [0_u32; 6];
    let mut truths = Vec::new();
    for argument in arguments {
        let index = argument.index();
        *seen.get_mut(index).ok_or(NoSuchArgument(index))? += 1;
        truths.push(reduce(argument, width(index)));
    }
    if seen.iter().any(|times| *times > 1) {
        let holding = |truth| match truth {
            ReducedCondition::Always => Some(Vec::new()),
            ReducedCondition::Never => None,
            ReducedCondition::If(condition) => Some(vec![condition]),
        };
        return Ok(truths.into_iter().filter_map(holding).collect());
    }
    let mut all = Vec::new();
    for truth in truths {
        match truth {
            ReducedCondition::Always => {}
            ReducedCondition::Never => return Ok(Vec::new()),
            ReducedCondition::If(condition) => all.push(condition),
        }
    }
    Ok(vec![all])
}

/// A condition after its reduction to the bits that the kernel uses: it may hold for all values of the argument, or for
/// none.
enum ReducedCondition {
    Always,
    Never,
    If(ArgumentCondition),
}

/// Reduces a condition to the bits that the kernel uses of an argument of this width.
fn reduce(argument: &LinuxSeccompArg, width: Width) -> ReducedCondition {
    let (value, mask) = match argument.op() {
        Op::ScmpCmpMaskedEq => (argument.value_two().unwrap_or_default() & argument.value(), argument.value()),
        _ => (argument.value(), u64::MAX),
    };
    let index = u32::try_from(argument.index()).unwrap_or(u32::MAX);
    let whole = ArgumentCondition { argument: index, operator: argument.op(), value, mask };
    match (width, whole.operator) {
        (Width::Register, _) => ReducedCondition::If(whole),
        (_, Op::ScmpCmpMaskedEq) => reduce_masked(whole, width.mask()),
        _ => reduce_comparison(whole, width.mask()),
    }
}

/// Reduces a comparison with a value, for an argument of which the kernel keeps the bits in `kept`.
///
/// A negative number may be written with the argument's width, 32 or 64 bits: the kernel keeps the same bits of all
/// these forms. Any other value with bits beyond the width is larger than every possible argument.
fn reduce_comparison(whole: ArgumentCondition, kept: u64) -> ReducedCondition {
    let low = whole.value & kept;
    let is_negative = low > kept >> 1;
    let forms = [low, low | (!kept & u64::from(u32::MAX)), low | !kept];
    let fits = whole.value == low || is_negative && forms.contains(&whole.value);
    match whole.operator {
        Op::ScmpCmpEq | Op::ScmpCmpGt | Op::ScmpCmpGe if !fits => ReducedCondition::Never,
        Op::ScmpCmpNe | Op::ScmpCmpLt | Op::ScmpCmpLe if !fits => ReducedCondition::Always,
        Op::ScmpCmpLt if low == 0 => ReducedCondition::Never,
        Op::ScmpCmpGe if low == 0 => ReducedCondition::Always,
        Op::ScmpCmpGt if low == kept => ReducedCondition::Never,
        Op::ScmpCmpLe if low == kept => ReducedCondition::Always,
        _ => ReducedCondition::If(ArgumentCondition { value: low, mask: kept, ..whole }),
    }
}

/// Reduces a masked comparison, for an argument of which the kernel keeps the bits in `kept`.
fn reduce_masked(whole: ArgumentCondition, kept: u64) -> ReducedCondition {
    let (low, high) = (whole.value & kept, whole.value & !kept);
    let (low_mask, high_mask) = (whole.mask & kept, whole.mask & !kept);
    let sign = kept ^ (kept >> 1);
    let is_negative = low & low_mask & sign != 0 && high == high_mask;
    if high != 0 && !is_negative {
        ReducedCondition::Never
    } else if low_mask == 0 {
        ReducedCondition::Always
    } else {
        ReducedCondition::If(ArgumentCondition { value: low, mask: low_mask, ..whole })
    }
}

impl ArgumentCondition {
    /// Returns whether it is certain that no argument meets both conditions.
    pub(super) fn excludes(&self, other: &Self) -> bool {
        if self.argument != other.argument {
            return false;
        }
        if let (Some((first, last)), Some((other_first, other_last))) = (self.interval(), other.interval())
            && (last < other_first || other_last < first)
        {
            return true;
        }
        if let (Some((value, mask)), Some((other_value, other_mask))) = (self.bits(), other.bits())
            && (value ^ other_value) & mask & other_mask != 0
        {
            return true;
        }
        self.is_opposite_of(other) || other.is_opposite_of(self)
    }

    /// Returns the first and last argument that meet the condition, if those arguments form an interval.
    fn interval(&self) -> Option<(u64, u64)> {
        match self.operator {
            Op::ScmpCmpEq => Some((self.value, self.value)),
            Op::ScmpCmpLt => Some((0, self.value.checked_sub(1)?)),
            Op::ScmpCmpLe => Some((0, self.value)),
            Op::ScmpCmpGe => Some((self.value, self.mask)),
            Op::ScmpCmpGt => Some((self.value.checked_add(1)?, self.mask)),
            Op::ScmpCmpNe | Op::ScmpCmpMaskedEq => None,
        }
    }

    /// Returns the bits that all arguments which meet the condition have in common, as a value and a mask.
    fn bits(&self) -> Option<(u64, u64)> {
        matches!(self.operator, Op::ScmpCmpEq | Op::ScmpCmpMaskedEq).then_some((self.value, self.mask))
    }

    fn is_opposite_of(&self, other: &Self) -> bool {
        self.operator == Op::ScmpCmpNe && other.operator == Op::ScmpCmpEq && self.value == other.value
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxSeccompArgBuilder;

    use super::*;

    fn argument(index: usize, op: Op, value: u64, two: Option<u64>) -> LinuxSeccompArg {
        let builder = LinuxSeccompArgBuilder::default().index(index).op(op).value(value);
        two.into_iter().fold(builder, LinuxSeccompArgBuilder::value_two).build().expect("an argument")
    }

    /// Returns the reduced condition as (value, mask), or as an error whether it always (true) or never (false) holds.
    fn left(op: Op, value: u64, two: Option<u64>, width: Width) -> Result<(u64, u64), bool> {
        let found = alternatives(&[argument(0, op, value, two)], |_| width).expect("an argument");
        match found.as_slice() {
            [] => Err(false),
            [all] if all.is_empty() => Err(true),
            [all] => Ok((all[0].value, all[0].mask)),
            _ => panic!("{found:?}"),
        }
    }

    const LOW: u64 = 0xffff_ffff;

    #[test]
    fn comparisons_look_at_what_the_kernel_keeps() {
        use Op::*;
        for (op, value, expected) in [
            (ScmpCmpEq, 40, Ok((40, LOW))),
            (ScmpCmpLt, 38, Ok((38, LOW))),
            // -1 as an int, and as a long.
            (ScmpCmpEq, LOW, Ok((LOW, LOW))),
            (ScmpCmpEq, u64::MAX, Ok((LOW, LOW))),
            // No int is as large as that.
            (ScmpCmpEq, 1 << 32 | 40, Err(false)),
            (ScmpCmpNe, 1 << 32 | 40, Err(true)),
            (ScmpCmpLt, 1 << 32, Err(true)),
            (ScmpCmpGt, LOW, Err(false)),
            (ScmpCmpGe, 0xffff_ffff_0000_0001, Err(false)),
            // These values are at the ends of an argument's range.
            (ScmpCmpGe, 0, Err(true)),
            (ScmpCmpLt, 0, Err(false)),
            (ScmpCmpLe, LOW, Err(true)),
        ] {
            assert_eq!(left(op, value, None, Width::Word), expected, "{op:?} {value:#x}");
        }
        assert_eq!(left(ScmpCmpEq, 1 << 32 | 40, None, Width::Register), Ok((1 << 32 | 40, u64::MAX)));
    }

    #[test]
    fn masks_look_at_what_the_kernel_keeps() {
        let masked = |mask, value| left(Op::ScmpCmpMaskedEq, mask, Some(value), Width::Word);
        assert_eq!(masked(0x7e02_0000, 0), Ok((0, 0x7e02_0000)));
        assert_eq!(masked(u64::MAX, 40), Ok((40, LOW)));
        assert_eq!(masked(u64::MAX, u64::MAX), Ok((LOW, LOW)));
        assert_eq!(masked(u64::MAX, 1 << 32 | 40), Err(false));
        assert_eq!(masked(!LOW, 0), Err(true));
        assert_eq!(masked(1 << 32 | 1, 1), Ok((1, 1)));
    }

    #[test]
    fn modes_have_16_bits() {
        let mode = |value| left(Op::ScmpCmpEq, value, None, Width::Half);
        assert_eq!(mode(0o4755), Ok((0o4755, 0xffff)));
        assert_eq!(mode(0x1_0000 | 0o4755), Err(false));
        for minus_one in [0xffff, LOW, u64::MAX] {
            assert_eq!(mode(minus_one), Ok((0xffff, 0xffff)));
        }
    }

    #[test]
    fn conditions_that_always_or_never_hold_are_left_out() {
        let (always, never) = (argument(0, Op::ScmpCmpGe, 0, None), argument(0, Op::ScmpCmpLt, 0, None));
        let other = argument(1, Op::ScmpCmpEq, 7, None);
        let found = |arguments: &[LinuxSeccompArg]| alternatives(arguments, |_| Width::Word).expect("arguments");
        let condition = ArgumentCondition { argument: 1, operator: Op::ScmpCmpEq, value: 7, mask: LOW };
        assert_eq!(found(&[always, other]), [vec![condition]]);
        assert_eq!(found(&[never, other]), Alternatives::new());
        // Several conditions on one argument are alternatives.
        assert_eq!(found(&[never, never, other]), [vec![condition]]);
        assert_eq!(found(&[never, always]), [vec![]]);
        assert_eq!(found(&[]), [vec![]]);
        let seventh = argument(6, Op::ScmpCmpEq, 7, None);
        assert_eq!(alternatives(&[seventh], |_| Width::Word), Err(NoSuchArgument(6)));
    }

    #[test]
    fn conditions_that_exclude_each_other_are_known() {
        use Op::*;
        let on = |argument: u32, operator, value| ArgumentCondition { argument, operator, value, mask: LOW };
        let masked = |value, mask| ArgumentCondition { argument: 0, operator: ScmpCmpMaskedEq, value, mask };
        let excluding = [
            (on(0, ScmpCmpEq, 3), on(0, ScmpCmpEq, 4)),
            (on(0, ScmpCmpLt, 38), on(0, ScmpCmpGe, 38)),
            (on(0, ScmpCmpLe, 38), on(0, ScmpCmpGt, 38)),
            (on(0, ScmpCmpNe, 16), on(0, ScmpCmpEq, 16)),
            (masked(1, 1), masked(0, 3)),
            (masked(0x1_0000, 0x1_0000), on(0, ScmpCmpEq, 5)),
        ];
        let meeting = [
            (on(0, ScmpCmpEq, 3), on(1, ScmpCmpEq, 4)),
            (on(0, ScmpCmpLt, 38), on(0, ScmpCmpEq, 37)),
            (on(0, ScmpCmpNe, 16), on(0, ScmpCmpNe, 17)),
            (masked(1, 1), masked(2, 2)),
            (masked(1, 1), on(0, ScmpCmpGt, 7)),
        ];
        for (one, other) in excluding {
            assert!(one.excludes(&other) && other.excludes(&one), "{one:?} {other:?}");
        }
        for (one, other) in meeting {
            assert!(!one.excludes(&other) && !other.excludes(&one), "{one:?} {other:?}");
        }
    }
}
