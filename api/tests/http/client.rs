//! The client, against the server and against what is none.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use api::client::{Client, ClientError};
use api::http::ServerOptions;
use api::routes::ROUTES;
use api::{Command, ControlError, ErrorKind, EventKind, Reply, VmState, wire};
use serde::de::DeserializeOwned;

use crate::fake::{Fake, PATIENCE, Server};

fn parsed<T: DeserializeOwned>(json: &str) -> T {
    serde_json::from_str(json).unwrap()
}

fn client(server: &Server) -> Client {
    Client::connect_within(&server.path, PATIENCE).unwrap()
}

/// Something that listens and answers these bytes to whatever comes, then closes.
fn impostor(answer: Vec<u8>) -> (Result<Client, ClientError>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let answer = answer.clone();
            thread::spawn(move || {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                // The client may have seen enough before the end.
                let _ = stream.write_all(&answer);
            });
        }
    });
    (Client::connect_within(&path, PATIENCE), directory)
}

#[test]
fn every_endpoint_has_a_call() {
    let source = include_str!("../../src/client.rs");
    for route in ROUTES {
        let quoted = format!("\"{}", route.name);
        assert!(source.contains(&quoted), "{}", route.name);
    }
}

#[test]
fn reads_are_answered() {
    let fake = Fake::created();
    let server = Server::of(&fake);
    let mut client = client(&server);
    assert_eq!(client.ping().unwrap().version, "54.0.0");
    assert_eq!(client.info().unwrap().state, wire::VmInfoState::Created);
    assert_eq!(client.counters().unwrap()["_disk0"]["read_ops"], u64::MAX);
    assert_eq!(client.devices().unwrap()[0].id, "d\u{e9}\u{1f426}");
    let metrics = client.metrics().unwrap();
    let counts = [
        "vireo_api_requests_total{endpoint=\"vm.counters\"} 1",
        "vireo_api_requests_total{endpoint=\"vm.devices\"} 1",
        "vireo_api_requests_total{endpoint=\"vm.info\"} 1",
        "vireo_api_requests_total{endpoint=\"vm.metrics\"} 1",
        "vireo_api_requests_total{endpoint=\"vmm.ping\"} 1",
    ];
    let (head, last) = metrics.split_at(metrics.find("vireo_api_requests_total{").unwrap());
    assert!(head.starts_with("vireo_up 1\n# HELP vireo_api_requests_total "));
    assert_eq!(last.lines().collect::<Vec<_>>(), counts);
    assert!(client.openapi().unwrap().contains("\"openapi\""));
    assert_eq!(client.jobs().unwrap(), []);
    assert_eq!(client.consoles().unwrap(), []);
}

#[test]
fn commands_arrive_each_as_itself() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let mut client = client(&server);
    client.create(&parsed(r#"{"payload":{}}"#)).unwrap();
    client.boot().unwrap();
    client.pause().unwrap();
    client.resume().unwrap();
    client.power_button().unwrap();
    client.nmi().unwrap();
    client.reset().unwrap();
    client.reboot().unwrap();
    client.shutdown().unwrap();
    client.delete().unwrap();
    client.resize(&wire::VmResize::default()).unwrap();
    client
        .resize_disk(&parsed(r#"{"id":"d","desired_size":1}"#))
        .unwrap();
    client.update_disk(&parsed(r#"{"id":"d"}"#)).unwrap();
    client.update_net(&parsed(r#"{"id":"n"}"#)).unwrap();
    client
        .update_rng(&parsed(r#"{"id":"r","rate_limiter_config":{}}"#))
        .unwrap();
    client.remove_device("d").unwrap();
    client.remove_port("p").unwrap();
    client
        .change_console(&wire::VmConsole::Add(
            "pty".to_owned(),
            wire::ConsolePort::Serial,
        ))
        .unwrap();
    client
        .size_console(parsed(r#"{"columns":132,"rows":50}"#))
        .unwrap();
    let dump = wire::VmCoredumpData {
        destination_url: "file://c".to_owned(),
    };
    assert_eq!(client.coredump(&dump).unwrap(), None);
    assert_eq!(client.add_disk(&parsed("{}")).unwrap(), None);
    assert_eq!(
        client
            .add_vsock(&parsed(r#"{"cid":3,"socket":"/s"}"#))
            .unwrap(),
        None
    );
    client
        .add_fs(&parsed(r#"{"tag":"t","socket":"/s"}"#))
        .unwrap();
    client.add_virtio(&parsed(r#"{"kind":"rng"}"#)).unwrap();
    client
        .send_key(&parsed(r#"{"keys":["ctrl-c"],"text":"a","id":"k"}"#))
        .unwrap();
    let events = r#"{"events":[{"key":{"key":"a","down":true}},{"button":{"button":"left","down":false}},
        {"place":{"axis":"x","at":7}},{"move":{"axis":"hwheel","by":-1}}]}"#;
    client.input(&parsed(events)).unwrap();
    client.cancel_job("1").unwrap();
    client.quit().unwrap();
    let names: Vec<String> = fake
        .submitted()
        .iter()
        .map(|text| text.split(['(', ' ']).next().unwrap().to_owned())
        .collect();
    let expected = "Create Boot Pause Resume PowerButton Nmi Reset Reboot Shutdown Delete Resize \
                    ResizeDisk UpdateDisk UpdateNet UpdateRng RemoveDevice RemovePort Console ConsoleSize Coredump Disk Vsock Fs Virtio \
                    SendKey Input Quit";
    assert_eq!(names.join(" "), expected);
}

#[test]
fn a_device_that_was_added_has_a_place_and_its_descriptors_arrive() {
    let place = wire::PciDeviceInfo {
        id: "n".to_owned(),
        bdf: "0000:00:05.0".to_owned(),
    };
    let reply = place.clone();
    let fake = Fake::new(move |_| Some(Ok(Reply::Added(reply.clone()))));
    let server = Server::of(&fake);
    let (mut near, far) = UnixStream::pair().unwrap();
    near.write_all(b"tap").unwrap();
    drop(near);
    let net = parsed(r#"{"id":"n"}"#);
    let added = client(&server).add_net(&net, &[far.as_fd()]).unwrap();
    assert_eq!(added, Some(place));
    assert_eq!(fake.submitted(), [r#"Net Some("n") ["tap"]"#]);
    let many = vec![far.as_fd(); 254];
    let error = client(&server).add_net(&net, &many).unwrap_err();
    assert!(error.to_string().contains("253"), "{error}");
}

#[test]
fn a_refusal_has_its_status_and_its_chain() {
    let fake = Fake::new(|command| match command {
        Command::Pause => Some(Err(ControlError::new(ErrorKind::Conflict, "it is paused"))),
        _ => Some(Ok(Reply::Done)),
    });
    let server = Server::of(&fake);
    let mut client = client(&server);
    let error = client.pause().unwrap_err();
    assert_eq!(error.status(), Some(409));
    assert_eq!(error.kind(), Some(ErrorKind::Conflict));
    assert_eq!(
        error.to_string(),
        "The VM could not be paused: it is paused"
    );
    assert_eq!(client.info().unwrap_err().status(), Some(404));
    assert_eq!(client.cancel_job("2").unwrap_err().status(), Some(404));
    // The connection goes on.
    client.resume().unwrap();
}

#[test]
fn a_connection_that_was_closed_is_made_again_and_nothing_is_sent_twice() {
    let fake = Fake::obedient();
    let options = ServerOptions {
        max_connections: 1,
        idle_timeout: Duration::ZERO,
        ..ServerOptions::default()
    };
    let server = Server::start(&fake, options);
    let mut first = client(&server);
    first.boot().unwrap();
    // This one makes the server close the idle one.
    client(&server).pause().unwrap();
    first.resume().unwrap();
    assert_eq!(fake.submitted(), ["Boot", "Pause", "Resume"]);
}

#[test]
fn events_go_on_behind_the_last_one_that_was_seen() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    for kind in [
        EventKind::Created,
        EventKind::Rebooting,
        EventKind::GuestReset,
    ] {
        fake.events.publish(kind);
    }
    let client = client(&server);
    let mut events = client.events(Some(1)).unwrap();
    let first = events.next().unwrap().unwrap();
    assert_eq!((first.id, first.kind.as_str()), (2, "rebooting"));
    assert_eq!(first.event().unwrap().kind, EventKind::Rebooting);
    drop(events);
    let mut events = client.events(Some(first.id)).unwrap();
    assert_eq!(events.next().unwrap().unwrap().kind, "guest_reset");
    assert_eq!(events.next_within(Duration::from_millis(5)).unwrap(), None);
    fake.events.publish(EventKind::State {
        state: VmState::Running,
        pause: None,
    });
    assert_eq!(events.next_within(PATIENCE).unwrap().unwrap().id, 4);
    server.stop();
    assert!(events.next().is_none());
    assert!(events.next().is_none());
}

#[test]
fn a_console_carries_bytes_both_ways_and_loses_none_at_its_start() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let mut stream = client(&server).attach_console(true).unwrap();
    let mut console = fake.consoles.lock().unwrap().pop().unwrap();
    stream.write_all(b"ls\r").unwrap();
    let mut typed = [0; 3];
    console.read_exact(&mut typed).unwrap();
    console.write_all(b"file\n").unwrap();
    drop(console);
    let mut seen = String::new();
    stream.read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "earlier\nfile\n");
}

#[test]
fn nobody_there_is_told_apart_from_a_monitor_that_hangs() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let brief = Duration::from_millis(20);
    assert!(Client::connect(&path).unwrap_err().is_gone());
    let listener = UnixListener::bind(&path).unwrap();
    let mut client = Client::connect_within(&path, brief).unwrap();
    // This process is the one that hangs.
    assert_eq!(client.process(), Some(std::process::id()));
    let error = client.ping().unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
    assert!(!error.is_gone());
    // Until the queue of connections is full too.
    let mut waiting = Vec::new();
    let error = loop {
        match Client::connect_within(&path, brief) {
            Ok(client) => waiting.push(client),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
    drop(listener);
    assert!(Client::connect(&path).unwrap_err().is_gone());
}

#[test]
fn answers_of_no_monitor_are_refused_and_bounded() {
    let long = "x".repeat(1 << 20);
    let deep = "[".repeat(200_000);
    for (answer, part) in [
        (String::new(), "closed the connection"),
        ("SSH-2.0-x\r\n\r\n".to_owned(), "no HTTP"),
        (format!("HTTP/1.1 200 \r\nX: {long}"), "too long"),
        (
            "HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n".to_owned(),
            "too long",
        ),
        (
            "HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n{".to_owned(),
            "closed the connection",
        ),
        (
            format!(
                "HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{deep}",
                deep.len()
            ),
            "vmm.ping cannot be understood",
        ),
        (
            "HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}".to_owned(),
            "vmm.ping cannot be understood",
        ),
        (
            "HTTP/1.1 500 \r\nContent-Length: 2\r\n\r\n{}".to_owned(),
            "status 500",
        ),
    ] {
        let (client, _directory) = impostor(answer.into_bytes());
        let error = client.unwrap().ping().unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn streams_of_no_monitor_are_refused_and_bounded() {
    const START: &str = "HTTP/1.1 200 \r\nContent-Type: text/event-stream\r\n\r\n";
    let long = "x".repeat(2 << 20);
    let lines = format!("data: {}\n", "x".repeat(1000)).repeat(2000);
    for (text, part) in [
        (format!("{START}data: {long}"), "too long"),
        (format!("{START}{lines}"), "too long"),
        (format!("{START}id: x\n\n"), "no number"),
    ] {
        let (client, _directory) = impostor(text.into_bytes());
        let mut events = client.unwrap().events(None).unwrap();
        let error = events.next().unwrap().unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
        assert!(events.next().is_none());
    }
    let future = format!("{START}:\n\nid: 7\nevent: dance\ndata: {{\"kind\":\"dance\"}}\n\n");
    let (client, _directory) = impostor(future.into_bytes());
    let mut events = client.unwrap().events(None).unwrap();
    let told = events.next().unwrap().unwrap();
    assert_eq!((told.id, told.event()), (7, None));
}
