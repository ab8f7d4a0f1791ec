//! A client's side of the encodings, for tests: written from the protocol's description alone.

use std::io::Read;

use flate2::{Decompress, FlushDecompress};

/// What a client keeps from rectangle to rectangle.
#[derive(Default)]
pub struct Decoder {
    zrle: Option<Decompress>,
    tight: [Option<Decompress>; 4],
}

/// A rectangle's pixels as numbers of `bytes` bytes, the first lowest.
pub type Pixels = Vec<u32>;

fn number(input: &mut &[u8], bytes: usize) -> u32 {
    let mut word = [0; 4];
    input.read_exact(&mut word[..bytes]).unwrap();
    u32::from_le_bytes(word)
}

fn byte(input: &mut &[u8]) -> usize {
    usize::try_from(number(input, 1)).unwrap()
}

fn inflate(stream: &mut Decompress, input: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 << 20);
    let before = stream.total_in();
    stream
        .decompress_vec(input, &mut out, FlushDecompress::Sync)
        .unwrap();
    assert_eq!(
        usize::try_from(stream.total_in() - before).unwrap(),
        input.len()
    );
    out
}

fn take<'a>(input: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(len);
    *input = rest;
    taken
}

impl Decoder {
    /// Reads the body of a rectangle of the encoding with this number.
    pub fn decode(
        &mut self,
        encoding: i32,
        (width, height): (usize, usize),
        bytes: usize,
        input: &mut &[u8],
    ) -> Pixels {
        match encoding {
            0 => (0..width * height).map(|_| number(input, bytes)).collect(),
            5 => hextile(width, height, bytes, input),
            7 => self.tight(width, height, bytes, input),
            16 => self.zrle(width, height, bytes, input),
            _ => panic!("encoding {encoding}"),
        }
    }

    fn zrle(&mut self, width: usize, height: usize, bytes: usize, input: &mut &[u8]) -> Pixels {
        let len = u32::from_be_bytes(*take(input, 4).first_chunk().unwrap());
        let stream = self.zrle.get_or_insert_with(|| Decompress::new(true));
        let plain = inflate(stream, take(input, usize::try_from(len).unwrap()));
        let mut plain = plain.as_slice();
        let mut pixels = vec![0; width * height];
        for y in (0..height).step_by(64) {
            for x in (0..width).step_by(64) {
                let (w, h) = (64.min(width - x), 64.min(height - y));
                let square = zrle_square(w, h, bytes, &mut plain);
                place(&mut pixels, width, (x, y), w, &square);
            }
        }
        assert!(plain.is_empty());
        pixels
    }

    fn tight(&mut self, width: usize, height: usize, bytes: usize, input: &mut &[u8]) -> Pixels {
        let control = byte(input);
        for (at, stream) in self.tight.iter_mut().enumerate() {
            if control >> at & 1 != 0 {
                *stream = None;
            }
        }
        if control >> 4 == 8 {
            return vec![number(input, bytes); width * height];
        }
        assert!(control & 0x80 == 0, "no basic compression: {control:#x}");
        let palette: Option<Pixels> = (control & 0x40 != 0).then(|| {
            assert_eq!(byte(input), 1, "the palette's filter");
            let count = byte(input) + 1;
            (0..count).map(|_| number(input, bytes)).collect()
        });
        let len = match palette.as_ref().map(Vec::len) {
            None => width * height * bytes,
            Some(2) => width.div_ceil(8) * height,
            Some(_) => width * height,
        };
        let plain = if len < 12 {
            take(input, len).to_vec()
        } else {
            let packed = tight_len(input);
            let stream = &mut self.tight[control >> 4 & 3];
            let stream = stream.get_or_insert_with(|| Decompress::new(true));
            inflate(stream, take(input, packed))
        };
        assert_eq!(plain.len(), len);
        let mut rest = plain.as_slice();
        match palette {
            None => (0..width * height)
                .map(|_| number(&mut rest, bytes))
                .collect(),
            Some(palette) if palette.len() == 2 => (0..width * height)
                .map(|at| {
                    let line = at / width * width.div_ceil(8);
                    let bits = plain[line + at % width / 8];
                    palette[usize::from(bits >> (7 - at % width % 8) & 1)]
                })
                .collect(),
            Some(palette) => plain.iter().map(|at| palette[usize::from(*at)]).collect(),
        }
    }
}

/// A length in Tight's form.
pub fn tight_len(input: &mut &[u8]) -> usize {
    let mut len = 0;
    for shift in [0, 7, 14] {
        let part = byte(input);
        len |= (part & if shift == 14 { 0xff } else { 0x7f }) << shift;
        if part & 0x80 == 0 {
            break;
        }
    }
    len
}

fn place(pixels: &mut [u32], width: usize, (x, y): (usize, usize), w: usize, square: &[u32]) {
    for (line, row) in square.chunks(w).enumerate() {
        let start = (y + line) * width + x;
        pixels[start..start + w].copy_from_slice(row);
    }
}

fn hextile(width: usize, height: usize, bytes: usize, input: &mut &[u8]) -> Pixels {
    let mut pixels = vec![0; width * height];
    let (mut background, mut foreground) = (None, None);
    for y in (0..height).step_by(16) {
        for x in (0..width).step_by(16) {
            let (w, h) = (16.min(width - x), 16.min(height - y));
            let flags = byte(input);
            if flags & 1 != 0 {
                let raw: Pixels = (0..w * h).map(|_| number(input, bytes)).collect();
                place(&mut pixels, width, (x, y), w, &raw);
                (background, foreground) = (None, None);
                continue;
            }
            if flags & 2 != 0 {
                background = Some(number(input, bytes));
            }
            if flags & 4 != 0 {
                foreground = Some(number(input, bytes));
            }
            let mut square = vec![background.unwrap(); w * h];
            let count = if flags & 8 != 0 { byte(input) } else { 0 };
            for _ in 0..count {
                if flags & 16 != 0 {
                    foreground = Some(number(input, bytes));
                }
                let (at, size) = (byte(input), byte(input));
                for line in (at & 15)..=(at & 15) + (size & 15) {
                    let start = line * w + (at >> 4);
                    square[start..=start + (size >> 4)].fill(foreground.unwrap());
                }
            }
            if flags & 16 != 0 {
                foreground = None;
            }
            place(&mut pixels, width, (x, y), w, &square);
        }
    }
    pixels
}

fn zrle_square(w: usize, h: usize, bytes: usize, input: &mut &[u8]) -> Pixels {
    let kind = byte(input);
    let colours = kind & 0x7f;
    let run = |input: &mut &[u8]| {
        let mut len = 1;
        loop {
            let part = byte(input);
            len += part;
            if part != 255 {
                return len;
            }
        }
    };
    let mut pixels = Vec::new();
    match kind {
        0 => return (0..w * h).map(|_| number(input, bytes)).collect(),
        128 => {
            while pixels.len() < w * h {
                let value = number(input, bytes);
                pixels.extend(vec![value; run(input)]);
            }
        }
        129 => panic!("a palette of one colour with runs"),
        _ => {
            let palette: Pixels = (0..colours).map(|_| number(input, bytes)).collect();
            match kind {
                1 => return vec![palette[0]; w * h],
                2..=16 => {
                    let bits = match colours {
                        2 => 1,
                        3..=4 => 2,
                        _ => 4,
                    };
                    for _ in 0..h {
                        let line = take(input, (w * bits).div_ceil(8));
                        pixels.extend((0..w).map(|x| {
                            let byte = usize::from(line[x * bits / 8]);
                            let shift = 8 - bits - x * bits % 8;
                            palette[byte >> shift & ((1 << bits) - 1)]
                        }));
                    }
                }
                130.. => {
                    while pixels.len() < w * h {
                        let at = byte(input);
                        let len = if at & 128 == 0 { 1 } else { run(input) };
                        pixels.extend(vec![palette[at & 127]; len]);
                    }
                }
                _ => panic!("a square of kind {kind}"),
            }
        }
    }
    assert_eq!(pixels.len(), w * h);
    pixels
}
