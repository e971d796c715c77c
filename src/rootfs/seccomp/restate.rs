//! Restates profiles for libseccomp, which is used in runc, and in crun for profiles that this driver does not compile.
//!
//! libseccomp compares all 64 bits of an argument. Only its masked equality can compare fewer bits, so every condition
//! on an argument that the kernel truncates is restated as one or several masked equalities. A range is divided into
//! blocks with a common binary prefix, as address ranges are divided into CIDR blocks: `< 38` becomes 0 to 31, 32 to
//! 35, and 36 to 37.

use std::collections::HashMap;

use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompOperator as Op, LinuxSyscall,
    LinuxSyscallBuilder,
};

use super::{
    SeccompError, SeccompHost,
    arguments::{CloneArguments, Width, width},
    conditions::{Alternatives, ArgumentCondition, alternatives},
};

/// The maximum number of rules that one rule may become. More rules would make a program that the kernel refuses (its
/// limit is 4096 instructions, of which a masked comparison takes three on each architecture).
const RULES_MAX: usize = 256;

/// The maximum number of conditions of a rule: crun ignores all after the first six (src/libcrun/seccomp.c), although a
/// rule with several conditions on one argument may have more.
const CONDITIONS_MAX: usize = 6;

/// Restates a profile so that libseccomp compares no bits that the kernel drops. The profile's meaning stays the same
/// for all arguments within the width that the kernel uses.
///
/// # Errors
/// Fails when the profile can't be restated without a change of its meaning.
pub fn for_libseccomp(profile: &LinuxSeccomp, host: SeccompHost) -> Result<LinuxSeccomp, SeccompError> {
    let clone = CloneArguments::on(host.arch);
    let mut rules = Vec::new();
    for rule in profile.syscalls().iter().flatten() {
        rules.extend(restate_rule(rule, clone)?);
    }
    refuse_conflicts(profile, clone)?;
    let mut profile = profile.clone();
    profile.set_syscalls(Some(rules));
    Ok(profile)
}

/// Restates a rule. It is split into several if its calls have arguments of different widths.
fn restate_rule(rule: &LinuxSyscall, clone: CloneArguments) -> Result<Vec<LinuxSyscall>, SeccompError> {
    let arguments = rule.args().as_deref().unwrap_or_default();
    let mut groups: Vec<(Vec<Width>, Vec<String>)> = Vec::new();
    for name in rule.names() {
        let widths: Vec<Width> = arguments.iter().map(|argument| width(name, argument.index(), clone)).collect();
        match groups.iter_mut().find(|(known, _)| *known == widths) {
            Some((_, names)) => names.push(name.clone()),
            None => groups.push((widths, vec![name.clone()])),
        }
    }
    let mut rules = Vec::new();
    for (widths, names) in groups {
        if arguments.len() <= CONDITIONS_MAX && widths.iter().all(|width| *width == Width::Register) {
            rules.push(rule_for(rule, names, arguments.to_vec())?);
            continue;
        }
        let holds = conditions(&names[0], arguments, clone)?;
        for arguments in masked_rules(&names[0], &holds)? {
            rules.push(rule_for(rule, names.clone(), arguments)?);
        }
    }
    Ok(rules)
}

/// Returns a rule with the action of `rule`, for these calls and with these arguments.
fn rule_for(
    rule: &LinuxSyscall,
    names: Vec<String>,
    arguments: Vec<LinuxSeccompArg>,
) -> Result<LinuxSyscall, SeccompError> {
    let mut builder = LinuxSyscallBuilder::default().names(names).action(rule.action());
    if let Some(errno) = rule.errno_ret() {
        builder = builder.errno_ret(errno);
    }
    if !arguments.is_empty() {
        builder = builder.args(arguments);
    }
    builder.build().map_err(|error| SeccompError::Invalid(error.to_string()))
}

/// Returns the alternatives under which a rule for this call applies.
fn conditions(call: &str, arguments: &[LinuxSeccompArg], clone: CloneArguments) -> Result<Alternatives, SeccompError> {
    let found = alternatives(arguments, |index| width(call, index, clone));
    found.map_err(|error| SeccompError::Invalid(format!("a rule for {call} names {error}")))
}

/// Returns the arguments of the rules that together apply whenever one of these alternatives holds. An empty inner list
/// is a rule that always applies.
fn masked_rules(call: &str, alternatives: &Alternatives) -> Result<Vec<Vec<LinuxSeccompArg>>, SeccompError> {
    let mut rules: Vec<Vec<LinuxSeccompArg>> = Vec::new();
    for all in alternatives {
        let mut found = vec![Vec::new()];
        for condition in all {
            let forms = libseccomp_forms(condition);
            if found.len() * forms.len() + rules.len() > RULES_MAX {
                return Err(SeccompError::Invalid(format!(
                    "a rule for {call} compares several arguments by order or with !=, and libseccomp would need more \
                    than {RULES_MAX} rules for it; compare all but one of them with == or with a mask"
                )));
            }
            found = found
                .iter()
                .flat_map(|before| forms.iter().map(move |form| [before.as_slice(), &[*form]].concat()))
                .collect();
        }
        rules.extend(found);
    }
    if rules.iter().any(Vec::is_empty) {
        return Ok(vec![Vec::new()]);
    }
    Ok(joined(rules))
}

/// Joins rules that have a single condition on the same argument: runtimes read several conditions on one argument as
/// alternatives.
fn joined(rules: Vec<Vec<LinuxSeccompArg>>) -> Vec<Vec<LinuxSeccompArg>> {
    let mut joined: Vec<Vec<LinuxSeccompArg>> = Vec::new();
    for rule in rules {
        let same = |known: &&mut Vec<LinuxSeccompArg>| {
            let mut of_both = known.iter().chain(&rule);
            rule.len() == 1
                && known.len() < CONDITIONS_MAX
                && of_both.all(|argument| argument.index() == rule[0].index())
        };
        match joined.iter_mut().find(same) {
            Some(known) => known.extend(rule),
            None => joined.push(rule),
        }
    }
    joined
}

/// Returns conditions that libseccomp can compare, and of which one holds whenever `condition` does.
fn libseccomp_forms(condition: &ArgumentCondition) -> Vec<LinuxSeccompArg> {
    let argument = |op, value, two: Option<u64>| {
        let index = condition.argument as usize;
        let builder = LinuxSeccompArgBuilder::default().index(index).op(op).value(value);
        two.into_iter().fold(builder, LinuxSeccompArgBuilder::value_two).build().expect("every field has a default")
    };
    if condition.mask == u64::MAX && condition.operator != Op::ScmpCmpMaskedEq {
        return vec![argument(condition.operator, condition.value, None)];
    }
    masked_equalities(condition)
        .into_iter()
        .map(|(mask, value)| argument(Op::ScmpCmpMaskedEq, mask, Some(value)))
        .collect()
}

/// Returns the masks and values of the masked equalities that together are equivalent to a condition on an argument
/// that the kernel truncates.
fn masked_equalities(condition: &ArgumentCondition) -> Vec<(u64, u64)> {
    let ArgumentCondition { value, mask, operator, .. } = *condition;
    // For each bit: the numbers that have the same higher bits as the value, and differ from it in that bit.
    let bits = (0..mask.count_ones()).rev();
    let differing = bits.map(|bit| {
        let prefix = mask & !((1 << bit) - 1);
        ((value >> bit) & 1 == 0, (prefix, (value ^ (1 << bit)) & prefix))
    });
    let equal = (mask, value);
    match operator {
        Op::ScmpCmpEq | Op::ScmpCmpMaskedEq => vec![equal],
        Op::ScmpCmpNe => differing.map(|(_, prefix)| prefix).collect(),
        Op::ScmpCmpGt => differing.filter(|(larger, _)| *larger).map(|(_, prefix)| prefix).collect(),
        Op::ScmpCmpLt => differing.filter(|(larger, _)| !*larger).map(|(_, prefix)| prefix).collect(),
        // The neighbouring value exists: conditions that always hold have been left out before.
        Op::ScmpCmpGe => {
            masked_equalities(&ArgumentCondition { operator: Op::ScmpCmpGt, value: value - 1, ..*condition })
        }
        Op::ScmpCmpLe => {
            masked_equalities(&ArgumentCondition { operator: Op::ScmpCmpLt, value: value + 1, ..*condition })
        }
    }
}

/// The action of a rule for a call, and the alternatives under which the rule applies.
struct CallRule {
    action: u32,
    holds: Alternatives,
    is_conditional: bool,
    is_restated: bool,
}

/// Refuses profiles in which rules of different actions apply to the same call. libseccomp decides between such rules
/// by an order of operators and values (src/db.c, `_db_chain_lt`). Restating a rule would change that order, and so the
/// verdict.
fn refuse_conflicts(profile: &LinuxSeccomp, clone: CloneArguments) -> Result<(), SeccompError> {
    let default = profile.default_action().as_u32(profile.default_errno_ret());
    let mut calls: HashMap<&str, Vec<CallRule>> = HashMap::new();
    for rule in profile.syscalls().iter().flatten() {
        let action = rule.action().as_u32(rule.errno_ret());
        let arguments = rule.args().as_deref().unwrap_or_default();
        // Runtimes leave out rules that have the same action as the default.
        if action == default {
            continue;
        }
        for name in rule.names() {
            let new = CallRule {
                action,
                holds: conditions(name, arguments, clone)?,
                is_conditional: !arguments.is_empty(),
                is_restated: arguments.iter().any(|one| width(name, one.index(), clone) != Width::Register),
            };
            let known = calls.entry(name).or_default();
            if known.iter().any(|other| new.conflicts_with(other)) {
                return Err(SeccompError::Conflict { call: name.clone() });
            }
            known.push(new);
        }
    }
    Ok(())
}

impl CallRule {
    fn conflicts_with(&self, other: &Self) -> bool {
        // A rule without conditions takes precedence over rules with conditions, unless all of those always hold.
        let is_ordered = self.is_conditional == other.is_conditional || self.always_holds() && other.always_holds();
        self.action != other.action
            && (self.is_restated || other.is_restated)
            && is_ordered
            && can_meet(&self.holds, &other.holds)
    }

    fn always_holds(&self) -> bool {
        self.holds.iter().any(Vec::is_empty)
    }
}

/// Returns whether the arguments of one call can meet an alternative of each.
fn can_meet(one: &Alternatives, other: &Alternatives) -> bool {
    let excluded = |all: &[ArgumentCondition], others: &[ArgumentCondition]| {
        all.iter().any(|one| others.iter().any(|other| one.excludes(other)))
    };
    one.iter().any(|all| other.iter().any(|others| !excluded(all, others)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPERATORS: [Op; 6] =
        [Op::ScmpCmpNe, Op::ScmpCmpLt, Op::ScmpCmpLe, Op::ScmpCmpEq, Op::ScmpCmpGe, Op::ScmpCmpGt];

    fn meets(is: u64, operator: Op, value: u64) -> bool {
        match operator {
            Op::ScmpCmpNe => is != value,
            Op::ScmpCmpLt => is < value,
            Op::ScmpCmpLe => is <= value,
            Op::ScmpCmpGe => is >= value,
            Op::ScmpCmpGt => is > value,
            Op::ScmpCmpEq | Op::ScmpCmpMaskedEq => is == value,
        }
    }

    #[test]
    fn prefixes_are_the_range_and_each_number_is_in_one() {
        let mask = Width::Half.mask();
        for operator in OPERATORS {
            for value in [1, 2, 37, 38, 40, 0x7fff, 0x8000, 0xfffe] {
                let prefixes = masked_equalities(&ArgumentCondition { argument: 0, operator, value, mask });
                assert!(prefixes.len() <= 16, "{operator:?} {value}");
                for is in 0..=mask {
                    let met = prefixes.iter().filter(|(mask, wanted)| is & mask == *wanted).count();
                    assert_eq!(met, usize::from(meets(is, operator, value)), "{is} {operator:?} {value}");
                }
            }
        }
    }

    fn profile(rules: &serde_json::Value) -> LinuxSeccomp {
        serde_json::from_value(serde_json::json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}))
            .expect("a profile")
    }

    fn after(rules: &serde_json::Value) -> Result<serde_json::Value, SeccompError> {
        let restated = for_libseccomp(&profile(rules), SeccompHost { arch: "amd64", kernel: (6, 1) })?;
        Ok(serde_json::to_value(restated.syscalls()).expect("rules"))
    }

    #[test]
    fn rules_are_restated_where_the_kernel_truncates() {
        let less = |index| serde_json::json!([{"index": index, "op": "SCMP_CMP_LT", "value": 38}]);
        let masked = |mask: u64, value: u64| serde_json::json!({"index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": mask, "valueTwo": value});
        let found = after(&serde_json::json!([
            {"names": ["socket", "unshare", "socketpair"], "action": "SCMP_ACT_ALLOW", "args": less(0)},
            {"names": ["unshare"], "action": "SCMP_ACT_LOG"},
        ]));
        let blocks = [masked(0xffff_ffe0, 0), masked(0xffff_fffc, 32), masked(0xffff_fffe, 36)];
        let wanted = serde_json::json!([
            {"names": ["socket", "socketpair"], "action": "SCMP_ACT_ALLOW", "args": blocks},
            {"names": ["unshare"], "action": "SCMP_ACT_ALLOW", "args": less(0)},
            {"names": ["unshare"], "action": "SCMP_ACT_LOG"},
        ]);
        assert_eq!(found.expect("restated"), wanted);
    }

    #[test]
    fn conditions_of_one_rule_stay_together() {
        let found =
            after(&serde_json::json!([{"names": ["ioctl"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5, "args": [
                {"index": 1, "op": "SCMP_CMP_EQ", "value": 0x5412},
                {"index": 2, "op": "SCMP_CMP_NE", "value": 7},
            ]}]));
        let wanted = serde_json::json!([{"names": ["ioctl"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5, "args": [
            {"index": 1, "op": "SCMP_CMP_MASKED_EQ", "value": 0xffff_ffff_u64, "valueTwo": 0x5412},
            {"index": 2, "op": "SCMP_CMP_NE", "value": 7},
        ]}]);
        assert_eq!(found.expect("restated"), wanted);
    }

    #[test]
    fn no_rule_has_more_conditions_than_crun_reads() {
        let equal = |value: u64| serde_json::json!({"index": 2, "op": "SCMP_CMP_EQ", "value": value});
        let seven: Vec<_> = (0..7).map(equal).collect();
        let found = after(&serde_json::json!([
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "op": "SCMP_CMP_NE", "value": 40}]},
            // The kernel does not truncate the arguments of this call.
            {"names": ["write"], "action": "SCMP_ACT_ALLOW", "args": seven},
        ]));
        let found = found.expect("restated");
        let lengths =
            found.as_array().expect("rules").iter().map(|rule| rule["args"].as_array().expect("arguments").len());
        assert_eq!(lengths.collect::<Vec<_>>(), [6, 6, 6, 6, 6, 2, 6, 1]);
    }

    #[test]
    fn rules_that_can_not_be_restated_are_refused() {
        let not = |index| serde_json::json!({"index": index, "op": "SCMP_CMP_NE", "value": 5});
        let rule = |args: &[serde_json::Value]| {
            after(&serde_json::json!([{"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": args}]))
        };
        for (arguments, part) in [
            ([not(0), not(1)], "a rule for socket compares several"),
            ([not(0), not(6)], "a rule for socket names argument 6"),
        ] {
            let error = rule(&arguments).expect_err("refused").to_string();
            assert!(error.contains(part), "{error}");
        }
        rule(&[not(0), not(4)]).expect("the fifth argument is not truncated");
    }
}
