use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::file::{HostFile, Kind};
use crate::storage::FileStorage;
use crate::testing::{Arena, Call, Script, Scripted};
use crate::{Buffers, Op};

/// A queue on each engine.
fn queues() -> [JobQueue; 2] {
    [Aio::IoUring, Aio::Threads].map(|aio| JobQueue::new(aio, 4).unwrap())
}

fn willing() -> Script {
    Box::new(|_| None)
}

fn job(tag: u64, file: FileId, op: Op, offset: u64, buffers: Buffers) -> Job {
    Job::new(tag, file, op, offset, buffers, false)
}

/// Waits; ends come as completions.
fn wait(queue: &mut JobQueue, until: Until, out: &mut Vec<Completed>) -> io::Result<bool> {
    queue.wait(until, out, |end, out| out.push(end.into()))
}

/// The ends of `count` jobs, by tag.
fn ends(queue: &mut JobQueue, count: usize) -> Vec<(u64, Result<u64, Option<i32>>)> {
    let mut out = Vec::new();
    while out.len() < count {
        wait(queue, Until::Forever, &mut out).unwrap();
    }
    let mut ends: Vec<_> = out
        .into_iter()
        .map(|completed| match completed {
            Completed::Request {
                token,
                result,
                bytes,
            } => (token, result.map(|()| bytes).map_err(|e| e.raw_os_error())),
            other @ Completed::Watch(_) => panic!("{other:?}"),
        })
        .collect();
    ends.sort_by_key(|(tag, _)| *tag);
    assert_eq!((ends.len(), queue.in_flight()), (count, 0));
    ends
}

#[test]
fn one_queue_moves_bytes_of_host_files_and_of_storages_without_one() {
    for mut queue in queues() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let host = HostFile::new(file, Kind::Regular, false).unwrap();
        let host = Arc::new(FileStorage::new(Arc::new(host)));
        let remote = Scripted::new(vec![1; 1 << 20], 1, willing());
        let coarse = Scripted::new(vec![2; 1 << 20], 512, willing());
        let files = [
            queue.add_file(Arc::clone(&remote) as _),
            queue.add_file(Arc::clone(&host) as _),
            queue.add_file(Arc::clone(&coarse) as _),
        ];
        assert_eq!(queue.abilities(files[2]).align.offset, 512);
        let arena = Arena::new(4096);
        arena.put(0, &[7; 1024]);
        for (tag, file) in (0..).zip(files) {
            // Pieces that the coarse storage does not accept as they are.
            let buffers = arena.buffers(&[(0, 100), (200, 412)]);
            queue.push(job(tag, file, Op::Write, 512, buffers));
        }
        assert_eq!(
            ends(&mut queue, 3),
            [(0, Ok(512)), (1, Ok(512)), (2, Ok(512))]
        );
        let mut bytes = vec![0; 512];
        host.read_at(&mut bytes, 512).unwrap();
        assert_eq!(bytes, [7; 512]);
        for (storage, old) in [(&remote, 1), (&coarse, 2)] {
            let bytes = storage.bytes();
            assert_eq!(bytes[512..1024], [7; 512]);
            assert!(
                bytes[..512]
                    .iter()
                    .chain(&bytes[1024..])
                    .all(|byte| *byte == old)
            );
        }
        for (tag, file) in (0..).zip(files) {
            let place = 1024 + 1024 * usize::try_from(tag).unwrap();
            queue.push(job(tag, file, Op::Read, 0, arena.buffers(&[(place, 1024)])));
        }
        assert_eq!(
            ends(&mut queue, 3),
            [(0, Ok(1024)), (1, Ok(1024)), (2, Ok(1024))]
        );
        assert_eq!(arena.get(1024, 513)[511..], [1, 7]);
        assert_eq!(arena.get(2048, 513)[511..], [0, 7]);
        assert_eq!(arena.get(3072, 513)[511..], [2, 7]);
    }
}

#[test]
fn a_storage_takes_large_transfers_in_turns_and_every_operation() {
    for mut queue in queues() {
        let storage = Scripted::new(vec![9; 4 << 20], 1, willing());
        let file = queue.add_file(Arc::clone(&storage) as _);
        let arena = Arena::new(2 << 20);
        arena.put(0, &vec![3; 1 << 20]);
        let write = arena.buffers(&[(0, 1 << 20)]);
        queue.push(Job::new(0, file, Op::Write, 5, write, true));
        assert_eq!(ends(&mut queue, 1), [(0, Ok(1 << 20))]);
        assert!(
            storage
                .calls()
                .iter()
                .filter(|call| **call == Call::Sync)
                .count()
                > 1
        );
        queue.push(job(1, file, Op::Flush, 0, Buffers::none()));
        let zeroes = |may_unmap| Op::WriteZeroes {
            len: 100,
            may_unmap,
        };
        queue.push(job(2, file, zeroes(true), 10, Buffers::none()));
        queue.push(job(3, file, zeroes(false), 200, Buffers::none()).standing_for(100));
        queue.push(job(4, file, Op::Discard { len: 50 }, 7, Buffers::none()));
        queue.push(job(
            5,
            file,
            Op::Read,
            0,
            arena.buffers(&[(1 << 20, 1 << 20)]),
        ));
        let (done, all) = (ends(&mut queue, 5), 1 << 20);
        assert_eq!(
            done,
            [
                (1, Ok(0)),
                (2, Ok(0)),
                (3, Ok(100)),
                (4, Ok(0)),
                (5, Ok(all))
            ]
        );
        let calls = storage.calls();
        for call in [
            Call::Sync,
            Call::Zero(10, 100),
            Call::Zero(200, 100),
            Call::Discard(7, 50),
        ] {
            assert!(calls.contains(&call), "{call:?}");
        }
        assert_eq!(storage.bytes()[..12], [9, 9, 9, 9, 9, 3, 3, 3, 3, 3, 0, 0]);
    }
}

#[test]
fn a_storages_errors_end_the_jobs_that_met_them() {
    for mut queue in queues() {
        let script: Script = Box::new(|call| match call {
            Call::Write(4096, _) => Some(libc::ENOSPC),
            Call::Sync => Some(libc::EIO),
            _ => None,
        });
        let file = queue.add_file(Scripted::new(vec![0; 8192], 1, script));
        let arena = Arena::new(4096);
        for (tag, op, offset) in [(0, Op::Write, 4096), (1, Op::Flush, 0), (2, Op::Write, 0)] {
            queue.push(job(tag, file, op, offset, arena.buffers(&[(0, 512)])));
        }
        let failed = |code| Err(Some(code));
        let expected = [
            (0, failed(libc::ENOSPC)),
            (1, failed(libc::EIO)),
            (2, Ok(512)),
        ];
        assert_eq!(ends(&mut queue, 3), expected);
    }
}

/// A script whose reads wait, each for a word.
fn gated(gate: Receiver<()>) -> Script {
    let gate = Mutex::new(gate);
    Box::new(move |call| {
        if matches!(call, Call::Read(..)) {
            let _ = gate.lock().unwrap().recv();
        }
        None
    })
}

#[test]
fn jobs_beyond_the_depth_wait_and_a_slow_storage_holds_up_nobody_else() {
    for mut queue in queues() {
        let (open, gate) = channel();
        let slow = queue.add_file(Scripted::new(vec![5; 4096], 1, gated(gate)));
        let quick = queue.add_file(Scripted::new(vec![6; 4096], 1, willing()));
        let arena = Arena::new(8192);
        queue.push(job(0, slow, Op::Read, 0, arena.buffers(&[(0, 512)])));
        queue.submit();
        for tag in 1..10 {
            queue.push(job(tag, quick, Op::Read, 0, arena.buffers(&[(4096, 512)])));
        }
        let mut out = Vec::new();
        while out.len() < 9 {
            wait(&mut queue, Until::Forever, &mut out).unwrap();
        }
        assert_eq!(queue.in_flight(), 1);
        open.send(()).unwrap();
        assert_eq!(ends(&mut queue, 1), [(0, Ok(512))]);
        assert_eq!(arena.get(0, 512), [5; 512]);
    }
}

#[test]
fn dropping_a_queue_waits_for_a_slow_storage() {
    for mut queue in queues() {
        let (open, gate) = channel();
        let storage = Scripted::new(vec![5; 4096], 1, gated(gate));
        let file = queue.add_file(Arc::clone(&storage) as _);
        let arena = Arena::new(4096);
        queue.push(job(0, file, Op::Read, 0, arena.buffers(&[(0, 512)])));
        queue.submit();
        let opener = std::thread::spawn(move || open.send(()));
        drop(queue);
        opener.join().unwrap().unwrap();
        assert_eq!(arena.get(0, 512), [5; 512]);
        assert_eq!(Arc::strong_count(&storage), 1);
        assert_eq!(Arc::strong_count(&arena), 1);
    }
}

#[test]
fn the_bell_ends_a_wait_without_a_completion_and_beside_the_watches() {
    use std::os::fd::AsRawFd;

    use vmm_sys_util::eventfd::EventFd;

    #[expect(unsafe_code, reason = "vmm-sys-util's EventFd lends no BorrowedFd")]
    fn lend(fd: &EventFd) -> BorrowedFd<'_> {
        // SAFETY: open as long as the borrow lives.
        unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
    }
    for mut queue in queues() {
        let [bell, other] = [0, 0].map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap());
        queue.watch_bell(lend(&bell)).unwrap();
        queue.watch(lend(&other), Watch(9)).unwrap();
        let mut out = Vec::new();
        for _ in 0..3 {
            bell.write(1).unwrap();
            assert!(wait(&mut queue, Until::Forever, &mut out).unwrap());
            assert!(out.is_empty(), "{out:?}");
            assert!(!wait(&mut queue, Until::Now, &mut out).unwrap());
        }
        other.write(1).unwrap();
        assert!(!wait(&mut queue, Until::Forever, &mut out).unwrap());
        assert!(matches!(out[..], [Completed::Watch(Watch(9))]), "{out:?}");
    }
}
