//! Memory that a file gives, which becomes the machine's own while the guest runs.
//!
//! # Contract
//!
//! * A part of memory is copied beside it ([`Window::fill`]) and again where it has been written meanwhile ([`Window::again`]), which a log of writes
//!   tells that has begun before. Then, while vCPUs and devices stand, the copy's pages are put into its place ([`Window::take_in`]).
//! * Wherever it ends, memory holds what it held before: a part is the file's or its own.
//! * The host has a part twice for as long as it is being copied, so that parts are [`WINDOW`] bytes at most.

use std::io;
use std::sync::Arc;

use migration::pages::{CHUNK, PAGE, PageSet, Ram};

use super::mapping::Mapping;
use super::restored::Restored;

/// The most bytes that the host has twice.
pub const WINDOW: u64 = 128 << 20;
/// How many bytes are read at a time.
const BLOCK: usize = 64 << 10;
/// [`PAGE`] as a length of memory.
const PAGE_LEN: usize = 4096;

/// A part of memory some of which is a file's, and the copy of it.
pub struct Window {
    mapping: Arc<Mapping>,
    /// Guest-physical: where the mapping begins.
    guest: u64,
    /// Where the part begins in the mapping, in bytes: whole chunks.
    offset: u64,
    copy: Mapping,
    /// What of it was the file's: offsets into the mapping, and lengths, in bytes.
    pieces: Vec<(u64, u64)>,
}

impl Restored {
    /// How many bytes a file gives.
    #[must_use]
    pub fn bytes_of_file(&self) -> u64 {
        let all = self.mappings().iter();
        let pieces = all.flat_map(|(_, mapping)| mapping.of_file(0, mapping.len()));
        pieces.map(|(_, len)| len).sum()
    }

    /// The next part of which some is a file's; `None`: all of memory is the machine's own.
    ///
    /// # Errors
    ///
    /// The host has no room for its copy.
    pub fn window(&self) -> io::Result<Option<Window>> {
        self.window_of(WINDOW)
    }

    /// As [`Restored::window`], of `most` bytes at most.
    fn window_of(&self, most: u64) -> io::Result<Option<Window>> {
        for (guest, mapping) in self.mappings() {
            let Some(first) = mapping.of_file(0, mapping.len()).first().copied() else {
                continue;
            };
            let offset = first.0 - first.0 % CHUNK;
            let len = most.min(mapping.len().saturating_sub(offset));
            let bytes = usize::try_from(len).map_err(io::Error::other)?;
            let copy = Mapping::new(bytes, None, false, None)?;
            copy.advise_thp(mapping.thp());
            return Ok(Some(Window {
                pieces: mapping.of_file(offset, len),
                mapping: Arc::clone(mapping),
                guest: *guest,
                offset,
                copy,
            }));
        }
        Ok(None)
    }
}

impl Window {
    /// How many of its bytes a file gives.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|(_, len)| len).sum()
    }

    /// Copies what a file gives, as it is in `ram` now. `go` says whether to go on.
    ///
    /// # Errors
    ///
    /// The file does not give it, or it is not to go on.
    pub fn fill(&self, ram: &dyn Ram, go: &dyn Fn() -> bool) -> io::Result<()> {
        for &(start, len) in &self.pieces {
            let pieces = blocks(start, len);
            pieces.into_iter().try_for_each(|(at, len)| {
                if go() {
                    self.copy(ram, at, len, false)
                } else {
                    Err(io::ErrorKind::Interrupted.into())
                }
            })?;
        }
        Ok(())
    }

    /// How many bytes of it are in `written`, a set of pages of memory with `ranges`.
    #[must_use]
    pub fn count(&self, ranges: &[(u64, u64)], written: &PageSet) -> u64 {
        self.written(ranges, written)
            .iter()
            .map(|(_, len)| *len as u64)
            .sum()
    }

    /// Copies what has been written since, as it is now.
    ///
    /// # Errors
    ///
    /// The file does not give it.
    pub fn again(&self, ram: &dyn Ram, ranges: &[(u64, u64)], written: &PageSet) -> io::Result<()> {
        for (at, len) in self.written(ranges, written) {
            for (at, len) in blocks(at, len as u64) {
                self.copy(ram, at, len, true)?;
            }
        }
        Ok(())
    }

    /// Puts the copy into the place of what a file gives. vCPUs and devices stand, and the copy is as memory is.
    ///
    /// # Errors
    ///
    /// The file has failed, or the host refuses: memory holds what it did.
    pub fn take_in(self) -> io::Result<()> {
        if self.mapping.lost().is_some() {
            return Err(lost());
        }
        self.mapping.take_in(self.offset, &self.copy)
    }

    /// What of it is in `written`: offsets into the mapping, and lengths, in bytes.
    fn written(&self, ranges: &[(u64, u64)], written: &PageSet) -> Vec<(u64, usize)> {
        let begin = self.guest.saturating_add(self.offset);
        let end = begin.saturating_add(self.copy.len());
        let chunks = written.chunks().into_iter().enumerate();
        let there = chunks.filter(|(_, there)| *there);
        let runs = there.flat_map(|(index, _)| written.runs_of(ranges, index));
        // It begins and ends with chunks.
        let own = runs.filter(|(address, _)| (begin..end).contains(address));
        own.filter_map(|(address, len)| {
            let offset = address.checked_sub(self.guest)?;
            Some((offset, usize::try_from(len).ok()?))
        })
        .collect()
    }

    /// Copies whole pages from `at` in the mapping; zeros too where they may follow something else.
    fn copy(&self, ram: &dyn Ram, at: u64, len: usize, zeros: bool) -> io::Result<()> {
        let mut block = [0_u8; BLOCK];
        let bytes = block.get_mut(..len).ok_or(io::ErrorKind::InvalidInput)?;
        ram.read(self.guest.saturating_add(at), bytes)?;
        let mut to = at.saturating_sub(self.offset);
        for page in bytes.chunks(PAGE_LEN) {
            if zeros || page.iter().any(|byte| *byte != 0) {
                let slice = self.copy.slice(to, page.len());
                let slice = slice.ok_or(io::ErrorKind::InvalidInput)?;
                slice.copy_from(page);
            }
            to = to.saturating_add(PAGE);
        }
        Ok(())
    }
}

/// `len` bytes from `at` in parts of [`BLOCK`] bytes at most.
fn blocks(at: u64, len: u64) -> Vec<(u64, usize)> {
    let parts = (0..len).step_by(BLOCK);
    let part = |start: u64| {
        let left = usize::try_from(len.saturating_sub(start)).unwrap_or(BLOCK);
        (at.saturating_add(start), left.min(BLOCK))
    };
    parts.map(part).collect()
}

fn lost() -> io::Error {
    io::Error::other("the file does not give its bytes any more")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use virtio::memory::GuestMap;
    use vm_memory::{
        Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion,
    };

    use super::*;
    use crate::machine::snapshot::SnapshotRam;
    use crate::memory::dirty::{Consumer, WriteLog};
    use crate::memory::{GuestRam, RamSlot, RamSpec};

    const SIZE: usize = 16 << 20;
    /// Where the file's bytes begin in memory, and how many there are.
    const START: usize = 2 << 20;
    const LEN: usize = 9 << 20;

    struct Nothing;

    impl WriteLog for Nothing {
        fn log(&self, _slot: &RamSlot, _on: bool) -> io::Result<()> {
            Ok(())
        }

        fn fetch(&self, _slot: &RamSlot) -> io::Result<Vec<u64>> {
            Ok(Vec::new())
        }
    }

    struct Rig {
        file: File,
        restored: Arc<Restored>,
        consumer: Consumer,
        map: GuestMap,
        /// What memory is to hold.
        model: Vec<u8>,
        _ram: GuestRam,
    }

    impl Rig {
        fn new() -> Self {
            let spec = RamSpec {
                size: SIZE as u64,
                shared: false,
                huge_page: None,
                thp: Some(false),
                prefault: false,
            };
            let mut ram = GuestRam::new(&spec).unwrap();
            let file = tempfile::tempfile().unwrap();
            let mut bytes = vec![0_u8; LEN];
            for (number, page) in bytes.chunks_mut(PAGE_LEN).enumerate() {
                // Each third one holds zeros.
                page.fill(u8::try_from(number % 251).unwrap() * u8::from(number % 3 != 0));
            }
            file.write_all_at(&bytes, 0).unwrap();
            let restored = ram.restorable().unwrap();
            let (_, mapping) = &restored.mappings()[0];
            mapping
                .map_file(START as u64, LEN as u64, &file, 0)
                .unwrap();
            let mut model = vec![0; SIZE];
            model[START..START + LEN].copy_from_slice(&bytes);
            Self {
                file,
                restored,
                consumer: ram.tracker(Box::new(Nothing)).begin().unwrap(),
                map: GuestMap::clone(&ram.memory().memory()),
                model,
                _ram: ram,
            }
        }

        fn ram(&self) -> SnapshotRam {
            SnapshotRam::new(GuestMap::clone(&self.map), false)
        }

        fn write(&mut self, at: usize, bytes: &[u8]) {
            self.map
                .write_slice(bytes, GuestAddress(at as u64))
                .unwrap();
            self.model[at..at + bytes.len()].copy_from_slice(bytes);
        }

        fn give_back(&mut self, at: usize, len: usize) {
            let region = self.map.find_region(GuestAddress(at as u64)).unwrap();
            let backing = region.bitmap().backing().unwrap();
            backing.discard(at as u64, len as u64).unwrap();
            self.model[at..at + len].fill(0);
        }

        fn check(&self) {
            let mut found = vec![0; SIZE];
            self.map.read_slice(&mut found, GuestAddress(0)).unwrap();
            let wrong = found.iter().zip(&self.model).position(|(a, b)| a != b);
            assert_eq!(wrong, None);
        }

        fn again(&self, window: &Window) {
            let written = self.consumer.take().unwrap();
            window
                .again(&self.ram(), self.consumer.ranges(), &written)
                .unwrap();
        }
    }

    #[test]
    fn memory_holds_the_same_at_every_step_and_is_its_own_at_the_end() {
        let mut rig = Rig::new();
        let mut windows = 0;
        rig.write(START + 5000, b"before");
        rig.give_back(START + (3 << 20), 64 << 10);
        while let Some(window) = rig.restored.window_of(4 << 20).unwrap() {
            windows += 1;
            let at = usize::try_from(window.offset).unwrap();
            window.fill(&rig.ram(), &|| true).unwrap();
            rig.check();
            // Meanwhile the guest writes, clears pages and gives some back.
            rig.write(at + 70_000, &[windows; 10_000]);
            rig.write(at + (1 << 20), &[0; 8192]);
            rig.give_back(at + (2 << 20) - 4096, 8192);
            rig.again(&window);
            rig.write(at + 70_100, b"late");
            rig.write(SIZE - 100, &[windows; 100]);
            let written = rig.consumer.look().unwrap();
            assert_eq!(window.count(rig.consumer.ranges(), &written), 4096);
            rig.again(&window);
            window.take_in().unwrap();
            rig.check();
        }
        assert_eq!((windows, rig.restored.bytes_of_file()), (3, 0));
        rig.file.set_len(0).unwrap();
        rig.check();
        assert!(!rig.restored.is_lost());
        rig.write(START, &[7; 4096]);
        rig.give_back(START, 4096);
        rig.check();
    }

    #[test]
    fn what_is_given_up_leaves_memory_as_it_was() {
        let mut rig = Rig::new();
        let window = rig.restored.window_of(4 << 20).unwrap().unwrap();
        let stopped = window.fill(&rig.ram(), &|| false).unwrap_err();
        assert_eq!(stopped.kind(), io::ErrorKind::Interrupted);
        window.fill(&rig.ram(), &|| true).unwrap();
        rig.write(START + 100, b"stays");
        drop(window);
        rig.check();
        assert_eq!(rig.restored.bytes_of_file(), LEN as u64);
    }

    #[test]
    fn nothing_is_taken_in_of_a_file_that_has_failed() {
        let rig = Rig::new();
        let (_, mapping) = &rig.restored.mappings()[0];
        let bell = Arc::new(super::super::lost::Bell::new().unwrap());
        mapping.watch(&bell).unwrap();
        let window = rig.restored.window_of(4 << 20).unwrap().unwrap();
        window.fill(&rig.ram(), &|| true).unwrap();
        rig.file.set_len(0).unwrap();
        // Somebody else touches it.
        let mut byte = [1];
        rig.map
            .read_slice(&mut byte, GuestAddress((START + LEN - 1) as u64))
            .unwrap();
        let refused = window.take_in().unwrap_err().to_string();
        assert!(refused.contains("does not give its bytes"), "{refused}");
        assert!(window_fails(&rig), "and nothing more is copied");
    }

    fn window_fails(rig: &Rig) -> bool {
        let window = rig.restored.window_of(4 << 20).unwrap().unwrap();
        window.fill(&rig.ram(), &|| true).is_err()
    }
}
