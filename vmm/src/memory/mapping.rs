//! One mapping of host memory, aligned for huge pages.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::ptr;
use std::sync::{Arc, OnceLock};

use super::still::{Still, Watcher};
use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals, fstatfs};
use virtio::memory::{Backing, DirtyLog};
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{MmapRegion, VolatileSlice};

use super::demand::Demand;
use super::lost::Bell;
use super::missing::Missing;
use super::overlay::Overlay;

/// The largest page that transparent huge pages use.
const ALIGN: usize = 2 << 20;

/// The host's usual page, in bytes.
const PAGE: u64 = 4096;

/// A mapping that is unmapped when dropped.
pub struct Mapping {
    address: *mut libc::c_void,
    len: usize,
    flags: i32,
    /// Of huge pages of this size in bytes.
    huge_page: Option<u64>,
    /// Whether transparent huge pages have been advised, or advised against.
    thp: OnceLock<bool>,
    /// What of it a snapshot's file gives.
    overlay: Overlay,
    /// Who holds it still.
    watcher: Watcher,
    /// What has been given back, while somebody wants to know.
    given_back: DirtyLog,
}

#[expect(unsafe_code, reason = "raw addresses are not Send; see the proof")]
// SAFETY: the address is only handed out as a number or to KVM and vm-memory,
// which treat the memory as shared and volatile; unmapping happens once, in drop.
unsafe impl Send for Mapping {}
#[expect(unsafe_code, reason = "raw addresses are not Sync; see the proof")]
// SAFETY: as above; no method gives out a reference to the memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes: of `file` from an offset, or anonymous memory. No core dump holds them, and no forked child has them.
    /// With a file of huge pages of `huge_page` bytes the mapping fails now if they are not there,
    /// rather than the guest later; ordinary memory is over-committed.
    ///
    /// # Errors
    ///
    /// The host's, when it refuses.
    pub fn new(
        len: usize,
        file: Option<(&File, u64)>,
        shared: bool,
        huge_page: Option<u64>,
    ) -> io::Result<Self> {
        let reserve = huge_page.map_or(libc::MAP_NORESERVE, |_| 0);
        Self::with_flags(len, file, shared, huge_page, reserve)
    }

    /// The same, and huge pages are over-committed too: those that are not there are found missing by
    /// [`Mapping::populate_part`].
    ///
    /// # Errors
    ///
    /// The host's, when it refuses.
    pub fn over_committed(
        len: usize,
        file: Option<(&File, u64)>,
        shared: bool,
        huge_page: Option<u64>,
    ) -> io::Result<Self> {
        Self::with_flags(len, file, shared, huge_page, libc::MAP_NORESERVE)
    }

    fn with_flags(
        len: usize,
        file: Option<(&File, u64)>,
        shared: bool,
        huge_page: Option<u64>,
        reserve: i32,
    ) -> io::Result<Self> {
        let sharing = if shared {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
        let (fd, offset, kind) = match file {
            Some((file, offset)) => (file.as_raw_fd(), offset, 0),
            None => (-1, 0, libc::MAP_ANONYMOUS),
        };
        let flags = sharing | kind | reserve;
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let reserved = len.checked_add(ALIGN).ok_or(io::ErrorKind::OutOfMemory)?;
        let reserve = map_at(ptr::null_mut(), reserved, libc::PROT_NONE, RESERVE, -1, 0)?;
        let skip = reserve.align_offset(ALIGN);
        let aligned = reserve.wrapping_byte_add(skip);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let mapped = map_at(
            aligned,
            len,
            protection,
            flags | libc::MAP_FIXED,
            fd,
            offset,
        );
        unmap(reserve, skip);
        let tail = aligned.wrapping_byte_add(len);
        match mapped {
            Ok(address) => {
                unmap(tail, ALIGN - skip);
                let mapping = Self {
                    address,
                    len,
                    flags,
                    huge_page,
                    thp: OnceLock::new(),
                    overlay: Overlay::default(),
                    watcher: Watcher::default(),
                    given_back: DirtyLog::with_len(len),
                };
                mapping.keep_to_this_process();
                Ok(mapping)
            }
            Err(error) => {
                unmap(aligned, reserved - skip);
                Err(error)
            }
        }
    }

    /// The host virtual address of the first byte.
    pub fn address(&self) -> u64 {
        self.address.addr() as u64
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Has `still` know of what is given back.
    pub(super) fn held_by(&self, still: std::sync::Weak<Still>) {
        self.watcher.set(still);
    }

    /// Which pages have been given back.
    pub(super) fn given_back_log(&self) -> &DirtyLog {
        &self.given_back
    }

    /// Gives `len` bytes from `offset` back to the host, of which there is a copy first where one is made.
    fn give_back(&self, offset: usize, len: usize) -> io::Result<()> {
        let still = self.watcher.get();
        let start = self.address().saturating_add(offset as u64);
        if let Some(still) = &still {
            still.give_back(start, len as u64);
        }
        let given = self.discard_part(offset, len);
        if let Some(still) = &still {
            still.given_back(start, len as u64);
        }
        // Also where some of it could not be.
        self.given_back.mark_dirty(offset, len);
        given
    }

    /// Marks those of the pages from `offset` on of which the host has none: they read as zeros. Only where the host swaps
    /// nothing out, which does not have those either; and not of files that hold something.
    fn mark_absent(&self, offset: u64, pages: &mut [bool]) {
        let anonymous = self.flags & libc::MAP_ANONYMOUS != 0;
        if (!anonymous && self.flags & libc::MAP_SHARED == 0) || self.is_of_file() {
            return;
        }
        let mut present = vec![1_u8; pages.len()];
        let size = usize::try_from(PAGE).unwrap_or(usize::MAX);
        let Some(len) = pages.len().checked_mul(size) else {
            return;
        };
        let Ok(offset) = number(offset) else {
            return;
        };
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return;
        }
        let address = self.address.wrapping_byte_add(offset);
        // SAFETY: the range lies in this mapping, as was just checked, and there is a byte for each of its pages.
        #[expect(unsafe_code, reason = "mincore is a system call on an address")]
        let result = unsafe { libc::mincore(address, len, present.as_mut_ptr()) };
        if result == 0 {
            for (page, present) in pages.iter_mut().zip(present) {
                *page = present & 1 == 0;
            }
        }
    }

    /// Whether nobody else has any of it: private, and of no file.
    pub fn is_private(&self) -> bool {
        let wanted = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
        self.flags & wanted == wanted && !self.is_of_file()
    }

    /// The protection flags of the mapping.
    pub fn protection(&self) -> i32 {
        libc::PROT_READ | libc::PROT_WRITE
    }

    /// The flags it was mapped with.
    pub fn flags(&self) -> i32 {
        self.flags
    }

    /// Advises for or against transparent huge pages. A host without them
    /// refuses, which changes nothing.
    pub fn advise_thp(&self, thp: Option<bool>) {
        if let Some(thp) = thp {
            // It is said once.
            let _ = self.thp.set(thp);
        }
        match thp {
            Some(true) => drop(self.advise(libc::MADV_HUGEPAGE)),
            Some(false) => drop(self.advise(libc::MADV_NOHUGEPAGE)),
            None => (),
        }
    }

    /// Guest memory is neither for core dumps nor for forked children.
    fn keep_to_this_process(&self) {
        // Both are hints for the worst case; an old host without them is no worse off.
        drop(self.advise(libc::MADV_DONTDUMP));
        drop(self.advise(libc::MADV_DONTFORK));
    }

    /// Faults every page in for writing.
    ///
    /// # Errors
    ///
    /// The host's, when it runs out of memory.
    pub fn populate(&self) -> io::Result<()> {
        self.advise(libc::MADV_POPULATE_WRITE)
    }

    /// Faults `len` bytes from `offset` in for writing.
    ///
    /// # Errors
    ///
    /// The host's, when it runs out of memory.
    pub fn populate_part(&self, offset: u64, len: u64) -> io::Result<()> {
        self.advise_part(number(offset)?, number(len)?, libc::MADV_POPULATE_WRITE)
    }

    /// Gives all pages back to the host; they then read as zeros.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn discard_all(&self) -> io::Result<()> {
        self.give_back(0, self.len)
    }

    fn discard_part(&self, offset: usize, len: usize) -> io::Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        let range = offset..end.ok_or(io::ErrorKind::InvalidInput)?;
        if let Some(demand) = self.overlay.demand() {
            let start = self.address().saturating_add(offset as u64);
            let range = start..start.saturating_add(len as u64);
            return demand.discard(&range, || self.advise_part(offset, len, self.discarding()));
        }
        if let Some(missing) = self.overlay.missing() {
            let start = self.address().saturating_add(offset as u64);
            let range = start..start.saturating_add(len as u64);
            return missing.discard(&range, || self.advise_part(offset, len, self.discarding()));
        }
        let mut at = range.start;
        let written = self.overlay.blank(self.address, &range)?;
        for kept in written
            .into_iter()
            .chain(std::iter::once(range.end..range.end))
        {
            if at < kept.start {
                let len = kept.start.saturating_sub(at);
                self.advise_part(at, len, self.discarding())?;
            }
            at = kept.end;
        }
        Ok(())
    }

    /// Has `bell` ring when a file that is mapped in the place of this memory does not give its bytes any more.
    ///
    /// # Errors
    ///
    /// The host lets nobody watch, or too much is watched already.
    pub fn watch(&self, bell: &Arc<Bell>) -> io::Result<()> {
        self.overlay.watch(self.address.addr(), self.len, bell)
    }

    /// Maps `len` bytes of `file` from `at` privately in the place of the private memory at `offset`. All are multiples of
    /// the host's page, but for the length of what is last.
    ///
    /// # Errors
    ///
    /// The range is not all in the mapping, or the host refuses.
    pub fn map_file(&self, offset: u64, len: u64, file: &File, at: u64) -> io::Result<()> {
        let (start, len) = (number(offset)?, number(len)?);
        let end = start.checked_add(len).filter(|end| *end <= self.len);
        let range = start..end.ok_or(io::ErrorKind::InvalidInput)?;
        self.overlay.map(self.address, range, file, at)
    }

    /// The parts of the `len` bytes at `offset`, ascending, that a file gives: their offsets and lengths in bytes.
    pub fn of_file(&self, offset: u64, len: u64) -> Vec<(u64, u64)> {
        let (Ok(start), Ok(end)) = (number(offset), number(offset.saturating_add(len))) else {
            return Vec::new();
        };
        let parts = self.overlay.within(&(start..end.min(self.len)));
        let number = |part: Range<usize>| (part.start as u64, part.len() as u64);
        parts.into_iter().map(number).collect()
    }

    /// Has the pages of `copy`, which are the same, be what of the private memory at `offset` a file gives. Nobody writes to either meanwhile.
    ///
    /// # Errors
    ///
    /// The range is not all in the mapping, or the host refuses: all bytes are as they were.
    pub fn take_in(&self, offset: u64, copy: &Self) -> io::Result<()> {
        let start = number(offset)?;
        let end = start.checked_add(copy.len).filter(|end| *end <= self.len);
        let range = start..end.ok_or(io::ErrorKind::InvalidInput)?;
        self.overlay.take_in(self.address, &range, copy.address)
    }

    /// The bytes at `offset`, where they are in the mapping.
    pub fn slice(&self, offset: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let start = number(offset).ok()?;
        start.checked_add(len).filter(|end| *end <= self.len)?;
        let address = self.address.wrapping_byte_add(start).cast();
        // SAFETY: the bytes lie in this mapping, as was just checked, which outlives the slice; they are shared and volatile.
        #[expect(unsafe_code, reason = "the slice takes a raw address")]
        Some(unsafe { VolatileSlice::new(address, len) })
    }

    /// Whether transparent huge pages have been advised, or advised against.
    pub fn thp(&self) -> Option<bool> {
        self.thp.get().copied()
    }

    /// Memory is read by `demand` until it is there.
    pub fn read_by(&self, demand: &Arc<Demand>) {
        self.overlay.read_by(demand);
    }

    /// Pages come to `missing` until all are there.
    pub(super) fn misses(&self, missing: &Arc<Missing>) {
        self.overlay.misses(missing);
    }

    /// What was lost last of what a file was to give, in bytes from the start.
    pub fn lost(&self) -> Option<usize> {
        self.overlay.lost()
    }

    /// What was lost is of no matter any more: all has been discarded.
    pub fn forget_lost(&self) {
        self.overlay.forget();
    }

    /// Whether a file, or another monitor, gives any of it.
    pub fn is_of_file(&self) -> bool {
        if self.overlay.missing().is_some() {
            return true;
        }
        let demand = self.overlay.demand();
        self.overlay.is_used() || demand.is_some_and(|demand| demand.left() > 0)
    }

    /// The advice that gives pages back: of shared memory they go out of its file too, for all who map it.
    fn discarding(&self) -> i32 {
        if self.flags & libc::MAP_SHARED != 0 {
            libc::MADV_REMOVE
        } else {
            libc::MADV_DONTNEED
        }
    }

    fn advise(&self, advice: i32) -> io::Result<()> {
        self.advise_part(0, self.len, advice)
    }

    fn advise_part(&self, offset: usize, len: usize, advice: i32) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range lies in this mapping, as was just checked.
        #[expect(unsafe_code, reason = "madvise is a system call on an address")]
        let result = unsafe { libc::madvise(self.address.wrapping_byte_add(offset), len, advice) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Builds the region that describes this mapping. The builder's bitmap
    /// must hold the mapping, which is what keeps the region valid.
    ///
    /// # Errors
    ///
    /// When flags or alignment do not fit the builder's rules.
    pub fn into_region(
        self: &Arc<Self>,
        builder: MmapRegionBuilder<DirtyLog>,
    ) -> Result<MmapRegion<DirtyLog>, MmapRegionError> {
        // SAFETY: the builder's log holds an Arc of this mapping, so the
        // memory stays mapped, readable and writable while the region exists.
        #[expect(unsafe_code, reason = "the region takes a raw address")]
        unsafe { builder.with_raw_mmap_pointer(self.address.cast()) }.build()
    }
}

/// As the host counts.
fn number(number: u64) -> io::Result<usize> {
    usize::try_from(number).map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl Mapping {
    /// As [`Mapping::into_region`] of `len` bytes from `offset`, which the builder describes; `None` when they are not in the mapping.
    ///
    /// # Errors
    ///
    /// When flags or alignment do not fit the builder's rules.
    pub fn into_part(
        self: &Arc<Self>,
        builder: MmapRegionBuilder<DirtyLog>,
        offset: u64,
        len: u64,
    ) -> Result<Option<MmapRegion<DirtyLog>>, MmapRegionError> {
        let end = offset.checked_add(len).and_then(|end| number(end).ok());
        let (Some(_), Ok(start)) = (end.filter(|end| *end <= self.len), number(offset)) else {
            return Ok(None);
        };
        let address = self.address.wrapping_byte_add(start).cast();
        // SAFETY: the bytes lie in this mapping, and the builder's log holds an Arc of it, so the
        // memory stays mapped, readable and writable while the region exists.
        #[expect(unsafe_code, reason = "the region takes a raw address")]
        let builder = unsafe { builder.with_raw_mmap_pointer(address) };
        builder.build().map(Some)
    }
}

impl Backing for Mapping {
    fn page_size(&self) -> u64 {
        self.huge_page.unwrap_or(PAGE)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.give_back(number(offset)?, number(len)?)
    }

    fn absent(&self, offset: u64, pages: &mut [bool]) {
        self.mark_absent(offset, pages);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.overlay.end();
        unmap(self.address, self.len);
    }
}

const RESERVE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

fn map_at(
    at: *mut libc::c_void,
    len: usize,
    protection: i32,
    flags: i32,
    fd: i32,
    offset: i64,
) -> io::Result<*mut libc::c_void> {
    // SAFETY: without MAP_FIXED the kernel picks unused addresses; with it,
    // `at` lies in a reservation that this module has just made.
    #[expect(unsafe_code, reason = "mmap is a system call on an address")]
    let address = unsafe { libc::mmap(at, len, protection, flags, fd, offset) };
    if address == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(address)
    }
}

fn unmap(address: *mut libc::c_void, len: usize) {
    if len > 0 {
        // SAFETY: the range is part of a mapping or reservation of this module
        // that nothing uses any more.
        #[expect(unsafe_code, reason = "munmap is a system call on an address")]
        unsafe {
            libc::munmap(address, len)
        };
    }
}

/// A memory file of huge pages when asked. Its size is sealed: others who map it could otherwise
/// have this process killed at its next look.
///
/// # Errors
///
/// The host's, when it refuses the file or its size.
pub fn memory_file(len: u64, huge_page: Option<u64>) -> io::Result<File> {
    let file = growing_file(len, huge_page)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Whether a memory file is of huge pages of its own. Shared memory has larger blocks, too, where the host gives it huge pages.
fn is_of_huge_pages(file: &File) -> io::Result<bool> {
    Ok(fstatfs(file)?.f_type == libc::HUGETLBFS_MAGIC)
}

/// That a file which another process has made is one of [`memory_file`], of `len` bytes.
///
/// # Errors
///
/// What it is instead.
pub fn check_memory_file(file: &File, len: u64, huge_page: Option<u64>) -> io::Result<()> {
    let wrong = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()));
    let Ok(seals) = fcntl_get_seals(file) else {
        return wrong("it is no memory file");
    };
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL) {
        return wrong("its length could be changed");
    }
    if seals.contains(SealFlags::WRITE) {
        return wrong("it cannot be written to");
    }
    let facts = file.metadata()?;
    if facts.len() != len {
        return wrong("it is not as long as the guest's memory");
    }
    match huge_page {
        Some(size) if facts.blksize() != size => wrong("its pages have another size"),
        None if is_of_huge_pages(file)? => wrong("its pages are huge, and not to be"),
        _ => Ok(()),
    }
}

/// A memory file that others map privately once [`seal`] has been called.
///
/// # Errors
///
/// The host's, when it refuses the file or its size.
pub fn template_file(len: u64) -> io::Result<File> {
    growing_file(len, None)
}

/// Has nobody change a file of [`template_file`], nor its length, from now on.
///
/// # Errors
///
/// The host's, and while the file is mapped for writing.
pub fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    Ok(fcntl_add_seals(file, seals)?)
}

/// A memory file without seals.
fn growing_file(len: u64, huge_page: Option<u64>) -> io::Result<File> {
    let huge = match huge_page {
        None => 0,
        Some(size) => libc::MFD_HUGETLB | size.trailing_zeros() << libc::MFD_HUGE_SHIFT,
    };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge;
    // SAFETY: the name is a C string; the flags are defined ones.
    #[expect(unsafe_code, reason = "memfd_create is a system call")]
    let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and owned by nobody else.
    #[expect(unsafe_code, reason = "takes ownership of a fresh descriptor")]
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    Ok(file)
}
