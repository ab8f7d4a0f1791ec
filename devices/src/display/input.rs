//! Where the keys and pointers of those who look go, and which key a viewer means.

use crate::input::scancodes::of_set_1;
use crate::input::typed;

/// What a guest is given of a viewer's keyboard and pointer. Called on the server's thread; must not block.
pub trait InputSink: Send + Sync {
    /// The key with this Linux code (`input-event-codes.h`) goes down or up. A key that is down already is repeated.
    fn key(&self, code: u16, down: bool);

    /// The pointer is at `x`, `y`, each from 0 to [`PLACE_MAX`] over the picture.
    fn place(&self, x: u16, y: u16);

    /// The pointer went so many pixels to the right and down.
    fn go(&self, right: i32, down: i32);

    /// A button goes down or up.
    fn button(&self, button: Button, down: bool);

    /// The wheel is turned by so many notches, away from the user and to the right.
    fn wheel(&self, away: i32, right: i32);

    /// Whether the guest asks where the pointer is; else how far it goes.
    fn takes_places(&self) -> bool;
}

/// The right and lower end of a picture as [`InputSink::place`] is told.
pub const PLACE_MAX: u16 = 0x7fff;

/// A button of a pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Button {
    /// The first.
    Left,
    /// The second, or the wheel's.
    Middle,
    /// The third.
    Right,
}

/// The Linux codes of keys that hold others.
pub(super) const LEFT_SHIFT: u16 = 42;
/// As [`LEFT_SHIFT`].
pub(super) const RIGHT_SHIFT: u16 = 54;
/// The keys that there are have codes below.
pub(super) const KEYS: u16 = 256;

/// The Linux code of the key with a scancode of set 1, as QEMU's extension tells it: what follows 0xE0 has bit 7.
#[must_use]
pub(super) fn of_scancode(scancode: u32) -> Option<u16> {
    let extended = scancode >= 0x80;
    let code = u8::try_from(scancode & !0xe000).ok()?;
    let known = if extended {
        of_set_1(code & 0x7f, true)
    } else {
        of_set_1(code, false)
    };
    let (others, code) = if extended {
        (EXTENDED, code | 0x80)
    } else {
        (PLAIN, code)
    };
    known.or_else(|| {
        let other = others.iter().find(|(other, _)| *other == code);
        other.map(|(_, key)| *key)
    })
}

/// Scancodes without 0xE0 past those that are Linux's.
const PLAIN: &[(u8, u16)] = &[
    (0x54, 99),
    (0x64, 183),
    (0x65, 184),
    (0x66, 185),
    (0x67, 186),
    (0x68, 187),
    (0x69, 188),
    (0x6a, 189),
    (0x6b, 190),
    (0x6c, 191),
    (0x6d, 192),
    (0x6e, 193),
    (0x76, 194),
];

/// Scancodes after 0xE0, with bit 7.
const EXTENDED: &[(u8, u16)] = &[(0xb7, 99), (0xc6, 119), (0xe8, 128)];

/// The Linux code of the key with which a keyboard of the United States makes the X symbol, and whether shift is
/// held for it.
#[must_use]
pub(super) fn of_symbol(symbol: u32) -> Option<(bool, u16)> {
    let symbol = match symbol {
        // Symbols past Latin-1 are those of Unicode with this bit.
        0x0100_0000..=0x0110_ffff => symbol & 0x00ff_ffff,
        _ => symbol,
    };
    if let Some(character) = char::from_u32(symbol).filter(|c| c.is_ascii_graphic() || *c == ' ') {
        return typed(character).map(|(shifted, key)| (shifted, key.code()));
    }
    let function = |first: u32, code: u16| u16::try_from(symbol - first).ok().map(|at| code + at);
    let code = match symbol {
        0xffbe..=0xffc7 => function(0xffbe, 59),
        0xffc8..=0xffc9 => function(0xffc8, 87),
        0xffca..=0xffd5 => function(0xffca, 183),
        _ => SYMBOLS
            .iter()
            .find(|(known, _)| *known == symbol)
            .map(|(_, code)| *code),
    };
    code.map(|code| (false, code))
}

/// X symbols (`keysymdef.h`) of keys that make no character.
const SYMBOLS: &[(u32, u16)] = &[
    (0xff08, 14),
    (0xff09, 15),
    (0xfe20, 15),
    (0xff0a, 28),
    (0xff0d, 28),
    (0xff13, 119),
    (0xff14, 70),
    (0xff15, 99),
    (0xff1b, 1),
    (0xff50, 102),
    (0xff51, 105),
    (0xff52, 103),
    (0xff53, 106),
    (0xff54, 108),
    (0xff55, 104),
    (0xff56, 109),
    (0xff57, 107),
    (0xff61, 99),
    (0xff63, 110),
    (0xff67, 127),
    (0xff6b, 119),
    (0xff7e, 100),
    (0xff7f, 69),
    (0xff8d, 96),
    (0xff95, 71),
    (0xff96, 75),
    (0xff97, 72),
    (0xff98, 77),
    (0xff99, 80),
    (0xff9a, 73),
    (0xff9b, 81),
    (0xff9c, 79),
    (0xff9d, 76),
    (0xff9e, 82),
    (0xff9f, 83),
    (0xffaa, 55),
    (0xffab, 78),
    (0xffac, 121),
    (0xffad, 74),
    (0xffae, 83),
    (0xffaf, 98),
    (0xffb0, 82),
    (0xffb1, 79),
    (0xffb2, 80),
    (0xffb3, 81),
    (0xffb4, 75),
    (0xffb5, 76),
    (0xffb6, 77),
    (0xffb7, 71),
    (0xffb8, 72),
    (0xffb9, 73),
    (0xffbd, 117),
    (0xffe1, LEFT_SHIFT),
    (0xffe2, RIGHT_SHIFT),
    (0xffe3, 29),
    (0xffe4, 97),
    (0xffe5, 58),
    (0xffe7, 125),
    (0xffe8, 126),
    (0xffe9, 56),
    (0xffea, 100),
    (0xffeb, 125),
    (0xffec, 126),
    (0xfe03, 100),
    (0xffff, 111),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scancodes_are_the_keys_of_their_places() {
        for (scancode, code) in [
            (0x1e, 30),
            (0x58, 88),
            (0x9d, 97),
            (0xe01d, 97),
            (0xcb, 105),
            (0xe04b, 105),
            (0xc6, 119),
            (0x70, 93),
        ] {
            assert_eq!(of_scancode(scancode), Some(code), "{scancode:#x}");
        }
        for none in [0, 0x55, 0x7f, 0x80, 0xff, 0x100, u32::MAX] {
            assert_eq!(of_scancode(none), None, "{none:#x}");
        }
    }

    #[test]
    fn symbols_are_the_keys_that_make_them() {
        for (symbol, key) in [
            (u32::from('a'), (false, 30)),
            (u32::from('A'), (true, 30)),
            (u32::from('~'), (true, 41)),
            (u32::from('|'), (true, 43)),
            (u32::from('/'), (false, 53)),
            (u32::from(' '), (false, 57)),
            (0x0100_0061, (false, 30)),
            (0xff0d, (false, 28)),
            (0xffbe, (false, 59)),
            (0xffc9, (false, 88)),
            (0xffca, (false, 183)),
        ] {
            assert_eq!(of_symbol(symbol), Some(key), "{symbol:#x}");
        }
        for none in [0, 0xe4, 0x0011_0000, u32::MAX] {
            assert_eq!(of_symbol(none), None, "{none:#x}");
        }
    }

    #[test]
    fn every_key_has_a_code_in_range() {
        let places = PLAIN.iter().chain(EXTENDED).map(|(_, code)| *code);
        let symbols = SYMBOLS.iter().map(|(_, code)| *code);
        assert!(places.chain(symbols).all(|code| code > 0 && code < KEYS));
    }
}
