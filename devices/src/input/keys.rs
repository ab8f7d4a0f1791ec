//! Keys by the names that QEMU gives them (its `QKeyCode`) and by the codes that Linux gives them
//! (`input-event-codes.h`), which virtio uses as well (Virtio 1.2, section 5.8).

use std::fmt;

/// A key of a keyboard or a button of a pointer, by its Linux code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(u16);

impl Key {
    /// The first code that is a button's and no key's.
    pub const FIRST_BUTTON: u16 = 0x100;

    /// The key with this QEMU name, for example `ctrl`, `a` or `kp_enter`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        find(KEYS, name)
    }

    /// The button with this QEMU name, for example `left`.
    #[must_use]
    pub fn button(name: &str) -> Option<Self> {
        find(BUTTONS, name)
    }

    /// The key with this Linux code, if it is one of a keyboard or pointer here.
    #[must_use]
    pub fn from_code(code: u16) -> Option<Self> {
        let mut all = KEYS.iter().chain(BUTTONS);
        all.any(|(_, known)| *known == code).then_some(Self(code))
    }

    /// Its Linux code.
    #[must_use]
    pub fn code(self) -> u16 {
        self.0
    }

    /// Its QEMU name; the first, where it has several.
    #[must_use]
    pub fn name(self) -> &'static str {
        let mut all = KEYS.iter().chain(BUTTONS);
        all.find(|(_, code)| *code == self.0)
            .map_or("unmapped", |(name, _)| name)
    }

    /// Whether a pointer has it rather than a keyboard.
    #[must_use]
    pub fn is_button(self) -> bool {
        self.0 >= Self::FIRST_BUTTON
    }

    /// Every key of a keyboard.
    pub fn keyboard() -> impl Iterator<Item = Self> {
        KEYS.iter().map(|(_, code)| Self(*code))
    }

    /// Every button of a pointer.
    pub fn buttons() -> impl Iterator<Item = Self> {
        BUTTONS.iter().map(|(_, code)| Self(*code))
    }

    /// The names of all keys of a keyboard.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KEYS.iter().map(|(name, _)| *name)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn find(among: &[(&str, u16)], name: &str) -> Option<Key> {
    let found = among.iter().find(|(known, _)| *known == name);
    found.map(|(_, code)| Key(*code))
}

/// The buttons of pointers, by QEMU's names for them.
const BUTTONS: &[(&str, u16)] = &[
    ("left", 0x110),
    ("right", 0x111),
    ("middle", 0x112),
    ("side", 0x113),
    ("extra", 0x114),
];

/// The keys. Where two names have one code, the one that is shown is first.
const KEYS: &[(&str, u16)] = &[
    ("esc", 1),
    ("1", 2),
    ("2", 3),
    ("3", 4),
    ("4", 5),
    ("5", 6),
    ("6", 7),
    ("7", 8),
    ("8", 9),
    ("9", 10),
    ("0", 11),
    ("minus", 12),
    ("equal", 13),
    ("backspace", 14),
    ("tab", 15),
    ("q", 16),
    ("w", 17),
    ("e", 18),
    ("r", 19),
    ("t", 20),
    ("y", 21),
    ("u", 22),
    ("i", 23),
    ("o", 24),
    ("p", 25),
    ("bracket_left", 26),
    ("bracket_right", 27),
    ("ret", 28),
    ("ctrl", 29),
    ("a", 30),
    ("s", 31),
    ("d", 32),
    ("f", 33),
    ("g", 34),
    ("h", 35),
    ("j", 36),
    ("k", 37),
    ("l", 38),
    ("semicolon", 39),
    ("apostrophe", 40),
    ("grave_accent", 41),
    ("shift", 42),
    ("backslash", 43),
    ("z", 44),
    ("x", 45),
    ("c", 46),
    ("v", 47),
    ("b", 48),
    ("n", 49),
    ("m", 50),
    ("comma", 51),
    ("dot", 52),
    ("slash", 53),
    ("shift_r", 54),
    ("kp_multiply", 55),
    ("asterisk", 55),
    ("alt", 56),
    ("spc", 57),
    ("caps_lock", 58),
    ("f1", 59),
    ("f2", 60),
    ("f3", 61),
    ("f4", 62),
    ("f5", 63),
    ("f6", 64),
    ("f7", 65),
    ("f8", 66),
    ("f9", 67),
    ("f10", 68),
    ("num_lock", 69),
    ("scroll_lock", 70),
    ("kp_7", 71),
    ("kp_8", 72),
    ("kp_9", 73),
    ("kp_subtract", 74),
    ("kp_4", 75),
    ("kp_5", 76),
    ("kp_6", 77),
    ("kp_add", 78),
    ("kp_1", 79),
    ("kp_2", 80),
    ("kp_3", 81),
    ("kp_0", 82),
    ("kp_decimal", 83),
    ("less", 86),
    ("f11", 87),
    ("f12", 88),
    ("ro", 89),
    ("hiragana", 91),
    ("henkan", 92),
    ("katakanahiragana", 93),
    ("muhenkan", 94),
    ("kp_enter", 96),
    ("ctrl_r", 97),
    ("kp_divide", 98),
    ("print", 99),
    ("sysrq", 99),
    ("alt_r", 100),
    ("lf", 101),
    ("home", 102),
    ("up", 103),
    ("pgup", 104),
    ("left", 105),
    ("right", 106),
    ("end", 107),
    ("down", 108),
    ("pgdn", 109),
    ("insert", 110),
    ("delete", 111),
    ("audiomute", 113),
    ("volumedown", 114),
    ("volumeup", 115),
    ("power", 116),
    ("kp_equals", 117),
    ("pause", 119),
    ("kp_comma", 121),
    ("lang1", 122),
    ("lang2", 123),
    ("yen", 124),
    ("meta_l", 125),
    ("meta_r", 126),
    ("compose", 127),
    ("stop", 128),
    ("again", 129),
    ("props", 130),
    ("undo", 131),
    ("front", 132),
    ("copy", 133),
    ("open", 134),
    ("paste", 135),
    ("find", 136),
    ("cut", 137),
    ("help", 138),
    ("menu", 139),
    ("calculator", 140),
    ("sleep", 142),
    ("wake", 143),
    ("mail", 155),
    ("ac_bookmarks", 156),
    ("computer", 157),
    ("ac_back", 158),
    ("ac_forward", 159),
    ("audionext", 163),
    ("audioplay", 164),
    ("audioprev", 165),
    ("audiostop", 166),
    ("ac_home", 172),
    ("ac_refresh", 173),
    ("f13", 183),
    ("f14", 184),
    ("f15", 185),
    ("f16", 186),
    ("f17", 187),
    ("f18", 188),
    ("f19", 189),
    ("f20", 190),
    ("f21", 191),
    ("f22", 192),
    ("f23", 193),
    ("f24", 194),
    ("mediaselect", 226),
];

/// The keys that type `character` on a keyboard of the layout that the United States use, and whether
/// shift is held for it. `None` where that layout has it not.
#[must_use]
pub fn typed(character: char) -> Option<(bool, Key)> {
    let named = |name| Key::from_name(name);
    let lower = character.to_ascii_lowercase();
    if lower.is_ascii_alphanumeric() {
        let key = named(lower.encode_utf8(&mut [0; 4]))?;
        return Some((character.is_ascii_uppercase(), key));
    }
    let (_, shift, name) = SIGNS.iter().find(|(sign, ..)| *sign == character)?;
    Some((*shift, named(name)?))
}

const SIGNS: &[(char, bool, &str)] = &[
    (' ', false, "spc"),
    ('\n', false, "ret"),
    ('\t', false, "tab"),
    ('-', false, "minus"),
    ('=', false, "equal"),
    ('[', false, "bracket_left"),
    (']', false, "bracket_right"),
    (';', false, "semicolon"),
    ('\'', false, "apostrophe"),
    ('`', false, "grave_accent"),
    ('\\', false, "backslash"),
    (',', false, "comma"),
    ('.', false, "dot"),
    ('/', false, "slash"),
    ('!', true, "1"),
    ('@', true, "2"),
    ('#', true, "3"),
    ('$', true, "4"),
    ('%', true, "5"),
    ('^', true, "6"),
    ('&', true, "7"),
    ('*', true, "8"),
    ('(', true, "9"),
    (')', true, "0"),
    ('_', true, "minus"),
    ('+', true, "equal"),
    ('{', true, "bracket_left"),
    ('}', true, "bracket_right"),
    (':', true, "semicolon"),
    ('"', true, "apostrophe"),
    ('~', true, "grave_accent"),
    ('|', true, "backslash"),
    ('<', true, "comma"),
    ('>', true, "dot"),
    ('?', true, "slash"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_to_its_key_and_every_key_to_a_name() {
        for key in Key::keyboard() {
            assert_eq!(Key::from_name(key.name()), Some(key));
            assert_eq!(Key::from_code(key.code()), Some(key));
            assert!(!key.is_button());
        }
        for key in Key::buttons() {
            assert_eq!(Key::button(key.name()), Some(key));
            assert_eq!(Key::from_code(key.code()), Some(key));
            assert!(key.is_button());
        }
        // An arrow and a button share a name.
        assert_eq!(Key::from_name("left").unwrap().code(), 105);
        assert_eq!(Key::from_name("print"), Key::from_name("sysrq"));
        assert_eq!(Key::from_name("kp_multiply"), Key::from_name("asterisk"));
        for unknown in ["", "A", "Ctrl", "unmapped", "bracket-left"] {
            assert_eq!(Key::from_name(unknown), None, "{unknown}");
        }
        for unknown in [0, 84, 0x115, u16::MAX] {
            assert_eq!(Key::from_code(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn no_name_is_there_twice() {
        let mut names: Vec<_> = Key::names().collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn what_can_be_printed_can_be_typed() {
        for character in (' '..='~').chain(['\n', '\t']) {
            let (shift, key) = typed(character).unwrap();
            assert!(!key.is_button(), "{character}");
            assert!(!(shift && character.is_ascii_lowercase()));
        }
        assert_eq!(typed('A'), Some((true, Key::from_name("a").unwrap())));
        assert_eq!(typed('ä'), None);
        assert_eq!(typed('\u{1b}'), None);
    }
}
