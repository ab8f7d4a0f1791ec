//! An export as bytes at offsets: what an image format can live on.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use crate::opener::Opener;
use crate::options::DiskOptions;
use crate::storage::Storage;

use super::blocking;
use super::handshake::Export;
use super::link::{Link, LinkError};
use super::session::{NbdError, Session, Subject};
use super::wire::{CMD_FUA, Kind};

/// The most connections, where the server allows several.
const MAX_LINKS: usize = 4;

/// How much of a partial block is changed at a time, in bytes; a multiple of every minimum block.
const PATCH: usize = 256 << 10;

/// The export of an NBD server. It never grows.
///
/// Calls from several threads run at once as far as the server allows several connections.
#[derive(Debug)]
pub(crate) struct NbdStorage {
    session: Session,
    subject: Subject,
    export: Export,
    read_only: bool,
    /// The first is there from the start, the others come when they are needed.
    links: [Mutex<Option<Link>>; MAX_LINKS],
    /// Held while an unaligned write reads, changes and writes whole blocks.
    patch: Mutex<()>,
    zeroes: AtomicBool,
    trims: AtomicBool,
    /// A flush or a connection has failed: what was written before may be lost.
    lost: AtomicBool,
}

impl NbdStorage {
    /// Connects to the server of the export at `uri`.
    ///
    /// Of `options` only `read_only` has a meaning here; what the cache modes say is up to who flushes.
    ///
    /// # Errors
    ///
    /// [`NbdError`].
    pub(crate) fn open(
        uri: &Path,
        opener: &dyn Opener,
        options: &DiskOptions,
    ) -> Result<Self, NbdError> {
        let session = Session::new(uri, opener)?;
        let (link, export) = session.dial()?;
        if export.offers.read_only() && !options.read_only {
            return Err(NbdError::ReadOnly { uri: session.uri() });
        }
        let mut first = Some(link);
        Ok(Self {
            subject: Subject::new(session.uri()),
            read_only: options.read_only,
            links: std::array::from_fn(|_| Mutex::new(first.take())),
            patch: Mutex::new(()),
            zeroes: AtomicBool::new(export.offers.zeroes()),
            trims: AtomicBool::new(export.offers.trim()),
            lost: AtomicBool::new(false),
            session,
            export,
        })
    }

    /// Runs `work` on a connection that is free, or comes free first.
    fn with<T>(&self, work: impl FnOnce(&mut Link) -> io::Result<T>) -> io::Result<T> {
        let mut place = self.free_link();
        let link = match &mut *place {
            Some(link) => link,
            empty => empty.insert(
                self.session
                    .dial_again(&self.export)
                    .map_err(io::Error::other)?,
            ),
        };
        work(link)
    }

    fn free_link(&self) -> MutexGuard<'_, Option<Link>> {
        let usable = if self.export.offers.multi_conn() {
            MAX_LINKS
        } else {
            1
        };
        for link in self.links.iter().take(usable) {
            match link.try_lock() {
                Ok(guard) => return guard,
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {}
            }
        }
        let [first, ..] = &self.links;
        first.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, error: &LinkError) {
        self.lost.store(true, Ordering::Relaxed);
        self.subject.report(error);
    }

    fn unit(&self) -> u64 {
        u64::from(self.export.minimum)
    }

    /// How much of the export can be reached, in bytes.
    fn size(&self) -> u64 {
        self.export.size - self.export.size % self.unit()
    }

    /// The most bytes in one command.
    fn limit(&self) -> usize {
        usize::try_from(self.export.maximum).unwrap_or(PATCH)
    }

    /// The range of whole blocks around a part of `left` bytes at `offset`, up to [`PATCH`] bytes: start, skip, bytes
    /// of the part, length.
    fn window(&self, offset: u64, left: usize) -> (u64, usize, usize, usize) {
        let unit = self.unit();
        let start = offset - offset % unit;
        let skip = usize::try_from(offset - start).unwrap_or(0);
        let part = left.min(PATCH.min(self.limit()).saturating_sub(skip));
        let unit = usize::try_from(unit).unwrap_or(1);
        (start, skip, part, (skip + part).next_multiple_of(unit))
    }

    fn suits(&self, offset: u64, len: u64) -> bool {
        (offset | len).is_multiple_of(self.unit())
    }

    /// Reads whole blocks.
    fn read_blocks(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for part in buf.chunks_mut(self.limit()) {
            self.with(|link| blocking::read(link, at, part, &|error| self.note(error)))?;
            at = at.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    /// Writes whole blocks.
    fn write_blocks(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for part in buf.chunks(self.limit()) {
            let flags = self.durable();
            self.with(|link| blocking::write(link, flags, at, part, &|error| self.note(error)))?;
            at = at.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    /// Without flushes, durable writes are the only way to keep what [`Storage::sync`] promises.
    fn durable(&self) -> u16 {
        if !self.export.offers.flush() && self.export.offers.fua() {
            CMD_FUA
        } else {
            0
        }
    }

    /// Reads at most one [`NbdStorage::window`] of bytes that are all within the export.
    fn read_part(&self, room: &mut [u8], buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let (start, skip, part, len) = self.window(offset, buf.len());
        let room = room.get_mut(..len).unwrap_or_default();
        self.read_blocks(room, start)?;
        if let (Some(to), Some(from)) = (buf.get_mut(..part), room.get(skip..skip + part)) {
            to.copy_from_slice(from);
        }
        Ok(part)
    }

    /// Whether a range can be changed.
    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        if len > 0 && offset.checked_add(len).is_none_or(|end| end > self.size()) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        Ok(())
    }

    /// Zeroes or trims whole blocks.
    fn command(&self, kind: Kind, offset: u64, len: u64) -> io::Result<()> {
        let mut at = offset;
        let end = offset.saturating_add(len);
        let flags = match kind {
            Kind::Zeroes => self.durable(),
            _ => 0,
        };
        while at < end {
            let part = u32::try_from(end - at)
                .unwrap_or(u32::MAX)
                .min(self.export.maximum);
            let command = blocking::plain(kind, flags, at, part);
            self.with(|link| blocking::perform(link, command, &|error| self.note(error)))?;
            at = at.saturating_add(u64::from(part));
        }
        Ok(())
    }

    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeros = vec![0; PATCH];
        let mut done = 0;
        while done < len {
            let part = usize::try_from(len - done).unwrap_or(PATCH).min(PATCH);
            self.write_at(
                zeros.get(..part).unwrap_or_default(),
                offset.saturating_add(done),
            )?;
            done += part as u64;
        }
        Ok(())
    }

    /// The whole blocks within a range.
    fn inner(&self, offset: u64, len: u64) -> (u64, u64) {
        let unit = self.unit();
        let end = offset.saturating_add(len).min(self.size());
        let first = offset.div_ceil(unit).saturating_mul(unit);
        (first, (end - end % unit).saturating_sub(first))
    }
}

impl Storage for NbdStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let there = self.size().saturating_sub(offset).min(buf.len() as u64);
        let there = usize::try_from(there).unwrap_or(usize::MAX);
        let (mut rest, past) = buf.split_at_mut_checked(there).unwrap_or_default();
        past.fill(0);
        if self.suits(offset, there as u64) {
            return self.read_blocks(rest, offset);
        }
        let mut room = vec![0; PATCH];
        let mut at = offset;
        while !rest.is_empty() {
            let part = self.read_part(&mut room, rest, at)?;
            rest = rest.get_mut(part..).unwrap_or_default();
            at = at.saturating_add(part as u64);
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        if self.suits(offset, buf.len() as u64) {
            return self.write_blocks(buf, offset);
        }
        let _patching = self.patch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut room = vec![0; PATCH];
        let (mut rest, mut at) = (buf, offset);
        while !rest.is_empty() {
            let (start, skip, part, len) = self.window(at, rest.len());
            let room = room.get_mut(..len).unwrap_or_default();
            self.read_blocks(room, start)?;
            let (now, later) = rest.split_at_checked(part).unwrap_or_default();
            if let Some(to) = room.get_mut(skip..skip + part) {
                to.copy_from_slice(now);
            }
            self.write_blocks(room, start)?;
            rest = later;
            at = at.saturating_add(part as u64);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if self.lost.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        if self.read_only || !self.export.offers.flush() {
            return Ok(());
        }
        let flush = blocking::plain(Kind::Flush, 0, 0, 0);
        self.with(|link| blocking::perform(link, flush, &|error| self.note(error)))
            .inspect_err(|_| self.lost.store(true, Ordering::Relaxed))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len <= self.size() {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        }
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let len = len.min(self.size().saturating_sub(offset));
        self.check(offset, len)?;
        let (first, whole) = self.inner(offset, len);
        if whole == 0 || !self.zeroes.load(Ordering::Relaxed) {
            return self.write_zeros(offset, len);
        }
        match self.command(Kind::Zeroes, first, whole) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.zeroes.store(false, Ordering::Relaxed);
                return self.write_zeros(offset, len);
            }
            Err(error) => return Err(error),
        }
        let end = first.saturating_add(whole);
        self.write_zeros(offset, first - offset)?;
        self.write_zeros(end, offset.saturating_add(len) - end)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let len = len.min(self.size().saturating_sub(offset));
        self.check(offset, len)?;
        let (first, whole) = self.inner(offset, len);
        if whole == 0 || !self.trims.load(Ordering::Relaxed) {
            return Ok(());
        }
        match self.command(Kind::Trim, first, whole) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.trims.store(false, Ordering::Relaxed);
                Ok(())
            }
            other => other,
        }
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        // The protocol has no such command that leaves the contents alone.
        self.check(offset, len)?;
        Err(io::ErrorKind::Unsupported.into())
    }

    fn grows_zeroed(&self) -> bool {
        false
    }

    fn alignment(&self) -> u32 {
        self.export.minimum
    }
}
