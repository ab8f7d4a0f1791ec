//! Guest memory as devices see it.
//!
//! `vmm` owns the memory and decides its backing; this module only names the
//! type that both sides share, because queues need a concrete one.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryLoadGuard,
    GuestMemoryMmap, GuestMemoryRegion,
};

/// One consistent view of the guest's memory.
pub type GuestMap = GuestMemoryMmap<DirtyLog>;

/// The guest's memory, whose map may change when memory is plugged. A worker
/// takes a view for each batch of requests and never keeps one while it waits.
///
/// Clones are handles on the same memory.
#[derive(Clone)]
pub struct GuestMemory {
    map: GuestMemoryAtomic<GuestMap>,
    watchers: Arc<Mutex<Vec<Weak<dyn MapWatcher>>>>,
}

/// Has told somebody else where the guest's memory is, and has to tell of changes.
pub trait MapWatcher: Send + Sync {
    /// The map has changed. Called by whoever changed it, before the guest learns of what is new and before
    /// the host takes back what is gone; must neither change the map nor wait for a device.
    fn map_changed(&self, memory: &GuestMemory);
}

impl GuestMemory {
    /// Memory with this map.
    #[must_use]
    pub fn new(map: GuestMap) -> Self {
        Self {
            map: GuestMemoryAtomic::new(map),
            watchers: Arc::default(),
        }
    }

    /// Has the memory have another map. Whoever takes a view from now on sees it; views taken
    /// before stay as they are.
    pub fn replace(&self, map: GuestMap) {
        let exclusive = self.map.lock();
        exclusive
            .unwrap_or_else(PoisonError::into_inner)
            .replace(map);
        let watchers = self.watchers().clone();
        for watcher in watchers.iter().filter_map(Weak::upgrade) {
            watcher.map_changed(self);
        }
    }

    /// Has `watcher` be told of changes for as long as it is there. It takes a view of its own first.
    pub fn watch(&self, watcher: Weak<dyn MapWatcher>) {
        let mut watchers = self.watchers();
        watchers.retain(|old| old.strong_count() > 0 && !old.ptr_eq(&watcher));
        watchers.push(watcher);
    }

    fn watchers(&self) -> MutexGuard<'_, Vec<Weak<dyn MapWatcher>>> {
        // Each change of the list is one call.
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GuestAddressSpace for GuestMemory {
    type T = GuestMemoryLoadGuard<GuestMap>;
    type M = GuestMap;

    fn memory(&self) -> Self::T {
        self.map.memory()
    }
}

const PAGE_SHIFT: u32 = 12;

/// The host's side of one region of guest memory.
///
/// Any thread may call it. The memory stays mapped as long as a view of the region is held.
pub trait Backing: Send + Sync {
    /// The size of the host's pages in bytes, a power of two of at least 4096:
    /// less than one of them cannot be given back.
    fn page_size(&self) -> u64;

    /// Gives `len` bytes from `offset` into the region back to the host. They read as zeros
    /// until somebody writes them. Both are multiples of [`Backing::page_size`].
    ///
    /// # Errors
    ///
    /// The host's, or that the range is not all in the region; what of it has been given back is not known.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Marks those of the 4 KiB pages from `offset` into the region on of which the host has none at all. Where it has
    /// swapped nothing out they read as zeros. Marks none that it does not know of.
    fn absent(&self, _offset: u64, _pages: &mut [bool]) {}
}

/// Which 4 KiB pages of a region have been written by devices since it was
/// last harvested. Off until somebody wants it: then a write costs one load,
/// and no memory is spent.
///
/// Clones share one log, which is how a consumer keeps a handle on a region's.
#[derive(Clone, Debug, Default)]
pub struct DirtyLog(Arc<Shared>);

#[derive(Default)]
struct Shared {
    enabled: AtomicBool,
    pages: usize,
    words: OnceLock<Box<[AtomicU64]>>,
    /// Dropped with the last handle on the log.
    backing: Option<Arc<dyn Backing>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyLog")
            .field("enabled", &self.enabled)
            .finish_non_exhaustive()
    }
}

impl DirtyLog {
    /// A log for a region of `len` bytes whose memory `backing` keeps mapped.
    ///
    /// A region owns its log, so tying the mapping to the log makes it live
    /// exactly as long as anybody can reach the region.
    #[must_use]
    pub fn for_backing(len: usize, backing: Arc<dyn Backing>) -> Self {
        let pages = len.div_ceil(1 << PAGE_SHIFT);
        Self(Arc::new(Shared {
            pages,
            backing: Some(backing),
            ..Shared::default()
        }))
    }

    /// Starts to record. Pages written before are not known.
    pub fn enable(&self) {
        self.0.words.get_or_init(|| {
            (0..self.0.pages.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect()
        });
        self.0.enabled.store(true, Ordering::SeqCst);
    }

    /// Stops recording and forgets what was recorded.
    pub fn disable(&self) {
        self.0.enabled.store(false, Ordering::SeqCst);
        self.harvest(|_, _| ());
    }

    /// Hands each 64-page word that is not zero to `take` with its index, and clears it.
    pub fn harvest(&self, mut take: impl FnMut(usize, u64)) {
        for (index, word) in self.0.words.get().into_iter().flatten().enumerate() {
            let pages = word.swap(0, Ordering::SeqCst);
            if pages != 0 {
                take(index, pages);
            }
        }
    }

    fn mark(&self, offset: usize, len: usize) {
        if len == 0 || !self.0.enabled.load(Ordering::Relaxed) {
            return;
        }
        let Some(words) = self.0.words.get() else {
            return;
        };
        let first = offset >> PAGE_SHIFT;
        let last = offset.saturating_add(len - 1) >> PAGE_SHIFT;
        for page in first..=last.min(self.0.pages.saturating_sub(1)) {
            if let Some(word) = words.get(page / 64) {
                word.fetch_or(1 << (page % 64), Ordering::SeqCst);
            }
        }
    }

    fn is_marked(&self, offset: usize) -> bool {
        let page = offset >> PAGE_SHIFT;
        let word = self.0.words.get().and_then(|w| w.get(page / 64));
        word.is_some_and(|w| w.load(Ordering::SeqCst) >> (page % 64) & 1 == 1)
    }
}

/// Has all of memory count as written by a device, for those that do not tell what they write.
pub fn mark_all(view: &GuestMap) {
    for region in view.iter() {
        region.bitmap().mark_dirty(0, region.size());
    }
}

impl NewBitmap for DirtyLog {
    fn with_len(len: usize) -> Self {
        let pages = len.div_ceil(1 << PAGE_SHIFT);
        Self(Arc::new(Shared {
            pages,
            ..Shared::default()
        }))
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyLog {
    type S = DirtySlice<'a>;
}

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.mark(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_marked(offset)
    }

    fn slice_at(&self, offset: usize) -> DirtySlice<'_> {
        DirtySlice {
            log: self,
            base: offset,
        }
    }
}

/// The part of a [`DirtyLog`] that starts at some offset into its region.
#[derive(Clone, Copy, Debug)]
pub struct DirtySlice<'a> {
    log: &'a DirtyLog,
    base: usize,
}

impl<'a> DirtySlice<'a> {
    /// The host's side of the region that this is the log of; `None` where nobody
    /// has said.
    #[must_use]
    pub fn backing(self) -> Option<&'a dyn Backing> {
        self.log.0.backing.as_deref()
    }
}

impl<'a> WithBitmapSlice<'a> for DirtySlice<'_> {
    type S = Self;
}

impl BitmapSlice for DirtySlice<'_> {}

impl Bitmap for DirtySlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark(self.base.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.is_marked(self.base.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            log: self.log,
            base: self.base.saturating_add(offset),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirty(log: &DirtyLog) -> Vec<(usize, u64)> {
        let mut all = Vec::new();
        log.harvest(|index, pages| all.push((index, pages)));
        all
    }

    #[test]
    fn a_log_records_only_while_it_is_enabled() {
        let log = DirtyLog::with_len(1 << 20);
        log.mark_dirty(0, 4096);
        assert_eq!(dirty(&log), []);
        log.enable();
        log.mark_dirty(4095, 2);
        log.slice_at(0x40000).mark_dirty(0x1000, 1);
        assert!(log.dirty_at(0) && log.dirty_at(4096) && !log.dirty_at(8192));
        assert_eq!(dirty(&log), [(0, 0b11), (1, 0b10)]);
        assert_eq!(dirty(&log), []);
        log.mark_dirty(0, 1);
        log.disable();
        log.mark_dirty(0, 1);
        assert_eq!(dirty(&log), []);
    }

    #[test]
    fn marks_past_the_end_are_cut_off() {
        let log = DirtyLog::with_len(3 << PAGE_SHIFT);
        log.enable();
        log.mark_dirty(2 << PAGE_SHIFT, usize::MAX);
        log.mark_dirty(usize::MAX, 5);
        assert_eq!(dirty(&log), [(0, 0b100)]);
    }
}
