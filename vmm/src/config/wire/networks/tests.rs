use api::ErrorKind;
use serde_json::json;

use super::*;

const MAC: &str = "52:54:00:00:00:01";

fn described(nets: Value) -> wire::VmConfig {
    serde_json::from_value(json!({ "payload": { "kernel": "/k" }, "net": nets })).unwrap()
}

fn made(nets: Value) -> VmConfig {
    VmConfig::from_wire(&described(nets)).unwrap()
}

fn net(value: Value) -> wire::NetConfig {
    serde_json::from_value(value).unwrap()
}

#[test]
fn a_cards_fields_arrive_and_are_shown_again() {
    let told = json!({
        "id": "n", "tap": "tap0", "ip": "10.0.0.1", "mask": "255.0.0.0", "mac": MAC,
        "host_mac": "52:54:00:00:00:02", "mtu": 9000, "num_queues": 4, "queue_size": 512,
        "offload_tso": false, "vhost": "auto",
        "rate_limiter_config": { "ops": { "size": 5, "refill_time": 6 } },
        "tx_rate_limiter_config": { "bandwidth": { "size": 7, "refill_time": 8 } },
    });
    let config = made(json!([told]));
    let card = config.devices[0].network().unwrap();
    let limits = card.rate_limits().unwrap();
    assert_eq!(limits.rx.ops.unwrap().size, 5);
    assert_eq!(
        (limits.tx.ops, limits.tx.bandwidth.unwrap().size),
        (None, 7)
    );
    let settings = card.settings().unwrap();
    assert_eq!(
        (settings.pairs, settings.queue_size, settings.mtu),
        (2, 512, Some(9000))
    );
    let shown = config.to_wire().net.unwrap().remove(0);
    let mut expected = net(told);
    // Each direction has limits of its own by then.
    expected.rx_rate_limiter_config = expected.rate_limiter_config.take();
    assert_eq!(shown, expected);
}

#[test]
fn a_card_behind_a_socket_is_shown_with_it() {
    let told = json!({ "id": "n", "socket": "/run/passt.sock", "mac": MAC });
    let config = made(json!([told]));
    assert_eq!(
        config.devices[0].network().unwrap().socket,
        Some("/run/passt.sock".into())
    );
    assert_eq!(config.to_wire().net.unwrap().remove(0), net(told));
}

#[test]
fn cards_that_make_no_sense_are_refused_by_kind() {
    let cases = [
        (json!([{ "mac": "01:00:00:00:00:00" }]), ErrorKind::Invalid),
        (json!([{ "num_queues": 3 }]), ErrorKind::Invalid),
        (json!([{ "ip": "10.0.0.1" }]), ErrorKind::Invalid),
        (
            json!([{ "ip": "fe80::1", "mask": "255.0.0.0" }]),
            ErrorKind::Invalid,
        ),
        (json!([{ "mtu": 100 }]), ErrorKind::Invalid),
        (json!([{ "socket": "" }]), ErrorKind::Invalid),
        (json!([{ "socket": "/s", "tap": "t" }]), ErrorKind::Invalid),
        (json!([{ "mac": MAC }, { "mac": MAC }]), ErrorKind::Conflict),
        (json!([{ "vhost_user": true }]), ErrorKind::Invalid),
        (json!([{ "vhost_socket": "/s" }]), ErrorKind::Invalid),
        (json!([{ "iommu": true }]), ErrorKind::Unimplemented),
    ];
    for (nets, kind) in cases {
        let error = VmConfig::from_wire(&described(nets.clone())).unwrap_err();
        assert_eq!(error.kind, kind, "{nets}: {error}");
    }
}

#[test]
fn what_the_kernel_cannot_do_is_refused_of_a_card_that_is_its() {
    let update = || {
        let limits = json!({ "ops": { "size": 5, "refill_time": 6 } });
        serde_json::from_value(json!({ "id": "n", "rate_limiter_config": limits })).unwrap()
    };
    let of = |vhost: &str| made(json!([{ "id": "n", "vhost": vhost }]));
    let refused = of("on").plan_net_update(&update()).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Invalid);
    assert!(refused.to_string().contains("keeps no limits"), "{refused}");
    assert!(of("auto").plan_net_update(&update()).is_ok());
}

#[test]
fn a_card_is_planned_under_a_free_name_with_an_address_and_its_descriptors() {
    let config = made(json!([{ "mac": MAC }]));
    let (shown, device) = config.plan_net(&net(json!({})), &[7]).unwrap();
    assert_eq!(
        (shown.id.as_deref(), device.id.as_str()),
        (Some("_net1"), "_net1")
    );
    let card = device.network().unwrap();
    assert_eq!((card.fd.as_deref(), card.tap), (Some("7"), None));
    assert!(shown.mac.is_some() && shown.mac == card.mac);
    let clash = config
        .plan_net(&net(json!({ "mac": MAC })), &[])
        .unwrap_err();
    assert_eq!(clash.kind, ErrorKind::Conflict, "{clash}");
    let generic = |config: Value| {
        let device = json!({ "kind": "net", "config": config });
        serde_json::from_value::<wire::VirtioConfig>(device).unwrap()
    };
    let passed = config.plan_device(&generic(json!({ "fd": "7" })));
    assert_eq!(passed.unwrap_err().kind, ErrorKind::Invalid);
    let planned = config
        .plan_device(&generic(json!({ "tap": "tap1" })))
        .unwrap();
    assert!(planned.network().unwrap().mac.is_some());
}

#[test]
fn a_card_is_updated_in_its_configuration_and_in_its_description() {
    let limited = json!([{ "id": "n", "mac": MAC, "rate_limiter_config":
        { "ops": { "size": 1, "refill_time": 2 } } }]);
    let mut wire = described(limited);
    let config = VmConfig::from_wire(&wire).unwrap();
    let request = |value: Value| -> wire::VmUpdateNet { serde_json::from_value(value).unwrap() };
    let change = request(json!({ "id": "n", "link": "down", "tx_rate_limiter_config": {} }));
    let NetUpdate { device, patch } = config.plan_net_update(&change).unwrap();
    assert_eq!(patch, json!({ "link": "down", "tx_limits": {} }));
    update_net(&mut wire, &device);
    let shown = &wire.net.as_ref().unwrap()[0];
    assert_eq!(
        (shown.rate_limiter_config, shown.tx_rate_limiter_config),
        (None, None)
    );
    assert_eq!(shown.rx_rate_limiter_config.unwrap().ops.unwrap().size, 1);
    assert_eq!(
        VmConfig::from_wire(&wire).unwrap().devices[0].network(),
        device.network()
    );
    for (id, kind) in [("x", ErrorKind::NotFound), ("__rng", ErrorKind::Invalid)] {
        let refused = config.plan_net_update(&request(json!({ "id": id })));
        assert_eq!(refused.unwrap_err().kind, kind);
    }
}

#[test]
fn a_mirror_is_put_into_the_configuration_shown_and_changed() {
    let mirrored = json!([{ "id": "n", "mac": MAC, "mirror": { "file": { "path": "/a.pcap" } } }]);
    let mut wire = described(mirrored);
    let config = VmConfig::from_wire(&wire).unwrap();
    let card = config.devices[0].network().unwrap();
    assert_eq!(card.mirror_file, Some("/a.pcap".into()));
    let shown = config.shown_net(&config.devices[0]).unwrap();
    let shown = serde_json::to_value(shown.mirror).unwrap();
    assert_eq!(
        shown,
        json!({ "file": { "path": "/a.pcap", "size": 1 << 30 } })
    );
    let request = |mirror: Value| -> wire::VmUpdateNet {
        serde_json::from_value(json!({ "id": "n", "mirror": mirror })).unwrap()
    };
    for (mirror, told) in [
        (json!({ "tap": "mon0" }), json!({ "tap": "mon0" })),
        (
            json!({ "file": { "path": "/b", "size": 1 << 20 } }),
            json!({ "file": "/b", "size": 1 << 20 }),
        ),
        (json!("off"), json!({})),
    ] {
        let planned = config.plan_net_update(&request(mirror.clone())).unwrap();
        assert_eq!(planned.patch, json!({ "mirror": told }));
        update_net(&mut wire, &planned.device);
        let shown = serde_json::to_value(&wire.net.as_ref().unwrap()[0].mirror).unwrap();
        let off = mirror == json!("off");
        assert_eq!(shown, if off { Value::Null } else { mirror });
    }
    for wrong in [
        json!({ "tap": "a/b" }),
        json!({ "file": { "path": "" } }),
        json!({ "file": { "path": "/a", "size": 5 } }),
    ] {
        let refused = config.plan_net_update(&request(wrong)).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Invalid);
    }
}
