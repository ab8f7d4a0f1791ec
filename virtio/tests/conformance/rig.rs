//! A machine with one device in it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use devices::pci::{PciAddress, PciFunction, PciRoot, Windows};
use devices::{Bus, MsiAllocator, MsiError, MsiMessage, MsiVector, Unit};
use migration::SectionSet;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio::memory::{GuestMap, GuestMemory};
use virtio::transport::{DeviceEvent, DeviceEvents, Doorbells, VirtioPci};
use vm_memory::{FileOffset, GuestAddress};

use crate::subjects::Subject;

pub const ECAM: u64 = 0xe000_0000;
pub const SLOT: u8 = 4;
/// RAM is two regions with a hole between them.
pub const RAM_END: u64 = 0x40_0000;
pub const RAM: [(u64, u64); 2] = [(0, 0x20_0000), (0x30_0000, 0x10_0000)];
pub const LOW_WINDOW: u64 = 0xc000_0000;
pub const HIGH_WINDOW: u64 = 0x1_0000_0000;
/// Far longer than anything takes: passing it is a failure.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// The interrupts that have arrived, by message data.
#[derive(Default)]
pub struct Interrupts {
    arrived: Mutex<BTreeMap<u32, u32>>,
    changed: Condvar,
}

impl Interrupts {
    /// Waits for interrupts with `data`, takes them, and tells how many there were.
    pub fn wait(&self, data: u32) -> u32 {
        let arrived = self.arrived.lock().unwrap();
        let (mut arrived, timeout) = self
            .changed
            .wait_timeout_while(arrived, PATIENCE, |a| !a.contains_key(&data))
            .unwrap();
        assert!(!timeout.timed_out(), "no interrupt {data}");
        arrived.remove(&data).unwrap()
    }

    /// How many interrupts with `data` have arrived; takes them.
    pub fn take(&self, data: u32) -> u32 {
        self.arrived.lock().unwrap().remove(&data).unwrap_or(0)
    }
}

struct Vector {
    interrupts: Arc<Interrupts>,
    message: Mutex<Option<MsiMessage>>,
}

impl MsiVector for Vector {
    fn signal(&self) {
        if let Some(message) = *self.message.lock().unwrap() {
            let mut arrived = self.interrupts.arrived.lock().unwrap();
            *arrived.entry(message.data).or_default() += 1;
            self.interrupts.changed.notify_all();
        }
    }

    fn route(&self, message: Option<MsiMessage>) -> Result<(), MsiError> {
        *self.message.lock().unwrap() = message;
        Ok(())
    }
}

struct Vectors(Arc<Interrupts>);

impl MsiAllocator for Vectors {
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiVector>>, MsiError> {
        let make = |_| {
            Arc::new(Vector {
                interrupts: Arc::clone(&self.0),
                message: Mutex::default(),
            }) as Arc<dyn MsiVector>
        };
        Ok((0..count).map(make).collect())
    }
}

/// The doorbells that the "host" rings by itself.
#[derive(Default)]
pub struct Bells {
    pub registered: Mutex<BTreeMap<u64, File>>,
    pub refuse: AtomicBool,
}

impl Bells {
    fn ring(&self, address: u64) -> bool {
        match self.registered.lock().unwrap().get(&address) {
            Some(fd) => (&*fd).write(&1_u64.to_ne_bytes()).is_ok(),
            None => false,
        }
    }

    /// Rings each of them.
    fn ring_all(&self) {
        for fd in self.registered.lock().unwrap().values() {
            (&*fd).write_all(&1_u64.to_ne_bytes()).unwrap();
        }
    }

    /// Whether one of them has been rung and not been heard.
    fn are_ringing(&self) -> bool {
        let registered = self.registered.lock().unwrap();
        let mut fds: Vec<PollFd<'_>> = registered
            .values()
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .collect();
        poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
    }

    pub fn addresses(&self) -> Vec<u64> {
        self.registered.lock().unwrap().keys().copied().collect()
    }
}

impl Doorbells for Bells {
    fn register(&self, address: u64, fd: BorrowedFd<'_>) -> io::Result<()> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(io::Error::other("refused"));
        }
        let file = File::from(fd.try_clone_to_owned()?);
        let old = self.registered.lock().unwrap().insert(address, file);
        assert!(old.is_none(), "a doorbell was registered twice");
        Ok(())
    }

    fn unregister(&self, address: u64, _fd: BorrowedFd<'_>) -> io::Result<()> {
        let old = self.registered.lock().unwrap().remove(&address);
        assert!(old.is_some(), "a doorbell was never registered");
        Ok(())
    }
}

/// What the device has reported.
#[derive(Default)]
pub struct Events {
    seen: Mutex<Vec<String>>,
    changed: Condvar,
}

impl Events {
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    /// Waits until the device has reported that it is broken.
    pub fn wait_broken(&self) {
        let seen = self.seen.lock().unwrap();
        let (_seen, timeout) = self
            .changed
            .wait_timeout_while(seen, PATIENCE, |seen| {
                !seen.iter().any(|e| e.starts_with("broken"))
            })
            .unwrap();
        assert!(!timeout.timed_out(), "the device is not broken");
    }
}

impl DeviceEvents for Events {
    fn device_event(&self, name: &str, event: DeviceEvent<'_>) {
        assert_eq!(name, "dut");
        let text = match event {
            DeviceEvent::Activated => "activated".to_owned(),
            DeviceEvent::Reset => "reset".to_owned(),
            DeviceEvent::NeedsReset { reason } => format!("broken: {reason}"),
            DeviceEvent::Disk(report) => format!("{report:?}"),
            DeviceEvent::Peer(report) => format!("{report:?}"),
            DeviceEvent::MemoryReached { plugged } => format!("memory: {plugged}"),
            DeviceEvent::BalloonReached { actual } => format!("balloon: {actual}"),
        };
        self.seen.lock().unwrap().push(text);
        self.changed.notify_all();
    }
}

pub struct Rig {
    pub memory: GuestMemory,
    pub root: Arc<PciRoot>,
    pub device: Arc<VirtioPci>,
    pub interrupts: Arc<Interrupts>,
    pub bells: Arc<Bells>,
    pub events: Arc<Events>,
    bus: Bus,
}

impl Rig {
    /// A machine with the subject's device, which has been started.
    pub fn new(subject: &Subject) -> Self {
        let rig = Self::stopped(subject, ram());
        rig.device.start().unwrap();
        rig
    }

    /// A machine whose device has not been started.
    pub fn stopped(subject: &Subject, memory: GuestMemory) -> Self {
        let interrupts = Arc::new(Interrupts::default());
        let bells = Arc::new(Bells::default());
        let events = Arc::new(Events::default());
        let device = VirtioPci::new(
            "dut",
            subject.make(),
            memory.clone(),
            &Vectors(Arc::clone(&interrupts)),
            bells.clone(),
            events.clone(),
        )
        .unwrap();
        let root = PciRoot::new(Windows {
            low: LOW_WINDOW..ECAM,
            high: HIGH_WINDOW..HIGH_WINDOW << 4,
        });
        let function = Arc::clone(&device) as Arc<dyn PciFunction>;
        root.add(function, Some(SLOT)).unwrap();
        let bus = Bus::default();
        bus.insert(ECAM, 1 << 20, root.ecam()).unwrap();
        for (window, device) in root.windows() {
            let len = window.end - window.start;
            bus.insert(window.start, len, device).unwrap();
        }
        Self {
            memory,
            root,
            device,
            interrupts,
            bells,
            events,
            bus,
        }
    }

    /// A guest's read; ones where nothing answers.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        self.bus.read(address, data);
    }

    /// A guest's write, which the host may turn into a kick.
    pub fn write(&self, address: u64, data: &[u8]) {
        if !self.bells.ring(address) {
            self.bus.write(address, data);
        }
    }

    pub fn config(&self, register: u64) -> u64 {
        ECAM + (u64::from(SLOT) << 15) + register
    }

    pub fn stop(&self) {
        self.device.stop(soon()).unwrap();
    }

    /// Waits until the started device has done all that it can do about its queues as they are now. A doorbell that
    /// rings twice is heard for the second time by a worker that has looked at the queue after the first. A broken
    /// device does nothing any more, and one without a driver has nothing to do.
    ///
    /// One that another program serves looks at its queues when that program does ([`crate::requests::reach`]).
    pub fn settle(&self) {
        let deadline = soon();
        for _ in 0..2 {
            self.bells.ring_all();
            while self.device.is_active() && !self.device.needs_reset() && self.bells.are_ringing()
            {
                assert!(Instant::now() < deadline, "a doorbell is not heard");
                std::thread::yield_now();
            }
        }
    }

    /// The sections of the stopped device.
    pub fn save(&self) -> SectionSet {
        let mut set = SectionSet::default();
        for section in self.device.save().unwrap() {
            set.push(section);
        }
        set
    }

    /// Another machine with the same memory, in the state of this one, whose
    /// device is stopped.
    pub fn successor(&self, subject: &Subject) -> Self {
        let mut set = self.save();
        let other = Self::stopped(subject, self.memory.clone());
        other.device.restore(&mut set).unwrap();
        set.finish().unwrap();
        other.root.start().unwrap();
        other
    }

    pub fn unplug(&self) {
        assert!(self.root.remove(PciAddress::new(SLOT).unwrap()).is_some());
    }

    pub fn weak(&self) -> Weak<VirtioPci> {
        Arc::downgrade(&self.device)
    }
}

/// RAM that other programs can map.
pub fn ram() -> GuestMemory {
    let file = tempfile::tempfile().unwrap();
    file.set_len(RAM_END).unwrap();
    let ranges = RAM.map(|(base, len)| {
        let part = FileOffset::new(file.try_clone().unwrap(), base);
        (
            GuestAddress(base),
            usize::try_from(len).unwrap(),
            Some(part),
        )
    });
    GuestMemory::new(GuestMap::from_ranges_with_files(ranges).unwrap())
}
