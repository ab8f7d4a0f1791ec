//! Reading an index, of this version and the one before, with no more memory than it may need.
//!
//! A chunk takes four bytes of an index at least, and twenty times that of memory. So there are no more chunks than memory has that the index is one of,
//! and no more runs than a chunk has pages: what claims more is refused before anything is allocated for it.
//!
//! Version 2 was before files were compressed: its chunks have no frame, and it does not say whether the file is compressed.

use serde::Deserialize;

use super::{CHUNK_PAGES, Chunk, PageIndex, Region, Run, chunks_of};
use crate::section::Section;
use crate::state::{RestoreError, SavedState};

/// The version without compression.
const PLAIN: u16 = 2;

/// What is left of an index.
struct Reader<'a> {
    rest: &'a [u8],
    version: u16,
}

impl<'a> Reader<'a> {
    fn failed(&self, source: postcard::Error) -> RestoreError {
        RestoreError::Decode {
            schema: PageIndex::SCHEMA,
            version: self.version,
            source,
        }
    }

    fn take<T: Deserialize<'a>>(&mut self) -> Result<T, RestoreError> {
        let taken = postcard::take_from_bytes(self.rest);
        let (value, rest) = taken.map_err(|source| self.failed(source))?;
        self.rest = rest;
        Ok(value)
    }

    /// How many of something there are.
    fn count(&mut self, most: usize, what: &str) -> Result<usize, RestoreError> {
        let count: u64 = self.take()?;
        let fits = usize::try_from(count).ok().filter(|count| *count <= most);
        fits.ok_or_else(|| RestoreError::Invalid {
            schema: PageIndex::SCHEMA,
            reason: format!("it claims {count} {what}, and there are {most} at most"),
        })
    }

    fn runs(&mut self) -> Result<Vec<Run>, RestoreError> {
        let count = self.count(usize::from(CHUNK_PAGES), "runs of a chunk")?;
        (0..count).map(|_| self.take()).collect()
    }

    fn chunk(&mut self) -> Result<Chunk, RestoreError> {
        Ok(Chunk {
            runs: self.runs()?,
            kept: self.runs()?,
            crc: self.take()?,
            frame: match self.version {
                PLAIN => None,
                _ => self.take()?,
            },
        })
    }

    /// A range of RAM. `ram` is the length of the one that it is to be, if that is known.
    fn region(&mut self, ram: Option<u64>) -> Result<Region, RestoreError> {
        let (start, len, offset) = self.take()?;
        // Each takes more than a byte.
        let most = ram.map_or(self.rest.len(), |len| chunks_of(len).count());
        let count = self.count(most, "chunks of a range of memory")?;
        let chunks = (0..count).map(|_| self.chunk());
        Ok(Region {
            start,
            len,
            offset,
            chunks: chunks.collect::<Result<_, _>>()?,
        })
    }
}

impl PageIndex {
    /// Decodes an index of memory with `ranges`, as [`super::Ram::ranges`] has them, which is for [`PageIndex::check`] to hold it against. What it
    /// claims beyond that is refused without memory being taken for it.
    ///
    /// # Errors
    ///
    /// [`RestoreError`].
    pub fn of_section(section: &Section, ranges: &[(u64, u64)]) -> Result<Self, RestoreError> {
        Self::decode(section.version, &section.body, Some(ranges))
    }

    pub(super) fn decode(
        found: u16,
        body: &[u8],
        ranges: Option<&[(u64, u64)]>,
    ) -> Result<Self, RestoreError> {
        if found != PLAIN && found != Self::VERSION {
            return Err(RestoreError::Version {
                schema: Self::SCHEMA,
                found,
                newest: Self::VERSION,
            });
        }
        let mut reader = Reader {
            rest: body,
            version: found,
        };
        let most = ranges.map_or(body.len(), <[_]>::len);
        let count = reader.count(most, "ranges of memory")?;
        let regions = (0..count).map(|nth| {
            let range = ranges.and_then(|ranges| ranges.get(nth));
            reader.region(range.map(|(_, len)| *len))
        });
        let regions = regions.collect::<Result<_, _>>()?;
        let packed = match found {
            PLAIN => false,
            _ => reader.take()?,
        };
        if !reader.rest.is_empty() {
            return Err(reader.failed(postcard::Error::DeserializeBadEncoding));
        }
        Ok(Self { regions, packed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGES: [(u64, u64); 2] = [(0, 4 << 20), (1 << 32, 1 << 20)];

    /// An index of these ranges of RAM with so many chunks of zeros, of which it says that there are `claimed`, and that there are so many ranges.
    fn index(version: u16, all: u64, regions: &[((u64, u64), usize, u64)]) -> Section {
        let mut body = postcard::to_stdvec(&all).unwrap();
        let mut offset = 0_u64;
        for ((start, len), chunks, claimed) in regions {
            body.extend(postcard::to_stdvec(&(start, len, offset, claimed)).unwrap());
            offset += len.next_multiple_of(super::super::CHUNK);
            let chunk = if version == PLAIN { 3 } else { 4 };
            body.extend(vec![0; chunks * chunk]);
        }
        if version != PLAIN {
            body.push(0);
        }
        let (unit, schema) = ("machine".to_owned(), PageIndex::SCHEMA.to_owned());
        Section {
            unit,
            schema,
            version,
            body,
        }
    }

    fn refused(section: &Section) -> String {
        let error = PageIndex::of_section(section, &RANGES).unwrap_err();
        assert!(matches!(error, RestoreError::Invalid { .. }), "{error}");
        error.to_string()
    }

    #[test]
    fn an_index_has_no_more_ranges_chunks_and_runs_than_memory_whatever_it_claims() {
        let [low, high] = RANGES;
        for version in [PLAIN, PageIndex::VERSION] {
            let whole = index(version, 2, &[(low, 2, 2), (high, 1, 1)]);
            let read = PageIndex::of_section(&whole, &RANGES).unwrap();
            read.check(&RANGES, 5 << 20).unwrap();
            assert_eq!(read, whole.decode().unwrap());
            // Also where the bytes are there.
            for (chunks, claimed) in [(3, 3), (1 << 16, 1 << 16), (0, 1 << 40), (0, u64::MAX)] {
                let told = refused(&index(version, 2, &[(low, chunks, claimed), (high, 1, 1)]));
                let wanted =
                    format!("claims {claimed} chunks of a range of memory, and there are 2");
                assert!(told.contains(&wanted), "{told}");
            }
            for claimed in [3, 1 << 40] {
                let told = refused(&index(version, claimed, &[(low, 2, 2), (high, 1, 1)]));
                assert!(told.contains(&format!("claims {claimed} ranges")), "{told}");
            }
            // The length of a range is that of memory, not its own.
            let long = (low.0, 1 << 50);
            let told = refused(&index(version, 2, &[(long, 9, 9), (high, 1, 1)]));
            assert!(told.contains("claims 9 chunks"), "{told}");
            let mut runs = index(version, 1, &[(low, 0, 2)]);
            runs.body
                .truncate(runs.body.len() - usize::from(version != PLAIN));
            runs.body.extend(postcard::to_stdvec(&513_u16).unwrap());
            runs.body.extend(vec![1; 2000]);
            let told = refused(&runs);
            assert!(told.contains("claims 513 runs"), "{told}");
            let mut long = whole.clone();
            long.body.push(0);
            let error = PageIndex::of_section(&long, &RANGES).unwrap_err();
            assert!(matches!(error, RestoreError::Decode { .. }), "{error}");
        }
    }
}
