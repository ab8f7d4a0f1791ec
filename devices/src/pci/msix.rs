//! MSI-X: the table, the pending bits and the signals (PCI Local Bus 3.0, 6.8.2).
//!
//! A function owns one [`Msix`]. Its workers call [`Msix::signal`], which takes
//! no lock while the entry is open. vCPU threads program the table through the
//! function's BAR; each entry that becomes open (function enabled, function
//! and entry unmasked) has its message routed on the host, and a signal that
//! came meanwhile is sent.
//!
//! A masked entry keeps its route: a signal that a worker has already begun
//! may still arrive, as on hardware, but cannot get lost.
//!
//! Signals may also come from elsewhere, by an eventfd ([`Msix::trigger`]). Nobody asks the table
//! then, so the host holds them back while the entry is not open.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::RestoreError;
use serde::{Deserialize, Serialize};

use crate::LogLimit;
use crate::irq::{MsiAllocator, MsiError, MsiMessage, MsiVector};

/// The capability's id.
pub const CAPABILITY_ID: u8 = 0x11;
/// Bytes of one table entry.
pub const ENTRY_SIZE: u64 = 16;
/// The most vectors that a function can have.
pub const MAX_VECTORS: u16 = 2048;

/// Message control (6.8.2.3).
const CONTROL_MASK_ALL: u16 = 1 << 14;
const CONTROL_ENABLE: u16 = 1 << 15;
/// Vector control: the entry is masked.
const ENTRY_MASKED: u32 = 1;

static REFUSED: LogLimit = LogLimit::new();

struct Vector {
    host: Arc<dyn MsiVector>,
    /// The entry is open and routed. Changed under the table's lock only.
    open: AtomicBool,
}

#[derive(Clone, Copy)]
struct Entry {
    message: MsiMessage,
    masked: bool,
    /// What the host has, if anything.
    routed: Option<MsiMessage>,
    /// Somebody else may signal it.
    triggered: bool,
    /// The host holds such signals back.
    held: bool,
}

impl Entry {
    const POWER_ON: Self = Self {
        message: MsiMessage {
            address: 0,
            data: 0,
        },
        masked: true,
        routed: None,
        triggered: false,
        held: false,
    };
}

struct Table {
    enabled: bool,
    masked: bool,
    entries: Vec<Entry>,
    pending: Vec<bool>,
}

/// The saved form of one table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixEntryV1 {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// The entry is masked.
    pub masked: bool,
    /// A signal waits for the entry to open.
    pub pending: bool,
}

/// The saved form of an [`Msix`], part of its function's section. The enable
/// and mask bits of the function are in its configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixV1 {
    /// One for each vector.
    pub entries: Vec<MsixEntryV1>,
}

/// A function's message-signalled interrupts.
pub struct Msix {
    vectors: Vec<Vector>,
    table: Mutex<Table>,
}

impl Msix {
    /// Makes `count` vectors, masked, with the function disabled.
    ///
    /// # Errors
    ///
    /// [`MsiError::Exhausted`] when the machine has no routes left, or `count`
    /// is 0 or above [`MAX_VECTORS`].
    pub fn new(allocator: &dyn MsiAllocator, count: u16) -> Result<Self, MsiError> {
        if count == 0 || count > MAX_VECTORS {
            return Err(MsiError::Exhausted { wanted: count });
        }
        let vectors: Vec<_> = allocator
            .allocate(count)?
            .into_iter()
            .map(|host| Vector {
                host,
                open: AtomicBool::new(false),
            })
            .collect();
        if vectors.len() != usize::from(count) {
            return Err(MsiError::Exhausted { wanted: count });
        }
        let table = Table {
            enabled: false,
            masked: false,
            entries: vec![Entry::POWER_ON; vectors.len()],
            pending: vec![false; vectors.len()],
        };
        Ok(Self {
            vectors,
            table: Mutex::new(table),
        })
    }

    /// How many vectors there are.
    #[must_use]
    pub fn count(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(MAX_VECTORS)
    }

    /// The capability after its two-byte header, for a table at `table` and
    /// pending bits at `pba`, byte offsets into `bar`, both multiples of 8.
    #[must_use]
    pub fn capability(&self, bar: u8, table: u32, pba: u32) -> [u8; 10] {
        let mut body = [0; 10];
        let [c0, c1] = self.count().saturating_sub(1).to_le_bytes();
        let place = |offset: u32| ((offset & !7) | u32::from(bar & 7)).to_le_bytes();
        let [t0, t1, t2, t3] = place(table);
        let [p0, p1, p2, p3] = place(pba);
        body.copy_from_slice(&[c0, c1, t0, t1, t2, t3, p0, p1, p2, p3]);
        body
    }

    /// The capability's writable bits, for
    /// [`ConfigSpace::add_capability`](super::ConfigSpace::add_capability).
    pub const CAPABILITY_WRITABLE: [u8; 2] = (CONTROL_MASK_ALL | CONTROL_ENABLE).to_le_bytes();

    /// The message control register has been written (or restored) to `control`.
    pub fn set_control(&self, control: u16) {
        let mut table = self.lock();
        let enabled = control & CONTROL_ENABLE != 0;
        let masked = control & CONTROL_MASK_ALL != 0;
        if (table.enabled, table.masked) == (enabled, masked) {
            return;
        }
        (table.enabled, table.masked) = (enabled, masked);
        self.refresh_all(&mut table);
    }

    /// Sends the interrupt of `vector`, or marks it as pending while it is
    /// masked. Without a function that is enabled, or such a vector, nothing happens.
    /// Any thread may call it.
    pub fn signal(&self, vector: u16) {
        let index = usize::from(vector);
        let Some(entry) = self.vectors.get(index) else {
            return;
        };
        if entry.open.load(Ordering::Acquire) {
            entry.host.signal();
            return;
        }
        let mut table = self.lock();
        if entry.open.load(Ordering::Acquire) {
            entry.host.signal();
        } else if table.enabled
            && let Some(pending) = table.pending.get_mut(index)
        {
            *pending = true;
        }
    }

    /// Another descriptor of an eventfd by which somebody else signals `vector`; what it has while the entry is
    /// masked is pending. `None` when there is no such vector, or the host has no such way.
    ///
    /// # Errors
    ///
    /// [`MsiError::Host`].
    pub fn trigger(&self, vector: u16) -> Result<Option<OwnedFd>, MsiError> {
        let index = usize::from(vector);
        let mut table = self.lock();
        let (Some(vector), Some(entry)) = (self.vectors.get(index), table.entries.get_mut(index))
        else {
            return Ok(None);
        };
        let Some(trigger) = vector.host.trigger()? else {
            return Ok(None);
        };
        entry.triggered = true;
        hold(vector, entry, !vector.open.load(Ordering::Acquire));
        Ok(Some(trigger))
    }

    /// Reads the table at byte `offset`. Anything but an aligned access of 4
    /// or 8 bytes inside it reads as ones.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !aligned(offset, data.len()) {
            return;
        }
        let table = self.lock();
        for (i, word) in data.chunks_exact_mut(4).enumerate() {
            let Some((index, field)) = locate(offset, i) else {
                return;
            };
            let Some(entry) = table.entries.get(index) else {
                return;
            };
            let [low, high] = halves(entry.message.address);
            let value = match field {
                0 => low,
                1 => high,
                2 => entry.message.data,
                _ => u32::from(entry.masked),
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Writes the table at byte `offset`. Anything but an aligned access of 4
    /// or 8 bytes inside it is ignored.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        if !aligned(offset, data.len()) {
            return;
        }
        let mut table = self.lock();
        for (i, word) in data.chunks_exact(4).enumerate() {
            let (Some((index, field)), Ok(word)) = (locate(offset, i), word.try_into()) else {
                return;
            };
            let Some(entry) = table.entries.get_mut(index) else {
                return;
            };
            let value = u32::from_le_bytes(word);
            let [low, high] = halves(entry.message.address);
            match field {
                0 => entry.message.address = join(value & !3, high),
                1 => entry.message.address = join(low, value),
                2 => entry.message.data = value,
                _ => entry.masked = value & ENTRY_MASKED != 0,
            }
            self.refresh(&mut table, index);
        }
    }

    /// Reads the pending bits at byte `offset`, aligned 4 or 8 bytes at a
    /// time; everything else, and what lies past the last vector, reads as zero.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if !aligned(offset, data.len()) {
            return;
        }
        let Ok(first) = usize::try_from(offset) else {
            return;
        };
        let table = self.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            let start = first.saturating_add(i).saturating_mul(8);
            let end = start.saturating_add(8).min(self.vectors.len());
            *byte = (start..end).enumerate().fold(0, |byte, (bit, index)| {
                byte | u8::from(self.is_pending(&table, index)) << bit
            });
        }
    }

    /// Masks and forgets everything, and disables the function.
    pub fn reset(&self) {
        let mut table = self.lock();
        (table.enabled, table.masked) = (false, false);
        self.refresh_all(&mut table);
        for (vector, entry) in self.vectors.iter().zip(&mut table.entries) {
            hold(vector, entry, false);
            *entry = Entry::POWER_ON;
        }
    }

    /// Takes the saved form.
    #[must_use]
    pub fn save(&self) -> MsixV1 {
        let table = self.lock();
        let entries = table.entries.iter().enumerate();
        MsixV1 {
            entries: entries
                .map(|(index, entry)| MsixEntryV1 {
                    address: entry.message.address,
                    data: entry.message.data,
                    masked: entry.masked,
                    pending: self.is_pending(&table, index),
                })
                .collect(),
        }
    }

    /// Puts saved entries back; `control` is the restored message control
    /// register. Open entries are routed.
    ///
    /// # Errors
    ///
    /// [`RestoreError::Invalid`], naming `schema`, when the number of vectors differs.
    pub fn restore(
        &self,
        schema: &'static str,
        state: MsixV1,
        control: u16,
    ) -> Result<(), RestoreError> {
        let MsixV1 { entries } = state;
        if entries.len() != self.vectors.len() {
            return Err(RestoreError::Invalid {
                schema,
                reason: format!(
                    "{} MSI-X vectors are saved, this function has {}",
                    entries.len(),
                    self.vectors.len()
                ),
            });
        }
        self.reset();
        {
            let mut table = self.lock();
            for (index, saved) in entries.into_iter().enumerate() {
                let MsixEntryV1 {
                    address,
                    data,
                    masked,
                    pending,
                } = saved;
                table.entries[index] = Entry {
                    message: MsiMessage {
                        address: address & !3,
                        data,
                    },
                    masked,
                    ..Entry::POWER_ON
                };
                table.pending[index] = pending;
            }
        }
        self.set_control(control);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_pending(&self, table: &Table, index: usize) -> bool {
        let entry = table.entries.get(index);
        let waits = |vector: &Vector| {
            let held = entry.is_some_and(|entry| entry.held);
            table.enabled && held && vector.host.is_waiting()
        };
        table.pending.get(index).is_some_and(|pending| *pending)
            || self.vectors.get(index).is_some_and(waits)
    }

    fn refresh_all(&self, table: &mut Table) {
        for index in 0..self.vectors.len() {
            self.refresh(table, index);
        }
    }

    /// Brings vector `index` in line with the table.
    fn refresh(&self, table: &mut Table, index: usize) {
        let Table {
            enabled,
            masked,
            entries,
            pending,
        } = table;
        let (Some(vector), Some(entry), Some(pending)) = (
            self.vectors.get(index),
            entries.get_mut(index),
            pending.get_mut(index),
        ) else {
            return;
        };
        if !*enabled || *masked || entry.masked {
            vector.open.store(false, Ordering::Release);
            hold(vector, entry, true);
            if !*enabled {
                *pending = false;
                if entry.routed.take().is_some() {
                    report(vector.host.route(None));
                }
            }
            return;
        }
        if entry.routed != Some(entry.message) {
            let routed = report(vector.host.route(Some(entry.message)));
            entry.routed = routed.then_some(entry.message);
            if !routed {
                // Not to leave the previous message attached.
                report(vector.host.route(None));
            }
        }
        let open = entry.routed.is_some();
        vector.open.store(open, Ordering::Release);
        hold(vector, entry, !open);
        if open && std::mem::take(pending) {
            vector.host.signal();
        }
    }
}

/// Has the host hold back what others signal, or not.
fn hold(vector: &Vector, entry: &mut Entry, held: bool) {
    if entry.triggered && entry.held != held && report(vector.host.hold(held)) {
        entry.held = held;
    }
}

fn report(result: Result<(), MsiError>) -> bool {
    if let Err(error) = &result
        && let Some(suppressed) = REFUSED.allow()
    {
        tracing::warn!(%error, suppressed, "an MSI-X message could not be routed");
    }
    result.is_ok()
}

fn aligned(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

/// Entry and field (a 32-bit word) of the `word`th word after `offset`.
fn locate(offset: u64, word: usize) -> Option<(usize, u64)> {
    let at = offset.checked_add(4 * word as u64)?;
    let index = usize::try_from(at / ENTRY_SIZE).ok()?;
    Some((index, at % ENTRY_SIZE / 4))
}

fn halves(address: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
mod tests;
