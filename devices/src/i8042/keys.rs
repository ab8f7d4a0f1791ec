//! The keys of a PS/2 keyboard: what they send, and which of them the guest has been told of.
//!
//! A keyboard's buffer is small and a guest may read slowly. So what is kept is not what happened but what is: which
//! keys are down, and which of them the guest knows of. As there is room, it is told of the difference. A key that goes
//! down and up again in between is lost; none stays down for ever.

use serde::{Deserialize, Serialize};

use super::keyboard::{RELEASED, RELEASED_BIT, SET_2_TO_1};
use crate::input::scancodes::set_1;

/// Keys have the codes of Linux's evdev below this.
const COUNT: u16 = 256;
const WORDS: usize = 4;

/// The code before a key's that has it in common with another.
const EXTENDED: u8 = 0xE0;
/// Pause sends all of its bytes at once, and nothing when it goes up.
const PAUSE: u16 = 119;
const PAUSE_SET_1: &[u8] = &[0xE1, 0x1D, 0x45, 0xE1, 0x9D, 0xC5];
const PAUSE_SET_2: &[u8] = &[0xE1, 0x14, 0x77, 0xE1, RELEASED, 0x14, RELEASED, 0x77];
/// Print Screen comes with a shift that is none.
const PRINT: u16 = 99;
const PRINT_SHIFT: u8 = 0x2A;
const PRINT_CODE: u8 = 0x37;

/// The code in set 2 that the controller translates to `code` of set 1.
fn set_2(code: u8) -> Option<u8> {
    if code == 0x41 {
        return Some(0x83);
    }
    let at = SET_2_TO_1.iter().position(|to| *to == code);
    at.and_then(|at| u8::try_from(at).ok())
}

/// What a key sends in a scan code set; nothing where it does not exist in it.
fn bytes(code: u16, down: bool, set: u8) -> Option<Vec<u8>> {
    let one = |code: u8, down: bool| -> Option<Vec<u8>> {
        Some(match (set, down) {
            (1, true) => vec![code],
            (1, false) => vec![code | RELEASED_BIT],
            (_, true) => vec![set_2(code)?],
            (_, false) => vec![RELEASED, set_2(code)?],
        })
    };
    let extended = |code: u8| Some([vec![EXTENDED], one(code, down)?].concat());
    match (code, down) {
        (PAUSE, true) if set == 1 => Some(PAUSE_SET_1.to_vec()),
        (PAUSE, true) => Some(PAUSE_SET_2.to_vec()),
        (PAUSE, false) => Some(Vec::new()),
        (PRINT, true) => Some([extended(PRINT_SHIFT)?, extended(PRINT_CODE)?].concat()),
        (PRINT, false) => Some([extended(PRINT_CODE)?, extended(PRINT_SHIFT)?].concat()),
        _ => match set_1(code)? {
            (code, true) => extended(code),
            (code, false) => one(code, down),
        },
    }
}

/// A bit for each key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct KeySet([u64; WORDS]);

impl KeySet {
    fn place(code: u16) -> Option<(usize, u64)> {
        (code < COUNT).then(|| (usize::from(code / 64), 1 << (code % 64)))
    }

    fn has(&self, code: u16) -> bool {
        Self::place(code).is_some_and(|(word, bit)| {
            let word = self.0.get(word).copied();
            word.unwrap_or(0) & bit != 0
        })
    }

    fn set(&mut self, code: u16, on: bool) {
        if let Some((word, bit)) = Self::place(code)
            && let Some(word) = self.0.get_mut(word)
        {
            *word = if on { *word | bit } else { *word & !bit };
        }
    }

    /// A key that is in one of two sets alone: first one that is not in `self`.
    fn difference(&self, other: &Self) -> Option<u16> {
        let codes = || 0..COUNT;
        let released = codes().find(|code| other.has(*code) && !self.has(*code));
        released.or_else(|| codes().find(|code| self.has(*code) && !other.has(*code)))
    }
}

/// The saved form of [`Keys`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct KeysV1 {
    /// Of those that are down nobody holds any, once the machine is restored.
    pub(super) told: KeySet,
}

/// The keys.
#[derive(Debug, Default)]
pub(super) struct Keys {
    down: KeySet,
    told: KeySet,
}

impl Keys {
    /// A key goes down or up. The bytes with which it repeats itself, where it has been down.
    pub(super) fn set(&mut self, code: u16, down: bool, set: u8) -> Vec<u8> {
        let Some(repeated) = bytes(code, true, set) else {
            return Vec::new();
        };
        let repeats = down && self.told.has(code);
        self.down.set(code, down);
        if repeats { repeated } else { Vec::new() }
    }

    /// What is to be told next, in no more than `room` bytes. It has been told then.
    pub(super) fn next(&mut self, room: usize, set: u8) -> Option<Vec<u8>> {
        let code = self.down.difference(&self.told)?;
        let down = self.down.has(code);
        let bytes = bytes(code, down, set).unwrap_or_default();
        (bytes.len() <= room).then(|| {
            self.told.set(code, down);
            bytes
        })
    }

    /// Whether the guest has been told of all that is.
    pub(super) fn are_told(&self) -> bool {
        self.down == self.told
    }

    /// Forgets all keys: the guest is told of none that is down now.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(super) fn save(&self) -> KeysV1 {
        let Self { down: _, told } = *self;
        KeysV1 { told }
    }

    /// Adopts untrusted keys.
    pub(super) fn restore(KeysV1 { told }: KeysV1) -> Self {
        let down = KeySet::default();
        Self { down, told }
    }
}

#[cfg(test)]
mod tests {
    use super::super::keyboard::translate;
    use super::*;

    #[test]
    fn every_key_is_the_same_in_both_sets() {
        for code in 0..COUNT {
            let (Some(one), Some(two)) = (bytes(code, true, 1), bytes(code, true, 2)) else {
                assert_eq!(bytes(code, true, 1), None, "{code}");
                continue;
            };
            if code == PAUSE {
                continue;
            }
            let translated: Vec<u8> = two.iter().map(|byte| translate(*byte)).collect();
            assert_eq!(one, translated, "{code}");
        }
    }

    #[test]
    fn known_keys_send_known_bytes() {
        for (code, set, down, up) in [
            (30, 1, &[0x1e][..], &[0x9e][..]),
            (30, 2, &[0x1c], &[0xf0, 0x1c]),
            (65, 2, &[0x83], &[0xf0, 0x83]),
            (88, 2, &[0x07], &[0xf0, 0x07]),
            (97, 2, &[0xe0, 0x14], &[0xe0, 0xf0, 0x14]),
            (105, 1, &[0xe0, 0x4b], &[0xe0, 0xcb]),
            (
                99,
                2,
                &[0xe0, 0x12, 0xe0, 0x7c],
                &[0xe0, 0xf0, 0x7c, 0xe0, 0xf0, 0x12],
            ),
            (119, 1, PAUSE_SET_1, &[]),
        ] {
            assert_eq!(bytes(code, true, set).unwrap(), down, "{code}");
            assert_eq!(bytes(code, false, set).unwrap(), up, "{code}");
        }
        for none in [0, 84, 85, 200, 255, 256, 0x110, u16::MAX] {
            assert_eq!(bytes(none, true, 2), None, "{none}");
        }
    }

    #[test]
    fn what_does_not_fit_is_told_later_and_no_key_stays_down() {
        let mut keys = Keys::default();
        assert_eq!(keys.set(30, true, 2), [0; 0]);
        assert_eq!(keys.next(0, 2), None, "no room");
        assert_eq!(keys.next(1, 2).unwrap(), [0x1c]);
        assert_eq!(keys.set(30, true, 2), [0x1c], "it repeats itself");
        keys.set(30, false, 2);
        keys.set(31, true, 2);
        assert_eq!(keys.next(1, 2), None, "the release comes first");
        assert_eq!(keys.next(2, 2).unwrap(), [0xf0, 0x1c]);
        keys.set(31, false, 2);
        assert_eq!(keys.next(16, 2), None, "the guest never knew");
        assert_eq!(keys.set(255, true, 2), [0; 0], "there is no such key");
        assert_eq!(keys.next(16, 2), None);
    }
}
