//! Any bytes as accesses to a device's configuration space and registers, of any width anywhere.
//!
//! What the device is cannot be changed, and a reset mends everything.
#![no_main]
#![allow(
    dead_code,
    reason = "the machine is that of the conformance suite, of which not all is needed"
)]

#[path = "../../tests/conformance/driver.rs"]
mod driver;
#[path = "../../tests/conformance/echo.rs"]
mod echo;
mod input;
#[path = "../../src/vhost/peer.rs"]
mod peer;
#[path = "../../tests/conformance/rig.rs"]
mod rig;
#[path = "../../tests/conformance/subjects.rs"]
mod subjects;

use std::sync::Arc;

use devices::Unit;
use driver::{COMMON, DRIVER_OK, Driver, Step};
use input::Input;
use libfuzzer_sys::fuzz_target;
use rig::{ECAM, HIGH_WINDOW, LOW_WINDOW, Rig};
use subjects::Subject;

/// The most accesses of one input.
const ACCESSES: usize = 256;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let subject = Subject::echo(&Arc::default());
    let rig = Rig::new(&subject);
    let driver = Driver::probe(&rig);
    let identity = [0, 8, 0x2c].map(|register| driver.config32(register));
    if input.byte() & 1 == 1 {
        driver.bring_to(Step::Queues, u64::MAX);
        driver.add_status(DRIVER_OK);
    }
    let bar = driver.bar;
    for _ in 0..ACCESSES {
        let Some(what) = input.next() else { break };
        access(&rig, bar, what, &mut input);
    }
    let after = [0, 8, 0x2c].map(|register| driver.config32(register));
    assert_eq!(after, identity);
    rig.stop();
    rig.device.reset();
    rig.root.reset();
    rig.device.start().expect("a transport starts");
    Driver::probe(&rig).boot();
});

fn access(rig: &Rig, bar: u64, what: u8, input: &mut Input<'_>) {
    let len = usize::from(what >> 4 & 7) + 1;
    let address = match what & 15 {
        0..=4 => rig.config(u64::from(input.byte())),
        5 => rig.config(u64::from(input.half() & 0xfff)),
        6..=9 => bar + u64::from(input.byte() & 63),
        10 => bar + u64::from(input.half()),
        11 => ECAM + u64::from(input.half()) * 16,
        // The BAR may have been moved to there.
        12 => LOW_WINDOW + u64::from(input.half()) * 16,
        13 => HIGH_WINDOW + u64::from(input.half()) * 16,
        14 => {
            rig.stop();
            rig.device.start().expect("a transport starts");
            return;
        }
        _ => {
            let status = rig.config(0x10);
            let mut low = [0; 4];
            rig.read(status, &mut low);
            (u64::from(u32::from_le_bytes(low)) & !0xf) + u64::from(COMMON)
        }
    };
    if what & 0x80 == 0 {
        let value = input.number();
        rig.write(address, &value.to_le_bytes()[..len]);
    }
    let mut back = [0; 8];
    rig.read(address, &mut back[..len]);
}
