//! The DSDT: the namespace of devices.
//!
//! Devices are described as they are: a system that believes the table needs
//! no probing. `_STA` is left out except of what comes and goes, which says present and
//! working (ACPI 6.5, section 6.3.7). The PCI bus has no `_PRT`: functions signal by
//! message alone and have no interrupt pins.
//!
//! Each slot of the bus is a device that can be ejected, whether or not it
//! holds a function; the system asks configuration space for that.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local,
    Memory32Fixed, Method, MethodCall, Name, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Or,
    Package, Path, ResourceTemplate, Return, Scope, Store, Subtract, Uuid, While, ZERO,
};
use acpi_tables::sdt::Sdt;
use devices::acpi::hotplug;

use super::tables::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, address32};
use super::{AcpiConfig, AcpiError, cpus, memory};
use crate::layout::memory::{ECAM_LEN, ECAM_START, GENERATION_ID};
use crate::layout::{COMS, PCI_SLOTS, ged_event, gsi, port};
use devices::pci::HOTPLUG_LEN;

/// Integers have 64 bits from this revision on (section 5.2.11.1).
const DSDT_REVISION: u8 = 2;
const HEADER_LEN: u32 = 36;

/// For S5 (section 7.4.2.5): the value of the sleep control register's SLP_TYP field.
const S5_SLEEP_TYPE: u8 = 5;
/// What a control-method power button notifies (section 5.6.6, table 5.167).
const NOTIFY_PRESSED: u8 = 0x80;

/// What a changed generation id notifies.
const NOTIFY_GENERATION: u8 = 0x80;

/// What hot-plug notifies a slot (section 5.6.6, table 5.166): look what is there
/// now, and give up what is there.
const NOTIFY_DEVICE_CHECK: u8 = 1;
const NOTIFY_EJECT_REQUEST: u8 = 3;
/// How often and at what distance, in milliseconds, `_EJ0` looks whether the slot
/// is empty: longer than a back end may take to drain.
const EJECT_LOOKS: u16 = 1000;
const EJECT_REST: u8 = 10;

/// `_OSC` of a PCI host bridge (PCI Firmware Specification 3.3, section 4.5.1).
const PCI_OSC_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// What is the system's to control: PME, AER, the capability structure, LTR. Not
/// native hot plug, PCI Express or SHPC, for which there is no hardware.
const PCI_OSC_GRANTED: u8 = 0b11_1100;
/// Status bits of `_OSC`'s first word (section 6.2.11.2).
const OSC_UNKNOWN_UUID: u8 = 1 << 2;
const OSC_UNKNOWN_REVISION: u8 = 1 << 3;
const OSC_MASKED: u8 = 1 << 4;

/// The table's bytes, header included.
pub(super) fn dsdt(config: &AcpiConfig) -> Result<Vec<u8>, AcpiError> {
    let mut devices = pci_bus(config)?;
    devices.extend(motherboard(config));
    devices.extend(event_device(config));
    devices.extend(keyboard_and_mouse());
    devices.extend(clock());
    devices.extend(generation_id());
    devices.extend(serials(config.serials));
    if config.pvpanic {
        devices.extend(pvpanic());
    }
    devices.extend(cpus::devices(config));
    devices.extend(memory::devices(config));

    let mut body = Scope::raw("\\_SB_".into(), devices);
    let s5 = Package::new(vec![&S5_SLEEP_TYPE, &ZERO, &ZERO, &ZERO]);
    Name::new("\\_S5_".into(), &s5).to_aml_bytes(&mut body);

    let mut table = Sdt::new(
        *b"DSDT",
        HEADER_LEN,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(&body);
    Ok(table.as_slice().to_vec())
}

pub(super) fn device(name: &str, children: Vec<&dyn Aml>) -> Vec<u8> {
    let mut bytes = Vec::new();
    Device::new(name.into(), children).to_aml_bytes(&mut bytes);
    bytes
}

/// Ports `first` to `first + len - 1`.
fn ports(first: u16, len: u8) -> IO {
    IO::new(first, first, 1, len)
}

/// A pin of the I/O APIC: edge-triggered, active high, not shared.
fn interrupt(pin: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, pin)
}

/// A device with a plug-and-play id and resources that are fixed.
fn fixed_device(name: &str, id: &str, resources: Vec<&dyn Aml>) -> Vec<u8> {
    device(
        name,
        vec![
            &Name::new("_HID".into(), &EISAName::new(id)),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    )
}

/// The host bridge (PCI Firmware Specification 3.3, section 4.3): bus 0, the
/// configuration ports, and the windows for base addresses. There is no I/O
/// window, since no function has I/O ports.
fn pci_bus(config: &AcpiConfig) -> Result<Vec<u8>, AcpiError> {
    let bus = AddressSpace::<u16>::new_bus_number(0, 0);
    let ports = ports(port::PCI_CONFIG, 8);
    let last = config.pci_mmio32.last(32)?;
    let window32 = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        address32(config.pci_mmio32.start),
        address32(last),
        None,
    );
    let window64 = match config.pci_mmio64 {
        Some(window) => Some(AddressSpace::<u64>::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            window.start,
            window.last(64)?,
            None,
        )),
        None => None,
    };
    let mut resources: Vec<&dyn Aml> = vec![&bus, &ports, &window32];
    if let Some(window) = &window64 {
        resources.push(window);
    }
    Ok(device(
        "PCI0",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            &pci_osc(),
            &pci_hotplug(),
        ],
    ))
}

/// The slots and their methods, over [`devices::pci::PciHotplug`]'s registers.
///
/// * `PCNT`, which the event device calls, notifies the slots whose bits are set.
/// * `_EJ0` of a slot (section 6.3.3) calls `PCEJ` with the slot's bit: it gives
///   the slot up and waits until it is empty, so that a system that looks at
///   the bus next does not find what is about to go.
fn pci_hotplug() -> Raw {
    let mut all = Raw::default();
    all.add(&OpRegion::new(
        "PCHP".into(),
        OpRegionSpace::SystemIO,
        &port::PCI_HOTPLUG,
        &HOTPLUG_LEN,
    ));
    let fields = [*b"PCUP", *b"PCDN", *b"PCEA"].map(|name| FieldEntry::Named(name, 32));
    all.add(&Field::new(
        "PCHP".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.into(),
    ));
    for slot in 1..=PCI_SLOTS {
        all.add(&Raw(pci_slot(slot)));
    }
    all.add(&pci_eject());
    all.add(&pci_notify());
    all.add(&Method::new(
        "PCNT".into(),
        0,
        true,
        vec![
            &MethodCall::new(
                "PCNF".into(),
                vec![&Path::new("PCUP"), &NOTIFY_DEVICE_CHECK],
            ),
            &MethodCall::new(
                "PCNF".into(),
                vec![&Path::new("PCDN"), &NOTIFY_EJECT_REQUEST],
            ),
        ],
    ));
    all
}

fn slot_name(slot: u8) -> String {
    format!("S{slot:03X}")
}

fn slot_bit(slot: u8) -> u32 {
    1 << slot
}

/// `_ADR` (section 6.1.1) is function 0 of the slot, `_SUN` (6.1.11) what
/// people call it.
fn pci_slot(slot: u8) -> Vec<u8> {
    let bit = slot_bit(slot);
    let eject = MethodCall::new("PCEJ".into(), vec![&bit]);
    device(
        &slot_name(slot),
        vec![
            &Name::new("_ADR".into(), &(u32::from(slot) << 16)),
            &Name::new("_SUN".into(), &slot),
            &Method::new("_EJ0".into(), 1, false, vec![&eject]),
        ],
    )
}

/// `PCEJ`: Arg0 is the slot's bit.
fn pci_eject() -> Raw {
    let (register, looks, busy) = (Path::new("PCEA"), Local(0), Local(1));
    let mut method = Raw::default();
    method.add(&Method::new(
        "PCEJ".into(),
        1,
        false,
        vec![
            &Store::new(&register, &Arg(0)),
            &Store::new(&looks, &EJECT_LOOKS),
            &While::new(
                &looks,
                vec![
                    &Subtract::new(&looks, &looks, &ONE),
                    &And::new(&busy, &register, &Arg(0)),
                    &If::new(&busy, vec![&Sleep(EJECT_REST)]),
                    &Else::new(vec![&Store::new(&looks, &ZERO)]),
                ],
            ),
        ],
    ));
    method
}

/// `PCNF`: Arg0 are the slots' bits, Arg1 what to notify them.
fn pci_notify() -> Raw {
    let mut body = Raw::default();
    for slot in 1..=PCI_SLOTS {
        body.add(&If::new(
            &And::new(&ZERO, &Arg(0), &slot_bit(slot)),
            vec![&Notify::new(&Path::new(&slot_name(slot)), &Arg(1))],
        ));
    }
    let mut method = Raw::default();
    method.add(&Method::new("PCNF".into(), 2, false, vec![&body]));
    method
}

/// Rests for so many milliseconds (section 19.6.125).
struct Sleep(u8);

impl Aml for Sleep {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&[0x5B, 0x22]);
        self.0.to_aml_bytes(sink);
    }
}

/// `_OSC`: Arg0 is the UUID, Arg1 the revision, Arg3 a buffer of status,
/// support and control words, returned with what is granted.
fn pci_osc() -> Raw {
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let granted = Local(0);
    let mut method = Raw::default();
    method.add(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &Arg(3), &ZERO),
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new(PCI_OSC_UUID)),
                vec![
                    &CreateDWordField::new(&control, &Arg(3), &8u8),
                    &And::new(&granted, &control, &PCI_OSC_GRANTED),
                    &If::new(
                        &NotEqual::new(&Arg(1), &ONE),
                        vec![&Or::new(&status, &status, &OSC_UNKNOWN_REVISION)],
                    ),
                    &If::new(
                        &NotEqual::new(&control, &granted),
                        vec![&Or::new(&status, &status, &OSC_MASKED)],
                    ),
                    &Store::new(&control, &granted),
                ],
            ),
            &Else::new(vec![&Or::new(&status, &status, &OSC_UNKNOWN_UUID)]),
            &Return::new(&Arg(3)),
        ],
    ));
    method
}

/// AML that was encoded before.
#[derive(Default)]
pub(super) struct Raw(Vec<u8>);

impl Raw {
    pub(super) fn add(&mut self, aml: &dyn Aml) {
        aml.to_aml_bytes(&mut self.0);
    }
}

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// Reserves what no other device claims: the ECAM (PCI Firmware Specification
/// 3.3, section 4.1.2, asks for that), and the
/// ports of sleep, events, hot-plug and debugging. The event device cannot claim its own: its
/// resources are interrupts only.
fn motherboard(config: &AcpiConfig) -> Vec<u8> {
    let ecam = Memory32Fixed::new(true, address32(ECAM_START), address32(ECAM_LEN));
    let mut claimed = vec![
        ports(port::DEBUGCON, 1),
        ports(port::SLEEP_CONTROL, 2),
        ports(port::GED_EVENTS, 4),
        ports(port::PCI_HOTPLUG, HOTPLUG_LEN),
    ];
    if config.cpu_slots {
        claimed.push(ports(port::CPU_SLOTS, hotplug::LEN));
    }
    if config.memory_slots > 0 {
        claimed.push(ports(port::MEMORY_SLOTS, hotplug::LEN));
    }
    let mut resources: Vec<&dyn Aml> = vec![&ecam];
    resources.extend(claimed.iter().map(|ports| ports as &dyn Aml));
    fixed_device("MBRD", "PNP0C02", resources)
}

/// The generic event device (section 5.6.9) and what it tells of: the power
/// button (section 4.8.3.2.2), a changed generation id and hot-plug. `_EVT` reads the pending events,
/// which clears them and lowers the line.
fn event_device(config: &AcpiConfig) -> Vec<u8> {
    let pending = Local(0);
    let register = Path::new("GEVT");
    let mut handler = Raw::default();
    handler.add(&Store::new(&pending, &register));
    let mut on = |event: u32, then: &dyn Aml| {
        handler.add(&If::new(&And::new(&ZERO, &pending, &event), vec![then]));
    };
    on(
        ged_event::POWER_BUTTON,
        &Notify::new(&Path::new("PWRB"), &NOTIFY_PRESSED),
    );
    on(
        ged_event::PCI_HOTPLUG,
        &MethodCall::new("\\_SB_.PCI0.PCNT".into(), Vec::new()),
    );
    on(
        ged_event::GENERATION_ID,
        &Notify::new(&Path::new("VGEN"), &NOTIFY_GENERATION),
    );
    if config.cpu_slots {
        on(ged_event::CPU_HOTPLUG, &cpus::scan());
    }
    if config.memory_slots > 0 {
        on(ged_event::MEMORY_HOTPLUG, &memory::scan());
    }
    let mut bytes = device(
        "PWRB",
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))],
    );
    bytes.extend(device(
        "GED_",
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, false, false, false, gsi::GED)]),
            ),
            &OpRegion::new(
                "GEDR".into(),
                OpRegionSpace::SystemIO,
                &port::GED_EVENTS,
                &4u8,
            ),
            &Field::new(
                "GEDR".into(),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"GEVT", 32)],
            ),
            &Method::new("_EVT".into(), 1, true, vec![&handler]),
        ],
    ));
    bytes
}

/// The i8042: a keyboard, which owns the ports, and a mouse.
fn keyboard_and_mouse() -> Vec<u8> {
    let mut bytes = fixed_device(
        "KBD_",
        "PNP0303",
        vec![
            &ports(port::I8042, 1),
            &ports(port::I8042 + 4, 1),
            &interrupt(gsi::KEYBOARD),
        ],
    );
    bytes.extend(fixed_device(
        "MOUS",
        "PNP0F13",
        vec![&interrupt(gsi::MOUSE)],
    ));
    bytes
}

/// The real-time clock.
fn clock() -> Vec<u8> {
    fixed_device(
        "RTC_",
        "PNP0B00",
        vec![&ports(port::RTC, 2), &interrupt(gsi::RTC)],
    )
}

/// The generation id (Virtual Machine Generation ID, Microsoft 2012): by `ADDR` a driver finds
/// the 16 bytes, as two halves of their address. The name that the paper gives is longer than an
/// id may be, so it is there in both of the spellings that drivers know.
fn generation_id() -> Vec<u8> {
    const NAME: &str = "VM_Gen_Counter";
    const HALVES: [u64; 2] = [GENERATION_ID & 0xffff_ffff, GENERATION_ID >> 32];
    let [low, high] = HALVES;
    device(
        "VGEN",
        vec![
            &Name::new("_HID".into(), &"VREO0001"),
            &Name::new("_CID".into(), &Package::new(vec![&"VMGENCTR", &NAME])),
            &Name::new("_DDN".into(), &NAME),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )
}

/// COM1 to COM4, as far as they are there: 16550As.
fn serials(there: [bool; 4]) -> Vec<u8> {
    let names = ["COM1", "COM2", "COM3", "COM4"].into_iter();
    let all = names.zip(COMS).zip(there);
    let present: Vec<_> = all
        .filter(|(_, there)| *there)
        .map(|(com, _)| com)
        .collect();
    let mut bytes = Vec::new();
    for (index, (name, com)) in (0u8..).zip(&present) {
        let uses = present.iter().filter(|(_, other)| other.gsi == com.gsi);
        let shared = uses.count() > 1;
        let ports = ports(com.port, 8);
        let interrupt = Interrupt::new(true, true, false, shared, com.gsi);
        let id = EISAName::new("PNP0501");
        let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
        let (id, uid) = (
            Name::new("_HID".into(), &id),
            Name::new("_UID".into(), &index),
        );
        let resources = Name::new("_CRS".into(), &resources);
        let mut children: Vec<&dyn Aml> = vec![&id, &resources];
        if present.len() > 1 {
            // Several devices of one id are told apart by another (ACPI 6.5, 6.1.12).
            children.push(&uid);
        }
        bytes.extend(device(name, children));
    }
    bytes
}

/// pvpanic, by which the guest tells that it crashed (QEMU's `docs/specs/pvpanic.rst`).
fn pvpanic() -> Vec<u8> {
    device(
        "PEVT",
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&ports(port::PVPANIC, 1)]),
            ),
        ],
    )
}
