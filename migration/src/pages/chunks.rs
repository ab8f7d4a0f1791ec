//! Memory that is taken from the file chunk by chunk, in any order.

use std::fs::File;
use std::ops::Range;

use super::{CHUNK, PageIndex, PagesError, Placed, chunks_of};

/// A chunk that has been written, by its number among all chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// The number, from 0 on: which chunk of which range of RAM.
    pub number: u32,
    /// Where it is.
    pub place: Placed,
}

impl PageIndex {
    /// The chunks that have pages in the file, in ascending order. The index has been checked.
    #[must_use]
    pub fn written(&self) -> Vec<ChunkPlace> {
        let regions = self.regions.iter();
        let all = regions.flat_map(|region| {
            let chunks = region.chunks.iter().zip(chunks_of(region.len));
            chunks.map(move |(chunk, (at, here))| {
                let place = Placed {
                    start: region.start.saturating_add(at),
                    len: here as u64,
                    offset: region.offset.saturating_add(at),
                };
                (chunk, place)
            })
        });
        let numbered = (0_u32..).zip(all);
        let there = numbered.filter(|(_, (chunk, _))| !chunk.runs.is_empty());
        there
            .map(|(number, (_, place))| ChunkPlace { number, place })
            .collect()
    }

    /// Reads the chunk `number` into `buffer`, which is as long as a chunk, and gives the ranges of bytes in it that
    /// are pages of the file; all others are zeros. The index has been checked, and the number is one of [`PageIndex::written`]'s.
    ///
    /// # Errors
    ///
    /// [`PagesError`], where the file does not give what was written.
    pub fn load(
        &self,
        number: u32,
        file: &File,
        buffer: &mut [u8],
    ) -> Result<Vec<Range<usize>>, PagesError> {
        let mut nth = usize::try_from(number).unwrap_or(usize::MAX);
        let found = self.regions.iter().find_map(|region| {
            let found = region.chunks.get(nth).map(|chunk| (region, chunk, nth));
            nth = nth.saturating_sub(region.chunks.len());
            found
        });
        let Some((region, chunk, nth)) = found else {
            return Ok(Vec::new());
        };
        let at = CHUNK.saturating_mul(nth as u64);
        let place = (
            region.start.saturating_add(at),
            region.offset.saturating_add(at),
        );
        chunk.read(file, place, buffer)?;
        Ok(chunk.runs.iter().map(|run| run.bytes()).collect())
    }
}
