//! Clients that mean no good.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use api::http::{Clients, ServerOptions};
use api::{Command, EventKind, Reply};
use proptest::prelude::*;

use crate::fake::{Client, Fake, NOTHING, Server, get, put, refused, request};

const BRIEFLY: Duration = Duration::from_millis(50);
const NEVER: Duration = Duration::from_secs(3600);

fn lives(server: &Server) {
    assert!(server.exchange(get("vmm.ping")).contains("54.0.0"));
}

#[test]
fn half_a_request_is_given_up_after_its_time() {
    let options = ServerOptions {
        request_timeout: BRIEFLY,
        ..ServerOptions::default()
    };
    let server = Server::start(&Fake::obedient(), options);
    for part in [
        "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: loc",
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 10\r\n\r\n{",
        "PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
    ] {
        let mut client = server.connect();
        client.send(part);
        let answer = client.rest();
        assert!(
            answer.starts_with("HTTP/1.1 408 \r\n"),
            "{part:?}: {answer}"
        );
        assert!(answer.contains("not all there after 0.05 s"), "{answer}");
    }
    // One that has said nothing is in nobody's way.
    let mut idle = server.connect();
    let mut half = server.connect();
    half.send("G");
    assert!(half.rest().starts_with("HTTP/1.1 408 \r\n"));
    assert!(idle.exchange(get("vmm.ping")).contains("54.0.0"));
}

#[test]
fn a_client_that_goes_away_in_the_middle_leaves_nothing_behind() {
    let options = ServerOptions {
        max_connections: 4,
        idle_timeout: NEVER,
        ..ServerOptions::default()
    };
    let server = Server::start(&Fake::obedient(), options);
    for part in [
        "",
        "G",
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
    ] {
        for _ in 0..20 {
            let mut client = UnixStream::connect(&server.path).unwrap();
            let _ = client.write_all(part.as_bytes());
        }
    }
    while !server
        .connect()
        .try_exchange(get("vmm.ping"))
        .contains("54.0.0")
    {}
}

#[test]
fn a_body_of_four_mib_is_read_and_one_byte_more_is_refused_readably() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let body = |length: usize| {
        let frame = r#"{"payload":{"cmdline":""}}"#;
        let filling = "x".repeat(length - frame.len());
        format!(r#"{{"payload":{{"cmdline":"{filling}"}}}}"#)
    };
    assert_eq!(server.exchange(put("vm.create", &body(4 << 20))), NOTHING);
    let mut client = server.connect();
    // All of it is sent before anything is read.
    client.send(put("vm.create", &body((4 << 20) + 1)));
    let answer = client.answer();
    assert!(answer.starts_with("HTTP/1.1 400 \r\n"), "{answer}");
    assert!(answer.contains("more than 4194304 bytes"), "{answer}");
    client.finish();
    assert_eq!(client.rest(), "");
    assert_eq!(fake.submitted().len(), 1);
}

#[test]
fn all_requests_together_have_a_bounded_size() {
    let options = ServerOptions {
        total_limit: 100_000,
        request_timeout: NEVER,
        ..ServerOptions::default()
    };
    let server = Server::start(&Fake::obedient(), options);
    let mut first = server.connect();
    let half = "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 90000\r\n\r\n";
    first.send(format!("{half}{}", "x".repeat(80_000)));
    // In the time of a ping the server receives from everyone who has sent something.
    (0..30).for_each(|_| lives(&server));
    let mut second = server.connect();
    second.send(format!("{half}{}", "x".repeat(80_000)));
    let answer = second.rest_after_finish();
    assert!(answer.starts_with("HTTP/1.1 429 \r\n"), "{answer}");
    lives(&server);
    first.send("x".repeat(10_000));
    let answer = first.answer();
    assert!(answer.contains("Failed to deserialize JSON"), "{answer}");
    // What the first one held is free again.
    let mut third = server.connect();
    third.send(format!("{half}{}", "x".repeat(90_000)));
    assert!(third.answer().contains("Failed to deserialize JSON"));
}

#[test]
fn ten_thousand_connections_leave_room_for_one_when_they_are_gone() {
    let options = ServerOptions {
        idle_timeout: NEVER,
        ..ServerOptions::default()
    };
    let server = Server::start(&Fake::obedient(), options);
    let mut first = server.connect();
    assert!(first.exchange(get("vmm.ping")).contains("54.0.0"));
    // A test may not have 10,000 descriptors: the older ones are closed.
    let mut held: VecDeque<Client> = VecDeque::new();
    for _ in 0..10_000 {
        held.push_back(server.connect());
        if held.len() > 300 {
            held.pop_front();
        }
    }
    let full = held.back_mut().unwrap().rest();
    let reason = "128 connections are open already: try again in a second";
    let expected = refused(503, &["Service Unavailable", reason]).replace("keep-alive", "close");
    assert_eq!(full, expected);
    assert!(first.exchange(get("vmm.ping")).contains("54.0.0"));
    drop(held);
    while !server
        .connect()
        .try_exchange(get("vmm.ping"))
        .contains("54.0.0")
    {}
}

#[test]
fn a_request_that_panics_costs_its_own_connection_and_no_other() {
    let fake = Fake::new(|command| match command {
        Command::Reset => panic!("as told"),
        _ => Some(Ok(Reply::Done)),
    });
    let server = Server::of(&fake);
    let mut other = server.connect();
    // More often than there may be commands or connections at once.
    for _ in 0..150 {
        assert_eq!(server.connect().try_exchange(put("vm.reset", "")), "");
    }
    assert!(other.exchange(put("vm.resume", "")).contains(" 204 "));
    lives(&server);
}

#[test]
fn a_user_who_is_not_served_reads_why_and_has_nothing_done() {
    let own = std::fs::metadata("/proc/self").unwrap().uid();
    let serving = |user: u32| ServerOptions {
        clients: Clients::Users(vec![user]),
        ..ServerOptions::default()
    };
    let fake = Fake::obedient();
    let server = Server::start(&fake, serving(own + 1));
    let answer = server.connect().rest();
    let reason = format!("user {own} may not control this monitor: ask as its own user or root");
    let expected = refused(403, &["Forbidden", &reason]).replace("keep-alive", "close");
    assert_eq!(answer, expected);
    // Whether it is refused before, while or after it asks.
    for _ in 0..200 {
        let error = api::client::Client::connect(&server.path)
            .and_then(|mut client| client.boot())
            .unwrap_err();
        assert!(error.to_string().contains("may not control"), "{error}");
    }
    assert!(fake.submitted().is_empty());
    lives(&Server::start(&fake, serving(own)));
}

#[test]
fn an_idle_connection_makes_room_and_a_busy_one_does_not() {
    let fake = Fake::new(|_| None);
    let options = ServerOptions {
        max_connections: 2,
        idle_timeout: Duration::ZERO,
        ..ServerOptions::default()
    };
    let server = Server::start(&fake, options);
    let mut busy = server.connect();
    busy.send(put("vm.boot", ""));
    while fake.submitted().is_empty() {
        std::thread::yield_now();
    }
    let mut idle = server.connect();
    for _ in 0..100 {
        let mut next = server.connect();
        assert!(next.exchange(get("vmm.ping")).contains("54.0.0"));
        assert_eq!(idle.rest(), "");
        idle = next;
    }
    fake.release(&Ok(Reply::Done));
    assert_eq!(busy.answer(), NOTHING);
}

#[test]
fn a_client_that_never_reads_is_given_up_and_holds_nobody_up() {
    let options = ServerOptions {
        write_timeout: BRIEFLY,
        ..ServerOptions::default()
    };
    let server = Server::start(&Fake::obedient(), options);
    let mut client = UnixStream::connect(&server.path).unwrap();
    client
        .set_write_timeout(Some(crate::fake::PATIENCE))
        .unwrap();
    // The server stops reading when what it has to send is not read.
    let requests = get("vmm.openapi").repeat(100);
    let error = loop {
        lives(&server);
        if let Err(error) = client.write_all(requests.as_bytes()) {
            break error;
        }
    };
    // Which of the two depends on whether the server had all of it.
    let kinds = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
    assert!(kinds.contains(&error.kind()), "{error}");
    lives(&server);
}

#[test]
fn a_reader_that_is_slow_gets_everything() {
    let server = Server::of(&Fake::obedient());
    let mut client = server.connect();
    let count = 200;
    let mut writer = client.stream.try_clone().unwrap();
    let sent = std::thread::spawn(move || {
        writer
            .write_all(get("vmm.openapi").repeat(count).as_bytes())
            .unwrap();
    });
    let first = client.answer();
    for _ in 1..count {
        assert_eq!(client.answer(), first);
    }
    sent.join().unwrap();
}

#[test]
fn json_that_is_none_or_too_much_is_refused_and_the_connection_kept() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let mut client = server.connect();
    let deep = format!(r#"{{"x":{}1{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
    let objects = format!(r#"{{"disks":[{}{{}}]}}"#, "{},".repeat(1_000_000));
    let values = format!(r#"{{"x":[{}1]}}"#, "1,".repeat(1_000_000));
    let long = format!(r#"{{"serial":{{"mode":"{}"}}}}"#, "x".repeat(100_000));
    for (body, reason) in [
        ("{", "EOF while parsing"),
        ("{}}", "trailing characters"),
        ("[]", "an array"),
        ("null", "invalid type: null"),
        ("\u{feff}{}", "expected value"),
        (&deep, "more than 64 deep"),
        (&objects, "4096 objects"),
        (&values, "262144 values"),
        (&long, "unknown variant"),
        (r#"{"memory":{"size":"1"}}"#, "invalid type: string"),
        (r#"{"memory":{"size":-1}}"#, "invalid value: integer `-1`"),
        (r#"{"memory":{"size":1.5}}"#, "invalid type: floating point"),
        (
            r#"{"memory":{"size":18446744073709551616}}"#,
            "invalid type: floating point",
        ),
        (r#"{"memory":{"size":1e999}}"#, "number out of range"),
        (
            r#"{"cpus":{"boot_vcpus":4294967296,"max_vcpus":1}}"#,
            "invalid value",
        ),
        (r#"{"disks":{}}"#, "invalid type: map"),
        (r#"{"payload":{"kernel":"\ud800"}}"#, "hex escape"),
    ] {
        let answer = client.exchange(put("vm.create", body));
        let shown = &body[..body.len().min(60)];
        assert!(answer.starts_with("HTTP/1.1 400 \r\n"), "{shown}: {answer}");
        assert!(answer.len() < 2000, "{shown}: {} bytes", answer.len());
        let chain: Vec<String> =
            serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!(chain[0], "Failed to deserialize JSON");
        assert!(chain[1].contains(reason), "{shown}: {answer}");
    }
    let head = "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 9\r\n\r\n";
    client.send([head.as_bytes(), b"{\"a\":\"\xff\"}"].concat());
    let not_utf8 = [
        "Failed to deserialize JSON",
        "the body is not UTF-8 from byte 6",
    ];
    assert_eq!(client.answer(), refused(400, &not_utf8));
    assert!(fake.submitted().is_empty());
}

#[test]
fn an_unknown_field_is_told_once_where_v1_accepts_it() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let body = r#"{"x":1,"memory":{"size":1,"y":2},"disks":[{"z":3}]}"#;
    for _ in 0..3 {
        assert_eq!(server.exchange(put("vm.create", body)), NOTHING);
    }
    let events = fake.events.after(0, 9);
    assert_eq!(events.len(), 1);
    let EventKind::UnknownFields { endpoint, fields } = &events[0].kind else {
        panic!("{events:?}");
    };
    assert_eq!(endpoint, "vm.create");
    assert_eq!(*fields, ["x", "memory.y", "disks.0.z"]);
}

#[test]
fn segments_that_a_client_always_asks_for_are_taken_told_once_and_refused_by_a_strict_server() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let body = |segments: u16| {
        let text = format!(r#"{{"platform":{{"num_pci_segments":{segments}}}}}"#);
        put("vm.create", &text)
    };
    for segments in [1, 2, 16, 17] {
        assert_eq!(server.exchange(body(segments)), NOTHING);
    }
    let events = fake.events.after(0, 9);
    assert_eq!(events.len(), 1);
    let EventKind::UnknownFields { endpoint, fields } = &events[0].kind else {
        panic!("{events:?}");
    };
    assert_eq!(endpoint, "vm.create");
    assert_eq!(*fields, ["platform.num_pci_segments"]);
    let strict = ServerOptions {
        strict: true,
        ..ServerOptions::default()
    };
    let server = Server::start(&fake, strict);
    let answer = server.exchange(body(2));
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(answer.contains("platform.num_pci_segments"), "{answer}");
    assert_eq!(server.exchange(body(1)), NOTHING);
}

#[test]
fn unknown_fields_cannot_fill_the_memory_of_the_monitor() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let long = "k".repeat(10_000);
    for round in 0..100 {
        let fields: Vec<String> = (0..100)
            .map(|n| format!("\"{round}-{n}-{long}\":1"))
            .collect();
        let body = format!("{{{}}}", fields.join(","));
        assert_eq!(server.exchange(put("vm.create", &body)), NOTHING);
    }
    let fields: Vec<usize> = fake
        .events
        .after(0, 1000)
        .iter()
        .map(|event| match &event.kind {
            EventKind::UnknownFields { fields, .. } => {
                assert!(fields.iter().all(|field| field.len() <= 128));
                fields.len()
            }
            kind => panic!("{kind:?}"),
        })
        .collect();
    assert_eq!(fields.iter().sum::<usize>(), 256);
}

#[test]
fn an_unknown_field_is_refused_by_name_in_what_is_added_and_by_a_strict_server() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let limit = r#"{"id":"d","rate_limiter_config":{"ops":{"size":1,"refill_time":1,"x":1}}}"#;
    for (endpoint, body, field) in [
        (
            "vm.job-cancel",
            r#"{"id":"1","force":true}"#,
            "unknown field `force`",
        ),
        (
            "vm.update-disk",
            limit,
            "unknown field `rate_limiter_config.ops.x`",
        ),
    ] {
        let answer = server.exchange(put(endpoint, body));
        assert!(answer.starts_with("HTTP/1.1 400 \r\n"), "{answer}");
        assert!(answer.contains(field), "{answer}");
    }
    let answer = server.exchange(get("vm.devices?x=1"));
    assert_eq!(
        answer,
        refused(400, &["Bad Request", "unknown parameter `x`"])
    );
    let options = ServerOptions {
        strict: true,
        ..ServerOptions::default()
    };
    let strict = Server::start(&fake, options);
    let answer = strict.exchange(put("vm.create", r#"{"memory":{"size":1,"y":2}}"#));
    let chain = ["Failed to deserialize JSON", "unknown field `memory.y`"];
    assert_eq!(answer, refused(400, &chain));
    assert!(fake.submitted().is_empty());
    assert!(fake.events.after(0, 9).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_answered_or_waited_for_and_the_server_lives(
        bytes in prop::collection::vec(
            prop_oneof![any::<u8>(), prop::sample::select(&b"\r\n:{}[]\",GETPUT /api1vm.0"[..])],
            0..600,
        ),
        start in prop::sample::select(vec![
            "", "GET ", "PUT /api/v1/vm.create HTTP/1.1\r\n",
            "PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 100\r\n\r\n",
            "GET /api/v1/vm.console-attach HTTP/1.1\r\nUpgrade: vireo-console\r\n\r\n",
            "GET /api/v1/vm.events?since=0 HTTP/1.1\r\n",
        ]),
    ) {
        let server = shared();
        let mut client = server.connect();
        let _ = client.stream.write_all(start.as_bytes());
        let _ = client.stream.write_all(&bytes);
        drop(client);
        lives(server);
    }

    #[test]
    fn any_json_is_answered_with_an_array_of_strings_or_done(
        body in prop_oneof![
            "\\PC{1,200}",
            r#"\{"(cpus|memory|disks|net|payload|x)":(\{\}|\[\]|\[\{\}\]|1|-1|null|"a"|true|1e400)\}"#,
        ],
        endpoint in prop::sample::select(vec![
            "vm.create", "vm.resize", "vm.add-disk", "vm.add-net", "vm.add-virtio", "vm.console",
        ]),
    ) {
        let answer = shared().exchange(request("PUT", endpoint, &body));
        if answer != NOTHING {
            prop_assert!(answer.starts_with("HTTP/1.1 400 \r\n"), "{}", answer);
            let chain = answer.split_once("\r\n\r\n").unwrap().1;
            let chain: Vec<String> = serde_json::from_str(chain).unwrap();
            prop_assert_eq!(chain.len(), 2);
        }
    }
}

/// One server for all cases, so that one case's leftovers would meet the next.
fn shared() -> &'static Server {
    static SERVER: std::sync::OnceLock<Server> = std::sync::OnceLock::new();
    SERVER.get_or_init(|| {
        let options = ServerOptions {
            idle_timeout: Duration::ZERO,
            ..ServerOptions::default()
        };
        Server::start(&Fake::obedient(), options)
    })
}
