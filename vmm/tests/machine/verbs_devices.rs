//! The verbs for devices of machines that run, by name: cards, and those of which a machine has none.

use std::process::Command;

use serde_json::{Value, json};

use crate::support::{Vireo, can_run, run_arguments, skip, until};
use crate::verbs::User;

/// A network of its own with a tap that takes what is sent; then the program runs there.
const NETWORK: &str =
    "ip tuntap add dev one mode tap && ip link set one up || exit 99; exec \"$@\"";

/// Who runs a program in that network.
fn in_network() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", NETWORK, "sh"]);
    command
}

/// How many frames the card has sent.
fn sent(user: &User, name: &str) -> u64 {
    let counters = user.json(&["counters", name, "--json"]);
    counters["lan"]["tx_frames"].as_u64().unwrap()
}

#[test]
fn limits_of_a_card_are_changed_and_lifted_by_its_machines_name() {
    if !can_run() {
        return;
    }
    let made = in_network().arg("true").output();
    if !made.as_ref().is_ok_and(|output| output.status.success()) {
        return skip(&format!("no taps can be made here: {made:?}"));
    }
    let user = User::new();
    let name = user.name();
    let name = name.as_str();
    // After so many frames none passes for hours.
    let card = "tap=one,id=lan,tx_ops_size=3,tx_ops_refill_time=3600000";
    let flags = ["--net", card, "--name", name, "--shutdown-timeout", "1000"];
    let mut command = in_network();
    command.arg(env!("CARGO_BIN_EXE_vireo"));
    command.args(run_arguments("net", "send count=5000", &flags));
    let mut machine = Vireo::spawn(user.within(&mut command));
    machine.stdout.wait_for("net=ready");
    until("three frames", || (sent(&user, name) == 3).then_some(()));

    let update = |text: &str| user.done(&["net", "update", name, "lan", text]);
    let shown = || {
        let info = user.json(&["info", name, "--json"]);
        info["config"]["net"][0].clone()
    };
    update("tx_ops_size=4,tx_ops_refill_time=3600000");
    until("four more", || (sent(&user, name) == 7).then_some(()));
    let is = |bucket: &Value, size: u64, time: u64| {
        let told = (&bucket["size"], &bucket["refill_time"]);
        assert_eq!(told, (&json!(size), &json!(time)));
    };
    is(&shown()["tx_rate_limiter_config"]["ops"], 4, 3_600_000);
    // All that is not named is lifted. A frame of 64 bytes is taken from a bucket of as many.
    update("tx_bw_size=320,tx_bw_refill_time=3600000000,rx_ops_size=9,rx_ops_refill_time=10");
    until("five more", || (sent(&user, name) == 12).then_some(()));
    let told = shown();
    let tx = &told["tx_rate_limiter_config"];
    is(&tx["bandwidth"], 320, 3_600_000_000);
    assert!(tx["ops"].is_null(), "{told}");
    is(&told["rx_rate_limiter_config"]["ops"], 9, 10);

    for (text, code, part) in [
        ("tx_ops_size=1", 2, "tx_ops_refill_time"),
        ("limits=off,ops_size=1,ops_refill_time=1", 2, "give either"),
        ("tpa=one", 2, "tpa"),
    ] {
        let refused = user.refused(code, &["net", "update", name, "lan", text]);
        assert!(refused.contains(part), "{text}: {refused}");
    }
    let unknown = user.refused(1, &["net", "update", name, "lna", "limits=off"]);
    assert!(unknown.contains("lna"), "{unknown}");
    assert_eq!(sent(&user, name), 12);

    let listed = user.json(&["net", "list", name, "--json"]);
    assert_eq!(
        (&listed[0]["id"], &listed[0]["tap"]),
        (&"lan".into(), &"one".into())
    );
    update("limits=off");
    machine.stdout.wait_for("frames=5000");
    machine.ends_with(0);
}

#[test]
fn what_a_machine_has_none_of_is_told_by_the_verbs_for_it() {
    if !can_run() {
        return;
    }
    let user = User::new();
    let (plain, port) = (user.name(), user.name());
    let mut machine = user.start(&plain, "poke", "serial-echo", &[]);
    machine.stdout.wait_for("echo=ready");
    let mut agent = user.start(&port, "poke", "serial-echo", &["--agent"]);
    agent.stdout.wait_for("echo=ready");
    for verb in [
        "ping", "info", "shutdown", "fsfreeze", "fsthaw", "fsstatus", "network",
    ] {
        let told = user.refused(1, &["agent", verb, &plain]);
        assert!(told.contains("no port for a guest agent"), "{verb}: {told}");
        // This guest has no driver for it.
        let told = user.refused(1, &["agent", verb, &port]);
        assert!(told.contains("nothing in the guest"), "{verb}: {told}");
        let told = user.refused(2, &["agent", verb]);
        assert!(told.contains("NAME"), "{verb}: {told}");
    }
    let mode = user.refused(2, &["agent", "shutdown", &port, "--mode", "sleep"]);
    assert!(mode.contains("powerdown"), "{mode}");

    assert_eq!(
        user.json(&["fs", "list", &plain, "--json"]),
        Value::Array(Vec::new())
    );
    let none = user.refused(1, &["fs", "remove", &plain, "source"]);
    assert!(
        none.contains("has no shared directory 'source': it has none"),
        "{none}"
    );
    let added = |text: &str, code| user.refused(code, &["fs", "add", &plain, text]);
    // What listens nowhere is named by its whole path; and the guest's memory is none that another program could map.
    let nowhere = added("src,socket=none", 1);
    assert!(
        nowhere.contains("shared=on") || nowhere.contains("/none"),
        "{nowhere}"
    );
    let tagless = added("socket=none", 2);
    assert!(tagless.contains("tag"), "{tagless}");
    for (machine, name) in [(&mut machine, &plain), (&mut agent, &port)] {
        user.done(&["destroy", name]);
        machine.ends_with(0);
    }
}
