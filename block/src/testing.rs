//! What this crate's tests share: an opener without policy, memory to do I/O
//! in, and a queue driven one request at a time.

use std::cell::UnsafeCell;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use crate::{
    Access, Address, Buffers, Completed, Connector, IoQueue, IoVec, Op, Opener, Request, Token,
};

/// Opens whatever the system lets it.
pub(crate) struct AnyPath;

impl Opener for AnyPath {
    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        let direct = if access.direct { libc::O_DIRECT } else { 0 };
        OpenOptions::new()
            .read(true)
            .write(access.write)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | direct)
            .open(path)
    }

    fn connector(&self, address: &Address) -> io::Result<Box<dyn Connector>> {
        Ok(Box::new(Anywhere(address.clone())))
    }
}

#[derive(Debug)]
struct Anywhere(Address);

impl Connector for Anywhere {
    fn connect(&self) -> io::Result<OwnedFd> {
        match &self.0 {
            Address::Unix(path) => UnixStream::connect(path).map(OwnedFd::from),
            Address::Tcp { host, port } => {
                TcpStream::connect((host.as_str(), *port)).map(OwnedFd::from)
            }
        }
    }
}

/// Memory for requests, shared with the kernel; page-aligned.
pub(crate) struct Arena {
    pages: Box<[Page]>,
}

#[repr(C, align(4096))]
struct Page(UnsafeCell<[u8; 4096]>);

#[expect(unsafe_code, reason = "the tests share it with the kernel")]
// SAFETY: it is reached by raw addresses only, by one party at a time.
unsafe impl Sync for Page {}

impl Arena {
    pub(crate) fn new(len: usize) -> Arc<Self> {
        let pages = (0..len.div_ceil(4096)).map(|_| Page(UnsafeCell::new([0; 4096])));
        Arc::new(Self {
            pages: pages.collect(),
        })
    }

    fn base(&self) -> *mut u8 {
        self.pages.as_ptr().cast_mut().cast()
    }

    /// Pieces of this memory as (offset, length).
    #[expect(unsafe_code, reason = "makes buffers of raw memory")]
    pub(crate) fn buffers(self: &Arc<Self>, pieces: &[(usize, usize)]) -> Buffers {
        let pieces: Vec<IoVec> = pieces
            .iter()
            .map(|&(offset, len)| {
                assert!(offset + len <= self.pages.len() * 4096);
                IoVec {
                    base: self.base().wrapping_add(offset),
                    len,
                }
            })
            .collect();
        // SAFETY: within this arena, which the Arc keeps.
        unsafe { Buffers::from_slice(&pieces, Arc::clone(self) as _) }
    }

    #[expect(unsafe_code, reason = "copies into raw memory")]
    pub(crate) fn put(&self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= self.pages.len() * 4096);
        // SAFETY: within the arena, as just checked; nobody else uses it now.
        unsafe {
            std::ptr::copy_nonoverlapping(data.as_ptr(), self.base().add(offset), data.len());
        }
    }

    #[expect(unsafe_code, reason = "copies out of raw memory")]
    pub(crate) fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.pages.len() * 4096);
        let mut data = vec![0; len];
        // SAFETY: within the arena, as just checked; nobody else uses it now.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base().add(offset), data.as_mut_ptr(), len);
        }
        data
    }
}

/// A request.
pub(crate) fn request(token: Token, op: Op, offset: u64, buffers: Buffers) -> Request {
    Request {
        token,
        op,
        offset,
        buffers,
    }
}

/// Waits until `count` requests have ended; each as (token, result, bytes).
pub(crate) fn finish(queue: &mut dyn IoQueue, count: usize) -> Vec<(Token, io::Result<()>, u64)> {
    let mut ended = Vec::new();
    let mut out = Vec::new();
    while ended.len() < count {
        queue.wait(None, &mut out).unwrap();
        for completed in out.drain(..) {
            match completed {
                Completed::Request {
                    token,
                    result,
                    bytes,
                } => ended.push((token, result, bytes)),
                Completed::Watch(watch) => panic!("{watch:?} is not watched"),
            }
        }
    }
    assert_eq!(ended.len(), count, "more completions than requests");
    ended
}

/// Does one request to its end.
pub(crate) fn perform(
    queue: &mut dyn IoQueue,
    op: Op,
    offset: u64,
    buffers: Buffers,
) -> io::Result<()> {
    assert_eq!(queue.in_flight(), 0);
    queue.push(request(7, op, offset, buffers));
    assert_eq!(queue.in_flight(), 1);
    let (token, result, _) = finish(queue, 1).remove(0);
    assert_eq!((token, queue.in_flight()), (7, 0));
    result
}
