//! A 16550A serial port.
//!
//! # Contract
//!
//! * Output is never slower than the guest: a byte goes to the host end at
//!   once or is dropped and counted ([`LossyOutput`]). The transmitter is
//!   therefore always empty, and its interrupt follows each write.
//! * Input is never lost by the host: [`Serial::input`] takes what fits into
//!   the 64-byte receive FIFO and says how much. When it took less than it was
//!   given, [`InputReady`] tells later that there is room. The port holds no
//!   other buffer, so neither side can make it grow.
//! * Input waits until the guest listens. A driver that starts up throws away
//!   what the FIFO holds; without a wire there is no reason to let it have
//!   anything before. A guest listens when it has enabled the receive
//!   interrupt, or when it polls: two reads of the line status in a row.
//! * The line rate means nothing: any divisor, 0 included, is only stored.
//!
//! # Mechanism
//!
//! The register core is `vm_superio::Serial`. Around it, this module adds
//! what drivers other than Linux's may rely on: an interrupt identification
//! that keeps to the priorities of the data sheet and lasts as long as its
//! cause (the core forgets a cause once it is read), and the FIFO control
//! register's clearing of the receive FIFO. The register layout is that of
//! the National Semiconductor PC16550D data sheet, section 8.

use std::convert::Infallible;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::{RestoreError, SaveError, SavedState, Section, SectionSet, Snapshot};
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, SerialState};

use crate::output::LossyOutput;
use crate::{BusDevice, IrqLine, Unit};

/// The receive FIFO's size in bytes; that of the register core.
pub const FIFO_LEN: usize = 64;
/// A sender that found the FIFO full is called when half of it is free: the
/// guest then has work left while the rest arrives.
const REFILL_LEN: usize = FIFO_LEN / 2;

/// Receive buffer, transmit holding register, or the divisor's low byte.
const DATA: u8 = 0;
/// Interrupt enable, or the divisor's high byte.
const IER: u8 = 1;
const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMIT_EMPTY: u8 = 1 << 1;
const IER_MASK: u8 = 0x0f;
/// Interrupt identification when read, FIFO control when written.
const IIR_FCR: u8 = 2;
const IIR_NONE: u8 = 0b001;
const IIR_TRANSMIT_EMPTY: u8 = 0b010;
const IIR_RECEIVED: u8 = 0b100;
const IIR_FIFOS: u8 = 0xc0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
/// Line control.
const LCR: u8 = 3;
const LCR_DIVISOR_LATCH: u8 = 1 << 7;
/// Modem control.
const MCR: u8 = 4;
const MCR_LOOP: u8 = 1 << 4;
const MCR_MASK: u8 = 0x1f;
/// Line status.
const LSR: u8 = 5;
const LSR_DATA_READY: u8 = 1 << 0;
/// Scratch, the last register.
const SCRATCH: u8 = 7;

/// This many reads of the line status in a row are polling.
const POLLING: u8 = 2;

/// Hears that a serial port takes input again.
pub trait InputReady: Send + Sync {
    /// The port has room for at least half a FIFO, and an earlier
    /// [`Serial::input`] took less than it was given. Called on a vCPU thread
    /// or the control thread, with no lock held; must not block.
    fn ready(&self);
}

/// The interrupt line as the register core wants it.
struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

type Uart = vm_superio::Serial<Line, NoEvents, LossyOutput>;

/// The registers with all their behaviour, and the output they write to.
struct Registers {
    uart: Uart,
    irq: Arc<dyn IrqLine>,
    /// What the interrupt enable register holds, also while the divisor latch hides it.
    enabled: u8,
    /// Reads of the line status with nothing in between, up to [`POLLING`].
    status_reads: u8,
    /// Input was refused and [`InputReady`] has not been called since.
    owes_ready: bool,
}

impl Registers {
    fn new(irq: Arc<dyn IrqLine>, output: LossyOutput) -> Self {
        Self {
            uart: Uart::new(Line(Arc::clone(&irq)), output),
            irq,
            enabled: 0,
            status_reads: 0,
            owes_ready: false,
        }
    }

    fn read(&mut self, register: u8) -> u8 {
        self.count_status_reads(register == LSR);
        match register {
            IIR_FCR => self.identify(),
            _ => self.uart.read(register),
        }
    }

    fn write(&mut self, register: u8, value: u8) {
        self.count_status_reads(false);
        match register {
            IIR_FCR if value & FCR_CLEAR_RECEIVER != 0 => self.clear_receiver(),
            IER if !self.divisor_latched() => {
                self.enabled = value & IER_MASK;
                if self.receive_enabled() {
                    self.status_reads = 0;
                }
                self.put(IER, value);
            }
            MCR => self.put(MCR, value & MCR_MASK),
            _ => self.put(register, value),
        }
    }

    /// Writes a register of the core.
    fn put(&mut self, register: u8, value: u8) {
        // Neither the output nor the line can fail.
        let _ = self.uart.write(register, value);
    }

    fn divisor_latched(&mut self) -> bool {
        self.uart.read(LCR) & LCR_DIVISOR_LATCH != 0
    }

    fn receive_enabled(&self) -> bool {
        self.enabled & IER_RECEIVED != 0
    }

    /// Whether the guest wants input.
    fn listens(&self) -> bool {
        self.receive_enabled() || self.status_reads >= POLLING
    }

    fn data_ready(&mut self) -> bool {
        self.uart.read(LSR) & LSR_DATA_READY != 0
    }

    /// Runs `f` while the divisor latch is out of the way of registers 0 and 1.
    fn past_divisor_latch(&mut self, f: impl FnOnce(&mut Self)) {
        let lcr = self.uart.read(LCR);
        self.put(LCR, lcr & !LCR_DIVISOR_LATCH);
        f(self);
        self.put(LCR, lcr);
    }

    /// The interrupt identification register: the highest cause that is
    /// enabled. Reading acknowledges an empty transmitter if that is what is
    /// shown; received data stays a cause until it is read.
    fn identify(&mut self) -> u8 {
        let causes = self.uart.read(IIR_FCR);
        let transmit = causes & IIR_TRANSMIT_EMPTY != 0 && self.enabled & IER_TRANSMIT_EMPTY != 0;
        let id = if self.receive_enabled() && self.data_ready() {
            if transmit {
                // The core has dropped both causes: have it raise them again.
                let enabled = self.enabled;
                self.past_divisor_latch(|this| this.put(IER, enabled));
            }
            IIR_RECEIVED
        } else if transmit {
            IIR_TRANSMIT_EMPTY
        } else {
            IIR_NONE
        };
        IIR_FIFOS | id
    }

    fn clear_receiver(&mut self) {
        self.past_divisor_latch(|this| {
            for _ in 0..FIFO_LEN {
                if !this.data_ready() {
                    break;
                }
                this.uart.read(DATA);
            }
        });
    }

    fn count_status_reads(&mut self, is_status_read: bool) {
        if self.status_reads < POLLING && !self.receive_enabled() {
            self.status_reads = if is_status_read {
                self.status_reads + 1
            } else {
                0
            };
        }
    }

    /// How many bytes the port takes from the host now.
    fn room(&mut self) -> usize {
        let looped = self.uart.read(MCR) & MCR_LOOP != 0;
        if self.listens() && !looped {
            self.uart.fifo_capacity()
        } else {
            0
        }
    }

    fn input(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.room());
        let fits = bytes.get(..count).unwrap_or_default();
        // The line cannot fail, and the bytes fit.
        let taken = self.uart.enqueue_raw_bytes(fits).unwrap_or(0);
        self.owes_ready |= taken < bytes.len();
        taken
    }

    /// `true` once for each refusal, when there is room again.
    fn take_ready(&mut self) -> bool {
        let ready = self.owes_ready && self.room() >= REFILL_LEN;
        if ready {
            self.owes_ready = false;
        }
        ready
    }

    /// Replaces the core; the output and what is owed to the host stay.
    ///
    /// Pulses the line when `state` has an interrupt pending. A guest bears a
    /// pulse too many.
    fn replace(&mut self, state: &SerialState) -> Result<(), RestoreError> {
        let nowhere = LossyOutput::new(String::new(), Box::new(std::io::sink()));
        let line = Line(Arc::clone(&self.irq));
        let mut uart = Uart::from_state(state, line, NoEvents, nowhere)
            .map_err(|error| invalid(error.to_string()))?;
        std::mem::swap(uart.writer_mut(), self.uart.writer_mut());
        self.uart = uart;
        self.enabled = state.interrupt_enable;
        Ok(())
    }

    fn reset(&mut self) {
        // The default state has an empty FIFO, the only thing that can be refused.
        let _ = self.replace(&SerialState::default());
        self.status_reads = 0;
    }
}

fn invalid(reason: String) -> RestoreError {
    RestoreError::Invalid {
        schema: SerialV1::SCHEMA,
        reason,
    }
}

/// Saved form of [`Serial`]. The line status and the modem status are not
/// here: the one follows from the FIFO, the other never changes.
#[derive(Clone, Serialize, Deserialize)]
struct SerialV1 {
    divisor_low: u8,
    divisor_high: u8,
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    received_pending: bool,
    transmit_empty_pending: bool,
    status_reads: u8,
    fifo: Vec<u8>,
}

impl SavedState for SerialV1 {
    const SCHEMA: &'static str = "serial16550";
    const VERSION: u16 = 1;
}

impl Snapshot for Registers {
    type State = SerialV1;

    fn save(&self) -> Result<SerialV1, SaveError> {
        let Self {
            uart,
            irq: _,
            enabled: _,
            status_reads,
            owes_ready: _,
        } = self;
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status: _,
            modem_control,
            modem_status: _,
            scratch,
            in_buffer,
        } = uart.state();
        Ok(SerialV1 {
            divisor_low: baud_divisor_low,
            divisor_high: baud_divisor_high,
            interrupt_enable,
            line_control,
            modem_control,
            scratch,
            received_pending: interrupt_identification & IIR_RECEIVED != 0,
            transmit_empty_pending: interrupt_identification & IIR_TRANSMIT_EMPTY != 0,
            status_reads: *status_reads,
            fifo: in_buffer,
        })
    }

    fn restore(&mut self, state: SerialV1) -> Result<(), RestoreError> {
        let SerialV1 {
            divisor_low,
            divisor_high,
            interrupt_enable,
            line_control,
            modem_control,
            scratch,
            received_pending,
            transmit_empty_pending,
            status_reads,
            fifo,
        } = state;
        if interrupt_enable & !IER_MASK != 0 || modem_control & !MCR_MASK != 0 {
            return Err(invalid(format!(
                "interrupt enable {interrupt_enable:#04x} and modem control {modem_control:#04x} \
                 have bits that the port lacks"
            )));
        }
        if fifo.len() > FIFO_LEN || (received_pending && fifo.is_empty()) {
            return Err(invalid(format!(
                "a receive FIFO with {} of {FIFO_LEN} bytes",
                fifo.len()
            )));
        }
        if status_reads > POLLING {
            return Err(invalid(format!("{status_reads} reads of the line status")));
        }
        let mut status = SerialState::default();
        if !fifo.is_empty() {
            status.line_status |= LSR_DATA_READY;
        }
        let received = if received_pending { IIR_RECEIVED } else { 0 };
        let transmit = if transmit_empty_pending {
            IIR_TRANSMIT_EMPTY
        } else {
            0
        };
        self.replace(&SerialState {
            baud_divisor_low: divisor_low,
            baud_divisor_high: divisor_high,
            interrupt_enable,
            interrupt_identification: match received | transmit {
                0 => IIR_NONE,
                causes => causes,
            },
            line_control,
            modem_control,
            scratch,
            in_buffer: fifo,
            line_status: status.line_status,
            modem_status: status.modem_status,
        })?;
        self.status_reads = status_reads;
        Ok(())
    }
}

/// The port: eight registers, an interrupt line, a host end each way.
pub struct Serial {
    name: String,
    registers: Mutex<Registers>,
    input_ready: Arc<dyn InputReady>,
}

impl Serial {
    /// Makes a port that writes to `output`, which must not block (see
    /// [`LossyOutput`]), and pulses `irq`. `name` is the unit's.
    #[must_use]
    pub fn new(
        name: impl Into<String>,
        irq: Arc<dyn IrqLine>,
        output: Box<dyn Write + Send>,
        input_ready: Arc<dyn InputReady>,
    ) -> Self {
        let name = name.into();
        let output = LossyOutput::new(name.clone(), output);
        Self {
            registers: Mutex::new(Registers::new(irq, output)),
            name,
            input_ready,
        }
    }

    /// Gives the guest input; how many of `bytes` were taken, from the first.
    ///
    /// Any thread may call it; it does not block. When not all were taken,
    /// keep the rest until [`InputReady::ready`].
    pub fn input(&self, bytes: &[u8]) -> usize {
        self.registers().input(bytes)
    }

    /// Whether the guest listens, as it must for input to reach it. Any thread may ask; it does not block.
    #[must_use]
    pub fn is_listened_to(&self) -> bool {
        self.registers().listens()
    }

    /// How many bytes of output the host end did not take. Any thread may ask.
    #[must_use]
    pub fn dropped_output(&self) -> u64 {
        self.registers().uart.writer().dropped()
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `f`, then tells the host about room that it made.
    fn then_report<T>(&self, f: impl FnOnce(&mut Registers) -> T) -> T {
        let mut registers = self.registers();
        let result = f(&mut registers);
        let ready = registers.take_ready();
        drop(registers);
        if ready {
            self.input_ready.ready();
        }
        result
    }
}

/// The register that the `index`th byte of an access at `offset` is for:
/// a wide access is one of each byte.
fn register_at(offset: u64, index: u64) -> Option<u8> {
    let register = u8::try_from(offset.checked_add(index)?).ok()?;
    (register <= SCRATCH).then_some(register)
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.then_report(|registers| {
            for (byte, index) in data.iter_mut().zip(0..) {
                if let Some(register) = register_at(offset, index) {
                    *byte = registers.read(register);
                }
            }
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.then_report(|registers| {
            for (&byte, index) in data.iter().zip(0..) {
                if let Some(register) = register_at(offset, index) {
                    registers.write(register, byte);
                }
            }
        });
    }
}

impl Unit for Serial {
    fn name(&self) -> &str {
        &self.name
    }

    fn reset(&self) {
        self.registers().reset();
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        let state = self.registers().save()?;
        Ok(vec![Section::encode(&self.name, &state)?])
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        let section = set.take(&self.name, SerialV1::SCHEMA)?;
        let state = section.decode()?;
        self.then_report(|registers| registers.restore(state))
    }
}

#[cfg(test)]
mod tests;
