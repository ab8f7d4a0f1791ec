//! The guest's memory as migrations read and write it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use migration::pages::Ram;
use migration::transport::channel::RamSource;
use migration::transport::pages::PageSink;
use virtio::memory::GuestMap;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile, VolatileMemoryError,
    WriteVolatile,
};

use super::link::late;
use crate::machine::snapshot::SnapshotRam;
use crate::memory::missing::Missing;
use crate::memory::restored::check;

impl RamSource for SnapshotRam {
    fn ranges(&self) -> Vec<(u64, u64)> {
        Ram::ranges(self)
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        Ram::read(self, address, bytes)
    }

    fn absent(&self, address: u64, pages: &mut [bool]) {
        Ram::absent(self, address, pages);
    }

    fn send(&self, address: u64, len: u64, mut socket: BorrowedFd<'_>) -> io::Result<()> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let slice = self.map().get_slice(GuestAddress(address), len);
        let slice = slice.map_err(io::Error::other)?;
        socket.write_all_volatile(&slice).map_err(of_socket)?;
        check(slice.ptr_guard().as_ptr().addr())
    }
}

/// What went wrong between memory and a socket, as the socket says it.
fn of_socket(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => late(error),
        error => io::Error::other(error),
    }
}

/// The memory of a guest that comes, which reads as zeros where nothing has come yet.
pub struct Arriving {
    map: GuestMap,
    /// What has come, a bit for each page of each range: zeros that come for other pages cost nothing.
    come: Vec<(u64, Vec<AtomicU64>)>,
    /// What comes while the guest runs.
    missing: RwLock<Option<Arc<Missing>>>,
}

impl Arriving {
    /// From here on pages come while the guest runs, or do not.
    pub fn follow(&self, missing: Option<Arc<Missing>>) {
        *self.missing.write().unwrap_or_else(PoisonError::into_inner) = missing;
    }

    fn missing(&self) -> Option<Arc<Missing>> {
        let missing = self.missing.read();
        missing.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The memory of `map`, which nobody else writes to.
    #[must_use]
    pub fn new(map: GuestMap) -> Self {
        let words = |len: u64| len.div_ceil(PAGE as u64).div_ceil(64);
        let range = |(start, len): (u64, u64)| {
            let words = (0..words(len)).map(|_| AtomicU64::new(0));
            (start, words.collect())
        };
        let ranges = map
            .iter()
            .map(|region| (region.start_addr().0, region.len()));
        Self {
            come: ranges.map(range).collect(),
            missing: RwLock::default(),
            map,
        }
    }

    fn has_come(&self, address: u64, len: u64) {
        for at in (address..address.saturating_add(len)).step_by(PAGE) {
            if let Some((word, bit)) = self.page(at) {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// The word and the bit of the page at `address`.
    fn page(&self, address: u64) -> Option<(&AtomicU64, u64)> {
        let index = self.come.partition_point(|(start, _)| *start <= address);
        let (start, words) = self.come.get(index.checked_sub(1)?)?;
        let page = address.checked_sub(*start)? / PAGE as u64;
        let word = words.get(usize::try_from(page / 64).ok()?)?;
        Some((word, 1 << (page % 64)))
    }
}

impl PageSink for Arriving {
    fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        if let Some(missing) = self.missing() {
            missing.fill(address, bytes)?;
            self.has_come(address, bytes.len() as u64);
            return Ok(());
        }
        let written = self.map.write_slice(bytes, GuestAddress(address));
        written.map_err(io::Error::other)?;
        self.has_come(address, bytes.len() as u64);
        Ok(())
    }

    fn receive(&self, address: u64, len: u64, mut socket: BorrowedFd<'_>) -> io::Result<()> {
        if self.missing().is_some() {
            // The guest runs: it may not see half of a page.
            let what = "a page goes straight while the guest runs";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let count = usize::try_from(len).unwrap_or(usize::MAX);
        let slice = self.map.get_slice(GuestAddress(address), count);
        let mut slice = slice.map_err(io::Error::other)?;
        self.has_come(address, len);
        socket.read_exact_volatile(&mut slice).map_err(of_socket)
    }

    fn zero(&self, address: u64, len: u64) -> io::Result<()> {
        if let Some(missing) = self.missing() {
            return missing.zero(address, len);
        }
        for at in (address..address.saturating_add(len)).step_by(PAGE) {
            let outside = || io::Error::from(io::ErrorKind::InvalidInput);
            let (word, bit) = self.page(at).ok_or_else(outside)?;
            if word.load(Ordering::Relaxed) & bit != 0 {
                self.write(at, &[0; PAGE])?;
            }
        }
        Ok(())
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        if self.missing().is_some() {
            // Nothing differs from what the guest may have changed since.
            return Err(io::ErrorKind::Unsupported.into());
        }
        let read = self.map.read_slice(bytes, GuestAddress(address));
        read.map_err(io::Error::other)
    }
}

/// Of a peer that has no pages to send.
#[derive(Clone, Copy, Debug)]
pub struct NoMemory;

impl PageSink for NoMemory {
    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn zero(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A page, in bytes.
const PAGE: usize = 4096;

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddressSpace;

    use super::*;
    use crate::memory::{GuestRam, RamSpec};

    #[test]
    fn pages_arrive_and_zeros_take_the_place_of_others() {
        let ram = GuestRam::new(&RamSpec {
            size: 4 << 20,
            shared: false,
            huge_page: None,
            thp: Some(false),
            prefault: false,
        });
        let ram = ram.unwrap();
        let arriving = Arriving::new(GuestMap::clone(&ram.memory().memory()));
        arriving.write(0x2000, &[7; PAGE]).unwrap();
        arriving.zero(0, 2 << 20).unwrap();
        let mut page = [1; PAGE];
        arriving.read(0x2000, &mut page).unwrap();
        assert_eq!(page, [0; PAGE]);
        arriving.write(0x3000, &[8; PAGE]).unwrap();
        arriving.read(0x3000, &mut page).unwrap();
        assert_eq!(page, [8; PAGE]);
        for (address, len) in [(4 << 20, 4096), (u64::MAX - 8191, 4096)] {
            assert!(arriving.zero(address, len).is_err());
            assert!(arriving.write(address, &[0; PAGE]).is_err());
        }
    }
}
