//! What the configuration says, and what it must not.

use net::Source;

use super::*;
use crate::limit::{Bucket, RateLimits};
use crate::models::BuildError;

fn config(value: Value) -> NetConfig {
    serde_json::from_value(value).unwrap()
}

#[test]
fn what_is_not_said_has_a_default() {
    let config = config(json!({}));
    let settings = config.settings().unwrap();
    assert_eq!(
        (settings.pairs, settings.queue_size, settings.mtu),
        (1, 256, None)
    );
    assert_eq!(settings.offloads, Offloads::all());
    assert_eq!(settings.mac.octets()[0] & 3, 2);
    let request = config.request().unwrap();
    assert_eq!(request.source, Source::Interface("vmtap%d".to_owned()));
}

#[test]
fn queues_are_counted_as_pairs_or_for_both_directions_or_by_descriptors() {
    let pairs = |value| config(value).settings().unwrap().pairs;
    assert_eq!(pairs(json!({ "num_queues": 4 })), 2);
    assert_eq!(pairs(json!({ "queues": 2, "num_queues": 4 })), 2);
    assert_eq!(pairs(json!({ "fd": "7:8:9" })), 3);
    assert_eq!(pairs(json!({ "fd": "[7,8]", "queues": 2 })), 2);
    let request = config(json!({ "fd": "[7,8]" })).request().unwrap();
    assert_eq!(request.source, Source::Descriptors(vec![7, 8]));
}

#[test]
fn values_that_make_no_sense_are_refused_by_their_field() {
    let cases = [
        (json!({ "mac": "52:54:00:12:34" }), "mac"),
        (json!({ "mac": "01:00:5e:00:00:01" }), "mac"),
        (json!({ "mac": "00:00:00:00:00:00" }), "mac"),
        (json!({ "host_mac": "ff:ff:ff:ff:ff:ff" }), "host_mac"),
        (json!({ "num_queues": 3 }), "num_queues"),
        (json!({ "num_queues": 0 }), "num_queues"),
        (json!({ "queues": 0 }), "queues"),
        (json!({ "queues": 65 }), "queues"),
        (json!({ "queues": 2, "num_queues": 2 }), "num_queues"),
        (json!({ "queue_size": 100 }), "queue_size"),
        (json!({ "queue_size": 65536 }), "queue_size"),
        (json!({ "mtu": 1279 }), "mtu"),
        (json!({ "mtu": 65522 }), "mtu"),
        (json!({ "tap": "a/b" }), "tap"),
        (json!({ "tap": "" }), "tap"),
        (json!({ "fd": "one" }), "fd"),
        (json!({ "fd": "2" }), "fd"),
        (json!({ "fd": "3:4", "queues": 1 }), "fd"),
        (json!({ "fd": "3", "tap": "tap0" }), "fd"),
        (
            json!({ "fd": "3", "ip": "10.0.0.1", "mask": "255.0.0.0" }),
            "fd",
        ),
        (json!({ "socket": "/s", "tap": "tap0" }), "socket"),
        (json!({ "socket": "/s", "fd": "3" }), "socket"),
        (json!({ "socket": "/s", "queues": 2 }), "queues"),
        (json!({ "socket": "/s", "owner": 1 }), "socket"),
        (json!({ "ip": "10.0.0.1" }), "mask"),
        (json!({ "ip": "10.0.0.1", "mask": "255.0.255.0" }), "mask"),
        (json!({ "mask": "255.0.0.0" }), "ip"),
        (json!({ "owner": 1_u64 << 32 }), "owner"),
    ];
    for (value, expected) in cases {
        let config = config(value.clone());
        match config.request() {
            Err(BuildError::Field { field, .. }) => assert_eq!(field, expected, "{value}"),
            other => panic!("{value}: {other:?}"),
        }
    }
}

#[test]
fn limits_of_a_direction_stand_over_those_of_both() {
    let bucket = |size| {
        Some(Bucket {
            size,
            one_time_burst: 0,
            refill_time: 100,
        })
    };
    let mut config = config(json!({
        "bw_size": 1000, "bw_refill_time": 100,
        "rx_ops_size": 5, "rx_ops_refill_time": 100,
        "tx_bw_size": 7, "tx_bw_refill_time": 100,
    }));
    let limits = config.rate_limits().unwrap();
    let of = |bandwidth, ops| RateLimits { bandwidth, ops };
    assert_eq!(limits.rx, of(bucket(1000), bucket(5)));
    assert_eq!(limits.tx, of(bucket(7), None));
    for limits in [
        limits,
        NetLimits::default(),
        NetLimits {
            rx: limits.rx,
            tx: limits.rx,
        },
    ] {
        config.set_rate_limits(limits);
        assert_eq!(config.rate_limits().unwrap(), limits);
    }
    config.rx_bw_size = Some(1);
    assert!(
        config
            .rate_limits()
            .unwrap_err()
            .to_string()
            .contains("rx_bw_refill_time")
    );
}
