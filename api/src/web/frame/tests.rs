use proptest::prelude::*;

use super::*;

/// A frame as a client sends it.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    put(first & 0xf, payload, &mut plain);
    let mask = [0x37, 0xfa, 0x21, 0x3d];
    let head = plain.len() - payload.len();
    let mut sent = plain[..head].to_vec();
    sent[0] = first;
    sent[1] |= MASKED;
    sent.extend(mask);
    sent.extend(payload.iter().zip(mask.iter().cycle()).map(|(a, b)| a ^ b));
    sent
}

/// What a decoder makes of bytes that come in pieces of `step`.
fn read(bytes: &[u8], step: usize) -> Result<(Vec<u8>, Vec<Piece>), FrameError> {
    let mut decoder = Decoder::default();
    let (mut data, mut others) = (Vec::new(), Vec::new());
    let mut out = [0; 7];
    for piece in bytes.chunks(step) {
        let mut rest = piece;
        loop {
            let (used, piece) = decoder.read(rest, &mut out)?;
            rest = &rest[used..];
            match piece {
                Piece::Part => break,
                Piece::Data(count) => data.extend(&out[..count]),
                other => others.push(other),
            }
        }
        assert!(rest.is_empty());
    }
    Ok((data, others))
}

#[test]
fn the_example_of_the_specification_is_read() {
    // RFC 6455, section 5.7, as a binary message.
    let hello = [
        0x82, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58,
    ];
    assert_eq!(read(&hello, 100), Ok((b"Hello".to_vec(), Vec::new())));
}

#[test]
fn fragments_are_one_message_with_control_frames_between() {
    let bytes = [
        frame(BINARY, b"frag"),
        frame(FINAL | PING, b"are you there"),
        frame(CONTINUATION, b""),
        frame(FINAL | PONG, b"yes"),
        frame(FINAL | CONTINUATION, b"ment"),
        frame(FINAL | BINARY, b"!"),
        frame(FINAL | CLOSE, &[3, 232]),
    ]
    .concat();
    for step in [1, 2, 3, 5, 1000] {
        let (data, others) = read(&bytes, step).unwrap();
        assert_eq!(data, b"fragment!");
        assert_eq!(
            others,
            [Piece::Ping(b"are you there".to_vec()), Piece::Close]
        );
    }
}

#[test]
fn a_ping_holds_nothing_of_the_frames_before_it() {
    let sent = [
        frame(0x8a, b"pong"),
        frame(0x88, &[3, 232, b'b', b'y', b'e']),
        frame(0x89, b"ping"),
    ]
    .concat();
    for step in 1..=sent.len() {
        let pings = [Piece::Close, Piece::Ping(b"ping".to_vec())];
        assert_eq!(read(&sent, step).unwrap(), (Vec::new(), pings.to_vec()));
    }
}

#[test]
fn what_no_client_may_send_is_refused_before_its_payload() {
    let long = (MAX_FRAME + 1).to_be_bytes();
    let huge = [[FINAL | BINARY, 0xff].as_slice(), &[0xff; 8], &[0; 4]].concat();
    let longer = [[FINAL | BINARY, 0xff].as_slice(), &long, &[0; 4]].concat();
    for (bytes, error) in [
        (vec![FINAL | BINARY, 5], FrameError::Unmasked),
        (vec![FINAL | 0x40 | BINARY], FrameError::Reserved),
        (frame(FINAL | 3, b""), FrameError::Kind(3)),
        (frame(FINAL | 15, b""), FrameError::Kind(15)),
        (frame(FINAL | TEXT, b"text"), FrameError::Text),
        (frame(FINAL | CONTINUATION, b""), FrameError::Order),
        (
            [frame(BINARY, b"a"), frame(FINAL | BINARY, b"b")].concat(),
            FrameError::Order,
        ),
        (frame(PING, b""), FrameError::Length),
        (frame(FINAL | PING, &[0; 126]), FrameError::Length),
        (
            vec![FINAL | BINARY, 0xfe, 0, 125, 0, 0, 0, 0],
            FrameError::Length,
        ),
        (
            [[FINAL | BINARY, 0xff].as_slice(), &[0; 6], &[255; 6]].concat(),
            FrameError::Length,
        ),
        (huge, FrameError::Long(u64::MAX)),
        (longer, FrameError::Long(MAX_FRAME + 1)),
    ] {
        assert_eq!(read(&bytes, 1), Err(error), "{bytes:?}");
        assert!([1002, 1003, 1009].contains(&error.code()));
    }
}

#[test]
fn lengths_are_written_in_the_shortest_form() {
    for length in [0, 1, 125, 126, 65_535, 65_536, 100_000] {
        let payload = vec![7; length];
        let mut out = Vec::new();
        put_binary(&payload, &mut out);
        let extended = match length {
            0..126 => 0,
            126..65_536 => 2,
            _ => 8,
        };
        assert_eq!(out.len(), 2 + extended + length);
        assert_eq!(
            read(&frame(FINAL | BINARY, &payload), 4096).unwrap().0,
            payload
        );
    }
}

proptest! {
    #[test]
    fn messages_come_out_as_they_went_in(
        messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..5),
        step in 1_usize..50,
    ) {
        let frames = messages.iter().map(|payload| frame(FINAL | BINARY, payload));
        let bytes = frames.collect::<Vec<_>>().concat();
        prop_assert_eq!(read(&bytes, step).unwrap().0, messages.concat());
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), step in 1_usize..9) {
        // Whatever comes of it, it does not hold up or panic.
        let _ = read(&bytes, step);
    }
}
