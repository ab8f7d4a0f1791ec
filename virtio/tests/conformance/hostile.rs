//! What a broken or malicious driver must not achieve: a crash, a hang, a
//! device that a reset does not mend, or harm to anything but its own device.

use std::sync::Arc;

use devices::Unit;
use proptest::prelude::*;
use serde_json::json;
use virtio::models::MODELS;
use virtio::transport::VirtioPciV1;

use crate::driver::{
    COMMON, DEVICE, DRIVER_OK, Driver, INDIRECT, ISR, NEEDS_RESET, NEXT, NOTIFY, Ring, Step,
    VERSION_1, WRITE,
};
use crate::echo::{EchoControl, Mode};
use crate::requests::{reach, rouse};
use crate::rig::{HIGH_WINDOW, RAM, RAM_END, Rig};
use crate::subjects::{Subject, all};

/// Whatever has happened: the device drains.
fn drains(rig: &Rig, what: &str) {
    rig.device
        .stop(crate::rig::soon())
        .unwrap_or_else(|error| panic!("{what}: {error}"));
}

/// Whatever has happened: the device drains, and works again after a reset.
fn recovers(rig: &Rig, what: &str) {
    drains(rig, what);
    rig.device.start().unwrap();
    let driver = Driver::probe(rig);
    driver.boot();
    rig.settle();
    assert_eq!(driver.status() & NEEDS_RESET, 0, "{what}");
    driver.reset();
}

/// Something bad to put into a ring that is in use, and whether it breaks the rules of rings: whoever looks at it leaves
/// them alone from then on.
type Attack = (&'static str, bool, fn(&Driver<'_>, &Ring));

fn chain(driver: &Driver<'_>, ring: &Ring, buffer: (u64, u32), flags: u16, next: u16) {
    driver.describe(ring.desc, 0, buffer, flags, next);
    driver.describe(ring.desc, 1, (ring.buffers, 64), WRITE, 0);
    driver.offer(ring, 0);
}

/// An indirect descriptor of `len` bytes over a table of two entries.
fn indirect(driver: &Driver<'_>, ring: &Ring, len: u32, flags: u16, inner: (u16, u16)) {
    let table = ring.buffers + 0x1000;
    driver.describe(table, 0, (ring.buffers, 16), inner.0, inner.1);
    driver.describe(table, 1, (ring.buffers, 16), WRITE, 0);
    chain(driver, ring, (table, len), flags, 1);
}

/// As many entries are made available, of which none has been written.
fn jump(driver: &Driver<'_>, ring: &Ring, by: u16) {
    let index: u16 = driver.get(ring.avail + 2);
    driver.put(ring.avail + 2, index.wrapping_add(by));
}

const ATTACKS: &[Attack] = &[
    ("a chain that is a loop", true, |d, r| {
        for slot in 0..r.size {
            let next = (slot + 1) % r.size;
            d.describe(r.desc, slot, (r.buffers, 16), NEXT, next);
        }
        d.offer(r, 0);
    }),
    ("a descriptor that follows itself", true, |d, r| {
        chain(d, r, (r.buffers, 16), NEXT, 0);
    }),
    ("a next beyond the table", true, |d, r| {
        chain(d, r, (r.buffers, 16), NEXT, r.size);
    }),
    ("a next far beyond the table", true, |d, r| {
        chain(d, r, (r.buffers, 16), NEXT, u16::MAX);
    }),
    ("a head beyond the table", true, |d, r| d.offer(r, r.size)),
    ("a head far beyond the table", true, |d, r| {
        d.offer(r, u16::MAX);
    }),
    ("the same head, ring full", false, |d, r| {
        chain(d, r, (r.buffers, 16), NEXT, 1);
        for _ in 1..r.size {
            d.offer(r, 0);
        }
    }),
    ("a descriptor of no length", false, |d, r| {
        chain(d, r, (r.buffers, 0), NEXT, 1);
    }),
    ("nothing but a descriptor of no length", false, |d, r| {
        chain(d, r, (0, 0), 0, 0);
    }),
    ("a huge length", false, |d, r| {
        chain(d, r, (r.buffers, u32::MAX), NEXT, 1);
    }),
    ("a huge writable length", false, |d, r| {
        chain(d, r, (r.buffers, u32::MAX), WRITE, 0);
    }),
    ("address and length wrap", false, |d, r| {
        chain(d, r, (u64::MAX - 8, 64), NEXT, 1);
    }),
    ("a buffer in the hole", false, |d, r| {
        chain(d, r, (RAM[0].1 - 8, 16), NEXT, 1);
    }),
    ("a writable buffer outside RAM", false, |d, r| {
        chain(d, r, (RAM_END - 1, 64), WRITE, 0);
    }),
    ("a buffer in the device's own registers", false, |d, r| {
        chain(d, r, (HIGH_WINDOW, 64), WRITE, 0);
    }),
    ("a buffer over the descriptor table", false, |d, r| {
        chain(d, r, (r.desc, 64), WRITE, 0);
    }),
    ("a buffer over the used ring", false, |d, r| {
        chain(d, r, (r.used, 64), NEXT | WRITE, 1);
    }),
    ("writable before readable", false, |d, r| {
        chain(d, r, (r.buffers, 16), WRITE | NEXT, 2);
        d.describe(r.desc, 2, (r.buffers, 16), 0, 0);
    }),
    ("unknown flags", false, |d, r| {
        chain(d, r, (r.buffers, 16), 0xfff8, 1);
    }),
    ("the longest chain", false, |d, r| {
        for slot in 0..r.size {
            let flags = if slot + 1 == r.size { 0 } else { NEXT };
            d.describe(r.desc, slot, (r.buffers, 1), flags, slot + 1);
        }
        d.offer(r, 0);
    }),
    ("an empty indirect table", true, |d, r| {
        indirect(d, r, 0, INDIRECT, (WRITE, 0));
    }),
    ("an indirect table of a broken length", true, |d, r| {
        indirect(d, r, 24, INDIRECT, (NEXT, 1));
    }),
    ("a nested indirect table", true, |d, r| {
        indirect(d, r, 32, INDIRECT, (INDIRECT, 0));
    }),
    ("an indirect table with a next", true, |d, r| {
        indirect(d, r, 32, INDIRECT | NEXT, (NEXT, 1));
    }),
    ("a writable indirect table", false, |d, r| {
        indirect(d, r, 32, INDIRECT | WRITE, (NEXT, 1));
    }),
    ("a loop in an indirect table", true, |d, r| {
        indirect(d, r, 32, INDIRECT, (NEXT, 0));
    }),
    ("a next beyond an indirect table", true, |d, r| {
        indirect(d, r, 32, INDIRECT, (NEXT, 2));
    }),
    ("an indirect table longer than the queue", false, |d, r| {
        let table = r.buffers + 0x1000;
        for slot in 0..512 {
            d.describe(table, slot, (r.buffers, 1), NEXT, slot + 1);
        }
        chain(d, r, (table, 512 * 16), INDIRECT, 0);
    }),
    ("a huge indirect table", false, |d, r| {
        indirect(d, r, 0xffff_fff0, INDIRECT, (NEXT, 1));
    }),
    ("an indirect table outside RAM", true, |d, r| {
        chain(d, r, (RAM_END, 32), INDIRECT, 0);
    }),
    ("an indirect table that wraps", true, |d, r| {
        chain(d, r, (u64::MAX - 15, 32), INDIRECT, 0);
    }),
    ("an available index that jumps", true, |d, r| {
        jump(d, r, r.size + 1);
    }),
    ("an available index that jumps far", true, |d, r| {
        jump(d, r, 0x8000);
    }),
    ("an available index that goes back", true, |d, r| {
        jump(d, r, u16::MAX);
    }),
    ("random rings", false, |d, r| {
        for at in (0..0x9000).step_by(8) {
            d.put(r.desc + at, at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
    }),
];

/// The most queues of a device that are attacked: those behind are like those before.
const ATTACKED: usize = 10;

/// Each attack on each queue of each model, in a machine whose driver has just taken the device into use.
fn each_attack(mut harm: impl FnMut(&Case<'_>)) {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        for queue in 0..usize::from(driver.queues()).min(ATTACKED) {
            for (name, breaks, attack) in ATTACKS {
                let rings = driver.boot();
                harm(&Case {
                    what: format!("{}, queue {queue}: {name}", subject.name),
                    subject: &subject,
                    rig: &rig,
                    driver: &driver,
                    rings,
                    queue,
                    // The test's own device is not so strict.
                    breaks: *breaks && subject.name != "echo",
                    attack: *attack,
                });
            }
        }
    }
}

/// One attack.
struct Case<'a> {
    what: String,
    subject: &'a Subject,
    rig: &'a Rig,
    driver: &'a Driver<'a>,
    rings: Vec<Ring>,
    queue: usize,
    breaks: bool,
    attack: fn(&Driver<'_>, &Ring),
}

impl Case<'_> {
    /// Another queue, if there is one.
    fn other_ring(&self) -> &Ring {
        // The control queue of that card says nothing of the program that serves the others.
        let count = match self.subject.name {
            "vhost-user-net" => 2,
            _ => self.rings.len(),
        };
        &self.rings[(self.queue + 1) % count]
    }

    fn attack(&self) {
        (self.attack)(self.driver, &self.rings[self.queue]);
    }

    /// Whether the stopped device has looked at the attack, behind `before` sound entries. One that breaks the rules
    /// has broken it then.
    fn is_served(&self, rig: &Rig, before: u16) -> bool {
        let progress = self.progress(rig);
        let returns = RETURNS.contains(&(self.subject.name, self.queue)) && !self.breaks;
        let served = progress != Some(before) || returns;
        assert!(
            !served || !self.breaks || progress.is_none(),
            "{}: not broken",
            self.what
        );
        served
    }

    /// How far the stopped device has come with the queue; `None` where it is broken.
    fn progress(&self, rig: &Rig) -> Option<u16> {
        let section = rig.save().take("dut", "virtio-pci").unwrap();
        let state: VirtioPciV1 = section.decode().unwrap();
        let progress = state.queues[self.queue].progress.as_ref();
        progress
            .filter(|_| !rig.device.needs_reset())
            .map(|progress| progress.next_avail)
    }

    /// Starts the device on another machine, and stops it when it has served what there is.
    fn passes(&self, other: &Rig) {
        other.device.start().unwrap();
        reach(self.subject.name, &Driver::probe(other), self.other_ring());
        other.settle();
        drains(other, &self.what);
    }
}

/// Queues whose buffers are in the ring again when the device has stopped, unless they have been used or break the rules: how far
/// it has come does not tell that it has looked at them.
const RETURNS: &[(&str, usize)] = &[("net", 0), ("net", 2)];

/// Queues that a device has no use for buffers in, unless it has been restored.
const RESTORED_ONLY: &[(&str, usize)] = &[("vsock", 2)];

/// Queues of which a device looks at no buffer, whatever is in them: those of ports that a console does not have.
const UNUSED: &[(&str, usize)] = &[("console", 8)];

#[test]
fn no_ring_content_that_is_served_harms_more_than_its_device() {
    each_attack(|case| {
        let Case {
            subject,
            rig,
            driver,
            rings,
            queue,
            what,
            ..
        } = case;
        let (queue, kind) = (*queue, subject.name);
        reach(kind, driver, case.other_ring());
        rouse(kind, driver, rings, queue);
        assert!(!rig.device.needs_reset(), "{what}: broken before");
        let before: u16 = driver.get(rings[queue].avail + 2);
        case.attack();
        driver.kick(rings[queue].index);
        rig.settle();
        drains(rig, what);
        let left_alone = RESTORED_ONLY.contains(&(kind, queue)) || UNUSED.contains(&(kind, queue));
        assert_ne!(case.is_served(rig, before), left_alone, "{what}: served");
        let other = rig.successor(subject);
        case.passes(&other);
        if left_alone {
            let unused = UNUSED.contains(&(kind, queue));
            assert_ne!(case.is_served(&other, before), unused, "{what}: moved");
        }
        other.device.start().unwrap();
        recovers(&other, what);
        rig.device.start().unwrap();
        rig.settle();
        recovers(rig, what);
    });
}

#[test]
fn ring_content_that_is_found_after_a_move_or_a_start_harms_no_more() {
    each_attack(|case| {
        let Case {
            subject,
            rig,
            driver,
            rings,
            queue,
            what,
            ..
        } = case;
        reach(subject.name, driver, case.other_ring());
        rouse(subject.name, driver, rings, *queue);
        rig.settle();
        drains(rig, what);
        let before = case
            .progress(rig)
            .unwrap_or_else(|| panic!("{what}: broken before"));
        let other = rig.successor(subject);
        case.attack();
        case.passes(&other);
        let mut served = case.is_served(&other, before);
        rig.device.start().unwrap();
        reach(subject.name, driver, case.other_ring());
        rig.settle();
        drains(rig, what);
        served |= case.is_served(rig, before);
        assert_ne!(
            served,
            UNUSED.contains(&(subject.name, *queue)),
            "{what}: served"
        );
        rig.device.start().unwrap();
        recovers(rig, what);
    });
}

#[test]
fn an_available_index_out_of_bounds_breaks_the_echo_device() {
    for index in [17_u16, 0x8000, u16::MAX] {
        let rig = Rig::new(&Subject::echo(&Arc::default()));
        let driver = Driver::probe(&rig);
        let ring = driver.boot().remove(0);
        driver.put(ring.avail + 2, index);
        driver.kick(0);
        rig.events.wait_broken();
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
        recovers(&rig, "index");
    }
}

#[test]
fn rings_outside_ram_break_the_device_and_nothing_else() {
    type Place = fn(&mut Ring);
    let places: &[Place] = &[
        |r| r.desc = RAM_END,
        |r| r.desc = RAM[0].1 - 16,
        |r| r.desc = 0xffff_ffff_ffff_fff0,
        |r| r.desc += 8,
        |r| r.avail = RAM_END - 2,
        |r| r.avail = u64::MAX - 1,
        |r| r.avail += 1,
        |r| r.used = RAM[0].1 - 4,
        |r| r.used = HIGH_WINDOW,
        |r| r.used = u64::MAX - 3,
        |r| r.used += 2,
    ];
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        for (number, place) in places.iter().enumerate() {
            let mut rings = driver.bring_to(Step::Interrupts, u64::MAX);
            assert!(rings.is_empty());
            rings.extend((0..driver.queues()).map(|queue| driver.ring(queue, 64)));
            let last = rings.len() - 1;
            place(&mut rings[last]);
            rings.iter().for_each(|ring| driver.enable(ring));
            driver.add_status(DRIVER_OK);
            let what = format!("{}, place {number}", subject.name);
            assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{what}");
            rings.iter().for_each(|ring| driver.kick(ring.index));
            rig.stop();
            let other = rig.successor(&subject);
            other.device.start().unwrap();
            recovers(&other, &what);
            rig.device.start().unwrap();
            recovers(&rig, &what);
        }
    }
}

#[test]
fn kicks_before_the_driver_is_ready_do_nothing() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        for step in [Step::Nothing, Step::Features, Step::Queues] {
            let rings = driver.bring_to(step, u64::MAX);
            for ring in &rings {
                chain(&driver, ring, (ring.buffers, 16), NEXT, 1);
            }
            for queue in 0..driver.queues() {
                driver.kick(queue);
            }
            rig.stop();
            rig.device.start().unwrap();
            for ring in &rings {
                assert_eq!(driver.used_index(ring), 0, "{}", subject.name);
                assert_eq!(rig.interrupts.take(ring.index.into()), 0);
            }
        }
    }
}

#[test]
fn kicks_of_queues_that_do_not_exist_or_are_not_enabled_do_nothing() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        driver.bring_to(Step::Interrupts, u64::MAX);
        driver.add_status(DRIVER_OK);
        for offset in [0, 2, 4, 0x7fc, 0xffc, 0xfff] {
            for queue in [0_u16, 1, u16::MAX] {
                driver.write(NOTIFY, offset, queue);
            }
            driver.write(NOTIFY, offset, 0xff_u8);
        }
        recovers(&rig, subject.name);
    }
}

#[test]
fn queues_that_do_not_exist_cannot_be_set_up() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        driver.bring_to(Step::Features, u64::MAX);
        for queue in [driver.queues(), 0x7fff, u16::MAX] {
            assert_eq!(driver.select(queue), 0);
            for offset in 24..60 {
                driver.write(COMMON, offset, 0x1111_u16);
                driver.write(COMMON, offset, 0x1111_1111_u32);
            }
            assert_eq!(driver.read::<u64>(COMMON, 32), 0);
            assert_eq!(driver.read::<u16>(COMMON, 28), 0);
        }
        recovers(&rig, subject.name);
    }
}

/// A write of any width anywhere in the BAR.
fn poke(rig: &Rig, base: u64, offset: u64, value: u64, len: usize) {
    let address = base + offset;
    rig.write(address, &value.to_le_bytes()[..len]);
    let mut back = [0; 8];
    rig.read(address, &mut back[..len]);
}

#[test]
fn every_width_and_offset_of_configuration_space_is_harmless() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        driver.boot();
        let ids = [
            driver.config32(0),
            driver.config32(8),
            driver.config32(0x2c),
        ];
        for len in 1..=8 {
            for offset in 0..4096 - len {
                for value in [u64::MAX, 0, 0x0123_4567_89ab_cdef] {
                    let at = rig.config(u64::try_from(offset).unwrap());
                    rig.write(at, &value.to_le_bytes()[..len]);
                    let mut back = [0; 8];
                    rig.read(at, &mut back[..len]);
                }
            }
        }
        let after = [
            driver.config32(0),
            driver.config32(8),
            driver.config32(0x2c),
        ];
        assert_eq!(after, ids, "{}", subject.name);
        rig.stop();
        rig.device.reset();
        rig.root.reset();
        rig.device.start().unwrap();
        recovers(&rig, subject.name);
    }
}

#[test]
fn every_width_and_offset_of_the_registers_is_harmless() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        driver.boot();
        for len in 1..=8 {
            for page in (0..0x1_0000).step_by(0x1000) {
                for offset in (0..0x48).chain(0xff0..=0x1000 - len) {
                    let value = 0x0101_0101_0101_0101;
                    poke(
                        &rig,
                        driver.bar,
                        page + offset,
                        value,
                        usize::try_from(len).unwrap(),
                    );
                }
            }
        }
        recovers(&rig, subject.name);
    }
}

/// Past the end of every model's own configuration: the longest is an input device's, of 136 bytes.
const PAST_CONFIGURATION: u64 = 0x110;

#[test]
fn every_width_and_offset_of_device_configuration_reads_its_bytes_and_writes_do_no_harm() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        driver.boot();
        let region = driver.region(DEVICE);
        let name = subject.name;
        for len in 1..=8_u64 {
            for offset in 0..PAST_CONFIGURATION {
                let bytes: Vec<u8> = (offset..offset + len)
                    .map(|at| driver.read(DEVICE, at))
                    .collect();
                if offset >= PAST_CONFIGURATION - 0x10 {
                    assert!(bytes.iter().all(|byte| *byte == 0), "{name}");
                }
                let mut data = vec![0xaa; bytes.len()];
                rig.read(region + offset, &mut data);
                assert_eq!(data, bytes, "{name}: {len} at {offset}");
                // A driver may write some of it, and choose by that what it reads.
                for value in [u64::MAX, 0x0102_0304_0506_0708, 0] {
                    rig.write(region + offset, &value.to_le_bytes()[..bytes.len()]);
                }
            }
        }
        rig.settle();
        recovers(&rig, name);
    }
}

#[test]
fn device_configuration_past_its_end_reads_as_zero() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        let region = driver.region(DEVICE);
        for offset in [0x400, 0xff8] {
            for len in 1..=8 {
                let mut data = [0xaa; 8];
                rig.read(region + offset, &mut data[..len]);
                assert!(data[..len].iter().all(|b| *b == 0), "{}", subject.name);
                rig.write(region + offset, &data[..len]);
            }
        }
    }
}

#[test]
fn queues_that_features_leave_no_use_for_hold_nobody_up() {
    const CTRL_VQ: u64 = 1 << 17;
    const MQ: u64 = 1 << 22;
    let cards = [
        ("vhost-user-net", json!({ "num_queues": 4 })),
        ("net", json!({})),
    ];
    for (kind, config) in cards {
        let model = MODELS.iter().find(|model| model.kind == kind).unwrap();
        let subject = Subject::configured(model, config);
        for features in [!MQ, !(MQ | CTRL_VQ), VERSION_1] {
            let rig = Rig::new(&subject);
            let driver = Driver::probe(&rig);
            let rings = driver.bring_to(Step::Running, features);
            assert_eq!(rings.len(), 5);
            for ring in rings.iter().rev() {
                driver.describe(ring.desc, 0, (ring.buffers, 64), WRITE, 0);
                driver.offer(ring, 0);
                driver.kick(ring.index);
            }
            // Of what it knows it serves everything, and by one connection.
            reach(kind, &driver, &rings[0]);
            reach(kind, &driver, &rings[1]);
            drains(&rig, kind);
            rig.device.start().unwrap();
            recovers(&rig, kind);
        }
    }
}

/// One thing that a guest may do, chosen by chance.
#[derive(Clone, Debug)]
enum Act {
    Poke(u64, u64, usize),
    Config(u64, u64, usize),
    Kick(u16),
    Status(u8),
    Ring(u64, u64),
    StopStart,
    Boot,
}

fn act() -> impl Strategy<Value = Act> {
    let value = prop_oneof![any::<u64>(), 0_u64..16, Just(u64::MAX)];
    prop_oneof![
        8 => (0_u64..60, value.clone(), 1_usize..9).prop_map(|(o, v, l)| Act::Poke(o, v, l)),
        2 => (0_u64..0xffff, value.clone(), 1_usize..9).prop_map(|(o, v, l)| Act::Poke(o, v, l)),
        2 => (0x10_u64..0x100, value.clone(), 1_usize..5).prop_map(|(o, v, l)| Act::Config(o, v, l)),
        4 => (0_u16..4).prop_map(Act::Kick),
        4 => any::<u8>().prop_map(Act::Status),
        4 => (0_u64..0x9000, value).prop_map(|(o, v)| Act::Ring(o, v)),
        1 => Just(Act::StopStart),
        1 => Just(Act::Boot),
    ]
}

fn perform(rig: &Rig, driver: &Driver<'_>, act: &Act) {
    match *act {
        Act::Poke(offset, value, len) if offset + 8 <= 0x1_0000 => {
            poke(rig, driver.bar, offset, value, len);
        }
        Act::Poke(..) => {}
        Act::Config(offset, value, len) => {
            rig.write(rig.config(offset), &value.to_le_bytes()[..len]);
        }
        Act::Kick(queue) => {
            driver.write(NOTIFY, u64::from(queue) * 4, queue);
            rig.settle();
        }
        Act::Status(status) => driver.set_status(status),
        Act::Ring(offset, value) => driver.put(0x1_0000 + offset, value),
        Act::StopStart => {
            rig.stop();
            rig.device.start().unwrap();
        }
        Act::Boot => {
            if driver.status() == 0 && driver.region(ISR) != 0 {
                driver.bring_to(Step::Queues, VERSION_1);
                driver.add_status(DRIVER_OK);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_accesses_harms_more_than_its_device(
        acts in prop::collection::vec(act(), 1..60)
    ) {
        for subject in all() {
            let rig = Rig::new(&subject);
            let driver = Driver::probe(&rig);
            driver.bring_to(Step::Queues, u64::MAX);
            for act in &acts {
                perform(&rig, &driver, act);
            }
            rig.stop();
            rig.device.reset();
            rig.root.reset();
            rig.device.start().unwrap();
            recovers(&rig, subject.name);
        }
    }
}

#[test]
fn a_worker_that_has_died_fails_the_stop_and_a_reset_mends_the_device() {
    let control = Arc::new(EchoControl::default());
    let rig = Rig::new(&Subject::echo(&control));
    let driver = Driver::probe(&rig);
    driver.boot();
    control.set(Mode::Dying);
    assert!(matches!(
        rig.device.stop(crate::rig::soon()),
        Err(devices::StopError::WorkerLost { .. })
    ));
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    control.set(Mode::Serve);
    recovers(&rig, "worker");
}
