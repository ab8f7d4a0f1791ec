//! Power cuts: after any prefix of what was written, with any part of what was not yet synced, the
//! image holds all flushed data and has no cluster that is used twice or not counted.
//!
//! `QCOW2_CRASHES` says how many sequences are run.

use std::collections::HashMap;
use std::sync::Arc;

use super::memory::{Event, Memory, put};
use crate::image::Image;
use crate::qcow2::Preallocation;
use crate::qcow2::bitmap_table;
use crate::qcow2::entry::{self, L2};
use crate::qcow2::fields::u64_at;
use crate::qcow2::header::Header;
use crate::qcow2::image::{Backing, Qcow2, RawBacking, Settings};
use crate::qcow2::meta::{Meta, read_table};
use crate::qcow2::snapshot_table;
use crate::qcow2::testing::Bench;
use crate::raw::RawImage;
use crate::storage::Storage;

const SECTOR: u64 = 512;

pub(crate) fn open(storage: Arc<Memory>, read_only: bool) -> Qcow2 {
    open_over(storage, read_only, None)
}

/// Opens an image with a raw backing file.
pub(crate) fn open_over(
    storage: Arc<Memory>,
    read_only: bool,
    base: Option<&Arc<Memory>>,
) -> Qcow2 {
    let backing = base.map(|base| {
        let (size, storage) = (base.len().unwrap(), Arc::clone(base) as Arc<dyn Storage>);
        let image = RawImage::new(Arc::clone(&storage), size, true, false);
        Backing::Raw(RawBacking {
            image: Box::new(image),
            storage,
            size,
        })
    });
    let header = Header::load(&*storage).unwrap();
    let settings = Settings {
        read_only,
        sync: true,
        punch: true,
        // So little that pages come and go.
        cache: 64 << 10,
    };
    Qcow2::open(header, storage, None, backing, settings).unwrap()
}

/// An image made by qemu-img, in memory.
pub(crate) fn blank(options: &str, size: u64) -> Option<Vec<u8>> {
    let bench = Bench::with_qemu()?;
    bench.line(&format!(
        "qemu-img create -q -f qcow2 -o {options} image {size}"
    ));
    Some(std::fs::read(bench.path("image")).unwrap())
}

/// What is referred to: each cluster's use, how often, and by which tree last.
struct Audit {
    bits: u32,
    uses: HashMap<u64, (&'static str, u64, usize)>,
    /// Clusters whose entries say that they are not shared.
    sole: Vec<u64>,
}

impl Audit {
    /// Metadata that only one reference may be to.
    fn own(&mut self, offset: u64, len: u64, what: &'static str) {
        for cluster in offset >> self.bits..(offset + len).div_ceil(1 << self.bits) {
            let other = self.uses.insert(cluster, (what, 1, 0));
            assert!(other.is_none(), "cluster {cluster}: {what} and {other:?}");
        }
    }

    /// What trees may share, though no tree may have it twice; compressed clusters may.
    fn shared(&mut self, offset: u64, len: u64, what: &'static str, tree: usize) {
        for cluster in offset >> self.bits..(offset + len).div_ceil(1 << self.bits) {
            let (used, count, last) = self.uses.entry(cluster).or_insert((what, 0, 0));
            assert_eq!(*used, what, "cluster {cluster}");
            assert!(
                *last != tree || what == "packed",
                "cluster {cluster}: {what} twice"
            );
            (*count, *last) = (*count + 1, tree);
        }
    }

    fn tree(&mut self, meta: &mut Meta, l1: &[u64], tree: usize) {
        let geometry = meta.geometry;
        for &l1_entry in l1 {
            let Some(table) = entry::l1(l1_entry, &geometry).unwrap() else {
                continue;
            };
            self.shared(table, 1 << self.bits, "L2 table", tree);
            if tree == 1 && l1_entry & entry::COPIED != 0 {
                self.sole.push(table >> self.bits);
            }
            let mut bytes = vec![0; 1 << self.bits];
            meta.storage.read_at(&mut bytes, table).unwrap();
            for raw in bytes.chunks_exact(usize::try_from(geometry.entry_size()).unwrap()) {
                let bitmap = if geometry.extended { u64_at(raw, 8) } else { 0 };
                let word = u64_at(raw, 0);
                match entry::l2(word, bitmap, &geometry).unwrap() {
                    L2::Compressed(at) => self.shared(at.offset, at.len, "packed", tree),
                    L2::Absent | L2::Zero { host: None, .. } | L2::Parts { host: None, .. } => {}
                    L2::Data { host, copied }
                    | L2::Zero {
                        host: Some(host),
                        copied,
                    }
                    | L2::Parts {
                        host: Some(host),
                        copied,
                        ..
                    } => {
                        self.shared(host, 1 << self.bits, "data", tree);
                        if tree == 1 && copied {
                            self.sole.push(host >> self.bits);
                        }
                    }
                }
            }
        }
    }
}

/// Panics unless on the disk of an image every reference is counted, no cluster has two uses, and none that is shared
/// counts as not shared.
pub(crate) fn audit(image: &Qcow2) {
    let mut meta = image.lock();
    let meta = &mut *meta;
    let (header, storage) = (meta.header.clone(), Arc::clone(&meta.storage));
    let mut audit = Audit {
        bits: header.cluster_bits,
        uses: HashMap::new(),
        sole: Vec::new(),
    };
    audit.own(0, 1 << audit.bits, "header");
    audit.own(header.l1_offset, u64::from(header.l1_entries) * 8, "L1");
    let reftable = u64::from(header.reftable_clusters) << audit.bits;
    audit.own(header.reftable_offset, reftable, "refcount table");
    for block in meta.reftable.clone().into_iter().filter(|b| *b != 0) {
        audit.own(block, 1 << audit.bits, "refcount block");
    }
    let l1 = read_table(&*storage, header.l1_offset, header.l1_entries as usize).unwrap();
    audit.tree(meta, &l1, 1);
    let (snapshots, len) = snapshot_table::load_with_len(&*storage, &header).unwrap();
    audit.own(header.snapshot_offset, len, "snapshot table");
    for (tree, snapshot) in (2..).zip(snapshots) {
        let (offset, entries) = (snapshot.l1_offset, snapshot.l1_entries);
        audit.own(offset, u64::from(entries) * 8, "snapshot L1");
        let l1 = read_table(&*storage, offset, entries as usize).unwrap();
        audit.tree(meta, &l1, tree);
    }
    if let Some(extension) = header.consistent_bitmaps() {
        let (offset, size) = (extension.directory_offset, extension.directory_size);
        audit.own(offset, size, "bitmap directory");
        for bitmap in
            bitmap_table::load(&*storage, &extension, &meta.geometry, header.size).unwrap()
        {
            let entries = bitmap.table_entries;
            audit.own(bitmap.table_offset, u64::from(entries) * 8, "bitmap table");
            for entry in read_table(&*storage, bitmap.table_offset, entries as usize).unwrap() {
                if let bitmap_table::Bits::At(at) =
                    bitmap_table::bits(entry, &meta.geometry).unwrap()
                {
                    audit.own(at, 1 << audit.bits, "bitmap");
                }
            }
        }
    }
    for (cluster, (what, count, _)) in &audit.uses {
        let counted = meta.refcount(*cluster).unwrap();
        assert!(
            counted >= *count,
            "{what} cluster {cluster} has {count} references and a refcount of {counted}"
        );
    }
    for cluster in audit.sole {
        assert_eq!(audit.uses[&cluster].1, 1, "cluster {cluster} is shared");
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

pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn below(&mut self, bound: u64) -> u64 {
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
                if round == 0 || rng.below(2) == 0 {
                    event.apply_to(&mut bytes);
                }
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
                pending
                    .drain(..)
                    .for_each(|event| event.apply_to(&mut durable));
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
