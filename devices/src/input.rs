//! Keyboards and pointers: what people do with them, on its way to the guest.
//!
//! A source (a viewer of the display, the control socket) gives whole reports to an
//! [`InputQueue`]: what happens at one time, as a movement along two axes does. The device that the
//! guest sees takes them out of it. Events have the numbers of Linux's evdev, which are
//! those of virtio (Virtio 1.2, section 5.8).
//!
//! Nothing waits for the guest. What it does not take in time is lost, in whole reports, and
//! counted; but no key stays down in the guest that nobody holds.

mod keys;
mod queue;
pub(crate) mod scancodes;

pub use keys::{Key, typed};
pub use queue::{CAPACITY, InputError, InputQueue, InputState, InvalidInput, MAX_REPORT};

/// Event types (Linux `input-event-codes.h`).
pub mod event_type {
    /// Ends a report.
    pub const SYN: u16 = 0;
    /// A key or button.
    pub const KEY: u16 = 1;
    /// A movement.
    pub const REL: u16 = 2;
    /// A place.
    pub const ABS: u16 = 3;
    /// A light on a keyboard.
    pub const LED: u16 = 17;
    /// The repetition of keys that are held.
    pub const REP: u16 = 20;
}

/// The greatest value of an absolute axis; the least is 0.
pub const AXIS_MAX: u32 = 0x7fff;

/// The greatest part of a movement that one event tells.
const STEP_MAX: i32 = 0x7fff;

/// One thing that has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InputEvent {
    /// What kind of thing: one of [`event_type`].
    pub kind: u16,
    /// Which key or axis.
    pub code: u16,
    /// What it is now, or by how much it has moved.
    pub value: i32,
}

/// An axis of a pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Axis {
    /// To the right.
    X,
    /// Downwards.
    Y,
    /// Of the wheel, away from the user; only relative.
    Wheel,
    /// Of the other wheel, to the right; only relative.
    HWheel,
}

impl Axis {
    /// Its code among relative axes.
    #[must_use]
    pub fn relative(self) -> u16 {
        match self {
            Self::X => 0,
            Self::Y => 1,
            Self::HWheel => 6,
            Self::Wheel => 8,
        }
    }

    /// Its code among absolute axes, where it is one.
    #[must_use]
    pub fn absolute(self) -> Option<u16> {
        match self {
            Self::X => Some(0),
            Self::Y => Some(1),
            Self::Wheel | Self::HWheel => None,
        }
    }
}

impl InputEvent {
    /// The end of a report.
    pub const SYN: Self = Self {
        kind: event_type::SYN,
        code: 0,
        value: 0,
    };

    /// A key or button goes down or up.
    #[must_use]
    pub fn key(key: Key, down: bool) -> Self {
        Self {
            kind: event_type::KEY,
            code: key.code(),
            value: down.into(),
        }
    }

    /// The pointer moves, or a wheel turns, by so many steps.
    #[must_use]
    pub fn moved(axis: Axis, by: i32) -> Self {
        Self {
            kind: event_type::REL,
            code: axis.relative(),
            value: by,
        }
    }

    /// The pointer is at a place from 0 to [`AXIS_MAX`]; `None` for an axis that has no places.
    #[must_use]
    pub fn placed(axis: Axis, at: u32) -> Option<Self> {
        Some(Self {
            kind: event_type::ABS,
            code: axis.absolute()?,
            value: i32::try_from(at).ok()?,
        })
    }
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InputKind {
    /// Keys and lights.
    Keyboard,
    /// A pointer that tells where it is.
    Tablet,
    /// A pointer that tells how far it has moved.
    Mouse,
}

impl InputKind {
    /// The codes that a device of this kind has among events of a type, in ascending order.
    #[must_use]
    pub fn codes(self, kind: u16) -> Vec<u16> {
        let keys = |keys: &mut dyn Iterator<Item = Key>| {
            let mut codes: Vec<u16> = keys.map(Key::code).collect();
            codes.sort_unstable();
            codes.dedup();
            codes
        };
        let wheels = [Axis::HWheel.relative(), Axis::Wheel.relative()];
        let plane = [Axis::X.relative(), Axis::Y.relative()];
        match (self, kind) {
            (Self::Keyboard, event_type::KEY) => keys(&mut Key::keyboard()),
            (Self::Keyboard, event_type::LED) => vec![0, 1, 2],
            (Self::Tablet | Self::Mouse, event_type::KEY) => keys(&mut Key::buttons()),
            (Self::Tablet, event_type::ABS) => plane.into(),
            (Self::Tablet, event_type::REL) => wheels.into(),
            (Self::Mouse, event_type::REL) => [plane, wheels].concat(),
            _ => Vec::new(),
        }
    }

    /// Whether a device of this kind can tell of `event`.
    #[must_use]
    pub fn has(self, event: &InputEvent) -> bool {
        let InputEvent { kind, code, value } = *event;
        let fits = match kind {
            event_type::KEY => (0..=1).contains(&value),
            event_type::ABS => u32::try_from(value).is_ok_and(|at| at <= AXIS_MAX),
            event_type::REL => (-STEP_MAX..=STEP_MAX).contains(&value),
            _ => false,
        };
        fits && match (self, kind) {
            (Self::Keyboard, event_type::KEY) => code < Key::FIRST_BUTTON && known(code),
            (Self::Tablet | Self::Mouse, event_type::KEY) => {
                code >= Key::FIRST_BUTTON && known(code)
            }
            _ => self.codes(kind).contains(&code),
        }
    }
}

fn known(code: u16) -> bool {
    Key::from_code(code).is_some()
}

/// The lights of a keyboard, as the guest sets them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leds {
    /// Num lock is on.
    pub num: bool,
    /// Caps lock is on.
    pub caps: bool,
    /// Scroll lock is on.
    pub scroll: bool,
}

impl Leds {
    /// As one bit each, in the order of their codes.
    #[must_use]
    pub fn bits(self) -> u8 {
        u8::from(self.num) | u8::from(self.caps) << 1 | u8::from(self.scroll) << 2
    }

    /// From one bit each; others mean nothing.
    #[must_use]
    pub fn from_bits(bits: u8) -> Self {
        Self {
            num: bits & 1 != 0,
            caps: bits & 2 != 0,
            scroll: bits & 4 != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::from_name(name).unwrap()
    }

    #[test]
    fn each_kind_has_its_own_events() {
        let press = InputEvent::key(key("a"), true);
        let click = InputEvent::key(Key::button("left").unwrap(), true);
        let place = InputEvent::placed(Axis::X, AXIS_MAX).unwrap();
        let step = InputEvent::moved(Axis::Y, -3);
        let wheel = InputEvent::moved(Axis::Wheel, 1);
        let has = |kind: InputKind| [press, click, place, step, wheel].map(|e| kind.has(&e));
        assert_eq!(has(InputKind::Keyboard), [true, false, false, false, false]);
        assert_eq!(has(InputKind::Tablet), [false, true, true, false, true]);
        assert_eq!(has(InputKind::Mouse), [false, true, false, true, true]);
    }

    #[test]
    fn values_that_mean_nothing_are_nobodys() {
        let with = |event: InputEvent, value| InputEvent { value, ..event };
        let press = InputEvent::key(key("a"), true);
        assert!(!InputKind::Keyboard.has(&with(press, 2)));
        let place = InputEvent::placed(Axis::X, 0).unwrap();
        assert!(!InputKind::Tablet.has(&with(place, 0x8000)));
        assert!(!InputKind::Tablet.has(&with(place, -1)));
        assert!(!InputKind::Mouse.has(&InputEvent::moved(Axis::X, i32::MIN)));
        assert!(!InputKind::Keyboard.has(&InputEvent::SYN));
        assert_eq!(InputEvent::placed(Axis::Wheel, 0), None);
        assert_eq!(InputEvent::placed(Axis::X, u32::MAX), None);
    }

    #[test]
    fn lights_are_bits() {
        for bits in 0..8 {
            assert_eq!(Leds::from_bits(bits).bits(), bits);
        }
    }
}
