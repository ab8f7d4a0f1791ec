//! A queue in the hands of its worker: chains out, used buffers back,
//! interrupts once per batch.
//!
//! [`Ring`] wraps the split virtqueue (Virtio 1.2, section 2.7) that a model
//! was activated with. Its owner does, in a loop:
//!
//! 1. [`Ring::quiet`], then [`Ring::take`] until it answers `false`: the ring
//!    was empty and the driver will kick from now on. An owner that looks for
//!    new entries itself for a while ([`Ring::pending`]) uses [`Ring::next`],
//!    which leaves kicks off, and [`Ring::invite`] before it sleeps;
//! 2. [`Ring::complete`] for every chain that is done, in any order;
//! 3. [`Ring::notify`] once, which interrupts the driver if it wants that;
//! 4. sleep until the doorbell rings ([`Ring::doorbell`]).
//!
//! Nothing that the driver put into memory is believed. A chain that breaks
//! the rules of the queue itself is a [`RingError`]: the owner calls
//! [`Ring::fail`], the device shows NEEDS_RESET, and the ring is not touched
//! any more. What a chain's bytes mean, and whether its buffers are memory,
//! is the model's to judge.

use std::collections::{BTreeSet, VecDeque};
use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_ALIGN_SIZE,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::device::{ActiveQueue, Notifier, StoppedQueue};
use crate::memory::GuestMap;

/// The most descriptors in one chain. A system call takes 1024 pieces of
/// memory (`UIO_MAXIOV`); two more are a header and a status. A driver keeps
/// to the limits that the configuration space states, which are below.
pub const MAX_CHAIN: u16 = 1026;

/// Bytes before the entries of the used ring, and of each entry (Virtio 1.2, 2.7.8).
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;

/// Bytes before the entries of the available ring, and of each entry (Virtio 1.2, 2.7.6).
const AVAIL_HEADER: u64 = 4;
const AVAIL_ELEMENT: u64 = 2;

/// How the driver broke the rules of a queue.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The rings' addresses or indexes are unusable.
    #[error("queue {queue}: {what} failed")]
    Rings {
        /// The queue's index.
        queue: u16,
        /// What was being done.
        what: &'static str,
        /// The reason.
        #[source]
        source: virtio_queue::Error,
    },
    /// Entries are announced in the available ring that cannot be read.
    #[error("queue {queue}: the available ring announces entries that cannot be read")]
    Available {
        /// The queue's index.
        queue: u16,
    },
    /// A chain names a descriptor past the end of its table.
    #[error("queue {queue}: descriptor {index} is not in a table of {size}")]
    Index {
        /// The queue's index.
        queue: u16,
        /// The descriptor's index.
        index: u16,
        /// How many descriptors the table has.
        size: u16,
    },
    /// A descriptor table lies outside memory.
    #[error("queue {queue}: no memory at {address:#x} for a descriptor")]
    Table {
        /// The queue's index.
        queue: u16,
        /// The guest-physical address of the descriptor.
        address: u64,
    },
    /// A chain has too many descriptors, or loops.
    #[error("queue {queue}: the chain at {head} loops or has more than {MAX_CHAIN} descriptors")]
    Length {
        /// The queue's index.
        queue: u16,
        /// The chain's head.
        head: u16,
    },
    /// A chain describes more than 2^32 - 1 bytes.
    #[error("queue {queue}: the chain at {head} describes 4 GiB or more")]
    Bytes {
        /// The queue's index.
        queue: u16,
        /// The chain's head.
        head: u16,
    },
    /// An indirect descriptor that was not negotiated, is nested, has a next
    /// descriptor, or whose table has no sensible size.
    #[error("queue {queue}: the indirect descriptor in the chain at {head} {what}")]
    Indirect {
        /// The queue's index.
        queue: u16,
        /// The chain's head.
        head: u16,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// A piece of guest memory as a descriptor states it: not checked to exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The guest-physical address of the first byte.
    pub addr: GuestAddress,
    /// Length in bytes, not 0.
    pub len: u32,
}

/// The total length of `extents` in bytes.
#[must_use]
pub fn total(extents: &[Extent]) -> u64 {
    extents.iter().map(|e| u64::from(e.len)).sum()
}

/// Copies the first bytes of `extents` into `into` and takes them off the
/// list. `false`, with the list as it was, when they are too few or not memory.
#[must_use]
pub fn take_front(view: &GuestMap, extents: &mut Vec<Extent>, into: &mut [u8]) -> bool {
    let mut filled = 0;
    let mut used = 0;
    while filled < into.len() {
        let Some(extent) = extents.get(used) else {
            return false;
        };
        let rest = into.get_mut(filled..).unwrap_or_default();
        let whole = usize::try_from(extent.len).unwrap_or(usize::MAX);
        let part = whole.min(rest.len());
        let rest = rest.get_mut(..part).unwrap_or_default();
        if view.read_slice(rest, extent.addr).is_err() {
            return false;
        }
        filled += part;
        if part < whole {
            break;
        }
        used += 1;
    }
    let before: usize = extents
        .iter()
        .take(used)
        .map(|e| usize::try_from(e.len).unwrap_or(usize::MAX))
        .sum();
    extents.drain(..used);
    if let (Some(first), Ok(cut)) = (extents.first_mut(), u32::try_from(into.len() - before))
        && cut > 0
    {
        // The bytes were just read, so the address does not wrap.
        first.addr = GuestAddress(first.addr.0.saturating_add(u64::from(cut)));
        first.len = first.len.saturating_sub(cut);
    }
    true
}

/// Copies `from` into the first bytes of `extents`, as far as they reach and
/// are memory, and returns how many bytes that was.
#[must_use]
pub fn fill_front(view: &GuestMap, extents: &[Extent], mut from: &[u8]) -> u32 {
    let mut written = 0;
    for extent in extents {
        let len = usize::try_from(extent.len).unwrap_or(usize::MAX);
        let (part, rest) = from.split_at(len.min(from.len()));
        if part.is_empty() || view.write_slice(part, extent.addr).is_err() {
            break;
        }
        written += u32::try_from(part.len()).unwrap_or(0);
        from = rest;
    }
    written
}

/// Takes the last byte off the list and returns where it is; `None` when the
/// list is empty or the address wraps.
#[must_use]
pub fn take_last_byte(extents: &mut Vec<Extent>) -> Option<GuestAddress> {
    let last = extents.last_mut()?;
    let shorter = last.len.checked_sub(1)?;
    let addr = last.addr.checked_add(u64::from(shorter))?;
    last.len = shorter;
    if shorter == 0 {
        extents.pop();
    }
    Some(addr)
}

/// A chain of descriptors, taken from the available ring. Empty descriptors
/// are left out. Made once and filled again for every chain.
#[derive(Debug, Default)]
pub struct Chain {
    /// What [`Ring::complete`] wants back.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Vec<Extent>,
    /// What the device may write, in order.
    pub writable: Vec<Extent>,
    /// All readable descriptors come before all writable ones, as they must
    /// (Virtio 1.2, 2.7.4.2).
    pub ordered: bool,
}

/// One queue, owned by the worker that serves it.
pub struct Ring {
    index: u16,
    queue: Queue,
    kick: File,
    parked: VecDeque<u16>,
    notifier: Arc<dyn Notifier>,
    indirect: bool,
    /// The driver may have been asked to kick.
    invited: bool,
    /// An entry was seen in the available ring that has not been taken.
    announced: bool,
    unannounced: bool,
    /// The chain that was taken last was the next one of the available ring.
    popped: bool,
    /// How many chains have been returned since the driver was last asked
    /// whether it wants to be interrupted.
    returned: u16,
    /// Some of them were returned together.
    together: bool,
    failed: bool,
}

impl Ring {
    /// Takes over an activated queue. `features` are the ones the driver accepted.
    #[must_use]
    pub fn new(active: ActiveQueue, features: u64, notifier: Arc<dyn Notifier>) -> Self {
        let ActiveQueue {
            index,
            queue,
            kick,
            parked,
        } = active;
        Self {
            index,
            queue,
            kick: File::from(kick),
            parked: parked.into(),
            notifier,
            indirect: features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
            invited: true,
            announced: false,
            unannounced: false,
            popped: false,
            returned: 0,
            together: false,
            failed: false,
        }
    }

    /// Gives the queue back. `in_flight` are heads that were taken and could
    /// not be completed; they go before those that were never taken.
    #[must_use]
    pub fn stop(self, in_flight: impl IntoIterator<Item = u16>) -> StoppedQueue {
        StoppedQueue {
            index: self.index,
            queue: self.queue,
            kick: OwnedFd::from(self.kick),
            parked: in_flight.into_iter().chain(self.parked).collect(),
        }
    }

    /// Puts heads that were taken back, to be taken before all others, in
    /// this order. They are unlike each other and no more than the queue's size.
    pub fn put_back(&mut self, heads: impl DoubleEndedIterator<Item = u16>) {
        for head in heads.rev() {
            self.parked.push_front(head);
        }
    }

    /// Puts back the chain that was taken last, so that the ring is as if nobody had taken it: the driver may
    /// have it out of there again, of a device that it takes out of use in part.
    pub fn untake(&mut self, head: u16) {
        if std::mem::take(&mut self.popped) {
            let before = self.queue.next_avail().wrapping_sub(1);
            self.queue.set_next_avail(before);
        } else {
            self.parked.push_front(head);
        }
    }

    /// Puts back chains that were taken, in their order, since when no other was taken. Where the ring says that they are
    /// the last ones, it is as if nobody had taken them; otherwise they are taken before all others, each once.
    pub fn untake_all(&mut self, view: &GuestMap, heads: &[u16]) {
        let count = u16::try_from(heads.len()).unwrap_or(u16::MAX);
        let first = self.queue.next_avail().wrapping_sub(count);
        let places = (0..count).map(|place| self.available(view, first.wrapping_add(place)));
        let last = self.parked.is_empty()
            && count <= self.queue.size()
            && places.eq(heads.iter().map(|head| Some(*head)));
        if last {
            self.popped = false;
            self.queue.set_next_avail(first);
            return;
        }
        // A broken driver may have offered a head twice.
        let mut seen = BTreeSet::new();
        let once: Vec<u16> = heads.iter().copied().filter(|h| seen.insert(*h)).collect();
        self.put_back(once.into_iter());
    }

    /// What the driver has made available at this index.
    fn available(&self, view: &GuestMap, index: u16) -> Option<u16> {
        let offset = AVAIL_HEADER + AVAIL_ELEMENT * u64::from(index % self.queue.size().max(1));
        let at = GuestAddress(self.queue.avail_ring()).checked_add(offset)?;
        let head = view.load::<u16>(at, Ordering::Relaxed).ok()?;
        Some(u16::from_le(head))
    }

    /// The size that the driver chose: an honest one never has more chains
    /// with the device.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether the driver broke the queue; then nothing below does anything.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// Leaves the queue alone from now on and says why (NEEDS_RESET).
    pub fn fail(&mut self, why: &dyn Error) {
        if !self.failed {
            self.failed = true;
            let mut reason = why.to_string();
            let mut cause = why.source();
            while let Some(deeper) = cause {
                reason = format!("{reason}: {deeper}");
                cause = deeper.source();
            }
            self.notifier.needs_reset(&reason);
        }
    }

    /// Becomes readable when the driver kicks; [`Ring::silence`] resets it.
    #[must_use]
    pub fn doorbell(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// Resets the doorbell, after it was seen to be readable.
    pub fn silence(&mut self) {
        // Nobody else reads, so this neither waits nor fails; and a doorbell
        // that rings on only costs a look at the ring.
        let _ = self.kick.read(&mut [0; 8]);
    }

    /// Asks the driver not to kick while the ring is being worked through.
    ///
    /// # Errors
    ///
    /// [`RingError::Rings`] when the used ring is not memory.
    pub fn quiet(&mut self, view: &GuestMap) -> Result<(), RingError> {
        if !std::mem::take(&mut self.invited) {
            return Ok(());
        }
        let quieted = if self.queue.event_idx_enabled() {
            self.pass_avail_event(view)
        } else {
            self.queue.disable_notification(view)
        };
        quieted.map_err(|e| rings(self.index, "suppressing kicks", e))
    }

    /// With EVENT_IDX a kick is asked for at an index (Virtio 1.2, 2.7.10):
    /// one that the driver has passed is reached again in 65,535 entries.
    fn pass_avail_event(&self, view: &GuestMap) -> Result<(), virtio_queue::Error> {
        let passed = self.queue.next_avail().wrapping_sub(1);
        let offset = USED_HEADER + USED_ELEMENT * u64::from(self.queue.size());
        let at = GuestAddress(self.queue.used_ring())
            .checked_add(offset)
            .ok_or(virtio_queue::Error::AddressOverflow)?;
        view.store(passed.to_le(), at, Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)
    }

    /// Takes the next chain into `chain`: parked ones first. `false` when
    /// there is none; the driver then kicks for the next one.
    ///
    /// # Errors
    ///
    /// Any [`RingError`].
    pub fn take(&mut self, view: &GuestMap, chain: &mut Chain) -> Result<bool, RingError> {
        while !self.next(view, chain)? {
            if !self.invite(view)? {
                return Ok(false);
            }
            self.quiet(view)?;
        }
        Ok(true)
    }

    /// As [`Ring::take`], but leaves it as it is whether the driver kicks.
    ///
    /// # Errors
    ///
    /// Any [`RingError`]; so when [`Ring::pending`] or [`Ring::invite`] saw
    /// an entry, and it cannot be had.
    pub fn next(&mut self, view: &GuestMap, chain: &mut Chain) -> Result<bool, RingError> {
        let announced = std::mem::take(&mut self.announced);
        match self.pop(view)? {
            Some(head) => self.walk(view, head, chain).map(|()| true),
            None if announced => Err(RingError::Available { queue: self.index }),
            None => Ok(false),
        }
    }

    /// Asks the driver to kick for the next entry. `true` when one has come
    /// before it could see that: it is to be taken without a kick.
    ///
    /// # Errors
    ///
    /// [`RingError::Rings`] when the rings are not memory.
    pub fn invite(&mut self, view: &GuestMap) -> Result<bool, RingError> {
        self.invited = true;
        let more = self.queue.enable_notification(view);
        self.announced = more.map_err(|e| rings(self.index, "asking for kicks", e))?;
        Ok(self.announced)
    }

    /// Whether there is an entry to take. Only a look; it costs no system call.
    ///
    /// # Errors
    ///
    /// [`RingError::Rings`] when the available ring is not memory.
    pub fn pending(&mut self, view: &GuestMap) -> Result<bool, RingError> {
        let index = self.queue.avail_idx(view, Ordering::Relaxed);
        let index = index.map_err(|e| rings(self.index, "reading the available ring", e))?;
        self.announced = index.0 != self.queue.next_avail();
        Ok(self.announced || !self.parked.is_empty())
    }

    /// Hands the chain with this head back; `written` bytes of its writable
    /// part, from its start, have been filled.
    ///
    /// # Errors
    ///
    /// [`RingError::Rings`] when the used ring is not memory.
    pub fn complete(&mut self, view: &GuestMap, head: u16, written: u32) -> Result<(), RingError> {
        if self.failed {
            return Ok(());
        }
        self.unannounced = true;
        self.returned = self.returned.saturating_add(1);
        self.queue
            .add_used(view, head, written)
            .map_err(|e| rings(self.index, "returning a chain", e))
    }

    /// Hands chains back, each as [`Ring::complete`] does, but so that the driver sees all or none
    /// of them. They are fewer than the queue's size.
    ///
    /// # Errors
    ///
    /// [`RingError::Rings`] when the used ring is not memory.
    pub fn complete_together(
        &mut self,
        view: &GuestMap,
        chains: &[(u16, u32)],
    ) -> Result<(), RingError> {
        let Some(((last, written), others)) = chains.split_last() else {
            return Ok(());
        };
        if !others.is_empty() && !self.failed {
            let what = "returning chains";
            let size = self.queue.size().max(1);
            let mut next = self.queue.next_used();
            for (head, written) in others {
                // Behind the index that the driver reads (Virtio 1.2, 2.7.8).
                let offset = USED_HEADER + USED_ELEMENT * u64::from(next % size);
                let element = u64::from(*head) | u64::from(*written) << 32;
                GuestAddress(self.queue.used_ring())
                    .checked_add(offset)
                    .ok_or(virtio_queue::Error::AddressOverflow)
                    .and_then(|at| {
                        view.write_obj(element.to_le(), at)
                            .map_err(virtio_queue::Error::GuestMemory)
                    })
                    .map_err(|e| rings(self.index, what, e))?;
                next = next.wrapping_add(1);
            }
            self.queue.set_next_used(next);
            let more = u16::try_from(others.len()).unwrap_or(u16::MAX);
            self.returned = self.returned.saturating_add(more);
            self.together = true;
        }
        self.complete(view, *last, *written)
    }

    /// Interrupts the driver if anything was completed since the last call
    /// and the driver wants to know.
    ///
    /// # Errors
    ///
    /// [`RingError::Rings`] when the available ring is not memory.
    pub fn notify(&mut self, view: &GuestMap) -> Result<(), RingError> {
        if self.failed || !std::mem::take(&mut self.unannounced) {
            return Ok(());
        }
        let before = self.queue.next_used();
        let wanted = self.queue.needs_notification(view);
        let wanted = wanted.map_err(|e| rings(self.index, "reading the used event", e))?
            || self.passed_used_event(view, before);
        self.returned = 0;
        self.together = false;
        if wanted && !self.interrupts_refused(view) {
            self.notifier.queue(self.index);
        }
        Ok(())
    }

    /// Whether the driver asked for an interrupt at a chain that was returned with others. The
    /// queue itself knows only of the last of them.
    fn passed_used_event(&self, view: &GuestMap, next_used: u16) -> bool {
        if !self.together || !self.queue.event_idx_enabled() {
            return false;
        }
        let offset = AVAIL_HEADER + AVAIL_ELEMENT * u64::from(self.queue.size());
        let at = GuestAddress(self.queue.avail_ring()).checked_add(offset);
        let event = at.and_then(|at| view.load::<u16>(at, Ordering::Relaxed).ok());
        event.is_none_or(|event| {
            let passed = next_used.wrapping_sub(u16::from_le(event)).wrapping_sub(1);
            passed < self.returned
        })
    }

    /// The flag that drivers without EVENT_IDX use (Virtio 1.2, 2.7.7).
    fn interrupts_refused(&self, view: &GuestMap) -> bool {
        let flags = GuestAddress(self.queue.avail_ring());
        !self.queue.event_idx_enabled()
            && view
                .load(flags, Ordering::Relaxed)
                .is_ok_and(|flags: u16| u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT != 0)
    }

    fn pop(&mut self, view: &GuestMap) -> Result<Option<u16>, RingError> {
        self.popped = false;
        if let Some(head) = self.parked.pop_front() {
            return Ok(Some(head));
        }
        let chains = self.queue.iter(view);
        let next = chains.map_err(|e| rings(self.index, "reading the available ring", e))?;
        let head = { next }.next().map(|chain| chain.head_index());
        self.popped = head.is_some();
        Ok(head)
    }

    /// Reads the chain at `head`. Every rule of Virtio 1.2, 2.7.5 that a
    /// driver can break ends here.
    fn walk(&self, view: &GuestMap, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        chain.ordered = true;
        let mut table = GuestAddress(self.queue.desc_table());
        let mut size = self.queue.size();
        let mut index = head;
        let mut nested = false;
        let mut bytes = 0_u32;
        for _ in 0..MAX_CHAIN {
            let descriptor = self.descriptor(view, table, size, index)?;
            if descriptor.refers_to_indirect_table() {
                size = self.indirect_size(head, &descriptor, nested)?;
                table = descriptor.addr();
                index = 0;
                nested = true;
                continue;
            }
            let extent = Extent {
                addr: descriptor.addr(),
                len: descriptor.len(),
            };
            bytes = bytes.checked_add(extent.len).ok_or(RingError::Bytes {
                queue: self.index,
                head,
            })?;
            if descriptor.is_write_only() {
                if extent.len > 0 {
                    chain.writable.push(extent);
                }
            } else if extent.len > 0 {
                chain.ordered &= chain.writable.is_empty();
                chain.readable.push(extent);
            }
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
        Err(RingError::Length {
            queue: self.index,
            head,
        })
    }

    fn descriptor(
        &self,
        view: &GuestMap,
        table: GuestAddress,
        size: u16,
        index: u16,
    ) -> Result<Descriptor, RingError> {
        if index >= size {
            return Err(RingError::Index {
                queue: self.index,
                index,
                size,
            });
        }
        let offset = u64::from(VRING_DESC_ALIGN_SIZE) * u64::from(index);
        table
            .checked_add(offset)
            .and_then(|addr| view.read_obj(addr).ok())
            .ok_or(RingError::Table {
                queue: self.index,
                address: table.0.wrapping_add(offset),
            })
    }

    fn indirect_size(
        &self,
        head: u16,
        descriptor: &Descriptor,
        nested: bool,
    ) -> Result<u16, RingError> {
        let entries = descriptor.len() / VRING_DESC_ALIGN_SIZE;
        let what = if !self.indirect {
            "was not negotiated"
        } else if nested {
            "lies in an indirect table"
        } else if descriptor.has_next() {
            "has a next descriptor"
        } else if entries == 0 || !descriptor.len().is_multiple_of(VRING_DESC_ALIGN_SIZE) {
            "has a table of no whole entries"
        } else {
            // Entries past the longest chain are out of reach anyway.
            return Ok(u16::try_from(entries).unwrap_or(u16::MAX));
        };
        Err(RingError::Indirect {
            queue: self.index,
            head,
            what,
        })
    }
}

fn rings(queue: u16, what: &'static str, source: virtio_queue::Error) -> RingError {
    RingError::Rings {
        queue,
        what,
        source,
    }
}

#[cfg(test)]
mod tests;
