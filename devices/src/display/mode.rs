//! How a framebuffer's memory is to be read.

use thiserror::Error;

/// The widest and the highest picture that there can be, in pixels.
const MAX_SIDE: u32 = 16384;

/// How a pixel lies in memory; little-endian, as the PC's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PixelFormat {
    /// 8 bits each of blue, green, red, and 8 that mean nothing.
    Xrgb8888,
    /// 8 bits each of blue, green and red.
    Rgb888,
    /// 5 bits of blue, 6 of green, 5 of red.
    Rgb565,
    /// 5 bits each of blue, green, red, and one that means nothing.
    Xrgb1555,
}

impl PixelFormat {
    /// Bytes of a pixel.
    #[must_use]
    pub fn bytes(self) -> u32 {
        match self {
            Self::Xrgb8888 => 4,
            Self::Rgb888 => 3,
            Self::Rgb565 | Self::Xrgb1555 => 2,
        }
    }
}

/// A mode that fits its memory: every pixel of the picture lies inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode {
    width: u32,
    height: u32,
    stride: u32,
    offset: usize,
    format: PixelFormat,
}

/// Why there is no such mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ModeError {
    /// A side is 0 or more than 16384 pixels.
    #[error("a picture of {width} x {height} pixels")]
    Size {
        /// Pixels of a line.
        width: u32,
        /// Lines.
        height: u32,
    },
    /// A line is longer than the distance of two.
    #[error("lines of {line} bytes at each {stride} bytes")]
    Stride {
        /// Bytes of a line's pixels.
        line: u32,
        /// Bytes from a line to the next.
        stride: u32,
    },
    /// The picture's end is past the memory's.
    #[error("a picture up to byte {end} of a memory of {len} bytes")]
    Memory {
        /// The byte after the last pixel's.
        end: u64,
        /// Bytes of the memory.
        len: usize,
    },
}

impl Mode {
    /// A picture of `width` by `height` pixels whose first is at byte `offset` of a memory of `len` bytes, with
    /// `stride` bytes from each line to the next.
    ///
    /// # Errors
    ///
    /// [`ModeError`], when a part of it would be outside.
    pub fn new(
        (width, height): (u32, u32),
        stride: u32,
        offset: usize,
        format: PixelFormat,
        len: usize,
    ) -> Result<Self, ModeError> {
        let sides = 1..=MAX_SIDE;
        if !sides.contains(&width) || !sides.contains(&height) {
            return Err(ModeError::Size { width, height });
        }
        let line = width * format.bytes();
        if line > stride {
            return Err(ModeError::Stride { line, stride });
        }
        let before = u64::from(height - 1) * u64::from(stride) + u64::from(line);
        let end = u64::try_from(offset)
            .unwrap_or(u64::MAX)
            .saturating_add(before);
        if usize::try_from(end).map_or(true, |end| end > len) {
            return Err(ModeError::Memory { end, len });
        }
        Ok(Self {
            width,
            height,
            stride,
            offset,
            format,
        })
    }

    /// Pixels of a line, 1 to 16384.
    #[must_use]
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Lines, 1 to 16384.
    #[must_use]
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Bytes from a line to the next.
    #[must_use]
    pub fn stride(&self) -> u32 {
        self.stride
    }

    /// The byte of the memory at which the first pixel is.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// How a pixel lies in memory.
    #[must_use]
    pub fn format(&self) -> PixelFormat {
        self.format
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: PixelFormat = PixelFormat::Xrgb8888;

    #[test]
    fn a_picture_that_fills_its_memory_is_a_mode() {
        let mode = Mode::new((10, 10), 40, 0, FORMAT, 400).unwrap();
        assert_eq!((mode.width(), mode.height(), mode.stride()), (10, 10, 40));
        // The last line needs no room after its pixels.
        assert!(Mode::new((10, 10), 64, 4, FORMAT, 9 * 64 + 40 + 4).is_ok());
    }

    #[test]
    fn a_picture_that_leaves_its_memory_is_refused() {
        let past = |offset| Mode::new((10, 10), 40, offset, FORMAT, 400);
        assert_eq!(past(1), Err(ModeError::Memory { end: 401, len: 400 }));
        assert!(matches!(past(usize::MAX), Err(ModeError::Memory { .. })));
        let huge = Mode::new((16384, 16384), u32::MAX, 0, FORMAT, 1 << 24);
        assert!(matches!(huge, Err(ModeError::Memory { .. })));
    }

    #[test]
    fn sides_of_none_or_too_many_pixels_are_refused() {
        for size in [(0, 1), (1, 0), (16385, 1), (1, u32::MAX)] {
            let refused = Mode::new(size, u32::MAX, 0, FORMAT, usize::MAX);
            assert!(matches!(refused, Err(ModeError::Size { .. })), "{size:?}");
        }
    }

    #[test]
    fn lines_that_overlap_are_refused() {
        let refused = Mode::new((10, 2), 39, 0, FORMAT, 400);
        assert_eq!(
            refused,
            Err(ModeError::Stride {
                line: 40,
                stride: 39
            })
        );
    }
}
