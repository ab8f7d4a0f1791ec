//! A boot whose disks take for ever to open: all else goes on, and what ends the machine ends it.

use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use api::wire::{VmConfig, VmInfoState};
use api::{Answer, Command as Ask, Control, ControlError, ErrorKind, EventKind, Reply, VmState};
use serde_json::json;
use vmm::machine::inbox::Message;

use crate::nbd::{Server, await_end};
use crate::support::{Local, Vireo, can_run, exit, guest, run_arguments};

/// The answer to a command that takes long.
fn begin(monitor: &Local, command: Ask) -> Receiver<Result<Reply, ControlError>> {
    let (sender, receiver) = channel();
    let answer: Answer = Box::new(move |result| {
        let _ = sender.send(result);
    });
    assert!(monitor.mailbox.send(Message::Command(command, answer)));
    receiver
}

fn description(server: &Server) -> VmConfig {
    let whole = json!({
        "payload": { "kernel": guest("poke"), "cmdline": "spin" },
        "memory": { "size": 64 << 20 },
        "serial": { "mode": "Off" },
        "disks": [{ "path": server.uri() }],
    });
    serde_json::from_value(whole).unwrap()
}

/// A monitor whose machine boots, the boot's answer, and the server that holds it up.
struct Case {
    monitor: Local,
    server: Server,
}

impl Case {
    fn new() -> Self {
        let (monitor, server) = (Local::idle(), Server::silent());
        let create = Ask::Create(Box::new(description(&server)));
        assert_eq!(monitor.ask(create), Ok(Reply::Done));
        Self { monitor, server }
    }

    fn states(&self) -> Vec<VmState> {
        let states = self.monitor.new_events().into_iter();
        states
            .filter_map(|event| match event {
                EventKind::State { state, .. } => Some(state),
                _ => None,
            })
            .collect()
    }
}

/// A boot that never came about has been told to who asked for it.
fn is_cut(booted: &Receiver<Result<Reply, ControlError>>) {
    let error = booted.recv().unwrap().unwrap_err();
    assert_eq!(error.kind, ErrorKind::Conflict, "{error}");
    assert!(error.to_string().contains("was ended"), "{error}");
}

#[test]
fn what_ends_a_machine_ends_a_boot_whose_disk_does_not_open() {
    if !can_run() {
        return;
    }
    let case = Case::new();
    let monitor = &case.monitor;
    for (end, left) in [(Ask::Shutdown, true), (Ask::Delete, false)] {
        let booted = begin(monitor, Ask::Boot);
        let held = case.server.holds();
        let shown = monitor.handle.info().unwrap();
        assert_eq!(shown.state, VmInfoState::Created);
        assert!(monitor.handle.devices().unwrap().is_empty());
        assert_eq!(case.states(), [VmState::Booting]);
        let again = monitor.ask(Ask::Boot).unwrap_err();
        assert_eq!(again.kind, ErrorKind::Conflict);
        assert_eq!(monitor.ask(end), Ok(Reply::Done));
        is_cut(&booted);
        assert_eq!(monitor.handle.info().is_ok(), left);
        let over = [VmState::ShuttingDown, VmState::Stopped];
        assert_eq!(case.states(), over);
        drop(held);
    }
}

#[test]
fn a_reboot_begins_a_boot_anew_and_an_end_ends_that_too() {
    if !can_run() {
        return;
    }
    let mut case = Case::new();
    let first = begin(&case.monitor, Ask::Boot);
    let held = case.server.holds();
    let second = begin(&case.monitor, Ask::Reboot);
    is_cut(&first);
    let held_too = case.server.holds();
    // Commands that it is too early for keep their places.
    let pause = begin(&case.monitor, Ask::Pause);
    assert_eq!(case.monitor.ask(Ask::Quit), Ok(Reply::Done));
    is_cut(&second);
    // There is nobody left to carry it out, or to say so.
    let _never = pause.recv();
    case.monitor.outcome();
    let last = case.monitor.events().pop().unwrap().kind;
    assert_eq!(last, exit(api::ExitReason::Stopped));
    drop((held, held_too));
}

#[test]
fn a_command_that_waits_for_a_boot_does_not_keep_it_from_being_ended() {
    if !can_run() {
        return;
    }
    let case = Case::new();
    let booted = begin(&case.monitor, Ask::Boot);
    let held = case.server.holds();
    let pause = begin(&case.monitor, Ask::Pause);
    assert_eq!(case.monitor.ask(Ask::Delete), Ok(Reply::Done));
    is_cut(&booted);
    let error = pause.recv().unwrap().unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
    drop(held);
}

#[test]
fn a_boot_whose_disk_cannot_be_opened_leaves_the_state_as_it_was() {
    if !can_run() {
        return;
    }
    let case = Case::new();
    let booted = begin(&case.monitor, Ask::Boot);
    drop(case.server.holds());
    let error = booted.recv().unwrap().unwrap_err();
    assert_eq!(error.kind, ErrorKind::Failed, "{error}");
    assert_eq!(case.states(), [VmState::Booting, VmState::Created]);
}

#[test]
fn a_signal_ends_a_run_whose_disk_does_not_open() {
    if !can_run() {
        return;
    }
    let server = Server::silent();
    let disk = format!("path=\"{}\"", server.uri());
    let mut vireo = Vireo::start("poke", "spin", &["--disk", &disk]);
    let held = server.holds();
    vireo.signal("TERM");
    // Not with 1, as when the server had been waited for.
    vireo.ends_with(0);
    drop(held);
}

#[test]
fn a_detached_machine_that_is_not_up_ends_with_the_command_that_waits_for_it() {
    if !can_run() {
        return;
    }
    let server = Server::silent();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let disk = format!("path=\"{}\"", server.uri());
    let flags = ["--detach", "--api-socket", socket.to_str().unwrap()];
    let arguments = run_arguments("poke", "spin", &[&flags[..], &["--disk", &disk]].concat());
    let mut command = Command::new(env!("CARGO_BIN_EXE_vireo"));
    let mut vireo = Vireo::spawn(command.args(arguments).stdin(Stdio::null()));
    let held = server.holds();
    vireo.signal("KILL");
    vireo.end();
    await_end(&held);
    // It has their standard error, and does not say that the server gave no answer.
    assert_eq!(vireo.stderr.rest(), "");
    assert!(!socket.exists());
}
