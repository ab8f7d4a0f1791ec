//! NBD servers that do not do what a disk needs of them.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use crate::support::LIMIT;

const INIT: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_UNSUPPORTED: u32 = 1 << 31 | 1;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISCONNECT: u16 = 2;

/// How large its export is, in bytes.
const SIZE: u64 = 64 << 20;

/// A server at a unix socket.
pub struct Server {
    directory: tempfile::TempDir,
    arrivals: Receiver<UnixStream>,
}

impl Server {
    /// One that lets clients in and says nothing.
    pub fn silent() -> Self {
        Self::start(|stream, arrived| {
            let _ = arrived.send(stream);
        })
    }

    /// One that answers everything but writes.
    pub fn stuck() -> Self {
        Self::start(|stream, arrived| {
            // The client has gone.
            let _ = serve(stream, arrived);
        })
    }

    fn start(serve: impl Fn(UnixStream, &Sender<UnixStream>) + Copy + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("nbd")).unwrap();
        let (arrived, arrivals) = channel();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, arrived) = (stream.unwrap(), arrived.clone());
                thread::spawn(move || serve(stream, &arrived));
            }
        });
        Self {
            directory,
            arrivals,
        }
    }

    /// What a disk is to be given as its path.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd")
    }

    /// Waits until somebody waits for an answer that will not come, and gives the connection.
    pub fn holds(&self) -> UnixStream {
        let stream = self.arrivals.recv_timeout(LIMIT).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }
}

/// Waits until the client has closed its connection.
pub fn await_end(mut stream: &UnixStream) {
    let mut rest = [0; 4096];
    while !matches!(stream.read(&mut rest), Ok(0)) {}
}

fn serve(stream: UnixStream, arrived: &Sender<UnixStream>) -> io::Result<()> {
    shake_hands(&stream)?;
    loop {
        let mut request = [0; 28];
        (&stream).read_exact(&mut request)?;
        let kind = u16::from_be_bytes([request[6], request[7]]);
        let len = u32::from_be_bytes(request[24..].try_into().unwrap());
        match kind {
            CMD_WRITE => {
                // Its data stay where they are.
                let _ = arrived.send(stream);
                return Ok(());
            }
            CMD_DISCONNECT => return Ok(()),
            _ => {
                let mut reply = SIMPLE_REPLY.to_be_bytes().to_vec();
                reply.extend([0; 4]);
                reply.extend(&request[8..16]);
                if kind == CMD_READ {
                    reply.resize(reply.len() + usize::try_from(len).unwrap(), 0);
                }
                (&stream).write_all(&reply)?;
            }
        }
    }
}

fn shake_hands(mut stream: &UnixStream) -> io::Result<()> {
    stream.write_all(INIT)?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let option = u32::from_be_bytes(head[8..12].try_into().unwrap());
        let len = u32::from_be_bytes(head[12..].try_into().unwrap());
        stream.read_exact(&mut vec![0; usize::try_from(len).unwrap()])?;
        let mut reply = |kind: u32, data: &[u8]| {
            let mut all = OPTION_REPLY.to_be_bytes().to_vec();
            all.extend(option.to_be_bytes());
            all.extend(kind.to_be_bytes());
            all.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
            all.extend(data);
            stream.write_all(&all)
        };
        if option != OPT_GO {
            reply(REP_UNSUPPORTED, &[])?;
            continue;
        }
        let mut export = vec![0, 0];
        export.extend(SIZE.to_be_bytes());
        // It has flags, and takes flushes.
        export.extend([0, 1 | 4]);
        reply(REP_INFO, &export)?;
        return reply(REP_ACK, &[]);
    }
}
