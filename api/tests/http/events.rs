//! Streams of events.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use api::http::ServerOptions;
use api::{EventKind, EventLog};

use crate::fake::{Client, Fake, Server, get, refused};

const HEAD: &str = "HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: close\r\n\
                    Content-Type: text/event-stream\r\nCache-Control: no-store\r\n\r\n";

fn resized(count: u32) -> EventKind {
    EventKind::CpusResized { count }
}

/// The number of the next event.
fn next(client: &mut Client) -> u64 {
    let event = client.read_to("\n\n");
    let event = event.trim_start_matches(":\n\n");
    let id = event
        .strip_prefix("id: ")
        .unwrap_or_else(|| panic!("{event:?}"));
    id.split_once('\n').unwrap().0.parse().unwrap()
}

fn follow(server: &Server, request: &str) -> Client {
    let mut client = server.connect();
    client.send(request);
    assert_eq!(client.read_to("\r\n\r\n"), HEAD);
    client
}

fn since(event: u64) -> String {
    get(&format!("vm.events?since={event}"))
}

fn behind(event: u64) -> String {
    format!("GET /api/v1/vm.events?since=0 HTTP/1.1\r\nLast-Event-ID: {event}\r\n\r\n")
}

#[test]
fn events_are_told_from_now_on_to_all_who_listen() {
    let fake = Fake::obedient();
    fake.events.publish(EventKind::GuestReset);
    let server = Server::of(&fake);
    let mut clients: Vec<Client> = (0..50)
        .map(|_| follow(&server, &get("vm.events")))
        .collect();
    fake.events.publish(resized(3));
    fake.events.publish(EventKind::GuestPanic);
    for client in &mut clients {
        let event = client.read_to("\n\n");
        let (name, data) = event.split_once("data: ").unwrap();
        assert_eq!(name, "id: 2\nevent: cpus_resized\n");
        let data: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!((&data["seq"], &data["count"]), (&2.into(), &3.into()));
        assert_eq!(next(client), 3);
    }
}

#[test]
fn a_client_that_comes_back_gets_what_it_has_missed() {
    let fake = Fake::obedient();
    for count in 0..10 {
        fake.events.publish(resized(count));
    }
    let server = Server::of(&fake);
    assert_eq!(next(&mut follow(&server, &since(0))), 1);
    assert_eq!(next(&mut follow(&server, &since(7))), 8);
    assert_eq!(next(&mut follow(&server, &behind(9))), 10);
    // A number that this monitor has never given is another monitor's.
    assert_eq!(next(&mut follow(&server, &behind(99))), 1);
    let mut client = follow(&server, &since(10));
    fake.events.publish(resized(10));
    assert_eq!(next(&mut client), 11);
}

#[test]
fn a_client_of_an_earlier_monitor_gets_all_of_this_one_from_its_first_event_on() {
    let mut fake = Fake::obedient();
    let earlier = EventLog::of_now();
    earlier.publish(EventKind::GuestReset);
    let events = EventLog::of_now();
    let first = events.last() + 1;
    std::sync::Arc::get_mut(&mut fake).unwrap().events = events;
    let server = Server::of(&fake);
    // Nothing has happened yet, and they stay to hear of it.
    let mut clients = [0, earlier.last().min(first - 1)].map(|seen| follow(&server, &behind(seen)));
    fake.events.publish(EventKind::GuestPanic);
    fake.events.publish(EventKind::GuestReset);
    for client in &mut clients {
        assert_eq!(next(client), first);
        assert_eq!(next(client), first + 1);
    }
    assert_eq!(next(&mut follow(&server, &behind(7))), first);
}

#[test]
fn parameters_that_make_no_sense_are_refused() {
    let server = Server::of(&Fake::obedient());
    for (query, reason) in [
        ("since=x", "`since` is not a number"),
        ("since=-1", "`since` is not a number"),
        ("until=5", "unknown parameter `until`"),
    ] {
        let answer = server.exchange(get(&format!("vm.events?{query}")));
        assert_eq!(answer, refused(400, &["Bad Request", reason]));
    }
}

#[test]
fn a_silent_stream_says_that_it_lives() {
    let options = ServerOptions {
        heartbeat: Duration::from_millis(10),
        ..ServerOptions::default()
    };
    let server = Server::start(&Fake::obedient(), options);
    let mut client = follow(&server, &get("vm.events"));
    for _ in 0..3 {
        assert_eq!(client.read_to("\n\n"), ":\n\n");
    }
}

#[test]
fn no_event_is_lost_between_a_busy_monitor_and_a_client_that_reads() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let mut client = follow(&server, &since(0));
    // Fewer than are kept, so that nothing may be missing.
    for count in 0..4000 {
        fake.events.publish(resized(count));
    }
    for id in 1..=4000 {
        assert_eq!(next(&mut client), id);
    }
}

#[test]
fn a_client_that_never_reads_is_let_go_when_the_log_has_gone_past_it_and_can_come_back() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let mut idle = follow(&server, &since(0));
    let mut reads = 0;
    // More than socket, buffer and log can hold.
    for count in 0..50_000 {
        fake.events.publish(resized(count));
        if count % 1000 == 0 {
            // Others are served all the while.
            assert!(server.exchange(get("vmm.ping")).contains("54.0.0"));
            reads += 1;
        }
    }
    assert_eq!(reads, 50);
    let got = idle.rest();
    let last = got.rsplit("id: ").next().unwrap();
    let last: u64 = last.split_once('\n').unwrap().0.parse().unwrap();
    assert!(last < 50_000, "{last}");
    assert!(
        got.ends_with("\n\n"),
        "cut in the middle: {:?}",
        &got[got.len() - 99..]
    );
    let resumed = next(&mut follow(&server, &behind(last)));
    assert!(resumed > last + 1, "{resumed} after {last}");
}

#[test]
fn a_stream_ends_with_the_server_and_has_what_happened_before() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let mut client = follow(&server, &since(0));
    for count in 0..100 {
        fake.events.publish(resized(count));
    }
    server.stop();
    for id in 1..=100 {
        assert_eq!(next(&mut client), id);
    }
    assert_eq!(client.rest(), "");
}

#[test]
fn a_stream_whose_reader_is_gone_makes_room() {
    let fake = Fake::obedient();
    let options = ServerOptions {
        max_connections: 1,
        ..ServerOptions::default()
    };
    let server = Server::start(&fake, options);
    for _ in 0..20 {
        let client = loop {
            let stream: UnixStream = server.connect().stream;
            drop(stream);
            let mut client = server.connect();
            client.send(get("vm.events"));
            if client.read_to("\r\n\r\n") == HEAD {
                break client;
            }
        };
        drop(client);
    }
}
