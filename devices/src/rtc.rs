//! The PC's real-time clock: a Motorola MC146818 with 114 bytes of memory.
//!
//! # Contract
//!
//! Two ports: an index (bit 7, the NMI mask, is ignored) and data. The clock
//! shows the host's time, or runs beside it by what the guest has set. The
//! century is register 0x32. Alarm, periodic and update-ended interrupts pulse
//! one line.
//!
//! Nothing here waits. The clock arms a [`WakeTimer`] whenever the guest
//! changes when the next interrupt is due, and the machine calls [`Rtc::tick`]
//! when the timer has fired. A clock with no interrupt enabled arms nothing.
//!
//! Time goes on over a reset, a pause and a migration; an alarm that was due
//! meanwhile fires on start.
//!
//! # Mechanism
//!
//! Nothing counts. The registers are computed from the host's time when they
//! are read; flags collect what has happened since the last look.
//! Follows the MC146818A data sheet, and what Linux's rtc-cmos driver does.

mod calendar;
mod registers;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migration::{RestoreError, SaveError, SavedState, Section, SectionSet, Snapshot};

use crate::time::{Clock, WakeTimer};
use crate::{BusDevice, IrqLine, StartError, StopError, Unit};
use registers::{Registers, RtcV1};

const NAME: &str = "rtc";

/// Offset of the index port.
const INDEX: u64 = 0;
/// Offset of the data port.
const DATA: u64 = 1;

struct State {
    registers: Registers,
    /// Between start and stop: the timer is armed only then.
    running: bool,
    /// What the timer is armed with, as far as is known.
    armed: Option<Duration>,
}

/// The clock at its two ports.
pub struct Rtc {
    state: Mutex<State>,
    irq: Arc<dyn IrqLine>,
    clock: Arc<dyn Clock>,
    timer: Arc<dyn WakeTimer>,
}

impl Rtc {
    /// Makes a clock that shows the civil time of `clock` ([`crate::time::SystemClock`]), pulses `irq` (IRQ 8) and
    /// arms `timer`.
    #[must_use]
    pub fn new(irq: Arc<dyn IrqLine>, clock: Arc<dyn Clock>, timer: Arc<dyn WakeTimer>) -> Self {
        Self {
            state: Mutex::new(State {
                registers: Registers::new(clock.now()),
                running: false,
                armed: None,
            }),
            irq,
            clock,
            timer,
        }
    }

    /// Fires the interrupts that are due. Called by the control thread after
    /// the [`WakeTimer`] has fired; a call too early or too often is harmless.
    pub fn tick(&self) {
        let mut state = self.state();
        // The timer has fired, so it is armed no longer.
        state.armed = None;
        if state.running {
            let now = self.clock.now();
            self.finish(state, |registers| registers.tick(now));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `f`, then arms the timer anew and pulses the line as needed.
    fn finish<T>(
        &self,
        mut state: MutexGuard<'_, State>,
        f: impl FnOnce(&mut Registers) -> T,
    ) -> T {
        let result = f(&mut state.registers);
        let edge = state.registers.take_edge();
        self.rearm(&mut state);
        drop(state);
        if edge {
            self.irq.pulse();
        }
        result
    }

    /// Arms the timer, under the lock: the last change is the last to arm.
    fn rearm(&self, state: &mut State) {
        let deadline = if state.running {
            state.registers.next_deadline()
        } else {
            None
        };
        if deadline != state.armed {
            state.armed = deadline;
            self.timer.arm(deadline);
        }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let now = self.clock.now();
        self.finish(self.state(), |registers| {
            for (byte, index) in data.iter_mut().zip(0_u64..) {
                // The index port is write-only.
                if offset.wrapping_add(index) == DATA {
                    *byte = registers.read(now);
                }
            }
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let now = self.clock.now();
        self.finish(self.state(), |registers| {
            for (&byte, index) in data.iter().zip(0_u64..) {
                match offset.wrapping_add(index) {
                    INDEX => registers.select(byte),
                    DATA => registers.write(byte, now),
                    _ => {}
                }
            }
        });
    }
}

impl Unit for Rtc {
    fn name(&self) -> &str {
        NAME
    }

    fn start(&self) -> Result<(), StartError> {
        let mut state = self.state();
        state.running = true;
        let now = self.clock.now();
        self.finish(state, |registers| registers.tick(now));
        Ok(())
    }

    fn stop(&self, _deadline: Instant) -> Result<(), StopError> {
        let mut state = self.state();
        state.running = false;
        self.rearm(&mut state);
        Ok(())
    }

    /// Does what firmware does after a reset: time and memory stay.
    fn reset(&self) {
        let now = self.clock.now();
        self.state().registers.reset(now);
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        let state = self.state().registers.save()?;
        Ok(vec![Section::encode(NAME, &state)?])
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        let section = set.take(NAME, RtcV1::SCHEMA)?;
        self.state().registers.restore(section.decode()?)
    }
}

#[cfg(test)]
mod tests;
