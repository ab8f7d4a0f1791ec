//! Pages that go straight from memory into a socket, and out of it.

use std::os::fd::{AsFd, OwnedFd};

use super::*;
use crate::transport::frame;

/// What writes to it, or reads from it.
pub(super) fn socket(socket: BorrowedFd<'_>) -> UnixStream {
    socket.try_clone_to_owned().unwrap().into()
}

pub(super) fn copy(of: &UnixStream) -> OwnedFd {
    of.as_fd().try_clone_to_owned().unwrap()
}

#[test]
fn pages_that_go_straight_arrive_as_those_that_do_not() {
    for streams in [1, 4] {
        let bytes = [true, false].map(|taken| {
            let (sent, received) = moves_by(streams, (Codec::Raw, 0), (true, taken));
            assert_eq!(sent.pages, received.pages);
            assert_eq!(sent.bytes, received.bytes);
            received.bytes
        });
        assert_eq!(bytes[0], bytes[1], "{streams}");
    }
}

/// A connection that brings three pages behind a frame.
fn three() -> Vec<u8> {
    let mut bytes = Vec::new();
    preamble(0, 1).write(&mut bytes).unwrap();
    let runs = [(0, 2), (1 << 32, 1)].map(|(address, pages)| Run { address, pages });
    frame::write(&mut bytes, Kind::Bare, &[&encode_runs(&runs)]).unwrap();
    bytes.extend_from_slice(&[9; 3 * PAGE]);
    bytes
}

#[test]
fn pages_behind_a_frame_that_end_early_are_told_of_wherever_they_end() {
    let whole = three();
    let first = whole.len() - 3 * PAGE;
    for straight in [true, false] {
        for len in (first..whole.len()).step_by(509) {
            let (mut out, into) = UnixStream::pair().unwrap();
            out.write_all(&whole[..len]).unwrap();
            drop(out);
            let from = straight.then(|| copy(&into));
            let (_, mut receiver) = StreamReceiver::open(into).unwrap();
            receiver.set_ranges(&RANGES);
            from.into_iter().for_each(|from| receiver.direct(from));
            let error = receiver.next(&Memory::new(), &Progress::default());
            let error = error.unwrap_err().to_string();
            let wanted = "the connection ends within the pages behind a frame, ";
            assert!(error.starts_with(wanted), "{straight} {len}: {error}");
        }
    }
}

#[test]
fn more_pages_behind_a_frame_than_there_may_be_are_refused() {
    let mut bytes = Vec::new();
    preamble(0, 1).write(&mut bytes).unwrap();
    let run = Run {
        address: 0,
        pages: 513,
    };
    frame::write(&mut bytes, Kind::Bare, &[&encode_runs(&[run])]).unwrap();
    let (_, mut receiver) = StreamReceiver::open(&*bytes).unwrap();
    receiver.set_ranges(&RANGES);
    let error = receiver.next(&Memory::new(), &Progress::default());
    assert_eq!(
        error.unwrap_err().to_string(),
        "the peer breaks the format: 513 pages behind a frame, which has at most 512 of them"
    );
}

#[test]
fn pages_that_a_guest_waits_for_do_not_go_straight() {
    let here = Memory::new();
    here.put(0, &vec![1; 64 * PAGE]);
    let ground = Ground::new(None);
    let (out, into) = UnixStream::pair().unwrap();
    let mut bytes = Vec::new();
    let mut sender = StreamSender::open(&mut bytes, &preamble(0, 1), Codec::Raw, 0).unwrap();
    sender.direct(out.into());
    let wanted = [Run {
        address: 0,
        pages: 64,
    }];
    sender.serve(&here, &wanted, ground.sending()).unwrap();
    drop(sender);
    assert!(bytes.len() > 64 * PAGE);
    let mut rest = Vec::new();
    (&into).read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}
