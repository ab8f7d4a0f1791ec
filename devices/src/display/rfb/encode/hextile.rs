//! Hextile (RFC 6143, section 7.7.4): squares of 16 pixels, each a background with rectangles on it.

use super::palette::Palette;
use super::{Block, Square, put};

const SIDE: usize = 16;

const RAW: u8 = 1;
const BACKGROUND: u8 = 2;
const FOREGROUND: u8 = 4;
const RECTANGLES: u8 = 8;
const COLOURED: u8 = 16;

/// A rectangle of one colour in a square; its last column and line are in it.
struct Piece {
    value: u32,
    left: usize,
    top: usize,
    right: usize,
    bottom: usize,
}

pub(super) fn encode(block: &Block<'_>, out: &mut Vec<u8>) {
    // What the client still has from the square before.
    let mut background = None;
    for square in block.squares(SIDE) {
        let start = out.len();
        let raw = 1 + square.values.len() * block.bytes;
        // With this many colours there is nothing to gain.
        let colours = Palette::of(&square.values, 64);
        if let Some(colours) = &colours {
            put_square(&square, colours, &mut background, block.bytes, out);
        }
        if colours.is_none() || out.len() - start > raw {
            out.truncate(start);
            out.push(RAW);
            for value in &square.values {
                put(out, *value, block.bytes);
            }
            background = None;
        }
    }
}

fn put_square(
    square: &Square,
    colours: &Palette,
    background: &mut Option<u32>,
    bytes: usize,
    out: &mut Vec<u8>,
) {
    let ground = most(square, colours);
    let mut flags = 0;
    if *background != Some(ground) {
        flags |= BACKGROUND;
    }
    let coloured = colours.colours().len() > 2;
    match colours.colours().len() {
        0 | 1 => {}
        2 => flags |= FOREGROUND | RECTANGLES,
        _ => flags |= RECTANGLES | COLOURED,
    }
    out.push(flags);
    if flags & BACKGROUND != 0 {
        put(out, ground, bytes);
        *background = Some(ground);
    }
    if flags & RECTANGLES == 0 {
        return;
    }
    if !coloured {
        let other = colours.colours().iter().find(|value| **value != ground);
        put(out, other.copied().unwrap_or(ground), bytes);
    }
    let pieces = pieces(square, ground);
    // A square has no more than 256 pixels, half of which are the background's or another colour's next to it.
    out.push(u8::try_from(pieces.len()).unwrap_or(u8::MAX));
    for piece in pieces {
        if coloured {
            put(out, piece.value, bytes);
        }
        let pair = |high: usize, low: usize| u8::try_from(high << 4 | low).unwrap_or(0);
        out.push(pair(piece.left, piece.top));
        out.push(pair(piece.right - piece.left, piece.bottom - piece.top));
    }
}

/// The colour that most pixels have.
fn most(square: &Square, colours: &Palette) -> u32 {
    let mut counts = vec![0; colours.colours().len()];
    for value in &square.values {
        if let Some(count) = counts.get_mut(usize::from(colours.number(*value))) {
            *count += 1;
        }
    }
    let counted = colours.colours().iter().zip(counts);
    counted
        .max_by_key(|(_, count)| *count)
        .map_or(0, |(value, _)| *value)
}

/// What is not background, as runs of a line that equal ones below make higher.
fn pieces(square: &Square, ground: u32) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (y, line) in square.values.chunks(square.width).enumerate() {
        let mut left = 0;
        for run in line.chunk_by(|one, next| one == next) {
            let right = left + run.len() - 1;
            let value = run[0];
            if value != ground {
                let above = pieces.iter_mut().find(|piece| {
                    (piece.left, piece.right) == (left, right)
                        && piece.bottom + 1 == y
                        && piece.value == value
                });
                match above {
                    Some(piece) => piece.bottom = y,
                    None => pieces.push(Piece {
                        value,
                        left,
                        top: y,
                        right,
                        bottom: y,
                    }),
                }
            }
            left = right + 1;
        }
    }
    pieces
}
