//! Network cards that another program serves: a real switch, killed and started again under its guests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use api::{EventKind, ExitReason};
use serde_json::json;

use crate::support::{Local, can_run, config, skip, until};

/// The ends of a switch with two ports, which passes on what comes.
const PORTS: [&str; 2] = ["port0", "port1"];

/// Who connects, and how many pairs of queues there are.
#[derive(Clone, Copy)]
enum Role {
    /// The machines, to the switch; one pair.
    Listens,
    /// The switch, to the machines; two pairs.
    Calls,
}

/// The program, which polls; killed when dropped.
struct Switch(Child);

/// DPDK as it was unpacked.
fn unpacked() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/testbed/dpdk")
}

/// The directory of the libraries that make the program a switch for guests, and their names. They are loaded first:
/// as plugins it would refuse them in some directories.
fn plugins(libraries: &Path) -> Option<(PathBuf, String)> {
    let directory = fs::read_dir(libraries.join("dpdk")).ok()?;
    let directory = directory
        .filter_map(|entry| Some(entry.ok()?.path()))
        .next()?;
    let files = fs::read_dir(&directory).ok()?;
    let names: Vec<_> = files
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    let wanted = ["librte_bus_vdev", "librte_mempool_ring", "librte_net_vhost"];
    let found = wanted.map(|name| {
        let start = format!("{name}.so.");
        names.iter().find(|name| name.starts_with(&start)).cloned()
    });
    let found: Option<Vec<String>> = found.into_iter().collect();
    Some((directory, found?.join(" ")))
}

/// The processors that this process may use, as a list of ranges.
fn processors() -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mut lines = status.lines();
    let list = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.unwrap().trim().to_owned()
}

impl Switch {
    /// One whose ports have their sockets in `directory`.
    fn start(directory: &Path, role: Role) -> Option<Self> {
        let root = unpacked();
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let Some((plugins, names)) = plugins(&libraries) else {
            skip("there is no DPDK; make setup unpacks it");
            return None;
        };
        let places = [libraries, root.join("lib/x86_64-linux-gnu"), plugins];
        let mut command = Command::new(root.join("usr/bin/dpdk-testpmd"));
        command.env("LD_LIBRARY_PATH", std::env::join_paths(places).unwrap());
        command.env("LD_PRELOAD", names);
        command.args(["--no-huge", "-m", "64", "--no-pci", "--no-telemetry"]);
        let processors = processors();
        let threads = format!("0@({processors}),1@({processors})");
        command.args(["--no-shconf", "--lcores", &threads]);
        for (number, port) in PORTS.iter().enumerate() {
            let socket = directory.join(port);
            let more = match role {
                Role::Listens => {
                    // One that was killed has left it.
                    let _ = fs::remove_file(&socket);
                    "queues=1"
                }
                Role::Calls => "queues=2,client=1",
            };
            let device = format!("net_vhost{number},iface={},{more}", socket.display());
            command.args(["--vdev", &device]);
        }
        command.args([
            "--",
            "--forward-mode=io",
            "--auto-start",
            "--disable-link-check",
        ]);
        command.args(["--total-num-mbufs=2048", "--stats-period=100"]);
        let log = fs::File::create(directory.join("log")).unwrap();
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let mut switch = Self(command.spawn().unwrap());
        until("the switch", || {
            let ended = switch.0.try_wait().unwrap();
            let log = || fs::read_to_string(directory.join("log")).unwrap();
            assert!(ended.is_none(), "the switch has ended: {}", log());
            let listens = |port: &&str| directory.join(port).exists();
            match role {
                Role::Listens => PORTS.iter().all(listens),
                Role::Calls => log().contains("Port 1:"),
            }
            .then_some(())
        });
        Some(switch)
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn boot(directory: &Path, role: Role, port: &str, cmdline: &str) -> Local {
    let socket = directory.join(port);
    let card = match role {
        Role::Listens => json!({ "socket": socket }),
        Role::Calls => json!({ "socket": socket, "vhost_mode": "server", "num_queues": 4 }),
    };
    let more = json!({
        "serial": { "file": directory.join(format!("{port}.serial")) },
        "devices": [{
            "kind": "vhost-user-net",
            "config": card,
        }],
    });
    let config = config("net", cmdline, more);
    assert!(config.memory.shared);
    Local::boot(&config)
}

fn hears(machine: &Local, wanted: fn(&EventKind) -> bool) {
    while !wanted(&machine.next_event()) {}
}

fn frames_pass(role: Role) {
    if !can_run() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let Some(switch) = Switch::start(directory, role) else {
        return;
    };
    // As many as it has buffers at first: none is lost for want of one.
    let mut receiver = boot(directory, role, PORTS[1], "receive count=200");
    let serial = directory.join("port1.serial");
    until("the receiver", || {
        let said = fs::read_to_string(&serial).unwrap_or_default();
        said.contains("net=ready").then_some(())
    });
    drop(switch);
    hears(&receiver, |event| {
        matches!(event, EventKind::DevicePeerLost { .. })
    });
    let _switch = Switch::start(directory, role).unwrap();
    hears(&receiver, |event| {
        matches!(event, EventKind::DevicePeerConnected { .. })
    });
    let mut sender = boot(directory, role, PORTS[0], "send count=5000 bytes=100");
    let outcome = sender.outcome();
    assert_eq!(outcome.reason, ExitReason::PowerOff);
    let outcome = receiver.outcome();
    let said = fs::read_to_string(&serial).unwrap();
    assert_eq!(outcome.reason, ExitReason::PowerOff, "{said}");
    assert!(said.contains("frames=200 "), "{said}");
}

#[test]
fn frames_pass_a_switch_that_was_started_again() {
    frames_pass(Role::Listens);
}

#[test]
fn frames_pass_a_switch_that_connects_and_was_started_again() {
    frames_pass(Role::Calls);
}
