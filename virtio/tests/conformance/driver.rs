//! The driver's side, as Virtio 1.2 tells a driver to do it.

use std::collections::BTreeMap;
use std::time::Instant;

use vm_memory::{ByteValued, Bytes, GuestAddress, GuestAddressSpace};

use crate::rig::{Rig, soon};

pub const ACKNOWLEDGE: u8 = 1;
pub const DRIVER: u8 = 2;
pub const DRIVER_OK: u8 = 4;
pub const FEATURES_OK: u8 = 8;
pub const NEEDS_RESET: u8 = 64;
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT_DESC: u64 = 1 << 28;

/// Capability types.
pub const COMMON: u8 = 1;
pub const NOTIFY: u8 = 2;
pub const ISR: u8 = 3;
pub const DEVICE: u8 = 4;
pub const PCI: u8 = 5;

/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Message data: queue N has N, configuration changes have this.
pub const CONFIG_MESSAGE: u32 = 0xc0;

const RINGS: u64 = 0x1_0000;
const RING_SPACE: u64 = 0x1_0000;
const BUFFERS: u64 = 0x18_0000;

/// How far a driver has come; each step includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    Nothing,
    Acknowledged,
    Features,
    Interrupts,
    Queues,
    Running,
}

pub const STEPS: [Step; 6] = [
    Step::Nothing,
    Step::Acknowledged,
    Step::Features,
    Step::Interrupts,
    Step::Queues,
    Step::Running,
];

/// One queue's rings in guest memory.
#[derive(Clone, Debug)]
pub struct Ring {
    pub index: u16,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub buffers: u64,
}

pub struct Driver<'a> {
    pub rig: &'a Rig,
    /// Capability type to its offset in configuration space and its region's address.
    pub capabilities: BTreeMap<u8, (u64, u64)>,
    pub msix: u64,
    pub bar: u64,
    pub multiplier: u64,
}

impl<'a> Driver<'a> {
    /// Finds the device's capabilities.
    pub fn probe(rig: &'a Rig) -> Self {
        let mut driver = Self {
            rig,
            capabilities: BTreeMap::new(),
            msix: 0,
            bar: 0,
            multiplier: 0,
        };
        driver.bar =
            u64::from(driver.config32(0x10) & !0xf) | u64::from(driver.config32(0x14)) << 32;
        assert_eq!(driver.config32(4) >> 16 & 0x10, 0x10, "no capability list");
        let mut at = u64::from(driver.config32(0x34) & 0xff);
        while at != 0 {
            let [id, next, _, kind] = driver.config32(at).to_le_bytes();
            match id {
                0x11 => driver.msix = at,
                0x09 => {
                    let region = driver.bar + u64::from(driver.config32(at + 8));
                    driver.capabilities.insert(kind, (at, region));
                    if kind == NOTIFY {
                        driver.multiplier = driver.config32(at + 16).into();
                    }
                }
                _ => panic!("unknown capability {id:#x}"),
            }
            at = next.into();
        }
        driver
    }

    pub fn config32(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.rig.read(self.rig.config(register), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn region(&self, kind: u8) -> u64 {
        self.capabilities[&kind].1
    }

    pub fn read<T: ByteValued>(&self, kind: u8, offset: u64) -> T {
        let mut value = T::zeroed();
        self.rig
            .read(self.region(kind) + offset, value.as_mut_slice());
        value
    }

    pub fn write<T: ByteValued>(&self, kind: u8, offset: u64, value: T) {
        self.rig.write(self.region(kind) + offset, value.as_slice());
    }

    pub fn status(&self) -> u8 {
        self.read(COMMON, 20)
    }

    pub fn set_status(&self, status: u8) {
        self.write(COMMON, 20, status);
    }

    pub fn add_status(&self, bits: u8) {
        self.set_status(self.status() | bits);
    }

    /// Resets the device and waits until it is done.
    pub fn reset(&self) {
        self.set_status(0);
        let deadline = soon();
        while self.status() != 0 {
            assert!(Instant::now() < deadline, "the reset does not end");
        }
    }

    pub fn offered(&self) -> u64 {
        let word = |select: u32| -> u64 {
            self.write(COMMON, 0, select);
            u64::from(self.read::<u32>(COMMON, 4))
        };
        word(0) | word(1) << 32
    }

    pub fn accept(&self, features: u64) {
        for select in 0..2_u32 {
            self.write(COMMON, 8, select);
            let word = u32::try_from(features >> (32 * select) & 0xffff_ffff).unwrap();
            self.write(COMMON, 12, word);
        }
    }

    /// Tries to agree on `features`.
    pub fn negotiate(&self, features: u64) -> bool {
        self.accept(features);
        self.add_status(FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    pub fn queues(&self) -> u16 {
        self.read(COMMON, 18)
    }

    /// Selects a queue and returns its size.
    pub fn select(&self, queue: u16) -> u16 {
        self.write(COMMON, 22, queue);
        self.read(COMMON, 24)
    }

    /// Unmasks all vectors, with the messages that tests wait for.
    pub fn enable_interrupts(&self) {
        let table = self.bar + u64::from(self.config32(self.msix + 4) & !7);
        for vector in 0..=self.queues() {
            let data = if vector == 0 {
                CONFIG_MESSAGE
            } else {
                u32::from(vector - 1)
            };
            let entry = table + 16 * u64::from(vector);
            self.rig.write(entry, &0xfee0_0000_u64.to_le_bytes());
            self.rig.write(entry + 8, &u64::from(data).to_le_bytes());
        }
        let control = self.rig.config(self.msix + 2);
        let mut bytes = [0; 2];
        self.rig.read(control, &mut bytes);
        self.rig.write(control, &[bytes[0], bytes[1] | 0x80]);
        self.write(COMMON, 16, 0_u16);
        assert_eq!(self.read::<u16>(COMMON, 16), 0);
    }

    /// Rings of `size` (or the largest there is) for a queue, in fresh memory.
    pub fn ring(&self, index: u16, size: u16) -> Ring {
        let size = size.min(self.select(index));
        let base = RINGS + u64::from(index) * RING_SPACE;
        let ring = Ring {
            index,
            size,
            desc: base,
            avail: base + 0x6000,
            used: base + 0x8000,
            buffers: BUFFERS + u64::from(index) * 0x4000,
        };
        let memory = self.rig.memory.memory();
        memory
            .write_slice(&[0; 0x1_0000], GuestAddress(base))
            .unwrap();
        ring
    }

    /// Tells the device of the rings, without enabling the queue.
    pub fn place(&self, ring: &Ring) {
        self.select(ring.index);
        self.write(COMMON, 24, ring.size);
        self.write(COMMON, 26, ring.index + 1);
        for (offset, address) in [(32, ring.desc), (40, ring.avail), (48, ring.used)] {
            self.write(
                COMMON,
                offset,
                u32::try_from(address & 0xffff_ffff).unwrap(),
            );
            self.write(COMMON, offset + 4, u32::try_from(address >> 32).unwrap());
        }
    }

    pub fn enable(&self, ring: &Ring) {
        self.place(ring);
        self.write(COMMON, 28, 1_u16);
    }

    /// Resets the device and brings it to `step`. Returns its rings from
    /// [`Step::Queues`] on.
    pub fn bring_to(&self, step: Step, features: u64) -> Vec<Ring> {
        self.reset();
        if step >= Step::Acknowledged {
            self.set_status(ACKNOWLEDGE);
            self.add_status(DRIVER);
        }
        if step >= Step::Features {
            assert!(self.negotiate(features & self.offered()));
        }
        if step >= Step::Interrupts {
            self.enable_interrupts();
        }
        let mut rings = Vec::new();
        if step >= Step::Queues {
            rings.extend((0..self.queues()).map(|queue| self.ring(queue, 64)));
            for ring in &rings {
                self.enable(ring);
            }
        }
        if step >= Step::Running {
            self.add_status(DRIVER_OK);
            assert_eq!(
                self.status(),
                ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
            );
        }
        rings
    }

    /// Takes the device into use with everything it offers.
    pub fn boot(&self) -> Vec<Ring> {
        self.bring_to(Step::Running, u64::MAX)
    }

    pub fn kick(&self, queue: u16) {
        self.select(queue);
        let offset = u64::from(self.read::<u16>(COMMON, 30)) * self.multiplier;
        self.write(NOTIFY, offset, queue);
    }

    pub fn put<T: ByteValued>(&self, address: u64, value: T) {
        let memory = self.rig.memory.memory();
        memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub fn get<T: ByteValued>(&self, address: u64) -> T {
        let memory = self.rig.memory.memory();
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// Writes a descriptor into a table.
    pub fn describe(&self, table: u64, slot: u16, buffer: (u64, u32), flags: u16, next: u16) {
        let at = table + 16 * u64::from(slot);
        self.put(at, buffer.0);
        self.put(at + 8, buffer.1);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    /// Makes a head available.
    pub fn offer(&self, ring: &Ring, head: u16) {
        let index: u16 = self.get(ring.avail + 2);
        self.put(ring.avail + 4 + 2 * u64::from(index % ring.size), head);
        self.put(ring.avail + 2, index.wrapping_add(1));
    }

    pub fn used_index(&self, ring: &Ring) -> u16 {
        self.get(ring.used + 2)
    }

    /// Head and length of a used entry.
    pub fn used(&self, ring: &Ring, index: u16) -> (u32, u32) {
        let at = ring.used + 4 + 8 * u64::from(index % ring.size);
        (self.get(at), self.get(at + 4))
    }
}
