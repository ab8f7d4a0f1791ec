//! What this crate's tests share: an opener without policy, memory to do I/O
//! in, and a queue driven one request at a time.

use std::cell::{Cell, UnsafeCell};
use std::fs::{File, OpenOptions};
use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::storage::Storage;
use crate::{
    Access, Address, Buffers, Completed, Connector, IoQueue, IoVec, Op, Opener, Request, Token,
};

thread_local! {
    /// After how many more steps of this thread the monitor is killed, if it is.
    static LEFT: Cell<Option<i64>> = const { Cell::new(None) };
}

/// From so many steps of this thread on all fail, as if the monitor had been killed: it changes files no more. How many were left is given,
/// which is less than nothing where steps have failed. With `None` it lives.
pub(crate) fn killed_after(steps: Option<i64>) -> Option<i64> {
    LEFT.replace(steps)
}

/// What changes a file or its name is a step.
pub(crate) fn step() -> io::Result<()> {
    let left = LEFT.get().map(|left| left.saturating_sub(1));
    LEFT.set(left);
    match left {
        Some(..0) => Err(io::Error::from_raw_os_error(libc::EIO)),
        _ => Ok(()),
    }
}

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

    fn create(&self, path: &Path, _: Access) -> io::Result<File> {
        step()?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).open(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        step()?;
        std::fs::hard_link(from, to)?;
        step()?;
        std::fs::remove_file(from)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        step()?;
        std::fs::remove_file(path)
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

/// A call of a [`Scripted`] storage; ranges are offsets and lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Read(u64, usize),
    Write(u64, usize),
    Sync,
    Zero(u64, u64),
    Discard(u64, u64),
}

/// What comes before every call: it may wait, and make the call fail with an error number.
pub(crate) type Script = Box<dyn Fn(Call) -> Option<i32> + Send + Sync>;

/// A storage in memory, without a descriptor, that does what a test says.
pub(crate) struct Scripted {
    bytes: Mutex<Vec<u8>>,
    calls: Mutex<Vec<Call>>,
    script: Script,
    unit: u32,
}

impl std::fmt::Debug for Scripted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scripted")
    }
}

impl Scripted {
    /// Of these bytes, which demands offsets and lengths that are multiples of `unit`.
    pub(crate) fn new(bytes: Vec<u8>, unit: u32, script: Script) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            calls: Mutex::default(),
            script,
            unit,
        })
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    fn called<T>(&self, call: Call, act: impl FnOnce(&mut Vec<u8>) -> T) -> io::Result<T> {
        if let Call::Read(at, len) | Call::Write(at, len) = call {
            assert!(
                (at | len as u64).is_multiple_of(self.unit.into()),
                "{call:?}"
            );
        }
        self.calls.lock().unwrap().push(call);
        match (self.script)(call) {
            Some(code) => Err(io::Error::from_raw_os_error(code)),
            None => Ok(act(&mut self
                .bytes
                .lock()
                .unwrap_or_else(PoisonError::into_inner))),
        }
    }
}

/// Overwrites bytes, which grow as needed.
fn overwrite(bytes: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let start = usize::try_from(offset).unwrap();
    let end = start + data.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[start..end].copy_from_slice(data);
}

impl Storage for Scripted {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.called(Call::Read(offset, buf.len()), |bytes| {
            let start = usize::try_from(offset).unwrap().min(bytes.len());
            let held = (bytes.len() - start).min(buf.len());
            buf[..held].copy_from_slice(&bytes[start..start + held]);
            buf[held..].fill(0);
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.called(Call::Write(offset, buf.len()), |bytes| {
            overwrite(bytes, offset, buf);
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.called(Call::Sync, |_| ())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes().len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut bytes = self.bytes.lock().unwrap();
        bytes.resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.called(Call::Zero(offset, len), |bytes| {
            let held = (bytes.len() as u64).saturating_sub(offset).min(len);
            overwrite(bytes, offset, &vec![0; usize::try_from(held).unwrap()]);
        })
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.called(Call::Discard(offset, len), |_| ())
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        // At once: a write may make it longer at any time.
        let mut bytes = self.bytes.lock().unwrap();
        let end = usize::try_from(offset + len).unwrap().max(bytes.len());
        bytes.resize(end, 0);
        Ok(())
    }

    fn grows_zeroed(&self) -> bool {
        true
    }

    fn alignment(&self) -> u32 {
        self.unit
    }
}
