//! The available and used rings that a peer sees.
//!
//! They lie in one sealed memory file that is shared with the peer and nobody else. What is read
//! from it is the peer's word, to be checked.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use virtio_bindings::virtio_ring::VRING_USED_F_NO_NOTIFY;
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Bytes before the entries of either ring (Virtio 1.2, 2.7.6 and 2.7.8).
const HEADER: usize = 4;
const AVAIL_ELEMENT: usize = 2;
const USED_ELEMENT: usize = 8;
/// Where the index of either ring is.
const INDEX: usize = 2;
/// A cache line: what the two sides write is apart.
const ALIGN: usize = 64;
const PAGE: usize = 4096;

/// The memory of all rings of a device.
pub(super) struct RingMemory {
    region: MmapRegion,
}

impl RingMemory {
    /// Memory for rings of these sizes, and the rings, both empty.
    ///
    /// # Errors
    ///
    /// The host's, when it has no memory.
    pub fn new(sizes: &[u16]) -> io::Result<(Arc<Self>, Vec<PeerRing>)> {
        let mut len = 0_usize;
        let mut places = Vec::new();
        for size in sizes {
            let entries = usize::from(*size);
            let avail = len;
            let used = avail + (HEADER + AVAIL_ELEMENT * (entries + 1)).next_multiple_of(ALIGN);
            len = used + (HEADER + USED_ELEMENT * entries + 2).next_multiple_of(ALIGN);
            places.push((*size, avail, used));
        }
        let len = len.max(1).next_multiple_of(PAGE);
        let file = memfd_create(
            "peer-rings",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?;
        ftruncate(&file, len as u64)?;
        // A peer that made it shorter would have this process killed at its next look.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let file = FileOffset::new(file.into(), 0);
        let region = MmapRegion::from_file(file, len).map_err(io::Error::other)?;
        let memory = Arc::new(Self { region });
        let rings = places.into_iter().map(|(size, avail, used)| PeerRing {
            memory: Arc::clone(&memory),
            size,
            avail,
            used,
            next_avail: 0,
            next_used: 0,
            given: vec![0; size.into()],
        });
        let rings = rings.collect();
        Ok((memory, rings))
    }

    /// Where it is mapped here: the address by which the peer is told of it.
    pub fn address(&self) -> u64 {
        self.region.as_ptr() as u64
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.region.size() as u64
    }

    /// The file that it is.
    pub fn file(&self) -> Option<&FileOffset> {
        self.region.file_offset()
    }

    fn load<T: AtomicAccess + Default>(&self, at: usize, order: Ordering) -> T {
        // All places were made inside the region.
        self.region
            .as_volatile_slice()
            .load(at, order)
            .unwrap_or_default()
    }

    fn store<T: AtomicAccess>(&self, at: usize, value: T, order: Ordering) {
        // As above.
        let _ = self.region.as_volatile_slice().store(value, at, order);
    }
}

/// The rings of one queue.
pub(super) struct PeerRing {
    memory: Arc<RingMemory>,
    size: u16,
    avail: usize,
    used: usize,
    next_avail: u16,
    next_used: u16,
    /// The heads in the available ring, as they were put there.
    given: Vec<u16>,
}

/// What a peer says it has done with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Returned {
    /// The chain's head.
    pub head: u32,
    /// How many bytes it has written.
    pub written: u32,
}

impl PeerRing {
    /// How many entries it has.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Addresses of the available and the used ring, as [`RingMemory::address`] is.
    pub fn addresses(&self) -> (u64, u64) {
        let base = self.memory.address();
        (base + self.avail as u64, base + self.used as u64)
    }

    /// How many chains have been taken out of the used ring, modulo 2^16.
    pub fn returned(&self) -> u16 {
        self.next_used
    }

    /// Puts a head into the available ring; the peer sees it after [`PeerRing::publish`]. There are
    /// never more heads with the peer than the ring has entries.
    pub fn push(&mut self, head: u16) {
        let entry = usize::from(self.next_avail % self.size.max(1));
        let at = self.avail + HEADER + AVAIL_ELEMENT * entry;
        self.memory.store(at, head.to_le(), Ordering::Relaxed);
        if let Some(given) = self.given.get_mut(entry) {
            *given = head;
        }
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Whether another peer can go on with it: the heads are there that were put in, and all that was returned has been taken out. Whoever
    /// had it before may have written anything.
    pub fn is_sound(&self) -> bool {
        let index = |ring: usize| {
            let index: u16 = self.memory.load(ring + INDEX, Ordering::Acquire);
            u16::from_le(index)
        };
        let out = self.next_avail.wrapping_sub(self.next_used);
        let is_there = |place: u16| {
            let entry = usize::from(place % self.size.max(1));
            let at = self.avail + HEADER + AVAIL_ELEMENT * entry;
            let head: u16 = self.memory.load(at, Ordering::Relaxed);
            self.given.get(entry) == Some(&u16::from_le(head))
        };
        index(self.avail) == self.next_avail
            && index(self.used) == self.next_used
            && out <= self.size
            && (0..out).all(|nth| is_there(self.next_used.wrapping_add(nth)))
    }

    /// Takes back that the last peer wanted no kicks: the next one says so itself.
    pub fn renew(&self) {
        self.memory.store(self.used, 0_u16, Ordering::Relaxed);
    }

    /// Shows the peer what was put in. `true` when it wants to be kicked.
    pub fn publish(&mut self) -> bool {
        let index = self.next_avail.to_le();
        self.memory
            .store(self.avail + INDEX, index, Ordering::Release);
        // The peer looks for more after it has asked to be kicked (2.7.13.4.1).
        fence(Ordering::SeqCst);
        let flags: u16 = self.memory.load(self.used, Ordering::Relaxed);
        u32::from(u16::from_le(flags)) & VRING_USED_F_NO_NOTIFY == 0
    }

    /// The next chain that the peer has returned.
    pub fn pop(&mut self) -> Option<Returned> {
        let index: u16 = self.memory.load(self.used + INDEX, Ordering::Acquire);
        if u16::from_le(index) == self.next_used {
            return None;
        }
        let entry = usize::from(self.next_used % self.size.max(1));
        let at = self.used + HEADER + USED_ELEMENT * entry;
        self.next_used = self.next_used.wrapping_add(1);
        let head: u32 = self.memory.load(at, Ordering::Relaxed);
        let written: u32 = self.memory.load(at + 4, Ordering::Relaxed);
        Some(Returned {
            head: u32::from_le(head),
            written: u32::from_le(written),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_are_sound_while_all_in_them_is_what_was_put_in_and_taken_out() {
        let (memory, mut parts) = RingMemory::new(&[4]).unwrap();
        let mut ring = parts.remove(0);
        let put = |at: usize, value: u16| memory.store(at, value.to_le(), Ordering::Relaxed);
        assert!(ring.is_sound());
        for round in 0..3_u16 {
            for head in [3, 0, 2] {
                ring.push(head);
            }
            assert!(!ring.is_sound(), "it has not been shown yet");
            assert!(ring.publish());
            assert!(ring.is_sound());
            let last = ring.avail + HEADER + AVAIL_ELEMENT * usize::from((3 * round + 2) % 4);
            for (at, wrong, right) in [
                (last, 1, 2),
                (ring.avail + INDEX, 3 * round + 4, 3 * round + 3),
                (ring.used + INDEX, 3 * round + 1, 3 * round),
            ] {
                put(at, wrong);
                assert!(!ring.is_sound(), "{at} {round}");
                put(at, right);
                assert!(ring.is_sound());
            }
            put(ring.used + INDEX, 3 * round + 3);
            assert_eq!(std::iter::from_fn(|| ring.pop()).count(), 3);
            // Entries that have been returned may hold anything.
            put(last, 77);
            assert!(ring.is_sound());
        }
        put(ring.used, u16::try_from(VRING_USED_F_NO_NOTIFY).unwrap());
        ring.push(1);
        assert!(!ring.publish());
        ring.renew();
        assert!(ring.publish());
    }
}
