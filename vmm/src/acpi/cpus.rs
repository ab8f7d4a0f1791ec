//! Processors, as devices (ACPI 6.5, section 8.4); `_UID` is the one in the MADT.
//!
//! Where vCPUs come and go, all but the first have `_STA`, `_EJ0` and `_OST`, and a
//! `_MAT` that is the MADT's entry of a vCPU that is there: Linux looks for
//! the APIC id of one that came in either, and wants it enabled.

use acpi_tables::Aml;
use acpi_tables::aml::{BufferData, MethodCall, Name};

use super::dsdt::{Raw, device};
use super::slots::SlotSet;
use super::tables::{bytes_of, local_apic};
use super::{AcpiConfig, Processor};
use crate::layout::port;

const SET: SlotSet = SlotSet {
    letter: b'C',
    port: port::CPU_SLOTS,
};

/// The devices, and the methods that serve them.
pub(super) fn devices(config: &AcpiConfig) -> Vec<u8> {
    let ids = (0..=u8::MAX).zip(&config.processors).map(|(id, _)| id);
    let mut bytes = Vec::new();
    for id in ids.clone() {
        let slotted = config.cpu_slots && id > 0;
        bytes.extend(if slotted { in_slot(id) } else { fixed(id) });
    }
    if config.cpu_slots {
        SET.methods(ids.skip(1).map(u32::from), true)
            .to_aml_bytes(&mut bytes);
    }
    bytes
}

/// Takes the events of all vCPUs.
pub(super) fn scan() -> MethodCall<'static> {
    SET.call_scan()
}

fn hid() -> Name {
    Name::new("_HID".into(), &"ACPI0007")
}

fn fixed(id: u8) -> Vec<u8> {
    let uid = Name::new("_UID".into(), &u32::from(id));
    device(&SET.device(id.into()), vec![&hid(), &uid])
}

fn in_slot(id: u8) -> Vec<u8> {
    let entry = bytes_of(&local_apic(id, Processor::Present));
    let mut body = Raw::default();
    body.add(&Name::new("_MAT".into(), &BufferData::new(entry)));
    let slot = u32::from(id);
    device(
        &SET.device(slot),
        vec![&hid(), &SET.common(slot), &SET.eject(slot), &body],
    )
}
