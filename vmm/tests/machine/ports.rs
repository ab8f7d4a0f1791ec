//! Further consoles, named ports and the guest agent, as a user has them.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::{fs, io};

use api::client::ClientError;
use api::wire::{ConsoleMode, ConsolePort, ConsoleRequest, PortConfig, VirtioConfig};
use serde_json::json;

use crate::sinks::Attached;
use crate::support::{Served, can_run, until};

/// The status and the causes of a refusal.
fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (u16, String) {
    match result {
        Err(ClientError::Refused { status, chain, .. }) => (status, chain.join(": ")),
        other => panic!("{other:?}"),
    }
}

/// What is answered when the machine has been booted: v1's state calls it running before.
fn once_it_runs(mut ask: impl FnMut() -> (u16, String)) -> (u16, String) {
    until("the machine to run", || {
        let answer = ask();
        (!answer.1.contains("VM is not running")).then_some(answer)
    })
}

#[test]
fn ports_are_there_as_described_and_go_with_the_machine() {
    if !can_run() {
        return;
    }
    let flags = [
        "--serial",
        "null",
        "--serial2",
        "file={dir}/com2",
        "--console",
        "file={dir}/hvc0",
        "--port",
        "name=a,socket={dir}/a",
        "--port",
        "b,pty",
        "--agent",
    ];
    let served = Served::start("poke", "serial-echo", &flags);
    let mut client = served.client();
    let info = client.info().unwrap();
    assert_eq!(info.config.console.mode, ConsoleMode::File);
    assert_eq!(info.config.ports.unwrap().len(), 3);
    let mut devices = client.devices().unwrap();
    let fixed = devices.split_off(1);
    let places: Vec<_> = fixed
        .iter()
        .map(|device| (device.id.as_str(), device.address.as_deref().unwrap()))
        .collect();
    let there = [
        ("com1", "port 0x3f8"),
        ("com2", "port 0x2f8"),
        ("i8042", "port 0x60"),
        ("rtc", "port 0x70"),
        ("pvpanic", "port 0x505"),
        ("vmgenid", "memory 0xf7000"),
    ];
    assert_eq!(places, there);
    let [device] = devices.as_slice() else {
        panic!("{devices:?}");
    };
    assert_eq!(
        (device.id.as_str(), device.kind.as_str()),
        ("__console", "console")
    );
    assert!(client.counters().unwrap()["__console"].contains_key("tx_bytes"));
    assert!(served.path("com2").exists() && served.path("hvc0").exists());
    let socket = served.path("a");
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    Attached::to(&served, true).output.wait_for("echo=ready");
    // It waits to be let in, for there is no driver.
    let _client = UnixStream::connect(&socket).unwrap();
    // The guest has no driver: nothing has the agent's port open.
    let (status, why) = once_it_runs(|| refused(client.agent_ping()));
    assert_eq!(status, 409);
    assert!(why.contains("no agent: nothing in the guest"), "{why}");
    client.pause().unwrap();
    let (status, why) = refused(client.agent_network());
    assert_eq!(status, 409);
    assert!(why.contains("paused"), "{why}");
    client.resume().unwrap();
    client.shutdown().unwrap();
    until("the socket's removal", || {
        let gone = fs::metadata(&socket).err()?.kind() == io::ErrorKind::NotFound;
        gone.then_some(())
    });
}

#[test]
fn a_machine_without_ports_says_that_it_has_none() {
    if !can_run() {
        return;
    }
    let flags = ["--serial", "null", "--serial4", "null"];
    let served = Served::start("poke", "serial-echo", &flags);
    let mut client = served.client();
    let mut first = Attached::to(&served, true);
    first.output.wait_for("echo=ready");
    let devices = client.devices().unwrap();
    assert!(devices.iter().all(|device| device.kind != "console"));
    let (status, why) = once_it_runs(|| refused(client.agent_freeze()));
    assert_eq!(status, 409);
    assert!(
        why.contains("has no port for a guest agent: it is one called"),
        "{why}"
    );
    let attach = |port| {
        let request = ConsoleRequest { replay: true, port };
        served.client().attach_to(&request)
    };
    for port in [ConsolePort::Serial2, ConsolePort::Console] {
        let (status, why) = refused(attach(port).map(|_| ()));
        assert_eq!(status, 404);
        assert!(why.contains("the machine has no console"), "{why}");
    }
    let _fourth = attach(ConsolePort::Serial4).unwrap();
    first.echo("one");
    let mut again = Attached::over(attach(ConsolePort::Serial).unwrap());
    again.output.wait_for("echo:one");
}

#[test]
fn a_port_comes_and_goes_while_the_machine_runs() {
    if !can_run() {
        return;
    }
    let flags = ["--serial", "null", "--port", "a,null"];
    let served = Served::start("poke", "serial-echo", &flags);
    let mut client = served.client();
    let socket = served.path("late");
    let late = PortConfig {
        name: "late".to_owned(),
        socket: Some(socket.clone()),
        ..PortConfig::default()
    };
    let added = until("the machine to run", || match client.add_port(&late) {
        Err(ClientError::Refused { chain, .. }) if chain.join("").contains("not running") => None,
        other => Some(other.unwrap()),
    });
    assert_eq!((added.name.as_str(), added.path), ("late", None));
    assert_eq!(client.info().unwrap().config.ports.unwrap().len(), 2);
    let _client = UnixStream::connect(&socket).unwrap();
    for (port, status, part) in [
        (&late, 409, "two ports of this name"),
        (&named("b", "s"), 400, "path is not absolute"),
        (&named("b", "/nonexistent/s"), 400, "/nonexistent/s"),
        (&PortConfig::default(), 400, "a name has 1 to 64"),
    ] {
        let (found, why) = refused(client.add_port(port));
        assert!(found == status && why.contains(part), "{found} {why}");
    }
    let (status, why) = refused(client.remove_port("none"));
    assert!(status == 404 && why.contains("no port 'none'"), "{why}");
    client.pause().unwrap();
    client.remove_port("late").unwrap();
    assert!(!socket.exists());
    let pty = PortConfig {
        name: "pty".to_owned(),
        pty: true,
        ..PortConfig::default()
    };
    let path = client.add_port(&pty).unwrap().path.unwrap();
    assert!(fs::metadata(path).is_ok());
    client.resume().unwrap();
    // The agent's port, which the monitor has itself.
    let agent = PortConfig {
        name: "org.qemu.guest_agent.0".to_owned(),
        ..PortConfig::default()
    };
    client.add_port(&agent).unwrap();
    assert!(
        refused(client.agent_ping())
            .1
            .contains("nothing in the guest")
    );
    client.remove_port(&agent.name).unwrap();
    assert!(
        refused(client.agent_ping())
            .1
            .contains("--agent: the machine has no")
    );
    // And all of them go, while the next boot has what is left.
    client.remove_port("a").unwrap();
    client.reboot().unwrap();
    let ports = client.info().unwrap().config.ports.unwrap();
    let names: Vec<_> = ports.iter().map(|port| port.name.as_str()).collect();
    assert_eq!(names, ["pty"]);
}

#[test]
fn ends_of_ports_of_a_device_that_was_added_are_there_and_at_the_next_boot_too() {
    if !can_run() {
        return;
    }
    let served = Served::start("poke", "serial-echo", &["--serial", "null"]);
    let mut client = served.client();
    let device = VirtioConfig {
        kind: "console".to_owned(),
        id: Some("late".to_owned()),
        address: None,
        config: json!({ "max_ports": 8 }).as_object().unwrap().clone(),
    };
    until("the machine to run", || client.add_virtio(&device).ok());
    let socket = named("socket", served.path("socket").to_str().unwrap());
    let file = PortConfig {
        name: "file".to_owned(),
        file: Some(served.path("file")),
        ..PortConfig::default()
    };
    let pty = PortConfig {
        name: "pty".to_owned(),
        pty: true,
        ..PortConfig::default()
    };
    client.add_port(&socket).unwrap();
    let _client = UnixStream::connect(served.path("socket")).unwrap();
    client.add_port(&file).unwrap();
    assert!(served.path("file").exists());
    let pty = client.add_port(&pty).unwrap().path.unwrap();
    assert!(fs::metadata(pty).is_ok());
    assert_eq!(client.info().unwrap().config.ports.unwrap().len(), 3);
    // They are there again with the machine's next boot.
    served.client().reboot().unwrap();
    until("the socket of the next boot", || {
        UnixStream::connect(served.path("socket")).ok()
    });
}

fn named(name: &str, socket: &str) -> PortConfig {
    PortConfig {
        name: name.to_owned(),
        socket: Some(socket.into()),
        ..PortConfig::default()
    }
}

#[test]
fn a_machine_that_has_no_room_for_ports_refuses_one_and_says_what_gives_it_some() {
    if !can_run() {
        return;
    }
    let port = PortConfig {
        name: "a".to_owned(),
        null: true,
        ..PortConfig::default()
    };
    for (flags, part) in [
        (vec!["--serial", "null"], "no device for ports"),
        (
            vec!["--serial", "null", "--console", "null"],
            "made for its console alone",
        ),
    ] {
        let served = Served::start("poke", "serial-echo", &flags);
        let mut client = served.client();
        let (status, why) = once_it_runs(|| refused(client.add_port(&port)));
        assert!(
            why.contains(part) && why.contains("max_ports=8"),
            "{status} {why}"
        );
    }
    let flags = [
        "--serial",
        "null",
        "--console",
        "null",
        "--virtio-console",
        "max_ports=4",
    ];
    let served = Served::start("poke", "serial-echo", &flags);
    let mut client = served.client();
    let added = until("the machine to run", || client.add_port(&port).ok());
    assert_eq!(added.name, "a");
}
