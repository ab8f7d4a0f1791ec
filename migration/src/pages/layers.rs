//! Memory that lies in the files of several snapshots: each holds what has changed since the next one was taken.
//!
//! A page is of the first file, from the newest on, that does not leave it to its parent. A chunk's checksum is over all pages that a
//! file has of it, also those that a newer one replaces: they are read with it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::set::Mask;
use super::{CHUNK_LEN, Chunk, PAGE_LEN, PageIndex, PagesError, Placed, Region, Run, chunks_of};
use crate::state::{RestoreError, SavedState};

/// Where the ground of a chunk is worse than the best by so many pages, it is still that of the chunk before: that is one mapping less.
const NEARLY: u32 = 32;

/// A chunk by its number among all chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// The number, from 0 on: which chunk of which range of RAM.
    pub number: u32,
    /// Where it is.
    pub place: Placed,
}

/// A file of guest memory and what it holds.
pub struct Layer {
    /// What errors call it.
    pub path: PathBuf,
    /// What is in it, which has been checked.
    pub index: PageIndex,
    /// The file.
    pub file: File,
}

/// What is wrong with a file of memory.
#[derive(Debug, thiserror::Error)]
#[error("{}", path.display())]
pub struct LayerError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    #[source]
    pub source: PagesError,
}

/// All of guest memory.
pub struct Layers {
    /// The newest first. There is one at least, and the last has all that the others leave.
    all: Vec<Layer>,
}

/// Takes the bytes of pages, with their guest-physical addresses.
type Take<'a> = &'a mut dyn FnMut(u64, &[u8]) -> io::Result<()>;

/// Pages of a chunk that are to be written over what has been mapped.
struct Patch {
    number: u32,
    pages: Mask,
}

/// How files are mapped in the place of memory.
pub struct Painting {
    /// What is mapped: of which file, counted from the newest, and which piece.
    pub mapped: Vec<(usize, Placed)>,
    patches: Vec<Patch>,
}

impl Painting {
    /// How many pages are to be copied.
    #[must_use]
    pub fn copied(&self) -> u64 {
        let pages = self.patches.iter().map(|patch| patch.pages.count());
        pages.map(u64::from).sum()
    }
}

/// Of which file each page of a chunk is.
struct Mix {
    /// Of each layer those pages of it that are not replaced. Layers below the last one that matters are not here.
    used: Vec<Mask>,
    /// Those of all layers; others are zeros.
    found: Mask,
}

impl Layers {
    /// Memory in `all`, of which the newest is the first. Each index has been checked, against the same memory.
    ///
    /// # Errors
    ///
    /// [`RestoreError::Invalid`]: the last one leaves pages to a parent, or there is none at all.
    pub fn new(all: Vec<Layer>) -> Result<Self, RestoreError> {
        if all.last().is_some_and(|layer| layer.index.is_whole()) {
            return Ok(Self { all });
        }
        Err(RestoreError::Invalid {
            schema: PageIndex::SCHEMA,
            reason: "it leaves pages to a parent, and there is none".to_owned(),
        })
    }

    /// The files, the newest first.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.all
    }

    /// Whether any of the files is compressed, so that they cannot be mapped.
    #[must_use]
    pub fn is_packed(&self) -> bool {
        self.all.iter().any(|layer| layer.index.is_packed())
    }

    fn regions(&self) -> &[Region] {
        let newest = self.all.first();
        newest.map_or(&[], |layer| &layer.index.regions)
    }

    /// The ranges of RAM, as [`super::Ram::ranges`] has them.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let regions = self.regions().iter();
        regions.map(|region| (region.start, region.len)).collect()
    }

    /// How many bytes of RAM there are.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.all.first().map_or(0, |layer| layer.index.total())
    }

    /// All chunks in ascending order, with their numbers.
    fn places(&self) -> impl Iterator<Item = ChunkPlace> + '_ {
        let places = self.regions().iter().flat_map(|region| {
            chunks_of(region.len).map(|(at, here)| Placed {
                start: region.start.saturating_add(at),
                len: here as u64,
                offset: region.offset.saturating_add(at),
            })
        });
        (0_u32..)
            .zip(places)
            .map(|(number, place)| ChunkPlace { number, place })
    }

    fn mix(&self, number: u32) -> Mix {
        let mut needed = Mask::first(CHUNK_LEN / PAGE_LEN);
        let mut mix = Mix {
            used: Vec::new(),
            found: Mask::default(),
        };
        for layer in &self.all {
            let Some((chunk, _)) = layer.index.chunk(number) else {
                break;
            };
            let used = Mask::of(&chunk.runs).and(&needed);
            mix.found = mix.found.or(&used);
            mix.used.push(used);
            needed = needed.and(&Mask::of(&chunk.kept));
            if needed.is_empty() {
                break;
            }
        }
        mix
    }

    /// The chunks that hold anything but zeros, in ascending order.
    #[must_use]
    pub fn written(&self) -> Vec<ChunkPlace> {
        let there = |chunk: &ChunkPlace| !self.mix(chunk.number).found.is_empty();
        self.places().filter(there).collect()
    }

    /// Reads the chunk `number` into `buffer`, which is as long as a chunk, and gives the ranges of bytes in it that were in
    /// a file; all others are zeros, whatever the buffer has there.
    ///
    /// # Errors
    ///
    /// [`LayerError`], where a file does not give what was written.
    pub fn load(&self, number: u32, buffer: &mut [u8]) -> Result<Vec<Range<usize>>, LayerError> {
        let mix = self.mix(number);
        let mut other = Vec::new();
        for (layer, used) in self.all.iter().zip(&mix.used) {
            let Some((chunk, place)) = layer.index.chunk(number).filter(|_| !used.is_empty())
            else {
                continue;
            };
            let failed = |source| LayerError {
                path: layer.path.clone(),
                source,
            };
            if *used == Mask::of(&chunk.runs) {
                // No byte of another layer is in their places.
                chunk.read(&layer.file, place, buffer).map_err(failed)?;
                continue;
            }
            other.resize(CHUNK_LEN, 0);
            chunk.read(&layer.file, place, &mut other).map_err(failed)?;
            for range in used.bytes() {
                let from = other.get(range.clone());
                if let Some((to, from)) = buffer.get_mut(range).zip(from) {
                    to.copy_from_slice(from);
                }
            }
        }
        Ok(mix.found.bytes())
    }

    /// Reads every page and gives those of chunks whose checksums are right to `take`, with their guest-physical addresses. `step`
    /// is as for [`PageIndex::write`].
    ///
    /// # Errors
    ///
    /// [`LayerError`]; some pages may have been given by then.
    pub fn read(
        &self,
        take: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
        step: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), LayerError> {
        let mut buffer = vec![0; CHUNK_LEN];
        let mut done = 0_u64;
        for ChunkPlace { number, place } in self.places() {
            if !step(done) {
                return Err(self.failed(PagesError::Cancelled));
            }
            for range in self.load(number, &mut buffer)? {
                let address = place.start.saturating_add(range.start as u64);
                let bytes = buffer.get(range).unwrap_or_default();
                take(address, bytes)
                    .map_err(|source| self.failed(PagesError::Memory { address, source }))?;
            }
            done = done.saturating_add(place.len);
        }
        if step(done) {
            Ok(())
        } else {
            Err(self.failed(PagesError::Cancelled))
        }
    }

    /// Names the newest file in an error that is of none.
    fn failed(&self, source: PagesError) -> LayerError {
        let newest = self.all.first();
        LayerError {
            path: newest.map(|layer| layer.path.clone()).unwrap_or_default(),
            source,
        }
    }

    /// Reads all of each file, compares every checksum, and sees that there is nothing else. `step` hears how many bytes have been gone through of as many times RAM as
    /// there are files.
    ///
    /// # Errors
    ///
    /// [`LayerError`].
    pub fn verify(&self, step: &mut dyn FnMut(u64) -> bool) -> Result<(), LayerError> {
        let mut before = 0_u64;
        for Layer { path, index, file } in &self.all {
            let mut step = |done: u64| step(before.saturating_add(done));
            let read = index.read(file, &mut |_, _| Ok(()), &mut step);
            read.and_then(|()| index.check_zeros(file, &mut |_| step(index.total())))
                .map_err(|source| LayerError {
                    path: path.clone(),
                    source,
                })?;
            before = before.saturating_add(index.total());
        }
        Ok(())
    }

    /// How the files, none of which is compressed, are mapped for memory that reads as zeros to be what was written: each chunk is of the file that has most of it, and
    /// what others have is copied over that. There are no more than `most` pieces, unless one file has more ranges of RAM than that;
    /// what lies in the smallest is copied otherwise.
    #[must_use]
    pub fn paint(&self, most: usize) -> Painting {
        if let [only] = self.all.as_slice() {
            return Painting {
                mapped: only
                    .index
                    .filled(most)
                    .into_iter()
                    .map(|p| (0, p))
                    .collect(),
                patches: Vec::new(),
            };
        }
        let mut mapped: Vec<(usize, Placed)> = Vec::new();
        let mut patches = Vec::new();
        for ChunkPlace { number, place } in self.places() {
            let mix = self.mix(number);
            let before = mapped.last().map(|(layer, _)| *layer);
            let Some((ground, pages)) = self.ground(number, &mix, before) else {
                continue;
            };
            match mapped.last_mut() {
                Some((layer, Placed { start, len, offset }))
                    if *layer == ground
                        && start.saturating_add(*len) == place.start
                        && offset.saturating_add(*len) == place.offset =>
                {
                    *len = len.saturating_add(place.len);
                }
                _ => mapped.push((ground, place)),
            }
            if !pages.is_empty() {
                patches.push(Patch { number, pages });
            }
        }
        if mapped.len() > most {
            mapped.sort_by_key(|(_, piece)| std::cmp::Reverse(piece.len));
            let rest = mapped.split_off(most);
            mapped.sort_by_key(|(_, piece)| piece.start);
            self.copy_instead(&rest, &mut patches);
        }
        Painting { mapped, patches }
    }

    /// The layer that is best mapped for a chunk, unless it is all zeros, and the pages that it has otherwise than memory is to have them.
    fn ground(&self, number: u32, mix: &Mix, before: Option<usize>) -> Option<(usize, Mask)> {
        let wrong = |layer: usize, used: &Mask| {
            let (chunk, _) = self.all.get(layer)?.index.chunk(number)?;
            let shown = Mask::of(&chunk.runs);
            Some(mix.found.or(&shown).without(used))
        };
        let layers = mix.used.iter().enumerate();
        let used = layers.filter(|(_, used)| !used.is_empty());
        let all = used.filter_map(|(layer, used)| Some((layer, wrong(layer, used)?)));
        let all: Vec<_> = all.collect();
        let best = all.iter().min_by_key(|(_, wrong)| wrong.count())?;
        let most = best.1.count().saturating_add(NEARLY);
        let same = all.iter().find(|(layer, _)| Some(*layer) == before);
        let chosen = same.filter(|(_, wrong)| wrong.count() <= most);
        Some(*chosen.unwrap_or(best))
    }

    /// The chunks of `pieces`, whose place reads as zeros, are copied.
    fn copy_instead(&self, pieces: &[(usize, Placed)], patches: &mut Vec<Patch>) {
        let mut starts: Vec<_> = pieces.iter().map(|(_, p)| (p.start, p.len)).collect();
        starts.sort_unstable();
        let is_in = |chunk: &ChunkPlace| {
            let below = starts.partition_point(|(start, _)| *start <= chunk.place.start);
            let piece = below.checked_sub(1).and_then(|place| starts.get(place));
            piece.is_some_and(|(start, len)| chunk.place.start < start.saturating_add(*len))
        };
        let numbers: Vec<u32> = self
            .places()
            .filter(is_in)
            .map(|chunk| chunk.number)
            .collect();
        patches.retain(|patch| numbers.binary_search(&patch.number).is_err());
        patches.extend(numbers.into_iter().map(|number| Patch {
            number,
            pages: self.mix(number).found,
        }));
    }

    /// Gives the pages that `painting` does not map to `take`, with their guest-physical addresses. Checksums are not
    /// compared. `step` says whether to go on.
    ///
    /// # Errors
    ///
    /// [`LayerError`]; some pages may have been given by then.
    pub fn copy(
        &self,
        painting: &Painting,
        take: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
        step: &mut dyn FnMut() -> bool,
    ) -> Result<(), LayerError> {
        let mut buffer = vec![0; CHUNK_LEN];
        for Patch { number, pages } in &painting.patches {
            if !step() {
                return Err(self.failed(PagesError::Cancelled));
            }
            let mix = self.mix(*number);
            let mut give = |run: Run, layer: Option<&Layer>| {
                self.give(*number, run, layer, (&mut buffer, &mut *take))
            };
            for (layer, used) in self.all.iter().zip(&mix.used) {
                for run in used.and(pages).runs() {
                    give(run, Some(layer))?;
                }
            }
            for run in pages.without(&mix.found).runs() {
                give(run, None)?;
            }
        }
        Ok(())
    }

    /// Gives pages of a chunk as `layer` has them, or zeros.
    fn give(
        &self,
        number: u32,
        run: Run,
        layer: Option<&Layer>,
        (buffer, take): (&mut [u8], Take<'_>),
    ) -> Result<(), LayerError> {
        let place = self.all.first().and_then(|layer| layer.index.chunk(number));
        let (Some((_, (address, offset))), range) = (place, run.bytes()) else {
            return Ok(());
        };
        let from = range.start as u64;
        let Some(bytes) = buffer.get_mut(..range.len()) else {
            return Ok(());
        };
        bytes.fill(0);
        if let Some(layer) = layer {
            let offset = offset.saturating_add(from);
            let read = layer.file.read_exact_at(bytes, offset);
            read.map_err(|source| LayerError {
                path: layer.path.clone(),
                source: PagesError::Read { offset, source },
            })?;
        }
        let address = address.saturating_add(from);
        take(address, bytes).map_err(|source| self.failed(PagesError::Memory { address, source }))
    }
}

impl PageIndex {
    /// The chunk `number`, its guest-physical address and its offset in the file.
    fn chunk(&self, number: u32) -> Option<(&Chunk, (u64, u64))> {
        let mut nth = usize::try_from(number).ok()?;
        let found = self.regions.iter().find_map(|region| {
            let found = region.chunks.get(nth).map(|chunk| (region, chunk, nth));
            nth = nth.saturating_sub(region.chunks.len());
            found
        });
        let (region, chunk, nth) = found?;
        let at = super::CHUNK.saturating_mul(nth as u64);
        let (start, offset) = (region.start, region.offset);
        Some((chunk, (start.saturating_add(at), offset.saturating_add(at))))
    }
}

#[cfg(test)]
mod tests;
