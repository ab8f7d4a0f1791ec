//! What a broken or malicious driver must not achieve: a crash, a hang, a
//! device that a reset does not mend, or harm to anything but its own device.

use std::sync::Arc;

use devices::Unit;
use proptest::prelude::*;

use crate::driver::{
    COMMON, DEVICE, DRIVER_OK, Driver, INDIRECT, ISR, NEEDS_RESET, NEXT, NOTIFY, Ring, Step,
    VERSION_1, WRITE,
};
use crate::echo::{EchoControl, Mode};
use crate::rig::{HIGH_WINDOW, RAM, RAM_END, Rig};
use crate::subjects::{Subject, all};

/// Whatever has happened: the device drains, and works again after a reset.
fn recovers(rig: &Rig, what: &str) {
    rig.device
        .stop(crate::rig::soon())
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    rig.device.start().unwrap();
    let driver = Driver::probe(rig);
    driver.boot();
    driver.reset();
}

/// Something bad to put into a ring that is in use.
type Attack = (&'static str, fn(&Driver<'_>, &Ring));

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

const ATTACKS: &[Attack] = &[
    ("a chain that is a loop", |d, r| {
        for slot in 0..r.size {
            let next = (slot + 1) % r.size;
            d.describe(r.desc, slot, (r.buffers, 16), NEXT, next);
        }
        d.offer(r, 0);
    }),
    ("a descriptor that follows itself", |d, r| {
        chain(d, r, (r.buffers, 16), NEXT, 0);
    }),
    ("a next beyond the table", |d, r| {
        chain(d, r, (r.buffers, 16), NEXT, r.size);
    }),
    ("a next far beyond the table", |d, r| {
        chain(d, r, (r.buffers, 16), NEXT, u16::MAX);
    }),
    ("a head beyond the table", |d, r| d.offer(r, r.size)),
    ("a head far beyond the table", |d, r| d.offer(r, u16::MAX)),
    ("the same head, ring full", |d, r| {
        chain(d, r, (r.buffers, 16), NEXT, 1);
        for _ in 1..r.size {
            d.offer(r, 0);
        }
    }),
    ("a descriptor of no length", |d, r| {
        chain(d, r, (r.buffers, 0), NEXT, 1);
    }),
    ("nothing but a descriptor of no length", |d, r| {
        chain(d, r, (0, 0), 0, 0);
    }),
    ("a huge length", |d, r| {
        chain(d, r, (r.buffers, u32::MAX), NEXT, 1);
    }),
    ("a huge writable length", |d, r| {
        chain(d, r, (r.buffers, u32::MAX), WRITE, 0);
    }),
    ("address and length wrap", |d, r| {
        chain(d, r, (u64::MAX - 8, 64), NEXT, 1);
    }),
    ("a buffer in the hole", |d, r| {
        chain(d, r, (RAM[0].1 - 8, 16), NEXT, 1);
    }),
    ("a writable buffer outside RAM", |d, r| {
        chain(d, r, (RAM_END - 1, 64), WRITE, 0);
    }),
    ("a buffer in the device's own registers", |d, r| {
        chain(d, r, (HIGH_WINDOW, 64), WRITE, 0);
    }),
    ("a buffer over the descriptor table", |d, r| {
        chain(d, r, (r.desc, 64), WRITE, 0);
    }),
    ("a buffer over the used ring", |d, r| {
        chain(d, r, (r.used, 64), NEXT | WRITE, 1);
    }),
    ("writable before readable", |d, r| {
        chain(d, r, (r.buffers, 16), WRITE | NEXT, 2);
        d.describe(r.desc, 2, (r.buffers, 16), 0, 0);
    }),
    ("unknown flags", |d, r| {
        chain(d, r, (r.buffers, 16), 0xfff8, 1);
    }),
    ("the longest chain", |d, r| {
        for slot in 0..r.size {
            let flags = if slot + 1 == r.size { 0 } else { NEXT };
            d.describe(r.desc, slot, (r.buffers, 1), flags, slot + 1);
        }
        d.offer(r, 0);
    }),
    ("an empty indirect table", |d, r| {
        indirect(d, r, 0, INDIRECT, (WRITE, 0));
    }),
    ("an indirect table of a broken length", |d, r| {
        indirect(d, r, 24, INDIRECT, (NEXT, 1));
    }),
    ("a nested indirect table", |d, r| {
        indirect(d, r, 32, INDIRECT, (INDIRECT, 0));
    }),
    ("an indirect table with a next", |d, r| {
        indirect(d, r, 32, INDIRECT | NEXT, (NEXT, 1));
    }),
    ("a writable indirect table", |d, r| {
        indirect(d, r, 32, INDIRECT | WRITE, (NEXT, 1));
    }),
    ("a loop in an indirect table", |d, r| {
        indirect(d, r, 32, INDIRECT, (NEXT, 0));
    }),
    ("a next beyond an indirect table", |d, r| {
        indirect(d, r, 32, INDIRECT, (NEXT, 2));
    }),
    ("an indirect table longer than the queue", |d, r| {
        let table = r.buffers + 0x1000;
        for slot in 0..512 {
            d.describe(table, slot, (r.buffers, 1), NEXT, slot + 1);
        }
        chain(d, r, (table, 512 * 16), INDIRECT, 0);
    }),
    ("a huge indirect table", |d, r| {
        indirect(d, r, 0xffff_fff0, INDIRECT, (NEXT, 1));
    }),
    ("an indirect table outside RAM", |d, r| {
        chain(d, r, (RAM_END, 32), INDIRECT, 0);
    }),
    ("an indirect table that wraps", |d, r| {
        chain(d, r, (u64::MAX - 15, 32), INDIRECT, 0);
    }),
    ("an available index that jumps", |d, r| {
        d.put(r.avail + 2, r.size + 1);
    }),
    ("an available index that jumps far", |d, r| {
        d.put(r.avail + 2, 0x8000_u16);
    }),
    ("an available index that goes back", |d, r| {
        d.put(r.avail + 2, u16::MAX);
    }),
    ("random rings", |d, r| {
        for at in (0..0x9000).step_by(8) {
            d.put(r.desc + at, at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
    }),
];

#[test]
fn no_ring_content_harms_more_than_its_device() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        for (name, attack) in ATTACKS {
            for queue in 0..usize::from(driver.queues()) {
                let what = format!("{}, queue {queue}: {name}", subject.name);
                let rings = driver.boot();
                attack(&driver, &rings[queue]);
                driver.kick(rings[queue].index);
                // With the attack still there: stopped, started, moved.
                rig.device
                    .stop(crate::rig::soon())
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                let other = rig.successor(&subject);
                other.device.start().unwrap();
                recovers(&other, &what);
                rig.device.start().unwrap();
                recovers(&rig, &what);
            }
        }
    }
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
        Act::Kick(queue) => driver.write(NOTIFY, u64::from(queue) * 4, queue),
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
