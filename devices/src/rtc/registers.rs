//! The clock's registers, as a function of what time it is on the host.
//!
//! Times are nanoseconds since the Unix epoch in `i128`, in which nothing
//! here can overflow. *Guest time* is host time plus [`Registers::offset`].

use std::time::Duration;

use migration::{RestoreError, SaveError, SavedState, Snapshot};
use serde::{Deserialize, Serialize};

use super::calendar::{DAY, DateTime, FIRST_SECOND, LAST_SECOND};

const SECOND: i128 = 1_000_000_000;
/// The update flag rises this long before the time changes (data sheet: 244 µs).
const UPDATE_WARNING: i128 = 244_000;
/// From the divider's release to the first update.
const FIRST_UPDATE: i128 = SECOND / 2;
/// Ticks of the oscillator in a second.
const OSCILLATOR: i128 = 32_768;

/// The latest host time there is, some 580 years on.
const MAX_HOST_TIME: i128 = u64::MAX as i128;
/// More than any two times can be apart.
const MAX_OFFSET: i128 = MAX_HOST_TIME + (LAST_SECOND - FIRST_SECOND) as i128 * SECOND;

const INDEX_MASK: u8 = 0x7F;
const REGISTER_A: u8 = 0x0A;
const REGISTER_B: u8 = 0x0B;
const REGISTER_C: u8 = 0x0C;
const REGISTER_D: u8 = 0x0D;
/// First byte of memory; it ends with the index.
const MEMORY: u8 = 0x0E;
/// Bytes of memory.
const MEMORY_LEN: usize = 114;

const A_UPDATE: u8 = 1 << 7;
const A_DIVIDER: u8 = 0b111 << 4;
const A_DIVIDER_RUNS: u8 = 0b010 << 4;
const A_RATE: u8 = 0b1111;
/// The divider runs, periodic rate 1024 Hz: what firmware sets.
const A_INITIAL: u8 = A_DIVIDER_RUNS | 6;

const B_SET: u8 = 1 << 7;
const B_PERIODIC: u8 = 1 << 6;
const B_ALARM: u8 = 1 << 5;
const B_UPDATE: u8 = 1 << 4;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// BCD and 24 hours, no interrupts: what firmware sets.
const B_INITIAL: u8 = B_24_HOURS;

/// Flags of register C; each has the place of its enable bit in register B.
const C_FLAGS: u8 = B_PERIODIC | B_ALARM | B_UPDATE;
const C_REQUEST: u8 = 1 << 7;

/// The battery is good.
const D_VALID: u8 = 1 << 7;

const PM: u8 = 1 << 7;
/// An alarm field from here on matches everything.
const ANY: u8 = 0xC0;

/// The time registers, in the order in which they are kept.
const SLOTS: [u8; 8] = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32];

/// A register by its index.
enum Register {
    /// A time register: its slot in [`SLOTS`].
    Time(usize),
    /// An alarm register: seconds, minutes, hours.
    Alarm(usize),
    A,
    B,
    C,
    D,
    Memory(usize),
}

impl Register {
    fn at(index: u8) -> Self {
        if let Some(slot) = SLOTS.iter().position(|at| *at == index) {
            return Self::Time(slot);
        }
        match index {
            REGISTER_A => Self::A,
            REGISTER_B => Self::B,
            REGISTER_C => Self::C,
            REGISTER_D => Self::D,
            MEMORY.. => Self::Memory(usize::from(index - MEMORY)),
            _ => Self::Alarm(usize::from(index / 2)),
        }
    }
}

/// What an alarm field asks of the time.
#[derive(Clone, Copy)]
enum Match {
    Any,
    Value(u8),
    /// The field holds no time.
    Never,
}

impl Match {
    fn accepts(self, value: u8) -> bool {
        match self {
            Self::Any => true,
            Self::Value(wanted) => wanted == value,
            Self::Never => false,
        }
    }

    /// How far it is from `value` up to one that is accepted.
    fn first_from(self, value: u8) -> Option<u8> {
        match self {
            Self::Any => Some(0),
            Self::Value(wanted) => wanted.checked_sub(value),
            Self::Never => None,
        }
    }
}

/// The registers and the memory of the clock.
pub(super) struct Registers {
    index: u8,
    /// Without the update flag.
    a: u8,
    b: u8,
    /// The flags of register C.
    flags: u8,
    alarm: [u8; 3],
    memory: [u8; MEMORY_LEN],
    /// Guest time less host time.
    offset: i128,
    /// The time registers while the clock stands still.
    held: Option<[u8; 8]>,
    /// Host time up to which events are in `flags`.
    seen: i128,
    /// The interrupt line after the last access; follows from the rest.
    line: bool,
    /// The line has risen since [`Registers::take_edge`].
    edge: bool,
}

/// Host time from a [`Duration`] since the Unix epoch.
fn nanoseconds(now: Duration) -> i128 {
    i128::try_from(now.as_nanos()).map_or(MAX_HOST_TIME, |now| now.min(MAX_HOST_TIME))
}

impl Registers {
    /// A clock that shows host time, as firmware leaves it.
    pub(super) fn new(now: Duration) -> Self {
        Self {
            index: 0,
            a: A_INITIAL,
            b: B_INITIAL,
            flags: 0,
            alarm: [0; 3],
            memory: [0; MEMORY_LEN],
            offset: 0,
            held: None,
            seen: nanoseconds(now),
            line: false,
            edge: false,
        }
    }

    /// Does what firmware does after a reset. Time and memory stay: there is a battery.
    pub(super) fn reset(&mut self, now: Duration) {
        let now = nanoseconds(now);
        self.advance(now);
        self.set_a(A_INITIAL, now);
        self.set_b(B_INITIAL, now);
        self.index = 0;
        self.flags = 0;
        self.settle();
        self.edge = false;
    }

    /// Chooses the register for the data port. Bit 7 masks NMIs on a PC; here
    /// NMIs come from the host only and are not masked.
    pub(super) fn select(&mut self, index: u8) {
        self.index = index & INDEX_MASK;
    }

    /// Reads the register that is chosen.
    pub(super) fn read(&mut self, now: Duration) -> u8 {
        let now = nanoseconds(now);
        self.advance(now);
        let value = match Register::at(self.index) {
            Register::Time(slot) => self
                .time_registers(now)
                .get(slot)
                .copied()
                .unwrap_or_default(),
            Register::Alarm(field) => self.alarm.get(field).copied().unwrap_or_default(),
            Register::A => self.a | self.update_flag(now),
            Register::B => self.b,
            Register::C => {
                let request = if self.requests() { C_REQUEST } else { 0 };
                std::mem::take(&mut self.flags) | request
            }
            Register::D => D_VALID,
            Register::Memory(at) => self.memory.get(at).copied().unwrap_or_default(),
        };
        self.settle();
        value
    }

    /// Writes the register that is chosen.
    pub(super) fn write(&mut self, value: u8, now: Duration) {
        let now = nanoseconds(now);
        self.advance(now);
        match Register::at(self.index) {
            Register::Time(slot) => {
                let mut registers = self.time_registers(now);
                if let Some(register) = registers.get_mut(slot) {
                    *register = value;
                }
                if self.held.is_some() {
                    self.held = Some(registers);
                } else {
                    self.set_time(&registers, now);
                }
            }
            Register::Alarm(field) => {
                if let Some(field) = self.alarm.get_mut(field) {
                    *field = value;
                }
            }
            Register::A => self.set_a(value & !A_UPDATE, now),
            Register::B => self.set_b(value, now),
            Register::C | Register::D => {}
            Register::Memory(at) => {
                if let Some(byte) = self.memory.get_mut(at) {
                    *byte = value;
                }
            }
        }
        self.settle();
    }

    /// Notes the events up to `now`.
    pub(super) fn tick(&mut self, now: Duration) {
        self.advance(nanoseconds(now));
        self.settle();
    }

    /// `true` once for each rise of the interrupt line.
    pub(super) fn take_edge(&mut self) -> bool {
        std::mem::take(&mut self.edge)
    }

    /// When an interrupt is due, in host time since the Unix epoch; `None`
    /// when none is to come before the guest does something.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        if self.requests() {
            return None;
        }
        let guest = self.seen + self.offset;
        let enabled = |interrupt| self.b & interrupt != 0;
        let update = (guest.div_euclid(SECOND) + 1) * SECOND;
        let due = [
            enabled(B_PERIODIC)
                .then(|| self.next_period(guest))
                .flatten(),
            (enabled(B_UPDATE) && self.held.is_none()).then_some(update),
            enabled(B_ALARM).then(|| self.next_alarm(guest)).flatten(),
        ];
        let host = due.into_iter().flatten().min()? - self.offset;
        u64::try_from(host).ok().map(Duration::from_nanos)
    }

    fn requests(&self) -> bool {
        self.flags & self.b != 0
    }

    fn settle(&mut self) {
        let line = self.requests();
        self.edge |= line && !self.line;
        self.line = line;
    }

    fn divider_runs(a: u8) -> bool {
        a & A_DIVIDER == A_DIVIDER_RUNS
    }

    /// Collects the events after [`Registers::seen`] into the flags.
    fn advance(&mut self, now: i128) {
        let (from, to) = (self.seen + self.offset, now + self.offset);
        self.seen = now;
        // A host clock that was set back causes no events.
        if to <= from {
            return;
        }
        if self.next_period(from).is_some_and(|at| at <= to) {
            self.flags |= B_PERIODIC;
        }
        if self.held.is_none() && from.div_euclid(SECOND) != to.div_euclid(SECOND) {
            self.flags |= B_UPDATE;
            if self.next_alarm(from).is_some_and(|at| at <= to) {
                self.flags |= B_ALARM;
            }
        }
    }

    /// The first end of a period after guest time `after`.
    fn next_period(&self, after: i128) -> Option<i128> {
        let ticks = match self.a & A_RATE {
            0 => return None,
            // With this oscillator the two fastest rates are slow ones.
            rate @ 1..=2 => 1_i128 << (rate + 6),
            rate => 1_i128 << (rate - 1),
        };
        if !Self::divider_runs(self.a) {
            return None;
        }
        let period = ticks * SECOND;
        let next = (after * OSCILLATOR).div_euclid(period) + 1;
        // Rounded up: not before it has happened.
        Some((next * period + OSCILLATOR - 1).div_euclid(OSCILLATOR))
    }

    /// The first second after guest time `after` that the alarm matches.
    fn next_alarm(&self, after: i128) -> Option<i128> {
        if self.held.is_some() {
            return None;
        }
        let [second, minute, hour] = self.alarm;
        let (second, minute) = (self.alarm_field(second, 60), self.alarm_field(minute, 60));
        let hour = self.alarm_hour(hour);
        let start = after.div_euclid(SECOND) + 1;
        let of_day = u32::try_from(start.rem_euclid(DAY.into())).unwrap_or_default();
        // Goes by hours, then minutes: at most some hundred steps in a day.
        let mut wait = 0;
        while wait < DAY {
            let at = (of_day + wait) % DAY;
            let [at_hour, at_minute, at_second] = [at / 3_600, at / 60 % 60, at % 60]
                .map(|value| u8::try_from(value).unwrap_or_default());
            if !hour.accepts(at_hour) {
                wait += 3_600 - at % 3_600;
            } else if minute.accepts(at_minute)
                && let Some(seconds) = second.first_from(at_second)
            {
                return Some((start + i128::from(wait) + i128::from(seconds)) * SECOND);
            } else {
                wait += 60 - at % 60;
            }
        }
        None
    }

    fn alarm_field(&self, raw: u8, limit: u8) -> Match {
        match self.decode(raw) {
            _ if raw >= ANY => Match::Any,
            Some(value) if value < limit => Match::Value(value),
            _ => Match::Never,
        }
    }

    fn alarm_hour(&self, raw: u8) -> Match {
        if raw >= ANY || self.b & B_24_HOURS != 0 {
            return self.alarm_field(raw, 24);
        }
        match self.decode(raw & !PM) {
            Some(hour @ 1..=12) => Match::Value(hour % 12 + if raw & PM != 0 { 12 } else { 0 }),
            _ => Match::Never,
        }
    }

    /// The value of a register in the coding that register B chooses.
    fn decode(&self, raw: u8) -> Option<u8> {
        if self.b & B_BINARY != 0 {
            return Some(raw);
        }
        let (tens, ones) = (raw >> 4, raw & 0xF);
        (tens < 10 && ones < 10).then_some(tens * 10 + ones)
    }

    /// `value`, below 100, in the coding that register B chooses.
    fn encode(&self, value: u8) -> u8 {
        if self.b & B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.b & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { PM } else { 0 };
        match hour % 12 {
            0 => self.encode(12) | pm,
            hour => self.encode(hour) | pm,
        }
    }

    fn decode_hour(&self, raw: u8) -> u8 {
        // What is no number counts as too large a one.
        if self.b & B_24_HOURS != 0 {
            return self.decode(raw).unwrap_or(u8::MAX);
        }
        let hour = self.decode(raw & !PM).unwrap_or(12).clamp(1, 12);
        hour % 12 + if raw & PM != 0 { 12 } else { 0 }
    }

    /// What the time registers show, in the order of [`SLOTS`].
    fn time_registers(&self, now: i128) -> [u8; 8] {
        if let Some(held) = self.held {
            return held;
        }
        let seconds = i64::try_from((now + self.offset).div_euclid(SECOND)).unwrap_or(i64::MAX);
        let time = DateTime::from_seconds(seconds);
        let [century, year] = [time.year / 100, time.year % 100]
            .map(|part| self.encode(u8::try_from(part).unwrap_or_default()));
        [
            self.encode(time.second),
            self.encode(time.minute),
            self.encode_hour(time.hour),
            self.encode(time.weekday),
            self.encode(time.day),
            self.encode(time.month),
            year,
            century,
        ]
    }

    /// Makes the time what `registers` say, keeping the fraction of the second.
    fn set_time(&mut self, registers: &[u8; 8], now: i128) {
        let [second, minute, hour, _weekday, day, month, year, century] = *registers;
        let part = |raw| self.decode(raw).unwrap_or(u8::MAX);
        let time = DateTime {
            year: u16::from(part(century).min(99)) * 100 + u16::from(part(year).min(99)),
            month: part(month),
            day: part(day),
            weekday: 1,
            hour: self.decode_hour(hour),
            minute: part(minute),
            second: part(second),
        };
        let fraction = (now + self.offset).rem_euclid(SECOND);
        self.offset = i128::from(time.to_seconds()) * SECOND + fraction - now;
    }

    fn update_flag(&self, now: i128) -> u8 {
        let fraction = (now + self.offset).rem_euclid(SECOND);
        if self.held.is_none() && fraction >= SECOND - UPDATE_WARNING {
            A_UPDATE
        } else {
            0
        }
    }

    fn set_a(&mut self, value: u8, now: i128) {
        let (ran, runs) = (Self::divider_runs(self.a), Self::divider_runs(value));
        let hold = self.holds(value, self.b);
        self.hold_if(hold, now);
        self.a = value;
        if runs && !ran {
            let fraction = (now + self.offset).rem_euclid(SECOND);
            self.offset += FIRST_UPDATE - fraction;
        }
        self.release_unless(hold, now);
    }

    fn set_b(&mut self, value: u8, now: i128) {
        // Stopping the updates stops their interrupt too (data sheet, SET).
        let value = if value & B_SET != 0 {
            value & !B_UPDATE
        } else {
            value
        };
        let hold = self.holds(self.a, value);
        self.hold_if(hold, now);
        self.b = value;
        self.release_unless(hold, now);
    }

    /// Whether the time stands still under these controls.
    fn holds(&self, a: u8, b: u8) -> bool {
        b & B_SET != 0 || !Self::divider_runs(a)
    }

    fn hold_if(&mut self, hold: bool, now: i128) {
        if hold {
            self.held = Some(self.time_registers(now));
        }
    }

    fn release_unless(&mut self, hold: bool, now: i128) {
        if !hold && let Some(registers) = self.held.take() {
            self.set_time(&registers, now);
        }
    }
}

/// Saved form of the clock. Times are in nanoseconds of the host's clock.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct RtcV1 {
    pub(super) index: u8,
    pub(super) a: u8,
    pub(super) b: u8,
    pub(super) flags: u8,
    alarm: [u8; 3],
    pub(super) memory: Vec<u8>,
    pub(super) offset: i128,
    pub(super) held: Option<[u8; 8]>,
    pub(super) seen: i128,
}

impl SavedState for RtcV1 {
    const SCHEMA: &'static str = "rtc";
    const VERSION: u16 = 1;
}

fn invalid(reason: String) -> RestoreError {
    RestoreError::Invalid {
        schema: RtcV1::SCHEMA,
        reason,
    }
}

impl Snapshot for Registers {
    type State = RtcV1;

    fn save(&self) -> Result<RtcV1, SaveError> {
        let Self {
            index,
            a,
            b,
            flags,
            alarm,
            memory,
            offset,
            held,
            seen,
            line: _,
            edge: _,
        } = self;
        Ok(RtcV1 {
            index: *index,
            a: *a,
            b: *b,
            flags: *flags,
            alarm: *alarm,
            memory: memory.to_vec(),
            offset: *offset,
            held: *held,
            seen: *seen,
        })
    }

    fn restore(&mut self, state: RtcV1) -> Result<(), RestoreError> {
        let RtcV1 {
            index,
            a,
            b,
            flags,
            alarm,
            memory,
            offset,
            held,
            seen,
        } = state;
        if index & !INDEX_MASK != 0 || a & A_UPDATE != 0 || flags & !C_FLAGS != 0 {
            return Err(invalid(format!(
                "index {index:#04x}, register A {a:#04x} or flags {flags:#04x} out of range"
            )));
        }
        if b & B_SET != 0 && b & B_UPDATE != 0 {
            return Err(invalid(format!(
                "register B {b:#04x} stops updates and announces them"
            )));
        }
        if held.is_some() != self.holds(a, b) {
            return Err(invalid(format!(
                "registers A {a:#04x} and B {b:#04x} do not agree with whether the time stands still"
            )));
        }
        if !(-MAX_OFFSET..=MAX_OFFSET).contains(&offset) || !(0..=MAX_HOST_TIME).contains(&seen) {
            return Err(invalid(format!("time {seen} ns or offset {offset} ns")));
        }
        let length = memory.len();
        let memory = memory
            .try_into()
            .map_err(|_| invalid(format!("{length} bytes of memory, not {MEMORY_LEN}")))?;
        *self = Self {
            index,
            a,
            b,
            flags,
            alarm,
            memory,
            offset,
            held,
            seen,
            line: false,
            edge: false,
        };
        // An edge of this line is with the interrupt controller already.
        self.line = self.requests();
        Ok(())
    }
}
