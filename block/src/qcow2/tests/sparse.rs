//! Images that claim far more than is in their files: what they cost goes by what is there.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::image::Image;
use crate::qcow2::check::{self, CheckError};
use crate::qcow2::entry::COPIED;
use crate::qcow2::header::Header;
use crate::qcow2::image::{Qcow2, Settings};
use crate::qcow2::repair::{Repair, repair};
use crate::qcow2::testing::Bench;
use crate::storage::{FileStorage, Storage};

/// The most bytes that any of these may make anybody read.
const LITTLE: u64 = 4 << 20;

/// A file whose reads are counted, in bytes.
#[derive(Debug)]
struct Counted {
    file: FileStorage,
    read: AtomicU64,
}

impl Storage for Counted {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(buf, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.zero(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(offset, len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.reserve(offset, len)
    }

    fn grows_zeroed(&self) -> bool {
        self.file.grows_zeroed()
    }

    fn extent(&self, offset: u64, max: u64) -> (u64, bool) {
        self.file.extent(offset, max)
    }

    fn host_file(&self) -> Option<&Arc<crate::file::HostFile>> {
        self.file.host_file()
    }
}

/// An image that is made by hand.
struct Crafted {
    bench: Bench,
    cluster_bits: u32,
    snapshots: u32,
    bitmaps: Option<(u32, u64)>,
    reftable_clusters: u32,
    /// What is at which offset, besides the header.
    parts: Vec<(u64, Vec<u8>)>,
    len: u64,
}

/// Where the snapshot table, or the bitmap directory, of a crafted image is.
const TABLE: u64 = 16 << 20;

impl Crafted {
    fn new(cluster_bits: u32, len: u64) -> Self {
        Self {
            bench: Bench::new(),
            cluster_bits,
            snapshots: 0,
            bitmaps: None,
            reftable_clusters: 1,
            parts: Vec::new(),
            len,
        }
    }

    /// With snapshots whose L1 tables have 32 MiB each, every `step` bytes.
    fn with_snapshots(count: u32, step: u64) -> Self {
        let start = 64 << 20;
        let mut image = Self::new(9, start + u64::from(count) * step.max(1) + (32 << 20));
        let mut table = Vec::new();
        for number in 0..u64::from(count) {
            table.extend((start + number * step).to_be_bytes());
            table.extend((4_u32 << 20).to_be_bytes());
            table.extend([0, 8, 0, 0]);
            table.extend([0; 20]);
            table.extend(16_u32.to_be_bytes());
            table.extend([0; 16]);
            table.extend(number.to_be_bytes());
        }
        image.snapshots = count;
        image.parts.push((TABLE, table));
        image
    }

    /// With bitmaps that nobody has saved, whose tables have 64 MiB each.
    fn with_bitmaps(count: u32) -> Self {
        let start = 64 << 20;
        let mut image = Self::new(9, start + (u64::from(count) << 26));
        let mut directory = Vec::new();
        for number in 0..u64::from(count) {
            directory.extend((start + (number << 26)).to_be_bytes());
            directory.extend((8_u32 << 20).to_be_bytes());
            directory.extend(1_u32.to_be_bytes());
            directory.extend([1, 16, 0, 8, 0, 0, 0, 0]);
            directory.extend((number | 1 << 62).to_be_bytes());
        }
        image.bitmaps = Some((count, directory.len() as u64));
        image.parts.push((TABLE, directory));
        image
    }

    fn header(&self) -> Vec<u8> {
        let cluster = 1_u64 << self.cluster_bits;
        let mut header = vec![0x51, 0x46, 0x49, 0xfb];
        header.extend(3_u32.to_be_bytes());
        header.extend([0; 12]);
        header.extend(self.cluster_bits.to_be_bytes());
        header.extend(cluster.to_be_bytes());
        header.extend([0; 4]);
        header.extend(1_u32.to_be_bytes());
        header.extend((3 * cluster).to_be_bytes());
        header.extend((4 * cluster).to_be_bytes());
        header.extend(self.reftable_clusters.to_be_bytes());
        header.extend(self.snapshots.to_be_bytes());
        let table = if self.snapshots == 0 { 0 } else { TABLE };
        header.extend(table.to_be_bytes());
        header.extend([0; 16]);
        header.extend(u64::from(self.bitmaps.is_some()).to_be_bytes());
        header.extend(4_u32.to_be_bytes());
        header.extend(104_u32.to_be_bytes());
        if let Some((count, size)) = self.bitmaps {
            header.extend(0x2385_2875_u32.to_be_bytes());
            header.extend(24_u32.to_be_bytes());
            header.extend(count.to_be_bytes());
            header.extend([0; 4]);
            header.extend(size.to_be_bytes());
            header.extend(TABLE.to_be_bytes());
        }
        header
    }

    fn storage(&self) -> Arc<Counted> {
        let cluster = 1 << self.cluster_bits;
        let file = self.bench.storage("image");
        file.set_len(self.len).unwrap();
        file.write_at(&self.header(), 0).unwrap();
        // What everything hangs on is counted.
        let block = u64::to_be_bytes(2 * cluster);
        file.write_at(&block, 4 * cluster).unwrap();
        file.write_at(&[0, 1].repeat(5), 2 * cluster).unwrap();
        for (offset, bytes) in &self.parts {
            file.write_at(bytes, *offset).unwrap();
        }
        Arc::new(Counted {
            file,
            read: AtomicU64::new(0),
        })
    }
}

fn open(storage: &Arc<Counted>, read_only: bool) -> io::Result<Qcow2> {
    let header = Header::load(&**storage).unwrap();
    let settings = Settings {
        read_only,
        sync: true,
        punch: false,
        cache: 1 << 20,
    };
    Qcow2::open(header, Arc::clone(storage) as _, None, None, settings)
}

/// Opens, checks and repairs; what the check says.
#[track_caller]
fn costs_little(storage: &Arc<Counted>) -> Result<check::CheckReport, CheckError> {
    for read_only in [true, false] {
        let image = open(storage, read_only).unwrap();
        let _mapped = image.written(0, 1 << 40);
    }
    let checked = check::check(&**storage, &mut |_| ());
    let _repaired = repair(&**storage, Repair::Leaks, &mut |_| ());
    let read = storage.read.load(Ordering::Relaxed);
    assert!(read <= LITTLE, "{read} bytes were read");
    checked
}

#[test]
fn snapshots_whose_tables_are_holes_cost_nothing_and_are_not_believed() {
    let storage = Crafted::with_snapshots(3000, 32 << 20).storage();
    let checked = costs_little(&storage);
    assert!(
        matches!(checked, Err(CheckError::Hollow { .. })),
        "{checked:?}"
    );
    let image = open(&storage, false).unwrap();
    assert!(!image.is_corrupt(), "no table lies over another");
    assert!(image.lock().metadata.contains((64 << 20) / 512));
    let end = image.lock().metadata.end();
    assert_eq!(end, ((64 << 20) + (3000 << 25)) / 512);
}

#[test]
fn a_guest_cannot_write_to_a_snapshots_table_that_is_a_hole() {
    let mut image = Crafted::with_snapshots(2, 32 << 20);
    image.cluster_bits = 16;
    // The disk's one cluster is in the midst of the second table, and counts as used.
    let (target, cluster) = (112_u64 << 20, 1_u64 << 16);
    let entry = |offset: u64| (offset | COPIED).to_be_bytes().to_vec();
    image.parts.push((3 * cluster, entry(5 * cluster)));
    image.parts.push((5 * cluster, entry(target)));
    image.parts.push((2 * cluster, [0, 1].repeat(6)));
    image
        .parts
        .push((2 * cluster + target / cluster * 2, vec![0, 1]));
    let storage = image.storage();
    let image = open(&storage, false).unwrap();
    image.read(0, &mut [0; 512]).unwrap();
    assert!(image.write(0, &[7; 512]).is_err());
    assert!(image.is_corrupt());
    let mut bytes = [1; 512];
    storage.file.read_at(&mut bytes, target).unwrap();
    assert_eq!(bytes, [0; 512]);
}

#[test]
fn snapshots_whose_tables_lie_over_each_other_are_read_once() {
    let storage = Crafted::with_snapshots(3000, 512).storage();
    let report = costs_little(&storage).unwrap();
    assert!(report.corruptions > 0, "their clusters are not counted");
    assert!(open(&storage, false).unwrap().is_corrupt());
}

#[test]
fn bitmaps_whose_tables_are_holes_cost_nothing_and_are_not_believed() {
    let storage = Crafted::with_bitmaps(300).storage();
    let checked = costs_little(&storage);
    assert!(
        matches!(checked, Err(CheckError::Hollow { .. })),
        "{checked:?}"
    );
}

#[test]
fn a_bitmap_directory_in_a_hole_is_refused_at_its_first_entry() {
    let mut image = Crafted::new(9, 1 << 30);
    image.bitmaps = Some((1, 64 << 20));
    let storage = image.storage();
    let refused = open(&storage, false).unwrap_err();
    assert!(
        refused.to_string().contains("bitmap directory"),
        "{refused}"
    );
    assert!(check::check(&*storage, &mut |_| ()).is_err());
    let read = storage.read.load(Ordering::Relaxed);
    assert!(read <= LITTLE, "{read} bytes were read");
}

#[test]
fn refcount_blocks_and_l2_tables_that_are_holes_are_not_read() {
    // 2 MiB each, and a place for 500 of either.
    let mut image = Crafted::new(21, 2000 << 21);
    let places = |from: u64| (from..from + 500).flat_map(|at| (at << 21).to_be_bytes());
    image.parts.push(((4 << 21) + 8, places(100).collect()));
    image.parts.push((3 << 21, places(900).collect()));
    let storage = image.storage();
    let checked = check::check(&*storage, &mut |_| ());
    let report = checked.unwrap();
    assert!(report.corruptions >= 500, "{report:?}");
    let read = storage.read.load(Ordering::Relaxed);
    assert!(read <= 2 * LITTLE, "{read} bytes were read");
    let image = open(&storage, true).unwrap();
    let before = storage.read.load(Ordering::Relaxed);
    let _mapped = image.written(0, 1 << 40);
    let read = storage.read.load(Ordering::Relaxed) - before;
    assert!(read <= 2 * LITTLE, "{read} bytes were read");
}
