//! A PS/2 keyboard: its keys, its commands and their answers.
//!
//! Follows the IBM PS/2 Hardware Interface Technical Reference, "Keyboards".

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::keys::{Keys, KeysV1};
use super::queue::SendQueue;

const ACK: u8 = 0xFA;
const RESEND: u8 = 0xFE;
const ECHO: u8 = 0xEE;
const SELF_TEST_PASSED: u8 = 0xAA;
/// An MF2 keyboard.
const ID: [u8; 2] = [0xAB, 0x83];

const DEFAULT_SCAN_SET: u8 = 2;
/// 10.9 characters per second after 500 ms.
const DEFAULT_TYPEMATIC: u8 = 0x2B;
const TYPEMATIC_MASK: u8 = 0x7F;
const LED_MASK: u8 = 0b111;

/// Keys that may wait to be typed: as much as a virtio keyboard takes at once.
const TYPED: usize = crate::input::CAPACITY / 2;

/// A command that takes a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Awaited {
    Leds,
    ScanSet,
    Typematic,
}

/// The keyboard.
#[derive(Debug)]
pub(super) struct Keyboard {
    scanning: bool,
    leds: u8,
    typematic: u8,
    scan_set: u8,
    awaited: Option<Awaited>,
    last_sent: u8,
    queue: SendQueue,
    keys: Keys,
    /// Keys that go down and up one after the other, as the guest takes what is before them. Not saved.
    typed: VecDeque<(u16, bool)>,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self {
            scanning: true,
            leds: 0,
            typematic: DEFAULT_TYPEMATIC,
            scan_set: DEFAULT_SCAN_SET,
            awaited: None,
            last_sent: 0,
            queue: SendQueue::default(),
            keys: Keys::default(),
            typed: VecDeque::new(),
        }
    }
}

impl Keyboard {
    /// Takes a byte from the host and queues the answer.
    pub(super) fn receive(&mut self, byte: u8) {
        // A byte that is no parameter ends the command that waits for one.
        match self.awaited.take() {
            Some(awaited) if byte < 0x80 => self.parameter(awaited, byte),
            _ => self.command(byte),
        }
    }

    fn command(&mut self, command: u8) {
        match command {
            0xED => self.await_parameter(Awaited::Leds),
            0xEE => return self.queue.push(&[ECHO]),
            0xF0 => self.await_parameter(Awaited::ScanSet),
            0xF2 => {
                let [first, second] = ID;
                return self.queue.push(&[ACK, first, second]);
            }
            0xF3 => self.await_parameter(Awaited::Typematic),
            0xF4 => {
                self.queue.clear();
                self.scanning = true;
            }
            0xF5 => self.set_defaults(false),
            0xF6 => self.set_defaults(true),
            0xFE => return self.queue.push(&[self.last_sent]),
            0xFF => {
                self.queue.clear();
                self.set_defaults(true);
                self.leds = 0;
                return self.queue.push(&[ACK, SELF_TEST_PASSED]);
            }
            _ => return self.queue.push(&[RESEND]),
        }
        self.queue.push(&[ACK]);
    }

    fn await_parameter(&mut self, awaited: Awaited) {
        self.awaited = Some(awaited);
    }

    fn parameter(&mut self, awaited: Awaited, value: u8) {
        match (awaited, value) {
            (Awaited::Leds, _) => self.leds = value & LED_MASK,
            (Awaited::Typematic, _) => self.typematic = value & TYPEMATIC_MASK,
            (Awaited::ScanSet, 0) => return self.queue.push(&[ACK, self.scan_set]),
            (Awaited::ScanSet, 1..=2) => self.scan_set = value,
            (Awaited::ScanSet, _) => return self.queue.push(&[RESEND]),
        }
        self.queue.push(&[ACK]);
    }

    fn set_defaults(&mut self, scanning: bool) {
        self.keys.clear();
        self.typed.clear();
        self.scanning = scanning;
        self.typematic = DEFAULT_TYPEMATIC;
        self.scan_set = DEFAULT_SCAN_SET;
    }

    /// A key goes down or up, by its evdev code. While the keyboard does not scan, none goes down.
    pub(super) fn key(&mut self, code: u16, down: bool) {
        if self.scanning || !down {
            let repeated = self.keys.set(code, down, self.scan_set);
            if repeated.len() <= self.queue.room() {
                self.queue.push(&repeated);
            }
            self.fill();
        }
    }

    /// Keys go down and up one after the other, each once the guest has been told of the one before. Whether there is
    /// room for all of them; else none does.
    pub(super) fn type_keys(&mut self, strokes: &[(u16, bool)]) -> bool {
        let fits = self.typed.len().saturating_add(strokes.len()) <= TYPED;
        if fits {
            self.typed.extend(strokes);
            self.fill();
        }
        fits
    }

    /// Whether the guest has it tell of keys.
    pub(super) fn is_scanning(&self) -> bool {
        self.scanning
    }

    /// Queues what the guest is to be told of keys, as far as there is room.
    fn fill(&mut self) {
        while self.scanning {
            if let Some(bytes) = self.keys.next(self.queue.room(), self.scan_set) {
                self.queue.push(&bytes);
                continue;
            }
            if !self.keys.are_told() {
                return;
            }
            let Some((code, down)) = self.typed.pop_front() else {
                return;
            };
            // A key that somebody holds already has been told.
            self.keys.set(code, down, self.scan_set);
        }
    }

    /// Takes the next byte for the controller, in the keyboard's own scan set.
    pub(super) fn send(&mut self) -> Option<u8> {
        self.fill();
        let byte = self.queue.pop()?;
        self.last_sent = byte;
        Some(byte)
    }

    /// Takes back the byte sent last.
    pub(super) fn put_back(&mut self, byte: u8) {
        self.queue.put_back(byte);
    }

    pub(super) fn save(&self) -> KeyboardV1 {
        let Self {
            scanning,
            leds,
            typematic,
            scan_set,
            awaited,
            last_sent,
            queue,
            keys,
            typed: _,
        } = self;
        KeyboardV1 {
            scanning: *scanning,
            leds: *leds,
            typematic: *typematic,
            scan_set: *scan_set,
            awaited: *awaited,
            last_sent: *last_sent,
            queue: queue.save(),
            keys: keys.save(),
        }
    }

    /// Rebuilds a keyboard from untrusted state, or says what is wrong with it.
    /// `one_is_out`: the controller holds a byte of it.
    pub(super) fn restore(state: KeyboardV1, one_is_out: bool) -> Result<Self, String> {
        let KeyboardV1 {
            scanning,
            leds,
            typematic,
            scan_set,
            awaited,
            last_sent,
            queue,
            keys,
        } = state;
        if leds & !LED_MASK != 0 || typematic & !TYPEMATIC_MASK != 0 {
            return Err(format!(
                "keyboard LEDs {leds:#04x} or typematic rate {typematic:#04x} out of range"
            ));
        }
        if !(1..=2).contains(&scan_set) {
            return Err(format!("keyboard scan code set {scan_set}"));
        }
        Ok(Self {
            scanning,
            leds,
            typematic,
            scan_set,
            awaited,
            last_sent,
            queue: SendQueue::restore(queue, one_is_out)?,
            keys: Keys::restore(keys),
            typed: VecDeque::new(),
        })
    }
}

/// Saved form of [`Keyboard`].
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct KeyboardV1 {
    scanning: bool,
    pub(super) leds: u8,
    typematic: u8,
    pub(super) scan_set: u8,
    awaited: Option<Awaited>,
    last_sent: u8,
    pub(super) queue: Vec<u8>,
    pub(super) keys: KeysV1,
}

/// The controller's translation of scan code set 2 to set 1, for bytes below
/// 0x80 (IBM PS/2 Hardware Interface Technical Reference, "Scan Code
/// Translation"). Answers are translated with the rest.
#[rustfmt::skip]
pub(super) const SET_2_TO_1: [u8; 0x80] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59,
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b,
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f,
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61,
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f,
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
];

/// What a keyboard sends before the code of a key that was released, in set 2; in set 1 it is the code's bit.
pub(super) const RELEASED: u8 = 0xF0;
pub(super) const RELEASED_BIT: u8 = 0x80;

/// Translates one byte that the keyboard sent.
pub(super) fn translate(byte: u8) -> u8 {
    match byte {
        0x83 => 0x41,
        0x84 => 0x54,
        _ => SET_2_TO_1.get(usize::from(byte)).copied().unwrap_or(byte),
    }
}
