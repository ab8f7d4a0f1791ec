//! The bytes of a connection: a preamble, then frames.
//!
//! # Contract
//!
//! * Bytes are untrusted. What they claim is held against a limit before anything is allocated, memory grows with the bytes that have
//!   come, and every way in which they can be wrong is an error that says what was found.
//! * Reading and writing are plain [`Read`] and [`Write`]: sockets, TLS and pipes of programs are the same.
//!
//! # The format, version 0.1
//!
//! Numbers are little-endian. The sender of a connection begins with the *preamble*, of 40 bytes; the receiver says nothing until it
//! has read it, and answers with frames alone.
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | the magic, `VIREOMIG` |
//! | 8 | 2 | the format's major version, 0 |
//! | 10 | 2 | the format's minor version, 1 |
//! | 12 | 16 | the session: random bytes, the same for all streams and for connections that are made anew |
//! | 28 | 2 | which stream it is, from 0 |
//! | 30 | 2 | how many there are, 1 to 64 |
//! | 32 | 4 | flags: bit 0, the connection replaces one that was lost; bit 1, it is that of the disks and no stream; others are 0 |
//! | 36 | 4 | CRC-32 of the 36 bytes before |
//!
//! Until 1.0 both versions have to be the same. A *frame* is a header of 12 bytes and a payload:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 1 | the kind |
//! | 1 | 3 | 0 |
//! | 4 | 4 | the payload's length |
//! | 8 | 4 | CRC-32 of the 8 bytes before and the payload |
//!
//! | kind | name | most bytes | payload | on stream |
//! |---|---|---|---|---|
//! | 1 | message | 1 MiB | a [`Message`](super::message::Message) in postcard's encoding | 0, both ways |
//! | 2 | state | 256 MiB | attempt (4 bytes), round (4), flags (4; bit 0: post-copy), a [`SectionSet`](crate::SectionSet) | 0 |
//! | 3 | round end | 12 | round (4), pages on this stream since the round before ended (8) | each |
//! | 4 | zeros | 24 KiB | runs of pages that are zeros | each |
//! | 5 | pages | 2 MiB and the runs | runs, then the pages | each |
//! | 6 | zstd | the same | runs, then one zstd frame (RFC 8878) of the pages | each |
//! | 7 | lz4 | the same | runs, then one LZ4 block of the pages | each |
//! | 8 | delta | the same | runs, then for each page the length of its delta (2) and the delta | each |
//! | 9 | missing | 24 KiB | runs of pages that follow while the guest runs; from the destination, before it says over a new connection that the guest runs: those that have not come | 0, both ways |
//! | 10 | want | 24 KiB | runs of pages that the guest, or who loads it, needs now | 0, from the destination |
//! | 11 | keepalive | 0 | – | each, both ways |
//! | 12 | disk data | 512 KiB and 10 | which disk (2), the offset (8), the bytes | the disks' |
//! | 13 | disk zeros | 18 | which disk (2), the offset (8), how many bytes are zeros (8) | the disks' |
//! | 14 | disk flush | 4 | before which pause all is made durable (4); 0: none | the disks' |
//! | 15 | disk done | 8 | how many frames of the disks' have been done (8) | the disks', from the destination |
//! | 16 | disk failed | 4 KiB and 2 | which disk (2), and why, as text | the disks', from the destination |
//! | 17 | bare | 24 KiB | runs of at most 512 pages, which follow behind the frame, with no checksum | each, where that has been agreed on |
//!
//! *Runs* are their number (2 bytes, 1 to 2,047) and for each the guest-physical address (8) and the count of pages of 4 KiB (4).
//! Pages of a frame with data are at most 512. What the pages mean is in [`pages`](super::pages).

use std::io::{self, ErrorKind, Read, Write};

/// What a connection begins with.
pub const MAGIC: [u8; 8] = *b"VIREOMIG";
/// The major and the minor version of the format.
pub const VERSION: (u16, u16) = (0, 1);
/// The most streams of one migration.
pub const STREAMS: u16 = 64;
/// How long a preamble is, in bytes.
pub const PREAMBLE: usize = 40;
/// How long a frame's header is, in bytes.
pub const HEADER: usize = 12;
/// How much is read at once, so that memory grows with what has come.
const STEP: usize = 1 << 20;
/// The connection replaces one that was lost.
const AGAIN: u32 = 1;
/// The connection is that of the disks.
const DISKS: u32 = 1 << 1;

/// What a frame holds. The table of the [module](self) has their numbers and lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A message.
    Message = 1,
    /// The state of the machine.
    State = 2,
    /// A round has ended on this stream.
    RoundEnd = 3,
    /// Pages of zeros.
    Zeros = 4,
    /// Pages as they are.
    Pages = 5,
    /// Pages, compressed with zstd.
    Zstd = 6,
    /// Pages, compressed with LZ4.
    Lz4 = 7,
    /// Pages, as what differs from those that were sent before.
    Delta = 8,
    /// Pages that follow.
    Missing = 9,
    /// Pages that are asked for.
    Want = 10,
    /// Nothing.
    Keepalive = 11,
    /// Bytes of a disk.
    DiskData = 12,
    /// Zeros of a disk.
    DiskZeros = 13,
    /// All that has come of disks is to be durable.
    DiskFlush = 14,
    /// Frames of disks have been done.
    DiskDone = 15,
    /// One cannot be done.
    DiskFailed = 16,
    /// Pages as they are, behind the frame.
    Bare = 17,
}

impl Kind {
    const ALL: [Self; 17] = [
        Self::Message,
        Self::State,
        Self::RoundEnd,
        Self::Zeros,
        Self::Pages,
        Self::Zstd,
        Self::Lz4,
        Self::Delta,
        Self::Missing,
        Self::Want,
        Self::Keepalive,
        Self::DiskData,
        Self::DiskZeros,
        Self::DiskFlush,
        Self::DiskDone,
        Self::DiskFailed,
        Self::Bare,
    ];

    /// Of the number in a header.
    #[must_use]
    pub fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// The longest payload, in bytes.
    #[must_use]
    pub fn longest(self) -> u32 {
        match self {
            Self::Message => 1 << 20,
            Self::State => 256 << 20,
            Self::RoundEnd => 12,
            Self::Zeros | Self::Missing | Self::Want | Self::Bare => 24 << 10,
            Self::Pages | Self::Zstd | Self::Lz4 | Self::Delta => (2 << 20) + (24 << 10),
            Self::Keepalive => 0,
            Self::DiskData => (512 << 10) + 10,
            Self::DiskZeros => 18,
            Self::DiskFlush => 4,
            Self::DiskDone => 8,
            Self::DiskFailed => (4 << 10) + 2,
        }
    }
}

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The bytes do not come or go.
    #[error("the connection is broken")]
    Broken(#[source] io::Error),
    /// The peer has closed it between two frames.
    #[error("the peer has closed the connection")]
    Closed,
    /// The peer has closed it elsewhere.
    #[error("the connection ends within {what}, {missing} bytes too early")]
    Short {
        /// What is not whole.
        what: &'static str,
        /// How much is missing of what has been claimed.
        missing: usize,
    },
    /// The peer is no Vireo.
    #[error("the peer speaks something else: {what}; is it the port of another service?")]
    Foreign {
        /// Its name, or how it begins.
        what: String,
    },
    /// The peer is another version.
    #[error(
        "the peer speaks format {found} of migration, which is {age} than this version's {}.{}; use the same version of Vireo on both sides",
        VERSION.0, VERSION.1
    )]
    Version {
        /// Its version.
        found: String,
        /// `"older"` or `"newer"`.
        age: &'static str,
    },
    /// Bytes are not what was sent.
    #[error("{what} is damaged: its checksum is {found:#010x}, not {stated:#010x}")]
    Checksum {
        /// What.
        what: &'static str,
        /// What it says.
        stated: u32,
        /// What it is.
        found: u32,
    },
    /// A value that the format does not have.
    #[error("the peer breaks the format: {0}")]
    Format(String),
    /// More than the format allows.
    #[error(
        "the peer announces {len} bytes in a frame of kind {kind}, which has at most {longest}"
    )]
    Long {
        /// The kind's number.
        kind: u8,
        /// What it claims.
        len: u32,
        /// What may be.
        longest: u32,
    },
}

/// The beginning of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Preamble {
    /// Which migration it is.
    pub session: [u8; 16],
    /// Which stream of it, from 0.
    pub stream: u16,
    /// How many there are.
    pub streams: u16,
    /// It replaces a connection that was lost.
    pub again: bool,
    /// It is that of the disks, and no stream.
    pub disks: bool,
}

impl Preamble {
    /// Sends it.
    ///
    /// # Errors
    ///
    /// [`FrameError::Broken`].
    pub fn write(&self, to: &mut impl Write) -> Result<(), FrameError> {
        let mut bytes = Vec::with_capacity(PREAMBLE);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.0.to_le_bytes());
        bytes.extend_from_slice(&VERSION.1.to_le_bytes());
        bytes.extend_from_slice(&self.session);
        bytes.extend_from_slice(&self.stream.to_le_bytes());
        bytes.extend_from_slice(&self.streams.to_le_bytes());
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        let flags = bit(self.again, AGAIN) | bit(self.disks, DISKS);
        bytes.extend_from_slice(&flags.to_le_bytes());
        let sum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        to.write_all(&bytes).map_err(FrameError::Broken)?;
        to.flush().map_err(FrameError::Broken)
    }

    /// Reads it.
    ///
    /// # Errors
    ///
    /// [`FrameError`]: the peer is something else or another version, or ends early.
    pub fn read(from: &mut impl Read) -> Result<Self, FrameError> {
        let mut bytes = [0; PREAMBLE];
        // What is no preamble may be shorter than one, and its sender may wait for an answer: it is known by its first bytes.
        let (magic, rest) = bytes.split_at_mut(MAGIC.len());
        let first = fill(from, magic)?;
        if first < MAGIC.len() && (first == 0 || MAGIC.starts_with(&magic[..first])) {
            let missing = PREAMBLE.saturating_sub(first);
            return Err(short("the preamble", first, missing));
        }
        if *magic != MAGIC {
            return Err(FrameError::Foreign {
                what: foreign(&magic[..first]),
            });
        }
        let (version, rest) = rest.split_at_mut(4);
        let begun = fill(from, version)?;
        if begun < version.len() {
            return Err(short("the preamble", MAGIC.len(), version.len() - begun));
        }
        let mut fields = Fields(version);
        check_version((fields.u16(), fields.u16()))?;
        let there = fill(from, rest)?;
        if there < rest.len() {
            return Err(short("the preamble", MAGIC.len(), rest.len() - there));
        }
        Self::decode(&bytes)
    }

    fn decode(bytes: &[u8; PREAMBLE]) -> Result<Self, FrameError> {
        let (covered, sum) = bytes.split_at(PREAMBLE - 4);
        let (stated, found) = (Fields(sum).u32(), crc32fast::hash(covered));
        if stated != found {
            return Err(FrameError::Checksum {
                what: "the preamble",
                stated,
                found,
            });
        }
        let mut fields = Fields(covered.get(12..).unwrap_or_default());
        let session = fields.array();
        let (stream, streams, flags) = (fields.u16(), fields.u16(), fields.u32());
        if !(1..=STREAMS).contains(&streams) || stream >= streams {
            let text = format!("stream {stream} of {streams}; there are 1 to {STREAMS}");
            return Err(FrameError::Format(text));
        }
        if flags & !(AGAIN | DISKS) != 0 {
            let text = format!("unknown flags {flags:#x} in the preamble");
            return Err(FrameError::Format(text));
        }
        Ok(Self {
            session,
            stream,
            streams,
            again: flags & AGAIN != 0,
            disks: flags & DISKS != 0,
        })
    }
}

fn check_version(found: (u16, u16)) -> Result<(), FrameError> {
    if found == VERSION {
        return Ok(());
    }
    Err(FrameError::Version {
        found: format!("{}.{}", found.0, found.1),
        age: if found < VERSION { "older" } else { "newer" },
    })
}

/// What else begins so.
fn foreign(first: &[u8]) -> String {
    const HTTP: [&[u8]; 6] = [b"GET ", b"PUT ", b"POST", b"HEAD", b"HTTP", b"OPTI"];
    let begins = |text: &[u8]| first.starts_with(text);
    let name = if HTTP.iter().any(|text| begins(text)) {
        "HTTP"
    } else if begins(b"SSH-") {
        "SSH"
    } else if begins(&[0x16, 3]) || begins(&[0x15, 3]) {
        "TLS, for which this side is not set up"
    } else if begins(b"QEVM") {
        "a QEMU migration"
    } else if begins(b"RFB ") {
        "VNC"
    } else {
        ""
    };
    let shown: Vec<String> = first.iter().map(|byte| format!("{byte:02x}")).collect();
    let shown = format!("it begins with {} ({:?})", shown.join(" "), text(first));
    match name {
        "" => shown,
        name => format!("{name}; {shown}"),
    }
}

/// Bytes that can be shown; others as dots.
fn text(bytes: &[u8]) -> String {
    let shown = |byte: &u8| match byte {
        b' '..=b'~' => char::from(*byte),
        _ => '.',
    };
    bytes.iter().map(shown).collect()
}

fn short(what: &'static str, had: usize, missing: usize) -> FrameError {
    if had == 0 {
        return FrameError::Closed;
    }
    FrameError::Short { what, missing }
}

/// Reads until `bytes` are full or there is no more: how many there are.
pub(super) fn fill(from: &mut impl Read, bytes: &mut [u8]) -> Result<usize, FrameError> {
    let mut at = 0_usize;
    while let Some(rest) = bytes.get_mut(at..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(count) => at = at.saturating_add(count),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(FrameError::Broken(error)),
        }
    }
    Ok(at)
}

/// Sends a frame whose payload is `parts`, one behind the other: how many bytes those were.
///
/// # Errors
///
/// [`FrameError::Broken`], and [`FrameError::Long`] for more than there may be; nothing is sent then.
pub fn write(to: &mut impl Write, kind: Kind, parts: &[&[u8]]) -> Result<u64, FrameError> {
    let sum = |sum: usize, part: &&[u8]| sum.saturating_add(part.len());
    let len = parts.iter().fold(0, sum);
    let number = u32::try_from(len).unwrap_or(u32::MAX);
    if number > kind.longest() {
        return Err(FrameError::Long {
            kind: kind as u8,
            len: number,
            longest: kind.longest(),
        });
    }
    let mut header = [0; HEADER];
    header[0] = kind as u8;
    header[4..8].copy_from_slice(&number.to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[..8]);
    parts.iter().for_each(|part| hasher.update(part));
    header[8..].copy_from_slice(&hasher.finalize().to_le_bytes());
    to.write_all(&header).map_err(FrameError::Broken)?;
    for part in parts {
        to.write_all(part).map_err(FrameError::Broken)?;
    }
    Ok((len as u64).saturating_add(HEADER as u64))
}

/// Reads a frame into `payload`, whatever that held.
///
/// # Errors
///
/// [`FrameError`]; the connection is of no use then. [`FrameError::Closed`] where the peer has ended it in order.
pub fn read(from: &mut impl Read, payload: &mut Vec<u8>) -> Result<Kind, FrameError> {
    let mut header = [0; HEADER];
    let there = fill(from, &mut header)?;
    if there < HEADER {
        return Err(short("a frame's header", there, HEADER - there));
    }
    let mut fields = Fields(&header);
    let (number, zeros) = (fields.u8(), [fields.u8(), fields.u8(), fields.u8()]);
    let (len, stated) = (fields.u32(), fields.u32());
    let Some(kind) = Kind::of(number) else {
        let text = format!("a frame of kind {number}, which there is not");
        return Err(FrameError::Format(text));
    };
    if zeros != [0; 3] {
        return Err(FrameError::Format(
            "a header that is not 0 where it should".to_owned(),
        ));
    }
    let longest = kind.longest();
    if len > longest {
        return Err(FrameError::Long {
            kind: number,
            len,
            longest,
        });
    }
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    payload.truncate(len);
    let mut at = 0_usize;
    while at < len {
        let end = at.saturating_add(STEP).max(payload.len()).min(len);
        payload.resize(end, 0);
        let here = payload.get_mut(at..end).unwrap_or_default();
        let there = fill(from, here)?;
        if there < here.len() {
            let missing = len.saturating_sub(at).saturating_sub(there);
            return Err(short("a frame", HEADER, missing));
        }
        at = end;
    }
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[..8]);
    hasher.update(payload);
    match hasher.finalize() {
        found if found == stated => Ok(kind),
        found => Err(FrameError::Checksum {
            what: "a frame",
            stated,
            found,
        }),
    }
}

/// Takes numbers from the front of bytes; what is not there is 0.
pub(super) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let (head, rest) = self.0.split_at(self.0.len().min(N));
        for (to, from) in array.iter_mut().zip(head) {
            *to = *from;
        }
        self.0 = rest;
        array
    }

    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAMPLE: Preamble = Preamble {
        session: *b"0123456789abcdef",
        stream: 3,
        streams: 4,
        again: true,
        disks: false,
    };

    fn preamble() -> Vec<u8> {
        let mut bytes = Vec::new();
        SAMPLE.write(&mut bytes).unwrap();
        bytes
    }

    fn said(bytes: &[u8]) -> String {
        Preamble::read(&mut &*bytes).unwrap_err().to_string()
    }

    #[test]
    fn a_preamble_survives_and_every_cut_and_flipped_bit_is_an_error() {
        let bytes = preamble();
        assert_eq!(bytes.len(), PREAMBLE);
        assert_eq!(Preamble::read(&mut &*bytes).unwrap(), SAMPLE);
        for len in 0..bytes.len() {
            let error = Preamble::read(&mut &bytes[..len]).unwrap_err();
            assert!(
                matches!(error, FrameError::Closed) == (len == 0),
                "{len}: {error}"
            );
        }
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Preamble::read(&mut &*bytes).is_err(), "{bit}");
        }
    }

    #[test]
    fn peers_that_speak_something_else_are_named() {
        assert!(said(b"GET / HTTP/1.1\r\n").contains("HTTP; it begins with 47 45 54"));
        assert!(said(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc]).contains("TLS"));
        assert!(said(b"QEVM\0\0\0\x03").contains("QEMU"));
        assert!(said(b"hi\n").contains("\"hi.\""));
        assert!(said(&[7; 50]).contains("07 07"));
    }

    #[test]
    fn other_versions_are_named_before_anything_else_is_looked_at() {
        let mut bytes = preamble();
        bytes.truncate(12);
        bytes[8] = 1;
        bytes[10] = 0;
        let text = said(&bytes);
        assert!(
            text.contains("format 1.0") && text.contains("newer"),
            "{text}"
        );
        (bytes[8], bytes[10]) = (0, 0);
        assert!(said(&bytes).contains("older"));
    }

    #[test]
    fn streams_that_there_are_not_are_refused() {
        for (stream, streams) in [(0, 0), (4, 4), (0, 65)] {
            let mut bytes = Vec::new();
            let preamble = Preamble {
                stream,
                streams,
                ..SAMPLE
            };
            preamble.write(&mut bytes).unwrap();
            assert!(said(&bytes).contains("there are 1 to 64"));
        }
    }

    #[test]
    fn a_frame_survives_and_every_cut_and_flipped_bit_is_an_error() {
        let mut bytes = Vec::new();
        write(&mut bytes, Kind::Zeros, &[b"ab", b"", b"cde"]).unwrap();
        let mut payload = vec![9; 100];
        assert_eq!(read(&mut &*bytes, &mut payload).unwrap(), Kind::Zeros);
        assert_eq!(payload, b"abcde");
        for len in 0..bytes.len() {
            let error = read(&mut &bytes[..len], &mut payload).unwrap_err();
            assert!(
                matches!(error, FrameError::Closed) == (len == 0),
                "{len}: {error}"
            );
        }
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&mut &*bytes, &mut payload).is_err(), "{bit}");
        }
    }

    #[test]
    fn a_frame_takes_no_more_memory_than_has_come_of_it() {
        let mut bytes = vec![Kind::State as u8, 0, 0, 0];
        bytes.extend_from_slice(&(256_u32 << 20).to_le_bytes());
        bytes.extend_from_slice(&[0; 100]);
        let mut payload = Vec::new();
        let error = read(&mut &*bytes, &mut payload).unwrap_err();
        assert!(matches!(error, FrameError::Short { .. }), "{error}");
        assert!(payload.capacity() <= 2 * STEP);
        bytes[7] = 0xff;
        let error = read(&mut &*bytes, &mut payload).unwrap_err();
        assert!(matches!(error, FrameError::Long { .. }), "{error}");
        let error = write(&mut Vec::new(), Kind::Keepalive, &[b"x"]).unwrap_err();
        assert!(matches!(error, FrameError::Long { .. }), "{error}");
    }

    #[test]
    fn every_kind_is_found_by_its_number() {
        for number in 0..=u8::MAX {
            let there = Kind::of(number);
            assert_eq!(there.is_some(), (1..=17).contains(&number));
            assert!(there.is_none_or(|kind| kind as u8 == number));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Preamble::read(&mut &*bytes);
            let _ = read(&mut &*bytes, &mut Vec::new());
        }
    }
}
