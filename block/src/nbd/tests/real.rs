//! Disks on servers of others.

use std::sync::Arc;
use std::thread;

use super::server::{SIZE, Server, contents, each};
use crate::nbd::NbdError;
use crate::testing::{AnyPath, Arena, finish, perform, request};
use crate::{Buffers, Cache, Discard, Disk, DiskOptions, IoQueue, NbdDisk, Op};

/// A small generator of numbers that are always the same (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// A part of a disk with what it should hold. Parts are worked on from several queues at once.
struct Part {
    start: u64,
    model: Vec<u8>,
    numbers: Numbers,
    unit: usize,
}

impl Part {
    fn new(disk: &dyn Disk, start: u64, len: usize) -> Self {
        Self {
            start,
            model: vec![0; len],
            numbers: Numbers(start + 88_172_645_463_325_252),
            unit: disk.info().logical_block as usize,
        }
    }

    /// A range within one of `count` equal slots, in bytes from the start of the part.
    fn range(&mut self, slot: usize, count: usize) -> (usize, usize) {
        let units = self.model.len() / count / self.unit;
        let below =
            |numbers: &mut Numbers, n: usize| usize::try_from(numbers.below(n as u64)).unwrap();
        let first = below(&mut self.numbers, units);
        let len = 1 + below(&mut self.numbers, units - first);
        ((slot * units + first) * self.unit, len * self.unit)
    }

    /// One batch of requests that do not touch each other, and what must come of it.
    fn batch(&mut self, queue: &mut dyn IoQueue, arena: &Arc<Arena>, case: &str) {
        const SLOTS: usize = 8;
        let mut reads = Vec::new();
        for slot in 0..SLOTS {
            let (at, len) = self.range(slot, SLOTS);
            let offset = self.start + at as u64;
            // Two pieces, the second at an odd address.
            let cut = self.unit.min(len);
            let pieces = [(at, cut), (at + cut, len - cut)];
            let (op, buffers) = match self.numbers.below(4) {
                0 => {
                    arena.put(at, &vec![0xcc; len]);
                    reads.push((at, len));
                    (Op::Read, arena.buffers(&pieces))
                }
                1 => {
                    self.model[at..at + len].fill(0);
                    let may_unmap = self.numbers.below(2) == 0;
                    let len = len as u64;
                    (Op::WriteZeroes { len, may_unmap }, Buffers::none())
                }
                _ => {
                    let fill = self.numbers.below(251);
                    for (i, byte) in self.model[at..at + len].iter_mut().enumerate() {
                        *byte = u8::try_from((fill + i as u64 / 7) % 251).unwrap();
                    }
                    arena.put(at, &self.model[at..at + len]);
                    (Op::Write, arena.buffers(&pieces))
                }
            };
            queue.push(request(slot as u64, op, offset, buffers));
        }
        queue.push(request(99, Op::Flush, 0, Buffers::none()));
        for (token, result, _) in finish(queue, SLOTS + 1) {
            result.unwrap_or_else(|error| panic!("{case}: request {token}: {error}"));
        }
        for (at, len) in reads {
            assert!(
                arena.get(at, len) == self.model[at..at + len],
                "{case}: {at}, {len}"
            );
        }
    }

    /// Reads all of it.
    fn check(&self, queue: &mut dyn IoQueue, case: &str) {
        let len = self.model.len();
        let arena = Arena::new(len);
        perform(queue, Op::Read, self.start, arena.buffers(&[(0, len)])).unwrap();
        assert!(arena.get(0, len) == self.model, "{case}");
    }
}

fn unmap(cache: Cache) -> DiskOptions {
    DiskOptions {
        cache,
        discard: Discard::Unmap,
        ..DiskOptions::default()
    }
}

/// What one of several workers does with its part of a disk.
fn work(disk: &dyn Disk, worker: u32, case: &str) {
    let len = 1 << 20;
    let mut part = Part::new(disk, u64::from(worker) << 20, len);
    let mut queue = disk.queue(1 + 3 * worker).unwrap();
    let zero = Op::WriteZeroes {
        len: len as u64,
        may_unmap: false,
    };
    perform(queue.as_mut(), zero, part.start, Buffers::none()).unwrap();
    let arena = Arena::new(len);
    for _ in 0..8 {
        part.batch(queue.as_mut(), &arena, case);
    }
    part.check(queue.as_mut(), case);
    // By another queue, which may have another connection.
    drop(queue);
    part.check(disk.queue(1).unwrap().as_mut(), case);
}

#[test]
fn random_requests_from_several_queues_do_on_every_server_what_they_say() {
    let mut modes = [Cache::Writeback, Cache::Writethrough].into_iter().cycle();
    each(|case, server| {
        let cache = modes.next().unwrap();
        let disk = server.open(&unmap(cache));
        let disk = disk.unwrap_or_else(|error| panic!("{case}: {error:?}"));
        assert_eq!(disk.info().size, SIZE, "{case}");
        thread::scope(|scope| {
            for worker in 0..3 {
                let disk = &disk;
                scope.spawn(move || work(disk, worker, case));
            }
        });
    });
}

#[test]
fn a_whole_disk_in_one_request_and_a_discard_of_it_work_on_every_server() {
    each(|case, server| {
        let disk = server.open(&unmap(Cache::Writeback)).unwrap();
        let mut queue = disk.queue(2).unwrap();
        let len = usize::try_from(SIZE).unwrap();
        let arena = Arena::new(2 * len);
        let bytes: Vec<u8> = (0..len)
            .map(|i| u8::try_from(i / 3 % 251).unwrap())
            .collect();
        arena.put(0, &bytes);
        // More pieces than a system call takes.
        let pieces: Vec<_> = (0..2048).map(|i| (i * len / 2048, len / 2048)).collect();
        queue.push(request(1, Op::Write, 0, arena.buffers(&pieces)));
        assert_eq!(finish(queue.as_mut(), 1)[0].2, SIZE, "{case}");
        let back: Vec<_> = pieces.iter().map(|(at, n)| (at + len, *n)).collect();
        queue.push(request(2, Op::Read, 0, arena.buffers(&back)));
        assert_eq!(finish(queue.as_mut(), 1)[0].2, SIZE, "{case}");
        assert!(arena.get(len, len) == bytes, "{case}");
        let discard = Op::Discard { len: SIZE };
        perform(queue.as_mut(), discard, 0, Buffers::none()).unwrap();
        perform(queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap();
    });
}

#[test]
fn what_is_written_is_in_the_servers_file_after_a_flush() {
    let Some(server) = Server::run(&["qemu-nbd", "-t", "-f", "raw", "IMAGE"], false) else {
        return;
    };
    let disk = server.open(&unmap(Cache::Writeback)).unwrap();
    let mut queue = disk.queue(2).unwrap();
    let arena = Arena::new(4096);
    arena.put(0, &[0x5a; 4096]);
    perform(queue.as_mut(), Op::Write, 8192, arena.buffers(&[(0, 4096)])).unwrap();
    perform(queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap();
    let file = contents(&server.image());
    assert_eq!(file[8192..12_288], [0x5a; 4096]);
    assert!(
        file[..8192]
            .iter()
            .chain(&file[12_288..])
            .all(|byte| *byte == 0)
    );
}

#[test]
fn errors_of_the_server_are_those_of_the_requests() {
    let words = ["nbdkit", "--filter=error", "memory", "1M"];
    for (wrong, failing) in [
        ("error-pread=ENOSPC", "read"),
        ("error-pwrite=ENOSPC", "write"),
    ] {
        let rate = wrong.split('=').next().unwrap().to_owned() + "-rate=100%";
        let words = [&words[..], &[wrong, &rate]].concat();
        let Some(server) = Server::run(&words, false) else {
            return;
        };
        let disk = server.open(&unmap(Cache::Writeback)).unwrap();
        let mut queue = disk.queue(2).unwrap();
        let arena = Arena::new(512);
        for (op, name) in [
            (Op::Read, "read"),
            (Op::Write, "write"),
            (Op::Flush, "flush"),
        ] {
            let buffers = match op {
                Op::Flush => Buffers::none(),
                _ => arena.buffers(&[(0, 512)]),
            };
            let code = perform(queue.as_mut(), op, 0, buffers).err();
            let code = code.map(|error| error.raw_os_error().unwrap());
            assert_eq!(code, (name == failing).then_some(libc::ENOSPC), "{name}");
        }
    }
}

#[test]
fn requests_that_wait_end_when_the_server_is_killed() {
    for mode in ["auto", "disable"] {
        let words = [
            "nbdkit",
            "--filter=multi-conn",
            "--filter=delay",
            "memory",
            "1M",
            "delay-read=1000",
            &format!("multi-conn-mode={mode}"),
        ];
        let Some(mut server) = Server::run(&words, false) else {
            return;
        };
        let disk = server.open(&unmap(Cache::Writeback)).unwrap();
        let arena = Arena::new(4096);
        let mut queues = [(); 2].map(|()| disk.queue(8).unwrap());
        for queue in &mut queues {
            for token in 0..4 {
                queue.push(request(token, Op::Read, 0, arena.buffers(&[(0, 512)])));
            }
            queue.push(request(4, Op::Write, 0, arena.buffers(&[(0, 512)])));
            // The write overtakes the reads, so those are with the server.
            assert_eq!(finish(queue.as_mut(), 1)[0].0, 4);
        }
        server.kill();
        for queue in &mut queues {
            for (_, result, _) in finish(queue.as_mut(), 4) {
                assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
            }
            let error = perform(queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO));
        }
    }
}

#[test]
fn a_queue_that_is_dropped_leaves_nothing_at_the_server() {
    let words = [
        "nbdkit",
        "--filter=delay",
        "memory",
        "1M",
        "delay-write=200ms",
    ];
    let Some(server) = Server::run(&words, false) else {
        return;
    };
    let disk = server.open(&unmap(Cache::Writeback)).unwrap();
    let arena = Arena::new(4096);
    arena.put(0, &[7; 512]);
    let mut queue = disk.queue(8).unwrap();
    queue.push(request(1, Op::Write, 0, arena.buffers(&[(0, 512)])));
    queue.submit();
    drop(queue);
    let mut queue = disk.queue(8).unwrap();
    perform(queue.as_mut(), Op::Read, 0, arena.buffers(&[(1024, 512)])).unwrap();
    assert_eq!(arena.get(1024, 512), [7; 512]);
}

#[test]
fn exports_have_names_and_a_wrong_one_is_refused_with_the_servers_words() {
    let words = ["qemu-nbd", "-t", "-f", "raw", "-x", "my disk", "IMAGE"];
    let Some(server) = Server::run(&words, false) else {
        return;
    };
    let options = unmap(Cache::Writeback);
    let disk = NbdDisk::open(&server.uri("my%20disk"), &AnyPath, &options);
    disk.unwrap();
    let error = NbdDisk::open(&server.uri("other"), &AnyPath, &options).unwrap_err();
    let reason = std::error::Error::source(&error).unwrap().to_string();
    assert!(matches!(error, NbdError::Handshake { .. }));
    assert!(
        reason.starts_with("the server has no export 'other': "),
        "{reason}"
    );
}

#[test]
fn an_export_that_is_read_only_or_of_an_odd_size_is_opened_for_reading() {
    let read_only = DiskOptions {
        read_only: true,
        ..DiskOptions::default()
    };
    for words in [
        &["nbdkit", "-r", "memory", "8M"][..],
        &[
            "nbdkit",
            "--filter=truncate",
            "file",
            "IMAGE",
            "truncate=1000",
        ],
        &["qemu-nbd", "-t", "-r", "-f", "raw", "IMAGE"],
    ] {
        let Some(server) = Server::run(words, false) else {
            continue;
        };
        let error = server.open(&DiskOptions::default()).unwrap_err();
        assert!(error.to_string().contains("readonly=on"), "{error}");
        let disk = server.open(&read_only).unwrap();
        let mut queue = disk.queue(1).unwrap();
        let arena = Arena::new(512);
        arena.put(0, &[9; 512]);
        let last = disk.info().size - 512;
        perform(queue.as_mut(), Op::Read, last, arena.buffers(&[(0, 512)])).unwrap();
        assert_eq!(arena.get(0, 512), [0; 512], "{words:?}");
    }
}

#[test]
fn a_foreign_format_is_refused_unless_raw_is_stated() {
    let words = ["nbdkit", "file", "IMAGE"];
    let Some(server) = Server::run(&words, false) else {
        return;
    };
    std::fs::write(server.image(), [&b"QFI\xfb"[..], &[0; 4092]].concat()).unwrap();
    let error = NbdDisk::open(&server.uri(""), &AnyPath, &DiskOptions::default()).unwrap_err();
    assert!(
        matches!(
            error,
            NbdError::Foreign {
                format: "qcow2",
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("format=raw"), "{error}");
    server.open(&DiskOptions::default()).unwrap();
}

#[test]
fn oldstyle_servers_and_missing_ones_are_refused_by_name() {
    if let Some(server) = Server::run(&["nbdkit", "-o", "memory", "1M"], false) {
        let error = server.open(&DiskOptions::default()).unwrap_err();
        let reason = std::error::Error::source(&error).unwrap().to_string();
        assert!(reason.contains("oldstyle"), "{reason}");
    }
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("nbd+unix:///?socket={}/none", dir.path().display());
    let options = DiskOptions::default();
    let error = NbdDisk::open(uri.as_ref(), &AnyPath, &options).unwrap_err();
    assert!(matches!(error, NbdError::Unreachable { .. }));
    assert!(error.to_string().contains(&uri), "{error}");
    let error = NbdDisk::open("nbds://h/x".as_ref(), &AnyPath, &options).unwrap_err();
    let reason = std::error::Error::source(&error).unwrap().to_string();
    assert!(reason.starts_with("TLS is not built in yet"), "{reason}");
}

#[test]
fn watched_descriptors_are_reported_beside_completions() {
    use crate::{Completed, Watch};
    use vmm_sys_util::eventfd::EventFd;
    let Some(server) = Server::run(&["qemu-nbd", "-t", "-f", "raw", "IMAGE"], false) else {
        return;
    };
    let disk = server.open(&DiskOptions::default()).unwrap();
    let mut queue = disk.queue(4).unwrap();
    let bell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    #[expect(unsafe_code, reason = "an EventFd lends no BorrowedFd")]
    // SAFETY: it is open until the end of the test.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&bell)) };
    queue.watch(fd, Watch(5)).unwrap();
    let mut out = Vec::new();
    queue
        .wait(Some(std::time::Duration::ZERO), &mut out)
        .unwrap();
    assert!(out.is_empty());
    for _ in 0..2 {
        bell.write(1).unwrap();
        queue.wait(None, &mut out).unwrap();
        assert!(matches!(out[..], [Completed::Watch(Watch(5))]), "{out:?}");
        out.clear();
    }
    // Not read, and still told only once for each time.
    let arena = Arena::new(512);
    queue.push(request(1, Op::Read, 0, arena.buffers(&[(0, 512)])));
    bell.write(1).unwrap();
    while out.len() < 2 {
        queue.wait(None, &mut out).unwrap();
    }
    let watches = out.iter().filter(|c| matches!(c, Completed::Watch(_)));
    assert_eq!((watches.count(), out.len()), (1, 2));
}
