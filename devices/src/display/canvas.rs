//! The screen as its viewers know it: one copy for all, in one pixel format.
//!
//! A [`Canvas`] is brought up to date when somebody waits for a picture, never by itself. It looks at the pages that the
//! source says were written, compares them with what it has, and notes the generation at which each tile of the picture
//! changed last. A viewer keeps the generation at which it has been sent each tile; what is newer is new for it, whatever
//! other viewers have seen.

use std::collections::HashMap;

use super::area::{Rect, Size};
use super::{FrameSource, Mode, PAGE, PixelFormat};

/// Pixels of a tile's line.
pub const TILE_WIDTH: u16 = 64;
/// Lines of a tile.
pub const TILE_HEIGHT: u16 = 16;
/// The size of a screen that has never been on.
pub const FIRST_SIZE: Size = Size {
    width: 640,
    height: 480,
};
/// How many lines must have moved together to be a scroll.
const SCROLL_LINES: usize = 64;

/// A server's copy of a screen.
#[derive(Debug)]
pub struct Canvas {
    size: Size,
    /// `0x00RRGGBB`, line by line.
    pixels: Vec<u32>,
    /// A hash of each line.
    lines: Vec<u64>,
    /// When each tile changed last, line by line.
    tiles: Vec<u64>,
    generation: u64,
    resized: u64,
    scroll: Option<Scroll>,
    mode: Option<Mode>,
    tracking: bool,
    pages: Vec<u64>,
    raw: Vec<u8>,
    row: Vec<u32>,
}

/// Lines that moved up in the last refresh.
#[derive(Debug)]
pub struct Scroll {
    /// The generation that the refresh began.
    pub generation: u64,
    /// Where they are now.
    pub to: Rect,
    /// How many lines below that they were.
    pub by: u16,
    /// When each tile had changed last before.
    before: Vec<u64>,
}

impl Default for Canvas {
    fn default() -> Self {
        Self::new()
    }
}

impl Canvas {
    /// A black screen that nobody looks at.
    #[must_use]
    pub fn new() -> Self {
        Self {
            size: FIRST_SIZE,
            pixels: Vec::new(),
            lines: Vec::new(),
            tiles: Vec::new(),
            generation: 1,
            resized: 1,
            scroll: None,
            mode: None,
            tracking: false,
            pages: Vec::new(),
            raw: Vec::new(),
            row: Vec::new(),
        }
    }

    /// The size of the screen's last mode.
    #[must_use]
    pub fn size(&self) -> Size {
        self.size
    }

    /// Counts the refreshes that found a change; never 0.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The generation that began with another size.
    #[must_use]
    pub fn resized(&self) -> u64 {
        self.resized
    }

    /// The generation at which each tile changed last, line by line of tiles.
    #[must_use]
    pub fn tiles(&self) -> &[u64] {
        &self.tiles
    }

    /// How many tiles are side by side.
    #[must_use]
    pub fn columns(&self) -> usize {
        usize::from(self.size.width.div_ceil(TILE_WIDTH))
    }

    /// The pixels of the tile at `index`.
    #[must_use]
    pub fn tile(&self, index: usize) -> Rect {
        let place =
            |at: usize, step: u16| u16::try_from(at).map_or(u16::MAX, |at| at.saturating_mul(step));
        Rect {
            x: place(index % self.columns(), TILE_WIDTH),
            y: place(index / self.columns(), TILE_HEIGHT),
            width: TILE_WIDTH,
            height: TILE_HEIGHT,
        }
        .clipped(&self.size.area())
    }

    /// The scroll of the last refresh, for a viewer whose picture is of no later generation than `shown` and which has
    /// been sent each tile at the generation in `known`; none where it lacks some of what moved.
    #[must_use]
    pub fn scroll(&self, known: &[u64], shown: u64) -> Option<&Scroll> {
        let scroll = self.scroll.as_ref()?;
        if scroll.generation != self.generation || scroll.generation <= shown {
            return None;
        }
        let from = Rect {
            height: scroll.to.height.saturating_add(scroll.by),
            ..scroll.to
        };
        let fresh = |(index, before): (usize, &u64)| {
            let concerned = !self.tile(index).clipped(&from).is_empty();
            !concerned || known.get(index).is_some_and(|known| known >= before)
        };
        scroll
            .before
            .iter()
            .enumerate()
            .all(fresh)
            .then_some(scroll)
    }

    /// Nobody looks any more: lets the source rest, and gives the memory back.
    pub fn close(&mut self, source: &dyn FrameSource) {
        if self.tracking {
            source.track(false);
            *self = Self {
                size: self.size,
                generation: self.generation,
                resized: self.resized,
                ..Self::new()
            };
        }
    }

    /// Takes over what the source shows now. Whether anything was different.
    pub fn refresh(&mut self, source: &dyn FrameSource) -> bool {
        let mode = source.mode();
        let all = !self.tracking || mode != self.mode;
        if !self.tracking {
            source.track(true);
            self.tracking = true;
        }
        // Asked before the pixels are read: what is written meanwhile is told the next time.
        self.pages.clear();
        self.pages
            .resize(source.size().div_ceil(PAGE).div_ceil(64), 0);
        source.changed(&mut self.pages);
        self.mode = mode;
        self.scroll = None;
        if !all && self.pages.iter().all(|word| *word == 0) {
            return false;
        }
        let size = mode.map_or(self.size, |mode| size_of(&mode));
        let before = self.generation;
        self.generation += 1;
        let resized = size != self.size || self.pixels.is_empty();
        if resized {
            self.resize(size);
        }
        let changed = match mode {
            None => self.blacken(),
            Some(mode) => self.take(source, &mode, all),
        };
        if !changed && !resized {
            self.generation = before;
        }
        changed || resized
    }

    /// Appends the pixels of `rect` to `into`, line by line. Black is what is outside.
    pub fn copy(&self, rect: Rect, into: &mut Vec<u32>) {
        let inside = rect.clipped(&self.size.area());
        for y in rect.y..rect.bottom() {
            let end = into.len() + usize::from(rect.width);
            if y < self.size.height {
                let start = self.at(inside.x.min(self.size.width), y);
                let row = start..start + usize::from(inside.width);
                into.extend_from_slice(self.pixels.get(row).unwrap_or_default());
            }
            into.resize(end, 0);
        }
    }

    fn at(&self, x: u16, y: u16) -> usize {
        usize::from(y) * usize::from(self.size.width) + usize::from(x)
    }

    fn resize(&mut self, size: Size) {
        self.size = size;
        self.resized = self.generation;
        self.pixels = vec![0; size.pixels()];
        self.lines = vec![0; usize::from(size.height)];
        let tiles = self.columns() * usize::from(size.height.div_ceil(TILE_HEIGHT));
        self.tiles = vec![self.generation; tiles];
    }

    fn blacken(&mut self) -> bool {
        if self.pixels.iter().all(|pixel| *pixel == 0) {
            return false;
        }
        self.pixels.fill(0);
        self.lines.fill(0);
        self.tiles.fill(self.generation);
        true
    }

    /// Reads the lines that may have changed, or all.
    fn take(&mut self, source: &dyn FrameSource, mode: &Mode, all: bool) -> bool {
        let len = usize::from(self.size.width) * bytes_of(mode.format());
        let stride = usize::try_from(mode.stride()).unwrap_or(usize::MAX);
        let old_lines = self.lines.clone();
        let old_tiles = self.tiles.clone();
        let mut changed = 0;
        for y in 0..self.size.height {
            let start = stride
                .saturating_mul(usize::from(y))
                .saturating_add(mode.offset());
            if !all && !self.written(start, len) {
                continue;
            }
            self.raw.clear();
            self.raw.resize(len, 0);
            source.read(start, &mut self.raw);
            self.row.clear();
            unpack(mode.format(), &self.raw, &mut self.row);
            changed += usize::from(self.compare(y));
        }
        if changed >= SCROLL_LINES {
            self.scroll = self.find_scroll(&old_lines, old_tiles);
        }
        changed != 0
    }

    /// Whether one of the pages of these bytes of the memory has been written.
    fn written(&self, start: usize, len: usize) -> bool {
        let last = start.saturating_add(len.saturating_sub(1)) / PAGE;
        (start / PAGE..=last).any(|page| {
            let word = self.pages.get(page / 64).copied().unwrap_or(u64::MAX);
            word >> (page % 64) & 1 != 0
        })
    }

    /// Takes over the line that was read. Whether it is another.
    fn compare(&mut self, y: u16) -> bool {
        let start = self.at(0, y);
        let Some(old) = self.pixels.get_mut(start..start + self.row.len()) else {
            return false;
        };
        if *old == *self.row {
            return false;
        }
        let columns = usize::from(self.size.width.div_ceil(TILE_WIDTH));
        let first = usize::from(y / TILE_HEIGHT) * columns;
        let width = usize::from(TILE_WIDTH);
        let pieces = old.chunks(width).zip(self.row.chunks(width));
        for (tile, (old, new)) in self.tiles.iter_mut().skip(first).zip(pieces) {
            if old != new {
                *tile = self.generation;
            }
        }
        old.copy_from_slice(&self.row);
        if let Some(line) = self.lines.get_mut(usize::from(y)) {
            *line = hash(&self.row);
        }
        true
    }

    /// Looks for lines that were further down before, as a console moves its text.
    fn find_scroll(&self, old: &[u64], before: Vec<u64>) -> Option<Scroll> {
        let mut places: HashMap<u64, Option<usize>> = HashMap::new();
        for (y, line) in old.iter().enumerate() {
            // A line that is there twice says nothing.
            places
                .entry(*line)
                .and_modify(|place| *place = None)
                .or_insert(Some(y));
        }
        let mut votes: HashMap<usize, usize> = HashMap::new();
        for (y, line) in self.lines.iter().enumerate() {
            let from = places.get(line).copied().flatten();
            if let Some(by) = from.and_then(|from| from.checked_sub(y)) {
                *votes.entry(by).or_default() += 1;
            }
        }
        let still = votes.remove(&0).unwrap_or(0);
        let (by, count) = votes
            .into_iter()
            .max_by_key(|&(by, count)| (count, usize::MAX - by))?;
        if count <= still {
            return None;
        }
        let (start, lines) = longest_run(&self.lines, old.get(by..)?);
        if lines < SCROLL_LINES {
            return None;
        }
        Some(Scroll {
            generation: self.generation,
            to: Rect {
                x: 0,
                y: u16::try_from(start).ok()?,
                width: self.size.width,
                height: u16::try_from(lines).ok()?,
            },
            by: u16::try_from(by).ok()?,
            before,
        })
    }
}

/// Where the longest run of equal elements begins, and how long it is.
fn longest_run(left: &[u64], right: &[u64]) -> (usize, usize) {
    let (mut best, mut run) = ((0, 0), 0);
    for (at, (left, right)) in left.iter().zip(right).enumerate() {
        run = if left == right { run + 1 } else { 0 };
        if run > best.1 {
            best = (at + 1 - run, run);
        }
    }
    best
}

/// 0 for a black line.
fn hash(row: &[u32]) -> u64 {
    row.iter().fold(0, |sum: u64, pixel| {
        (sum.rotate_left(5) ^ u64::from(*pixel)).wrapping_mul(0x517c_c1b7_2722_0a95)
    })
}

/// A mode's size; its sides are at most 16384 pixels.
pub(super) fn size_of(mode: &Mode) -> Size {
    let side = |pixels| u16::try_from(pixels).unwrap_or(u16::MAX);
    Size {
        width: side(mode.width()),
        height: side(mode.height()),
    }
}

pub(super) fn bytes_of(format: PixelFormat) -> usize {
    usize::try_from(format.bytes()).unwrap_or(usize::MAX)
}

/// Appends the pixels in `bytes` as `0x00RRGGBB`.
pub(super) fn unpack(format: PixelFormat, bytes: &[u8], into: &mut Vec<u32>) {
    let five = |bits: u32| {
        let bits = bits & 0x1f;
        bits << 3 | bits >> 2
    };
    let six = |bits: u32| {
        let bits = bits & 0x3f;
        bits << 2 | bits >> 4
    };
    let word = |pair: &[u8; 2]| u32::from(u16::from_le_bytes(*pair));
    match format {
        PixelFormat::Xrgb8888 => {
            let (pixels, _) = bytes.as_chunks::<4>();
            into.extend(pixels.iter().map(|p| u32::from_le_bytes(*p) & 0x00ff_ffff));
        }
        PixelFormat::Rgb888 => {
            let (pixels, _) = bytes.as_chunks::<3>();
            into.extend(
                pixels
                    .iter()
                    .map(|&[b, g, r]| u32::from_le_bytes([b, g, r, 0])),
            );
        }
        PixelFormat::Rgb565 => {
            let (pixels, _) = bytes.as_chunks::<2>();
            into.extend(
                pixels
                    .iter()
                    .map(word)
                    .map(|pixel| five(pixel >> 11) << 16 | six(pixel >> 5) << 8 | five(pixel)),
            );
        }
        PixelFormat::Xrgb1555 => {
            let (pixels, _) = bytes.as_chunks::<2>();
            into.extend(
                pixels
                    .iter()
                    .map(word)
                    .map(|pixel| five(pixel >> 10) << 16 | five(pixel >> 5) << 8 | five(pixel)),
            );
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
