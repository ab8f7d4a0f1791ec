//! Descriptors that come along with requests.

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::fake::{Client, Fake, NOTHING, Server, get, put};

/// A stream from which its receiver can read `text`, and nothing more.
fn holding(text: &str) -> OwnedFd {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(text.as_bytes()).unwrap();
    ours.into()
}

fn send_with(client: &Client, bytes: &str, descriptors: &[OwnedFd]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    let vectors = [IoSlice::new(bytes.as_bytes())];
    let sent = sendmsg(&client.stream, &vectors, &mut control, SendFlags::empty()).unwrap();
    assert_eq!(sent, bytes.len());
}

/// Whether all of the other ends are closed.
fn are_closed(mut ends: Vec<UnixStream>) -> bool {
    ends.iter_mut().all(|end| {
        end.set_read_timeout(Some(crate::fake::PATIENCE)).unwrap();
        std::io::Read::read(end, &mut [0]).unwrap() == 0
    })
}

#[test]
fn descriptors_reach_the_device_that_they_are_for_in_order() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let client = server.connect();
    // As v1's client does: the first line with the descriptors, the rest behind it.
    let request = put("vm.add-net", r#"{"id":"n0","num_queues":4}"#);
    let (line, rest) = request.split_at(30);
    send_with(&client, line, &[holding("a"), holding("b")]);
    let mut client = client;
    assert_eq!(client.exchange(rest), NOTHING);
    assert_eq!(fake.submitted(), [r#"Net Some("n0") ["a", "b"]"#]);
}

#[test]
fn descriptors_may_come_with_any_part_of_the_request() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let request = put("vm.add-net", r#"{"id":"n0"}"#);
    for cut in 1..request.len() {
        let mut client = server.connect();
        client.send(&request[..cut]);
        send_with(&client, &request[cut..], &[holding("a")]);
        assert_eq!(client.answer(), NOTHING);
    }
    let submitted = fake.submitted();
    assert_eq!(submitted.len(), request.len() - 1);
    assert!(
        submitted
            .iter()
            .all(|text| text == r#"Net Some("n0") ["a"]"#)
    );
}

#[test]
fn descriptors_go_to_the_request_that_they_came_with_and_not_to_its_neighbours() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let mut client = server.connect();
    let add = |id: &str| put("vm.add-net", &format!(r#"{{"id":"{id}"}}"#));
    for _ in 0..50 {
        client.send(add("before"));
        send_with(&client, &add("it"), &[holding("a")]);
        client.send(add("after"));
        for _ in 0..3 {
            assert_eq!(client.answer(), NOTHING);
        }
    }
    for three in fake.submitted().chunks(3) {
        assert_eq!(
            three,
            [
                r#"Net Some("before") []"#,
                r#"Net Some("it") ["a"]"#,
                r#"Net Some("after") []"#
            ]
        );
    }
}

#[test]
fn descriptors_that_nobody_wants_are_closed() {
    let server = Server::of(&Fake::obedient());
    let mut client = server.connect();
    let mut ends = Vec::new();
    for request in [
        get("vmm.ping"),
        put("vm.boot", ""),
        put("vm.create", "{}"),
        get("nothing"),
    ] {
        let (end, given) = UnixStream::pair().unwrap();
        ends.push(end);
        send_with(&client, &request, &[given.into()]);
        client.answer();
    }
    // Those of a request that never comes, too.
    let (end, given) = UnixStream::pair().unwrap();
    ends.push(end);
    send_with(&client, "PUT /api/v1/vm.add-net HT", &[given.into()]);
    drop(client);
    assert!(are_closed(ends));
}

#[test]
fn too_many_descriptors_are_refused_and_closed() {
    let fake = Fake::obedient();
    let server = Server::of(&fake);
    let mut client = server.connect();
    let (ends, given): (Vec<_>, Vec<_>) = (0..254).map(|_| UnixStream::pair().unwrap()).unzip();
    let given: Vec<OwnedFd> = given.into_iter().map(Into::into).collect();
    let request = put("vm.add-net", "{}");
    let (line, rest) = request.split_at(20);
    send_with(&client, line, &given[..200]);
    send_with(&client, rest, &given[200..]);
    drop(given);
    let answer = client.rest_after_finish();
    assert!(answer.starts_with("HTTP/1.1 400 \r\n"), "{answer}");
    assert!(answer.contains("too many descriptors"), "{answer}");
    assert!(are_closed(ends));
    assert!(fake.submitted().is_empty());
    let mut client = server.connect();
    assert!(client.exchange(get("vmm.ping")).contains("54.0.0"));
}
