//! A kernel whose storage stops to answer when it is read, at a boot or a reset: what ends a machine ends that.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use api::{Command as Ask, ErrorKind, EventKind, ExitReason, Reply, VmState};
use serde_json::{from_value, json};

use crate::hung::{Hung, begin, kind};
use crate::support::{LIMIT, Local, can_run, exit, guest};

/// A monitor whose machine is described: its kernel is read as long as `answers`.
struct Case {
    monitor: Local,
    answers: Arc<AtomicBool>,
    /// A read waits.
    waits: Receiver<()>,
    _storage: Hung,
}

impl Case {
    fn new(answers: bool) -> Option<Self> {
        let answers = Arc::new(AtomicBool::new(answers));
        let kernel = fs::read(guest("poke")).unwrap();
        let (storage, waits) = Hung::with_one_file(kernel, Arc::clone(&answers))?;
        let monitor = Local::idle();
        let whole = json!({
            "payload": { "kernel": storage.path("kernel"), "cmdline": "spin" },
            "memory": { "size": 64 << 20 },
            "serial": { "mode": "Null" },
        });
        let create = Ask::Create(Box::new(from_value(whole).unwrap()));
        assert_eq!(monitor.ask(create), Ok(Reply::Done));
        Some(Self {
            monitor,
            answers,
            waits,
            _storage: storage,
        })
    }

    fn has_ended(mut self) {
        self.monitor.outcome();
        let last = self.monitor.events().pop().unwrap().kind;
        assert_eq!(last, exit(ExitReason::Stopped));
    }
}

#[test]
fn what_ends_a_machine_ends_a_boot_whose_kernel_is_not_read() {
    if !can_run() {
        return;
    }
    let Some(case) = Case::new(false) else { return };
    for end in [Ask::Shutdown, Ask::Quit] {
        let booted = begin(&case.monitor, Ask::Boot);
        case.waits.recv_timeout(LIMIT).unwrap();
        assert_eq!(case.monitor.ask(end), Ok(Reply::Done));
        assert_eq!(kind(&booted), Some(ErrorKind::Conflict));
    }
    case.has_ended();
}

#[test]
fn a_kernel_that_was_given_up_is_booted_when_its_storage_answers() {
    if !can_run() {
        return;
    }
    let Some(case) = Case::new(false) else { return };
    let booted = begin(&case.monitor, Ask::Boot);
    case.waits.recv_timeout(LIMIT).unwrap();
    let again = begin(&case.monitor, Ask::Reboot);
    assert_eq!(kind(&booted), Some(ErrorKind::Conflict));
    case.waits.recv_timeout(LIMIT).unwrap();
    case.answers.store(true, Ordering::Release);
    // Nobody asks for what went unanswered again: this boot waits as the first did.
    assert_eq!(case.monitor.ask(Ask::Shutdown), Ok(Reply::Done));
    assert_eq!(kind(&again), Some(ErrorKind::Conflict));
    assert_eq!(case.monitor.ask(Ask::Boot), Ok(Reply::Done));
    assert_eq!(case.monitor.state().0, VmState::Running);
}

#[test]
fn what_ends_a_machine_ends_a_reset_whose_kernel_is_not_read() {
    if !can_run() {
        return;
    }
    let Some(case) = Case::new(true) else { return };
    for end in [Ask::Shutdown, Ask::Quit] {
        assert_eq!(case.monitor.ask(Ask::Boot), Ok(Reply::Done));
        case.answers.store(false, Ordering::Release);
        let reset = begin(&case.monitor, Ask::Reset);
        case.waits.recv_timeout(LIMIT).unwrap();
        // A command that is no end keeps its place.
        let paused = begin(&case.monitor, Ask::Pause);
        assert_eq!(case.monitor.ask(end), Ok(Reply::Done));
        assert_eq!(kind(&reset), Some(ErrorKind::Conflict));
        assert_eq!(kind(&paused), Some(ErrorKind::Conflict));
        case.answers.store(true, Ordering::Release);
    }
    let resets = case.monitor.events();
    let resets = resets.iter().filter(|event| event.kind == EventKind::Reset);
    assert_eq!(resets.count(), 2);
    case.has_ended();
}
