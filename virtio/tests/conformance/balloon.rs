//! What a balloon's driver may rely on beyond what all may.

use devices::Unit;
use virtio::models::balloon::BalloonChange;

use crate::driver::{COMMON, CONFIG_MESSAGE, DEVICE, Driver};
use crate::rig::Rig;
use crate::subjects::all;

const TARGET: BalloonChange = BalloonChange::Target(3 << 20);

#[test]
fn a_driver_is_told_of_another_target_and_other_kinds_have_none() {
    for subject in all() {
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        driver.boot();
        let generation: u8 = driver.read(COMMON, 21);
        let changed = rig.device.change_balloon(TARGET);
        assert_eq!(rig.device.balloon().is_some(), subject.name == "balloon");
        if subject.name != "balloon" {
            assert!(changed.is_err());
            assert_eq!(rig.interrupts.take(CONFIG_MESSAGE), 0);
            continue;
        }
        changed.unwrap();
        rig.interrupts.wait(CONFIG_MESSAGE);
        assert_ne!(driver.read::<u8>(COMMON, 21), generation);
        assert_eq!(driver.read::<u32>(DEVICE, 0), 768);
        // A stopped one is told as well.
        rig.stop();
        rig.device.change_balloon(BalloonChange::Target(0)).unwrap();
        rig.interrupts.wait(CONFIG_MESSAGE);
        rig.device.start().unwrap();
        assert_eq!(driver.read::<u32>(DEVICE, 0), 0);
    }
}

#[test]
fn a_target_goes_with_the_state_and_stays_over_a_reset() {
    for subject in all() {
        if subject.name != "balloon" {
            continue;
        }
        let rig = Rig::new(&subject);
        let driver = Driver::probe(&rig);
        driver.boot();
        rig.device.change_balloon(TARGET).unwrap();
        driver.write(DEVICE, 4, 768_u32);
        assert_eq!(rig.events.take().last().unwrap(), "balloon: 3145728");
        rig.stop();
        let other = rig.successor(&subject);
        other.device.start().unwrap();
        let driver = Driver::probe(&other);
        assert_eq!(driver.read::<u64>(DEVICE, 0), 768 << 32 | 768);
        driver.reset();
        assert_eq!(driver.read::<u64>(DEVICE, 0), 768);
        assert_eq!(other.device.balloon().unwrap().actual(), 0);
    }
}
