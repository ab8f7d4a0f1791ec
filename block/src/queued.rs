//! An image whose reads and writes go through a queue, as those of a machine do: so that what a machine uses can
//! be scripted and compared.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::buffers::Buffers;
use crate::disk::{Completed, Disk, IoQueue, Op, Request};
use crate::engine::bounce::AlignedBuf;
use crate::image::{Extent, Image};
use crate::open::{ImageOptions, Opened, open_chain, unusable};
use crate::opener::Opener;
use crate::options::Format;
use crate::qcow2::Qcow2;
use crate::qcow2::disk::Qcow2Disk;
use crate::raw::{OpenError, RawDisk, RawImage};
use crate::storage::FileStorage;

/// How many requests are at the host at once.
const DEPTH: u32 = 16;

/// How large a part of a request is, in bytes: several are sent at once.
const PART: usize = 256 << 10;

/// An image behind a queue.
struct Queued {
    /// The same file, or the same opened qcow2 image, for what a queue does not do.
    image: Arc<dyn Image>,
    size: u64,
    /// What offsets and lengths are multiples of, in bytes.
    unit: u64,
    queue: Mutex<Box<dyn IoQueue>>,
}

impl std::fmt::Debug for Queued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queued")
            .field("image", &self.image)
            .finish_non_exhaustive()
    }
}

/// Opens an image for operations that go through a queue with the engine of `options.disk.aio`. Such an image takes
/// requests of whole logical blocks only (`EINVAL` otherwise) and keeps its size.
///
/// # Errors
///
/// [`OpenError`]; nothing is left open or locked then.
pub fn open_queued(
    path: &Path,
    opener: &dyn Opener,
    options: &ImageOptions,
) -> Result<Arc<dyn Image>, OpenError> {
    let (image, disk): (Arc<dyn Image>, Box<dyn Disk>) =
        if options.disk.format == Some(Format::Qcow2) {
            let Opened::Qcow2(image) = open_chain(path, opener, options)? else {
                return Err(unusable(path, "qcow2", "it is raw"));
            };
            let disk = Qcow2Disk::new(Arc::clone(&image), &options.disk)
                .map_err(|error| unusable(path, "qcow2", error))?;
            (image, Box::new(disk))
        } else {
            let disk = RawDisk::open(path, opener, &options.disk)?;
            let storage = Arc::new(FileStorage::new(disk.file()));
            let size = disk.info().size;
            let sync = !options.disk.cache.ignores_flush();
            let image = RawImage::new(storage, size, options.disk.read_only, sync);
            (Arc::new(image), Box::new(disk))
        };
    let queue = disk
        .queue(DEPTH)
        .map_err(|error| unusable(path, options.disk.format.map_or("raw", Format::name), error))?;
    let info = disk.info();
    Ok(Arc::new(Queued {
        image,
        size: info.size,
        unit: info.logical_block.into(),
        queue: Mutex::new(queue),
    }))
}

impl Queued {
    fn lock(&self) -> MutexGuard<'_, Box<dyn IoQueue>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        if !(offset | len).is_multiple_of(self.unit) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Sends requests and waits until all have ended; the first error.
    fn send(&self, requests: Vec<Request>) -> io::Result<()> {
        let mut queue = self.lock();
        requests.into_iter().for_each(|request| queue.push(request));
        let (mut first, mut completed) = (Ok(()), Vec::new());
        while queue.in_flight() > 0 {
            queue.wait(None, &mut completed)?;
            for event in completed.drain(..) {
                if let Completed::Request { result, .. } = event {
                    first = first.and(result);
                }
            }
        }
        first
    }

    fn send_one(&self, op: Op, offset: u64) -> io::Result<()> {
        self.send(vec![Request {
            token: 0,
            op,
            offset,
            buffers: Buffers::none(),
        }])
    }

    /// Moves `memory` in several requests, and gives it back.
    fn transfer(
        &self,
        op: Op,
        offset: u64,
        memory: AlignedBuf,
        len: usize,
    ) -> io::Result<AlignedBuf> {
        let memory = Arc::new(Mutex::new(memory));
        let whole = memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .piece(len);
        let mut requests = Vec::new();
        let mut done = 0;
        while done < len {
            let piece = crate::IoVec {
                base: whole.base.wrapping_add(done),
                len: PART.min(len - done),
            };
            #[expect(unsafe_code, reason = "the memory is named by its address")]
            // SAFETY: the piece lies within the memory, which lives as long as its owner; nobody refers to it
            // until all requests have ended.
            let buffers = unsafe { Buffers::from_slice(&[piece], memory.clone()) };
            requests.push(Request {
                token: done as u64,
                op,
                offset: offset + done as u64,
                buffers,
            });
            done += piece.len;
        }
        self.send(requests)?;
        let memory = Arc::into_inner(memory)
            .ok_or_else(|| io::Error::other("a request is still under way"))?;
        Ok(memory.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Image for Queued {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.image.read_only()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        let memory = AlignedBuf::new(buf.len())?;
        let mut memory = self.transfer(Op::Read, offset, memory, buf.len())?;
        let len = buf.len();
        buf.copy_from_slice(memory.bytes_mut().get(..len).unwrap_or_default());
        Ok(())
    }

    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        let mut memory = AlignedBuf::new(buf.len())?;
        if let Some(room) = memory.bytes_mut().get_mut(..buf.len()) {
            room.copy_from_slice(buf);
        }
        self.transfer(Op::Write, offset, memory, buf.len())
            .map(|_| ())
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.check(offset, len)?;
        self.send_one(Op::WriteZeroes { len, may_unmap }, offset)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        self.send_one(Op::Discard { len }, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.send_one(Op::Flush, 0)
    }

    fn extent(&self, offset: u64, max: u64) -> io::Result<Extent> {
        self.image.extent(offset, max)
    }

    fn backing(&self) -> Option<&dyn Image> {
        self.image.backing()
    }

    fn as_qcow2(&self) -> Option<&Qcow2> {
        self.image.as_qcow2()
    }
}
