//! Servers that keep to the protocol no longer than into the transmission phase.

use std::io::{self, Write};
use std::sync::{Mutex, mpsc};

use proptest::prelude::*;

use super::super::wire::{
    CHUNK_DATA, CHUNK_DONE, CHUNK_ERROR, CHUNK_ERROR_OFFSET, CHUNK_HOLE, CHUNK_MAGIC, CHUNK_NONE,
};
use super::fake::{
    Asked, Bytes, DISC, FLUSH, Fake, MULTI_CONN, Manners, READ, chunk, read_request, simple,
};
use crate::testing::{Arena, finish, perform, request};
use crate::{Buffers, Disk, DiskOptions, NbdDisk, Op};

/// A disk whose server answers the first request by this, and hangs up.
fn answering(
    manners: Manners,
    answer: impl Fn(&Asked) -> Bytes + Send + Sync + 'static,
) -> NbdDisk {
    let fake = Fake::new(move |mut stream| {
        manners.welcome(&mut stream)?;
        let asked = read_request(&mut stream)?;
        stream.write_all(&answer(&asked).0)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        // Whatever else comes is read, so that the client sees an end and no reset.
        io::copy(&mut stream, &mut io::sink()).map(|_| ())
    });
    fake.disk(DiskOptions::default()).unwrap()
}

/// The place of the read that all these servers are asked for.
const AT: u64 = 4096;
const LEN: usize = 1024;

/// How a read of [`LEN`] bytes at [`AT`] ends, and that nothing beside its memory has changed.
fn read(disk: &NbdDisk) -> (io::Result<()>, Vec<u8>) {
    let arena = Arena::new(3 * 4096);
    arena.put(0, &[0xee; 3 * 4096]);
    let mut queue = disk.queue(4).unwrap();
    let buffers = arena.buffers(&[(4096, 1000), (6000, 24)]);
    let result = perform(queue.as_mut(), Op::Read, AT, buffers);
    for (start, end) in [(0, 4096), (5096, 6000), (6024, 3 * 4096)] {
        assert!(
            arena
                .get(start, end - start)
                .iter()
                .all(|byte| *byte == 0xee)
        );
    }
    let mut data = arena.get(4096, 1000);
    data.extend(arena.get(6000, 24));
    (result, data)
}

/// A chunk with data for a part of the export.
fn data(flags: u16, cookie: u64, offset: u64, len: usize) -> Bytes {
    let head = chunk(flags, CHUNK_DATA, cookie, u32::try_from(len + 8).unwrap());
    head.u64(offset).raw(&vec![0x11; len])
}

fn hole(flags: u16, cookie: u64, offset: u64, len: u32) -> Bytes {
    chunk(flags, CHUNK_HOLE, cookie, 12).u64(offset).u32(len)
}

fn done(cookie: u64) -> Vec<u8> {
    chunk(CHUNK_DONE, CHUNK_NONE, cookie, 0).0
}

fn error(flags: u16, kind: u16, cookie: u64, text: &[u8], rest: &[u8]) -> Bytes {
    let len = u32::try_from(6 + text.len() + rest.len()).unwrap();
    let text_len = u16::try_from(text.len()).unwrap();
    let head = chunk(flags, kind, cookie, len).u32(28).u16(text_len);
    head.raw(text).raw(rest)
}

type Answer = fn(&Asked) -> Bytes;

#[test]
fn every_right_form_of_an_answer_is_understood() {
    let no_space = Some(libc::ENOSPC);
    let (half, full) = (LEN / 2, LEN);
    let mixed = [vec![0x11; half], vec![0; half]].concat();
    let cases: [(&str, Answer, Option<i32>, Vec<u8>); 8] = [
        (
            "one chunk",
            |a| data(1, a.cookie, AT, LEN),
            None,
            vec![0x11; full],
        ),
        (
            "a chunk, then none",
            |a| data(0, a.cookie, AT, LEN).raw(&done(a.cookie)),
            None,
            vec![0x11; full],
        ),
        (
            "a hole first, then data before it",
            |a| hole(0, a.cookie, AT + 512, 512).raw(&data(1, a.cookie, AT, 512).0),
            None,
            mixed,
        ),
        (
            "every other byte, then the others",
            |a| {
                let at = |i: u64| data(0, a.cookie, AT + i, 1).0;
                let odd = (1..LEN as u64).step_by(2).flat_map(at);
                let even = (0..LEN as u64).step_by(2).flat_map(at);
                let bytes: Vec<u8> = odd.chain(even).collect();
                Bytes(bytes).raw(&done(a.cookie))
            },
            None,
            vec![0x11; full],
        ),
        (
            "an error with a text",
            |a| error(1, CHUNK_ERROR, a.cookie, &[b'x'; 4096], &[]),
            no_space,
            vec![0xee; full],
        ),
        (
            "an error at an offset, among data",
            |a| {
                let bytes = data(0, a.cookie, AT, LEN);
                let offset = (AT + 7).to_be_bytes();
                let bytes = bytes.raw(&error(0, CHUNK_ERROR_OFFSET, a.cookie, b"oh", &offset).0);
                bytes.raw(&done(a.cookie))
            },
            no_space,
            vec![0x11; full],
        ),
        (
            "an error of a type that is not known",
            |a| error(1, 0x8123, a.cookie, b"oh", b"whatever this is"),
            no_space,
            vec![0xee; full],
        ),
        (
            "flags that are not known",
            |a| data(0xffff, a.cookie, AT, LEN),
            None,
            vec![0x11; full],
        ),
    ];
    for (case, answer, code, bytes) in cases {
        let (result, data) = read(&answering(Manners::default(), answer));
        let found = result.err().map(|error| error.raw_os_error());
        assert_eq!(found, code.map(Some), "{case}");
        assert!(data == bytes, "{case}");
    }
}

/// Answers that no server may give.
const BREACHES: &[(&str, Answer)] = &[
    ("the end", |_| Bytes::default()),
    ("half a header", |a| {
        Bytes(data(1, a.cookie, AT, LEN).0[..15].to_vec())
    }),
    ("half the data", |a| {
        Bytes(data(1, a.cookie, AT, LEN).0[..500].to_vec())
    }),
    ("another magic", |a| {
        Bytes::default().u32(0x1234_5678).u64(a.cookie).u64(0)
    }),
    ("another cookie", |a| data(1, a.cookie + 1, AT, LEN)),
    ("a cookie far off", |_| data(1, u64::MAX, AT, LEN)),
    ("a cookie of another time", |a| {
        data(1, a.cookie ^ 1 << 40, AT, LEN)
    }),
    ("a simple reply", |a| simple(0, a.cookie).raw(&[0x11; LEN])),
    ("a simple error", |a| simple(5, a.cookie)),
    ("no data at all", |a| Bytes(done(a.cookie))),
    ("too little data", |a| {
        data(0, a.cookie, AT, LEN - 1).raw(&done(a.cookie))
    }),
    ("too little, at once", |a| data(1, a.cookie, AT, LEN - 512)),
    ("data before", |a| data(1, a.cookie, AT - 1, LEN)),
    ("data at 0", |a| data(1, a.cookie, 0, LEN)),
    ("data behind", |a| data(1, a.cookie, AT + 1, LEN)),
    ("data far behind", |a| data(1, a.cookie, u64::MAX, LEN)),
    ("too much data", |a| data(1, a.cookie, AT, LEN + 1)),
    ("a huge chunk", |a| {
        chunk(1, CHUNK_DATA, a.cookie, u32::MAX).u64(AT)
    }),
    ("an empty chunk", |a| {
        chunk(1, CHUNK_DATA, a.cookie, 8).u64(AT)
    }),
    ("less than an offset", |a| {
        chunk(1, CHUNK_DATA, a.cookie, 7).u64(AT)
    }),
    ("data twice", |a| {
        data(0, a.cookie, AT, 512).raw(&data(0, a.cookie, AT + 511, 1).0)
    }),
    ("a hole over data", |a| {
        data(0, a.cookie, AT, LEN).raw(&hole(1, a.cookie, AT, 512).0)
    }),
    ("a hole before", |a| hole(1, a.cookie, AT - 512, 1024)),
    ("a hole behind", |a| hole(1, a.cookie, AT, 1025)),
    ("a huge hole", |a| hole(1, a.cookie, AT, u32::MAX)),
    ("an empty hole", |a| hole(1, a.cookie, AT, 0)),
    ("a long hole chunk", |a| {
        chunk(1, CHUNK_HOLE, a.cookie, 13)
            .u64(AT)
            .u32(512)
            .raw(&[0])
    }),
    ("none with a payload", |a| {
        chunk(1, CHUNK_NONE, a.cookie, 1).raw(&[0])
    }),
    ("none that is not the last", |a| {
        chunk(0, CHUNK_NONE, a.cookie, 0)
    }),
    ("block status", |a| chunk(1, 5, a.cookie, 12).u64(0).u32(0)),
    ("a type that is not known", |a| chunk(1, 77, a.cookie, 0)),
    ("a short error", |a| {
        chunk(1, CHUNK_ERROR, a.cookie, 5).raw(&[0; 5])
    }),
    ("a huge error", |a| {
        chunk(1, CHUNK_ERROR, a.cookie, u32::MAX).u32(5).u16(0)
    }),
    ("an error's text too long", |a| {
        chunk(1, CHUNK_ERROR, a.cookie, 10)
            .u32(5)
            .u16(5)
            .raw(&[65; 4])
    }),
    ("an error with more than it has", |a| {
        error(1, CHUNK_ERROR, a.cookie, b"", &[0; 8])
    }),
    ("an error without its offset", |a| {
        error(1, CHUNK_ERROR_OFFSET, a.cookie, b"", &[])
    }),
    ("no error", |a| {
        chunk(1, CHUNK_ERROR, a.cookie, 6).u32(0).u16(0)
    }),
    ("errors without end", |a| {
        Bytes(error(0, CHUNK_ERROR, a.cookie, b"", &[]).0.repeat(5000))
    }),
    ("it shuts down", |a| {
        chunk(1, CHUNK_ERROR, a.cookie, 6).u32(108).u16(0)
    }),
];

#[test]
fn every_breach_of_the_protocol_ends_the_connection_and_writes_nowhere_else() {
    for (case, answer) in BREACHES {
        let disk = answering(Manners::default(), *answer);
        let (result, _) = read(&disk);
        let code = result.unwrap_err().raw_os_error();
        assert_eq!(code, Some(libc::ENOTCONN), "{case}");
        let error = disk.queue(1).err().unwrap();
        assert_eq!(error.source.raw_os_error(), Some(libc::ENOTCONN), "{case}");
    }
}

#[test]
fn what_was_not_agreed_on_is_a_breach_as_well() {
    let plain = Manners {
        structured: false,
        ..Manners::default()
    };
    let (result, data_read) = read(&answering(plain.clone(), |a| {
        simple(0, a.cookie).raw(&[0x22; LEN])
    }));
    result.unwrap();
    assert_eq!(data_read, [0x22; LEN]);
    let (result, _) = read(&answering(plain.clone(), |a| simple(28, a.cookie)));
    assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    let (result, _) = read(&answering(plain.clone(), |a| data(1, a.cookie, AT, LEN)));
    assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    let (result, _) = read(&answering(plain, |a| {
        simple(0, a.cookie).raw(&[0x22; LEN - 1])
    }));
    assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
}

#[test]
fn data_for_what_is_no_read_is_a_breach_and_a_flush_lost_with_the_connection_stays_lost() {
    for answer in [
        |a: &Asked| data(1, a.cookie, 0, 512),
        |a: &Asked| hole(1, a.cookie, 0, 512),
        |a: &Asked| simple(0, a.cookie).raw(&simple(0, a.cookie).0),
    ] {
        let disk = answering(
            Manners {
                flags: 1 | FLUSH | MULTI_CONN,
                ..Manners::default()
            },
            answer,
        );
        let mut queue = disk.queue(4).unwrap();
        let first = perform(queue.as_mut(), Op::Flush, 0, Buffers::none());
        let second = perform(queue.as_mut(), Op::Flush, 0, Buffers::none());
        assert!(first.is_err() || second.is_err());
        // Another connection is another matter, but what was written before may be lost.
        let mut other = disk.queue(4).unwrap();
        let error = perform(other.as_mut(), Op::Flush, 0, Buffers::none()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
}

#[test]
fn an_answer_to_a_write_that_is_not_sent_yet_is_a_breach() {
    let (send, receive) = mpsc::channel::<()>();
    let receive = Mutex::new(receive);
    let fake = Fake::new(move |mut stream| {
        Manners::default().welcome(&mut stream)?;
        let asked = read_request(&mut stream)?;
        // The data is not read, so that the socket fills; the reply comes all the same.
        stream.write_all(&simple(0, asked.cookie).0)?;
        // Until the test has seen what comes of it.
        let _ = receive.lock().unwrap().recv();
        Ok(())
    });
    let disk = fake.disk(DiskOptions::default()).unwrap();
    let mut queue = disk.queue(1).unwrap();
    let arena = Arena::new(1 << 20);
    let buffers = arena.buffers(&[(0, 1 << 20)]);
    let error = perform(queue.as_mut(), Op::Write, 0, buffers).unwrap_err();
    drop(send);
    assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));
}

#[test]
fn all_requests_of_all_queues_end_when_the_server_goes() {
    let (send, receive) = mpsc::channel::<()>();
    let receive = Mutex::new(receive);
    let fake = Fake::new(move |mut stream| {
        Manners::default().welcome(&mut stream)?;
        read_request(&mut stream)?;
        // Until the test says so.
        let _ = receive.lock().unwrap().recv();
        Ok(())
    });
    let disk = fake.disk(DiskOptions::default()).unwrap();
    let arena = Arena::new(4096);
    let mut queues = [(); 3].map(|()| disk.queue(2).unwrap());
    for queue in &mut queues {
        for token in 0..5 {
            queue.push(request(token, Op::Read, 0, arena.buffers(&[(0, 512)])));
        }
        queue.submit();
    }
    drop(send);
    for queue in &mut queues {
        let mut ended = finish(queue.as_mut(), 5);
        ended.sort_by_key(|end| end.0);
        for (token, end) in ended.into_iter().enumerate() {
            assert_eq!(end.0, token as u64);
            let code = end.1.unwrap_err().raw_os_error();
            assert_eq!(code, Some(libc::ENOTCONN));
        }
        assert_eq!(queue.in_flight(), 0);
    }
}

#[test]
fn a_disk_that_is_closed_takes_leave_of_its_server() {
    let (send, receive) = mpsc::channel();
    let send = Mutex::new(send);
    let fake = Fake::new(move |mut stream| {
        Manners::default().welcome(&mut stream)?;
        let last = read_request(&mut stream)?;
        send.lock().unwrap().send(last.kind).unwrap();
        Ok(())
    });
    drop(fake.disk(DiskOptions::default()).unwrap());
    assert_eq!(receive.recv(), Ok(DISC));
}

/// What a server may say in a row: things that are nearly right.
fn saying() -> impl Strategy<Value = Vec<u8>> {
    let cookie = prop_oneof![9 => Just(None), 1 => any::<u64>().prop_map(Some)];
    let kind = prop_oneof![
        4 => Just(CHUNK_DATA), 2 => Just(CHUNK_HOLE), 1 => Just(CHUNK_NONE),
        2 => Just(CHUNK_ERROR), 1 => Just(CHUNK_ERROR_OFFSET), 1 => any::<u16>(),
    ];
    let offset = prop_oneof![6 => AT..AT + 1100, 1 => any::<u64>()];
    let len = prop_oneof![6 => 0_u32..600, 1 => any::<u32>()];
    let payload = prop::collection::vec(any::<u8>(), 0..300);
    (cookie, any::<u16>(), kind, offset, len, payload).prop_map(
        |(cookie, flags, kind, offset, len, payload)| {
            let cookie = cookie.unwrap_or(FIRST_COOKIE);
            let long = usize::try_from(len.saturating_sub(8)).unwrap_or(0).min(600);
            match kind {
                CHUNK_DATA => {
                    chunk(flags, kind, cookie, len)
                        .u64(offset)
                        .raw(&payload.repeat(3)[..long.min(payload.len() * 3)])
                        .0
                }
                CHUNK_HOLE => hole(flags, cookie, offset, len).0,
                CHUNK_NONE => chunk(flags, kind, cookie, 0).0,
                CHUNK_ERROR => error(flags, kind, cookie, &payload, &[]).0,
                CHUNK_ERROR_OFFSET => error(flags, kind, cookie, &payload, &[0; 8]).0,
                _ => Bytes::default().u32(CHUNK_MAGIC).raw(&payload).0,
            }
        },
    )
}

/// The cookie of the first command on a connection.
const FIRST_COOKIE: u64 = 1 << 32;

/// A disk whose server says this after the first request, whatever that is.
fn saying_all(manners: Manners, bytes: Vec<u8>) -> NbdDisk {
    answering(manners, move |asked| {
        assert_eq!(asked.cookie, FIRST_COOKIE);
        Bytes(bytes.clone())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_chunks_come_every_request_ends_and_nothing_else_is_written(
        said in prop::collection::vec(saying(), 0..12),
    ) {
        let disk = saying_all(Manners::default(), said.concat());
        let (_, data) = read(&disk);
        prop_assert_eq!(data.len(), LEN);
    }

    #[test]
    fn whatever_bytes_come_every_request_ends(
        structured in any::<bool>(),
        start in 0_usize..28,
        junk in prop::collection::vec(any::<u8>(), 0..3000),
        flush in any::<bool>(),
    ) {
        let manners = Manners { structured, ..Manners::default() };
        let right = if structured {
            data(1, FIRST_COOKIE, AT, LEN)
        } else {
            simple(0, FIRST_COOKIE)
        };
        let bytes = [&right.0[..start.min(right.0.len())], &junk].concat();
        let disk = saying_all(manners, bytes);
        if flush {
            let mut queue = disk.queue(1).unwrap();
            let _ = perform(queue.as_mut(), Op::Flush, 0, Buffers::none());
        } else {
            let _ = read(&disk);
        }
    }
}

/// So that the table's servers are what the client takes them for.
#[test]
fn the_scripts_know_the_request_that_they_answer() {
    let disk = answering(Manners::default(), |asked| {
        let Asked {
            kind, offset, len, ..
        } = *asked;
        assert_eq!((kind, offset, len as usize), (READ, AT, LEN));
        assert_eq!(asked.cookie, FIRST_COOKIE);
        data(1, asked.cookie, AT, LEN)
    });
    read(&disk).0.unwrap();
}
