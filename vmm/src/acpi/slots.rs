//! The AML of slots: registers, status, answers and the search for events.
//!
//! vCPUs and memory have a set each, whose names begin with a letter of their
//! own. The registers are `devices::acpi::hotplug`'s. Whoever selects a slot holds the set's mutex.

use acpi_tables::aml::{
    Acquire, And, Arg, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    If, Local, Method, MethodCall, Mutex, Name, NotEqual, Notify, OpRegion, OpRegionSpace, Path,
    Release, Return, Store, While, ZERO,
};
use devices::acpi::hotplug::{FILLED, GIVE_BACK, LEN, NEW, NO_SLOT, TO_GO};

use super::dsdt::Raw;

/// What `_STA` says of something that is there (ACPI 6.5, section 6.3.7).
const STA_PRESENT: u8 = 0x0F;
/// Notifications (section 5.6.6, table 5.166).
const NOTIFY_DEVICE_CHECK: u8 = 1;
const NOTIFY_EJECT_REQUEST: u8 = 3;
/// The mutex is waited for without limit.
const FOR_EVER: u16 = 0xFFFF;

/// One set of slots.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotSet {
    /// Begins the names of the set: `C` for `CSTA` and `C000`.
    pub(super) letter: u8,
    /// The first of the registers' ports.
    pub(super) port: u16,
}

impl SlotSet {
    /// A name of the set: its letter and three others.
    pub(super) fn name(self, rest: &str) -> Path {
        Path::new(&format!("{}{rest}", char::from(self.letter)))
    }

    /// The device in a slot.
    pub(super) fn device(self, slot: u32) -> String {
        format!("{}{slot:03X}", char::from(self.letter))
    }

    fn field(self, rest: &[u8; 3]) -> [u8; 4] {
        let [a, b, c] = *rest;
        [self.letter, a, b, c]
    }

    /// Registers and methods of the set, whose slots `noted` can come or go:
    ///
    /// * `xSTA(slot)` and `xOST(slot, event, status)` serve the devices' own methods;
    /// * `xEJ0(slot)` gives a slot back, if `ejects`;
    /// * `xSCN()` takes all events and notifies the devices.
    pub(super) fn methods(self, noted: impl Iterator<Item = u32>, ejects: bool) -> Raw {
        let mut all = Raw::default();
        all.add(&OpRegion::new(
            self.name("REG"),
            OpRegionSpace::SystemIO,
            &self.port,
            &LEN,
        ));
        all.add(&Field::new(
            self.name("REG"),
            FieldAccessType::DWord,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            [
                (b"SEL", 32),
                (b"CTL", 32),
                (b"NXT", 32),
                (b"OSC", 32),
                (b"BAS", 64),
                (b"LEN", 64),
            ]
            .map(|(rest, bits)| FieldEntry::Named(self.field(rest), bits))
            .into(),
        ));
        all.add(&Mutex::new(self.name("LCK"), 0));
        all.add(&self.status());
        all.add(&self.answer());
        if ejects {
            all.add(&self.give_back());
        }
        all.add(&self.notify(noted));
        all.add(&self.scan());
        all
    }

    /// Holds the set.
    pub(super) fn lock(self) -> Acquire {
        Acquire::new(self.name("LCK"), FOR_EVER)
    }

    /// Lets the set go.
    pub(super) fn unlock(self) -> Release {
        Release::new(self.name("LCK"))
    }

    fn status(self) -> Raw {
        let (select, control) = (self.name("SEL"), self.name("CTL"));
        let mut method = Raw::default();
        method.add(&Method::new(
            self.name("STA"),
            1,
            false,
            vec![
                &self.lock(),
                &Store::new(&select, &Arg(0)),
                &Store::new(&Local(0), &ZERO),
                &If::new(
                    &And::new(&ZERO, &control, &FILLED),
                    vec![&Store::new(&Local(0), &STA_PRESENT)],
                ),
                &self.unlock(),
                &Return::new(&Local(0)),
            ],
        ));
        method
    }

    fn answer(self) -> Raw {
        let mut method = Raw::default();
        method.add(&Method::new(
            self.name("OST"),
            3,
            false,
            vec![
                &self.lock(),
                &Store::new(&self.name("SEL"), &Arg(0)),
                &Store::new(&self.name("NXT"), &Arg(1)),
                &Store::new(&self.name("OSC"), &Arg(2)),
                &self.unlock(),
            ],
        ));
        method
    }

    fn give_back(self) -> Raw {
        let mut method = Raw::default();
        method.add(&Method::new(
            self.name("EJ0"),
            1,
            false,
            vec![
                &self.lock(),
                &Store::new(&self.name("SEL"), &Arg(0)),
                &Store::new(&self.name("CTL"), &GIVE_BACK),
                &self.unlock(),
            ],
        ));
        method
    }

    /// `xNTF(slot, value)`: notifications need a device's name, which AML cannot compute.
    fn notify(self, slots: impl Iterator<Item = u32>) -> Raw {
        let mut body = Raw::default();
        for slot in slots {
            body.add(&If::new(
                &Equal::new(&Arg(0), &slot),
                vec![&Notify::new(&Path::new(&self.device(slot)), &Arg(1))],
            ));
        }
        let mut method = Raw::default();
        method.add(&Method::new(self.name("NTF"), 2, false, vec![&body]));
        method
    }

    /// Takes each event before it notifies: one that comes meanwhile is found again.
    fn scan(self) -> Raw {
        let (next, control) = (self.name("NXT"), self.name("CTL"));
        let (slot, events) = (Local(0), Local(1));
        let notify = |value: &'static u8| MethodCall::new(self.name("NTF"), vec![&Local(0), value]);
        let mut method = Raw::default();
        method.add(&Method::new(
            self.name("SCN"),
            0,
            false,
            vec![
                &self.lock(),
                &Store::new(&slot, &next),
                &While::new(
                    &NotEqual::new(&slot, &NO_SLOT),
                    vec![
                        &Store::new(&self.name("SEL"), &slot),
                        &And::new(&events, &control, &(NEW | TO_GO)),
                        &Store::new(&control, &events),
                        &If::new(
                            &And::new(&ZERO, &events, &NEW),
                            vec![&notify(&NOTIFY_DEVICE_CHECK)],
                        ),
                        &If::new(
                            &And::new(&ZERO, &events, &TO_GO),
                            vec![&notify(&NOTIFY_EJECT_REQUEST)],
                        ),
                        &Store::new(&slot, &next),
                    ],
                ),
                &self.unlock(),
            ],
        ));
        method
    }

    /// What every device in a slot has: `_UID`, `_STA` and `_OST`.
    pub(super) fn common(self, slot: u32) -> Raw {
        let mut all = Raw::default();
        all.add(&Name::new("_UID".into(), &slot));
        all.add(&Method::new(
            "_STA".into(),
            0,
            false,
            vec![&Return::new(&MethodCall::new(
                self.name("STA"),
                vec![&slot],
            ))],
        ));
        all.add(&Method::new(
            "_OST".into(),
            3,
            false,
            vec![&MethodCall::new(
                self.name("OST"),
                vec![&slot, &Arg(0), &Arg(1)],
            )],
        ));
        all
    }

    /// `_EJ0` of the device in a slot.
    pub(super) fn eject(self, slot: u32) -> Raw {
        let mut method = Raw::default();
        method.add(&Method::new(
            "_EJ0".into(),
            1,
            false,
            vec![&MethodCall::new(self.name("EJ0"), vec![&slot])],
        ));
        method
    }

    /// The call that takes all events, for the event device.
    pub(super) fn call_scan(self) -> MethodCall<'static> {
        MethodCall::new(self.name("SCN"), Vec::new())
    }
}
