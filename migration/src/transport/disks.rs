//! What disks hold that go along with their machine: frames on a connection of their own.
//!
//! # Contract
//!
//! * The connection begins with a [`Preamble`](super::frame::Preamble) of the session that says so. Then the source sends [`DiskFrame`]s, and the destination [`DiskAnswer`]s: for every
//!   frame that it has done a count of all that have been, in order, or why one could not be; nothing follows that.
//! * Disks are numbered in the order in which the offer names them. Both sides know their sizes, and a frame that goes beyond is an error before anything is done.
//! * What has been acknowledged has been written. It is durable with the acknowledgement of a [`DiskFrame::Flush`] behind it.
//! * A flush says before which pause of the guest it is, counted as the states are ([`Word::State`](super::protocol::Word)): the destination takes no state without the one of its number, behind which
//!   nothing has come.

use std::io::{Read, Write};

use super::frame::{self, Fields, FrameError, Kind};

/// The most bytes of a disk in one frame.
pub const LONGEST: usize = 512 << 10;
/// The most disks.
pub const DISKS: usize = 1024;
/// The longest reason that is told, in bytes.
const REASON: usize = 4 << 10;

/// What the source sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFrame<'a> {
    /// Bytes of a disk.
    Data {
        /// Which.
        disk: u16,
        /// Where, in bytes.
        offset: u64,
        /// At least one, and at most [`LONGEST`].
        bytes: &'a [u8],
    },
    /// A part of a disk reads as zeros.
    Zeros {
        /// Which.
        disk: u16,
        /// Where, in bytes.
        offset: u64,
        /// At least 1.
        len: u64,
    },
    /// All that has come is to be durable.
    Flush {
        /// Before which pause; 0: none.
        attempt: u32,
    },
    /// Nothing; it is acknowledged like the others.
    Keepalive,
}

impl<'a> DiskFrame<'a> {
    /// Sends it: how many bytes those were.
    ///
    /// # Errors
    ///
    /// [`FrameError`].
    pub fn write(&self, to: &mut impl Write) -> Result<u64, FrameError> {
        match self {
            Self::Data {
                disk,
                offset,
                bytes,
            } => {
                let parts: [&[u8]; 3] = [&disk.to_le_bytes(), &offset.to_le_bytes(), bytes];
                frame::write(to, Kind::DiskData, &parts)
            }
            Self::Zeros { disk, offset, len } => {
                let numbers = [offset.to_le_bytes(), len.to_le_bytes()];
                let parts: [&[u8]; 2] = [&disk.to_le_bytes(), numbers.as_flattened()];
                frame::write(to, Kind::DiskZeros, &parts)
            }
            Self::Flush { attempt } => frame::write(to, Kind::DiskFlush, &[&attempt.to_le_bytes()]),
            Self::Keepalive => frame::write(to, Kind::Keepalive, &[]),
        }
    }

    /// Waits for the next one, which is read into `payload`, for disks of these sizes in bytes.
    ///
    /// # Errors
    ///
    /// [`FrameError`]; the connection is of no use then.
    pub fn read(
        from: &mut impl Read,
        payload: &'a mut Vec<u8>,
        sizes: &[u64],
    ) -> Result<Self, FrameError> {
        let kind = frame::read(from, payload)?;
        Self::decode(kind, payload, sizes)
    }

    /// Of a frame's payload.
    ///
    /// # Errors
    ///
    /// [`FrameError::Format`].
    pub fn decode(kind: Kind, payload: &'a [u8], sizes: &[u64]) -> Result<Self, FrameError> {
        let wrong = FrameError::Format;
        let mut fields = Fields(payload);
        let within = |disk: u16, offset: u64, len: u64| {
            let Some(size) = sizes.get(usize::from(disk)) else {
                return Err(wrong(format!("disk {disk} of {}", sizes.len())));
            };
            match offset.checked_add(len) {
                Some(end) if end <= *size && len > 0 => Ok(()),
                _ => Err(wrong(format!(
                    "{len} bytes at {offset} of disk {disk}, which has {size}"
                ))),
            }
        };
        match kind {
            Kind::DiskData => {
                let (disk, offset) = (fields.u16(), u64::from_le_bytes(fields.array()));
                let bytes = fields.0;
                within(disk, offset, bytes.len() as u64)?;
                Ok(Self::Data {
                    disk,
                    offset,
                    bytes,
                })
            }
            Kind::DiskZeros if payload.len() == 18 => {
                let disk = fields.u16();
                let mut number = || u64::from_le_bytes(fields.array());
                let (offset, len) = (number(), number());
                within(disk, offset, len)?;
                Ok(Self::Zeros { disk, offset, len })
            }
            Kind::DiskFlush if payload.len() == 4 => Ok(Self::Flush {
                attempt: fields.u32(),
            }),
            Kind::Keepalive => Ok(Self::Keepalive),
            Kind::DiskZeros | Kind::DiskFlush => {
                Err(wrong("a frame of disks that is cut short".to_owned()))
            }
            other => Err(wrong(format!(
                "a frame of kind {} on the connection of disks",
                other as u8
            ))),
        }
    }
}

/// What the destination answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskAnswer {
    /// So many frames have been done.
    Done(u64),
    /// One cannot be, of which disk, and why.
    Failed(u16, String),
}

impl DiskAnswer {
    /// Sends it. A reason that is too long is cut.
    ///
    /// # Errors
    ///
    /// [`FrameError`].
    pub fn write(&self, to: &mut impl Write) -> Result<(), FrameError> {
        match self {
            Self::Done(count) => frame::write(to, Kind::DiskDone, &[&count.to_le_bytes()])?,
            Self::Failed(disk, reason) => {
                let mut end = reason.len().min(REASON);
                while !reason.is_char_boundary(end) {
                    end = end.saturating_sub(1);
                }
                let text = reason.as_bytes().get(..end).unwrap_or_default();
                frame::write(to, Kind::DiskFailed, &[&disk.to_le_bytes(), text])?
            }
        };
        to.flush().map_err(FrameError::Broken)
    }

    /// Waits for the next one.
    ///
    /// # Errors
    ///
    /// [`FrameError`]; the connection is of no use then.
    pub fn read(from: &mut impl Read, payload: &mut Vec<u8>) -> Result<Self, FrameError> {
        let kind = frame::read(from, payload)?;
        Self::decode(kind, payload)
    }

    /// Of a frame's payload. A reason has nothing in it that could drive a terminal.
    ///
    /// # Errors
    ///
    /// [`FrameError::Format`].
    pub fn decode(kind: Kind, payload: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Fields(payload);
        match kind {
            Kind::DiskDone if payload.len() == 8 => {
                Ok(Self::Done(u64::from_le_bytes(fields.array())))
            }
            Kind::DiskFailed if payload.len() >= 2 => {
                let disk = fields.u16();
                let plain = |c: char| if c.is_control() { '?' } else { c };
                let text = String::from_utf8_lossy(fields.0);
                Ok(Self::Failed(disk, text.chars().map(plain).collect()))
            }
            other => Err(FrameError::Format(format!(
                "an answer about disks of kind {}, {} bytes long",
                other as u8,
                payload.len()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZES: [u64; 2] = [1 << 20, 4096];

    fn frames() -> [DiskFrame<'static>; 5] {
        [
            DiskFrame::Data {
                disk: 1,
                offset: 4090,
                bytes: b"abcdef",
            },
            DiskFrame::Zeros {
                disk: 0,
                offset: 512,
                len: (1 << 20) - 512,
            },
            DiskFrame::Flush { attempt: 7 },
            DiskFrame::Flush { attempt: 0 },
            DiskFrame::Keepalive,
        ]
    }

    fn said(frame: DiskFrame<'_>) -> String {
        let mut bytes = Vec::new();
        frame.write(&mut bytes).unwrap();
        let read = DiskFrame::read(&mut &*bytes, &mut Vec::new(), &SIZES).unwrap_err();
        read.to_string()
    }

    #[test]
    fn frames_and_answers_survive_and_no_cut_of_them_does() {
        for frame in frames() {
            let mut bytes = Vec::new();
            let len = frame.write(&mut bytes).unwrap();
            assert_eq!(len, bytes.len() as u64);
            let mut payload = Vec::new();
            let read = DiskFrame::read(&mut &*bytes, &mut payload, &SIZES);
            assert_eq!(read.unwrap(), frame);
            for len in 0..bytes.len() {
                let cut = DiskFrame::read(&mut &bytes[..len], &mut payload, &SIZES);
                assert!(cut.is_err(), "{frame:?} {len}");
            }
        }
        let long = "é".repeat(REASON);
        for answer in [
            DiskAnswer::Done(u64::MAX),
            DiskAnswer::Failed(3, "full".to_owned()),
            DiskAnswer::Failed(0, long),
        ] {
            let mut bytes = Vec::new();
            answer.write(&mut bytes).unwrap();
            let read = DiskAnswer::read(&mut &*bytes, &mut Vec::new()).unwrap();
            match (&answer, &read) {
                (DiskAnswer::Failed(0, _), DiskAnswer::Failed(0, cut)) => {
                    assert_eq!(cut.len(), REASON);
                }
                _ => assert_eq!(read, answer),
            }
            for len in 0..bytes.len() {
                assert!(DiskAnswer::read(&mut &bytes[..len], &mut Vec::new()).is_err());
            }
        }
    }

    #[test]
    fn what_lies_outside_of_a_disk_is_refused_before_anything_is_done() {
        let zeros = |disk, offset, len| DiskFrame::Zeros { disk, offset, len };
        for frame in [
            zeros(2, 0, 1),
            zeros(0, 0, 1 << 60),
            zeros(0, 1 << 20, 1),
            zeros(0, u64::MAX, 2),
            zeros(1, 0, 0),
            DiskFrame::Data {
                disk: 1,
                offset: 4095,
                bytes: b"ab",
            },
            DiskFrame::Data {
                disk: u16::MAX,
                offset: 0,
                bytes: b"ab",
            },
            DiskFrame::Data {
                disk: 0,
                offset: 0,
                bytes: b"",
            },
        ] {
            let said = said(frame);
            assert!(said.contains("disk "), "{said}");
        }
        let mut bytes = Vec::new();
        frame::write(&mut bytes, Kind::DiskFlush, &[b"abc"]).unwrap();
        frame::write(&mut bytes, Kind::Zeros, &[b"abc"]).unwrap();
        let mut rest = &*bytes;
        for wanted in ["cut short", "of kind 4"] {
            let error = DiskFrame::read(&mut rest, &mut Vec::new(), &SIZES).unwrap_err();
            assert!(error.to_string().contains(wanted), "{error}");
        }
        let long = vec![1; LONGEST + 1];
        let frame = DiskFrame::Data {
            disk: 0,
            offset: 0,
            bytes: &long,
        };
        assert!(frame.write(&mut Vec::new()).is_err());
    }

    #[test]
    fn a_reason_of_a_destination_cannot_drive_a_terminal() {
        let mut bytes = Vec::new();
        let parts: [&[u8]; 2] = [&[0, 0], b"no\x1b[2J\nroom\xff"];
        frame::write(&mut bytes, Kind::DiskFailed, &parts).unwrap();
        let read = DiskAnswer::read(&mut &*bytes, &mut Vec::new()).unwrap();
        let text = "no?[2J?room\u{fffd}".to_owned();
        assert_eq!(read, DiskAnswer::Failed(0, text));
    }

    proptest! {
        #[test]
        fn any_payload_is_decoded_without_a_panic_and_within_its_disk(
            number in 0..20_u8,
            payload in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            if let Some(kind) = Kind::of(number) {
                let _ = DiskAnswer::decode(kind, &payload);
                match DiskFrame::decode(kind, &payload, &SIZES) {
                    Ok(DiskFrame::Zeros { disk, offset, len }) => {
                        assert!(offset.checked_add(len).unwrap() <= SIZES[usize::from(disk)]);
                    }
                    Ok(DiskFrame::Data { disk, offset, bytes }) => {
                        assert!(offset + bytes.len() as u64 <= SIZES[usize::from(disk)]);
                    }
                    _ => {}
                }
            }
        }
    }
}
