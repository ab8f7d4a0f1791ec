//! Pages that go straight from memory into a socket, and out of it.

use std::os::fd::{AsFd, OwnedFd};

use super::*;
use crate::transport::frame;

/// What writes to it, or reads from it.
pub(super) fn socket(socket: BorrowedFd<'_>) -> UnixStream {
    socket.try_clone_to_owned().unwrap().into()
}

fn copy(of: &UnixStream) -> OwnedFd {
    of.as_fd().try_clone_to_owned().unwrap()
}

/// Six rounds over so many streams, taken straight out of the sockets or not: how many bytes they were.
fn moves(streams: u16, straight: bool) -> u64 {
    let (here, there) = (Memory::new(), Memory::new());
    there.put(0, &vec![0xee; LEN]);
    let mut noise = Noise(streams.into());
    noise.scribble(&here, 300);
    here.put(3 << 20, &vec![5; 2 << 20]);
    let (ground, received) = (Ground::new(None), Progress::default());
    let barrier = Barrier::new(streams);
    std::thread::scope(|scope| {
        let mut senders = Vec::new();
        for stream in 0..streams {
            let (out, into) = UnixStream::pair().unwrap();
            let (there, barrier, received) = (&there, &barrier, &received);
            let from = straight.then(|| copy(&into));
            scope.spawn(move || take_from(into, from, there, barrier, received));
            let to = copy(&out);
            let mut sender = StreamSender::open(out, &preamble(stream, streams), Codec::Raw, 0);
            sender.as_mut().unwrap().direct(to);
            senders.push(sender.unwrap());
        }
        let mut set = PageSet::all(&RANGES);
        for round in 1..=6 {
            let sent = send_round(&mut senders, &here, &set, round, ground.sending(), &scoped);
            assert_eq!(sent.unwrap().counts.pages, set.count());
            barrier.wait(round, Duration::MAX).unwrap();
            assert!(
                *here.bytes.read().unwrap() == *there.bytes.read().unwrap(),
                "{round}"
            );
            set = noise.scribble(&here, 40);
        }
    });
    assert_eq!(ground.progress.figures().pages, received.figures().pages);
    assert_eq!(ground.progress.figures().bytes, received.figures().bytes);
    received.figures().bytes
}

#[test]
fn pages_that_go_straight_arrive_as_those_that_do_not() {
    for streams in [1, 4] {
        assert_eq!(moves(streams, true), moves(streams, false), "{streams}");
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
