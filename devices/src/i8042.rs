//! The i8042 keyboard controller with a keyboard and a mouse behind it.
//!
//! # Contract
//!
//! The controller answers at ports 0x60 (data) and 0x64 (status, commands),
//! pulses IRQ 1 for bytes from the controller and the keyboard and IRQ 12 for
//! those of the auxiliary port, and turns a pulse of output port bit 0
//! (command 0xFE) into [`GuestRequest::Reset`]. Keyboard and mouse answer
//! every command, and send what [`I8042::key`] and [`I8042::point`] tell them.
//!
//! It comes up as firmware leaves it: self test passed, both ports and their
//! interrupts on, scan codes translated to set 1.
//!
//! Port 0x61 lies in between. It reads as "no NMI source, timer output high":
//! a kernel that looks for the cause of an NMI, or waits for the timer that
//! this machine lacks, goes on at once.
//!
//! # Mechanism
//!
//! One output buffer byte stands between the guest and three senders. A
//! command's reply takes the buffer at once; a keyboard or mouse byte that it
//! displaces goes back to the head of its queue. Queues are bounded, so a
//! guest that sends commands without reading replies loses replies.
//!
//! Follows the IBM PS/2 Hardware Interface Technical Reference, "Keyboard and
//! Auxiliary Device Controller", and what Linux's i8042, atkbd and psmouse
//! drivers send.

mod keyboard;
mod keys;
mod mouse;
mod queue;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bitflags::bitflags;
use migration::{RestoreError, SaveError, SavedState, Section, SectionSet, Snapshot};
use serde::{Deserialize, Serialize};

use crate::input::{InputError, InputKind};
use crate::{BusDevice, GuestRequest, GuestRequests, IrqLine, Unit};
use keyboard::{Keyboard, KeyboardV1};
use mouse::{Mouse, MouseV1};

const NAME: &str = "i8042";

/// Offset of port 0x60.
const DATA: u64 = 0;
/// Offset of port 0x61.
const PORT_B: u64 = 1;
/// Offset of port 0x64.
const STATUS_COMMAND: u64 = 4;
/// What port 0x61 reads as: the output of timer 2 is high, no NMI is latched.
const PORT_B_VALUE: u8 = 1 << 5;

bitflags! {
    /// The status register.
    #[derive(Clone, Copy, Debug)]
    struct Status: u8 {
        const OUTPUT_FULL = 1 << 0;
        const SYSTEM = 1 << 2;
        /// The last write was to the command port.
        const COMMAND = 1 << 3;
        /// The keyboard is not locked.
        const UNLOCKED = 1 << 4;
        const AUX_OUTPUT = 1 << 5;
    }

    /// The command byte. Unnamed bits are kept for the guest.
    #[derive(Clone, Copy, Debug)]
    struct CommandByte: u8 {
        const KEYBOARD_INTERRUPT = 1 << 0;
        const AUX_INTERRUPT = 1 << 1;
        const SYSTEM = 1 << 2;
        const KEYBOARD_DISABLED = 1 << 4;
        const AUX_DISABLED = 1 << 5;
        const TRANSLATE = 1 << 6;
        const _ = !0;
    }
}

/// The command byte as firmware leaves it.
const INITIAL_COMMAND_BYTE: CommandByte = CommandByte::KEYBOARD_INTERRUPT
    .union(CommandByte::AUX_INTERRUPT)
    .union(CommandByte::SYSTEM)
    .union(CommandByte::TRANSLATE);

/// Output port: low resets the machine.
const OUTPUT_NO_RESET: u8 = 1 << 0;
/// Output port: address line 20, stored only.
const OUTPUT_A20: u8 = 1 << 1;
/// Output port: the states of the interrupt lines, which follow the output buffer.
const OUTPUT_KEYBOARD_FULL: u8 = 1 << 4;
const OUTPUT_AUX_FULL: u8 = 1 << 5;
const OUTPUT_LINES: u8 = OUTPUT_KEYBOARD_FULL | OUTPUT_AUX_FULL;

const SELF_TEST_PASSED: u8 = 0x55;
const PORT_TEST_PASSED: u8 = 0x00;
/// Input port: the keyboard is not locked.
const INPUT_PORT: u8 = 0x80;

/// A controller command that takes its parameter from the data port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Awaited {
    CommandByte,
    OutputPort,
    /// The parameter comes back as if the keyboard had sent it.
    KeyboardLoop,
    /// The parameter comes back as if the auxiliary device had sent it.
    AuxLoop,
    /// The parameter goes to the auxiliary device.
    AuxSend,
}

/// Who put a byte into the output buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Source {
    Controller,
    AuxLoop,
    Keyboard,
    Mouse,
}

impl Source {
    fn is_aux(self) -> bool {
        matches!(self, Self::AuxLoop | Self::Mouse)
    }
}

/// The output buffer when it is full; `byte` is as the source sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Output {
    byte: u8,
    source: Source,
    /// The keyboard's byte came behind one that says that its key was released, which translation takes away.
    released: bool,
}

/// Levels of the two interrupt lines, or edges of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Lines {
    keyboard: bool,
    aux: bool,
}

/// What an access asks of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Signals {
    interrupts: Lines,
    reset: bool,
}

/// The controller's registers and the devices behind it.
struct Controller {
    command_byte: CommandByte,
    /// Without [`OUTPUT_LINES`].
    output_port: u8,
    awaited: Option<Awaited>,
    last_was_command: bool,
    output: Option<Output>,
    keyboard: Keyboard,
    mouse: Mouse,
    /// The guest has looked for it since it was reset; assumed of one that was saved.
    used: bool,
    /// The lines after the last access; follows from the rest.
    lines: Lines,
    /// What has been asked since [`Controller::take_signals`].
    signals: Signals,
}

impl Controller {
    fn new() -> Self {
        Self {
            command_byte: INITIAL_COMMAND_BYTE,
            output_port: OUTPUT_NO_RESET | OUTPUT_A20,
            awaited: None,
            last_was_command: false,
            output: None,
            keyboard: Keyboard::default(),
            mouse: Mouse::default(),
            used: false,
            lines: Lines::default(),
            signals: Signals::default(),
        }
    }

    fn status(&self) -> Status {
        let mut status = Status::UNLOCKED;
        status.set(
            Status::SYSTEM,
            self.command_byte.contains(CommandByte::SYSTEM),
        );
        status.set(Status::COMMAND, self.last_was_command);
        if let Some(output) = self.output {
            status |= Status::OUTPUT_FULL;
            status.set(Status::AUX_OUTPUT, output.source.is_aux());
        }
        status
    }

    /// Takes the byte in the output buffer, 0 when there is none, and lets
    /// the next one in.
    fn read_data(&mut self) -> u8 {
        let byte = match self.output.take() {
            Some(Output {
                byte,
                source: Source::Keyboard,
                released,
            }) if self.command_byte.contains(CommandByte::TRANSLATE) => {
                keyboard::translate(byte) | if released { keyboard::RELEASED_BIT } else { 0 }
            }
            Some(Output { byte, .. }) => byte,
            None => 0,
        };
        self.lines = Lines::default();
        self.settle();
        byte
    }

    fn write_data(&mut self, byte: u8) {
        self.last_was_command = false;
        match self.awaited.take() {
            None => {
                self.command_byte.remove(CommandByte::KEYBOARD_DISABLED);
                self.keyboard.receive(byte);
            }
            Some(Awaited::CommandByte) => self.command_byte = CommandByte::from_bits_retain(byte),
            Some(Awaited::OutputPort) => {
                self.output_port = byte & !OUTPUT_LINES;
                self.signals.reset |= byte & OUTPUT_NO_RESET == 0;
            }
            Some(Awaited::KeyboardLoop) => self.reply(byte, Source::Controller),
            Some(Awaited::AuxLoop) => self.reply(byte, Source::AuxLoop),
            Some(Awaited::AuxSend) => {
                self.command_byte.remove(CommandByte::AUX_DISABLED);
                self.mouse.receive(byte);
            }
        }
        self.settle();
    }

    fn write_command(&mut self, command: u8) {
        self.last_was_command = true;
        self.awaited = None;
        let reply = |this: &mut Self, byte| this.reply(byte, Source::Controller);
        match command {
            0x20 => reply(self, self.command_byte.bits()),
            0x60 => self.awaited = Some(Awaited::CommandByte),
            0xA7 => self.command_byte.insert(CommandByte::AUX_DISABLED),
            0xA8 => self.command_byte.remove(CommandByte::AUX_DISABLED),
            0xA9 | 0xAB => reply(self, PORT_TEST_PASSED),
            0xAA => {
                self.command_byte.insert(CommandByte::SYSTEM);
                reply(self, SELF_TEST_PASSED);
            }
            0xAD => self.command_byte.insert(CommandByte::KEYBOARD_DISABLED),
            0xAE => self.command_byte.remove(CommandByte::KEYBOARD_DISABLED),
            0xC0 => reply(self, INPUT_PORT),
            0xD0 => reply(self, self.read_output_port()),
            0xD1 => self.awaited = Some(Awaited::OutputPort),
            0xD2 => self.awaited = Some(Awaited::KeyboardLoop),
            0xD3 => self.awaited = Some(Awaited::AuxLoop),
            0xD4 => self.awaited = Some(Awaited::AuxSend),
            // Pulses low the output port's bits whose command bits are 0.
            0xF0..=0xFF => self.signals.reset |= command & OUTPUT_NO_RESET == 0,
            _ => tracing::debug!(command, "unknown i8042 command"),
        }
        self.settle();
    }

    fn read_output_port(&self) -> u8 {
        let lines = match self.output {
            None => 0,
            Some(output) if output.source.is_aux() => OUTPUT_AUX_FULL,
            Some(_) => OUTPUT_KEYBOARD_FULL,
        };
        self.output_port | lines
    }

    /// Puts a reply into the output buffer. A device's byte that is there
    /// waits at the head of its queue; a reply that is there is lost.
    fn reply(&mut self, byte: u8, source: Source) {
        let reply = Output {
            byte,
            source,
            released: false,
        };
        match self.output.replace(reply) {
            Some(Output {
                byte,
                source: Source::Keyboard,
                released,
            }) => {
                self.keyboard.put_back(byte);
                if released {
                    self.keyboard.put_back(keyboard::RELEASED);
                }
            }
            Some(Output {
                byte,
                source: Source::Mouse,
                ..
            }) => self.mouse.put_back(byte),
            _ => {}
        }
        self.lines = Lines::default();
    }

    /// Fills an empty output buffer from the devices that may send, and
    /// notes the interrupt lines that rise.
    fn settle(&mut self) {
        if self.output.is_none() {
            let enabled = |disabled| !self.command_byte.contains(disabled);
            let keyboard = enabled(CommandByte::KEYBOARD_DISABLED);
            let aux = enabled(CommandByte::AUX_DISABLED);
            let typed = if keyboard { self.typed() } else { None };
            self.output = typed.or_else(|| {
                let byte = if aux { self.mouse.send() } else { None };
                byte.map(|byte| Output {
                    byte,
                    source: Source::Mouse,
                    released: false,
                })
            });
        }
        let lines = self.levels();
        self.signals.interrupts.keyboard |= lines.keyboard && !self.lines.keyboard;
        self.signals.interrupts.aux |= lines.aux && !self.lines.aux;
        self.lines = lines;
    }

    /// What the keyboard sends next. A byte that is translation's alone goes no further.
    fn typed(&mut self) -> Option<Output> {
        let translates = self.command_byte.contains(CommandByte::TRANSLATE);
        let mut byte = self.keyboard.send()?;
        let mut released = false;
        if translates && byte == keyboard::RELEASED {
            released = true;
            byte = self.keyboard.send()?;
        }
        Some(Output {
            byte,
            source: Source::Keyboard,
            released,
        })
    }

    fn levels(&self) -> Lines {
        let on = |interrupt| self.command_byte.contains(interrupt);
        let aux = self.output.map(|output| output.source.is_aux());
        Lines {
            keyboard: aux == Some(false) && on(CommandByte::KEYBOARD_INTERRUPT),
            aux: aux == Some(true) && on(CommandByte::AUX_INTERRUPT),
        }
    }

    fn take_signals(&mut self) -> Signals {
        std::mem::take(&mut self.signals)
    }
}

/// Saved form of [`I8042`].
#[derive(Clone, Serialize, Deserialize)]
struct I8042V1 {
    command_byte: u8,
    output_port: u8,
    awaited: Option<Awaited>,
    last_was_command: bool,
    output: Option<Output>,
    keyboard: KeyboardV1,
    mouse: MouseV1,
}

impl SavedState for I8042V1 {
    const SCHEMA: &'static str = "i8042";
    const VERSION: u16 = 1;
}

fn invalid(reason: String) -> RestoreError {
    RestoreError::Invalid {
        schema: I8042V1::SCHEMA,
        reason,
    }
}

impl Snapshot for Controller {
    type State = I8042V1;

    fn save(&self) -> Result<I8042V1, SaveError> {
        let Self {
            command_byte,
            output_port,
            awaited,
            last_was_command,
            output,
            keyboard,
            mouse,
            used: _,
            lines: _,
            signals: _,
        } = self;
        Ok(I8042V1 {
            command_byte: command_byte.bits(),
            output_port: *output_port,
            awaited: *awaited,
            last_was_command: *last_was_command,
            output: *output,
            keyboard: keyboard.save(),
            mouse: mouse.save(),
        })
    }

    fn restore(&mut self, state: I8042V1) -> Result<(), RestoreError> {
        let I8042V1 {
            command_byte,
            output_port,
            awaited,
            last_was_command,
            output,
            keyboard,
            mouse,
        } = state;
        if output_port & OUTPUT_LINES != 0 {
            return Err(invalid(format!(
                "output port {output_port:#04x} has interrupt lines in it"
            )));
        }
        let out = |source| output.is_some_and(|output| output.source == source);
        *self = Self {
            command_byte: CommandByte::from_bits_retain(command_byte),
            output_port,
            awaited,
            last_was_command,
            output,
            keyboard: Keyboard::restore(keyboard, out(Source::Keyboard)).map_err(invalid)?,
            mouse: Mouse::restore(mouse, out(Source::Mouse)).map_err(invalid)?,
            used: true,
            lines: Lines::default(),
            signals: Signals::default(),
        };
        // An edge of these lines is with the interrupt controller already.
        self.lines = self.levels();
        Ok(())
    }
}

/// The controller at its ports, five from 0x60.
pub struct I8042 {
    controller: Mutex<Controller>,
    keyboard_irq: Arc<dyn IrqLine>,
    mouse_irq: Arc<dyn IrqLine>,
    requests: Arc<dyn GuestRequests>,
}

impl I8042 {
    /// Makes a controller whose keyboard pulses `keyboard_irq` (IRQ 1), whose
    /// mouse pulses `mouse_irq` (IRQ 12), and which resets through `requests`.
    #[must_use]
    pub fn new(
        keyboard_irq: Arc<dyn IrqLine>,
        mouse_irq: Arc<dyn IrqLine>,
        requests: Arc<dyn GuestRequests>,
    ) -> Self {
        Self {
            controller: Mutex::new(Controller::new()),
            keyboard_irq,
            mouse_irq,
            requests,
        }
    }

    /// A key goes down or up, or is repeated while it is down, by its evdev code
    /// (Linux `input-event-codes.h`). Those that a PS/2 keyboard has not got are ignored.
    pub fn key(&self, code: u16, down: bool) {
        self.access(|controller| {
            controller.keyboard.key(code, down);
            controller.settle();
        });
    }

    /// Keys go down and up one after the other, each as soon as the guest has taken what is before it: a text, that
    /// loses none of its letters however slowly the guest reads.
    ///
    /// # Errors
    ///
    /// [`InputError::Unused`] while the guest has not looked for a keyboard here or does not listen to it, and
    /// [`InputError::Full`] when it has not taken what was typed before. Nothing is typed then.
    pub fn type_keys(&self, strokes: &[(u16, bool)]) -> Result<(), InputError> {
        let mut typed = Err(InputError::Unused(InputKind::Keyboard));
        self.access(|controller| {
            if controller.used && controller.keyboard.is_scanning() {
                let fits = controller.keyboard.type_keys(strokes);
                let full = InputError::Full(InputKind::Keyboard);
                typed = fits.then_some(()).ok_or(full);
                controller.settle();
            }
        });
        typed
    }

    /// Whether the guest has looked for the controller since it was reset.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.controller().used
    }

    /// The mouse goes to the right and down by so many steps, its wheel is turned towards the user by
    /// so many notches, and its left, right and middle buttons are as bits 0 to 2 say.
    pub fn point(&self, right: i32, down: i32, wheel: i32, buttons: u8) {
        self.access(|controller| {
            controller.mouse.point(right, down, wheel, buttons);
            controller.settle();
        });
    }

    fn controller(&self) -> MutexGuard<'_, Controller> {
        self.controller
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `f`, then what it asks of the machine.
    fn access(&self, f: impl FnOnce(&mut Controller)) {
        let mut controller = self.controller();
        f(&mut controller);
        let Signals { interrupts, reset } = controller.take_signals();
        drop(controller);
        if interrupts.keyboard {
            self.keyboard_irq.pulse();
        }
        if interrupts.aux {
            self.mouse_irq.pulse();
        }
        if reset {
            self.requests.request(GuestRequest::Reset);
        }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.access(|controller| {
            for (byte, index) in data.iter_mut().zip(0_u64..) {
                match offset.wrapping_add(index) {
                    DATA => {
                        controller.used = true;
                        *byte = controller.read_data();
                    }
                    PORT_B => *byte = PORT_B_VALUE,
                    STATUS_COMMAND => *byte = controller.status().bits(),
                    _ => {}
                }
            }
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.access(|controller| {
            for (&byte, index) in data.iter().zip(0_u64..) {
                match offset.wrapping_add(index) {
                    DATA => {
                        controller.used = true;
                        controller.write_data(byte);
                    }
                    STATUS_COMMAND => {
                        controller.used = true;
                        controller.write_command(byte);
                    }
                    _ => {}
                }
            }
        });
    }
}

impl Unit for I8042 {
    fn name(&self) -> &str {
        NAME
    }

    fn reset(&self) {
        *self.controller() = Controller::new();
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        let state = self.controller().save()?;
        Ok(vec![Section::encode(NAME, &state)?])
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        let section = set.take(NAME, I8042V1::SCHEMA)?;
        self.controller().restore(section.decode()?)
    }
}

#[cfg(test)]
mod tests;
