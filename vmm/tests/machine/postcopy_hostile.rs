//! Peers that do in post-copy what they may not: frames that are put between those of real ones.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use api::wire::MigrationPhase;
use migration::transport::frame::{self, Kind, PREAMBLE};
use migration::transport::message::Message;
use migration::transport::pages::{PAGE, Ranges, Run, decode_runs, encode_runs};

use crate::migrations::{Side, unix};
use crate::postcopy::{can_follow, first};
use crate::snapshots::ask;
use crate::support::until;

/// The memory of the guest, in bytes.
const MEMORY: u64 = 64 << 20;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    /// Pages of the source come twice, and others that are not missing.
    Twice,
    /// Pages come that are not in memory.
    Outside,
    /// The source asks for pages.
    Asking,
    /// A page comes as what differs from what was there.
    Difference,
    /// A page comes as it is, behind its frame and not in it.
    Bare,
    /// The state comes again.
    Again,
    /// The destination asks for what is not in memory.
    WantOutside,
    /// It asks for all pages, twice, and says that all is missing.
    WantAll,
    /// It asks while the guest runs at the source.
    WantEarly,
    /// The connection ends right behind the word that lets the guest go.
    CutBehindCommit,
}

impl Wrong {
    /// What a source adds behind the first pages that follow the guest.
    fn of_source(self, missing: &[Run], state: &[u8]) -> Vec<(Kind, Vec<u8>)> {
        let one = |address| vec![Run { address, pages: 1 }];
        match self {
            Self::Twice => {
                let here = |page: &u64| {
                    let address = page * PAGE as u64;
                    let is_in =
                        |run: &Run| (run.address..run.address + run.len()).contains(&address);
                    !missing.iter().any(is_in)
                };
                let pages: Vec<u64> = (256..MEMORY / PAGE as u64).filter(here).take(512).collect();
                let run = |page: &u64| Run {
                    address: page * PAGE as u64,
                    pages: 1,
                };
                let runs: Vec<Run> = pages.iter().map(run).collect();
                assert!(!runs.is_empty());
                let mut bytes = encode_runs(&runs);
                bytes.resize(bytes.len() + runs.len() * PAGE, 0xaa);
                vec![(Kind::Zeros, encode_runs(&runs)), (Kind::Pages, bytes)]
            }
            Self::Outside => vec![(Kind::Zeros, encode_runs(&one(MEMORY)))],
            Self::Asking => vec![(Kind::Want, encode_runs(&one(0)))],
            Self::Difference => {
                let bytes = [encode_runs(&one(0)), vec![0, 0]].concat();
                vec![(Kind::Delta, bytes)]
            }
            Self::Bare => vec![(Kind::Bare, encode_runs(&one(0)))],
            Self::Again => vec![(Kind::State, state.to_vec())],
            _ => Vec::new(),
        }
    }

    /// What a destination adds behind a message.
    fn of_destination(self, message: &Message) -> Vec<(Kind, Vec<u8>)> {
        let pages = u32::try_from(MEMORY / PAGE as u64).unwrap();
        let all = encode_runs(&[Run { address: 0, pages }]);
        let outside = encode_runs(&[Run {
            address: MEMORY,
            pages: 1,
        }]);
        match (self, message) {
            (Self::WantOutside, Message::Running) => vec![(Kind::Want, outside)],
            (Self::WantAll, Message::Running) => vec![
                (Kind::Want, all.clone()),
                (Kind::Want, all.clone()),
                (Kind::Missing, all),
            ],
            (Self::WantEarly, Message::Accept { .. }) => vec![(Kind::Want, all)],
            _ => Vec::new(),
        }
    }
}

fn pass(to: &mut UnixStream, kind: Kind, payload: &[u8]) -> bool {
    frame::write(to, kind, &[payload]).is_ok() && to.flush().is_ok()
}

/// The way to the destination.
fn send(mut from: UnixStream, mut to: UnixStream, wrong: Option<Wrong>) {
    let mut preamble = [0; PREAMBLE];
    if from.read_exact(&mut preamble).is_err() || to.write_all(&preamble).is_err() {
        return;
    }
    let ranges = Ranges::new(&[(0, MEMORY)]);
    let (mut missing, mut state, mut done) = (Vec::new(), Vec::new(), false);
    let mut payload = Vec::new();
    while let Ok(kind) = frame::read(&mut from, &mut payload) {
        if !pass(&mut to, kind, &payload) {
            break;
        }
        match kind {
            Kind::Missing => missing.extend(decode_runs(&payload, &ranges).unwrap().0),
            Kind::State => state.clone_from(&payload),
            Kind::Message if wrong == Some(Wrong::CutBehindCommit) => {
                if matches!(Message::decode(&payload), Ok(Message::Commit { .. })) {
                    break;
                }
            }
            Kind::Bare => {
                let (runs, _) = decode_runs(&payload, &ranges).unwrap();
                let len = runs.iter().map(|run| run.len()).sum();
                if std::io::copy(&mut (&from).take(len), &mut to).is_err() {
                    break;
                }
            }
            Kind::Pages | Kind::Zeros if !state.is_empty() => {
                if wrong == Some(Wrong::Twice) && !pass(&mut to, kind, &payload) {
                    break;
                }
                let first = wrong.filter(|_| !std::mem::replace(&mut done, true));
                for (kind, payload) in first.iter().flat_map(|w| w.of_source(&missing, &state)) {
                    // It may hang up on that.
                    let _hung_up = pass(&mut to, kind, &payload);
                }
            }
            _ => {}
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// The way back.
fn answer(mut from: UnixStream, mut to: UnixStream, wrong: Option<Wrong>) {
    let mut payload = Vec::new();
    while let Ok(kind) = frame::read(&mut from, &mut payload) {
        if !pass(&mut to, kind, &payload) {
            break;
        }
        if kind == Kind::Message {
            let message = Message::decode(&payload).unwrap();
            for (kind, payload) in wrong.iter().flat_map(|w| w.of_destination(&message)) {
                let _hung_up = pass(&mut to, kind, &payload);
            }
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// Stands between both; the first connection is not as it is sent. How many there have been.
fn between(path: PathBuf, there: PathBuf, wrong: Wrong) -> Arc<Mutex<u32>> {
    let listener = UnixListener::bind(path).unwrap();
    let count = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&count);
    thread::spawn(move || {
        while let Ok((near, _)) = listener.accept() {
            let Ok(far) = UnixStream::connect(&there) else {
                continue;
            };
            let mut count = counted.lock().unwrap();
            let wrong = (*count == 0).then_some(wrong);
            *count += 1;
            let (back, forth) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            thread::spawn(move || send(near, far, wrong));
            thread::spawn(move || answer(back, forth, wrong));
        }
    });
    count
}

/// Sends a guest past `wrong`; whether the connection was made again.
fn moves_past(wrong: Wrong) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let before = ask(&mut source.vireo, 1);
    let mut target = Side::empty(dir.path(), "t.sock");
    let there = dir.path().join("there");
    let waits = target.receive(&format!("unix:{}", there.display()));
    let count = between(dir.path().join("between"), there, wrong);
    let url = unix(dir.path(), "between");
    source.client().send_migration(&first(&url)).unwrap();
    waits.join().unwrap().unwrap();
    source.vireo.ends_with(0);
    assert_eq!(target.ended().phase, MigrationPhase::Completed, "{wrong:?}");
    assert!(ask(&mut target.vireo, 2) > before, "{wrong:?}");
    *count.lock().unwrap() > 1
}

#[test]
fn what_a_source_sends_that_it_may_not_changes_nothing_or_ends_its_connection() {
    if !can_follow() {
        return;
    }
    for wrong in [Wrong::Twice, Wrong::Again] {
        assert!(!moves_past(wrong), "{wrong:?}");
    }
    for wrong in [
        Wrong::Outside,
        Wrong::Asking,
        Wrong::Difference,
        Wrong::Bare,
    ] {
        assert!(moves_past(wrong), "{wrong:?}");
    }
}

#[test]
fn what_a_destination_asks_for_that_it_may_not_is_passed_over_or_ends_its_connection() {
    if !can_follow() {
        return;
    }
    assert!(!moves_past(Wrong::WantAll));
    assert!(moves_past(Wrong::WantOutside));
}

#[test]
fn a_guest_that_has_been_let_go_waits_for_its_memory_though_nobody_can_send_it_yet() {
    if !can_follow() {
        return;
    }
    assert!(moves_past(Wrong::CutBehindCommit));
}

#[test]
fn a_destination_that_asks_for_pages_too_early_does_not_get_the_guest() {
    if !can_follow() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = Side::counting(dir.path());
    let target = Side::empty(dir.path(), "t.sock");
    let there = dir.path().join("there");
    let waits = target.receive(&format!("unix:{}", there.display()));
    let _count = between(dir.path().join("between"), there, Wrong::WantEarly);
    let url = unix(dir.path(), "between");
    source.client().send_migration(&first(&url)).unwrap();
    let info = source.ended();
    assert_eq!(info.phase, MigrationPhase::Failed);
    let told = info.error.unwrap();
    assert!(told.contains("not agreed on"), "{told}");
    assert!(waits.join().unwrap().is_err());
    until("the end of the other", || {
        target.state().is_none().then_some(())
    });
    ask(&mut source.vireo, 1);
}
