//! Writing guest memory to a file, chunk by chunk in any order.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::set::{Mask, PageSet};
use super::{
    CHUNK_PAGES, Chunk, PAGE_LEN, PageIndex, PagesError, Placed, Ram, Region, Run, chunks_of, place,
};

/// How many pages are read and written at once: what a processor's cache holds besides other things.
const BATCH: usize = 64;

static ZEROS: [u8; PAGE_LEN] = [0; PAGE_LEN];

/// Guest memory on its way into a file. Chunks are counted through all ranges, from 0.
pub struct PageWriter {
    placed: Vec<Placed>,
    /// Of each chunk its guest-physical address, its offset in the file and its length.
    places: Vec<(u64, u64, usize)>,
    chunks: Vec<Option<Chunk>>,
    buffer: Vec<u8>,
    /// What has changed since the parent was taken, where there is one.
    since: Option<PageSet>,
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
            buffer: vec![0; BATCH * PAGE_LEN],
            since: None,
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
        *to = Some(write_chunk(file, ram, (*place, since), &mut self.buffer)?);
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
            let range = run.bytes();
            let offset = offset.saturating_add(range.start as u64);
            let bytes = content.get(range).unwrap_or_default();
            file.write_all_at(bytes, offset)
                .map_err(|source| PagesError::Write { offset, source })?;
            hasher.update(bytes);
        }
        chunk.crc = hasher.finalize();
        *to = Some(chunk);
        Ok(())
    }

    /// What `file` holds, when every chunk has been written; `None` when one has not. The file is not synced.
    ///
    /// # Errors
    ///
    /// [`PagesError::Write`].
    pub fn finish(self, file: &File) -> Result<Option<PageIndex>, PagesError> {
        let end = self.placed.last();
        let end = end.map_or(0, |part| part.offset.saturating_add(part.len));
        file.set_len(end).map_err(|source| PagesError::Write {
            offset: end,
            source,
        })?;
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
        Ok(Some(PageIndex { regions }))
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

/// Writes the pages of a chunk that are not zeros: all, or those of `since` alone.
fn write_chunk(
    file: &File,
    ram: &dyn Ram,
    ((address, offset, len), since): ((u64, u64, usize), Option<Mask>),
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
    for (batch, known) in known.chunks(BATCH).enumerate() {
        if known.iter().all(|absent| *absent) {
            continue;
        }
        let first = batch.saturating_mul(BATCH);
        let at = first.saturating_mul(PAGE_LEN);
        let here = len.saturating_sub(at).min(buffer.len());
        let bytes = buffer.get_mut(..here).unwrap_or_default();
        let address = address.saturating_add(at as u64);
        read(ram, address, known, bytes)?;
        let mut runs = Vec::new();
        let contents = bytes.chunks(PAGE_LEN).zip(known);
        for (page, (content, absent)) in (0..).zip(contents) {
            if !absent && ZEROS.get(..content.len()) != Some(content) {
                add(&mut runs, page);
            }
        }
        for run in runs {
            let range = run.bytes();
            let offset = offset.saturating_add((at.saturating_add(range.start)) as u64);
            let bytes = bytes.get(range).unwrap_or_default();
            file.write_all_at(bytes, offset)
                .map_err(|source| PagesError::Write { offset, source })?;
            hasher.update(bytes);
            let first = u16::try_from(first).unwrap_or(CHUNK_PAGES);
            let all = run.first..run.first.saturating_add(run.count);
            all.for_each(|page| add(&mut chunk.runs, first.saturating_add(page)));
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
