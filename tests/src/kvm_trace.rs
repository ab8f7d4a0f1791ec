//! What the nested machine's KVM saw last of a guest.
//!
//! The emulated processor loses a guest now and then, and what the monitor
//! sees of that (a triple fault, a guest that spins) does not tell whose fault
//! it was. KVM's trace points do: the last exits with their instruction
//! pointers, and what was injected. The kernel keeps them in a ring, which
//! costs a run nothing that can be measured.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;

/// Where L1's init mounts the kernel's tracing.
const TRACING: &str = "/sys/kernel/tracing";
/// Exits that tell of the guest's way, and what KVM did to it.
const EVENTS: &[&str] = &[
    "kvm_exit",
    "kvm_inj_exception",
    "kvm_inj_virq",
    "kvm_page_fault",
    "kvm_pio",
    "kvm_userspace_exit",
];
/// All exits but `SVM_EXIT_INTR` (0x60): a guest that spins has no others, and
/// they would drive out what came before.
const EXITS: &str = "exit_reason != 0x60";
/// The ring's size for each processor, in KiB.
const RING: &str = "1024";
/// The most events in a round that is told once.
const ROUND: usize = 4;
/// `EXITINTINFO`: valid, an exception with an error code, vector 14.
const PAGE_FAULT: u64 = 0x8000_0B0E;
/// A page fault's error code: the access was an instruction fetch.
const FETCH: u64 = 1 << 4;
/// How many lines are told.
const TOLD: usize = 80;
/// L1's symbols with their addresses; only root sees these.
const SYMBOLS: &str = "/proc/kallsyms";
/// The function of L1's kernel that holds its VMRUN.
const ENTRY: &str = "__svm_vcpu_run";
/// What stands before the range of [`ENTRY`] in a trace.
const ENTRY_IS: &str = "L1's VMRUN is in ";
/// What stands before the number of an interrupt that no longer could be taken.
const NOT_TAKEN: &str = "no device acted since the vCPU last took the interrupt it shut down in, ";
/// What stands before the exit of a vCPU that is lost without having shut down.
const STRAYED: &str = "a vCPU fetches its instructions where L1 enters guests, ";
/// The first vector of Linux's own timer and inter-processor interrupts; those of devices are below.
const LOCAL_VECTORS: u64 = 0xEC;
/// Exits of a guest that computes, waits and sets its timer: nothing else sees them.
const QUIET_EXITS: [&str; 5] = ["hlt", "msr", "vintr", "interrupt", "shutdown"];

/// Begins to keep what KVM sees.
///
/// # Errors
/// The kernel has no such trace points, or their files are not where they should be.
pub fn start() -> io::Result<()> {
    let root = Path::new(TRACING);
    fs::write(root.join("buffer_size_kb"), RING)?;
    let kvm = root.join("events/kvm");
    fs::write(kvm.join("kvm_exit/filter"), EXITS)?;
    for event in EVENTS {
        fs::write(kvm.join(event).join("enable"), "1")?;
    }
    clear()
}

/// Forgets what was kept so far: a new guest begins.
///
/// # Errors
/// [`start`] has not been called.
pub fn clear() -> io::Result<()> {
    fs::write(Path::new(TRACING).join("trace"), "")
}

/// The last that KVM saw, one event a line.
///
/// # Errors
/// [`start`] has not been called.
pub fn last() -> io::Result<String> {
    let text = fs::read_to_string(Path::new(TRACING).join("trace"))?;
    let range = function_in(&fs::read_to_string(SYMBOLS)?, ENTRY);
    let strayed = range
        .as_ref()
        .and_then(|range| strayed(&text, range))
        .map(|line| format!("{STRAYED}{line}\n"))
        .unwrap_or_default();
    let entry = range
        .map(|range| format!("{ENTRY_IS}{:#x}..{:#x}\n", range.start, range.end))
        .unwrap_or_default();
    let not_taken = not_taken(&text)
        .map(|vector| format!("{NOT_TAKEN}{vector:#x}\n"))
        .unwrap_or_default();
    Ok(entry + &strayed + &not_taken + &end_of(&text, TOLD))
}

/// The exit of a vCPU, by `text`, that is to run the instructions of L1's own `entry` and cannot have them: the memory there is not the
/// guest's. It goes round in page faults for ever while the other vCPUs wait for it.
fn strayed<'a>(text: &'a str, entry: &Range<u64>) -> Option<&'a str> {
    let mut exits = text.lines().filter(|line| line.contains(": kvm_exit: "));
    exits
        .find(|line| {
            field(line, " rip ").is_some_and(|at| entry.contains(&at)) && is_failed_fetch(line)
        })
        .map(str::trim)
}

/// Whether, in the exit of `line`, a page fault was being delivered (AMD APM volume 2, 15.7.2) that an instruction's fetch had caused.
fn is_failed_fetch(line: &str) -> bool {
    field(line, " intr_info ") == Some(PAGE_FAULT)
        && field(line, " error_code ").is_some_and(|code| code & FETCH != 0)
}

/// Whether `trace`, from [`last`], proves that the emulated processor has lost a vCPU of a guest that did not shut down: what waits
/// for that vCPU is never done.
#[must_use]
pub fn lost_a_processor(trace: &str) -> bool {
    trace.contains(STRAYED)
}

/// The vector of a local interrupt in whose delivery the guest shut down by `text`,
/// if the same vCPU took it before and since then all vCPUs have but computed,
/// waited and interrupted each other.
fn not_taken(text: &str) -> Option<u64> {
    let lines: Vec<&str> = text.lines().collect();
    let end = lines
        .iter()
        .rposition(|line| line.contains("reason shutdown"))?;
    let delivered = field(lines[end], " intr_info ")?;
    // Valid, of type 0: an external interrupt (AMD APM volume 2, 15.7.2).
    let vector = delivered.checked_sub(0x8000_0000)?;
    if !(LOCAL_VECTORS..0x100).contains(&vector) {
        return None;
    }
    let vcpu = lines[end].split_whitespace().next()?;
    let of_vcpu = |line: &&&str| line.split_whitespace().next() == Some(vcpu);
    let is_taken =
        |line: &&str| line.contains(": kvm_exit: ") && field(line, " intr_info ") == Some(vector);
    let taken = lines[..end]
        .iter()
        .rposition(|line| of_vcpu(&line) && is_taken(line))?;
    lines[taken..=end]
        .iter()
        .all(|line| is_quiet(line))
        .then_some(vector)
}

/// Whether no device and nobody outside the vCPUs has part in the event of `line`.
fn is_quiet(line: &str) -> bool {
    let reason = line
        .split_once(" reason ")
        .and_then(|(_, rest)| rest.split_whitespace().next());
    if line.contains(": kvm_exit: ") {
        reason.is_some_and(|reason| QUIET_EXITS.contains(&reason))
    } else {
        field(line, " kvm_inj_virq: IRQ ").is_some_and(|vector| vector >= LOCAL_VECTORS)
    }
}

/// The hexadecimal number after `name` in `line`.
fn field(line: &str, name: &str) -> Option<u64> {
    let (_, rest) = line.split_once(name)?;
    number(rest.split_whitespace().next()?)
}

/// Where `name` lies by `symbols`, the lines of `/proc/kallsyms`: up to the next symbol's address.
fn function_in(symbols: &str, name: &str) -> Option<Range<u64>> {
    let addresses = || {
        symbols.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            Some((address, words.nth(1)?))
        })
    };
    let (start, _) = addresses().find(|&(address, symbol)| address != 0 && symbol == name)?;
    let end = addresses()
        .map(|(address, _)| address)
        .filter(|&next| next > start)
        .min()?;
    Some(start..end)
}

/// Whether `trace`, from [`last`], ends in a way in which the emulated processor
/// loses guests: it leaves state of L1 in the guest's control block, and the guest
/// shuts down for want of anything it knows. Each of three marks proves it:
///
/// - the guest is at an address inside L1's own VMRUN function, which it has no
///   means of knowing, or
/// - it has its own instruction pointer but L1's page tables: the fetch of an
///   instruction, which ran a moment ago, is a page fault that no handler can be
///   fetched for, or
/// - it shuts down in the delivery of its own timer's or another vCPU's interrupt, as
///   it has taken before, and since then no vCPU has done anything that a device or
///   the monitor could see.
#[must_use]
pub fn lost_to_the_emulator(trace: &str) -> bool {
    let Some(exit) = trace.lines().rfind(|line| line.contains("reason shutdown")) else {
        return false;
    };
    let entry = trace.lines().find_map(|line| {
        let (start, end) = line.split_once(ENTRY_IS)?.1.split_once("..")?;
        Some(number(start)?..number(end.trim())?)
    });
    let has_its_pointer = entry
        .zip(field(exit, " rip "))
        .is_some_and(|(entry, at)| entry.contains(&at));
    has_its_pointer || is_failed_fetch(exit) || trace.contains(NOT_TAKEN)
}

/// A hexadecimal number.
fn number(word: &str) -> Option<u64> {
    u64::from_str_radix(word.trim_start_matches("0x"), 16).ok()
}

/// The last `count` events, where a round of events that a guest in a loop
/// repeats is told once.
fn end_of(text: &str, count: usize) -> String {
    let mut told = Vec::new();
    let mut recent = [""; ROUND];
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        // In front are process, processor and time.
        let event = line.split_once(": ").map_or(line, |(_, event)| event);
        if !recent.contains(&event) {
            told.push(format!("{}\n", line.trim()));
        }
        recent.rotate_left(1);
        recent[ROUND - 1] = event;
    }
    told.split_off(told.len().saturating_sub(count)).concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_events_are_told_without_the_head() {
        let text = "# tracer: nop\n#\n  v 0.1: one\n  v 0.2: two\n  v 0.3: three\n";
        assert_eq!(end_of(text, 2), "v 0.2: two\nv 0.3: three\n");
        assert_eq!(end_of(text, 9).lines().count(), 3);
        assert_eq!(end_of("# nothing\n", 2), "");
    }

    #[test]
    fn only_a_shutdown_out_of_a_failed_fetch_is_the_emulators() {
        let trace = |reason: &str, delivered: &str, code: &str| {
            format!(
                "v 0.1: kvm_exit: vcpu 0 reason io rip 0x8e intr_info 0x0 error_code 0x0\n\
                 v 0.2: kvm_exit: vcpu 0 reason {reason} rip 0x8f info1 0x0 info2 0x0 \
                 intr_info {delivered} error_code {code}\n\
                 v 0.3: kvm_userspace_exit: reason KVM_EXIT_SHUTDOWN (8)\n"
            )
        };
        let judge = |reason, delivered, code| lost_to_the_emulator(&trace(reason, delivered, code));
        assert!(judge("shutdown", "0x80000b0e", "0x00000010"));
        assert!(!judge("shutdown", "0x80000b0e", "0x00000002"));
        assert!(!judge("shutdown", "0x80000b0d", "0x00000010"));
        assert!(!judge("shutdown", "0x00000000", "0x00000000"));
        assert!(!judge("npf", "0x80000b0e", "0x00000010"));
        assert!(!lost_to_the_emulator(""));
    }

    #[test]
    fn a_shutdown_inside_the_vmrun_of_l1_is_the_emulators() {
        let symbols = "ffffffffc06a5500 t svm_pre\t[kvm_amd]\n\
                       ffffffffc06a5640 t svm_post\t[kvm_amd]\n\
                       ffffffffc06a5580 t __svm_vcpu_run\t[kvm_amd]\n";
        let range = function_in(symbols, ENTRY).unwrap();
        assert_eq!(range, 0xffff_ffff_c06a_5580..0xffff_ffff_c06a_5640);
        assert_eq!(function_in(symbols, "svm_vcpu"), None);
        assert_eq!(
            function_in("0000000000000000 t __svm_vcpu_run\n", ENTRY),
            None
        );

        let trace = |head: &str, rip: &str| {
            format!(
                "{head}v 0.2: kvm_exit: vcpu 0 reason shutdown rip {rip} info1 0x0 info2 0x0 \
                 intr_info 0x800000ec error_code 0x0\n"
            )
        };
        let head = format!("{ENTRY_IS}{:#x}..{:#x}\n", range.start, range.end);
        assert!(lost_to_the_emulator(&trace(&head, "0xffffffffc06a55b0")));
        assert!(!lost_to_the_emulator(&trace(&head, "0xffffffffc06a5640")));
        assert!(!lost_to_the_emulator(&trace("", "0xffffffffc06a55b0")));
    }

    #[test]
    fn a_vcpu_that_fetches_in_l1s_own_code_is_lost_and_one_that_runs_its_own_there_is_not() {
        let entry = 0xC056_9510..0xC056_B900;
        let trace = |rip: &str, delivered: &str, code: &str| {
            format!(
                "v1-5 [0] d.. 0.1: kvm_exit: vcpu 1 reason npf rip {rip} info1 0x2 info2 0x1 \
                 intr_info {delivered} error_code {code}\n\
                 v0-4 [0] d.. 0.2: kvm_exit: vcpu 0 reason hlt rip 0x8f info1 0x0 info2 0x0 \
                 intr_info 0x0 error_code 0x0\n"
            )
        };
        let judge = |rip, delivered, code| strayed(&trace(rip, delivered, code), &entry).is_some();
        assert!(judge("0xc05695b0", "0x80000b0e", "0x00000010"));
        // A module of the guest's may lie there, and read what is not there yet.
        assert!(!judge("0xc05695b0", "0x80000b0e", "0x00000000"));
        assert!(!judge("0xc05695b0", "0x00000000", "0x00000010"));
        assert!(!judge("0xc056b900", "0x80000b0e", "0x00000010"));
        assert!(!lost_a_processor(&trace(
            "0xc05695b0",
            "0x80000b0e",
            "0x10"
        )));
        assert!(lost_a_processor(&format!("{STRAYED}v1-5 [0] d.. 0.1\n")));
    }

    #[test]
    fn a_timer_that_was_taken_a_moment_ago_is_not_taken_only_by_the_emulators_fault() {
        let trace = |between: &str, delivered: &str| {
            format!(
                "vcpu1-5 [0] d.. 0.1: kvm_inj_virq: IRQ 0xec\n\
                 vcpu1-5 [0] d.. 0.2: kvm_exit: vcpu 1 reason msr rip 0x8 info1 0x1 info2 0x0 \
                 intr_info 0x000000ec error_code 0x0\n\
                 {between}\
                 vcpu1-5 [0] ... 0.4: kvm_inj_virq: IRQ 0xec\n\
                 vcpu2-6 [1] d.. 0.5: kvm_exit: vcpu 2 reason hlt rip 0x9 info1 0x0 info2 0x0 \
                 intr_info 0x00000000 error_code 0x0\n\
                 vcpu1-5 [0] d.. 0.6: kvm_exit: vcpu 1 reason shutdown rip 0x7 info1 0x0 info2 0x0 \
                 intr_info {delivered} error_code 0x0\n\
                 vcpu1-5 [0] ... 0.7: kvm_userspace_exit: reason KVM_EXIT_SHUTDOWN (8)\n"
            )
        };
        assert_eq!(not_taken(&trace("", "0x800000ec")), Some(0xEC));
        // Another interrupt, and one that it never took; a device's; an exception.
        assert_eq!(not_taken(&trace("", "0x800000fb")), None);
        assert_eq!(not_taken(&trace("", "0x80000041")), None);
        assert_eq!(not_taken(&trace("", "0x80000b0e")), None);
        assert_eq!(not_taken(&trace("", "0x00000000")), None);
        for acted in [
            "vcpu2-6 [1] ... 0.3: kvm_inj_virq: IRQ 0x41\n",
            "vcpu2-6 [1] ... 0.3: kvm_exit: vcpu 2 reason npf rip 0x8 intr_info 0x0\n",
            "vcpu0-4 [1] ... 0.3: kvm_userspace_exit: reason KVM_EXIT_IO (2)\n",
            "vcpu0-4 [1] ... 0.3: kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x41\n",
        ] {
            assert_eq!(not_taken(&trace(acted, "0x800000ec")), None, "{acted}");
        }
        assert_eq!(not_taken(""), None);
        assert!(lost_to_the_emulator(&format!(
            "{NOT_TAKEN}0xec\n{}",
            trace("", "0x800000ec")
        )));
    }

    #[test]
    fn what_a_guest_did_before_it_looped_is_not_driven_out() {
        let round = "v 0.2: exit\nv 0.3: fault\nv 0.4: inject\n".repeat(1000);
        let text = format!("v 0.1: before\n{round}");
        assert_eq!(
            end_of(&text, 4),
            "v 0.1: before\nv 0.2: exit\nv 0.3: fault\nv 0.4: inject\n"
        );
    }
}
