//! Whatever may come out of a connection into a destination of a live migration: preamble, frames, pages and messages.
//!
//! The first byte says how. With 0 the rest is what the connection brings. With others it is parts, each of a kind, two bytes of length and a payload, which
//! come as frames whose checksums are right, behind a preamble that is.
#![no_main]

use std::io;
use std::sync::Mutex;

use libfuzzer_sys::fuzz_target;
use migration::SectionSet;
use migration::transport::channel::{Incoming, Progress, StreamReceiver};
use migration::transport::compare::compare;
use migration::transport::disks::{DiskAnswer, DiskFrame};
use migration::transport::frame::{self, Kind, PREAMBLE, Preamble};
use migration::transport::message::Message;
use migration::transport::pages::{PageSink, Run};
use migration::transport::protocol::{
    Destination, DestinationAction, DestinationEvent, DestinationState, Locks, Word,
};

const RANGES: [(u64, u64); 2] = [(0, 8 << 12), (1 << 32, 4 << 12)];

/// Memory that knows its ends.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn with(&self, address: u64, len: u64, act: impl FnOnce(&mut [u8])) {
        let inside = |(start, all): &&(u64, u64)| {
            address >= *start && address - start + len <= *all && len % 4096 == 0
        };
        let (start, _) = RANGES.iter().find(inside).expect("only what is in memory");
        let before = if *start == 0 { 0 } else { RANGES[0].1 };
        let at = (before + address - start) as usize;
        act(&mut self.0.lock().expect("nobody panicked")[at..at + len as usize]);
    }
}

impl PageSink for Memory {
    fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        self.with(address, bytes.len() as u64, |there| {
            there.copy_from_slice(bytes)
        });
        Ok(())
    }

    fn zero(&self, address: u64, len: u64) -> io::Result<()> {
        self.with(address, len, |there| there.fill(0));
        Ok(())
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.with(address, bytes.len() as u64, |there| {
            bytes.copy_from_slice(there)
        });
        Ok(())
    }
}

/// A destination whose operations succeed at once.
struct Machine {
    destination: Destination,
    committed: bool,
    runs: bool,
}

impl Machine {
    fn hear(&mut self, word: Word) {
        self.committed |= matches!(word, Word::Commit { .. });
        let mut events = vec![DestinationEvent::Received(word)];
        while let Some(event) = events.pop() {
            for action in self.destination.on(event) {
                let locks = Locks::Shared;
                events.push(match action {
                    DestinationAction::Check => DestinationEvent::Checked(true),
                    DestinationAction::Load { attempt } => {
                        DestinationEvent::Loaded { attempt, locks }
                    }
                    DestinationAction::TakeLocks => DestinationEvent::LocksTaken,
                    DestinationAction::Run => {
                        assert!(self.committed, "it runs without COMMIT");
                        self.runs = true;
                        DestinationEvent::Started
                    }
                    _ => continue,
                });
            }
        }
        let failed = self.destination.state() == DestinationState::Failed;
        assert!(!(failed && self.runs), "what runs has not failed");
    }
}

/// What the connection brings.
fn connection(input: &[u8]) -> Vec<u8> {
    let Some((0, bytes)) = input.split_first().map(|(first, rest)| (*first, rest)) else {
        let mut bytes = Vec::new();
        let preamble = Preamble {
            session: [1; 16],
            stream: 0,
            streams: 1,
            again: false,
            disks: false,
        };
        preamble.write(&mut bytes).expect("room");
        let mut rest = input.get(1..).unwrap_or_default();
        while let [kind, low, high, after @ ..] = rest {
            let len = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
            let (payload, after) = after.split_at(len);
            rest = after;
            if let Some(kind) = Kind::of(*kind) {
                // What is longer than its kind may be is refused here, too.
                let _ = frame::write(&mut bytes, kind, &[payload]);
            }
        }
        return bytes;
    };
    bytes.to_vec()
}

fn within(runs: &[Run]) {
    for run in runs {
        let end = run.address + run.len();
        assert!(
            RANGES
                .iter()
                .any(|(start, len)| run.address >= *start && end <= start + len)
        );
    }
}

/// The same frames as those of disks, and as the answers to them.
fn disks(bytes: &[u8]) {
    const SIZES: [u64; 2] = [1 << 16, u64::MAX];
    let frames = bytes.get(PREAMBLE..).unwrap_or_default();
    let (mut from, mut payload) = (frames, Vec::new());
    loop {
        let (disk, offset, len) = match DiskFrame::read(&mut from, &mut payload, &SIZES) {
            Ok(DiskFrame::Data {
                disk,
                offset,
                bytes,
            }) => (disk, offset, bytes.len() as u64),
            Ok(DiskFrame::Zeros { disk, offset, len }) => (disk, offset, len),
            Ok(DiskFrame::Flush { .. } | DiskFrame::Keepalive) => continue,
            Err(error) => {
                assert!(error.to_string().len() < 2000);
                break;
            }
        };
        let end = offset.checked_add(len).expect("it is in the disk");
        assert!(len > 0 && end <= SIZES[usize::from(disk)]);
    }
    let mut from = frames;
    while let Ok(answer) = DiskAnswer::read(&mut from, &mut payload) {
        if let DiskAnswer::Failed(_, reason) = answer {
            assert!(!reason.chars().any(char::is_control));
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let bytes = connection(input);
    disks(&bytes);
    let Ok((_, mut receiver)) = StreamReceiver::open(&*bytes) else {
        return;
    };
    let memory = Memory(Mutex::new(vec![0; 12 << 12]));
    let progress = Progress::default();
    let mut machine = Machine {
        destination: Destination::new(),
        committed: false,
        runs: false,
    };
    loop {
        match receiver.next(&memory, &progress) {
            Ok(Incoming::Message(message)) => {
                if let Message::Offer(offer) = &message {
                    let differences = compare(&offer.facts, &[]);
                    differences.iter().for_each(|difference| {
                        assert!(difference.to_string().len() < 2000);
                    });
                    receiver.set_ranges(&RANGES);
                }
                if let Some(word) = message.word() {
                    machine.hear(word);
                }
            }
            Ok(Incoming::State {
                attempt,
                postcopy,
                sections,
                ..
            }) => {
                let _ = SectionSet::from_bytes(&sections);
                machine.hear(Word::State { attempt, postcopy });
            }
            Ok(Incoming::Missing(runs) | Incoming::Want(runs)) => within(&runs),
            Ok(Incoming::RoundEnd(_) | Incoming::Keepalive) => {}
            Err(error) => {
                assert!(error.to_string().len() < 2000);
                return;
            }
        }
    }
});
