//! Power cuts: after any prefix of what was written, with any part of what was not yet synced, the
//! image holds all flushed data and has no cluster that is used twice or not counted.
//!
//! `QCOW2_CRASHES` says how many sequences are run.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::memory::{Event, Memory, put};
use crate::image::Image;
use crate::qcow2::Preallocation;
use crate::qcow2::entry::{self, L2};
use crate::qcow2::header::Header;
use crate::qcow2::image::{Qcow2, Settings};
use crate::qcow2::meta::Lookup;
use crate::qcow2::testing::Bench;

const SECTOR: u64 = 512;

pub(crate) fn open(storage: Arc<Memory>, read_only: bool) -> Qcow2 {
    let header = Header::load(&*storage).unwrap();
    let settings = Settings {
        read_only,
        sync: true,
        punch: true,
        // So little that pages come and go.
        cache: 64 << 10,
    };
    Qcow2::open(header, storage, None, None, settings).unwrap()
}

/// An image made by qemu-img, in memory.
pub(crate) fn blank(options: &str, size: u64) -> Option<Vec<u8>> {
    let bench = Bench::with_qemu()?;
    bench.line(&format!(
        "qemu-img create -q -f qcow2 -o {options} image {size}"
    ));
    Some(std::fs::read(bench.path("image")).unwrap())
}

/// Panics unless every reference is counted and no cluster has two owners.
pub(crate) fn audit(image: &Qcow2) {
    let geometry = *image.geometry();
    let bits = geometry.cluster_bits;
    let mut references: HashMap<u64, u64> = HashMap::new();
    let mut owners: HashSet<u64> = HashSet::new();
    let mut meta = image.lock();
    let header = meta.header.clone();
    let mut claim = |offset: u64, len: u64, what: &str| {
        for cluster in offset >> bits..(offset + len).div_ceil(1 << bits) {
            *references.entry(cluster).or_default() += 1;
            assert!(owners.insert(cluster), "cluster {cluster} twice: {what}");
        }
    };
    claim(0, 1 << bits, "header");
    claim(header.l1_offset, u64::from(header.l1_entries) * 8, "L1");
    let reftable = u64::from(header.reftable_clusters) << bits;
    claim(header.reftable_offset, reftable, "refcount table");
    for block in meta.reftable.clone().into_iter().filter(|b| *b != 0) {
        claim(block, 1 << bits, "refcount block");
    }
    let mut compressed = Vec::new();
    for index in 0..meta.l1.len() {
        let Some(table) = meta.table(index).unwrap() else {
            continue;
        };
        claim(table, 1 << bits, "L2 table");
        for number in 0..geometry.l2_entries() {
            let offset = ((index as u64) << geometry.table_bits()) + (number << bits);
            let Lookup::Page { page, .. } = meta.l2_page(offset, true).unwrap() else {
                panic!("no page");
            };
            let word = meta.place(offset).word;
            match meta.l2_entry(&page, word, offset).unwrap() {
                L2::Data { host, .. } => claim(host, 1 << bits, "data"),
                L2::Zero { host, .. } | L2::Parts { host, .. } => {
                    if let Some(host) = host {
                        claim(host, 1 << bits, "kept");
                    }
                }
                L2::Compressed(at) => compressed.push((at.offset, at.len)),
                L2::Absent => {}
            }
        }
    }
    for (offset, len) in compressed {
        for cluster in offset >> bits..(offset + len).div_ceil(1 << bits) {
            assert!(
                !owners.contains(&cluster),
                "compressed data in cluster {cluster}"
            );
            *references.entry(cluster).or_default() += 1;
        }
    }
    let _ = entry::COPIED;
    for (cluster, count) in references {
        let counted = meta.refcount(cluster).unwrap();
        assert!(
            counted >= count,
            "cluster {cluster} has {count} references and a refcount of {counted}"
        );
    }
}

/// What each sector may read as: the flushed byte, or one that was written later.
struct Model {
    /// How many sectors the disk has at least.
    least: usize,
    now: Vec<u8>,
    allowed: Vec<Vec<u8>>,
}

impl Model {
    fn new(size: u64) -> Self {
        let sectors = usize::try_from(size / SECTOR).unwrap();
        Self {
            least: sectors,
            now: vec![0; sectors],
            allowed: vec![vec![0]; sectors],
        }
    }

    fn set(&mut self, first: u64, count: u64, byte: u8) {
        for sector in first..first + count {
            let sector = usize::try_from(sector).unwrap();
            self.now[sector] = byte;
            self.allowed[sector].push(byte);
        }
    }

    fn flushed(&mut self) {
        for (allowed, now) in self.allowed.iter_mut().zip(&self.now) {
            allowed.clear();
            allowed.push(*now);
        }
    }

    fn check(&self, image: &Qcow2) {
        // A cut within a growth may leave either size.
        let sectors = usize::try_from(image.size() / SECTOR).unwrap();
        assert!(sectors <= self.now.len() && sectors >= self.least);
        let mut bytes = vec![0; sectors * 512];
        image.read(0, &mut bytes).unwrap();
        for (number, (sector, allowed)) in bytes.chunks(512).zip(&self.allowed).enumerate() {
            assert!(
                sector.iter().all(|byte| *byte == sector[0]) && allowed.contains(&sector[0]),
                "sector {number} is {:#x}… and may be {allowed:x?}",
                sector[0]
            );
        }
    }
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) % bound
    }
}

/// Checks the image after power cuts within the events of one operation, some of whose writes are lost.
fn cut(durable: &[u8], pending: &[Event], model: &Model, rng: &mut Rng) {
    for round in 0..3 {
        let mut bytes = durable.to_vec();
        for event in pending {
            let Event::Write(offset, data) = event else {
                continue;
            };
            for (number, sector) in data.chunks(512).enumerate() {
                let keep = match round {
                    0 => true,
                    _ => rng.below(2) == 0,
                };
                if keep {
                    put(&mut bytes, offset + number as u64 * SECTOR, sector);
                }
            }
        }
        let image = open(Memory::new(bytes), false);
        audit(&image);
        model.check(&image);
    }
}

fn act(image: &Qcow2, model: &mut Model, rng: &mut Rng, byte: u8) {
    let sectors = model.now.len() as u64;
    let first = rng.below(sectors);
    let most = [1, 9, 64, 300][usize::try_from(rng.below(4)).unwrap()];
    let count = (1 + rng.below(most)).min(sectors - first);
    let (offset, len) = (first * SECTOR, count * SECTOR);
    match rng.below(9) {
        0..=3 => {
            model.set(first, count, byte);
            let data = vec![byte; usize::try_from(len).unwrap()];
            image.write(offset, &data).unwrap();
        }
        4 => {
            model.set(first, count, 0);
            image.write_zeroes(offset, len, rng.below(2) == 0).unwrap();
        }
        5 => {
            // Whatever it leaves, zeros are allowed, and the old bytes are.
            for sector in first..first + count {
                model.allowed[usize::try_from(sector).unwrap()].push(0);
            }
            image.discard(offset, len).unwrap();
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            image.read(offset, &mut bytes).unwrap();
            for (sector, bytes) in (first..).zip(bytes.chunks(512)) {
                model.now[usize::try_from(sector).unwrap()] = bytes[0];
            }
        }
        8 if sectors < 8192 => {
            let more = 1 + rng.below(1500);
            let grown = usize::try_from(sectors + more).unwrap();
            image
                .resize((sectors + more) * SECTOR, Preallocation::Off)
                .unwrap();
            model.now.resize(grown, 0);
            model.allowed.resize(grown, vec![0]);
            model.least = grown;
            // Growing flushes.
            model.flushed();
        }
        _ => {
            image.flush().unwrap();
            model.flushed();
        }
    }
}

fn sequence(seed: u64, options: &str) {
    let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let size = 256 * 1024 + rng.below(2048) * SECTOR;
    let Some(bytes) = blank(options, size) else {
        return;
    };
    let storage = Memory::new(bytes.clone());
    let image = open(Arc::clone(&storage), false);
    let mut model = Model::new(size);
    let mut durable = bytes;
    let mut pending: Vec<Event> = Vec::new();
    for number in 0..60_u8 {
        let seen = storage.log_len();
        // A cut within an operation may show the bytes of before and of after it.
        let before = Model {
            least: model.least,
            now: model.now.clone(),
            allowed: model.allowed.clone(),
        };
        act(&image, &mut model, &mut rng, number + 1);
        let none = Vec::new();
        let earlier = before.allowed.iter().chain(std::iter::repeat(&none));
        let during = Model {
            least: before.least,
            now: model.now.clone(),
            allowed: earlier
                .zip(&model.allowed)
                .map(|(a, b)| a.iter().chain(b).copied().collect())
                .collect(),
        };
        for event in storage.log().split_off(seen) {
            let sync = matches!(event, Event::Sync);
            pending.push(event);
            if sync {
                for event in pending.drain(..) {
                    if let Event::Write(offset, data) = event {
                        put(&mut durable, offset, &data);
                    }
                }
            }
            if rng.below(3) == 0 {
                cut(&durable, &pending, &during, &mut rng);
            }
        }
        if number % 4 == 0 {
            cut(&durable, &pending, &model, &mut rng);
        }
    }
    drop(image);
    let image = open(Memory::new(storage.bytes()), false);
    audit(&image);
}

const SHAPES: [&str; 8] = [
    "cluster_size=512",
    "cluster_size=4096",
    "cluster_size=64k",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4096,refcount_bits=1",
    "cluster_size=1024,compat=0.10",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=512,refcount_bits=8",
];

#[test]
fn power_cuts_lose_nothing_flushed_and_corrupt_nothing() {
    let count = std::env::var("QCOW2_CRASHES").map_or(8, |text| text.parse().unwrap());
    for seed in 0..count {
        let options = SHAPES[usize::try_from(seed).unwrap() % SHAPES.len()];
        let done = std::panic::catch_unwind(|| sequence(seed + 1, options));
        assert!(done.is_ok(), "sequence {seed} on {options} failed");
    }
}
