//! A disk whose storage never answers: what waits for it can be cut short.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};

use api::{Answer, Command as Ask, Control, ControlError, ExitReason, Reply, VmState};
use serde_json::json;
use vmm::machine::inbox::Message;

use crate::nbd::{Server, await_end};
use crate::support::{LIMIT, Local, Served, can_run, config, until};

/// So many that it would take too long to wait for each.
const PAUSES: usize = 4;

fn begin(machine: &Local, command: Ask) -> Receiver<Result<Reply, ControlError>> {
    let (sender, receiver) = channel();
    let answer: Answer = Box::new(move |result| {
        let _ = sender.send(result);
    });
    assert!(machine.mailbox.send(Message::Command(command, answer)));
    receiver
}

#[test]
fn a_command_that_ends_the_monitor_cuts_pauses_short_and_a_second_one_the_end() {
    if !can_run() {
        return;
    }
    let server = Server::stuck();
    let devices = json!([{ "kind": "blk", "config": { "path": server.uri() } }]);
    let more = json!({ "devices": devices });
    let mut machine = Local::boot(&config("blk", "verify keep", more));
    let held = server.holds();
    let pauses: Vec<_> = (0..PAUSES).map(|_| begin(&machine, Ask::Pause)).collect();
    let quit = begin(&machine, Ask::Quit);
    // The last first: the limit is for all of them.
    for pause in pauses.into_iter().rev() {
        let error = pause.recv_timeout(LIMIT).unwrap().unwrap_err();
        assert!(error.to_string().contains("in flight"), "{error}");
    }
    until("the machine's end", || {
        (machine.handle.info().unwrap().state == api::wire::VmInfoState::Shutdown).then_some(())
    });
    assert!(quit.try_recv().is_err(), "its disk may still answer");
    let _again = begin(&machine, Ask::Quit);
    assert_eq!(quit.recv_timeout(LIMIT).unwrap(), Ok(Reply::Done));
    assert_eq!(machine.outcome().reason, ExitReason::Stopped);
    let states: Vec<_> = machine
        .events()
        .into_iter()
        .filter_map(|event| match event.kind {
            api::EventKind::State { state, .. } => Some(state),
            _ => None,
        })
        .collect();
    use VmState::{Booting, Running, ShuttingDown, Stopped};
    assert_eq!(states, [Booting, Running, ShuttingDown, Stopped]);
    drop(held);
}

#[test]
fn a_second_signal_ends_a_machine_that_is_being_paused() {
    if !can_run() {
        return;
    }
    let server = Server::stuck();
    let disk = format!("path=\"{}\"", server.uri());
    let flags = ["--disk", &disk, "--serial", "null"];
    let mut served = Served::start("blk", "verify keep", &flags);
    let held = server.holds();
    let pauses = [(); PAUSES].map(|()| {
        let mut pause = UnixStream::connect(served.socket()).unwrap();
        let request = b"PUT /api/v1/vm.pause HTTP/1.1\r\nHost: here\r\n\r\n";
        pause.write_all(request).unwrap();
        pause
    });
    served.client().info().unwrap();
    // Two of the same kind may be one.
    served.vireo.signal("TERM");
    served.vireo.signal("INT");
    served.vireo.ends_with(0);
    await_end(&held);
    drop(pauses);
}

#[test]
fn one_signal_is_heard_at_once_by_a_machine_that_is_being_paused() {
    if !can_run() {
        return;
    }
    let server = Server::stuck();
    let disk = format!("path=\"{}\"", server.uri());
    let flags = ["--disk", &disk, "--serial", "null"];
    let mut served = Served::start("blk", "verify keep", &flags);
    let held = server.holds();
    let mut pauses = [(); PAUSES].map(|()| {
        let mut pause = UnixStream::connect(served.socket()).unwrap();
        let request = b"PUT /api/v1/vm.pause HTTP/1.1\r\nHost: here\r\n\r\n";
        pause.write_all(request).unwrap();
        pause.set_read_timeout(Some(LIMIT)).unwrap();
        pause
    });
    // All have been handed over when a second request of a client that came after them is answered.
    let mut client = served.client();
    client.info().unwrap();
    client.info().unwrap();
    // A signal that came before would not be for the pauses.
    let tasks = format!("/proc/{}/task", served.vireo.id());
    until("the first pause", || {
        let names = fs::read_dir(&tasks).unwrap().flatten();
        let mut names = names.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        names.any(|name| name == "drain\n").then_some(())
    });
    served.vireo.signal("TERM");
    // The last first: the limit is for all of them.
    for pause in pauses.iter_mut().rev() {
        pause.read_exact(&mut [0; 8]).unwrap();
    }
    assert!(served.vireo.is_running(), "the guest has been asked alone");
    served.vireo.signal("INT");
    served.vireo.ends_with(0);
    await_end(&held);
}

#[test]
fn a_signal_cuts_the_end_of_a_machine_short() {
    if !can_run() {
        return;
    }
    let server = Server::stuck();
    let disk = format!("path=\"{}\"", server.uri());
    let mut served = Served::start("blk", "verify keep", &["--disk", &disk, "--no-shutdown"]);
    let held = server.holds();
    let mut client = served.client();
    let mut ending = served.client();
    let ended = std::thread::spawn(move || ending.shutdown());
    until("the machine's end", || {
        (client.info().unwrap().state == api::wire::VmInfoState::Shutdown).then_some(())
    });
    served.vireo.signal("TERM");
    served.vireo.ends_with(0);
    await_end(&held);
    // It may have been told, or have found nobody.
    let _either = ended.join().unwrap();
}

#[test]
fn a_signal_that_comes_while_a_disk_is_waited_for_is_not_lost_on_a_shutdown() {
    if !can_run() {
        return;
    }
    let server = Server::stuck();
    let disk = format!("path=\"{}\"", server.uri());
    let mut served = Served::start("blk", "verify keep", &["--disk", &disk, "--serial", "null"]);
    let held = server.holds();
    let mut pause = UnixStream::connect(served.socket()).unwrap();
    let request = b"PUT /api/v1/vm.pause HTTP/1.1\r\nHost: here\r\n\r\n";
    pause.write_all(request).unwrap();
    let mut client = served.client();
    client.info().unwrap();
    served.vireo.signal("TERM");
    let mut ending = served.client();
    let ended = std::thread::spawn(move || ending.shutdown());
    until("the machine's end", || {
        (client.info().ok()?.state == api::wire::VmInfoState::Shutdown).then_some(())
    });
    drop(held);
    drop(server);
    served.vireo.ends_with(0);
    let _either = ended.join().unwrap();
}
