//! The texts are those that a Cloud Hypervisor of version 54 was seen to send
//! and its clients to accept.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;

/// What is printed for what `text` says.
fn printed<T: DeserializeOwned + Serialize>(text: &str) -> String {
    serde_json::to_string(&serde_json::from_str::<T>(text).unwrap()).unwrap()
}

/// That `text` is printed as it was read.
fn kept<T: DeserializeOwned + Serialize>(text: &str) {
    assert_eq!(printed::<T>(text), text);
}

fn refused<T: DeserializeOwned + std::fmt::Debug>(value: &Value) -> String {
    // Not from the value: clients send texts, and the message names a place in them.
    serde_json::from_str::<T>(&value.to_string())
        .unwrap_err()
        .to_string()
}

const INFO: &str = concat!(
    r#"{"config":{"cpus":{"boot_vcpus":1,"max_vcpus":1,"kvm_hyperv":false,"max_phys_bits":46,"#,
    r#""features":{"amx":false},"nested":true,"core_scheduling":"Vm","profile":"Host"},"#,
    r#""memory":{"size":536870912,"mergeable":false,"hotplug_method":"Acpi","shared":false,"#,
    r#""hugepages":false,"prefault":false,"reserve":false,"thp":true},"payload":{},"#,
    r#""rng":{"pci_segment":0,"src":"/dev/urandom"},"serial":{"mode":"Null"},"#,
    r#""console":{"mode":"Off","pci_segment":0},"debug_console":{"mode":"Off","iobase":233},"#,
    r#""pvpanic":false,"iommu":false,"watchdog":false,"landlock_enable":false},"#,
    r#""state":"Created","memory_actual_size":536870912}"#
);

#[test]
fn a_machine_of_defaults_is_printed_as_its_clients_know_it() {
    let config = r#"{"payload":{},"console":{"mode":"Off"}}"#;
    let info = VmInfo {
        config: serde_json::from_str(config).unwrap(),
        state: VmInfoState::Created,
        pause: None,
        memory_restored: None,
        web_console: None,
        memory_actual_size: 512 << 20,
        device_tree: None,
    };
    assert_eq!(serde_json::to_string(&info).unwrap(), INFO);
    kept::<VmInfo>(INFO);
}

#[test]
fn a_disk_is_printed_with_its_defaults_and_without_what_is_not_set() {
    assert_eq!(
        printed::<DiskConfig>(r#"{"path":"/a","id":"_disk0","image_type":"Raw"}"#),
        concat!(
            r#"{"id":"_disk0","pci_segment":0,"path":"/a","readonly":false,"direct":false,"#,
            r#""num_queues":1,"queue_size":128,"vhost_user":false,"disable_io_uring":false,"#,
            r#""disable_aio":false,"backing_files":false,"sparse":true,"image_type":"Raw","#,
            r#""lock_granularity":"ByteRange"}"#
        )
    );
}

#[test]
fn a_disk_with_everything_is_printed_in_the_order_of_the_fields() {
    kept::<DiskConfig>(concat!(
        r#"{"id":"d","iommu":true,"pci_segment":1,"pci_device_id":2,"path":"/a","readonly":true,"#,
        r#""direct":true,"num_queues":2,"queue_size":64,"vhost_user":true,"vhost_socket":"/v","#,
        r#""rate_limit_group":"g","rate_limiter_config":{"bandwidth":{"size":1,"#,
        r#""one_time_burst":null,"refill_time":2},"ops":null},"disable_io_uring":true,"#,
        r#""disable_aio":true,"serial":"s","queue_affinity":[{"queue_index":0,"host_cpus":[1]}],"#,
        r#""backing_files":true,"sparse":false,"image_type":"FixedVhd","lock_granularity":"Full"}"#
    ));
}

#[test]
fn other_devices_are_printed_as_their_clients_know_them() {
    let balloon =
        r#"{"pci_segment":0,"size":0,"deflate_on_oom":false,"free_page_reporting":false}"#;
    assert_eq!(printed::<BalloonConfig>(r#"{"size":0}"#), balloon);
    kept::<VsockConfig>(r#"{"id":"_vsock1","pci_segment":0,"cid":3,"socket":"/s"}"#);
    kept::<PciDeviceInfo>(r#"{"id":"ee","bdf":"0000:00:05.0"}"#);
    kept::<ConsoleConfig>(r#"{"mode":"File","file":"/f","id":"c","pci_segment":0}"#);
    assert_eq!(
        printed::<NetConfig>("{}"),
        concat!(
            r#"{"pci_segment":0,"num_queues":2,"queue_size":256,"vhost_user":false,"#,
            r#""vhost_mode":"Client","offload_tso":true,"offload_ufo":true,"offload_csum":true}"#
        )
    );
    assert_eq!(
        printed::<FsConfig>(r#"{"tag":"t","socket":"/s"}"#),
        r#"{"pci_segment":0,"tag":"t","socket":"/s","num_queues":1,"queue_size":1024}"#
    );
    kept::<VmmPingResponse>(concat!(
        r#"{"build_version":"v53.0-246-gae44c2971-dirty","version":"54.0.0","pid":19002,"#,
        r#""features":["kvm"]}"#
    ));
}

#[test]
fn a_device_in_the_tree_is_printed_with_its_bar() {
    kept::<DeviceNode>(concat!(
        r#"{"id":"_virtio-pci-_disk0","resources":[{"PciBar":{"index":0,"base":3891789824,"#,
        r#""size":524288,"type_":"Mmio32","prefetchable":false}},{"LegacyIrq":4},"#,
        r#"{"PioAddressRange":{"base":1016,"size":8}}],"parent":"p","children":["_disk0"],"#,
        r#""pci_bdf":"0000:00:01.0"}"#
    ));
}

#[test]
fn a_resize_is_taken_with_the_nulls_that_ch_remote_sends() {
    let text = r#"{"desired_vcpus":2,"desired_ram":null,"desired_balloon":null}"#;
    let resize: VmResize = serde_json::from_str(text).unwrap();
    assert_eq!(resize.desired_vcpus, Some(2));
    assert_eq!((resize.desired_ram, resize.desired_balloon), (None, None));
    assert_eq!(printed::<VmResize>("{}"), "{}");
}

#[test]
fn null_is_taken_where_a_field_may_be_absent_and_nowhere_else() {
    let absent = json!({
        "id": null, "pci_device_id": null, "path": "/a", "vhost_socket": null,
        "rate_limit_group": null, "rate_limiter_config": null, "serial": null,
        "queue_affinity": null,
    });
    assert_eq!(
        serde_json::from_value::<DiskConfig>(absent).unwrap(),
        serde_json::from_value(json!({"path": "/a"})).unwrap()
    );
    let whole = json!({
        "payload": null, "disks": null, "net": null, "balloon": null, "fs": null, "pmem": null,
        "vsock": null, "numa": null, "rtc": null, "platform": null, "tpm": null,
        "rate_limit_groups": null, "landlock_rules": null, "devices": null,
        "memory": {"size": 1, "hotplug_size": null, "hotplugged_size": null,
            "hugepage_size": null, "zones": null},
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "topology": null, "affinity": null},
        "serial": {"mode": "Off", "file": null, "socket": null},
    });
    serde_json::from_value::<VmConfig>(whole).unwrap();
    for field in [
        "readonly",
        "direct",
        "num_queues",
        "queue_size",
        "sparse",
        "image_type",
        "iommu",
        "pci_segment",
    ] {
        let message = refused::<DiskConfig>(&json!({ field: null }));
        assert!(message.contains("line 1 column"), "{field}: {message}");
    }
    for field in ["cpus", "memory", "rng", "serial", "console", "pvpanic"] {
        refused::<VmConfig>(&json!({ field: null }));
    }
}

#[test]
fn what_clients_leave_out_of_migrations_may_be_null() {
    let send = json!({
        "destination_url": "unix:/s", "downtime_ms": null, "timeout_s": null,
        "timeout_strategy": null, "connections": null, "tls_dir": null, "preset": null,
        "bandwidth": null, "stall_s": null, "throttle": null, "delta_cache": null,
        "copy_storage": null, "free_page_hints": null,
    });
    let plain = SendMigrationData {
        destination_url: "unix:/s".to_owned(),
        ..SendMigrationData::default()
    };
    assert_eq!(
        serde_json::from_value::<SendMigrationData>(send).unwrap(),
        plain
    );
    for field in ["local", "preserve_source", "memory_mode", "compression"] {
        let told = refused::<SendMigrationData>(&json!({ "destination_url": "", field: null }));
        assert!(told.contains("line 1 column"), "{field}: {told}");
    }
    let receive = json!({
        "receiver_url": "unix:/s", "tls_dir": null, "zone_updates": null, "vfio_fds": null,
        "iommufd_fd": null, "net_fds": null, "overrides": null, "wait_s": null,
    });
    let plain = ReceiveMigrationData {
        receiver_url: "unix:/s".to_owned(),
        ..ReceiveMigrationData::default()
    };
    assert_eq!(
        serde_json::from_value::<ReceiveMigrationData>(receive).unwrap(),
        plain
    );
    let unknown = |told: String| assert!(told.contains("unknown field `x`"), "{told}");
    unknown(refused::<VmMigrationSet>(&json!({ "x": 1 })));
    unknown(refused::<VmMigrationResolve>(
        &json!({ "resolution": "Resume", "x": 1 }),
    ));
    let set = json!({
        "bandwidth": null, "downtime_ms": null, "timeout_s": null, "timeout_strategy": null,
        "throttle": null,
    });
    assert_eq!(
        serde_json::from_value::<VmMigrationSet>(set).unwrap(),
        VmMigrationSet::default()
    );
}

#[test]
fn a_migration_is_printed_without_what_is_not_known() {
    let info = MigrationInfo {
        job: "migration-1".to_owned(),
        ..MigrationInfo::default()
    };
    kept::<MigrationInfo>(&serde_json::to_string(&info).unwrap());
    let printed = serde_json::to_value(&info).unwrap();
    assert_eq!(printed["phase"], "connecting");
    assert_eq!(printed["direction"], "outgoing");
    for field in ["bandwidth", "expected_downtime_us", "downtime_us", "error"] {
        assert!(printed.get(field).is_none(), "{field}");
    }
}

#[test]
fn fields_that_are_not_known_are_passed_over_except_beside_buckets() {
    let config = json!({
        "x": 1,
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "profile": "Host", "x": 1},
        "disks": [{"path": "/a", "x": 1, "rate_limiter_config":
            {"ops": {"size": 1, "refill_time": 1, "x": 1}}}],
    });
    serde_json::from_value::<VmConfig>(config).unwrap();
    let limiter = json!({"ops": null, "x": 1});
    assert!(refused::<RateLimiterConfig>(&limiter).contains("unknown field `x`"));
}

#[test]
fn fields_that_are_not_known_can_be_told_from_the_others() {
    // A struct that is flattened into another would take them all.
    let mut found = Vec::new();
    let value = json!({"path": "/a", "id": "d", "iommu": false, "x": 1});
    let disk: DiskConfig =
        serde_ignored::deserialize(value, |path| found.push(path.to_string())).unwrap();
    assert_eq!(disk.id.as_deref(), Some("d"));
    assert_eq!(found, ["x"]);
}

#[test]
fn what_is_missing_or_of_the_wrong_type_is_named_with_its_place() {
    assert_eq!(
        serde_json::from_str::<VmConfig>(r#"{"payload":{},"memory":{}}"#)
            .unwrap_err()
            .to_string(),
        "missing field `size` at line 1 column 25"
    );
    for value in [
        json!({"size": -1}),
        json!({"size": 1.5}),
        json!({"size": "1"}),
        json!({"size": 1e30}),
        json!({"size": 1, "hotplug_method": "acpi"}),
        json!({"size": 1, "thp": 1}),
    ] {
        assert!(refused::<MemoryConfig>(&value).contains("line 1 column"));
    }
    assert!(refused::<DiskConfig>(&json!({"queue_size": 65536})).contains("65536"));
}

#[test]
fn the_older_names_of_a_platforms_fields_are_understood() {
    let platform: PlatformConfig =
        serde_json::from_value(json!({"serial_number": "s", "uuid": "u"})).unwrap();
    assert_eq!(platform.system_serial_number.as_deref(), Some("s"));
    assert_eq!(
        serde_json::to_string(&platform).unwrap(),
        concat!(
            r#"{"num_pci_segments":1,"iommu_address_width_bits":64,"system_serial_number":"s","#,
            r#""system_uuid":"u","iommufd":false,"vfio_p2p_dma":true}"#
        )
    );
}

#[test]
fn what_is_ours_refuses_unknown_fields_by_their_name() {
    let unknown = |message: String| assert!(message.contains("unknown field `x`"), "{message}");
    unknown(refused::<VmUpdateDisk>(&json!({"id": "a", "x": 1})));
    unknown(refused::<VirtioConfig>(&json!({"kind": "a", "x": 1})));
    unknown(refused::<ConsoleRequest>(&json!({"x": 1})));
    unknown(refused::<JobCancel>(&json!({"id": "a", "x": 1})));
    unknown(refused::<VmConsole>(&json!({"x": "a"})));
    unknown(refused::<VmConsoleSize>(&json!({"x": 1})));
    let none = json!({"columns": 0, "rows": 24});
    assert!(refused::<VmConsoleSize>(&none).contains("nonzero"));
}

#[test]
fn a_change_of_a_console_is_one_addition_or_one_removal() {
    let taken = |body| serde_json::from_value::<VmConsole>(body);
    for (body, port) in [
        (json!({"add": "a"}), ConsolePort::Serial),
        (json!({"add": "a", "port": "console"}), ConsolePort::Console),
    ] {
        let addition = VmConsole::Add("a".to_owned(), port);
        assert_eq!(serde_json::to_value(&addition).unwrap(), body);
        assert_eq!(taken(body).unwrap(), addition);
    }
    let told = refused::<VmConsole>(&json!({"remove": "a", "port": "serial"}));
    assert!(told.contains("`port` goes with `add`"), "{told}");
    let removal = VmConsole::Remove("a".to_owned());
    assert_eq!(taken(json!({"remove": "a"})).unwrap(), removal);
    for wrong in [json!({}), json!({"add": "a", "remove": "b"})] {
        let told = refused::<VmConsole>(&wrong);
        assert!(told.contains("give one of `add` and `remove`"), "{told}");
    }
}
