//! A file of guest memory in place of memory: mapped privately, so that what the guest writes stays its own.
//!
//! What is given back must not come back as the file has it, which is what the host makes of such pages when they are
//! discarded: anonymous memory takes their place. That costs the host a mapping for each piece, of which a process has some ten
//! thousand: past [`PIECES`] pieces zeros are written where one more would come to be, and that memory is not saved.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::demand::Demand;
use super::lost::{Bell, Watch};
use super::missing::Missing;

/// How many pieces of one mapping may be of the file.
const PIECES: usize = 8192;

/// Which parts of a mapping are of a file.
#[derive(Default)]
pub(super) struct Overlay(Mutex<Parts>);

#[derive(Default)]
struct Parts {
    /// Offsets of bytes into the mapping: the start and the end of each piece. They do not touch.
    pieces: BTreeMap<usize, usize>,
    /// Held while there are, or were, pieces.
    watch: Option<Watch>,
    /// Who reads memory that is not there yet.
    demand: Weak<Demand>,
    /// What is at another monitor.
    missing: Weak<Missing>,
}

impl Overlay {
    fn lock(&self) -> MutexGuard<'_, Parts> {
        // Each change leaves it sound; a panic elsewhere does too.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches the whole mapping of `len` bytes at `address`.
    ///
    /// # Errors
    ///
    /// As of [`Watch::new`].
    pub fn watch(&self, address: usize, len: usize, bell: &Arc<Bell>) -> io::Result<()> {
        let watch = Watch::new(address, len, Arc::clone(bell))?;
        self.lock().watch = Some(watch);
        Ok(())
    }

    /// Maps `range`, offsets of bytes into the mapping at `base`, from `file` at `at`.
    ///
    /// # Errors
    ///
    /// The host's, when it refuses; the range is as it was before.
    pub fn map(
        &self,
        base: *mut libc::c_void,
        range: Range<usize>,
        file: &File,
        at: u64,
    ) -> io::Result<()> {
        let mut parts = self.lock();
        let at = i64::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        fix(base, &range, Some((file, at)))?;
        parts.pieces.insert(range.start, range.end);
        Ok(())
    }

    /// Has no byte of `range` be the file's any more; what was is zeros. What is given are the parts of it, ascending, whose
    /// zeros had to be written over bytes of the file, which would come back if they were discarded.
    ///
    /// # Errors
    ///
    /// The host's, when it refuses.
    pub fn blank(
        &self,
        base: *mut libc::c_void,
        range: &Range<usize>,
    ) -> io::Result<Vec<Range<usize>>> {
        let mut parts = self.lock();
        let mut written = Vec::new();
        for piece in parts.within(range) {
            if parts.pieces.len() >= PIECES && parts.is_split_by(&piece) {
                zero(base, &piece);
                written.push(piece);
            } else {
                fix(base, &piece, None)?;
                parts.cut(&piece);
            }
        }
        Ok(written)
    }

    /// The parts of `range`, ascending, that are the file's.
    pub fn within(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        self.lock().within(range)
    }

    /// Has the private memory at `copy`, which holds the same bytes, be what of `range`, offsets of bytes into the mapping at `base`, is the
    /// file's. Nobody writes to either meanwhile.
    ///
    /// # Errors
    ///
    /// The host's, when it refuses; each part is the file's or the copy's then.
    pub fn take_in(
        &self,
        base: *mut libc::c_void,
        range: &Range<usize>,
        copy: *mut libc::c_void,
    ) -> io::Result<()> {
        let mut parts = self.lock();
        for piece in parts.within(range) {
            let from = copy.wrapping_byte_add(piece.start.saturating_sub(range.start));
            exchange(from, base, &piece)?;
            parts.cut(&piece);
        }
        Ok(())
    }

    /// The page that was lost last, in bytes from the start of the mapping.
    pub fn lost(&self) -> Option<usize> {
        self.lock().watch.as_ref().and_then(Watch::lost)
    }

    /// What was lost is of no matter any more.
    pub fn forget(&self) {
        self.lock().watch.iter().for_each(Watch::forget);
    }

    /// Whether any byte is the file's.
    pub fn is_used(&self) -> bool {
        !self.lock().pieces.is_empty()
    }

    /// Memory is read by `demand` until it is there.
    pub fn read_by(&self, demand: &Arc<Demand>) {
        self.lock().demand = Arc::downgrade(demand);
    }

    /// Who reads memory that is not there yet.
    pub fn demand(&self) -> Option<Arc<Demand>> {
        self.lock().demand.upgrade()
    }

    /// Pages come to `missing` until all are there.
    pub fn misses(&self, missing: &Arc<Missing>) {
        self.lock().missing = Arc::downgrade(missing);
    }

    /// What is at another monitor, while anything is.
    pub fn missing(&self) -> Option<Arc<Missing>> {
        let missing = self.lock().missing.upgrade();
        missing.filter(|missing| missing.left() > 0)
    }

    /// Ends the watch, before the memory goes.
    pub fn end(&self) {
        self.lock().watch = None;
    }
}

impl Parts {
    /// What of `range` is the file's.
    fn within(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        let before = self.pieces.range(..=range.start).next_back();
        let inside = self.pieces.range(range.start.saturating_add(1)..range.end);
        let cut = |(start, end): (&usize, &usize)| (*start).max(range.start)..(*end).min(range.end);
        let all = before.into_iter().chain(inside).map(cut);
        all.filter(|piece| !piece.is_empty()).collect()
    }

    /// Whether one piece becomes two when `piece`, which lies in it, is taken out.
    fn is_split_by(&self, piece: &Range<usize>) -> bool {
        let around = self.pieces.range(..=piece.start).next_back();
        around.is_some_and(|(start, end)| *start < piece.start && piece.end < *end)
    }

    /// Takes `piece`, which lies in one piece, out.
    fn cut(&mut self, piece: &Range<usize>) {
        let Some((&start, &end)) = self.pieces.range(..=piece.start).next_back() else {
            return;
        };
        self.pieces.remove(&start);
        if start < piece.start {
            self.pieces.insert(start, piece.start);
        }
        if piece.end < end {
            self.pieces.insert(piece.end, end);
        }
    }
}

/// Puts a mapping of a file, or of nothing, in the place of `range`.
fn fix(
    base: *mut libc::c_void,
    range: &Range<usize>,
    file: Option<(&File, i64)>,
) -> io::Result<()> {
    let (fd, at, kind) = match file {
        Some((file, at)) => (file.as_raw_fd(), at, 0),
        None => (-1, 0, libc::MAP_ANONYMOUS),
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE | kind;
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    let len = range.end.saturating_sub(range.start);
    let address = base.wrapping_byte_add(range.start);
    // SAFETY: the caller's mapping holds the range, so that nothing else is replaced; guest memory is shared and
    // volatile, and nobody has a reference into it.
    #[expect(unsafe_code, reason = "mmap is a system call on an address")]
    let mapped = unsafe { libc::mmap(address, len, rights, flags, fd, at) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    for advice in [libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
        // SAFETY: as above. Both are hints for the worst case.
        #[expect(unsafe_code, reason = "madvise is a system call on an address")]
        unsafe {
            libc::madvise(address, len, advice);
        }
    }
    Ok(())
}

/// Moves the pages at `from` into the place of `range`. What is left there are no pages, and the mapping.
fn exchange(
    from: *mut libc::c_void,
    base: *mut libc::c_void,
    range: &Range<usize>,
) -> io::Result<()> {
    let len = range.end.saturating_sub(range.start);
    let to = base.wrapping_byte_add(range.start);
    let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    // SAFETY: the caller's mappings hold both ranges, so that nothing else is replaced, and the one that is moved stays mapped; guest
    // memory is shared and volatile, and nobody has a reference into it.
    #[expect(unsafe_code, reason = "mremap is a system call on addresses")]
    let moved = unsafe { libc::mremap(from, len, len, how, to) };
    if moved == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Writes zeros.
fn zero(base: *mut libc::c_void, range: &Range<usize>) {
    let len = range.end.saturating_sub(range.start);
    // SAFETY: the caller's mapping holds the range, which is writable; guest memory is shared and volatile, and the guest
    // has given these bytes away.
    #[expect(unsafe_code, reason = "guest memory is written by its address")]
    unsafe {
        std::ptr::write_bytes(base.cast::<u8>().wrapping_add(range.start), 0, len);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;

    use virtio::memory::Backing;

    use super::super::mapping::Mapping;
    use super::*;

    const PAGES: usize = 16;
    const PAGE: usize = 4096;

    /// A file each of whose pages holds its number, from 1 on.
    fn file() -> File {
        let mut file = tempfile::tempfile().unwrap();
        for page in 1..=PAGES {
            file.write_all(&[u8::try_from(page).unwrap(); PAGE])
                .unwrap();
        }
        file
    }

    fn mapped(file: &File, bell: &Arc<Bell>) -> Mapping {
        let mapping = Mapping::new(PAGES * PAGE, None, false, None).unwrap();
        mapping.watch(bell).unwrap();
        let len = (PAGES * PAGE) as u64;
        mapping.map_file(0, len, file, 0).unwrap();
        mapping
    }

    fn byte(mapping: &Mapping, page: usize) -> &std::sync::atomic::AtomicU8 {
        let address = usize::try_from(mapping.address()).unwrap() + page * PAGE;
        let pointer = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: the byte lies in the mapping, which outlives the reference.
        #[expect(unsafe_code, reason = "memory is looked at by its address")]
        unsafe {
            std::sync::atomic::AtomicU8::from_ptr(pointer)
        }
    }

    fn bytes(mapping: &Mapping) -> Vec<u8> {
        let pages = 0..PAGES;
        pages
            .map(|page| byte(mapping, page).load(Ordering::Relaxed))
            .collect()
    }

    #[test]
    fn what_is_given_back_is_zeros_and_not_as_the_file_has_it() {
        let (file, bell) = (file(), Arc::new(Bell::new().unwrap()));
        let mapping = mapped(&file, &bell);
        let mut wanted: Vec<u8> = (1..=16).collect();
        assert_eq!(bytes(&mapping), wanted);
        byte(&mapping, 3).store(99, Ordering::Relaxed);
        byte(&mapping, 9).store(98, Ordering::Relaxed);
        wanted[3] = 99;
        wanted[9] = 98;
        for (first, count) in [(2, 3), (3, 1), (0, 1), (1, 3), (15, 1), (8, 4), (7, 6)] {
            let len = (count * PAGE) as u64;
            mapping.discard((first * PAGE) as u64, len).unwrap();
            wanted[first..first + count].fill(0);
            assert_eq!(bytes(&mapping), wanted, "{first} {count}");
            assert!(mapping.is_of_file());
        }
        byte(&mapping, 2).store(7, Ordering::Relaxed);
        mapping.discard((2 * PAGE) as u64, PAGE as u64).unwrap();
        assert_eq!(bytes(&mapping), wanted);
        mapping.discard_all().unwrap();
        assert!(!mapping.is_of_file());
        assert_eq!(bytes(&mapping), [0; PAGES]);
        let mut there = [0];
        file.read_exact_at(&mut there, 3 * PAGE as u64).unwrap();
        assert_eq!(there, [4], "the file is as it was");
    }

    #[test]
    fn what_a_file_gives_no_more_is_zeros_and_is_told() {
        let (file, bell) = (file(), Arc::new(Bell::new().unwrap()));
        let mapping = mapped(&file, &bell);
        byte(&mapping, 5).store(77, Ordering::Relaxed);
        assert_eq!(mapping.lost(), None);
        file.set_len(2 * PAGE as u64).unwrap();
        assert_eq!(byte(&mapping, 1).load(Ordering::Relaxed), 2);
        assert_eq!(mapping.lost(), None);
        assert_eq!(byte(&mapping, 6).load(Ordering::Relaxed), 0);
        assert_eq!(mapping.lost(), Some(6 * PAGE));
        let address = usize::try_from(mapping.address()).unwrap();
        super::super::lost::check(address + PAGE).unwrap_err();
        super::super::lost::check(address.wrapping_sub(PAGE)).unwrap();
        byte(&mapping, 7).store(5, Ordering::Relaxed);
        assert_eq!(byte(&mapping, 7).load(Ordering::Relaxed), 5);
        let mut waiting = [crate::machine::driver::readable(Some(bell.raw_fd()))];
        crate::machine::driver::ppoll(&mut waiting, None).unwrap();
        mapping.discard_all().unwrap();
        mapping.forget_lost();
        assert_eq!(mapping.lost(), None);
        assert_eq!(bytes(&mapping), [0; PAGES]);
    }

    #[test]
    fn past_the_most_pieces_zeros_are_written() {
        let pages = PIECES * 2 + 64;
        let file = tempfile::tempfile().unwrap();
        file.set_len((pages * PAGE) as u64).unwrap();
        file.write_all_at(&[9], ((pages - 2) * PAGE) as u64)
            .unwrap();
        let mapping = Mapping::new(pages * PAGE, None, false, None).unwrap();
        mapping
            .map_file(0, (pages * PAGE) as u64, &file, 0)
            .unwrap();
        let at = |page: usize| (page * PAGE) as u64;
        assert_eq!(byte(&mapping, pages - 2).load(Ordering::Relaxed), 9);
        for page in (1..pages).step_by(2) {
            mapping.discard(at(page), PAGE as u64).unwrap();
        }
        // Of the last pages no piece of its own could be cut.
        assert_eq!(byte(&mapping, pages - 3).load(Ordering::Relaxed), 0);
        assert_eq!(byte(&mapping, pages - 2).load(Ordering::Relaxed), 9);
        for page in [0, 1, pages - 3, pages - 2] {
            byte(&mapping, page).store(7, Ordering::Relaxed);
        }
        // Parts of pieces, the memory between them, and what splits the last.
        mapping.discard(0, 3 * PAGE as u64).unwrap();
        mapping.discard(at(pages - 4), 3 * PAGE as u64).unwrap();
        for page in [0, 1, pages - 3, pages - 2] {
            assert_eq!(byte(&mapping, page).load(Ordering::Relaxed), 0, "{page}");
        }
        assert!(mapping.is_of_file());
        byte(&mapping, 3).store(7, Ordering::Relaxed);
        byte(&mapping, 4).store(7, Ordering::Relaxed);
        mapping.discard_all().unwrap();
        assert!(!mapping.is_of_file(), "all are taken out, however many");
        assert_eq!(byte(&mapping, 3).load(Ordering::Relaxed), 0);
        assert_eq!(byte(&mapping, 4).load(Ordering::Relaxed), 0);
    }
}
