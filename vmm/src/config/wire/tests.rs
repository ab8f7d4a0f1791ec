use serde_json::{Value, json};

use super::*;
use crate::config::{DeviceConfig, HotplugMethod};

fn described(value: Value) -> wire::VmConfig {
    serde_json::from_value(value).unwrap()
}

/// A description that can be booted, with the fields of `more` beside.
fn with(more: Value) -> wire::VmConfig {
    let mut whole = json!({"payload": {"kernel": "/k"}});
    let Value::Object(more) = more else {
        panic!("not an object");
    };
    whole.as_object_mut().unwrap().extend(more);
    described(whole)
}

fn made(more: Value) -> VmConfig {
    VmConfig::from_wire(&with(more)).unwrap()
}

fn refused(more: Value) -> ControlError {
    VmConfig::from_wire(&with(more)).unwrap_err()
}

fn disk(config: &VmConfig, index: usize) -> virtio::models::blk::BlkConfig {
    serde_json::from_value(config.devices[index].config.clone()).unwrap()
}

#[test]
fn memory_by_virtio_mem_keeps_what_is_plugged_apart() {
    let described = json!({"memory": {"size": 67_108_864, "hotplug_method": "VirtioMem", "hotplug_size": 402_653_184, "hotplugged_size": 134_217_728}});
    let config = made(described.clone());
    let memory = &config.memory;
    assert_eq!(memory.hotplug_method, HotplugMethod::VirtioMem);
    let sizes = (memory.size, memory.hotplug_size, memory.hotplugged_size);
    assert_eq!(sizes, (64 << 20, 384 << 20, 128 << 20));
    assert_eq!(config.devices.last().unwrap().kind, "mem");
    let shown = serde_json::to_value(config.to_wire().memory).unwrap();
    for (key, value) in described["memory"].as_object().unwrap() {
        assert_eq!(shown[key], *value, "{key}");
    }
}

#[test]
fn what_is_to_be_done_about_an_event_brings_the_device_that_tells_it() {
    for (key, usual, other) in [
        ("on_panic", "exit", "pause"),
        ("on_watchdog", "restart", "stop"),
    ] {
        let told = |action: &str| {
            let config = VmConfig::from_wire(&described(json!({ key: action }))).unwrap();
            (config.pvpanic, config.watchdog)
        };
        assert_eq!(told(usual), (false, false));
        assert_eq!(told(other), (key == "on_panic", key == "on_watchdog"));
    }
}

#[test]
fn an_empty_description_is_a_machine_with_the_defaults_of_v1_that_cannot_be_booted() {
    let config = VmConfig::from_wire(&described(json!({}))).unwrap();
    assert_eq!(config.cpus.boot, 1);
    assert_eq!(config.memory.size, 512 << 20);
    assert_eq!(config.serial, SerialConfig::Sinks(vec![SinkConfig::Null]));
    assert_eq!(config.debugcon, DebugconConfig::Off);
    assert!(!config.pvpanic);
    assert_eq!(config.payload.cmdline, "");
    let kinds: Vec<_> = config.devices.iter().map(|d| (&*d.kind, &*d.id)).collect();
    assert_eq!(kinds, [("rng", "__rng")]);
    let error = config.check_bootable().unwrap_err();
    assert_eq!(error.kind, ErrorKind::Invalid);
    assert_eq!(
        error.chain,
        [
            "Failed to validate config",
            "Payload configuration is not bootable",
            "No bootitem provided: neither firmware nor kernel"
        ]
    );
    assert_eq!(made(json!({})).check_bootable(), Ok(()));
}

#[test]
fn memory_that_had_been_added_is_there_from_the_start() {
    let config = made(json!({
        "memory": {"size": 67_108_864, "hotplug_size": 402_653_184, "hotplugged_size": 134_217_728},
    }));
    let memory = config.memory;
    assert_eq!((memory.size, memory.hotplug_size), (192 << 20, 256 << 20));
}

#[test]
fn every_part_that_there_is_arrives() {
    let config = made(json!({
        "cpus": {"boot_vcpus": 3, "max_vcpus": 8, "topology":
            {"threads_per_core": 2, "cores_per_die": 2, "dies_per_package": 1, "packages": 2}},
        "memory": {"size": 4194304, "hotplug_size": 268_435_456, "shared": true, "hugepages": true, "hugepage_size": 2_097_152,
            "prefault": true, "thp": false},
        "payload": {"kernel": "/k", "initramfs": "/i", "cmdline": "a b"},
        "serial": {"mode": "File", "file": "/s"},
        "debug_console": {"mode": "File", "file": "/d", "iobase": 233},
        "console": {"mode": "Off"},
        "pvpanic": true,
        "rng": {"src": "/dev/random", "id": "noise", "pci_device_id": 9},
        "platform": {"serial_number": "s", "uuid": "00112233-4455-6677-8899-aabbccddeeff",
            "oem_strings": ["x", "y"], "system_manufacturer": "m", "chassis_asset_tag": "t"},
    }));
    assert_eq!((config.cpus.boot, config.cpus.max), (3, Some(8)));
    assert_eq!(config.cpus.arrangement().levels(), [2, 2, 1, 2]);
    assert_eq!(
        config.memory,
        MemoryConfig {
            size: 4 << 20,
            hotplug_size: 256 << 20,
            hotplug_method: HotplugMethod::Acpi,
            hotplugged_size: 0,
            shared: true,
            hugepages: true,
            hugepage_size: Some(2 << 20),
            thp: Thp::Off,
            prefault: true,
        }
    );
    assert_eq!(config.payload.initramfs, Some("/i".into()));
    assert_eq!(config.payload.cmdline, "a b");
    let file = SinkConfig::File(FileSink::new("/s"));
    assert_eq!(config.serial, SerialConfig::Sinks(vec![file]));
    assert_eq!(config.debugcon, DebugconConfig::File("/d".into()));
    assert!(config.pvpanic);
    assert_eq!(
        config.devices,
        [DeviceConfig {
            kind: "rng".to_owned(),
            id: "noise".to_owned(),
            address: Some(9),
            config: json!({"src": "/dev/random"}),
        }]
    );
    let SmbiosConfig {
        serial,
        asset_tag,
        oem_strings,
        product,
        ..
    } = config.smbios;
    assert_eq!(serial.as_deref(), Some("s"));
    assert_eq!(asset_tag.as_deref(), Some("t"));
    assert_eq!(oem_strings, ["x", "y"]);
    assert_eq!(product, None);
}

#[test]
fn a_disks_fields_arrive() {
    use block::{Aio, BackingPolicy, Discard, Format};
    let config = made(json!({
        "cpus": {"boot_vcpus": 4, "max_vcpus": 4},
        "rate_limit_groups": [{"id": "g", "rate_limiter_config": {"ops":
            {"size": 7, "refill_time": 100}}}],
        "disks": [
            {"path": "/a"},
            {"path": "/b", "readonly": true, "direct": true, "num_queues": 2, "queue_size": 64,
             "serial": "S", "backing_files": true, "sparse": false, "image_type": "Qcow2",
             "disable_io_uring": true, "rate_limit_group": "g", "pci_device_id": 5,
             "rate_limiter_config": {"bandwidth":
                {"size": 10, "refill_time": 20, "one_time_burst": 30}, "ops": null}},
            {"path": "/c", "image_type": "Raw",
             "rate_limiter_config": {"ops": {"size": 0, "refill_time": 1}}},
        ],
    }));
    let [a, b, c] = [0, 1, 2].map(|index| disk(&config, index));
    assert_eq!(a.format, None);
    assert_eq!(a.direct, None);
    assert_eq!(a.discard, Discard::Unmap);
    assert_eq!(a.backing, BackingPolicy::Deny);
    assert_eq!(a.aio, Aio::Auto);
    assert_eq!((a.num_queues, a.queue_size), (Some(1), 128));
    assert!(!a.readonly && a.lock);
    assert_eq!(b.format, Some(Format::Qcow2));
    assert_eq!(b.direct, Some(true));
    assert_eq!(b.discard, Discard::Ignore);
    assert_eq!(b.backing, BackingPolicy::Any);
    assert_eq!(b.aio, Aio::Threads);
    assert_eq!((b.num_queues, b.queue_size), (Some(2), 64));
    assert_eq!(b.serial.as_deref(), Some("S"));
    assert!(b.readonly);
    assert_eq!(b.rate_limit_group.as_deref(), Some("g"));
    let limits = b.rate_limits().unwrap();
    let bandwidth = Bucket {
        size: 10,
        one_time_burst: 30,
        refill_time: 20,
    };
    assert_eq!(limits.bandwidth, Some(bandwidth));
    assert_eq!(limits.ops, None);
    assert_eq!(config.devices[1].address, Some(5));
    assert_eq!(c.format, Some(Format::Raw));
    assert_eq!(c.rate_limits().unwrap(), RateLimits::default());
    let group = config.rate_limit_groups[0].limits;
    assert_eq!(group.ops.map(|bucket| bucket.size), Some(7));
}

#[test]
fn devices_are_named_by_one_count_past_the_names_that_were_given() {
    let mut config = described(json!({
        "disks": [{"path": "/a"}, {"path": "/b", "id": "root"}, {"path": "/c"}],
        "net": [{}],
        "vsock": {"cid": 3, "socket": "/v"},
    }));
    name_devices(&mut config);
    let ids = |config: &wire::VmConfig| -> Vec<String> {
        names::ids(config).map(str::to_owned).collect()
    };
    assert_eq!(
        ids(&config),
        ["_disk0", "root", "_disk1", "_net2", "_vsock3"]
    );
    let before = config.clone();
    name_devices(&mut config);
    assert_eq!(config, before);
    config.disks.as_mut().unwrap().push(wire::DiskConfig {
        id: None,
        ..before.disks.unwrap().remove(0)
    });
    name_devices(&mut config);
    assert_eq!(ids(&config)[3], "_disk4");
}

#[test]
fn what_is_there_twice_is_a_conflict() {
    for (more, message) in [
        (
            json!({"disks": [{"path": "/a", "id": "d"}, {"path": "/b", "id": "d"}]}),
            "Identifier d is not unique",
        ),
        (
            json!({"disks": [{"path": "/a", "id": "d"}], "rng": {"src": "/r", "id": "d"}}),
            "Identifier d is not unique",
        ),
        (
            json!({"disks": [{"path": "/a", "id": "g"}],
                "rate_limit_groups": [{"id": "g", "rate_limiter_config": {}}]}),
            "Identifier g is not unique",
        ),
        (
            json!({"disks": [{"path": "/a"}, {"path": "/a", "readonly": true}]}),
            "Duplicated device path: /a",
        ),
    ] {
        let error = refused(more);
        assert_eq!(error.kind, ErrorKind::Conflict);
        assert_eq!(error.chain, ["Failed to validate config", message]);
    }
    let slots = json!({"disks": [{"path": "/a", "pci_device_id": 3},
        {"path": "/b", "pci_device_id": 3}]});
    assert_eq!(refused(slots).kind, ErrorKind::Conflict);
    made(json!({"disks": [{"path": "/a", "readonly": true}, {"path": "/a", "readonly": true}]}));
}

fn nonsense_of_cpus_and_memory() -> Vec<(Value, &'static str)> {
    vec![
        (json!({"cpus": {"boot_vcpus": 0, "max_vcpus": 0}}), "boot=0"),
        (
            json!({"cpus": {"boot_vcpus": 2, "max_vcpus": 1}}),
            "max_vcpus 1",
        ),
        (
            json!({"cpus": {"boot_vcpus": 70000, "max_vcpus": 70000}}),
            "70000",
        ),
        (
            json!({"cpus": {"boot_vcpus": 1, "max_vcpus": 255}}),
            "max=255",
        ),
        (
            json!({"cpus": {"boot_vcpus": 2, "max_vcpus": 2, "topology": {"threads_per_core": 2,
                "cores_per_die": 2, "dies_per_package": 1, "packages": 1}}}),
            "topology=2:2:1:1",
        ),
        (
            json!({"memory": {"size": 4_194_304, "hotplug_size": 4_194_304}}),
            "pieces of 128M",
        ),
        (
            json!({"memory": {"size": 4_194_304, "hotplugged_size": 134_217_728}}),
            "memory.hotplugged_size: 134217728 bytes are more than memory.hotplug_size, 0",
        ),
        (
            json!({"memory": {"size": 4_194_304, "hotplug_size": 268_435_456, "hotplugged_size": 4_194_304}}),
            "memory.hotplugged_size: memory is added in pieces of 134217728 bytes",
        ),
        (
            json!({"memory": {"size": u64::MAX - 1, "hotplug_size": u64::MAX, "hotplugged_size": u64::MAX}}),
            "memory.hotplugged_size",
        ),
        (json!({"memory": {"size": 0}}), "at least 2M"),
        (json!({"memory": {"size": u64::MAX}}), "the host has"),
        (
            json!({"memory": {"size": 4_194_304, "hugepage_size": 2_097_152}}),
            "hugepages",
        ),
    ]
}

fn nonsense_of_files_and_disks() -> Vec<(Value, &'static str)> {
    vec![
        (
            json!({"payload": {"kernel": ""}}),
            "payload.kernel: the path is empty",
        ),
        (json!({"payload": {"kernel": "a\u{0}b"}}), "zero byte"),
        (
            json!({"payload": {"kernel": "/k", "cmdline": "a\u{0}"}}),
            "zero byte",
        ),
        (json!({"disks": [{}]}), "no path"),
        (json!({"disks": [{"path": ""}]}), "disks.path"),
        (
            json!({"disks": [{"path": "/a", "num_queues": 0}]}),
            "0: a disk has",
        ),
        (
            json!({"disks": [{"path": "/a", "queue_size": 3}]}),
            "power of two",
        ),
        (
            json!({"disks": [{"path": "/a", "serial": "123456789012345678901"}]}),
            "up to 20",
        ),
        (
            json!({"disks": [{"path": "/a", "pci_device_id": 0}]}),
            "1 to 31",
        ),
        (
            json!({"disks": [{"path": "/a", "pci_device_id": 32}]}),
            "1 to 31",
        ),
        (
            json!({"disks": [{"path": "/a", "id": "__x"}]}),
            "begins with __",
        ),
        (json!({"disks": [{"path": "/a", "id": "a b"}]}), "an id is"),
        (json!({"disks": [{"path": "/a", "id": ""}]}), "is empty"),
        (
            json!({"disks": [{"path": "/a", "rate_limit_group": "g"}]}),
            "there is no such group",
        ),
        (json!({"serial": {"mode": "File"}}), "serial"),
        (json!({"rng": {"src": ""}}), "rng.src"),
        (
            json!({"rng": {"src": "/r", "rate_limiter_config":
                {"bandwidth": {"size": 1, "refill_time": 0}}}}),
            "bw_refill_time",
        ),
        (json!({"platform": {"uuid": "x"}}), "'x' is none"),
        (
            json!({"platform": {"oem_strings": ["a\u{0}"]}}),
            "zero byte",
        ),
    ]
}

#[test]
fn nonsense_is_refused_with_what_is_wrong() {
    let cases = nonsense_of_cpus_and_memory();
    for (more, part) in cases.into_iter().chain(nonsense_of_files_and_disks()) {
        let error = refused(more.clone());
        assert_eq!(error.kind, ErrorKind::Invalid, "{more}: {error}");
        assert_eq!(error.chain[0], "Failed to validate config");
        assert!(error.to_string().contains(part), "{more}: {error}");
    }
    let many: Vec<_> = (0..31).map(|n| json!({"path": format!("/{n}")})).collect();
    assert!(
        refused(json!({ "disks": many }))
            .to_string()
            .contains("32 devices")
    );
}

/// What is no part of a machine here.
fn missing_parts() -> Vec<(Value, &'static str)> {
    vec![
        (
            json!({"balloon": {"size": 1, "iommu": true}}),
            "balloon.iommu",
        ),
        (json!({"generic_vhost_user": [{}]}), "generic_vhost_user"),
        (json!({"pmem": [{"file": "/p"}]}), "pmem"),
        (json!({"devices": [{"path": "/sys"}]}), "devices"),
        (json!({"user_devices": [{"socket": "/s"}]}), "user_devices"),
        (json!({"vdpa": [{"path": "/v"}]}), "vdpa"),
        (
            json!({"vsock": {"cid": 3, "socket": "/v", "iommu": true}}),
            "vsock.iommu",
        ),
        (json!({"iommu": true}), "iommu"),
        (json!({"numa": [{"guest_numa_id": 0}]}), "numa"),
        (json!({"rtc": {}}), "rtc"),
        (json!({"pci_segments": [{}]}), "pci_segments"),
        (json!({"tpm": {"socket": "/t"}}), "tpm"),
        (json!({"landlock_enable": true}), "landlock_enable"),
        (
            json!({"landlock_rules": [{"path": "/", "access": "r"}]}),
            "landlock_rules",
        ),
        (
            json!({"console": {"mode": "Null", "iommu": true}}),
            "console.iommu",
        ),
        (
            json!({"rng": {"src": "/r", "pci_segment": 1}}),
            "rng.pci_segment",
        ),
        (
            json!({"disks": [{"path": "/a", "pci_segment": 1}],
                "platform": {"num_pci_segments": 2}}),
            "disks.pci_segment",
        ),
        (
            json!({"debug_console": {"mode": "Pty"}}),
            "debug_console.mode=Pty",
        ),
        (
            json!({"debug_console": {"mode": "Tty", "iobase": 1}}),
            "debug_console.iobase",
        ),
    ]
}

/// What the parts that there are have not.
fn missing_fields() -> Vec<(Value, &'static str)> {
    let zone = json!([{"id": "z", "size": 1}]);
    vec![
        (json!({"payload": {"firmware": "/f"}}), "payload.firmware"),
        (
            json!({"memory": {"size": 4_194_304, "zones": zone}}),
            "memory.zones",
        ),
        (
            json!({"memory": {"size": 4_194_304, "mergeable": true}}),
            "memory.mergeable",
        ),
        (
            json!({"cpus": {"boot_vcpus": 1, "max_vcpus": 1, "kvm_hyperv": true}}),
            "cpus.kvm_hyperv",
        ),
        (
            json!({"cpus": {"boot_vcpus": 1, "max_vcpus": 1, "features": {"amx": true}}}),
            "cpus.features.amx",
        ),
        (
            json!({"platform": {"num_pci_segments": 17}}),
            "platform.num_pci_segments",
        ),
        (json!({"platform": {"iommufd": true}}), "platform.iommufd"),
        (
            json!({"disks": [{"path": "/a", "vhost_user": true, "vhost_socket": "/s"}]}),
            "disks.path beside vhost_user",
        ),
        (
            json!({"disks": [{"path": "/a", "iommu": true}]}),
            "disks.iommu",
        ),
        (
            json!({"disks": [{"path": "/a", "image_type": "Vhdx"}]}),
            "disks.image_type=Vhdx",
        ),
        (
            json!({"disks": [{"path": "/a",
                "queue_affinity": [{"queue_index": 0, "host_cpus": [0]}]}]}),
            "disks.queue_affinity",
        ),
    ]
}

#[test]
fn what_there_is_not_is_refused_by_its_name() {
    for (more, field) in missing_parts().into_iter().chain(missing_fields()) {
        let error = refused(more.clone());
        assert_eq!(error.kind, ErrorKind::Unimplemented, "{more}: {error}");
        assert!(error.chain[0].starts_with(field), "{more}: {error}");
    }
    // A list of nothing asks for nothing.
    made(json!({"net": [], "fs": [], "pmem": [], "devices": [], "numa": [], "disks": []}));
}

#[test]
fn a_limit_that_fills_in_no_time_is_refused_by_its_key() {
    let limits = |bucket: &str| json!({ bucket: { "size": 1, "refill_time": 0 } });
    for (bucket, key) in [("bandwidth", "bw_refill_time"), ("ops", "ops_refill_time")] {
        let disk = json!({"path": "/a", "id": "a", "rate_limiter_config": limits(bucket)});
        let group = json!({"id": "g", "rate_limiter_config": limits(bucket)});
        let update = json!({"id": "_disk0", "rate_limiter_config": limits(bucket)});
        let config = made(json!({"disks": [{"path": "/b"}]}));
        let update = config.plan_update(&serde_json::from_value(update).unwrap());
        for error in [
            refused(json!({"disks": [disk.clone()]})),
            refused(json!({"rate_limit_groups": [group]})),
            config
                .plan_disk(&serde_json::from_value(disk).unwrap())
                .unwrap_err(),
            update.unwrap_err(),
        ] {
            assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
            assert!(error.to_string().contains(key), "{error}");
        }
    }
}

#[test]
fn a_disk_is_planned_under_a_free_name_and_the_rules_of_the_whole_machine() {
    let config = made(json!({"disks": [{"path": "/a"}], "rate_limit_groups":
        [{"id": "g", "rate_limiter_config": {}}]}));
    let plan = |value: Value| config.plan_disk(&serde_json::from_value(value).unwrap());
    let (disk, device) = plan(json!({"path": "/b", "rate_limit_group": "g"})).unwrap();
    assert_eq!(device.id, "_disk1");
    assert_eq!(disk.id.as_deref(), Some("_disk1"));
    assert_eq!(device.address, None);
    assert_eq!(plan(json!({"path": "/b", "id": "x"})).unwrap().1.id, "x");
    for (value, kind, part) in [
        (
            json!({"path": "/a"}),
            ErrorKind::Conflict,
            "Duplicated device path: /a",
        ),
        (
            json!({"path": "/b", "id": "_disk0"}),
            ErrorKind::Conflict,
            "Identifier _disk0 is not unique",
        ),
        (
            json!({"path": "/b", "id": "g"}),
            ErrorKind::Conflict,
            "Identifier g",
        ),
        (json!({"path": "/b", "id": "__b"}), ErrorKind::Invalid, "__"),
        (
            json!({"path": "/b", "pci_device_id": 1}),
            ErrorKind::Conflict,
            "_disk0",
        ),
        (
            json!({"path": "/b", "rate_limit_group": "h"}),
            ErrorKind::Invalid,
            "'_disk1'",
        ),
        (
            json!({"path": "/b", "queue_size": 0}),
            ErrorKind::Invalid,
            "power of two",
        ),
        (
            json!({"path": "/b", "vhost_user": true, "vhost_socket": "/s"}),
            ErrorKind::Unimplemented,
            "vhost_user",
        ),
    ] {
        let error = plan(value.clone()).unwrap_err();
        assert_eq!(error.kind, kind, "{value}: {error}");
        assert!(error.to_string().contains(part), "{value}: {error}");
    }
}

#[test]
fn a_machine_is_shown_as_it_was_described() {
    let whole = json!({
        "cpus": {"boot_vcpus": 3, "max_vcpus": 3, "nested": false},
        "memory": {"size": 4_194_304, "shared": true, "prefault": true, "thp": false},
        "payload": {"kernel": "/k", "initramfs": "/i", "cmdline": "a b"},
        "rate_limit_groups": [{"id": "g", "rate_limiter_config": {"ops":
            {"size": 7, "refill_time": 100, "one_time_burst": 5}}}],
        "disks": [{"id": "d", "path": "/b", "readonly": true, "direct": true, "num_queues": 2,
            "queue_size": 64, "serial": "S", "backing_files": true, "sparse": false,
            "image_type": "Qcow2", "rate_limit_group": "g", "rate_limiter_config":
            {"bandwidth": {"size": 10, "refill_time": 20}}}],
        "rng": {"id": "noise", "src": "/dev/random"},
        "serial": {"mode": "File", "file": "/s"},
        "console": {"mode": "Off"},
        "debug_console": {"mode": "Tty", "iobase": 233},
        "pvpanic": true,
        "platform": {"system_serial_number": "s", "oem_strings": ["x"], "system_family": "f"},
    });
    let whole = described(whole);
    assert_eq!(VmConfig::from_wire(&whole).unwrap().to_wire(), whole);
}

#[test]
fn a_machine_from_the_command_line_is_shown_with_what_it_has() {
    let config: VmConfig = serde_json::from_value(json!({
        "payload": {"kernel": "/k"},
        "cpus": {"boot": 9},
        "devices": [{"kind": "blk", "id": "disk0", "address": 1,
            "config": {"path": "/a", "cache": "none"}}],
    }))
    .unwrap();
    let shown = config.to_wire();
    let disk = &shown.disks.unwrap()[0];
    assert_eq!((disk.num_queues, disk.queue_size), (4, 256));
    assert!(disk.direct && disk.backing_files && disk.sparse);
    assert_eq!(shown.serial.mode, ConsoleMode::Tty);
    assert_eq!(shown.console.mode, ConsoleMode::Off);
    assert_eq!(shown.platform, None);
}

#[test]
fn a_disk_is_updated_in_its_configuration_and_in_its_description() {
    let mut described = with(json!({"disks": [
        {"id": "d", "path": "/a", "readonly": true, "rate_limiter_config":
            {"ops": {"size": 1, "refill_time": 1}}},
        {"id": "w", "path": "/b"},
    ]}));
    let config = VmConfig::from_wire(&described).unwrap();
    let request = |value: Value| -> wire::VmUpdateDisk { serde_json::from_value(value).unwrap() };
    let change = request(json!({"id": "d", "path": "/c", "rate_limiter_config":
        {"bandwidth": {"size": 5, "refill_time": 6}}}));
    let DiskUpdate { device, patch } = config.plan_update(&change).unwrap();
    assert_eq!(
        patch,
        json!({"path": "/c", "limits":
            {"bandwidth": {"size": 5, "one_time_burst": 0, "refill_time": 6}}})
    );
    update_disk(&mut described, &change).unwrap();
    let again = VmConfig::from_wire(&described).unwrap();
    assert_eq!(again.devices[0], device);
    let lifted = request(json!({"id": "d", "rate_limiter_config": {}}));
    update_disk(&mut described, &lifted).unwrap();
    assert_eq!(
        described.disks.as_ref().unwrap()[0].rate_limiter_config,
        None
    );
    assert_eq!(
        config.plan_update(&lifted).unwrap().patch,
        json!({"limits": {}})
    );
    for (value, kind) in [
        (json!({"id": "x"}), ErrorKind::NotFound),
        (json!({"id": "__rng"}), ErrorKind::Invalid),
        (json!({"id": "w", "path": "/c"}), ErrorKind::Invalid),
        (json!({"id": "d", "path": ""}), ErrorKind::Invalid),
        (json!({"id": "d", "path": "/b"}), ErrorKind::Conflict),
    ] {
        assert_eq!(config.plan_update(&request(value)).unwrap_err().kind, kind);
    }
    let unknown = request(json!({"id": "x"}));
    let error = update_disk(&mut described, &unknown).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
}

#[test]
fn consoles_and_ports_of_a_description_are_on_the_device_that_was_described() {
    let config = made(json!({
        "serial": {"mode": "Off"},
        "serial2": {"mode": "File", "file": "/two"},
        "serial4": {"mode": "Null"},
        "console": {"mode": "Pty", "id": "hvc", "pci_device_id": 9},
        "ports": [{"name": "org.qemu.guest_agent.0"}, {"name": "a", "socket": "/a"}],
    }));
    assert!(config.has_agent());
    assert_eq!(config.console, SinkConfig::Pty.into());
    let on: Vec<_> = config.serials().map(SerialConfig::is_on).to_vec();
    assert_eq!(on, [false, true, false, true]);
    let device = &config.devices[1];
    assert_eq!((&*device.kind, &*device.id), ("console", "hvc"));
    assert_eq!(device.address, Some(9));
    let own = json!({"console": true, "ports": "org.qemu.guest_agent.0:a"});
    assert_eq!(device.config, own);
    let shown = config.to_wire();
    assert_eq!(shown.console.mode, ConsoleMode::Pty);
    assert_eq!(shown.console.id.as_deref(), Some("hvc"));
    assert_eq!(shown.serial2.as_ref().unwrap().mode, ConsoleMode::File);
    assert_eq!(shown.serial3, None);
    assert_eq!(VmConfig::from_wire(&shown).unwrap().ports, config.ports);
    // Clients that do not say, or want the terminal, get no device for that.
    for console in [json!({}), json!({"console": {"mode": "Tty"}})] {
        assert_eq!(made(console).devices.len(), 1);
    }
    let named = made(json!({"console": {"mode": "Null"}}));
    assert_eq!(named.devices[1].id, "__console");
}

#[test]
fn consoles_that_want_the_same_are_refused_with_both() {
    for (more, part) in [
        (
            json!({"serial": {"mode": "Tty"}, "serial2": {"mode": "Tty"}}),
            "serial and serial2 are both Tty",
        ),
        (
            json!({"serial": {"mode": "Socket", "socket": "/s"}, "ports": [{"name": "a", "socket": "/s"}]}),
            "--serial socket=/s",
        ),
        (json!({"ports": [{"name": "a"}]}), "leads nowhere"),
        (json!({"ports": [{"name": "", "pty": true}]}), "a name has"),
        (
            json!({"ports": [{"name": "a", "pty": true}, {"name": "a", "null": true}]}),
            "two ports of this name",
        ),
        (
            json!({"console": {"mode": "File"}}),
            "console: its mode is File",
        ),
        (
            json!({"serial3": {"mode": "Socket"}}),
            "serial3: its mode is Socket",
        ),
    ] {
        let error = refused(more);
        assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
    let strict = serde_json::from_value::<wire::PortConfig>(json!({"name": "a", "x": 1}));
    assert!(strict.unwrap_err().to_string().contains("unknown field"));
}
