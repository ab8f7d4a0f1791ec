//! The driver's side of a device, for tests: memory, a ring to put chains
//! into, and a notifier that passes on what it is told.

use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Activation, ActiveQueue, DiskReport, Notifier, StoppedQueue, VirtioDevice};
use crate::memory::{GuestMap, GuestMemory};
use crate::worker::{Patience, borrow};

/// Where one region of memory ends and the next begins, in bytes.
pub const SEAM: u64 = 1 << 20;
/// Where memory ends.
pub const END: u64 = 2 << 20;
/// Where tests put data; rings are below.
pub const DATA: u64 = 0x4_0000;

/// Nothing here takes long; this ends a test that would hang.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Two regions, one after the other.
pub fn memory() -> GuestMemory {
    let len = usize::try_from(SEAM).unwrap();
    let ranges = [(GuestAddress(0), len), (GuestAddress(SEAM), len)];
    GuestMemory::new(GuestMap::from_ranges(&ranges).unwrap())
}

pub fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Opens no network.
pub struct NoNetworks;

impl net::Opener for NoNetworks {
    fn network(&self, _request: &net::Request) -> Result<Box<dyn net::Backend>, net::BackendError> {
        Err(net::BackendError::Refused)
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum Notice {
    Queue(u16),
    Config,
    Reset(String),
    Disk(DiskReport),
    Balloon(u64),
}

struct Notices(Mutex<Sender<Notice>>, Patience);

impl Notices {
    fn send(&self, notice: Notice) {
        // A test that has ended does not listen.
        let _ = self.0.lock().unwrap().send(notice);
    }
}

impl Notifier for Notices {
    fn queue(&self, queue: u16) {
        self.send(Notice::Queue(queue));
    }

    fn config_changed(&self) {
        self.send(Notice::Config);
    }

    fn needs_reset(&self, reason: &str) {
        self.send(Notice::Reset(reason.to_owned()));
    }

    fn disk_report(&self, report: &DiskReport) {
        self.send(Notice::Disk(report.clone()));
    }

    fn balloon_reached(&self, actual: u64) {
        self.send(Notice::Balloon(actual));
    }

    fn patience(&self) -> Option<&Patience> {
        Some(&self.1)
    }
}

pub fn notices() -> (Arc<dyn Notifier>, Receiver<Notice>) {
    let (sender, receiver) = channel();
    let notices = Notices(Mutex::new(sender), Patience::default());
    (Arc::new(notices), receiver)
}

/// A descriptor as tests write it: address, length, writable by the device.
pub type Piece = (u64, u32, bool);

/// A driver's side of one queue. Descriptors are handed out in a circle; a
/// test never has more than fit.
pub struct Driver {
    pub memory: GuestMemory,
    pub index: u16,
    pub size: u16,
    table: u64,
    avail: u64,
    used: u64,
    next_descriptor: u16,
    offered: u16,
    seen: u16,
    doorbell: EventFd,
}

impl Driver {
    /// Rings for queue `index`, which lie in the page `index` pages from 0x1000.
    pub fn new(memory: &GuestMemory, index: u16, size: u16) -> Self {
        let table = 0x1000 * (u64::from(index) * 4 + 1);
        Self {
            memory: memory.clone(),
            index,
            size,
            table,
            avail: table + 0x2000,
            used: table + 0x3000,
            next_descriptor: 0,
            offered: 0,
            seen: 0,
            doorbell: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    /// The device's side, as the transport hands it over at DRIVER_OK.
    pub fn activate(&self) -> ActiveQueue {
        self.activate_with(false)
    }

    pub fn activate_with(&self, event_idx: bool) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(u32::try_from(self.table).unwrap()), None);
        queue.set_avail_ring_address(Some(u32::try_from(self.avail).unwrap()), None);
        queue.set_used_ring_address(Some(u32::try_from(self.used).unwrap()), None);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory.memory()));
        ActiveQueue {
            index: self.index,
            queue,
            kick: borrow(&self.doorbell).try_clone_to_owned().unwrap(),
            parked: Vec::new(),
        }
    }

    pub fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        let view = self.memory.memory();
        view.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.memory().read_obj(GuestAddress(at)).unwrap()
    }

    pub fn put_bytes(&self, at: u64, bytes: &[u8]) {
        let view = self.memory.memory();
        view.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let view = self.memory.memory();
        view.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Writes a descriptor into a table at `table`.
    pub fn describe(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        self.put(at, addr);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    pub fn table(&self) -> u64 {
        self.table
    }

    /// Writes a chain into the table and returns its head.
    pub fn chain(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        for (i, (addr, len, writable)) in pieces.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let more = i + 1 < pieces.len();
            let flags = if *writable { WRITE } else { 0 } | if more { NEXT } else { 0 };
            self.describe(self.table, index, *addr, *len, flags, self.next_descriptor);
        }
        head
    }

    /// Puts a head into the available ring.
    pub fn offer_head(&mut self, head: u16) {
        let entry = self.avail + 4 + 2 * u64::from(self.offered % self.size);
        self.put(entry, head);
        self.offered = self.offered.wrapping_add(1);
        self.set_avail_index(self.offered);
    }

    pub fn set_avail_index(&self, index: u16) {
        let view = self.memory.memory();
        let at = GuestAddress(self.avail + 2);
        let order = Ordering::SeqCst;
        view.store(index, at, order).unwrap();
    }

    /// Offers a chain, without a kick.
    pub fn offer(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.chain(pieces);
        self.offer_head(head);
        head
    }

    /// Takes back what has been offered and not been used, as Linux's driver does with a queue that it gives up.
    pub fn take_back(&mut self) {
        self.offered = self.used_index();
        self.set_avail_index(self.offered);
    }

    pub fn kick(&self) {
        self.doorbell.write(1).unwrap();
    }

    /// Kicks, and waits until the worker has woken up for that.
    pub fn kick_and_wait(&self) {
        let epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        let fd = std::os::fd::AsRawFd::as_raw_fd(&self.doorbell);
        epoll.ctl(ControlOperation::Add, fd, event).unwrap();
        self.kick();
        while epoll.wait(0, &mut [EpollEvent::default()]).unwrap() > 0 {
            std::thread::yield_now();
        }
    }

    pub fn set_avail_flags(&self, flags: u16) {
        self.put(self.avail, flags);
    }

    pub fn set_used_event(&self, index: u16) {
        self.put(self.avail + 4 + 2 * u64::from(self.size), index);
    }

    pub fn avail_event(&self) -> u16 {
        self.get(self.used + 4 + 8 * u64::from(self.size))
    }

    /// How many heads have been offered in all: the index of the next entry.
    pub fn offered(&self) -> u16 {
        self.offered
    }

    /// Whether the device asks for a kick when the entry of this index has
    /// been added (Virtio 1.2, 2.7.7 and 2.7.10).
    pub fn invited(&self, entry: u16, event_idx: bool) -> bool {
        // Between adding the entry and asking.
        fence(Ordering::SeqCst);
        if event_idx {
            self.avail_event() == entry
        } else {
            self.used_flags() & 1 == 0
        }
    }

    pub fn used_flags(&self) -> u16 {
        self.get(self.used)
    }

    /// How many chains the device has returned in all.
    pub fn used_index(&self) -> u16 {
        let view = self.memory.memory();
        let at = GuestAddress(self.used + 2);
        let order = Ordering::SeqCst;
        view.load(at, order).unwrap()
    }

    /// The next chain that came back: its head and the bytes written.
    pub fn returned(&mut self) -> Option<(u32, u32)> {
        if self.seen == self.used_index() {
            return None;
        }
        let entry = self.used + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        Some((self.get(entry), self.get(entry + 4)))
    }

    /// Waits for interrupts until a chain has come back.
    pub fn wait(&mut self, notices: &Receiver<Notice>) -> (u32, u32) {
        loop {
            if let Some(returned) = self.returned() {
                return returned;
            }
            let notice = notices.recv_timeout(PATIENCE).unwrap();
            let expected = matches!(notice, Notice::Queue(_) | Notice::Disk(_));
            assert!(expected, "{notice:?}");
        }
    }

    /// Takes the queue back into use after a stop, with what was parked.
    pub fn reactivate(stopped: StoppedQueue) -> ActiveQueue {
        let StoppedQueue {
            index,
            queue,
            kick,
            parked,
        } = stopped;
        ActiveQueue {
            index,
            queue,
            kick,
            parked,
        }
    }
}

/// Starts `device` with these queues.
pub fn start(
    device: &mut dyn VirtioDevice,
    features: u64,
    memory: &GuestMemory,
    queues: Vec<ActiveQueue>,
) -> Receiver<Notice> {
    let (notifier, notices) = notices();
    device.features_negotiated(features);
    device
        .start(Activation {
            features,
            memory: memory.clone(),
            queues,
            notifier,
        })
        .unwrap();
    notices
}

/// The next notice, which says that the device must be reset.
pub fn reset_reason(notices: &Receiver<Notice>) -> String {
    loop {
        match notices.recv_timeout(PATIENCE).unwrap() {
            Notice::Reset(reason) => return reason,
            Notice::Queue(_) | Notice::Disk(_) | Notice::Balloon(_) => {}
            Notice::Config => panic!("the configuration space has not changed"),
        }
    }
}
