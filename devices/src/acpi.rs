//! The registers of a hardware-reduced ACPI machine.
//!
//! | device | registers | specification |
//! |---|---|---|
//! | [`SleepRegisters`] | sleep control (offset 0), sleep status (offset 1) | ACPI 6.5, 4.8.3.7 |
//! | [`ResetRegister`] | reset control, one byte | ACPI 6.5, 4.8.3.6; the PC's port 0xCF9 |
//! | [`EventRegister`] | pending events of the generic event device, 32 bits | ACPI 6.5, 5.6.9 |
//! | [`hotplug::SlotRegisters`] | vCPUs and memory that come and go | this machine's own |

pub mod hotplug;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::{RestoreError, SaveError, SavedState, Section, SectionSet, Snapshot};
use serde::{Deserialize, Serialize};

use crate::{BusDevice, GuestRequest, GuestRequests, LevelLine, Unit};

const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111 << SLEEP_TYPE_SHIFT;
const SLEEP_ENABLE: u8 = 1 << 5;
/// The sleep type that the machine's `_S5` object names.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Reset control: the reset is that of the whole system, not of the CPU alone.
const RESET_SYSTEM: u8 = 1 << 1;
/// Reset control: writing one resets.
const RESET_CPU: u8 = 1 << 2;
/// Reset control: the reset includes a power cycle.
const RESET_FULL: u8 = 1 << 3;
/// What to write to the reset register to reset the machine, for the FADT.
pub const RESET_VALUE: u8 = RESET_SYSTEM | RESET_CPU;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sleep control and sleep status. S5 (soft off) is the only sleep state.
///
/// Status is always 0: its one bit reports waking, and nothing wakes from S5.
pub struct SleepRegisters {
    control: Mutex<SleepControl>,
    requests: Arc<dyn GuestRequests>,
}

/// The sleep control register.
#[derive(Default)]
struct SleepControl {
    /// The sleep type in its place in the register; the enable bit reads as 0.
    sleep_type: u8,
}

impl SleepControl {
    /// Takes a write; `true` when it asks for S5.
    fn write(&mut self, value: u8) -> bool {
        self.sleep_type = value & SLEEP_TYPE_MASK;
        value & SLEEP_ENABLE != 0 && self.sleep_type >> SLEEP_TYPE_SHIFT == SLEEP_TYPE_S5
    }
}

/// Saved form of [`SleepRegisters`].
#[derive(Serialize, Deserialize)]
struct SleepV1 {
    sleep_type: u8,
}

impl SavedState for SleepV1 {
    const SCHEMA: &'static str = "acpi-sleep";
    const VERSION: u16 = 1;
}

impl Snapshot for SleepControl {
    type State = SleepV1;

    fn save(&self) -> Result<SleepV1, SaveError> {
        let Self { sleep_type } = *self;
        Ok(SleepV1 { sleep_type })
    }

    fn restore(&mut self, state: SleepV1) -> Result<(), RestoreError> {
        let SleepV1 { sleep_type } = state;
        if sleep_type & !SLEEP_TYPE_MASK != 0 {
            return Err(RestoreError::Invalid {
                schema: SleepV1::SCHEMA,
                reason: format!("the sleep control register cannot hold {sleep_type:#04x}"),
            });
        }
        *self = Self { sleep_type };
        Ok(())
    }
}

impl SleepRegisters {
    /// Makes the registers; S5 goes to `requests` as [`GuestRequest::PowerOff`].
    #[must_use]
    pub fn new(requests: Arc<dyn GuestRequests>) -> Self {
        Self {
            control: Mutex::default(),
            requests,
        }
    }
}

impl BusDevice for SleepRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (byte, register) in data.iter_mut().zip(0_u64..) {
            *byte = match offset.wrapping_add(register) {
                0 => lock(&self.control).sleep_type,
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(&value)) = (offset, data.first())
            && lock(&self.control).write(value)
        {
            self.requests.request(GuestRequest::PowerOff);
        }
    }
}

impl Unit for SleepRegisters {
    fn name(&self) -> &str {
        "acpi-sleep"
    }

    fn reset(&self) {
        *lock(&self.control) = SleepControl::default();
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        let state = lock(&self.control).save()?;
        Ok(vec![Section::encode(self.name(), &state)?])
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        let section = set.take(self.name(), SleepV1::SCHEMA)?;
        lock(&self.control).restore(section.decode()?)
    }
}

/// The reset register, one byte: a write with bit 2 set resets the machine.
///
/// Bits 1 and 3 choose the kind of reset on a PC and are kept for reading;
/// here every reset is one of the whole system.
pub struct ResetRegister {
    control: Mutex<ResetControl>,
    requests: Arc<dyn GuestRequests>,
}

/// The reset control register.
#[derive(Default)]
struct ResetControl {
    kind: u8,
}

impl ResetControl {
    /// Takes a write; `true` when it asks for a reset.
    fn write(&mut self, value: u8) -> bool {
        self.kind = value & (RESET_SYSTEM | RESET_FULL);
        value & RESET_CPU != 0
    }
}

/// Saved form of [`ResetRegister`].
#[derive(Serialize, Deserialize)]
struct ResetV1 {
    kind: u8,
}

impl SavedState for ResetV1 {
    const SCHEMA: &'static str = "acpi-reset";
    const VERSION: u16 = 1;
}

impl Snapshot for ResetControl {
    type State = ResetV1;

    fn save(&self) -> Result<ResetV1, SaveError> {
        let Self { kind } = *self;
        Ok(ResetV1 { kind })
    }

    fn restore(&mut self, state: ResetV1) -> Result<(), RestoreError> {
        let ResetV1 { kind } = state;
        if kind & !(RESET_SYSTEM | RESET_FULL) != 0 {
            return Err(RestoreError::Invalid {
                schema: ResetV1::SCHEMA,
                reason: format!("the reset register cannot hold {kind:#04x}"),
            });
        }
        *self = Self { kind };
        Ok(())
    }
}

impl ResetRegister {
    /// Makes the register; a reset goes to `requests` as [`GuestRequest::Reset`].
    #[must_use]
    pub fn new(requests: Arc<dyn GuestRequests>) -> Self {
        Self {
            control: Mutex::default(),
            requests,
        }
    }
}

impl BusDevice for ResetRegister {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = lock(&self.control).kind;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(&value)) = (offset, data.first())
            && lock(&self.control).write(value)
        {
            self.requests.request(GuestRequest::Reset);
        }
    }
}

impl Unit for ResetRegister {
    fn name(&self) -> &str {
        "acpi-reset"
    }

    fn reset(&self) {
        *lock(&self.control) = ResetControl::default();
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        let state = lock(&self.control).save()?;
        Ok(vec![Section::encode(self.name(), &state)?])
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        let section = set.take(self.name(), ResetV1::SCHEMA)?;
        lock(&self.control).restore(section.decode()?)
    }
}

/// The generic event device's register: which events are pending.
///
/// Reading gives the pending events and clears the bytes that were read, so
/// that the guest's handler sees each event once. Writes are ignored.
///
/// The line is high while events are pending, so a guest that has no handler
/// yet, or has its interrupts masked, hears of them later.
pub struct EventRegister {
    pending: Mutex<PendingEvents>,
    /// Driven with `pending` locked, so that it follows the register's order.
    line: Arc<dyn LevelLine>,
}

/// The register of pending events, little-endian.
#[derive(Default)]
struct PendingEvents {
    bits: u32,
}

impl PendingEvents {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut bytes = self.bits.to_le_bytes();
        for (byte, register) in data.iter_mut().zip(0_u64..) {
            *byte = usize::try_from(offset.wrapping_add(register))
                .ok()
                .and_then(|at| bytes.get_mut(at))
                .map_or(0, std::mem::take);
        }
        self.bits = u32::from_le_bytes(bytes);
    }
}

/// Saved form of [`EventRegister`]. Every value is one that it can hold: which
/// events exist is known to those who raise them.
#[derive(Serialize, Deserialize)]
struct EventsV1 {
    bits: u32,
}

impl SavedState for EventsV1 {
    const SCHEMA: &'static str = "acpi-events";
    const VERSION: u16 = 1;
}

impl Snapshot for PendingEvents {
    type State = EventsV1;

    fn save(&self) -> Result<EventsV1, SaveError> {
        let Self { bits } = *self;
        Ok(EventsV1 { bits })
    }

    fn restore(&mut self, state: EventsV1) -> Result<(), RestoreError> {
        let EventsV1 { bits } = state;
        *self = Self { bits };
        Ok(())
    }
}

impl EventRegister {
    /// Makes the register with nothing pending and `line` low.
    #[must_use]
    pub fn new(line: Arc<dyn LevelLine>) -> Self {
        Self {
            pending: Mutex::default(),
            line,
        }
    }

    /// Makes the events in `bits` pending and interrupts the guest.
    ///
    /// Any thread may call it, also while the machine is paused. An event that
    /// is pending already stays one event.
    pub fn raise(&self, bits: u32) {
        self.change(|pending| pending.bits |= bits);
    }

    /// Changes the register, and the line with it.
    fn change<T>(&self, change: impl FnOnce(&mut PendingEvents) -> T) -> T {
        let mut pending = lock(&self.pending);
        let before = pending.bits != 0;
        let result = change(&mut pending);
        let after = pending.bits != 0;
        if before != after {
            self.line.set(after);
        }
        result
    }
}

impl BusDevice for EventRegister {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.change(|pending| pending.read(offset, data));
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

impl Unit for EventRegister {
    fn name(&self) -> &str {
        "acpi-events"
    }

    fn reset(&self) {
        self.change(|pending| *pending = PendingEvents::default());
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        let state = lock(&self.pending).save()?;
        Ok(vec![Section::encode(self.name(), &state)?])
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        let section = set.take(self.name(), EventsV1::SCHEMA)?;
        let state = section.decode()?;
        self.change(|pending| pending.restore(state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{self, Asked, Level};

    fn byte(device: &impl BusDevice, offset: u64) -> u8 {
        let mut data = [0xff];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn only_sleep_type_5_with_the_enable_bit_powers_off() {
        for value in 0..=u8::MAX {
            let asked = Arc::new(Asked::default());
            SleepRegisters::new(asked.clone()).write(0, &[value]);
            let expected: &[GuestRequest] = if value & 0x3c == 0x34 {
                &[GuestRequest::PowerOff]
            } else {
                &[]
            };
            assert_eq!(asked.take(), expected, "after {value:#04x}");
        }
    }

    #[test]
    fn the_sleep_type_reads_back_without_the_enable_bit_and_status_is_clear() {
        let asked = Arc::new(Asked::default());
        let sleep = SleepRegisters::new(asked.clone());
        sleep.write(0, &[0x34]);
        sleep.write(1, &[0x80]);
        assert_eq!((byte(&sleep, 0), byte(&sleep, 1)), (0x14, 0));
        sleep.reset();
        assert_eq!(byte(&sleep, 0), 0);
    }

    #[test]
    fn bit_2_of_the_reset_register_resets_and_its_kind_reads_back() {
        for (value, resets, kind) in [
            (0x06, true, 0x02),
            (0x0e, true, 0x0a),
            (0x04, true, 0),
            (0x02, false, 0x02),
            (0xf1, false, 0),
        ] {
            let asked = Arc::new(Asked::default());
            let reset = ResetRegister::new(asked.clone());
            reset.write(0, &[value]);
            assert_eq!(asked.take().len(), usize::from(resets), "{value:#04x}");
            assert_eq!(byte(&reset, 0), kind, "{value:#04x}");
        }
    }

    #[test]
    fn events_add_up_until_they_are_read_once() {
        let line = Arc::new(Level::default());
        let events = EventRegister::new(line.clone());
        events.raise(1 << 0);
        events.raise(1 << 31);
        assert!(line.is_high());
        let mut data = [0xff; 4];
        events.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8000_0001);
        assert!(!line.is_high());
        events.read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn a_narrow_read_clears_only_the_events_it_gave() {
        let line = Arc::new(Level::default());
        let events = EventRegister::new(line.clone());
        events.raise(0x0001_0001);
        assert_eq!(byte(&events, 0), 1);
        assert!(line.is_high(), "one is left");
        let mut data = [0xff; 4];
        events.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x0001_0000);
    }

    #[test]
    fn pending_events_survive_saving_and_go_with_a_reset() {
        let line = Arc::new(Level::default());
        let events = EventRegister::new(line.clone());
        events.raise(0x5);
        let mut set = SectionSet::default();
        set.push(events.save().unwrap().remove(0));
        events.reset();
        assert!(!line.is_high());
        assert_eq!(byte(&events, 0), 0);
        events.restore(&mut set).unwrap();
        assert!(line.is_high());
        assert_eq!(byte(&events, 0), 5);
    }

    #[test]
    fn any_access_is_answered_and_state_round_trips() {
        let asked = || Arc::new(Asked::default());
        conformance::check(2, || SleepRegisters::new(asked()));
        conformance::check(1, || ResetRegister::new(asked()));
        conformance::check(4, || {
            let events = EventRegister::new(Arc::new(Level::default()));
            events.raise(0xdead_beef);
            events
        });
    }

    #[test]
    fn values_that_the_registers_cannot_hold_are_refused() {
        let asked = || Arc::new(Asked::default());
        let sleep = SleepRegisters::new(asked());
        conformance::assert_refused(&sleep, &SleepV1 { sleep_type: 0x20 }, "enable bit");
        let reset = ResetRegister::new(asked());
        conformance::assert_refused(&reset, &ResetV1 { kind: 0x04 }, "reset bit");
    }
}
