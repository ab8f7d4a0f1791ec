//! A PS/2 mouse: its movements, its commands and their answers.
//!
//! What has moved is added up until the guest has room for a report of it, so that nothing is lost and
//! nothing waits behind what is old.
//!
//! Follows the IBM PS/2 Hardware Interface Technical Reference, "Mouse", with Microsoft's extension for a wheel:
//! the sample rates 200, 100 and 80 in a row turn it on, and reports have a fourth byte then.

use serde::{Deserialize, Serialize};

use super::queue::SendQueue;

const ACK: u8 = 0xFA;
const RESEND: u8 = 0xFE;
const SELF_TEST_PASSED: u8 = 0xAA;
/// The standard mouse, and one with a wheel.
const ID: u8 = 0x00;
const ID_WHEEL: u8 = 0x03;
/// The sample rates that turn the wheel on.
const KNOCK: [u8; 3] = [200, 100, 80];

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
/// The first byte of a report: always one.
const REPORT_ONE: u8 = 1 << 3;
/// In it, the signs of both movements.
const REPORT_LEFT: u8 = 1 << 4;
const REPORT_DOWN: u8 = 1 << 5;
/// Left, right and middle.
const BUTTONS: u8 = 0b111;
/// The most of a movement, and of the wheel's, in one report.
const MOST: i32 = 255;
const MOST_WHEEL: i32 = 7;
/// More than this is not added up.
const MOST_LEFT: i32 = 1 << 14;

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
    /// How many of [`KNOCK`] came in a row.
    knocked: u8,
    wheel: bool,
    pending: Pending,
}

/// What has not been reported yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Pending {
    right: i32,
    up: i32,
    wheel: i32,
    buttons: u8,
    /// The buttons of the last report.
    told: u8,
}

impl Pending {
    fn is_news(&self) -> bool {
        (self.right, self.up, self.wheel) != (0, 0, 0) || self.buttons != self.told
    }

    /// A report of as much as fits into one.
    fn take(&mut self, wheel: bool) -> Vec<u8> {
        let part = |left: &mut i32, most: i32| {
            let step = (*left).clamp(-most, most);
            *left -= step;
            step
        };
        let (right, up) = (part(&mut self.right, MOST), part(&mut self.up, MOST));
        let turned = part(&mut self.wheel, MOST_WHEEL);
        self.told = self.buttons;
        let sign = |step: i32, bit| if step < 0 { bit } else { 0 };
        let first = REPORT_ONE | self.buttons | sign(right, REPORT_LEFT) | sign(up, REPORT_DOWN);
        let low = |step: i32| step.to_le_bytes()[0];
        let mut report = vec![first, low(right), low(up)];
        if wheel {
            report.push(low(turned));
        }
        report
    }

    fn is_sane(&self) -> bool {
        let near = |left: i32| (-MOST_LEFT..=MOST_LEFT).contains(&left);
        near(self.right)
            && near(self.up)
            && near(self.wheel)
            && (self.buttons | self.told) & !BUTTONS == 0
    }
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
            knocked: 0,
            wheel: false,
            pending: Pending::default(),
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
                self.knock(byte);
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
                self.queue.push(&[ACK]);
                let report = self.pending.take(self.wheel);
                return self.queue.push(&report);
            }
            RESET_WRAP => self.wrap = false,
            0xEE => self.wrap = true,
            0xF0 => self.remote = true,
            0xF2 => {
                let id = if self.wheel { ID_WHEEL } else { ID };
                return self.queue.push(&[ACK, id]);
            }
            0xF3 => self.awaited = Some(Awaited::Rate),
            0xF4 => self.reporting = true,
            0xF5 => self.reporting = false,
            0xF6 => self.set_defaults(),
            0xFE => return self.queue.push(&[self.last_sent]),
            RESET => {
                self.queue.clear();
                self.set_defaults();
                self.wheel = false;
                self.knocked = 0;
                return self.queue.push(&[ACK, SELF_TEST_PASSED, ID]);
            }
            _ => return self.queue.push(&[RESEND]),
        }
        self.queue.push(&[ACK]);
    }

    fn knock(&mut self, rate: u8) {
        let wanted = KNOCK.get(usize::from(self.knocked));
        self.knocked = match wanted {
            Some(wanted) if *wanted == rate => self.knocked + 1,
            _ => u8::from(rate == KNOCK[0]),
        };
        if usize::from(self.knocked) == KNOCK.len() {
            self.knocked = 0;
            self.wheel = true;
        }
    }

    /// It moves, its wheel turns towards the user, its buttons are as the bits say.
    pub(super) fn point(&mut self, right: i32, down: i32, wheel: i32, buttons: u8) {
        let more = |left: i32, step: i32| {
            let sum = left.saturating_add(step);
            sum.clamp(-MOST_LEFT, MOST_LEFT)
        };
        let pending = &mut self.pending;
        pending.buttons = buttons & BUTTONS;
        if self.reporting {
            pending.right = more(pending.right, right);
            pending.up = more(pending.up, down.saturating_neg());
            pending.wheel = more(pending.wheel, wheel);
        }
    }

    fn set_defaults(&mut self) {
        self.pending = Pending {
            buttons: self.pending.buttons,
            ..Pending::default()
        };
        self.reporting = false;
        self.remote = false;
        self.wrap = false;
        self.scaled = false;
        self.resolution = DEFAULT_RESOLUTION;
        self.rate = DEFAULT_RATE;
    }

    fn status(&self) -> u8 {
        let flag = |on, bit| if on { bit } else { 0 };
        // The status has the buttons the other way round.
        let [left, right, middle] = [0, 1, 2].map(|bit| self.pending.buttons >> bit & 1);
        (left << 2 | middle << 1 | right)
            | flag(self.scaled, STATUS_SCALING)
            | flag(self.reporting, STATUS_REPORTING)
            | flag(self.remote, STATUS_REMOTE)
    }

    /// Takes the next byte for the controller.
    pub(super) fn send(&mut self) -> Option<u8> {
        let streams = self.reporting && !self.remote && !self.wrap;
        if streams && self.queue.is_empty() && self.pending.is_news() {
            let report = self.pending.take(self.wheel);
            self.queue.push(&report);
        }
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
            knocked,
            wheel,
            pending,
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
            knocked: *knocked,
            wheel: *wheel,
            // Nobody holds the buttons of a machine that is restored.
            pending: Pending {
                buttons: 0,
                ..*pending
            },
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
            knocked,
            wheel,
            pending,
        } = state;
        if usize::from(knocked) >= KNOCK.len() || !pending.is_sane() {
            return Err(format!(
                "mouse after {knocked} sample rates with {pending:?} to report"
            ));
        }
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
            knocked,
            wheel,
            pending,
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
    knocked: u8,
    wheel: bool,
    pending: Pending,
}
