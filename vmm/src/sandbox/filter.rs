//! From the list to programs of the host's filter machine.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use super::rules::{BASELINE, NAMESPACES, RULES, Rule, TYPED, When};
use super::{Kind, SandboxError, trap};

/// The programs that have been made, one for each kind.
static PROGRAMS: [OnceLock<BpfProgram>; Kind::ALL.len()] =
    [const { OnceLock::new() }; Kind::ALL.len()];

/// What the host has in the structure that a program reads: `struct seccomp_data` of `linux/seccomp.h`.
mod data {
    pub(super) const NUMBER: u32 = 0;
    pub(super) const POINTER: u32 = 8;
}

/// Instructions, by `linux/bpf_common.h`.
mod code {
    pub(super) const LOAD: u16 = 0x20;
    pub(super) const JUMP_IF_EQUAL: u16 = 0x15;
    pub(super) const JUMP_IF_AT_LEAST: u16 = 0x35;
    pub(super) const RETURN: u16 = 0x06;
}

/// The filter of this kind, which is made once.
///
/// # Errors
///
/// [`SandboxError::Program`] where the list makes no program, which tests rule out.
pub(super) fn program(kind: Kind, lenient: bool) -> Result<&'static BpfProgram, SandboxError> {
    let Some(place) = PROGRAMS.get(kind as usize) else {
        return Err(SandboxError::Program(kind, "no such kind".to_owned()));
    };
    if let Some(made) = place.get() {
        return Ok(made);
    }
    let made = make(kind, lenient).map_err(|why| SandboxError::Program(kind, why))?;
    Ok(place.get_or_init(|| made))
}

/// Whether threads of this kind may make the call under the rule's condition.
pub(super) fn applies(rule: &Rule, kind: Kind) -> bool {
    rule.kinds.contains(&kind)
}

fn make(kind: Kind, lenient: bool) -> Result<BpfProgram, String> {
    let mut calls: BTreeMap<i64, Option<Vec<SeccompRule>>> = BTreeMap::new();
    for rule in RULES.iter().filter(|rule| applies(rule, kind)) {
        let ways = calls.entry(rule.number).or_insert_with(|| Some(Vec::new()));
        let more = conditions(&rule.when)?;
        // Without a condition the others mean nothing.
        *ways = match (ways.take(), more) {
            (Some(mut ways), Some(more)) => {
                ways.extend(more);
                Some(ways)
            }
            _ => None,
        };
    }
    let calls = calls
        .into_iter()
        .map(|(number, ways)| (number, ways.unwrap_or_default()))
        .collect();
    let filter = SeccompFilter::new(
        calls,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    );
    let rules = BpfProgram::try_from(filter.map_err(|error| error.to_string())?);
    let rules = rules.map_err(|error| error.to_string())?;
    let mut program = prologue(lenient);
    program.extend(rules);
    Ok(program)
}

/// The conditions of which one must hold; `None`: there are none.
fn conditions(when: &When) -> Result<Option<Vec<SeccompRule>>, String> {
    let word = SeccompCmpArgLen::Dword;
    let rule = |conditions| SeccompRule::new(conditions).map_err(|error| error.to_string());
    let condition = |argument, len, op, value| {
        SeccompCondition::new(argument, len, op, value).map_err(|error| error.to_string())
    };
    let one = |argument, len, op, value| rule(vec![condition(argument, len, op, value)?]);
    let is = |argument, value: u32| {
        condition(argument, word.clone(), SeccompCmpOp::Eq, u64::from(value))
    };
    let all = match *when {
        When::Always => return Ok(None),
        When::Is(argument, values) => values
            .iter()
            .map(|value| one(argument, word.clone(), SeccompCmpOp::Eq, u64::from(*value)))
            .collect::<Result<_, _>>()?,
        When::Without(argument, bits) => vec![one(
            argument,
            word,
            SeccompCmpOp::MaskedEq(u64::from(bits)),
            0,
        )?],
        When::Both(first, other) => vec![rule(vec![is(first.0, first.1)?, is(other.0, other.1)?])?],
        When::Null(argument) => {
            vec![one(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?]
        }
        When::OwnProcess(signals) => signals
            .iter()
            .map(|signal| rule(vec![is(0, std::process::id())?, is(2, *signal)?]))
            .collect::<Result<_, _>>()?,
    };
    Ok(Some(all))
}

/// What comes before the rules: `clone3`, whose flags no filter can read, is told not to be there, so that the C library uses `clone`;
/// and with `lenient` what has been refused once may be done.
fn prologue(lenient: bool) -> BpfProgram {
    let step = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    let missing = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
    let mut program = vec![
        step(code::LOAD, 0, 0, data::NUMBER),
        step(code::JUMP_IF_EQUAL, 0, 1, CLONE3),
        step(code::RETURN, 0, 0, missing),
    ];
    if lenient {
        let (low, high) = halves(trap::redone());
        program.extend([
            step(code::LOAD, 0, 0, data::POINTER),
            step(code::JUMP_IF_EQUAL, 0, 3, low),
            step(code::LOAD, 0, 0, data::POINTER + 4),
            step(code::JUMP_IF_EQUAL, 0, 1, high),
            step(code::RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        ]);
    }
    program
}

/// The filter of the thread [`OUTSIDE`](super::OUTSIDE), which all have beside their own that it starts, and programs: what is
/// on the [list](BASELINE) fails.
pub(super) fn baseline() -> Result<BpfProgram, String> {
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BASELINE
        .iter()
        .map(|number| (*number, Vec::new()))
        .collect();
    let namespaces = NAMESPACES.iter().map(|flag| {
        let word = SeccompCmpArgLen::Dword;
        SeccompCondition::new(0, word, SeccompCmpOp::MaskedEq(*flag), *flag)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map_err(|error| error.to_string())
    });
    calls.insert(libc::SYS_clone, namespaces.collect::<Result<_, _>>()?);
    let terminals = conditions(&When::Is(1, TYPED))?.unwrap_or_default();
    calls.insert(libc::SYS_ioctl, terminals);
    let filter = SeccompFilter::new(
        calls,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM.unsigned_abs()),
        TargetArch::x86_64,
    );
    let rules = BpfProgram::try_from(filter.map_err(|error| error.to_string())?);
    let step = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    let mut program = prologue(false);
    // The numbers of x32 mean the same calls as others do.
    program.extend([
        step(code::LOAD, 0, 0, data::NUMBER),
        step(code::JUMP_IF_AT_LEAST, 0, 1, X32),
        step(
            code::RETURN,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs(),
        ),
    ]);
    program.extend(rules.map_err(|error| error.to_string())?);
    Ok(program)
}

/// From here on, numbers are those of x32.
const X32: u32 = 0x4000_0000;

/// `clone3`, by `unistd_64.h`.
const CLONE3: u32 = 435;

fn halves(number: u64) -> (u32, u32) {
    let half = |shift: u32| u32::try_from((number >> shift) & u64::from(u32::MAX)).unwrap_or(0);
    (half(0), half(32))
}
