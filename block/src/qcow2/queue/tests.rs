//! Queues of qcow2 disks: against a model, against each other, and on storages that fail and wait.
//!
//! `QCOW2_ROUNDS` multiplies how long the tests with many queues run.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use proptest::test_runner::{Config, TestRunner};

use super::*;
use crate::disk::Disk;
use crate::image::{Image, Kept};
use crate::options::{Aio, Cache, DetectZeroes, Discard, DiskOptions, Format};
use crate::qcow2::disk::Qcow2Disk;
use crate::qcow2::header::Header;
use crate::qcow2::image::{Qcow2, Settings};
use crate::qcow2::testing::Bench;
use crate::qcow2::tests::crash::{audit, blank};
use crate::queue::tests::{BLOCKS, Differential, ENGINES, Model, acts};
use crate::testing::{AnyPath, Arena, Call, Script, Scripted, finish, perform, request};
use crate::{BackingPolicy, DiskEvent, ImageOptions, Observer, open_disk};

fn options(aio: Aio, cache: Cache) -> ImageOptions {
    ImageOptions {
        disk: DiskOptions {
            aio,
            cache,
            discard: Discard::Unmap,
            format: Some(Format::Qcow2),
            ..DiskOptions::default()
        },
        backing: BackingPolicy::Directory,
        ..ImageOptions::default()
    }
}

fn open(path: &Path, options: &ImageOptions) -> Arc<dyn Disk> {
    open_disk(path, &AnyPath, options).unwrap()
}

/// A disk on an image in memory, and the image.
fn scripted(image: &[u8], aio: Aio, script: Script) -> (Qcow2Disk, Arc<Qcow2>, Arc<Scripted>) {
    let storage = Scripted::new(image.to_vec(), 1, script);
    let settings = Settings {
        read_only: false,
        sync: true,
        punch: true,
        cache: 1 << 20,
    };
    let header = Header::load(&*storage).unwrap();
    let image = Qcow2::open(header, Arc::clone(&storage) as _, None, None, settings).unwrap();
    let image = Arc::new(image);
    let options = options(aio, Cache::Writeback).disk;
    let disk = Qcow2Disk::new(Arc::clone(&image), &options).unwrap();
    (disk, image, storage)
}

/// A backing file's bytes where there is one.
fn below(at: usize) -> u8 {
    u8::try_from(at / 512 % 251).unwrap()
}

/// What the image is made of, and what lies below it.
struct Make {
    options: &'static str,
    /// The formats of the chain below, topmost first.
    chain: &'static [&'static str],
}

impl Make {
    /// Makes the image; what it holds.
    fn create(&self, bench: &Bench) -> Vec<Option<u8>> {
        let size = BLOCKS * 512;
        let mut held = vec![Some(0); usize::try_from(size).unwrap()];
        let mut name = "base".to_owned();
        for (depth, format) in self.chain.iter().enumerate().rev() {
            let below_format = self.chain.get(depth + 1);
            match below_format {
                None if *format == "raw" => {
                    // Shorter than the disk, and no whole number of clusters.
                    let bytes: Vec<u8> = (0..200_000_usize / 512 * 512).map(below).collect();
                    for (slot, byte) in held.iter_mut().zip(&bytes) {
                        *slot = Some(*byte);
                    }
                    std::fs::write(bench.path(&name), bytes).unwrap();
                }
                None => {
                    bench.line(&format!("qemu-img create -q -f {format} {name} {size}"));
                }
                Some(lower) => {
                    let over = format!("layer{depth}");
                    bench.line(&format!(
                        "qemu-img create -q -f {format} -b {name} -F {lower} {over} {size}"
                    ));
                    let byte = u8::try_from(depth + 1).unwrap();
                    let at = 40_960 * (depth + 1);
                    let write = format!("write -P {byte} {at} 8k");
                    bench.run(&["qemu-io", "-f", format, "-c", &write, &over]);
                    held[at..at + 8192].fill(Some(byte));
                    name = over;
                }
            }
        }
        let backing = match self.chain.first() {
            Some(format) => format!("-b {name} -F {format}"),
            None => String::new(),
        };
        let options = self.options;
        bench.line(&format!(
            "qemu-img create -q -f qcow2 -o {options} {backing} image {size}"
        ));
        held
    }
}

fn differential(make: &Make, aio: Aio, cache: Cache, shift: usize, cases: u32) {
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    drop(bench);
    let run = |acts: Vec<_>| {
        let bench = Bench::new();
        let held = make.create(&bench);
        let disk = open(&bench.path("image"), &options(aio, cache));
        if disk.info().logical_block != 512 {
            return Ok(());
        }
        let mut run = Differential {
            queue: disk.queue(8).unwrap(),
            arena: Arena::new(256 << 10),
            model: Model(held),
            shift,
        };
        for act in &acts {
            run.act(act);
        }
        let model = run.model;
        drop((run.queue, disk));
        assert_eq!(bench.qemu_check("image"), 0, "{acts:?}");
        bench.line("qemu-img convert -f qcow2 -O raw image out");
        let bytes = std::fs::read(bench.path("out")).unwrap();
        assert_eq!(bytes.len(), model.0.len());
        assert!(model.agrees(0, &bytes), "as qemu sees it");
        Ok(())
    };
    TestRunner::new(config).run(&acts(), run).unwrap();
}

const PLAIN: Make = Make {
    options: "cluster_size=4k",
    chain: &[],
};

#[test]
fn random_requests_leave_what_a_model_says_on_every_kind_of_image() {
    let table = [
        ("cluster_size=512", &[] as &[_]),
        ("cluster_size=64k", &[]),
        ("cluster_size=4k,refcount_bits=1", &["raw"]),
        ("cluster_size=16k,extended_l2=on", &["raw"]),
        ("cluster_size=4k,compat=0.10", &["qcow2", "raw"]),
        ("cluster_size=4k,preallocation=metadata", &[]),
        ("cluster_size=4k,data_file=data", &[]),
        (
            "cluster_size=64k,lazy_refcounts=on",
            &["qcow2", "qcow2", "raw"],
        ),
    ];
    for (index, (options, chain)) in table.into_iter().enumerate() {
        let make = Make { options, chain };
        differential(&make, ENGINES[index % 2], Cache::Writeback, 1, 6);
    }
}

#[test]
fn random_requests_leave_what_a_model_says_in_every_cache_mode() {
    for aio in ENGINES {
        for cache in [
            Cache::None,
            Cache::Writethrough,
            Cache::Directsync,
            Cache::Unsafe,
        ] {
            let cases = if cache.writeback() { 4 } else { 2 };
            differential(&PLAIN, aio, cache, 3, cases);
        }
        let make = Make {
            options: "cluster_size=4k",
            chain: &["qcow2", "raw"],
        };
        differential(&make, aio, Cache::None, 0, 4);
    }
}

#[test]
fn every_token_comes_back_once_whatever_its_path() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    for aio in ENGINES {
        PLAIN.create(&bench);
        let disk = open(&bench.path("image"), &options(aio, Cache::Writeback));
        let mut queue = disk.queue(3).unwrap();
        let arena = Arena::new(8192);
        let count = 600_u64;
        for token in 0..count {
            let op = match token % 6 {
                0 => Op::Flush,
                1 | 2 => Op::Write,
                3 => Op::Discard { len: 8192 },
                4 => Op::WriteZeroes {
                    len: 100,
                    may_unmap: true,
                },
                _ => Op::Read,
            };
            let buffers = arena.buffers(&[(0, 512), (1024, 4096)]);
            queue.push(request(token, op, token * 409 % 200_000, buffers));
            if token % 7 == 0 {
                queue.submit();
            }
        }
        assert_eq!(queue.in_flight(), 600);
        let mut ended = finish(queue.as_mut(), 600);
        ended.sort_by_key(|(token, ..)| *token);
        for (expected, (token, result, bytes)) in (0..).zip(ended) {
            result.unwrap();
            let moves = matches!(token % 6, 1 | 2 | 5);
            assert_eq!((token, bytes), (expected, if moves { 4608 } else { 0 }));
        }
        assert_eq!(queue.in_flight(), 0);
        drop((queue, disk));
        assert_eq!(bench.qemu_check("image"), 0);
    }
}

/// A script whose data writes wait, each for a word, once it is told to.
fn gated(armed: &Arc<AtomicBool>, gate: Receiver<Option<i32>>) -> Script {
    let (armed, gate) = (Arc::clone(armed), Mutex::new(gate));
    Box::new(move |call| match call {
        Call::Write(_, len) if len >= 8192 && armed.load(Ordering::SeqCst) => gate
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv()
            .unwrap_or_default(),
        _ => None,
    })
}

#[test]
fn a_write_to_clusters_in_flight_waits_for_them_in_its_own_queue_and_in_another() {
    let Some(image) = blank("cluster_size=64k", 1 << 20) else {
        return;
    };
    for aio in ENGINES {
        let (open, gate) = channel();
        let armed = Arc::new(AtomicBool::new(true));
        let (disk, image, _) = scripted(&image, aio, gated(&armed, gate));
        let [mut one, mut other] = [4, 4].map(|depth| disk.queue(depth).unwrap());
        let arena = Arena::new(32 << 10);
        arena.put(0, &[1; 16 << 10]);
        arena.put(16 << 10, &[2; 16 << 10]);
        let first = |token| request(token, Op::Write, 0, arena.buffers(&[(0, 8192)]));
        let second = |token, at| request(token, Op::Write, at, arena.buffers(&[(16 << 10, 4096)]));
        one.push(first(1));
        one.submit();
        one.push(second(2, 8192));
        other.push(second(3, 16 << 10));
        let mut out = Vec::new();
        for queue in [&mut one, &mut other] {
            queue.wait(Some(Duration::ZERO), &mut out).unwrap();
        }
        assert!(out.is_empty(), "{out:?}");
        assert_eq!((one.in_flight(), other.in_flight()), (2, 1));
        drop(open);
        for (_, result, bytes) in finish(one.as_mut(), 2) {
            result.unwrap();
            assert!(bytes >= 4096);
        }
        finish(other.as_mut(), 1).remove(0).1.unwrap();
        let mut bytes = vec![9; 24 << 10];
        image.read(0, &mut bytes).unwrap();
        for (block, byte) in bytes.chunks(4096).zip([1, 1, 2, 0, 2, 0]) {
            assert!(block.iter().all(|b| *b == byte), "{aio:?}");
        }
        drop((one, other, disk));
        audit(&image);
    }
}

#[test]
fn a_wait_ends_with_its_limit_or_a_watch_while_a_thread_is_at_work() {
    let Some(image) = blank("cluster_size=64k", 8 << 20) else {
        return;
    };
    for aio in ENGINES {
        let (open, gate) = channel();
        let armed = Arc::new(AtomicBool::new(true));
        let (disk, _image, _) = scripted(&image, aio, gated(&armed, gate));
        let bell = Mailbox::<()>::new().unwrap();
        let mut queue = disk.queue(4).unwrap();
        queue.watch(bell.bell(), Watch(3)).unwrap();
        // Longer than what is planned by the queue, so a thread writes it.
        let arena = Arena::new(1 << 20);
        let pieces = [(0, 1 << 20); 3];
        queue.push(request(1, Op::Write, 0, arena.buffers(&pieces)));
        let mut out = Vec::new();
        let time = Some(Duration::from_millis(1));
        queue.wait(time, &mut out).unwrap();
        assert!(out.is_empty(), "{out:?}");
        bell.put(());
        queue.wait(None, &mut out).unwrap();
        assert!(matches!(out[..], [Completed::Watch(Watch(3))]), "{out:?}");
        drop(open);
        finish(queue.as_mut(), 1).remove(0).1.unwrap();
    }
}

#[test]
fn a_failed_allocating_write_leaves_what_was_there_and_its_clusters_usable() {
    let Some(image) = blank("cluster_size=64k", 1 << 20) else {
        return;
    };
    for aio in ENGINES {
        let (open, gate) = channel();
        let armed = Arc::new(AtomicBool::new(true));
        let (disk, image, _) = scripted(&image, aio, gated(&armed, gate));
        let mut queue = disk.queue(4).unwrap();
        let arena = Arena::new(128 << 10);
        arena.put(0, &[7; 128 << 10]);
        let whole = || arena.buffers(&[(0, 128 << 10)]);
        open.send(Some(libc::ENOSPC)).unwrap();
        let error = perform(queue.as_mut(), Op::Write, 0, whole()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        let mut bytes = vec![9; 128 << 10];
        image.read(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
        let extent = image.extent(0, 128 << 10).unwrap();
        assert_eq!(extent.kept, Kept::Absent, "it takes no clusters");
        drop(open);
        perform(queue.as_mut(), Op::Write, 0, whole()).unwrap();
        armed.store(false, Ordering::SeqCst);
        perform(queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap();
        image.read(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 7));
        drop((queue, disk));
        audit(&image);
    }
}

#[test]
fn dropping_a_queue_ends_its_plans_and_waits_for_its_threads() {
    let Some(image) = blank("cluster_size=64k", 4 << 20) else {
        return;
    };
    for aio in ENGINES {
        let (open, gate) = channel();
        let armed = Arc::new(AtomicBool::new(true));
        let (disk, image, _) = scripted(&image, aio, gated(&armed, gate));
        let mut queue = disk.queue(4).unwrap();
        let arena = Arena::new(3 << 20);
        arena.put(0, &vec![3; 3 << 20]);
        // A plan, one that parks behind it, and one that a thread writes.
        queue.push(request(0, Op::Write, 0, arena.buffers(&[(0, 8192)])));
        queue.push(request(1, Op::Write, 8192, arena.buffers(&[(0, 8192)])));
        queue.push(request(
            2,
            Op::Write,
            1 << 20,
            arena.buffers(&[(0, 3 << 20)]),
        ));
        queue.submit();
        let opener = thread::spawn(move || while open.send(None).is_ok() {});
        drop(queue);
        assert_eq!(Arc::strong_count(&arena), 1, "{aio:?}");
        let mut bytes = vec![0; 3 << 20];
        image.read(1 << 20, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 3));
        image.read(0, &mut bytes[..8192]).unwrap();
        assert!(bytes[..8192].iter().all(|byte| *byte == 3));
        // Nothing is left in flight.
        let mut queue = disk.queue(4).unwrap();
        perform(
            queue.as_mut(),
            Op::Write,
            0,
            arena.buffers(&[(0, 64 << 10)]),
        )
        .unwrap();
        drop((queue, disk));
        audit(&image);
        drop(image);
        opener.join().unwrap();
    }
}

#[test]
fn a_cluster_that_is_freed_under_a_transfer_is_used_anew_only_after_it() {
    const CLUSTER: u64 = 64 << 10;
    let Some(image) = blank("cluster_size=64k", 4 << 20) else {
        return;
    };
    for (aio, op) in [(Aio::IoUring, Op::Read), (Aio::Threads, Op::Write)] {
        let (open, gate) = channel::<()>();
        let (armed, gate) = (Arc::new(AtomicBool::new(false)), Mutex::new(gate));
        let gating = Arc::clone(&armed);
        let script: Script = Box::new(move |call| {
            let meant = match call {
                Call::Read(_, len) => op == Op::Read && len == 512,
                Call::Write(_, len) => op == Op::Write && len == 512,
                _ => false,
            };
            if meant && gating.load(Ordering::SeqCst) {
                let _ = gate.lock().unwrap().recv();
            }
            None
        });
        let (disk, image, _) = scripted(&image, aio, script);
        let [mut slow, mut other] = [4, 4].map(|depth| disk.queue(depth).unwrap());
        let arena = Arena::new(256 << 10);
        arena.put(0, &[1; 64 << 10]);
        arena.put(64 << 10, &[2; 64 << 10]);
        let mut act = |op, offset, place| {
            let buffers = arena.buffers(&[(place, 64 << 10)]);
            perform(other.as_mut(), op, offset, buffers).unwrap();
        };
        act(Op::Write, 0, 0);
        act(Op::Flush, 0, 0);
        armed.store(true, Ordering::SeqCst);
        slow.push(request(1, op, 0, arena.buffers(&[(128 << 10, 512)])));
        slow.submit();
        act(Op::Discard { len: CLUSTER }, 0, 0);
        for number in 1..40 {
            act(Op::Write, number * CLUSTER, 64 << 10);
            act(Op::Flush, 0, 0);
        }
        drop(open);
        finish(slow.as_mut(), 1).remove(0).1.unwrap();
        if op == Op::Read {
            let got = arena.get(128 << 10, 512);
            assert!(got == [1; 512] || got == [0; 512], "{:?}", &got[..4]);
        }
        for number in 1..40 {
            let mut bytes = vec![0; 64 << 10];
            image.read(number * CLUSTER, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 2), "{aio:?} {number}");
        }
        drop((slow, other, disk));
        audit(&image);
    }
}

#[test]
fn a_cluster_that_was_freed_under_a_transfer_is_no_leak_once_the_image_is_closed() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    bench.line("qemu-img create -q -f qcow2 image 1M");
    bench.run(&["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", "image"]);
    let options = options(Aio::Auto, Cache::Writeback);
    let chain = crate::open::open_chain(&bench.path("image"), &AnyPath, &options);
    let crate::open::Opened::Qcow2(image) = chain.unwrap() else {
        panic!("it is qcow2");
    };
    let mut pins = image.pins();
    let epoch = pins.enter();
    image.discard(0, 64 << 10).unwrap();
    image.flush().unwrap();
    image.flush().unwrap();
    pins.leave(epoch);
    drop(image);
    assert_eq!(bench.qemu_check("image"), 0);
}

/// One of the threads that write to one image: a sixteenth of each 64 KiB are its own.
struct Writer {
    queue: Box<dyn IoQueue>,
    arena: Arc<Arena>,
    number: u64,
    seed: u64,
    /// The byte of each of its blocks; `None` after a failed write.
    model: Vec<Option<u8>>,
}

const WRITERS: u64 = 4;
const UNIT: u64 = 4096;

impl Writer {
    fn random(&mut self, below: u64) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % below
    }

    fn offset(&self, block: usize) -> u64 {
        (block as u64 * WRITERS + self.number) * UNIT
    }

    /// A round of requests to different blocks of its own, and what becomes of them.
    fn round(&mut self, hostile: bool) {
        let depth = 1 + self.random(16);
        let mut blocks: Vec<(usize, Op, u8)> = Vec::new();
        while (blocks.len() as u64) < depth {
            let count = self.model.len() as u64;
            let block = usize::try_from(self.random(count)).unwrap();
            if !blocks.iter().any(|(other, ..)| *other == block) {
                let op = match self.random(10) {
                    0 => Op::WriteZeroes {
                        len: UNIT,
                        may_unmap: true,
                    },
                    1..=3 => Op::Read,
                    _ => Op::Write,
                };
                let byte = u8::try_from(1 + self.random(255)).unwrap();
                blocks.push((block, op, byte));
            }
        }
        for (index, (block, op, byte)) in blocks.iter().enumerate() {
            let place = index * 4096;
            self.arena.put(place, &[*byte; 4096]);
            let pieces = self.arena.buffers(&[(place, 1024), (place + 1024, 3072)]);
            let at = self.offset(*block);
            self.queue.push(request(index as u64, *op, at, pieces));
        }
        for (token, result, _) in finish(self.queue.as_mut(), blocks.len()) {
            let index = usize::try_from(token).unwrap();
            let (block, op, byte) = blocks[index];
            assert!(result.is_ok() || hostile, "{op:?}: {result:?}");
            let slot = &mut self.model[block];
            match (op, result) {
                (Op::Read, Ok(())) => {
                    let got = self.arena.get(index * 4096, 4096);
                    let expected = slot.unwrap_or(got[0]);
                    assert!(got.iter().all(|b| *b == expected), "block {block}");
                }
                (Op::Read, Err(_)) => {}
                (_, Err(_)) => *slot = None,
                (Op::Write, Ok(())) => *slot = Some(byte),
                (_, Ok(())) => *slot = Some(0),
            }
        }
        if self.random(20) == 0 {
            let result = perform(self.queue.as_mut(), Op::Flush, 0, Buffers::none());
            assert!(result.is_ok() || hostile, "{result:?}");
        }
    }
}

/// How much longer than usual the tests with many queues are to run.
fn patience() -> u32 {
    std::env::var("QCOW2_ROUNDS").map_or(1, |times| times.parse().unwrap())
}

/// Lets many queues write to one image at once; `size` bytes of it, and what else it holds is `initial`.
fn contend(
    disk: &dyn Disk,
    image: &dyn Image,
    size: u64,
    rounds: u32,
    hostile: bool,
    initial: &(dyn Fn(u64) -> u8 + Sync),
) {
    let rounds = rounds * patience();
    thread::scope(|scope| {
        let mut writers = Vec::new();
        for number in 0..WRITERS {
            let queue = disk.queue(8).unwrap();
            writers.push(scope.spawn(move || {
                let blocks = usize::try_from(size / UNIT / WRITERS).unwrap();
                let mut writer = Writer {
                    queue,
                    arena: Arena::new(64 << 10),
                    number,
                    seed: 0x9e37_79b9_7f4a_7c15 ^ (number + 1) ^ u64::from(rounds) << 32,
                    model: vec![None; blocks],
                };
                for block in 0..blocks {
                    writer.model[block] = Some(initial(writer.offset(block)));
                }
                for _ in 0..rounds {
                    writer.round(hostile);
                }
                writer
            }));
        }
        // Somebody else discards where nobody writes.
        let mut queue = disk.queue(2).unwrap();
        for round in 0..u64::from(rounds) {
            let arena = Arena::new(64 << 10);
            let at = size + round % 8 * (64 << 10);
            let buffers = arena.buffers(&[(0, 64 << 10)]);
            let written = perform(queue.as_mut(), Op::Write, at, buffers);
            let discard = Op::Discard { len: 64 << 10 };
            let discarded = perform(queue.as_mut(), discard, at, Buffers::none());
            assert!(hostile || written.is_ok() && discarded.is_ok());
        }
        for writer in writers {
            let writer = writer.join().unwrap();
            let known = writer.model.iter().flatten().count();
            assert!(
                known > writer.model.len() / 2,
                "hardly anything was written"
            );
            for (block, byte) in writer.model.iter().enumerate() {
                let mut bytes = [0; 4096];
                image.read(writer.offset(block), &mut bytes).unwrap();
                let expected = byte.unwrap_or(bytes[0]);
                assert!(
                    byte.is_none() || bytes.iter().all(|b| *b == expected),
                    "writer {} block {block}: {byte:?} became {:?}",
                    writer.number,
                    &bytes[..4],
                );
            }
        }
    });
}

#[test]
fn many_queues_allocate_in_the_same_clusters_without_loss() {
    for (options, aio) in [
        ("cluster_size=64k", Aio::IoUring),
        ("cluster_size=64k", Aio::Threads),
        ("cluster_size=16k,extended_l2=on", Aio::IoUring),
        ("cluster_size=512", Aio::Threads),
    ] {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        bench.line(&format!(
            "qemu-img create -q -f qcow2 -o {options} image 20M"
        ));
        let path = bench.path("image");
        let chain =
            crate::open::open_chain(&path, &AnyPath, &tests::options(aio, Cache::Writeback));
        let crate::open::Opened::Qcow2(image) = chain.unwrap() else {
            panic!("it is qcow2");
        };
        let options = tests::options(aio, Cache::Writeback).disk;
        let disk = Qcow2Disk::new(Arc::clone(&image), &options).unwrap();
        contend(&disk, &*image, 16 << 20, 120, false, &|_| 0);
        image.flush().unwrap();
        audit(&image);
        drop((disk, image));
        assert_eq!(bench.qemu_check("image"), 0);
    }
}

#[test]
fn many_queues_copy_from_a_backing_file_without_loss() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    let bytes: Vec<u8> = (0..4 << 20_usize)
        .map(|at| u8::try_from(at / 4096 % 251).unwrap())
        .collect();
    std::fs::write(bench.path("base"), &bytes).unwrap();
    bench.line("qemu-img create -q -f qcow2 -b base -F raw image 5M");
    let path = bench.path("image");
    let options = options(Aio::Auto, Cache::Writeback);
    let chain = crate::open::open_chain(&path, &AnyPath, &options);
    let crate::open::Opened::Qcow2(image) = chain.unwrap() else {
        panic!("it is qcow2");
    };
    let disk = Qcow2Disk::new(Arc::clone(&image), &options.disk).unwrap();
    let initial = |at: u64| u8::try_from(at / 4096 % 251).unwrap();
    contend(&disk, &*image, 4 << 20, 60, false, &initial);
    drop((disk, image));
    assert_eq!(bench.qemu_check("image"), 0);
}

#[test]
fn many_queues_on_a_failing_storage_keep_what_they_were_told_is_written() {
    let Some(blank) = blank("cluster_size=64k", 20 << 20) else {
        return;
    };
    for aio in ENGINES {
        let calls = AtomicU64::new(1);
        let calm = Arc::new(AtomicBool::new(false));
        let peace = Arc::clone(&calm);
        let script: Script = Box::new(move |call| {
            let mut x = calls
                .fetch_add(1, Ordering::Relaxed)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15);
            x ^= x >> 29;
            if x.is_multiple_of(5) {
                thread::yield_now();
            }
            let fails = matches!(call, Call::Write(..) | Call::Sync) && x.is_multiple_of(23);
            let code = [libc::EIO, libc::ENOSPC][usize::try_from(x >> 40 & 1).unwrap()];
            (fails && !peace.load(Ordering::Relaxed)).then_some(code)
        });
        let (disk, image, storage) = scripted(&blank, aio, script);
        contend(&disk, &*image, 16 << 20, 60, true, &|_| 0);
        calm.store(true, Ordering::Relaxed);
        assert!(!image.is_corrupt(), "a failure is no corruption");
        image.flush().unwrap();
        audit(&image);
        drop((disk, image));
        let bench = Bench::new();
        std::fs::write(bench.path("image"), storage.bytes()).unwrap();
        // Leaks are no damage.
        assert!(matches!(bench.qemu_check("image"), 0 | 3));
    }
}

/// Keeps what it hears.
#[derive(Default)]
struct Ear(Mutex<Vec<DiskEvent>>);

impl Observer for Ear {
    fn event(&self, event: &DiskEvent) {
        self.0.lock().unwrap().push(event.clone());
    }
}

#[test]
fn the_threshold_is_one_of_the_image_file_on_every_path() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    for cache in [Cache::Writeback, Cache::Writethrough] {
        bench.line("qemu-img create -q -f qcow2 image 64M");
        let disk = open(&bench.path("image"), &options(Aio::Auto, cache));
        let ear = Arc::new(Ear::default());
        disk.observe(ear.clone());
        let mut queue = disk.queue(1).unwrap();
        let arena = Arena::new(64 << 10);
        let mut write = |at| {
            let buffers = arena.buffers(&[(0, 64 << 10)]);
            perform(queue.as_mut(), Op::Write, at, buffers).unwrap();
            std::mem::take(&mut *ear.0.lock().unwrap())
        };
        assert_eq!(write(32 << 20), []);
        let high = disk.high_water().unwrap();
        assert!((64 << 10..1 << 20).contains(&high), "{high}");
        disk.set_write_threshold(Some(high));
        // Far in the disk, near in the file.
        assert_eq!(write(32 << 20), []);
        let told = write(0);
        let end = disk.high_water().unwrap();
        let event = DiskEvent::WriteThreshold {
            threshold: high,
            offset: end,
        };
        assert_eq!(told, [event], "{cache:?}");
        assert_eq!(write(1 << 20), []);
        // In place, and past it.
        disk.set_write_threshold(Some(high));
        assert_eq!(write(0).len(), 1);
    }
}

#[test]
fn a_corruption_is_told_once_and_stops_writes() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    bench.line("qemu-img create -q -f qcow2 image 64M");
    bench.run(&["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", "image"]);
    let header = Header::load(&bench.storage("image")).unwrap();
    let table = u64::from_be_bytes(
        bench
            .bytes("image", header.l1_offset, 8)
            .try_into()
            .unwrap(),
    );
    let table = table & 0x00ff_ffff_ffff_fe00;
    // The second cluster is said to be where the header is.
    bench.poke(
        "image",
        table + 8,
        &(1_u64 << 63 | header.l1_offset).to_be_bytes(),
    );
    let disk = open(&bench.path("image"), &options(Aio::Auto, Cache::Writeback));
    let ear = Arc::new(Ear::default());
    disk.observe(ear.clone());
    let mut queue = disk.queue(1).unwrap();
    let arena = Arena::new(4096);
    for at in [64 << 10, 0] {
        let result = perform(queue.as_mut(), Op::Write, at, arena.buffers(&[(0, 4096)]));
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EIO), "{at}");
    }
    let told = std::mem::take(&mut *ear.0.lock().unwrap());
    assert!(
        matches!(&told[..], [DiskEvent::Corrupt { message }] if message.contains("metadata")),
        "{told:?}"
    );
    perform(queue.as_mut(), Op::Read, 0, arena.buffers(&[(0, 4096)])).unwrap();
    assert_eq!(arena.get(0, 4096), [1; 4096]);
}

#[test]
fn zeros_that_are_detected_take_no_clusters() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    for (detect_zeroes, takes) in [(DetectZeroes::Off, true), (DetectZeroes::Unmap, false)] {
        bench.line("qemu-img create -q -f qcow2 image 64M");
        let mut options = options(Aio::Auto, Cache::Writeback);
        options.disk.detect_zeroes = detect_zeroes;
        let disk = open(&bench.path("image"), &options);
        let before = disk.high_water().unwrap();
        let mut queue = disk.queue(1).unwrap();
        let arena = Arena::new(256 << 10);
        queue.push(request(
            5,
            Op::Write,
            4096,
            arena.buffers(&[(0, 256 << 10)]),
        ));
        let (_, result, bytes) = finish(queue.as_mut(), 1).remove(0);
        result.unwrap();
        assert_eq!(bytes, 256 << 10);
        assert_eq!(disk.high_water().unwrap() >= before + (256 << 10), takes);
    }
}

#[test]
fn a_read_only_image_reads_and_flushes_and_refuses_changes() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    bench.line("qemu-img create -q -f qcow2 image 1M");
    bench.run(&["qemu-io", "-f", "qcow2", "-c", "write -P 5 0 64k", "image"]);
    let mut options = options(Aio::Auto, Cache::Writeback);
    options.disk.read_only = true;
    let disk = open(&bench.path("image"), &options);
    assert!(disk.info().read_only && !disk.info().discard);
    let mut queue = disk.queue(1).unwrap();
    let arena = Arena::new(8192);
    let mut act = |op, at| perform(queue.as_mut(), op, at, arena.buffers(&[(0, 8192)]));
    act(Op::Read, (64 << 10) - 4096).unwrap();
    act(Op::Flush, 0).unwrap();
    let error = act(Op::Write, 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    assert_eq!(
        act(Op::Read, 1 << 20).unwrap_err().kind(),
        io::ErrorKind::InvalidInput
    );
    assert_eq!(arena.get(4095, 2), [5, 0]);
}

#[test]
fn a_cluster_that_the_file_ends_in_reads_as_zeros_past_its_end() {
    let Some(bench) = Bench::with_qemu() else {
        return;
    };
    for aio in ENGINES {
        for cache in [Cache::Writeback, Cache::None] {
            bench.line("qemu-img create -q -f qcow2 image 1M");
            bench.run(&["qemu-io", "-f", "qcow2", "-c", "write -P 5 0 64k", "image"]);
            let path = bench.path("image");
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            let end = file.metadata().unwrap().len();
            file.set_len(end - (32 << 10) - 100).unwrap();
            let disk = open(&path, &options(aio, cache));
            let mut queue = disk.queue(1).unwrap();
            let arena = Arena::new(64 << 10);
            perform(queue.as_mut(), Op::Read, 0, arena.buffers(&[(0, 64 << 10)])).unwrap();
            let got = arena.get(0, 64 << 10);
            let held = (32 << 10) - 100;
            assert!(
                got[..held].iter().all(|byte| *byte == 5),
                "{aio:?} {cache:?}"
            );
            assert!(
                got[held..].iter().all(|byte| *byte == 0),
                "{aio:?} {cache:?}"
            );
        }
    }
}

#[test]
fn what_has_been_flushed_is_in_the_file_when_the_process_is_gone() {
    let Some(blank) = blank("cluster_size=64k", 20 << 20) else {
        return;
    };
    for aio in ENGINES {
        let (disk, _image, storage) = scripted(&blank, aio, Box::new(|_| None));
        let mut writer = Writer {
            queue: disk.queue(8).unwrap(),
            arena: Arena::new(64 << 10),
            number: 0,
            seed: 0x1234_5678,
            model: vec![Some(0); 1000],
        };
        for round in 0..60 {
            writer.round(false);
            if round % 5 != 4 {
                continue;
            }
            perform(writer.queue.as_mut(), Op::Flush, 0, Buffers::none()).unwrap();
            let (_disk, left, _storage) = scripted(&storage.bytes(), aio, Box::new(|_| None));
            for (block, byte) in writer.model.iter().enumerate() {
                let mut bytes = [0; 4096];
                left.read(writer.offset(block), &mut bytes).unwrap();
                assert!(
                    bytes.iter().all(|b| Some(*b) == *byte),
                    "round {round}: block {block} is {} and should be {byte:?}",
                    bytes[0]
                );
            }
        }
    }
}

/// An image whose one L2 table has two pages, and where that table is.
fn two_pages() -> Option<(Vec<u8>, u64)> {
    let image = blank("cluster_size=64k,preallocation=metadata", 40 << 20)?;
    let (disk, qcow2, _) = scripted(&image, Aio::Threads, Box::new(|_| None));
    let table = qcow2.lock().table(0).unwrap().unwrap();
    drop(disk);
    Some((image, table))
}

#[test]
fn requests_that_need_one_table_have_it_loaded_once_and_move_their_own_data() {
    let Some((image, table)) = two_pages() else {
        return;
    };
    for (aio, op) in [(Aio::IoUring, Op::Read), (Aio::Threads, Op::Write)] {
        let (disk, _, storage) = scripted(&image, aio, Box::new(|_| None));
        let mut queue = disk.queue(8).unwrap();
        let arena = Arena::new(4096);
        for number in 0..8_u64 {
            let place = usize::try_from(number * 512).unwrap();
            let buffers = arena.buffers(&[(place, 512)]);
            queue.push(request(number, op, number * (5 << 20), buffers));
        }
        let ended = finish(queue.as_mut(), 8);
        assert!(ended.iter().all(|(_, result, _)| result.is_ok()));
        drop((queue, disk));
        let calls = storage.calls();
        let in_table =
            |call: &&Call| matches!(call, Call::Read(at, _) if (table..table + 65536).contains(at));
        let loads: Vec<_> = calls.iter().filter(in_table).collect();
        assert_eq!(loads, [&Call::Read(table, 65536)], "{aio:?}");
        let own = |call: &&Call| matches!(call, Call::Read(_, 512) | Call::Write(_, 512));
        assert_eq!(calls.iter().filter(own).count(), 8, "{aio:?}");
    }
}

#[test]
fn a_part_of_a_table_that_cannot_be_read_fails_only_the_requests_that_need_it() {
    let Some((image, table)) = two_pages() else {
        return;
    };
    for (aio, op) in [(Aio::IoUring, Op::Read), (Aio::Threads, Op::Write)] {
        let script: Script = Box::new(move |call| match call {
            Call::Read(at, len) if at <= table + 4096 && table + 4096 < at + len as u64 => {
                Some(libc::EIO)
            }
            _ => None,
        });
        let (disk, _, _) = scripted(&image, aio, script);
        let mut queue = disk.queue(8).unwrap();
        let arena = Arena::new(4096);
        let mut act = |offset| {
            let buffers = arena.buffers(&[(0, 512)]);
            perform(queue.as_mut(), op, offset, buffers).map_err(|error| error.raw_os_error())
        };
        assert_eq!(act(36 << 20), Err(Some(libc::EIO)), "{aio:?}");
        assert_eq!(act(1 << 20), Ok(()), "{aio:?}");
        assert_eq!(act(36 << 20), Err(Some(libc::EIO)), "{aio:?}");
    }
}
