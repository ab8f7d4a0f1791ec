//! What the drivers of memory that comes and goes, and of keyboards, may rely on beyond what all may.

use devices::Unit;
use devices::input::{InputEvent, Key};

use crate::driver::{CONFIG_MESSAGE, DEVICE, Driver, NEXT, Ring, WRITE};
use crate::rig::Rig;
use crate::subjects::all;

const BLOCK: u64 = 2 << 20;
const REQUESTED: u64 = 48;

/// Asks for blocks at the beginning of the region, which is at address 0 as nobody has said where: type and state of the answer.
fn ask(driver: &Driver<'_>, ring: &Ring, kind: u64, blocks: u64) -> (u16, u16) {
    let before = driver.used_index(ring);
    for (at, word) in [(0, kind), (8, 0), (16, blocks)] {
        driver.put(ring.buffers + at, word);
    }
    driver.describe(ring.desc, 0, (ring.buffers, 24), NEXT, 1);
    driver.describe(ring.desc, 1, (ring.buffers + 0x100, 10), WRITE, 0);
    driver.offer(ring, 0);
    driver.kick(0);
    // With event indexes only the first of them interrupts.
    while driver.used_index(ring) == before {
        std::thread::yield_now();
    }
    assert_eq!(driver.used(ring, before), (0, 10));
    let answer = ring.buffers + 0x100;
    (driver.get(answer), driver.get(answer + 8))
}

#[test]
fn a_driver_is_told_of_another_request_and_other_kinds_have_none() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        driver.boot();
        let requested = rig.device.request_memory(BLOCK);
        assert_eq!(rig.device.memory().is_some(), subject.name == "mem");
        if subject.name != "mem" {
            assert!(requested.is_err());
            assert_eq!(rig.interrupts.take(CONFIG_MESSAGE), 0);
            continue;
        }
        requested.unwrap();
        rig.interrupts.wait(CONFIG_MESSAGE);
        assert_eq!(driver.read::<u64>(DEVICE, REQUESTED), BLOCK);
    }
}

#[test]
fn what_is_plugged_goes_with_the_state_and_stays_over_a_reset() {
    for subject in all().iter().filter(|subject| subject.name == "mem") {
        let rig = Rig::new(subject);
        let driver = Driver::probe(&rig);
        let ring = driver.boot().remove(0);
        assert_eq!(ask(&driver, &ring, 0, 8), (0, 0));
        rig.stop();
        let seen = rig.events.take();
        assert_eq!(seen.last().unwrap(), &format!("memory: {}", 8 * BLOCK));
        let other = rig.successor(subject);
        other.device.start().unwrap();
        let driver = Driver::probe(&other);
        driver.reset();
        let ring = driver.boot().remove(0);
        assert_eq!(ask(&driver, &ring, 3, 8), (0, 0));
        assert_eq!(ask(&driver, &ring, 0, 1), (3, 0));
        assert_eq!(ask(&driver, &ring, 1, 8), (0, 0));
        assert_eq!(ask(&driver, &ring, 3, 8), (0, 1));
    }
}

#[test]
fn only_a_device_in_use_takes_input_and_a_reset_forgets_it() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        assert_eq!(rig.device.input().is_some(), subject.name == "input");
        let Some(queue) = rig.device.input() else {
            continue;
        };
        let press = [InputEvent::key(Key::from_name("a").unwrap(), true)];
        assert!(queue.send(&press).is_err());
        driver.boot();
        queue.send(&press).unwrap();
        rig.stop();
        assert!(queue.send(&press).is_err());
        let other = rig.successor(&subject);
        let waiting = other.device.input().unwrap();
        assert_eq!(waiting.save(), queue.save());
        assert_eq!(waiting.save().reports.len(), 1);
        other.device.start().unwrap();
        Driver::probe(&other).reset();
        assert!(waiting.save().reports.is_empty());
        assert!(waiting.send(&press).is_err());
    }
}
