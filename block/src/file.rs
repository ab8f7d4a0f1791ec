//! An opened host file or block device, and what the host says about it.
//!
//! The engines see a [`HostFile`] as a descriptor plus [`Abilities`]. They know
//! nothing of disks or formats.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::disk::ResizeError;
use crate::engine::bounce::AlignedBuf;
use crate::lease::Lease;
use crate::lock::{self, Intent};
use crate::track::Tracks;

/// `BLKGETSIZE64`, `_IOR(0x12, 114, size_t)` of `linux/fs.h`: a device's size in bytes.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// `BLKDISCARD`, `_IO(0x12, 119)` of `linux/fs.h`: discards a byte range of a device.
const BLKDISCARD: libc::c_ulong = 0x1277;

/// The largest alignment that is tried or believed, in bytes.
const MAX_ALIGN: u32 = 64 << 10;

/// What kind of thing was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file.
    Regular,
    /// A block device.
    Device,
}

/// What O_DIRECT demands of a request, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of each piece's address.
    pub memory: u32,
    /// Of the offset and of each piece's length.
    pub offset: u32,
}

impl Alignment {
    /// The alignment of buffered I/O: none.
    pub(crate) const NONE: Self = Self {
        memory: 1,
        offset: 1,
    };
}

/// What the host can do with a file, as learnt so far. Shared by all queues.
#[derive(Debug)]
pub(crate) struct Abilities {
    /// File or device.
    pub kind: Kind,
    /// What direct I/O demands; [`Alignment::NONE`] for buffered I/O.
    pub align: Alignment,
    /// Bypasses the page cache.
    pub direct: bool,
    /// Holes can be punched.
    pub punch: AtomicBool,
    /// Ranges can be zeroed without writing.
    pub zero_range: AtomicBool,
    /// Ranges can be discarded.
    pub discard: AtomicBool,
    /// Where the file ends, in bytes, if the disk goes on past that: what is read there is zeros.
    pub end: Option<u64>,
    /// A flush has failed: the page cache may have dropped data that it could not write, and
    /// the host reports that once only. Later flushes must not claim success.
    pub lost: AtomicBool,
}

impl Abilities {
    /// The hopes for a fresh file.
    pub(crate) fn new(kind: Kind, direct: bool, align: Alignment) -> Self {
        Self {
            kind,
            align,
            direct,
            punch: AtomicBool::new(true),
            zero_range: AtomicBool::new(true),
            discard: AtomicBool::new(true),
            end: None,
            lost: AtomicBool::new(false),
        }
    }

    /// Whether buffers of these pieces can go to the host as they are.
    pub(crate) fn accepts(&self, pieces: &[crate::IoVec]) -> bool {
        let memory = self.align.memory as usize;
        let offset = self.align.offset as usize;
        pieces
            .iter()
            .all(|p| p.base.addr().is_multiple_of(memory) && p.len.is_multiple_of(offset))
    }
}

/// An opened file with its facts; unlocks when dropped.
#[derive(Debug)]
pub(crate) struct HostFile {
    file: File,
    /// What it was opened as, for messages.
    name: PathBuf,
    size: AtomicU64,
    /// Held by who changes the size.
    sizing: Mutex<()>,
    physical: u32,
    logical: u32,
    abilities: Abilities,
    /// The bitmaps of the raw disk that it is, if it is one.
    tracks: Tracks,
    /// Given up after the locks.
    lease: Option<Box<dyn Lease>>,
    /// What others are kept from by its locks, if it has any.
    held: Mutex<Option<Intent>>,
}

impl HostFile {
    /// Looks at an opened file. `direct` says whether it was opened with `O_DIRECT`.
    ///
    /// The caller has made sure that it is of `kind`.
    pub(crate) fn new(file: File, kind: Kind, direct: bool) -> io::Result<Self> {
        let (size, sector, physical) = match kind {
            Kind::Regular => {
                let meta = file.metadata()?;
                let physical = u32::try_from(meta.blksize()).unwrap_or(4096);
                (meta.len(), 512, physical)
            }
            Kind::Device => (
                device_size(&file)?,
                device_number(&file, libc::BLKSSZGET)?,
                device_number(&file, libc::BLKPBSZGET)?,
            ),
        };
        let align = if direct {
            alignment(&file, kind, sector)?
        } else {
            Alignment::NONE
        };
        let sector = plausible(sector).unwrap_or(512);
        let logical = sector.max(align.offset).max(512);
        Ok(Self {
            file,
            name: PathBuf::new(),
            size: AtomicU64::new(size),
            sizing: Mutex::default(),
            physical: plausible(physical).unwrap_or(4096).max(logical),
            logical,
            abilities: Abilities::new(kind, direct, align),
            tracks: Tracks::default(),
            lease: None,
            held: Mutex::default(),
        })
    }

    /// It was opened as this.
    pub(crate) fn named(&mut self, name: &Path) {
        self.name = name.to_owned();
    }

    /// What it was opened as; empty where nobody has said that.
    pub(crate) fn name(&self) -> &Path {
        &self.name
    }

    /// Keeps the lease under which the file was opened as long as the file is open.
    pub(crate) fn hold(&mut self, lease: Option<Box<dyn Lease>>) {
        self.lease = lease;
    }

    /// The opened file has the locks for this.
    pub(crate) fn locked(&self, intent: Intent) {
        *self.held() = Some(intent);
    }

    fn held(&self) -> MutexGuard<'_, Option<Intent>> {
        // It is written whole.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What its locks are for; `None` where it has none.
    pub(crate) fn intent(&self) -> Option<Intent> {
        *self.held()
    }

    /// Whether a program has given a lease of it.
    pub(crate) fn is_leased(&self) -> bool {
        self.lease.is_some()
    }

    /// Gives up all its locks.
    pub(crate) fn give_up(&self) {
        let mut held = self.held();
        lock::release(&self.file);
        *held = None;
    }

    /// Takes the locks for `intent`, of which it has none.
    pub(crate) fn take(&self, intent: Intent) -> Result<(), lock::LockError> {
        let mut held = self.held();
        lock::acquire(&self.file, intent)?;
        *held = Some(intent);
        Ok(())
    }

    /// Lets other readers in, and writers still not. It is not written from now on.
    pub(crate) fn keep_reading(&self) {
        let mut held = self.held();
        lock::keep_reading(&self.file);
        *held = held.map(|_| Intent::Read);
    }

    /// Takes the locks of a writer for this file, of which `reader` is another opening with those of a reader.
    pub(crate) fn begin_writing(&self, reader: &Self) -> Result<(), lock::LockError> {
        lock::begin_writing(&reader.file, &self.file)?;
        self.locked(Intent::Write);
        Ok(())
    }

    /// Whether another one is the same file or device.
    pub(crate) fn is_same(&self, other: &Self) -> io::Result<bool> {
        let [a, b] = [self.file.metadata()?, other.file.metadata()?];
        Ok(match self.abilities.kind {
            Kind::Regular => (a.dev(), a.ino()) == (b.dev(), b.ino()),
            Kind::Device => a.rdev() == b.rdev(),
        })
    }

    /// The opened file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The size in bytes when it was opened, with the zeros past the end of the file if there are any, or when it
    /// was last [grown](HostFile::grow).
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Makes a regular file `size` bytes long, at least; reads a device's size again, which must be enough.
    pub(crate) fn grow(&self, size: u64) -> io::Result<()> {
        let _sizing = self.sizing.lock().unwrap_or_else(PoisonError::into_inner);
        let from = self.size();
        if size < from {
            return Err(ResizeError::Shrink { from, to: size }.into());
        }
        let now = match self.abilities.kind {
            Kind::Regular => {
                // Whoever made it longer has bytes there.
                if self.file.metadata()?.len() < size {
                    self.file.set_len(size)?;
                }
                size
            }
            Kind::Device => match device_size(&self.file)? {
                held if held < size => return Err(ResizeError::Device { size, held }.into()),
                held => held,
            },
        };
        self.size.store(now, Ordering::Release);
        Ok(())
    }

    /// Has reads go on past the end of the file, with zeros, to a whole number of `unit` bytes. For a file
    /// that is only read.
    pub(crate) fn pad_to(&mut self, unit: u64) {
        let held = *self.size.get_mut();
        if let Some(size) = held.checked_next_multiple_of(unit)
            && size != held
        {
            self.abilities.end = Some(held);
            *self.size.get_mut() = size;
        }
    }

    /// The smallest unit that can be written, in bytes.
    pub(crate) fn logical_block(&self) -> u32 {
        self.logical
    }

    /// The unit that is efficient, in bytes.
    pub(crate) fn physical_block(&self) -> u32 {
        self.physical
    }

    /// What can be done with it.
    pub(crate) fn abilities(&self) -> &Abilities {
        &self.abilities
    }

    /// The bitmaps of the raw disk that it is. Only that disk's queues record in them.
    pub(crate) fn tracks(&self) -> &Tracks {
        &self.tracks
    }

    /// Reads the first bytes into a buffer that suits direct I/O; fewer than
    /// asked for at the end of the file.
    pub(crate) fn head(&self, len: usize) -> io::Result<Vec<u8>> {
        let mut buf = AlignedBuf::new(len.next_multiple_of(MAX_ALIGN as usize))?;
        let got = self.file.read_at(buf.bytes_mut(), 0)?;
        Ok(buf.bytes_mut().iter().take(got.min(len)).copied().collect())
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for HostFile {
    fn drop(&mut self) {
        lock::release(&self.file);
    }
}

/// Which kind of file this is; the name of what it is instead when it cannot hold a disk.
pub(crate) fn kind(file: &File) -> io::Result<Result<Kind, &'static str>> {
    let kind = file.metadata()?.file_type();
    Ok(if kind.is_file() {
        Ok(Kind::Regular)
    } else if kind.is_block_device() {
        Ok(Kind::Device)
    } else if kind.is_dir() {
        Err("a directory")
    } else if kind.is_fifo() {
        Err("a named pipe")
    } else if kind.is_char_device() {
        Err("a character device")
    } else if kind.is_socket() {
        Err("a socket")
    } else {
        Err("neither a regular file nor a block device")
    })
}

/// Takes `O_NONBLOCK` off: with it io_uring would refuse to wait for the medium.
#[expect(unsafe_code, reason = "fcntl has no safe wrapper")]
pub(crate) fn make_blocking(file: &File) -> io::Result<()> {
    // SAFETY: both commands take and give plain integers.
    unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        if flags < 0 || libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) < 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Discards `len` bytes at `offset` of a block device.
#[expect(unsafe_code, reason = "an ioctl has no safe wrapper")]
pub(crate) fn discard_device(device: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64 at the given address, which `range` is.
    let rc = unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD as _, range.as_ptr()) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[expect(unsafe_code, reason = "an ioctl has no safe wrapper")]
fn device_size(file: &File) -> io::Result<u64> {
    let mut size = 0_u64;
    // SAFETY: BLKGETSIZE64 writes one u64 at the given address.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64 as _, &raw mut size) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(size)
}

/// An ioctl that gives one number (`BLKSSZGET`, `BLKPBSZGET`).
#[expect(unsafe_code, reason = "an ioctl has no safe wrapper")]
fn device_number(file: &File, request: libc::Ioctl) -> io::Result<u32> {
    let mut number: libc::c_uint = 0;
    // SAFETY: the two requests used write one int at the given address.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut number) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(number)
}

/// A block size worth believing: a power of two within reason.
fn plausible(size: u32) -> Option<u32> {
    (size.is_power_of_two() && (512..=MAX_ALIGN).contains(&size)).then_some(size)
}

/// What direct I/O demands: asked of the kernel (statx, 6.1 and later), then
/// of the device, then found out by trying.
fn alignment(file: &File, kind: Kind, sector: u32) -> io::Result<Alignment> {
    if let Some((memory, offset)) = statx_alignment(file)
        && let Some(offset) = plausible(offset)
        && memory.is_power_of_two()
        && memory <= MAX_ALIGN
    {
        return Ok(Alignment { memory, offset });
    }
    if kind == Kind::Device {
        let offset = plausible(sector).unwrap_or(512);
        return Ok(Alignment {
            memory: offset,
            offset,
        });
    }
    probe_alignment(file)
}

#[expect(unsafe_code, reason = "statx has no safe wrapper")]
fn statx_alignment(file: &File) -> Option<(u32, u32)> {
    // SAFETY: all bytes zero are a valid `statx`; it is plain data.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string, the result has the right type
    // and outlives the call.
    let rc = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut found,
        )
    };
    (rc == 0 && found.stx_mask & libc::STATX_DIOALIGN != 0 && found.stx_dio_offset_align != 0)
        .then_some((found.stx_dio_mem_align, found.stx_dio_offset_align))
}

/// Reads from the start with growing alignment until the host agrees.
fn probe_alignment(file: &File) -> io::Result<Alignment> {
    let mut offset = 512;
    let mut buf = AlignedBuf::new(MAX_ALIGN as usize)?;
    while offset < 4096 {
        let room = buf
            .bytes_mut()
            .get_mut(..offset as usize)
            .unwrap_or_default();
        match file.read_at(room, 0) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => offset *= 2,
            Err(e) => return Err(e),
            Ok(_) => break,
        }
    }
    // The read was from well aligned memory, so its demand is not known: be careful.
    Ok(Alignment {
        memory: 4096,
        offset,
    })
}

/// Remembers that the host cannot do something.
pub(crate) fn forget(ability: &AtomicBool) {
    ability.store(false, Ordering::Relaxed);
}
