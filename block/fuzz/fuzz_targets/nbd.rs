//! Any bytes as what a server of NBD says: every request ends, and nothing is written beside its memory.
//!
//! The first byte of an input says how much of a handshake that keeps to the protocol comes before the rest.
#![no_main]

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use block::{
    Access, Address, Buffers, Completed, Connector, Disk, DiskOptions, IoVec, NbdDisk, Op, Opener,
    Request,
};
use libfuzzer_sys::fuzz_target;

const URI: &str = "nbd+unix:///e?socket=/s";
/// The place of a read, its length, and what is around its memory.
const AT: u64 = 4096;
const LEN: usize = 1024;
const MARGIN: usize = 512;

/// Everything that a server says, at once.
#[derive(Clone, Debug)]
struct Says(Arc<[u8]>);

impl Connector for Says {
    fn connect(&self) -> io::Result<OwnedFd> {
        let (ours, mut theirs) = UnixStream::pair()?;
        let bytes = Arc::clone(&self.0);
        // It hears all that it is asked, so that the client never waits for it to.
        thread::spawn(move || {
            let _ = theirs.write_all(&bytes);
            let _ = theirs.shutdown(Shutdown::Write);
            let _ = io::copy(&mut theirs.take(1 << 20), &mut io::sink());
        });
        Ok(ours.into())
    }
}

impl Opener for Says {
    fn open(&self, _: &Path, _: Access) -> io::Result<File> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn connector(&self, _: &Address) -> io::Result<Box<dyn Connector>> {
        Ok(Box::new(self.clone()))
    }
}

/// A reply to an option.
fn reply(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short");
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    for number in [option, kind, length] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// What a server says that keeps to the protocol, up to where requests are answered.
fn handshake(structured: bool) -> [Vec<u8>; 3] {
    let mut greeting = b"NBDMAGICIHAVEOPT".to_vec();
    greeting.extend(3_u16.to_be_bytes());
    let answer = if structured { 1 } else { 1 << 31 | 1 };
    let mut export = 0_u16.to_be_bytes().to_vec();
    export.extend((1_u64 << 20).to_be_bytes());
    // Flushes, trims and zeroes, and more than one connection.
    export.extend(0x16d_u16.to_be_bytes());
    let go = [reply(7, 3, &export), reply(7, 1, &[])].concat();
    [greeting, reply(8, answer, &[]), go]
}

/// Memory of one read, with a margin that nobody may write to.
struct Memory(Mutex<Vec<u8>>);

fn request(token: u64, op: Op, memory: &Arc<Memory>) -> Request {
    let buffers = if op == Op::Flush {
        Buffers::none()
    } else {
        let mut bytes = memory.0.lock().expect("nobody panics");
        let piece = IoVec {
            base: bytes[MARGIN..].as_mut_ptr(),
            len: LEN,
        };
        // SAFETY: the bytes are the owner's, which lives as long as the buffers, and never move: the vector is not changed.
        unsafe { Buffers::new(vec![piece], Arc::clone(memory) as _) }
    };
    Request {
        token,
        op,
        offset: if op == Op::Flush { 0 } else { AT },
        buffers,
    }
}

fn run(says: Says) -> Option<()> {
    let disk = NbdDisk::open(Path::new(URI), &says, &DiskOptions::default()).ok()?;
    let memory = Arc::new(Memory(Mutex::new(vec![0xee; LEN + 2 * MARGIN])));
    let mut queue = disk.queue(4).ok()?;
    for (token, op) in [(1, Op::Read), (2, Op::Flush), (3, Op::Read)] {
        queue.push(request(token, op, &memory));
    }
    queue.submit();
    let (mut out, mut ended) = (Vec::new(), 0);
    while ended < 3 {
        queue.wait(None, &mut out).ok()?;
        let requests = |done: &Completed| matches!(done, Completed::Request { .. });
        ended += out.drain(..).filter(|done| requests(done)).count();
    }
    drop(queue);
    let bytes = memory.0.lock().expect("nobody panics");
    let margins = bytes[..MARGIN].iter().chain(&bytes[MARGIN + LEN..]);
    assert!(margins.copied().all(|byte| byte == 0xee));
    Some(())
}

fuzz_target!(|input: &[u8]| {
    let [how, rest @ ..] = input else {
        return;
    };
    let parts = handshake(how & 4 != 0);
    let mut bytes: Vec<u8> = parts[..usize::from(how & 3)].concat();
    bytes.extend(rest);
    run(Says(bytes.into()));
});
