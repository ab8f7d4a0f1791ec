use std::fs;
use std::path::Path;
use std::sync::Arc;

use block::open_disk;
use serde_json::json;
use virtio::models::MODELS;

use super::*;
use crate::config::HostLimits;

const SIZE: u64 = 1 << 20;

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn processors() -> Processors {
    Processors {
        cpuid: vec![
            leaf(0, 0, [0x16, 0x756E_6547, 0x6C65_746E, 0x4965_6E69]),
            leaf(1, 0, [0x806F8, 0x800, 1 << 9 | 1 << 28, 0x1FF]),
            leaf(7, 0, [1, 1 << 5 | 1 << 16, 0, 0]),
            leaf(7, 1, [0, 0, 0, 0]),
        ],
        tsc_khz: 2_400_000,
        msrs: vec![0x10, 0xC000_0102],
    }
}

fn machine(devices: serde_json::Value) -> VmConfig {
    let mut config: VmConfig = serde_json::from_value(json!({
        "name": "moved",
        "cpus": { "boot": 2 },
        "payload": { "kernel": "/k" },
        "devices": devices,
    }))
    .unwrap();
    config.complete(MODELS);
    config.validate(MODELS, &HostLimits::read()).unwrap();
    config
}

fn devices() -> serde_json::Value {
    json!([
        { "kind": "blk", "id": "d", "config": { "path": "/x", "serial": "S1" } },
        { "kind": "net", "id": "n", "config": { "mac": "02:00:00:00:00:01" } },
        { "kind": "vsock", "id": "v", "config": { "cid": 7, "socket": "/s" } },
    ])
}

fn info() -> DiskInfo {
    DiskInfo {
        size: SIZE,
        logical_block: 4096,
        physical_block: 4096,
        read_only: false,
        discard: true,
    }
}

fn image(found: Result<DiskInfo, String>) -> Vec<Image> {
    let id = "d".to_owned();
    vec![Image { id, found }]
}

fn side<'a>(processors: &'a Result<Processors, String>, images: &'a [Image]) -> Side<'a> {
    Side {
        processors,
        images,
        disks: Disks::Shared,
    }
}

/// What a source tells of [`devices`] on [`processors`].
fn offered() -> Vec<Fact> {
    let processors = Ok(processors());
    facts(&machine(devices()), side(&processors, &image(Ok(info()))))
}

fn said(offered: &[Fact], here: Vec<Fact>) -> Vec<String> {
    let all = differences(offered, here);
    all.iter().map(ToString::to_string).collect()
}

/// What is refused where the destination has other processors.
fn with_processors(change: impl FnOnce(&mut Processors)) -> Vec<String> {
    let mut other = processors();
    change(&mut other);
    let here = facts(&machine(devices()), side(&Ok(other), &image(Ok(info()))));
    said(&offered(), here)
}

/// What is refused where the destination has this image of the disk.
fn with_image(found: Result<DiskInfo, String>) -> Vec<String> {
    let here = facts(&machine(devices()), side(&Ok(processors()), &image(found)));
    said(&offered(), here)
}

/// What is refused where the machine is described so.
fn with_config(change: impl FnOnce(&mut VmConfig)) -> Vec<String> {
    let mut config = machine(devices());
    change(&mut config);
    let images = image(Ok(info()));
    said(&offered(), facts(&config, side(&Ok(processors()), &images)))
}

#[test]
fn both_sides_of_one_machine_agree_and_tell_each_fact_once() {
    let offered = offered();
    assert_eq!(said(&offered, offered.clone()), [""; 0]);
    let names: BTreeSet<&str> = offered.iter().map(|fact| fact.name.as_str()).collect();
    assert_eq!(names.len(), offered.len());
    let value = |name| value(&offered, name).unwrap();
    assert_eq!(value("cpuid.1.0.ecx"), "ssse3 avx");
    assert_eq!(value("cpuid.7.0.ebx"), "avx2 avx512f");
    assert_eq!(value("cpuid.0.0.ebx"), "0x756e6547");
    assert_eq!(value("cpuid.leaves"), "0.0 1.0 7.0 7.1");
    assert_eq!(value("msrs"), "10 c0000102");
    assert_eq!(value("device.d.queues"), "2");
    assert_eq!(value("device.n.mac"), "02:00:00:00:00:01");
    assert_eq!(value("device.n.offloads"), "csum tso4 tso6 ecn uso");
    assert_eq!(value("device.v.cid"), "7");
    assert!(!names.contains("cpuid.7.1.ebx"));
}

#[test]
fn the_largest_machine_has_no_more_facts_than_there_may_be() {
    let devices: Vec<_> = (0..24)
        .map(|n| json!({ "kind": "blk", "id": format!("d{n}"), "config": { "path": format!("/{n}") } }))
        .collect();
    let full = Processors {
        cpuid: (0..256).map(|n| leaf(n, 0, [u32::MAX; 4])).collect(),
        ..processors()
    };
    let list = facts(&machine(devices.into()), side(&Ok(full), &[]));
    assert!(
        (1000..compare::FACTS).contains(&list.len()),
        "{}",
        list.len()
    );
}

#[test]
fn processors_that_are_not_those_of_the_guest_are_refused_by_the_names_of_their_features() {
    assert_eq!(
        with_processors(|cpus| cpus.cpuid[2].ebx = 1 << 5),
        ["cpuid.7.0.ebx: the destination lacks avx512f"]
    );
    assert_eq!(
        with_processors(|cpus| cpus.cpuid[1].ecx |= 1 << 12 | 1 << 27),
        ["cpuid.1.0.ecx: nothing at the source, fma osxsave at the destination"]
    );
    assert_eq!(
        with_processors(|cpus| cpus.cpuid[0].eax = 0xD),
        ["cpuid.0.0.eax: 0x16 at the source, 0xd at the destination"]
    );
    // A leaf without a bit is none the less there.
    assert_eq!(
        with_processors(|cpus| {
            cpus.cpuid.pop();
        }),
        ["cpuid.leaves: the destination lacks 7.1"]
    );
    assert_eq!(
        with_processors(|cpus| cpus.cpuid.push(leaf(0xD, 1, [0, 8, 0, 0]))),
        [
            "cpuid.d.1.ebx: nothing at the source, 0x8 at the destination",
            "cpuid.leaves: nothing at the source, d.1 at the destination",
        ]
    );
    assert_eq!(
        with_processors(|cpus| cpus.tsc_khz = 2_100_000),
        ["tsc.khz: 2400000 at the source, 2100000 at the destination"]
    );
    assert_eq!(with_processors(|cpus| cpus.msrs.clear()), [""; 0]);
    assert_eq!(offered_tsc(&offered()), Some(2_400_000));
}

#[test]
fn processors_that_cannot_be_had_are_one_difference() {
    let none = Err("no KVM".to_owned());
    let here = facts(&machine(devices()), side(&none, &image(Ok(info()))));
    assert_eq!(
        said(&offered(), here),
        ["cpus.available: yes at the source, no KVM at the destination"]
    );
}

#[test]
fn a_disk_is_refused_that_is_gone_or_another() {
    assert_eq!(
        with_image(Err("disk /x: no such file".to_owned())),
        ["device.d.access: writable at the source, disk /x: no such file at the destination"]
    );
    let other = DiskInfo {
        size: SIZE / 2,
        discard: false,
        ..info()
    };
    assert_eq!(
        with_image(Ok(other)),
        [
            "device.d.discard: true at the source, false at the destination",
            "device.d.size: 1048576 at the source, 524288 at the destination",
        ]
    );
    let small = DiskInfo {
        logical_block: 512,
        physical_block: 512,
        ..info()
    };
    assert_eq!(with_image(Ok(small)), [""; 0]);
    let large = DiskInfo {
        logical_block: 8192,
        ..info()
    };
    assert_eq!(
        with_image(Ok(large)),
        ["device.d.logical_block: 4096 at the source, 8192 at the destination"]
    );
}

#[test]
fn what_the_guest_sees_is_compared_and_what_is_behind_it_is_not() {
    let set = |config: &mut VmConfig, device: usize, key: &str, value: serde_json::Value| {
        config.devices[device].config[key] = value;
    };
    assert_eq!(
        with_config(|config| {
            set(config, 0, "path", json!("/elsewhere"));
            set(config, 0, "cache", json!("none"));
            set(config, 1, "tap", json!("other0"));
            set(config, 2, "socket", json!("/elsewhere"));
            config.memory.shared = true;
        }),
        [""; 0]
    );
    assert_eq!(
        with_config(|config| {
            set(config, 0, "format", json!("qcow2"));
            set(config, 0, "readonly", json!(true));
            set(config, 0, "num_queues", json!(1));
            set(config, 1, "mac", json!("02:00:00:00:00:02"));
            set(config, 1, "offload_tso", json!(false));
            set(config, 1, "mtu", json!(1500));
            set(config, 2, "cid", json!(8));
            config.memory.size *= 2;
            config.watchdog = true;
            config.cpus.max = Some(4);
        }),
        [
            "cpus.max: 2 at the source, 4 at the destination",
            "device.d.access: writable at the source, readonly at the destination",
            "device.d.format: raw at the source, qcow2 at the destination",
            "device.d.queues: 2 at the source, 1 at the destination",
            "device.n.mac: 02:00:00:00:00:01 at the source, 02:00:00:00:00:02 at the destination",
            "device.n.mtu: none at the source, 1500 at the destination",
            "device.n.offloads: the destination lacks tso4 tso6 ecn",
            "device.v.cid: 7 at the source, 8 at the destination",
            "memory.size: 536870912 at the source, 1073741824 at the destination",
            "watchdog: false at the source, true at the destination",
        ]
    );
}

#[test]
fn devices_that_one_side_has_are_one_difference_each() {
    assert_eq!(
        with_config(|config| {
            config.devices.remove(1);
            config.devices[1].address = Some(9);
            config.devices[0].kind = "rng".to_owned();
        }),
        [
            "device.d.kind: blk at the source, rng at the destination",
            "device.n.kind: net at the source, nothing at the destination",
            "device.v.slot: 3 at the source, 9 at the destination",
        ]
    );
}

#[test]
fn devices_that_cannot_do_what_the_guest_uses_are_refused_when_they_are_there() {
    let mut offer = offered();
    offer.extend(feature_facts(
        [("n", 1 << 32 | 1 << 14 | 1), ("v", 0)].into_iter(),
    ));
    assert_eq!(said(&offer, offered()), [""; 0], "not yet");
    let lacks = |features: u64| {
        let here = [("n", features), ("v", 1), ("d", 1)];
        let all = lacking(&offer, here.into_iter());
        all.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(lacks(u64::MAX), [""; 0]);
    assert_eq!(
        lacks(1 << 32 | 1 << 13),
        ["device.n.features: the destination lacks 0 14"]
    );
    let gone = lacking(&offer, [("n", u64::MAX)].into_iter());
    assert_eq!(gone[0].name, "device.v.features");
}

#[test]
fn an_image_that_is_copied_may_have_another_format() {
    let tell = |disks, format: &str| {
        let mut config = machine(devices());
        config.devices[0].config["format"] = json!(format);
        let (processors, images) = (Ok(processors()), image(Ok(info())));
        let side = Side {
            processors: &processors,
            images: &images,
            disks,
        };
        facts(&config, side)
    };
    for (disks, count) in [(Disks::Shared, 1), (Disks::Mirrored, 0)] {
        let refused = said(&tell(disks, "raw"), tell(disks, "qcow2"));
        assert_eq!(refused.len(), count, "{refused:?}");
    }
}

#[test]
fn a_disk_is_taken_from_an_offer_only_if_it_can_be_one() {
    assert_eq!(offered_disk(&offered(), "d"), Some(info()));
    assert_eq!(offered_disk(&offered(), "n"), None);
    for (key, wrong) in [
        ("size", "0"),
        ("size", "18446744073709551615"),
        ("size", "x"),
        ("logical_block", "0"),
        ("logical_block", "256"),
        ("logical_block", "4095"),
        ("logical_block", "2147483648"),
        ("physical_block", "512"),
        ("physical_block", "5000"),
        ("discard", "maybe"),
    ] {
        let mut offered = offered();
        let name = format!("device.d.{key}");
        let fact = offered.iter_mut().find(|fact| fact.name == name).unwrap();
        wrong.clone_into(&mut fact.value);
        assert_eq!(offered_disk(&offered, "d"), None, "{key}={wrong}");
    }
}

fn disk(path: &Path, more: &serde_json::Value) -> serde_json::Value {
    let mut config = json!({ "path": path, "format": "raw" });
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

#[test]
fn the_disks_of_a_machine_that_runs_elsewhere_are_found_and_their_locks_seen() {
    let directory = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| {
        let path = directory.path().join(name);
        fs::write(&path, vec![0; 4096]).unwrap();
        path
    });
    let opener = Arc::new(Opener::new());
    let plain = json!({});
    let look_at = |first: serde_json::Value, second: serde_json::Value| {
        let config = machine(json!([
            { "kind": "blk", "id": "a", "config": first },
            { "kind": "blk", "id": "b", "config": second },
        ]));
        look(&config, &opener, &[])
    };
    let found = look_at(disk(&one, &plain), disk(&two, &plain));
    assert_eq!(found.locks, Locks::Separate);
    assert_eq!(found.images[1].found.as_ref().unwrap().size, 4096);
    let hold = |path: &Path| {
        let options = block::ImageOptions {
            disk: block::DiskOptions {
                format: Some(Format::Raw),
                ..block::DiskOptions::default()
            },
            ..block::ImageOptions::default()
        };
        open_disk(path, &*opener, &options).unwrap()
    };
    let first = hold(&one);
    let found = look_at(disk(&one, &plain), disk(&two, &plain));
    assert_eq!(found.locks, Locks::Separate, "one of two");
    let readonly = json!({ "readonly": true });
    let found = look_at(disk(&one, &plain), disk(&two, &readonly));
    assert_eq!(found.locks, Locks::Shared);
    let second = hold(&two);
    let found = look_at(disk(&one, &plain), disk(&two, &plain));
    assert_eq!(found.locks, Locks::Shared);
    let unlocked = json!({ "lock": false });
    let found = look_at(disk(&one, &unlocked), disk(&two, &plain));
    assert_eq!(
        found.locks,
        Locks::Separate,
        "who writes to one is not seen"
    );
    let unlocked = json!({ "lock": false, "readonly": true });
    let found = look_at(disk(&one, &unlocked), disk(&two, &readonly));
    assert_eq!(found.locks, Locks::None);
    drop((first, second));
    fs::remove_file(&two).unwrap();
    let found = look_at(disk(&one, &plain), disk(&two, &plain));
    let why = found.images[1].found.as_ref().unwrap_err();
    assert!(why.contains("two: no such file"), "{why}");
}

#[test]
fn a_refusal_has_a_line_for_each_difference_and_tells_the_mends() {
    let refused = |differences: &[Difference]| refuse(differences);
    let difference = |name: &str| Difference {
        name: name.to_owned(),
        source: Some("a".to_owned()),
        destination: None,
        lacks: Vec::new(),
    };
    let text = refused(&[
        difference("cpuid.7.0.ebx"),
        difference("device.d.access"),
        difference("tsc.khz"),
    ]);
    let begin = "the machine does not fit the destination: cpuid.7.0.ebx: a at the source, nothing at the destination; device.d.access: ";
    assert!(text.starts_with(begin), "{text}");
    assert_eq!(text.split("; ").count(), 6, "{text}");
    for mend in ["--cpus baseline=", "time-stamp counter", "the very images"] {
        assert!(text.contains(mend), "{text}");
    }
    for (name, baseline, model) in [
        ("watchdog", false, false),
        ("cpuid.leaves", true, false),
        ("cpuid.80000001.0.edx", true, false),
        ("cpuid.d.2.eax", true, false),
        ("cpuid.1.0.eax", false, true),
        ("cpuid.7.0.eax", false, true),
        ("cpuid.80000002.0.ebx", false, true),
    ] {
        let text = refused(&[difference(name)]);
        assert_eq!(text.contains("baseline"), baseline, "{text}");
        assert_eq!(text.contains("another model"), model, "{text}");
    }
    let many: Vec<_> = (0..4096).map(|n| difference(&format!("x{n}"))).collect();
    let text = refused(&many);
    assert_eq!(text.split("; ").count(), SHOWN + 1);
    assert!(text.ends_with("and 4056 more"), "{text}");
}
