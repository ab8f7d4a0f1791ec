//! An address space (port I/O or memory-mapped I/O) and the devices in it.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

/// A device that answers accesses in a range of a bus.
///
/// Called by vCPU threads, concurrently. Accesses are at most 8 bytes and lie
/// wholly inside the device's range. Neither method may block on I/O.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the start of the range.
    /// `data` holds ones (an empty bus) beforehand.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be put on a bus.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or wraps around the end of the address space.
    #[error("the range {base:#x} of {len:#x} bytes is empty or wraps")]
    Range {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range overlaps one that is there.
    #[error("the range {base:#x} of {len:#x} bytes overlaps the one at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// Where the range in the way starts.
        other: u64,
    },
}

struct Entry {
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// Routes accesses to devices by address. Cheap to read, rarely written.
#[derive(Default)]
pub struct Bus {
    entries: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    /// Puts `device` at `base..base + len`.
    ///
    /// # Errors
    ///
    /// [`BusError`] when the range is no range or is taken.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let Some(last) = len.checked_sub(1).and_then(|l| base.checked_add(l)) else {
            return Err(BusError::Range { base, len });
        };
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((&other, entry)) = entries.range(..=last).next_back()
            && entry.len > base.saturating_sub(other)
        {
            return Err(BusError::Overlap { base, len, other });
        }
        entries.insert(base, Entry { len, device });
        Ok(())
    }

    /// Takes away the range that starts at `base`; `false` when there is none.
    pub fn remove(&self, base: u64) -> bool {
        self.entries
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&base)
            .is_some()
    }

    /// The device whose range holds all of `address..address + len`, and the
    /// offset into it.
    fn find(&self, address: u64, len: usize) -> Option<(Arc<dyn BusDevice>, u64)> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let (&base, entry) = entries.range(..=address).next_back()?;
        let offset = address.checked_sub(base)?;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= entry.len).then(|| (Arc::clone(&entry.device), offset))
    }

    /// Reads; `false`, with all ones in `data`, when nothing answers there.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Writes; `false` when nothing answers there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Probe(Mutex<Vec<(u64, usize)>>);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
            data.fill(0);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_with_its_offset() {
        let bus = Bus::default();
        let probe = Arc::new(Probe::default());
        bus.insert(0x100, 8, probe.clone()).unwrap();
        let mut data = [0; 4];
        assert!(bus.read(0x104, &mut data));
        assert!(bus.write(0x100, &data));
        assert_eq!(*probe.0.lock().unwrap(), [(4, 4), (0, 4)]);
    }

    #[test]
    fn an_access_that_no_device_holds_whole_reads_ones() {
        let bus = Bus::default();
        bus.insert(0x100, 8, Arc::new(Probe::default())).unwrap();
        for address in [0, 0xff, 0x105, 0x108, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(address, &mut data), "{address:#x} answered");
            assert_eq!(data, [0xff; 4]);
        }
    }

    #[test]
    fn overlapping_and_wrapping_ranges_are_refused() {
        let bus = Bus::default();
        let put = |base, len| bus.insert(base, len, Arc::new(Probe::default()));
        put(0x100, 0x10).unwrap();
        assert_eq!(
            put(0x10f, 1),
            Err(BusError::Overlap {
                base: 0x10f,
                len: 1,
                other: 0x100
            })
        );
        assert_eq!(
            put(0xf0, 0x11),
            Err(BusError::Overlap {
                base: 0xf0,
                len: 0x11,
                other: 0x100
            })
        );
        assert_eq!(put(0, 0), Err(BusError::Range { base: 0, len: 0 }));
        assert_eq!(
            put(u64::MAX, 2),
            Err(BusError::Range {
                base: u64::MAX,
                len: 2
            })
        );
        put(0xf0, 0x10).unwrap();
        put(0x110, 1).unwrap();
        assert!(bus.remove(0x100));
        put(0x104, 4).unwrap();
    }
}
