//! The configuration space of one function (PCI Local Bus 3.0, chapter 6).
//!
//! A space is 256 registers of one byte, each with a mask of the bits that the
//! guest may change. Everything the guest sees follows from that: sizing a BAR
//! by writing ones, read-only ids, a capability's control bits. Accesses may
//! have any width and alignment; what lies past the 256 bytes (the extended
//! space that ECAM reaches) reads as zero, which means "no extended
//! capabilities", and ignores writes.
//!
//! Functions have no interrupt pin: they signal by MSI-X only. They also carry
//! no PCI Express capability. The root complex has no ports, links or slots
//! that such a capability would describe, and without it a guest stops its
//! search at 256 bytes instead of reading 4 KiB.
//!
//! Bus mastering can be switched in the command register, as drivers expect,
//! but does not gate the function's work.

use std::ops::Range;

use migration::RestoreError;
use serde::{Deserialize, Serialize};

/// Bytes of the conventional configuration space.
const SPACE: usize = 256;
/// Offsets of the type 0 header (6.1).
mod reg {
    pub const VENDOR: usize = 0x00;
    pub const DEVICE: usize = 0x02;
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const REVISION: usize = 0x08;
    pub const CLASS: usize = 0x09;
    pub const BARS: usize = 0x10;
    pub const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub const SUBSYSTEM: usize = 0x2e;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3c;
    /// The first byte after the header.
    pub const FREE: usize = 0x40;
}
/// Command register bits (6.2.2).
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status register: there is a capability list (6.2.3).
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Base address register, type 64-bit memory (6.2.5.1).
const BAR_MEMORY64: u32 = 0b100;

/// How many base address registers a type 0 header has.
pub const BAR_COUNT: usize = 6;

/// The ids of a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FunctionId {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// Where a BAR may be put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Memory below 4 GiB; takes one register.
    Memory32,
    /// Memory anywhere; takes two registers.
    Memory64,
}

/// One base address register as the function declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its (first) register, 0 to 5.
    pub index: u8,
    /// Where it may be put.
    pub kind: BarKind,
    /// Its size in bytes: a power of two, at least 4096.
    pub size: u64,
}

/// A function that cannot be described. A fault of the device model.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The register does not exist or is taken.
    #[error("base address register {index} does not exist or is in use")]
    BarIndex {
        /// The register.
        index: u8,
    },
    /// The size is no power of two, below a page, or too large for the kind.
    #[error("a base address register cannot have the size {size:#x}")]
    BarSize {
        /// The size in bytes.
        size: u64,
    },
    /// The capability does not fit.
    #[error("no room for capability {id:#04x} with {len} bytes")]
    CapabilityRoom {
        /// The capability's id.
        id: u8,
        /// Its length with its header.
        len: usize,
    },
}

/// The saved form of a [`ConfigSpace`], part of its function's section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigSpaceV1 {
    /// All 256 registers.
    pub registers: Vec<u8>,
    /// The same after power-on, which holds the assigned addresses.
    pub power_on: Vec<u8>,
}

/// The configuration space of a function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    registers: [u8; SPACE],
    power_on: [u8; SPACE],
    writable: [u8; SPACE],
    bars: Vec<Bar>,
    /// Where the next capability goes, and the byte that is to point to it.
    free: usize,
    link: usize,
}

impl ConfigSpace {
    /// A space with the header filled in, no BARs and no capabilities.
    #[must_use]
    pub fn new(id: &FunctionId) -> Self {
        let mut space = Self {
            registers: [0; SPACE],
            power_on: [0; SPACE],
            writable: [0; SPACE],
            bars: Vec::new(),
            free: reg::FREE,
            link: reg::CAPABILITIES,
        };
        let [base, sub, interface] = id.class;
        space.define(reg::VENDOR, &id.vendor.to_le_bytes(), &[]);
        space.define(reg::DEVICE, &id.device.to_le_bytes(), &[]);
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.define(reg::COMMAND, &[0; 2], &command.to_le_bytes());
        space.define(reg::REVISION, &[id.revision], &[]);
        space.define(reg::CLASS, &[interface, sub, base], &[]);
        space.define(
            reg::SUBSYSTEM_VENDOR,
            &id.subsystem_vendor.to_le_bytes(),
            &[],
        );
        space.define(reg::SUBSYSTEM, &id.subsystem.to_le_bytes(), &[]);
        // Means nothing without an interrupt pin, but software keeps notes in it.
        space.define(reg::INTERRUPT_LINE, &[0], &[0xff]);
        space
    }

    /// Adds a memory BAR at register `index`.
    ///
    /// # Errors
    ///
    /// [`ConfigError::BarIndex`], [`ConfigError::BarSize`].
    pub fn add_bar(&mut self, index: u8, kind: BarKind, size: u64) -> Result<(), ConfigError> {
        let registers = match kind {
            BarKind::Memory32 => 1,
            BarKind::Memory64 => 2,
        };
        let at = usize::from(index);
        let taken = |r: usize| {
            self.bars.iter().any(|bar| {
                let first = usize::from(bar.index);
                r == first || (bar.kind == BarKind::Memory64 && r == first + 1)
            })
        };
        if at + registers > BAR_COUNT || (at..at + registers).any(taken) {
            return Err(ConfigError::BarIndex { index });
        }
        let limit = match kind {
            BarKind::Memory32 => 1 << 31,
            BarKind::Memory64 => 1 << 62,
        };
        if !size.is_power_of_two() || !(4096..=limit).contains(&size) {
            return Err(ConfigError::BarSize { size });
        }
        let bar = Bar { index, kind, size };
        let kind_bits = match kind {
            BarKind::Memory32 => 0,
            BarKind::Memory64 => BAR_MEMORY64,
        };
        let mask = (!(size - 1)).to_le_bytes();
        let mask = mask.get(..registers * 4).unwrap_or(&mask);
        self.define(bar_offset(index), &kind_bits.to_le_bytes(), mask);
        self.bars.push(bar);
        Ok(())
    }

    /// Appends a capability: `body` follows its two-byte header, and a set bit
    /// in `writable` (which may be shorter) lets the guest change that bit.
    /// Returns the offset of the header.
    ///
    /// # Errors
    ///
    /// [`ConfigError::CapabilityRoom`].
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u8, ConfigError> {
        let len = body.len().saturating_add(2);
        let start = self.free;
        let end = start.checked_add(len).filter(|end| *end <= SPACE);
        let (Some(end), Ok(offset)) = (end, u8::try_from(start)) else {
            return Err(ConfigError::CapabilityRoom { id, len });
        };
        self.define(self.link, &[offset], &[]);
        self.define(reg::STATUS, &STATUS_CAPABILITIES.to_le_bytes(), &[]);
        self.define(start, &[id, 0], &[]);
        self.define(start + 2, body, writable);
        self.link = start + 1;
        self.free = end.next_multiple_of(4);
        Ok(offset)
    }

    fn define(&mut self, offset: usize, value: &[u8], writable: &[u8]) {
        for (i, byte) in value.iter().enumerate() {
            if let Some(at) = self.registers.get_mut(offset + i) {
                *at = *byte;
                self.power_on[offset + i] = *byte;
            }
        }
        for (i, mask) in writable.iter().enumerate() {
            if let Some(at) = self.writable.get_mut(offset + i) {
                *at = *mask;
            }
        }
    }

    /// Reads at byte `offset`; zeros past the end.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::from(offset).saturating_add(i);
            *byte = self.registers.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes at byte `offset`: writable bits change, all others stay.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            let at = usize::from(offset).saturating_add(i);
            if let (Some(old), Some(mask)) = (self.registers.get_mut(at), self.writable.get(at)) {
                *old = (*old & !mask) | (byte & mask);
            }
        }
    }

    /// Overwrites registers whatever their masks: for what the device itself
    /// shows in a capability.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            if let Some(at) = self
                .registers
                .get_mut(usize::from(offset).saturating_add(i))
            {
                *at = *byte;
            }
        }
    }

    /// Whether a write to these bytes may change which addresses decode.
    #[must_use]
    pub fn is_decode_control(offset: u16, len: usize) -> bool {
        let start = usize::from(offset);
        let end = start.saturating_add(len);
        let hits = |range: Range<usize>| start < range.end && range.start < end;
        hits(reg::COMMAND..reg::STATUS) || hits(reg::BARS..reg::BARS + 4 * BAR_COUNT)
    }

    /// The BARs that the function has.
    #[must_use]
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// What each BAR decodes now: first address, or nothing while memory
    /// decoding is off. The address is the guest's and may be anywhere, but is
    /// a multiple of the size.
    #[must_use]
    pub fn decoded(&self) -> Vec<(Bar, Option<u64>)> {
        let command = u16::from_le_bytes([
            self.registers[reg::COMMAND],
            self.registers[reg::COMMAND + 1],
        ]);
        let on = command & COMMAND_MEMORY != 0;
        self.bars
            .iter()
            .map(|bar| (*bar, on.then(|| bar_address(&self.registers, bar))))
            .collect()
    }

    /// The address that each BAR has after power-on; 0 until it is placed.
    #[must_use]
    pub fn homes(&self) -> Vec<(Bar, u64)> {
        self.bars
            .iter()
            .map(|bar| (*bar, bar_address(&self.power_on, bar)))
            .collect()
    }

    /// Puts a BAR at `base`, a multiple of its size, now and after every
    /// reset, and lets the function decode memory.
    pub fn place(&mut self, index: u8, base: u64) {
        let Some(bar) = self.bars.iter().find(|bar| bar.index == index) else {
            return;
        };
        let offset = bar_offset(bar.index);
        let width = match bar.kind {
            BarKind::Memory32 => 4,
            BarKind::Memory64 => 8,
        };
        for (i, byte) in base.to_le_bytes().into_iter().take(width).enumerate() {
            let mask = self.writable[offset + i];
            for image in [&mut self.registers, &mut self.power_on] {
                image[offset + i] = (image[offset + i] & !mask) | (byte & mask);
            }
        }
        for image in [&mut self.registers, &mut self.power_on] {
            image[reg::COMMAND] |= COMMAND_MEMORY.to_le_bytes()[0];
        }
    }

    /// Back to the values after power-on.
    pub fn reset(&mut self) {
        self.registers = self.power_on;
    }

    /// Takes the saved form.
    #[must_use]
    pub fn save(&self) -> ConfigSpaceV1 {
        ConfigSpaceV1 {
            registers: self.registers.to_vec(),
            power_on: self.power_on.to_vec(),
        }
    }

    /// Puts saved registers back into a space with the same layout.
    ///
    /// # Errors
    ///
    /// [`RestoreError::Invalid`], naming `schema`, when a read-only bit
    /// differs: it was another function. The space is then unchanged.
    pub fn restore(
        &mut self,
        schema: &'static str,
        state: ConfigSpaceV1,
    ) -> Result<(), RestoreError> {
        let ConfigSpaceV1 {
            registers,
            power_on,
        } = state;
        let registers = self.accept(schema, &registers)?;
        let power_on = self.accept(schema, &power_on)?;
        self.registers = registers;
        self.power_on = power_on;
        Ok(())
    }

    fn accept(&self, schema: &'static str, image: &[u8]) -> Result<[u8; SPACE], RestoreError> {
        let image: [u8; SPACE] = image.try_into().map_err(|_| RestoreError::Invalid {
            schema,
            reason: format!(
                "the configuration space has {} bytes, not {SPACE}",
                image.len()
            ),
        })?;
        for (at, byte) in image.iter().enumerate() {
            let fixed = !self.writable[at];
            if (byte ^ self.registers[at]) & fixed != 0 {
                return Err(RestoreError::Invalid {
                    schema,
                    reason: format!(
                        "configuration register {at:#04x} holds {byte:#04x}, this function has {:#04x}",
                        self.registers[at]
                    ),
                });
            }
        }
        Ok(image)
    }
}

fn bar_offset(index: u8) -> usize {
    reg::BARS + 4 * usize::from(index)
}

fn bar_address(image: &[u8; SPACE], bar: &Bar) -> u64 {
    let width = match bar.kind {
        BarKind::Memory32 => 4,
        BarKind::Memory64 => 8,
    };
    let mut bytes = [0; 8];
    for (to, from) in bytes
        .iter_mut()
        .zip(image.iter().skip(bar_offset(bar.index)).take(width))
    {
        *to = *from;
    }
    u64::from_le_bytes(bytes) & !(bar.size - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> ConfigSpace {
        let mut space = ConfigSpace::new(&FunctionId {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0, 2],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1142,
        });
        space.add_bar(0, BarKind::Memory64, 0x10000).unwrap();
        space.add_bar(2, BarKind::Memory32, 0x1000).unwrap();
        space
            .add_capability(0x11, &[0x07, 0, 1, 2], &[0, 0xc0])
            .unwrap();
        space.add_capability(0x09, &[0x10], &[]).unwrap();
        space
    }

    fn dword(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0xaa; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_header_shows_the_ids_and_no_interrupt_pin() {
        let space = sample();
        assert_eq!(dword(&space, 0x00), 0x1042_1af4);
        assert_eq!(dword(&space, 0x04), 0x0010_0000);
        assert_eq!(dword(&space, 0x08), 0x0100_0201);
        assert_eq!(dword(&space, 0x0c), 0);
        assert_eq!(dword(&space, 0x2c), 0x1142_1af4);
        assert_eq!(dword(&space, 0x3c), 0);
    }

    #[test]
    fn capabilities_form_a_list() {
        let space = sample();
        assert_eq!(dword(&space, 0x34), 0x40);
        assert_eq!(dword(&space, 0x40), 0x0007_4811);
        assert_eq!(dword(&space, 0x48), 0x0010_0009);
    }

    #[test]
    fn writing_ones_to_a_bar_shows_its_size() {
        let mut space = sample();
        for offset in [0x10, 0x14, 0x18, 0x1c] {
            space.write(offset, &[0xff; 4]);
        }
        assert_eq!(dword(&space, 0x10), 0xffff_0004);
        assert_eq!(dword(&space, 0x14), 0xffff_ffff);
        assert_eq!(dword(&space, 0x18), 0xffff_f000);
        assert_eq!(dword(&space, 0x1c), 0);
    }

    #[test]
    fn a_bar_decodes_only_while_memory_decoding_is_on() {
        let mut space = sample();
        space.place(0, 0x12_3456_0000);
        space.place(2, 0xc000_1000);
        let addresses =
            |space: &ConfigSpace| space.decoded().iter().map(|(_, a)| *a).collect::<Vec<_>>();
        assert_eq!(addresses(&space), [Some(0x12_3456_0000), Some(0xc000_1000)]);
        space.write(4, &[0]);
        assert_eq!(addresses(&space), [None, None]);
        space.write(0x10, &[0; 8]);
        space.reset();
        assert_eq!(addresses(&space), [Some(0x12_3456_0000), Some(0xc000_1000)]);
    }

    #[test]
    fn impossible_bars_and_capabilities_are_refused() {
        let mut space = sample();
        for index in [0, 1, 2, 5, 6, 255] {
            assert_eq!(
                space.add_bar(index, BarKind::Memory64, 0x1000),
                Err(ConfigError::BarIndex { index })
            );
        }
        for size in [0, 1, 0x800, 0x3000, 1 << 32] {
            assert_eq!(
                space.add_bar(3, BarKind::Memory32, size),
                Err(ConfigError::BarSize { size })
            );
        }
        assert_eq!(
            space.add_capability(9, &[0; 0xb8], &[]),
            Err(ConfigError::CapabilityRoom { id: 9, len: 0xba })
        );
        space.add_capability(9, &[0; 0xb2], &[]).unwrap();
        assert!(space.add_capability(9, &[], &[]).is_err());
    }

    #[test]
    fn saved_registers_come_back_and_another_functions_are_refused() {
        let mut space = sample();
        space.place(0, 0x1_0000_0000);
        space.write(4, &[6, 4]);
        space.write(0x43, &[0xff]);
        let mut other = sample();
        other.restore("test", space.save()).unwrap();
        assert_eq!(other.save(), space.save());
        let mut foreign = space.save();
        foreign.registers[2] ^= 1;
        assert!(matches!(
            other.restore("test", foreign),
            Err(RestoreError::Invalid { .. })
        ));
        let mut short = space.save();
        short.power_on.pop();
        assert!(matches!(
            other.restore("test", short),
            Err(RestoreError::Invalid { .. })
        ));
        assert_eq!(other.save(), space.save());
    }

    proptest! {
        #[test]
        fn no_access_panics_or_changes_what_is_read_only(
            offset in any::<u16>(),
            data in prop::collection::vec(any::<u8>(), 0..16),
        ) {
            let mut space = sample();
            space.write(offset, &data);
            let saved = space.save();
            prop_assert!(sample().restore("test", saved).is_ok());
            let mut back = vec![0xaa; data.len()];
            space.read(offset, &mut back);
            if offset >= 256 {
                prop_assert!(back.iter().all(|b| *b == 0));
            }
        }
    }
}
