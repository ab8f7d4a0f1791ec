//! What a client says after the handshake (RFC 6143, section 7.5, and the community's extensions), read out of bytes
//! that come in pieces.

use thiserror::Error;

use super::super::area::{Rect, Size};
use super::format::{ClientFormat, FORMAT_LEN, FormatError};

/// The most encodings that a client may list; real ones list some thirty.
pub const MAX_ENCODINGS: u16 = 1024;
/// The longest text; a client that cuts more is sent away.
pub const MAX_CUT_TEXT: u32 = 64 << 20;
/// The longest payload of a fence, by its definition.
pub const MAX_FENCE: u8 = 64;

/// A message of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The client wants pixels in another format.
    Format(ClientFormat),
    /// What the client understands, what it likes best first.
    Encodings(Vec<i32>),
    /// The client wants a picture, or what has changed of it.
    Update {
        /// Only what the client does not have.
        incremental: bool,
        /// The part that it wants; may reach past the picture.
        area: Rect,
    },
    /// A key, by its symbol in X.
    Key {
        /// The symbol.
        symbol: u32,
        /// Whether it went down.
        down: bool,
    },
    /// A key, by its place on a PC's keyboard as well.
    ExtendedKey {
        /// The symbol.
        symbol: u32,
        /// The scancode of set 1, with bit 7 for what follows 0xE0.
        scancode: u32,
        /// Whether it went down.
        down: bool,
    },
    /// The pointer.
    Pointer {
        /// Bits of the buttons that are down; wheels are buttons.
        buttons: u8,
        /// Its column, or 0x7FFF and how far it went.
        x: u16,
        /// Its line, or 0x7FFF and how far it went.
        y: u16,
    },
    /// So many bytes of text follow.
    CutText(u32),
    /// Updates are to come without being asked for, or no longer.
    Continuous {
        /// Whether.
        on: bool,
        /// The part that the client wants.
        area: Rect,
    },
    /// To be answered when all before it is done.
    Fence {
        /// What it is to hold apart.
        flags: u32,
        /// Comes back as it is.
        payload: Vec<u8>,
    },
    /// The client would like another size.
    Resize(Size),
}

/// Why a client is sent away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum MessageError {
    /// No such message, so that its end is not known either.
    #[error("message {0}, which has no meaning here")]
    Unknown(u8),
    /// No such message of QEMU's.
    #[error("QEMU message {0}, which has no meaning here")]
    UnknownQemu(u8),
    /// A pixel format of no use.
    #[error("no pixels can be sent")]
    Format(#[from] FormatError),
    /// More than [`MAX_ENCODINGS`].
    #[error("a list of {0} encodings; at most {MAX_ENCODINGS} are read")]
    Encodings(u16),
    /// More than [`MAX_CUT_TEXT`].
    #[error("a text of {0} bytes; at most {MAX_CUT_TEXT} are read")]
    CutText(u32),
    /// More than [`MAX_FENCE`].
    #[error("a fence with {0} bytes; it has at most {MAX_FENCE}")]
    Fence(u8),
}

/// Reads the message that `bytes` begin with. Returns it and its length, or none while it is not complete: the
/// longest are lists of [`MAX_ENCODINGS`] and of 255 screens, some 4 KiB. A text is not part of its message.
///
/// # Errors
///
/// [`MessageError`], as soon as it is plain.
pub fn parse(bytes: &[u8]) -> Result<Option<(Message, usize)>, MessageError> {
    let Some((kind, rest)) = bytes.split_first() else {
        return Ok(None);
    };
    let body = match kind {
        0 => format(rest)?,
        2 => encodings(rest)?,
        3 => fixed(rest, |&[incremental, area @ ..]: &[u8; 9]| {
            Message::Update {
                incremental: incremental != 0,
                area: rect(area),
            }
        }),
        4 => fixed(rest, |&[down, _, _, symbol @ ..]: &[u8; 7]| Message::Key {
            symbol: u32::from_be_bytes(symbol),
            down: down != 0,
        }),
        5 => fixed(rest, |&[buttons, x0, x1, y0, y1]| Message::Pointer {
            buttons,
            x: u16::from_be_bytes([x0, x1]),
            y: u16::from_be_bytes([y0, y1]),
        }),
        6 => cut_text(rest)?,
        150 => fixed(rest, |&[on, area @ ..]: &[u8; 9]| Message::Continuous {
            on: on != 0,
            area: rect(area),
        }),
        248 => fence(rest)?,
        251 => resize(rest),
        255 => qemu(rest)?,
        unknown => return Err(MessageError::Unknown(*unknown)),
    };
    Ok(body.map(|(message, len)| (message, 1 + len)))
}

type Body = Option<(Message, usize)>;

fn fixed<const N: usize>(rest: &[u8], message: impl Fn(&[u8; N]) -> Message) -> Body {
    Some((message(rest.first_chunk::<N>()?), N))
}

fn rect([x0, x1, y0, y1, w0, w1, h0, h1]: [u8; 8]) -> Rect {
    Rect {
        x: u16::from_be_bytes([x0, x1]),
        y: u16::from_be_bytes([y0, y1]),
        width: u16::from_be_bytes([w0, w1]),
        height: u16::from_be_bytes([h0, h1]),
    }
}

fn format(rest: &[u8]) -> Result<Body, MessageError> {
    let Some([_, _, _, wire @ ..]) = rest.first_chunk::<{ 3 + FORMAT_LEN }>() else {
        return Ok(None);
    };
    Ok(Some((
        Message::Format(ClientFormat::parse(wire)?),
        3 + FORMAT_LEN,
    )))
}

fn encodings(rest: &[u8]) -> Result<Body, MessageError> {
    let Some((&[_, c0, c1], list)) = rest.split_first_chunk() else {
        return Ok(None);
    };
    let count = u16::from_be_bytes([c0, c1]);
    if count > MAX_ENCODINGS {
        return Err(MessageError::Encodings(count));
    }
    let len = usize::from(count) * 4;
    let Some(list) = list.get(..len) else {
        return Ok(None);
    };
    let (numbers, _) = list.as_chunks::<4>();
    let numbers = numbers.iter().map(|number| i32::from_be_bytes(*number));
    Ok(Some((Message::Encodings(numbers.collect()), 3 + len)))
}

fn cut_text(rest: &[u8]) -> Result<Body, MessageError> {
    let Some(&[_, _, _, a, b, c, d]) = rest.first_chunk() else {
        return Ok(None);
    };
    match u32::from_be_bytes([a, b, c, d]) {
        len if len > MAX_CUT_TEXT => Err(MessageError::CutText(len)),
        len => Ok(Some((Message::CutText(len), 7))),
    }
}

fn fence(rest: &[u8]) -> Result<Body, MessageError> {
    let Some((&[_, _, _, a, b, c, d, len], payload)) = rest.split_first_chunk() else {
        return Ok(None);
    };
    if len > MAX_FENCE {
        return Err(MessageError::Fence(len));
    }
    let payload = payload.get(..usize::from(len)).map(<[u8]>::to_vec);
    Ok(payload.map(|payload| {
        let flags = u32::from_be_bytes([a, b, c, d]);
        (Message::Fence { flags, payload }, 8 + usize::from(len))
    }))
}

fn resize(rest: &[u8]) -> Body {
    let &[_, w0, w1, h0, h1, screens, _] = rest.first_chunk()?;
    let len = 7 + 16 * usize::from(screens);
    rest.get(..len)?;
    let size = Size {
        width: u16::from_be_bytes([w0, w1]),
        height: u16::from_be_bytes([h0, h1]),
    };
    Some((Message::Resize(size), len))
}

fn qemu(rest: &[u8]) -> Result<Body, MessageError> {
    match rest.first() {
        None => Ok(None),
        Some(0) => Ok(fixed(
            rest,
            |&[_, d0, d1, s0, s1, s2, s3, c0, c1, c2, c3]| Message::ExtendedKey {
                symbol: u32::from_be_bytes([s0, s1, s2, s3]),
                scancode: u32::from_be_bytes([c0, c1, c2, c3]),
                down: [d0, d1] != [0, 0],
            },
        )),
        Some(unknown) => Err(MessageError::UnknownQemu(*unknown)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The message of these bytes; incomplete at each byte before the last, and no longer than they are.
    fn whole(bytes: &[u8]) -> Message {
        for end in 0..bytes.len() {
            assert_eq!(parse(&bytes[..end]), Ok(None), "{end} of {bytes:?}");
        }
        let (message, len) = parse(&[bytes, &[99; 3]].concat()).unwrap().unwrap();
        assert_eq!(len, bytes.len());
        message
    }

    #[test]
    fn every_message_is_read_in_any_pieces() {
        let area = Rect {
            x: 1,
            y: 2,
            width: 0xffff,
            height: 4,
        };
        let wire = [0, 1, 0, 2, 0xff, 0xff, 0, 4];
        let mut format = vec![0, 0, 0, 0];
        ClientFormat::SERVER.write(&mut format);
        assert_eq!(whole(&format), Message::Format(ClientFormat::SERVER));
        assert_eq!(
            whole(&[2, 0, 0, 2, 0, 0, 0, 16, 255, 255, 255, 0]),
            Message::Encodings(vec![16, -256])
        );
        let incremental = true;
        assert_eq!(
            whole(&[&[3, 1][..], &wire].concat()),
            Message::Update { incremental, area }
        );
        let (symbol, down) = (0xff0d, true);
        assert_eq!(
            whole(&[4, 1, 0, 0, 0, 0, 0xff, 0x0d]),
            Message::Key { symbol, down }
        );
        let (buttons, x, y) = (4, 0x7fff, 2);
        assert_eq!(
            whole(&[5, 4, 0x7f, 0xff, 0, 2]),
            Message::Pointer { buttons, x, y }
        );
        assert_eq!(whole(&[6, 0, 0, 0, 0, 0, 1, 0]), Message::CutText(256));
        let on = true;
        assert_eq!(
            whole(&[&[150, 1][..], &wire].concat()),
            Message::Continuous { on, area }
        );
        let (flags, payload) = (1 << 31, vec![7, 8]);
        assert_eq!(
            whole(&[248, 0, 0, 0, 128, 0, 0, 0, 2, 7, 8]),
            Message::Fence { flags, payload }
        );
        let mut resize = vec![251, 0, 4, 0, 3, 0, 1, 0];
        resize.extend([0; 16]);
        let (width, height) = (1024, 768);
        assert_eq!(whole(&resize), Message::Resize(Size { width, height }));
        let (scancode, down) = (0x9d, false);
        assert_eq!(
            whole(&[255, 0, 0, 0, 0, 0, 0xff, 0x0d, 0, 0, 0, 0x9d]),
            Message::ExtendedKey {
                symbol,
                scancode,
                down
            }
        );
    }

    #[test]
    fn lengths_of_four_gibibytes_are_refused_before_their_bytes_come() {
        assert_eq!(
            parse(&[6, 0, 0, 0, 255, 255, 255, 255]),
            Err(MessageError::CutText(u32::MAX))
        );
        assert_eq!(
            parse(&[2, 0, 255, 255]),
            Err(MessageError::Encodings(65535))
        );
        assert_eq!(
            parse(&[248, 0, 0, 0, 0, 0, 0, 0, 255]),
            Err(MessageError::Fence(255))
        );
    }

    #[test]
    fn what_has_no_meaning_is_refused() {
        for kind in [1, 7, 249, 254] {
            assert_eq!(parse(&[kind]), Err(MessageError::Unknown(kind)));
        }
        assert_eq!(parse(&[255, 1]), Err(MessageError::UnknownQemu(1)));
        let mut format = vec![0; 20];
        assert!(matches!(parse(&format), Err(MessageError::Format(_))));
        format[4] = 255;
        assert!(matches!(parse(&format), Err(MessageError::Format(_))));
    }
}
