//! Layouts and numbers of input devices (Virtio 1.2, section 5.8), and what configuration space answers.

use devices::input::{AXIS_MAX, InputEvent, InputKind, event_type};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The device type number.
pub const DEVICE_TYPE: u16 = 18;

/// The queue on which events go to the driver, and that on which the driver switches lights (5.8.2).
pub const EVENTS: u16 = 0;
/// See [`EVENTS`].
pub const STATUS: u16 = 1;

/// An event (5.8.6).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Event {
    /// The type.
    pub kind: U16,
    /// The code.
    pub code: U16,
    /// The value, of which some are negative.
    pub value: U32,
}

/// Its length in bytes.
pub const EVENT_LEN: usize = 8;

const _: () = assert!(size_of::<Event>() == EVENT_LEN);

impl From<InputEvent> for Event {
    fn from(event: InputEvent) -> Self {
        Self {
            kind: event.kind.into(),
            code: event.code.into(),
            value: event.value.cast_unsigned().into(),
        }
    }
}

/// Where configuration space has what is asked for, the length of the answer, and the answer (5.8.4).
pub const SELECT: u64 = 0;
/// See [`SELECT`].
pub const SUBSEL: u64 = 1;
const SIZE: usize = 2;
const ANSWER: usize = 8;
const ANSWER_LEN: usize = 128;

/// What can be asked for (5.8.4).
mod select {
    pub const ID_NAME: u8 = 0x01;
    pub const ID_SERIAL: u8 = 0x02;
    pub const ID_DEVIDS: u8 = 0x03;
    pub const PROP_BITS: u8 = 0x10;
    pub const EV_BITS: u8 = 0x11;
    pub const ABS_INFO: u8 = 0x12;
}

/// `BUS_VIRTUAL`, the vendor of virtio devices, and the first version.
const BUS: u16 = 0x06;
const VENDOR: u16 = 0x1af4;
const VERSION: u16 = 1;

/// `INPUT_PROP_POINTER`: it moves a pointer on the screen.
const PROPERTY_POINTER: u8 = 1;

/// `REP_DELAY` and `REP_PERIOD`: the driver repeats keys by itself.
const REPETITION: u8 = 3;

/// What the driver asks configuration space for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Question {
    /// What.
    pub select: u8,
    /// Of what.
    pub subsel: u8,
}

impl Question {
    /// Configuration space of a device of this kind. What is not known has an answer of no bytes.
    pub fn space(self, kind: InputKind, serial: &str) -> [u8; ANSWER + ANSWER_LEN] {
        let answer = self.answer(kind, serial);
        let mut space = [0; ANSWER + ANSWER_LEN];
        let (head, body) = space.split_at_mut(ANSWER);
        let len = answer.len().min(ANSWER_LEN);
        // An answer is no longer than 128 bytes.
        let size = u8::try_from(len).unwrap_or(0);
        for (place, byte) in [(0, self.select), (1, self.subsel), (SIZE, size)] {
            if let Some(to) = head.get_mut(place) {
                *to = byte;
            }
        }
        for (to, from) in body.iter_mut().zip(answer) {
            *to = from;
        }
        space
    }

    fn answer(self, kind: InputKind, serial: &str) -> Vec<u8> {
        match (self.select, self.subsel) {
            (select::ID_NAME, 0) => format!("Vireo {}", kind.name()).into_bytes(),
            (select::ID_SERIAL, 0) => serial.as_bytes().to_vec(),
            (select::ID_DEVIDS, 0) => ids(kind),
            (select::PROP_BITS, 0) if kind != InputKind::Keyboard => vec![PROPERTY_POINTER],
            (select::EV_BITS, of) if u16::from(of) == event_type::REP => {
                let repeats = kind == InputKind::Keyboard;
                repeats.then_some(REPETITION).into_iter().collect()
            }
            (select::EV_BITS, of) => bits(&kind.codes(of.into())),
            (select::ABS_INFO, axis) if kind.codes(event_type::ABS).contains(&axis.into()) => {
                // Least, greatest, fuzz, flat, resolution.
                let numbers = [0, AXIS_MAX, 0, 0, 0].map(u32::to_le_bytes);
                numbers.concat()
            }
            _ => Vec::new(),
        }
    }
}

fn ids(kind: InputKind) -> Vec<u8> {
    let product = match kind {
        InputKind::Keyboard => 1,
        InputKind::Tablet => 2,
        InputKind::Mouse => 3,
    };
    [BUS, VENDOR, product, VERSION]
        .map(u16::to_le_bytes)
        .concat()
}

/// One bit for each code, as many bytes as that takes.
fn bits(codes: &[u16]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for code in codes {
        let byte = usize::from(code / 8);
        if bytes.len() <= byte {
            bytes.resize(byte + 1, 0);
        }
        if let Some(bits) = bytes.get_mut(byte) {
            *bits |= 1 << (code % 8);
        }
    }
    bytes
}
