//! An opened qcow2 image, and its blocking reads and writes.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};

use vmm_sys_util::eventfd::EventFd;

use super::checkpoint::Gate;
use super::compress;
use super::debt::Debt;
use super::entry::Compressed;
use super::epoch::Pins;
use super::geometry::Geometry;
use super::header::{Compression, Header};
use super::map::{Kind, Range};
use super::meta::{Meta, Shared, eio};
use super::write::{Asked, Copy, Plan, Refusal};
use super::zero::{Clear, Cleared};
use crate::image::{Extent, Image, Kept};
use crate::raw::RawImage;
use crate::storage::Storage;

/// The most bytes that one plan is made for.
pub(crate) const CHUNK: u64 = 2 << 20;

/// How often a lock is tried before somebody else does the work.
const SPINS: u32 = 64;

/// How an image is to be used.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Refuse changes.
    pub read_only: bool,
    /// A flush reaches stable storage.
    pub sync: bool,
    /// Freed clusters become holes.
    pub punch: bool,
    /// How many bytes of tables are kept in memory.
    pub cache: usize,
}

/// What lies below an image.
#[derive(Debug)]
pub(crate) enum Backing {
    /// Another qcow2 image.
    Qcow2(Arc<Qcow2>),
    /// A file whose bytes are the disk's.
    Raw(RawBacking),
}

/// A raw backing file.
#[derive(Debug)]
pub(crate) struct RawBacking {
    /// As an image.
    pub image: Box<RawImage>,
    /// Its bytes.
    pub storage: Arc<dyn Storage>,
    /// Its size in bytes.
    pub size: u64,
}

impl Backing {
    /// As an image.
    pub(crate) fn image(&self) -> &dyn Image {
        match self {
            Self::Qcow2(image) => &**image,
            Self::Raw(raw) => &*raw.image,
        }
    }
}

/// An opened qcow2 image with its backing chain.
#[derive(Debug)]
pub struct Qcow2 {
    meta: Mutex<Meta>,
    /// Clusters that were in flight are not any more.
    released: Condvar,
    pub(super) shared: Arc<Shared>,
    geometry: Geometry,
    compression: Compression,
    size: AtomicU64,
    pub(super) read_only: AtomicBool,
    raw_data: bool,
    pub(super) storage: Arc<dyn Storage>,
    data: Arc<dyn Storage>,
    backing: Option<Backing>,
    settings: Settings,
    gate: Gate,
    /// Held while the size changes.
    pub(super) resizing: Mutex<()>,
    /// Whether the file takes clearly less space than it is long.
    pub(super) sparse: OnceLock<bool>,
    pub(super) debt: Debt,
}

impl Qcow2 {
    /// Opens the image in `storage`; its header has been loaded and judged by the caller, who has
    /// also opened what it names.
    ///
    /// # Errors
    ///
    /// The host's, when the tables cannot be read.
    pub(crate) fn open(
        header: Header,
        storage: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
        backing: Option<Backing>,
        settings: Settings,
    ) -> io::Result<Self> {
        let geometry = header.geometry();
        let (size, compression) = (header.size, header.compression);
        let raw_data = header.has_raw_data_file();
        let meta = Meta::load(
            header,
            Arc::clone(&storage),
            settings.read_only,
            settings.cache,
        )?;
        Ok(Self {
            shared: Arc::clone(&meta.shared),
            meta: Mutex::new(meta),
            released: Condvar::new(),
            geometry,
            compression,
            size: AtomicU64::new(size),
            read_only: settings.read_only.into(),
            raw_data,
            data: data.unwrap_or_else(|| Arc::clone(&storage)),
            storage,
            backing,
            settings,
            gate: Gate::default(),
            resizing: Mutex::default(),
            sparse: OnceLock::new(),
            debt: Debt::default(),
        })
    }

    /// The sizes that its tables depend on.
    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// What may be looked at without the lock.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// How its clusters are compressed.
    pub(crate) fn compression(&self) -> Compression {
        self.compression
    }

    /// What lies below.
    pub(crate) fn below(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Where its data is.
    pub(crate) fn data(&self) -> &dyn Storage {
        &*self.data
    }

    /// Whether the data file's bytes are the disk's, whatever the tables say.
    pub(crate) fn has_raw_data(&self) -> bool {
        self.raw_data
    }

    /// Where its tables are.
    pub(crate) fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Whether freed clusters become holes.
    pub(crate) fn punches(&self) -> bool {
        self.settings.punch
    }

    /// The disk's size in bytes.
    pub(crate) fn disk_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Changes the disk's size as queues see it; the header is the caller's.
    pub(crate) fn set_disk_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    /// The files that [`super::map::Piece::File`] names, by index: where the data of each image of the
    /// chain is, this one first.
    pub(crate) fn files(&self) -> Vec<Arc<dyn Storage>> {
        let mut files = vec![Arc::clone(&self.data)];
        match &self.backing {
            None => {}
            Some(Backing::Qcow2(next)) => files.extend(next.files()),
            Some(Backing::Raw(raw)) => files.push(Arc::clone(&raw.storage)),
        }
        files
    }

    /// Takes part in the image's epochs.
    pub(crate) fn pins(&self) -> ChainPins {
        let mut pins = vec![self.shared.epochs.join()];
        let mut below = self.below();
        while let Some(Backing::Qcow2(next)) = below {
            pins.push(next.shared.epochs.join());
            below = next.below();
        }
        ChainPins(pins)
    }

    /// One past the highest byte of the file that was ever allocated.
    #[must_use]
    pub fn high_water(&self) -> u64 {
        self.shared.high_water.load(Ordering::Relaxed)
    }

    /// Whether a flush has more to do than to sync the file with the data.
    pub(crate) fn is_dirty(&self) -> bool {
        self.shared.dirty.load(Ordering::Acquire) || self.debt.is_due()
    }

    /// Whether it was found corrupt, so that nothing may be written.
    pub(crate) fn is_corrupt(&self) -> bool {
        self.shared.corrupt.load(Ordering::Acquire)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock, if it is free within some instants.
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, Meta>> {
        for _ in 0..SPINS {
            match self.meta.try_lock() {
                Ok(meta) => return Some(meta),
                Err(TryLockError::Poisoned(poison)) => return Some(poison.into_inner()),
                Err(TryLockError::WouldBlock) => std::hint::spin_loop(),
            }
        }
        None
    }

    /// How many bytes of the disk one page of an L2 table maps, as a power of two.
    pub(crate) fn slice_bits(&self) -> u32 {
        let page = self.geometry.cluster().min(super::pages::MAX_PAGE);
        self.geometry.cluster_bits + (page / self.geometry.entry_size()).trailing_zeros()
    }

    /// The mask of an entry's number within its page.
    pub(crate) fn slice_mask(&self) -> u64 {
        (1 << (self.slice_bits() - self.geometry.cluster_bits)) - 1
    }

    /// Makes data durable, and whatever else has been written to the files.
    pub(crate) fn sync_data(&self) -> io::Result<()> {
        if !self.settings.sync {
            return Ok(());
        }
        if self.geometry.data_file {
            self.data.sync()?;
        }
        self.storage.sync()
    }

    /// Makes written tables durable.
    pub(crate) fn sync_tables(&self) -> io::Result<()> {
        if self.settings.sync {
            self.storage.sync()
        } else {
            Ok(())
        }
    }

    /// Refuses ranges that are not within the disk.
    pub(crate) fn check_range(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.disk_size() => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// How far the backing file hides behind this image, in bytes.
    pub(crate) fn backing_size(&self) -> u64 {
        self.backing.as_ref().map_or(0, |b| b.image().size())
    }

    fn asked(&self, offset: u64, len: u64, quick: bool) -> Asked {
        Asked {
            offset,
            len,
            backing: self.backing_size(),
            quick,
        }
    }

    /// Plans a write without waiting for anything. When another write is in the way, `waiter` is
    /// written to once that has ended.
    pub(crate) fn plan_quick(
        &self,
        offset: u64,
        len: u64,
        waiter: &Arc<EventFd>,
    ) -> Result<Plan, Refusal> {
        let Some(mut meta) = self.try_lock() else {
            return Err(Refusal::Slow);
        };
        let planned = meta.plan(self.asked(offset, len, true));
        let known = |other: &Arc<EventFd>| Arc::ptr_eq(other, waiter);
        if matches!(planned, Err(Refusal::Busy)) && !meta.waiters.iter().any(known) {
            meta.waiters.push(Arc::clone(waiter));
        }
        planned
    }

    /// Enters a plan whose data is written into the mapping.
    pub(crate) fn publish(&self, plan: Plan) {
        self.lock().publish(plan);
        self.announce();
    }

    /// Undoes a plan whose data could not be written.
    pub(crate) fn abandon(&self, plan: Plan) {
        self.lock().abandon(plan);
        self.announce();
    }

    /// Wakes blocking calls that wait for clusters in flight.
    pub(crate) fn announce(&self) {
        self.released.notify_all();
    }

    /// Asks until there is an answer, waiting and writing tables as it takes.
    pub(crate) fn persist<T>(
        &self,
        mut ask: impl FnMut(&mut Meta) -> Result<T, Refusal>,
    ) -> io::Result<T> {
        let mut meta = self.lock();
        loop {
            match ask(&mut meta) {
                Ok(answer) => return Ok(answer),
                Err(Refusal::Failed(error)) => return Err(error),
                Err(Refusal::Busy) => {
                    meta = self
                        .released
                        .wait(meta)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                Err(Refusal::Checkpoint | Refusal::Slow) => {
                    drop(meta);
                    self.checkpoint()?;
                    meta = self.lock();
                }
            }
        }
    }

    /// Moves what a plan asks for. `None`: the range becomes zeros.
    pub(super) fn carry_out(&self, plan: &Plan, data: Option<&[u8]>) -> io::Result<()> {
        if plan.copies.is_empty() {
            let mut done = 0;
            for &(host, len) in &plan.pieces {
                match data {
                    Some(data) => {
                        let end = done + usize::try_from(len).unwrap_or(usize::MAX);
                        let part = data.get(done..end).ok_or_else(eio)?;
                        self.data.write_at(part, host)?;
                        done = end;
                    }
                    None => self.data.zero(host, len)?,
                }
            }
            return Ok(());
        }
        self.carry_out_with_copies(plan, data)
    }

    /// As [`Qcow2::carry_out`], with data and copies that are neighbours in one write.
    fn carry_out_with_copies(&self, plan: &Plan, data: Option<&[u8]>) -> io::Result<()> {
        let mut parts: Vec<(u64, Vec<u8>)> = Vec::new();
        for copy in &plan.copies {
            parts.push((copy.host, self.copied(copy)?));
        }
        let mut done = 0;
        for &(host, len) in &plan.pieces {
            let len = usize::try_from(len).unwrap_or(0);
            let bytes = match data {
                Some(data) => data.get(done..done + len).ok_or_else(eio)?.to_vec(),
                None => vec![0; len],
            };
            done += len;
            parts.push((host, bytes));
        }
        parts.sort_by_key(|(host, _)| *host);
        let mut joined: Option<(u64, Vec<u8>)> = None;
        for (host, bytes) in parts {
            match &mut joined {
                Some((start, have)) if *start + have.len() as u64 == host => have.extend(bytes),
                _ => {
                    if let Some((start, have)) = joined.take() {
                        self.data.write_at(&have, start)?;
                    }
                    joined = Some((host, bytes));
                }
            }
        }
        joined.map_or(Ok(()), |(start, have)| self.data.write_at(&have, start))
    }

    /// The bytes of a copy, as the guest sees them before the write.
    fn copied(&self, copy: &Copy) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(copy.len).unwrap_or(0)];
        let held = self.disk_size().saturating_sub(copy.guest).min(copy.len);
        if !copy.zero
            && held > 0
            && let Some(held) = bytes.get_mut(..usize::try_from(held).unwrap_or(0))
        {
            self.read(copy.guest, held)?;
        }
        Ok(bytes)
    }

    /// Writes bytes, or zeros (`None`), at most [`CHUNK`] of them; `planned` is called once they have a place.
    fn write_chunk(
        &self,
        offset: u64,
        len: u64,
        data: Option<&[u8]>,
        planned: impl FnOnce(),
    ) -> io::Result<()> {
        let mut pins = self.pins();
        let _held = pins.hold();
        let asked = self.asked(offset, len, false);
        let plan = self.persist(|meta| meta.plan(asked))?;
        planned();
        match self.carry_out(&plan, data) {
            Ok(()) => {
                self.publish(plan);
                Ok(())
            }
            Err(error) => {
                self.abandon(plan);
                Err(error)
            }
        }
    }

    fn write_range(&self, offset: u64, len: u64, data: Option<&[u8]>) -> io::Result<()> {
        self.check_range(offset, len)?;
        self.write_parts(offset, len, data)
    }

    /// Writes bytes, or zeros (`None`), past the end of the disk too.
    pub(super) fn write_parts(&self, offset: u64, len: u64, data: Option<&[u8]>) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let part = (CHUNK - at % CHUNK).min(len - done);
            let from = usize::try_from(done).unwrap_or(usize::MAX);
            let to = usize::try_from(done + part).unwrap_or(usize::MAX);
            let bytes = match data {
                Some(data) => Some(data.get(from..to).ok_or_else(eio)?),
                None => None,
            };
            self.write_chunk(at, part, bytes, || {})?;
            done += part;
        }
        Ok(())
    }

    /// As [`Image::write`], for at most 2 MiB that do not cross a multiple of that; `planned` is called as soon as the
    /// bytes have a place, before they are written.
    ///
    /// # Errors
    ///
    /// As [`Image::write`].
    pub(crate) fn write_planned(
        &self,
        offset: u64,
        data: &[u8],
        planned: impl FnOnce(),
    ) -> io::Result<()> {
        let len = data.len() as u64;
        self.check_range(offset, len)?;
        if len > CHUNK - offset % CHUNK {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.write_chunk(offset, len, Some(data), planned)
    }

    /// How a range is kept, with tables loaded as needed.
    pub(crate) fn range(&self, offset: u64, max: u64) -> io::Result<Range> {
        self.lock().range(offset, max, true)?.ok_or_else(eio)
    }

    fn read_range(&self, range: Range, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match range.kind {
            Kind::Data { host, .. } => self.data.read_at(buf, host),
            Kind::Zero { .. } => {
                buf.fill(0);
                Ok(())
            }
            Kind::Compressed(compressed) => self.read_compressed(compressed, offset, buf),
            Kind::Absent => {
                let held = self.backing_size().saturating_sub(offset);
                let held = usize::try_from(held).unwrap_or(usize::MAX).min(buf.len());
                let (below, past) = buf.split_at_mut(held);
                past.fill(0);
                match &self.backing {
                    Some(backing) if held > 0 => backing.image().read(offset, below),
                    _ => Ok(()),
                }
            }
        }
    }

    fn read_compressed(
        &self,
        compressed: Compressed,
        offset: u64,
        buf: &mut [u8],
    ) -> io::Result<()> {
        let mut data = vec![0; usize::try_from(compressed.len).map_err(|_| eio())?];
        self.storage.read_at(&mut data, compressed.offset)?;
        let mut cluster = vec![0; usize::try_from(self.geometry.cluster()).map_err(|_| eio())?];
        compress::expand(self.compression, &data, &mut cluster)?;
        let start = usize::try_from(self.geometry.within(offset)).map_err(|_| eio())?;
        let part = cluster.get(start..start + buf.len()).ok_or_else(eio)?;
        buf.copy_from_slice(part);
        Ok(())
    }

    /// Clears whole units of a range in the mapping; zeros that the image has no entry for are written.
    pub(crate) fn clear(&self, offset: u64, len: u64, clear: Clear) -> io::Result<()> {
        let mut at = offset;
        let end = offset + len;
        while at < end {
            let range = Cleared {
                offset: at,
                len: end - at,
                backing: match clear {
                    Clear::Forget => 0,
                    Clear::Hide => u64::MAX,
                    _ => self.backing_size(),
                },
                clear,
            };
            if let Some(done) = self.persist(|meta| meta.clear(range))? {
                at += done;
                continue;
            }
            let next = if self.geometry.extended {
                end.min(self.geometry.down(at) + self.geometry.cluster())
            } else {
                end
            };
            match clear {
                Clear::Hide => self.write_parts(at, next - at, None)?,
                _ => self.zero_part(at, next - at)?,
            }
            at = next;
        }
        if self.geometry.data_file && self.punches() && clear != (Clear::Zero { unmap: false }) {
            self.data.discard(offset, len)?;
        }
        Ok(())
    }

    /// Says of a range that it is zeros even where it reads so already, because another backing file is to come. The range
    /// consists of whole grains, or ends at the disk's end.
    ///
    /// # Errors
    ///
    /// As [`Image::write`].
    pub(crate) fn hide(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_range(offset, len)?;
        self.lock().writable()?;
        let whole = self.whole(offset, len, self.geometry.grain());
        self.clear(whole.start, whole.end - whole.start, Clear::Hide)
    }

    /// Takes everything out of the image, so that its backing file shows through.
    ///
    /// # Errors
    ///
    /// As [`Image::write`].
    pub(crate) fn empty(&self) -> io::Result<()> {
        self.lock().writable()?;
        let size = self.disk_size().next_multiple_of(self.geometry.cluster());
        self.clear(0, size, Clear::Forget)
    }

    /// The part of a range that consists of whole units of `unit` bytes; the disk's end ends a unit.
    fn whole(&self, offset: u64, len: u64, unit: u64) -> std::ops::Range<u64> {
        let end = offset + len;
        let first = offset.next_multiple_of(unit);
        let last = if end == self.disk_size() {
            end.next_multiple_of(unit)
        } else {
            end - end % unit
        };
        first..last.max(first)
    }

    /// Writes zeros where a range does not read as zeros yet.
    pub(super) fn zero_part(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut at = offset;
        while at < offset + len {
            let range = self.range(at, offset + len - at)?;
            let backing = self.backing_size();
            let (zeros, len) = match range.kind {
                Kind::Absent if at < backing => (false, range.len.min(backing - at)),
                Kind::Zero { .. } | Kind::Absent => (true, range.len),
                Kind::Data { .. } | Kind::Compressed(_) => (false, range.len),
            };
            if !zeros {
                self.write_parts(at, len, None)?;
            }
            at += len;
        }
        Ok(())
    }
}

/// Pins in all images of a chain.
#[derive(Debug)]
pub(crate) struct ChainPins(Vec<Pins>);

impl ChainPins {
    /// Pins the current epoch of the topmost image, the only one that changes.
    pub(crate) fn enter(&mut self) -> u64 {
        self.0.first_mut().map_or(0, Pins::enter)
    }

    /// Ends what [`ChainPins::enter`] began.
    pub(crate) fn leave(&mut self, epoch: u64) {
        if let Some(pins) = self.0.first_mut() {
            pins.leave(epoch);
        }
    }

    pub(super) fn hold(&mut self) -> &mut Self {
        self.enter();
        self
    }
}

impl Image for Qcow2 {
    fn size(&self) -> u64 {
        self.disk_size()
    }

    fn read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let mut pins = self.pins();
        let _held = pins.hold();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let range = self.range(at, (buf.len() - done) as u64)?;
            let end = done + usize::try_from(range.len).map_err(|_| eio())?;
            let part = buf.get_mut(done..end).ok_or_else(eio)?;
            self.read_range(range, at, part)?;
            done = end;
        }
        Ok(())
    }

    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.write_range(offset, buf.len() as u64, Some(buf))
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.check_range(offset, len)?;
        self.lock().writable()?;
        if self.raw_data {
            return self.write_range(offset, len, None);
        }
        let whole = self.whole(offset, len, self.geometry.grain());
        if whole.is_empty() {
            return self.zero_part(offset, len);
        }
        let end = offset + len;
        self.zero_part(offset, whole.start - offset)?;
        let clear = Clear::Zero { unmap: may_unmap };
        self.clear(whole.start, whole.end - whole.start, clear)?;
        if whole.end < end {
            self.zero_part(whole.end, end - whole.end)?;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_range(offset, len)?;
        self.lock().writable()?;
        let whole = self.whole(offset, len, self.geometry.cluster());
        if whole.is_empty() {
            return Ok(());
        }
        let len = whole.end - whole.start;
        if self.raw_data {
            self.persist(|meta| meta.record(whole.start, len, false))?;
            return self.data.discard(whole.start, len);
        }
        self.clear(whole.start, len, Clear::Discard)
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only() {
            return Ok(());
        }
        self.lock().writable()?;
        self.debt.pay()?;
        if self.is_dirty() {
            self.checkpoint()
        } else {
            self.sync_data()
        }
    }

    fn extent(&self, offset: u64, max: u64) -> io::Result<Extent> {
        self.check_range(offset, max)?;
        let mut range = self.range(offset, max)?;
        while range.len < max {
            let next = self.range(offset + range.len, max - range.len)?;
            let joined = match (range.kind, next.kind) {
                (Kind::Data { host: a, .. }, Kind::Data { host: b, .. })
                | (Kind::Zero { host: Some(a) }, Kind::Zero { host: Some(b) }) => {
                    a + range.len == b
                }
                (Kind::Absent, Kind::Absent)
                | (Kind::Zero { host: None }, Kind::Zero { host: None })
                | (Kind::Compressed(_), Kind::Compressed(_)) => true,
                _ => false,
            };
            if !joined {
                break;
            }
            range.len += next.len;
        }
        Ok(Extent {
            len: range.len,
            kept: match range.kind {
                Kind::Data { host, .. } => Kept::Data { host: Some(host) },
                Kind::Compressed(_) => Kept::Data { host: None },
                Kind::Zero { host } => Kept::Zero { host },
                Kind::Absent => Kept::Absent,
            },
        })
    }

    fn backing(&self) -> Option<&dyn Image> {
        self.backing.as_ref().map(Backing::image)
    }

    fn as_qcow2(&self) -> Option<&Self> {
        Some(self)
    }
}
