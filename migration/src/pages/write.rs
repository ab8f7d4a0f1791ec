//! Writing guest memory to a file, chunk by chunk in any order.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::beside::Buffer;
use super::packed::{Frame, Packer};
use super::set::{Mask, PageSet};
use super::{
    CHUNK_PAGES, Chunk, PAGE_LEN, PageIndex, PagesError, Placed, Ram, Region, Run, chunks_of, place,
};

/// How many pages are copied, and then looked at, at once: what a processor's cache holds besides other things.
const BATCH: usize = 64;

/// With runs that are as long as this on an average, in bytes, a chunk is written past the page cache.
const LONG: usize = 16 * PAGE_LEN;

/// Of a chunk its guest-physical address, its offset in the file and its length.
pub(super) type Place = (u64, u64, usize);

static ZEROS: [u8; PAGE_LEN] = [0; PAGE_LEN];

/// Guest memory on its way into a file. Chunks are counted through all ranges, from 0.
pub struct PageWriter {
    placed: Vec<Placed>,
    pub(super) places: Vec<Place>,
    pub(super) chunks: Vec<Option<Chunk>>,
    buffer: Option<Buffer>,
    /// What has changed since the parent was taken, where there is one.
    pub(super) since: Option<PageSet>,
    pub(super) store: Store,
}

/// How pages are put into the file.
#[derive(Default)]
pub(super) struct Store {
    /// Where it is compressed.
    packer: Option<Packer>,
    /// The same file, for writes past the page cache.
    direct: Option<File>,
}

impl PageWriter {
    /// Nothing is written of memory with `ranges`, as [`Ram::ranges`] has them.
    #[must_use]
    pub fn new(ranges: &[(u64, u64)]) -> Self {
        let placed = place(ranges);
        let places: Vec<_> = placed
            .iter()
            .flat_map(|part| {
                chunks_of(part.len).map(|(at, here)| {
                    let address = part.start.saturating_add(at);
                    (address, part.offset.saturating_add(at), here)
                })
            })
            .collect();
        Self {
            placed,
            chunks: vec![None; places.len()],
            places,
            buffer: None,
            since: None,
            store: Store::default(),
        }
    }

    /// Long runs of pages are written to `direct`, which is the same file opened with `O_DIRECT`: they cost no memory of the host and less of
    /// its time. What it refuses is written through the page cache, and so is all that is compressed.
    #[must_use]
    pub fn past_the_cache(mut self, direct: Option<File>) -> Self {
        self.store.direct = direct;
        self
    }

    /// The file is compressed: it is smaller, cannot be mapped, and takes the processor longer.
    ///
    /// # Errors
    ///
    /// [`PagesError::Write`]: there is no memory for that.
    pub fn packed(mut self) -> Result<Self, PagesError> {
        let packer = Packer::new().map_err(|source| PagesError::Write { offset: 0, source })?;
        self.store.packer = Some(packer);
        Ok(self)
    }

    /// Writes all of `ram`, which does not change meanwhile. `step` is as for [`PageIndex::write`].
    ///
    /// # Errors
    ///
    /// [`PagesError`]; the file is then of no use.
    pub fn write_all(
        mut self,
        file: &File,
        ram: &dyn Ram,
        step: &mut dyn FnMut(u64) -> bool,
    ) -> Result<PageIndex, PagesError> {
        let mut done = 0_u64;
        for index in 0..self.count() {
            if !step(done) {
                return Err(PagesError::Cancelled);
            }
            let written = self.write(index, file, ram)?;
            done = done.saturating_add(written.unwrap_or(0));
        }
        match self.finish(file)? {
            Some(index) if step(done) => Ok(index),
            _ => Err(PagesError::Cancelled),
        }
    }

    /// Only the pages of `changed` are written, if it is given: all others are as a parent has them. What need not be written at all is
    /// done.
    #[must_use]
    pub fn since(mut self, changed: Option<PageSet>) -> Self {
        let Some(changed) = changed else {
            return self;
        };
        for (index, (to, (.., len))) in self.chunks.iter_mut().zip(&self.places).enumerate() {
            if changed.of_chunk(index).is_empty() {
                *to = Some(kept(*len));
            }
        }
        self.since = Some(changed);
        self
    }

    /// How many chunks there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.places.len()
    }

    /// How many bytes of RAM need not be written, or have been.
    #[must_use]
    pub fn done(&self) -> u64 {
        let chunks = self.chunks.iter().zip(&self.places);
        let done = chunks.filter(|(chunk, _)| chunk.is_some());
        done.map(|(_, (.., len))| *len as u64).sum()
    }

    /// All pages of a chunk are zeros, but for those that a parent has.
    pub fn leave_zeros(&mut self, index: usize) {
        let (Some((.., len)), Some(to)) = (self.places.get(index), self.chunks.get_mut(index))
        else {
            return;
        };
        let all = Mask::first(len.div_ceil(PAGE_LEN));
        let kept = self
            .since
            .as_ref()
            .map(|pages| all.without(&pages.of_chunk(index)).runs());
        *to = Some(Chunk {
            kept: kept.unwrap_or_default(),
            ..Chunk::default()
        });
    }

    /// Writes the pages of a chunk of `ram` that are not zeros: how many bytes of RAM that is. The chunk does not change meanwhile.
    /// `None` when there is no such chunk.
    ///
    /// # Errors
    ///
    /// [`PagesError`]; the file is then of no use.
    pub fn write(
        &mut self,
        index: usize,
        file: &File,
        ram: &dyn Ram,
    ) -> Result<Option<u64>, PagesError> {
        let (Some(place), Some(to)) = (self.places.get(index), self.chunks.get_mut(index)) else {
            return Ok(None);
        };
        let since = self.since.as_ref().map(|pages| pages.of_chunk(index));
        let buffer = self.buffer.get_or_insert_with(Buffer::new);
        let chunk = scan(ram, (*place, since), buffer.bytes_mut())?;
        let frame = self
            .store
            .put((file, place.1), &chunk.runs, buffer.bytes())?;
        *to = Some(Chunk { frame, ..chunk });
        Ok(Some(place.2 as u64))
    }

    /// Writes the pages of a chunk that are not zeros from `content`, which is as long as a chunk: those that lie in `there`, ranges of whole pages. All others are
    /// zeros. Nothing happens when there is no such chunk.
    ///
    /// # Errors
    ///
    /// [`PagesError`]; the file is then of no use.
    pub fn put(
        &mut self,
        index: usize,
        file: &File,
        content: &[u8],
        there: &[Range<usize>],
    ) -> Result<(), PagesError> {
        let (Some((_, offset, _)), Some(to)) = (self.places.get(index), self.chunks.get_mut(index))
        else {
            return Ok(());
        };
        let mut chunk = Chunk::default();
        for (page, bytes) in (0_u16..).zip(content.chunks(PAGE_LEN)) {
            let at = usize::from(page).saturating_mul(PAGE_LEN);
            let is_there = there.iter().any(|range| range.contains(&at));
            if is_there && ZEROS.get(..bytes.len()) != Some(bytes) {
                add(&mut chunk.runs, page);
            }
        }
        let mut hasher = crc32fast::Hasher::new();
        for run in &chunk.runs {
            hasher.update(content.get(run.bytes()).unwrap_or_default());
        }
        chunk.crc = hasher.finalize();
        chunk.frame = self.store.put((file, *offset), &chunk.runs, content)?;
        *to = Some(chunk);
        Ok(())
    }

    /// What `file` holds, when every chunk has been written; `None` when one has not. The file is not synced.
    ///
    /// # Errors
    ///
    /// [`PagesError::Write`].
    pub fn finish(self, file: &File) -> Result<Option<PageIndex>, PagesError> {
        let packed = self.store.packer.is_some();
        if !packed {
            let end = self.placed.last();
            let end = end.map_or(0, |part| part.offset.saturating_add(part.len));
            file.set_len(end).map_err(|source| PagesError::Write {
                offset: end,
                source,
            })?;
        }
        let chunks: Option<Vec<Chunk>> = self.chunks.into_iter().collect();
        let Some(mut chunks) = chunks.map(Vec::into_iter) else {
            return Ok(None);
        };
        let region = |part: Placed| Region {
            start: part.start,
            len: part.len,
            offset: part.offset,
            chunks: chunks.by_ref().take(chunks_of(part.len).count()).collect(),
        };
        let regions = self.placed.into_iter().map(region).collect();
        Ok(Some(PageIndex { regions, packed }))
    }
}

impl Store {
    /// Writes `runs` of `content`, a chunk that lies in the file at an offset: where they are, when they are compressed.
    pub fn put(
        &mut self,
        (file, offset): (&File, u64),
        runs: &[Run],
        content: &[u8],
    ) -> Result<Option<Frame>, PagesError> {
        let pages = |run: &Run| content.get(run.bytes()).unwrap_or_default();
        if let Some(packer) = &mut self.packer {
            runs.iter().for_each(|run| packer.take(pages(run)));
            return packer.write(file);
        }
        let all: usize = runs.iter().map(|run| run.bytes().len()).sum();
        let long = all >= runs.len().saturating_mul(LONG);
        for run in runs {
            let offset = offset.saturating_add(run.bytes().start as u64);
            let direct = self.direct.as_ref().filter(|_| long);
            match direct.map(|direct| direct.write_all_at(pages(run), offset)) {
                Some(Ok(())) => continue,
                Some(Err(_)) => self.direct = None,
                None => (),
            }
            file.write_all_at(pages(run), offset)
                .map_err(|source| PagesError::Write { offset, source })?;
        }
        Ok(None)
    }
}

/// A chunk of `len` bytes that is as the parent has it.
fn kept(len: usize) -> Chunk {
    let count = u16::try_from(len.div_ceil(PAGE_LEN)).unwrap_or(CHUNK_PAGES);
    Chunk {
        kept: vec![Run { first: 0, count }],
        ..Chunk::default()
    }
}

/// Adds a page to runs, after all that are there.
pub(super) fn add(runs: &mut Vec<Run>, page: u16) {
    match runs.last_mut() {
        Some(run) if run.first.saturating_add(run.count) == page => run.count += 1,
        _ => runs.push(Run {
            first: page,
            count: 1,
        }),
    }
}

/// Copies the pages of a chunk into their places in `buffer`, which is as long as a chunk, and tells which are not zeros: of all, or of those of
/// `since` alone. All others have any bytes.
pub(super) fn scan(
    ram: &dyn Ram,
    ((address, _, len), since): (Place, Option<Mask>),
    buffer: &mut [u8],
) -> Result<Chunk, PagesError> {
    let mut chunk = Chunk::default();
    let mut hasher = crc32fast::Hasher::new();
    let mut absent = [false; CHUNK_PAGES as usize];
    let pages = len.div_ceil(PAGE_LEN);
    let known = absent.get_mut(..pages).unwrap_or_default();
    ram.absent(address, known);
    if let Some(since) = since {
        chunk.kept = Mask::first(pages).without(&since).runs();
        for (page, absent) in (0..).zip(known.iter_mut()) {
            *absent |= !since.holds(page);
        }
    }
    let places = buffer.get_mut(..len).unwrap_or_default();
    let batches = places.chunks_mut(BATCH * PAGE_LEN).zip(known.chunks(BATCH));
    let mut page = 0_u16;
    for (bytes, known) in batches {
        let at = u64::from(page).saturating_mul(PAGE_LEN as u64);
        read(ram, address.saturating_add(at), known, bytes)?;
        for (content, absent) in bytes.chunks(PAGE_LEN).zip(known) {
            if !absent && ZEROS.get(..content.len()) != Some(content) {
                add(&mut chunk.runs, page);
                hasher.update(content);
            }
            page = page.saturating_add(1);
        }
    }
    chunk.crc = hasher.finalize();
    Ok(chunk)
}

/// Reads the pages that are not absent into their places in `bytes`.
fn read(ram: &dyn Ram, address: u64, absent: &[bool], bytes: &mut [u8]) -> Result<(), PagesError> {
    let mut page = 0;
    for group in absent.chunk_by(|a, b| a == b) {
        let start = page * PAGE_LEN;
        page += group.len();
        let end = bytes.len().min(page * PAGE_LEN);
        if group.first() == Some(&false) {
            let address = address.saturating_add(start as u64);
            let bytes = bytes.get_mut(start..end).unwrap_or_default();
            ram.read(address, bytes)
                .map_err(|source| PagesError::Memory { address, source })?;
        }
    }
    Ok(())
}
