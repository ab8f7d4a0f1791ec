//! The devices that stay, as clients and people are shown them.

use std::collections::BTreeMap;

use api::client::{Client, ClientError};
use api::wire::{DeviceInfo, DeviceState, PciBarType, Resource};

use crate::support::{Served, Vireo, can_run, until};

fn verb(served: &Served, verb: &str) -> String {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vireo"));
    command.args([verb, "--api-socket"]).arg(served.socket());
    let mut verb = Vireo::spawn(&mut command);
    let said = verb.stdout.rest();
    verb.ends_with(0);
    said
}

/// What the machine of the test has.
const THERE: [(&str, (&str, &str, DeviceState)); 8] = [
    ("com1", ("serial", "port 0x3f8", DeviceState::Active)),
    ("com3", ("serial", "port 0x3e8", DeviceState::Present)),
    ("display", ("display", "0000:00:1e.0", DeviceState::Active)),
    ("i8042", ("i8042", "port 0x60", DeviceState::Present)),
    ("pvpanic", ("pvpanic", "port 0x505", DeviceState::Present)),
    ("rtc", ("rtc", "port 0x70", DeviceState::Present)),
    (
        "vmgenid",
        ("vmgenid", "memory 0xf7000", DeviceState::Present),
    ),
    (
        "watchdog",
        ("watchdog", "0000:00:1f.0", DeviceState::Present),
    ),
];

#[test]
fn what_stays_is_listed_with_kind_place_and_state_and_cannot_be_removed() {
    if !can_run() {
        return;
    }
    let flags = [
        "--serial",
        "null",
        "--serial3",
        "null",
        "--watchdog",
        "on",
        "--on-watchdog",
        "pause",
        "--pvpanic",
        "on",
        "--display",
        "width=800,height=600",
    ];
    let served = Served::start("poke", "serial-echo", &flags);
    let mut client = served.client();
    // The guest polls its first port, and knows nothing of the others.
    let first_is_used = |devices: &[DeviceInfo]| {
        let mut devices = devices.iter();
        devices.any(|device| device.id == "com1" && device.state == DeviceState::Active)
    };
    let devices = until("the guest's polling", || {
        let devices = client.devices().unwrap();
        first_is_used(&devices).then_some(devices)
    });
    let shown: BTreeMap<_, _> = devices
        .iter()
        // The screen brings some, which are virtio devices.
        .filter(|device| device.kind != "input")
        .map(|device| {
            let place = device.bdf.as_ref().or(device.address.as_ref());
            let place = place.unwrap().as_str();
            (
                device.id.as_str(),
                (device.kind.as_str(), place, device.state),
            )
        })
        .collect();
    assert_eq!(shown, BTreeMap::from(THERE));
    is_in_the_tree(&mut client);
    is_shown_to_people(&served);

    let refused = client.remove_device("watchdog").unwrap_err();
    let ClientError::Refused { status, .. } = &refused else {
        panic!("{refused}");
    };
    assert_eq!(*status, 400);
    let why = refused.to_string();
    assert!(why.contains("watchdog is part of the machine"), "{why}");
}

fn is_in_the_tree(client: &mut Client) {
    let tree = client.info().unwrap().device_tree.unwrap();
    let com3 = Resource::PioAddressRange {
        base: 0x3e8,
        size: 8,
    };
    assert_eq!(tree["com3"].resources, [com3]);
    assert_eq!(tree["watchdog"].pci_bdf.as_deref(), Some("0000:00:1f.0"));
    let framebuffer = |resource: &Resource| {
        matches!(
            resource,
            Resource::PciBar { base: 0xc000_0000, type_, .. } if *type_ == PciBarType::Mmio32
        )
    };
    assert!(
        tree["display"].resources.iter().any(framebuffer),
        "{:?}",
        tree["display"]
    );
}

fn is_shown_to_people(served: &Served) {
    let table = verb(served, "devices");
    let line = |start: &str, rest: &[&str]| {
        let found = table.lines().find(|line| line.starts_with(start));
        let words: Vec<&str> = found.unwrap().split_whitespace().collect();
        assert_eq!(words[1..], *rest, "{table}");
    };
    line("com1", &["serial", "port", "0x3f8", "active"]);
    line("display", &["display", "0000:00:1e.0", "active"]);
    let facts = verb(served, "info");
    for fact in [
        ("Display", "800x600"),
        ("Watchdog", "pause"),
        ("Panic device", "exit"),
    ] {
        let mut lines = facts.lines();
        let told = lines.any(|line| line.starts_with(fact.0) && line.ends_with(fact.1));
        assert!(told, "{facts}");
    }
}
