//! The limits of a source of random numbers, changed while the machine runs.

use api::wire::{RateLimiterConfig, TokenBucket, VmUpdateRng};

use crate::support::{Served, Vireo, can_run};

fn limits(size: u64) -> RateLimiterConfig {
    let bucket = TokenBucket {
        size,
        one_time_burst: None,
        refill_time: 1000,
    };
    RateLimiterConfig {
        bandwidth: Some(bucket),
        ops: None,
    }
}

/// `vireo rng update` of a machine; what it has said on standard error.
fn verb(served: &Served, words: &[&str], code: i32) -> String {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vireo"));
    command.args(["rng", "update", "--api-socket"]);
    let mut verb = Vireo::spawn(command.arg(served.socket()).args(words));
    verb.ends_with(code);
    verb.stderr.rest()
}

#[test]
fn limits_are_changed_by_request_and_verb_and_stay_over_a_reboot() {
    if !can_run() {
        return;
    }
    let flags = ["--serial", "null", "--rng", "id=noise", "--pvpanic", "off"];
    let served = Served::start("poke", "serial-echo", &flags);
    let mut client = served.client();
    let mut request = VmUpdateRng {
        id: "noise".to_owned(),
        rate_limiter_config: limits(4096),
    };
    let shown = || {
        served
            .client()
            .info()
            .unwrap()
            .config
            .rng
            .rate_limiter_config
    };
    let size = || shown().unwrap().bandwidth.unwrap().size;
    crate::support::until("the machine to run", || client.update_rng(&request).ok());
    assert_eq!(size(), 4096);
    verb(&served, &["noise", "bw_size=8K,bw_refill_time=1000"], 0);
    assert_eq!(size(), 8192);
    verb(&served, &["noise", "limits=off"], 0);
    assert_eq!(shown(), None);

    // A bucket that never fills, and what is there under no name or is something else.
    let endless = verb(&served, &["noise", "bw_size=1,bw_refill_time=0"], 2);
    assert!(endless.contains("bw_refill_time=0"), "{endless}");
    let missing = verb(&served, &["other", "limits=off"], 1);
    assert!(missing.contains("other"), "{missing}");
    request.id = "com1".to_owned();
    assert_eq!(client.update_rng(&request).unwrap_err().status(), Some(404));
    assert_eq!(shown(), None);

    request.id = "noise".to_owned();
    client.update_rng(&request).unwrap();
    client.reboot().unwrap();
    assert_eq!(size(), 4096);
}
