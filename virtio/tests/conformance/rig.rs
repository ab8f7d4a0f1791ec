//! A machine with one device in it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use devices::pci::{PciAddress, PciFunction, PciRoot, Windows};
use devices::{Bus, MsiAllocator, MsiError, MsiMessage, MsiVector, Unit};
use migration::SectionSet;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
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
pub struct Bells {
    pub registered: Mutex<BTreeMap<u64, File>>,
    pub refuse: AtomicBool,
    /// Readable when a doorbell may be one that nobody hears any more: the device is broken, or it has been given up.
    news: File,
}

impl Default for Bells {
    fn default() -> Self {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Self {
            registered: Mutex::default(),
            refuse: AtomicBool::default(),
            news: File::from(eventfd(0, flags).unwrap()),
        }
    }
}

/// As much as an eventfd holds: it becomes writable when it is read.
const FULL: u64 = u64::MAX - 1;

/// A doorbell that is rung so that it is seen when it is heard.
struct Peal(File);

impl Peal {
    fn begin(bell: &File) -> Self {
        let bell = bell.try_clone().unwrap();
        // One that was rung before is heard with this one. Somebody may ring it in between.
        let _ = (&bell).read(&mut [0; 8]);
        let rung = (&bell).write(&FULL.to_ne_bytes());
        assert!(rung.is_ok() || rung.unwrap_err().kind() == io::ErrorKind::WouldBlock);
        Self(bell)
    }

    fn is_heard(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::OUT)];
        poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
    }

    /// Waits until it is heard, or there is news.
    fn wait(&self, news: &File, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        let time = Timespec::try_from(left).unwrap();
        let mut fds = [
            PollFd::new(&self.0, PollFlags::OUT),
            PollFd::new(news, PollFlags::IN),
        ];
        assert!(
            poll(&mut fds, Some(&time)).unwrap() > 0,
            "a doorbell is not heard"
        );
        // Nothing is there to be read without news.
        let _ = { news }.read(&mut [0; 8]);
    }
}

impl Drop for Peal {
    /// Who has not heard it by now may do so later. It can be rung again.
    fn drop(&mut self) {
        if !self.is_heard() && (&self.0).read(&mut [0; 8]).is_ok() {
            let _ = (&self.0).write(&1_u64.to_ne_bytes());
        }
    }
}

impl Bells {
    fn ring(&self, address: u64) -> bool {
        match self.registered.lock().unwrap().get(&address) {
            Some(fd) => (&*fd).write(&1_u64.to_ne_bytes()).is_ok(),
            None => false,
        }
    }

    /// Rings each of them.
    fn ring_all(&self) -> Vec<Peal> {
        let registered = self.registered.lock().unwrap();
        registered.values().map(Peal::begin).collect()
    }

    /// Has who waits for a doorbell to be heard look whether it can be.
    fn tell(&self) {
        (&self.news).write_all(&1_u64.to_ne_bytes()).unwrap();
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
        self.tell();
        Ok(())
    }
}

/// What the device has reported.
pub struct Events {
    seen: Mutex<Vec<String>>,
    changed: Condvar,
    bells: Arc<Bells>,
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
        if let DeviceEvent::NeedsReset { .. } = event {
            self.bells.tell();
        }
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
        let events = Arc::new(Events {
            seen: Mutex::default(),
            changed: Condvar::new(),
            bells: Arc::clone(&bells),
        });
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
            for peal in self.bells.ring_all() {
                while self.device.is_active() && !self.device.needs_reset() && !peal.is_heard() {
                    peal.wait(&self.bells.news, deadline);
                }
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
