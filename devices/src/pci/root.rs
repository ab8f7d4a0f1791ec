//! Bus 0: slots, configuration access, and the windows in which BARs decode.
//!
//! The root puts four things on the machine's buses: the configuration ports
//! ([`PciRoot::ports`], PCI Local Bus 3.0, 3.2.2.3.2), the memory-mapped
//! configuration space ([`PciRoot::ecam`], PCI Express 4.0, 7.2.2), and one
//! device for each memory window ([`PciRoot::windows`]). All stay where they
//! are for the life of the machine; what guests move is inside the windows.
//!
//! # Locks
//!
//! `slots` and `routes` are held for look-ups only, never during a call to a
//! function. `routing` is held while routes are recomputed and functions are
//! told ([`PciFunction::bar_mapped`]).

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use migration::{RestoreError, SaveError, SavedState, Section, SectionSet};
use serde::{Deserialize, Serialize};

use super::routes::{Routes, Windows};
use super::{Bar, ConfigSpace, ConfigSpaceV1, FunctionId, PciAddress, PciFunction};
use crate::bus::BusDevice;
use crate::unit::{StartError, Unit};

const SLOTS: usize = PciAddress::SLOTS as usize;
/// The address register's bits: enable, bus, device, function, register.
const LATCH_BITS: u32 = 0x80ff_fffc;
const LATCH_ENABLE: u32 = 1 << 31;
/// Bytes of ECAM for each function.
const ECAM_FUNCTION: u64 = 4096;

/// Why a function could not be put on the bus.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// The slot does not exist.
    #[error("there is no PCI slot {slot}; slots are 1 to 31")]
    NoSuchSlot {
        /// The slot asked for.
        slot: u8,
    },
    /// The slot holds another function.
    #[error("PCI slot {slot} is in use; leave the address out to have one chosen")]
    Occupied {
        /// The slot asked for.
        slot: u8,
    },
    /// All slots hold functions.
    #[error("all 31 PCI slots are in use")]
    Full,
    /// A base address register finds no room.
    #[error("no room for a PCI register range of {size:#x} bytes in slot {slot}")]
    NoRoom {
        /// The slot.
        slot: u8,
        /// The size in bytes.
        size: u64,
    },
}

/// The saved form of a [`PciRoot`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciRootV1 {
    /// The configuration address register.
    pub address: u32,
    /// A bit for each slot that has ever held a function.
    pub used_slots: u32,
    /// The host bridge's configuration space.
    pub bridge: ConfigSpaceV1,
}

impl SavedState for PciRootV1 {
    const SCHEMA: &'static str = "pci-root";
    const VERSION: u16 = 1;
}

struct Slots {
    functions: [Option<Arc<dyn PciFunction>>; SLOTS],
    /// A bit for each slot that has ever held a function.
    used: u32,
}

/// The root complex with its one bus. As a [`Unit`] its name is `pci`; it may
/// stand anywhere in the machine's order, as it follows its functions again
/// when it is started.
pub struct PciRoot {
    windows: Windows,
    bridge: Arc<HostBridge>,
    slots: RwLock<Slots>,
    routes: RwLock<Routes>,
    routing: Mutex<()>,
    address: AtomicU32,
}

impl PciRoot {
    /// A bus with the host bridge in slot 0.
    #[must_use]
    pub fn new(windows: Windows) -> Arc<Self> {
        let bridge = Arc::new(HostBridge::new());
        let mut functions = [const { None }; SLOTS];
        functions[0] = Some(bridge.clone() as Arc<dyn PciFunction>);
        Arc::new(Self {
            windows,
            bridge,
            slots: RwLock::new(Slots { functions, used: 1 }),
            routes: RwLock::default(),
            routing: Mutex::default(),
            address: AtomicU32::new(0),
        })
    }

    /// The configuration ports, eight of them from 0xCF8 on. Accesses of one
    /// byte to 0xCF9 go to `reset` at its offset 0; without one they read as ones.
    #[must_use]
    pub fn ports(self: &Arc<Self>, reset: Option<Arc<dyn BusDevice>>) -> Arc<dyn BusDevice> {
        Arc::new(Ports {
            root: Arc::clone(self),
            reset,
        })
    }

    /// The memory-mapped configuration space of bus 0: one MiB.
    #[must_use]
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(Arc::clone(self)))
    }

    /// The memory windows, each with the device that answers there.
    #[must_use]
    pub fn windows(self: &Arc<Self>) -> Vec<(Range<u64>, Arc<dyn BusDevice>)> {
        let device = |window: &Range<u64>| {
            Arc::new(Window {
                root: Arc::clone(self),
                base: window.start,
            })
        };
        self.windows
            .all()
            .into_iter()
            .filter(|window| !window.is_empty())
            .map(|window| (window.clone(), device(window) as Arc<dyn BusDevice>))
            .collect()
    }

    /// Puts a function into `slot`, or into one that has never been used (when
    /// all have been: the lowest free one), places its BARs and lets them
    /// decode. Returns where it is: its address for life.
    ///
    /// # Errors
    ///
    /// [`PciError`]; the bus is then as before.
    pub fn add(
        &self,
        function: Arc<dyn PciFunction>,
        slot: Option<u8>,
    ) -> Result<PciAddress, PciError> {
        let address = {
            let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
            let address = slots.choose(slot)?;
            let places = self.allocate(&slots, address, &function)?;
            {
                let mut config = lock(function.config());
                for (bar, base) in places {
                    config.place(bar.index, base);
                }
            }
            slots.functions[usize::from(address.slot())] = Some(function);
            slots.used |= 1 << address.slot();
            address
        };
        self.reroute();
        Ok(address)
    }

    /// Takes the function out of its slot; its BARs no longer decode when this
    /// returns. `None` when the slot is empty or holds the host bridge.
    pub fn remove(&self, address: PciAddress) -> Option<Arc<dyn PciFunction>> {
        if address.slot() == 0 {
            return None;
        }
        let function = self
            .slots
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .functions
            .get_mut(usize::from(address.slot()))?
            .take()?;
        self.reroute();
        Some(function)
    }

    /// Recomputes which BARs decode where. Needed only after a function's
    /// configuration space has changed by other means than the guest's writes;
    /// [`Unit::start`] does it too.
    pub fn reroute(&self) {
        let _serial = lock(&self.routing);
        let functions = {
            let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
            slots.functions.clone()
        };
        let new = Routes::compute(&self.windows, functions.into_iter().flatten());
        let old = {
            let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *routes, new.clone())
        };
        for (_, route) in old.without(&new) {
            route.function.bar_mapped(route.bar, None);
        }
        for (base, route) in new.without(&old) {
            route.function.bar_mapped(route.bar, Some(base));
        }
    }

    /// Finds room for each BAR of `function`, apart from everything that
    /// others decode now or will after a reset.
    fn allocate(
        &self,
        slots: &Slots,
        address: PciAddress,
        function: &Arc<dyn PciFunction>,
    ) -> Result<Vec<(Bar, u64)>, PciError> {
        let mut taken = Vec::new();
        for other in slots.functions.iter().flatten() {
            let config = lock(other.config());
            let now = config
                .decoded()
                .into_iter()
                .filter_map(|(bar, base)| Some((bar, base?)));
            taken.extend(
                now.chain(config.homes())
                    .map(|(bar, base)| (base, bar.size)),
            );
        }
        let bars = lock(function.config()).bars().to_vec();
        let mut places = Vec::new();
        for bar in bars {
            let base = self
                .windows
                .find(bar.kind, bar.size, &taken)
                .ok_or(PciError::NoRoom {
                    slot: address.slot(),
                    size: bar.size,
                })?;
            taken.push((base, bar.size));
            places.push((bar, base));
        }
        Ok(places)
    }

    fn function(&self, slot: u64) -> Option<Arc<dyn PciFunction>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let slot = usize::try_from(slot).ok()?;
        slots.functions.get(slot)?.clone()
    }

    /// Reads configuration space at an ECAM offset; ones where nothing is.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at_mut(piece_len(at, rest.len()));
            if let Some((function, register)) = self.decode(at) {
                function.config_read(register, piece);
            }
            at = at.saturating_add(piece.len() as u64);
            rest = tail;
        }
    }

    /// Writes configuration space at an ECAM offset.
    fn config_write(&self, offset: u64, data: &[u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at(piece_len(at, rest.len()));
            if let Some((function, register)) = self.decode(at) {
                function.config_write(register, piece);
                if ConfigSpace::is_decode_control(register, piece.len()) {
                    self.reroute();
                }
            }
            at = at.saturating_add(piece.len() as u64);
            rest = tail;
        }
    }

    /// Splits an ECAM offset into a function of bus 0 and its register.
    fn decode(&self, offset: u64) -> Option<(Arc<dyn PciFunction>, u16)> {
        let register = u16::try_from(offset % ECAM_FUNCTION).ok()?;
        let device_function = offset / ECAM_FUNCTION;
        if !device_function.is_multiple_of(8) {
            return None;
        }
        Some((self.function(device_function / 8)?, register))
    }
}

impl Slots {
    fn choose(&self, wanted: Option<u8>) -> Result<PciAddress, PciError> {
        let free = |slot: &u8| self.functions[usize::from(*slot)].is_none();
        match wanted {
            Some(slot) if slot == 0 || slot >= PciAddress::SLOTS => {
                Err(PciError::NoSuchSlot { slot })
            }
            Some(slot) if !free(&slot) => Err(PciError::Occupied { slot }),
            Some(slot) => Ok(PciAddress(slot)),
            None => {
                let fresh = |slot: &u8| self.used & (1 << slot) == 0;
                (1..PciAddress::SLOTS)
                    .find(|slot| free(slot) && fresh(slot))
                    .or_else(|| (1..PciAddress::SLOTS).find(free))
                    .map(PciAddress)
                    .ok_or(PciError::Full)
            }
        }
    }
}

/// How many of `len` bytes at `offset` lie in the same 32-bit register.
fn piece_len(offset: u64, len: usize) -> usize {
    usize::try_from(4 - offset % 4).map_or(len, |left| left.min(len))
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Unit for PciRoot {
    fn name(&self) -> &'static str {
        "pci"
    }

    fn start(&self) -> Result<(), StartError> {
        self.reroute();
        Ok(())
    }

    fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
        lock(&self.bridge.0).reset();
        self.reroute();
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let state = PciRootV1 {
            address: self.address.load(Ordering::Relaxed),
            used_slots: slots.used,
            bridge: lock(&self.bridge.0).save(),
        };
        Ok(vec![Section::encode(self.name(), &state)?])
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        let PciRootV1 {
            address,
            used_slots,
            bridge,
        } = set.take(self.name(), PciRootV1::SCHEMA)?.decode()?;
        if address & !LATCH_BITS != 0 {
            return Err(RestoreError::Invalid {
                schema: PciRootV1::SCHEMA,
                reason: format!("the configuration address {address:#010x} has reserved bits set"),
            });
        }
        lock(&self.bridge.0).restore(PciRootV1::SCHEMA, bridge)?;
        self.address.store(address, Ordering::Relaxed);
        self.slots
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .used |= used_slots;
        self.reroute();
        Ok(())
    }
}

/// The function in slot 0: a host bridge with neither BARs nor work. Its ids
/// are those of a plain Intel root complex, which guests know as harmless.
struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    fn new() -> Self {
        Self(Mutex::new(ConfigSpace::new(&FunctionId {
            vendor: 0x8086,
            device: 0x0d57,
            revision: 0,
            class: [0x06, 0x00, 0x00],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        })))
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.0
    }

    fn bar_read(&self, _bar: u8, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}
}

/// Ports 0xCF8 to 0xCFF: configuration mechanism #1.
struct Ports {
    root: Arc<PciRoot>,
    reset: Option<Arc<dyn BusDevice>>,
}

impl Ports {
    /// What an access to a data port means: the ECAM offset, on bus 0 only.
    fn target(&self, port: u64) -> Option<u64> {
        let address = self.root.address.load(Ordering::Relaxed);
        if address & LATCH_ENABLE == 0 || address & 0x00ff_0000 != 0 {
            return None;
        }
        let device_function = u64::from(address >> 8 & 0xff);
        let register = u64::from(address & 0xfc);
        Some(device_function * ECAM_FUNCTION + register + port.checked_sub(4)?)
    }
}

impl BusDevice for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => {
                let address = self.root.address.load(Ordering::Relaxed);
                data.copy_from_slice(&address.to_le_bytes());
            }
            (1, 1) => {
                if let Some(reset) = &self.reset {
                    reset.read(0, data);
                }
            }
            (4.., 1..=4) => {
                if let Some(target) = self.target(offset) {
                    self.root.config_read(target, data);
                }
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => {
                let address = u32::from_le_bytes([a, b, c, d]) & LATCH_BITS;
                self.root.address.store(address, Ordering::Relaxed);
            }
            (1, &[_]) => {
                if let Some(reset) = &self.reset {
                    reset.write(0, data);
                }
            }
            (4.., _) if data.len() <= 4 => {
                if let Some(target) = self.target(offset) {
                    self.root.config_write(target, data);
                }
            }
            _ => {}
        }
    }
}

/// Memory-mapped configuration space.
struct Ecam(Arc<PciRoot>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.config_read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.config_write(offset, data);
    }
}

/// One memory window.
struct Window {
    root: Arc<PciRoot>,
    base: u64,
}

impl Window {
    /// The function at `offset`, its BAR, and the offset into that.
    fn find(&self, offset: u64, len: usize) -> Option<(Arc<dyn PciFunction>, u8, u64)> {
        let address = self.base.checked_add(offset)?;
        let routes = self
            .root
            .routes
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let (route, offset) = routes.find(address, len)?;
        Some((Arc::clone(&route.function), route.bar, offset))
    }
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((function, bar, offset)) = self.find(offset, data.len()) {
            function.bar_read(bar, offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, bar, offset)) = self.find(offset, data.len()) {
            function.bar_write(bar, offset, data);
        }
    }
}

#[cfg(test)]
mod tests;
