//! Servers that run in the test: what they say is up to it.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use super::super::wire::{
    CHUNK_DATA, CHUNK_DONE, CHUNK_MAGIC, CHUNK_NONE, INFO_BLOCK_SIZE, INFO_EXPORT, INIT_MAGIC,
    OPT_GO, OPT_STRUCTURED_REPLY, OPTION_MAGIC, OPTION_REPLY_MAGIC, REP_ACK, REP_ERR_UNSUP,
    REP_INFO, REQUEST_LEN, SIMPLE_MAGIC,
};
use crate::{Access, Address, Connector, NbdDisk, Opener};

pub(in crate::nbd) const READ_ONLY: u16 = 1 << 1;
pub(in crate::nbd) const FLUSH: u16 = 1 << 2;
pub(in crate::nbd) const FUA: u16 = 1 << 3;
pub(in crate::nbd) const TRIM: u16 = 1 << 5;
pub(in crate::nbd) const ZEROES: u16 = 1 << 6;
pub(in crate::nbd) const MULTI_CONN: u16 = 1 << 8;

type Script = Arc<dyn Fn(UnixStream) -> io::Result<()> + Send + Sync>;

/// An opener for which every address leads to a script.
#[derive(Clone)]
pub(in crate::nbd) struct Fake(Script);

impl Fake {
    /// Each connection runs the script in a thread. It ends with an error when the client
    /// hangs up, which is no matter.
    pub(in crate::nbd) fn new(
        script: impl Fn(UnixStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(script))
    }

    /// Opens an export of this server, stated to be raw.
    pub(in crate::nbd) fn disk(
        &self,
        options: crate::DiskOptions,
    ) -> Result<NbdDisk, super::super::NbdError> {
        let options = crate::DiskOptions {
            format: Some(crate::Format::Raw),
            ..options
        };
        NbdDisk::open(Path::new("nbd://fake/x"), self, &options)
    }
}

impl fmt::Debug for Fake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fake")
    }
}

impl Opener for Fake {
    fn open(&self, _path: &Path, _access: Access) -> io::Result<std::fs::File> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn connector(&self, _address: &Address) -> io::Result<Box<dyn Connector>> {
        Ok(Box::new(self.clone()))
    }
}

impl Connector for Fake {
    fn connect(&self) -> io::Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair()?;
        let script = Arc::clone(&self.0);
        thread::spawn(move || script(theirs));
        Ok(ours.into())
    }
}

/// Bytes one after the other, big-endian numbers among them.
#[derive(Clone, Debug, Default)]
pub(in crate::nbd) struct Bytes(pub(in crate::nbd) Vec<u8>);

impl Bytes {
    pub(in crate::nbd) fn u16(mut self, number: u16) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    pub(in crate::nbd) fn u32(mut self, number: u32) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    pub(in crate::nbd) fn u64(mut self, number: u64) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    pub(in crate::nbd) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

/// The greeting of a server with these handshake flags.
pub(in crate::nbd) fn greeting(flags: u16) -> Bytes {
    Bytes::default()
        .u64(INIT_MAGIC)
        .u64(OPTION_MAGIC)
        .u16(flags)
}

/// A reply to an option.
pub(in crate::nbd) fn option_reply(option: u32, kind: u32, payload: &[u8]) -> Bytes {
    Bytes::default()
        .u64(OPTION_REPLY_MAGIC)
        .u32(option)
        .u32(kind)
        .u32(payload.len().try_into().unwrap())
        .raw(payload)
}

/// The information about an export's size and flags.
pub(in crate::nbd) fn export_info(size: u64, flags: u16) -> Bytes {
    let info = Bytes::default().u16(INFO_EXPORT).u64(size).u16(flags);
    option_reply(OPT_GO, REP_INFO, &info.0)
}

/// The information about block sizes.
pub(in crate::nbd) fn size_info(minimum: u32, preferred: u32, maximum: u32) -> Bytes {
    let info = Bytes::default()
        .u16(INFO_BLOCK_SIZE)
        .u32(minimum)
        .u32(preferred)
        .u32(maximum);
    option_reply(OPT_GO, REP_INFO, &info.0)
}

/// Reads an option of the client: its number and data.
pub(in crate::nbd) fn read_option(stream: &mut UnixStream) -> io::Result<(u32, Vec<u8>)> {
    let mut header = [0; 16];
    stream.read_exact(&mut header)?;
    assert_eq!(header[..8], OPTION_MAGIC.to_be_bytes());
    let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
    let mut data = vec![0; number(12) as usize];
    stream.read_exact(&mut data)?;
    Ok((number(8), data))
}

/// What a server is like that keeps to the protocol.
#[derive(Clone, Debug)]
pub(in crate::nbd) struct Manners {
    pub(in crate::nbd) size: u64,
    pub(in crate::nbd) flags: u16,
    pub(in crate::nbd) structured: bool,
    pub(in crate::nbd) blocks: Option<(u32, u32, u32)>,
}

impl Default for Manners {
    fn default() -> Self {
        Self {
            size: 1 << 20,
            flags: 1 | FLUSH,
            structured: true,
            blocks: None,
        }
    }
}

impl Manners {
    /// The whole handshake.
    pub(in crate::nbd) fn welcome(&self, stream: &mut UnixStream) -> io::Result<()> {
        stream.write_all(&greeting(3).0)?;
        stream.read_exact(&mut [0; 4])?;
        let (option, _) = read_option(stream)?;
        assert_eq!(option, OPT_STRUCTURED_REPLY);
        let kind = if self.structured {
            REP_ACK
        } else {
            REP_ERR_UNSUP
        };
        stream.write_all(&option_reply(option, kind, &[]).0)?;
        let (option, _) = read_option(stream)?;
        assert_eq!(option, OPT_GO);
        let mut bytes = export_info(self.size, self.flags);
        if let Some((minimum, preferred, maximum)) = self.blocks {
            bytes = bytes.raw(&size_info(minimum, preferred, maximum).0);
        }
        stream.write_all(&bytes.raw(&option_reply(OPT_GO, REP_ACK, &[]).0).0)
    }
}

/// A request as a server reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::nbd) struct Asked {
    pub(in crate::nbd) flags: u16,
    pub(in crate::nbd) kind: u16,
    pub(in crate::nbd) cookie: u64,
    pub(in crate::nbd) offset: u64,
    pub(in crate::nbd) len: u32,
}

pub(in crate::nbd) const READ: u16 = 0;
pub(in crate::nbd) const WRITE: u16 = 1;
pub(in crate::nbd) const DISC: u16 = 2;
pub(in crate::nbd) const FLUSH_CMD: u16 = 3;
pub(in crate::nbd) const TRIM_CMD: u16 = 4;
pub(in crate::nbd) const ZERO_CMD: u16 = 6;

/// Reads a request without its data.
pub(in crate::nbd) fn read_request(stream: &mut UnixStream) -> io::Result<Asked> {
    let mut bytes = [0; REQUEST_LEN];
    stream.read_exact(&mut bytes)?;
    let mut reader = super::super::wire::Reader(&bytes[4..]);
    Ok(Asked {
        flags: reader.u16().unwrap(),
        kind: reader.u16().unwrap(),
        cookie: reader.u64().unwrap(),
        offset: reader.u64().unwrap(),
        len: reader.u32().unwrap(),
    })
}

/// A simple reply.
pub(in crate::nbd) fn simple(error: u32, cookie: u64) -> Bytes {
    Bytes::default().u32(SIMPLE_MAGIC).u32(error).u64(cookie)
}

/// The header of a chunk.
pub(in crate::nbd) fn chunk(flags: u16, kind: u16, cookie: u64, len: u32) -> Bytes {
    let bytes = Bytes::default().u32(CHUNK_MAGIC).u16(flags).u16(kind);
    bytes.u64(cookie).u32(len)
}

/// A server that does what it is asked for and writes it down; some requests it answers with an error.
#[derive(Clone)]
pub(in crate::nbd) struct Honest {
    pub(in crate::nbd) manners: Manners,
    pub(in crate::nbd) bytes: Arc<Mutex<Vec<u8>>>,
    pub(in crate::nbd) asked: Arc<Mutex<Vec<Asked>>>,
    /// The error for a kind of request.
    pub(in crate::nbd) refuse: Arc<Mutex<Vec<(u16, u32)>>>,
}

impl Honest {
    pub(in crate::nbd) fn new(manners: Manners) -> Self {
        let size = usize::try_from(manners.size).unwrap();
        Self {
            manners,
            bytes: Arc::new(Mutex::new(vec![0xaa; size])),
            asked: Arc::default(),
            refuse: Arc::default(),
        }
    }

    /// An opener that leads to it.
    pub(in crate::nbd) fn opener(&self) -> Fake {
        let server = self.clone();
        Fake::new(move |mut stream| server.serve(&mut stream))
    }

    /// What it has been asked for since the last call: kind, flags, offset, length.
    pub(in crate::nbd) fn take(&self) -> Vec<(u16, u16, u64, u32)> {
        let asked = std::mem::take(&mut *self.asked.lock().unwrap());
        let brief = asked.iter().map(|a| (a.kind, a.flags, a.offset, a.len));
        brief.collect()
    }

    pub(in crate::nbd) fn serve(&self, stream: &mut UnixStream) -> io::Result<()> {
        self.manners.welcome(stream)?;
        loop {
            let asked = read_request(stream)?;
            if asked.kind != DISC {
                self.asked.lock().unwrap().push(asked.clone());
            }
            let refused = self
                .refuse
                .lock()
                .unwrap()
                .iter()
                .find_map(|(kind, error)| (*kind == asked.kind).then_some(*error));
            let from = usize::try_from(asked.offset).unwrap();
            let range = from..from + asked.len as usize;
            let mut data = vec![0; range.len()];
            match asked.kind {
                DISC => return Ok(()),
                WRITE => stream.read_exact(&mut data)?,
                _ => {}
            }
            let mut bytes = self.bytes.lock().unwrap();
            let reply = match (asked.kind, refused) {
                (READ, Some(error)) if self.manners.structured => {
                    chunk(CHUNK_DONE, 0x8001, asked.cookie, 6).u32(error).u16(0)
                }
                (_, Some(error)) => simple(error, asked.cookie),
                (READ, None) => self.answer(&asked, &bytes[range]),
                (WRITE | ZERO_CMD, None) => {
                    bytes[range].copy_from_slice(&data);
                    simple(0, asked.cookie)
                }
                (_, None) => simple(0, asked.cookie),
            };
            drop(bytes);
            stream.write_all(&reply.0)?;
        }
    }

    /// The answer to a read: in two chunks, the later part first, where chunks are agreed on.
    fn answer(&self, asked: &Asked, data: &[u8]) -> Bytes {
        if !self.manners.structured {
            return simple(0, asked.cookie).raw(data);
        }
        let (first, second) = data.split_at(data.len() / 2);
        let len = |part: &[u8]| u32::try_from(part.len() + 8).unwrap();
        chunk(0, CHUNK_DATA, asked.cookie, len(second))
            .u64(asked.offset + first.len() as u64)
            .raw(second)
            .raw(&chunk(0, CHUNK_DATA, asked.cookie, len(first)).0)
            .u64(asked.offset)
            .raw(first)
            .raw(&chunk(CHUNK_DONE, CHUNK_NONE, asked.cookie, 0).0)
    }
}
