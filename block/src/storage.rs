//! Bytes at offsets, blocking: what image formats keep their metadata in.
//!
//! A format does all its metadata I/O, and the slow part of its data I/O, through a
//! [`Storage`]; mapped data goes straight from the engine to the same file. So a test can put
//! a storage below a format that records, cuts off or fails what is written.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use libc::c_int;

use crate::engine::bounce::AlignedBuf;
use crate::file::{HostFile, Kind, forget};
use std::sync::atomic::Ordering;

/// The most bytes that go through a bounce buffer at once.
const BOUNCE: usize = 256 << 10;

/// Bytes at offsets. Every call blocks until it is done; calls from several threads may run at once.
///
/// A write is in the file when the call returns, and on stable storage after a later [`Storage::sync`].
pub(crate) trait Storage: Send + Sync + fmt::Debug {
    /// Fills `buf` from `offset`, with zeros past the end.
    ///
    /// # Errors
    ///
    /// The host's.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf` at `offset`; a regular file grows as needed.
    ///
    /// # Errors
    ///
    /// The host's; part of it may have been written then.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes all completed writes durable.
    ///
    /// # Errors
    ///
    /// The host's, and for ever after the first that lost data.
    fn sync(&self) -> io::Result<()>;

    /// The length in bytes now.
    ///
    /// # Errors
    ///
    /// The host's.
    fn len(&self) -> io::Result<u64>;

    /// Makes a regular file exactly this long; new bytes are zeros. On a device it only checks that there is
    /// room.
    ///
    /// # Errors
    ///
    /// The host's.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes the range read as zeros, as a hole where the host can, else by
    /// writing them. Past the end of a file nothing needs to be done.
    ///
    /// # Errors
    ///
    /// The host's.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The contents of the range are not needed any more: a hole where the host can, else nothing.
    ///
    /// # Errors
    ///
    /// The host's, but never because it is not supported.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Reserves space for the range, past the end of the file too, without changing what it reads as.
    ///
    /// # Errors
    ///
    /// The host's, `Unsupported` among them.
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Whether bytes past the end of the file, once it has grown, are zeros: a regular file's are.
    fn grows_zeroed(&self) -> bool;

    /// How far from `offset` on, at most `max` bytes, it goes on as it begins, and whether that is data; a hole, which reads as zeros,
    /// otherwise. Where the host cannot tell, all is data.
    fn extent(&self, offset: u64, max: u64) -> (u64, bool) {
        let _ = offset;
        (max, true)
    }

    /// What the caller must align direct data I/O to, in bytes; 1 for none.
    fn alignment(&self) -> u32 {
        1
    }

    /// The host file below, for engines that need its descriptor.
    fn host_file(&self) -> Option<&Arc<HostFile>> {
        None
    }
}

/// The storage of a host file or block device.
#[derive(Debug)]
pub(crate) struct FileStorage {
    file: Arc<HostFile>,
    /// Held while an unaligned direct write reads, changes and writes whole blocks.
    patch: Mutex<()>,
}

impl FileStorage {
    /// Storage on an opened file.
    pub(crate) fn new(file: Arc<HostFile>) -> Self {
        Self {
            file,
            patch: Mutex::new(()),
        }
    }

    fn unit(&self) -> u64 {
        u64::from(self.file.abilities().align.offset)
    }

    fn suits(&self, buf: &[u8], offset: u64) -> bool {
        let align = &self.file.abilities().align;
        let memory = align.memory as usize;
        buf.as_ptr().addr().is_multiple_of(memory)
            && (offset | buf.len() as u64).is_multiple_of(self.unit())
    }

    /// Reads until the buffer is full or the file ends; how much that was.
    fn read_some(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self
                .file
                .file()
                .read_at(rest, offset.saturating_add(done as u64))
            {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            // Direct I/O cannot go on from within a block: that was the end of the file.
            if !(done as u64).is_multiple_of(self.unit()) {
                break;
            }
        }
        Ok(done)
    }

    /// The aligned range around a part of `buf`, at most [`BOUNCE`] bytes of it: start, skip, bytes of `buf`, length.
    fn window(&self, offset: u64, left: usize) -> (u64, usize, usize, usize) {
        let unit = self.unit();
        let start = offset - offset % unit;
        let skip = usize::try_from(offset - start).unwrap_or(0);
        let part = left.min(BOUNCE - skip);
        let unit = usize::try_from(unit).unwrap_or(1);
        (start, skip, part, (skip + part).next_multiple_of(unit))
    }

    /// Where the next data or the next hole is from `offset` on; `None` when the host cannot tell or there is
    /// none.
    fn seek(&self, offset: u64, whence: c_int) -> Option<u64> {
        let offset = i64::try_from(offset).ok()?;
        #[expect(unsafe_code, reason = "lseek by descriptor has no safe wrapper")]
        // SAFETY: plain numbers and an open descriptor, whose position nobody uses.
        let found = unsafe { libc::lseek(self.file.as_fd().as_raw_fd(), offset, whence) };
        u64::try_from(found).ok()
    }

    fn allocate(&self, mode: c_int, offset: u64, len: u64) -> io::Result<()> {
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let len = i64::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        loop {
            match fallocate(&self.file, mode, offset, len) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeros = AlignedBuf::new(BOUNCE)?;
        let mut done = 0;
        while done < len {
            let n = (len - done).min(BOUNCE as u64);
            let part = zeros
                .bytes()
                .get(..usize::try_from(n).unwrap_or(BOUNCE))
                .unwrap_or_default();
            self.write_at(part, offset.saturating_add(done))?;
            done += n;
        }
        Ok(())
    }
}

#[expect(unsafe_code, reason = "fallocate has no safe wrapper")]
fn fallocate(file: &HostFile, mode: c_int, offset: i64, len: i64) -> io::Result<()> {
    // SAFETY: plain numbers and an open descriptor.
    let rc = unsafe { libc::fallocate(file.as_fd().as_raw_fd(), mode, offset, len) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY)
    )
}

impl Storage for FileStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if self.suits(buf, offset) {
            let got = self.read_some(buf, offset)?;
            buf.get_mut(got..).unwrap_or_default().fill(0);
            return Ok(());
        }
        let mut bounce = AlignedBuf::new(BOUNCE)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset.saturating_add(done as u64);
            let (start, skip, part, len) = self.window(at, buf.len() - done);
            let room = bounce.bytes_mut().get_mut(..len).unwrap_or_default();
            let got = self.read_some(room, start)?;
            room.get_mut(got..).unwrap_or_default().fill(0);
            if let (Some(to), Some(from)) =
                (buf.get_mut(done..done + part), room.get(skip..skip + part))
            {
                to.copy_from_slice(from);
            }
            done += part;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        crate::testing::step()?;
        if self.suits(buf, offset) {
            return self.file.file().write_all_at(buf, offset);
        }
        let _patching = self.patch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bounce = AlignedBuf::new(BOUNCE)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset.saturating_add(done as u64);
            let (start, skip, part, len) = self.window(at, buf.len() - done);
            let room = bounce.bytes_mut().get_mut(..len).unwrap_or_default();
            if skip != 0 || part != len {
                let got = self.read_some(room, start)?;
                room.get_mut(got..).unwrap_or_default().fill(0);
            }
            if let (Some(from), Some(to)) =
                (buf.get(done..done + part), room.get_mut(skip..skip + part))
            {
                to.copy_from_slice(from);
            }
            self.file.file().write_all_at(room, start)?;
            done += part;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        crate::testing::step()?;
        let abilities = self.file.abilities();
        if abilities.lost.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.file.file().sync_data().inspect_err(|_| {
            if !abilities.direct {
                abilities.lost.store(true, Ordering::Relaxed);
            }
        })
    }

    fn len(&self) -> io::Result<u64> {
        match self.file.abilities().kind {
            Kind::Regular => Ok(self.file.file().metadata()?.len()),
            Kind::Device => Ok(self.file.size()),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        #[cfg(test)]
        crate::testing::step()?;
        match self.file.abilities().kind {
            Kind::Regular => self.file.file().set_len(len),
            Kind::Device if len <= self.file.size() => Ok(()),
            Kind::Device => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        #[cfg(test)]
        crate::testing::step()?;
        let abilities = self.file.abilities();
        let modes = [
            (&abilities.punch, libc::FALLOC_FL_PUNCH_HOLE),
            (&abilities.zero_range, libc::FALLOC_FL_ZERO_RANGE),
        ];
        let len = match abilities.kind {
            Kind::Regular => len.min(self.len()?.saturating_sub(offset)),
            Kind::Device => len,
        };
        if len == 0 {
            return Ok(());
        }
        for (ability, mode) in modes {
            if !ability.load(Ordering::Relaxed) {
                continue;
            }
            match self.allocate(mode | libc::FALLOC_FL_KEEP_SIZE, offset, len) {
                Ok(()) => return Ok(()),
                Err(error) if unsupported(&error) => forget(ability),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(error),
            }
        }
        self.write_zeros(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        #[cfg(test)]
        crate::testing::step()?;
        let abilities = self.file.abilities();
        if len == 0 || !abilities.discard.load(Ordering::Relaxed) {
            return Ok(());
        }
        let done = match abilities.kind {
            Kind::Regular => self.allocate(
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset,
                len,
            ),
            Kind::Device => crate::file::discard_device(self.file.as_fd(), offset, len),
        };
        match done {
            Err(error) if unsupported(&error) => {
                forget(&abilities.discard);
                Ok(())
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        #[cfg(test)]
        crate::testing::step()?;
        match self.file.abilities().kind {
            Kind::Regular => self.allocate(0, offset, len).map_err(|error| {
                if unsupported(&error) {
                    io::ErrorKind::Unsupported.into()
                } else {
                    error
                }
            }),
            Kind::Device => Ok(()),
        }
    }

    fn grows_zeroed(&self) -> bool {
        self.file.abilities().kind == Kind::Regular
    }

    fn extent(&self, offset: u64, max: u64) -> (u64, bool) {
        match self.seek(offset, libc::SEEK_DATA) {
            Some(start) if start > offset => (max.min(start - offset), false),
            Some(_) => {
                let end = self.seek(offset, libc::SEEK_HOLE).unwrap_or(u64::MAX);
                (end.saturating_sub(offset).max(1).min(max), true)
            }
            // No data up to the end, if the host can tell holes at all.
            None => (max, self.seek(0, libc::SEEK_HOLE).is_none()),
        }
    }

    fn alignment(&self) -> u32 {
        self.file.abilities().align.offset
    }

    fn host_file(&self) -> Option<&Arc<HostFile>> {
        Some(&self.file)
    }
}
