//! All that is done to the images of a disk in use, in random sequences, against a plain model: what the disk holds, what each
//! image below it holds, and what its backups hold. Each is read by qemu-img, and the images are checked, after every step.
//!
//! `LIVE_SEEDS` says how many sequences are run, and `LIVE_STEPS` how long they are. `LIVE_SEED` runs one of them alone.

use std::collections::BTreeMap;

use super::backing_up::{full, since};
use super::merging::copy as merge_all;
use super::mirroring::copy as mirror_all;
use super::*;
use crate::live::merge::Merged;
use crate::live::mirror::{Mirror, MirrorTarget};
use crate::live::revert::Revert;

/// How many images a chain has at most.
const DEEP: usize = 6;

/// An image of the chain, and what it holds.
struct Layer {
    name: String,
    format: Format,
    held: Vec<u8>,
}

struct World {
    bench: Bench,
    guest: Guest,
    /// What lies below the disk's own image, the lowest one first.
    below: Vec<Layer>,
    /// The backups, each on the one before unless it is full.
    backups: Vec<Layer>,
    /// Since which backup the bitmap of an image tells what was written: a bitmap belongs to its image, not to the disk.
    tells: BTreeMap<String, usize>,
    made: u32,
    /// What is done next is of this, and not of the guest's: how much the guest does beside a job is a matter of time.
    random: u64,
}

impl World {
    fn new(bench: Bench, seed: u64) -> Self {
        let format = if seed.is_multiple_of(2) {
            Format::Qcow2
        } else {
            Format::Raw
        };
        Self {
            guest: Guest::on(&bench, format, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            bench,
            below: Vec::new(),
            backups: Vec::new(),
            tells: BTreeMap::new(),
            made: 0,
            random: seed,
        }
    }

    fn next(&mut self, below: usize) -> usize {
        self.random = stirred(self.random);
        usize::try_from(self.random >> 33).unwrap() % below
    }

    fn name(&mut self, what: &str) -> String {
        self.made += 1;
        format!("{what}{}", self.made)
    }

    fn own(&self) -> (String, Format) {
        let name = self.guest.path.file_name().unwrap().to_str().unwrap();
        (name.to_owned(), self.guest.options.disk.format.unwrap())
    }

    /// One step; what it was.
    fn step(&mut self) -> String {
        match self.next(10) {
            0 | 1 if self.below.len() < DEEP => self.snapshot(),
            2 if !self.below.is_empty() => self.revert(),
            3 if !self.below.is_empty() => self.stream(),
            4 if !self.below.is_empty() => self.commit(),
            5 if self.below.len() > 1 => self.delete(),
            6 => self.mirror(),
            7 | 8 => self.back_up(),
            _ => self.reopen(),
        }
    }

    fn snapshot(&mut self) -> String {
        let (before, format) = self.own();
        let name = self.name("layer");
        let held = self.guest.snapshot(&self.bench.path(&name));
        self.below.push(Layer {
            name: before,
            format,
            held,
        });
        format!("snapshot {name}")
    }

    fn revert(&mut self) -> String {
        let to = self.next(self.below.len());
        let name = self.below[to].name.clone();
        let path = self.bench.path(&name);
        let guest = &mut self.guest;
        let options = guest.options.clone();
        let found = Revert::of(&*guest.disk, &guest.path, Some(&path), &AnyPath, &options);
        let (cut, emptied) = found.unwrap().finish(&options, &|| true).unwrap();
        guest.disk = cut.disk();
        cut.keep();
        guest.model.clone_from(&self.below[to].held);
        guest.work(2);
        emptied.free();
        self.below.truncate(to + 1);
        format!("revert to {name}")
    }

    fn stream(&mut self) -> String {
        // The one right below is no base: there would be nothing to be taken in.
        let base = self.next(self.below.len());
        let name = base
            .checked_sub(1)
            .map(|base| self.below[base].name.clone());
        let stream = stream(&mut self.guest, &self.bench, name.as_deref());
        stream.name().unwrap();
        self.guest.work(2);
        let cut = stream.finish(&self.guest.options, &|| true).unwrap();
        self.guest.disk = cut.disk();
        cut.keep();
        self.below.truncate(base);
        format!("stream on {name:?}")
    }

    fn commit(&mut self) -> String {
        let base = self.next(self.below.len());
        let Layer { name, format, .. } = self.below.remove(base);
        let mut merge = self.guest.merge(None, Some(&name)).unwrap();
        self.guest.begin(&mut merge);
        merge_all(&mut self.guest, &merge);
        merge.name().unwrap();
        self.guest.finish(merge);
        assert_eq!(self.own(), (name.clone(), format));
        self.below.truncate(base);
        format!("commit to {name}")
    }

    /// Merges images in the middle.
    fn delete(&mut self) -> String {
        let top = 1 + self.next(self.below.len() - 1);
        let base = self.next(top);
        let (from, to) = (self.below[top].name.clone(), self.below[base].name.clone());
        let mut merge = self.guest.merge(Some(&from), Some(&to)).unwrap();
        self.guest.begin(&mut merge);
        merge_all(&mut self.guest, &merge);
        merge.name().unwrap();
        match merge.finish(&|| true).unwrap() {
            Merged::Shorter(cut) => {
                self.guest.disk = cut.disk();
                cut.keep();
            }
            Merged::Base(..) => panic!("the disk's own image was not merged"),
        }
        self.guest.work(2);
        merge.settle().unwrap();
        let held = std::mem::take(&mut self.below[top].held);
        self.below[base].held = held;
        self.below.drain(base + 1..=top);
        format!("merge {from} to {to}")
    }

    fn mirror(&mut self) -> String {
        let name = self.name("place");
        let format = self.format();
        let target = MirrorTarget {
            path: self.bench.path(&name),
            format,
            existing: false,
        };
        let guest = &mut self.guest;
        let disk = Arc::clone(&guest.disk);
        let mirror = Mirror::of(disk, target, opener(), &guest.options);
        let mut mirror = mirror.unwrap();
        mirror_all(guest, &mirror);
        guest.disk = mirror.finish(&|| true).unwrap();
        guest.path = self.bench.path(&name);
        guest.options.disk.format = Some(format);
        self.below.clear();
        format!("mirror to {name}")
    }

    fn format(&mut self) -> Format {
        if self.next(2) == 0 {
            Format::Raw
        } else {
            Format::Qcow2
        }
    }

    /// On the backup before if there is a bitmap that tells what was written since that.
    fn back_up(&mut self) -> String {
        let name = self.name("backup");
        let (own, _) = self.own();
        let before = self.guest.bitmap().filter(|it| !it.broken);
        let before = before.and_then(|_| self.backups.get(*self.tells.get(&own)?));
        let before = before.map(|backup| (backup.name.clone(), backup.format));
        let (request, format, told) = match &before {
            Some((base, format)) => {
                let request = since(&self.bench, &name, Some((base, *format)));
                (request, Format::Qcow2, "incremental")
            }
            None => {
                let format = self.format();
                (full(&self.bench, &name, format, true), format, "full")
            }
        };
        let held = self.guest.backed_up(request);
        let told = format!("{told} backup {name}");
        self.tells.insert(own, self.backups.len());
        self.backups.push(Layer { name, format, held });
        told
    }

    /// Closes the disk, looks at everything, and opens it again.
    fn reopen(&mut self) -> String {
        self.look();
        "reopen".to_owned()
    }

    fn look(&mut self) {
        let guest = &mut self.guest;
        guest.holds_its_model();
        // There is nothing in its place for an instant: another disk that is not used.
        let path = self.bench.path("nothing");
        fs::write(&path, vec![0; 512]).unwrap();
        let mut raw = guest.options.clone();
        raw.disk.format = Some(Format::Raw);
        guest.disk = open_disk(&path, &AnyPath, &raw).unwrap();
        let (name, format) = self.own();
        let below = self.below.iter().chain(&self.backups);
        let all = below.map(|layer| (layer.name.as_str(), layer.format, &layer.held));
        for (name, format, held) in all.chain([(name.as_str(), format, &self.guest.model)]) {
            if format == Format::Qcow2 {
                assert_eq!(self.bench.qemu_check(name), 0, "{name}");
            }
            let found = read_by_qemu(&self.bench, name, format);
            let first = found.iter().zip(held).position(|(a, b)| a != b);
            assert!(first.is_none(), "{name} at {first:?}");
        }
        let guest = &mut self.guest;
        guest.disk = open_disk(&guest.path, &AnyPath, &guest.options).unwrap();
    }
}

fn stirred(number: u64) -> u64 {
    number
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(0x9e37_79b9_7f4a_7c15)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn a_disk_its_chain_and_its_backups_hold_what_they_are_to_whatever_is_done() {
    let steps = number("LIVE_STEPS").unwrap_or(8);
    let count = seeds().saturating_mul(2);
    let range = number("LIVE_SEED").map_or(0..count, |seed| seed..seed.saturating_add(1));
    for seed in range {
        let Some(bench) = Bench::with_qemu() else {
            return;
        };
        let mut world = World::new(bench, seed);
        for step in 0..steps {
            // However far it came beside the last one.
            world.guest.random = stirred(world.random);
            world.guest.work(6);
            println!("{seed}.{step}");
            let what = world.step();
            println!("{seed}.{step}: {what}");
            world.guest.work(2);
            if world.next(2) == 0 {
                world.look();
            } else {
                world.guest.holds_its_model();
            }
        }
        world.look();
    }
}
