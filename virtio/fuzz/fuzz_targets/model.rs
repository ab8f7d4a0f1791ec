//! Any bytes as what a guest does with one kind of device, whose name is in `FUZZ_MODEL`.
//!
//! Whatever it was, the device stops soon, its state can be restored, and a driver can take it into use again.
#![no_main]
#![allow(
    dead_code,
    reason = "the machine is that of the conformance suite, of which not all is needed"
)]

#[path = "../../tests/conformance/driver.rs"]
mod driver;
#[path = "../../tests/conformance/echo.rs"]
mod echo;
mod guest;
mod input;
#[path = "../../tests/conformance/rig.rs"]
mod rig;
#[path = "../../tests/conformance/subjects.rs"]
mod subjects;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use virtio::models::{Model, find};

static MODEL: LazyLock<&'static Model> = LazyLock::new(|| {
    let kind = std::env::var("FUZZ_MODEL").expect("FUZZ_MODEL names a model");
    find(&kind).unwrap_or_else(|| panic!("there is no model {kind}"))
});

fuzz_target!(|bytes: &[u8]| {
    let subject = subjects::Subject::model(*MODEL);
    guest::Guest::new(&subject).run(input::Input(bytes));
});
