//! What a correct driver may rely on.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::Unit;
use devices::pci::PciFunction;
use migration::{Section, SectionSet};
use serde_json::{Value, json};
use virtio::device::{ReconfigureError, ResizeError};
use virtio::models::MODELS;
use virtio::transport::VirtioPciV1;

use crate::driver::{
    ACKNOWLEDGE, COMMON, CONFIG_MESSAGE, DEVICE, DRIVER, DRIVER_OK, Driver, EVENT_IDX, FEATURES_OK,
    INDIRECT, INDIRECT_DESC, ISR, NEEDS_RESET, NEXT, NOTIFY, PCI, Ring, STEPS, Step, VERSION_1,
    WRITE,
};
use crate::echo::{EchoControl, FEATURE, Mode, QUEUE_SIZE, QUEUES};
use crate::rig::{HIGH_WINDOW, Rig, soon};
use crate::subjects::{Subject, all, context};

fn echo() -> (Subject, Arc<EchoControl>) {
    let control = Arc::new(EchoControl::default());
    (Subject::echo(&control), control)
}

/// Offers one chain: `text` to read, then room for as much.
fn offer_text(driver: &Driver<'_>, ring: &Ring, slot: u16, text: &[u8]) {
    let from = ring.buffers + u64::from(slot) * 0x100;
    for (i, byte) in text.iter().enumerate() {
        driver.put(from + i as u64, *byte);
    }
    let len = u32::try_from(text.len()).unwrap();
    driver.describe(ring.desc, slot, (from, len), NEXT, slot + 1);
    driver.describe(ring.desc, slot + 1, (from + 0x80, len), WRITE, 0);
    driver.offer(ring, slot);
}

fn answer(driver: &Driver<'_>, ring: &Ring, slot: u16, len: usize) -> Vec<u8> {
    let at = ring.buffers + u64::from(slot) * 0x100 + 0x80;
    (0..len).map(|i| driver.get(at + i as u64)).collect()
}

fn round_trip(driver: &Driver<'_>, ring: &Ring, text: &[u8]) {
    let before = driver.used_index(ring);
    offer_text(driver, ring, 0, text);
    driver.kick(ring.index);
    driver.rig.interrupts.wait(ring.index.into());
    assert_eq!(driver.used_index(ring), before.wrapping_add(1));
    let len = u32::try_from(text.len()).unwrap();
    assert_eq!(driver.used(ring, before), (0, len));
    assert_eq!(answer(driver, ring, 0, text.len()), text);
}

#[test]
fn every_kind_is_registered_once_and_described() {
    for (i, model) in MODELS.iter().enumerate() {
        assert!(!model.about.is_empty() && !model.flag.is_empty());
        let same =
            |other: &&virtio::models::Model| other.kind == model.kind || other.flag == model.flag;
        assert!(!MODELS[..i].iter().any(|m| same(&m)), "{}", model.kind);
    }
}

#[test]
fn what_the_driver_has_taken_is_told_with_what_is_offered() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        let offered = driver.offered();
        assert_eq!(rig.device.features(), (offered, 0), "{}", subject.name);
        assert!(driver.negotiate(VERSION_1));
        assert_eq!(rig.device.features(), (offered, VERSION_1));
        driver.reset();
        assert_eq!(rig.device.features(), (offered, 0));
    }
}

#[test]
fn the_function_is_a_modern_virtio_device_with_all_its_capabilities() {
    for subject in all() {
        let identity = subject.make().identity();
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        let id = 0x1040 + u32::from(identity.device_type);
        assert_eq!(driver.config32(0), id << 16 | 0x1af4, "{}", subject.name);
        assert_eq!(driver.config32(8) & 0xff, 1);
        for kind in [COMMON, NOTIFY, ISR, DEVICE, PCI] {
            assert!(driver.capabilities.contains_key(&kind), "no {kind}");
        }
        let vectors = driver.config32(driver.msix) >> 16 & 0x7ff;
        assert_eq!(
            usize::try_from(vectors).unwrap(),
            identity.queue_sizes.len()
        );
        assert_eq!(usize::from(driver.queues()), identity.queue_sizes.len());
        for (queue, size) in (0..).zip(&identity.queue_sizes) {
            assert_eq!(driver.select(queue), *size);
        }
        assert_eq!(driver.select(driver.queues()), 0);
        assert_eq!(driver.read::<u16>(COMMON, 26), 0);
        assert_eq!(
            driver.offered(),
            identity.features | VERSION_1 | EVENT_IDX | INDIRECT_DESC
        );
        assert_eq!(driver.status(), 0);
    }
}

#[test]
fn only_what_is_offered_can_be_agreed_on_and_then_it_is_fixed() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        let refused = !driver.offered() & (1 << 50 | 1 << 40);
        for features in [0, EVENT_IDX, VERSION_1 | refused] {
            driver.bring_to(Step::Acknowledged, 0);
            assert!(!driver.negotiate(features), "{features:#x}");
            driver.add_status(DRIVER_OK);
            assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);
        }
        driver.bring_to(Step::Acknowledged, 0);
        assert!(driver.negotiate(VERSION_1));
        driver.accept(u64::MAX);
        driver.write(COMMON, 8, 1_u32);
        assert_eq!(driver.read::<u32>(COMMON, 12), 1);
        driver.write(COMMON, 8, 2_u32);
        driver.write(COMMON, 12, u32::MAX);
        assert_eq!(driver.read::<u32>(COMMON, 12), 0);
    }
}

#[test]
fn status_bits_stay_until_a_reset() {
    let rig = Rig::new(&echo().0);
    let driver = Driver::probe(&rig);
    driver.boot();
    driver.set_status(ACKNOWLEDGE);
    assert_eq!(driver.status() & DRIVER_OK, DRIVER_OK);
    driver.set_status(NEEDS_RESET | 0x30);
    assert_eq!(
        driver.status(),
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    );
    driver.reset();
    assert_eq!(rig.events.take(), ["reset", "activated", "reset"]);
}

#[test]
fn a_device_can_be_reset_and_taken_into_use_again_at_every_step() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        for step in STEPS {
            driver.bring_to(step, u64::MAX);
            driver.reset();
            assert_eq!(driver.read::<u16>(COMMON, 28), 0);
            assert_eq!(driver.read::<u16>(COMMON, 16), 0xffff);
            for queue in 0..driver.queues() {
                driver.select(queue);
                assert_eq!(driver.read::<u64>(COMMON, 32), 0);
                assert_eq!(driver.read::<u16>(COMMON, 26), 0xffff);
            }
            driver.boot();
        }
        rig.stop();
        rig.device.reset();
        assert_eq!(driver.status(), 0);
    }
}

#[test]
fn a_device_stops_and_starts_at_every_step() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        for step in STEPS {
            driver.bring_to(step, u64::MAX);
            let status = driver.status();
            for _ in 0..3 {
                rig.stop();
                rig.stop();
                rig.device.start().unwrap();
                rig.device.start().unwrap();
            }
            assert_eq!(driver.status(), status, "{} at {step:?}", subject.name);
        }
        rig.stop();
        rig.unplug();
        let weak = rig.weak();
        drop(rig);
        assert!(weak.upgrade().is_none(), "{} is kept alive", subject.name);
    }
}

#[test]
fn a_device_is_removed_at_every_step_and_lets_go_of_everything() {
    for subject in all() {
        for step in STEPS {
            let rig = Rig::new(&subject);
            let driver = Driver::probe(&rig);
            driver.bring_to(step, u64::MAX);
            rig.stop();
            rig.unplug();
            drop(rig.device.retire());
            assert!(rig.bells.addresses().is_empty(), "{}", subject.name);
            let mut id = [0; 4];
            rig.read(rig.config(0), &mut id);
            assert_eq!(id, [0xff; 4], "{} at {step:?}", subject.name);
        }
    }
}

#[test]
fn a_model_is_dropped_when_it_is_retired_and_late_accesses_do_nothing() {
    let (subject, control) = echo();
    let rig = Rig::new(&subject);
    let driver = Driver::probe(&rig);
    let rings = driver.boot();
    round_trip(&driver, &rings[0], b"before");
    rig.stop();
    rig.unplug();
    drop(rig.device.retire());
    // The test has it, and the subject, which could make another.
    assert_eq!(Arc::strong_count(&control), 2);
    // A vCPU that found the function before it went sets it up once more.
    rig.events.take();
    for status in [0, 1, 3, 11, 15] {
        rig.device.bar_write(0, 20, &[status]);
    }
    for offset in (0..0x40).chain(0x2000..0x2010).chain(0x3000..0x3008) {
        rig.device.bar_write(0, offset, &[1]);
        rig.device.bar_read(0, offset, &mut [0; 4]);
    }
    assert_eq!(rig.interrupts.take(0), 0);
    let told = rig.events.take();
    assert!(!told.iter().any(|e| e.starts_with("broken")), "{told:?}");
    assert!(rig.bells.addresses().is_empty());
}

#[test]
fn a_saved_device_goes_on_elsewhere_from_every_step() {
    for subject in all() {
        for step in STEPS {
            let rig = Rig::new(&subject);
            let driver = Driver::probe(&rig);
            driver.bring_to(step, u64::MAX);
            let status = driver.status();
            rig.stop();
            let saved = rig.save();
            let other = rig.successor(&subject);
            assert_eq!(other.save(), saved, "{} at {step:?}", subject.name);
            other.device.start().unwrap();
            let driver = Driver::probe(&other);
            assert_eq!(driver.status(), status);
            other.stop();
            // A network card has asked its driver to announce itself: that is an interrupt.
            let own = |set: SectionSet| {
                set.sections()[usize::from(subject.name.ends_with("net"))..].to_vec()
            };
            assert_eq!(own(other.save()), own(saved));
            other.device.start().unwrap();
            driver.boot();
            assert_eq!(driver.status() & NEEDS_RESET, 0);
        }
    }
}

#[test]
fn damaged_state_is_refused_or_harmless() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        driver.boot();
        rig.stop();
        let sections = rig.save().sections().to_vec();
        let other = Rig::stopped(&subject, rig.memory.clone());
        for (victim, section) in sections.iter().enumerate() {
            for at in 0..section.body.len() {
                for flip in [0x01, 0x80, 0xff] {
                    let mut damaged = sections.clone();
                    damaged[victim].body[at] ^= flip;
                    let mut set = SectionSet::default();
                    damaged.into_iter().for_each(|s| set.push(s));
                    let _ = other.device.restore(&mut set);
                }
            }
            let mut short = sections.clone();
            let cut = short[victim].body.pop().is_some();
            let mut set = SectionSet::default();
            short.into_iter().for_each(|s| set.push(s));
            assert_eq!(other.device.restore(&mut set).is_err(), cut);
        }
        other.device.reset();
        other.root.start().unwrap();
        other.device.start().unwrap();
        Driver::probe(&other).boot();
    }
}

/// A named change to a saved transport.
type Edit = (&'static str, fn(&mut VirtioPciV1));

#[test]
fn impossible_state_is_refused() {
    let (subject, _) = echo();
    let rig = Rig::new(&subject);
    Driver::probe(&rig).boot();
    rig.stop();
    let sections = rig.save().sections().to_vec();
    let edits: [Edit; 14] = [
        ("unknown status", |s| s.status |= 0x10),
        ("no FEATURES_OK", |s| s.status &= !FEATURES_OK),
        ("unknown feature", |s| s.driver_features |= 1 << 50),
        ("no VERSION_1", |s| s.driver_features &= !VERSION_1),
        ("ISR", |s| s.isr = 4),
        ("config vector", |s| s.config_vector = QUEUES + 1),
        ("queue vector", |s| s.queues[0].vector = QUEUES + 1),
        ("a queue less", |s| drop(s.queues.pop())),
        ("maximum size", |s| s.queues[1].max_size = 32),
        ("size", |s| s.queues[1].size = 3),
        ("no progress", |s| s.queues[0].progress = None),
        ("progress of a disabled queue", |s| {
            s.queues[0].enabled = false;
        }),
        ("alignment", |s| s.queues[0].desc += 1),
        ("a parked head beyond the queue", |s| {
            s.queues[0].progress.as_mut().unwrap().parked = vec![QUEUE_SIZE];
        }),
    ];
    let mut state: VirtioPciV1 = sections[0].decode().unwrap();
    let parked = &mut state.queues[0].progress.as_mut().unwrap().parked;
    *parked = vec![3, 3];
    let twice = Section::encode("dut", &state).unwrap();
    let edited = edits.iter().map(|(name, edit)| {
        let mut state: VirtioPciV1 = sections[0].decode().unwrap();
        edit(&mut state);
        (*name, Section::encode("dut", &state).unwrap())
    });
    let other = Rig::stopped(&subject, rig.memory.clone());
    for (name, section) in edited.chain([("a head parked twice", twice)]) {
        let mut set = SectionSet::default();
        set.push(section);
        set.push(sections[1].clone());
        let result = other.device.restore(&mut set);
        assert!(
            matches!(result, Err(migration::RestoreError::Invalid { .. })),
            "{name}: {result:?}"
        );
    }
}

#[test]
fn configuration_space_reaches_the_registers_through_the_access_capability() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        let at = driver.capabilities[&PCI].0;
        let aim = |offset: u32, len: u32| {
            rig.write(rig.config(at + 4), &[0]);
            rig.write(rig.config(at + 8), &offset.to_le_bytes());
            rig.write(rig.config(at + 12), &len.to_le_bytes());
        };
        aim(22, 2);
        rig.write(rig.config(at + 16), &1_u16.to_le_bytes());
        assert_eq!(driver.read::<u16>(COMMON, 22), 1);
        aim(18, 2);
        let queues = u32::from(driver.queues());
        assert_eq!(driver.config32(at + 16) & 0xffff, queues);
        aim(20, 1);
        rig.write(rig.config(at + 16), &[ACKNOWLEDGE]);
        assert_eq!(driver.status(), ACKNOWLEDGE);
        for (offset, len) in [(1, 2), (2, 4), (0, 3), (0, 8), (0x1_0000, 4), (u32::MAX, 1)] {
            aim(offset, len);
            driver.config32(at + 16);
            rig.write(rig.config(at + 16), &[0xff; 4]);
        }
        assert_eq!(driver.status(), ACKNOWLEDGE);
    }
}

#[test]
fn data_goes_round_with_every_combination_of_ring_features() {
    let rig = Rig::new(&echo().0);
    let driver = Driver::probe(&rig);
    for features in [
        0,
        EVENT_IDX,
        INDIRECT_DESC,
        EVENT_IDX | INDIRECT_DESC | FEATURE,
    ] {
        let rings = driver.bring_to(Step::Running, VERSION_1 | features);
        for count in 0..u16::from(u8::MAX) {
            let ring = &rings[usize::from(count % 2)];
            // Ask for the next interrupt, with event indexes.
            let next = driver.used_index(ring);
            driver.put(ring.avail + 4 + 2 * u64::from(ring.size), next);
            round_trip(&driver, ring, format!("request {count}").as_bytes());
        }
    }
}

#[test]
fn an_indirect_table_is_followed() {
    let rig = Rig::new(&echo().0);
    let driver = Driver::probe(&rig);
    let rings = driver.boot();
    let ring = &rings[1];
    let table = ring.buffers + 0x1000;
    driver.put(ring.buffers, *b"indirect");
    driver.describe(table, 0, (ring.buffers, 8), NEXT, 1);
    driver.describe(table, 1, (ring.buffers + 0x80, 8), WRITE, 0);
    driver.describe(ring.desc, 5, (table, 32), INDIRECT, 0);
    driver.offer(ring, 5);
    driver.kick(1);
    rig.interrupts.wait(1);
    assert_eq!(driver.used(ring, 0), (5, 8));
    assert_eq!(driver.get::<[u8; 8]>(ring.buffers + 0x80), *b"indirect");
}

#[test]
fn with_event_indexes_no_interrupt_comes_before_the_one_asked_for() {
    let rig = Rig::new(&echo().0);
    let driver = Driver::probe(&rig);
    let ring = driver.boot().remove(0);
    let used_event = ring.avail + 4 + 2 * u64::from(ring.size);
    driver.put(used_event, 3_u16);
    for i in 0..4 {
        offer_text(&driver, &ring, 2 * i, b"x");
    }
    driver.kick(0);
    let early = rig.interrupts.wait(0);
    assert_eq!(driver.used_index(&ring), 4);
    rig.stop();
    assert_eq!(early + rig.interrupts.take(0), 1);
}

#[test]
fn queue_registers_are_fixed_once_they_are_in_use() {
    let rig = Rig::new(&echo().0);
    let driver = Driver::probe(&rig);
    driver.bring_to(Step::Interrupts, u64::MAX);
    let ring = driver.ring(0, 8);
    driver.enable(&ring);
    let fields = || -> (u16, u64, u64, u64, u16) {
        driver.select(0);
        (
            driver.read(COMMON, 24),
            driver.read(COMMON, 32),
            driver.read(COMMON, 40),
            driver.read(COMMON, 48),
            driver.read(COMMON, 28),
        )
    };
    let before = fields();
    assert_eq!(before, (8, ring.desc, ring.avail, ring.used, 1));
    let scribble = || {
        driver.select(0);
        driver.write(COMMON, 24, 4_u16);
        driver.write(COMMON, 28, 0_u16);
        for offset in (32..56).step_by(4) {
            driver.write(COMMON, offset, 0x1000_u32);
        }
        for offset in (32..56).step_by(8) {
            driver.write(COMMON, offset, 0x1000_u64);
        }
    };
    scribble();
    assert_eq!(fields(), before);
    driver.add_status(DRIVER_OK);
    scribble();
    assert_eq!(fields(), before);
    // Nor is another queue enabled after DRIVER_OK.
    driver.enable(&Ring {
        index: 1,
        ..ring.clone()
    });
    assert_eq!(driver.read::<u16>(COMMON, 28), 0);
    round_trip(&driver, &ring, b"still here");
}

#[test]
fn sizes_and_vectors_that_do_not_exist_are_not_taken() {
    let rig = Rig::new(&echo().0);
    let driver = Driver::probe(&rig);
    driver.bring_to(Step::Features, u64::MAX);
    driver.select(0);
    for size in [0, 3, QUEUE_SIZE - 1, QUEUE_SIZE * 2, 0x8000, u16::MAX] {
        driver.write(COMMON, 24, size);
        assert_eq!(driver.read::<u16>(COMMON, 24), QUEUE_SIZE, "{size}");
    }
    driver.write(COMMON, 24, 1_u16);
    assert_eq!(driver.read::<u16>(COMMON, 24), 1);
    for offset in [16, 26] {
        driver.write(COMMON, offset, QUEUES);
        assert_eq!(driver.read::<u16>(COMMON, offset), QUEUES);
        driver.write(COMMON, offset, QUEUES + 1);
        assert_eq!(driver.read::<u16>(COMMON, offset), 0xffff);
    }
}

#[test]
fn isr_status_tells_the_cause_and_is_cleared_by_reading() {
    let (subject, control) = echo();
    let rig = Rig::new(&subject);
    let driver = Driver::probe(&rig);
    let rings = driver.boot();
    let generation: u8 = driver.read(COMMON, 21);
    assert_eq!(driver.read::<u8>(ISR, 0), 0);
    round_trip(&driver, &rings[0], b"x");
    assert_eq!(driver.read::<u8>(ISR, 1), 0);
    assert_eq!(driver.read::<u8>(ISR, 0), 1);
    let notifier = control.notifier.lock().unwrap().clone().unwrap();
    notifier.config_changed();
    rig.interrupts.wait(CONFIG_MESSAGE);
    assert_eq!(driver.read::<u32>(ISR, 0), 2);
    assert_eq!(driver.read::<u32>(ISR, 0), 0);
    assert_ne!(driver.read::<u8>(COMMON, 21), generation);
}

#[test]
fn a_driver_is_told_that_its_disk_has_grown_and_other_kinds_do_not_grow() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        driver.boot();
        let look = || {
            let generation: u8 = driver.read(COMMON, 21);
            (driver.read::<u64>(DEVICE, 0), generation)
        };
        let (size, generation) = look();
        let resized = rig.device.resize_disk(3 << 20);
        if subject.name != "blk" {
            assert!(matches!(resized, Err(ResizeError::NoDisk)));
            assert_eq!(rig.interrupts.take(CONFIG_MESSAGE), 0);
            assert_eq!(look(), (size, generation));
            continue;
        }
        resized.unwrap();
        rig.interrupts.wait(CONFIG_MESSAGE);
        let (larger, next) = look();
        assert_eq!((size, larger), ((1 << 20) / 512, (3 << 20) / 512));
        assert_ne!(generation, next);
        // A stopped one grows as well.
        rig.stop();
        rig.device.resize_disk(4 << 20).unwrap();
        rig.interrupts.wait(CONFIG_MESSAGE);
        rig.device.start().unwrap();
        assert_eq!(look().0, (4 << 20) / 512);
    }
}

fn reconfigure(rig: &Rig, patch: Value) -> Result<(), ReconfigureError> {
    let prepare = rig.device.prepare(patch, context())?;
    rig.device.reconfigure(prepare()?)
}

#[test]
fn a_driver_is_told_of_changes_that_it_can_see_and_of_no_others() {
    let (subject, _control) = echo();
    let rig = Rig::new(&subject);
    let driver = Driver::probe(&rig);
    driver.boot();
    let generation: u8 = driver.read(COMMON, 21);
    reconfigure(&rig, json!({})).unwrap();
    assert_eq!(rig.interrupts.take(CONFIG_MESSAGE), 0);
    assert_eq!(driver.read::<u8>(COMMON, 21), generation);
    reconfigure(&rig, json!(77)).unwrap();
    rig.interrupts.wait(CONFIG_MESSAGE);
    assert_eq!(driver.read::<u32>(DEVICE, 0), 77);
    assert_ne!(driver.read::<u8>(COMMON, 21), generation);
}

#[test]
fn what_cannot_be_changed_of_a_device_stays_and_the_device_works() {
    for subject in all() {
        if subject.name == "echo" {
            continue;
        }
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        driver.boot();
        let refused = reconfigure(&rig, json!({"no such key": 1}));
        assert!(
            matches!(
                refused,
                Err(ReconfigureError::Fixed | ReconfigureError::Shape(_))
            ),
            "{}",
            subject.name
        );
        assert_eq!(driver.status() & NEEDS_RESET, 0);
    }
}

#[test]
fn a_broken_device_says_so_once_until_it_is_reset() {
    let (subject, control) = echo();
    let rig = Rig::new(&subject);
    let driver = Driver::probe(&rig);
    let rings = driver.boot();
    rig.events.take();
    let notifier = control.notifier.lock().unwrap().clone().unwrap();
    notifier.needs_reset("test");
    notifier.needs_reset("again");
    assert_eq!(rig.events.take(), ["broken: test"]);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(rig.interrupts.take(CONFIG_MESSAGE), 1);
    rig.stop();
    let other = rig.successor(&subject);
    other.device.start().unwrap();
    let driver = Driver::probe(&other);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(driver.boot().len(), rings.len());
}

#[test]
fn doorbells_are_registered_while_in_use_and_follow_the_bar() {
    let rig = Rig::new(&echo().0);
    let driver = Driver::probe(&rig);
    assert_eq!(driver.bar, HIGH_WINDOW);
    driver.bring_to(Step::Queues, u64::MAX);
    assert!(rig.bells.addresses().is_empty());
    let rings = driver.boot();
    let at = |bar: u64| [bar + 0x3000, bar + 0x3004];
    assert_eq!(rig.bells.addresses(), at(HIGH_WINDOW));
    let moved = HIGH_WINDOW + 0x5_0000;
    rig.write(rig.config(0x10), &0x5_0000_u32.to_le_bytes());
    assert_eq!(rig.bells.addresses(), at(moved));
    round_trip(&Driver::probe(&rig), &rings[1], b"moved");
    rig.write(rig.config(4), &[0]);
    assert!(rig.bells.addresses().is_empty());
    rig.write(rig.config(4), &[2]);
    assert_eq!(rig.bells.addresses(), at(moved));
    rig.stop();
    let other = rig.successor(&echo().0);
    assert_eq!(other.bells.addresses(), at(moved));
    rig.unplug();
    assert!(rig.bells.addresses().is_empty());
    other.device.start().unwrap();
    Driver::probe(&other).reset();
    assert!(other.bells.addresses().is_empty());
}

#[test]
fn kicks_arrive_without_the_hosts_doorbells_too() {
    let rig = Rig::new(&echo().0);
    rig.bells.refuse.store(true, Ordering::SeqCst);
    let driver = Driver::probe(&rig);
    for ring in driver.boot() {
        round_trip(&driver, &ring, b"slow");
    }
    assert!(rig.bells.addresses().is_empty());
}

#[test]
fn requests_from_before_a_stop_are_served_after_the_start() {
    let (subject, _) = echo();
    let rig = Rig::new(&subject);
    let driver = Driver::probe(&rig);
    let rings = driver.boot();
    rig.stop();
    offer_text(&driver, &rings[0], 0, b"late");
    let other = rig.successor(&subject);
    other.device.start().unwrap();
    other.interrupts.wait(0);
    assert_eq!(answer(&Driver::probe(&other), &rings[0], 0, 4), b"late");
}

#[test]
fn parked_requests_survive_a_save() {
    let (subject, control) = echo();
    control.set(Mode::Park);
    let rig = Rig::new(&subject);
    let driver = Driver::probe(&rig);
    let rings = driver.boot();
    offer_text(&driver, &rings[0], 4, b"park");
    driver.kick(0);
    control.wait_held();
    rig.stop();
    assert_eq!(parked(&rig), [4]);
    control.set(Mode::Serve);
    let other = rig.successor(&subject);
    assert_eq!(parked(&other), [4]);
    other.device.start().unwrap();
    other.interrupts.wait(0);
    assert_eq!(Driver::probe(&other).used(&rings[0], 0), (4, 0));
}

fn parked(rig: &Rig) -> Vec<u16> {
    let section = rig.save().take("dut", "virtio-pci").unwrap();
    let state: VirtioPciV1 = section.decode().unwrap();
    state.queues[0].progress.clone().unwrap().parked
}

#[test]
fn a_reset_waits_for_requests_in_flight_without_holding_the_vcpu() {
    let (subject, control) = echo();
    control.set(Mode::Stuck);
    let rig = Rig::new(&subject);
    let driver = Driver::probe(&rig);
    let rings = driver.boot();
    offer_text(&driver, &rings[0], 0, b"stuck");
    driver.kick(0);
    control.wait_held();
    driver.set_status(0);
    for _ in 0..3 {
        assert_ne!(driver.status(), 0);
    }
    // The device is neither usable nor configurable meanwhile.
    driver.set_status(ACKNOWLEDGE);
    driver.write(COMMON, 22, 1_u16);
    assert_eq!(driver.read::<u16>(COMMON, 22), 0);
    assert!(rig.device.stop(soon()).is_err());
    assert_ne!(driver.status(), 0);
    control.set(Mode::Serve);
    assert_eq!(driver.status(), 0);
    let rings = driver.boot();
    round_trip(&driver, &rings[0], b"again");
}

#[test]
fn stopping_the_unit_ends_a_reset_that_is_under_way() {
    let (subject, control) = echo();
    control.set(Mode::Stuck);
    let rig = Rig::new(&subject);
    let driver = Driver::probe(&rig);
    let ring = driver.boot().remove(0);
    offer_text(&driver, &ring, 0, b"stuck");
    driver.kick(0);
    control.wait_held();
    driver.set_status(0);
    control.set(Mode::Serve);
    rig.stop();
    let other = rig.successor(&subject);
    assert_eq!(Driver::probe(&other).status(), 0);
}
