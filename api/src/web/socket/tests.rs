use std::os::unix::net::UnixStream;

use super::*;
use crate::web::frame::{FrameError, MAX_FRAME};

/// A server's end, and the client's.
fn pair() -> (WebSocket, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let socket = WebSocket::new(Stream::Unix(ours), Vec::new(), Vec::new());
    (socket, theirs)
}

/// A frame of a client, whose mask is 0.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap();
    [&[first, 0x80 | length, 0, 0, 0, 0], payload].concat()
}

fn would_block(result: io::Result<usize>) -> bool {
    result.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

fn heard(client: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    client.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn what_came_behind_the_handshake_is_read_first() {
    let (ours, mut client) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let early = frame(0x82, b"early");
    let mut socket = WebSocket::new(Stream::Unix(ours), early, b"101".to_vec());
    assert!(socket.is_ahead());
    client.write_all(&frame(0x82, b"late")).unwrap();
    let mut bytes = [0; 3];
    let mut all = Vec::<u8>::new();
    while all.len() < 9 {
        let count = socket.read(&mut bytes).unwrap();
        all.extend(&bytes[..count]);
    }
    assert_eq!(all, b"earlylate");
    assert!(would_block(socket.read(&mut bytes)));
    socket.write_all(b"hi").unwrap();
    assert_eq!(heard(&mut client, 7), b"101\x82\x02hi");
}

#[test]
fn pings_are_answered_and_the_end_too() {
    let (mut socket, mut client) = pair();
    client.write_all(&frame(0x89, b"one")).unwrap();
    client.write_all(&frame(0x88, &[3, 232])).unwrap();
    assert_eq!(socket.read(&mut [0; 9]).unwrap(), 0);
    assert_eq!(heard(&mut client, 9), b"\x8a\x03one\x88\x02\x03\xe8");
    assert!(socket.write(b"more").is_err());
}

#[test]
fn who_breaks_the_rules_is_told_so_and_sent_away() {
    let (mut socket, mut client) = pair();
    client.write_all(&[0x82, 5]).unwrap();
    let error = socket.read(&mut [0; 9]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert_eq!(heard(&mut client, 4), b"\x88\x02\x03\xea");
    let (mut socket, mut client) = pair();
    let length = (MAX_FRAME + 1).to_be_bytes();
    client
        .write_all(&[[0x82, 0xff].as_slice(), &length, &[0; 4]].concat())
        .unwrap();
    let error = socket.read(&mut [0; 9]).unwrap_err();
    let inner = error.get_ref().unwrap().downcast_ref();
    assert_eq!(inner, Some(&FrameError::Long(MAX_FRAME + 1)));
    assert_eq!(heard(&mut client, 4), b"\x88\x02\x03\xf1");
}

#[test]
fn a_client_that_does_not_read_is_kept_little_for() {
    let (mut socket, mut client) = pair();
    let mut sent = 0;
    loop {
        match socket.write(&[7; 1 << 20]) {
            Ok(count) => sent += count,
            Err(error) => break assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        // It asks whether somebody is there, and does not listen to the answer.
        client.write_all(&frame(0x89, &[1; 100])).unwrap();
        assert!(would_block(socket.read(&mut [0; 9])));
    }
    assert!(socket.holds_back() && socket.out.len() <= MOST + 200);
    // All of it comes, and one answer at least.
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        all
    });
    while socket.flush().is_err() {
        std::thread::yield_now();
    }
    drop(socket);
    let all = reader.join().unwrap();
    let sevens = all.iter().filter(|byte| **byte == 7).count();
    assert!(sevens >= sent && all.ends_with(b"\x88\x02\x03\xe9"));
}

#[test]
fn an_end_without_farewell_is_an_end() {
    let (mut socket, client) = pair();
    drop(client);
    assert_eq!(socket.read(&mut [0; 9]).unwrap(), 0);
    assert_eq!(socket.read(&mut [0; 9]).unwrap(), 0);
}

#[test]
fn frames_without_data_do_not_keep_the_reader() {
    let (mut socket, mut client) = pair();
    let empty = frame(0x82, b"");
    // As much as three receptions bring.
    let many = empty.repeat(3 * RECEIVED / empty.len());
    client.write_all(&many).unwrap();
    client.write_all(&frame(0x82, b"at last")).unwrap();
    let mut turns = 0;
    let mut bytes = [0; 9];
    let count = loop {
        match socket.read(&mut bytes) {
            Ok(count) => break count,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        turns += 1;
    };
    assert_eq!((&bytes[..count], turns), (&b"at last"[..], 3));
}
