//! What a server is asked for, and in which form.

use std::sync::atomic::Ordering;

use super::fake::{
    FLUSH, FLUSH_CMD, FUA, Honest, MULTI_CONN, Manners, READ, READ_ONLY, TRIM, TRIM_CMD, WRITE,
    ZERO_CMD, ZEROES,
};
use crate::nbd::NbdError;
use crate::testing::{Arena, finish, perform, request};
use crate::{Buffers, Cache, Discard, Disk, DiskOptions, IoQueue, Op};

fn options(cache: Cache) -> DiskOptions {
    DiskOptions {
        cache,
        discard: Discard::Unmap,
        ..DiskOptions::default()
    }
}

fn honest(flags: u16) -> Honest {
    Honest::new(Manners {
        flags: 1 | flags,
        ..Manners::default()
    })
}

fn write(queue: &mut dyn IoQueue, offset: u64, len: usize) -> std::io::Result<()> {
    let arena = Arena::new(len);
    perform(queue, Op::Write, offset, arena.buffers(&[(0, len)]))
}

#[test]
fn writes_and_flushes_are_as_durable_as_the_cache_mode_and_the_server_allow() {
    let plain = (WRITE, 0, 4096, 512);
    let fua = (WRITE, 1, 4096, 512);
    let flush = (FLUSH_CMD, 0, 0, 0);
    // The server's offers, the mode, what a write is, and what a flush is.
    for (offers, cache, written, flushed) in [
        (FLUSH | FUA, Cache::Writeback, &[plain][..], &[flush][..]),
        (FLUSH | FUA, Cache::None, &[plain], &[flush]),
        (FLUSH | FUA, Cache::Writethrough, &[fua], &[flush]),
        (FLUSH | FUA, Cache::Directsync, &[fua], &[flush]),
        (FLUSH | FUA, Cache::Unsafe, &[plain], &[]),
        (FLUSH, Cache::Writeback, &[plain], &[flush]),
        (FLUSH, Cache::Writethrough, &[plain, flush], &[flush]),
        (FUA, Cache::Writeback, &[fua], &[]),
        (FUA, Cache::Writethrough, &[fua], &[]),
        (FUA, Cache::Unsafe, &[plain], &[]),
        (0, Cache::Writeback, &[plain], &[]),
        (0, Cache::Writethrough, &[plain], &[]),
    ] {
        let server = honest(offers);
        let disk = server.opener().disk(options(cache)).unwrap();
        let mut queue = disk.queue(4).unwrap();
        write(queue.as_mut(), 4096, 512).unwrap();
        assert_eq!(server.take(), written, "{offers:#x}, {cache:?}");
        perform(queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap();
        assert_eq!(server.take(), flushed, "{offers:#x}, {cache:?}");
    }
}

#[test]
fn zeroes_and_discards_become_what_the_server_has() {
    let zero = |may_unmap| Op::WriteZeroes {
        len: 8192,
        may_unmap,
    };
    let discard = Op::Discard { len: 8192 };
    let ignoring = DiskOptions::default();
    let unmapping = options(Cache::Writeback);
    for (offers, options, op, asked) in [
        (
            ZEROES,
            &unmapping,
            zero(true),
            &[(ZERO_CMD, 0, 512, 8192)][..],
        ),
        (ZEROES, &unmapping, zero(false), &[(ZERO_CMD, 2, 512, 8192)]),
        (ZEROES, &ignoring, zero(true), &[(ZERO_CMD, 2, 512, 8192)]),
        (0, &unmapping, zero(true), &[(WRITE, 0, 512, 8192)]),
        (TRIM, &unmapping, discard, &[(TRIM_CMD, 0, 512, 8192)]),
        (TRIM, &ignoring, discard, &[]),
        (0, &unmapping, discard, &[]),
    ] {
        let server = honest(FLUSH | offers);
        let disk = server.opener().disk(options.clone()).unwrap();
        let mut queue = disk.queue(4).unwrap();
        perform(queue.as_mut(), op, 512, Buffers::none()).unwrap();
        assert_eq!(server.take(), asked, "{offers:#x}, {op:?}");
        if !matches!(op, Op::Discard { .. }) {
            let bytes = server.bytes.lock().unwrap();
            assert!(bytes[512..512 + 8192].iter().all(|byte| *byte == 0));
            assert_eq!((bytes[511], bytes[512 + 8192]), (0xaa, 0xaa));
        }
        let told = disk.info().discard;
        assert_eq!(told, offers == TRIM && options.discard == Discard::Unmap);
    }
}

#[test]
fn durable_zeroes_are_as_durable_as_writes() {
    let zero = Op::WriteZeroes {
        len: 512,
        may_unmap: true,
    };
    for (offers, asked) in [
        (ZEROES | FUA, vec![(ZERO_CMD, 1, 0, 512)]),
        (ZEROES, vec![(ZERO_CMD, 0, 0, 512), (FLUSH_CMD, 0, 0, 0)]),
        (0, vec![(WRITE, 0, 0, 512), (FLUSH_CMD, 0, 0, 0)]),
        (FUA, vec![(WRITE, 1, 0, 512)]),
    ] {
        let server = honest(FLUSH | offers);
        let disk = server.opener().disk(options(Cache::Writethrough)).unwrap();
        let mut queue = disk.queue(4).unwrap();
        perform(queue.as_mut(), zero, 0, Buffers::none()).unwrap();
        assert_eq!(server.take(), asked, "{offers:#x}");
    }
}

#[test]
fn what_the_server_does_not_support_after_all_is_done_otherwise_and_not_tried_again() {
    let server = honest(FLUSH | ZEROES | TRIM);
    *server.refuse.lock().unwrap() = vec![(ZERO_CMD, 95), (TRIM_CMD, 95)];
    let disk = server.opener().disk(options(Cache::Writeback)).unwrap();
    let mut queue = disk.queue(4).unwrap();
    let (discard, zero) = (
        Op::Discard { len: 512 },
        Op::WriteZeroes {
            len: 512,
            may_unmap: true,
        },
    );
    for op in [discard, zero, discard, zero] {
        perform(queue.as_mut(), op, 0, Buffers::none()).unwrap();
    }
    let write = (WRITE, 0, 0, 512);
    let asked = [(TRIM_CMD, 0, 0, 512), (ZERO_CMD, 0, 0, 512), write, write];
    assert_eq!(server.take(), asked);
}

#[test]
fn a_failed_flush_is_an_error_for_ever_and_other_errors_are_their_requests_own() {
    let server = honest(FLUSH);
    *server.refuse.lock().unwrap() = vec![(FLUSH_CMD, 28), (WRITE, 1), (READ, 5)];
    let disk = server.opener().disk(options(Cache::Writeback)).unwrap();
    let mut queue = disk.queue(4).unwrap();
    let arena = Arena::new(512);
    let error = write(queue.as_mut(), 0, 512).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    let read = perform(queue.as_mut(), Op::Read, 0, arena.buffers(&[(0, 512)]));
    assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::EIO));
    let mut flush = || perform(queue.as_mut(), Op::Flush, 0, Buffers::none());
    assert_eq!(flush().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    server.refuse.lock().unwrap().clear();
    server.take();
    assert_eq!(flush().unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(server.take(), []);
    write(queue.as_mut(), 0, 512).unwrap();
}

#[test]
fn a_long_request_is_cut_at_the_servers_maximum_and_ends_once() {
    let server = Honest::new(Manners {
        blocks: Some((512, 4096, 5000)),
        flags: 1 | FLUSH | FUA | ZEROES,
        ..Manners::default()
    });
    let disk = server.opener().disk(options(Cache::Writethrough)).unwrap();
    for depth in [1, 3, 64] {
        let mut queue = disk.queue(depth).unwrap();
        let arena = Arena::new(64 << 10);
        let bytes: Vec<u8> = (0..20_480)
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect();
        arena.put(7, &bytes);
        let pieces = [(7, 1000), (1007, 19_000), (20_007, 480)];
        queue.push(request(1, Op::Write, 1024, arena.buffers(&pieces)));
        assert_eq!(finish(queue.as_mut(), 1)[0].2, 20_480);
        assert_eq!(server.bytes.lock().unwrap()[1024..][..20_480], bytes);
        let parts: Vec<_> = server.take().iter().map(|a| (a.0, a.1, a.3)).collect();
        let whole = (WRITE, 1, 4608);
        assert_eq!(parts, [whole, whole, whole, whole, (WRITE, 1, 2048)]);
        queue.push(request(
            2,
            Op::Read,
            1024,
            arena.buffers(&[(30_000, 20_480)]),
        ));
        assert_eq!(finish(queue.as_mut(), 1)[0].2, 20_480);
        assert_eq!(arena.get(30_000, 20_480), bytes);
        server.take();
        let zero = Op::WriteZeroes {
            len: 9216,
            may_unmap: true,
        };
        perform(queue.as_mut(), zero, 0, Buffers::none()).unwrap();
        let parts = [(ZERO_CMD, 1, 0, 4608), (ZERO_CMD, 1, 4608, 4608)];
        assert_eq!(server.take(), parts);
    }
}

#[test]
fn a_part_that_fails_fails_the_request_once_and_the_queue_goes_on() {
    let server = Honest::new(Manners {
        blocks: Some((512, 4096, 4096)),
        ..Manners::default()
    });
    let disk = server.opener().disk(options(Cache::Writeback)).unwrap();
    for depth in [1, 2, 8] {
        let mut queue = disk.queue(depth).unwrap();
        *server.refuse.lock().unwrap() = vec![(READ, 5)];
        let arena = Arena::new(64 << 10);
        for token in 0..3 {
            queue.push(request(token, Op::Read, 0, arena.buffers(&[(0, 64 << 10)])));
        }
        for (_, result, bytes) in finish(queue.as_mut(), 3) {
            let code = result.unwrap_err().raw_os_error();
            assert_eq!((code, bytes), (Some(libc::EIO), 0));
        }
        assert_eq!(queue.in_flight(), 0);
        server.refuse.lock().unwrap().clear();
        let buffers = arena.buffers(&[(0, 64 << 10)]);
        perform(queue.as_mut(), Op::Read, 0, buffers).unwrap();
        assert!(arena.get(0, 64 << 10).iter().all(|byte| *byte == 0xaa));
    }
}

#[test]
fn requests_that_may_not_be_are_refused_without_asking_the_server() {
    let server = Honest::new(Manners {
        blocks: Some((4096, 8192, 1 << 20)),
        ..Manners::default()
    });
    let disk = server.opener().disk(options(Cache::Writeback)).unwrap();
    let info = disk.info();
    assert_eq!((info.logical_block, info.physical_block), (4096, 8192));
    let mut queue = disk.queue(4).unwrap();
    let arena = Arena::new(8192);
    let size = info.size;
    for (offset, len) in [
        (512, 4096),
        (0, 512),
        (size, 4096),
        (size - 4096, 8192),
        (u64::MAX - 4095, 4096),
        (u64::MAX, 1),
    ] {
        let buffers = arena.buffers(&[(0, len)]);
        let error = perform(queue.as_mut(), Op::Read, offset, buffers).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    }
    let nothing = perform(queue.as_mut(), Op::Write, 0, Buffers::none());
    nothing.unwrap();
    assert_eq!(server.take(), []);
}

#[test]
fn a_read_only_disk_refuses_changes_and_its_odd_end_reads_as_zeros() {
    let server = Honest::new(Manners {
        size: 1000,
        flags: 1 | READ_ONLY,
        ..Manners::default()
    });
    let writable = server.opener().disk(options(Cache::Writeback));
    assert!(matches!(writable, Err(NbdError::ReadOnly { .. })));
    let disk = server.opener().disk(DiskOptions {
        read_only: true,
        ..DiskOptions::default()
    });
    let disk = disk.unwrap();
    assert_eq!((disk.info().size, disk.info().read_only), (1024, true));
    let mut queue = disk.queue(1).unwrap();
    let arena = Arena::new(2048);
    arena.put(0, &[0xee; 2048]);
    perform(
        queue.as_mut(),
        Op::Read,
        0,
        arena.buffers(&[(0, 1000), (1500, 24)]),
    )
    .unwrap();
    assert_eq!(arena.get(0, 1000), [0xaa; 1000]);
    assert_eq!(arena.get(1500, 24), [0; 24]);
    assert_eq!(arena.get(1000, 500), [0xee; 500]);
    perform(queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap();
    let error = write(queue.as_mut(), 0, 512).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    let only_reads = server.take().iter().all(|asked| asked.0 == READ);
    assert!(only_reads);
}

#[test]
fn sizes_that_make_no_disk_are_refused() {
    for (size, message) in [(0, "empty"), (1000, "1000 bytes is not a multiple of 512")] {
        let server = Honest::new(Manners {
            size,
            ..Manners::default()
        });
        let error = server.opener().disk(options(Cache::Writeback)).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert!(error.to_string().contains("nbd://fake/x"), "{error}");
    }
}

#[test]
fn each_queue_has_its_connection_only_where_the_server_allows_it() {
    for (offers, connections) in [(FLUSH, 1), (FLUSH | MULTI_CONN, 3)] {
        let server = honest(offers);
        let count = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let opener = {
            let (server, count) = (server.clone(), std::sync::Arc::clone(&count));
            super::fake::Fake::new(move |stream| {
                count.fetch_add(1, Ordering::Relaxed);
                server.serve(&mut { stream })
            })
        };
        let disk = opener.disk(options(Cache::Writeback)).unwrap();
        let mut queues = [(); 3].map(|()| disk.queue(4).unwrap());
        for (queue, at) in queues.iter_mut().zip([0, 512, 1024]) {
            write(queue.as_mut(), at, 512).unwrap();
            perform(queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap();
        }
        assert_eq!(count.load(Ordering::Relaxed), connections);
        assert_eq!(server.take().len(), 6);
    }
}
