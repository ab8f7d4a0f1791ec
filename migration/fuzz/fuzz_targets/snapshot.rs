//! Any bytes as what a snapshot says: its manifest, its sections, and the indexes of a chain of files of memory.
//!
//! What is taken is whole: a manifest and a set of sections are the same when they are written and read again. Whatever indexes say of
//! memory that there is, nothing outside it is read or given; what is mapped lies in it and in the file, in no more pieces than asked for; and what a
//! chain holds is the same when it has been written to one file, compressed or not.
//!
//! The first byte of an input says how many snapshots there are, the second the most pieces. Then comes of each, the newest first, the length of its index
//! in two bytes, and the index; what is left is a manifest and a set of sections.
#![no_main]

use std::cell::OnceCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use migration::manifest::Manifest;
use migration::pages::{CHUNK, Layer, Layers, PAGE, PageIndex, PageWriter};
use migration::{SavedState, Section, SectionSet};

/// RAM: the second range is half a chunk.
const RANGES: [(u64, u64); 2] = [(0, 4 << 20), (1 << 32, 1 << 20)];
const FILE: u64 = 5 << 20;
const MOST: usize = 4;
const MACHINE: &str = "vireo-dev";

thread_local! {
    /// Pages that differ from each other, in files that differ.
    static FILES: OnceCell<Vec<File>> = const { OnceCell::new() };
    static FLAT: OnceCell<File> = const { OnceCell::new() };
}

fn file() -> File {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(FILE).expect("room");
    file
}

fn files() -> Vec<File> {
    let fill = |layer: u64| {
        let file = file();
        for page in 0..FILE / PAGE {
            let byte = (page * 3 + layer * 7 + 1) as u8;
            file.write_all_at(&[byte; 9], page * PAGE).expect("room");
        }
        file
    };
    (0..MOST as u64).map(fill).collect()
}

/// That a range of guest memory is RAM.
fn is_ram(start: u64, len: u64) -> bool {
    let end = start.checked_add(len).expect("no address is past the last");
    RANGES
        .iter()
        .any(|(first, ram)| *first <= start && end <= first + ram)
}

fn decoded(body: &[u8]) -> Option<PageIndex> {
    if body.len() as u64 > PageIndex::longest(&RANGES) {
        return None;
    }
    let section = Section {
        unit: "machine".to_owned(),
        schema: PageIndex::SCHEMA.to_owned(),
        version: PageIndex::VERSION,
        body: body.to_vec(),
    };
    let index = PageIndex::of_section(&section, &RANGES).ok()?;
    assert_eq!(section.decode().ok().as_ref(), Some(&index));
    index.check(&RANGES, FILE).ok()?;
    assert!(index.data() + index.kept() <= index.total());
    Some(index)
}

/// All of memory, which begins as zeros.
#[derive(PartialEq)]
struct Ram(Vec<u8>);

impl Ram {
    fn of(layers: &Layers) -> Option<Self> {
        let mut all = Self(vec![0; FILE as usize]);
        let mut take = |address: u64, bytes: &[u8]| {
            assert!(is_ram(address, bytes.len() as u64));
            let at = if address < RANGES[1].0 {
                address
            } else {
                address - RANGES[1].0 + RANGES[0].1
            };
            let at = at as usize;
            all.0[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        layers.read(&mut take, &mut |_| true).ok()?;
        Some(all)
    }
}

fn chain(indexes: Vec<PageIndex>, most: usize) {
    let layer = |(index, number): (PageIndex, usize)| {
        let file = FILES.with(|files| {
            let files = files.get_or_init(self::files);
            files[number].try_clone().expect("a descriptor")
        });
        let path = PathBuf::from(number.to_string());
        Layer { path, index, file }
    };
    let all = indexes.into_iter().zip(0..).map(layer).collect();
    let Ok(layers) = Layers::new(all) else {
        return;
    };
    if !layers.is_packed() {
        painted(&layers, most);
    }
    let _ = layers.verify(&mut |_| true);
    let Some(ram) = Ram::of(&layers) else {
        return;
    };
    // It is the same in a file that is compressed and in one that is not.
    for packed in [false, true] {
        assert!(Ram::of(&flat(&layers, packed)).is_some_and(|other| other == ram));
    }
}

/// What is mapped lies in memory and in the file.
fn painted(layers: &Layers, most: usize) {
    let painting = layers.paint(most);
    assert!(painting.mapped.len() <= most.max(RANGES.len()));
    for (layer, place) in &painting.mapped {
        assert!(*layer < layers.layers().len() && is_ram(place.start, place.len));
        assert!(place.offset + place.len <= FILE);
    }
    let mut take = |address: u64, bytes: &[u8]| {
        assert!(is_ram(address, bytes.len() as u64));
        Ok(())
    };
    layers
        .copy(&painting, &mut take, &mut || true)
        .expect("files give their bytes");
}

/// All of `layers` in one file.
fn flat(layers: &Layers, packed: bool) -> Layers {
    let flat = FLAT.with(|flat| flat.get_or_init(file).try_clone().expect("a descriptor"));
    flat.set_len(0).expect("room");
    let mut writer = PageWriter::new(&RANGES);
    if packed {
        writer = writer.packed().expect("memory");
    }
    let mut buffer = vec![0xaa; CHUNK as usize];
    for number in 0..writer.count() {
        let there = layers
            .load(number as u32, &mut buffer)
            .expect("it was read before");
        writer.put(number, &flat, &buffer, &there).expect("room");
    }
    let index = writer.finish(&flat).expect("room").expect("all chunks");
    index
        .check(&RANGES, flat.metadata().expect("a file").len())
        .expect("what is written is right");
    let path = PathBuf::from("flat");
    let layer = Layer {
        path,
        index,
        file: flat,
    };
    Layers::new(vec![layer]).expect("it needs no other")
}

fuzz_target!(|input: &[u8]| {
    let [count, most, rest @ ..] = input else {
        return;
    };
    let mut rest = rest;
    let mut indexes = Vec::new();
    for _ in 0..=usize::from(*count) % MOST {
        let [low, high, bytes @ ..] = rest else {
            return;
        };
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(bytes.len());
        let (body, after) = bytes.split_at(len);
        indexes.extend(decoded(body));
        rest = after;
    }
    chain(indexes, usize::from(*most) + 1);
    if let Ok(manifest) = Manifest::parse(rest, MACHINE) {
        let again =
            Manifest::parse(&manifest.to_bytes(), MACHINE).expect("what is written is read");
        assert_eq!(again, manifest);
    }
    if let Ok(set) = SectionSet::from_bytes(rest) {
        assert_eq!(
            SectionSet::from_bytes(&set.to_bytes()).expect("what is written is read"),
            set
        );
    }
});
