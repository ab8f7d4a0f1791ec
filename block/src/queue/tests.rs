use std::collections::HashSet;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vmm_sys_util::eventfd::EventFd;

use crate::testing::{AnyPath, Arena, finish, perform, request};
use crate::*;

pub(crate) const ENGINES: [Aio; 2] = [Aio::IoUring, Aio::Threads];

fn image(size: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

fn options(aio: Aio, cache: Cache) -> DiskOptions {
    DiskOptions {
        aio,
        cache,
        discard: Discard::Unmap,
        ..DiskOptions::default()
    }
}

fn open(path: &Path, options: &DiskOptions) -> RawDisk {
    RawDisk::open(path, &AnyPath, options).unwrap()
}

fn invalid(result: std::io::Result<()>) -> bool {
    result.is_err_and(|e| e.kind() == std::io::ErrorKind::InvalidInput)
}

/// One random step of the differential test; numbers are in blocks of 512 bytes.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Read(u64, Vec<usize>),
    Write(u64, Vec<usize>, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
}

pub(crate) const BLOCKS: u64 = 600;

pub(crate) fn acts() -> impl Strategy<Value = Vec<Act>> {
    let pieces = || prop::collection::vec(1_usize..20, 1..8);
    let act = prop_oneof![
        3 => (0..BLOCKS, pieces()).prop_map(|(at, lens)| Act::Read(at, lens)),
        4 => (0..BLOCKS, pieces(), any::<u8>()).prop_map(|(at, lens, b)| Act::Write(at, lens, b)),
        2 => (0..BLOCKS, 1..BLOCKS, any::<bool>()).prop_map(|(at, n, u)| Act::Zero(at, n, u)),
        1 => (0..BLOCKS, 1..BLOCKS).prop_map(|(at, n)| Act::Discard(at, n)),
        1 => Just(Act::Flush),
    ];
    prop::collection::vec(act, 1..40)
}

/// The disk as it should be; `None` is a byte that a discard left open.
pub(crate) struct Model(pub Vec<Option<u8>>);

impl Model {
    fn range(&self, at: u64, len: usize) -> Option<std::ops::Range<usize>> {
        let at = usize::try_from(at * 512).unwrap();
        (at + len <= self.0.len()).then_some(at..at + len)
    }

    pub(crate) fn agrees(&self, at: usize, bytes: &[u8]) -> bool {
        let expected = &self.0[at..at + bytes.len()];
        expected
            .iter()
            .zip(bytes)
            .all(|(e, b)| e.is_none_or(|e| e == *b))
    }
}

pub(crate) struct Differential {
    pub queue: Box<dyn IoQueue>,
    pub arena: Arc<Arena>,
    pub model: Model,
    /// Moves buffers off alignment, so that direct I/O must bounce.
    pub shift: usize,
}

impl Differential {
    fn places(&self, lens: &[usize]) -> (Vec<(usize, usize)>, usize) {
        let mut at = self.shift;
        let places: Vec<_> = lens
            .iter()
            .map(|n| {
                let place = (at, n * 512);
                at += n * 512 + 4096 - (n * 512) % 4096;
                place
            })
            .collect();
        (places, lens.iter().sum::<usize>() * 512)
    }

    pub(crate) fn act(&mut self, act: &Act) {
        match act {
            Act::Read(at, lens) => {
                let (places, len) = self.places(lens);
                let buffers = self.arena.buffers(&places);
                let result = perform(self.queue.as_mut(), Op::Read, at * 512, buffers);
                let Some(range) = self.model.range(*at, len) else {
                    return assert!(invalid(result));
                };
                result.unwrap();
                let got: Vec<u8> = places
                    .iter()
                    .flat_map(|(offset, len)| self.arena.get(*offset, *len))
                    .collect();
                assert!(self.model.agrees(range.start, &got), "{act:?}");
            }
            Act::Write(at, lens, byte) => {
                let (places, len) = self.places(lens);
                let data: Vec<u8> = (0..len)
                    .map(|i| u8::try_from(i % 253).unwrap() ^ byte)
                    .collect();
                let mut from = 0;
                for (offset, len) in &places {
                    self.arena.put(*offset, &data[from..from + len]);
                    from += len;
                }
                let buffers = self.arena.buffers(&places);
                let result = perform(self.queue.as_mut(), Op::Write, at * 512, buffers);
                let Some(range) = self.model.range(*at, len) else {
                    return assert!(invalid(result));
                };
                result.unwrap();
                for (slot, byte) in self.model.0[range].iter_mut().zip(data) {
                    *slot = Some(byte);
                }
            }
            Act::Zero(at, blocks, may_unmap) => {
                let op = Op::WriteZeroes {
                    len: blocks * 512,
                    may_unmap: *may_unmap,
                };
                self.range_op(op, *at, *blocks, Some(0));
            }
            Act::Discard(at, blocks) => {
                self.range_op(Op::Discard { len: blocks * 512 }, *at, *blocks, None);
            }
            Act::Flush => {
                perform(self.queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap();
            }
        }
    }

    fn range_op(&mut self, op: Op, at: u64, blocks: u64, becomes: Option<u8>) {
        let result = perform(self.queue.as_mut(), op, at * 512, Buffers::none());
        let len = usize::try_from(blocks * 512).unwrap();
        let Some(range) = self.model.range(at, len) else {
            return assert!(invalid(result));
        };
        result.unwrap();
        self.model.0[range].fill(becomes);
    }
}

fn differential(aio: Aio, cache: Cache, shift: usize, cases: u32) {
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let size = BLOCKS * 512;
    TestRunner::new(config)
        .run(&acts(), |acts| {
            let file = image(size);
            let disk = open(file.path(), &options(aio, cache));
            if disk.info().logical_block != 512 {
                return Ok(());
            }
            let mut run = Differential {
                queue: disk.queue(8).unwrap(),
                arena: Arena::new(256 << 10),
                model: Model(vec![Some(0); usize::try_from(size).unwrap()]),
                shift,
            };
            for act in &acts {
                run.act(act);
            }
            let bytes = std::fs::read(file.path()).unwrap();
            assert_eq!(bytes.len(), run.model.0.len());
            assert!(run.model.agrees(0, &bytes), "the file's own bytes");
            Ok(())
        })
        .unwrap();
}

#[test]
fn random_requests_leave_what_a_model_says_with_io_uring() {
    differential(Aio::IoUring, Cache::Writeback, 1, 60);
    differential(Aio::IoUring, Cache::Unsafe, 0, 10);
    differential(Aio::IoUring, Cache::Writethrough, 0, 3);
}

#[test]
fn random_requests_leave_what_a_model_says_with_threads() {
    differential(Aio::Threads, Cache::Writeback, 1, 60);
    differential(Aio::Threads, Cache::Unsafe, 0, 10);
    differential(Aio::Threads, Cache::Writethrough, 0, 3);
}

#[test]
fn random_requests_leave_what_a_model_says_with_direct_io_and_bounces() {
    for aio in ENGINES {
        differential(aio, Cache::None, 0, 5);
        differential(aio, Cache::None, 1, 8);
        differential(aio, Cache::Directsync, 7, 2);
    }
}

#[test]
fn requests_outside_the_disk_are_invalid() {
    let file = image(4096);
    for aio in ENGINES {
        let disk = open(file.path(), &options(aio, Cache::Writeback));
        let mut queue = disk.queue(1).unwrap();
        let arena = Arena::new(1024);
        for offset in [4096 - 512, 4096, u64::MAX - 511, u64::MAX] {
            for op in [
                Op::Read,
                Op::Write,
                Op::Discard { len: 1024 },
                Op::WriteZeroes {
                    len: u64::MAX,
                    may_unmap: false,
                },
            ] {
                let result = perform(queue.as_mut(), op, offset, arena.buffers(&[(0, 1024)]));
                assert!(invalid(result), "{aio:?} {op:?} at {offset}");
            }
        }
        assert_eq!(file.as_file().metadata().unwrap().len(), 4096);
    }
}

#[test]
fn a_read_only_disk_refuses_changes_and_flushes_and_reads() {
    let file = image(4096);
    for aio in ENGINES {
        let disk = open(
            file.path(),
            &DiskOptions {
                read_only: true,
                ..options(aio, Cache::Writethrough)
            },
        );
        assert!(disk.info().read_only && !disk.info().discard);
        let mut queue = disk.queue(4).unwrap();
        let arena = Arena::new(512);
        for op in [
            Op::Write,
            Op::Discard { len: 512 },
            Op::WriteZeroes {
                len: 512,
                may_unmap: true,
            },
        ] {
            let error = perform(queue.as_mut(), op, 0, arena.buffers(&[(0, 512)])).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{op:?}");
        }
        perform(queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap();
        perform(queue.as_mut(), Op::Read, 0, arena.buffers(&[(0, 512)])).unwrap();
    }
}

#[test]
fn direct_io_refuses_offsets_between_blocks() {
    let file = image(1 << 16);
    for aio in ENGINES {
        let disk = open(file.path(), &options(aio, Cache::None));
        let mut queue = disk.queue(4).unwrap();
        let arena = Arena::new(1 << 16);
        for (offset, len) in [(1, 512), (0, 100), (256, 512)] {
            let buffers = arena.buffers(&[(0, len)]);
            assert!(invalid(perform(queue.as_mut(), Op::Read, offset, buffers)));
        }
    }
}

#[test]
fn more_bounced_requests_than_buffers_all_end() {
    let file = image(1 << 20);
    for aio in ENGINES {
        let disk = open(file.path(), &options(aio, Cache::None));
        let mut queue = disk.queue(256).unwrap();
        let arena = Arena::new((1 << 20) + 4096);
        for i in 0..100_u64 {
            let at = 1 + usize::try_from(i).unwrap() * 4096;
            arena.put(at, &[u8::try_from(i).unwrap(); 4096]);
            queue.push(request(
                i,
                Op::Write,
                i * 4096,
                arena.buffers(&[(at, 4096)]),
            ));
        }
        assert_eq!(queue.in_flight(), 100);
        for (_, result, bytes) in finish(queue.as_mut(), 100) {
            result.unwrap();
            assert_eq!(bytes, 4096);
        }
        let bytes = std::fs::read(file.path()).unwrap();
        assert!((0..100).all(|i| {
            bytes[i * 4096..(i + 1) * 4096]
                .iter()
                .all(|b| usize::from(*b) == i)
        }));
    }
}

#[test]
fn every_token_comes_back_once_beyond_the_depth() {
    let file = image(1 << 20);
    for aio in ENGINES {
        let disk = open(file.path(), &options(aio, Cache::Writeback));
        let mut queue = disk.queue(3).unwrap();
        let arena = Arena::new(4096);
        for token in 0..500 {
            let op = match token % 4 {
                0 => Op::Flush,
                1 => Op::Write,
                2 => Op::Discard { len: 0 },
                _ => Op::Read,
            };
            let buffers = arena.buffers(&[(0, 4096)]);
            queue.push(request(token, op, (token % 100) * 4096, buffers));
            if token % 7 == 0 {
                queue.submit();
            }
        }
        let tokens: HashSet<_> = finish(queue.as_mut(), 500)
            .into_iter()
            .map(|(token, result, _)| {
                result.unwrap();
                token
            })
            .collect();
        assert_eq!(tokens.len(), 500);
        assert_eq!(queue.in_flight(), 0);
    }
}

#[test]
fn many_queues_of_one_disk_keep_apart() {
    const SHARE: u64 = 1 << 20;
    let file = image(4 * SHARE);
    for aio in ENGINES {
        let disk = open(file.path(), &options(aio, Cache::Writeback));
        thread::scope(|scope| {
            for share in 0..4_u64 {
                let mut queue = disk.queue(16).unwrap();
                scope.spawn(move || {
                    let arena = Arena::new(64 << 10);
                    for round in 0..16_u64 {
                        for i in 0..16_u64 {
                            let place = usize::try_from(i * 4096).unwrap();
                            let byte = u8::try_from(share * 60 + round).unwrap();
                            arena.put(place, &[byte; 4096]);
                            let at = share * SHARE + (round * 16 + i) * 4096;
                            let buffers = arena.buffers(&[(place, 4096)]);
                            queue.push(request(i, Op::Write, at, buffers));
                        }
                        for (_, result, _) in finish(queue.as_mut(), 16) {
                            result.unwrap();
                        }
                        perform(queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap();
                    }
                });
            }
        });
        let bytes = std::fs::read(file.path()).unwrap();
        for (i, block) in bytes.chunks(4096).enumerate() {
            let expected = (i / 256) * 60 + (i % 256) / 16;
            assert!(
                block.iter().all(|b| usize::from(*b) == expected),
                "{aio:?} block {i}"
            );
        }
    }
}

/// Keeps memory and counts its own end.
struct Owner {
    _memory: Arc<Arena>,
    ended: Arc<AtomicUsize>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.ended.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
#[expect(unsafe_code, reason = "makes buffers with an owner that counts")]
fn dropping_a_queue_waits_for_its_requests_and_lets_go_of_their_memory() {
    let file = image(64 << 20);
    for aio in ENGINES {
        for cache in [Cache::Writeback, Cache::None] {
            let disk = open(file.path(), &options(aio, cache));
            let mut queue = disk.queue(32).unwrap();
            let arena = Arena::new(1 << 20);
            arena.put(0, &vec![0xab; 1 << 20]);
            let ended = Arc::new(AtomicUsize::new(0));
            for i in 0..32_u64 {
                let pieces = arena.buffers(&[(0, 1 << 20)]);
                let owner = Owner {
                    _memory: Arc::clone(&arena),
                    ended: Arc::clone(&ended),
                };
                // SAFETY: the owner keeps the arena.
                let buffers = unsafe { Buffers::from_slice(pieces.pieces(), Arc::new(owner)) };
                queue.push(request(i, Op::Write, i << 20, buffers));
            }
            queue.submit();
            // Another thread may do it.
            thread::spawn(move || drop(queue)).join().unwrap();
            assert_eq!(ended.load(Ordering::SeqCst), 32, "{aio:?} {cache:?}");
            let mut block = vec![0; 4096];
            for i in 0..32 {
                file.as_file().read_exact_at(&mut block, i << 20).unwrap();
                assert!(block.iter().all(|b| *b == 0xab), "{aio:?} {cache:?} {i}");
            }
            file.as_file().set_len(0).unwrap();
            file.as_file().set_len(64 << 20).unwrap();
        }
    }
}

#[test]
fn a_queue_moves_between_threads_with_its_watches() {
    let file = image(1 << 20);
    for aio in ENGINES {
        let disk = open(file.path(), &options(aio, Cache::Writeback));
        let bell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut queue = disk.queue(4).unwrap();
        queue.watch(borrow(&bell), Watch(5)).unwrap();
        let arena = Arena::new(4096);
        for _ in 0..3 {
            queue = thread::scope(|scope| {
                let handle = scope.spawn(|| {
                    let mut out = Vec::new();
                    bell.write(1).unwrap();
                    queue.wait(None, &mut out).unwrap();
                    assert!(matches!(out[..], [Completed::Watch(Watch(5))]), "{out:?}");
                    bell.read().unwrap();
                    perform(queue.as_mut(), Op::Read, 0, arena.buffers(&[(0, 4096)])).unwrap();
                    queue
                });
                handle.join().unwrap()
            });
        }
    }
}

#[test]
fn a_watch_is_reported_beside_completions_and_once_for_each_ring() {
    let file = image(1 << 20);
    for aio in ENGINES {
        let disk = open(file.path(), &options(aio, Cache::Writeback));
        let mut queue = disk.queue(4).unwrap();
        let bells: Vec<_> = (0..20)
            .map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap())
            .collect();
        for (i, bell) in (0..).zip(&bells) {
            queue.watch(borrow(bell), Watch(i)).unwrap();
        }
        let mut out = Vec::new();
        queue
            .wait(Some(std::time::Duration::ZERO), &mut out)
            .unwrap();
        assert!(out.is_empty(), "{aio:?} {out:?}");
        for round in 0..3 {
            let mut seen = HashSet::new();
            for bell in &bells {
                bell.write(1).unwrap();
            }
            while seen.len() < bells.len() {
                queue.wait(None, &mut out).unwrap();
                for completed in out.drain(..) {
                    let Completed::Watch(Watch(i)) = completed else {
                        panic!("{completed:?}");
                    };
                    assert!(seen.insert(i), "{aio:?} round {round}: {i} twice");
                    bells[usize::try_from(i).unwrap()].read().unwrap();
                }
            }
        }
        // All quiet: a limit ends the wait, and nothing is reported again.
        let time = std::time::Duration::from_millis(1);
        queue.wait(Some(time), &mut out).unwrap();
        assert!(out.is_empty(), "{aio:?} {out:?}");
        assert_eq!(queue.in_flight(), 0);
    }
}

#[expect(unsafe_code, reason = "vmm-sys-util's EventFd lends no BorrowedFd")]
fn borrow(bell: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: open as long as the borrow lives.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(bell.as_raw_fd()) }
}

#[test]
fn discards_and_zeroes_free_space_only_when_asked_to() {
    for aio in ENGINES {
        for (discard, may_unmap, op_is_discard, frees) in [
            (Discard::Unmap, false, true, true),
            (Discard::Ignore, false, true, false),
            (Discard::Unmap, true, false, true),
            (Discard::Unmap, false, false, false),
            (Discard::Ignore, true, false, false),
        ] {
            let file = image(1 << 20);
            file.as_file().write_all_at(&vec![1; 1 << 20], 0).unwrap();
            file.as_file().sync_all().unwrap();
            let before = file.as_file().metadata().unwrap().blocks();
            let options = DiskOptions {
                discard,
                ..options(aio, Cache::Writeback)
            };
            let disk = open(file.path(), &options);
            assert_eq!(disk.info().discard, discard == Discard::Unmap);
            let mut queue = disk.queue(1).unwrap();
            let len = 1 << 20;
            let op = if op_is_discard {
                Op::Discard { len }
            } else {
                Op::WriteZeroes { len, may_unmap }
            };
            perform(queue.as_mut(), op, 0, Buffers::none()).unwrap();
            file.as_file().sync_all().unwrap();
            let after = file.as_file().metadata().unwrap().blocks();
            assert_eq!(after < before, frees, "{aio:?} {discard:?} {op:?}");
            assert_eq!(file.as_file().metadata().unwrap().len(), 1 << 20);
        }
    }
}

#[test]
fn writes_of_zeros_become_holes_only_as_detect_zeroes_says() {
    for aio in ENGINES {
        for (detect_zeroes, discard, frees) in [
            (DetectZeroes::Off, Discard::Unmap, false),
            (DetectZeroes::On, Discard::Unmap, false),
            (DetectZeroes::Unmap, Discard::Ignore, false),
            (DetectZeroes::Unmap, Discard::Unmap, true),
        ] {
            let file = image(1 << 20);
            file.as_file().write_all_at(&vec![1; 1 << 20], 0).unwrap();
            file.as_file().sync_all().unwrap();
            let before = file.as_file().metadata().unwrap().blocks();
            let options = DiskOptions {
                detect_zeroes,
                discard,
                ..options(aio, Cache::Writeback)
            };
            let disk = open(file.path(), &options);
            let mut queue = disk.queue(2).unwrap();
            let arena = Arena::new((1 << 20) + 4096);
            let buffers = arena.buffers(&[(0, 4096), (4096, (1 << 20) - 8192)]);
            queue.push(request(0, Op::Write, 4096, buffers));
            // One byte of these is none.
            arena.put((1 << 20) + 4095, &[1]);
            let buffers = arena.buffers(&[(1 << 20, 4096)]);
            queue.push(request(1, Op::Write, 0, buffers));
            for (token, result, bytes) in finish(queue.as_mut(), 2) {
                result.unwrap();
                assert_eq!(
                    bytes,
                    [(1 << 20) - 4096, 4096][usize::try_from(token).unwrap()]
                );
            }
            let bytes = std::fs::read(file.path()).unwrap();
            assert_eq!(bytes[4095], 1);
            assert!(
                bytes.iter().filter(|byte| **byte != 0).count() == 1,
                "{aio:?}"
            );
            file.as_file().sync_all().unwrap();
            let after = file.as_file().metadata().unwrap().blocks();
            assert_eq!(
                after < before,
                frees,
                "{aio:?} {detect_zeroes:?} {discard:?}"
            );
        }
    }
}

#[test]
fn a_full_file_system_gives_its_error_and_the_disk_lives_on() {
    // The host refuses to grow a file beyond the limit of a process, so this runs in its own.
    const CHILD: &str = "VIREO_BLOCK_TEST_FILE_LIMIT";
    if std::env::var_os(CHILD).is_none() {
        let name = "queue::tests::a_full_file_system_gives_its_error_and_the_disk_lives_on";
        let out = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        return assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
    }
    let file = image(1 << 20);
    for aio in ENGINES {
        let disk = open(file.path(), &options(aio, Cache::Writeback));
        let mut queue = disk.queue(4).unwrap();
        limit_file_size(64 << 10);
        let arena = Arena::new(8192);
        let write = |queue: &mut dyn IoQueue, offset| {
            perform(queue, Op::Write, offset, arena.buffers(&[(0, 8192)]))
        };
        let error = write(queue.as_mut(), 128 << 10).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG), "{aio:?}");
        // Cut short by the limit, then refused.
        let error = write(queue.as_mut(), (64 << 10) - 4096).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG), "{aio:?}");
        write(queue.as_mut(), 0).unwrap();
        perform(queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap();
    }
}

#[expect(unsafe_code, reason = "setrlimit and signal have no safe wrapper")]
fn limit_file_size(bytes: u64) {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: valid arguments; ignoring a signal runs no handler.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
    }
}

#[test]
fn a_file_cut_behind_the_disks_back_ends_reads_with_an_error() {
    let file = image(1 << 16);
    for aio in ENGINES {
        let disk = open(file.path(), &options(aio, Cache::Writeback));
        let mut queue = disk.queue(1).unwrap();
        file.as_file().set_len(4096).unwrap();
        let arena = Arena::new(8192);
        let result = perform(queue.as_mut(), Op::Read, 0, arena.buffers(&[(0, 8192)]));
        assert_eq!(
            result.unwrap_err().kind(),
            std::io::ErrorKind::UnexpectedEof
        );
        file.as_file().set_len(1 << 16).unwrap();
    }
}

#[test]
fn requests_survive_the_end_of_the_thread_that_sent_them() {
    let file = image(32 << 20);
    for aio in ENGINES {
        for cache in [Cache::Writeback, Cache::None] {
            let disk = open(file.path(), &options(aio, cache));
            let mut queue = disk.queue(32).unwrap();
            let arena = Arena::new(1 << 20);
            let mut queue = thread::scope(|scope| {
                let sender = scope.spawn(|| {
                    for i in 0..32_u64 {
                        let buffers = arena.buffers(&[(0, 1 << 20)]);
                        queue.push(request(i, Op::Write, i << 20, buffers));
                    }
                    queue.submit();
                    queue
                });
                sender.join().unwrap()
            });
            for (token, result, bytes) in finish(queue.as_mut(), 32) {
                result.unwrap_or_else(|e| panic!("{aio:?} {cache:?} {token}: {e}"));
                assert_eq!(bytes, 1 << 20);
            }
        }
    }
}

#[test]
fn data_lost_at_one_queues_flush_fails_the_flushes_of_all_but_an_unsafe_disk() {
    let file = image(1 << 16);
    for aio in ENGINES {
        for (cache, expected) in [
            (Cache::Writeback, Some(libc::EIO)),
            (Cache::Writethrough, Some(libc::EIO)),
            (Cache::Unsafe, None),
        ] {
            let disk = open(file.path(), &options(aio, cache));
            let mut queues = [disk.queue(1).unwrap(), disk.queue(1).unwrap()];
            for queue in &mut queues {
                perform(queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap();
            }
            disk.lose_data();
            for queue in &mut queues {
                let result = perform(queue.as_mut(), Op::Flush, 0, Buffers::none());
                let code = result.err().and_then(|e| e.raw_os_error());
                assert_eq!(code, expected, "{aio:?} {cache:?}");
            }
        }
    }
}

/// A loop device over a file; `None` where the host has none to give.
struct Loop(String);

impl Loop {
    fn new(path: &Path) -> Option<Self> {
        let out = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(path)
            .output()
            .ok()?;
        if !out.status.success() {
            eprintln!("no loop device here, block devices are not tested: {out:?}");
            return None;
        }
        Some(Self(
            String::from_utf8(out.stdout).unwrap().trim().to_owned(),
        ))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_block_device_has_its_size_and_takes_every_request() {
    let file = image(4 << 20);
    let Some(device) = Loop::new(file.path()) else {
        return;
    };
    for aio in ENGINES {
        for cache in [Cache::Writeback, Cache::None] {
            let disk = open(Path::new(&device.0), &options(aio, cache));
            let info = disk.info();
            assert_eq!(info.size, 4 << 20);
            assert!(info.logical_block >= 512 && info.physical_block >= info.logical_block);
            let mut queue = disk.queue(4).unwrap();
            let arena = Arena::new(128 << 10);
            arena.put(0, &[0x77; 64 << 10]);
            let mut act = |op, offset, place| {
                let buffers = arena.buffers(&[(place, 64 << 10)]);
                perform(queue.as_mut(), op, offset, buffers).unwrap();
            };
            act(Op::Write, 1 << 20, 0);
            act(Op::Write, 2 << 20, 0);
            act(Op::Flush, 0, 0);
            act(Op::Read, 1 << 20, 64 << 10);
            assert_eq!(arena.get(64 << 10, 64 << 10), vec![0x77; 64 << 10]);
            for may_unmap in [false, true] {
                act(Op::Write, 1 << 20, 0);
                let len = 64 << 10;
                act(Op::WriteZeroes { len, may_unmap }, 1 << 20, 0);
                act(Op::Read, 1 << 20, 64 << 10);
                assert_eq!(arena.get(64 << 10, 64 << 10), vec![0; 64 << 10]);
            }
            // A discarded loop device punches holes, which read as zeros.
            act(Op::Discard { len: 64 << 10 }, 2 << 20, 0);
            act(Op::Read, 2 << 20, 64 << 10);
            assert_eq!(arena.get(64 << 10, 64 << 10), vec![0; 64 << 10]);
            // Part of a sector is left alone.
            if cache == Cache::Writeback {
                act(Op::Discard { len: 100 }, 700, 0);
            }
        }
    }
}
