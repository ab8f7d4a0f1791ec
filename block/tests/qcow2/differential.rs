//! Random operations, done here and by QEMU's tools in turn, against a model in memory: reads and writes of all kinds,
//! snapshots, sizes, and overlays that are committed or rebased. After each turn the image checks clean and holds what the
//! model does.
//!
//! `QCOW2_SEQUENCES` says how many sequences are run, `QCOW2_SEED` where they begin. A failure names its seed.

use std::path::Path;
use std::sync::Arc;

use block::ops::{Commit, Control, NewBacking, check, commit, rebase};
use block::{ChangeError, Format, Image, NewSnapshot, Preallocation, Qcow2, Repair};

use crate::shape::Shape;
use crate::support::{AnyPath, Rng, marked, open, options, qemu_img, qemu_io, tool};

const SECTOR: u64 = 512;
/// What a bit of the bitmap stands for.
const UNIT: u64 = 64 << 10;

/// One operation on both.
#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
}

fn random_op(rng: &mut Rng, size: u64) -> Op {
    let sectors = size / SECTOR;
    let offset = rng.below(sectors);
    let most = *rng.pick(&[1, 8, 130, 1024, 9000]);
    let len = (1 + rng.below(most)).min(sectors - offset);
    let (offset, len) = (offset * SECTOR, len * SECTOR);
    match rng.below(10) {
        0..=4 => Op::Write(offset, len, 1 + rng.below(255) as u8),
        5 | 6 => Op::Zero(offset, len, rng.below(2) == 0),
        7 | 8 => Op::Discard(offset, len),
        _ => Op::Flush,
    }
}

fn range(offset: u64, len: u64) -> std::ops::Range<usize> {
    offset as usize..(offset + len) as usize
}

fn perform(image: &Arc<dyn Image>, op: &Op, model: &mut [u8]) {
    eprintln!("{op:x?}");
    match *op {
        Op::Write(offset, len, byte) => {
            image.write(offset, &vec![byte; len as usize]).unwrap();
            model[range(offset, len)].fill(byte);
        }
        Op::Zero(offset, len, unmap) => {
            image.write_zeroes(offset, len, unmap).unwrap();
            model[range(offset, len)].fill(0);
        }
        Op::Discard(offset, len) => {
            image.discard(offset, len).unwrap();
            adopt(image, offset, len, model);
        }
        Op::Flush => image.flush().unwrap(),
    }
}

/// After a discard, every byte is what it was or zero.
fn adopt(image: &Arc<dyn Image>, offset: u64, len: u64, model: &mut [u8]) {
    let mut now = vec![0; len as usize];
    image.read(offset, &mut now).unwrap();
    let before = &mut model[range(offset, len)];
    for (at, (old, new)) in before.iter_mut().zip(&now).enumerate() {
        assert!(
            *new == 0 || new == old,
            "byte {at} of a discard at {offset} became {new:#x}"
        );
        *old = *new;
    }
}

fn verify(image: &Arc<dyn Image>, model: &[u8]) {
    let mut now = vec![0; model.len()];
    image.read(0, &mut now).unwrap();
    if let Some(at) = now.iter().zip(model).position(|(a, b)| a != b) {
        panic!(
            "byte {at:#x} is {:#x} and should be {:#x}",
            now[at], model[at]
        );
    }
}

fn with_qemu(directory: &Path, ops: &[Op], model: &mut [u8]) {
    eprintln!("qemu-io {ops:x?}");
    let commands: Vec<String> = ops
        .iter()
        .map(|op| match *op {
            Op::Write(offset, len, byte) => {
                model[range(offset, len)].fill(byte);
                format!("write -P {byte} {offset} {len}")
            }
            Op::Zero(offset, len, unmap) => {
                model[range(offset, len)].fill(0);
                let unmap = if unmap { "-u " } else { "" };
                format!("write -z {unmap}{offset} {len}")
            }
            Op::Discard(offset, len) => format!("discard {offset} {len}"),
            Op::Flush => "flush".to_owned(),
        })
        .collect();
    qemu_io(directory, "image", &commands);
}

/// What the image is to hold.
struct Model {
    now: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    /// Names that have been given.
    named: u32,
    /// What the disk was when its bitmap was added, if it has one.
    marked: Option<Vec<u8>>,
}

impl Model {
    fn resize(&mut self, len: usize) {
        self.now.resize(len, 0);
        if let Some(marked) = &mut self.marked {
            marked.resize(len, 0);
        }
    }

    fn go_back(&mut self, content: Vec<u8>) {
        self.resize(content.len());
        self.now = content;
    }
}

/// One sequence.
struct Sequence<'a> {
    directory: &'a Path,
    shape: &'a Shape,
    rng: Rng,
    model: Model,
}

impl Sequence<'_> {
    fn size(&self) -> u64 {
        self.model.now.len() as u64
    }

    fn qemu_img(&self, args: &[&str]) -> String {
        qemu_img(self.directory, args)
    }

    /// Some reads and writes, and then something larger.
    fn our_turn(&mut self) {
        let path = self.directory.join("image");
        let image = open(&path);
        verify(&image, &self.model.now);
        for _ in 0..1 + self.rng.below(3) {
            for _ in 0..self.rng.below(12) {
                let size = self.size();
                let op = random_op(&mut self.rng, size);
                perform(&image, &op, &mut self.model.now);
            }
            let qcow2 = image.as_qcow2().unwrap();
            match self.rng.below(8) {
                0 | 1 => self.our_compressed(qcow2),
                2 | 3 => self.our_snapshot(qcow2),
                4 => self.our_size(qcow2),
                5 => self.our_bitmap(qcow2),
                _ => {}
            }
            verify(&image, &self.model.now);
        }
        drop(image);
        self.look_at_snapshots(&path);
    }

    fn our_compressed(&mut self, image: &Qcow2) {
        if self.shape.has_data_file() {
            return;
        }
        for _ in 0..1 + self.rng.below(4) {
            let (offset, len) = self.cluster();
            let byte = 1 + self.rng.below(255) as u8;
            eprintln!("compressed {offset:#x} {len:#x} {byte:#x}");
            if image
                .write_compressed(offset, &vec![byte; len as usize])
                .unwrap()
            {
                self.model.now[range(offset, len)].fill(byte);
            }
        }
    }

    /// A cluster of the disk; the last one may be cut off.
    fn cluster(&mut self) -> (u64, u64) {
        let cluster = self.shape.new.cluster_size;
        let offset = self.rng.below(self.size().div_ceil(cluster)) * cluster;
        (offset, cluster.min(self.size() - offset))
    }

    fn new_name(&mut self) -> String {
        self.model.named += 1;
        format!("snapshot{}", self.model.named)
    }

    fn any_snapshot(&mut self) -> Option<usize> {
        let count = self.model.snapshots.len() as u64;
        (count > 0).then(|| self.rng.below(count) as usize)
    }

    fn our_snapshot(&mut self, image: &Qcow2) {
        match (self.rng.below(4), self.any_snapshot()) {
            (0, Some(index)) => {
                let (name, content) = self.model.snapshots[index].clone();
                eprintln!("apply {name}");
                match image.apply_snapshot(&name) {
                    Ok(()) => self.model.go_back(content),
                    // For a moment it takes one reference more.
                    Err(ChangeError::RefcountFull { .. }) => assert!(self.shape.counts_few()),
                    Err(error) => panic!("{error}: {error:?}"),
                }
            }
            (1, Some(index)) => {
                let (name, _) = self.model.snapshots.remove(index);
                eprintln!("delete {name}");
                image.delete_snapshot(&name).unwrap();
            }
            _ => {
                let name = self.new_name();
                let new = NewSnapshot {
                    id: None,
                    name: &name,
                    seconds: 1_700_000_000,
                    nanoseconds: 5,
                };
                let created = image.create_snapshot(new);
                eprintln!("create {name}: {created:?}");
                match created {
                    Ok(_) => {
                        assert!(!self.shape.has_data_file());
                        let content = self.model.now.clone();
                        self.model.snapshots.push((name, content));
                    }
                    Err(ChangeError::DataFile) => assert!(self.shape.has_data_file()),
                    Err(ChangeError::RefcountFull { .. }) => assert!(self.shape.counts_few()),
                    Err(error) => panic!("{error}: {error:?}"),
                }
            }
        }
    }

    /// A new size, and how much of it is not told by a change of size.
    fn new_size(&mut self) -> Option<u64> {
        if self.shape.v2() && !self.model.snapshots.is_empty() {
            return None;
        }
        let most = 2 * self.shape.new.size / SECTOR;
        Some((1 + self.rng.below(most)) * SECTOR)
    }

    fn our_size(&mut self, image: &Qcow2) {
        let Some(size) = self.new_size() else {
            return;
        };
        let how = *self.rng.pick(&[
            Preallocation::Off,
            Preallocation::Off,
            Preallocation::Off,
            Preallocation::Metadata,
            Preallocation::Falloc,
            Preallocation::Full,
        ]);
        eprintln!("resize {size:#x} {how:?}");
        block::ops::resize(image, size, how).unwrap();
        self.model.resize(size as usize);
    }

    fn our_bitmap(&mut self, image: &Qcow2) {
        if self.shape.v2() {
            return;
        }
        if self.model.marked.take().is_some() {
            eprintln!("remove the bitmap");
            image.remove_bitmap("bits").unwrap();
        } else {
            eprintln!("add a bitmap");
            image.add_bitmap("bits", Some(UNIT), true).unwrap();
            self.model.marked = Some(self.model.now.clone());
        }
    }

    fn look_at_snapshots(&mut self, path: &Path) {
        let Some(index) = self.any_snapshot() else {
            return;
        };
        let (name, content) = &self.model.snapshots[index];
        let mut at = options();
        at.snapshot = Some(name.clone());
        let image = block::open_image(path, &AnyPath, &at).unwrap();
        assert!(image.read_only());
        assert_eq!(image.size(), content.len() as u64);
        verify(&image, content);
    }

    fn qemu_turn(&mut self) {
        match self.rng.below(8) {
            0 | 1 => self.qemu_snapshot(),
            2 => self.qemu_size(),
            3 => self.qemu_compressed(),
            4 => self.overlay(),
            _ => self.qemu_writes(),
        }
    }

    fn qemu_writes(&mut self) {
        let count = 1 + self.rng.below(8);
        let size = self.size();
        let ops: Vec<Op> = (0..count).map(|_| random_op(&mut self.rng, size)).collect();
        with_qemu(self.directory, &ops, &mut self.model.now);
        // What qemu-io's discards made of the bytes is QEMU's to say.
        self.take_over(0..size as usize);
    }

    /// What QEMU says of a range, where zeros may have come.
    fn take_over(&mut self, part: std::ops::Range<usize>) {
        self.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "image", "flat"]);
        let flat = std::fs::read(self.directory.join("flat")).unwrap();
        for (now, model) in flat[part.clone()].iter().zip(&mut self.model.now[part]) {
            assert!(*now == 0 || now == model);
            *model = *now;
        }
    }

    fn qemu_compressed(&mut self) {
        if self.shape.has_data_file() {
            return;
        }
        for _ in 0..1 + self.rng.below(4) {
            let (offset, len) = self.cluster();
            let byte = 1 + self.rng.below(255) as u8;
            let command = format!("write -c -P {byte} {offset} {len}");
            let words = ["-f", "qcow2", "-c", &command, "image"];
            match tool(self.directory, "qemu-io", &words) {
                Ok(_) => self.model.now[range(offset, len)].fill(byte),
                // It never overwrites a cluster that is not shared.
                Err(error) => assert!(error.contains("Input/output error"), "{error}"),
            }
        }
    }

    fn qemu_snapshot(&mut self) {
        if self.shape.has_data_file() || self.shape.new.refcount_bits == 1 {
            return;
        }
        match (self.rng.below(4), self.any_snapshot()) {
            // Not with a bitmap in use.
            (0, Some(index)) if self.model.marked.is_none() => {
                let (name, content) = self.model.snapshots[index].clone();
                match tool(
                    self.directory,
                    "qemu-img",
                    &["snapshot", "-a", &name, "image"],
                ) {
                    Ok(_) => self.model.go_back(content),
                    Err(error) => {
                        assert!(self.shape.counts_few(), "{error}");
                        self.give_leaks_back();
                    }
                }
            }
            (1, Some(index)) => {
                let (name, _) = self.model.snapshots.remove(index);
                self.qemu_img(&["snapshot", "-d", &name, "image"]);
            }
            _ => {
                let name = self.new_name();
                let words = ["snapshot", "-c", &name, "image"];
                if let Err(error) = tool(self.directory, "qemu-img", &words) {
                    assert!(self.shape.counts_few(), "{error}");
                    self.give_leaks_back();
                    return;
                }
                let content = self.model.now.clone();
                self.model.snapshots.push((name, content));
            }
        }
    }

    /// QEMU leaves what it had counted before it gave up. Its own repair forgets all snapshots of an image that has bitmaps.
    fn give_leaks_back(&self) {
        let path = self.directory.join("image");
        let mend = Some(Repair::Leaks);
        let report = check(&path, &AnyPath, Format::Qcow2, mend, true, &mut |_| ()).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0));
    }

    fn qemu_size(&mut self) {
        let Some(size) = self.new_size() else {
            return;
        };
        let old = self.size();
        let text = size.to_string();
        let words = ["resize", "-q", "--shrink", "-f", "qcow2", "image", &text];
        if let Err(error) = tool(self.directory, "qemu-img", &words) {
            // It cannot hide what a longer backing file has there.
            assert!(
                self.shape.v2() && self.shape.has_backing() && size > old,
                "{error}"
            );
            return;
        }
        self.model.resize(size as usize);
        if size > old {
            // In the cluster that the disk ended in, it may leave what was there.
            let cluster = self.shape.new.cluster_size;
            let end = old.next_multiple_of(cluster).min(size);
            self.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "image", "flat"]);
            let flat = std::fs::read(self.directory.join("flat")).unwrap();
            let tail = range(old, end - old);
            self.model.now[tail.clone()].copy_from_slice(&flat[tail.clone()]);
            if let Some(marked) = &mut self.model.marked {
                marked[tail.clone()].copy_from_slice(&flat[tail]);
            }
        }
    }

    /// Writes to an overlay, which is then committed, or loses its backing file.
    fn overlay(&mut self) {
        if self.shape.new.data_file_raw {
            return;
        }
        let (ours, rebased) = (self.rng.below(2) == 0, self.rng.below(2) == 0);
        let cluster = 1_u64 << (9 + self.rng.below(9));
        let options = format!("cluster_size={cluster}");
        let words = ["create", "-q", "-f", "qcow2", "-b", "image", "-F", "qcow2"];
        self.qemu_img(&[&words[..], &["-o", &options, "top"]].concat());
        let mut content = self.model.now.clone();
        let top = open(&self.directory.join("top"));
        for _ in 0..1 + self.rng.below(8) {
            let op = random_op(&mut self.rng, content.len() as u64);
            perform(&top, &op, &mut content);
        }
        if self.rng.below(3) == 0 {
            let size = (1 + self.rng.below(2 * self.shape.new.size / SECTOR)) * SECTOR;
            let top = top.as_qcow2().unwrap();
            top.resize(size, Preallocation::Off).unwrap();
            content.resize(size as usize, 0);
        }
        verify(&top, &content);
        drop(top);
        self.qemu_img(&["check", "-q", "-f", "qcow2", "top"]);
        if rebased {
            self.lose_backing(ours);
        } else if self.shape.v2()
            && !self.model.snapshots.is_empty()
            && content.len() > self.model.now.len()
        {
            // The image below cannot grow.
            return;
        } else {
            // QEMU cannot hide what a longer backing file has there.
            let grows = self.shape.v2() && content.len() > self.model.now.len();
            self.commit(ours || grows && self.shape.has_backing());
            let longer = content.len().max(self.model.now.len());
            self.model.resize(longer);
            self.model.now[..content.len()].copy_from_slice(&content);
        }
        self.qemu_img(&["check", "-q", "-f", "qcow2", "top"]);
        let top = open(&self.directory.join("top"));
        verify(&top, &content);
    }

    fn commit(&self, ours: bool) {
        if !ours {
            self.qemu_img(&["commit", "-q", "-f", "qcow2", "top"]);
            return;
        }
        let how = Commit {
            path: &self.directory.join("top"),
            options: &options(),
            base: None,
            keep: false,
            threads: 2,
            rate: None,
        };
        commit(&how, &AnyPath, &Control::none()).unwrap();
    }

    fn lose_backing(&self, ours: bool) {
        if !ours {
            self.qemu_img(&["rebase", "-q", "-f", "qcow2", "-b", "", "top"]);
            return;
        }
        let path = self.directory.join("top");
        let none: Option<&NewBacking> = None;
        rebase(&path, &AnyPath, &options(), none, 2, &Control::none()).unwrap();
    }

    /// Whatever is not as it was when the bitmap was added is marked.
    fn judge_bitmap(&self) {
        let Some(before) = &self.model.marked else {
            return;
        };
        let ranges = marked(self.directory, "bits");
        let is_marked = |at| {
            ranges
                .iter()
                .any(|(offset, len)| (*offset..offset + len).contains(&at))
        };
        let unit = UNIT as usize;
        let units = self.model.now.chunks(unit).zip(before.chunks(unit));
        for (number, (now, before)) in units.enumerate() {
            let offset = (number * unit) as u64;
            assert!(
                now == before || is_marked(offset),
                "{offset:#x} is not in {ranges:x?}"
            );
        }
    }

    /// The image as QEMU sees it, and as our own check does.
    fn judge(&self) {
        self.qemu_img(&["check", "-q", "-f", "qcow2", "image"]);
        let path = self.directory.join("image");
        let mut findings = Vec::new();
        let mut sink = |finding| findings.push(finding);
        let report = check(&path, &AnyPath, Format::Qcow2, None, true, &mut sink).unwrap();
        let found = (report.check_errors, report.corruptions, report.leaks);
        assert_eq!(found, (0, 0, 0), "{findings:?}");
        std::fs::write(self.directory.join("flat"), &self.model.now).unwrap();
        self.qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", "image", "flat"]);
        let info = self.qemu_img(&["info", "-f", "qcow2", "--output=json", "image"]);
        assert!(!info.contains("in-use"), "{info}");
        let has_bitmap = info.contains("\"bits\"");
        assert_eq!(has_bitmap, self.model.marked.is_some(), "{info}");
        self.judge_bitmap();
        for (name, content) in &self.model.snapshots {
            assert!(info.contains(&format!("\"{name}\"")), "{info}");
            let snapshot = format!("snapshot.name={name}");
            let words = [
                "convert", "-l", &snapshot, "-f", "qcow2", "-O", "raw", "image", "flat",
            ];
            self.qemu_img(&words);
            let mut flat = std::fs::read(self.directory.join("flat")).unwrap();
            // QEMU shows it with the size that the disk has now.
            let both = content.len().min(self.model.now.len());
            flat.resize(both, 0);
            assert!(flat == content[..both], "snapshot {name}");
        }
    }
}

fn sequence(seed: u64) {
    let mut rng = Rng::new(seed);
    let shape = Shape::random(&mut rng);
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let now = shape.make(directory, &mut rng);
    let mut sequence = Sequence {
        directory,
        shape: &shape,
        rng,
        model: Model {
            now,
            snapshots: Vec::new(),
            named: 0,
            marked: None,
        },
    };
    for _ in 0..2 + sequence.rng.below(4) {
        sequence.our_turn();
        sequence.judge();
        if sequence.rng.below(3) != 0 {
            sequence.qemu_turn();
            sequence.judge();
        }
    }
    if shape.new.data_file_raw {
        // Whatever the tables say, the data file is the disk.
        let data = std::fs::read(directory.join("data")).unwrap();
        let zeros = std::iter::repeat(&0);
        assert!(
            data.iter()
                .chain(zeros)
                .zip(&sequence.model.now)
                .all(|(a, b)| a == b)
        );
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn random_sequences_read_as_the_model_and_check_clean() {
    let first = number("QCOW2_SEED", 1);
    for seed in first..first + number("QCOW2_SEQUENCES", 10) {
        if std::panic::catch_unwind(|| sequence(seed)).is_err() {
            let shape = Shape::random(&mut Rng::new(seed));
            panic!("sequence {seed} failed: {shape:?}");
        }
    }
}
