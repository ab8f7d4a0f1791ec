use proptest::prelude::*;

use super::super::super::area::Size;
use super::decode::{Decoder, tight_len};
use super::*;

const ALL: [Encoding; 4] = [
    Encoding::Raw,
    Encoding::Hextile,
    Encoding::Zrle,
    Encoding::Tight,
];

fn format(wire: [u8; 16]) -> ClientFormat {
    ClientFormat::parse(&wire).unwrap()
}

/// 32, 16 and 8 bits, both ends first.
fn formats() -> [ClientFormat; 5] {
    [
        ClientFormat::SERVER,
        format([32, 24, 1, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0]),
        format([32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 24, 16, 8, 0, 0, 0]),
        format([16, 16, 1, 1, 0, 31, 0, 63, 0, 31, 11, 5, 0, 0, 0, 0]),
        format([8, 8, 0, 1, 0, 7, 0, 7, 0, 3, 0, 3, 6, 0, 0, 0]),
    ]
}

fn wish(format: ClientFormat, encoding: Encoding) -> Wish {
    Wish {
        format,
        encoding,
        effort: 2,
        quality: None,
    }
}

fn area(width: u16, height: u16) -> Rect {
    Rect {
        x: 3,
        y: 5,
        width,
        height,
    }
}

/// A picture with as many colours as it says, in runs as long as it says.
fn picture(size: usize, colours: u32, run: usize, seed: u32) -> Vec<u32> {
    let mut state = seed;
    let mut pixels = Vec::new();
    while pixels.len() < size {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let colour = (state >> 8) % colours;
        let pixel = colour.wrapping_mul(0x0023_4567) & 0x00ff_ffff;
        pixels.extend(vec![pixel; run]);
    }
    pixels.truncate(size);
    pixels
}

/// Sends `pixels` and compares what arrives.
fn there_and_back(
    encoder: &mut Encoder,
    decoder: &mut Decoder,
    wish: Wish,
    area: Rect,
    pixels: &[u32],
) -> usize {
    let mut out = Vec::new();
    encoder.set(wish);
    encoder.encode(area, pixels, &mut out).unwrap();
    let mut head = Vec::new();
    header(&mut head, area, wish.encoding.number());
    let mut rest = out.strip_prefix(head.as_slice()).unwrap();
    let translation = Translation::new(&wish.format, wish.encoding.packing());
    let found = decoder.decode(
        wish.encoding.number(),
        (area.width.into(), area.height.into()),
        translation.bytes(),
        &mut rest,
    );
    assert!(rest.is_empty());
    let sent: Vec<u32> = pixels.iter().map(|p| translation.pixel(*p)).collect();
    assert!(found == sent, "{wish:?} {area:?}");
    out.len()
}

#[test]
fn every_encoding_brings_the_pixels_over_in_every_format() {
    for encoding in ALL {
        for format in formats() {
            let wish = wish(format, encoding);
            let (mut encoder, mut decoder) = (Encoder::new(wish), Decoder::default());
            let sides = [
                (1, 1),
                (3, 2),
                (16, 16),
                (17, 70),
                (64, 64),
                (65, 33),
                (130, 20),
            ];
            for (width, height) in sides {
                for (colours, run) in [
                    (1, 1),
                    (2, 3),
                    (3, 2),
                    (9, 1),
                    (40, 9),
                    (200, 300),
                    (9999, 1),
                ] {
                    let area = area(width, height);
                    let pixels = picture(area.pixels(), colours, run, u32::from(width));
                    there_and_back(&mut encoder, &mut decoder, wish, area, &pixels);
                }
            }
        }
    }
}

#[test]
fn a_client_may_change_its_mind_between_rectangles() {
    let (mut encoder, mut decoder) = (
        Encoder::new(wish(ClientFormat::SERVER, Encoding::Raw)),
        Decoder::default(),
    );
    let area = area(70, 40);
    for turn in 0..40_u32 {
        let encoding = ALL[usize::try_from(turn / 3).unwrap() % 4];
        let format = formats()[usize::try_from(turn).unwrap() % 5];
        let effort = u8::try_from(turn % 11).unwrap();
        let wish = Wish {
            effort,
            ..wish(format, encoding)
        };
        let pixels = picture(area.pixels(), 1 + turn * 13, 3, turn);
        there_and_back(&mut encoder, &mut decoder, wish, area, &pixels);
    }
}

#[test]
fn text_takes_less_than_its_pixels() {
    let area = area(640, 64);
    let pixels = picture(area.pixels(), 2, 4, 1);
    for (encoding, most) in [
        (Encoding::Hextile, area.pixels() * 2),
        (Encoding::Zrle, area.pixels() / 6),
        (Encoding::Tight, area.pixels() / 6),
    ] {
        let wish = wish(ClientFormat::SERVER, encoding);
        let (mut encoder, mut decoder) = (Encoder::new(wish), Decoder::default());
        let len = there_and_back(&mut encoder, &mut decoder, wish, area, &pixels);
        assert!(len < most, "{encoding:?}: {len}");
    }
}

#[test]
fn photographs_are_jpeg_where_the_client_says_how_good() {
    let area = area(64, 64);
    // A gradient with more colours than a palette has.
    let pixels: Vec<u32> = (0..64 * 64)
        .map(|at| (at % 64) << 18 | (at / 64) << 10)
        .collect();
    let encoded = |quality, pixels: &[u32]| {
        let wish = Wish {
            quality,
            ..wish(ClientFormat::SERVER, Encoding::Tight)
        };
        let mut out = Vec::new();
        Encoder::new(wish).encode(area, pixels, &mut out).unwrap();
        out.split_off(12)
    };
    assert_eq!(encoded(None, &pixels)[0] & 0x80, 0);
    let lossy = encoded(Some(8), &pixels);
    assert_eq!(lossy[0], JPEG_CONTROL);
    let mut rest = &lossy[1..];
    assert_eq!(tight_len(&mut rest), rest.len());
    assert_eq!(rest[..2], [0xff, 0xd8], "a JPEG's first marker");
    assert!(encoded(Some(0), &pixels).len() < lossy.len());
    // Text stays as sharp as it is.
    let text = picture(area.pixels(), 4, 3, 1);
    assert_eq!(encoded(Some(0), &text)[0] & 0x80, 0);
}

#[test]
fn text_beside_a_photograph_stays_sharp() {
    let whole = Size {
        width: 512,
        height: 64,
    }
    .area();
    let wish = Wish {
        quality: Some(5),
        ..wish(ClientFormat::SERVER, Encoding::Tight)
    };
    let mut encoder = Encoder::new(wish);
    let kinds = Encoder::pieces(&wish, whole).map(|piece| {
        let text = picture(piece.pixels(), 4, 3, 1);
        let photograph = picture(piece.pixels(), 9999, 1, 1);
        let pixels = if piece.x < 256 { text } else { photograph };
        let mut out = Vec::new();
        encoder.encode(piece, &pixels, &mut out).unwrap();
        (piece.x, out[12] & 0x80 != 0)
    });
    assert_eq!(kinds.collect::<Vec<_>>(), [(0, false), (256, true)]);
}

const JPEG_CONTROL: u8 = 0x90;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_picture_arrives_as_it_was(
        encoding in 0..4_usize,
        format in 0..5_usize,
        sides in (1..150_u16, 1..90_u16),
        colours in 1..400_u32,
        run in 1..700_usize,
        seed: u32,
    ) {
        let wish = wish(formats()[format], ALL[encoding]);
        let (mut encoder, mut decoder) = (Encoder::new(wish), Decoder::default());
        let area = area(sides.0, sides.1);
        for turn in 0..2 {
            let pixels = picture(area.pixels(), colours, run, seed ^ turn);
            there_and_back(&mut encoder, &mut decoder, wish, area, &pixels);
        }
    }
}
