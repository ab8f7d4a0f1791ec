//! The protocol's numbers and the layout of its fixed messages (proto.md, "Values" and
//! "Transmission"). All integers are big-endian.

use std::io;

/// The port of a server whose URI names none.
pub(super) const PORT: u16 = 10809;

/// The most bytes of a name or a text (proto.md, "Conventions").
pub(super) const MAX_STRING: usize = 4096;

/// First word of the greeting: `NBDMAGIC`.
pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of the newstyle greeting, and first of each option: `IHAVEOPT`.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Second word of the oldstyle greeting.
pub(super) const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First word of each reply to an option.
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flag, of both sides: options may be refused one by one.
pub(super) const FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag, of both sides: no padding after the reply to an export's name.
pub(super) const NO_ZEROES: u16 = 1 << 1;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
/// The bit that all refusals have.
pub(super) const REP_ERROR: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUP: u32 = REP_ERROR + 1;
pub(super) const REP_ERR_TLS_REQD: u32 = REP_ERROR + 5;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_ERROR + 6;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_NAME: u16 = 1;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// First word of a request.
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply.
pub(super) const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// First word of a chunk of a structured reply.
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// The length of a request without its data, in bytes.
pub(super) const REQUEST_LEN: usize = 28;
/// The length of a simple reply without its data, in bytes.
pub(super) const SIMPLE_LEN: usize = 16;
/// The length of a chunk without its payload, in bytes.
pub(super) const CHUNK_LEN: usize = 20;

/// Command flag: done only when it is on stable storage.
pub(super) const CMD_FUA: u16 = 1 << 0;
/// Command flag: zeros that have space of their own.
pub(super) const CMD_NO_HOLE: u16 = 1 << 1;

/// Chunk flag: the last of its reply.
pub(super) const CHUNK_DONE: u16 = 1 << 0;

pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_DATA: u16 = 1;
pub(super) const CHUNK_HOLE: u16 = 2;
/// The bit that all chunks have that report an error.
pub(super) const CHUNK_ERROR_BIT: u16 = 1 << 15;
pub(super) const CHUNK_ERROR: u16 = CHUNK_ERROR_BIT + 1;
pub(super) const CHUNK_ERROR_OFFSET: u16 = CHUNK_ERROR_BIT + 2;

/// The server is going away.
pub(super) const ESHUTDOWN: u32 = 108;

/// What a server offers for an export: its transmission flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Offers(pub(super) u16);

impl Offers {
    /// Writes are refused.
    pub(super) fn read_only(self) -> bool {
        self.has(1)
    }

    /// Flushes can be sent.
    pub(super) fn flush(self) -> bool {
        self.has(2)
    }

    /// [`CMD_FUA`] can be sent.
    pub(super) fn fua(self) -> bool {
        self.has(3)
    }

    /// Ranges can be trimmed.
    pub(super) fn trim(self) -> bool {
        self.has(5)
    }

    /// Ranges can be zeroed without sending zeros.
    pub(super) fn zeroes(self) -> bool {
        self.has(6)
    }

    /// A flush on one connection covers the writes of all.
    pub(super) fn multi_conn(self) -> bool {
        self.has(8)
    }

    /// A zeroing that would be slow can be refused. Nothing here prefers a refusal, so this is only told.
    pub(super) fn fast_zero(self) -> bool {
        self.has(11)
    }

    /// Without bit 0 the others mean nothing.
    fn has(self, bit: u16) -> bool {
        let wanted = 1 | 1 << bit;
        self.0 & wanted == wanted
    }
}

/// What a server can be asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Trim,
    Zeroes,
}

impl Kind {
    fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Zeroes => 6,
        }
    }
}

/// A request's header.
pub(super) fn request(
    kind: Kind,
    flags: u16,
    cookie: u64,
    offset: u64,
    len: u32,
) -> [u8; REQUEST_LEN] {
    encode(kind.number(), flags, cookie, offset, len)
}

/// The request that ends a connection; there is no reply.
pub(super) fn disconnect() -> [u8; REQUEST_LEN] {
    encode(2, 0, 0, 0, 0)
}

fn encode(number: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST_LEN] {
    let mut bytes = [0; REQUEST_LEN];
    let fields = REQUEST_MAGIC
        .to_be_bytes()
        .into_iter()
        .chain(flags.to_be_bytes())
        .chain(number.to_be_bytes())
        .chain(cookie.to_be_bytes())
        .chain(offset.to_be_bytes())
        .chain(len.to_be_bytes());
    for (to, from) in bytes.iter_mut().zip(fields) {
        *to = from;
    }
    bytes
}

/// Takes big-endian numbers off the front of some bytes. What is not there is `None`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl Reader<'_> {
    pub(super) fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (now, later) = self.0.split_first_chunk::<N>()?;
        self.0 = later;
        Some(*now)
    }
}

/// What an error number of the protocol means (proto.md, "Error values"). One that it does not define counts as an
/// invalid argument, as it demands.
pub(super) fn error(number: u32) -> io::Error {
    io::Error::from_raw_os_error(match number {
        1 => libc::EPERM,
        5 => libc::EIO,
        12 => libc::ENOMEM,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::EOPNOTSUPP,
        ESHUTDOWN => libc::ESHUTDOWN,
        _ => libc::EINVAL,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_laid_out_as_specified() {
        let bytes = request(
            Kind::Zeroes,
            CMD_NO_HOLE,
            0x0102_0304_0506_0708,
            0x1000,
            0x200,
        );
        assert_eq!(
            bytes,
            [
                0x25, 0x60, 0x95, 0x13, 0, 2, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10,
                0, 0, 0, 2, 0
            ]
        );
        assert_eq!(disconnect()[4..8], [0, 0, 0, 2]);
        assert_eq!(INIT_MAGIC.to_be_bytes(), *b"NBDMAGIC");
        assert_eq!(OPTION_MAGIC.to_be_bytes(), *b"IHAVEOPT");
    }

    #[test]
    fn offers_mean_nothing_without_the_bit_that_says_so() {
        let all = Offers(u16::MAX);
        assert!(all.read_only() && all.flush() && all.fua() && all.trim() && all.zeroes());
        assert!(all.multi_conn() && all.fast_zero());
        let none = Offers(u16::MAX - 1);
        assert!(!none.read_only() && !none.flush() && !none.multi_conn());
        assert!(Offers(1 | 1 << 2).flush() && !Offers(1 | 1 << 2).fua());
    }

    #[test]
    fn numbers_are_taken_in_order_and_not_past_the_end() {
        let mut reader = Reader(&[0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 9]);
        assert_eq!(
            (reader.u16(), reader.u32(), reader.u64()),
            (Some(1), Some(2), Some(3))
        );
        assert_eq!((reader.u16(), reader.0), (None, &[9][..]));
    }

    #[test]
    fn undefined_errors_are_invalid_arguments() {
        assert_eq!(error(28).raw_os_error(), Some(libc::ENOSPC));
        assert_eq!(error(95).kind(), io::ErrorKind::Unsupported);
        for number in [0, 2, 22, 4096, u32::MAX] {
            assert_eq!(error(number).raw_os_error(), Some(libc::EINVAL));
        }
    }
}
