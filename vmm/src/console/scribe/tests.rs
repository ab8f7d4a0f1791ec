use std::fs::File;
use std::io::{PipeReader, Read, Write, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use api::{EventKind, EventLog};

use super::super::history::MOST_WAITING;
use super::super::hub::ConsoleHub;
use super::super::sink::{Opened, SinkInfo};
use super::*;
use crate::config::serial::MAX_SINKS;
use crate::console::{ConsoleError, Consoles};

/// Nothing here takes long; who waits longer than this has found a fault.
const LIMIT: Duration = Duration::from_secs(60);

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "no {what}");
        thread::yield_now();
    }
}

/// A file whose storage takes what a pipe holds, and then nothing until that is read.
fn hanging(hub: &ConsoleHub) -> (SinkInfo, PipeReader) {
    let (reader, writer) = pipe().unwrap();
    let file = LogFile::of(File::from(OwnedFd::from(writer)));
    (hub.insert(Opened::log(file)).unwrap(), reader)
}

/// A file whose storage takes nothing until what is there has been read.
fn full(hub: &ConsoleHub) -> Result<(SinkInfo, UnixStream), ConsoleError> {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    while (&near).write(&[0; PIECE]).is_ok() {}
    near.set_nonblocking(false).unwrap();
    let file = LogFile::of(File::from(OwnedFd::from(near)));
    Ok((hub.insert(Opened::log(file))?, far))
}

fn put(hub: &ConsoleHub, bytes: &[u8]) {
    hub.writer().write_all(bytes).unwrap();
}

fn info(hub: &ConsoleHub, id: SinkId) -> SinkInfo {
    let list = hub.list();
    list.into_iter().find(|sink| sink.id == id).unwrap()
}

/// Bytes that tell their place.
fn numbered(len: usize) -> Vec<u8> {
    let lines = (0..len / 8 + 1).map(|n| format!("{n:07}\n"));
    let mut all = lines.collect::<String>().into_bytes();
    all.truncate(len);
    all
}

#[test]
fn storage_that_hangs_holds_up_neither_the_guest_nor_who_looks_nor_other_sinks() {
    let hub = ConsoleHub::new("--serial", 0).unwrap();
    let events = EventLog::default();
    hub.tell(events.clone());
    let (file, mut storage) = hanging(&hub);
    let (near, mut far) = UnixStream::pair().unwrap();
    let all = numbered(3 * MOST_WAITING);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut got = vec![0; all.len()];
            far.read_exact(&mut got).unwrap();
            got
        });
        let client = hub.attach(near, false).unwrap().id;
        put(&hub, &all[..PIECE]);
        until("the file", || info(&hub, file.id).waiting == 0);
        for piece in all[PIECE..].chunks(PIECE) {
            put(&hub, piece);
            // The client keeps up.
            until("the client", || info(&hub, client).waiting < 100_000);
        }
        assert!(reader.join().unwrap() == all);
    });
    let stuck = info(&hub, file.id);
    assert!(stuck.lost > 0 && stuck.waiting > 0, "{stuck:?}");
    assert!(stuck.waiting <= count(MOST_WAITING + PIECE), "{stuck:?}");
    let told = events.after(0, usize::MAX);
    let lost = |kind: &EventKind| matches!(kind, EventKind::ConsoleOutputLost { id, .. } if *id == file.id.to_string());
    assert!(told.iter().any(|event| lost(&event.kind)));
    // When it answers it gets the rest, in order, and what is missing has been counted.
    let waiting = usize::try_from(stuck.waiting).unwrap();
    let mut got = vec![0; all.len() - usize::try_from(stuck.lost).unwrap()];
    storage.read_exact(&mut got).unwrap();
    let tail = waiting - PIECE;
    assert!(got[got.len() - tail..] == all[all.len() - tail..]);
    assert!(got[..PIECE] == all[..PIECE]);
    until("the file", || info(&hub, file.id).waiting == 0);
    assert_eq!(info(&hub, file.id).lost, stuck.lost);
    hub.close();
}

#[test]
fn a_removed_file_gets_what_had_been_written_and_no_more() {
    let hub = ConsoleHub::new("--serial", 0).unwrap();
    let (file, mut storage) = hanging(&hub);
    let before = numbered(MOST_WAITING / 2);
    put(&hub, &before);
    hub.remove(file.id).unwrap();
    assert_eq!(hub.list(), []);
    put(&hub, b"after");
    let mut got = Vec::new();
    // It is closed then.
    storage.read_to_end(&mut got).unwrap();
    assert!(got == before);
    until("the end of its place", || hub.0.state().leaving.is_empty());
    assert_eq!(hub.0.state().files_left(), 0);
    hub.close();
}

#[test]
fn removed_files_that_hang_are_bounded_and_make_room_when_they_go_on() {
    let hub = ConsoleHub::new("--serial", 0).unwrap();
    let mut storages = Vec::new();
    for _ in 0..MAX_SINKS {
        let (file, storage) = full(&hub).unwrap();
        put(&hub, &[b'x'; PIECE]);
        hub.remove(file.id).unwrap();
        storages.push(storage);
    }
    assert!(matches!(full(&hub), Err(ConsoleError::TooManyFiles)));
    drop(storages);
    until("room", || hub.0.state().leaving.is_empty());
    let (file, _storage) = full(&hub).unwrap();
    hub.remove(file.id).unwrap();
    hub.close();
}

#[test]
fn who_waits_for_files_waits_until_they_have_all_and_no_longer_than_is_given() {
    let consoles = Consoles::new(0).unwrap();
    let (file, mut storage) = hanging(consoles.debugcon());
    let all = numbered(500_000);
    put(consoles.debugcon(), &all);
    consoles.settle(Duration::ZERO, None);
    assert!(info(consoles.debugcon(), file.id).waiting > 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut got = vec![0; all.len()];
            storage.read_exact(&mut got).unwrap();
            assert!(got == all);
        });
        consoles.settle(LIMIT * 60, None);
    });
    assert_eq!(info(consoles.debugcon(), file.id).waiting, 0);
    // Something else to be heard ends it.
    let (file, _storage) = hanging(consoles.serial());
    put(consoles.serial(), &all);
    let (heard, mut sender) = pipe().unwrap();
    sender.write_all(b"!").unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&heard);
    consoles.settle(LIMIT * 60, Some(fd));
    assert!(info(consoles.serial(), file.id).waiting > 0);
}
