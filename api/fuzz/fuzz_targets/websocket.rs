//! Any bytes as what a browser sends over a WebSocket, in any pieces: what is read does not depend on the pieces, is no more than was sent,
//! and ends with the first frame that is none.
//!
//! The first byte of an input says how long the pieces are, and the second how much room there is for each reading.
#![no_main]

use api::web::frame::{CONTROL, Decoder, FrameError, Piece};
use libfuzzer_sys::fuzz_target;

/// What came out: the messages' bytes, the pings' and ends, and why it ended.
type Read = (Vec<u8>, Vec<Piece>, Option<FrameError>);

fn read(bytes: &[u8], step: usize, room: usize) -> Read {
    let mut decoder = Decoder::default();
    let (mut data, mut others) = (Vec::new(), Vec::new());
    let mut out = vec![0; room];
    for mut rest in bytes.chunks(step) {
        loop {
            match decoder.read(rest, &mut out) {
                Err(error) => return (data, others, Some(error)),
                Ok((used, piece)) => {
                    assert!(used <= rest.len());
                    rest = &rest[used..];
                    match piece {
                        Piece::Part => {
                            assert!(rest.is_empty());
                            break;
                        }
                        Piece::Data(count) => {
                            assert!(count > 0 && count <= used);
                            data.extend(&out[..count]);
                        }
                        other => others.push(other),
                    }
                }
            }
        }
    }
    (data, others, None)
}

fuzz_target!(|input: &[u8]| {
    let [step, room, bytes @ ..] = input else {
        return;
    };
    let (step, room) = (usize::from(*step) + 1, usize::from(*room) + 1);
    let whole = read(bytes, bytes.len().max(1), bytes.len().max(1));
    assert_eq!(read(bytes, step, room), whole);
    let (data, others, error) = whole;
    let pings = others.iter().map(|other| match other {
        Piece::Ping(payload) => {
            assert!(payload.len() <= CONTROL);
            payload.len()
        }
        _ => 0,
    });
    assert!(data.len() + pings.sum::<usize>() <= bytes.len());
    if let Some(error) = error {
        assert!([1002, 1003, 1009].contains(&error.code()));
    }
});
