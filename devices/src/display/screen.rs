//! A screen that several may look at, and pictures of it that need no viewer.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::FrameSource;
use super::area::Size;
use super::canvas::{FIRST_SIZE, bytes_of, size_of, unpack};

/// One source of pictures, for a server and for whoever wants a screenshot.
pub struct Screen(Mutex<Box<dyn FrameSource>>);

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Screen")
    }
}

impl Screen {
    /// The screen that `source` draws.
    #[must_use]
    pub fn new(source: Box<dyn FrameSource>) -> Self {
        Self(Mutex::new(source))
    }

    /// What the screen shows now; black while it is off. The guest may be running or not; recorded writes are left to
    /// those who asked for them. Takes time and memory in proportion to the picture.
    #[must_use]
    pub fn picture(&self) -> Picture {
        let source = self.source();
        let Some(mode) = source.mode() else {
            return Picture {
                size: FIRST_SIZE,
                pixels: vec![0; FIRST_SIZE.pixels()],
            };
        };
        let size = size_of(&mode);
        let mut pixels = Vec::with_capacity(size.pixels());
        let mut line = vec![0; usize::from(size.width) * bytes_of(mode.format())];
        let stride = usize::try_from(mode.stride()).unwrap_or(usize::MAX);
        for y in 0..usize::from(size.height) {
            let start = stride.saturating_mul(y).saturating_add(mode.offset());
            source.read(start, &mut line);
            unpack(mode.format(), &line, &mut pixels);
        }
        Picture { size, pixels }
    }

    pub(super) fn source(&self) -> MutexGuard<'_, Box<dyn FrameSource>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A picture by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Its sides.
    pub size: Size,
    /// `0x00RRGGBB`, line by line.
    pub pixels: Vec<u32>,
}

impl Picture {
    /// Writes it as a PNG file of 8-bit RGB.
    ///
    /// # Errors
    ///
    /// Those of `out`.
    pub fn write_png(&self, out: &mut dyn Write) -> Result<(), png::EncodingError> {
        let sides = (u32::from(self.size.width), u32::from(self.size.height));
        let mut encoder = png::Encoder::new(out, sides.0, sides.1);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(png::Compression::Fast);
        let mut writer = encoder.write_header()?;
        let bytes = self.pixels.iter().flat_map(|pixel| rgb(*pixel));
        writer.write_image_data(&bytes.collect::<Vec<u8>>())?;
        writer.finish()
    }
}

/// A pixel's red, green and blue.
pub(super) fn rgb(pixel: u32) -> [u8; 3] {
    let [blue, green, red, _] = pixel.to_le_bytes();
    [red, green, blue]
}

#[cfg(test)]
mod tests {
    use super::super::canvas::tests::Memory;
    use super::super::{Mode, PixelFormat};
    use super::*;

    #[test]
    fn a_picture_is_what_the_memory_holds_without_asking_for_records() {
        let memory = Memory::new(64 * 64 * 4);
        memory.set(Mode::new((64, 60), 256, 256, PixelFormat::Xrgb8888, 64 * 256).ok());
        memory.fill(256, &[1, 2, 3, 99]);
        memory.fill(256 + 59 * 256 + 63 * 4, &[0, 0, 255, 0]);
        let screen = Screen::new(Box::new(memory.clone()));
        let picture = screen.picture();
        assert_eq!((picture.size.width, picture.size.height), (64, 60));
        assert_eq!(picture.pixels[0], 0x0003_0201);
        assert_eq!(picture.pixels[59 * 64 + 63], 0x00ff_0000);
        assert_eq!(picture.pixels.iter().filter(|p| **p != 0).count(), 2);
        assert!(!memory.tracked());
    }

    #[test]
    fn a_screen_that_is_off_is_black() {
        let picture = Screen::new(Box::new(Memory::new(4096))).picture();
        assert_eq!(picture.pixels, vec![0; 640 * 480]);
    }

    #[test]
    fn a_png_file_has_the_pixels() {
        let size = Size {
            width: 3,
            height: 2,
        };
        let pixels = vec![0x0001_0203, 0x00ff_0000, 0, 0x0000_ff00, 0xff, 0x00ff_ffff];
        let picture = Picture { size, pixels };
        let mut file = Vec::new();
        picture.write_png(&mut file).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(file))
            .read_info()
            .unwrap();
        let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut bytes).unwrap();
        assert_eq!((info.width, info.height), (3, 2));
        let found: Vec<u8> = picture.pixels.iter().flat_map(|p| rgb(*p)).collect();
        assert_eq!(bytes, found);
    }
}
