//! A whole migration as bytes: cut, damaged, and as the release of its format has written it.

use std::path::{Path, PathBuf};

use super::*;
use crate::transport::compare::{Fact, Rule};
use crate::transport::message::{Capabilities, Disks, Offer};
use crate::{Section, SectionSet};

/// The memory of the recorded machine.
const SMALL: [(u64, u64); 2] = [(0, 8 << 12), (1 << 32, 4 << 12)];

struct Small(Mutex<Vec<u8>>);

impl Small {
    fn at(address: u64) -> usize {
        let inside = if address < 1 << 32 {
            address
        } else {
            address - (1 << 32) + (8 << 12)
        };
        usize::try_from(inside).unwrap()
    }

    /// As it is before each round, from 1.
    fn before(round: u8) -> Vec<u8> {
        let mut bytes = vec![0; 12 << 12];
        for (page, bytes) in bytes.chunks_mut(PAGE).enumerate() {
            let page = u8::try_from(page).unwrap();
            match page % 4 {
                0 => bytes.fill(page + 1),
                1 => (0..=255)
                    .cycle()
                    .zip(bytes.iter_mut())
                    .for_each(|(at, byte)| *byte = (at % 16) ^ page),
                _ => {}
            }
            if page.is_multiple_of(5) {
                bytes[100..100 + usize::from(round)].fill(round);
            }
        }
        bytes
    }
}

impl RamSource for Small {
    fn ranges(&self) -> Vec<(u64, u64)> {
        SMALL.to_vec()
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        let at = Self::at(address);
        bytes.copy_from_slice(&self.0.lock().unwrap()[at..at + bytes.len()]);
        Ok(())
    }
}

impl PageSink for Small {
    fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        let at = Self::at(address);
        self.0.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&self, address: u64, len: u64) -> io::Result<()> {
        self.write(address, &vec![0; usize::try_from(len).unwrap()])
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        RamSource::read(self, address, bytes)
    }
}

fn offer() -> Message {
    Message::Offer(Box::new(Offer {
        name: "recorded".to_owned(),
        machine: "vireo-dev".to_owned(),
        config: br#"{"memory":{"size":49152}}"#.to_vec(),
        ranges: SMALL.to_vec(),
        facts: vec![
            Fact::new("cpu.flags", "sse sse2", Rule::Words),
            Fact::new("memory", "49152", Rule::Same),
        ],
        capabilities: Capabilities::ALL,
        paused: false,
        disks: Disks::None,
    }))
}

fn sections() -> Vec<u8> {
    let mut set = SectionSet::default();
    set.push(Section {
        unit: "unit".to_owned(),
        schema: "schema".to_owned(),
        version: 1,
        body: vec![1, 2, 3],
    });
    set.to_bytes()
}

/// What the source of a whole migration sends on its only stream, when nothing goes wrong.
fn record(codec: Codec) -> Vec<u8> {
    let memory = Small(Mutex::new(Small::before(1)));
    let ground = Ground::new(None);
    let mut bytes = Vec::new();
    let mut sender = StreamSender::open(&mut bytes, &preamble(0, 1), Codec::Raw, 0).unwrap();
    sender.message(&offer()).unwrap();
    sender.agree(codec, 8 * PAGE).unwrap();
    sender.keepalive().unwrap();
    for round in 1..=3 {
        *memory.0.lock().unwrap() = Small::before(round);
        let set = PageSet::all(&SMALL);
        let senders = std::slice::from_mut(&mut sender);
        let with = ground.sending();
        send_all(senders, (&memory, &set), round.into(), with, &scoped).unwrap();
    }
    sender.state((1, 3), false, &sections()).unwrap();
    let missing = Run {
        address: 1 << 32,
        pages: 2,
    };
    sender.list(Kind::Missing, &[missing]).unwrap();
    sender.message(&Message::Commit { attempt: 1 }).unwrap();
    drop(sender);
    bytes
}

/// What a destination hears in such bytes, until they end; and what it then says.
fn hear(bytes: &[u8]) -> (Vec<Incoming>, Small, ChannelError) {
    let memory = Small(Mutex::new(vec![0xee; 12 << 12]));
    let mut heard = Vec::new();
    let mut receiver = match StreamReceiver::open(bytes) {
        Ok((found, receiver)) => {
            assert_eq!(found, preamble(0, 1));
            receiver
        }
        Err(error) => return (heard, memory, error),
    };
    loop {
        match receiver.next(&memory, &Progress::default()) {
            Ok(Incoming::Message(Message::Offer(offer))) => {
                receiver.set_ranges(&offer.ranges);
                heard.push(Incoming::Message(Message::Offer(offer)));
            }
            Ok(incoming) => heard.push(incoming),
            Err(error) => return (heard, memory, error),
        }
    }
}

fn check(bytes: &[u8]) {
    let (heard, memory, end) = hear(bytes);
    assert!(
        matches!(end, ChannelError::Frame(FrameError::Closed)),
        "{end}"
    );
    let state = Incoming::State {
        attempt: 1,
        round: 3,
        postcopy: false,
        sections: sections(),
    };
    let missing = Run {
        address: 1 << 32,
        pages: 2,
    };
    let expected = [
        Incoming::Message(offer()),
        Incoming::Keepalive,
        Incoming::RoundEnd(1),
        Incoming::RoundEnd(2),
        Incoming::RoundEnd(3),
        state,
        Incoming::Missing(vec![missing]),
        Incoming::Message(Message::Commit { attempt: 1 }),
    ];
    assert_eq!(heard, expected);
    assert!(*memory.0.lock().unwrap() == Small::before(3));
    SectionSet::from_bytes(&sections()).unwrap();
}

#[test]
fn a_migration_that_is_cut_at_any_byte_is_never_taken_for_a_whole_one() {
    let bytes = record(Codec::Lz4);
    check(&bytes);
    let mut last = 0;
    for len in 0..bytes.len() {
        let (heard, _, end) = hear(&bytes[..len]);
        let commit = |heard: &Incoming| *heard == Incoming::Message(Message::Commit { attempt: 1 });
        assert!(!heard.iter().any(commit), "{len}");
        assert!(heard.len() >= last);
        last = heard.len();
        let ends = matches!(
            end,
            ChannelError::Frame(FrameError::Closed | FrameError::Short { .. })
        );
        assert!(ends, "{len}: {end}");
    }
}

#[test]
fn a_migration_with_any_byte_changed_fails_there() {
    let bytes = record(Codec::Zstd);
    for at in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x10;
        let (heard, _, end) = hear(&bytes);
        assert!(heard.len() < 8, "{at}");
        assert!(
            !matches!(end, ChannelError::Frame(FrameError::Closed)),
            "{at}: {end}"
        );
    }
}

fn kept() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/migration/0.1")
}

/// Streams of this format are never changed. With `VIREO_WRITE_STREAMS` those that are missing are written.
#[test]
fn recorded_streams_of_each_format_are_read() {
    for (name, codec) in [
        ("raw", Codec::Raw),
        ("zstd", Codec::Zstd),
        ("lz4", Codec::Lz4),
    ] {
        let path = kept().join(format!("{name}.stream"));
        if std::env::var_os("VIREO_WRITE_STREAMS").is_some() && !path.exists() {
            std::fs::create_dir_all(kept()).unwrap();
            std::fs::write(&path, record(codec)).unwrap();
        }
        check(&std::fs::read(&path).unwrap());
    }
}

/// The seeds of the fuzz target are what the target makes such a migration of: parts of two bytes of length, a kind and a payload.
#[test]
fn seeds_of_the_fuzz_target_are_there() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/stream");
    let bytes = record(Codec::Lz4);
    let mut rest = &bytes[crate::transport::frame::PREAMBLE..];
    let mut seed = vec![1];
    let mut payload = Vec::new();
    while let Ok(kind) = crate::transport::frame::read(&mut rest, &mut payload) {
        seed.push(kind as u8);
        seed.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_le_bytes());
        seed.extend_from_slice(&payload);
    }
    for (name, seed) in [
        ("parts", seed),
        ("bytes", [vec![0], record(Codec::Zstd)].concat()),
    ] {
        let path = seeds.join(name);
        if std::env::var_os("VIREO_WRITE_STREAMS").is_some() && !path.exists() {
            std::fs::create_dir_all(&seeds).unwrap();
            std::fs::write(&path, &seed).unwrap();
        }
        assert!(!std::fs::read(&path).unwrap().is_empty(), "{name}");
    }
}
