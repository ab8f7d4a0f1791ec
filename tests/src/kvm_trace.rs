//! What the nested machine's KVM saw last of a guest.
//!
//! The emulated processor loses a guest now and then, and what the monitor
//! sees of that (a triple fault, a guest that spins) does not tell whose fault
//! it was. KVM's trace points do: the last exits with their instruction
//! pointers, and what was injected. The kernel keeps them in a ring, which
//! costs a run nothing that can be measured.

use std::fs;
use std::io;
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
/// How many lines are told.
const TOLD: usize = 80;

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
    Ok(end_of(&text, TOLD))
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
    fn what_a_guest_did_before_it_looped_is_not_driven_out() {
        let round = "v 0.2: exit\nv 0.3: fault\nv 0.4: inject\n".repeat(1000);
        let text = format!("v 0.1: before\n{round}");
        assert_eq!(
            end_of(&text, 4),
            "v 0.1: before\nv 0.2: exit\nv 0.3: fault\nv 0.4: inject\n"
        );
    }
}
