//! Network cards that cannot be had, asked for while the machine runs, in a network of the test's own.

use std::path::Path;
use std::process::Command;

use api::client::Client;
use serde_json::json;

use crate::managers::ask;
use crate::support::{Vireo, can_run, run_arguments, skip, until};

/// What makes the network; then the program runs there.
const NETWORK: &str = "ip tuntap add dev one mode tap && ip tuntap add dev many mode tap multi_queue && \
    ip tuntap add dev tun7 mode tun && ip link add br7 type bridge || exit 99; exec \"$@\"";

/// Whether such a network can be made.
fn can_make() -> bool {
    let made = Command::new("unshare")
        .args(["--net", "sh", "-c", NETWORK, "sh", "true"])
        .output();
    match made {
        Ok(output) if output.status.success() => true,
        told => {
            skip(&format!("no taps can be made here: {told:?}"));
            false
        }
    }
}

/// A machine in that network, whose guest has no driver.
fn machine(socket: &Path) -> Vireo {
    let flags = ["--serial", "null", "--api-socket", socket.to_str().unwrap()];
    let vireo = Vireo::spawn(
        Command::new("unshare")
            .args([
                "--net",
                "sh",
                "-c",
                NETWORK,
                "sh",
                env!("CARGO_BIN_EXE_vireo"),
            ])
            .args(run_arguments("poke", "serial-echo", &flags)),
    );
    until("the machine", || Client::connect(socket).ok()?.info().ok());
    vireo
}

#[test]
fn cards_that_cannot_be_had_are_refused_by_name_and_leave_the_machine_as_it_was() {
    if !can_run() || !can_make() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("api.sock");
    let _vireo = machine(&socket);
    let mac = "52:54:00:00:00:01";
    let first = json!({ "id": "first", "tap": "one", "mac": mac });
    let second = json!({ "id": "second", "tap": "many", "num_queues": 4 });
    for card in [first, second] {
        let added = until("the machine to run", || {
            let told = ask(&socket, "PUT", "vm.add-net", Some(&card));
            (!told.1.contains("not running")).then_some(told)
        });
        assert!(matches!(added.0, 200 | 204), "{added:?}");
    }
    let devices = || ask(&socket, "GET", "vm.devices", None).1;
    let before = devices();
    let wrong = [
        (json!({ "tap": "lo" }), 500, "'lo' is of another kind"),
        (json!({ "tap": "tun7" }), 500, "'tun7' is a tun interface"),
        (
            json!({ "tap": "br7" }),
            500,
            "'br7' is one of the driver bridge",
        ),
        (json!({ "tap": "one" }), 500, "'one' is in use"),
        (json!({ "tap": "many" }), 500, "'many' is in use"),
        (json!({ "tap": "a/b" }), 400, "'a/b' cannot be the name"),
        (
            json!({ "mac": "52:54:00:00:00:zz" }),
            400,
            "52:54:00:12:34:56",
        ),
        (json!({ "mac": "01:00:5e:00:00:01" }), 400, "multicast"),
        (json!({ "mac": "00:00:00:00:00:00" }), 400, "is no address"),
        (json!({ "mac": mac }), 409, mac),
        (json!({ "num_queues": 3 }), 400, "an even number"),
        (json!({ "tap": "none", "mtu": 100 }), 400, "mtu"),
    ];
    for (card, status, says) in wrong {
        let (found, told) = ask(&socket, "PUT", "vm.add-net", Some(&card));
        assert_eq!(found, status, "{card}: {told}");
        assert!(told.contains(says), "{card}: {told}");
        // The verb says the same, in one line.
        let words = card.as_object().unwrap().iter();
        let words: Vec<_> = words
            .map(|(key, value)| format!("{key}={value}").replace('"', ""))
            .collect();
        let mut verb = Command::new(env!("CARGO_BIN_EXE_vireo"));
        verb.args(["net", "add", "--api-socket"])
            .arg(&socket)
            .arg(words.join(","));
        let mut verb = Vireo::spawn(&mut verb);
        assert!(!verb.end().success(), "{card}");
        let told = verb.stderr.rest();
        assert!(
            told.contains(says) && told.lines().count() == 1,
            "{card}: {told}"
        );
    }
    assert_eq!(devices(), before);
}
