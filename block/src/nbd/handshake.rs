//! The way into the transmission phase (proto.md, "Handshake"): fixed newstyle where the server
//! has it, with [`OPT_GO`] and structured replies, and all that older servers can do otherwise.
//!
//! Everything that the server sends is bounded here: lengths, the number of replies, and
//! the time of it all.

use std::io;
use std::time::{Duration, Instant};

use super::socket::{Patient, Socket};
use super::wire::{
    FIXED_NEWSTYLE, INFO_BLOCK_SIZE, INFO_EXPORT, INFO_NAME, INIT_MAGIC, MAX_STRING, NO_ZEROES,
    OLDSTYLE_MAGIC, OPT_ABORT, OPT_EXPORT_NAME, OPT_GO, OPT_STRUCTURED_REPLY, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, Offers, REP_ACK, REP_ERR_TLS_REQD, REP_ERR_UNKNOWN, REP_ERR_UNSUP,
    REP_ERROR, REP_INFO, Reader,
};

/// How long it may take as a whole.
const TIME: Duration = Duration::from_secs(10);

/// The most replies to one option.
const MAX_REPLIES: usize = 256;

/// The longest reply that is read, in bytes: a name or a text with what goes before.
const MAX_REPLY: u32 = 2 * 4096;

/// The padding after an export's description (`NO_ZEROES`), in bytes.
const PADDING: usize = 124;

/// The most data that a command takes if the server says nothing or more, in bytes.
pub(super) const MAX_PAYLOAD: u32 = 32 << 20;

/// The largest smallest block (proto.md, "Size constraints"), in bytes.
const MAX_MINIMUM: u32 = 64 << 10;

/// How much of a text of the server is shown, in characters.
const SHOWN: usize = 200;

/// Why a server did not let us in.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// It does not speak in time.
    #[error("the server did not answer within {} s", TIME.as_secs())]
    TimedOut,
    /// It hangs up where an answer is due.
    #[error("the server closed the connection during the handshake")]
    Closed,
    /// It hangs up on an export's name, which is an old server's way to say no.
    #[error("the server closed the connection: it has no export '{export}', or wants TLS for it")]
    ClosedOnName {
        /// The export.
        export: String,
    },
    /// The connection failed.
    #[error("the connection failed during the handshake")]
    Io {
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("what answers there is no NBD server")]
    NotNbd,
    /// It speaks the oldest dialect.
    #[error("the server speaks the oldstyle protocol only; use one made after 2011")]
    OldStyle,
    /// There is no such export.
    #[error("the server has no export '{export}'{message}")]
    NoExport {
        /// The export.
        export: String,
        /// The server's words, with a colon before them, or nothing.
        message: String,
    },
    /// It insists on TLS.
    #[error("the server demands TLS, which is not built in yet")]
    TlsDemanded,
    /// It refuses for another reason.
    #[error("the server refused with code {code}{message}")]
    Refused {
        /// The code, without the bit that marks errors.
        code: u32,
        /// The server's words, with a colon before them, or nothing.
        message: String,
    },
    /// It breaks the protocol.
    #[error("the server broke the protocol: {what}")]
    Protocol {
        /// How.
        what: &'static str,
    },
}

impl From<io::Error> for HandshakeError {
    fn from(source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::TimedOut => Self::TimedOut,
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset => Self::Closed,
            _ => Self::Io { source },
        }
    }
}

/// What is agreed on about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Export {
    /// Size in bytes; at most `i64::MAX`.
    pub(super) size: u64,
    /// What the server can do.
    pub(super) offers: Offers,
    /// Reads are answered in chunks.
    pub(super) structured: bool,
    /// What offsets and lengths are multiples of, in bytes; a power of two, at most 64 KiB.
    pub(super) minimum: u32,
    /// What is efficient, in bytes; a power of two, not less than `minimum`.
    pub(super) preferred: u32,
    /// The most data in one command, in bytes; a multiple of `minimum`.
    pub(super) maximum: u32,
}

impl Export {
    fn new(size: u64, flags: u16) -> Result<Self, HandshakeError> {
        if i64::try_from(size).is_err() {
            return Err(broken("the export is larger than 2^63 bytes"));
        }
        Ok(Self {
            size,
            offers: Offers(flags),
            structured: false,
            minimum: 1,
            preferred: 4096,
            maximum: MAX_PAYLOAD,
        })
    }
}

fn broken(what: &'static str) -> HandshakeError {
    HandshakeError::Protocol { what }
}

/// Enters the transmission phase of the export of that name.
///
/// # Errors
///
/// [`HandshakeError`]; the connection is of no more use then.
pub(super) fn enter(socket: &Socket, export: &str) -> Result<Export, HandshakeError> {
    enter_until(socket, export, Instant::now() + TIME)
}

fn enter_until(socket: &Socket, name: &str, deadline: Instant) -> Result<Export, HandshakeError> {
    let handshake = Handshake {
        line: Patient { socket, deadline },
        name,
    };
    let flags = handshake.greet()?;
    let padded = flags & NO_ZEROES == 0;
    if flags & FIXED_NEWSTYLE == 0 {
        return handshake.by_name(padded);
    }
    let structured = handshake.structured()?;
    let export = match handshake.go() {
        Ok(Some(export)) => export,
        Ok(None) => handshake.by_name(padded)?,
        Err(error) => {
            handshake.abort(&error);
            return Err(error);
        }
    };
    Ok(Export {
        structured,
        ..export
    })
}

struct Handshake<'a> {
    line: Patient<'a>,
    name: &'a str,
}

/// A reply to an option.
struct Reply {
    kind: u32,
    payload: Vec<u8>,
}

impl Reply {
    /// The server's words, made fit to be shown.
    fn message(&self) -> String {
        let text = String::from_utf8_lossy(&self.payload);
        let text: String = text
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .take(SHOWN)
            .collect();
        match text.trim() {
            "" => String::new(),
            text => format!(": {text}"),
        }
    }
}

impl Handshake<'_> {
    fn u16(&self) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.line.read(&mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn u32(&self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.line.read(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.line.read(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    /// Exchanges greetings; the flags that both sides have.
    fn greet(&self) -> Result<u16, HandshakeError> {
        if self.u64()? != INIT_MAGIC {
            return Err(HandshakeError::NotNbd);
        }
        match self.u64()? {
            OPTION_MAGIC => {}
            OLDSTYLE_MAGIC => return Err(HandshakeError::OldStyle),
            _ => return Err(HandshakeError::NotNbd),
        }
        let flags = self.u16()? & (FIXED_NEWSTYLE | NO_ZEROES);
        self.line.write(&u32::from(flags).to_be_bytes())?;
        Ok(flags)
    }

    fn send(&self, option: u32, data: &[u8]) -> Result<(), HandshakeError> {
        let len = u32::try_from(data.len()).map_err(|_| broken("an option is too long"))?;
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.extend(data);
        Ok(self.line.write(&bytes)?)
    }

    /// Reads one reply to `option`.
    fn reply(&self, option: u32) -> Result<Reply, HandshakeError> {
        if self.u64()? != OPTION_REPLY_MAGIC {
            return Err(broken("a reply to an option begins with other bytes"));
        }
        if self.u32()? != option {
            return Err(broken("a reply to an option that was not sent"));
        }
        let kind = self.u32()?;
        let len = self.u32()?;
        if len > MAX_REPLY {
            return Err(broken("a reply to an option is too long"));
        }
        let mut payload = vec![0; usize::try_from(len).unwrap_or(0)];
        self.line.read(&mut payload)?;
        Ok(Reply { kind, payload })
    }

    /// Asks for structured replies.
    fn structured(&self) -> Result<bool, HandshakeError> {
        self.send(OPT_STRUCTURED_REPLY, &[])?;
        match self.reply(OPT_STRUCTURED_REPLY)?.kind {
            REP_ACK => Ok(true),
            kind if kind & REP_ERROR != 0 => Ok(false),
            _ => Err(broken(
                "the reply about structured replies is of a wrong type",
            )),
        }
    }

    /// Asks for the export; `None` when the server does not know how to be asked so.
    fn go(&self) -> Result<Option<Export>, HandshakeError> {
        let len = u32::try_from(self.name.len()).unwrap_or(u32::MAX);
        let mut data = len.to_be_bytes().to_vec();
        data.extend(self.name.as_bytes());
        data.extend(2_u16.to_be_bytes());
        data.extend(INFO_NAME.to_be_bytes());
        data.extend(INFO_BLOCK_SIZE.to_be_bytes());
        self.send(OPT_GO, &data)?;
        let (mut export, mut sizes) = (None, None);
        for _ in 0..MAX_REPLIES {
            let reply = self.reply(OPT_GO)?;
            match reply.kind {
                REP_INFO => read_info(&reply.payload, &mut export, &mut sizes)?,
                REP_ACK => {
                    let export = export.ok_or(broken("the export's size is missing"))?;
                    return constrain(export, sizes).map(Some);
                }
                REP_ERR_UNSUP => return Ok(None),
                REP_ERR_TLS_REQD => return Err(HandshakeError::TlsDemanded),
                REP_ERR_UNKNOWN => {
                    return Err(HandshakeError::NoExport {
                        export: self.name.to_owned(),
                        message: reply.message(),
                    });
                }
                code if code & REP_ERROR != 0 => {
                    return Err(HandshakeError::Refused {
                        code: code & !REP_ERROR,
                        message: reply.message(),
                    });
                }
                _ => return Err(broken("a reply about the export is of a wrong type")),
            }
        }
        Err(broken("too many replies about the export"))
    }

    /// Enters the export in the way of old servers, which hang up where there is none.
    fn by_name(&self, padded: bool) -> Result<Export, HandshakeError> {
        self.send(OPT_EXPORT_NAME, self.name.as_bytes())?;
        let size = self.u64().map_err(|error| match error.into() {
            HandshakeError::Closed => HandshakeError::ClosedOnName {
                export: self.name.to_owned(),
            },
            other => other,
        })?;
        let export = Export::new(size, self.u16()?)?;
        if padded {
            self.line.read(&mut [0; PADDING])?;
        }
        Ok(export)
    }

    /// Takes leave of a server that has refused, as the protocol asks for ("Termination of the session").
    fn abort(&self, error: &HandshakeError) {
        use HandshakeError::{NoExport, Refused, TlsDemanded};
        if matches!(error, NoExport { .. } | Refused { .. } | TlsDemanded) {
            // It may have hung up already.
            let _ = self.send(OPT_ABORT, &[]);
        }
    }
}

/// Block sizes: minimum, preferred, maximum.
type Sizes = (u32, u32, u32);

/// Reads a piece of information about the export. Unknown ones are passed over.
fn read_info(
    payload: &[u8],
    export: &mut Option<Export>,
    sizes: &mut Option<Sizes>,
) -> Result<(), HandshakeError> {
    let short = || broken("information about the export is of a wrong length");
    let mut reader = Reader(payload);
    match reader.u16().ok_or_else(short)? {
        INFO_EXPORT => {
            let (size, flags) = reader.u64().zip(reader.u16()).ok_or_else(short)?;
            *export = Some(Export::new(size, flags)?);
        }
        INFO_BLOCK_SIZE => {
            let minimum = reader.u32().ok_or_else(short)?;
            let (preferred, maximum) = reader.u32().zip(reader.u32()).ok_or_else(short)?;
            *sizes = Some((minimum, preferred, maximum));
        }
        INFO_NAME => {
            if reader.0.len() > MAX_STRING {
                return Err(short());
            }
            let name = String::from_utf8_lossy(reader.0);
            tracing::debug!(?name, "the NBD server's own name of the export");
            return Ok(());
        }
        _ => return Ok(()),
    }
    if reader.0.is_empty() {
        Ok(())
    } else {
        Err(short())
    }
}

/// Applies the server's block sizes, if it gave any.
fn constrain(export: Export, sizes: Option<Sizes>) -> Result<Export, HandshakeError> {
    let Some((minimum, preferred, maximum)) = sizes else {
        return Ok(export);
    };
    if !minimum.is_power_of_two() || minimum > MAX_MINIMUM {
        return Err(broken(
            "the minimum block size is no power of two up to 65536",
        ));
    }
    let maximum = maximum.min(MAX_PAYLOAD);
    let maximum = maximum - maximum % minimum;
    if maximum < 512 {
        return Err(broken("the maximum block size is below the minimum or 512"));
    }
    // It is only advice.
    let preferred = if preferred.is_power_of_two() {
        preferred.max(minimum)
    } else {
        minimum.max(4096)
    };
    Ok(Export {
        minimum,
        preferred,
        maximum,
        ..export
    })
}

#[cfg(test)]
mod tests;
