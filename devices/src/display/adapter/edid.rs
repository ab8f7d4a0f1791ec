//! What the monitor says of itself: VESA E-EDID, release A, revision 2 (structure 1.4).

/// Bytes of the one block.
pub const EDID_LEN: usize = 128;

/// A pixel more or less of blanking does not matter without a beam: reduced blanking, for what
/// drivers compute from it.
const H_BLANK: u32 = 160;
const H_FRONT: u32 = 48;
const H_SYNC: u32 = 32;
const V_FRONT: u32 = 3;
const V_SYNC: u32 = 6;
const V_BACK: u32 = 14;
/// Frames each second.
const RATE: u32 = 60;
/// The widest and the highest that a detailed timing can say.
const MOST: u32 = 4095;
/// The largest mode that is offered besides the preferred one.
const LARGEST: (u16, u16) = (3840, 2160);
/// Sizes at 60 Hz that fit a standard timing: its width, and the code of its aspect ratio.
const STANDARD: [(u32, u8); 8] = [
    (1920, ASPECT_16_9),
    (1680, ASPECT_16_10),
    (1600, ASPECT_16_9),
    (1440, ASPECT_16_10),
    (1280, ASPECT_5_4),
    (1280, ASPECT_16_9),
    (1024, ASPECT_4_3),
    (800, ASPECT_4_3),
];
const ASPECT_16_10: u8 = 0;
const ASPECT_4_3: u8 = 1;
const ASPECT_5_4: u8 = 2;
const ASPECT_16_9: u8 = 3;

/// The block of a monitor whose preferred mode is `width` by `height` pixels at 60 Hz.
#[must_use]
pub fn edid(width: u16, height: u16) -> [u8; EDID_LEN] {
    let mut block = [0; EDID_LEN];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in block.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    put(0, &[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
    // The maker VIR in letters of five bits, product 1, serial number 0, made in 2026.
    put(8, &maker(*b"VIR"));
    put(10, &[1, 0, 0, 0, 0, 0, 0, 36]);
    // Structure 1.4; digital, 8 bits a colour; of no size; gamma 2.2; sRGB, preferred timing native.
    put(18, &[1, 4, 0xa0, 0, 0, 120, 0x06]);
    // sRGB's primaries.
    put(
        25,
        &[0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54],
    );
    // 640x480, 800x600 and 1024x768, each at 60 Hz.
    put(35, &[0x21, 0x08, 0]);
    for (place, (width, aspect)) in (38..).step_by(2).zip(STANDARD) {
        put(place, &[low_byte(width / 8 - 31), aspect << 6]);
    }
    put(54, &detailed(width, height));
    put(72, &detailed(LARGEST.0, LARGEST.1));
    put(90, &text(0xfc, b"Vireo"));
    // 5 to 240 Hz, 5 to 255 kHz, up to 600 MHz; no formula.
    put(
        108,
        &[
            0, 0, 0, 0xfd, 0, 5, 240, 5, 255, 60, 1, 0x0a, b' ', b' ', b' ', b' ', b' ', b' ',
        ],
    );
    let sum = block.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    block[EDID_LEN - 1] = sum.wrapping_neg();
    block
}

fn low_byte(value: u32) -> u8 {
    value.to_le_bytes()[0]
}

/// Three letters from A on, in 15 bits, the first the highest.
fn maker(letters: [u8; 3]) -> [u8; 2] {
    let number = letters.into_iter().fold(0_u16, |number, letter| {
        number << 5 | u16::from(letter - b'A' + 1)
    });
    number.to_be_bytes()
}

/// A detailed timing descriptor (3.10.2).
fn detailed(width: u16, height: u16) -> [u8; 18] {
    let (width, height) = (u32::from(width).min(MOST), u32::from(height).min(MOST));
    let v_blank = V_FRONT + V_SYNC + V_BACK;
    // In units of 10 kHz, for which there are 16 bits.
    let clock = (width + H_BLANK) * (height + v_blank) * RATE / 10_000;
    let clock = u16::try_from(clock).unwrap_or(u16::MAX).to_le_bytes();
    let high = |upper: u32, lower: u32| low_byte((upper >> 8) << 4 | lower >> 8);
    [
        clock[0],
        clock[1],
        low_byte(width),
        low_byte(H_BLANK),
        high(width, H_BLANK),
        low_byte(height),
        low_byte(v_blank),
        high(height, v_blank),
        low_byte(H_FRONT),
        low_byte(H_SYNC),
        low_byte(V_FRONT << 4 | V_SYNC),
        0,
        0,
        0,
        0,
        0,
        0,
        // Digital separate sync, horizontal positive.
        0x1a,
    ]
}

/// A descriptor of text, at most 13 characters.
fn text(tag: u8, text: &[u8]) -> [u8; 18] {
    let mut descriptor = [b' '; 18];
    descriptor[..5].copy_from_slice(&[0, 0, 0, tag, 0]);
    let end = text.iter().chain(b"\n");
    for (to, from) in descriptor.iter_mut().skip(5).zip(end) {
        *to = *from;
    }
    descriptor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_adds_up_to_zero() {
        for (width, height) in [(1024, 768), (1, 1), (65535, 65535)] {
            let block = edid(width, height);
            let sum = block.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "{width} x {height}");
        }
    }

    #[test]
    fn the_preferred_mode_is_the_first_detailed_timing() {
        let block = edid(1280, 800);
        let width = u32::from(block[56]) | u32::from(block[58] >> 4) << 8;
        let height = u32::from(block[59]) | u32::from(block[61] >> 4) << 8;
        assert_eq!((width, height), (1280, 800));
        let clock = u32::from(u16::from_le_bytes([block[54], block[55]])) * 10_000;
        let frame = (1280 + H_BLANK) * (800 + V_FRONT + V_SYNC + V_BACK);
        assert_eq!((clock + frame / 2) / frame, RATE);
    }

    #[test]
    fn standard_timings_name_their_widths() {
        let block = edid(1024, 768);
        let widths: Vec<u32> = (38..54)
            .step_by(2)
            .map(|at| (u32::from(block[at]) + 31) * 8)
            .collect();
        let wanted: Vec<u32> = STANDARD.iter().map(|(width, _)| *width).collect();
        assert_eq!(widths, wanted);
    }
}
