//! The registers of the Bochs display interface, and what mode they mean.

use serde::{Deserialize, Serialize};

use super::super::{Mode, PixelFormat};
use super::EDID_LEN;

/// What BAR 2 holds, at which offsets.
const EDID_END: usize = 0x400;
const VGA: usize = 0x400;
const VGA_END: usize = 0x420;
const INTERFACE: usize = 0x500;
const EXTENDED: usize = 0x600;
const EXTENDED_ORDER: usize = 0x604;
const EXTENDED_END: usize = 0x608;

/// The interface's registers, 16 bits each.
const ID: usize = 0;
const XRES: usize = 1;
const YRES: usize = 2;
const BPP: usize = 3;
const ENABLE: usize = 4;
const VIRTUAL_WIDTH: usize = 6;
const VIRTUAL_HEIGHT: usize = 7;
const X_OFFSET: usize = 8;
const Y_OFFSET: usize = 9;
const MEMORY_64K: usize = 10;
const COUNT: usize = 11;

/// The version: with linear framebuffer, 32 bits, and its memory's size.
const VERSION: u16 = 0xb0c5;
const ENABLED: u16 = 1 << 0;
const GET_CAPABILITIES: u16 = 1 << 1;
const LINEAR: u16 = 1 << 6;
const KEEP_MEMORY: u16 = 1 << 7;
/// The most that there is, and that is told with [`GET_CAPABILITIES`].
const MOST: [u16; 3] = [3840, 2160, 32];

/// VGA ports from 0x3c0 on: attribute index and data, input status 1.
const ATTRIBUTE: usize = 0x00;
const STATUS: usize = 0x1a;
/// In the attribute index: the palette is in use, without which the screen is blank.
const ATTRIBUTE_PALETTE: u8 = 0x20;

/// Byte orders, as the interface's owner spells them.
const LITTLE: u32 = 0x1e1e_1e1e;

/// The saved form of the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistersV1 {
    /// The interface's, by their index.
    pub interface: [u16; COUNT],
    /// The VGA attribute index, with its palette bit.
    pub attribute: u8,
    /// The next write to the attribute port is data.
    pub attribute_data: bool,
}

/// What a write asks for besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Video memory becomes zeros.
    Clear,
}

#[derive(Debug)]
pub struct Registers {
    interface: [u16; COUNT],
    attribute: u8,
    attribute_data: bool,
    power_on: (u16, u16),
    /// Bytes of video memory.
    memory: usize,
}

impl Registers {
    pub fn new(width: u16, height: u16, memory: usize) -> Self {
        let mut registers = Self {
            interface: [0; COUNT],
            attribute: ATTRIBUTE_PALETTE,
            attribute_data: false,
            power_on: (width, height),
            memory,
        };
        registers.reset();
        registers
    }

    pub fn reset(&mut self) {
        let (width, height) = self.power_on;
        self.interface = [0; COUNT];
        self.interface[XRES] = width;
        self.interface[YRES] = height;
        self.interface[BPP] = 32;
        self.interface[VIRTUAL_WIDTH] = width;
        self.interface[ENABLE] = ENABLED | LINEAR;
        self.attribute = ATTRIBUTE_PALETTE;
        self.attribute_data = false;
    }

    /// The mode, if all that is set makes one.
    pub fn mode(&self) -> Option<Mode> {
        let on = ENABLED | LINEAR;
        if self.interface[ENABLE] & on != on || self.attribute & ATTRIBUTE_PALETTE == 0 {
            return None;
        }
        let format = match self.interface[BPP] {
            32 => PixelFormat::Xrgb8888,
            24 => PixelFormat::Rgb888,
            16 => PixelFormat::Rgb565,
            15 => PixelFormat::Xrgb1555,
            _ => return None,
        };
        // What is shown is kept for each viewer: a guest has no more than what was promised.
        let [most_x, most_y, _] = MOST;
        if self.interface[XRES] > most_x || self.interface[YRES] > most_y {
            return None;
        }
        let wide = |register: usize| u32::from(self.interface[register]);
        // At most 65535 pixels of 4 bytes, 65535 times.
        let stride = wide(VIRTUAL_WIDTH).max(wide(XRES)) * format.bytes();
        let offset = u64::from(wide(Y_OFFSET)) * u64::from(stride)
            + u64::from(wide(X_OFFSET) * format.bytes());
        let offset = usize::try_from(offset).ok()?;
        Mode::new(
            (wide(XRES), wide(YRES)),
            stride,
            offset,
            format,
            self.memory,
        )
        .ok()
    }

    fn interface(&self, register: usize) -> u16 {
        let asked = self.interface[ENABLE] & GET_CAPABILITIES != 0;
        match register {
            ID => VERSION,
            XRES | YRES | BPP if asked => MOST[register - XRES],
            MEMORY_64K => u16::try_from(self.memory >> 16).unwrap_or(u16::MAX),
            // As many lines as the memory has room for.
            VIRTUAL_HEIGHT => {
                let bits = usize::from(self.interface[BPP]).next_multiple_of(8);
                let width = self.interface[VIRTUAL_WIDTH].max(self.interface[XRES]);
                let line = usize::from(width) * bits / 8;
                let lines = self.memory.checked_div(line).unwrap_or(0);
                u16::try_from(lines).unwrap_or(u16::MAX)
            }
            register => self.interface.get(register).copied().unwrap_or(0),
        }
    }

    fn set_interface(&mut self, register: usize, value: u16) -> Effect {
        match register {
            ENABLE => {
                let begins = value & ENABLED != 0 && self.interface[ENABLE] & ENABLED == 0;
                self.interface[ENABLE] = value;
                if begins {
                    self.interface[VIRTUAL_WIDTH] = self.interface[XRES];
                    self.interface[X_OFFSET] = 0;
                    self.interface[Y_OFFSET] = 0;
                    if value & KEEP_MEMORY == 0 {
                        return Effect::Clear;
                    }
                }
            }
            ID | VIRTUAL_HEIGHT | MEMORY_64K => (),
            register => {
                if let Some(old) = self.interface.get_mut(register) {
                    *old = value;
                }
            }
        }
        Effect::None
    }

    /// Reads `data` at `offset` of BAR 2, where `edid` is shown too.
    pub fn read(&mut self, edid: &[u8; EDID_LEN], offset: usize, data: &mut [u8]) {
        data.fill(0);
        match offset {
            0..EDID_END => {
                let from = edid.get(offset..).unwrap_or_default();
                for (to, from) in data.iter_mut().zip(from) {
                    *to = *from;
                }
            }
            VGA..VGA_END => {
                if offset - VGA == STATUS {
                    self.attribute_data = false;
                }
                if offset - VGA == ATTRIBUTE
                    && let Some(byte) = data.first_mut()
                {
                    *byte = self.attribute;
                }
            }
            INTERFACE..EXTENDED => {
                let at = offset - INTERFACE;
                let words = [self.interface(at / 2), self.interface(at / 2 + 1)];
                let [a, b] = words.map(u16::to_le_bytes);
                let bytes = [a[0], a[1], b[0], b[1]];
                for (to, from) in data.iter_mut().zip(bytes.into_iter().skip(at % 2)) {
                    *to = from;
                }
            }
            EXTENDED..EXTENDED_END => {
                // The size of these registers, then the byte order.
                let size = u32::try_from(EXTENDED_END - EXTENDED).unwrap_or(0);
                let word = if offset < EXTENDED_ORDER {
                    size
                } else {
                    LITTLE
                };
                for (to, from) in data
                    .iter_mut()
                    .zip(word.to_le_bytes().into_iter().skip(offset % 4))
                {
                    *to = from;
                }
            }
            _ => (),
        }
    }

    /// Writes `data` at `offset` of BAR 2.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Effect {
        match (offset, data) {
            (VGA..VGA_END, [value, ..]) if offset - VGA == ATTRIBUTE => {
                if !self.attribute_data {
                    self.attribute = *value;
                }
                self.attribute_data = !self.attribute_data;
            }
            (INTERFACE..EXTENDED, [low, high, ..]) if offset.is_multiple_of(2) => {
                let value = u16::from_le_bytes([*low, *high]);
                return self.set_interface((offset - INTERFACE) / 2, value);
            }
            _ => (),
        }
        Effect::None
    }

    pub fn save(&self) -> RegistersV1 {
        let Self {
            interface,
            attribute,
            attribute_data,
            power_on: _,
            memory: _,
        } = *self;
        RegistersV1 {
            interface,
            attribute,
            attribute_data,
        }
    }

    /// Adopts untrusted registers: any value is one that a guest could have written.
    pub fn restore(&mut self, state: RegistersV1) {
        let RegistersV1 {
            interface,
            attribute,
            attribute_data,
        } = state;
        self.interface = interface;
        self.attribute = attribute;
        self.attribute_data = attribute_data;
    }
}
