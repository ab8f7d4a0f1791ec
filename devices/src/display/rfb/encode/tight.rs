//! Tight, as TightVNC made it and the community's protocol description tells it: a rectangle is one colour, a
//! palette, pixels as they are, or a JPEG; but for the first and the last through one of four zlib streams.

use super::super::super::screen::rgb;
use super::palette::Palette;
use super::{Block, Deflater, EncodeError, Wish, put};

/// What is shorter is not compressed.
const MIN_COMPRESSED: usize = 12;
/// The most colours of a palette.
const MOST_COLOURS: usize = 256;
/// Pieces of fewer pixels are not worth being a JPEG.
const MIN_JPEG: usize = 256;

const FILL: u8 = 0x80;
const JPEG: u8 = 0x90;
const FILTER: u8 = 0x40;
const FILTER_PALETTE: u8 = 1;

/// JPEG qualities for the levels 0 to 9.
const QUALITIES: [u8; 10] = [15, 29, 41, 50, 62, 72, 79, 86, 92, 100];

/// The zlib streams: of pixels as they are, of two colours, and of more.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: [Deflater; 3],
}

pub(super) fn encode(
    block: &Block<'_>,
    pixels: &[u32],
    streams: &mut Streams,
    wish: &Wish,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let palette = Palette::of(block.values, MOST_COLOURS);
    match palette {
        Some(palette) if palette.colours().len() <= 1 => {
            out.push(FILL);
            put(out, block.values.first().copied().unwrap_or(0), block.bytes);
            Ok(())
        }
        Some(palette) if palette.colours().len() < block.values.len() / 2 => {
            put_indexed(block, &palette, streams, wish.effort, out)
        }
        None if wish.format.takes_jpeg() && block.values.len() >= MIN_JPEG => match wish.quality {
            Some(quality) => put_jpeg(block, pixels, quality, out),
            None => put_plain(block, streams, wish.effort, out),
        },
        _ => put_plain(block, streams, wish.effort, out),
    }
}

fn put_plain(
    block: &Block<'_>,
    streams: &mut Streams,
    effort: u8,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let mut data = Vec::with_capacity(block.values.len() * block.bytes);
    for value in block.values {
        put(&mut data, *value, block.bytes);
    }
    put_control(streams, 0, 0, effort, data.len(), out);
    put_data(streams, 0, &data, out)
}

fn put_indexed(
    block: &Block<'_>,
    palette: &Palette,
    streams: &mut Streams,
    effort: u8,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let colours = palette.colours();
    let mut data = Vec::new();
    let stream = if colours.len() == 2 {
        for line in block.values.chunks(block.width) {
            for group in line.chunks(8) {
                let byte = group.iter().zip(0_u8..).fold(0, |byte, (value, at)| {
                    byte | palette.number(*value) << (7 - at)
                });
                data.push(byte);
            }
        }
        1
    } else {
        data.extend(block.values.iter().map(|value| palette.number(*value)));
        2
    };
    put_control(streams, stream, FILTER, effort, data.len(), out);
    out.push(FILTER_PALETTE);
    out.push(u8::try_from(colours.len() - 1).unwrap_or(u8::MAX));
    for value in colours {
        put(out, *value, block.bytes);
    }
    put_data(streams, stream, &data, out)
}

fn put_jpeg(
    block: &Block<'_>,
    pixels: &[u32],
    quality: u8,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let bytes: Vec<u8> = pixels.iter().flat_map(|pixel| rgb(*pixel)).collect();
    let quality = QUALITIES.get(usize::from(quality)).copied().unwrap_or(100);
    let mut file = Vec::new();
    let side = |pixels: usize| u16::try_from(pixels).unwrap_or(u16::MAX);
    let height = block.values.len() / block.width;
    jpeg_encoder::Encoder::new(&mut file, quality).encode(
        &bytes,
        side(block.width),
        side(height),
        jpeg_encoder::ColorType::Rgb,
    )?;
    out.push(JPEG);
    put_len(file.len(), out);
    out.extend(file);
    Ok(())
}

/// The byte that names the stream, and says whether it begins.
fn put_control(
    streams: &mut Streams,
    stream: usize,
    filter: u8,
    effort: u8,
    len: usize,
    out: &mut Vec<u8>,
) {
    let begins = len >= MIN_COMPRESSED && streams.streams[stream].begins(effort);
    let number = u8::try_from(stream).unwrap_or(0);
    out.push(number << 4 | filter | u8::from(begins) << number);
}

fn put_data(
    streams: &mut Streams,
    stream: usize,
    data: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    if data.len() < MIN_COMPRESSED {
        out.extend(data);
        return Ok(());
    }
    let mut compressed = Vec::new();
    streams.streams[stream].deflate(data, &mut compressed)?;
    put_len(compressed.len(), out);
    out.extend(compressed);
    Ok(())
}

/// A length of up to 22 bits, 7 a byte from the lowest; the third byte has 8.
fn put_len(len: usize, out: &mut Vec<u8>) {
    let part = |value: usize| u8::try_from(value).unwrap_or(u8::MAX);
    out.push(part(len & 0x7f) | part(usize::from(len > 0x7f)) << 7);
    if len > 0x7f {
        out.push(part(len >> 7 & 0x7f) | part(usize::from(len > 0x3fff)) << 7);
    }
    if len > 0x3fff {
        out.push(part(len >> 14 & 0xff));
    }
}
