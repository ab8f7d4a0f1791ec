//! The display adapter: a linear framebuffer with the Bochs display interface, as a PCI function.
//!
//! # Contract
//!
//! BAR 0 is the video memory, which the guest reads and writes without an exit where the host maps it
//! ([`VideoMemory::place`]); BAR 2 holds the registers. The firmware's work is done at power-on and at every reset: the
//! memory is clear and a mode is set, so that a guest can draw before it has a driver.
//!
//! A guest may set any mode at any moment; one that does not fit the memory, or that this adapter does not have, is no
//! mode: the screen is off until the next. Nothing it writes costs more than a few assignments, but for the clearing of
//! the memory that the interface asks for when a mode is set.
//!
//! # Follows
//!
//! The Bochs VBE display API, with the registers of QEMU's stdvga and bochs-display at their places in
//! BAR 2 (EDID at 0, VGA ports at 0x400, the interface's registers at 0x500, byte order at 0x600), which is what the
//! `bochs` driver of Linux uses. There is no VGA text mode, no I/O port and no legacy memory.

mod edid;
mod registers;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use migration::{RestoreError, SaveError, SavedState, Section, SectionSet};
use serde::{Deserialize, Serialize};

pub use edid::{EDID_LEN, edid};
pub use registers::RegistersV1;
use registers::{Effect, Registers};

use super::{FrameSource, Mode, PAGE};
use crate::pci::{BarKind, ConfigError, ConfigSpace, ConfigSpaceV1, FunctionId, PciFunction};
use crate::{StartError, StopError, Unit};

const NAME: &str = "display";
const ZEROS: [u8; PAGE] = [0; PAGE];
/// The BARs' registers.
const MEMORY_BAR: u8 = 0;
const REGISTER_BAR: u8 = 2;
const REGISTERS_LEN: u64 = 4096;

/// The memory that a guest draws in. Called by any thread.
pub trait VideoMemory: Send + Sync {
    /// Its size in bytes: a power of two, at least 64 KiB, at most 2 GiB.
    fn size(&self) -> usize;

    /// The guest sees it from guest-physical `base` on, or no longer. Calls are serialised, and alternate.
    /// Where the host cannot map it, accesses come to the adapter one by one.
    fn place(&self, base: Option<u64>);

    /// As [`FrameSource::track`].
    fn track(&self, on: bool);

    /// As [`FrameSource::changed`]: only of writes that do not go through [`VideoMemory::write`].
    fn changed(&self, pages: &mut [u64]);

    /// Copies from byte `offset`; what is past the end is left as it is.
    fn read(&self, offset: usize, buffer: &mut [u8]);

    /// Copies to byte `offset`; what is past the end is dropped.
    fn write(&self, offset: usize, data: &[u8]);

    /// Makes all of it zeros, and gives it back to the host.
    fn clear(&self);
}

/// The saved form of an [`Adapter`]. Its memory is in sections of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterV1 {
    /// The registers.
    pub registers: RegistersV1,
    /// The configuration space.
    pub space: ConfigSpaceV1,
    /// Bytes of video memory.
    pub memory: u64,
}

impl SavedState for AdapterV1 {
    const SCHEMA: &'static str = "bochs-display";
    const VERSION: u16 = 1;
}

/// The saved form of the video memory: those of its pages that are not zeros.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VideoMemoryV1 {
    /// Each page's number, rising, with its 4096 bytes.
    pub pages: Vec<(u32, Vec<u8>)>,
}

impl SavedState for VideoMemoryV1 {
    const SCHEMA: &'static str = "video-memory";
    const VERSION: u16 = 1;
}

/// The name under which the memory is saved.
const MEMORY_NAME: &str = "display-memory";

/// The function on the PCI bus. As a [`Unit`] its name is `display`.
pub struct Adapter {
    registers: Mutex<Registers>,
    space: Mutex<ConfigSpace>,
    memory: Arc<dyn VideoMemory>,
    edid: [u8; EDID_LEN],
    /// All of the picture is to be looked at anew: it was changed by other means than the guest's
    /// own writes to mapped memory.
    stale: AtomicBool,
}

impl Adapter {
    /// An adapter that draws in `memory` and shows `width` by `height` pixels at power-on: 32 bits each, line after line.
    ///
    /// # Errors
    ///
    /// [`ConfigError::BarSize`] for a memory that has not got the size of a base address register.
    pub fn new(memory: Arc<dyn VideoMemory>, width: u16, height: u16) -> Result<Self, ConfigError> {
        let mut space = ConfigSpace::new(&FunctionId {
            vendor: 0x1234,
            device: 0x1111,
            revision: 2,
            // A display controller that is no VGA.
            class: [0x03, 0x80, 0x00],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        let size = memory.size();
        let bytes = u64::try_from(size).unwrap_or(u64::MAX);
        space.add_bar(MEMORY_BAR, BarKind::Memory32, bytes)?;
        space.add_bar(REGISTER_BAR, BarKind::Memory32, REGISTERS_LEN)?;
        Ok(Self {
            registers: Mutex::new(Registers::new(width, height, size)),
            space: Mutex::new(space),
            memory,
            edid: edid(width, height),
            stale: AtomicBool::new(true),
        })
    }

    /// The mode that is set, or none while the screen is off.
    #[must_use]
    pub fn mode(&self) -> Option<Mode> {
        self.registers().mode()
    }

    /// Where the guest finds the video memory after power-on, guest-physical, once it is on the bus.
    #[must_use]
    pub fn home(&self) -> u64 {
        let homes = lock(&self.space).homes();
        let mut homes = homes.into_iter();
        let home = homes.find(|(bar, _)| bar.index == MEMORY_BAR);
        home.map_or(0, |(_, base)| base)
    }

    /// What is to be seen of it.
    #[must_use]
    pub fn source(self: &Arc<Self>) -> Box<dyn FrameSource> {
        Box::new(Source(Arc::clone(self)))
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }

    fn touched(&self) {
        self.stale.store(true, Ordering::Release);
    }

    fn clear(&self) {
        self.memory.clear();
        self.touched();
    }

    fn save_memory(&self) -> VideoMemoryV1 {
        let count = u32::try_from(self.memory.size() / PAGE).unwrap_or(u32::MAX);
        let mut page = [0; PAGE];
        let mut pages = Vec::new();
        for (index, offset) in (0..count).zip((0..).step_by(PAGE)) {
            self.memory.read(offset, &mut page);
            if page != ZEROS {
                pages.push((index, page.to_vec()));
            }
        }
        VideoMemoryV1 { pages }
    }

    fn restore_memory(&self, VideoMemoryV1 { pages }: VideoMemoryV1) -> Result<(), RestoreError> {
        let invalid = |reason: String| RestoreError::Invalid {
            schema: VideoMemoryV1::SCHEMA,
            reason,
        };
        self.memory.clear();
        for (index, bytes) in pages {
            let offset = usize::try_from(index)
                .ok()
                .and_then(|i| i.checked_mul(PAGE));
            let offset = offset.filter(|offset| *offset < self.memory.size());
            let offset = offset.ok_or_else(|| invalid(format!("there is no page {index}")))?;
            if bytes.len() != PAGE {
                return Err(invalid(format!("page {index} has {} bytes", bytes.len())));
            }
            self.memory.write(offset, &bytes);
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A BAR's offset as an index; what it cannot hold is past every memory.
fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

impl PciFunction for Adapter {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.space
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if bar == MEMORY_BAR {
            self.memory.read(index(offset), data);
        } else {
            self.registers().read(&self.edid, index(offset), data);
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar == MEMORY_BAR {
            self.memory.write(index(offset), data);
            self.touched();
            return;
        }
        // The memory is cleared under the lock: a mode is not seen with another one's picture.
        let mut registers = self.registers();
        if registers.write(index(offset), data) == Effect::Clear {
            self.clear();
        }
    }

    fn bar_mapped(&self, bar: u8, base: Option<u64>) {
        if bar == MEMORY_BAR {
            self.memory.place(base);
            // What was recorded of writes is lost.
            self.touched();
        }
    }
}

impl Unit for Adapter {
    fn name(&self) -> &str {
        NAME
    }

    fn start(&self) -> Result<(), StartError> {
        Ok(())
    }

    fn stop(&self, _deadline: Instant) -> Result<(), StopError> {
        Ok(())
    }

    fn reset(&self) {
        lock(&self.space).reset();
        self.registers().reset();
        self.clear();
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        let state = AdapterV1 {
            registers: self.registers().save(),
            space: lock(&self.space).save(),
            memory: u64::try_from(self.memory.size()).unwrap_or(u64::MAX),
        };
        let memory = self.save_memory();
        Ok(vec![
            Section::encode(NAME, &state)?,
            Section::encode(MEMORY_NAME, &memory)?,
        ])
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        let state: AdapterV1 = set.take(NAME, AdapterV1::SCHEMA)?.decode()?;
        let pages = set.take(MEMORY_NAME, VideoMemoryV1::SCHEMA)?;
        // Before it is decoded, which takes many times its bytes. A page has a number and a length besides.
        if pages.body.len()
            > self
                .memory
                .size()
                .saturating_add(self.memory.size() / 256)
                .saturating_add(16)
        {
            return Err(RestoreError::Invalid {
                schema: VideoMemoryV1::SCHEMA,
                reason: format!("it is {} bytes long", pages.body.len()),
            });
        }
        let pages = pages.decode()?;
        let AdapterV1 {
            registers,
            space,
            memory,
        } = state;
        let size = self.memory.size();
        if usize::try_from(memory) != Ok(size) {
            return Err(RestoreError::Invalid {
                schema: AdapterV1::SCHEMA,
                reason: format!("{memory} bytes of video memory, and there are {size}"),
            });
        }
        self.registers().restore(registers);
        lock(&self.space).restore(AdapterV1::SCHEMA, space)?;
        self.restore_memory(pages)?;
        self.touched();
        Ok(())
    }
}

/// What viewers see of an [`Adapter`].
struct Source(Arc<Adapter>);

impl FrameSource for Source {
    fn mode(&self) -> Option<Mode> {
        self.0.mode()
    }

    fn track(&self, on: bool) {
        self.0.memory.track(on);
        self.0.touched();
    }

    fn changed(&self, pages: &mut [u64]) {
        self.0.memory.changed(pages);
        if self.0.stale.swap(false, Ordering::Acquire) {
            pages.fill(u64::MAX);
        }
    }

    fn size(&self) -> usize {
        self.0.memory.size()
    }

    fn read(&self, offset: usize, buffer: &mut [u8]) {
        self.0.memory.read(offset, buffer);
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.0.memory.track(false);
    }
}

#[cfg(test)]
mod tests;
