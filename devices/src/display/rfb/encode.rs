//! Pictures as the encodings put them (RFC 6143, section 7.7).
//!
//! An [`Encoder`] belongs to one client: ZRLE and Tight compress each rectangle with what came before. It takes pixels
//! of `0x00RRGGBB` and makes what the client's format and encoding want of them.

#[cfg(test)]
pub mod decode;
mod hextile;
mod palette;
mod tight;
mod zrle;

use flate2::{Compress, CompressError, Compression, FlushCompress};
use thiserror::Error;

use super::super::area::Rect;
use super::format::{ClientFormat, Packing, Translation, put};

/// How pixels may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// As they are.
    Raw,
    /// As rectangles within squares of 16 pixels.
    Hextile,
    /// Compressed, in squares of 64 pixels.
    Zrle,
    /// Compressed, or as photographs.
    Tight,
}

impl Encoding {
    /// The encoding with this number, where it is one of pixels.
    #[must_use]
    pub fn from_number(number: i32) -> Option<Self> {
        [Self::Raw, Self::Hextile, Self::Zrle, Self::Tight]
            .into_iter()
            .find(|encoding| encoding.number() == number)
    }

    /// Its number on the wire.
    #[must_use]
    pub fn number(self) -> i32 {
        match self {
            Self::Raw => 0,
            Self::Hextile => 5,
            Self::Tight => 7,
            Self::Zrle => 16,
        }
    }

    fn packing(self) -> Packing {
        match self {
            Self::Raw | Self::Hextile => Packing::Plain,
            Self::Zrle => Packing::Zrle,
            Self::Tight => Packing::Tight,
        }
    }
}

/// How a client wants its pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// Their format.
    pub format: ClientFormat,
    /// How they are put.
    pub encoding: Encoding,
    /// From 0, quick, to 9, small.
    pub effort: u8,
    /// From 0 to 9 where photographs may lose detail.
    pub quality: Option<u8>,
}

/// Pixels could not be put.
#[derive(Debug, Error)]
pub enum EncodeError {
    /// Compression failed.
    #[error("a picture could not be compressed")]
    Deflate(#[from] CompressError),
    /// Making a photograph failed.
    #[error("a picture could not be made a JPEG")]
    Jpeg(#[from] jpeg_encoder::EncodingError),
}

/// What encodes for one client.
#[derive(Debug)]
pub struct Encoder {
    wish: Wish,
    translation: Translation,
    /// The pixels at hand as they go to the client.
    values: Vec<u32>,
    zrle: Deflater,
    tight: tight::Streams,
}

impl Encoder {
    /// One that has sent nothing.
    #[must_use]
    pub fn new(wish: Wish) -> Self {
        Self {
            wish,
            translation: Translation::new(&wish.format, wish.encoding.packing()),
            values: Vec::new(),
            zrle: Deflater::default(),
            tight: tight::Streams::default(),
        }
    }

    /// The client wants its pixels otherwise from the next rectangle on.
    pub fn set(&mut self, wish: Wish) {
        if wish != self.wish {
            self.wish = wish;
            self.translation = Translation::new(&wish.format, wish.encoding.packing());
        }
    }

    /// `area` in the pieces that make the rectangles of an update.
    pub fn pieces(wish: &Wish, area: Rect) -> impl Iterator<Item = Rect> + use<> {
        match wish.encoding {
            // Each is text or a photograph by itself.
            Encoding::Tight => area.pieces(256, 1 << 14),
            _ => area.pieces(u16::MAX, u16::MAX),
        }
    }

    /// Appends the pixels of `area`, line by line in `pixels`, as a rectangle of an update. It is one of
    /// [`Encoder::pieces`].
    ///
    /// # Errors
    ///
    /// [`EncodeError`]; the client cannot be sent anything any more.
    pub fn encode(
        &mut self,
        area: Rect,
        pixels: &[u32],
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        header(out, area, self.wish.encoding.number());
        let translate = |pixel: &u32| self.translation.pixel(*pixel);
        self.values.clear();
        self.values.extend(pixels.iter().map(translate));
        let block = Block {
            values: &self.values,
            width: area.width.into(),
            bytes: self.translation.bytes(),
        };
        match self.wish.encoding {
            Encoding::Raw => {
                for value in block.values {
                    put(out, *value, block.bytes);
                }
                Ok(())
            }
            Encoding::Hextile => {
                hextile::encode(&block, out);
                Ok(())
            }
            Encoding::Zrle => zrle::encode(&block, &mut self.zrle, self.wish.effort, out),
            Encoding::Tight => tight::encode(&block, pixels, &mut self.tight, &self.wish, out),
        }
    }
}

/// Appends what each rectangle of an update begins with.
pub fn header(out: &mut Vec<u8>, area: Rect, encoding: i32) {
    for number in [area.x, area.y, area.width, area.height] {
        out.extend(number.to_be_bytes());
    }
    out.extend(encoding.to_be_bytes());
}

/// Pixels of a rectangle, translated.
struct Block<'a> {
    values: &'a [u32],
    /// Not 0.
    width: usize,
    /// Bytes of each.
    bytes: usize,
}

/// A square of a block.
struct Square {
    values: Vec<u32>,
    width: usize,
}

impl Block<'_> {
    /// Its squares of at most `side` pixels, from left to right and then down.
    fn squares(&self, side: usize) -> impl Iterator<Item = Square> {
        let lines = side.saturating_mul(self.width);
        let columns = (0..self.width).step_by(side);
        self.values.chunks(lines).flat_map(move |band| {
            columns.clone().map(move |x| {
                let width = side.min(self.width - x);
                let lines = band.chunks_exact(self.width);
                Square {
                    values: lines
                        .flat_map(|line| &line[x..x + width])
                        .copied()
                        .collect(),
                    width,
                }
            })
        })
    }
}

/// A zlib stream to one client.
#[derive(Default)]
struct Deflater(Option<(u8, Compress)>);

impl std::fmt::Debug for Deflater {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Deflater").field(&self.0.is_some()).finish()
    }
}

impl Deflater {
    /// Whether what comes next begins a stream: the first time, and when the effort becomes another.
    fn begins(&mut self, effort: u8) -> bool {
        if self.0.as_ref().is_some_and(|(with, _)| *with == effort) {
            return false;
        }
        let level = Compression::new(effort.clamp(1, 9).into());
        self.0 = Some((effort, Compress::new(level, true)));
        true
    }

    /// Appends `input` compressed, up to its last byte.
    fn deflate(&mut self, mut input: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let Some((_, stream)) = &mut self.0 else {
            return Ok(());
        };
        loop {
            out.reserve(input.len() / 2 + 64);
            let before = stream.total_in();
            stream.compress_vec(input, out, FlushCompress::Sync)?;
            let taken = usize::try_from(stream.total_in() - before).unwrap_or(usize::MAX);
            input = input.get(taken..).unwrap_or_default();
            // A flush is complete when it has left room.
            if input.is_empty() && out.len() < out.capacity() {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests;
