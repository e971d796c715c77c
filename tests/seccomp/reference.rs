//! libseccomp's programs, made in the same way as by runc and crun.

use std::{
    collections::BTreeSet,
    io::{Read as _, Seek as _},
};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator, LinuxSyscall};
use seccompiler::sock_filter;

use super::scmp;

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

/// Builds libseccomp's program with the same calls as runc and crun.
pub(crate) fn theirs(profile: &LinuxSeccomp, host: Arch) -> Vec<sock_filter> {
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
        if then != default {
            add(&mut filter, rule, then);
        }
    }
    exported(&filter)
}

fn add(filter: &mut ScmpFilterContext, rule: &LinuxSyscall, then: ScmpAction) {
    let arguments: Vec<ScmpArgCompare> = rule.args().iter().flatten().map(comparison).collect();
    let indices: BTreeSet<usize> = rule.args().iter().flatten().map(LinuxSeccompArg::index).collect();
    assert!(arguments.len() <= 6, "crun passes over all but the first six");
    for name in rule.names() {
        // Names that this libseccomp does not know are skipped, as runtimes do.
        let Ok(call) = ScmpSyscall::from_name(name) else { continue };
        if arguments.is_empty() {
            filter.add_rule(then, call).unwrap_or_else(|error| panic!("{name}: {error}"));
        } else if arguments.len() != indices.len() {
            for argument in &arguments {
                filter.add_rule_conditional(then, call, &[*argument]).expect("a rule");
            }
        } else {
            filter.add_rule_conditional(then, call, &arguments).expect("a rule");
        }
    }
}

fn comparison(argument: &LinuxSeccompArg) -> ScmpArgCompare {
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
}

fn exported(filter: &ScmpFilterContext) -> Vec<sock_filter> {
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
