use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::channel;

use super::reader::Manners;
use super::sink::Opened;
use super::*;
use crate::config::SinkConfig;
use crate::opener::Opener;

const LONG: Duration = Duration::from_secs(60);

/// Nobody interrupts.
const NEVER: Interrupt<'static> = Interrupt {
    fd: None,
    asked: &|| false,
};

fn consoles() -> Consoles {
    Consoles::new(0).unwrap()
}

fn put(hub: &ConsoleHub, len: usize) {
    hub.writer().write_all(&vec![b'x'; len]).unwrap();
}

/// The reading end of a pipe that output goes to.
fn pipe(hub: &ConsoleHub, manners: Manners) -> File {
    let (reader, writer) = io::pipe().unwrap();
    let writer = File::from(OwnedFd::from(writer));
    hub.insert(Opened::screen(writer, manners)).unwrap();
    File::from(OwnedFd::from(reader))
}

fn read(mut from: impl Read, len: usize) {
    from.read_exact(&mut vec![0; len]).unwrap();
}

#[test]
fn a_pseudo_terminals_last_output_is_there_for_who_reads_it_late() {
    let consoles = consoles();
    let hub = consoles.serial();
    let info = hub.add(&SinkConfig::Pty, &Arc::new(Opener::new())).unwrap();
    let mut options = OpenOptions::new();
    let mut reader = options.read(true).open(info.path.unwrap()).unwrap();
    put(hub, 1000);
    let (sender, receiver) = channel();
    let late = thread::spawn(move || {
        receiver.recv().unwrap();
        let mut read = Vec::new();
        // The end of a pseudo-terminal is an error.
        let _ = reader.read_to_end(&mut read);
        read.len()
    });
    sender.send(()).unwrap();
    consoles.finish(false, LONG, &NEVER);
    drop(consoles);
    assert_eq!(late.join().unwrap(), 1000);
}

#[test]
fn the_reader_of_a_pipe_has_the_time_it_wants() {
    let consoles = consoles();
    let reader = pipe(consoles.serial(), Manners::Patient);
    let debug = pipe(consoles.debugcon(), Manners::Patient);
    put(consoles.serial(), 500_000);
    put(consoles.debugcon(), 500_000);
    let (sender, receiver) = channel();
    let late = thread::spawn(move || {
        receiver.recv().unwrap();
        read(debug, 500_000);
        read(reader, 500_000);
    });
    sender.send(()).unwrap();
    consoles.finish(true, Duration::ZERO, &NEVER);
    drop(consoles);
    late.join().unwrap();
}

#[test]
fn an_interrupt_ends_the_waiting_for_a_pipe_at_once() {
    let consoles = consoles();
    let _reader = pipe(consoles.serial(), Manners::Patient);
    put(consoles.serial(), 500_000);
    let (signal, mut sender) = io::pipe().unwrap();
    let (told, heard) = channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            let asked = || told.send(()).is_ok();
            let interrupt = Interrupt {
                fd: Some(signal.as_raw_fd()),
                asked: &asked,
            };
            consoles.finish(true, LONG * 60, &interrupt);
        });
        sender.write_all(b"!").unwrap();
        heard.recv().unwrap();
    });
    assert!(consoles.serial().list()[0].waiting > 0);
}

#[test]
fn readers_that_take_nothing_are_waited_for_no_longer_than_they_are_given() {
    let consoles = consoles();
    let _reader = pipe(consoles.serial(), Manners::Steady);
    let _unwanted = pipe(consoles.serial(), Manners::Patient);
    let (near, _far) = UnixStream::pair().unwrap();
    consoles.serial().attach(near, false).unwrap();
    put(consoles.serial(), 1 << 20);
    consoles.finish(false, Duration::from_millis(10), &NEVER);
    assert!(consoles.serial().list().iter().all(|sink| sink.waiting > 0));
}

#[test]
fn clients_and_terminals_get_the_last_output_when_they_take_it() {
    let consoles = consoles();
    let reader = pipe(consoles.serial(), Manners::Steady);
    let (near, far) = UnixStream::pair().unwrap();
    consoles.serial().attach(near, false).unwrap();
    put(consoles.serial(), 500_000);
    thread::scope(|scope| {
        scope.spawn(|| read(&reader, 500_000));
        scope.spawn(|| read(&far, 500_000));
        consoles.finish(false, LONG, &NEVER);
    });
    assert!(
        consoles
            .serial()
            .list()
            .iter()
            .all(|sink| sink.waiting == 0)
    );
    drop(consoles);
    assert_eq!((&far).read(&mut [0; 1]).unwrap(), 0, "closed");
}

#[test]
fn a_reader_that_goes_away_ends_the_waiting() {
    let consoles = consoles();
    let reader = pipe(consoles.serial(), Manners::Patient);
    let (near, far) = UnixStream::pair().unwrap();
    consoles.serial().attach(near, false).unwrap();
    put(consoles.serial(), 1 << 20);
    thread::scope(|scope| {
        scope.spawn(move || drop((reader, far)));
        consoles.finish(true, LONG * 60, &NEVER);
    });
}
