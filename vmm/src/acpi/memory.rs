//! Memory devices (ACPI 6.5, section 9.11): one for each slot that memory can be added to.
//!
//! The tables name no proximity domains, so there is no SRAT: Linux then puts
//! what comes into its one node. Memory that is there at boot is in
//! the boot protocol's map alone.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Add, AddressSpace, AddressSpaceCacheable, Arg, CreateQWordField, EISAName, Local, Method,
    MethodCall, Name, ONE, Path, ResourceTemplate, Return, Store, Subtract,
};

use super::AcpiConfig;
use super::dsdt::{Raw, device};
use super::slots::SlotSet;
use crate::layout::port;

const SET: SlotSet = SlotSet {
    letter: b'M',
    port: port::MEMORY_SLOTS,
};

/// Offsets in a QWord address space descriptor (section 6.4.3.5.1).
const MINIMUM: u8 = 14;
const MAXIMUM: u8 = 22;
const LENGTH: u8 = 38;

/// The devices, and the methods that serve them.
pub(super) fn devices(config: &AcpiConfig) -> Vec<u8> {
    let slots = 0..config.memory_slots;
    let mut bytes = Vec::new();
    for slot in slots.clone() {
        bytes.extend(memory(slot));
    }
    if !slots.is_empty() {
        SET.methods(slots, false).to_aml_bytes(&mut bytes);
        resources().to_aml_bytes(&mut bytes);
    }
    bytes
}

/// Takes the events of all memory.
pub(super) fn scan() -> MethodCall<'static> {
    SET.call_scan()
}

fn memory(slot: u32) -> Vec<u8> {
    let range = MethodCall::new(SET.name("CRS"), vec![&slot]);
    let mut body = Raw::default();
    body.add(&Method::new(
        "_CRS".into(),
        0,
        false,
        vec![&Return::new(&range)],
    ));
    device(
        &SET.device(slot),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C80")),
            &SET.common(slot),
            &body,
        ],
    )
}

/// `MCRS(slot)`: the range of the memory in a slot. It is put together in one
/// buffer, of which the caller gets a copy.
fn resources() -> Raw {
    let template = AddressSpace::<u64>::new_memory(
        AddressSpaceCacheable::Cacheable,
        true,
        0,
        (1 << 12) - 1,
        None,
    );
    let (minimum, maximum, length) = (Path::new("MMIN"), Path::new("MMAX"), Path::new("MSIZ"));
    let buffer = Path::new("MRES");
    let mut all = Raw::default();
    all.add(&Name::new(
        "MRES".into(),
        &ResourceTemplate::new(vec![&template]),
    ));
    all.add(&CreateQWordField::new(&minimum, &buffer, &MINIMUM));
    all.add(&CreateQWordField::new(&maximum, &buffer, &MAXIMUM));
    all.add(&CreateQWordField::new(&length, &buffer, &LENGTH));
    all.add(&Method::new(
        SET.name("CRS"),
        1,
        false,
        vec![
            &SET.lock(),
            &Store::new(&SET.name("SEL"), &Arg(0)),
            &Store::new(&minimum, &SET.name("BAS")),
            &Store::new(&length, &SET.name("LEN")),
            &Add::new(&maximum, &minimum, &length),
            &Subtract::new(&maximum, &maximum, &ONE),
            &Store::new(&Local(0), &buffer),
            &SET.unlock(),
            &Return::new(&Local(0)),
        ],
    ));
    all
}
