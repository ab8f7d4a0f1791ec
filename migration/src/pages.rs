//! Guest memory in a file: which pages are there, where, and whether they are what was written.
//!
//! # Contract
//!
//! * The file is as memory is: each range of RAM lies in it in one piece, at an offset of whole chunks. Pages of zeros are holes,
//!   so that the file can be mapped in place of memory and costs what memory costs.
//! * The index says of each chunk of [`CHUNK`] bytes which pages have been written, as runs, and the CRC-32 of
//!   their bytes in order; and which are as they were when the parent was taken, where there is a parent. All others are
//!   zeros. What it says is not trusted: [`PageIndex::check`] holds it against the memory that there is.
//! * A file may be compressed instead ([`PageWriter::packed`]): the pages of each chunk lie in a frame of their own, one behind the other. It
//!   cannot be mapped.
//! * Nothing is allocated in proportion to what an index claims: it is decoded from bytes that are there, of no more chunks than memory
//!   has ([`PageIndex::of_section`]), and a chunk is the most that is read at once.

mod beside;
mod decode;
mod layers;
mod packed;
mod set;
mod write;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::state::{RestoreError, SavedState};
use packed::Frame;

pub use beside::Feeder;
pub use layers::{ChunkPlace, Layer, LayerError, Layers, Painting};
pub use set::PageSet;
pub use write::PageWriter;

/// The page that runs are counted in, in bytes.
pub const PAGE: u64 = 4096;
/// What has one checksum, in bytes.
pub const CHUNK: u64 = 2 << 20;
/// How many pages a chunk has.
const CHUNK_PAGES: u16 = 512;
/// [`CHUNK`] as a length of memory.
const CHUNK_LEN: usize = 2 << 20;
/// [`PAGE`] as a length of memory.
const PAGE_LEN: usize = 4096;

/// Guest memory that is written to a file or read from one. Addresses are guest-physical bytes.
pub trait Ram {
    /// The ranges of RAM as start and length, in ascending order. Both are multiples of [`PAGE`].
    fn ranges(&self) -> Vec<(u64, u64)>;

    /// Reads `bytes` from `address`.
    ///
    /// # Errors
    ///
    /// Memory is gone that was there.
    fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Marks those of the pages from `address` on that have never been written or have been given back: they read as zeros,
    /// and are not looked at. None, where nobody knows.
    fn absent(&self, _address: u64, _pages: &mut [bool]) {}

    /// Writes `bytes` to `address`.
    ///
    /// # Errors
    ///
    /// Memory is gone that was there.
    fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Why memory was not written to a file or taken from it.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// The file takes no more.
    #[error("guest memory could not be written to the file at byte {offset}")]
    Write {
        /// Where in the file.
        offset: u64,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The file gives nothing.
    #[error("guest memory could not be read from the file at byte {offset}")]
    Read {
        /// Where in the file.
        offset: u64,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The guest's memory itself does not take or give bytes.
    #[error("guest memory at {address:#x} is out of reach")]
    Memory {
        /// The guest-physical address.
        address: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A chunk is not what was written.
    #[error(
        "the memory at {address:#x} is damaged: the checksum of its 2 MiB is {found:#010x}, not {stated:#010x}"
    )]
    Checksum {
        /// The guest-physical address of the chunk.
        address: u64,
        /// The checksum in the index.
        stated: u32,
        /// The checksum of the bytes.
        found: u32,
    },
    /// There are bytes where no page was written.
    #[error(
        "the memory at {address:#x} is damaged: it is zeros, and the file has something else there"
    )]
    NotZeros {
        /// The guest-physical address of the page.
        address: u64,
    },
    /// What is compressed does not become what was written.
    #[error("the memory at {address:#x} is damaged: its 2 MiB do not decompress: {reason}")]
    Frame {
        /// The guest-physical address of the chunk.
        address: u64,
        /// What is wrong.
        reason: String,
    },
    /// Nobody wants it any more.
    #[error("it was cancelled")]
    Cancelled,
}

/// Pages of a chunk that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    /// The first page, from the chunk's start.
    first: u16,
    /// How many there are.
    count: u16,
}

impl Run {
    /// In bytes from the chunk's start, for a run that has been checked.
    fn bytes(self) -> std::ops::Range<usize> {
        let first = usize::from(self.first).saturating_mul(PAGE_LEN);
        first..first.saturating_add(usize::from(self.count).saturating_mul(PAGE_LEN))
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Chunk {
    /// Pages that are in the file.
    runs: Vec<Run>,
    /// Pages that are as the parent has them, whose places in the file are holes.
    kept: Vec<Run>,
    crc: u32,
    /// Where the pages are, in a file that is compressed.
    frame: Option<Frame>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Region {
    /// The guest-physical address.
    start: u64,
    /// In bytes.
    len: u64,
    /// Where in the file, in bytes.
    offset: u64,
    chunks: Vec<Chunk>,
}

/// What a file of guest memory holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageIndex {
    regions: Vec<Region>,
    /// The file is compressed.
    packed: bool,
}

impl SavedState for PageIndex {
    const SCHEMA: &'static str = "memory-pages";
    const VERSION: u16 = 3;

    fn upgrade(found: u16, body: &[u8]) -> Result<Self, RestoreError> {
        Self::decode(found, body, None)
    }
}

/// One range of RAM and where it lies in the file, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The guest-physical address.
    pub start: u64,
    /// The length.
    pub len: u64,
    /// The offset in the file.
    pub offset: u64,
}

/// Where ranges of RAM, given as start and length, lie in a file.
fn place(ranges: &[(u64, u64)]) -> Vec<Placed> {
    let mut at = 0_u64;
    let place = |&(start, len): &(u64, u64)| {
        let offset = at;
        at = at.saturating_add(len.next_multiple_of(CHUNK));
        Placed { start, len, offset }
    };
    ranges.iter().map(place).collect()
}

impl PageIndex {
    /// Writes the pages of `ram` that are not zeros to `file`, which is empty. `step` hears how many bytes of RAM have been gone
    /// through, and says whether to go on. The file is not synced.
    ///
    /// # Errors
    ///
    /// [`PagesError`]; the file is then of no use.
    pub fn write(
        file: &File,
        ram: &dyn Ram,
        step: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Self, PagesError> {
        Self::write_since(file, ram, None, step)
    }

    /// As [`PageIndex::write`], of the pages of `changed` alone, if it is given: a parent has all others.
    ///
    /// # Errors
    ///
    /// [`PagesError`]; the file is then of no use.
    pub fn write_since(
        file: &File,
        ram: &dyn Ram,
        changed: Option<PageSet>,
        step: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Self, PagesError> {
        let writer = PageWriter::new(&ram.ranges()).since(changed);
        writer.write_all(file, ram, step)
    }

    /// The most bytes that the index of memory with `ranges` is encoded in.
    #[must_use]
    pub fn longest(ranges: &[(u64, u64)]) -> u64 {
        // Numbers of 64 bits take 10 bytes, of 32 bits 5 and of 16 bits 3; every page may be a run, of one kind or the other.
        const REGION: u64 = 4 * 10;
        const FRAME: u64 = 1 + 10 + 5;
        const CHUNK_LONGEST: u64 = 3 + 3 + 5 + FRAME + CHUNK_PAGES as u64 * 6;
        ranges.iter().fold(10 + 1, |sum, (_, len)| {
            let chunks = len.div_ceil(CHUNK).saturating_mul(CHUNK_LONGEST);
            sum.saturating_add(REGION).saturating_add(chunks)
        })
    }

    /// Sees that the index is one of memory with `ranges`, in a file of `file_len` bytes.
    ///
    /// # Errors
    ///
    /// [`RestoreError::Invalid`], which says what is wrong.
    pub fn check(&self, ranges: &[(u64, u64)], file_len: u64) -> Result<(), RestoreError> {
        let invalid = |reason: String| RestoreError::Invalid {
            schema: Self::SCHEMA,
            reason,
        };
        let placed = place(ranges);
        if !self.placed().eq(placed.iter().copied()) {
            let of = |(start, len): (u64, u64)| format!("{len:#x} bytes at {start:#x}");
            let list = |all: Vec<String>| all.join(", ");
            let found = list(self.placed().map(|p| of((p.start, p.len))).collect());
            let wanted = list(ranges.iter().copied().map(of).collect());
            return Err(invalid(format!("it has {found}; the machine has {wanted}")));
        }
        let end = placed.last().map_or(0, |p| p.offset.saturating_add(p.len));
        if !self.packed && file_len != end {
            let text = format!("the file has {file_len} bytes, not {end}");
            return Err(invalid(text));
        }
        for region in &self.regions {
            let lens: Vec<usize> = chunks_of(region.len).map(|(_, here)| here).collect();
            if lens.len() != region.chunks.len() {
                let text = format!("{} chunks for {} bytes", region.chunks.len(), region.len);
                return Err(invalid(text));
            }
            let fits = |(chunk, here): (&Chunk, &usize)| chunk.is_within(*here);
            if !region.chunks.iter().zip(&lens).all(fits) {
                let text = format!("runs at {:#x} overlap or end too late", region.start);
                return Err(invalid(text));
            }
            let framed = |chunk: &Chunk| match chunk.frame {
                Some(frame) => self.packed && !chunk.runs.is_empty() && frame.is_within(file_len),
                None => !self.packed || chunk.runs.is_empty(),
            };
            if !region.chunks.iter().all(framed) {
                let text = format!("frames at {:#x} are missing or lie elsewhere", region.start);
                return Err(invalid(text));
            }
        }
        Ok(())
    }

    /// Whether it says of no page that the parent has it.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let mut chunks = self.regions.iter().flat_map(|region| &region.chunks);
        chunks.all(|chunk| chunk.kept.is_empty())
    }

    /// Where each range of RAM lies in the file.
    pub fn placed(&self) -> impl Iterator<Item = Placed> + '_ {
        self.regions.iter().map(|region| Placed {
            start: region.start,
            len: region.len,
            offset: region.offset,
        })
    }

    /// What has to be mapped of the file, in whole chunks, for memory that reads as zeros to be what was written. The index has been checked.
    /// There are no more than `most` pieces, unless there are more ranges of RAM than that: gaps are mapped too then.
    #[must_use]
    pub fn filled(&self, most: usize) -> Vec<Placed> {
        let mut all = Vec::new();
        for region in &self.regions {
            for (chunk, (at, here)) in region.chunks.iter().zip(chunks_of(region.len)) {
                if chunk.runs.is_empty() {
                    continue;
                }
                let piece = Placed {
                    start: region.start.saturating_add(at),
                    len: here as u64,
                    offset: region.offset.saturating_add(at),
                };
                match all.last_mut() {
                    Some(Placed { start, len, offset })
                        if start.saturating_add(*len) == piece.start
                            && offset.saturating_add(*len) == piece.offset =>
                    {
                        *len = len.saturating_add(piece.len);
                    }
                    _ => all.push(piece),
                }
            }
        }
        if all.len() > most {
            return self.placed().collect();
        }
        all
    }

    /// How many bytes of RAM there are.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.regions
            .iter()
            .fold(0, |sum, region| sum.saturating_add(region.len))
    }

    /// How many bytes have been written.
    #[must_use]
    pub fn data(&self) -> u64 {
        self.sum(|chunk| &chunk.runs)
    }

    /// Whether the file is compressed, so that it cannot be mapped.
    #[must_use]
    pub fn is_packed(&self) -> bool {
        self.packed
    }

    /// How many bytes the file has for [`PageIndex::data`].
    #[must_use]
    pub fn stored(&self) -> u64 {
        if !self.packed {
            return self.data();
        }
        let chunks = self.regions.iter().flat_map(|region| &region.chunks);
        chunks.filter_map(|chunk| Some(chunk.frame?.bytes())).sum()
    }

    /// How many bytes are left to the parent.
    #[must_use]
    pub fn kept(&self) -> u64 {
        self.sum(|chunk| &chunk.kept)
    }

    fn sum(&self, runs: impl Fn(&Chunk) -> &Vec<Run>) -> u64 {
        let chunks = self.regions.iter().flat_map(|region| &region.chunks);
        let runs = chunks.flat_map(runs);
        runs.map(|run| u64::from(run.count).saturating_mul(PAGE))
            .sum()
    }

    /// Reads every page that is in `file` and gives those of a chunk whose checksum is right to `take`, with their guest-physical
    /// address. The index has been checked. `step` is as for [`PageIndex::write`].
    ///
    /// # Errors
    ///
    /// [`PagesError`]; some pages may have been given by then.
    pub fn read(
        &self,
        file: &File,
        take: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
        step: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), PagesError> {
        let mut buffer = vec![0; CHUNK_LEN];
        self.each_chunk(step, |chunk, place, _| {
            chunk.read(file, place, &mut buffer)?;
            chunk.runs.iter().try_for_each(|run| {
                let bytes = run.bytes();
                let address = place.0.saturating_add(bytes.start as u64);
                let bytes = buffer.get(bytes).unwrap_or_default();
                take(address, bytes).map_err(|source| PagesError::Memory { address, source })
            })
        })
    }

    /// Sees that `file` holds zeros wherever no page has been written, which is what is read there when it is mapped. What is compressed is
    /// not mapped. `step` is as for [`PageIndex::write`].
    ///
    /// # Errors
    ///
    /// [`PagesError`].
    pub fn check_zeros(
        &self,
        file: &File,
        step: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), PagesError> {
        if self.is_packed() {
            return Ok(());
        }
        let mut buffer = vec![0; CHUNK_LEN];
        self.each_chunk(step, |chunk, place, here| {
            if chunk.runs.iter().any(|run| run.bytes() == (0..here)) {
                return Ok(());
            }
            let buffer = buffer.get_mut(..here).unwrap_or_default();
            chunk.check_zeros(file, place, buffer)
        })
    }

    /// Goes through all chunks: each with its guest-physical address and its offset in the file, and with its length.
    fn each_chunk(
        &self,
        step: &mut dyn FnMut(u64) -> bool,
        mut act: impl FnMut(&Chunk, (u64, u64), usize) -> Result<(), PagesError>,
    ) -> Result<(), PagesError> {
        let mut done = 0_u64;
        for region in &self.regions {
            for (chunk, (at, here)) in region.chunks.iter().zip(chunks_of(region.len)) {
                if !step(done) {
                    return Err(PagesError::Cancelled);
                }
                let (start, offset) = (region.start, region.offset);
                let place = (start.saturating_add(at), offset.saturating_add(at));
                act(chunk, place, here)?;
                done = done.saturating_add(here as u64);
            }
        }
        if step(done) {
            Ok(())
        } else {
            Err(PagesError::Cancelled)
        }
    }
}

impl Chunk {
    /// Sees that its part of the file, which begins at `offset` and is as long as `buffer`, has nothing but its runs.
    fn check_zeros(
        &self,
        file: &File,
        (address, offset): (u64, u64),
        buffer: &mut [u8],
    ) -> Result<(), PagesError> {
        let read = file.read_exact_at(buffer, offset);
        read.map_err(|source| PagesError::Read { offset, source })?;
        for run in &self.runs {
            buffer.get_mut(run.bytes()).unwrap_or_default().fill(0);
        }
        match buffer.iter().position(|byte| *byte != 0) {
            None => Ok(()),
            Some(at) => {
                let address = address.saturating_add(at as u64) / PAGE * PAGE;
                Err(PagesError::NotZeros { address })
            }
        }
    }

    /// Runs are not empty, ascend, do not touch others of their kind and end within `len` bytes; no page is of both kinds.
    fn is_within(&self, len: usize) -> bool {
        let fine = |runs: &[Run]| {
            let mut end = None;
            runs.iter().all(|run| {
                let apart = end.is_none_or(|end| run.first > end);
                let last = run.first.checked_add(run.count);
                end = last;
                let inside = last.is_some_and(|last| last <= CHUNK_PAGES) && run.bytes().end <= len;
                apart && inside && run.count > 0
            })
        };
        if !fine(&self.runs) || !fine(&self.kept) {
            return false;
        }
        let mut all: Vec<Run> = self.runs.iter().chain(&self.kept).copied().collect();
        all.sort_unstable_by_key(|run| run.first);
        let ends = |(a, b): (&Run, &Run)| a.first.saturating_add(a.count) <= b.first;
        all.iter().zip(all.iter().skip(1)).all(ends)
    }

    /// Reads the pages into their places in `buffer`, and sees that they are what was written.
    fn read(
        &self,
        file: &File,
        (address, offset): (u64, u64),
        buffer: &mut [u8],
    ) -> Result<(), PagesError> {
        let mut hasher = crc32fast::Hasher::new();
        let lens = self.runs.iter().map(|run| run.bytes().len());
        let frame = self
            .frame
            .map(|frame| frame.read(file, address, lens.sum()));
        let packed = frame.transpose()?;
        let mut rest = packed.as_deref().unwrap_or_default();
        for run in &self.runs {
            let range = run.bytes();
            let offset = offset.saturating_add(range.start as u64);
            let bytes = buffer.get_mut(range).unwrap_or_default();
            if packed.is_some() {
                let Some((pages, others)) = rest.split_at_checked(bytes.len()) else {
                    break;
                };
                bytes.copy_from_slice(pages);
                rest = others;
            } else {
                file.read_exact_at(bytes, offset)
                    .map_err(|source| PagesError::Read { offset, source })?;
            }
            hasher.update(bytes);
        }
        let (stated, found) = (self.crc, hasher.finalize());
        if found == stated {
            Ok(())
        } else {
            Err(PagesError::Checksum {
                address,
                stated,
                found,
            })
        }
    }
}

/// The chunks of `len` bytes, as offset and length.
fn chunks_of(len: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..len.div_ceil(CHUNK)).map(move |index| {
        let at = index.saturating_mul(CHUNK);
        let here = len.saturating_sub(at).min(CHUNK);
        (at, usize::try_from(here).unwrap_or(CHUNK_LEN))
    })
}

#[cfg(test)]
mod tests;
