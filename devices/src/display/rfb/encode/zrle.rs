//! ZRLE (RFC 6143, section 7.7.6): squares of 64 pixels, each as what is shortest, all through one zlib stream.

use super::palette::Palette;
use super::{Block, Deflater, EncodeError, Square, put};

const SIDE: usize = 64;
/// The most colours of a palette with runs.
const MOST_COLOURS: usize = 127;
/// The most colours of a palette without.
const MOST_PACKED: usize = 16;

pub(super) fn encode(
    block: &Block<'_>,
    stream: &mut Deflater,
    effort: u8,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let mut plain = Vec::new();
    for square in block.squares(SIDE) {
        put_square(&square, block.bytes, &mut plain);
    }
    // The stream never begins anew: its effort is that of its first use.
    if stream.0.is_none() {
        stream.begins(effort);
    }
    let start = out.len();
    out.extend([0; 4]);
    stream.deflate(&plain, out)?;
    let len = u32::try_from(out.len() - start - 4).unwrap_or(u32::MAX);
    out[start..start + 4].copy_from_slice(&len.to_be_bytes());
    Ok(())
}

fn put_square(square: &Square, bytes: usize, out: &mut Vec<u8>) {
    let palette = Palette::of(&square.values, MOST_COLOURS);
    let runs = || square.values.chunk_by(|one, next| one == next);
    let raw = square.values.len() * bytes;
    let plain_runs: usize = runs().map(|run| bytes + run_len_bytes(run.len())).sum();
    let Some(palette) = palette else {
        return if plain_runs < raw {
            put_runs(square, bytes, out);
        } else {
            put_raw(square, bytes, out);
        };
    };
    let colours = palette.colours().len();
    if colours == 1 {
        out.push(1);
        put(out, square.values.first().copied().unwrap_or(0), bytes);
        return;
    }
    let table = colours * bytes;
    let packed = if colours <= MOST_PACKED {
        let lines = square.values.len() / square.width;
        table + lines * (square.width * bits(colours)).div_ceil(8)
    } else {
        usize::MAX
    };
    let one = |run: &[u32]| match run.len() {
        1 => 1,
        len => 1 + run_len_bytes(len),
    };
    let indexed_runs = table + runs().map(one).sum::<usize>();
    let least = raw.min(plain_runs).min(packed).min(indexed_runs);
    if packed == least {
        put_packed(square, &palette, bytes, out);
    } else if indexed_runs == least {
        put_indexed_runs(square, &palette, bytes, out);
    } else if plain_runs == least {
        put_runs(square, bytes, out);
    } else {
        put_raw(square, bytes, out);
    }
}

/// Bytes that a run's length takes.
fn run_len_bytes(len: usize) -> usize {
    len.saturating_sub(1) / 255 + 1
}

/// Bits of a colour's number in a palette without runs.
fn bits(colours: usize) -> usize {
    match colours {
        0..=2 => 1,
        3..=4 => 2,
        _ => 4,
    }
}

fn put_raw(square: &Square, bytes: usize, out: &mut Vec<u8>) {
    out.push(0);
    for value in &square.values {
        put(out, *value, bytes);
    }
}

fn put_table(palette: &Palette, kind: u8, bytes: usize, out: &mut Vec<u8>) {
    out.push(kind);
    for value in palette.colours() {
        put(out, *value, bytes);
    }
}

fn put_packed(square: &Square, palette: &Palette, bytes: usize, out: &mut Vec<u8>) {
    let colours = palette.colours().len();
    put_table(palette, u8::try_from(colours).unwrap_or(0), bytes, out);
    let bits = bits(colours);
    for line in square.values.chunks(square.width) {
        for group in line.chunks(8 / bits) {
            let mut byte = 0;
            for (at, value) in group.iter().enumerate() {
                byte |= palette.number(*value) << (8 - bits * (at + 1));
            }
            out.push(byte);
        }
    }
}

fn put_runs(square: &Square, bytes: usize, out: &mut Vec<u8>) {
    out.push(128);
    for run in square.values.chunk_by(|one, next| one == next) {
        put(out, run[0], bytes);
        put_len(run.len(), out);
    }
}

fn put_indexed_runs(square: &Square, palette: &Palette, bytes: usize, out: &mut Vec<u8>) {
    let colours = u8::try_from(palette.colours().len()).unwrap_or(0);
    put_table(palette, 128 | colours, bytes, out);
    for run in square.values.chunk_by(|one, next| one == next) {
        let number = palette.number(run[0]);
        if run.len() == 1 {
            out.push(number);
        } else {
            out.push(128 | number);
            put_len(run.len(), out);
        }
    }
}

/// A run's length less one, as bytes of 255 and one of less.
fn put_len(len: usize, out: &mut Vec<u8>) {
    let rest = len.saturating_sub(1);
    out.extend(std::iter::repeat_n(255, rest / 255));
    out.push(u8::try_from(rest % 255).unwrap_or(0));
}
