//! Pages on their way: runs of zeros, pages as they are, compressed, or as what differs from what went before.
//!
//! # Contract
//!
//! * An [`Encoder`] takes batches of pages and gives frames; a [`Decoder`] takes frames and gives pages to a [`PageSink`]. Each stream has its own
//!   of both, and a page stays with its stream, so that what differs is against what the peer has.
//! * Frames are untrusted. A run that is not aligned, not in memory, or whose data are more or fewer than its pages, is an error; nothing of that frame has been
//!   given to the sink then, of deltas those before it aside. Room is that of one frame.
//! * Zeros are never sent as data, and what compresses to no less than it was is sent as it is.

mod delta;

use std::io;
use std::os::fd::BorrowedFd;

use lz4_flex::block as lz4;
use zstd::bulk::{Compressor, Decompressor};

use super::frame::{Fields, Kind};
pub use delta::{DeltaError, apply, difference};

/// The bytes of a page.
pub const PAGE: usize = 4096;
/// The most pages of a frame with data.
pub const FRAME_PAGES: usize = 512;
/// How many pages an [`Encoder`] takes at once: what stays in a processor's cache.
pub const BATCH_PAGES: usize = 128;
/// The most runs of a frame.
const RUNS: usize = 2047;
/// The bytes of a run.
const RUN: usize = 12;
/// How hard zstd tries.
const LEVEL: i32 = 1;
/// A delta of more bytes is not worth it.
const DELTA_MOST: usize = PAGE / 2;

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// The guest-physical address, a multiple of [`PAGE`].
    pub address: u64,
    /// How many, 1 or more.
    pub pages: u32,
}

impl Run {
    /// In bytes.
    #[must_use]
    pub fn len(self) -> u64 {
        u64::from(self.pages).saturating_mul(PAGE as u64)
    }

    /// Whether there is no page.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.pages == 0
    }

    fn end(self) -> u64 {
        self.address.saturating_add(self.len())
    }
}

/// Adds pages to runs: to the last one, where they follow it.
pub fn push(runs: &mut Vec<Run>, run: Run) {
    if let Some(last) = runs.last_mut().filter(|last| last.end() == run.address)
        && let Some(pages) = last.pages.checked_add(run.pages)
    {
        last.pages = pages;
        return;
    }
    runs.push(run);
}

/// Why pages were not taken or given.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// The peer breaks the format.
    #[error("the peer sends wrong pages: {0}")]
    Format(String),
    /// Memory of this side does not take or give bytes.
    #[error("guest memory at {address:#x} is out of reach")]
    Memory {
        /// The guest-physical address.
        address: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The compressor does not work.
    #[error("pages cannot be compressed")]
    Compress(#[source] io::Error),
}

fn format(text: String) -> PagesError {
    PagesError::Format(text)
}

/// Where pages go. Streams give pages at the same time, each of them by one stream.
pub trait PageSink: Sync {
    /// Writes whole pages from `address` on, which are in memory.
    ///
    /// # Errors
    ///
    /// Memory cannot be had.
    fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes the bytes of whole pages zeros. What has never been written need not be touched.
    ///
    /// # Errors
    ///
    /// Memory cannot be had.
    fn zero(&self, address: u64, len: u64) -> io::Result<()>;

    /// Reads what has been written to a page.
    ///
    /// # Errors
    ///
    /// Memory is gone.
    fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Reads whole pages from `address` on straight out of a socket, and waits for them.
    ///
    /// # Errors
    ///
    /// Those of the socket, [`io::ErrorKind::UnexpectedEof`] where it ends early, or `Unsupported`.
    fn receive(&self, _address: u64, _len: u64, _socket: BorrowedFd<'_>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// The ranges of RAM, as start and length in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    /// Of ranges in any order.
    #[must_use]
    pub fn new(ranges: &[(u64, u64)]) -> Self {
        let mut ranges = ranges.to_vec();
        ranges.sort_unstable();
        Self(ranges)
    }

    /// Whether all of a run is in one range.
    #[must_use]
    pub fn holds(&self, run: Run) -> bool {
        let after = self.0.partition_point(|(start, _)| *start <= run.address);
        let range = after.checked_sub(1).and_then(|at| self.0.get(at));
        range.is_some_and(|(start, len)| {
            let inside = run.address.saturating_sub(*start);
            inside.checked_add(run.len()).is_some_and(|end| end <= *len)
        })
    }
}

/// The bytes of runs, of which there are 1 to 2,047.
#[must_use]
pub fn encode_runs(runs: &[Run]) -> Vec<u8> {
    let runs = runs.get(..RUNS).unwrap_or(runs);
    let mut bytes = Vec::with_capacity(runs.len().saturating_mul(RUN).saturating_add(2));
    let count = u16::try_from(runs.len()).unwrap_or(u16::MAX);
    bytes.extend_from_slice(&count.to_le_bytes());
    for run in runs {
        bytes.extend_from_slice(&run.address.to_le_bytes());
        bytes.extend_from_slice(&run.pages.to_le_bytes());
    }
    bytes
}

/// The runs that `bytes` begin with, which are all in `ranges`, and the bytes behind them.
///
/// # Errors
///
/// [`PagesError::Format`].
pub fn decode_runs<'a>(
    bytes: &'a [u8],
    ranges: &Ranges,
) -> Result<(Vec<Run>, &'a [u8]), PagesError> {
    let short = || format("a frame ends within its runs".to_owned());
    let (head, rest) = bytes.split_at_checked(2).ok_or_else(short)?;
    let count = usize::from(Fields(head).u16());
    if count == 0 || count > RUNS {
        return Err(format(format!("{count} runs in a frame, of 1 to {RUNS}")));
    }
    let len = count.saturating_mul(RUN);
    let (list, rest) = rest.split_at_checked(len).ok_or_else(short)?;
    let mut runs = Vec::with_capacity(count);
    for bytes in list.chunks_exact(RUN) {
        let mut fields = Fields(bytes);
        let address = u64::from_le_bytes(fields.array());
        let pages = fields.u32();
        let run = Run { address, pages };
        if pages == 0 || !address.is_multiple_of(PAGE as u64) {
            return Err(format(format!(
                "{pages} pages at {address:#x}, which is no run"
            )));
        }
        if !ranges.holds(run) {
            let text = format!("{pages} pages at {address:#x}, which is not in memory");
            return Err(format(text));
        }
        runs.push(run);
    }
    Ok((runs, rest))
}

/// Whether all bytes are zeros.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most pages that are not zeros are seen in their first words; eight words at once let the compiler use wide registers.
    let mut blocks = bytes.chunks_exact(128);
    let fine = blocks.all(|block| {
        let words = block.chunks_exact(16);
        let word = |word: &[u8]| u128::from_ne_bytes(word.try_into().unwrap_or([0xff; 16]));
        words.fold(0, |all, next| all | word(next)) == 0
    });
    fine && blocks.remainder().iter().all(|byte| *byte == 0)
}

/// How pages are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Not at all.
    #[default]
    Raw,
    /// With zstd.
    Zstd,
    /// With LZ4.
    Lz4,
}

/// What became of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All of them.
    pub pages: u64,
    /// Those that are zeros.
    pub zeros: u64,
    /// Those that went as differences.
    pub deltas: u64,
}

impl Counts {
    /// Both.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            pages: self.pages.saturating_add(other.pages),
            zeros: self.zeros.saturating_add(other.zeros),
            deltas: self.deltas.saturating_add(other.deltas),
        }
    }
}

/// Hears frames: kind, and parts of the payload.
pub type Emit<'a, E> = &'a mut dyn FnMut(Kind, &[&[u8]]) -> Result<(), E>;

/// Makes frames of pages.
pub struct Encoder {
    codec: Codec,
    zstd: Option<Compressor<'static>>,
    cache: Option<delta::Cache>,
    zeros: Vec<Run>,
    packed: Vec<u8>,
    deltas: Vec<u8>,
}

impl Encoder {
    /// With `cache` bytes of room for pages that were sent before; with none there are no deltas.
    ///
    /// # Errors
    ///
    /// [`PagesError::Compress`], if the compressor cannot be had.
    pub fn new(codec: Codec, cache: usize) -> Result<Self, PagesError> {
        let zstd = (codec == Codec::Zstd).then(|| Compressor::new(LEVEL));
        Ok(Self {
            codec,
            zstd: zstd.transpose().map_err(PagesError::Compress)?,
            cache: delta::Cache::new(cache),
            zeros: Vec::new(),
            packed: Vec::new(),
            deltas: Vec::new(),
        })
    }

    /// No page goes as a difference any more: the peer may not have what was sent before.
    pub fn forget(&mut self) {
        self.cache = None;
    }

    /// Pages that are known to be zeros.
    ///
    /// # Errors
    ///
    /// Those of `emit`.
    pub fn zeros<E>(&mut self, run: Run, emit: Emit<'_, E>) -> Result<Counts, E> {
        if let Some(cache) = &mut self.cache {
            cache.forget(run);
        }
        push(&mut self.zeros, run);
        if self.zeros.len() >= RUNS {
            self.finish(emit)?;
        }
        let pages = u64::from(run.pages);
        Ok(Counts {
            pages,
            zeros: pages,
            deltas: 0,
        })
    }

    /// At most [`BATCH_PAGES`] pages, whose bytes are one behind the other in `data`; that is used up.
    ///
    /// # Errors
    ///
    /// Those of `emit`, or [`PagesError`].
    pub fn batch<E: From<PagesError>>(
        &mut self,
        runs: &[Run],
        data: &mut [u8],
        emit: Emit<'_, E>,
    ) -> Result<Counts, E> {
        let mut counts = Counts::default();
        let (mut plain, mut changed) = (Vec::new(), Vec::new());
        let mut kept = 0_usize;
        let mut from = 0_usize;
        self.deltas.clear();
        let each = |run: &Run| {
            let address = run.address;
            (0..u64::from(run.pages)).map(move |page| address.saturating_add(page * PAGE as u64))
        };
        for address in runs.iter().flat_map(each) {
            let end = from.saturating_add(PAGE);
            let Some(page) = data.get(from..end) else {
                break;
            };
            let run = Run { address, pages: 1 };
            if is_zero(page) {
                counts = counts.plus(self.zeros(run, emit)?);
            } else if self.as_delta(address, page) {
                counts.pages = counts.pages.saturating_add(1);
                counts.deltas = counts.deltas.saturating_add(1);
                push(&mut changed, run);
            } else {
                if kept != from {
                    data.copy_within(from..end, kept);
                }
                kept = kept.saturating_add(PAGE);
                counts.pages = counts.pages.saturating_add(1);
                push(&mut plain, run);
            }
            from = end;
        }
        if !changed.is_empty() {
            emit(Kind::Delta, &[&encode_runs(&changed), &self.deltas])?;
        }
        if !plain.is_empty() {
            self.plain(&plain, data.get(..kept).unwrap_or_default(), emit)?;
        }
        Ok(counts)
    }

    /// What is still here.
    ///
    /// # Errors
    ///
    /// Those of `emit`.
    pub fn finish<E>(&mut self, emit: Emit<'_, E>) -> Result<(), E> {
        if !self.zeros.is_empty() {
            emit(Kind::Zeros, &[&encode_runs(&self.zeros)])?;
            self.zeros.clear();
        }
        Ok(())
    }

    /// Adds the page to the deltas, if it was sent before and little of it has changed.
    fn as_delta(&mut self, address: u64, page: &[u8]) -> bool {
        let Some(cache) = &mut self.cache else {
            return false;
        };
        let begin = self.deltas.len();
        self.deltas.extend_from_slice(&[0; 2]);
        let before = cache.find(address);
        let short = before.is_some_and(|old| difference(old, page, DELTA_MOST, &mut self.deltas));
        cache.put(address, page);
        let len = self.deltas.len().saturating_sub(begin).saturating_sub(2);
        let there = self.deltas.get_mut(begin..begin.saturating_add(2));
        match (there, u16::try_from(len)) {
            (Some(there), Ok(len)) if short => {
                there.copy_from_slice(&len.to_le_bytes());
                true
            }
            _ => {
                self.deltas.truncate(begin);
                false
            }
        }
    }

    fn plain<E: From<PagesError>>(
        &mut self,
        runs: &[Run],
        data: &[u8],
        emit: Emit<'_, E>,
    ) -> Result<(), E> {
        let runs = encode_runs(runs);
        let (kind, len) = match (self.codec, &mut self.zstd) {
            (Codec::Zstd, Some(zstd)) => {
                let room = zstd::zstd_safe::compress_bound(data.len());
                self.packed.resize(room, 0);
                let packed = zstd.compress_to_buffer(data, &mut self.packed);
                (Kind::Zstd, packed.map_err(PagesError::Compress)?)
            }
            (Codec::Lz4, _) => {
                let room = lz4::get_maximum_output_size(data.len());
                self.packed.resize(room, 0);
                let packed = lz4::compress_into(data, &mut self.packed);
                let failed = |error| PagesError::Compress(io::Error::other(error));
                (Kind::Lz4, packed.map_err(failed)?)
            }
            _ => (Kind::Pages, data.len()),
        };
        match self.packed.get(..len) {
            Some(packed) if kind != Kind::Pages && len < data.len() => emit(kind, &[&runs, packed]),
            _ => emit(Kind::Pages, &[&runs, data]),
        }
    }
}

/// Takes pages out of frames.
pub struct Decoder {
    ranges: Ranges,
    zstd: Decompressor<'static>,
    room: Vec<u8>,
}

impl Decoder {
    /// For memory with `ranges`.
    ///
    /// # Errors
    ///
    /// [`PagesError::Compress`], if the decompressor cannot be had.
    pub fn new(ranges: Ranges) -> Result<Self, PagesError> {
        Ok(Self {
            ranges,
            zstd: Decompressor::new().map_err(PagesError::Compress)?,
            room: Vec::new(),
        })
    }

    /// Where memory is.
    #[must_use]
    pub fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    /// Other memory, once it is known.
    pub fn set_ranges(&mut self, ranges: Ranges) {
        self.ranges = ranges;
    }

    /// Gives the pages of a frame to `sink`. Kinds that hold none give nothing.
    ///
    /// # Errors
    ///
    /// [`PagesError`].
    pub fn take(
        &mut self,
        kind: Kind,
        payload: &[u8],
        sink: &dyn PageSink,
    ) -> Result<Counts, PagesError> {
        if !matches!(
            kind,
            Kind::Zeros | Kind::Pages | Kind::Zstd | Kind::Lz4 | Kind::Delta
        ) {
            return Ok(Counts::default());
        }
        let (runs, data) = decode_runs(payload, &self.ranges)?;
        let add = |sum: u64, run: &Run| sum.saturating_add(u64::from(run.pages));
        let pages = runs.iter().fold(0, add);
        let mut counts = Counts {
            pages,
            ..Counts::default()
        };
        if kind == Kind::Zeros {
            counts.zeros = pages;
            return zero(&runs, data, sink).map(|()| counts);
        }
        let len = match usize::try_from(pages) {
            Ok(pages) if pages <= FRAME_PAGES => pages.saturating_mul(PAGE),
            _ => {
                let text = format!("{pages} pages in a frame, which has at most {FRAME_PAGES}");
                return Err(format(text));
            }
        };
        match kind {
            Kind::Delta => {
                counts.deltas = pages;
                change(&runs, data, sink)?;
            }
            Kind::Pages => write(&runs, data, len, sink)?,
            _ => {
                if self.room.len() < len {
                    self.room.resize(len, 0);
                }
                let room = self.room.get_mut(..len).unwrap_or_default();
                let filled = if kind == Kind::Zstd {
                    let filled = self.zstd.decompress_to_buffer(data, room);
                    filled.map_err(|error| error.to_string())
                } else {
                    lz4::decompress_into(data, room).map_err(|error| error.to_string())
                };
                let filled =
                    filled.map_err(|error| format(format!("they do not decompress: {error}")))?;
                write(&runs, room.get(..filled).unwrap_or_default(), len, sink)?;
            }
        }
        Ok(counts)
    }
}

fn out_of_reach(address: u64) -> impl FnOnce(io::Error) -> PagesError {
    move |source| PagesError::Memory { address, source }
}

fn zero(runs: &[Run], data: &[u8], sink: &dyn PageSink) -> Result<(), PagesError> {
    if !data.is_empty() {
        return Err(format(format!("{} bytes behind zeros", data.len())));
    }
    for run in runs {
        let zeroed = sink.zero(run.address, run.len());
        zeroed.map_err(out_of_reach(run.address))?;
    }
    Ok(())
}

fn write(runs: &[Run], data: &[u8], len: usize, sink: &dyn PageSink) -> Result<(), PagesError> {
    if data.len() != len {
        let text = format!("{} bytes for {} pages", data.len(), len / PAGE);
        return Err(format(text));
    }
    let mut rest = data;
    for run in runs {
        let here = usize::try_from(run.len()).unwrap_or(usize::MAX);
        let (bytes, after) = rest.split_at(here.min(rest.len()));
        let written = sink.write(run.address, bytes);
        written.map_err(out_of_reach(run.address))?;
        rest = after;
    }
    Ok(())
}

fn change(runs: &[Run], data: &[u8], sink: &dyn PageSink) -> Result<(), PagesError> {
    let mut rest = data;
    let mut page = [0; PAGE];
    for run in runs {
        for number in 0..u64::from(run.pages) {
            let address = run
                .address
                .saturating_add(number.saturating_mul(PAGE as u64));
            let short = || format(format!("the delta of {address:#x} is not whole"));
            let (len, after) = rest.split_at_checked(2).ok_or_else(short)?;
            let len = usize::from(Fields(len).u16());
            let (bytes, after) = after.split_at_checked(len).ok_or_else(short)?;
            rest = after;
            let read = sink.read(address, &mut page);
            read.map_err(out_of_reach(address))?;
            let applied = apply(bytes, &mut page);
            applied.map_err(|error| format(format!("the delta of {address:#x}: {error}")))?;
            let written = sink.write(address, &page);
            written.map_err(out_of_reach(address))?;
        }
    }
    if rest.is_empty() {
        Ok(())
    } else {
        Err(format(format!("{} bytes behind deltas", rest.len())))
    }
}

#[cfg(test)]
mod tests;
