//! Frames of the WebSocket protocol (RFC 6455, section 5), as a server reads and writes them.
//!
//! Payload is passed on as it comes: nothing that a client says about a length makes the server keep or reserve
//! anything. Of a control frame's payload 125 bytes are kept, which is all that it can have.

use thiserror::Error;

/// The most bytes of a control frame's payload (section 5.5).
pub const CONTROL: usize = 125;
/// The most bytes of a frame that a client may send. What it types and points at is far less.
pub const MAX_FRAME: u64 = 1 << 20;

/// Operation codes (section 11.8).
const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// The last frame of a message.
const FINAL: u8 = 0x80;
const RESERVED: u8 = 0x70;
const MASKED: u8 = 0x80;

/// Why bytes are no frames of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FrameError {
    /// An extension's bits, and none was agreed on.
    #[error("a frame with reserved bits")]
    Reserved,
    /// No operation that there is.
    #[error("a frame of the unknown kind {0}")]
    Kind(u8),
    /// Clients mask.
    #[error("a frame that is not masked")]
    Unmasked,
    /// A length in more bytes than it takes, or a control frame that is long or in fragments.
    #[error("a frame with a length that is not allowed")]
    Length,
    /// Too long.
    #[error("a frame of {0} bytes; at most {MAX_FRAME} are taken")]
    Long(u64),
    /// A fragment that continues nothing, or a message amid another.
    #[error("a fragment out of its order")]
    Order,
    /// Text, where bytes are spoken.
    #[error("a text message: bytes are spoken here")]
    Text,
}

impl FrameError {
    /// The status code that tells the client (section 7.4.1).
    #[must_use]
    pub fn code(self) -> u16 {
        match self {
            Self::Text => 1003,
            Self::Long(_) => 1009,
            _ => 1002,
        }
    }
}

/// What some bytes were.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Nothing whole yet: more bytes are needed.
    Part,
    /// So many bytes of a message are in the output now.
    Data(usize),
    /// A ping, to be answered with the same bytes.
    Ping(Vec<u8>),
    /// The client ends the connection.
    Close,
}

/// Reads what a client sends.
#[derive(Debug, Default)]
pub struct Decoder {
    /// The header, as far as it has come.
    head: Vec<u8>,
    /// The frame whose payload comes.
    frame: Option<Frame>,
    /// The last data frame was not its message's last.
    amid: bool,
    /// A control frame's payload.
    control: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    kind: u8,
    left: u64,
    mask: [u8; 4],
    /// Where in the mask the next byte is.
    at: usize,
}

impl Decoder {
    /// Reads the front of `input`, and puts what is of a message into `out`, which has room. Returns how many bytes are
    /// used up, and what they were. All is used up before a [`Piece::Part`].
    ///
    /// # Errors
    ///
    /// [`FrameError`]; nothing may be read any more then.
    pub fn read(&mut self, input: &[u8], out: &mut [u8]) -> Result<(usize, Piece), FrameError> {
        let mut used = 0;
        loop {
            let rest = input.get(used..).unwrap_or_default();
            let Some(mut frame) = self.frame.take() else {
                let Some(&byte) = rest.first() else {
                    return Ok((used, Piece::Part));
                };
                used += 1;
                self.head.push(byte);
                self.frame = self.begin()?;
                continue;
            };
            let is_control = frame.kind >= CLOSE;
            let room = if is_control { CONTROL } else { out.len() };
            let left = usize::try_from(frame.left).unwrap_or(usize::MAX);
            let count = rest.len().min(left).min(room);
            let bytes = rest.iter().take(count).enumerate();
            let plain = bytes.map(|(at, byte)| byte ^ frame.mask[frame.at.wrapping_add(at) % 4]);
            if is_control {
                self.control.extend(plain);
            } else {
                out.iter_mut().zip(plain).for_each(|(to, byte)| *to = byte);
            }
            used += count;
            frame.at = frame.at.wrapping_add(count) % 4;
            frame.left -= count as u64;
            let ended = frame.left == 0;
            if !ended {
                self.frame = Some(frame);
            }
            match frame.kind {
                PING if ended => return Ok((used, Piece::Ping(std::mem::take(&mut self.control)))),
                CLOSE if ended => {
                    self.control.clear();
                    return Ok((used, Piece::Close));
                }
                CLOSE.. if ended => self.control.clear(),
                _ if count > 0 && !is_control => return Ok((used, Piece::Data(count))),
                _ if ended => (),
                _ => return Ok((used, Piece::Part)),
            }
        }
    }

    /// The frame that the header tells of, once it is whole.
    fn begin(&mut self) -> Result<Option<Frame>, FrameError> {
        let (first, second) = match *self.head {
            [first] if first & RESERVED != 0 => return Err(FrameError::Reserved),
            [first, second, ..] => (first, second),
            _ => return Ok(None),
        };
        let kind = first & 0xf;
        let ends = first & FINAL != 0;
        let short = second & !MASKED;
        if self.head.len() == 2 {
            self.check(kind, ends, second)?;
        }
        let extended: usize = match short {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        if self.head.len() < 2 + extended + 4 {
            return Ok(None);
        }
        let (length, mask) = self.head.split_at(2 + extended);
        let number = length.iter().skip(2);
        let told = number.fold(0, |all: u64, byte| all << 8 | u64::from(*byte));
        let left = match extended {
            0 => short.into(),
            // The shortest form is to be used (section 5.2).
            2 if told < 126 => return Err(FrameError::Length),
            8 if told <= u16::MAX.into() => return Err(FrameError::Length),
            _ => told,
        };
        if left > MAX_FRAME {
            return Err(FrameError::Long(left));
        }
        let mask = mask.first_chunk().copied().unwrap_or_default();
        self.head.clear();
        if kind < CLOSE {
            self.amid = !ends;
        }
        Ok(Some(Frame {
            kind,
            left,
            mask,
            at: 0,
        }))
    }

    /// Whether a frame that begins like this may come now.
    fn check(&self, kind: u8, ends: bool, second: u8) -> Result<(), FrameError> {
        if second & MASKED == 0 {
            return Err(FrameError::Unmasked);
        }
        match kind {
            CONTINUATION if self.amid => Ok(()),
            BINARY if !self.amid => Ok(()),
            CONTINUATION | BINARY => Err(FrameError::Order),
            TEXT => Err(FrameError::Text),
            CLOSE | PING | PONG => {
                let fits = usize::from(second & !MASKED) <= CONTROL;
                (ends && fits).then_some(()).ok_or(FrameError::Length)
            }
            other => Err(FrameError::Kind(other)),
        }
    }
}

/// Puts a message of bytes into `out`, in one frame.
pub fn put_binary(payload: &[u8], out: &mut Vec<u8>) {
    put(BINARY, payload, out);
}

/// Puts the answer to a ping into `out`.
pub fn put_pong(payload: &[u8], out: &mut Vec<u8>) {
    put(PONG, payload, out);
}

/// Puts the connection's end into `out`, with the status code that tells why.
pub fn put_close(code: u16, out: &mut Vec<u8>) {
    put(CLOSE, &code.to_be_bytes(), out);
}

fn put(kind: u8, payload: &[u8], out: &mut Vec<u8>) {
    out.push(FINAL | kind);
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(length @ ..126), _) => out.push(length),
        (_, Ok(length)) => {
            out.push(126);
            out.extend(length.to_be_bytes());
        }
        _ => {
            out.push(127);
            out.extend((payload.len() as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(payload);
}

#[cfg(test)]
mod tests;
