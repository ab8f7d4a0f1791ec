//! A PS/2 mouse: its commands and their answers.
//!
//! Follows the IBM PS/2 Hardware Interface Technical Reference, "Mouse". It
//! knows no extension, so drivers settle on the standard protocol.

use serde::{Deserialize, Serialize};

use super::queue::SendQueue;

const ACK: u8 = 0xFA;
const RESEND: u8 = 0xFE;
const SELF_TEST_PASSED: u8 = 0xAA;
/// The standard mouse.
const ID: u8 = 0x00;

/// 4 counts per millimetre.
const DEFAULT_RESOLUTION: u8 = 2;
const MAX_RESOLUTION: u8 = 3;
/// Reports per second.
const DEFAULT_RATE: u8 = 100;

/// Status byte: scaling is 2:1.
const STATUS_SCALING: u8 = 1 << 4;
/// Status byte: movements are reported.
const STATUS_REPORTING: u8 = 1 << 5;
/// Status byte: remote mode.
const STATUS_REMOTE: u8 = 1 << 6;
/// No buttons and no movement; the bit is always one.
const IDLE_REPORT: [u8; 3] = [1 << 3, 0, 0];

const RESET_WRAP: u8 = 0xEC;
const RESET: u8 = 0xFF;

/// A command that takes a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Awaited {
    Resolution,
    Rate,
}

/// The mouse.
#[derive(Debug)]
pub(super) struct Mouse {
    reporting: bool,
    remote: bool,
    /// Every byte comes back, except for those that end this mode.
    wrap: bool,
    scaled: bool,
    resolution: u8,
    rate: u8,
    awaited: Option<Awaited>,
    last_sent: u8,
    queue: SendQueue,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            reporting: false,
            remote: false,
            wrap: false,
            scaled: false,
            resolution: DEFAULT_RESOLUTION,
            rate: DEFAULT_RATE,
            awaited: None,
            last_sent: 0,
            queue: SendQueue::default(),
        }
    }
}

impl Mouse {
    /// Takes a byte from the host and queues the answer.
    pub(super) fn receive(&mut self, byte: u8) {
        if self.wrap && byte != RESET && byte != RESET_WRAP {
            return self.queue.push(&[byte]);
        }
        match self.awaited.take() {
            Some(Awaited::Resolution) if byte > MAX_RESOLUTION => self.queue.push(&[RESEND]),
            Some(Awaited::Resolution) => {
                self.resolution = byte;
                self.queue.push(&[ACK]);
            }
            Some(Awaited::Rate) => {
                self.rate = byte;
                self.queue.push(&[ACK]);
            }
            None => self.command(byte),
        }
    }

    fn command(&mut self, command: u8) {
        match command {
            0xE6 => self.scaled = false,
            0xE7 => self.scaled = true,
            0xE8 => self.awaited = Some(Awaited::Resolution),
            0xE9 => {
                return self
                    .queue
                    .push(&[ACK, self.status(), self.resolution, self.rate]);
            }
            0xEA => self.remote = false,
            0xEB => {
                let [buttons, x, y] = IDLE_REPORT;
                return self.queue.push(&[ACK, buttons, x, y]);
            }
            RESET_WRAP => self.wrap = false,
            0xEE => self.wrap = true,
            0xF0 => self.remote = true,
            0xF2 => return self.queue.push(&[ACK, ID]),
            0xF3 => self.awaited = Some(Awaited::Rate),
            0xF4 => self.reporting = true,
            0xF5 => self.reporting = false,
            0xF6 => self.set_defaults(),
            0xFE => return self.queue.push(&[self.last_sent]),
            RESET => {
                self.queue.clear();
                self.set_defaults();
                return self.queue.push(&[ACK, SELF_TEST_PASSED, ID]);
            }
            _ => return self.queue.push(&[RESEND]),
        }
        self.queue.push(&[ACK]);
    }

    fn set_defaults(&mut self) {
        self.reporting = false;
        self.remote = false;
        self.wrap = false;
        self.scaled = false;
        self.resolution = DEFAULT_RESOLUTION;
        self.rate = DEFAULT_RATE;
    }

    fn status(&self) -> u8 {
        let flag = |on, bit| if on { bit } else { 0 };
        flag(self.scaled, STATUS_SCALING)
            | flag(self.reporting, STATUS_REPORTING)
            | flag(self.remote, STATUS_REMOTE)
    }

    /// Takes the next byte for the controller.
    pub(super) fn send(&mut self) -> Option<u8> {
        let byte = self.queue.pop()?;
        self.last_sent = byte;
        Some(byte)
    }

    /// Takes back the byte sent last.
    pub(super) fn put_back(&mut self, byte: u8) {
        self.queue.put_back(byte);
    }

    pub(super) fn save(&self) -> MouseV1 {
        let Self {
            reporting,
            remote,
            wrap,
            scaled,
            resolution,
            rate,
            awaited,
            last_sent,
            queue,
        } = self;
        MouseV1 {
            reporting: *reporting,
            remote: *remote,
            wrap: *wrap,
            scaled: *scaled,
            resolution: *resolution,
            rate: *rate,
            awaited: *awaited,
            last_sent: *last_sent,
            queue: queue.save(),
        }
    }

    /// Rebuilds a mouse from untrusted state, or says what is wrong with it.
    /// `one_is_out`: the controller holds a byte of it.
    pub(super) fn restore(state: MouseV1, one_is_out: bool) -> Result<Self, String> {
        let MouseV1 {
            reporting,
            remote,
            wrap,
            scaled,
            resolution,
            rate,
            awaited,
            last_sent,
            queue,
        } = state;
        if resolution > MAX_RESOLUTION {
            return Err(format!("mouse resolution {resolution}"));
        }
        Ok(Self {
            reporting,
            remote,
            wrap,
            scaled,
            resolution,
            rate,
            awaited,
            last_sent,
            queue: SendQueue::restore(queue, one_is_out)?,
        })
    }
}

/// Saved form of [`Mouse`].
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct MouseV1 {
    reporting: bool,
    remote: bool,
    wrap: bool,
    scaled: bool,
    pub(super) resolution: u8,
    rate: u8,
    awaited: Option<Awaited>,
    last_sent: u8,
    queue: Vec<u8>,
}
