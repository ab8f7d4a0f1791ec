//! Scan codes of set 1, which a PC's keyboard controller gives and viewers name keys by.

/// Keys whose set 1 code differs from their evdev code: that code, and whether 0xE0 comes before it.
const OTHERS: &[(u16, u8, bool)] = &[
    (89, 0x73, false),
    (90, 0x78, false),
    (91, 0x77, false),
    (92, 0x79, false),
    (93, 0x70, false),
    (94, 0x7B, false),
    (95, 0x5C, false),
    (96, 0x1C, true),
    (97, 0x1D, true),
    (98, 0x35, true),
    (100, 0x38, true),
    (102, 0x47, true),
    (103, 0x48, true),
    (104, 0x49, true),
    (105, 0x4B, true),
    (106, 0x4D, true),
    (107, 0x4F, true),
    (108, 0x50, true),
    (109, 0x51, true),
    (110, 0x52, true),
    (111, 0x53, true),
    (113, 0x20, true),
    (114, 0x2E, true),
    (115, 0x30, true),
    (116, 0x5E, true),
    (117, 0x59, false),
    (121, 0x7E, false),
    (124, 0x7D, false),
    (125, 0x5B, true),
    (126, 0x5C, true),
    (127, 0x5D, true),
    (140, 0x21, true),
    (142, 0x5F, true),
    (143, 0x63, true),
    (155, 0x6C, true),
    (156, 0x66, true),
    (157, 0x6B, true),
    (158, 0x6A, true),
    (159, 0x69, true),
    (163, 0x19, true),
    (164, 0x22, true),
    (165, 0x10, true),
    (166, 0x24, true),
    (172, 0x32, true),
    (173, 0x67, true),
    (183, 0x5D, false),
    (184, 0x5E, false),
    (185, 0x5F, false),
    (217, 0x65, true),
    (226, 0x6D, true),
];

/// A key's code in set 1, and whether 0xE0 comes before it; nothing where it is no key of that set, or sends more than that.
#[must_use]
pub(crate) fn set_1(code: u16) -> Option<(u8, bool)> {
    match code {
        1..=83 | 86..=88 => u8::try_from(code).ok().map(|code| (code, false)),
        _ => {
            let found = OTHERS.iter().find(|(known, ..)| *known == code);
            found.map(|(_, code, extended)| (*code, *extended))
        }
    }
}

/// The key that has this code in set 1, `extended` behind 0xE0.
#[must_use]
pub(crate) fn of_set_1(code: u8, extended: bool) -> Option<u16> {
    let wanted = Some((code, extended));
    let plain = u16::from(code);
    if set_1(plain) == wanted {
        return Some(plain);
    }
    let found = OTHERS
        .iter()
        .find(|(_, known, behind)| Some((*known, *behind)) == wanted);
    found.map(|(code, ..)| *code)
}
