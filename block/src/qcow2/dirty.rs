//! Bitmaps in memory: which parts of a disk have been written.
//!
//! Bits are set without a lock by whoever writes, and before the bytes are on their way. A bitmap takes memory for what is
//! set in it, whatever the size of the disk.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// How many words of bits are allocated together.
const CHUNK_WORDS: usize = 512;
/// How many bits those are.
const CHUNK_BITS: u64 = CHUNK_WORDS as u64 * 64;

#[derive(Debug)]
enum Chunk {
    /// All bits are set.
    Ones,
    Words(Box<[AtomicU64]>),
}

impl Chunk {
    fn words(value: u64) -> Box<[AtomicU64]> {
        (0..CHUNK_WORDS).map(|_| AtomicU64::new(value)).collect()
    }

    fn word(&self, index: usize) -> u64 {
        match self {
            Self::Ones => u64::MAX,
            Self::Words(words) => words
                .get(index)
                .map_or(0, |word| word.load(Ordering::Relaxed)),
        }
    }
}

/// The bits of one bitmap.
#[derive(Debug)]
pub(crate) struct Bits {
    granularity_bits: u32,
    size: u64,
    /// Those that are not there are zeros.
    chunks: Vec<OnceLock<Chunk>>,
}

/// What a part of a bitmap is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// All bits are clear.
    Zeros,
    /// All bits are set.
    Ones,
    /// As it is on disk.
    Bytes(Vec<u8>),
}

impl Bits {
    /// No bit is set. The disk has `size` bytes, and a bit stands for `1 << granularity_bits` of them.
    pub(crate) fn new(granularity_bits: u32, size: u64) -> Self {
        let mut bits = Self {
            granularity_bits,
            size: 0,
            chunks: Vec::new(),
        };
        bits.resize(size);
        bits
    }

    /// How many bytes the bits of a disk take.
    pub(crate) fn bytes_for(granularity_bits: u32, size: u64) -> u64 {
        size.div_ceil(1 << granularity_bits).div_ceil(8)
    }

    /// The size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// What a bit stands for, in bytes of the disk.
    pub(crate) fn granularity(&self) -> u64 {
        1_u64.checked_shl(self.granularity_bits).unwrap_or(u64::MAX)
    }

    /// How many bytes of the disk are marked.
    pub(crate) fn marked(&self) -> u64 {
        let mut sum = 0_u64;
        self.each_range(|offset, len| {
            let within = len.min(self.size.saturating_sub(offset));
            sum = sum.saturating_add(within);
        });
        sum
    }

    /// The number of bits.
    fn count(&self) -> u64 {
        self.size.div_ceil(1 << self.granularity_bits)
    }

    /// Marks a range of the disk, in bytes; what is past its end is left out.
    pub(crate) fn set(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return;
        }
        let mut at = offset >> self.granularity_bits;
        let end = ((end - 1) >> self.granularity_bits) + 1;
        while at < end {
            let next = end.min((at / CHUNK_BITS + 1) * CHUNK_BITS);
            self.set_in_chunk(at, next);
            at = next;
        }
    }

    /// Sets the bits from `first` up to `end`, all of one chunk.
    fn set_in_chunk(&self, first: u64, end: u64) {
        let index = usize::try_from(first / CHUNK_BITS).unwrap_or(usize::MAX);
        let Some(chunk) = self.chunks.get(index) else {
            return;
        };
        let whole = end - first == CHUNK_BITS;
        let chunk = chunk.get_or_init(|| {
            if whole {
                Chunk::Ones
            } else {
                Chunk::Words(Chunk::words(0))
            }
        });
        let Chunk::Words(words) = chunk else {
            return;
        };
        let (mut at, end) = (first % CHUNK_BITS, end - first + first % CHUNK_BITS);
        while at < end {
            let next = end.min((at / 64 + 1) * 64);
            let mask = (u64::MAX >> (64 - (next - at))) << (at % 64);
            let index = usize::try_from(at / 64).unwrap_or(usize::MAX);
            if let Some(word) = words.get(index)
                && word.load(Ordering::Relaxed) & mask != mask
            {
                word.fetch_or(mask, Ordering::Relaxed);
            }
            at = next;
        }
    }

    /// Calls `each` with ranges of the disk, as (offset, length), that together are all that is marked.
    pub(crate) fn each_range(&self, mut each: impl FnMut(u64, u64)) {
        for (number, chunk) in self.chunks.iter().enumerate() {
            let first = number as u64 * CHUNK_BITS;
            match chunk.get() {
                None => {}
                Some(Chunk::Ones) => each(
                    first << self.granularity_bits,
                    CHUNK_BITS << self.granularity_bits,
                ),
                Some(Chunk::Words(words)) => {
                    for (at, word) in (first..).step_by(64).zip(words) {
                        let mut word = word.load(Ordering::Relaxed);
                        while word != 0 {
                            let bit = at + u64::from(word.trailing_zeros());
                            each(bit << self.granularity_bits, 1 << self.granularity_bits);
                            word &= word - 1;
                        }
                    }
                }
            }
        }
    }

    /// A part of the bitmap as it is on disk; `start` and `len` are bytes of it, and multiples of 8.
    pub(crate) fn part(&self, start: u64, len: u64) -> Part {
        let mut bytes = Vec::new();
        let (mut any, mut all) = (false, true);
        for word in start / 8..(start + len) / 8 {
            let index = usize::try_from(word / CHUNK_WORDS as u64).unwrap_or(usize::MAX);
            let within = usize::try_from(word % CHUNK_WORDS as u64).unwrap_or(0);
            let chunk = self.chunks.get(index).and_then(OnceLock::get);
            let value = chunk.map_or(0, |chunk| chunk.word(within));
            any |= value != 0;
            all &= value == u64::MAX;
            bytes.extend(value.to_le_bytes());
        }
        match (any, all) {
            (false, _) => Part::Zeros,
            (true, true) => Part::Ones,
            (true, false) => Part::Bytes(bytes),
        }
    }

    /// Sets the bits that a part of the bitmap has on disk; `start` is in bytes, a multiple of 8.
    pub(crate) fn take_in(&self, start: u64, bytes: &[u8]) {
        let (words, _) = bytes.as_chunks::<8>();
        for (at, word) in (start * 8..).step_by(64).zip(words) {
            let mut word = u64::from_le_bytes(*word);
            if word == u64::MAX {
                self.set(at << self.granularity_bits, 64 << self.granularity_bits);
                continue;
            }
            while word != 0 {
                let bit = at + u64::from(word.trailing_zeros());
                self.set(bit << self.granularity_bits, 1);
                word &= word - 1;
            }
        }
    }

    /// Goes with the size of the disk; new bits are clear.
    pub(crate) fn resize(&mut self, size: u64) {
        self.size = size;
        let count = self.count();
        let chunks = usize::try_from(count.div_ceil(CHUNK_BITS)).unwrap_or(usize::MAX);
        self.chunks.resize_with(chunks, OnceLock::new);
        let left = count % CHUNK_BITS;
        let Some(last) = self.chunks.last_mut().filter(|_| left != 0) else {
            return;
        };
        if matches!(last.get(), Some(Chunk::Ones)) {
            *last = OnceLock::from(Chunk::Words(Chunk::words(u64::MAX)));
        }
        if let Some(Chunk::Words(words)) = last.get_mut() {
            for (at, word) in (0..CHUNK_BITS).step_by(64).zip(words) {
                let keep = match left.saturating_sub(at) {
                    0 => 0,
                    bits @ 1..64 => u64::MAX >> (64 - bits),
                    _ => u64::MAX,
                };
                *word.get_mut() &= keep;
            }
        }
    }
}

/// There is nothing to record in.
const NONE: u8 = 0;
/// There are bitmaps, which say on disk that they are up to date.
const IDLE: u8 = 1;
/// The bitmaps on disk say that they are not up to date.
const ARMED: u8 = 2;

/// The name of the bitmap that records for the time after a backup that is under way. No bitmap of an image can have it, so
/// that it is never written to one.
const NEXT: &[u8] = b"";

/// A bitmap that records, with its name.
pub(crate) type Recorded = (Vec<u8>, Bits);

/// The bitmaps of an image that record changes.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    state: AtomicU8,
    bitmaps: RwLock<Vec<Recorded>>,
}

impl Recorder {
    /// Whether the bitmaps on disk have to be marked before anything is written.
    pub(crate) fn is_idle(&self) -> bool {
        self.state.load(Ordering::Acquire) == IDLE
    }

    /// Whether the bitmaps on disk are marked.
    pub(crate) fn is_armed(&self) -> bool {
        self.state.load(Ordering::Acquire) == ARMED
    }

    /// The bitmaps on disk have been marked, or brought up to date.
    pub(crate) fn set_armed(&self, armed: bool) {
        let state = match (armed, self.read().is_empty()) {
            (_, true) => NONE,
            (true, false) => ARMED,
            (false, false) => IDLE,
        };
        self.state.store(state, Ordering::Release);
    }

    /// Records a change of a range of the disk, in bytes.
    pub(crate) fn note(&self, offset: u64, len: u64) {
        if self.state.load(Ordering::Acquire) != NONE {
            self.read()
                .iter()
                .for_each(|(_, bits)| bits.set(offset, len));
        }
    }

    /// As [`Recorder::note`]; whether the bitmaps on disk are marked, or there are none. Where they are not, they are to be marked before the change: who
    /// writes them out may have missed it.
    #[must_use]
    pub(crate) fn noted(&self, offset: u64, len: u64) -> bool {
        self.note(offset, len);
        // What is noted is seen by who brings them up to date, or that is seen here.
        fence(Ordering::SeqCst);
        !self.is_idle()
    }

    /// What is recorded is about to be read and written out, after which the bitmaps on disk are not marked any more.
    pub(crate) fn begin_store(&self) {
        self.set_armed(false);
        fence(Ordering::SeqCst);
    }

    /// These are the bitmaps now, as they are on disk.
    pub(crate) fn replace(&self, bitmaps: Vec<Recorded>) {
        *self.write() = bitmaps;
        self.set_armed(false);
    }

    /// Goes with the size of the disk.
    pub(crate) fn resize(&self, size: u64) {
        self.write()
            .iter_mut()
            .for_each(|(_, bits)| bits.resize(size));
    }

    /// Looks at the bitmap `name`; `None` when there is none that records.
    pub(crate) fn look<T>(&self, name: &[u8], look: impl FnOnce(&Bits) -> T) -> Option<T> {
        let bitmaps = self.read();
        let found = bitmaps.iter().find(|(other, _)| other == name);
        found.map(|(_, bits)| look(bits))
    }

    /// Records in a second bitmap beside `name` from now on, in which nothing is marked yet. Both record until
    /// [`Recorder::adopt_next`] or [`Recorder::forget_next`]. `false`: `name` does not record, or there is a second one already.
    pub(crate) fn begin_next(&self, name: &[u8]) -> bool {
        let mut bitmaps = self.write();
        if bitmaps.iter().any(|(other, _)| other == NEXT) {
            return false;
        }
        let Some((_, bits)) = bitmaps.iter().find(|(other, _)| other == name) else {
            return false;
        };
        let next = Bits::new(bits.granularity_bits, bits.size);
        bitmaps.push((NEXT.to_vec(), next));
        true
    }

    /// Has the second bitmap take the place of `name`. `false`: there is none of them any more, and nothing is changed.
    pub(crate) fn adopt_next(&self, name: &[u8]) -> bool {
        let mut bitmaps = self.write();
        let place = |wanted: &[u8]| bitmaps.iter().position(|(other, _)| other == wanted);
        let (Some(old), Some(next)) = (place(name), place(NEXT)) else {
            return false;
        };
        bitmaps.swap(old, next);
        if let Some((renamed, _)) = bitmaps.get_mut(old) {
            *renamed = name.to_vec();
        }
        // What is there now is the old one.
        bitmaps.remove(next);
        true
    }

    /// Drops the second bitmap: `name` has recorded all along.
    pub(crate) fn forget_next(&self) {
        self.write().retain(|(other, _)| other != NEXT);
    }

    /// Changes which bitmaps there are, where none of them are on disk.
    pub(crate) fn edit<T>(&self, change: impl FnOnce(&mut Vec<Recorded>) -> T) -> T {
        let changed = change(&mut self.write());
        self.set_armed(true);
        changed
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Vec<Recorded>> {
        self.bitmaps.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<Recorded>> {
        self.bitmaps.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(bits: &Bits) -> Vec<(u64, u64)> {
        let mut all: Vec<(u64, u64)> = Vec::new();
        bits.each_range(|offset, len| match all.last_mut() {
            Some((start, have)) if *start + *have == offset => *have += len,
            _ => all.push((offset, len)),
        });
        all
    }

    #[test]
    fn every_touched_unit_is_marked_and_no_other() {
        let bits = Bits::new(9, 1 << 30);
        bits.set(511, 2);
        bits.set(1 << 20, 0);
        bits.set((1 << 30) - 1, 100);
        bits.set(32768 * 512 - 512, 1024);
        let expected = [(0, 1024), (32768 * 512 - 512, 1024), ((1 << 30) - 512, 512)];
        assert_eq!(ranges(&bits), expected);
    }

    #[test]
    fn the_form_on_disk_goes_in_and_out() {
        let bits = Bits::new(12, 1 << 30);
        bits.set(0, 4096 * 9);
        bits.set(64 << 20, 512 << 20);
        assert_eq!(
            bits.part(0, 8),
            Part::Bytes(vec![0xff, 1, 0, 0, 0, 0, 0, 0])
        );
        assert_eq!(bits.part(8, 512), Part::Zeros);
        assert_eq!(bits.part(4096, 4096), Part::Ones);
        let copy = Bits::new(12, 1 << 30);
        for start in (0..32768).step_by(512) {
            match bits.part(start, 512) {
                Part::Zeros => {}
                Part::Ones => copy.take_in(start, &[0xff; 512]),
                Part::Bytes(bytes) => copy.take_in(start, &bytes),
            }
        }
        assert_eq!(ranges(&copy), ranges(&bits));
    }

    #[test]
    fn a_smaller_disk_forgets_what_is_past_its_end() {
        let mut bits = Bits::new(9, 100 << 20);
        bits.set(0, 100 << 20);
        bits.resize((17 << 20) + 513);
        assert_eq!(ranges(&bits), [(0, (17 << 20) + 1024)]);
        bits.resize(100 << 20);
        assert_eq!(ranges(&bits), [(0, (17 << 20) + 1024)]);
        bits.resize(0);
        bits.resize(1 << 20);
        assert_eq!(ranges(&bits), []);
    }

    #[test]
    fn the_second_bitmap_takes_the_place_of_the_first_or_leaves_it_as_it_is() {
        let recorder = Recorder::default();
        recorder.edit(|bitmaps| {
            for name in [b"a", b"b"] {
                bitmaps.push((name.to_vec(), Bits::new(16, 1 << 20)));
            }
        });
        recorder.note(0, 1);
        assert!(!recorder.begin_next(b"c") && recorder.begin_next(b"a"));
        assert!(!recorder.begin_next(b"b"), "there is one already");
        recorder.forget_next();
        assert!(!recorder.adopt_next(b"a"), "there is none");
        assert!(recorder.begin_next(b"a"));
        recorder.note(1 << 17, 1);
        let marked = |name: &[u8]| recorder.look(name, ranges).unwrap();
        let both = [(0, 65536), (1 << 17, 65536)];
        assert_eq!(marked(b"a"), both);
        assert!(recorder.adopt_next(b"a"));
        assert_eq!((marked(b"a"), marked(b"b")), (vec![both[1]], both.to_vec()));
        assert_eq!(recorder.read().len(), 2);
        assert!(recorder.begin_next(b"b"));
        recorder.note(1 << 18, 1);
        recorder.forget_next();
        assert_eq!((marked(b"b").len(), recorder.read().len()), (3, 2));
        assert_eq!(recorder.look(b"b", Bits::marked), Some(3 << 16));
    }

    #[test]
    fn a_recorder_without_bitmaps_is_neither_idle_nor_armed() {
        let recorder = Recorder::default();
        recorder.set_armed(true);
        assert!(!recorder.is_armed() && !recorder.is_idle());
        recorder.replace(vec![(b"a".into(), Bits::new(16, 1 << 20))]);
        assert!(recorder.is_idle());
        assert!(!recorder.noted(0, 1), "they are to be marked first");
        recorder.set_armed(true);
        assert!(recorder.noted(0, 1));
        recorder.begin_store();
        assert!(!recorder.noted(0, 1), "they may be on disk without it");
        recorder.set_armed(true);
        recorder.note(0, 1);
        assert_eq!(ranges(&recorder.read()[0].1), [(0, 65536)]);
        assert!(recorder.is_armed());
    }
}
